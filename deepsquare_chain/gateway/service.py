"""Keeps definitions, logs and results for whom `access` lets in, within the limits of `rules`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final
from weakref import WeakValueDictionary

from eth_utils.address import is_address

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.sign_in import is_signed_by
from deepsquare_chain.daemon.service import ServiceSettings
from deepsquare_chain.errors import GridError, JobFileError, UsageError
from deepsquare_chain.gateway.access import Access, Right, Session
from deepsquare_chain.gateway.objects import Objects
from deepsquare_chain.gateway.records import GatewayRecords, JobSpace, StoredFile
from deepsquare_chain.gateway.rules import DAY, GatewayRules, check_name
from deepsquare_chain.observability import get_logger
from deepsquare_chain.observability.metrics import Metrics
from deepsquare_chain.observability.serving import RequestRefusedError
from deepsquare_chain.store.definitions import MAX_BYTES
from deepsquare_chain.store.gateway_client import LOG, share_message
from deepsquare_chain.workflow import Definition

#: Seconds between two looks at a job whose log has not begun, and for old files.
_LOOK: Final = 1.0
_CLEAN: Final = 600.0
#: Uploads whose parts are in memory at once.
_UPLOADS: Final = 24
_ACCOUNT_UPLOADS: Final = 8
#: Log streams of all accounts.
_MAX_STREAMS: Final = 10_000
#: Least bytes that a definition counts for.
_LEAST_DEFINITION: Final = 4_096
_PIECE: Final = 64 * 1024
_MAX_SHARE: Final = 366 * DAY
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class GatewaySettings(ServiceSettings):
    """How a gateway runs.

    Attributes:
        rules: Limits.
        objects: Folder of the object store, or its URL; empty for a folder in `state_dir`.
        urls: Addresses under which customers and providers reach it; its own if there are none.
        sites: Addresses of pages, such as an explorer's, whose visitors may sign in here.
    """

    rules: GatewayRules = field(default_factory=GatewayRules)
    objects: str = ""
    urls: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()


class UploadSlots:
    """Bounds the bodies that are in memory at once, and how many of them one account may have."""

    def __init__(self) -> None:
        self._all = asyncio.Semaphore(_UPLOADS)
        self._own: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    @asynccontextmanager
    async def slot(self, account: str) -> AsyncIterator[None]:
        """A place for one body; who has too many waits for its own first."""
        own = self._own.get(account)
        if own is None:
            own = self._own[account] = asyncio.Semaphore(_ACCOUNT_UPLOADS)
        async with own, self._all:
            yield


class GatewayService:
    """One gateway of one deployment; `cycle` is run by a daemon, the rest by the HTTP side.

    Args:
        contracts: The deployment.
        access: Who may do what.
        records: What is known of the objects.
        objects: The bytes.
        rules: Limits.
        metrics: Where its metrics go.
    """

    max_definition: Final = MAX_BYTES

    def __init__(
        self,
        contracts: Contracts,
        access: Access,
        records: GatewayRecords,
        objects: Objects,
        *,
        rules: GatewayRules,
        metrics: Metrics,
    ) -> None:
        self.access = access
        self.objects = objects
        self.rules = rules
        self.uploads = UploadSlots()
        self._contracts = contracts
        self._records = records
        self._metrics = metrics
        self._streams: Counter[str] = Counter()
        self._cleaned = float("-inf")
        self._closed = asyncio.Event()
        self._bytes = metrics.counter(
            "gateway_bytes", "Bytes taken in.", kind=("definition", "log", "results")
        )
        self._open = metrics.gauge("gateway_streams", "Open log streams.")
        self._removed = metrics.counter("gateway_removed", "Files removed because of their age.")

    def terms(self) -> dict[str, Any]:
        """What this gateway is for, and its limits, as `GET /v1/gateway` answers them."""
        rules = self.rules
        return {
            "chain_id": self._contracts.deployment.chain_id,
            "contract": self._contracts.scheduler.address,
            "urls": list(self.access.origins),
            "max_definition": MAX_BYTES,
            "max_part": rules.max_part,
            "max_log": rules.max_log,
            "max_job": rules.max_job,
            "max_account": rules.max_account,
            "keep_seconds": rules.keep_seconds,
            "catch_up_seconds": rules.catch_up_seconds,
        }

    # -- definitions

    async def put_definition(self, session: Session, digest: str, data: bytes) -> None:
        """Keep a definition.

        Raises:
            RequestRefusedError: It is not what its digest says, no definition, or too much.
            StoreError: The store does not take it now.
        """
        if hashlib.sha256(data).hexdigest() != digest:
            raise _unfit("The body is not what its digest says", "wrong-digest")
        try:
            Definition.from_bytes(data)
        except JobFileError as error:
            raise _unfit(
                f"The body is no definition: {error.message[:300]}", "bad-definition"
            ) from None
        counted = max(len(data), _LEAST_DEFINITION)
        if self._records.has_definition(digest, session.account):
            self._records.touch_definition(digest)
            if await self.objects.definition(digest) == data:
                return
        elif self._records.definition_bytes(session.account) + counted > self.rules.max_definitions:
            raise _too_much(f"{session.account} keeps as many definitions as it may")
        await self.objects.put_definition(digest, data)
        self._records.add_definition(digest, session.account, counted)
        self._metrics.add(self._bytes, "definition", amount=len(data))

    async def definition(self, space: JobSpace) -> bytes:
        """The definition of a job.

        Raises:
            RequestRefusedError: There is none, or what is there is something else.
            StoreError: The store does not answer.
        """
        digest = space.job.definition.hex()
        found = None
        if self._records.has_definition(digest):
            found = await self.objects.definition(digest)
        if found is None:
            raise _missing(f"The definition of job {space.job_id} is not here")
        if hashlib.sha256(found).hexdigest() != digest:
            _log.error("definition altered", digest=digest)
            raise _missing(f"The definition of job {space.job_id} was altered here")
        self._records.touch_definition(digest)
        return found

    # -- files

    def file(self, space: JobSpace, name: str) -> StoredFile:
        """A file of a job.

        Raises:
            RequestRefusedError: There is none.
        """
        found = self._records.file(space, name)
        if found is None:
            raise _missing(f"Job {space.job_id} has no file of that name here")
        return found

    async def look(self, session: Session, job_id: int, name: str) -> StoredFile:
        """A file of a job, for who writes it and for who reads it; errors as `Access.job`."""
        try:
            space = await self.access.job(session, job_id, Right.WRITE, counted=False)
        except RequestRefusedError:
            return self.file(await self.access.job(session, job_id, Right.READ), name)
        found = self._records.file(space, name)
        if found is None:
            self._check_here(space)
            return StoredFile(0, space.key, name, 0, complete=False)
        return found

    async def append(
        self,
        space: JobSpace,
        name: str,
        offset: int,
        data: bytes,
        *,
        complete: bool,
        exact: bool = False,
    ) -> StoredFile:
        """Add the part of a file that begins at `offset`; what is there already is left alone.

        Raises:
            RequestRefusedError: The part begins beyond the end of the file, or, with `exact`, before
                it; or it is too much.
            StoreError: The store does not take it now.
        """
        async with self.objects.lock(space, name):
            file = self._records.file(space, name)
            size = 0 if file is None else file.size
            if offset > size or (exact and offset < size):
                raise RequestRefusedError(
                    f"The file has {size} bytes, the part begins at {offset}",
                    code="wrong-offset",
                    status=HTTPStatus.CONFLICT,
                    hint=f"Go on at {size}.",
                    offset=size,
                )
            data = data[size - offset :]
            if file is not None and file.complete:
                if data:
                    raise RequestRefusedError(
                        "The file is complete",
                        code="complete",
                        status=HTTPStatus.CONFLICT,
                        offset=size,
                    )
                return file
            if file is None:
                self._check_here(space)
            self._check_room(space, name, size, len(data), new=file is None)
            file = file or self._records.begin_file(space, name)
            file = await self.objects.append(space, file, data, complete=complete)
        self._metrics.add(self._bytes, "log" if name == LOG else "results", amount=len(data))
        return file

    def put_results(self, space: JobSpace, body: Mapping[str, Any]) -> None:
        """Keep what a provider says that a run left.

        Raises:
            RequestRefusedError: A file is not complete here, or the list is none.
        """
        files = body.get("files")
        if not isinstance(files, list) or len(files) > self.rules.max_files:
            raise _unfit("That is no list of files", "bad-results")
        kept = []
        there = {file.name: file for file in self._records.files(space)}
        for each in files:
            entry = _entry(each)
            if not entry["problem"]:
                file = there.get(check_name(entry["name"]))
                if file is None or not file.complete or file.size != entry["size"]:
                    raise _unfit(f"{entry['name']} is not complete here", "incomplete")
            kept.append(entry)
        self._records.put_results(space, json.dumps({"files": kept}))

    def results(self, space: JobSpace) -> str:
        """What a run left (JSON).

        Raises:
            RequestRefusedError: Its provider has not delivered all of it.
        """
        found = self._records.results(space)
        if found is None:
            raise _missing(f"The provider of job {space.job_id} has not delivered its results yet")
        return found

    # -- streams

    def open_stream(
        self, session: Session, job_id: int, offset: int
    ) -> AsyncIterator[tuple[bytes, int] | None]:
        """The log of a job from an offset as it grows: pieces with the offset after each, at last None.

        It ends without None when the session ends or the gateway closes: the reader comes back.

        Raises:
            RequestRefusedError: The account has too many streams open.
        """
        full = self._streams.total() >= _MAX_STREAMS
        if (
            full
            or self._closed.is_set()
            or self._streams[session.account] >= self.rules.max_streams
        ):
            raise RequestRefusedError(
                "Too many streams are open",
                code="too-many-streams",
                status=HTTPStatus.TOO_MANY_REQUESTS,
                retry=5,
            )
        return self._stream(session, job_id, offset)

    async def _stream(
        self, session: Session, job_id: int, offset: int
    ) -> AsyncIterator[tuple[bytes, int] | None]:
        self._streams[session.account] += 1
        self._open.inc()
        try:
            while not self._closed.is_set() and self.access.now() < session.expires:
                space = await self.access.job(session, job_id, Right.READ)
                file = self._records.file(space, LOG)
                if file is not None and offset < file.size:
                    async for data in self.objects.read(
                        file, offset, min(file.size, offset + _PIECE)
                    ):
                        offset += len(data)
                        yield data, offset
                    continue
                if (file is not None and file.complete) or _never_ran(space, file):
                    yield None
                    return
                await self._wait(space, LOG, offset)
        except GridError as error:
            # The answer has begun: the reader comes back and is told then.
            _log.info("stream ended", job=job_id, error=error.message)
        finally:
            self._streams[session.account] -= 1
            if not self._streams[session.account]:
                del self._streams[session.account]
            self._open.dec()

    async def _wait(self, space: JobSpace, name: str, offset: int) -> None:
        """Wait until a file is longer, complete, or some time has passed."""

        def moved() -> bool:
            file = self._records.file(space, name)
            return self._closed.is_set() or (
                file is not None and (file.complete or file.size > offset)
            )

        grown = self.objects.grown(space)
        try:
            async with asyncio.timeout(_LOOK), grown:
                await grown.wait_for(moved)
        except TimeoutError:
            return

    # -- shares

    async def share(
        self, session: Session, job_id: int, reader: str, until: int, signature: bytes
    ) -> None:
        """Let a reader read a job until then; the customer's signature says so.

        Raises:
            RequestRefusedError: The account is not the customer, or did not sign this.
            EndpointError: The chain does not answer.
        """
        space = await self.access.job(session, job_id, Right.OWN)
        if not is_address(reader) or not 0 <= until <= self.access.now() + _MAX_SHARE:
            raise UsageError(
                "A share names an address, and a time within a year",
                hint="A time in the past ends an earlier share.",
            )
        message = share_message(
            self._contracts.deployment.chain_id,
            self._contracts.scheduler.address,
            job_id,
            reader,
            until,
        )
        if not await is_signed_by(self._contracts.w3, message, signature, space.customer):
            raise RequestRefusedError(
                "The customer of the job did not sign this share",
                code="wrong-signature",
                status=HTTPStatus.FORBIDDEN,
            )
        full = self._records.share_count(space.customer) >= self.rules.max_shares
        if full and until > self.access.now():
            raise _too_much(f"{space.customer} shares as many jobs as it may")
        self._records.share(job_id, space.customer, reader, until)

    # -- the daemon

    async def cycle(self) -> bool:
        """Remove what is too old, now and then."""
        now = time.monotonic()
        if now - self._cleaned >= _CLEAN:
            self._cleaned = now
            await self.clean()
        return False

    async def clean(self) -> None:
        """Remove what has not been used or changed for as long as files are kept.

        Raises:
            StoreError: The store does not answer; the next look goes on.
        """
        before = int(time.time()) - self.rules.keep_seconds
        while files := self._records.expired_files(before):
            await self.objects.drop(files)
            self._metrics.add(self._removed, amount=len(files))
        for digest in self._records.drop_definitions(before):
            await self.objects.drop_definition(digest)
        self._records.drop_shares(int(time.time()))
        self.access.forget_expired()

    async def close(self) -> None:
        """End all streams; readers come back to whoever serves then."""
        self._closed.set()
        # Streams that wait look again within a second at the latest.
        for _ in range(30):
            if not self._streams:
                return
            await asyncio.sleep(0.1)

    # -- limits

    def _check_here(self, space: JobSpace) -> None:
        """Refuse files of a job whose definition is kept elsewhere: its customer looks there.

        Raises:
            RequestRefusedError: The definition is not here.
        """
        if not self._records.has_definition(space.job.definition.hex()):
            raise _missing(f"The definition of job {space.job_id} is not here")

    def _check_room(self, space: JobSpace, name: str, size: int, added: int, *, new: bool) -> None:
        rules = self.rules
        if name == LOG and size + added > rules.max_log:
            raise _too_much(f"The log of job {space.job_id} is as long as it may be")
        size, number = self._records.job_usage(space)
        if size + added > rules.max_job:
            raise _too_much(f"Job {space.job_id} keeps as many bytes as it may")
        if self._records.customer_usage(space.customer)[0] + added > rules.max_account:
            raise _too_much(f"The customer of job {space.job_id} keeps as many bytes as it may")
        if new and number >= rules.max_files:
            raise _too_much(f"Job {space.job_id} has as many files as it may")


def _never_ran(space: JobSpace, file: StoredFile | None) -> bool:
    """Whether a job has ended without a log that could still come."""
    status = space.job.status
    return file is None and status.is_final and not (space.provider_id and space.job.rate)


def _entry(given: Any) -> dict[str, Any]:
    """A file of a list of results, checked.

    Raises:
        RequestRefusedError: It is none.
    """
    if isinstance(given, dict):
        entry = {
            "name": given.get("name"),
            "size": given.get("size"),
            "digest": given.get("digest", ""),
            "problem": given.get("problem", ""),
            "special": given.get("special", False),
        }
        texts = all(isinstance(entry[key], str) for key in ("name", "digest", "problem"))
        if texts and type(entry["size"]) is int and type(entry["special"]) is bool:
            entry["name"], entry["problem"] = entry["name"][:1_024], entry["problem"][:300]
            entry["digest"] = entry["digest"][:64]
            return entry
    raise _unfit("That is no list of files", "bad-results")


def _unfit(message: str, code: str) -> RequestRefusedError:
    return RequestRefusedError(message, code=code, status=HTTPStatus.UNPROCESSABLE_ENTITY)


def _missing(message: str) -> RequestRefusedError:
    return RequestRefusedError(message, code="not-found", status=HTTPStatus.NOT_FOUND)


def _too_much(message: str) -> RequestRefusedError:
    return RequestRefusedError(
        message,
        code="quota",
        status=HTTPStatus.INSUFFICIENT_STORAGE,
        hint="Old files are removed by themselves; ask who runs the gateway for more.",
    )
