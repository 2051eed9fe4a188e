"""Parts of the provider's service with a fake chain, executor and store that fail on request."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from deepsquare_chain.chain.bindings.abi import interface
from deepsquare_chain.chain.bindings.contracts import MetaSchedulerContract
from deepsquare_chain.chain.bindings.events import TransitionSkipped
from deepsquare_chain.chain.bindings.reverts import ERRORS, decode_revert
from deepsquare_chain.chain.rpc.batching import gather_all
from deepsquare_chain.chain.rpc.heads import Head, HeadSource
from deepsquare_chain.chain.transactions.nonce_manager import Spender
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.daemon.service import FATAL
from deepsquare_chain.errors import (
    EndpointError,
    GridError,
    InsufficientFundsError,
    NotFoundError,
    UsageError,
)
from deepsquare_chain.executors.base import (
    ExecutorUnavailableError,
    Exit,
    RunRefusedError,
    RunState,
    RunStatus,
)
from deepsquare_chain.job import Job, JobStatus, Offer, Resources
from deepsquare_chain.observability.metrics import Metrics
from deepsquare_chain.provider import actions as actions_module
from deepsquare_chain.provider import model
from deepsquare_chain.provider.actions import ExecutorActions, ProviderBatches
from deepsquare_chain.provider.model import DefinitionState, Lookup, Phase, Run, View
from deepsquare_chain.provider.observer import DefinitionCache, RunObserver
from deepsquare_chain.provider.outputs import find_run, has_ended, read_output
from deepsquare_chain.provider.service import (
    ProviderMetrics,
    ProviderService,
    ProviderSettings,
    _MaintenanceSignals,
)
from deepsquare_chain.provider.state import RunTable
from deepsquare_chain.store.database import Store
from deepsquare_chain.store.definitions import DefinitionMismatch
from deepsquare_chain.workflow import Definition, Step
from tests.support import workloads

ME = "0x15d34AAf54267DB7D7c367839AAf71A00a2C6A65"
CONTRACT = "0x5FbDB2315678afecb367f032d93F642f64180aa3"
SMALL = Resources(1, 1, 64, 0)
DEFINITION = Definition(resources=SMALL, env={}, steps=(Step.simple("only", "echo"),))
ENDED = Exit(0, "exited", 7, 1.0, 8.0)
LIVE = RunStatus(RunState.RUNNING)


def job(number: int = 1, status: JobStatus = JobStatus.RUNNING, **changes: Any) -> Job:
    defaults = {"customer": ME, "since": 100, "provider_id": 1, "resources": SMALL, "rate": 1}
    return workloads.job(
        number, status=status, **(defaults | {"definition": DEFINITION.digest} | changes)
    )


def view(number: int = 1, run: Run | None = None, **changes: Any) -> View:
    return View(job(number), run or Run(number, f"31337-5fbdb231-{number}"), mine=True, **changes)


@pytest.fixture
def table() -> Iterator[RunTable]:
    with Store.open(None, chain_id=31337, contract=CONTRACT, account=ME) as store:
        yield RunTable(store, ME, chain_id=31337, contract=CONTRACT)


# ------------------------------------------------------------------------- cache


class FakeDefinitionStore:
    """A definition store with a given result."""

    def __init__(self, answer: bytes | Exception | None) -> None:
        self.answer = answer
        self.calls = 0

    async def get(self, digest: bytes, job_id: int | None = None) -> bytes:
        self.calls += 1
        if self.answer is None:
            await asyncio.sleep(60)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def put(self, data: bytes) -> bytes:
        raise NotImplementedError


class TestDefinitionCache:
    @pytest.mark.parametrize(
        ("answer", "state", "reason"),
        [
            (DEFINITION.to_bytes(), DefinitionState.READY, ""),
            (NotFoundError("no"), DefinitionState.MISSING, "is not in the store"),
            (DefinitionMismatch("no"), DefinitionState.MISSING, "does not match its digest"),
            (b"other bytes", DefinitionState.MISSING, "does not match its digest"),
            (EndpointError("down"), DefinitionState.UNREACHABLE, "down"),
            (GridError("full"), DefinitionState.UNREACHABLE, "full"),
            (OSError("io"), DefinitionState.UNREACHABLE, "io"),
            (None, DefinitionState.UNREACHABLE, "can't be fetched"),
        ],
    )
    async def test_answers(self, answer, state, reason):
        result = await DefinitionCache(FakeDefinitionStore(answer), timeout=0.05).fetch(job())
        assert result.state is state
        assert reason in result.reason

    async def test_invalid_for_ever(self):
        data = b'{"version":1}'
        record = job(definition=hashlib.sha256(data).digest())
        definition_store = FakeDefinitionStore(data)
        cache = DefinitionCache(definition_store)
        for _ in range(2):
            assert (await cache.fetch(record)).state is DefinitionState.INVALID
        assert definition_store.calls == 1
        assert cache.definition(record) is None

    async def test_a_definition_that_requires_more_than_the_record_is_invalid(self):
        cache = DefinitionCache(FakeDefinitionStore(DEFINITION.to_bytes()))
        result = await cache.fetch(job(resources=Resources(1, 2, 64, 0)))
        assert result.state is DefinitionState.INVALID
        assert "1 x 1 CPUs" in result.reason
        assert (await cache.fetch(job())).state is DefinitionState.READY

    async def test_missing_data_is_requested_again(self):
        definition_store = FakeDefinitionStore(NotFoundError("no"))
        cache = DefinitionCache(definition_store)
        assert (await cache.fetch(job())).state is DefinitionState.MISSING
        definition_store.answer = DEFINITION.to_bytes()
        assert (await cache.fetch(job())).state is DefinitionState.READY
        assert cache.definition(job()) == DEFINITION


# --------------------------------------------------------------------------- batches


@dataclass
class FakeSender:
    """Records sent batches; responds with skipped jobs or an error."""

    skipped: dict[int, bytes] = field(default_factory=dict)
    error: Exception | None = None
    calls: list[Any] = field(default_factory=list)
    gates: dict[str, asyncio.Event] = field(default_factory=dict)
    cut: list[str] = field(default_factory=list)

    async def send(self, call: Any, *, timeout: float) -> Any:
        self.calls.append(call)
        try:
            if call.label in self.gates:
                await self.gates[call.label].wait()
        except asyncio.CancelledError:
            self.cut.append(call.label)
            raise
        if self.error is not None:
            raise self.error
        events = tuple(
            TransitionSkipped(job_id, JobStatus.PENDING, reason)
            for job_id, reason in self.skipped.items()
        )
        return SimpleNamespace(events=events, block_number=42, gas_used=1)

    @property
    def labels(self) -> list[str]:
        return [call.label for call in self.calls]


class TestBatches:
    @pytest.fixture
    def counts(self) -> dict[str, int]:
        return {}

    def make(self, sender: FakeSender, counts: dict[str, int], size: int = 50) -> ProviderBatches:
        def count(kind: str, moved: int, _refused: int) -> None:
            if moved:
                counts[kind] = counts.get(kind, 0) + moved

        scheduler = MetaSchedulerContract(SimpleNamespace(), CONTRACT)
        return ProviderBatches(sender, scheduler, size=size, timeout=1, count=count)

    async def test_one_transaction_for_each_kind_and_reason(self, counts):
        sender = FakeSender()
        work = self.make(sender, counts)
        actions = [
            (view(1), model.Claim()),
            (view(2), model.Claim()),
            (view(3), model.Start()),
            (view(11), model.ClaimAndStart()),
            (view(12), model.Collect()),
            (view(13), model.Collect()),
            (view(4), model.RunReport(5, 0, "")),
            (view(5), model.RunReport(6, 2**40, "x")),
            (view(6), model.Requeue("a")),
            (view(7), model.Requeue("b")),
            (view(8), model.Requeue("a")),
            (view(9), model.Panic("a")),
            (view(10), model.Wait("")),
        ]
        with capture_logs() as logs:
            assert await work.send(actions) == 12
        reasons = {entry["label"]: entry.get("reason", "") for entry in logs}
        assert (reasons["requeue job 7"], reasons["start job 3"]) == ("b", "")
        assert sorted(sender.labels) == sorted(
            [
                *("claim 2 jobs", "claimAndStart job 11", "start job 3", "collect 2 jobs"),
                "finish 2 jobs",
                *("requeue 2 jobs", "requeue job 7", "panic job 9"),
            ]
        )
        assert counts == {
            "claim": 2,
            "claim_and_start": 1,
            "start": 1,
            "collect": 2,
            "finish": 2,
            "requeue": 3,
            "panic": 1,
        }
        assert work.mined_at == 42

    async def test_a_transaction_that_misses_the_block_continues_in_the_background(self, counts):
        sender = FakeSender()
        work = self.make(sender, counts)
        release = sender.gates["finish job 2"] = asyncio.Event()
        actions = [(view(1), model.Claim()), (view(2), model.RunReport(5, 0, ""))]
        assert await work.send(actions) == 1
        assert (work.jobs, counts) == ({2}, {"claim": 1})
        assert await work.send([]) == 0  # without actions it does not wait
        release.set()
        await work.close()
        assert (work.jobs, counts) == (frozenset(), {"claim": 1, "finish": 1})

    async def test_jobs_of_earlier_transactions_count_when_they_are_mined(self, counts):
        sender = FakeSender()
        work = self.make(sender, counts)
        release = sender.gates["finish job 2"] = asyncio.Event()
        await work.send([(view(1), model.Claim()), (view(2), model.RunReport(5, 0, ""))])
        release.set()
        assert await work.send([(view(3), model.Claim())]) == 2
        assert work.jobs == frozenset()

    async def test_closing_cancels_transactions_that_do_not_end(self, counts):
        sender = FakeSender()
        work = self.make(sender, counts)
        sender.gates["finish job 2"] = asyncio.Event()
        await work.send([(view(1), model.Claim()), (view(2), model.RunReport(5, 0, ""))])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await work.close()
        await asyncio.sleep(0)
        assert (work.jobs, sender.cut) == (frozenset(), ["finish job 2"])

    async def test_an_unexpected_error_is_raised(self, counts):
        work = self.make(FakeSender(error=ZeroDivisionError("!")), counts)
        with pytest.raises(ZeroDivisionError):
            await work.send([(view(1), model.Claim())])
        assert work.jobs == frozenset()

    async def test_large_work_is_cut(self, counts):
        sender = FakeSender()
        work = self.make(sender, counts, size=2)
        await work.send([(view(number), model.Claim()) for number in range(1, 6)])
        assert sender.labels == ["claim 2 jobs", "claim 2 jobs", "claim job 5"]

    async def test_a_skipped_job_has_a_backoff(self, counts, monkeypatch):
        clock = [0.0]
        monkeypatch.setattr(actions_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
        sender = FakeSender(skipped={2: next(iter(ERRORS))})
        work = self.make(sender, counts)
        actions = [(view(1), model.Claim()), (view(2), model.Claim())]
        assert await work.send(actions) == 1
        assert await work.send(actions) == 1
        assert sender.labels == ["claim 2 jobs", "claim job 1"]
        clock[0] += 1.1
        await work.send(actions)
        clock[0] += 1.1
        await work.send(actions)
        assert sender.labels[2:] == ["claim 2 jobs", "claim job 1"]
        work.forget([2])
        await work.send(actions)
        assert sender.labels[-1] == "claim 2 jobs"

    async def test_a_refused_interim_payment_does_not_hold_up_the_report(self, counts):
        sender = FakeSender(skipped={1: next(iter(ERRORS))})
        work = self.make(sender, counts)
        assert await work.send([(view(1), model.Collect())]) == 0
        assert not work.would_send([(view(1), model.Collect()), (view(1), model.Wait(""))])
        sender.skipped.clear()
        assert work.would_send([(view(1), model.RunReport(5, 0, ""))])
        assert await work.send([(view(1), model.RunReport(5, 0, ""))]) == 1

    @pytest.mark.parametrize(
        ("error", "again"),
        [
            (decode_revert(b"\x00" * 4), False),
            (InsufficientFundsError("no gas"), False),
            (EndpointError("down"), True),
        ],
    )
    async def test_a_doomed_transaction_is_not_repeated_at_once(self, counts, error, again):
        sender = FakeSender(error=error)
        work = self.make(sender, counts)
        for _ in range(2):
            assert await work.send([(view(1), model.Claim())]) == 0
        assert len(sender.calls) == 1 + again
        assert counts == {}

    async def test_answer(self, counts):
        sender = FakeSender()
        await self.make(sender, counts).answer()
        assert counts == {"answer": 1}


# -------------------------------------------------------------------------- handlers


class FakeExecutor:
    """An executor that records its calls, and the run record at each call."""

    queues = False

    def __init__(self, table: RunTable | None = None) -> None:
        self.table = table
        self.calls: list[tuple[Any, ...]] = []
        self.error: Exception | None = None
        self.printed = b"0123456789" * 10_000
        self.known: set[str] = set()
        self.statuses: dict[str, RunStatus] = {}

    def note(self, *call: Any) -> None:
        self.calls.append(call)
        if self.error is not None:
            raise self.error

    async def submit(self, spec: Any) -> str:
        assert self.table is not None
        row = self.table.get(1)
        assert row is not None
        assert row.phase is Phase.SUBMITTING, "the intent is written first"
        self.note("submit", spec.key, spec.walltime)
        self.spec = spec
        return "h1"

    async def find(self, key: str) -> str | None:
        self.note("find", key)
        return key if key in self.known else None

    async def poll(self, handles: list[str]) -> dict[str, RunStatus]:
        self.note("poll", *handles)
        return {handle: self.statuses[handle] for handle in handles if handle in self.statuses}

    async def cancel(self, handle: str) -> None:
        self.note("cancel", handle)

    async def extend(self, handle: str, walltime: int) -> None:
        self.note("extend", handle, walltime)

    async def capacity(self) -> Offer:
        self.note("capacity")
        return Offer(1, 2, 3)

    async def fault(self) -> str:
        self.note("fault")
        return ""

    async def output(self, handle: str, offset: int = 0, limit: int = 65536) -> bytes:
        self.note("output", offset)
        return self.printed[offset : offset + limit]

    async def keys(self) -> list[str]:
        self.note("keys")
        return sorted(self.known)


@pytest.fixture
def executor(table: RunTable) -> FakeExecutor:
    return FakeExecutor(table)


@pytest.fixture
async def handlers(table: RunTable, executor: FakeExecutor) -> ExecutorActions:
    cache = DefinitionCache(FakeDefinitionStore(DEFINITION.to_bytes()))
    await cache.fetch(job())
    return ExecutorActions(executor, table, cache, {"DEEPSQUARE_CHAIN_ID": "31337"})


SUBMITTED = Run(1, "31337-5fbdb231-1", Phase.SUBMITTED, handle="h1", allotment=60, lead=2)


class TestExecutorActions:
    async def test_submit(self, handlers, executor, table):
        assert await handlers.carry_out([(view(), model.Submit(58, 60, 2))]) == 1
        assert table.get(1) == SUBMITTED
        assert b"DEEPSQUARE_JOB_ID=1" in executor.spec.script
        assert b"DEEPSQUARE_CHAIN_ID=31337" in executor.spec.script

    async def test_refused_submit_is_remembered(self, handlers, executor, table):
        executor.error = RunRefusedError("too large")
        await handlers.carry_out([(view(), model.Submit(58, 60, 2))])
        row = table.get(1)
        assert (row.phase, row.note) == (Phase.REFUSED, "too large")

    async def test_unclear_submit_stays_an_intent(self, handlers, executor, table):
        executor.error = ExecutorUnavailableError("busy")
        assert await handlers.carry_out([(view(), model.Submit(58, 60, 2))]) == 0
        assert table.get(1).phase is Phase.SUBMITTING

    async def test_a_failure_of_one_job_does_not_affect_others(self, handlers, executor, table):
        executor.error = ExecutorUnavailableError("busy")
        actions = [(view(1), model.Submit(58, 60, 2)), (view(2), model.Adopt("h2"))]
        assert await handlers.carry_out(actions) == 1
        assert table.get(2).handle == "h2"

    async def test_end_is_written_with_the_digest_of_all_output(self, handlers, executor, table):
        await handlers.carry_out([(view(run=SUBMITTED), model.RecordEnd(ENDED))])
        row = table.get(1)
        assert (row.phase, row.exit) == (Phase.ENDED, ENDED)
        assert row.result == hashlib.sha256(executor.printed).digest()
        executor.error = NotFoundError("gone")
        await handlers.carry_out([(view(run=SUBMITTED), model.RecordEnd(ENDED))])
        assert table.get(1).result == bytes(32)

    async def test_extend(self, handlers, executor, table):
        await handlers.carry_out([(view(run=SUBMITTED), model.Extend(88, 90))])
        assert executor.calls == [("extend", "h1", 88)]
        assert table.get(1).allotment == 90
        executor.error = NotFoundError("gone")
        with capture_logs() as logs:
            for _ in range(3):  # every cycle retries, and it is logged once
                actions = [(view(run=SUBMITTED), model.Extend(98, 100))]
                assert await handlers.carry_out(actions) == 0
        assert [entry["event"] for entry in logs] == ["run not extended"]
        assert table.get(1).allotment == 90

    @pytest.mark.parametrize("action", [model.Close(), model.Release()])
    async def test_nothing_of_an_unknown_run_is_left(self, handlers, executor, table, action):
        unknown = RunStatus(RunState.UNKNOWN)
        await handlers.carry_out([(view(run=SUBMITTED, status=unknown), action)])
        assert executor.calls == [("cancel", "h1")]
        executor.calls.clear()
        cut_off = Run(1, "31337-5fbdb231-1", Phase.SUBMITTING)
        await handlers.carry_out([(view(run=cut_off), action)])
        assert executor.calls == [("cancel", "31337-5fbdb231-1")]
        executor.calls.clear()
        ended = RunStatus(RunState.ENDED, ENDED)
        await handlers.carry_out([(view(run=SUBMITTED, status=ended), action)])
        assert executor.calls == []

    async def test_release_gives_another_key(self, handlers, executor, table):
        ended_run = replace(SUBMITTED, phase=Phase.ENDED, exit=ENDED)
        await handlers.carry_out([(view(run=ended_run), model.Release())])
        assert table.get(1) == Run(1, "31337-5fbdb231-1.1", attempt=1)

    async def test_cancel(self, handlers, executor):
        await handlers.carry_out([(view(run=SUBMITTED), model.Cancel("x"))])
        assert executor.calls == [("cancel", "h1")]

    async def test_transactions_are_not_executor_actions(self, handlers, executor):
        for action in (model.Claim(), model.Wait(""), model.Panic("x"), model.RunReport(1, 0, "")):
            assert await handlers.carry_out([(view(), action)]) == 0
        assert executor.calls == []


# -------------------------------------------------------------------------- observer


class FakeScheduler:
    """Records by block."""

    def __init__(self, *records: Job) -> None:
        self.now = {record.id: record for record in records}
        self.before = dict(self.now)
        self.blocks: list[Any] = []
        self.calls: list[list[int]] = []

    async def get_jobs(self, ids, *, block):
        self.blocks.append(block)
        self.calls.append(list(ids))
        is_past = block < 20
        return [(self.before if is_past else self.now)[job_id] for job_id in ids]


class TestObserver:
    def make(self, scheduler, executor, table, confirmations=1) -> RunObserver:
        return RunObserver(
            scheduler,
            executor,
            table,
            DefinitionCache(FakeDefinitionStore(DEFINITION.to_bytes())),
            provider_id=1,
            confirmations=confirmations,
            first_block=5,
        )

    async def look(self, observer: RunObserver, block: bytes = b"a") -> View:
        [result] = await observer.views(Head(20, 1_000, block))
        return result

    async def test_asks_for_a_record_once_a_block(self, executor, table):
        scheduler = FakeScheduler(job(1), job(2))
        observer = self.make(scheduler, executor, table)
        table.watch(1)
        await self.look(observer, b"a")
        await self.look(observer, b"a")
        assert sorted(scheduler.blocks) == [19, 20]
        table.watch(2)
        views = await observer.views(Head(20, 1_000, b"a"))
        assert [item.job.id for item in views] == [1, 2]
        assert scheduler.calls[2:] == [[2], [2]]
        await observer.views(Head(20, 1_000, b"b"))
        assert scheduler.calls[4:] == [[1, 2], [1, 2]]

    async def test_asks_for_a_key_only_where_the_answer_decides(self, executor, table):
        scheduler = FakeScheduler(job(status=JobStatus.META_SCHEDULED))
        observer = self.make(scheduler, executor, table)
        table.watch(1)
        assert (await self.look(observer)).lookup is None
        table.put(table.get(1).starting())
        assert (await self.look(observer)).lookup is None
        scheduler.now[1] = job(status=JobStatus.RUNNING)
        assert (await self.look(observer, b"b")).lookup == Lookup(None)
        executor.known.add("31337-5fbdb231-1")
        assert (await self.look(observer, b"b")).lookup == Lookup("31337-5fbdb231-1")
        table.put(SUBMITTED)
        executor.statuses["h1"] = LIVE
        result = await self.look(observer, b"b")
        assert (result.lookup, result.status) == (None, LIVE)

    async def test_a_start_that_the_executor_counts_is_placed(self, executor, table):
        observer = self.make(FakeScheduler(job()), executor, table)
        submitting = Run(1, SUBMITTED.key, Phase.SUBMITTING)
        table.put(submitting)
        assert not (await self.look(observer)).placed
        executor.known.add(SUBMITTED.key)
        assert (await self.look(observer)).placed
        executor.error = ExecutorUnavailableError("down")
        assert not (await self.look(observer)).placed
        executor.error = None
        executor.queues = True  # queued runs occupy no capacity
        assert not (await self.look(observer)).placed

    async def test_counts_responses_without_a_run(self, executor, table):
        observer = self.make(FakeScheduler(job()), executor, table)
        table.put(SUBMITTED)
        executor.statuses["h1"] = RunStatus(RunState.UNKNOWN)
        assert [(await self.look(observer)).misses for _ in range(3)] == [1, 2, 3]
        executor.known.add(SUBMITTED.key)
        assert (await self.look(observer)).misses == 0
        executor.known.clear()
        assert (await self.look(observer)).misses == 1

    async def test_an_executor_that_does_not_respond_does_not_mean_a_missing_run(
        self, executor, table
    ):
        observer = self.make(FakeScheduler(job()), executor, table)
        table.put(SUBMITTED)
        executor.error = ExecutorUnavailableError("down")
        result = await self.look(observer)
        assert (result.status, result.lookup, result.misses) == (None, None, 0)
        assert await observer.free() is None

    async def test_settled_once_confirmed_blocks_agree(self, executor, table):
        scheduler = FakeScheduler(job())
        scheduler.before[1] = job(status=JobStatus.SCHEDULED)
        table.watch(1)
        assert not (await self.look(self.make(scheduler, executor, table))).settled
        assert scheduler.blocks == [20, 19]
        assert (await self.look(self.make(scheduler, executor, table, 0))).settled
        scheduler.before[1] = job()
        assert (await self.look(self.make(scheduler, executor, table, 3))).settled

    async def test_orphaned_runs_of_the_executor_get_records(self, executor, table):
        executor.known |= {"31337-5fbdb231-1.2", "1-5fbdb231-9", "something"}
        scheduler = FakeScheduler(job(status=JobStatus.FINISHED))
        observer = self.make(scheduler, executor, table)
        await observer.sweep()
        [row] = table.all()
        assert (row.job_id, row.attempt, row.key) == (1, 2, "31337-5fbdb231-1.2")
        assert (await self.look(observer)).lookup == Lookup("31337-5fbdb231-1.2")

    async def test_other_peoples_jobs_need_no_definition(self, executor, table):
        table.watch(1)
        observer = self.make(FakeScheduler(job(provider_id=2)), executor, table)
        result = await self.look(observer)
        assert (result.mine, result.cached_definition.state) == (False, DefinitionState.PENDING)


# ---------------------------------------------------------------------------- outputs


def test_output_of_the_latest_run_is_found_below_several_providers(tmp_path: Path):
    assert find_run(tmp_path, 31337, CONTRACT, 4) is None
    first = tmp_path / "a" / "runs" / "31337-5fbdb231-4"
    later = tmp_path / "b" / "runs" / "31337-5fbdb231-4.1"
    other = tmp_path / "b" / "runs" / "31337-5fbdb231-44"
    for path in (first, later, other):
        path.mkdir(parents=True)
    run = find_run(tmp_path, 31337, CONTRACT, 4)
    assert run == later
    assert find_run(tmp_path / "a", 31337, CONTRACT, 4) == first
    assert read_output(run) == (b"", 0)
    assert not has_ended(run)
    (run / "output").write_bytes(b"0123456789")
    (run / "exit.json").write_text("{}")
    assert read_output(run, 3, 4) == (b"3456", 7)
    assert has_ended(run)
    (run / "output").unlink()
    (run / "output").symlink_to("/etc/hostname")
    with pytest.raises(NotFoundError):
        read_output(run)


SCHEDULER = "0x" + "Ab" * 20


async def test_gather_all_waits_for_everything_before_it_raises():
    finished = []

    async def slow() -> None:
        await asyncio.sleep(0.01)
        finished.append(1)

    async def broken() -> None:
        raise GridError("no")

    with pytest.raises(GridError):
        await gather_all(broken(), slow())
    assert finished == [1]


# --------------------------------------------------------------------------- service


class RecoveringSender:
    """A sender with a transaction of an earlier process."""

    def __init__(self, *, mined: bool) -> None:
        self.mined, self.pending = mined, ["claim 2 jobs"]

    def unattended(self) -> list[str]:
        return self.pending

    async def recover(self, *, timeout: float) -> list[Any]:
        assert timeout > 0
        self.pending = [] if self.mined else self.pending
        return [SimpleNamespace(block_number=9)] if self.mined else []


@pytest.mark.parametrize("mined", [True, False])
async def test_nothing_is_read_before_transactions_of_an_earlier_process_are_mined(mined: bool):
    """A head before the block of these transactions is ignored."""
    blocks = [3]
    batches = SimpleNamespace(record_block=blocks.append)
    looked: list[str] = []

    async def look(block: str) -> None:
        looked.append(block)

    service: Any = SimpleNamespace(
        _sender=RecoveringSender(mined=mined), _batches=batches, _check_challenge=look
    )
    assert await ProviderService._settle_earlier_transactions(service) is mined
    assert blocks == ([3, 9] if mined else [3])
    assert looked == [
        "latest"
    ]  # an earlier transaction may cost as much as the answer that waits for it


@dataclass
class ChallengedService:
    """The parts of a service that decide how a challenge is answered."""

    planned: list[tuple[View, model.Action]]
    on_its_way: frozenset[int] = frozenset()
    challenged_at: int = 1_000
    now: int = 1_005
    base_fee: int = 1
    sent: list[str] = field(default_factory=list)

    async def run(self) -> list[str]:
        async def answer() -> bool:
            self.sent.append("answer")
            return True

        async def send(planned: Any) -> int:
            self.sent.append("would_send")
            return len(planned)

        batches = SimpleNamespace(jobs=self.on_its_way, would_send=bool, answer=answer, send=send)
        service: Any = object.__new__(ProviderService)
        service._batches = batches
        service._challenged_at = self.challenged_at
        service._settings = SimpleNamespace(max_fee_per_gas=100)
        service._registration = SimpleNamespace(response_timeout=60)
        await service._send(Head(1, self.now, b"", base_fee=self.base_fee), self.planned)
        return self.sent


CLAIM = [(view(1), model.Claim())]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (ChallengedService([], challenged_at=0), ["would_send"]),
        (ChallengedService([]), ["answer", "would_send"]),
        (ChallengedService(CLAIM), ["would_send"]),
        (ChallengedService([], on_its_way=frozenset({3})), ["would_send"]),
        (ChallengedService(CLAIM, now=1_029), ["would_send"]),
        (ChallengedService(CLAIM, now=1_030), ["answer", "would_send"]),
        (ChallengedService(CLAIM, base_fee=101), ["answer"]),
        (ChallengedService(CLAIM, challenged_at=0, base_fee=101), ["would_send"]),
    ],
)
async def test_a_challenge_costs_a_transaction_only_if_no_transition_answers_it(case, expected):
    assert await case.run() == expected


@pytest.mark.parametrize(("challenged_at", "ceiling"), [(0, 100), (7, 5_000)])
async def test_an_open_challenge_raises_the_ceiling(challenged_at: int, ceiling: int):
    async def clock_of(_number: int, *, block: Any) -> Any:
        return SimpleNamespace(challenged_at=challenged_at)

    service: Any = object.__new__(ProviderService)
    service.provider_id, service._challenged_at = 1, 0
    service._contracts = SimpleNamespace(scheduler=SimpleNamespace(clock_of=clock_of))
    service._settings = SimpleNamespace(max_fee_per_gas=100, max_answer_fee=5_000)
    service._sender = SimpleNamespace(max_fee_per_gas=0)
    await service._check_challenge("latest")
    assert service._sender.max_fee_per_gas == ceiling
    assert service._challenged_at == challenged_at


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, model.Collecting(600, 70_000 * 10 * 20)),
        ({"coin_value": 2_000.0}, model.Collecting(600, 70_000 * 10 * 20 * 2_000)),
        ({"collect_gas_share": 0.5}, model.Collecting(600, 70_000 * 10 * 2)),
        ({"collect_interval": 900}, model.Collecting(900, 70_000 * 10 * 20)),
        ({"collect_interval": 60}, model.Collecting(600, 70_000 * 10 * 20)),
        ({"collect_interval": 0}, None),
    ],
)
def test_when_interim_payments_are_collected(tmp_path: Path, changes, expected):
    """Gas for one payment, at 10 wei, may cost a twentieth of the payment."""
    service: Any = object.__new__(ProviderService)
    service._settings = ProviderSettings(state_dir=tmp_path, **changes)
    service._registration = SimpleNamespace(collect_interval=600)
    assert service._collecting(Head(1, 1, b"", base_fee=10)) == expected


def test_unbilled_revenue_is_shown_and_warned_of_once(tmp_path: Path):
    rate = 10**16
    long = replace(view(1), job=job(1, rate=rate, escrow=10**20, time_limit=5_000, fee_bps=1_000))
    short = replace(view(2), job=job(2, rate=rate, escrow=10**20, time_limit=500))
    service: Any = object.__new__(ProviderService)
    service._settings = ProviderSettings(state_dir=tmp_path, unbilled_warning=8 * CREDIT)
    service._warned = set()
    service.metrics = ProviderMetrics(Metrics("provider"))
    with capture_logs() as logs:
        for now in (900, 1_000, 1_000):
            service._check_revenue([long, short], Head(1, now, b""))
    # 900 s of the first less its fee, and all of the second.
    assert service.metrics.metrics.value("revenue_accrued_credits") == pytest.approx(8.1 + 5)
    assert service.metrics.metrics.value("revenue_at_risk_credits") == pytest.approx(8.1)
    assert [(log["job"], log["credits"]) for log in logs] == [(1, "8.1")]
    service._check_revenue([], Head(1, 1_000, b""))
    assert service.metrics.metrics.value("revenue_accrued_credits") == 0


async def test_transactions_mined_during_the_poll_cause_no_lag():
    mined = [0]

    async def reconcile() -> dict[str, Any]:
        mined[0] = 6  # a transaction of a background task
        return {"number": "0x5", "timestamp": hex(1_000), "hash": "0x05"}

    figures: Any = SimpleNamespace(
        record_head=lambda *_, **__: None, record_lag=lambda _blocks: None
    )
    w3: Any = SimpleNamespace(provider=None)
    heads = HeadSource(w3, reconcile, figures, poll=1)
    assert await heads.poll(lambda: mined[0]) == Head(5, 1_000, b"\5")
    assert await heads.poll(lambda: mined[0]) is None  # now it is such a transaction


@pytest.mark.parametrize(
    ("name", "to", "is_fatal"),
    [
        ("claim", SCHEDULER, True),
        ("start", SCHEDULER, True),
        ("finish", SCHEDULER.lower(), True),
        # A command of a person with the same wallet, from another folder, is not another daemon.
        ("answer", SCHEDULER, False),
        ("requeue", SCHEDULER, False),
        ("claim", "0x" + "66" * 20, False),
    ],
)
def test_another_daemon_of_the_account_ends_this_one(name: str, to: str, is_fatal: bool) -> None:
    selector = interface("MetaScheduler").function(name).selector
    spender = Spender("0xab", 77, to, selector + bytes(32))
    service: Any = SimpleNamespace(
        _contracts=SimpleNamespace(scheduler=SimpleNamespace(address=SCHEDULER)),
        _sender=SimpleNamespace(nonce_conflicts=lambda: [spender], address="0x" + "55" * 20),
    )
    if not is_fatal:
        ProviderService._refuse_second_daemon(service)
        return
    with pytest.raises(UsageError, match=f"it sent {name} in transaction 0xab of block 77"):
        ProviderService._refuse_second_daemon(service)
    assert UsageError in FATAL


async def test_signals_begin_and_end_maintenance_also_before_the_service_is_open() -> None:
    calls: list[bool] = []
    service: Any = SimpleNamespace(drain=calls.append)
    signals = _MaintenanceSignals()
    with signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        await asyncio.sleep(0.01)
        assert calls == []
        signals.serve(service)
        assert calls == [True]
        os.kill(os.getpid(), signal.SIGUSR2)
        await asyncio.sleep(0.01)
        assert calls == [True, False]
