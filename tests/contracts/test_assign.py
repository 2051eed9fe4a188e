"""metaSchedule, selfSchedule and isEligible apply the same rules of eligibility."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from deepsquare_chain.job import JobStatus
from tests.support.evm import Reverted, person, reverts
from tests.support.grid import (
    APPROVAL_PERIOD,
    FEE_BPS,
    HARDWARE,
    PRICES,
    RATE,
    TERMS,
    TIMES,
    UNTIL_SPENT,
    Grid,
    Host,
    assignment,
)

pytestmark = pytest.mark.contracts
WAIT = TIMES["pendingTimeout"]


def refusal(grid: Grid, job_id: int, provider_id: int) -> str:
    eligible, reason = grid.scheduler.isEligible(job_id, provider_id)
    assert eligible == (reason == b"\0" * 4)
    return "" if eligible else grid.chain.error_name(reason)


def attempt(call: Callable[[], object]) -> str:
    try:
        call()
    except Reverted as refused:
        return refused.name
    return ""


def agreed(grid: Grid, host: Host, job_id: int) -> str:
    """Return the result of the three functions for a job and a provider; they must agree."""
    grid.chain.advance(WAIT)
    view = refusal(grid, job_id, host.id)
    before = grid.chain.snapshot()
    assert attempt(lambda: grid.assign(host, job_id)) == view
    grid.chain.revert(before)
    before = grid.chain.snapshot()
    assert attempt(lambda: grid.scheduler.selfSchedule([job_id], sender=host.account)) == view
    grid.chain.revert(before)
    return view


# ------------------------------------------------------------------ metaSchedule


def test_assignment_fixes_provider_rate_and_fee(grid: Grid, host: Host) -> None:
    job_id = grid.submit()
    grid.chain.advance(5)
    receipt = grid.assign(host, job_id)

    job = grid.job(job_id)
    assert (job.status, job.providerId) == (JobStatus.META_SCHEDULED, host.id)
    assert (job.rate, job.feeBps, job.since) == (RATE, FEE_BPS, grid.chain.now)
    assert (job.escrow, job.timeLimit) == (TERMS["amount"], TERMS["timeLimit"])
    assert receipt.one("JobTransition").parameters == {
        "jobId": job_id,
        "customer": grid.alice,
        "provider": host.account,
        "from": JobStatus.PENDING,
        "to": JobStatus.META_SCHEDULED,
    }
    assert receipt.one("JobPriced").parameters == {
        "jobId": job_id,
        "provider": host.account,
        "rate": RATE,
        "feeBps": FEE_BPS,
    }
    assert grid.balance(grid.scheduler.address) == TERMS["amount"]


def test_later_prices_and_fees_never_reach_back(grid: Grid, host: Host) -> None:
    job_id = grid.running(host)
    grid.registry.setPrices({"cpu": 1, "gpu": 1, "mem": 1}, sender=host.account)
    grid.scheduler.setFee(2_000, sender=grid.admin)
    grid.chain.advance(10)
    settled = grid.finish(host, job_id, 10).one("JobSettled")
    assert settled.paid + settled.fee == RATE * 10
    assert settled.fee == RATE * 10 * FEE_BPS // 10_000


def test_a_price_raised_just_before_an_assignment_is_limited_by_the_ceiling(
    grid: Grid, host: Host
) -> None:
    """escrow / timeLimit limits the price, even if a provider raises it just before."""
    job_id = grid.submit(amount=RATE * 600)
    grid.registry.setPrices(PRICES | {"cpu": PRICES["cpu"] + 1}, sender=host.account)
    with reverts("OverBudget", job_id):
        grid.assign(host, job_id)


def test_an_offer_reduced_just_before_an_assignment_is_respected(grid: Grid, host: Host) -> None:
    job_id = grid.submit()
    grid.registry.setOffer({"cpus": 5, "mem": 600, "gpus": 1}, sender=host.account)
    with reverts("DoesNotFit", job_id):
        grid.assign(host, job_id)


def test_only_the_role_may_assign(grid: Grid, host: Host) -> None:
    job_id = grid.submit()
    role = grid.scheduler.METASCHEDULER_ROLE()
    for caller in (grid.alice, host.account, grid.admin, grid.stranger):
        with reverts("AccessControlUnauthorizedAccount", caller, role):
            grid.scheduler.metaSchedule([assignment(host.id, job_id)], sender=caller)
    with reverts("AccessControlUnauthorizedAccount"):
        grid.scheduler.metaSchedule([], sender=grid.stranger)


def test_each_group_goes_to_its_provider(grid: Grid, host: Host, other: Host) -> None:
    ids = [grid.submit() for _ in range(4)]
    grid.scheduler.metaSchedule(
        [
            assignment(host.id, ids[0], ids[3]),
            assignment(other.id, ids[1]),
            assignment(host.id, ids[2]),
        ],
        sender=grid.meta,
    )
    assert [j.providerId for j in grid.scheduler.getJobs(ids)] == [
        host.id,
        other.id,
        host.id,
        host.id,
    ]


def test_a_batch_skips_refused_jobs_with_the_reason(grid: Grid, host: Host) -> None:
    affordable, underfunded, large = grid.submit(), grid.submit(amount=1), grid.submit(tasks=100)
    receipt = grid.assign(host, 999, underfunded, affordable, large, affordable)
    skipped = [
        (e.jobId, JobStatus(e.status), grid.chain.error_name(e.reason))
        for e in receipt.named("TransitionSkipped")
    ]
    assert skipped == [
        (999, JobStatus.NONE, "InvalidTransition"),
        (underfunded, JobStatus.PENDING, "OverBudget"),
        (large, JobStatus.PENDING, "DoesNotFit"),
        (affordable, JobStatus.META_SCHEDULED, "InvalidTransition"),
    ]
    assert len(receipt.named("JobTransition")) == 1
    assert [grid.status(i) for i in (underfunded, large)] == [JobStatus.PENDING] * 2


def test_an_invalid_group_does_not_affect_a_valid_one(grid: Grid, host: Host) -> None:
    one, two = grid.submit(), grid.submit()
    receipt = grid.scheduler.metaSchedule(
        [assignment(77, one), assignment(host.id, two)],
        sender=grid.meta,
    )
    assert receipt.one("TransitionSkipped").jobId == one
    assert grid.status(two) is JobStatus.META_SCHEDULED


def test_a_batch_without_effect_reverts_with_the_first_reason(grid: Grid, host: Host) -> None:
    underfunded, large = grid.submit(amount=1), grid.submit(tasks=100)
    with reverts("OverBudget", underfunded):
        grid.assign(host, underfunded, large, 999)
    with reverts("InvalidTransition", 999, JobStatus.NONE, JobStatus.META_SCHEDULED):
        grid.assign(host, 999, underfunded, large)


@pytest.mark.parametrize("assignments", [[], [assignment(1)]])
def test_an_empty_batch_is_refused(grid: Grid, host: Host, assignments: list[object]) -> None:
    with reverts("EmptyBatch"):
        grid.scheduler.metaSchedule(assignments, sender=grid.meta)


@pytest.mark.parametrize("status", [s for s in JobStatus if s is not JobStatus.PENDING])
def test_only_pending_jobs_are_assigned(grid: Grid, host: Host, status: JobStatus) -> None:
    job_id = grid.in_status(status, host)
    assert agreed(grid, grid.provider("free provider"), job_id) == "InvalidTransition"
    with reverts("InvalidTransition", job_id, status, JobStatus.META_SCHEDULED):
        grid.assign(host, job_id)


# -------------------------------------------------- eligibility, through all three


def test_a_provider_in_good_standing_is_eligible(grid: Grid, host: Host) -> None:
    assert agreed(grid, host, grid.submit()) == ""


def test_unknown_and_waiting_providers_get_nothing(grid: Grid) -> None:
    job_id = grid.submit()
    grid.register(person("waiting"))
    assert grid.registry.idOf(person("waiting")) == 0
    assert agreed(grid, Host(0, person("waiting")), job_id) == "ProviderNotActive"
    assert agreed(grid, Host(0, grid.stranger), job_id) == "ProviderNotActive"
    assert refusal(grid, job_id, 65_535) == "ProviderNotActive"


def test_draining_and_banned_providers_get_nothing(grid: Grid, host: Host) -> None:
    job_id = grid.submit()
    grid.registry.setDraining(True, sender=host.account)
    assert agreed(grid, host, job_id) == "ProviderNotActive"
    grid.registry.ban(host.account, "", sender=grid.admin)
    assert agreed(grid, host, job_id) == "ProviderNotActive"
    grid.registry.unban(host.account, sender=grid.admin)
    assert agreed(grid, host, job_id) == "ProviderNotActive"
    grid.registry.setDraining(False, sender=host.account)
    assert agreed(grid, host, job_id) == ""


def test_an_approval_holds_to_its_last_second(grid: Grid, host: Host) -> None:
    job_id = grid.submit()
    approved_until = grid.registry.getProvider(host.account).approvedUntil
    assert approved_until == grid.chain.now + APPROVAL_PERIOD
    grid.chain.advance(APPROVAL_PERIOD - WAIT)
    assert agreed(grid, host, job_id) == ""
    assert grid.chain.now == approved_until
    grid.chain.advance(1)
    assert refusal(grid, job_id, host.id) == "ProviderNotActive"
    assert agreed(grid, host, job_id) == "ProviderNotActive"
    grid.registry.approve(host.account, 1, sender=grid.admin)
    assert agreed(grid, host, job_id) == ""


def test_an_expired_or_draining_provider_ends_what_it_has(grid: Grid, host: Host) -> None:
    one, two = grid.assigned(host), grid.assigned(host)
    grid.registry.setDraining(True, sender=host.account)
    grid.scheduler.claim([one, two], sender=host.account)
    grid.chain.advance(APPROVAL_PERIOD + 1)
    grid.scheduler.start([one, two], sender=host.account)
    grid.registry.ban(host.account, "", sender=grid.admin)
    grid.chain.advance(5)
    receipt = grid.scheduler.finish([grid.report(one, 5), grid.report(two, 5)], sender=host.account)
    assert len(receipt.named("JobSettled")) == 2


def test_a_silent_provider_gets_nothing_until_it_answers(grid: Grid, host: Host) -> None:
    assigned, job_id = grid.assigned(host), grid.submit()
    grid.silence(host, assigned)
    assert agreed(grid, host, job_id) == "ProviderSilent"
    grid.scheduler.answer(sender=host.account)
    assert agreed(grid, host, job_id) == ""


def test_a_provider_that_lost_a_predecessor_is_excluded_for_ever(
    grid: Grid, host: Host, other: Host
) -> None:
    first = grid.running(host, retries=2)
    second = grid.scheduler.panic([first], "", sender=host.account).one("JobRetried").successor
    assert agreed(grid, host, second) == "ProviderExcluded"
    assert agreed(grid, other, second) == ""
    grid.assign(other, second)
    grid.scheduler.claim([second], sender=other.account)
    grid.scheduler.start([second], sender=other.account)
    third = grid.scheduler.panic([second], "", sender=other.account).one("JobRetried").successor
    assert agreed(grid, host, third) == "ProviderExcluded"
    assert agreed(grid, other, third) == "ProviderExcluded"
    assert agreed(grid, grid.provider("third provider"), third) == ""
    # other jobs are not affected
    assert agreed(grid, host, grid.submit()) == ""


@pytest.mark.parametrize(
    ("terms", "fits"),
    [
        # a node holds 8 / 3 = 2 tasks of 3 cpus, four nodes hold 8
        ({"tasks": 8, "cpusPerTask": 3, "gpus": 0, "amount": 10**12}, True),
        ({"tasks": 9, "cpusPerTask": 3, "gpus": 0, "amount": 10**12}, False),
        ({"tasks": 4, "cpusPerTask": 8, "gpus": 0, "amount": 10**12}, True),
        ({"tasks": 1, "cpusPerTask": 9, "gpus": 0, "amount": 10**12}, False),
        ({"tasks": 32, "cpusPerTask": 1, "memPerCpu": 1_000, "amount": 10**12}, True),
        ({"tasks": 32, "cpusPerTask": 1, "memPerCpu": 1_001, "amount": 10**12}, False),
        # the memory of a node holds seven
        ({"tasks": 28, "cpusPerTask": 1, "memPerCpu": 1_001, "amount": 10**12}, True),
        ({"tasks": 29, "cpusPerTask": 1, "memPerCpu": 1_001, "amount": 10**12}, False),
        ({"tasks": 1, "cpusPerTask": 1, "memPerCpu": 8_001}, False),
        ({"gpus": 8, "amount": 10**12}, True),
        ({"gpus": 9, "amount": 10**12}, False),
        # products of the largest fields
        ({"tasks": 65_535, "cpusPerTask": 65_535, "memPerCpu": 2**24 - 1}, False),
        ({"tasks": 65_535, "cpusPerTask": 1, "memPerCpu": 2**24 - 1}, False),
    ],
)
def test_fit_is_by_node_and_by_offer(
    grid: Grid, host: Host, terms: dict[str, int], fits: bool
) -> None:
    assert agreed(grid, host, grid.submit(**terms)) == ("" if fits else "DoesNotFit")


@pytest.mark.parametrize(
    ("offer", "fits"),
    [
        ({"cpus": 6, "mem": 600, "gpus": 1}, True),
        ({"cpus": 5, "mem": 600, "gpus": 1}, False),
        ({"cpus": 6, "mem": 599, "gpus": 1}, False),
        ({"cpus": 6, "mem": 600, "gpus": 0}, False),
        ({"cpus": 0, "mem": 0, "gpus": 0}, False),
    ],
)
def test_the_whole_job_keeps_within_the_offer(
    grid: Grid, host: Host, offer: dict[str, int], fits: bool
) -> None:
    grid.registry.setOffer(offer, sender=host.account)
    assert agreed(grid, host, grid.submit()) == ("" if fits else "DoesNotFit")


def test_the_escrow_must_buy_the_time_limit_to_the_wei(grid: Grid, host: Host) -> None:
    assert agreed(grid, host, grid.submit(amount=RATE * 600)) == ""
    assert agreed(grid, host, grid.submit(amount=RATE * 600 - 1)) == "OverBudget"
    assert agreed(grid, host, grid.submit(amount=RATE * 600, flags=UNTIL_SPENT)) == ""
    assert agreed(grid, host, grid.submit(amount=RATE * 600 - 1, flags=UNTIL_SPENT)) == "OverBudget"
    assert agreed(grid, host, grid.submit(amount=RATE, timeLimit=1)) == ""


def test_a_rate_of_zero_is_refused(grid: Grid) -> None:
    free = grid.provider("free", prices={"cpu": 0, "gpu": 1, "mem": 0})
    assert agreed(grid, free, grid.submit(gpus=0)) == "RateOutOfRange"
    assert agreed(grid, free, grid.submit(gpus=1)) == ""


def test_a_rate_of_more_than_72_bits_is_refused(grid: Grid) -> None:
    grid.credit.mint(grid.alice, 2**97, sender=grid.admin)
    cap = 10 * 10**18
    big = {"nodes": 2**24 - 1, "cpusPerNode": 255, "memPerNode": 2**24 - 1, "gpusPerNode": 1}
    expensive = grid.provider("dear", hardware=big, prices={"cpu": cap, "gpu": 0, "mem": 0})
    terms = {"amount": 2**96 - 1, "timeLimit": 1, "cpusPerTask": 1, "memPerCpu": 1, "gpus": 0}
    within = (2**72 - 1) // cap
    assert agreed(grid, expensive, grid.submit(tasks=within, **terms)) == ""
    assert agreed(grid, expensive, grid.submit(tasks=within + 1, **terms)) == "RateOutOfRange"


def test_the_largest_rate_and_limit_do_not_spill_into_other_fields(grid: Grid) -> None:
    grid.credit.mint(grid.alice, 2**97, sender=grid.admin)
    rate = 2**72 - 1  # = 255 x 18519084246547628289, within the price cap x 472
    price = rate // 255
    assert price * 255 == rate
    # one cpu can't cost that much, so the memory price carries it
    shape = {"tasks": 255, "cpusPerTask": 1, "memPerCpu": 2, "gpus": 0}
    big = {"nodes": 300, "cpusPerNode": 1, "memPerNode": 2, "gpusPerNode": 0}
    prices = {"cpu": price - 2 * (price // 4), "gpu": 0, "mem": price // 4}
    host = grid.provider("big", hardware=big, prices=prices)
    job_id = grid.submit(amount=2**96 - 1, timeLimit=2**24 - 1, **shape)
    assert (2**72 - 1) * (2**24 - 1) < 2**96 - 1
    grid.assign(host, job_id)
    job = grid.job(job_id)
    assert (job.rate, job.timeLimit, job.escrow) == (2**72 - 1, 2**24 - 1, 2**96 - 1)
    assert (job.tasks, job.feeBps, job.customer) == (255, FEE_BPS, grid.alice)
    grid.scheduler.claim([job_id], sender=host.account)
    grid.scheduler.start([job_id], sender=host.account)
    grid.chain.advance(2**24)
    settled = grid.finish(host, job_id, 2**32 - 1).one("JobSettled")
    assert settled.paid + settled.fee == (2**72 - 1) * (2**24 - 1)
    assert settled.refunded == 2**96 - 1 - (2**72 - 1) * (2**24 - 1)


def test_unapproved_hardware_does_not_count(grid: Grid, host: Host) -> None:
    job_id = grid.submit(tasks=33, cpusPerTask=1, amount=10**12, gpus=0)
    assert agreed(grid, host, job_id) == "DoesNotFit"
    version = grid.register(host.account, hardware=HARDWARE | {"nodes": 5})
    assert agreed(grid, host, job_id) == "DoesNotFit"
    grid.registry.approve(host.account, version, sender=grid.admin)
    assert agreed(grid, host, job_id) == ""


# ------------------------------------------------------------------- selfSchedule


def test_self_scheduling_waits_for_the_scheduler(grid: Grid, host: Host) -> None:
    job_id = grid.submit()
    grid.chain.advance(WAIT - 1)
    with reverts("TooEarly", job_id):
        grid.scheduler.selfSchedule([job_id], sender=host.account)
    grid.chain.advance(1)
    receipt = grid.scheduler.selfSchedule([job_id], sender=host.account)
    assert receipt.one("JobPriced").rate == RATE
    job = grid.job(job_id)
    assert (job.status, job.providerId, job.feeBps) == (
        JobStatus.META_SCHEDULED,
        host.id,
        FEE_BPS,
    )


def test_the_wait_starts_again_after_a_requeue(grid: Grid, host: Host, other: Host) -> None:
    job_id = grid.assigned(host)
    grid.chain.advance(WAIT)
    grid.scheduler.requeue([job_id], "", sender=host.account)
    grid.chain.advance(WAIT - 1)
    with reverts("TooEarly", job_id):
        grid.scheduler.selfSchedule([job_id], sender=other.account)
    grid.chain.advance(1)
    grid.scheduler.selfSchedule([job_id], sender=other.account)


def test_a_provider_that_returned_a_job_cannot_assign_it_to_itself(grid: Grid, host: Host) -> None:
    """Otherwise a provider could hold a job for ever by taking and returning it."""
    job_id = grid.submit()
    grid.chain.advance(WAIT)
    grid.scheduler.selfSchedule([job_id], sender=host.account)
    grid.scheduler.requeue([job_id], "", sender=host.account)
    grid.chain.advance(WAIT)
    with reverts("ProviderExcluded", job_id):
        grid.scheduler.selfSchedule([job_id], sender=host.account)
    grid.assign(host, job_id)


def test_a_provider_that_let_a_job_time_out_cannot_assign_it_to_itself(
    grid: Grid, host: Host, other: Host
) -> None:
    job_id = grid.assigned(host)
    grid.chain.advance(TIMES["claimTimeout"] + 1)
    grid.scheduler.requeue([job_id], "", sender=grid.stranger)
    assert grid.scheduler.isBarred(job_id, host.id)
    assert not grid.scheduler.isBarred(job_id, other.id)
    grid.chain.advance(WAIT)
    with reverts("ProviderExcluded", job_id):
        grid.scheduler.selfSchedule([job_id], sender=host.account)
    # the scheduler may decide otherwise
    assert refusal(grid, job_id, host.id) == ""
    grid.assign(host, job_id)


def test_self_scheduling_batches_skip(grid: Grid, host: Host) -> None:
    old = grid.submit()
    grid.chain.advance(WAIT)
    recent, underfunded = grid.submit(), grid.submit(amount=1)
    receipt = grid.scheduler.selfSchedule([recent, old, old, underfunded], sender=host.account)
    assert [grid.chain.error_name(e.reason) for e in receipt.named("TransitionSkipped")] == [
        "TooEarly",
        "InvalidTransition",
        "TooEarly",
    ]
    with reverts("EmptyBatch"):
        grid.scheduler.selfSchedule([], sender=host.account)
