"""Bytes of definitions and files, in an object store: a folder, or S3 by URL."""

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

#: Written at the start of a gateway.
_CHECK: Final = "check"
#: A part that is added to a last segment of less than this makes it longer, so that a log is no
#: heap of tiny objects.
_MERGED: Final = 256 * 1024
#: Last segments of growing files that are kept in memory.
_MAX_TAILS: Final = 128
#: Bytes that one read takes from the store at once.
_READ: Final = 1024 * 1024
#: For one request to a store elsewhere; clients of the gateway wait for 15 seconds.
_TIMEOUT: Final = timedelta(seconds=10)


def open_object_store(place: str | Path) -> ObjectStore:
    """The store at a folder, or at a URL such as `s3://bucket/prefix`.

    Credentials of S3 come from the environment (AWS_ACCESS_KEY_ID and so on), never from the URL.

    Raises:
        UsageError: It can't be used.
    """
    try:
        if "://" in str(place):
            return _remote(str(place))
        folder = Path(place).absolute()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return LocalStore(folder)
    except (BaseError, OSError, ValueError) as error:
        raise UsageError(
            f"The object store can't be used: {_words(error)}",
            hint="Give a folder, or a URL such as s3://bucket/prefix with the variables AWS_... "
            "of the environment.",
        ) from None


def _remote(url: str) -> ObjectStore:
    """A store elsewhere, which is given up before the gateway's clients give the gateway up."""
    endpoint = os.environ.get("AWS_ENDPOINT") or os.environ.get("AWS_ENDPOINT_URL") or ""
    return from_url(
        url,
        client_options={
            "timeout": _TIMEOUT,
            "connect_timeout": _TIMEOUT,
            # Named by whoever runs the gateway, as a server of the same network.
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
        store: Where bytes are.
        records: What is known of them; always behind the store, never ahead of it.
    """

    def __init__(self, store: ObjectStore, records: GatewayRecords) -> None:
        self._store = store
        self._records = records
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._tails: OrderedDict[int, tuple[int, bytes]] = OrderedDict()
        self._grown: WeakValueDictionary[str, asyncio.Condition] = WeakValueDictionary()

    async def check(self) -> None:
        """Write and read an object, so that a store that can't be used is known at once.

        Raises:
            StoreError: It can't be used now.
        """
        await self._put(_CHECK, b"deepsquare gateway")
        if await self._get(_CHECK) != b"deepsquare gateway":
            raise _failed(OSError("what was written can't be read"))

    # -- definitions

    async def put_definition(self, digest: str, data: bytes) -> None:
        """Keep a definition.

        Raises:
            StoreError: The store can't keep it now.
        """
        await self._put(_definition(digest), data)

    async def definition(self, digest: str) -> bytes | None:
        """A definition's bytes, unchecked; None where the store has none."""
        return await self._get(_definition(digest))

    async def drop_definition(self, digest: str) -> None:
        """Remove a definition."""
        await self._delete([_definition(digest)])

    # -- files

    def lock(self, space: JobSpace, name: str) -> asyncio.Lock:
        """What the writer of a file holds from its look at the offset to the end of its write."""
        key = f"{space.key}/{name}"
        lock = self._locks.get(key)
        if lock is None:
            lock = self._locks[key] = asyncio.Lock()
        return lock

    async def append(
        self, space: JobSpace, file: StoredFile, data: bytes, *, complete: bool
    ) -> StoredFile:
        """Write the next part of a file; the caller holds its lock.

        Raises:
            StoreError: The store can't keep it now; the file is as before.
        """
        if data:
            start, head = await self._tail(file)
            body = head + data
            await self._put(_segment(file, start), body)
            self._tails[file.id] = (start, body)
            self._tails.move_to_end(file.id)
            while len(self._tails) > _MAX_TAILS:
                self._tails.popitem(last=False)
            file = self._records.put_segment(
                space, file, Segment(start, len(body)), complete=complete
            )
        elif complete:
            file = self._records.finish(file)
        if complete or len(self._tails.get(file.id, (0, b""))[1]) >= _MERGED:
            self._tails.pop(file.id, None)
        await self._notify(space)
        return file

    async def read(self, file: StoredFile, start: int, end: int) -> AsyncIterator[bytes]:
        """The bytes of a file from `start` up to `end`, in pieces of a bounded size.

        Raises:
            StoreError: The store can't read them now.
        """
        for segment in self._records.segments(file):
            first = max(start, segment.start)
            last = min(end, segment.start + segment.size)
            while first < last:
                piece = min(_READ, last - first)
                yield await self._range(file, segment, first - segment.start, piece)
                first += piece

    async def drop(self, files: Sequence[StoredFile]) -> None:
        """Remove files."""
        paths = [
            _segment(file, segment.start)
            for file in files
            for segment in self._records.segments(file)
        ]
        for file in files:
            self._tails.pop(file.id, None)
        await self._delete(paths)
        self._records.drop_files(files)

    # -- readers that wait

    def grown(self, space: JobSpace) -> asyncio.Condition:
        """Is notified when a file of a job grows."""
        found = self._grown.get(space.key)
        if found is None:
            found = self._grown[space.key] = asyncio.Condition()
        return found

    async def _notify(self, space: JobSpace) -> None:
        found = self._grown.get(space.key)
        if found is not None:
            async with found:
                found.notify_all()

    # -- the store

    async def _tail(self, file: StoredFile) -> tuple[int, bytes]:
        """Where the next part goes: the start of its segment, and what is in it already."""
        known = self._tails.get(file.id)
        if known is not None and known[0] + len(known[1]) == file.size:
            return known
        segments = self._records.segments(file)
        if not segments or segments[-1].size >= _MERGED:
            return file.size, b""
        last = segments[-1]
        return last.start, await self._range(file, last, 0, last.size)

    async def _range(self, file: StoredFile, segment: Segment, start: int, length: int) -> bytes:
        try:
            found = await obstore.get_range_async(
                self._store, _segment(file, segment.start), start=start, length=length
            )
        except (BaseError, OSError) as error:
            raise _failed(error) from None
        if len(found) != length:
            raise StoreError("The object store has less of a file than was written to it")
        return bytes(found)

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
    # The space is made of numbers and an address, and the name of a file is no part of it.
    return f"jobs/{file.space}/{file.id}/{start:016d}"


def _failed(error: Exception) -> StoreError:
    return StoreError(
        f"The object store failed: {_words(error)}",
        hint="Is it running, and is there room? What was under way is sent again.",
    )


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
