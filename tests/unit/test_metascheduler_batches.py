"""Transactions of a cycle: their size, refusals, backoff, and dry runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from structlog.testing import capture_logs

from deepsquare_chain.chain.bindings import reverts
from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.chain.bindings.events import TransitionSkipped
from deepsquare_chain.chain.transactions.outbox import TxReceipt
from deepsquare_chain.daemon.batcher import Backoff, TransactionBatch, TransactionBatcher
from deepsquare_chain.errors import (
    EndpointError,
    GridError,
    InsufficientFundsError,
    RevertedError,
)
from deepsquare_chain.job import JobStatus, Prices
from deepsquare_chain.metascheduler.batches import SchedulerBatches

NOW = 1_000
ONE, TWO = (1, Prices(1, 1, 1)), (2, Prices(2, 2, 2))


class FakeContract:
    """Makes calls whose labels contain their arguments."""

    def meta_schedule(self, groups: Any) -> Call:
        ids_by_provider = {number: ids for (number, _), ids in groups.items()}
        return Call("", b"", f"assign {ids_by_provider}")

    def requeue(self, ids: Any) -> Call:
        return Call("", b"", f"requeue {list(ids)}")

    def panic(self, ids: Any) -> Call:
        return Call("", b"", f"panic {list(ids)}")

    def cancel(self, ids: Any) -> Call:
        return Call("", b"", f"cancel {list(ids)}")

    def challenge(self, job_id: int) -> Call:
        return Call("", b"", f"challenge {job_id}")


@dataclass
class FakeSender:
    """Mines everything, skips some jobs, or fails."""

    skips: set[int] = field(default_factory=set)
    reason: type[reverts.ContractError] = reverts.TooEarly
    error: GridError | None = None
    sent: list[str] = field(default_factory=list)

    async def send(self, call: Call, **_: Any) -> TxReceipt:
        self.sent.append(call.label)
        if self.error is not None:
            raise self.error
        events = tuple(
            TransitionSkipped(job_id, JobStatus.PENDING, self.reason.selector)
            for job_id in self.skips
        )
        return TxReceipt("0x1", 7, "0x2", 21_000, 1, events)


@dataclass
class Bench:
    sender: FakeSender
    batches: SchedulerBatches
    counts: list[tuple[str, int, int]]


def bench(sender: FakeSender | None = None, size: int = 50) -> Bench:
    sender = sender or FakeSender()
    counts: list[tuple[str, int, int]] = []
    batches = SchedulerBatches(
        sender,  # type: ignore[arg-type]
        FakeContract(),  # type: ignore[arg-type]
        size=size,
        timeout=1,
        count=lambda *arguments: counts.append(arguments),
    )
    return Bench(sender, batches, counts)


async def test_groups_are_cut_at_the_size() -> None:
    result = bench(size=2)
    assert await result.batches.assign({ONE: [1, 2, 3], TWO: [4, 5]}, NOW) == 5
    assert result.sender.sent == [
        "assign {1: [1, 2]}",
        "assign {1: [3], 2: [4]}",
        "assign {2: [5]}",
    ]
    assert result.counts == [("assign", 2, 0), ("assign", 2, 0), ("assign", 1, 0)]
    assert result.batches.mined_at == 7


async def test_other_kinds_are_cut_too() -> None:
    result = bench(size=2)
    assert await result.batches.requeue([1, 2, 3], NOW) == 3
    assert await result.batches.panic([4], NOW) == 1
    assert await result.batches.challenge(9, NOW) == 1
    assert result.sender.sent == ["requeue [1, 2]", "requeue [3]", "panic [4]", "challenge 9"]


async def test_expired_jobs_are_cancelled_one_transaction_a_cycle() -> None:
    result = bench(size=2)
    assert await result.batches.cancel([1, 2, 3], NOW) == 2
    assert result.sender.sent == ["cancel [1, 2]"]


@pytest.mark.parametrize("reason", [reverts.PriceRaised, reverts.DoesNotFit])
async def test_a_refusal_because_of_the_provider_gives_it_a_cooldown_and_the_job_none(
    reason: Any,
) -> None:
    result = bench(FakeSender(skips={2, 3}, reason=reason))
    batches, sender = result.batches, result.sender
    assert await batches.assign({ONE: [1], TWO: [2, 3]}, NOW) == 1
    assert batches.due("assign", [2, 3], NOW) == [2, 3]
    assert (batches.cooldown_until(1), batches.cooldown_until(2)) == (0, NOW + 2)
    assert batches.refusals == 2
    # Again, as a call without any effect: the cooldown is longer each time, up to a maximum.
    sender.error = reason("refused", fields={"job_id": 2})
    cooldown_ends = []
    for _ in range(9):
        await batches.assign({TWO: [2, 3], ONE: [1]}, NOW)
        cooldown_ends.append(batches.cooldown_until(2) - NOW)
    assert cooldown_ends == [4, 8, 16, 32, 64, 128, 256, 512, 600]
    assert batches.due("assign", [1, 2, 3], NOW) == [1, 2, 3]
    assert batches.cooldown_until(1) == 0
    # An assignment that succeeds ends the series.
    sender.error, sender.skips = None, set()
    await batches.assign({TWO: [2, 3]}, NOW + 600)
    assert batches.cooldown_until(2) == 0


async def test_a_refusal_because_of_the_job_gives_the_provider_no_cooldown() -> None:
    result = bench(FakeSender(skips={2}, reason=reverts.ProviderExcluded))
    await result.batches.assign({ONE: [1, 2]}, NOW)
    assert result.batches.cooldown_until(1) == 0
    assert result.batches.due("assign", [1, 2], NOW) == [1]
    result.sender.error = reverts.InvalidTransition("moved", fields={"job_id": 3})
    await result.batches.assign({ONE: [3]}, NOW)
    assert result.batches.due("assign", [3], NOW) == []
    assert result.batches.refusals == 0


async def test_nothing_to_do_sends_nothing() -> None:
    result = bench()
    assert await result.batches.assign({}, NOW) == 0
    assert await result.batches.requeue([], NOW) == 0
    assert result.sender.sent == []


async def test_skipped_jobs_have_a_longer_backoff_each_time() -> None:
    result = bench(FakeSender(skips={2}))
    assert await result.batches.requeue([1, 2], NOW) == 1
    assert result.counts == [("requeue", 1, 1)]
    assert result.batches.due("requeue", [1, 2], NOW + 1) == [1]
    assert result.batches.due("requeue", [1, 2], NOW + 2) == [1, 2]
    # The backoff of one kind of transaction does not apply to another.
    assert result.batches.due("assign", [2], NOW) == [2]
    await result.batches.requeue([2], NOW + 2)
    assert result.batches.due("requeue", [2], NOW + 5) == []
    assert result.batches.due("requeue", [2], NOW + 6) == [2]
    now = NOW + 6
    for pause in (8, 16, 32, 64, 128, 256, 512, 600, 600):
        await result.batches.requeue([2], now)
        assert result.batches.due("requeue", [2], now + pause - 1) == []
        now += pause
    result.sender.skips = set()
    await result.batches.requeue([2], now)
    assert result.batches.due("requeue", [2], NOW) == [2]


@pytest.mark.parametrize(
    ("error", "is_cooldown"),
    [
        (RevertedError("TooEarly"), True),
        (InsufficientFundsError("no gas"), True),
        (EndpointError("down"), False),
    ],
)
async def test_failures_end_no_cycle(error: GridError, is_cooldown: bool) -> None:
    result = bench(FakeSender(error=error))
    with capture_logs() as logs:
        assert await result.batches.challenge(3, NOW) == 0
    assert [entry["message"] if "message" in entry else entry["error"] for entry in logs]
    assert (result.batches.due("challenge", [3], NOW) == []) is is_cooldown
    result.sender.sent.clear()
    await result.batches.challenge(3, NOW)
    assert bool(result.sender.sent) is not is_cooldown


async def test_a_failure_that_lasts_is_logged_once_in_five_minutes_until_a_batch_is_mined() -> None:
    clock = [0.0]
    sender = FakeSender(error=EndpointError("The signer does not answer", hint="Start it."))
    batcher = TransactionBatcher(
        "scheduler",
        sender,  # type: ignore[arg-type]
        timeout=1,
        count=lambda *_: None,
        backoff=Backoff(2, 600),
    )

    async def warnings(at: float) -> int:
        clock[0] = at
        with capture_logs() as logs:
            await batcher.send(
                TransactionBatch("assign", (1,), Call("", b"", "")), lambda: clock[0]
            )
        return sum(entry["event"] == "batch not sent" for entry in logs)

    assert [await warnings(at) for at in (0, 1, 299, 300, 301)] == [1, 0, 0, 1, 0]
    sender.error = EndpointError("The signer refused")
    assert await warnings(302) == 1  # another failure
    sender.error = None
    assert await warnings(303) == 0
    sender.error = EndpointError("The signer refused")
    assert await warnings(304) == 1


async def test_a_dry_run_logs_each_planned_action_once() -> None:
    batches = SchedulerBatches(
        None,
        FakeContract(),  # type: ignore[arg-type]
        size=50,
        timeout=1,
        count=lambda *_: pytest.fail("nothing was sent"),
    )
    with capture_logs() as logs:
        for _ in range(3):
            assert await batches.assign({ONE: [4, 5]}, NOW) == 0
    assert [(entry["event"], entry["jobs"]) for entry in logs] == [("batch simulated", [4, 5])]
