"""Stores the bytes of definitions and files in an object store: a folder, or S3 by URL."""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Final
from weakref import WeakValueDictionary

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from deepsquare_chain.errors import StoreError, UsageError
from deepsquare_chain.gateway.records import GatewayRecords, JobSpace, Segment, StoredFile

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

    Args:
        store: Object store of the bytes.
        records: Database of the objects; updated after the store, so it never runs ahead of it.
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
        key = f"{space.key}/{name}"
        lock = self._locks.get(key)
        if lock is None:
            lock = self._locks[key] = asyncio.Lock()
        return lock

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
                space, file, Segment(start, len(body)), complete=complete
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
        condition = self._growth_conditions.get(space.key)
        if condition is None:
            condition = self._growth_conditions[space.key] = asyncio.Condition()
        return condition

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

    async def _range(self, file: StoredFile, segment: Segment, start: int, length: int) -> bytes:
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
