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
from deepsquare_chain.errors import EndpointError, GridError, UsageError
from deepsquare_chain.observability import get_logger
from deepsquare_chain.observability.probe import Health
from deepsquare_chain.observability.serving import problem, read_body, sends_json
from deepsquare_chain.relay.records import PENDING, RelayedRequest
from deepsquare_chain.relay.rules import RefusedError
from deepsquare_chain.relay.service import RelayService

_RETRY_SECONDS: Final = 5
_log = get_logger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]


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
        return _probed(probe().live)

    async def ready(_: Request) -> Response:
        return _probed(probe().ready)

    return Starlette(
        routes=[
            Route("/v1/relay", guarded(terms)),
            Route("/v1/requests", guarded(take), methods=["POST"]),
            Route("/v1/requests/{digest}", guarded(find)),
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
        except RefusedError as error:
            return problem(
                error.status,
                error.message,
                hint=error.hint,
                code=error.code,
                retry=error.retry_after,
                next_nonce=error.next_nonce,
            )
        except UsageError as error:
            return problem(
                HTTPStatus.BAD_REQUEST, error.message, hint=error.hint, code="bad-request"
            )
        except EndpointError as error:
            _log.warning("endpoint failed", error=error.message)
            return problem(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "This relay can't reach the chain now",
                code="endpoint",
                retry=_RETRY_SECONDS,
            )
        except Exception as error:  # noqa: BLE001 - nobody outside learns what it was
            message = error.message if isinstance(error, GridError) else None
            _log.error("relay failed", path=request.url.path, error=message, exc_info=error)
            return problem(
                HTTPStatus.INTERNAL_SERVER_ERROR, "Something went wrong here", code="internal"
            )

    return answer


async def _read(request: Request, limit: int) -> SignedRequest:
    if not sends_json(request):
        raise UsageError("Requests are sent as application/json")
    body = await read_body(request, limit)
    if body is None:
        raise RefusedError(
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


def _probed(good: bool) -> Response:
    return JSONResponse({"ok": good}, HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE)


async def _http_problem(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - what it is registered for
    response = problem(HTTPStatus(error.status_code), str(error.detail))
    response.headers.update(error.headers or {})
    return response
