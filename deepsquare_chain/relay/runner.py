"""The relay's HTTP API, and its daemon: opens its resources in order, and closes them in reverse."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from http import HTTPStatus
from typing import Any, Final

from pydantic_core import from_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.bindings.forwarder import SignedRequest
from deepsquare_chain.chain.signers import Signer
from deepsquare_chain.daemon import Daemon
from deepsquare_chain.daemon.service import (
    open_contracts,
    open_daemon,
    open_sender,
    open_store,
    serve,
)
from deepsquare_chain.errors import UsageError
from deepsquare_chain.observability.metrics import Health, Metrics
from deepsquare_chain.observability.serving import (
    DeferredApp,
    LoopbackServer,
    RequestRefusedError,
    failure_response,
    probe_response,
    problem,
    read_body,
    sends_json,
)
from deepsquare_chain.relay.records import PENDING, RelayedRequest
from deepsquare_chain.relay.service import RelayService, RelaySettings

# -- the HTTP API of the relay
#
# `GET /v1/relay` returns its terms, `POST /v1/requests` submits a signed request, and
# `GET /v1/requests/DIGEST` returns the state of one. Submission is idempotent: a repeated request
# returns the state of the first. Errors are problem details (RFC 9457) with a `code` for programs.
# `/live` and `/ready` return 200 or 503.

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
        raise UsageError("The body is not JSON") from None
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


NAME: Final = "relay"


async def run_relay(
    url: str,
    deployment: Deployment,
    account: Signer,
    settings: RelaySettings,
    *,
    host: str,
    port: int,
    ready: Callable[[str], None] = lambda _: None,
    stop: asyncio.Event | None = None,
    served_by: DeferredApp | None = None,
) -> None:
    """Run a relay until SIGINT, SIGTERM or `stop`.

    Args:
        url: JSON-RPC endpoint, or several, separated by commas.
        deployment: The deployment record of the grid.
        account: The relay's own wallet, which pays the gas.
        settings: Settings of the relay.
        host: Address to listen on.
        port: Port to listen on; 0 selects a free one.
        ready: Called with the relay's URL when it accepts requests.
        stop: Stops the relay when set.
        served_by: Serves the application instead of an own server. Host and port are then unused,
            and `ready` gets an empty string.

    Raises:
        UsageError: The deployment has no forwarder, the address can't be used, or the database is
            in use or belongs to another account or grid.
        WrongEndpointError: An endpoint serves another chain, or lacks the contracts. If an
            endpoint is down, the relay waits for it.
    """

    async def open_once(parts: AsyncExitStack, stop: asyncio.Event) -> Daemon:
        metrics = Metrics(NAME)
        contracts = await open_contracts(parts, url, deployment, settings, metrics)
        trusted = (await contracts.scheduler.parameters()).forwarder
        if int(trusted, 16) == 0 or trusted != contracts.forwarder.address:
            raise UsageError(
                f"The MetaScheduler at {contracts.scheduler.address} accepts no calls through the "
                f"forwarder {contracts.forwarder.address} of the deployment record",
                hint="Give the record of a deployment whose contracts trust its forwarder.",
            )
        store = parts.enter_context(await open_store(NAME, contracts, account, settings))
        sender = await open_sender(
            parts, contracts, account, store=store, settings=settings, metrics=metrics
        )
        service = RelayService(
            contracts,
            sender,
            store,
            domain=await contracts.forwarder.domain(),
            settings=settings,
            metrics=metrics,
        )
        parts.push_async_callback(service.close)
        daemon = await open_daemon(
            NAME,
            service.cycle,
            settings,
            chain_id=deployment.chain_id,
            metrics=metrics,
            stop=stop,
        )
        service.wake = daemon.wake
        await service.poll_wallet()
        app = relay_app(service, daemon.health)
        if served_by is not None:
            served_by.app = app
            parts.callback(setattr, served_by, "app", None)
            ready("")
            return daemon
        server = LoopbackServer(app, port, host)
        await server.start()
        parts.push_async_callback(server.stop)
        ready(server.url)
        return daemon

    await serve(NAME, open_once, stop)
