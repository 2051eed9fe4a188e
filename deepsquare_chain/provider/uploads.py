"""Delivers the output and result files of runs to the gateways, during the runs and after them.

Uploads read from the folders of runs, so that a gateway that is down only causes a delay: the
missing parts are read again, as long as `retention` keeps the folders. Uploads are not part of a
cycle, and failures of a gateway do not affect cycles.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Final

from sqlalchemy import Boolean, Column, Integer, String, Table, delete, insert, select

from deepsquare_chain.daemon.loop import cancelled
from deepsquare_chain.errors import EndpointError, GridError, NotFoundError
from deepsquare_chain.executors.base import Executor
from deepsquare_chain.executors.rundir import (
    OUTPUT_LIMIT,
    RunFolder,
    open_regular,
    read_bytes,
    read_kept,
)
from deepsquare_chain.job import DAY
from deepsquare_chain.observability import get_logger
from deepsquare_chain.observability.metrics import Metrics
from deepsquare_chain.provider.model import Phase
from deepsquare_chain.provider.outputs import ResultFile, read_output, result_files
from deepsquare_chain.provider.state import RunTable
from deepsquare_chain.store.database import Store, metadata
from deepsquare_chain.store.encryption import (
    FOLDER,
    MANIFEST,
    encrypt_file,
    encrypted_log_part,
    manifest,
)
from deepsquare_chain.store.gateway_client import (
    LOG,
    GatewayClient,
    GatewayRefusedError,
    WrongAccountError,
    is_file_name,
)

#: Seconds between two checks for new output.
_INTERVAL: Final = 0.4
#: Number of concurrent uploads, and bytes of one request.
_MAX_UPLOADS: Final = 8
_LOG_PART: Final = 256 * 1024
_FILE_PART: Final = 4 * 1024 * 1024
#: Maximum restarts of one delivery because the gateway has another length of the log.
_REWINDS: Final = 3
#: First and longest backoff of a gateway, or of a run that it refuses, in seconds.
_PAUSES: Final = (0.5, 30.0)
#: Seconds after which an undelivered upload is given up.
_GIVE_UP_SECONDS: Final = 7 * DAY
_log = get_logger(__name__)

_uploads: Final = Table(
    "gateway_uploads",
    metadata,
    Column("key", String, primary_key=True),
    Column("job_id", Integer, nullable=False),
    Column("handle", String, nullable=False),
    Column("gateway", String, nullable=False),
    Column("position", Integer, nullable=False),
    Column("offset", Integer, nullable=False),
    Column("log_done", Boolean, nullable=False),
    Column("done", Boolean, nullable=False),
    Column("since", Integer, nullable=False),
)


@dataclass(frozen=True, slots=True)
class Upload:
    """Progress of the upload of one run.

    Attributes:
        gateway: URL of the gateway that accepts it; empty before one was found.
        position: Position in the run's output up to which it was read.
        offset: Size of the log at the gateway in bytes, notes about missing output included.
        log_done: The log at the gateway is complete.
        done: Nothing is left to do.
        since: When the delivery began, in epoch seconds.
    """

    key: str
    job_id: int
    handle: str
    gateway: str = ""
    position: int = 0
    offset: int = 0
    log_done: bool = False
    done: bool = False
    since: int = 0


class OutputUploader:
    """Delivers the output of all runs of a provider in the background.

    The output of a job goes to the first gateway that has its definition. `interval` is the number
    of seconds between two checks; `store` keeps the progress of uploads.
    """

    def __init__(
        self,
        executor: Executor,
        table: RunTable,
        store: Store,
        gateways: Sequence[GatewayClient],
        *,
        metrics: Metrics,
        interval: float = _INTERVAL,
    ) -> None:
        self._executor = executor
        self._table = table
        self._store = store
        self._gateways = tuple(gateways)
        self._interval = interval
        self._cooldowns: dict[str, tuple[float, float]] = {}  # gateway or run -> backoff, end
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._worker: asyncio.Task[None] | None = None
        self._pending = metrics.gauge(
            "gateway_pending_runs", "Runs whose output is not delivered to a gateway yet."
        )

    def start(self) -> None:
        """Start the upload task."""
        self._worker = asyncio.create_task(self._work(), name="uploads")

    async def close(self) -> None:
        """Stop; unfinished uploads continue after the next start."""
        if self._worker is not None:
            await cancelled(self._worker)
        for task in self._tasks.values():
            await cancelled(task)

    async def _work(self) -> None:
        while True:
            try:
                self.start_due_uploads()
            except GridError as error:
                _log.warning("uploads not read", error=error.message)
            await asyncio.sleep(self._interval)

    def start_due_uploads(self) -> None:
        """Begin the uploads that are due, a limited number at a time."""
        for key in [key for key, task in self._tasks.items() if task.done()]:
            del self._tasks[key]
        uploads = {record.key: record for record in self._open_uploads()}
        for run in self._table.open():
            if run.handle is not None and run.key not in uploads and not self._finished(run.key):
                uploads[run.key] = Upload(run.key, run.job_id, run.handle, since=int(time.time()))
                self._save(uploads[run.key])
        self._pending.set(len(uploads))
        for upload in uploads.values():
            if len(self._tasks) >= _MAX_UPLOADS:
                return
            if upload.key not in self._tasks and not self._has_cooldown(upload.key):
                self._tasks[upload.key] = asyncio.create_task(self._run_upload(upload))

    async def _run_upload(self, upload: Upload) -> None:
        """Upload the new output of one run."""
        run = self._table.get(upload.job_id)
        ended = run is None or run.key != upload.key or run.phase in {Phase.ENDED, Phase.CLOSED}
        try:
            await self.deliver(upload, ended=ended)
        except WrongAccountError as error:
            _log.info("output rejected", job=upload.job_id, error=error.message)
            self._start_cooldown(upload.key)
            if run is None or run.key != upload.key:
                self._give_up(upload, "the job was assigned to another provider")
        except GridError as error:
            _log.warning("output not delivered", job=upload.job_id, error=error.message)
            self._start_cooldown(upload.key)
        except OSError as error:
            _log.warning("output not read", job=upload.job_id, error=error.strerror)
            self._start_cooldown(upload.key)
        except Exception as error:  # noqa: BLE001 - only this task can log it
            _log.error("delivery failed", job=upload.job_id, exc_info=error)
            self._start_cooldown(upload.key)
        else:
            self._cooldowns.pop(upload.key, None)
        if time.time() - upload.since > _GIVE_UP_SECONDS:
            self._give_up(upload, "no gateway accepted it within days")

    async def deliver(self, upload: Upload, *, ended: bool) -> Upload:
        """Upload the new output of a run; everything once the run has ended.

        Raises:
            GridError: No gateway accepts it now.
            OSError: The run's folder can't be read.
        """
        folder = self._executor.folder(upload.handle)
        gateway = await self._gateway_of(upload)
        upload = replace(upload, gateway=gateway.url)
        if not upload.log_done:
            upload = await self._log(gateway, upload, folder, ended=ended)
        if ended and upload.log_done and not upload.done:
            if folder.exists():
                await self._results(gateway, upload, folder)
            upload = replace(upload, done=True)
            self._save(upload)
            _log.info("output delivered", job=upload.job_id, gateway=gateway.display_url)
        return upload

    async def _gateway_of(self, upload: Upload) -> GatewayClient:
        """Return the gateway of a run: the one that has its definition.

        Raises:
            GridError: No gateway that answers has it.
        """
        failure: GridError | None = None
        for gateway in self._gateways:
            if upload.gateway in {"", gateway.url}:
                if self._has_cooldown(gateway.url):
                    failure = EndpointError(
                        f"The gateway at {gateway.display_url} did not respond recently"
                    )
                    continue
                try:
                    if upload.gateway or await gateway.size(upload.job_id, LOG) is not None:
                        return gateway
                except WrongAccountError as error:
                    failure = failure or error
                except GridError as error:
                    self._start_cooldown(gateway.url)
                    failure = error
        raise failure or NotFoundError(f"No gateway has the definition of job {upload.job_id}")

    async def _log(
        self, gateway: GatewayClient, upload: Upload, folder: Path, *, ended: bool
    ) -> Upload:
        """Append the new output of a run to its log."""
        recipients = self._table.recipients(upload.key)
        rewinds = 0
        while True:
            part = await asyncio.to_thread(_read_log, folder, upload.position)
            complete = ended and not part[0]
            if not part[0] and not complete:
                return upload
            data = part[0]
            if data and recipients:
                data = encrypted_log_part(
                    *(upload.job_id, upload.position, part[1], data, recipients),
                    first=not upload.offset,
                )
            try:
                remote = await gateway.append(
                    *(upload.job_id, LOG, upload.offset, data),
                    complete=complete,
                    exact=bool(recipients),
                )
            except GatewayRefusedError as error:
                if error.code == "wrong-offset" and rewinds < _REWINDS:
                    rewinds += 1
                    upload = _resume_position(upload, error.offset or 0, encrypted=bool(recipients))
                    continue
                if error.code not in {"quota", "complete"}:
                    raise
                _log.warning("log truncated", job=upload.job_id, error=error.message)
                if error.code == "quota":
                    remote = await gateway.append(
                        upload.job_id, LOG, upload.offset, b"", complete=True
                    )
                complete = True
            upload = replace(
                upload,
                position=part[1],
                offset=upload.offset + len(data),
                log_done=complete or remote.complete,
            )
            self._save(upload)
            if upload.log_done:
                return upload

    async def _results(self, gateway: GatewayClient, upload: Upload, folder: Path) -> None:
        """Upload the kept output and the files of the working folder, then their list."""
        recipients = self._table.recipients(upload.key)
        if recipients:
            await self._encrypted_results(gateway, upload, folder, recipients)
            return
        entries = []
        for file in await asyncio.to_thread(result_files, folder):
            problem = file.problem
            if not problem and not is_file_name(file.name):
                problem = "its name can't be delivered"
            if not problem:
                problem = await self._file(gateway, upload.job_id, folder, file)
            entries.append(_entry(file, problem))
        await gateway.put_results(upload.job_id, entries)

    async def _encrypted_results(
        self, gateway: GatewayClient, upload: Upload, folder: Path, recipients: Sequence[str]
    ) -> None:
        """Upload the results encrypted: files are named by number, and their list is encrypted too.

        Encrypted files stay in the folder until all are delivered, so that an interrupted upload
        resumes with the same bytes.
        """
        manifest_entries, uploaded = [], []
        for number, file in enumerate(await asyncio.to_thread(result_files, folder)):
            problem, part = file.problem, f"{FOLDER}/{number}"
            if not problem:
                sealed = await asyncio.to_thread(_encrypted, folder, file.name, part, recipients)
                problem = await self._file(gateway, upload.job_id, folder, sealed)
                if not problem:
                    uploaded.append(_entry(sealed, ""))
            manifest_entries.append({**_entry(file, problem), "part": part})
        data = manifest(upload.job_id, manifest_entries)
        sealed = await asyncio.to_thread(_encrypted, folder, None, MANIFEST, recipients, data)
        problem = await self._file(gateway, upload.job_id, folder, sealed)
        await gateway.put_results(upload.job_id, [*uploaded, _entry(sealed, problem)])
        await asyncio.to_thread(shutil.rmtree, folder / FOLDER, ignore_errors=True)

    async def _file(
        self, gateway: GatewayClient, job_id: int, folder: Path, file: ResultFile
    ) -> str:
        """Upload the missing part of a file; returns the problem, or an empty string."""
        remote = await gateway.size(job_id, file.name)
        if remote is not None and remote.complete:
            return "" if remote.size == file.size else "another file of that name was delivered"
        offset = remote.size if remote is not None else 0
        try:
            while True:
                limit = min(_FILE_PART, file.size - offset)
                data = await asyncio.to_thread(_read_file, folder, file.name, offset, limit)
                if len(data) < limit:
                    return "it was truncated during the upload"
                complete = offset + len(data) >= file.size
                await gateway.append(job_id, file.name, offset, data, complete=complete)
                offset += len(data)
                if complete:
                    return ""
        except GatewayRefusedError as error:
            if error.code != "quota":
                raise
            return "it is too large for the gateway"

    # -- records

    def _open_uploads(self) -> list[Upload]:
        with self._store.read() as connection:
            query = select(_uploads).where(_uploads.c.done.is_(False)).order_by(_uploads.c.since)
            return [Upload(**row._mapping) for row in connection.execute(query)]  # noqa: SLF001

    def _finished(self, key: str) -> bool:
        with self._store.read() as connection:
            query = select(_uploads.c.key).where(_uploads.c.key == key)
            return connection.execute(query).first() is not None

    def _save(self, upload: Upload) -> None:
        values = {name: getattr(upload, name) for name in Upload.__slots__}
        with self._store.begin(durable=False) as connection:
            connection.execute(delete(_uploads).where(_uploads.c.key == upload.key))
            connection.execute(insert(_uploads).values(values))

    def _give_up(self, upload: Upload, why: str) -> None:
        _log.warning("output given up", job=upload.job_id, reason=why)
        self._save(replace(upload, done=True))

    # -- backoff

    def _has_cooldown(self, key: str) -> bool:
        return self._cooldowns.get(key, (0.0, 0.0))[1] > time.monotonic()

    def _start_cooldown(self, key: str) -> None:
        shortest, longest = _PAUSES
        pause = min(longest, 2 * self._cooldowns.get(key, (shortest / 2, 0.0))[0])
        self._cooldowns[key] = (pause, time.monotonic() + pause)


def _resume_position(upload: Upload, size: int, *, encrypted: bool) -> Upload:
    """Return the position from which to resume a log that has `size` bytes at the gateway."""
    if not encrypted:
        return replace(upload, position=0, offset=0)  # the gateway ignores parts that it has
    # Encryption never yields the same bytes twice: readers skip repeated output.
    lost = size < upload.offset
    return replace(upload, position=0 if lost else upload.position, offset=size)


def _encrypted(
    folder: Path, name: str | None, part: str, recipients: Sequence[str], data: bytes = b""
) -> ResultFile:
    """Encrypt a file of a run, or data, into a file of its folder, unless that exists."""
    path = folder / part
    if not path.exists():
        path.parent.mkdir(mode=0o700, exist_ok=True)
        temporary = path.with_name(f".{path.name}.new")
        with _source(folder, name, data) as source, temporary.open("wb") as target:
            encrypt_file(source, target, recipients)
            target.flush()
            os.fsync(target.fileno())  # after a power loss the name must not be of an empty file
        temporary.replace(path)
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_FILE_PART):
            sha256.update(chunk)
        return ResultFile(part, file.tell(), sha256.hexdigest())


def _source(folder: Path, name: str | None, data: bytes) -> BinaryIO:
    if name is None:
        return io.BytesIO(data)
    if name == "output":
        return io.BytesIO(read_kept(RunFolder(folder).output, 0, 2 * OUTPUT_LIMIT))
    return open_regular(folder / name)


def _read_log(folder: Path, position: int) -> tuple[bytes, int]:
    with contextlib.suppress(NotFoundError):
        return read_output(folder, position, _LOG_PART)
    return b"", position


def _read_file(folder: Path, name: str, offset: int, limit: int) -> bytes:
    if limit <= 0:
        return b""
    if name == "output":
        return read_kept(RunFolder(folder).output, offset, limit)
    return read_bytes(folder / name, offset, limit)


def _entry(file: ResultFile, problem: str) -> dict[str, Any]:
    name = file.name.encode("utf-8", "replace").decode()
    return {
        "name": name,
        "size": file.size,
        "digest": file.digest,
        "problem": problem,
        "special": file.special,
    }
