"""The relay over HTTP.

`GET /v1/relay` tells what it takes, `POST /v1/requests` hands a signed request over, and
`GET /v1/requests/DIGEST` tells what became of one. A repeated request gets the answer of the first.
Refusals are problems (RFC 9457) with a `code` for programs. `/live` and `/ready` answer 200 or 503.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Final

from pydantic_core import from_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deepsquare_chain.chain.bindings.forwarder import SignedRequest
from deepsquare_chain.errors import UsageError
from deepsquare_chain.observability.probe import Health
from deepsquare_chain.observability.serving import (
    RequestRefusedError,
    failure_response,
    probe_response,
    problem,
    read_body,
    sends_json,
)
from deepsquare_chain.relay.records import PENDING, RelayedRequest
from deepsquare_chain.relay.service import RelayService

Endpoint = Callable[[Request], Awaitable[Response]]


#: Where requests for a relay go.
PATHS: Final = ("/v1/relay", "/v1/requests", "/v1/requests/{digest}")


def relay_app(relay: RelayService, probe: Callable[[], Health]) -> Starlette:
    """The HTTP application of a relay.

    Args:
        relay: What answers.
        probe: Health of its daemon.
    """

    async def terms(_: Request) -> Response:
        return JSONResponse(relay.terms())

    async def take(request: Request) -> Response:
        taken = await relay.accept(await _read(request, relay.rules.max_bytes))
        status = HTTPStatus.ACCEPTED if taken.state in PENDING else HTTPStatus.OK
        where = {"Location": f"/v1/requests/{taken.digest}"}
        return JSONResponse(_wire(relay, taken), status, headers=where)

    async def find(request: Request) -> Response:
        found = relay.find(request.path_params["digest"])
        if found is None:
            return problem(HTTPStatus.NOT_FOUND, "This relay has taken no such request")
        return JSONResponse(_wire(relay, found))

    async def live(_: Request) -> Response:
        return probe_response(probe().live)

    async def ready(_: Request) -> Response:
        return probe_response(probe().ready)

    return Starlette(
        routes=[
            Route(PATHS[0], guarded(terms)),
            Route(PATHS[1], guarded(take), methods=["POST"]),
            Route(PATHS[2], guarded(find)),
            Route("/live", live),
            Route("/ready", ready),
        ],
        exception_handlers={HTTPException: _http_problem},
    )


def guarded(endpoint: Endpoint) -> Endpoint:
    """An endpoint whose errors are problems, never tracebacks."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Exception as error:  # noqa: BLE001 - nobody outside learns what it was
            return failure_response(error, "relay", request.url.path)

    return answer


async def _read(request: Request, limit: int) -> SignedRequest:
    if not sends_json(request):
        raise UsageError("Requests are sent as application/json")
    body = await read_body(request, limit)
    if body is None:
        raise RequestRefusedError(
            f"The body is longer than {limit:,} bytes",
            code="too-large",
            status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            hint="Split it into several requests.",
        )
    try:
        tree = from_json(body, allow_inf_nan=False)
    except ValueError:
        raise UsageError("The body is no JSON") from None
    return SignedRequest.from_wire(tree)


def _wire(relay: RelayService, request: RelayedRequest) -> dict[str, Any]:
    return {
        "digest": request.digest,
        "state": request.state.value,
        "function": request.function,
        "transaction": relay.transaction_of(request) or None,
        "detail": request.detail or None,
    }


async def _http_problem(request: Request, error: Exception) -> Response:
    return failure_response(error, "relay", request.url.path)
