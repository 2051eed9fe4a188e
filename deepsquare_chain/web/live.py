"""Live pages: server-sent events that say what changed, and nothing else.

A page that is told of a change reads itself again; so nothing is drawn twice, and a page that
misses an event is right again at the next one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Final

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from deepsquare_chain.errors import GridError
from deepsquare_chain.indexer.queries import Index
from deepsquare_chain.indexer.read_models import Changes

#: Seconds after which a silent stream shows that it lives: proxies cut what is silent.
HEARTBEAT: Final = 15.0
MOST_STREAMS: Final = 500
_MAX_NUMBER: Final = 2**63 - 1


class Feed:
    """Looks for changes while anybody listens, once for all listeners.

    Args:
        index: Where changes are noted.
        interval: Seconds between two looks.
    """

    def __init__(self, index: Index, interval: float = 0.7) -> None:
        self._index = index
        self._interval = interval
        self._moved = asyncio.Condition()
        self._latest = 0
        self._listeners = 0
        self._looking: asyncio.Task[None] | None = None
        self.closed = False

    @property
    def listeners(self) -> int:
        """Open streams."""
        return self._listeners

    async def close(self) -> None:
        """End all streams; harmless a second time."""
        self.closed = True
        async with self._moved:
            self._moved.notify_all()
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait({self._looking})

    async def stream(self, since: int) -> AsyncIterator[str]:
        """Events after a change, until the reader goes or the feed is closed."""
        self._listeners += 1
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        try:
            yield "retry: 2000\n\n"
            while not self.closed:
                if not await self._wait_beyond(since):
                    yield ": still here\n\n"
                    continue
                found = await run_in_threadpool(self._index.changes, since)
                since = found.latest
                for text in _events(found):
                    yield text
        finally:
            self._listeners -= 1

    async def _wait_beyond(self, since: int) -> bool:
        try:
            async with asyncio.timeout(HEARTBEAT), self._moved:
                # A rebuilt index counts from the beginning again.
                await self._moved.wait_for(lambda: self.closed or self._latest not in {since, 0})
        except TimeoutError:
            return False
        return not self.closed

    async def _look(self) -> None:
        while self._listeners and not self.closed:
            try:
                status = await run_in_threadpool(self._index.status)
            except GridError:
                status = None  # a database that is away; the next look may find it
            if status is not None and status.change != self._latest:
                async with self._moved:
                    self._latest = status.change
                    self._moved.notify_all()
            await asyncio.sleep(self._interval)


def _events(found: Changes) -> list[str]:
    if found.missed:
        return [_event(found.latest, {"kind": "rebuilt", "jobs": [], "everything": True})]
    return [
        _event(
            each.number,
            {
                "kind": each.kind,
                "first_block": each.first_block,
                "last_block": each.last_block,
                "jobs": list(each.jobs),
                "everything": each.kind in {"reorg", "rebuilt"},
            },
        )
        for each in found.items
    ]


def _event(number: int, body: dict[str, Any]) -> str:
    return f"id: {number}\nevent: change\ndata: {json.dumps(body)}\n\n"


async def live(request: Request) -> Response:
    """The stream; `since` or the browser's own `Last-Event-ID` is where it goes on."""
    feed: Feed = request.app.state.feed
    if feed.closed or feed.listeners >= MOST_STREAMS:
        return PlainTextResponse("busy", status_code=503, headers={"Retry-After": "30"})
    asked = request.headers.get("last-event-id") or request.query_params.get("since", "")
    since = int(asked[:19]) if asked.isascii() and asked.isdigit() else 0
    return StreamingResponse(
        feed.stream(min(since, _MAX_NUMBER)),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )
