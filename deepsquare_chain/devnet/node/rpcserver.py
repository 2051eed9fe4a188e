"""JSON-RPC over HTTP in front of the embedded chain: single calls and batches, bounded."""

from __future__ import annotations

import json
from typing import Any

from pydantic_core import from_json
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from deepsquare_chain.devnet.node.methods import Methods
from deepsquare_chain.devnet.node.rpcerrors import (
    INTERNAL_ERROR,
    INVALID_PARAMS,
    INVALID_REQUEST,
    PARSE_ERROR,
    RpcError,
)
from deepsquare_chain.observability.serving import LOOPBACK_ONLY, read_body, sends_json

MAX_BODY = 5 * 1024 * 1024  # bytes, geth's own bound
MAX_BATCH = 1_000

Answer = dict[str, Any]


def rpc_app(methods: Methods) -> Starlette:
    """The node's one address: POST / takes JSON-RPC."""

    async def answer(request: Request) -> Response:
        if not sends_json(request):
            return PlainTextResponse("send application/json", status_code=415)
        body = await read_body(request, MAX_BODY)
        if body is None:
            return PlainTextResponse(f"content length too large (limit {MAX_BODY})", 413)
        reply = await respond(methods, body)
        if reply is None:
            return Response(status_code=204)
        encoded = json.dumps(reply, separators=(",", ":"))
        return Response(encoded, media_type="application/json")

    return Starlette(routes=[Route("/", answer, methods=["POST"])], middleware=[LOOPBACK_ONLY])


async def respond(methods: Methods, body: bytes) -> Answer | list[Answer] | None:
    """The reply to one request body; None where only notifications were sent."""
    try:
        # py-evm raises the recursion limit so far that the json module overruns the C stack.
        asked = from_json(body)
    except ValueError:
        return _error(None, RpcError(PARSE_ERROR, "parse error: the body is not JSON"))
    if not isinstance(asked, list):
        return await _one(methods, asked)
    if not asked:
        return _error(None, RpcError(INVALID_REQUEST, "empty batch"))
    if len(asked) > MAX_BATCH:
        return _error(None, RpcError(INVALID_REQUEST, f"batch too large (limit {MAX_BATCH})"))
    replies = [await _one(methods, each) for each in asked]
    return [reply for reply in replies if reply is not None] or None


async def _one(methods: Methods, asked: Any) -> Answer | None:
    if not isinstance(asked, dict) or not isinstance(asked.get("method"), str):
        return _error(None, RpcError(INVALID_REQUEST, "invalid request"))
    identity = asked.get("id")
    if not isinstance(identity, (str, int, float, type(None))):
        return _error(None, RpcError(INVALID_REQUEST, "invalid request: the id can't be an object"))
    params = asked.get("params") or []
    if not isinstance(params, list):
        return _error(identity, RpcError(INVALID_PARAMS, "non-array args"))
    try:
        result = await methods.call(asked["method"], params)
    except RpcError as error:
        reply: Answer = _error(identity, error)
    except Exception as error:  # noqa: BLE001 - a node answers, whatever one request ran into
        reply = _error(identity, RpcError(INTERNAL_ERROR, f"internal error: {error!r}"[:500]))
    else:
        reply = {"jsonrpc": "2.0", "id": identity, "result": result}
    return reply if "id" in asked else None


def _error(identity: Any, error: RpcError) -> Answer:
    return {"jsonrpc": "2.0", "id": identity, "error": error.to_wire()}
