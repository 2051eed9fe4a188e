"""Operations of wallet owners without a chain: bills, quotes, histories, waiting."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from deepsquare_chain.chain.bindings import reverts
from deepsquare_chain.chain.bindings.events import (
    Event,
    JobCollected,
    JobPanicked,
    JobResult,
    JobRetried,
    JobSettled,
    JobSubmitted,
    JobToppedUp,
    JobTransition,
)
from deepsquare_chain.chain.rpc.endpoint import TransientEndpointError, WrongEndpointError
from deepsquare_chain.client import jobs as client_jobs
from deepsquare_chain.client import submission
from deepsquare_chain.client.jobs import (
    Ended,
    History,
    inherit,
    newest,
    parse_statuses,
    replay,
    watch,
)
from deepsquare_chain.client.offers import cheapest, quote
from deepsquare_chain.client.submission import Bill
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.errors import (
    EndpointError,
    InsufficientFundsError,
    UsageError,
    WaitTimeoutError,
)
from deepsquare_chain.job import (
    Hardware,
    Job,
    JobFlags,
    JobStatus,
    Objective,
    Offer,
    Prices,
    Provider,
    ProviderStatus,
    Resources,
    Terms,
)
from tests.support.workloads import job

ALICE, ALPINE, JURA = "0xA", "0xB", "0xC"
TERMS = Terms(
    amount=CREDIT,
    time_limit=100,
    resources=Resources(tasks=2, cpus_per_task=2, mem_per_cpu=10, gpus=0),
    retries=1,
    flags=JobFlags.NONE,
    objective=Objective.TIME,
    name="work",
    uses="site=alpine",
)
PROVIDER = Provider(
    id=1,
    account=ALPINE,
    status=ProviderStatus.ACTIVE,
    approved_until=1_000,
    version=1,
    pending_version=1,
    hardware=Hardware(1, 8, 800, 0),
    offer=Offer(8, 800, 0),
    prices=Prices(cpu=CREDIT // 1_000, gpu=0, mem=0),
    labels={"site": "alpine"},
)
JOB = job(
    1,
    customer=ALICE,
    since=0,
    resources=TERMS.resources,
    retries_left=1,
    time_limit=TERMS.time_limit,
    fee_bps=500,
)


# ------------------------------------------------------------------ bills


def bill(**changes: Any) -> Bill:
    values = {"customer": ALICE, "jobs": 2, "total": 10, "balance": 10, "allowance": 10}
    return Bill(**(values | {"gas_wei": 5, "gas_balance": 5} | changes))


def test_a_balance_that_covers_the_bill_to_the_wei_is_accepted() -> None:
    bill().check()
    assert not bill().approval
    assert bill(allowance=9).approval


@pytest.mark.parametrize("short", [{"balance": 9}, {"gas_balance": 4}, {"gas_balance": 0}])
def test_a_balance_that_lacks_a_wei_is_refused_with_a_hint(short: dict[str, int]) -> None:
    with pytest.raises(InsufficientFundsError) as error_info:
        bill(**short).check()
    assert error_info.value.exit_code == 5
    assert "faucet" in error_info.value.hint


# ----------------------------------------------------------------- quotes


def test_quote_prices_the_limit_and_the_escrow() -> None:
    result = quote(PROVIDER, TERMS, now=0)
    assert (result.rate, result.cost) == (4 * CREDIT // 1_000, 400 * CREDIT // 1_000)
    assert result.seconds == 250
    assert result.eligible


@pytest.mark.parametrize(
    ("provider", "terms", "now", "silent", "message"),
    [
        ({"status": ProviderStatus.BANNED}, {}, 0, False, "banned"),
        ({"status": ProviderStatus.WAITING_APPROVAL}, {}, 0, False, "waiting approval"),
        ({"status": ProviderStatus.DRAINING}, {}, 0, False, "draining"),
        ({}, {}, 1_000, False, "approval has expired"),
        ({}, {}, 0, True, "silent"),
        ({"offer": Offer(3, 800, 0)}, {}, 0, False, "exceeds its"),
        ({"hardware": Hardware(1, 3, 800, 0)}, {}, 0, False, "exceeds its"),
        ({"labels": {"site": "jura"}}, {}, 0, False, "labels"),
        ({"prices": Prices(0, 0, 0)}, {}, 0, False, "no price"),
        ({}, {"amount": 400 * CREDIT // 1_000 - 1}, 0, False, "over budget"),
    ],
)
def test_quote_gives_the_reason(
    provider: dict[str, Any], terms: dict[str, Any], now: int, silent: bool, message: str
) -> None:
    result = quote(replace(PROVIDER, **provider), replace(TERMS, **terms), now=now, silent=silent)
    assert message in result.refusal
    assert not result.eligible


def test_the_cheapest_offer_skips_providers_that_are_not_eligible() -> None:
    free = quote(replace(PROVIDER, prices=Prices(0, 0, 0)), TERMS, now=0)
    good = quote(PROVIDER, TERMS, now=0)
    assert cheapest([free, good]) is good
    assert cheapest([free]) is None


# -------------------------------------------------------------- histories


def moved(job: int, after: JobStatus, provider: str = ALPINE) -> JobTransition:
    return JobTransition(job, ALICE, provider, JobStatus.PENDING, after)


def lost_and_continued() -> list[Event]:
    return [
        JobSubmitted(1, ALICE, bytes(32), TERMS),
        JobToppedUp(1, ALICE, 5, CREDIT + 5, 100),
        moved(1, JobStatus.META_SCHEDULED),
        moved(1, JobStatus.PANICKED),
        JobPanicked(1, JURA, "gone"),
        JobRetried(1, 2, CREDIT + 5),
        moved(2, JobStatus.META_SCHEDULED, JURA),
        JobResult(2, 0, bytes(32), "exited"),
        JobCollected(2, JURA, ALICE, 5, 50, 2, CREDIT - 47, 95),
        JobSettled(2, JURA, ALICE, 2, 20, 1, CREDIT - 68),
    ]


def test_history_of_a_chain_of_retries_follows_from_its_events() -> None:
    result = {1: History(1), 2: History(2)}
    replay(result, lost_and_continued())
    inherit(result)
    first, second = result[1], result[2]
    assert (first.funded, first.carried_in, first.successor) == (CREDIT + 5, 0, 2)
    assert (first.provider, first.reason, first.exit_code) == (ALPINE, "gone", None)
    assert (second.funded, second.carried_in, second.retry_of) == (0, CREDIT + 5, 1)
    assert (second.paid, second.fee, second.refunded) == (70, 3, CREDIT - 68)
    assert second.collected == 52
    assert (second.billed_seconds, second.exit_code, second.provider) == (7, 0, JURA)
    assert (second.name, second.uses, second.objective) == ("work", TERMS.uses, Objective.TIME)
    assert second.carried_in == second.paid + second.fee + second.refunded


def test_events_of_other_jobs_change_nothing() -> None:
    result = {9: History(9)}
    replay(result, lost_and_continued())
    assert result == {9: History(9)}


# ---------------------------------------------------------------- waiting


class FakeScheduler:
    """Returns one record after the other; the last one repeatedly."""

    def __init__(self, *records: Job) -> None:
        self._records = {record.id: [] for record in records}
        for record in records:
            self._records[record.id].append(record)

    async def get_job(self, job_id: int) -> Job:
        responses = self._records[job_id]
        return responses.pop(0) if len(responses) > 1 else responses[0]

    async def job_count(self) -> int:
        return len(self._records)

    async def get_jobs(self, job_ids: Any) -> list[Job]:
        return [self._records[number][0] for number in job_ids]


class FakeContracts:
    def __init__(self, *records: Job) -> None:
        self.scheduler = FakeScheduler(*records)


def ended(status: JobStatus, code: int | None) -> Ended:
    return Ended(replace(JOB, status=status), History(1, exit_code=code))


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [
        (JobStatus.FINISHED, 0, 0),
        (JobStatus.FAILED, 3, 3),
        (JobStatus.FAILED, 255, 255),
        (JobStatus.FAILED, 256, 1),
        (JobStatus.FAILED, -9, 1),
        (JobStatus.OUT_OF_CREDITS, 143, 143),
        (JobStatus.OUT_OF_CREDITS, 0, 1),
        (JobStatus.CANCELLED, None, 1),
        (JobStatus.PANICKED, None, 1),
    ],
)
def test_exit_code_is_that_of_the_job(status: JobStatus, code: int | None, exit_code: int) -> None:
    assert ended(status, code).exit_code == exit_code


async def test_watch_follows_every_successor(monkeypatch: pytest.MonkeyPatch) -> None:
    records = (
        JOB,
        replace(JOB, status=JobStatus.RUNNING),
        replace(JOB, status=JobStatus.PANICKED),
        replace(JOB, id=2, retry_of=1),
        replace(JOB, id=2, retry_of=1, status=JobStatus.FINISHED),
    )
    messages = {1: History(1, successor=2), 2: History(2, exit_code=0)}

    async def histories(_contracts: object, ids: list[int]) -> dict[int, History]:
        return {number: messages[number] for number in ids}

    monkeypatch.setattr(client_jobs, "histories", histories)
    changes: list[tuple[int, JobStatus]] = []
    result = await watch(
        FakeContracts(*records),  # type: ignore[arg-type]
        1,
        interval=0,
        on_change=lambda job: changes.append((job.id, job.status)),
    )
    assert (result.job.id, result.exit_code) == (2, 0)
    assert changes == [(record.id, record.status) for record in records]


async def test_watch_reports_a_job_without_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    async def histories(_contracts: object, ids: list[int]) -> dict[int, History]:
        return {number: History(number, exit_code=0) for number in ids}

    monkeypatch.setattr(client_jobs, "histories", histories)
    polls = client_jobs.POLLS_BEFORE_EXPLANATION + 1
    claimed = replace(JOB, status=JobStatus.META_SCHEDULED, provider_id=1)
    records = (
        *(JOB for _ in range(2 * polls)),
        *(claimed for _ in range(polls)),
        # A running job makes progress, however long it runs.
        *(replace(JOB, status=JobStatus.RUNNING) for _ in range(4 * polls)),
        replace(JOB, status=JobStatus.FINISHED),
    )
    rested: list[JobStatus] = []
    await watch(
        FakeContracts(*records),  # type: ignore[arg-type]
        1,
        interval=0,
        on_waiting=lambda job: rested.append(job.status),
    )
    assert rested == [JobStatus.PENDING, JobStatus.PENDING, JobStatus.META_SCHEDULED]


@pytest.mark.parametrize(
    "error",
    [
        TransientEndpointError("HTTP status 502"),
        TransientEndpointError("transaction indexing is in progress"),
        EndpointError("HTTP status 403"),
    ],
)
async def test_watch_continues_while_the_endpoint_fails(
    monkeypatch: pytest.MonkeyPatch, error: EndpointError
) -> None:
    """Reads of records and of events are retried; each outage is reported once."""
    answers: list[Any] = [error, error, JOB, error, replace(JOB, status=JobStatus.FINISHED)]
    messages: list[str] = []

    async def get_job(_job_id: int) -> Job:
        result = answers.pop(0)
        if isinstance(result, EndpointError):
            raise result
        return result  # type: ignore[no-any-return]

    async def histories(_contracts: object, ids: list[int]) -> dict[int, History]:
        if failures:
            raise failures.pop()
        return {number: History(number, exit_code=0) for number in ids}

    failures = [error, error]
    monkeypatch.setattr(client_jobs, "histories", histories)
    monkeypatch.setattr(client_jobs, "RETRY_PAUSES", (0.001, 0.002))
    contracts: Any = SimpleNamespace(scheduler=SimpleNamespace(get_job=get_job))
    result = await watch(
        contracts,
        1,
        interval=0,
        on_outage=lambda item: messages.append("back" if item is None else item.message),
    )
    assert result.exit_code == 0
    assert messages == [error.message, "back"] * 3


async def test_watch_ends_where_waiting_does_not_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_jobs, "RETRY_PAUSES", (0.001, 0.002))
    errors: list[EndpointError] = [TransientEndpointError("away"), WrongEndpointError("another")]

    async def get_job(_job_id: int) -> Job:
        raise errors[0] if len(errors) == 1 else errors.pop(0)

    contracts: Any = SimpleNamespace(scheduler=SimpleNamespace(get_job=get_job))
    with pytest.raises(WrongEndpointError):
        await watch(contracts, 1, interval=0)
    errors[:] = [TransientEndpointError("away")]
    with pytest.raises(TransientEndpointError):
        await watch(contracts, 1, interval=0, timeout=0.02)


async def test_watch_gives_up_in_time() -> None:
    with pytest.raises(WaitTimeoutError) as error_info:
        await watch(FakeContracts(JOB), 1, interval=0, timeout=0)  # type: ignore[arg-type]
    assert "PENDING" in error_info.value.message


# ------------------------------------------------------------------ lists


def test_statuses_by_name() -> None:
    assert parse_statuses([]) == set(JobStatus) - {JobStatus.NONE}
    assert parse_statuses(["running", "out-of-credits"]) == {
        JobStatus.RUNNING,
        JobStatus.OUT_OF_CREDITS,
    }
    for name in ("none", "done"):
        with pytest.raises(UsageError):
            parse_statuses([name])


async def test_newest_jobs_of_one_customer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def histories(_contracts: object, ids: list[int]) -> dict[int, History]:
        return {number: History(number, name=f"job {number}") for number in ids}

    monkeypatch.setattr("deepsquare_chain.client.jobs.histories", histories)
    monkeypatch.setattr("deepsquare_chain.client.jobs._PAGE", 2)
    records = [replace(JOB, id=n, customer=ALICE if n % 2 else JURA) for n in range(1, 8)]
    contracts: Any = FakeContracts(*records)
    all_statuses = set(JobStatus)
    result = await newest(contracts, limit=3, customer=ALICE, statuses=all_statuses)
    assert [(job.id, messages.name) for job, messages in result] == [
        (7, "job 7"),
        (5, "job 5"),
        (3, "job 3"),
    ]
    named_jobs = await newest(contracts, limit=3, statuses=all_statuses, names=["job [24]", "none"])
    assert [job.id for job, _ in named_jobs] == [4, 2]
    assert await newest(contracts, limit=3, provider_id=4, statuses=all_statuses) == []


@pytest.mark.parametrize(
    ("lost_allowances", "expected_approvals"), [(0, 0), (1, 0), (3, 1), (7, 3)]
)
async def test_an_allowance_that_another_folder_uses_up_is_given_again(
    monkeypatch: pytest.MonkeyPatch, lost_allowances: int, expected_approvals: int
) -> None:
    """Each allowance is tried twice; the first `lost_allowances` payments find it used by another submission."""
    monkeypatch.setattr(submission, "_ALLOWANCE_RETRIES", (2, 0.0))
    approvals: list[str] = []

    async def pay() -> Any:
        approvals.append("pay")
        if approvals.count("pay") <= lost_allowances:
            raise reverts.ERC20InsufficientAllowance
        return "a receipt"

    async def allow() -> None:
        approvals.append("allow")

    assert await submission.pay_with_allowance(pay, allow) == "a receipt"
    assert approvals.count("allow") == expected_approvals
    assert approvals.count("pay") == lost_allowances + 1


async def test_an_allowance_that_is_always_used_up_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(submission, "_ALLOWANCE_RETRIES", (2, 0.0))

    async def pay() -> Any:
        raise reverts.ERC20InsufficientAllowance

    async def allow() -> None:
        pass

    with pytest.raises(reverts.ERC20InsufficientAllowance):
        await submission.pay_with_allowance(pay, allow)
