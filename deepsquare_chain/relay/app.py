"""The HTTP API of the relay.

`GET /v1/relay` returns its terms, `POST /v1/requests` submits a signed request, and
`GET /v1/requests/DIGEST` returns the state of one. Submission is idempotent: a repeated request
returns the state of the first. Errors are problem details (RFC 9457) with a `code` for programs.
`/live` and `/ready` return 200 or 503.
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


#: Paths of the API.
PATHS: Final = ("/v1/relay", "/v1/requests", "/v1/requests/{digest}")


def relay_app(relay: RelayService, probe: Callable[[], Health]) -> Starlette:
    """Build the HTTP application of a relay.

    Args:
        relay: The relay.
        probe: Returns the health of its daemon.
    """

    async def terms(_: Request) -> Response:
        return JSONResponse(relay.terms())

    async def take(request: Request) -> Response:
        relayed = await relay.accept(await _read(request, relay.rules.max_bytes))
        status = HTTPStatus.ACCEPTED if relayed.state in PENDING else HTTPStatus.OK
        headers = {"Location": f"/v1/requests/{relayed.digest}"}
        return JSONResponse(_wire(relay, relayed), status, headers=headers)

    async def find(request: Request) -> Response:
        relayed = relay.find(request.path_params["digest"])
        if relayed is None:
            return problem(HTTPStatus.NOT_FOUND, "This relay has not accepted this request")
        return JSONResponse(_wire(relay, relayed))

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
    """Wrap an endpoint to return errors as problem details, never tracebacks."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Exception as error:  # noqa: BLE001 - clients must not see internal errors
            return failure_response(error, "relay", request.url.path)

    return answer


async def _read(request: Request, limit: int) -> SignedRequest:
    if not sends_json(request):
        raise UsageError("Requests must be sent as application/json")
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
