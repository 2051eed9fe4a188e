"""Actions of one cycle: transactions in batches, and executor actions.

Later cycles read the effect of a transaction from the chain. Executor actions are: submit, adopt,
extend, cancel, record exit statuses. Each step is recorded before or right after it is done. The
order makes it crash-safe: a kill between any two steps neither repeats nor loses a run.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.chain.bindings.contracts import MetaSchedulerContract
from deepsquare_chain.chain.bindings.records import Report as ChainReport
from deepsquare_chain.chain.rpc.batching import chunks, gather_all
from deepsquare_chain.chain.transactions.sender import Sender
from deepsquare_chain.daemon.batcher import Backoff, TransactionBatch, TransactionBatcher
from deepsquare_chain.daemon.loop import BackgroundTasks
from deepsquare_chain.errors import (
    AuditError,
    GridError,
    JobFileError,
    NotAuthorisedError,
    NotFoundError,
    UsageError,
)
from deepsquare_chain.executors.base import (
    Executor,
    ExecutorUnavailableError,
    RunRefusedError,
    RunSpec,
    RunState,
)
from deepsquare_chain.faults import crash_point
from deepsquare_chain.job import Job
from deepsquare_chain.observability import get_logger
from deepsquare_chain.provider.model import (
    Action,
    Adopt,
    Cancel,
    Claim,
    ClaimAndStart,
    Close,
    Collect,
    Extend,
    Panic,
    Phase,
    RecordEnd,
    Release,
    Requeue,
    Run,
    RunReport,
    Start,
    Submit,
    View,
)
from deepsquare_chain.provider.observer import DefinitionCache
from deepsquare_chain.provider.state import RunTable
from deepsquare_chain.store.encryption import decrypt_secrets, find_result_key
from deepsquare_chain.workflow import Definition, ExecutionSite, render_script
from deepsquare_chain.workflow.abilities import needed_abilities

#: Seconds between two checks whether a cycle may end its wait for launches.
_LAUNCH_CHECK_SECONDS: Final = 0.05

#: Seconds to wait for the receipts of transactions in the same block.
_RECEIPT_WAIT: Final = 0.05
#: First and longest backoff after a refusal, in seconds.
_PAUSES: Final = (1, 60)

Planned = tuple[View, Action]


class LaunchQueue:
    """Launches at most `at_once` runs at a time, so that other work is not delayed.

    `start` launches one run and returns True when the executor has it. A slow launch continues in
    the background; later cycles skip its job until it ends.
    """

    def __init__(
        self, start: Callable[[View, Submit], Coroutine[Any, Any, bool]], *, at_once: int
    ) -> None:
        self._start = start
        self._at_once = at_once
        self._tasks = BackgroundTasks()

    @property
    def jobs(self) -> frozenset[int]:
        """Jobs whose launch is under way, or ended since the last `begin`."""
        return self._tasks.jobs

    async def begin(
        self, submits: Iterable[tuple[View, Submit]], enough: Callable[[], bool]
    ) -> int:
        """Launch queued runs until `enough()`; returns the number of runs that the executor got.

        Runs that were not launched are planned again by the next cycle.
        """
        queue, launched = deque(submits), self._tasks.collect()
        while True:
            while queue and len(self._tasks) < self._at_once:
                view, action = queue.popleft()
                self._tasks.begin(self._start(view, action), [view.job.id])
            if not self._tasks or enough():
                return launched
            await self._tasks.wait(_LAUNCH_CHECK_SECONDS, first=True)
            launched += self._tasks.collect()

    async def end(self) -> None:
        """Wait for the launches that are under way."""
        await self._tasks.wait()
        self._tasks.collect()


_MAX_LAUNCHES: Final = 8
#: Maximum seconds that a cycle waits for launches alone.
_LAUNCH_SECONDS: Final = 0.3
_PAGE: Final = 65536
_log = get_logger(__name__)


class ExecutorActions:
    """Carries out actions that concern the executor and the database.

    `env` are the environment variables of every job, such as the chain ID. `abilities` returns
    the abilities found by the last test, None before the first one. The key in the file
    `secrets_key` decrypts the secrets of jobs.
    """

    def __init__(
        self,
        executor: Executor,
        table: RunTable,
        definition_cache: DefinitionCache,
        env: Mapping[str, str],
        *,
        abilities: Callable[[], frozenset[str] | None] = frozenset,
        secrets_key: Path | None = None,
    ) -> None:
        self._secrets_key = secrets_key
        self._abilities = abilities
        self._executor = executor
        self._table = table
        self._definition_cache = definition_cache
        self._env = dict(env)
        self._action_slots = asyncio.Semaphore(_MAX_LAUNCHES)
        # More concurrent launches than CPUs would only delay claims and reports.
        cpus = len(os.sched_getaffinity(0))
        at_once = _MAX_LAUNCHES if executor.queues else min(_MAX_LAUNCHES, cpus)
        self._launches = LaunchQueue(self._carry_out_logged, at_once=at_once)
        #: Last error of each run that could not be extended, which every cycle tries again.
        self._extend_errors: dict[str, str] = {}

    @property
    def launching(self) -> frozenset[int]:
        """Jobs that are skipped, because their launch is under way."""
        return self._launches.jobs

    async def carry_out(
        self,
        planned: Collection[Planned],
        may_end: Callable[[], bool] = lambda: True,
    ) -> int:
        """Carry out all actions that are not transactions; returns the number of those done.

        Launches are slow, so claims and reports do not wait for them. After `_LAUNCH_SECONDS` the
        cycle may end, and the next one plans the remaining launches again. `may_end` returns
        whether this cycle has nothing else to wait for.
        """
        started_at = time.monotonic()
        submits = [(view, action) for view, action in planned if isinstance(action, Submit)]
        other_actions = [pair for pair in planned if not isinstance(pair[1], Submit)]

        def enough() -> bool:
            return time.monotonic() >= started_at + _LAUNCH_SECONDS and may_end()

        results = await gather_all(
            self._launches.begin(submits, enough),
            *(self._carry_out_one(*pair) for pair in other_actions),
        )
        return sum(results)

    async def close(self) -> None:
        """Wait for the launches that are under way."""
        await self._launches.end()

    async def _carry_out_one(self, view: View, action: Action) -> bool:
        async with self._action_slots:
            return await self._carry_out_logged(view, action)

    async def _carry_out_logged(self, view: View, action: Action) -> bool:
        try:
            return await self._dispatch(view, action)
        except GridError as error:
            # A failure of one job does not affect others; the next cycle plans from its new state.
            action_name = type(action).__name__
            _log.warning("action failed", action=action_name, job=view.job.id, error=error.message)
            return False

    async def _dispatch(self, view: View, action: Action) -> bool:
        match action:
            case Submit():
                await self._submit(view, action)
            case Adopt():
                _log.info("run adopted", job=view.job.id, run=action.handle)
                self._table.put(view.run.submitted(action.handle), durable=False)
            case Extend():
                return await self._extend(view, action)
            case Cancel():
                await self._cancel(view, action)
            case RecordEnd():
                await self._record_end(view, action)
            case Release():
                await self._cancel_unknown(view)
                attempt = view.run.attempt + 1
                self._table.put(view.run.released(self._table.key(view.job.id, attempt)))
            case Close():
                await self._cancel_unknown(view)
                # Not durable: the state on chain leads to the same action again.
                self._table.put(view.run.closed(), durable=False)
            case _:
                return False
        return True

    async def _submit(self, view: View, action: Submit) -> None:
        definition = self._definition_cache.definition(view.job)
        if definition is None:
            return  # evicted from the cache meanwhile; fetched again in the next cycle
        site = self._site(definition)
        run = view.run.submitting(action)
        crash_point("provider.submit.planned")
        if definition.recipients:  # recorded before the run prints output to encrypt
            self._table.set_recipients(run.key, definition.recipients)
        self._table.put(run)
        crash_point("provider.submit.intended")
        try:
            definition = self._with_secrets(definition, view.job)
            spec = RunSpec(
                key=run.key,
                script=render_script(definition, self._job_env(view.job), site),
                resources=view.job.resources,
                walltime=action.walltime,
                env={},
                comment=self._table.comment(view.job.id),
            )
            handle = await self._executor.submit(spec)
        except (RunRefusedError, ValueError) as error:
            _log.warning("run refused", job=view.job.id, error=str(error))
            self._table.put(run.refused(str(error)))
            return
        crash_point("provider.submit.taken")
        # A run may remove its own folder; then only this record proves that it began.
        self._table.put(run.submitted(handle))
        crash_point("provider.submit.recorded")
        _log.info("run submitted", job=view.job.id, run=handle, walltime=action.walltime)

    async def _extend(self, view: View, action: Extend) -> bool:
        crash_point("provider.extend.planned")
        try:
            await self._executor.extend(_handle(view.run), action.walltime)
        except (NotFoundError, RunRefusedError) as error:
            if self._extend_errors.get(view.run.key) != str(error):
                self._extend_errors[view.run.key] = str(error)
                _log.warning("run not extended", job=view.job.id, error=str(error))
            return False
        crash_point("provider.extend.done")
        self._table.put(view.run.extended(action.allotment))
        _log.info("run extended", job=view.job.id, walltime=action.walltime)
        return True

    async def _cancel(self, view: View, action: Cancel) -> None:
        _log.info("run cancelled", job=view.job.id, reason=action.why)
        crash_point("provider.cancel.planned")
        await self._executor.cancel(_handle(view.run))
        crash_point("provider.cancel.done")

    async def _cancel_unknown(self, view: View) -> None:
        """Cancel a run of unknown state before its record is released or closed."""
        unknown = view.status is None or view.status.state is RunState.UNKNOWN
        if view.run.phase in {Phase.SUBMITTING, Phase.SUBMITTED} and unknown:
            # An interrupted submit may have left a run that still uses capacity.
            await self._executor.cancel(view.run.handle or view.run.key)

    async def _record_end(self, view: View, action: RecordEnd) -> None:
        crash_point("provider.end.seen")
        result = await self._digest(_handle(view.run))
        self._table.put(view.run.ended(action.exit, result))
        self._extend_errors.pop(view.run.key, None)
        crash_point("provider.end.recorded")
        ended = action.exit
        fields = {"code": ended.code, "reason": ended.reason, "seconds": ended.seconds}
        _log.info("run ended", job=view.job.id, **fields)

    async def _digest(self, handle: str) -> bytes:
        """Return the SHA-256 of the kept output; zero bytes if none is left to read."""
        digest = hashlib.sha256()
        offset = 0
        try:
            while chunk := await self._executor.output(handle, offset, _PAGE):
                digest.update(chunk)
                offset += len(chunk)
        except NotFoundError:
            return bytes(32)
        return digest.digest()

    def _with_secrets(self, definition: Definition, job: Job) -> Definition:
        """Return the definition with its decrypted secrets as environment variables.

        Raises:
            RunRefusedError: The secrets are encrypted to other providers, belong to another
                customer, or can't be read.
        """
        if definition.secrets is None:
            return definition
        try:
            key = find_result_key(self._secrets_key, f"A secret of job {job.id}")
            return definition.with_env(decrypt_secrets(definition.secrets, job.customer, key))
        except JobFileError:  # its message may contain a secret
            raise RunRefusedError("its secrets are not valid variables of a job") from None
        except (AuditError, NotAuthorisedError, UsageError) as error:
            raise RunRefusedError(f"its secrets can't be used: {error.message}") from None

    def _site(self, definition: Definition) -> ExecutionSite:
        abilities = self._abilities()
        if abilities is None and needed_abilities(definition):
            raise ExecutorUnavailableError("The abilities of this provider are not tested yet")
        return ExecutionSite(abilities or frozenset())

    def _job_env(self, job: Job) -> dict[str, str]:
        return {"USER": job.customer, **self._env, "DEEPSQUARE_JOB_ID": str(job.id)}


def _handle(run: Run) -> str:
    if run.handle is None:
        raise ExecutorUnavailableError(f"Job {run.job_id} has no run yet")
    return run.handle


class ProviderBatches:
    """Sends planned actions as transactions and waits for their receipts.

    A transaction that misses the block of the others continues in the background; later cycles
    skip its jobs until it is mined, and nothing else waits for it. `size` is the maximum number of
    jobs in one transaction; `TransactionBatcher` documents the other arguments.
    """

    def __init__(
        self,
        sender: Sender,
        scheduler: MetaSchedulerContract,
        *,
        size: int,
        timeout: float,
        count: Callable[[str, int, int], None],
    ) -> None:
        self._batcher = TransactionBatcher(
            "provider", sender, timeout=timeout, count=count, backoff=Backoff(*_PAUSES)
        )
        self._scheduler = scheduler
        self._size = size
        self._tasks = BackgroundTasks()

    @property
    def mined_at(self) -> int:
        """The highest block that holds a transaction of this provider."""
        return self._batcher.mined_at

    def record_block(self, block: int) -> None:
        """Record the block of a transaction that an earlier process sent."""
        self._batcher.mined_at = max(self._batcher.mined_at, block)

    @property
    def jobs(self) -> frozenset[int]:
        """Jobs whose transaction is pending, or was mined since the last `send`."""
        return self._tasks.jobs

    async def answer(self) -> bool:
        """Answer this provider's challenge; returns whether the answer is mined."""
        previous_block = self.mined_at
        await self._send(TransactionBatch("answer", (), self._scheduler.answer()))
        return self.mined_at > previous_block

    async def send(self, planned: Iterable[Planned]) -> int:
        """Send all planned transactions, and wait until the first of them is mined.

        Returns the number of jobs changed, by earlier transactions too.
        """
        moved = self._tasks.collect()
        batches = self._due(planned)
        for batch in batches:
            self._tasks.begin(self._send(batch), batch.job_ids)
        if batches:
            await self._tasks.wait(first=True)
            await self._tasks.wait(_RECEIPT_WAIT)
        return moved + self._tasks.collect()

    def would_send(self, planned: Iterable[Planned]) -> bool:
        """Return whether `send` would send a transaction now, which also answers a challenge."""
        return bool(self._due(planned))

    async def close(self) -> None:
        """Wait for pending transactions; those that it cancels remain in the outbox."""
        try:
            await self._tasks.wait()
        finally:
            self._tasks.cancel_all()

    def forget(self, job_ids: Iterable[int]) -> None:
        """Forget the refusals of these jobs, which are closed."""
        self._batcher.forget(job_ids)

    # -- building batches

    def _due(self, planned: Iterable[Planned]) -> list[TransactionBatch]:
        """Return the transactions of the planned actions that are not in backoff."""
        now, due = time.monotonic(), []
        for view, action in planned:
            kind = _kind(action)
            if kind and self._batcher.is_due(kind, view.job.id, now):
                due.append((view, action))
        return list(self._batches(due))

    def _batches(self, planned: Sequence[Planned]) -> Iterable[TransactionBatch]:
        # Claims first: customers wait for them, and late transactions may miss the block.
        for kind, job_ids, make, reason in self._transitions(planned):
            for part in chunks(job_ids, self._size):
                yield TransactionBatch(kind, tuple(part), make(part), reason=reason)
        reports = [_report(view, a) for view, a in planned if isinstance(a, RunReport)]
        for chunk in chunks(reports, self._size):
            ids = tuple(report.job_id for report in chunk)
            yield TransactionBatch("finish", ids, self._scheduler.finish(chunk))

    def _transitions(
        self, planned: Sequence[Planned]
    ) -> Iterable[tuple[str, list[int], Callable[[Sequence[int]], Call], str]]:
        """Yield kind, jobs, call and reason of the transitions that take job IDs only."""
        contract = self._scheduler
        yield "claim", _ids(planned, Claim()), contract.claim, ""
        yield "claim_and_start", _ids(planned, ClaimAndStart()), contract.claim_and_start, ""
        yield "start", _ids(planned, Start()), contract.start, ""
        yield "collect", _ids(planned, Collect()), contract.collect, ""
        # One reason per transaction.
        for action in dict.fromkeys(a for _, a in planned if isinstance(a, Requeue | Panic)):
            kind = _kind(action)
            make = contract.requeue if kind == "requeue" else contract.panic
            yield kind, _ids(planned, action), partial(make, reason=action.reason), action.reason

    async def _send(self, batch: TransactionBatch) -> int:
        return len(await self._batcher.send(batch, time.monotonic))


_KINDS: Final[dict[type[Action], str]] = {
    Claim: "claim",
    ClaimAndStart: "claim_and_start",
    Start: "start",
    Collect: "collect",
    RunReport: "finish",
    Requeue: "requeue",
    Panic: "panic",
}


def _kind(action: Action) -> str:
    """Return the kind of transaction of an action; empty for an action without one."""
    return _KINDS.get(type(action), "")


def _ids(planned: Iterable[Planned], action: Action) -> list[int]:
    return [view.job.id for view, planned_action in planned if planned_action == action]


def _report(view: View, action: RunReport) -> ChainReport:
    return ChainReport(
        job_id=view.job.id,
        seconds_used=action.seconds,
        exit_code=max(-(2**31), min(action.exit_code, 2**31 - 1)),
        result=view.run.result or bytes(32),
        reason=action.reason,
    )
