"""Customer operations on gateways: upload definitions, follow logs, download and verify results."""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.signers import Signer
from deepsquare_chain.chain.wallet import read_secret
from deepsquare_chain.client.jobs import (
    RETRY_PAUSES,
    OnOutage,
    reported_digest,
    with_endpoint_retries,
)
from deepsquare_chain.client.network import transport_of
from deepsquare_chain.daemon.loop import cancelled
from deepsquare_chain.errors import AuditError, EndpointError, GridError, NotFoundError, UsageError
from deepsquare_chain.job import Job, JobStatus
from deepsquare_chain.notification import Notify, standing_request
from deepsquare_chain.observability.redaction import plain
from deepsquare_chain.provider.outputs import (
    ResultFile,
    closed_folder,
    create_folder,
    find_run,
    has_ended,
    result_files,
)
from deepsquare_chain.settings import Settings
from deepsquare_chain.store.database import Database
from deepsquare_chain.store.definitions import DefinitionStore, FolderDefinitionStore
from deepsquare_chain.store.encryption import (
    MANIFEST,
    LogDecoder,
    ResultKey,
    find_result_key,
    read_manifest,
)
from deepsquare_chain.store.gateway_client import (
    LOG,
    GatewayClient,
    GatewayDefinitionStore,
    NotDeliveredError,
    WrongAccountError,
    gateway_urls,
    is_file_name,
    open_gateways,
)
from deepsquare_chain.store.notifications import remember_notify
from deepsquare_chain.workflow import parse_duration

#: Poll interval in seconds.
_POLL_SECONDS: Final = 1.0
#: Seconds to wait for the next part of the log or of the results after a job has ended: after an
#: outage of the gateway, the provider retries within 30 seconds.
_DELIVERY_SECONDS: Final = 40.0
#: Length of a block of zeros that is saved as a hole of the file.
_HOLE: Final = 64 * 1024
#: Maximum number of consecutive failures of a download without progress.
_MAX_FAILURES: Final = 5
_OUTPUT: Final = "output"
_MAX_OUTPUT: Final = 16 * 1024 * 1024
_MAX_MANIFEST: Final = 16 * 1024 * 1024


@asynccontextmanager
async def gateways_of(
    settings: Settings, deployment: Deployment, account: Signer | None
) -> AsyncIterator[tuple[GatewayClient, ...]]:
    """Open the gateways of the settings for an account; empty if definitions are in a folder."""
    async with open_gateways(
        gateway_urls(settings, deployment), account, deployment, transport_of(settings)
    ) as gateways:
        yield gateways


@asynccontextmanager
async def definitions_of(
    settings: Settings, deployment: Deployment, account: Signer
) -> AsyncIterator[DefinitionStore]:
    """Open the store of definitions: the gateways of the settings, else the shared folder."""
    async with gateways_of(settings, deployment, account) as gateways:
        if gateways:
            yield GatewayDefinitionStore(gateways)
        else:
            yield FolderDefinitionStore(settings.store)


def webhook_key(settings: Settings) -> str:
    """Return the key that signs webhooks; "" without one.

    Raises:
        NotFoundError: Its file does not exist.
        UsageError: It is empty or readable by others.
    """
    if settings.notify_key_file is None:
        return ""
    return read_secret(settings.notify_key_file, "key of webhooks")


async def request_notifications(
    settings: Settings,
    store: Database,
    gateways: Sequence[GatewayClient],
    definitions: Sequence[str],
    notify: Notify,
) -> None:
    """Request notifications of jobs before they are submitted, from whom the settings name.

    Args:
        settings: The setting `notify_by` names `notify run`, which reads the wallet's database, or
            the first gateway. Each event is sent by one of them.
        store: The wallet's database.
        gateways: The gateways of the settings.
        definitions: Digests (hexadecimal) of the definitions.
        notify: The request of the job file.

    Raises:
        UsageError: A gateway is to notify, and there is none or it refuses.
        EndpointError: The gateway is down.
    """
    if settings.notify_by == "run":
        remember_notify(store, definitions, notify)
        return
    remember_notify(store, definitions, Notify())
    requests = (standing_request(settings.notify_to, settings.notify_on), notify)
    if not gateways:
        if any(request.to for request in requests):
            raise no_gateway()
        return
    try:
        await gateways[0].register_notifications(definitions, requests, webhook_key(settings))
    except NotFoundError:
        if any(request.to for request in requests):
            raise UsageError(
                f"The gateway at {gateways[0].display_url} sends no notifications",
                hint="Set notify_by to run, and start `deepsquare notify run`.",
            ) from None


def no_gateway() -> UsageError:
    """Return the error of a command that needs a gateway if none is set."""
    return UsageError(
        "No gateway is configured, and the deployment record has none",
        hint="Give one with --gateway or DEEPSQUARE_GATEWAY; `deepsquare gateway serve` runs one.",
    )


def parse_share_end(text: str) -> int:
    """Parse the end of a share, a date or a duration from now such as 7d, into epoch seconds.

    Raises:
        UsageError: The text is invalid, or the time is in the past.
    """
    now = time.time()
    try:
        ends = now + parse_duration(text)
    except ValueError:
        try:
            date = datetime.fromisoformat(text)
        except ValueError:
            raise UsageError(
                f"--until: {text[:40]!r} is neither a date nor a time",
                hint="Write 2026-12-24, 2026-12-24T18:00 (UTC), 7d or 12h.",
            ) from None
        ends = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    if ends <= now:
        raise UsageError(f"--until: {text[:40]} is in the past", hint="Give a date in the future.")
    return int(ends)


async def read_log(
    contracts: Contracts,
    gateways: Sequence[GatewayClient],
    job_id: int,
    *,
    follow: bool,
    key_file: Path | None = None,
    on_outage: OnOutage | None = None,
) -> AsyncIterator[bytes]:
    """Stream a job's log from the beginning; with `follow` until its end, with reconnects.

    An encrypted log is decrypted with the age key in `key_file`.

    Raises:
        NotFoundError: The job does not exist, or no gateway has its log.
        NotAuthorisedError: The account may not read it, or the key does not decrypt it.
        AuditError: The encrypted log was altered, or its end is missing.
        EndpointError: No gateway answers; with `follow`, only raised after the end of the job.
    """
    decoder = LogDecoder(job_id, key_file)
    if follow:
        raw = _follow(contracts, gateways, job_id, on_outage)
    else:
        raw = _read(contracts, gateways, job_id)
    async with aclosing(raw) as chunks:  # close it even if the decoder raises
        async for data in chunks:
            if decoded := decoder.feed(data):
                yield decoded
    if rest := decoder.finish(complete=follow):
        yield rest


async def _read(
    contracts: Contracts, gateways: Sequence[GatewayClient], job_id: int
) -> AsyncGenerator[bytes]:
    job = await contracts.scheduler.get_job(job_id)
    gateway = await _gateway_with_log(gateways, job_id)
    if gateway is None:
        raise _no_log(job)
    async with gateway.download(job_id, LOG) as chunks:
        async for data in chunks:
            yield data


async def _follow(
    contracts: Contracts, gateways: Sequence[GatewayClient], job_id: int, on_outage: OnOutage | None
) -> AsyncGenerator[bytes]:
    await contracts.scheduler.get_job(job_id)
    ended = asyncio.create_task(_until_ended(contracts, job_id))
    offset, is_failing, (pause, longest) = 0, False, RETRY_PAUSES
    try:
        while True:
            try:
                gateway = (
                    gateways[0] if len(gateways) == 1 else await _gateway_with_log(gateways, job_id)
                )
                if gateway is not None:
                    log = gateway.follow(job_id, offset)
                    async for part in _until_log_timeout(log, ended):
                        if is_failing and on_outage is not None:
                            on_outage(None)
                        is_failing, pause = False, RETRY_PAUSES[0]
                        if part.end:
                            return
                        offset = part.offset
                        yield part.data
            except WrongAccountError:
                raise
            except EndpointError as error:
                if on_outage is not None and not is_failing:
                    on_outage(error)
                is_failing = True
                if _is_overdue(ended):
                    raise
            if _is_overdue(ended):
                if not offset:
                    raise _no_log(ended.result()[0])
                raise EndpointError(
                    f"The provider of job {job_id} has not delivered the end of its log",
                    hint=f"Try `deepsquare job logs {job_id}` again later.",
                )
            await asyncio.sleep(pause if is_failing else _POLL_SECONDS)
            pause = min(longest, 2 * pause)
    finally:
        await cancelled(ended)


async def _until_log_timeout(
    log: AsyncIterator[Any], ended: asyncio.Task[Any]
) -> AsyncIterator[Any]:
    """Yield the parts of a log, until none arrives for a while after the end of the job."""
    reading: asyncio.Task[Any] | None = None
    try:
        while True:
            reading = reading or asyncio.ensure_future(anext(log))
            await asyncio.wait({reading}, timeout=_POLL_SECONDS)
            if reading.done():
                task, reading = reading, None
                try:
                    part = task.result()
                except StopAsyncIteration:
                    return
                yield part
            elif _is_overdue(ended):
                return
    finally:
        if reading is not None:
            await cancelled(reading)


async def _until_ended(contracts: Contracts, job_id: int) -> tuple[Job, float]:
    """Wait for the end of a job; return it and the time of observation (monotonic seconds)."""
    while True:
        job = await with_endpoint_retries(partial(contracts.scheduler.get_job, job_id))
        if job.status.is_final:
            return job, time.monotonic()
        await asyncio.sleep(_POLL_SECONDS)


def _is_overdue(ended: asyncio.Task[tuple[Job, float]]) -> bool:
    if not ended.done():
        return False
    job, ended_at = ended.result()
    # A job that no provider has started has no log.
    return not job.rate or time.monotonic() - ended_at > _DELIVERY_SECONDS


async def _gateway_with_log(gateways: Sequence[GatewayClient], job_id: int) -> GatewayClient | None:
    """Return the gateway that has a job's log; None if no gateway has it.

    Raises:
        GridError: A gateway is down or refuses, and none of the others has the log.
    """
    failure: GridError | None = None
    for gateway in gateways:
        try:
            if await gateway.size(job_id, LOG) is not None:
                return gateway
        except GridError as error:
            failure = failure or error
    if failure is not None:
        raise failure
    return None


def _no_log(job: Job) -> NotFoundError:
    hint = "Its provider has not delivered one yet; `deepsquare job logs -f` waits for it."
    if job.status.is_live and job.status is not JobStatus.RUNNING:
        hint = f"It has not started; see `deepsquare job why {job.id}`."
    return NotFoundError(f"No gateway has a log of job {job.id} ({job.status.name})", hint=hint)


async def remote_results(
    contracts: Contracts,
    gateways: Sequence[GatewayClient],
    job_id: int,
    to: Path | None = None,
    *,
    report: Callable[[str], None] = lambda _: None,
    key_file: Path | None = None,
) -> tuple[list[ResultFile], str]:
    """Return the files of a job at a gateway, and the digest of its output on chain.

    The output is always verified by the digest on chain. The other files are verified by the
    provider's list when they are downloaded. Encrypted files are decrypted before the check.

    `to` is a new folder for the download, with the files `output` and `work/...`; `key_file` holds
    the age key for encrypted results. `report` is called when a download resumes after a failure,
    and when results are decrypted.

    Raises:
        NotFoundError: The job does not exist, or its provider has not uploaded its results.
        UsageError: The job has not ended, or the folder exists.
        AuditError: The output does not match the digest on chain; nothing was written.
        NotAuthorisedError: The account may not read it, or the key does not decrypt it.
        EndpointError: No gateway answers.
    """
    job = await contracts.scheduler.get_job(job_id)
    if not job.status.is_final:
        raise UsageError(
            f"Job {job_id} has not ended: it is {job.status.name}",
            hint=f"Wait for it with `deepsquare job watch {job_id}`.",
        )
    gateway, delivered = await _wait_for_results(gateways, job, report)
    source = await _source(gateway, job_id, delivered, report, key_file)
    reported = await reported_digest(contracts, job_id)
    output = await source.output()
    if reported and (output is None or hashlib.sha256(output).hexdigest() != reported):
        raise AuditError(
            f"The output of job {job_id} at {gateway.display_url} is not the one that its provider "
            "reported on chain",
            hint="It was changed since, or belongs to another run; ask the provider.",
        )
    files = source.files
    if to is not None:
        create_folder(to)
        files = [await source.save(file, to) for file in files]
    return files, reported


async def _wait_for_results(
    gateways: Sequence[GatewayClient], job: Job, report: Callable[[str], None]
) -> tuple[GatewayClient, list[ResultFile]]:
    """Return the gateway that has the results, and their list; waits while more of them arrives."""
    deadline, received, reported = time.monotonic() + _DELIVERY_SECONDS, 0, False
    while True:
        failures: list[GridError] = []
        for gateway in gateways:
            try:
                entries = await gateway.results(job.id)
                return gateway, [_result_file(entry) for entry in entries]
            except NotDeliveredError as pending:
                if pending.received > received:
                    deadline = time.monotonic() + _DELIVERY_SECONDS
                    received = pending.received
            except GridError as error:
                failures.append(error)
        if len(failures) == len(gateways) or not job.rate or time.monotonic() > deadline:
            break
        if not reported:
            report(f"The provider of job {job.id} is delivering its results ...")
            reported = True
        await asyncio.sleep(_POLL_SECONDS)
    if failures:
        raise failures[0]
    raise NotFoundError(
        f"The provider of job {job.id} ({job.status.name}) has not delivered its results",
        hint="They are delivered after the end of the run; try again later."
        if job.rate
        else "It ended before a provider ran it.",
    )


def _result_file(entry: dict[str, Any]) -> ResultFile:
    """Return a file of a provider's list, which is untrusted: names and lengths are checked."""
    name, digest = plain(str(entry.get("name")))[:1_024], str(entry.get("digest"))[:64]
    size = entry.get("size")
    problem = plain(str(entry.get("problem") or ""))[:300]
    if type(size) is not int or size < 0:
        size, problem = 0, problem or "its size is not known"
    if not problem and (not is_file_name(name) or name == LOG):
        problem = "its name points outside of the folder; not downloaded"
    return ResultFile(name, size, digest, problem, entry.get("special") is True)


async def _source(
    gateway: GatewayClient,
    job_id: int,
    delivered: list[ResultFile],
    report: Callable[[str], None],
    key_file: Path | None,
) -> _Source:
    """Return the source of the listed files; encrypted results contain a manifest."""
    parts = {listed_file.name: listed_file for listed_file in delivered if not listed_file.problem}
    plain_source = _Source(gateway, job_id, delivered, report)
    if MANIFEST not in parts:
        return plain_source
    key = find_result_key(key_file, f"The result of job {job_id}")
    sealed = await plain_source.read(parts[MANIFEST], _MAX_MANIFEST)
    entries = read_manifest(await asyncio.to_thread(key.decrypt, sealed), job_id)
    report(f"The results of job {job_id} are encrypted; decrypted with {key.path}.")
    files = [_result_file(entry) for entry in entries]
    encrypted_files = {
        file.name: parts.get(str(entry.get("part")))
        for file, entry in zip(files, entries, strict=True)
    }
    return _EncryptedSource(gateway, job_id, files, report, key, encrypted_files)


@dataclass(frozen=True, slots=True)
class _Source:
    """Downloads the files of a job from a gateway and verifies them by the provider's list."""

    gateway: GatewayClient
    job_id: int
    files: list[ResultFile]
    report: Callable[[str], None]

    async def output(self) -> bytes | None:
        """Return the output that the provider kept; None if there is none."""
        file = next((item for item in self.files if item.name == _OUTPUT), None)
        return None if file is None or file.problem else await self.read(file, _MAX_OUTPUT)

    async def read(self, file: ResultFile, limit: int) -> bytes:
        """Return the content of a small file.

        Raises:
            EndpointError: The file is longer than `limit` bytes, or the gateway does not answer.
        """
        data = bytearray()
        async with self.gateway.download(self.job_id, file.name) as chunks:
            async for chunk in chunks:
                data += chunk
                if len(data) > limit:
                    raise EndpointError(
                        f"{file.name} of job {self.job_id} at {self.gateway.display_url} is longer "
                        "than any provider makes it"
                    )
        return bytes(data)

    async def save(self, file: ResultFile, to: Path) -> ResultFile:
        """Download a file and verify it by the digest in the provider's list."""
        if file.problem:
            return file
        path = to / file.name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as target:
                digest = await self.copy(file, target)
        except OSError as error:
            return _mark_unsaved(file, path, f"can't be written: {error.strerror}")
        except GridError as error:
            return _mark_unsaved(file, path, f"can't be downloaded: {error.message}")
        if digest != file.digest:
            return _mark_unsaved(file, path, "does not match the provider's digest; not kept")
        return file

    async def copy(self, file: ResultFile, target: BinaryIO) -> str:
        """Write a file's content into an open file, and return its SHA-256."""
        return await _download(self.gateway, self.job_id, file, target, self.report)


@dataclass(frozen=True, slots=True)
class _EncryptedSource(_Source):
    """A source of encrypted files; `encrypted_files` has the encrypted file of each name."""

    key: ResultKey
    encrypted_files: Mapping[str, ResultFile | None]

    async def read(self, file: ResultFile, limit: int) -> bytes:
        """Return the decrypted content of a small file; errors as in the base class."""
        # Without arguments, `super()` does not work in a dataclass with slots.
        sealed = await _Source.read(self, self._encrypted(file), 2 * limit)
        return await asyncio.to_thread(self.key.decrypt, sealed)

    async def copy(self, file: ResultFile, target: BinaryIO) -> str:
        """Write the decrypted content into an open file; the encrypted one goes to a temporary file.

        Returns:
            The SHA-256 of the decrypted content; empty if the encrypted file does not match.
        """
        sealed = self._encrypted(file)
        with tempfile.TemporaryFile(dir=Path(target.name).parent) as temporary:
            digest = await _download(self.gateway, self.job_id, sealed, temporary, self.report)
            if digest != sealed.digest:
                return ""
            temporary.seek(0)
            return await asyncio.to_thread(self._decrypted, temporary, target)

    def _decrypted(self, source: BinaryIO, target: BinaryIO) -> str:
        writer = _HashingWriter(target)
        self.key.decrypt_file(source, writer)
        return writer.digest.hexdigest()

    def _encrypted(self, file: ResultFile) -> ResultFile:
        encrypted_file = self.encrypted_files.get(file.name)
        if encrypted_file is None:
            raise NotFoundError(
                f"The gateway at {self.gateway.display_url} lacks the encrypted file"
            )
        return encrypted_file


class _HashingWriter:
    """Writes to a file and computes the SHA-256 of all data."""

    def __init__(self, target: BinaryIO) -> None:
        self._target = target
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Write the data and update the digest."""
        self.digest.update(data)
        return _write_sparse(self._target, data)


def _mark_unsaved(file: ResultFile, path: Path, problem: str) -> ResultFile:
    with suppress(OSError):
        path.unlink()
    return ResultFile(file.name, file.size, "", problem)


def _write_sparse(target: BinaryIO, data: bytes) -> int:
    """Write data at the end of a new file, with holes for blocks of zeros; return its length."""
    for start in range(0, len(data), _HOLE):
        block = data[start : start + _HOLE]
        if block.count(0) == len(block):
            target.truncate(target.seek(len(block), os.SEEK_CUR))
        else:
            target.write(block)
    return len(data)


async def _download(
    gateway: GatewayClient,
    job_id: int,
    file: ResultFile,
    target: BinaryIO,
    report: Callable[[str], None],
) -> str:
    """Download into an open file, resuming after failures; return the SHA-256 of the content.

    The digest is empty if the gateway sends more bytes than listed.
    """
    content_hash, position, tries_left = hashlib.sha256(), 0, _MAX_FAILURES
    pause, longest = RETRY_PAUSES
    while position < file.size:
        before = position
        try:
            async with gateway.download(job_id, file.name, position) as chunks:
                async for chunk in chunks:
                    position += len(chunk)
                    if position > file.size:
                        return ""
                    content_hash.update(chunk)
                    await asyncio.to_thread(_write_sparse, target, chunk)
        except WrongAccountError:
            raise
        except EndpointError as error:
            tries_left, pause = (
                (_MAX_FAILURES, RETRY_PAUSES[0])
                if position > before
                else (tries_left - 1, min(longest, 2 * pause))
            )
            if not tries_left:
                raise
            report(f"{file.name}: {error.message}; continuing at byte {position}.")
            await asyncio.sleep(pause)
        else:
            if position == before:
                break  # the file at the gateway is shorter than listed
    return content_hash.hexdigest()


@dataclass(frozen=True, slots=True)
class Result(ResultFile):
    """A result file of a job.

    `on_chain` is True if the digest matches the one reported on chain, and None if none was reported
    for this file, or the file was not read.
    """

    on_chain: bool | None = None


async def job_results(
    contracts: Contracts,
    root: Path,
    job_id: int,
    to: Path | None = None,
    *,
    gateways: Sequence[GatewayClient] = (),
    report: Callable[[str], None] = lambda _: None,
    key_file: Path | None = None,
) -> list[Result]:
    """Return the output and files of an ended job, from a gateway or else from this machine.

    Args:
        contracts: Contracts of the deployment.
        root: A provider's state folder, or a folder of several; used if there are no gateways.
        job_id: The job.
        to: A new folder for copies, written after the output was verified.
        gateways: Gateways to read from.
        report: Called when a download resumes after a failure, and when results are decrypted.
        key_file: File of the age key for encrypted results at a gateway.

    Raises:
        NotFoundError: The job does not exist, no provider below `root` has run it, or its provider
            has not uploaded its results to a gateway.
        UsageError: The job has not ended, or the folder exists.
        AuditError: The output does not match the digest on chain; nothing was copied.
        GridError: No gateway answers, or none permits this account to read it.
    """
    if gateways:
        files, reported = await remote_results(
            contracts, gateways, job_id, to, report=report, key_file=key_file
        )
        return _compare_digest(files, reported, job_id, gateways[0].display_url)
    job = await contracts.scheduler.get_job(job_id)
    grid = contracts.deployment.chain_id, contracts.scheduler.address
    run = await asyncio.to_thread(find_run, root, *grid, job_id)
    if run is None:
        raise no_run(job, root)
    if not job.status.is_final or not has_ended(run):
        raise UsageError(
            f"Job {job_id} has not ended: it is {job.status.name}",
            hint=f"Wait for it with `deepsquare job watch {job_id}`.",
        )
    on_chain = await reported_digest(contracts, job_id)
    location = f"below {run}"
    results = _compare_digest(
        await asyncio.to_thread(result_files, run), on_chain, job_id, location
    )
    if to is not None:
        files = await asyncio.to_thread(result_files, run, to)
        results = _compare_digest(files, on_chain, job_id, location)
    return results


def no_run(job: Job, root: Path) -> NotFoundError:
    """Return the error for a job without a run folder on this machine."""
    hint = "Output is read from a provider on this machine: give its state_dir (--state-dir)."
    unreadable_folder = closed_folder(root)
    if unreadable_folder is not None:
        hint = f"{unreadable_folder} can't be read by this user: ask its owner, or give another --state-dir."
    elif job.status.is_live and job.status is not JobStatus.RUNNING:
        hint = f"It has not started; see `deepsquare job why {job.id}`."
    return NotFoundError(
        f"No run of job {job.id} ({job.status.name}) is kept below {root}", hint=hint
    )


def _compare_digest(
    files: Sequence[ResultFile], reported: str, job_id: int, location: str
) -> list[Result]:
    output = files[0] if files and files[0].name == "output" else None
    unreadable = output is not None and not output.digest
    if reported and not unreadable and (output is None or output.digest != reported):
        raise AuditError(
            f"The output of job {job_id} {location} does not match the digest that its provider reported",
            hint="It was changed since, or belongs to another run; ask the provider.",
        )
    # Only the digest of the output is on chain.
    return [
        Result(
            **asdict(file), on_chain=True if reported and file is output and file.digest else None
        )
        for file in files
    ]
