"""The gateway service: stores definitions, logs and results, with access control and quotas."""

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
from typing import Annotated, Any, Final
from weakref import WeakValueDictionary

from eth_account.messages import encode_typed_data
from eth_utils.address import is_address
from pydantic import AfterValidator, BaseModel, TypeAdapter, ValidationError

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.sign_in import is_signed_by
from deepsquare_chain.daemon.service import ServiceSettings
from deepsquare_chain.errors import GridError, JobFileError, UsageError
from deepsquare_chain.gateway.access import Access, GatewayRules, Permission, Session, check_name
from deepsquare_chain.gateway.notifications import GatewayNotifications
from deepsquare_chain.gateway.storage import GatewayRecords, JobSpace, Objects, StoredFile
from deepsquare_chain.job import DAY
from deepsquare_chain.notify.delivery import MailServer
from deepsquare_chain.observability import get_logger
from deepsquare_chain.observability.metrics import Metrics
from deepsquare_chain.observability.serving import RequestRefusedError, forbidden
from deepsquare_chain.store.definitions import MAX_BYTES
from deepsquare_chain.store.gateway_client import LOG, share_data
from deepsquare_chain.workflow import Definition

#: Poll interval of an open log stream, and interval of the removal of old files, in seconds.
_POLL_SECONDS: Final = 1.0
_CLEAN_SECONDS: Final = 600.0
#: Concurrent uploads whose bodies are in memory, of all accounts and of one account.
_UPLOADS: Final = 24
_ACCOUNT_UPLOADS: Final = 8
#: Open log streams of all accounts.
_MAX_STREAMS: Final = 10_000
#: Minimum size in bytes of a definition for the quota.
_MIN_DEFINITION_BYTES: Final = 4_096
_CHUNK_BYTES: Final = 64 * 1024
_MAX_SHARE: Final = 366 * DAY
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class GatewaySettings(ServiceSettings):
    """Settings of a gateway."""

    rules: GatewayRules = field(default_factory=GatewayRules)  # limits and quotas
    objects: str = ""  # folder or URL of the object store; empty for a folder in `state_dir`
    #: Public URLs for customers and providers; empty for the URL of the server.
    urls: tuple[str, ...] = ()
    #: Origins of other web pages, such as an explorer, whose visitors may sign in.
    sites: tuple[str, ...] = ()
    notify: bool = False  # whether customers may have notifications sent
    notify_private: bool = False  # whether webhooks may be at addresses that are not public
    mail: MailServer | None = None  # mail server of notifications; None for none


class UploadSlots:
    """Limits the number of request bodies in memory, in total and per account."""

    def __init__(self) -> None:
        self._all = asyncio.Semaphore(_UPLOADS)
        self._by_account: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    @asynccontextmanager
    async def slot(self, account: str) -> AsyncIterator[None]:
        """Hold a slot for one body; waits for a slot of the account, then for one of all slots."""
        account_slots = self._by_account.setdefault(account, asyncio.Semaphore(_ACCOUNT_UPLOADS))
        async with account_slots, self._all:
            yield


class GatewayService:
    """The gateway of one deployment; the daemon runs `cycle`, the HTTP routes call the rest."""

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
        notifications: GatewayNotifications | None = None,
    ) -> None:
        self.access = access
        self.notifications = notifications
        self.objects = objects
        self.rules = rules
        self.uploads = UploadSlots()
        self._contracts = contracts
        self._records = records
        self._metrics = metrics
        self._streams: Counter[str] = Counter()
        self._definition_locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._cleaned = float("-inf")
        self._closed = asyncio.Event()
        self._bytes = metrics.counter(
            "gateway_bytes", "Bytes received.", kind=("definition", "log", "results")
        )
        self._open = metrics.gauge("gateway_streams", "Open log streams.")
        self._removed = metrics.counter(
            "gateway_removed", "Files removed after the retention period."
        )

    def terms(self) -> dict[str, Any]:
        """Return the deployment and the limits of this gateway, for `GET /v1/gateway`."""
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
            "notifications": self.notifications is not None,
        }

    # -- definitions

    async def put_definition(self, session: Session, digest: str, data: bytes) -> None:
        """Store a definition; idempotent.

        Raises:
            RequestRefusedError: The digest does not match, the body is not a valid definition, or
                the quota of the account is exhausted.
            StoreError: The object store failed.
        """
        if hashlib.sha256(data).hexdigest() != digest:
            raise _invalid("The body does not match its digest", "wrong-digest")
        try:
            Definition.from_bytes(data)
        except JobFileError as error:
            raise _invalid(
                f"The body is not a definition: {error.message[:300]}", "bad-definition"
            ) from None
        counted = max(len(data), _MIN_DEFINITION_BYTES)
        async with self._definition_lock(digest):
            if self._records.has_definition(digest, session.account):
                self._records.touch_definition(digest)
                if await self.objects.definition(digest) == data:
                    return
            elif (
                self._records.definition_bytes(session.account) + counted
                > self.rules.max_definitions
            ):
                raise _quota_exceeded(f"{session.account} has reached its quota of definitions")
            await self.objects.put_definition(digest, data)
            self._records.add_definition(digest, session.account, counted)
        self._metrics.add(self._bytes, "definition", amount=len(data))

    async def definition(self, space: JobSpace) -> bytes:
        """Return the definition of a job.

        Raises:
            RequestRefusedError: The gateway does not have it, or its bytes do not match the digest.
            StoreError: The object store failed.
        """
        digest = space.job.definition.hex()
        data = None
        if self._records.has_definition(digest):
            data = await self.objects.definition(digest)
        if data is None:
            raise _not_found(f"This gateway does not have the definition of job {space.job_id}")
        if hashlib.sha256(data).hexdigest() != digest:
            _log.error("definition altered", digest=digest)
            raise _not_found(f"The definition of job {space.job_id} was altered at this gateway")
        self._records.touch_definition(digest)
        return data

    # -- files

    def file(self, space: JobSpace, name: str) -> StoredFile:
        """Return the record of a file of a job.

        Raises:
            RequestRefusedError: The file does not exist.
        """
        file = self._records.file(space, name)
        if file is None:
            raise _not_found(f"Job {space.job_id} has no file of this name")
        return file

    async def readable_file(self, session: Session, job_id: int, name: str) -> StoredFile:
        """Return the record of a file for its writer or a reader; errors as `Access.job`.

        For the writer, a file that does not exist yet has size 0.
        """
        try:
            space = await self.access.job(session, job_id, Permission.WRITE, counted=False)
        except RequestRefusedError:
            return self.file(await self.access.job(session, job_id, Permission.READ), name)
        file = self._records.file(space, name)
        if file is None:
            self._check_has_definition(space)
            return StoredFile(0, space.key, name, 0, complete=False)
        return file

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
        """Append the part of a file that begins at `offset`; existing bytes are not changed.

        Raises:
            RequestRefusedError: The part begins after the end of the file, or, with `exact`, before
                it; the file is complete; or a quota is exhausted.
            StoreError: The object store failed.
        """
        async with self.objects.lock(space, name):
            file = self._records.file(space, name)
            size = 0 if file is None else file.size
            if offset > size or (exact and offset < size):
                raise RequestRefusedError(
                    f"The file has {size} bytes, but the part begins at {offset}",
                    code="wrong-offset",
                    status=HTTPStatus.CONFLICT,
                    hint=f"Continue at {size}.",
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
                self._check_has_definition(space)
            self._check_quota(space, name, size, len(data), new_files=file is None)
            file = file or self._records.begin_file(space, name)
            file = await self.objects.append(space, file, data, complete=complete)
        self._metrics.add(self._bytes, "log" if name == LOG else "results", amount=len(data))
        return file

    def put_results(self, space: JobSpace, body: Mapping[str, Any]) -> None:
        """Store the provider's list of the files of a run.

        Raises:
            RequestRefusedError: The list is invalid, or a file is not completely uploaded.
        """
        try:
            entries = _ENTRIES.validate_python(body.get("files"))
        except ValidationError:
            raise _invalid("The list of files is not valid", "bad-results") from None
        if len(entries) > self.rules.max_files:
            raise _invalid("The list of files is not valid", "bad-results")
        files_by_name = {file.name: file for file in self._records.files(space)}
        for entry in entries:
            if not entry.problem:
                file = files_by_name.get(check_name(entry.name))
                if file is None or not file.complete or file.size != entry.size:
                    raise _invalid(f"{entry.name} is not uploaded completely", "incomplete")
        self._records.put_results(space, json.dumps({"files": _ENTRIES.dump_python(entries)}))

    def results(self, space: JobSpace) -> str:
        """Return the provider's list of the files of a run, as JSON.

        Raises:
            RequestRefusedError: The provider has not uploaded it yet; `received` are the bytes of
                the job's files so far.
        """
        body = self._records.results(space)
        if body is None:
            raise RequestRefusedError(
                f"The provider of job {space.job_id} has not delivered its results yet",
                code="not-delivered",
                status=HTTPStatus.NOT_FOUND,
                received=self._records.job_usage(space)[0],
            )
        return body

    # -- streams

    def open_stream(
        self, session: Session, job_id: int, offset: int
    ) -> AsyncIterator[tuple[bytes, int] | None]:
        """Stream the log of a job from an offset as it grows.

        Yields chunks with the byte offset after each, and None at the end of the log. The stream
        ends without None when the session expires or the gateway closes; the client reconnects.

        Raises:
            RequestRefusedError: The account, or the gateway, has too many open streams.
        """
        if self._closed.is_set() or self._has_too_many_streams(session):
            raise RequestRefusedError(
                "Too many log streams are open",
                code="too-many-streams",
                status=HTTPStatus.TOO_MANY_REQUESTS,
                retry=5,
            )
        return self._stream(session, job_id, offset)

    def _has_too_many_streams(self, session: Session) -> bool:
        own_streams = self._streams[session.account]
        return self._streams.total() >= _MAX_STREAMS or own_streams >= self.rules.max_streams

    async def _stream(
        self, session: Session, job_id: int, offset: int
    ) -> AsyncIterator[tuple[bytes, int] | None]:
        if self._has_too_many_streams(session):
            return  # opened together with others; the client reconnects and gets the refusal
        self._streams[session.account] += 1
        self._open.inc()
        try:
            while not self._closed.is_set() and self.access.now() < session.expires:
                space = await self.access.job(session, job_id, Permission.READ)
                file = self._records.file(space, LOG)
                if file is not None and offset < file.size:
                    async for data in self.objects.read(
                        file, offset, min(file.size, offset + _CHUNK_BYTES)
                    ):
                        offset += len(data)
                        yield data, offset
                    continue
                if (file is not None and file.complete) or _has_no_log(space, file):
                    yield None
                    return
                await self._wait(space, LOG, offset)
        except GridError as error:
            # The response has started; the client gets the error when it reconnects.
            _log.info("stream ended", job=job_id, error=error.message)
        finally:
            self._streams[session.account] -= 1
            if not self._streams[session.account]:
                del self._streams[session.account]
            self._open.dec()

    async def _wait(self, space: JobSpace, name: str, offset: int) -> None:
        """Wait until a file grows or is complete, for one poll interval at most."""

        def has_changed() -> bool:
            file = self._records.file(space, name)
            return self._closed.is_set() or (
                file is not None and (file.complete or file.size > offset)
            )

        growth_of = self.objects.growth_of(space)
        try:
            async with asyncio.timeout(_POLL_SECONDS), growth_of:
                await growth_of.wait_for(has_changed)
        except TimeoutError:
            return

    # -- shares

    async def share(
        self, session: Session, job_id: int, reader: str, until: int, signature: bytes
    ) -> None:
        """Let a reader read a job until `until` (epoch seconds); needs the customer's signature.

        Raises:
            RequestRefusedError: The account is not the customer, the signature is not the
                customer's, or the customer has too many shares.
            UsageError: The address is invalid, or the time is more than a year ahead.
            EndpointError: The chain can't be read.
        """
        space = await self.access.job(session, job_id, Permission.OWN)
        if not is_address(reader) or not 0 <= until <= self.access.now() + _MAX_SHARE:
            raise UsageError(
                "A share needs an address, and a time within a year",
                hint="To end an earlier share, use a time in the past.",
            )
        data = share_data(
            self._contracts.deployment.chain_id,
            self._contracts.scheduler.address,
            job_id,
            reader,
            until,
        )
        message = encode_typed_data(full_message=data)
        if not await is_signed_by(self._contracts.w3, message, signature, space.customer):
            raise forbidden(
                "The customer of the job did not sign this share", code="wrong-signature"
            )
        now = self.access.now()
        others = self._records.share_count(space.customer, now, job_id=job_id, reader=reader)
        if others >= self.rules.max_shares and until > now:
            raise _quota_exceeded(f"{space.customer} has reached its limit of shares")
        self._records.share(job_id, space.customer, reader, until)

    # -- the daemon

    async def cycle(self) -> bool:
        """Remove old files periodically, and send notifications; return whether any were sent."""
        now = time.monotonic()
        if now - self._cleaned >= _CLEAN_SECONDS:
            self._cleaned = now
            await self.clean()
        return self.notifications is not None and await self.notifications.cycle()

    async def clean(self) -> None:
        """Remove files and definitions that were not used or changed within the retention period.

        Raises:
            StoreError: The object store failed; the next run continues.
        """
        before = int(time.time()) - self.rules.keep_seconds
        while files := self._records.expired_files(before):
            await self.objects.drop(files)
            self._metrics.add(self._removed, amount=len(files))
        for digest in self._records.expired_definitions(before):
            async with self._definition_lock(digest):
                if self._records.is_expired(digest, before):
                    # The record goes last: after a failure the next run finds the object again.
                    await self.objects.drop_definition(digest)
                    self._records.drop_definition(digest)
        if self.notifications is not None:
            self.notifications.clean(self.rules.keep_seconds)
        self._records.drop_shares(int(time.time()))
        self.access.forget_expired()

    async def close(self) -> None:
        """End all streams; clients reconnect when a gateway is available."""
        self._closed.set()
        # Waiting streams poll every second.
        for _ in range(30):
            if not self._streams:
                return
            await asyncio.sleep(0.1)

    def _definition_lock(self, digest: str) -> asyncio.Lock:
        """Return the lock of a definition: it is not removed while it is uploaded again."""
        return self._definition_locks.setdefault(digest, asyncio.Lock())

    # -- limits

    def _check_has_definition(self, space: JobSpace) -> None:
        """Refuse files of a job whose definition is at another gateway: its customer reads there.

        Raises:
            RequestRefusedError: This gateway does not have the definition.
        """
        if not self._records.has_definition(space.job.definition.hex()):
            raise _not_found(f"This gateway does not have the definition of job {space.job_id}")

    def _check_quota(
        self, space: JobSpace, name: str, size: int, added_bytes: int, *, new_files: bool
    ) -> None:
        rules = self.rules
        if name == LOG and size + added_bytes > rules.max_log:
            raise _quota_exceeded(f"The log of job {space.job_id} has reached the maximum size")
        size, number = self._records.job_usage(space)
        if size + added_bytes > rules.max_job:
            raise _quota_exceeded(f"Job {space.job_id} has reached its quota of bytes")
        if self._records.customer_usage(space.customer)[0] + added_bytes > rules.max_account:
            raise _quota_exceeded(
                f"The customer of job {space.job_id} has reached its quota of bytes"
            )
        if new_files and number >= rules.max_files:
            raise _quota_exceeded(f"Job {space.job_id} has reached its maximum number of files")


def _has_no_log(space: JobSpace, file: StoredFile | None) -> bool:
    """Return whether a job has ended and can't have a log."""
    status = space.job.status
    return file is None and status.is_final and not (space.provider_id and space.job.rate)


def _truncated(length: int) -> AfterValidator:
    return AfterValidator(lambda text: text[:length])


class _ResultEntry(BaseModel, strict=True):
    """An entry of a provider's list of results; long texts are truncated."""

    name: Annotated[str, _truncated(1_024)]
    size: int
    digest: Annotated[str, _truncated(64)] = ""
    problem: Annotated[str, _truncated(300)] = ""
    special: bool = False


_ENTRIES: Final = TypeAdapter(list[_ResultEntry])


def _invalid(message: str, code: str) -> RequestRefusedError:
    return RequestRefusedError(message, code=code, status=HTTPStatus.UNPROCESSABLE_ENTITY)


def _not_found(message: str) -> RequestRefusedError:
    return RequestRefusedError(message, code="not-found", status=HTTPStatus.NOT_FOUND)


def _quota_exceeded(message: str) -> RequestRefusedError:
    return RequestRefusedError(
        message,
        code="quota",
        status=HTTPStatus.INSUFFICIENT_STORAGE,
        hint="Old files are removed automatically; ask the operator of the gateway for a larger quota.",
    )
