"""New blocks over a websocket, as a wake-up call and nothing else.

What a block holds is read over HTTP by whoever was woken; a lost or invented message costs or
saves a moment and changes nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import pydantic_core
import structlog
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidURI, WebSocketException

from deepsquare_chain.chain.transport import Transport, proxy_for, tls_problem
from deepsquare_chain.errors import UsageError
from deepsquare_chain.settings import safe_url

#: Seconds before the next connection, doubled with each failure in a row.
_PAUSES: Final = (1.0, 30.0)
#: Seconds for opening, and for an answer.
_TIMEOUT: Final = 10.0
#: Bytes of a message; a header has about a thousand.
_MAX_MESSAGE: Final = 65_536
_log = structlog.get_logger(__name__)


class _UnusableError(Exception):
    """The other side does not speak as a node should."""


class HeadWatch:
    """Calls `wake` at each new block, for as long as it runs; connects again and again.

    Args:
        url: ws:// or wss:// address of a node.
        wake: Called without arguments, also after each new connection.
        chain_id: Chain that the node must serve.
        told: Called with whether it listens now.
        pauses: Shortest and longest pause before the next connection, in seconds.
        transport: Certificates and headers for a remote address.

    Raises:
        UsageError: That is no address of a websocket.
    """

    def __init__(
        self,
        url: str,
        wake: Callable[[], None],
        *,
        chain_id: int,
        told: Callable[[bool], None] = lambda _listens: None,
        pauses: tuple[float, float] = _PAUSES,
        transport: Transport | None = None,
    ) -> None:
        if not url.startswith(("ws://", "wss://")):
            raise UsageError(f"{safe_url(url)} is no ws:// or wss:// address")
        self._url = url
        self._place = safe_url(url)
        self._wake = wake
        self._told = told
        self._chain_id = chain_id
        self._pauses = pauses
        self._transport = transport or Transport()
        self._failures = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to listen, beside everything else."""
        self._task = asyncio.create_task(self._run(), name="websocket")

    async def stop(self) -> None:
        """End listening; harmless when it never began."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _run(self) -> None:
        while True:
            try:
                await self._listen()
            except (OSError, WebSocketException, TimeoutError, _UnusableError) as error:
                self._told(False)
                self._failures += 1
                low, high = self._pauses
                pause = min(high, low * 2.0 ** min(self._failures - 1, 10))
                words = tls_problem(error) or str(error)[:200]
                if isinstance(error, InvalidURI):
                    words = "no such address"
                _log.warning(
                    "websocket_lost",
                    endpoint=self._place,
                    error=words or type(error).__name__,
                    retry_in=pause,
                )
                await asyncio.sleep(pause)

    async def _listen(self) -> None:
        """One connection, to its end."""
        secure = self._url.startswith("wss://")
        async with connect(
            self._url,
            max_size=_MAX_MESSAGE,
            open_timeout=_TIMEOUT,
            close_timeout=1,
            proxy=proxy_for(self._url),
            ssl=self._transport.context() if secure else None,
            additional_headers=self._transport.headers_for(self._url),
        ) as socket:
            numbers = itertools.count(1)
            found = await self._ask(socket, next(numbers), "eth_chainId")
            if found != hex(self._chain_id):
                raise _UnusableError(f"it serves chain {str(found)[:40]}, not {self._chain_id}")
            subscription = await self._ask(socket, next(numbers), "eth_subscribe", "newHeads")
            self._failures = 0
            self._told(True)
            _log.info("websocket_listens", endpoint=self._place)
            self._wake()  # blocks of the time without a connection
            async for message in socket:
                body = _read(message)
                params = body.get("params")
                if isinstance(params, dict) and params.get("subscription") == subscription:
                    self._wake()
            raise _UnusableError("it closed the connection")

    async def _ask(self, socket: ClientConnection, number: int, method: str, *params: str) -> Any:
        body = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
        async with asyncio.timeout(_TIMEOUT):
            await socket.send(json.dumps(body))
            answer = _read(await socket.recv())
        if answer.get("id") != number or not isinstance(answer.get("result"), str):
            raise _UnusableError(f"no proper answer to {method}")
        return answer["result"]


def _read(message: str | bytes) -> dict[str, Any]:
    try:
        body = pydantic_core.from_json(message, allow_inf_nan=False)
    except ValueError:
        raise _UnusableError("no JSON") from None
    if not isinstance(body, dict):
        raise _UnusableError("no JSON-RPC")
    return body
