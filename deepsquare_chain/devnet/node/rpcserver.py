"""The JSON-RPC server of the embedded chain: single calls and batches over HTTP, with limits."""

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

MAX_BODY = 5 * 1024 * 1024  # bytes, the same limit as geth
MAX_BATCH = 1_000

Answer = dict[str, Any]


def rpc_app(methods: Methods) -> Starlette:
    """Return the HTTP application of the node; it accepts JSON-RPC by POST /."""

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
    """Return the response to one request body; None if it contains only notifications."""
    try:
        # py-evm raises the recursion limit so far that the json module can overflow the C stack.
        request = from_json(body)
    except ValueError:
        return _error(None, RpcError(PARSE_ERROR, "parse error: the body is not JSON"))
    if not isinstance(request, list):
        return await _one(methods, request)
    if not request:
        return _error(None, RpcError(INVALID_REQUEST, "empty batch"))
    if len(request) > MAX_BATCH:
        return _error(None, RpcError(INVALID_REQUEST, f"batch too large (limit {MAX_BATCH})"))
    replies = [await _one(methods, item) for item in request]
    return [reply for reply in replies if reply is not None] or None


async def _one(methods: Methods, asked: Any) -> Answer | None:
    if not isinstance(asked, dict) or not isinstance(asked.get("method"), str):
        return _error(None, RpcError(INVALID_REQUEST, "invalid request"))
    request_id = asked.get("id")
    if not isinstance(request_id, (str, int, float, type(None))):
        return _error(None, RpcError(INVALID_REQUEST, "invalid request: the id can't be an object"))
    params = asked.get("params") or []
    if not isinstance(params, list):
        return _error(request_id, RpcError(INVALID_PARAMS, "non-array args"))
    try:
        result = await methods.call(asked["method"], params)
    except RpcError as error:
        reply: Answer = _error(request_id, error)
    except Exception as error:  # noqa: BLE001 - a failed request must get a response
        reply = _error(request_id, RpcError(INTERNAL_ERROR, f"internal error: {error!r}"[:500]))
    else:
        reply = {"jsonrpc": "2.0", "id": request_id, "result": result}
    return reply if "id" in asked else None


def _error(identity: Any, error: RpcError) -> Answer:
    return {"jsonrpc": "2.0", "id": identity, "error": error.to_wire()}
