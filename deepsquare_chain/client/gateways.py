"""What customers do with gateways: upload definitions, follow logs, download results."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.signers import Signer
from deepsquare_chain.client.history import reported_digest
from deepsquare_chain.client.network import transport_of
from deepsquare_chain.client.watching import OnTrouble, until_answered
from deepsquare_chain.daemon.loop import cancelled
from deepsquare_chain.errors import AuditError, EndpointError, GridError, NotFoundError, UsageError
from deepsquare_chain.job import Job, JobStatus
from deepsquare_chain.observability.redaction import plain
from deepsquare_chain.provider.outputs import ResultFile
from deepsquare_chain.settings import Settings
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
    WrongAccountError,
    gateway_urls,
    is_file_name,
    open_gateways,
)
from deepsquare_chain.workflow import parse_duration

#: Seconds between two looks which gateway has a log, and before a lost connection is made again.
_LOOK: Final = 1.0
_PAUSES: Final = (0.5, 10.0)
#: Seconds for which the rest of a log is waited for after its job has ended.
_LATE: Final = 20.0
#: Seconds for which the results of an ended job are waited for: they come after its report.
_DELIVERY: Final = 15.0
#: Tries to go on with a download that was cut off, without a byte in between.
_TRIES: Final = 5
_OUTPUT: Final = "output"
_MAX_OUTPUT: Final = 16 * 1024 * 1024
_MAX_MANIFEST: Final = 16 * 1024 * 1024


@asynccontextmanager
async def gateways_of(
    settings: Settings, deployment: Deployment, account: Signer | None
) -> AsyncIterator[tuple[GatewayClient, ...]]:
    """The gateways of the settings for an account; empty where definitions are in a folder."""
    async with open_gateways(
        gateway_urls(settings, deployment), account, deployment, transport_of(settings)
    ) as gateways:
        yield gateways


@asynccontextmanager
async def definitions_of(
    settings: Settings, deployment: Deployment, account: Signer
) -> AsyncIterator[DefinitionStore]:
    """Where definitions go: the gateways of the settings, else the folder that is shared."""
    async with gateways_of(settings, deployment, account) as gateways:
        if gateways:
            yield GatewayDefinitionStore(gateways)
        else:
            yield FolderDefinitionStore(settings.store)


def no_gateway() -> UsageError:
    """That something needs a gateway, and none is set."""
    return UsageError(
        "No gateway is set, and the deployment record names none",
        hint="Name one with --gateway or DEEPSQUARE_GATEWAY; `deepsquare gateway serve` runs one.",
    )


def share_end(text: str) -> int:
    """When a share ends, in seconds since the epoch: a date, or a time from now such as 7d.

    Raises:
        UsageError: It is neither, or is over.
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
        raise UsageError(f"--until: {text[:40]} is over", hint="Name a date in the future.")
    return int(ends)


async def read_log(
    contracts: Contracts,
    gateways: Sequence[GatewayClient],
    job_id: int,
    *,
    follow: bool,
    key_file: Path | None = None,
    on_trouble: OnTrouble | None = None,
) -> AsyncIterator[bytes]:
    """A job's log from its beginning; with `follow` until its end, through lost connections.

    A log that is encrypted is decrypted with the age key in `key_file`.

    Raises:
        NotFoundError: There is no such job, or no gateway has its log.
        NotAuthorisedError: The account may not read it, or the key does not decrypt it.
        AuditError: It is encrypted and was altered.
        EndpointError: No gateway answers; with `follow`, none does after the end of the job.
    """
    decoder = LogDecoder(job_id, key_file)
    if follow:
        raw = _follow(contracts, gateways, job_id, on_trouble)
    else:
        raw = _read(contracts, gateways, job_id)
    async with aclosing(raw) as pieces:  # also where the decoder raises
        async for data in pieces:
            if found := decoder.feed(data):
                yield found
    if rest := decoder.finish():
        yield rest


async def _read(
    contracts: Contracts, gateways: Sequence[GatewayClient], job_id: int
) -> AsyncGenerator[bytes]:
    job = await contracts.scheduler.get_job(job_id)
    gateway = await _holder(gateways, job_id)
    if gateway is None:
        raise _no_log(job)
    async with gateway.download(job_id, LOG) as pieces:
        async for data in pieces:
            yield data


async def _follow(
    contracts: Contracts,
    gateways: Sequence[GatewayClient],
    job_id: int,
    on_trouble: OnTrouble | None,
) -> AsyncGenerator[bytes]:
    await contracts.scheduler.get_job(job_id)
    ended = asyncio.create_task(_until_ended(contracts, job_id))
    offset, troubled, (pause, longest) = 0, False, _PAUSES
    try:
        while True:
            try:
                gateway = gateways[0] if len(gateways) == 1 else await _holder(gateways, job_id)
                if gateway is not None:
                    log = gateway.follow(job_id, offset)
                    async for part in _until_late(log, ended):
                        if troubled and on_trouble is not None:
                            on_trouble(None)
                        troubled, pause = False, _PAUSES[0]
                        if part.end:
                            return
                        offset = part.offset
                        yield part.data
            except WrongAccountError:
                raise
            except EndpointError as error:
                if on_trouble is not None and not troubled:
                    on_trouble(error)
                troubled = True
                if _is_late(ended):
                    raise
            if _is_late(ended):
                if not offset:
                    raise _no_log(ended.result()[0])
                raise EndpointError(
                    f"The provider of job {job_id} has not delivered the end of its log",
                    hint=f"Try `deepsquare job logs {job_id}` again later.",
                )
            await asyncio.sleep(pause if troubled else _LOOK)
            pause = min(longest, 2 * pause)
    finally:
        await cancelled(ended)


async def _until_late(log: AsyncIterator[Any], ended: asyncio.Task[Any]) -> AsyncIterator[Any]:
    """The parts of a log, until nothing comes although its job ended a while ago."""
    reading: asyncio.Task[Any] | None = None
    try:
        while True:
            reading = reading or asyncio.ensure_future(anext(log))
            await asyncio.wait({reading}, timeout=_LOOK)
            if reading.done():
                task, reading = reading, None
                try:
                    part = task.result()
                except StopAsyncIteration:
                    return
                yield part
            elif _is_late(ended):
                return
    finally:
        if reading is not None:
            await cancelled(reading)


async def _until_ended(contracts: Contracts, job_id: int) -> tuple[Job, float]:
    """The job once it has ended, and when that was seen (monotonic seconds)."""
    while True:
        job = await until_answered(partial(contracts.scheduler.get_job, job_id))
        if job.status.is_final:
            return job, time.monotonic()
        await asyncio.sleep(_LOOK)


def _is_late(ended: asyncio.Task[tuple[Job, float]]) -> bool:
    if not ended.done():
        return False
    job, at = ended.result()
    # A job that no provider has started prints nothing.
    return not job.rate or time.monotonic() - at > _LATE


async def _holder(gateways: Sequence[GatewayClient], job_id: int) -> GatewayClient | None:
    """The gateway that has a job's log; None where those that answer have none.

    Raises:
        GridError: None of those that answer has it, and one does not answer or refuses.
    """
    failed: GridError | None = None
    for each in gateways:
        try:
            if await each.size(job_id, LOG) is not None:
                return each
        except GridError as error:
            failed = failed or error
    if failed is not None:
        raise failed
    return None


def _no_log(job: Job) -> NotFoundError:
    hint = "Its provider has delivered none yet; `deepsquare job logs -f` waits for it."
    if job.status.is_live and job.status is not JobStatus.RUNNING:
        hint = f"It has not started: `deepsquare job why {job.id}` tells why."
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
    """What a job left, from a gateway, and the digest of its output that is on chain.

    The output is read and compared with the chain in any case, and the other files with what the
    provider says of them when they are downloaded. What is encrypted is decrypted first.

    Args:
        contracts: The deployment.
        gateways: Where it is looked for.
        job_id: The job.
        to: A new folder to download into; the output becomes `output`, the others `work/...`.
        key_file: File of the age key for results that are encrypted.
        report: Called when a download resumes after it was cut off, and when results are decrypted.

    Raises:
        NotFoundError: There is no such job, or its provider has not delivered its results.
        UsageError: It has not ended, or the folder is there already.
        AuditError: The output is other than the chain says; nothing was written.
        NotAuthorisedError: The account may not read it, or the key does not decrypt it.
        EndpointError: No gateway answers.
    """
    job = await contracts.scheduler.get_job(job_id)
    if not job.status.is_final:
        raise UsageError(
            f"Job {job_id} has not ended: it is {job.status.name}",
            hint=f"Wait for it with `deepsquare job watch {job_id}`.",
        )
    gateway, delivered = await _delivered(gateways, job, report)
    source = await _source(gateway, job_id, delivered, report, key_file)
    reported = await reported_digest(contracts, job_id)
    output = await source.output()
    if reported and (output is None or hashlib.sha256(output).hexdigest() != reported):
        raise AuditError(
            f"The output of job {job_id} at {gateway.place} is not the one that its provider "
            "reported on chain",
            hint="It was changed since, or is another run's; ask the provider.",
        )
    files = source.files
    if to is not None:
        _make(to)
        files = [await source.save(each, to) for each in files]
    return files, reported


async def _delivered(
    gateways: Sequence[GatewayClient], job: Job, report: Callable[[str], None]
) -> tuple[GatewayClient, list[ResultFile]]:
    """The gateway that has the results, and their list; waits a little for a job that ran."""
    deadline, waits = time.monotonic() + _DELIVERY, False
    while True:
        failed: GridError | None = None
        for each in gateways:
            try:
                found = await each.results(job.id)
            except GridError as error:
                failed = failed or error
                continue
            if found is not None:
                return each, [_result_file(entry) for entry in found]
        if failed is not None or not job.rate or time.monotonic() > deadline:
            break
        if not waits:
            report(f"The provider of job {job.id} is delivering its results ...")
            waits = True
        await asyncio.sleep(_LOOK)
    raise failed or NotFoundError(
        f"The provider of job {job.id} ({job.status.name}) has not delivered its results",
        hint="It delivers them after the end of a run; try again later."
        if job.rate
        else "It ended before any provider took it.",
    )


def _result_file(entry: dict[str, Any]) -> ResultFile:
    """A file of a provider's list. The list is a stranger's: names are checked, texts bounded."""
    name, digest = plain(str(entry.get("name")))[:1_024], str(entry.get("digest"))[:64]
    size = entry.get("size")
    problem = plain(str(entry.get("problem") or ""))[:300]
    if type(size) is not int or size < 0:
        size, problem = 0, problem or "its size is not known"
    if not problem and (not is_file_name(name) or name == LOG):
        problem = "its name leads out of the folder, not downloaded"
    return ResultFile(name, size, digest, problem, entry.get("special") is True)


async def _source(
    gateway: GatewayClient,
    job_id: int,
    delivered: list[ResultFile],
    report: Callable[[str], None],
    key_file: Path | None,
) -> _Source:
    """What the list of a provider is read from; an encrypted one has a manifest in it."""
    parts = {each.name: each for each in delivered if not each.problem}
    plain_source = _Source(gateway, job_id, delivered, report)
    if MANIFEST not in parts:
        return plain_source
    key = find_result_key(key_file, f"What job {job_id} left")
    sealed = await plain_source.read(parts[MANIFEST], _MAX_MANIFEST)
    listed = read_manifest(await asyncio.to_thread(key.decrypt, sealed), job_id)
    report(f"The results of job {job_id} are encrypted; decrypted with {key.path}.")
    files = [_result_file(entry) for entry in listed]
    sources = {
        file.name: parts.get(str(entry.get("part")))
        for file, entry in zip(files, listed, strict=True)
    }
    return _EncryptedSource(gateway, job_id, files, report, key=key, sources=sources)


class _Source:
    """Files of one job at one gateway, downloaded and compared with the list of its provider."""

    def __init__(
        self,
        gateway: GatewayClient,
        job_id: int,
        files: list[ResultFile],
        report: Callable[[str], None],
    ) -> None:
        self.files = files
        self._gateway = gateway
        self._job_id = job_id
        self._report = report

    async def output(self) -> bytes | None:
        """What the provider kept of the output; None where there is none."""
        file = next((each for each in self.files if each.name == _OUTPUT), None)
        return None if file is None or file.problem else await self.read(file, _MAX_OUTPUT)

    async def read(self, file: ResultFile, limit: int) -> bytes:
        """The content of a small file.

        Raises:
            EndpointError: It is longer than `limit` bytes, or the gateway does not answer.
        """
        data = bytearray()
        async with self._gateway.download(self._job_id, file.name) as pieces:
            async for piece in pieces:
                data += piece
                if len(data) > limit:
                    raise EndpointError(
                        f"{file.name} of job {self._job_id} at {self._gateway.place} is longer "
                        "than any provider makes it"
                    )
        return bytes(data)

    async def save(self, file: ResultFile, to: Path) -> ResultFile:
        """Download a file and compare it with what the provider says of it."""
        if file.problem:
            return file
        path = to / file.name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as target:
                digest = await self.copy(file, target)
        except OSError as error:
            return _unsaved(file, path, f"can't be written: {error.strerror}")
        except GridError as error:
            return _unsaved(file, path, f"can't be downloaded: {error.message}")
        if digest != file.digest:
            return _unsaved(file, path, "is not what the provider says of it, not kept")
        return file

    async def copy(self, file: ResultFile, target: BinaryIO) -> str:
        """Write a file's content into an open one, and return its SHA-256."""
        return await _download(self._gateway, self._job_id, file, target, self._report)


class _EncryptedSource(_Source):
    """The same for files that are encrypted; `sources` are the encrypted files of each name."""

    def __init__(
        self,
        gateway: GatewayClient,
        job_id: int,
        files: list[ResultFile],
        report: Callable[[str], None],
        *,
        key: ResultKey,
        sources: Mapping[str, ResultFile | None],
    ) -> None:
        super().__init__(gateway, job_id, files, report)
        self._key = key
        self._sources = sources

    async def read(self, file: ResultFile, limit: int) -> bytes:
        """As for any file, decrypted."""
        sealed = await super().read(self._sealed(file), 2 * limit)
        return await asyncio.to_thread(self._key.decrypt, sealed)

    async def copy(self, file: ResultFile, target: BinaryIO) -> str:
        """As for any file, decrypted; the encrypted one is kept in a temporary file meanwhile."""
        sealed = self._sealed(file)
        with tempfile.TemporaryFile(dir=Path(target.name).parent) as fetched:
            digest = await _download(self._gateway, self._job_id, sealed, fetched, self._report)
            if digest != sealed.digest:
                return ""
            fetched.seek(0)
            return await asyncio.to_thread(self._decrypted, fetched, target)

    def _decrypted(self, source: BinaryIO, target: BinaryIO) -> str:
        writer = _HashingWriter(target)
        self._key.decrypt_file(source, writer)
        return writer.digest.hexdigest()

    def _sealed(self, file: ResultFile) -> ResultFile:
        found = self._sources.get(file.name)
        if found is None:
            raise NotFoundError(f"The gateway at {self._gateway.place} lacks the encrypted file")
        return found


class _HashingWriter:
    """Writes into a file and makes the SHA-256 of all that was written."""

    def __init__(self, target: BinaryIO) -> None:
        self._target = target
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Write all of the data."""
        self.digest.update(data)
        return self._target.write(data)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UsageError(
            f"{folder} can't be made: {error.strerror}", hint="Give a folder that is not there yet."
        ) from None


def _unsaved(file: ResultFile, path: Path, problem: str) -> ResultFile:
    with suppress(OSError):
        path.unlink()
    return ResultFile(file.name, file.size, "", problem)


async def _download(
    gateway: GatewayClient,
    job_id: int,
    file: ResultFile,
    target: BinaryIO,
    report: Callable[[str], None],
) -> str:
    """Download into a file, on from where it was cut off; the SHA-256 of all."""
    whole, at, tries = hashlib.sha256(), 0, _TRIES
    pause, longest = _PAUSES
    while at < file.size:
        before = at
        try:
            async with gateway.download(job_id, file.name, at) as pieces:
                async for piece in pieces:
                    at += len(piece)
                    if at > file.size:
                        return ""
                    whole.update(piece)
                    await asyncio.to_thread(target.write, piece)
        except WrongAccountError:
            raise
        except EndpointError as error:
            tries, pause = (
                (_TRIES, _PAUSES[0]) if at > before else (tries - 1, min(longest, 2 * pause))
            )
            if not tries:
                raise
            report(f"{file.name}: {error.message}; going on at byte {at}.")
            await asyncio.sleep(pause)
        else:
            if at == before:
                break  # it is shorter there than the provider says
    return whole.hexdigest()
