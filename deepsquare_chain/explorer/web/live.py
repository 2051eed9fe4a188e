"""Server-sent events: pages learn that something changed, and read themselves anew."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Final

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from deepsquare_chain.explorer.web.site import Site

#: Streams at once; each looks at the index once a second.
MAX_STREAMS: Final = 200
_PAUSE: Final = 1.0
_ALIVE_EVERY: Final = 15


class Live:
    """All open streams of a site."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self.open = 0

    async def __call__(self, request: Request) -> Response:
        """`/live?since=N`: an event `change` for what happened after a change's number."""
        if self.open >= MAX_STREAMS:
            return PlainTextResponse("Too many live pages; read again.", 503)
        asked = request.headers.get("last-event-id") or request.query_params.get("since", "")
        since = int(asked) if asked.isascii() and asked.isdigit() and len(asked) < 16 else 0
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(
            self._stream(request, since), media_type="text/event-stream", headers=headers
        )

    async def _stream(self, request: Request, since: int) -> AsyncIterator[str]:
        self.open += 1
        try:
            yield "retry: 3000\n\n"
            quiet = 0.0
            while not self._site.stop.is_set() and not await request.is_disconnected():
                found = await self._site.ask(self._site.index.changes, since)
                if found.latest != since or found.missed:
                    jobs = sorted({job for each in found.items for job in each.jobs})
                    everything = found.missed or any(
                        each.kind in {"reorg", "rebuilt", "finality"} for each in found.items
                    )
                    body = json.dumps({"jobs": jobs, "everything": everything})
                    since, quiet = found.latest, 0.0
                    yield f"id: {since}\nevent: change\ndata: {body}\n\n"
                elif quiet >= _ALIVE_EVERY:
                    quiet = 0.0
                    yield ": still here\n\n"
                await self._pause()
                quiet += _PAUSE
        finally:
            self.open -= 1

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(_PAUSE):
                await self._site.stop.wait()
        except TimeoutError:
            pass
