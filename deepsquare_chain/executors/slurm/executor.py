"""Runs jobs as jobs of a Slurm cluster.

A run has a folder that the nodes share with the daemon, and at most one Slurm job, found by its
name. The state of a job is read from the queue, then from accounting if available, then from the
records of the wrapper in the folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from deepsquare_chain.errors import NotFoundError
from deepsquare_chain.executors import launch
from deepsquare_chain.executors.base import (
    Executor,
    ExecutorContext,
    ExecutorError,
    ExecutorUnavailableError,
    Exit,
    RunRefusedError,
    RunSpec,
    RunState,
    RunStatus,
    Stored,
    check_key,
    check_spec,
    check_walltime,
    run_keys,
    stored_in,
    unavailable,
)
from deepsquare_chain.executors.isolation import UNISOLATED, refuse_exposure, refuse_unisolated
from deepsquare_chain.executors.launch import in_thread
from deepsquare_chain.executors.rundir import GRACE, OUTPUT_LIMIT, read_kept
from deepsquare_chain.executors.sandbox import bubblewrap_arguments
from deepsquare_chain.executors.slurm import commands, parsing, records
from deepsquare_chain.executors.slurm.client import (
    CommandRefusedError,
    SlurmClient,
    UnknownJobError,
    read_nodes,
    user_checks,
)
from deepsquare_chain.executors.slurm.options import SlurmOptions, parse_options
from deepsquare_chain.executors.slurm.parsing import SlurmJob, SlurmNode
from deepsquare_chain.executors.slurm.records import SlurmFolder
from deepsquare_chain.faults import crash_point
from deepsquare_chain.job import DAY, Offer
from deepsquare_chain.observability import get_logger
from deepsquare_chain.observability.metrics import Check

WRAPPER: Final = Path(__file__).with_name("wrapper.sh")
#: The `srun` of a job in the sandbox.
SRUN: Final = Path(__file__).with_name("srun.sh")
#: Seconds past its walltime after which a run is killed, because its wrapper does not react.
_OVERDUE: Final = 30.0
_CANCEL_TIMEOUT: Final = 30.0
_CANCEL_POLL_INTERVAL: Final = 0.3
#: Minimum seconds between two polls of accounting, and maximum job names in one command.
_ACCOUNTING_INTERVAL: Final = 5.0
_NAMES_AT_ONCE: Final = 200
#: Seconds for which a job that could not be started counts as a fault of the executor.
_UNSTARTED_COUNTS: Final = 300.0
#: Seconds for which the state of partitions is cached.
_PARTITIONS_COUNT: Final = 15.0
#: Minimum number of consecutive polls of the queue without the job.
_MIN_MISSES: Final = 3
_OPTIONS_HINT: Final = (
    "Correct partitions, account, qos, constraint or extra, or permit them to the daemon's user."
)
#: Configuration that a cluster needs to kill whole jobs, enforce limits, and hide jobs from others.
_CLUSTER: Final = (
    ("ProctrackType", "proctrack/cgroup"),
    ("TaskPlugin", "task/cgroup"),
    ("PrivateData", "jobs"),
)
T = TypeVar("T")
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Queue:
    """Jobs of squeue by run key, and the time of the request (monotonic seconds)."""

    polled_at: float
    number: int
    jobs: Mapping[str, list[SlurmJob]]


@dataclass(slots=True)
class _MissingJob:
    """A run whose job is missing in Slurm's responses: since when, and in how many."""

    since: float
    last_queue: int
    misses: int = 1


@dataclass(slots=True)
class _RunCache:
    """Data of runs by key, so that their records need not be read from disk again."""

    job_ids: dict[str, str] = field(default_factory=dict)
    starts: dict[str, float] = field(default_factory=dict)
    ended: dict[str, Exit] = field(default_factory=dict)
    absent: dict[str, _MissingJob] = field(default_factory=dict)
    walltimes: dict[str, int] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)


class SlurmExecutor(Executor):
    """Executor of a Slurm cluster; `Executor` documents the methods.

    Args:
        state_dir: State folder of the daemon; runs are in `runs/` below it, or in the option
            `run_dir`.
        options: Options of the executor.
        owner: Account of the provider; jobs of other providers in the same cluster are ignored.
        private: Folders and files of the daemon, in addition to its state, that are hidden from
            jobs.

    Raises:
        ExecutorUnavailableError: The folder can't be created or read.
    """

    queues = True

    def __init__(
        self,
        state_dir: Path,
        options: SlurmOptions,
        *,
        owner: str = "",
        private: Sequence[Path] = (),
    ) -> None:
        self._options = options
        self._private = (Path(os.path.abspath(state_dir)), *private)
        self._owner = owner.lower()
        self._client = SlurmClient(options)
        self._path = Path(os.path.abspath(options.run_dir or state_dir / "runs"))
        self._cache = _RunCache()
        self._queue = _Queue(float("-inf"), 0, {})
        self._poll_lock = asyncio.Lock()
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._config: dict[str, str] | None = None
        self._accounted_at = self._unstarted_at = float("-inf")
        self._nodes: tuple[float, list[SlurmNode]] = float("-inf"), []
        self._partitions = float("-inf"), ""
        self._fault = ""
        self._untested = True  # whether Slurm may reject even the smallest job
        try:
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._client.group_id is not None:
                self._path.chmod(0o711)  # jobs access runs by name, without listing them
        except OSError as error:
            raise unavailable("Slurm", self._path, error) from error

    # -- starting

    async def submit(self, spec: RunSpec) -> str:
        """`ExecutorUnavailableError` also means: it is not known whether Slurm accepted the job."""
        check_spec(spec)
        async with self._locks[spec.key]:
            folder = self._folder(spec.key)
            is_new = await self._call(self._prepare, folder, spec)
            if not await self._is_submitted(folder, is_new=is_new):
                await self._submit(folder, spec)
            return spec.key

    def _prepare(self, folder: SlurmFolder, spec: RunSpec) -> bool:
        """Create the folder of a run if needed; returns whether it is new."""
        is_new = not folder.exists()
        if is_new:
            launch.make_run(self._path, spec)
        if folder.intent() is None:
            folder.set_environment(spec.env)
            if self._options.isolation == "sandbox":
                self._set_sandbox(folder, spec)
            folder.share()
        return is_new

    def _set_sandbox(self, folder: SlurmFolder, spec: RunSpec) -> None:
        arguments = bubblewrap_arguments(
            self._options,
            work=str(folder.work),
            temporary=str(folder.temporary),
            script=str(folder.script),
            private=self._private,
            hostname="",
            is_root=os.geteuid() == 0 and not self._options.user,
        )
        limits = (
            self._options.disk * 1024,
            self._options.processes,
            spec.resources.gpus,
            int(self._options.namespaces),
        )
        folder.set_sandbox(["bwrap", *arguments], limits, SRUN.read_bytes())

    async def _is_submitted(self, folder: SlurmFolder, *, is_new: bool = False) -> bool:
        """Return whether Slurm has, or had, a job of this run; an unrecorded job is adopted.

        If the folder is new, an earlier one may be lost while its job still exists.

        Raises:
            ExecutorUnavailableError: It is not known yet.
        """
        if await self._call(self._known_job, folder):
            return True
        intended_at = await self._call(folder.intent)
        if intended_at is None:
            # A job whose folder was lost is older than the last poll of the queue.
            age = self._options.query_interval
            jobs = (await self._polled_queue(age)).jobs.get(folder.key, []) if is_new else []
            if len(jobs) > 1:
                raise self._duplicates_error(folder.key, jobs)
            if jobs:
                await self._adopt(folder, jobs[0])
            return bool(jobs)
        job = await self._look_up(folder.key, int(intended_at))
        if job is not None:
            await self._adopt(folder, job)
            return True
        if abs(time.time() - intended_at) < self._options.settle:
            raise ExecutorUnavailableError(
                f"It is not clear yet whether Slurm accepted run {folder.key}",
                hint=f"This is decided {self._options.settle:g} seconds after sbatch failed.",
            )
        return False

    def _known_job(self, folder: SlurmFolder) -> bool:
        if folder.key in self._cache.job_ids:
            return True
        job_id = folder.job_id()
        if job_id is None:
            start = folder.start()
            job_id = None if start is None else start[0]
        if job_id:
            self._cache.job_ids[folder.key] = job_id
        return bool(job_id)

    async def _submit(self, folder: SlurmFolder, spec: RunSpec) -> None:
        arguments = await self._arguments(folder, spec)
        crash_point("executor.slurm.prepared")
        await self._call(folder.set_intent)
        crash_point("executor.slurm.intended")
        try:
            printed = await self._client.run(arguments)
        except CommandRefusedError as error:
            await self._call(folder.drop_intent)
            self._untested, self._partitions = True, (float("-inf"), "")
            raise RunRefusedError(f"Slurm rejected run {spec.key}: {error.message}") from error
        except ExecutorUnavailableError as error:
            await self._resolve_failed_submit(folder, error)
            return
        crash_point("executor.slurm.submitted")
        job_id = parsing.job_id(printed)
        if job_id is None:
            unclear = ExecutorUnavailableError("sbatch printed no job number")
            await self._resolve_failed_submit(folder, unclear)
            return
        await self._call(folder.set_job_id, job_id)
        crash_point("executor.slurm.recorded")
        self._cache.job_ids[spec.key] = job_id
        self._forget_queue()
        _log.info("Slurm job submitted", run=spec.key, slurm_job=job_id)

    async def _resolve_failed_submit(
        self, folder: SlurmFolder, error: ExecutorUnavailableError
    ) -> None:
        """After a failed sbatch, adopt its job if Slurm accepted it; else raise the error."""
        _log.warning("submission outcome unknown", run=folder.key, error=error.message)
        job = await self._look_up(folder.key, int(time.time()))
        if job is None:
            raise error
        await self._adopt(folder, job)

    async def _arguments(self, folder: SlurmFolder, spec: RunSpec) -> list[str]:
        minutes = commands.minutes(spec.walltime)
        if self._options.limit_headroom != 0:
            minutes = await self._with_headroom(minutes, spec)
        comment = " ".join(part for part in (spec.comment, self._owner_mark()) if part)
        return commands.submit(
            spec,
            self._options,
            folder=str(folder.path),
            wrapper=str(WRAPPER),
            limit_minutes=minutes,
            comment=comment,
        )

    async def _with_headroom(self, minutes: int, spec: RunSpec) -> int:
        """Return the time limit with headroom for top-ups, as far as the partitions allow."""
        headroom = self._options.limit_headroom
        if headroom is None:
            headroom = 0 if await self._may_raise_limits() else DAY
        if not headroom:
            return minutes
        names = self._options.partitions_for(spec.resources.gpus)
        text = await self._client.run(commands.partitions(names))
        limits = parsing.partition_limits(text, default_only=not names)
        longest = [limit for _, limit in limits.values() if limit is not None]
        longer = minutes + headroom // 60
        return max(minutes, min([longer, *(limit // 60 for limit in longest)]))

    async def _may_raise_limits(self) -> bool:
        """Return whether Slurm lets this user raise the limit of a running job."""
        if self._client.user_id == 0:
            return True
        config = await self._configuration()
        return config.get("SlurmUser", "").partition("(")[0] == self._client.user

    async def _configuration(self) -> dict[str, str]:
        if self._config is None:
            self._config = parsing.config(await self._client.run(commands.show_config()))
        return self._config

    # -- lookup

    async def find(self, key: str) -> str | None:
        folder = self._folder(key)
        async with self._locks[key]:
            if await self._call(folder.exists):
                return key if await self._is_submitted(folder) else None
            # The run's folder was lost; the job is found by its name.
            return None if await self._look_up(key, int(time.time()) - DAY) is None else key

    async def _look_up(self, key: str, since: int) -> SlurmJob | None:
        """Return the Slurm job of a run by its name, from the queue or accounting."""
        queue = await self._polled_queue(max_age=0.0)
        jobs = queue.jobs.get(key) or (await self._accounted([key], since)).get(key, [])
        if len(jobs) > 1:
            raise self._duplicates_error(key, jobs)
        return jobs[0] if jobs else None

    def _duplicates_error(self, key: str, jobs: list[SlurmJob]) -> ExecutorUnavailableError:
        ids = ", ".join(sorted(job.id for job in jobs))
        if self._cache.warnings.get(key) != ids:
            self._cache.warnings[key] = ids
            _log.error("duplicate Slurm jobs detected", run=key, slurm_jobs=ids)
        return ExecutorUnavailableError(
            f"Slurm jobs {ids} have the name of one run, {key}",
            hint="Find out who submitted them, and cancel those that are not the provider's.",
        )

    async def _adopt(self, folder: SlurmFolder, job: SlurmJob) -> None:
        await self._call(folder.set_job_id, job.id)
        self._cache.job_ids[folder.key] = job.id
        _log.info("Slurm job adopted", run=folder.key, slurm_job=job.id)

    # -- status

    async def poll(self, handles: Iterable[str]) -> dict[str, RunStatus]:
        """Poll the queue once for all handles."""
        all_keys = list(handles)
        ended = self._cache.ended
        open_keys = [key for key in all_keys if key not in ended]
        statuses = {key: RunStatus(RunState.ENDED, ended[key]) for key in all_keys if key in ended}
        if not open_keys:
            return statuses
        queue = await self._polled_queue(max_age=self._options.query_interval)
        missing = []
        for key in open_keys:
            jobs = queue.jobs.get(key, [])
            if jobs:
                statuses[key] = await self._status(key, jobs)
            else:
                missing.append(key)
        return statuses | await self._missing_statuses(missing, queue)

    async def _status(self, key: str, jobs: list[SlurmJob]) -> RunStatus:
        """Return the status of a run that is in the queue."""
        self._cache.absent.pop(key, None)
        try:
            folder = self._folder(key)
            if len(jobs) > 1:
                raise self._duplicates_error(key, jobs)
            job = jobs[0]
            recorded = self._cache.job_ids.get(key) or await self._call(folder.job_id)
            if recorded is not None and recorded != job.id:
                raise self._duplicates_error(key, [job, SlurmJob(recorded, "")])
            state = records.run_state(job.state)
            if state is RunState.ENDED:
                return await self._conclude(folder, job)
            if records.never_starts(job):
                await self._cancel_blocked_job(folder, job)
            if job.state == "RUNNING":
                await self._enforce(folder, job)
        except (ExecutorUnavailableError, RunRefusedError) as error:
            self._warn(key, error)
            return RunStatus(RunState.UNKNOWN)
        if state is RunState.UNKNOWN:
            self._warn(key, ExecutorError(f"unknown state {job.state!r}"))
        return RunStatus(state)

    async def _cancel_blocked_job(self, folder: SlurmFolder, job: SlurmJob) -> None:
        """Cancel a job that would never start; the next poll finds it cancelled."""
        _log.warning("Slurm job blocked", run=folder.key, reason=job.reason)
        await self._signal(job.id)
        self._forget_queue()

    async def _enforce(self, folder: SlurmFolder, job: SlurmJob) -> None:
        """Kill a run whose wrapper does not enforce its walltime."""
        start = self._cache.starts.get(folder.key)
        if start is None:
            record = await self._call(self._started, folder)
            if record is None:
                return
            start = self._cache.starts[folder.key] = record
        elapsed = time.time() - start - _OVERDUE
        if elapsed < self._cache.walltimes.get(folder.key, 0):
            return
        walltime = self._cache.walltimes[folder.key] = await self._call(folder.walltime)
        if elapsed < walltime:
            return
        _log.warning("walltime exceeded", run=folder.key)
        await self._call(lambda: folder.set_control(overdue=True))
        await self._signal(job.id, "KILL")
        self._forget_queue()

    @staticmethod
    def _started(folder: SlurmFolder) -> float | None:
        start = folder.start() if folder.exists() else None
        return None if start is None else start[1]

    async def _missing_statuses(self, keys: list[str], queue: _Queue) -> dict[str, RunStatus]:
        """Return the status of runs that left the queue: by records, then by accounting."""
        statuses: dict[str, RunStatus] = {}
        unrecorded = []
        for key in keys:
            try:
                folder = self._folder(key)
                ended = await self._call(self._recorded, folder)
                if ended is not None:
                    statuses[key] = self._remember(key, ended)
                elif await self._call(folder.exists) and await self._call(self._known_job, folder):
                    unrecorded.append(key)
                else:
                    statuses[key] = RunStatus(RunState.UNKNOWN)
            except (ExecutorUnavailableError, RunRefusedError) as error:
                self._warn(key, error)
                statuses[key] = RunStatus(RunState.UNKNOWN)
        if unrecorded:
            statuses |= await self._unrecorded_statuses(unrecorded, queue)
        return statuses

    def _recorded(self, folder: SlurmFolder) -> Exit | None:
        """Return the exit status of a run from its records alone; None if they are not enough."""
        if not folder.exists():
            return None
        recorded = folder.verdict()
        if recorded is not None:
            return recorded
        end, start = folder.end(), folder.start()
        withdrawn = start is not None and start[1] is None
        # Only Slurm has the reason why it terminated a script.
        if not withdrawn and (end is None or end.reason == "terminated"):
            return None
        return self._judge(folder, None)

    async def _unrecorded_statuses(self, keys: list[str], queue: _Queue) -> dict[str, RunStatus]:
        """Return the status, by accounting, of runs that left the queue without a usable record."""
        accounted: Mapping[str, list[SlurmJob]] = {}
        if time.monotonic() - self._accounted_at >= _ACCOUNTING_INTERVAL:
            try:
                accounted = await self._accounted(keys, int(time.time()) - 30 * DAY)
                self._accounted_at = time.monotonic()
            except ExecutorUnavailableError as error:
                self._warn("accounting", error)
                return dict.fromkeys(keys, RunStatus(RunState.UNKNOWN))
        statuses = {}
        for key in keys:
            job_id = self._cache.job_ids[key]
            own_jobs = [job for job in accounted.get(key, []) if job.id == job_id]
            ended = [job for job in own_jobs if records.run_state(job.state) is RunState.ENDED]
            if ended:
                statuses[key] = await self._conclude(self._folder(key), ended[-1])
            elif not own_jobs and self._is_gone(key, queue):
                _log.warning("Slurm job vanished", run=key, slurm_job=job_id)
                statuses[key] = await self._conclude(self._folder(key), None)
            else:
                statuses[key] = RunStatus(RunState.UNKNOWN)
        return statuses

    def _is_gone(self, key: str, queue: _Queue) -> bool:
        """Return whether the job was missing long enough, in enough polls."""
        absence = self._cache.absent.setdefault(key, _MissingJob(queue.polled_at, queue.number))
        if absence.last_queue != queue.number:
            absence.last_queue = queue.number
            absence.misses += 1
        missing = queue.polled_at - absence.since
        return absence.misses >= _MIN_MISSES and missing >= self._options.missing

    async def _conclude(self, folder: SlurmFolder, job: SlurmJob | None) -> RunStatus:
        """Determine the exit status of a run, and record it."""
        if job is not None and job.exit_code is None and job.state in {"COMPLETED", "FAILED"}:
            end = await self._call(folder.end) if await self._call(folder.exists) else None
            if end is None:
                job = await self._with_exit_code(job)
        ended = await self._call(self._judge, folder, job)
        return self._remember(folder.key, ended)

    async def _with_exit_code(self, job: SlurmJob) -> SlurmJob:
        with contextlib.suppress(UnknownJobError, CommandRefusedError):
            detailed = parsing.job(await self._client.run(commands.show_job(job.id)))
            if detailed is not None and detailed.id == job.id:
                return detailed
        return job

    def _judge(self, folder: SlurmFolder, job: SlurmJob | None) -> Exit:
        """Return the exit status of a run, and record it in its folder if that still exists."""
        exists = folder.exists()
        end, orders = None, records.Orders()
        started_at = None if job is None or job.started_at is None else float(job.started_at)
        if exists:
            start, end = folder.start(), folder.end()
            started_at = start[1] if start else None
            withdrawn = start is not None and started_at is None  # before it began
            orders = records.Orders(cancel=True) if withdrawn else folder.orders()
        user_id = self._client.user_id
        ended = records.conclude(job, started_at, end, orders, user_id=user_id, now=time.time())
        if exists:
            folder.set_verdict(ended)
            launch.remove_tree(folder.temporary)
        return ended

    def _remember(self, key: str, ended: Exit) -> RunStatus:
        cache = self._cache
        cache.ended[key] = ended
        if ended.reason == "unstarted":
            self._unstarted_at = time.monotonic()
        for values in (cache.starts, cache.walltimes, cache.absent, cache.warnings):
            values.pop(key, None)
        self._drop_lock(key)
        return RunStatus(RunState.ENDED, ended)

    def _drop_lock(self, key: str) -> None:
        """Drop the lock of a run unless a call holds it, which another call may wait for."""
        if key in self._locks and not self._locks[key].locked():
            del self._locks[key]

    # -- queue and accounting

    async def _polled_queue(self, max_age: float) -> _Queue:
        """Return the queue, from a cache that is at most `max_age` seconds old."""
        requested_at = time.monotonic()
        async with self._poll_lock:
            # Another task may have polled while this one waited for the lock.
            if self._queue.polled_at >= requested_at - max_age:
                return self._queue
            now = time.monotonic()
            text = await self._client.run(commands.queue(self._client.user))
            jobs: dict[str, list[SlurmJob]] = {}
            for job in parsing.queue(text):
                key = commands.key_of(job.name)
                if key is not None and self._is_own(job):
                    jobs.setdefault(key, []).append(job)
            self._queue = _Queue(now, self._queue.number + 1, jobs)
            return self._queue

    def _forget_queue(self) -> None:
        self._queue = _Queue(float("-inf"), self._queue.number, self._queue.jobs)

    def _owner_mark(self) -> str:
        return f"provider={self._owner}" if self._owner else ""

    def _is_own(self, job: SlurmJob) -> bool:
        """Return whether a job is this provider's; a cluster may strip or replace comments."""
        mark = next((part for part in job.comment.split() if part.startswith("provider=")), "")
        return not mark or not self._owner or mark == self._owner_mark()

    async def _accounted(self, keys: list[str], since: int) -> dict[str, list[SlurmJob]]:
        """Return jobs from accounting by run key; empty if the cluster has no accounting."""
        kind = await self._accounting_kind()
        accounted: list[SlurmJob] = []
        if kind == "completion":
            accounted = parsing.completions(await self._client.run(commands.completions()))
        elif kind == "sacct":
            names = [commands.job_name(key) for key in keys]
            for start in range(0, len(names), _NAMES_AT_ONCE):
                batch = names[start : start + _NAMES_AT_ONCE]
                text = await self._client.run(commands.accounting(batch, since - 60))
                accounted += parsing.accounting(text)
        run_keys, jobs = set(keys), dict[str, list[SlurmJob]]()
        for job in accounted:
            key = commands.key_of(job.name)
            if key in run_keys:
                jobs.setdefault(str(key), []).append(job)
        return jobs

    async def _accounting_kind(self) -> str:
        kind = self._options.accounting
        if kind != "auto":
            return kind
        config = await self._configuration()
        if config.get("AccountingStorageType") == "accounting_storage/slurmdbd":
            return "sacct"
        return "completion" if config.get("JobCompType") == "jobcomp/filetxt" else "none"

    # -- cancellation and extension

    async def cancel(self, handle: str) -> None:
        folder = self._folder(handle)
        if handle in self._cache.ended:
            return
        async with self._locks[handle]:
            exists = await self._call(folder.exists)
            jobs = await self._live(handle, max_age=0.0)
            if exists and (jobs or await self._call(folder.verdict) is None):
                # A job that Slurm accepted, but is not known yet, must not run the script later.
                await self._call(folder.withdraw)
            await self._end_jobs(handle, jobs)

    async def _end_jobs(self, key: str, jobs: list[SlurmJob]) -> None:
        started_at, killed = time.monotonic(), False
        for job in jobs:
            await self._signal(job.id)
        while jobs:
            if time.monotonic() - started_at > _CANCEL_TIMEOUT:
                raise ExecutorUnavailableError(
                    f"Slurm job {jobs[0].id} of run {key} does not end",
                    hint="Check its node; the cancellation is retried.",
                )
            await asyncio.sleep(_CANCEL_POLL_INTERVAL)
            jobs = await self._live(key, max_age=_CANCEL_POLL_INTERVAL / 2)
            if not killed and time.monotonic() - started_at > GRACE:
                killed = True
                for job in jobs:
                    await self._signal(job.id, "KILL")

    async def _signal(self, job_id: str, signal: str = "") -> None:
        with contextlib.suppress(UnknownJobError):
            await self._client.run(commands.cancel(job_id, signal))

    async def _live(self, key: str, max_age: float) -> list[SlurmJob]:
        """Return the jobs of a run that have not ended."""
        queue = await self._polled_queue(max_age)
        jobs = queue.jobs.get(key, [])
        return [job for job in jobs if records.run_state(job.state) is not RunState.ENDED]

    async def extend(self, handle: str, walltime: int) -> None:
        """Refused if it is longer than the limit of the Slurm job, and this user may not raise that."""
        check_walltime(handle, walltime)
        folder = self._folder(handle)
        await self._call(self._require, folder)
        jobs = await self._live(handle, max_age=self._options.query_interval)
        if jobs:
            await self._raise_limit(handle, jobs[0], walltime)
        await self._call(lambda: folder.set_control(walltime=walltime))

    async def _raise_limit(self, key: str, job: SlurmJob, walltime: int) -> None:
        minutes = commands.minutes(walltime)
        if job.limit is None or job.limit >= minutes * 60:
            return
        try:
            await self._client.run(commands.set_limit(job.id, minutes))
            self._forget_queue()
        except UnknownJobError:
            pass  # it has just ended
        except CommandRefusedError as error:
            if job.limit < walltime:
                raise RunRefusedError(
                    f"Slurm did not raise the limit of run {key}: {error.message}",
                    hint="Give the daemon's user the permission, or set the option limit_headroom.",
                ) from error

    # -- capacity, output and files

    async def capacity(self) -> Offer:
        free = [node for node in await self._cluster_nodes() if node.is_up]
        return Offer(
            cpus=sum(node.idle_cpus for node in free),
            memory=sum(max(0, node.memory - node.allocated_memory) for node in free),
            gpus=sum(max(0, node.gpus - node.allocated_gpus) for node in free),
        )

    async def fault(self) -> str:
        """A job that failed before its wrapper began counts as a fault for a while.

        Every other job would fail in the same way, and at once.
        """
        fault = await self._find_fault()
        if fault and fault != self._fault:
            _log.error("Slurm can't start jobs", reason=fault)
        elif self._fault and not fault:
            _log.info("Slurm can start jobs again")
        self._fault = fault
        return fault

    async def _find_fault(self) -> str:
        if time.monotonic() - self._unstarted_at < _UNSTARTED_COUNTS:
            return f"Slurm could not start the last job; do the nodes see {self._path}?"
        names = self._options.all_partitions
        target = f"partition {','.join(names)}" if names else "Slurm"
        if not any(node.is_up for node in await self._cluster_nodes()):
            return f"no node of {target} is in service"
        if time.monotonic() - self._partitions[0] > _PARTITIONS_COUNT:
            text = await self._client.run(commands.partitions(names))
            limits = parsing.partition_limits(text, default_only=not names)
            is_up = any(up for up, _ in limits.values())
            reason = await self._rejection() if is_up else f"{target} accepts no jobs"
            self._partitions = time.monotonic(), reason
        return self._partitions[1]

    async def _rejection(self) -> str:
        """Return why Slurm rejects every job; tested at the start and after each rejected job."""
        if not self._untested:
            return ""
        reason = await rejection(self._client, self._options)
        self._untested = bool(reason)
        return reason and f"Slurm rejects every job, check executor_options: {reason}"

    async def _cluster_nodes(self) -> list[SlurmNode]:
        """Return the nodes, from a cache."""
        if time.monotonic() - self._nodes[0] > self._options.query_interval:
            self._nodes = time.monotonic(), await read_nodes(self._options)
        return self._nodes[1]

    def folder(self, handle: str) -> Path:
        return self._path / check_key(handle)

    async def output(self, handle: str, offset: int = 0, limit: int = 65536) -> bytes:
        folder = self._folder(handle)

        def read() -> bytes:
            self._require(folder)
            return read_kept(folder.output, max(0, offset), max(0, min(limit, OUTPUT_LIMIT)))

        return await self._call(read)

    async def keys(self) -> list[str]:
        return await self._call(run_keys, self._path)

    async def stored(self, handle: str) -> Stored | None:
        return await self._call(stored_in, self.folder(handle))

    async def forget(self, handle: str) -> None:
        folder = self._folder(handle)
        if not await self._call(folder.exists):
            return
        if (await self.poll([handle]))[handle].state is not RunState.ENDED:
            raise ExecutorError(f"Run {handle} has not ended", hint="Cancel it first.")
        await self._remove_as_user(folder)
        await self._call(lambda: launch.remove_tree(launch.move_to_trash(folder)))
        self._cache.ended.pop(handle, None)
        self._cache.job_ids.pop(handle, None)
        self._drop_lock(handle)

    async def _remove_as_user(self, folder: SlurmFolder) -> None:
        """Remove the job's files as its user, which may have removed the daemon's permissions."""
        if self._client.group_id is not None:
            with contextlib.suppress(ExecutorError):
                folders = [str(folder.work), str(folder.temporary)]
                await self._client.run(["/bin/rm", "-rf", "--", *folders])

    def _require(self, folder: SlurmFolder) -> None:
        if not folder.exists():
            raise NotFoundError(f"There is no run {folder.key} in {self._path}")

    def _folder(self, key: str) -> SlurmFolder:
        return SlurmFolder(self.folder(key), self._client.group_id)

    def _warn(self, name: str, error: Exception) -> None:
        if name not in self._cache.warnings:
            self._cache.warnings[name] = str(error)
            _log.warning("run status unknown", run=name, error=str(error))

    async def _call(self, work: Callable[..., T], *arguments: object) -> T:
        def typed() -> T:
            try:
                return work(*arguments)
            except OSError as error:
                raise unavailable("Slurm", self._path, error) from error

        return await in_thread(typed)


async def rejection(client: SlurmClient, options: SlurmOptions) -> str:
    """Return why sbatch rejects the smallest job, such as an unknown account; empty otherwise."""
    try:
        await client.run(commands.trial(options))
    except CommandRefusedError as error:
        return error.message
    except ExecutorUnavailableError:
        pass  # not an answer about the options
    return ""


async def examine(context: ExecutorContext) -> list[Check]:
    """Check that Slurm answers, has nodes for jobs, and isolates jobs; read-only.

    Raises:
        GridError: An option is invalid, or Slurm does not answer.
    """
    options = parse_options(context.options)
    nodes = await read_nodes(options)
    usable = [node for node in nodes if node.is_up]
    text = f"Slurm responds; nodes in service: {len(usable)} of {len(nodes)}"
    hint = "" if usable else "`sinfo` shows why they are out of service."
    if not nodes:
        partitions = ", ".join(options.all_partitions) or "default partition"
        text = f"Slurm responds, and has no nodes in {partitions}"
        hint = "`sinfo` lists the partitions and their nodes."
    checks = [Check("executor", bool(usable), text, hint, "executor_options.partitions")]
    client = SlurmClient(options)
    config = parsing.config(await client.run(commands.show_config()))
    reason = await rejection(client, options)
    text, hint = (
        reason or "sbatch accepts a job with these options",
        _OPTIONS_HINT if reason else "",
    )
    checks.append(Check("submission", not reason, text, hint, "executor_options"))
    checks += isolation_checks(options, config)
    if options.user:
        checks += await user_checks(options, context, WRAPPER)
    return checks


def isolation_checks(options: SlurmOptions, config: Mapping[str, str]) -> list[Check]:
    """Return the checks of job isolation on a cluster with this `scontrol show config`."""
    sandboxed = options.isolation == "sandbox"
    text = "jobs run under bubblewrap on the nodes" if sandboxed else UNISOLATED
    hint = "" if sandboxed else "Set isolation = sandbox; the nodes need bubblewrap."
    checks = [Check("isolation", sandboxed, text, hint, "executor_options.isolation")]
    for key, required in _CLUSTER:
        actual = config.get(key, "(null)")
        hint = f"Set {key} to {required} in slurm.conf; see docs/provider.md for the reason."
        ok = required in actual
        checks.append(Check(key, ok, actual, "" if ok else hint))
    return checks


def create(context: ExecutorContext) -> SlurmExecutor:
    """Create the executor from settings: entry point `slurm` of `deepsquare.executors`.

    Raises:
        UsageError: An option is invalid or unsafe, or jobs would run without isolation, which is
            not allowed.
        ExecutorUnavailableError: The folder can't be created.
    """
    options = parse_options(context.options)
    refuse_exposure(options, (context.state_dir, *context.private))
    if options.isolation == "none":
        refuse_unisolated(context, "The option isolation of the Slurm executor is none")
    return SlurmExecutor(context.state_dir, options, owner=context.owner, private=context.private)
