"""The storage of a gateway: its database, and the object store that holds the bytes.

The database has definitions, files, lists of results, and shares. The object store is a folder, or S3
by URL.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from weakref import WeakValueDictionary

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url
from sqlalchemy import (
    Column,
    Connection,
    Index,
    Integer,
    String,
    Table,
    Text,
    delete,
    func,
    insert,
    select,
    update,
)

from deepsquare_chain.errors import StoreError, UsageError
from deepsquare_chain.job import Job
from deepsquare_chain.store.database import Database, metadata

_MAX_TOTALS: Final = 10_000
#: Object written and read at the start of a gateway.
_CHECK_NAME: Final = "check"
#: A part is merged into the last segment while that is smaller than this (bytes), so that a log
#: does not become many tiny objects.
_MIN_SEGMENT: Final = 256 * 1024
#: Number of cached last segments of growing files.
_MAX_CACHED_SEGMENTS: Final = 128
#: Maximum bytes per read from the store.
_READ_BYTES: Final = 1024 * 1024
#: Timeout of a request to a remote store; clients of the gateway have a timeout of 15 seconds.
_TIMEOUT: Final = timedelta(seconds=10)

_definitions: Final = Table(
    "gateway_definitions",
    metadata,
    Column("digest", String, primary_key=True),
    Column("account", String, primary_key=True),
    Column("size", Integer, nullable=False),
    Column("used_at", Integer, nullable=False),
)
Index("gateway_definitions_account", _definitions.c.account)
Index("gateway_definitions_used", _definitions.c.used_at)

_files: Final = Table(
    "gateway_files",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("space", String, nullable=False),
    Column("name", Text, nullable=False),
    Column("customer", String, nullable=False),
    Column("size", Integer, nullable=False),
    Column("complete", Integer, nullable=False),
    Column("changed_at", Integer, nullable=False),
    sqlite_autoincrement=True,  # IDs are part of object names and must not be reused
)
Index("gateway_files_name", _files.c.space, _files.c.name, unique=True)
Index("gateway_files_customer", _files.c.customer)
Index("gateway_files_changed", _files.c.changed_at)

_segments: Final = Table(
    "gateway_segments",
    metadata,
    Column("file", Integer, primary_key=True),
    Column("start", Integer, primary_key=True),
    Column("size", Integer, nullable=False),
)

_results: Final = Table(
    "gateway_results",
    metadata,
    Column("space", String, primary_key=True),
    Column("body", Text, nullable=False),
    Column("changed_at", Integer, nullable=False),
)

_shares: Final = Table(
    "gateway_shares",
    metadata,
    Column("job_id", String, primary_key=True),
    Column("customer", String, primary_key=True),
    Column("reader", String, primary_key=True),
    Column("until", Integer, nullable=False),
)
Index("gateway_shares_customer", _shares.c.customer)


@dataclass(frozen=True, slots=True)
class JobSpace:
    """The namespace of the files of a job and its provider.

    The customer is part of the key: after a reorg a job ID may be the job of another customer.
    """

    job_id: int
    customer: str
    provider_id: int
    job: Job

    @property
    def key(self) -> str:
        """Return the key of the namespace, safe as a part of an object's name."""
        return f"{self.job_id}-{self.customer.removeprefix('0x').lower()}-{self.provider_id}"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a job; `size` in bytes, `complete` once its last part is uploaded."""

    id: int
    space: str
    name: str
    size: int
    complete: bool


@dataclass(frozen=True, slots=True)
class StoredSegment:
    """A part of a file stored as one object; `start` and `size` in bytes."""

    start: int
    size: int


class GatewayRecords:
    """Definitions, files, results and shares of one gateway, in its own database."""

    def __init__(self, store: Database) -> None:
        self._store = store
        #: Bytes and number of files by space and by customer. Summed once and then updated, because
        #: each part of an upload checks them.
        self._totals: OrderedDict[str, tuple[int, int]] = OrderedDict()

    # -- definitions

    def add_definition(self, digest: str, account: str, size: int) -> None:
        """Record a definition of an account; the object must exist already."""
        key = {"digest": digest, "account": account.lower()}
        self._store.write(
            delete(_definitions).filter_by(**key),
            insert(_definitions).values(**key, size=size, used_at=_now()),
        )

    def has_definition(self, digest: str, account: str | None = None) -> bool:
        """Return whether any account, or this one, has uploaded a definition."""
        query = select(_definitions.c.digest).where(_definitions.c.digest == digest)
        if account is not None:
            query = query.where(_definitions.c.account == account.lower())
        return self._store.scalar(query.limit(1)) is not None

    def has_definitions(self, account: str) -> bool:
        """Return whether an account has uploaded any definition."""
        query = select(_definitions.c.digest).where(_definitions.c.account == account.lower())
        return self._store.scalar(query.limit(1)) is not None

    def touch_definition(self, digest: str) -> None:
        """Update the time of last use of a definition, which extends its retention."""
        query = update(_definitions).where(_definitions.c.digest == digest)
        self._store.write(query.values(used_at=_now()), durable=False)

    def definition_bytes(self, account: str) -> int:
        """Return the bytes of all definitions of an account."""
        query = select(func.coalesce(func.sum(_definitions.c.size), 0))
        return int(self._store.scalar(query.where(_definitions.c.account == account.lower())))

    def expired_definitions(self, before: int) -> list[str]:
        """Return digests of definitions that no account has used since `before` (epoch seconds)."""
        query = select(_definitions.c.digest).group_by(_definitions.c.digest)
        rows = self._store.rows(query.having(func.max(_definitions.c.used_at) < before))
        return sorted(row.digest for row in rows)

    def is_expired(self, digest: str, before: int) -> bool:
        """Return whether no account has used a definition since `before` (epoch seconds)."""
        query = select(func.max(_definitions.c.used_at)).where(_definitions.c.digest == digest)
        used_at = self._store.scalar(query)
        return used_at is not None and used_at < before

    def drop_definition(self, digest: str) -> None:
        """Remove a definition of all accounts."""
        self._store.write(delete(_definitions).where(_definitions.c.digest == digest))

    # -- files of jobs

    def file(self, space: JobSpace, name: str) -> StoredFile | None:
        """Return a file of a job; None if it does not exist."""
        query = select(_files).where(_files.c.space == space.key, _files.c.name == name)
        rows = self._store.rows(query)
        return _file(rows[0]) if rows else None

    def files(self, space: JobSpace) -> list[StoredFile]:
        """Return all files of a job, ordered by name."""
        query = select(_files).where(_files.c.space == space.key).order_by(_files.c.name)
        return [_file(row) for row in self._store.rows(query)]

    def begin_file(self, space: JobSpace, name: str) -> StoredFile:
        """Create an empty file."""
        with self._store.begin(durable=False) as connection:
            file_id = connection.execute(
                insert(_files)
                .values(
                    space=space.key,
                    name=name,
                    customer=space.customer.lower(),
                    size=0,
                    complete=0,
                    changed_at=_now(),
                )
                .returning(_files.c.id)
            ).scalar_one()
        self._add_to_totals(space, 0, new_files=True)
        return StoredFile(int(file_id), space.key, name, 0, False)

    def segments(self, file: StoredFile) -> list[StoredSegment]:
        """Return the segments of a file in order."""
        query = select(_segments).where(_segments.c.file == file.id).order_by(_segments.c.start)
        return [StoredSegment(row.start, row.size) for row in self._store.rows(query)]

    def put_segment(
        self, space: JobSpace, file: StoredFile, segment: StoredSegment, *, complete: bool
    ) -> StoredFile:
        """Record the last segment of a file, after its object is written.

        Crash-safe: a crash between the two leaves a file shorter than its objects, and the client
        uploads that part again.
        """
        size = segment.start + segment.size
        same_segment = (_segments.c.file == file.id) & (_segments.c.start == segment.start)
        with self._store.begin(durable=complete) as connection:
            connection.execute(delete(_segments).where(same_segment))
            connection.execute(
                insert(_segments).values(file=file.id, start=segment.start, size=segment.size)
            )
            resized = _resize(connection, file, size, complete=complete)
        self._add_to_totals(space, size - file.size)
        return resized

    def finish(self, file: StoredFile) -> StoredFile:
        """Mark a file as complete."""
        with self._store.begin() as connection:
            return _resize(connection, file, file.size, complete=True)

    def job_usage(self, space: JobSpace) -> tuple[int, int]:
        """Return bytes and number of the files of a job."""
        return self._usage(space.key, _files.c.space == space.key)

    def customer_usage(self, customer: str) -> tuple[int, int]:
        """Return bytes and number of the files of all jobs of a customer."""
        key = customer.lower()
        return self._usage(key, _files.c.customer == key)

    def _usage(self, key: str, condition: Any) -> tuple[int, int]:
        usage = self._totals.get(key)
        if usage is None:
            query = select(func.coalesce(func.sum(_files.c.size), 0), func.count())
            ((size, number),) = self._store.rows(query.where(condition))
            usage = self._totals[key] = (int(size), int(number))
            while len(self._totals) > _MAX_TOTALS:
                self._totals.popitem(last=False)
        return usage

    def _add_to_totals(self, space: JobSpace, added_bytes: int, *, new_files: bool = False) -> None:
        for key in (space.key, space.customer.lower()):
            if key in self._totals:
                size, number = self._totals[key]
                self._totals[key] = (size + added_bytes, number + int(new_files))

    def expired_files(self, before: int) -> list[StoredFile]:
        """Return files that have not changed since `before` (epoch seconds), at most 1,000."""
        query = select(_files).where(_files.c.changed_at < before).limit(1_000)
        return [_file(row) for row in self._store.rows(query)]

    def drop_files(self, files: Sequence[StoredFile]) -> None:
        """Remove the rows of files whose objects were removed."""
        self._totals.clear()
        file_ids = [file.id for file in files]
        spaces = {file.space for file in files}
        with self._store.begin() as connection:
            connection.execute(delete(_segments).where(_segments.c.file.in_(file_ids)))
            connection.execute(delete(_files).where(_files.c.id.in_(file_ids)))
            query = select(_files.c.space).where(_files.c.space.in_(spaces))
            emptied = spaces - set(connection.execute(query).scalars())
            connection.execute(delete(_results).where(_results.c.space.in_(emptied)))

    # -- lists of results

    def put_results(self, space: JobSpace, body: str) -> None:
        """Store the list of a job's results (JSON)."""
        self._store.write(
            delete(_results).where(_results.c.space == space.key),
            insert(_results).values(space=space.key, body=body, changed_at=_now()),
        )

    def results(self, space: JobSpace) -> str | None:
        """Return the list of a job's results (JSON); None before all are uploaded."""
        body = self._store.scalar(select(_results.c.body).where(_results.c.space == space.key))
        return None if body is None else str(body)

    # -- shares

    def share(self, job_id: int, customer: str, reader: str, until: int) -> None:
        """Share a job's output until `until` (epoch seconds); a past time ends the share."""
        key = _share_key(job_id, customer, reader)
        self._store.write(
            delete(_shares).filter_by(**key), insert(_shares).values(**key, until=until)
        )

    def is_shared(self, job_id: int, customer: str, reader: str, now: float) -> bool:
        """Return whether a customer shares a job with a reader at `now` (epoch seconds)."""
        key = _share_key(job_id, customer, reader)
        until = self._store.scalar(select(_shares.c.until).filter_by(**key))
        return until is not None and until > now

    def share_count(self, customer: str, now: float, *, job_id: int, reader: str) -> int:
        """Return the number of valid shares of a customer, without that of a job with a reader."""
        same = (_shares.c.job_id == str(job_id)) & (_shares.c.reader == reader.lower())
        query = select(func.count()).where(
            _shares.c.customer == customer.lower(), _shares.c.until > now, ~same
        )
        return int(self._store.scalar(query))

    def drop_shares(self, before: int) -> None:
        """Remove shares that expired before `before` (epoch seconds)."""
        self._store.write(delete(_shares).where(_shares.c.until < before), durable=False)


def _share_key(job_id: int, customer: str, reader: str) -> dict[str, str]:
    return {"job_id": str(job_id), "customer": customer.lower(), "reader": reader.lower()}


def _resize(connection: Connection, file: StoredFile, size: int, *, complete: bool) -> StoredFile:
    connection.execute(
        update(_files)
        .where(_files.c.id == file.id)
        .values(size=size, complete=int(complete), changed_at=_now())
    )
    return StoredFile(file.id, file.space, file.name, size, complete)


def _file(row: Any) -> StoredFile:
    return StoredFile(row.id, row.space, row.name, row.size, bool(row.complete))


def _now() -> int:
    return int(time.time())


def open_object_store(location: str | Path) -> ObjectStore:
    """Open the store in a folder, or at a URL such as `s3://bucket/prefix`.

    S3 credentials are read from the environment (AWS_ACCESS_KEY_ID and so on), never from the URL.

    Raises:
        UsageError: The folder or URL is invalid.
    """
    try:
        if "://" in str(location):
            return _remote(str(location))
        folder = Path(location).absolute()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return LocalStore(folder)
    except (BaseError, OSError, ValueError) as error:
        raise UsageError(
            f"The object store can't be used: {_error_text(error)}",
            hint="Give a folder, or a URL such as s3://bucket/prefix with the variables AWS_... "
            "of the environment.",
        ) from None


def _remote(url: str) -> ObjectStore:
    """Open a remote store whose requests time out before those of the gateway's clients."""
    endpoint = os.environ.get("AWS_ENDPOINT") or os.environ.get("AWS_ENDPOINT_URL") or ""
    return from_url(
        url,
        client_options={
            "timeout": _TIMEOUT,
            "connect_timeout": _TIMEOUT,
            # The operator sets it for a server in the same network.
            "allow_http": endpoint.startswith("http://"),
        },
        retry_config={
            "max_retries": 2,
            "retry_timeout": _TIMEOUT,
            "backoff": {"init_backoff": timedelta(milliseconds=100)},
        },
    )


class Objects:
    """Definitions and growing files in an object store.

    The records are updated after the store, so that they never name an object that does not exist.
    """

    def __init__(self, store: ObjectStore, records: GatewayRecords) -> None:
        self._store = store
        self._records = records
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._segment_cache: OrderedDict[int, tuple[int, bytes]] = OrderedDict()
        self._growth_conditions: WeakValueDictionary[str, asyncio.Condition] = WeakValueDictionary()

    async def check(self) -> None:
        """Write and read an object, so that an unusable store fails at the start.

        Raises:
            StoreError: The store failed.
        """
        await self._put(_CHECK_NAME, b"deepsquare gateway")
        if await self._get(_CHECK_NAME) != b"deepsquare gateway":
            raise _failed(OSError("the test object can't be read back"))

    # -- definitions

    async def put_definition(self, digest: str, data: bytes) -> None:
        """Store a definition.

        Raises:
            StoreError: The store failed.
        """
        await self._put(_definition(digest), data)

    async def definition(self, digest: str) -> bytes | None:
        """Return a definition's bytes without a check of the digest; None if it is missing."""
        return await self._get(_definition(digest))

    async def drop_definition(self, digest: str) -> None:
        """Remove a definition."""
        await self._delete([_definition(digest)])

    # -- files

    def lock(self, space: JobSpace, name: str) -> asyncio.Lock:
        """Return the lock of a file; a writer holds it from the offset check until the write."""
        return self._locks.setdefault(f"{space.key}/{name}", asyncio.Lock())

    async def append(
        self, space: JobSpace, file: StoredFile, data: bytes, *, complete: bool
    ) -> StoredFile:
        """Append a part to a file; the caller holds its lock.

        Raises:
            StoreError: The store failed; the file is unchanged.
        """
        if data:
            start, head = await self._last_segment(file)
            body = head + data
            await self._put(_segment(file, start), body)
            self._segment_cache[file.id] = (start, body)
            self._segment_cache.move_to_end(file.id)
            while len(self._segment_cache) > _MAX_CACHED_SEGMENTS:
                self._segment_cache.popitem(last=False)
            file = self._records.put_segment(
                space, file, StoredSegment(start, len(body)), complete=complete
            )
        elif complete:
            file = self._records.finish(file)
        if complete or len(self._segment_cache.get(file.id, (0, b""))[1]) >= _MIN_SEGMENT:
            self._segment_cache.pop(file.id, None)
        await self._notify(space)
        return file

    async def read(self, file: StoredFile, start: int, end: int) -> AsyncIterator[bytes]:
        """Stream the bytes of a file from `start` to `end` (exclusive) in chunks.

        Raises:
            StoreError: The store failed.
        """
        for segment in self._records.segments(file):
            first = max(start, segment.start)
            last = min(end, segment.start + segment.size)
            while first < last:
                chunk_size = min(_READ_BYTES, last - first)
                yield await self._range(file, segment, first - segment.start, chunk_size)
                first += chunk_size

    async def drop(self, files: Sequence[StoredFile]) -> None:
        """Remove files."""
        paths = [
            _segment(file, segment.start)
            for file in files
            for segment in self._records.segments(file)
        ]
        for file in files:
            self._segment_cache.pop(file.id, None)
        await self._delete(paths)
        self._records.drop_files(files)

    # -- notification of readers

    def growth_of(self, space: JobSpace) -> asyncio.Condition:
        """Return a condition that is notified when a file of a job grows."""
        return self._growth_conditions.setdefault(space.key, asyncio.Condition())

    async def _notify(self, space: JobSpace) -> None:
        condition = self._growth_conditions.get(space.key)
        if condition is not None:
            async with condition:
                condition.notify_all()

    # -- the store

    async def _last_segment(self, file: StoredFile) -> tuple[int, bytes]:
        """Return the start of the segment for the next part, and the bytes already in it."""
        cached = self._segment_cache.get(file.id)
        if cached is not None and cached[0] + len(cached[1]) == file.size:
            return cached
        segments = self._records.segments(file)
        if not segments or segments[-1].size >= _MIN_SEGMENT:
            return file.size, b""
        last = segments[-1]
        return last.start, await self._range(file, last, 0, last.size)

    async def _range(
        self, file: StoredFile, segment: StoredSegment, start: int, length: int
    ) -> bytes:
        try:
            data = await obstore.get_range_async(
                self._store, _segment(file, segment.start), start=start, length=length
            )
        except (BaseError, OSError) as error:
            raise _failed(error) from None
        if len(data) != length:
            raise StoreError("The object store returned less of a file than was written to it")
        return bytes(data)

    async def _put(self, path: str, data: bytes) -> None:
        try:
            await obstore.put_async(self._store, path, data)
        except (BaseError, OSError) as error:
            raise _failed(error) from None

    async def _get(self, path: str) -> bytes | None:
        try:
            return bytes(await (await obstore.get_async(self._store, path)).bytes_async())
        except FileNotFoundError:
            return None
        except (BaseError, OSError) as error:
            raise _failed(error) from None

    async def _delete(self, paths: Sequence[str]) -> None:
        for path in paths:
            try:
                await obstore.delete_async(self._store, path)
            except FileNotFoundError:
                continue
            except (BaseError, OSError) as error:
                raise _failed(error) from None


def _definition(digest: str) -> str:
    return f"definitions/{digest[:2]}/{digest}"


def _segment(file: StoredFile, start: int) -> str:
    # Safe as a path: the space consists of numbers and an address, without the file's name.
    return f"jobs/{file.space}/{file.id}/{start:016d}"


def _failed(error: Exception) -> StoreError:
    return StoreError(
        f"The object store failed: {_error_text(error)}",
        hint="Check that it is running and has free space. Interrupted uploads are repeated.",
    )


def _error_text(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
