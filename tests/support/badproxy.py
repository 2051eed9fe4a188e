"""A loopback JSON-RPC proxy that spoils answers on order."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx

#: Gets the request's body and the node's answer; returns status, body and whether to answer at all.
Fault = Callable[[Any, Any], tuple[int, bytes]]


def status(code: int, body: bytes = b"busy") -> Fault:
    """An HTTP status instead of an answer; the request is forwarded all the same."""
    return lambda _request, _answer: (code, body)


def page(_request: Any, _answer: Any) -> tuple[int, bytes]:
    """A web page."""
    return 200, b"<html><body>Welcome</body></html>"


def truncated(_request: Any, answer: Any) -> tuple[int, bytes]:
    """Half of the answer, complete as HTTP."""
    text = json.dumps(answer).encode()
    return 200, text[: len(text) // 2]


def wrong_id(_request: Any, answer: Any) -> tuple[int, bytes]:
    """The answer to another question."""
    return 200, json.dumps({**answer, "id": 999_999}).encode()


def null(request: Any, _answer: Any) -> tuple[int, bytes]:
    """Nothing as a result."""
    return 200, json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": None}).encode()


def error(code: int, message: str) -> Fault:
    """A JSON-RPC error instead of the answer; the request is forwarded all the same."""
    return lambda request, _answer: (
        200,
        json.dumps(
            {"jsonrpc": "2.0", "id": request["id"], "error": {"code": code, "message": message}}
        ).encode(),
    )


def lost(_request: Any, _answer: Any) -> tuple[int, bytes]:
    """The connection is closed after forwarding."""
    return 0, b""


class BadProxy:
    """Stands before a node; `faults` are used up one by one, for `methods` only if given."""

    def __init__(self, upstream: str) -> None:
        self.url = ""
        self.faults: list[Fault] = []
        self.methods: set[str] = set()
        self.seen: list[str] = []
        self.delay = 0.0
        self.chaos: Callable[[], Fault | None] = lambda: None  # asked where no fault is ordered
        self._upstream = upstream
        self._client = httpx.AsyncClient(trust_env=False, timeout=30)
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> BadProxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        await self._client.aclose()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (head := await reader.readuntil(b"\r\n\r\n")) and await self._one(
                head, reader, writer
            ):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, httpx.HTTPError):
            pass
        finally:
            writer.close()

    async def _one(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        lines = head.decode().lower().split("\r\n")
        length = next(int(each[15:]) for each in lines if each.startswith("content-length:"))
        request = json.loads(await reader.readexactly(length))
        method = request["method"] if isinstance(request, dict) else "batch"
        self.seen.append(method)
        answer = (await self._client.post(self._upstream, json=request)).json()
        await asyncio.sleep(self.delay)
        code, body = 200, json.dumps(answer).encode()
        if self.faults and (not self.methods or method in self.methods):
            code, body = self.faults.pop(0)(request, answer)
        elif fault := self.chaos():
            code, body = fault(request, answer)
        if code == 0:
            return False
        writer.write(f"HTTP/1.1 {code} X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        return True
