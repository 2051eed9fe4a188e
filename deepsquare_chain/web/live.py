"""Live pages: server-sent events that only notify of changes.

A page reloads its content after an event. Pages are thus rendered in one place only, and a page
that missed an event is correct again after the next one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from deepsquare_chain.errors import GridError
from deepsquare_chain.indexer.queries import Index
from deepsquare_chain.indexer.read_models import Changes
from deepsquare_chain.indexer.schema import MAX_INT

#: Seconds between heartbeats of an idle stream: proxies close idle connections.
HEARTBEAT: Final = 15.0
MAX_STREAMS: Final = 500


class Feed:
    """Polls the index every `interval` seconds while there are open streams, once for all."""

    def __init__(self, index: Index, interval: float = 0.7) -> None:
        self._index = index
        self._interval = interval
        self._changed = asyncio.Condition()
        self._latest = 0
        self._listeners = 0
        self._poller: asyncio.Task[None] | None = None
        self.closed = False

    @property
    def listeners(self) -> int:
        """Number of open streams."""
        return self._listeners

    async def close(self) -> None:
        """Close all streams; idempotent."""
        self.closed = True
        async with self._changed:
            self._changed.notify_all()
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.wait({self._poller})

    async def stream(self, since: int) -> AsyncIterator[str]:
        """Yield events after the change `since`, until the client leaves or the feed closes."""
        self._listeners += 1
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll())
        try:
            yield "retry: 2000\n\n"
            while not self.closed:
                if not await self._wait_beyond(since):
                    yield ": still here\n\n"
                    continue
                changes = await run_in_threadpool(self._index.changes, since)
                since = changes.latest
                for event in _events(changes):
                    yield event
        finally:
            self._listeners -= 1

    async def _wait_beyond(self, since: int) -> bool:
        try:
            async with asyncio.timeout(HEARTBEAT), self._changed:
                # A rebuilt index restarts the numbering of changes: compare with != instead of >.
                await self._changed.wait_for(lambda: self.closed or self._latest not in {since, 0})
        except TimeoutError:
            return False
        return not self.closed

    async def _poll(self) -> None:
        while self._listeners and not self.closed:
            try:
                status = await run_in_threadpool(self._index.status)
            except GridError:
                status = None  # the database is not available; retry at the next poll
            if status is not None and status.change != self._latest:
                async with self._changed:
                    self._latest = status.change
                    self._changed.notify_all()
            await asyncio.sleep(self._interval)


def _events(changes: Changes) -> Iterator[str]:
    if changes.missed:
        yield _event(changes.latest, kind="rebuilt", jobs=[])
        return
    for change in changes.items:
        blocks = {"first_block": change.first_block, "last_block": change.last_block}
        yield _event(change.number, kind=change.kind, **blocks, jobs=list(change.jobs))


def _event(number: int, *, kind: str, **fields: Any) -> str:
    body = {"kind": kind, **fields, "everything": kind in {"reorg", "rebuilt"}}
    return f"id: {number}\nevent: change\ndata: {json.dumps(body)}\n\n"


async def live(request: Request) -> Response:
    """Stream changes after `since` or the browser's `Last-Event-ID`."""
    feed: Feed = request.app.state.feed
    if feed.closed or feed.listeners >= MAX_STREAMS:
        return PlainTextResponse("busy", status_code=503, headers={"Retry-After": "30"})
    cursor = request.headers.get("last-event-id") or request.query_params.get("since", "")
    since = int(cursor[:19]) if cursor.isascii() and cursor.isdigit() else 0
    return StreamingResponse(
        feed.stream(min(since, MAX_INT)),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )
