"""A loopback JSON-RPC proxy that injects faults: on request, or at random with a seed.

It sits between daemons and a working node, and fails like hosted endpoints. `Proxy.counts` counts
the injected faults, so that a test can verify that there were some.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import httpx2
from eth_account import Account
from eth_account.typed_transactions import TypedTransaction
from hexbytes import HexBytes

#: All faults, with their weights in a mix. Hangs cost the client time, so they are rarer.
MIXED: Mapping[str, float] = {
    "busy": 1,  # 429
    "broken": 1,  # 502 with an HTML page of a load balancer
    "page": 1,  # 200 with HTML
    "truncated": 1,  # part of a response, then the connection closes
    "half": 1,  # half of the JSON in a complete HTTP response
    "nested": 1,  # deeply nested brackets, which overflow a recursive parser
    "wrong_id": 1,  # a response with the ID of another request
    "null": 1,  # result: null
    "limited": 1,  # 200 with a rate limit error
    "hang": 0.5,  # no response, then the connection closes
    "lost": 1,  # forwarded, but without a response
    "stale": 1.5,  # the response of a node that lags 1 to 20 blocks
    "internal": 1,  # 200 with an internal error of the node
    "indexing": 1,  # 200 with the error of a node that is indexing
    "unavailable": 1,  # 503 with an error object
    "denied": 1,  # 400 with an error object
    "disowned": 1,  # forwarded, but with an error object as response
}
MOST_BEHIND = 20
_SEND = "eth_sendRawTransaction"
#: Index of the block parameter of each method that reads state.
_BLOCK_AT = {
    "eth_call": 1,
    "eth_estimateGas": 1,
    "eth_getBalance": 1,
    "eth_getBlockByNumber": 0,
    "eth_getCode": 1,
    "eth_getTransactionCount": 1,
    "eth_feeHistory": 1,
}


#: Makes a faulty response from a request and its result: HTTP status and body.
Spoil = Callable[[Any, Any], tuple[str, bytes]]


def status(message: str, body: bytes = b"busy") -> Spoil:
    """Return a fault that responds with an HTTP status, such as "503 Service Unavailable"."""
    return lambda _question, _answer: (message, body)


def refusal(code: int, message: str) -> Spoil:
    """Return a fault that responds with a JSON-RPC error."""
    error = {"code": code, "message": message}
    return lambda question, _answer: ("200 OK", json.dumps(_errors(question, error)).encode())


#: Responds to a request in place of the node: HTTP status and body; None forwards it to the node.
Profile = Callable[[Any], tuple[str, Any] | None]


def calls(question: Any) -> list[dict[str, Any]]:
    """Return the calls of a request, which may be a batch."""
    return question if isinstance(question, list) else [question]


def error_object(question: Any, code: int, message: str, *, with_id: bool = True) -> dict[str, Any]:
    """Return one error object for a whole request, with the ID of its first call or without ID."""
    number = calls(question)[0]["id"] if with_id else None
    return {"jsonrpc": "2.0", "id": number, "error": {"code": code, "message": message}}


def few_blocks(limit: int, line: str, code: int, message: str) -> Profile:
    """Return the profile of a node that limits the block range of `eth_getLogs`."""

    def profile(question: Any) -> tuple[str, Any] | None:
        for call in calls(question):
            if call["method"] == "eth_getLogs":
                query = call["params"][0]
                if (
                    "blockHash" not in query
                    and int(query["toBlock"], 16) - int(query["fromBlock"], 16) >= limit
                ):
                    return line, error_object(question, code, message)
        return None

    return profile


def few_calls(limit: int, line: str, code: int, message: str, *, shape: str = "object") -> Profile:
    """Return the profile of a node that limits the number of calls in a batch.

    It refuses with an `object`, a `list` of one error, or one error per call (`each`).
    """

    def profile(question: Any) -> tuple[str, Any] | None:
        if not isinstance(question, list) or len(question) <= limit:
            return None
        error = {"code": code, "message": message}
        if shape == "each":
            return line, _errors(question, error)
        error_response = error_object(question, code, message, with_id=False)
        return line, [error_response] if shape == "list" else error_response

    return profile


def failing(methods: Collection[str], line: str, code: int, message: str, *, times: int) -> Profile:
    """Return the profile of a node that fails the first `times` calls of these methods."""
    remaining = times

    def profile(question: Any) -> tuple[str, Any] | None:
        nonlocal remaining
        if remaining <= 0 or not methods & {call["method"] for call in calls(question)}:  # type: ignore[operator]
            return None
        remaining -= 1
        return line, _errors(question, {"code": code, "message": message})

    return profile


#: Refusals of log ranges by nodes and hosted endpoints: HTTP status, code, message.
RANGE_REFUSALS: Mapping[str, tuple[str, int, str]] = {
    "besu": ("200 OK", -32005, "Requested range exceeds maximum RPC range limit"),
    "alchemy": (
        "400 Bad Request",
        -32600,
        "You can make eth_getLogs requests with up to a 500 block range.",
    ),
    "quicknode": ("413 Payload Too Large", -32614, "eth_getLogs is limited to a 500 range"),
    "infura": ("200 OK", -32005, "query returned more than 10000 results"),
    "drpc": ("400 Bad Request", 35, "ranges over 10000 blocks are not supported on freetier"),
    "reth": ("200 OK", -32602, "query exceeds max block range 100000"),
    "unheard of": ("500 Internal Server Error", -32000, "no"),
}
#: Refusals of batches: maximum number of calls, HTTP status, code, message, shape.
BATCH_REFUSALS: Mapping[str, tuple[int, str, int, str, str]] = {
    "drpc": (3, "500 Internal Server Error", 31, "Batch of more than 3 requests", "object"),
    "400": (3, "400 Bad Request", 31, "Batch of more than 3 requests", "object"),
    "list of one": (3, "200 OK", 31, "Batch of more than 3 requests", "list"),
    "each": (2, "200 OK", -32000, "batch too large", "each"),
    "none": (0, "200 OK", -32600, "batch requests are not supported", "object"),
    "none, 403": (0, "403 Forbidden", -32600, "batch requests are not supported", "object"),
}
#: Transient errors of nodes for reads; a retry may succeed.
READ_ERRORS: Mapping[str, tuple[str, int, str]] = {
    "indexing": ("200 OK", -32000, "transaction indexing is in progress"),
    "internal": ("200 OK", -32603, "Internal error"),
    "timed out": ("200 OK", -32000, "upstream request timed out"),
    "not found": ("200 OK", -32000, "not found"),
    "503": ("503 Service Unavailable", -32000, "no backends available"),
    "400": ("400 Bad Request", -32600, "something is wrong with this"),
    "unheard of": ("200 OK", 19, "temporary trouble, retry"),
}


@dataclass(frozen=True)
class HostedLimits:
    """The limits of a hosted endpoint, and its refusals.

    `blocks` is the largest log range and `calls` the largest batch. One in `every` requests exceeds
    the rate limit. A refusal is an HTTP status, a code and a message.
    """

    blocks: int
    range_refusal: tuple[str, int, str]
    every: int
    rate_refusal: tuple[str, int, str]
    calls: int = 1000
    batch_refusal: tuple[str, int, str] = ("200 OK", -32600, "batch too large")


#: The limits are smaller than the real ones, so that a short chain reaches them.
HOSTED: Mapping[str, HostedLimits] = {
    "alchemy": HostedLimits(
        *(10, RANGE_REFUSALS["alchemy"], 5),
        (
            "429 Too Many Requests",
            429,
            "Your app has exceeded its compute units per second capacity.",
        ),
    ),
    "infura": HostedLimits(
        *(10, RANGE_REFUSALS["infura"], 5),
        ("429 Too Many Requests", 429, "Too Many Requests"),
    ),
    "infura, older": HostedLimits(
        *(10, RANGE_REFUSALS["infura"], 5),
        ("200 OK", -32005, "project ID request rate exceeded"),
    ),
    "quicknode": HostedLimits(
        *(10, RANGE_REFUSALS["quicknode"], 5),
        ("429 Too Many Requests", -32007, "15/second request limit reached"),
    ),
    "chainstack": HostedLimits(
        *(10, ("200 OK", -32602, "Block range limit exceeded."), 5),
        ("200 OK", -32005, "You've exceeded the RPS limit available on the current plan."),
    ),
    "drpc": HostedLimits(
        *(10, RANGE_REFUSALS["drpc"], 5),
        ("429 Too Many Requests", 15, "Too many requests, please retry"),
        *(3, BATCH_REFUSALS["drpc"][1:4]),
    ),
}


def hosted(habits: HostedLimits) -> Profile:
    """Return the profile of a hosted endpoint with rate, range and batch limits."""
    limits = (
        few_blocks(habits.blocks, *habits.range_refusal),
        few_calls(habits.calls, *habits.batch_refusal),
    )
    requests = 0

    def profile(question: Any) -> tuple[str, Any] | None:
        nonlocal requests
        requests += 1
        if requests % habits.every == 0:
            line, code, message = habits.rate_refusal
            return line, _errors(question, {"code": code, "message": message})
        return next((refusal for limit in limits if (refusal := limit(question))), None)

    return profile


def mixed(rate: float) -> dict[str, float]:
    """Return the rates of all faults for a total fault rate between 0 and 1."""
    total = sum(MIXED.values())
    return {name: rate * share / total for name, share in MIXED.items()}


class Proxy:
    """Serves on 127.0.0.1 within an `async with` block.

    Args:
        upstream: URL of the node.
        rates: Probability of each fault, 0 to 1; their sum is at most 1.
        seed: Seed of the random numbers.
        hang: Seconds without response before a hanging connection is closed.
        replacement_rule: Refuse replacement transactions that pay less than 10 % more, like geth.

    Attributes:
        orders: Faults for the next responses, used one by one before random faults: names of
            `MIXED`, or functions. The node receives these requests all the same.
        only: Methods to which `orders` apply; all methods if empty.
        profile: Responds in place of the node to requests that exceed its limits, before faults.
    """

    def __init__(
        self,
        upstream: str,
        rates: Mapping[str, float] | None = None,
        *,
        seed: int = 1,
        hang: float = 1.0,
        replacement_rule: bool = True,
    ) -> None:
        self.rates = dict(rates or {})
        assert set(self.rates) <= set(MIXED)
        assert sum(self.rates.values()) <= 1.0 + 1e-9
        self.orders: list[str | Spoil] = []
        self.only: frozenset[str] = frozenset()
        self.profile: Profile | None = None
        self.counts: Counter[str] = Counter()
        self.methods: Counter[str] = Counter()
        self.connections = 0
        self.url = ""
        self._upstream = upstream
        self._hang = hang
        self._dice = random.Random(seed)
        self._rule = replacement_rule
        self._pool: dict[tuple[str, int], tuple[str, int, int]] = {}
        self._client = httpx2.AsyncClient(timeout=30, trust_env=False)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def faults(self) -> int:
        """Number of requests with an injected fault."""
        return sum(self.counts[name] for name in MIXED)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.die()
        await self._client.aclose()

    async def die(self) -> None:
        """Close all connections, and accept no more."""
        assert self._server is not None
        await _cut(self._server, self._tasks)

    def lead_to(self, upstream: str) -> None:
        """Forward to another node from now on, as if the node had been restarted."""
        self._upstream = upstream

    def calm(self) -> None:
        """Stop random faults."""
        self.rates = {}

    # -- HTTP

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while body := await _read_request(reader):
                answer, stay = await self._serve(json.loads(body))
                writer.write(answer)
                await writer.drain()
                if not stay:
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()
            with suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _serve(self, question: Any) -> tuple[bytes, bool]:
        """Return the bytes of a response, and whether to keep the connection open."""
        requests = question if isinstance(question, list) else [question]
        self.methods.update(call["method"] for call in requests)
        self.counts["requests"] += 1
        refusal_response = None if self.profile is None else self.profile(question)
        if refusal_response is not None:
            self.counts["refused"] += 1
            return _http(json.dumps(refusal_response[1]).encode(), refusal_response[0]), True
        if self.orders and (not self.only or self.only & {call["method"] for call in requests}):
            return await self._faulty_response(question, requests, self.orders.pop(0))
        fault = self._choose_fault()
        self.counts[fault or "fair"] += 1
        if fault is not None and (plain := await self._plain(question, fault)):
            return plain
        behind = self._dice.randint(1, MOST_BEHIND) if fault == "stale" else 0
        results = [await self._forward(call, behind) for call in requests]
        return self._altered(question, results, fault)

    async def _faulty_response(
        self, question: Any, calls: list[dict[str, Any]], fault: str | Spoil
    ) -> tuple[bytes, bool]:
        """Return an ordered fault, after the node has processed the request."""
        results = [await self._forward(call, 0) for call in calls]
        if callable(fault):
            line, body = fault(question, results if isinstance(question, list) else results[0])
            self.counts["ordered"] += 1
            return _http(body, line), True
        self.counts[fault] += 1
        return await self._plain(question, fault) or self._altered(question, results, fault)

    async def _plain(self, question: Any, fault: str) -> tuple[bytes, bool] | None:
        """Return the response of faults that do not depend on the node, or None."""
        if fault == "hang":
            await asyncio.sleep(self._hang)
            return b"", False
        if fault == "limited":
            error = {"code": -32005, "message": "daily request rate limit reached"}
            return _http(json.dumps(_errors(question, error)).encode()), True
        if fault in _ERRORS:
            line, code, message = _ERRORS[fault]
            error = {"code": code, "message": message}
            return _http(json.dumps(_errors(question, error)).encode(), line), True
        return (_PLAIN[fault], True) if fault in _PLAIN else None

    @staticmethod
    def _altered(
        question: Any, responses: list[dict[str, Any]], fault: str | None
    ) -> tuple[bytes, bool]:
        """Return the node's response, altered by a fault."""
        if fault == "lost":
            return b"", False
        if fault == "disowned":
            error = {"code": -32603, "message": "Internal error"}
            responses = [
                {"jsonrpc": "2.0", "id": response["id"], "error": error} for response in responses
            ]
        if fault == "wrong_id":
            responses[0]["id"] = (responses[0].get("id") or 0) + 1
        if fault == "null":
            responses[0] = {"jsonrpc": "2.0", "id": responses[0]["id"], "result": None}
        text = json.dumps(responses if isinstance(question, list) else responses[0]).encode()
        if fault == "half":
            text = text[: len(text) // 2]
        whole = _http(text)
        if fault == "truncated":
            return whole[:-20], False  # Content-Length announces the whole body
        return whole, True

    def _choose_fault(self) -> str | None:
        remainder = self._dice.random()
        for name, rate in self.rates.items():
            remainder -= rate
            if remainder < 0:
                return name
        return None

    # -- JSON-RPC

    async def _forward(self, question: dict[str, Any], behind: int) -> dict[str, Any]:
        if question["method"] == _SEND and self._rule:
            refusal = await self._underpriced(question["params"][0])
            if refusal is not None:
                self.counts["underpriced"] += 1
                return {"jsonrpc": "2.0", "id": question["id"], "error": refusal}
        if behind and question["method"] != _SEND:
            return await self._lagging_response(question, behind)
        return await self._ask(question)

    async def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = (await self._client.post(self._upstream, json=question)).json()
        return answer

    async def _result(self, method: str, *params: Any) -> Any:
        body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        return (await self._ask(body))["result"]

    async def _lagging_response(self, question: dict[str, Any], behind: int) -> dict[str, Any]:
        """Return the response of a node that lags `behind` blocks."""
        head = max(0, int(await self._result("eth_blockNumber"), 16) - behind)
        method, params = question["method"], list(question["params"])
        answer: dict[str, Any] = {"jsonrpc": "2.0", "id": question["id"]}
        if method == "eth_blockNumber":
            return answer | {"result": hex(head)}
        if method in _BLOCK_AT:
            position = _BLOCK_AT[method]
            block_tag = params[position] if len(params) > position else "latest"
            if block_tag in {"latest", "pending", "safe", "finalized"}:
                params[position:] = [hex(head), *params[position + 1 :]]
            elif block_tag != "earliest" and int(block_tag, 16) > head:
                if method == "eth_getBlockByNumber":
                    return answer | {"result": None}
                return answer | {"error": {"code": -32000, "message": "header not found"}}
        if method == "eth_getLogs" and "blockHash" in params[0]:
            block = await self._result("eth_getBlockByHash", params[0]["blockHash"], False)
            if block is None or int(block["number"], 16) > head:
                return answer | {"error": {"code": -32000, "message": "unknown block"}}
        elif method == "eth_getLogs":
            # Some nodes return no error for blocks that they do not have.
            last = min(int(params[0]["toBlock"], 16), head)
            if last < int(params[0]["fromBlock"], 16):
                return answer | {"result": []}
            params = [params[0] | {"toBlock": hex(last)}]
        response = await self._ask(question | {"params": params})
        if method in {"eth_getTransactionReceipt", "eth_getTransactionByHash"}:
            number = (response.get("result") or {}).get("blockNumber")
            if number is None or int(number, 16) > head:
                return answer | {"result": None}
        return response

    async def _underpriced(self, raw: str) -> dict[str, Any] | None:
        """Apply geth's rule: a replacement must raise both fees by at least 10 %."""
        fields = TypedTransaction.from_bytes(HexBytes(raw)).as_dict()
        sender = Account.recover_transaction(raw)
        key = sender, int(fields["nonce"])
        fees = int(fields["maxFeePerGas"]), int(fields["maxPriorityFeePerGas"])
        mined = int(await self._result("eth_getTransactionCount", sender, "latest"), 16)
        before = self._pool.get(key)
        if before is not None and key[1] >= mined and before[0] != raw:
            self.counts["replacement"] += 1
            if any(
                10 * new_fee < 11 * old_fee
                for new_fee, old_fee in zip(fees, before[1:], strict=True)
            ):
                return {"code": -32000, "message": "replacement transaction underpriced"}
        self._pool[key] = (raw, *fees)
        return None


class Wire:
    """Forwards TCP connections to a node's port, also WebSockets, until it is closed."""

    def __init__(self, upstream: str) -> None:
        self._port = int(upstream.rpartition(":")[2])
        self._tasks: set[asyncio.Task[Any]] = set()
        self.url = ""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"ws://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.die()

    async def die(self) -> None:
        """Close all connections, and accept no more."""
        await _cut(self._server, self._tasks)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            upstream_writer, client_writer = await asyncio.open_connection("127.0.0.1", self._port)
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(_pass(reader, client_writer))
                    tasks.create_task(_pass(upstream_writer, writer))
            finally:
                client_writer.close()
        except (OSError, ExceptionGroup, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()


async def _cut(server: asyncio.Server, tasks: set[asyncio.Task[Any]]) -> None:
    """Stop accepting connections, and close the open ones."""
    server.close()
    for task in list(tasks):
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()
    raise ConnectionError("the other side is gone")


async def _read_request(reader: asyncio.StreamReader) -> bytes:
    """Read the body of the next request; empty at the end of the connection."""
    head = await reader.readuntil(b"\r\n\r\n")
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return await reader.readexactly(int(value))
    return b""


def _http(body: bytes, status: str = "200 OK", kind: str = "application/json") -> bytes:
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def _errors(question: Any, error: Mapping[str, Any]) -> Any:
    if isinstance(question, list):
        return [_errors(request, error) for request in question]
    return {"jsonrpc": "2.0", "id": question["id"], "error": error}


_ERRORS = {
    "internal": READ_ERRORS["internal"],
    "indexing": READ_ERRORS["indexing"],
    "unavailable": READ_ERRORS["503"],
    "denied": READ_ERRORS["400"],
}
_HTML = b"<!doctype html><title>One moment, please</title><h1>Checking your browser</h1>"
_PLAIN = {
    "busy": _http(b"slow down", "429 Too Many Requests", "text/plain"),
    "broken": _http(_HTML, "502 Bad Gateway", "text/html"),
    "page": _http(_HTML, kind="text/html"),
    "nested": _http(b'{"jsonrpc":"2.0","id":1,"result":' + b"[" * 200_000),
}
