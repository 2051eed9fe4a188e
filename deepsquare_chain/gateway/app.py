"""HTTP API of the gateway, below `/v1`.

`POST /v1/sign-in/nonce` and `POST /v1/sign-in` return a token for a signed message (EIP-4361); all
other requests except `GET /v1/gateway` need it. Definitions are addressed by their SHA-256 for
uploads and by their job for reads. Files of a job are uploaded in parts at byte offsets, so that an
interrupted upload can be resumed, and are read in ranges. The log is streamed as server-sent events
whose IDs are byte offsets. Errors are problems (RFC 9457) with a `code` for programs.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import fields
from http import HTTPStatus
from typing import Annotated, Any, Final, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Path
from fastapi.exceptions import RequestValidationError
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from deepsquare_chain import __version__
from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.rpc.transport import Transport
from deepsquare_chain.daemon import Daemon
from deepsquare_chain.daemon.service import (
    ServiceSettings,
    open_contracts,
    open_daemon,
    open_store,
    serve,
)
from deepsquare_chain.errors import GridError, UsageError
from deepsquare_chain.gateway.access import Access, Permission, Session, check_name
from deepsquare_chain.gateway.notifications import (
    CustomerDeliverer,
    GatewayNotifications,
    Recipients,
)
from deepsquare_chain.gateway.service import GatewayService, GatewaySettings
from deepsquare_chain.gateway.storage import GatewayRecords, Objects, open_object_store
from deepsquare_chain.notify.service import NotifySettings
from deepsquare_chain.observability.metrics import Health, Metrics
from deepsquare_chain.observability.serving import (
    LoopbackServer,
    RateLimit,
    RequestRefusedError,
    failure_response,
    json_body,
    probe_routes,
    problem,
    read_body,
    sends_json,
    too_large,
)
from deepsquare_chain.store.database import Store

#: Timeout in seconds for receiving a body, so that slow clients do not occupy upload slots.
_BODY_SECONDS: Final = 60
_MAX_JSON: Final = 16 * 1024
_MAX_RESULTS: Final = 8 * 1024 * 1024
_RANGE: Final = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")
_OFFSET: Final = re.compile(r"[0-9]{1,18}")
#: Seconds between keep-alive messages of an idle stream; proxies close idle connections.
_HEARTBEAT: Final = 15
_SAFE: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "sandbox; default-src 'none'",
    "X-Content-Type-Options": "nosniff",
}
JobId = Annotated[str, Path(pattern=r"^[0-9]{1,18}$")]
Digest = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$")]
T = TypeVar("T")


def gateway_app(
    gateway: GatewayService, probe: Callable[[], Health], more: Mapping[str, ASGIApp] | None = None
) -> FastAPI:
    """Return the HTTP application of a gateway, and of `more` services by path."""
    app = FastAPI(
        title="DeepSquare gateway",
        version=__version__,
        description=__doc__ or "",
        openapi_url="/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    rules = gateway.rules
    app.state.gateway = gateway
    app.state.requests = RateLimit(rules.rate, rules.burst)
    app.state.sign_ins = RateLimit(rules.sign_in_rate, rules.sign_in_burst)
    app.include_router(router)
    app.router.routes.extend(probe_routes(probe))
    for path, service_app in (more or {}).items():
        app.router.routes.append(Route(path, service_app, include_in_schema=False))
    for kind in (GridError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _error_response)
    # Browsers never send tokens automatically, unlike cookies, so any origin is allowed.
    app.add_middleware(
        CORSMiddleware,
        allow_origins=["*"],
        allow_methods=["GET", "HEAD", "POST", "PUT"],
        allow_headers=["Authorization", "Content-Type", "Range"],
        expose_headers=["Content-Range", "Upload-Complete", "Upload-Offset"],
        max_age=600,
    )
    return app


def _gateway(request: Request) -> GatewayService:
    gateway: GatewayService = request.app.state.gateway
    return gateway


def _signed_in(request: Request) -> Session:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    session = _gateway(request).access.session(token if scheme.lower() == "bearer" else "")
    _refuse_excess(request.app.state.requests.wait(session.account.lower()))
    return session


def _check_sign_in_rate(request: Request) -> None:
    _refuse_excess(request.app.state.sign_ins.wait(request.client.host if request.client else "?"))


Gateway = Annotated[GatewayService, Depends(_gateway)]
Signed = Annotated[Session, Depends(_signed_in)]
router: Final = APIRouter()

# -- sign-in


@router.get("/v1/gateway")
async def terms(gateway: Gateway) -> dict[str, Any]:
    """Return the deployment and the limits of this gateway."""
    return gateway.terms()


@router.post("/v1/sign-in/nonce", dependencies=[Depends(_check_sign_in_rate)])
async def nonce(gateway: Gateway) -> Response:
    """Return a nonce for one sign-in."""
    return JSONResponse(gateway.access.challenge(), headers=_SAFE)


@router.post("/v1/sign-in", dependencies=[Depends(_check_sign_in_rate)])
async def sign_in(gateway: Gateway, request: Request) -> Response:
    """Return a token for a signed message: `{"message": TEXT, "signature": "0x..."}`."""
    body = await _json(request)
    text, signature = body.get("message"), _hex(body.get("signature"))
    if not isinstance(text, str) or signature is None:
        raise UsageError("A sign-in needs a message and a signature in hexadecimal")
    token, session = await gateway.access.sign_in(text, signature)
    return JSONResponse(
        {"token": token, "account": session.account, "expires": int(session.expires)}, headers=_SAFE
    )


# -- definitions


@router.put("/v1/definitions/{digest}")
async def put_definition(
    gateway: Gateway, request: Request, digest: Digest, session: Signed
) -> Response:
    """Store a definition under its SHA-256."""
    await gateway.access.check_uploader(session)
    async with gateway.uploads.slot(session.account):
        data = await _part(request, gateway.max_definition)
        await gateway.put_definition(session, digest, data)
    return Response(status_code=HTTPStatus.NO_CONTENT)


@router.get("/v1/jobs/{job_id}/definition")
async def definition(gateway: Gateway, job_id: JobId, session: Signed) -> Response:
    """Return the definition of a job, for its customer and its current provider."""
    space = await gateway.access.job(session, int(job_id), Permission.READ_DEFINITION)
    data = await gateway.definition(space)
    return Response(data, headers=_SAFE, media_type="application/json")


# -- files of a job


@router.api_route("/v1/jobs/{job_id}/files/{name:path}", methods=["PATCH"])
async def append(
    gateway: Gateway, request: Request, job_id: JobId, name: str, session: Signed
) -> Response:
    """Append a part at the offset in `Upload-Offset`, with `Upload-Complete: ?1` for the last one.

    With `Upload-Exact: ?1` the part is refused if the file does not end at that offset.
    """
    check_name(name)
    space = await gateway.access.job(session, int(job_id), Permission.WRITE)
    offset = request.headers.get("upload-offset", "")
    if not _OFFSET.fullmatch(offset):
        raise UsageError("Upload-Offset must be a number of bytes")
    complete = _is_set(request, "complete")
    async with gateway.uploads.slot(session.account):
        data = await _part(request, gateway.rules.max_part)
        file = await gateway.append(
            space, name, int(offset), data, complete=complete, exact=_is_set(request, "exact")
        )
    return Response(
        status_code=HTTPStatus.NO_CONTENT, headers=_upload_headers(file.size, file.complete)
    )


@router.head("/v1/jobs/{job_id}/files/{name:path}")
async def size(gateway: Gateway, job_id: JobId, name: str, session: Signed) -> Response:
    """Return the uploaded size of a file in headers, for its writer and its readers."""
    check_name(name)
    file = await gateway.readable_file(session, int(job_id), name)
    headers = {**_SAFE, **_upload_headers(file.size, file.complete), "Accept-Ranges": "bytes"}
    return Response(headers={**headers, "Content-Length": str(file.size)})


@router.get("/v1/jobs/{job_id}/files/{name:path}")
async def read(
    gateway: Gateway, request: Request, job_id: JobId, name: str, session: Signed
) -> Response:
    """Return a file, or a range of it."""
    check_name(name)
    space = await gateway.access.job(session, int(job_id), Permission.READ)
    file = gateway.file(space, name)
    byte_range = _range(request.headers.get("range"), file.size)
    start, end = (0, file.size) if byte_range is None else byte_range
    headers = {
        **_SAFE,
        **_upload_headers(file.size, file.complete),
        "Accept-Ranges": "bytes",
        "Content-Disposition": "attachment",
        "Content-Length": str(end - start),
    }
    if byte_range is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
    return StreamingResponse(
        gateway.objects.read(file, start, end),
        HTTPStatus.OK if byte_range is None else HTTPStatus.PARTIAL_CONTENT,
        headers,
        media_type="application/octet-stream",
    )


@router.put("/v1/jobs/{job_id}/results")
async def put_results(
    gateway: Gateway, request: Request, job_id: JobId, session: Signed
) -> Response:
    """Store the list of a run's files, once all are uploaded: `{"files": [{"name", ...}, ...]}`."""
    space = await gateway.access.job(session, int(job_id), Permission.WRITE)
    async with gateway.uploads.slot(session.account):
        gateway.put_results(space, await _json(request, _MAX_RESULTS))
    return Response(status_code=HTTPStatus.NO_CONTENT)


@router.get("/v1/jobs/{job_id}/results")
async def results(gateway: Gateway, job_id: JobId, session: Signed) -> Response:
    """Return the provider's list of the files of a run."""
    space = await gateway.access.job(session, int(job_id), Permission.READ)
    return Response(gateway.results(space), headers=_SAFE, media_type="application/json")


@router.get("/v1/jobs/{job_id}/log/events")
async def events(gateway: Gateway, request: Request, job_id: JobId, session: Signed) -> Response:
    """Stream the log from an offset as it grows; the ID of each event is the offset after it."""
    await gateway.access.job(session, int(job_id), Permission.READ)
    offset_text = request.headers.get("last-event-id") or request.query_params.get("offset", "0")
    if not _OFFSET.fullmatch(offset_text):
        raise UsageError("offset must be a number of bytes")
    stream = gateway.open_stream(session, int(job_id), int(offset_text))
    return EventSourceResponse(
        _events(stream),
        ping=_HEARTBEAT,
        sep="\n",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


@router.put("/v1/jobs/{job_id}/shares")
async def share(gateway: Gateway, request: Request, job_id: JobId, session: Signed) -> Response:
    """Share a job with a reader: `{"reader", "until", "signature"}`, signed by its customer."""
    body = await _json(request)
    reader, until = body.get("reader"), body.get("until")
    signature = _hex(body.get("signature"))
    if not isinstance(reader, str) or type(until) is not int or signature is None:
        raise UsageError("A share needs a reader, a time in seconds, and a signature")
    await gateway.share(session, int(job_id), reader, until, signature)
    return Response(status_code=HTTPStatus.NO_CONTENT)


@router.put("/v1/notifications")
async def register_notifications(gateway: Gateway, request: Request, session: Signed) -> Response:
    """Register recipients for jobs of definitions: `{"definitions", "requests", "key"}`."""
    await gateway.access.check_uploader(session)
    _notifications(gateway).register(session.account, await _json(request))
    return Response(status_code=HTTPStatus.NO_CONTENT)


@router.get("/v1/notifications")
async def notifications(gateway: Gateway, request: Request, session: Signed) -> Response:
    """Return the newest notifications of the account's jobs."""
    gateway.access.check_unrestricted(session)
    limit = request.query_params.get("limit", "50")
    if not re.fullmatch(r"[1-9][0-9]{0,2}", limit):
        raise UsageError("limit must be a number from 1 to 999")
    rows = _notifications(gateway).latest(session.account, int(limit))
    return JSONResponse({"notifications": rows}, headers=_SAFE)


def _notifications(gateway: GatewayService) -> GatewayNotifications:
    if gateway.notifications is None:
        raise RequestRefusedError(
            "This gateway sends no notifications",
            code="no-notifications",
            status=HTTPStatus.NOT_FOUND,
            hint="Send them with `deepsquare notify run`: the setting notify_by.",
        )
    return gateway.notifications


def _refuse_excess(wait: float) -> None:
    """Refuse a request over its rate limit, which is allowed again in `wait` seconds; 0 for now."""
    if wait:
        raise RequestRefusedError(
            "Too many requests",
            code="too-many",
            status=HTTPStatus.TOO_MANY_REQUESTS,
            hint="Try again later.",
            retry=max(1, round(wait)),
        )


async def _error_response(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        return problem(HTTPStatus.NOT_FOUND, "There is no resource at this path")
    return failure_response(error, "gateway", request.url.path)


async def _part(request: Request, limit: int) -> bytes:
    """Return the body.

    Raises:
        RequestRefusedError: The body is longer than `limit` bytes, or too slow.
    """
    length = request.headers.get("content-length", "0")
    too_long = length.isascii() and length.isdigit() and int(length[:19]) > limit
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            data = None if too_long else await read_body(request, limit)
    except TimeoutError:
        raise RequestRefusedError(
            f"The body took longer than {_BODY_SECONDS} seconds",
            code="too-slow",
            status=HTTPStatus.REQUEST_TIMEOUT,
            hint="Send smaller parts.",
        ) from None
    if data is None:
        raise too_large(limit, "Send files in parts.")
    return data


async def _json(request: Request, limit: int = _MAX_JSON) -> dict[str, Any]:
    if not sends_json(request):
        raise UsageError("The body must be sent as application/json")
    return json_body(await _part(request, limit))


def _hex(text: Any) -> bytes | None:
    if not isinstance(text, str) or not re.fullmatch(r"0x(?:[0-9a-fA-F]{2}){1,4096}", text):
        return None
    return bytes.fromhex(text[2:])


def _range(header: str | None, size: int) -> tuple[int, int] | None:
    """Return start and end (exclusive) of the requested range; None for the whole file."""
    match = _RANGE.fullmatch(header or "")
    if match is None or match.group(0) == "bytes=-":
        return None  # anything but a single range may be ignored (RFC 9110, 14.2)
    first, last = match.groups()
    start = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    if start >= size or end <= start:
        raise HTTPException(
            HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
            "The file is shorter than the requested range",
            {"Content-Range": f"bytes */{size}"},
        )
    return start, end


def _is_set(request: Request, name: str) -> bool:
    """Return whether a boolean structured header of an upload is true (RFC 9651)."""
    return request.headers.get(f"upload-{name}", "?0") == "?1"


def _upload_headers(size: int, complete: bool) -> dict[str, str]:
    return {"Upload-Offset": str(size), "Upload-Complete": "?1" if complete else "?0"}


async def _events(
    stream: AsyncIterator[tuple[bytes, int] | None],
) -> AsyncIterator[ServerSentEvent]:
    offset = 0
    async for chunk in stream:
        if chunk is None:
            yield ServerSentEvent(event="end", data=json.dumps({"offset": offset}), sep="\n")
            return
        data, offset = chunk
        text = base64.b64encode(data).decode()
        yield ServerSentEvent(event="log", id=str(offset), data=text, sep="\n")


# -- the gateway's daemon: opens its resources in order and closes them in reverse order

NAME: Final = "gateway"
#: Concurrent deliveries of notifications, and the timeout of one in seconds.
_AT_ONCE: Final = 32
_WEBHOOK_TIMEOUT: Final = 10.0


async def run_gateway(
    url: str,
    deployment: Deployment,
    settings: GatewaySettings,
    *,
    host: str,
    port: int,
    ready: Callable[[str], None] = lambda _: None,
    stop: asyncio.Event | None = None,
    more: Mapping[str, ASGIApp] | None = None,
) -> None:
    """Run a gateway until SIGINT, SIGTERM or `stop`; it needs no wallet.

    Args:
        ready: Called with the gateway's URL once it accepts requests.
        more: Applications of other services by path of this server, such as a relay.

    Raises:
        UsageError: The address or the object store is invalid, or the database is in use or belongs
            to another grid.
        StoreError: The object store failed.
        WrongEndpointError: An endpoint serves another chain, or lacks the contracts. An endpoint
            that is down is retried.
    """

    async def open_once(parts: AsyncExitStack, stop: asyncio.Event) -> Daemon:
        metrics = Metrics(NAME)
        contracts = await open_contracts(parts, url, deployment, settings, metrics)
        store = parts.enter_context(await open_store(NAME, contracts, None, settings))
        records = GatewayRecords(store)
        objects = Objects(
            open_object_store(settings.objects or settings.state_dir / "objects"), records
        )
        await objects.check()
        access = Access(contracts, records, settings.rules)
        service = GatewayService(
            contracts,
            access,
            records,
            objects,
            rules=settings.rules,
            metrics=metrics,
            notifications=await _open_notifications(contracts, store, settings, metrics),
        )
        daemon = await open_daemon(
            NAME, service.cycle, settings, chain_id=deployment.chain_id, metrics=metrics, stop=stop
        )
        app = gateway_app(service, daemon.health, more or {})
        server = LoopbackServer(app, port, host, metrics)
        await server.start()
        urls = tuple(public_url.rstrip("/") for public_url in settings.urls) or _server_urls(
            server.url
        )
        access.serve_under(urls, [public_url.rstrip("/") for public_url in settings.sites])
        parts.push_async_callback(server.stop)
        # Close open streams first: the server waits for them when it stops.
        parts.push_async_callback(service.close)
        ready(urls[0])
        return daemon

    await serve(NAME, open_once, stop)


async def _open_notifications(
    contracts: Contracts, store: Store, settings: GatewaySettings, metrics: Metrics
) -> GatewayNotifications | None:
    """Open the notifications of customers; None if the settings disable them."""
    if not settings.notify:
        return None
    recipients = Recipients(store)
    # Headers of the settings are keys of the operator: customers' webhooks get none.
    deliverer = CustomerDeliverer(
        recipients,
        transport_settings=Transport(settings.transport.ca_file),
        mail=settings.mail,
        public_only=not settings.notify_private,
        timeout=_WEBHOOK_TIMEOUT,
    )
    common = {field.name: getattr(settings, field.name) for field in fields(ServiceSettings)}
    return GatewayNotifications(
        contracts,
        store,
        deliverer,
        recipients,
        NotifySettings(**common, at_once=_AT_ONCE),
        per_day=settings.rules.notifications,
        has_mail=settings.mail is not None,
        start_block=int(await contracts.w3.eth.block_number) + 1,
        metrics=metrics,
    )


def _server_urls(url: str) -> tuple[str, ...]:
    """Return the URL of the server; for 127.0.0.1 also with the name localhost."""
    return (url, url.replace("127.0.0.1", "localhost", 1)) if "127.0.0.1" in url else (url,)
