"""The arithmetic of `deepsquare_chain.credits` equals the contract's, to the wei, on random values."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from deepsquare_chain import credits as money
from deepsquare_chain.job import Hardware, JobStatus, Offer, Prices, Resources
from tests.support.evm import person
from tests.support.grid import UNTIL_SPENT, Grid, Host

pytestmark = pytest.mark.contracts
MAX_PRICE = 10 * 10**18
quick = settings(
    max_examples=120,
    deadline=None,
    # each example reverts its snapshot
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def near(*values: int, low: int, high: int) -> st.SearchStrategy[int]:
    """Numbers of a range, often next to a given number or a bound."""
    edges = {v + d for v in (*values, low, high) for d in (-1, 0, 1)}
    return st.sampled_from(sorted(v for v in edges if low <= v <= high)) | st.integers(low, high)


usual_prices = st.builds(
    Prices, cpu=st.integers(0, 10**13), gpu=st.integers(0, 10**13), mem=st.integers(0, 10**10)
)
prices = usual_prices | st.builds(
    Prices,
    cpu=near(low=0, high=MAX_PRICE),
    gpu=near(low=0, high=MAX_PRICE),
    mem=near(low=0, high=MAX_PRICE),
)
usual_resources = st.builds(
    Resources,
    tasks=st.integers(1, 40),
    cpus_per_task=st.integers(1, 16),
    mem_per_cpu=st.integers(1, 4_000),
    gpus=st.integers(0, 8),
)
resources = usual_resources | st.builds(
    Resources,
    tasks=near(low=1, high=65_535),
    cpus_per_task=near(low=1, high=65_535),
    mem_per_cpu=near(low=1, high=2**24 - 1),
    gpus=near(low=0, high=65_535),
)


@st.composite
def clusters(draw: Any, resources_needed: Resources) -> tuple[Hardware, Offer]:
    """Hardware and offer about as large as a job, so that both sides of each limit occur."""
    # At most one part is short in most cases, or hardly anything would fit.
    short = draw(st.sampled_from((None, None, None, "cpus", "memory", "nodes", "share")))

    def slack(part: str) -> int:
        return draw(st.integers(0, 1)) - (short == part)

    per_node = draw(st.integers(1, 4))
    cpus = min(65_535, max(1, per_node * resources_needed.cpus_per_task + slack("cpus")))
    memory = per_node * resources_needed.cpus_per_task * resources_needed.mem_per_cpu + slack(
        "memory"
    )
    memory = min(2**32 - 1, max(1, memory))
    nodes = -(-resources_needed.tasks // per_node) + slack("nodes")
    nodes = max(1, min(nodes, 2**24 - 1, (2**48 - 1) // memory, (2**32 - 1) // cpus))
    gpus = min(65_535, -(-resources_needed.gpus // nodes))
    whole = (nodes * cpus, nodes * memory, nodes * gpus)
    required = (resources_needed.cpus, resources_needed.memory, resources_needed.gpus)
    tight = draw(st.integers(0, 2))
    share = [
        max(0, min(total, need + slack("share") if index == tight else total))
        for index, (total, need) in enumerate(zip(whole, required, strict=True))
    ]
    return Hardware(nodes, cpus, memory, gpus), Offer(*share)


@st.composite
def cases(draw: Any) -> tuple[Any, ...]:
    resources_needed = draw(resources)
    hardware, offer = draw(clusters(resources_needed))
    tariff = draw(prices)
    rate = money.job_rate(tariff, resources_needed)
    limit = draw(near(low=1, high=2**24 - 1) | st.integers(1, 1_000))
    need = money.cost(rate, limit)
    amount = draw(
        st.sampled_from((need - 1, need, need + 1, 2 * need + 7, 2**96 - 1))
        | st.integers(1, 2**96 - 1)
    )
    amount = min(max(amount, 1), 2**96 - 1)
    return resources_needed, hardware, offer, tariff, limit, amount, draw(st.booleans())


def set_up(grid: Grid, case: tuple[Any, ...]) -> tuple[Host, int]:
    """Create a provider and a PENDING job for a case."""
    resources_needed, hardware, offer, tariff, limit, amount, until_spent = case
    host = grid.provider(
        "generated",
        hardware=dict(
            zip(
                ("nodes", "cpusPerNode", "memPerNode", "gpusPerNode"),
                (
                    hardware.nodes,
                    hardware.cpus_per_node,
                    hardware.mem_per_node,
                    hardware.gpus_per_node,
                ),
                strict=True,
            )
        ),
        prices={"cpu": tariff.cpu, "gpu": tariff.gpu, "mem": tariff.mem},
    )
    given_offer = {"cpus": offer.cpus, "mem": offer.memory, "gpus": offer.gpus}
    grid.registry.setOffer(given_offer, sender=host.account)
    grid.credit.mint(grid.alice, 2**97, sender=grid.admin)
    job_id = grid.submit(
        amount=amount,
        timeLimit=limit,
        tasks=resources_needed.tasks,
        cpusPerTask=resources_needed.cpus_per_task,
        memPerCpu=resources_needed.mem_per_cpu,
        gpus=resources_needed.gpus,
        flags=UNTIL_SPENT if until_spent else 0,
    )
    return host, job_id


def verdict(case: tuple[Any, ...]) -> str:
    """Return the expected result of the contract for a case, computed in Python."""
    resources_needed, hardware, offer, tariff, limit, amount, _ = case
    rate = money.job_rate(tariff, resources_needed)
    if not money.fits(hardware, offer, resources_needed):
        return "DoesNotFit"
    if not 0 < rate < 2**72:
        return "RateOutOfRange"
    return "OverBudget" if money.cost(rate, limit) > amount else ""


FITTING = (Resources(3, 2, 10, 1), Hardware(2, 4, 40, 1), Offer(6, 60, 1), Prices(7, 11, 13))


@quick
@given(case=cases())
@example(case=(*FITTING, 10, 8_330, False))
@example(case=(*FITTING, 10, 8_329, False))
def test_fit_rate_and_budget(deployed: Grid, case: tuple[Any, ...]) -> None:
    event(verdict(case) or "eligible")
    before = deployed.chain.snapshot()
    try:
        host, job_id = set_up(deployed, case)
        eligible, reason = deployed.scheduler.isEligible(job_id, host.id)
        assert ("" if eligible else deployed.chain.error_name(reason)) == verdict(case)
        if eligible:
            deployed.assign(host, job_id)
            assert deployed.job(job_id).rate == money.job_rate(case[3], case[0])
    finally:
        deployed.chain.revert(before)


@quick
@given(
    tariff=prices,
    fee_bps=near(low=0, high=2_000),
    limit=st.integers(1, 10_000) | near(low=1, high=2**24 - 1),
    spare=st.integers(0, 10**6) | st.integers(0, 2**94),
    until_spent=st.booleans(),
    elapsed=st.integers(0, 12_000) | st.integers(0, 2**25),
    reported=st.none() | st.integers(0, 12_000) | near(low=0, high=2**32 - 1),
    exit_code=st.sampled_from((0, 1, -1)),
)
def test_allotment_bill_and_split(
    deployed: Grid,
    tariff: Prices,
    fee_bps: int,
    limit: int,
    spare: int,
    until_spent: bool,
    elapsed: int,
    reported: int | None,
    exit_code: int,
) -> None:
    resources_needed = Resources(2, 3, 50, 1)
    rate = money.job_rate(tariff, resources_needed)
    if not 0 < rate < 2**72:
        tariff = Prices(tariff.cpu % 2**60, tariff.gpu % 2**60, tariff.mem % 2**50 + 1)
        rate = money.job_rate(tariff, resources_needed)
    amount = min(money.cost(rate, limit) + spare, 2**96 - 1)
    reported = elapsed if reported is None else reported
    hardware, offer = Hardware(1, 6, 300, 1), Offer(6, 300, 1)
    grid = deployed
    before = grid.chain.snapshot()
    try:
        grid.scheduler.setFee(fee_bps, sender=grid.admin)
        host, job_id = set_up(
            grid, (resources_needed, hardware, offer, tariff, limit, amount, until_spent)
        )
        grid.assign(host, job_id)
        grid.scheduler.claim([job_id], sender=host.account)
        grid.scheduler.start([job_id], sender=host.account)
        allotted = money.allotment(limit, until_spent, amount, rate)
        assert grid.scheduler.allotment(job_id) == allotted
        grid.chain.advance(elapsed)
        settled = grid.finish(host, job_id, reported, exit_code).one("JobSettled")
        expected = money.settle(
            escrow=amount,
            rate=rate,
            fee_bps=fee_bps,
            time_limit=limit,
            until_spent=until_spent,
            reported=reported,
            elapsed=elapsed,
        )
        assert (settled.billedSeconds, settled.paid, settled.fee, settled.refunded) == (
            expected.billed_seconds,
            expected.paid,
            expected.fee,
            expected.refunded,
        )
        assert grid.balance(person("generated")) == expected.paid
        assert grid.balance(grid.treasury) == expected.fee
        status = JobStatus.FAILED if exit_code else JobStatus.FINISHED
        if expected.billed_seconds == allotted:
            status = JobStatus.OUT_OF_CREDITS
        assert grid.status(job_id) is status
    finally:
        grid.chain.revert(before)
