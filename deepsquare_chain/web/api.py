"""The JSON API below `/api/v1`: queries of the index, and their OpenAPI document."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Coroutine
from functools import cache
from http import HTTPStatus
from typing import Annotated, Any, Final, TypeAlias, get_origin

from fastapi import APIRouter, Depends, FastAPI, Path, Query
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepsquare_chain import __version__
from deepsquare_chain.errors import NotFoundError, StoreError, UsageError
from deepsquare_chain.indexer import read_models as rm
from deepsquare_chain.indexer.queries import (
    ANOMALY_KINDS,
    DEFAULT_LIMIT,
    MAX_BUCKETS,
    MAX_LIMIT,
    Index,
)
from deepsquare_chain.indexer.schema import MAX_INT
from deepsquare_chain.job import JobStatus
from deepsquare_chain.observability import get_logger
from deepsquare_chain.observability.serving import PROBLEM, RateLimit, problem

PREFIX: Final = "/api/v1"
#: Rate limit of one client: requests per second, and the burst.
RATE: Final = 10.0
BURST: Final = 100
_MAX_TEXT: Final = 500
_DIGITS: Final = re.compile(r"[0-9]{1,19}")
_RETRY_SECONDS: Final = 5
_DESCRIPTION: Final = """\
Read access to the index of a grid's events. Every row names its block, transaction and log, so that
it can be checked on the chain. A reorg can still undo a row that is not `finalized`.

Amounts are strings: `paid` in credit-wei, `paid_credits` in credits. Times are seconds of chain
time. Lists are paginated: pass `next` as `cursor` to get the next page. Responses carry an `ETag`;
a request with `If-None-Match` gets 304 if nothing changed. Above the rate limit, the status is 429
with `Retry-After`. Names, labels and reasons are untrusted text, never markup.
"""
_log = get_logger(__name__)


def api_routes(index: Index, *, rate: float = RATE, burst: int = BURST) -> list[BaseRoute]:
    """Return the routes of the API.

    One client may make `rate` requests per second (zero for no limit), and `burst` at once.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.index = index
    app.include_router(router, prefix=PREFIX)
    app.add_api_route(PREFIX, describe, include_in_schema=False)
    app.add_exception_handler(HTTPException, _not_found)
    guarded = _Guard(app, RateLimit(rate, burst))
    return [Route(PREFIX, guarded), Route(PREFIX + "/{rest:path}", guarded)]


# -- errors


class Problem(BaseModel):
    """An error and what to do next, as problem details (RFC 9457)."""

    model_config = ConfigDict(extra="forbid")

    type: str = Field("about:blank", json_schema_extra={"format": "uri-reference"})
    title: str
    status: int
    detail: str
    hint: str | None = None


class _NotModified(Exception):  # noqa: N818 - it ends a request early, nothing failed
    """Raised if the client's cached response is still valid (304)."""

    def __init__(self, headers: dict[str, str]) -> None:
        super().__init__()
        self.headers = headers


def _response_of(request: Request, error: Exception) -> Response:
    """Return the response to an exception of an endpoint, without internal details."""
    match error:
        case _NotModified():
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=error.headers)
        case RequestValidationError():
            return problem(HTTPStatus.BAD_REQUEST, _invalid(error.errors()[0]))
        case NotFoundError():
            return problem(HTTPStatus.NOT_FOUND, error.message, hint=error.hint)
        case UsageError():
            return problem(HTTPStatus.BAD_REQUEST, error.message, hint=error.hint)
    _log.error("api failed", path=request.url.path[:200], exc_info=error)
    if isinstance(error, StoreError):
        # Do not disclose the location of the database.
        detail = "The index can't be read"
        return problem(HTTPStatus.SERVICE_UNAVAILABLE, detail, retry=_RETRY_SECONDS)
    return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "An unexpected error occurred")


def _invalid(error: dict[str, Any]) -> str:
    """Return the message of a parameter that pydantic refused; it begins with the name."""
    name = str(error["loc"][1])
    if error["type"] == "string_too_long":
        return f"{name} is longer than {error['ctx']['max_length']} characters"
    return f"{name} {error['msg']}"


async def _not_found(_: Request, __: Exception) -> Response:
    hint = f"See {PREFIX}/openapi.json."
    return problem(HTTPStatus.NOT_FOUND, "This path is not in the API", hint=hint)


class _Guard:
    """Middleware that allows only GET and HEAD, and applies the rate limit."""

    def __init__(self, app: ASGIApp, limit: RateLimit) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request (ASGI)."""
        client = scope["client"][0] if scope.get("client") else ""
        if scope["method"] not in {"GET", "HEAD"}:
            response = problem(HTTPStatus.METHOD_NOT_ALLOWED, "This API is read-only")
            response.headers["Allow"] = "GET, HEAD"
        elif wait := self._limit.wait(client):
            response = problem(
                HTTPStatus.TOO_MANY_REQUESTS, "Too many requests", retry=math.ceil(wait)
            )
        elif scope["method"] == "HEAD":
            await self._app({**scope, "method": "GET"}, receive, _without_body(send))
            return
        else:
            await self._app(scope, receive, send)
            return
        await response(scope, receive, send)


def _without_body(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return sent


class _Endpoint(APIRoute):
    """A route that returns errors as problem details, never tracebacks."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                return await handler(request)
            except Exception as error:  # noqa: BLE001 - clients must not see internal errors
                return _response_of(request, error)

        return guarded


# -- parameters


def _between(minimum: int, maximum: int = MAX_INT) -> tuple[Any, BeforeValidator]:
    """Return the annotations of an integer of plain digits within bounds."""

    def read(text: str) -> int:
        if _DIGITS.fullmatch(text) and minimum <= int(text) <= maximum:
            return int(text)
        raise PydanticCustomError(
            "number",
            "must be a number from {least} to {most}, not {given}",
            {"least": minimum, "most": f"{maximum:,}", "given": repr(text[:40])},
        )

    return Field(ge=minimum, le=maximum), BeforeValidator(read)


def _status(name: str) -> str:
    if name not in _STATUSES:
        raise UsageError(f"{name[:40]!r} is not a status: {', '.join(_STATUSES)}")
    return name


def _flag(text: str) -> bool:
    if text not in {"true", "false"}:
        raise PydanticCustomError("flag", "must be true or false")
    return text == "true"


_STATUSES: Final = tuple(status.name for status in JobStatus if status)
_Status: TypeAlias = Annotated[
    str, BeforeValidator(_status), Field(json_schema_extra={"enum": list(_STATUSES)})
]
_Number: TypeAlias = Annotated[int, *_between(0)]
_Text: TypeAlias = Annotated[str, Field(max_length=_MAX_TEXT)]
_Limit: TypeAlias = Annotated[int, *_between(1, MAX_LIMIT)]
_Buckets: TypeAlias = Annotated[int, *_between(1, MAX_BUCKETS)]

JobId: TypeAlias = Annotated[int, *_between(1), Path(description="ID of the job.")]
Account: TypeAlias = Annotated[_Text, Path(description="Address.")]


def _paging(
    cursor: Annotated[_Text | None, Query(description="`next` of the page before.")] = None,
    limit: Annotated[_Limit, Query(description="Rows of a page.")] = DEFAULT_LIMIT,
) -> tuple[str | None, int]:
    return cursor, limit


def _intervals(
    buckets: Annotated[_Buckets, Query(description="Steps.")] = 60,
    since: Annotated[
        _Number | None, Query(description="First time, in seconds; the first event's by default.")
    ] = None,
    until: Annotated[
        _Number | None, Query(description="Last time, in seconds; the index's by default.")
    ] = None,
) -> dict[str, Any]:
    return {"buckets": buckets, "since": since, "until": until}


#: Cursor and number of rows of a page.
Paging: TypeAlias = Annotated[tuple[str | None, int], Depends(_paging)]
#: Points of a time series.
Intervals: TypeAlias = Annotated[dict[str, Any], Depends(_intervals)]


def _check_parameter_names(request: Request) -> None:
    """Refuse unknown parameters, and repeated ones that are not lists."""
    dependant = request.scope["route"].dependant
    parameters = {
        parameter.alias: get_origin(parameter.field_info.annotation) is list
        for part in (dependant, *dependant.dependencies)
        for parameter in part.query_params
    }
    if unknown := sorted(set(request.query_params) - set(parameters)):
        raise UsageError(
            f"There is no parameter {unknown[0][:40]!r} here",
            hint=f"There are: {', '.join(sorted(parameters)) or 'none'}.",
        )
    for name, repeats in parameters.items():
        if not repeats and len(request.query_params.getlist(name)) > 1:
            raise UsageError(f"{name} was given more than once")


# -- conditional requests


def _revalidated(*status_members: str) -> Any:
    """Return a dependency: the index, unless the client's response is still valid (304).

    The ETag covers the tables of the index, and the given members of its status.
    """

    def open_index(request: Request, response: Response) -> Index:
        index: Index = request.app.state.index
        # The ETag is computed before the query: at worst, the next request is answered in full.
        status = index.status()
        members = (getattr(status, name) for name in status_members)
        version = [status.built_since, status.change, *members]
        response.headers.update(_etag_headers(request, version))
        return index

    return Depends(open_index)


def _etag_headers(request: Request, version: Any) -> dict[str, str]:
    """Return the ETag headers for a version of the data; raises _NotModified if it is known."""
    digest = hashlib.sha256(json.dumps([__version__, version]).encode()).hexdigest()
    tag = f'W/"{digest[:20]}"'
    # Clients may cache it, but must revalidate it.
    headers = {"ETag": tag, "Cache-Control": "no-cache"}
    client_tags = request.headers.get("if-none-match", "")
    if any(client_tag.strip() in {tag, "*"} for client_tag in client_tags.split(",")):
        raise _NotModified(headers)
    return headers


#: The index for responses that depend on its tables alone.
Tables: TypeAlias = Annotated[Index, _revalidated()]
#: The index for responses that also depend on its last block, or on the head of the chain.
AtBlock: TypeAlias = Annotated[Index, _revalidated("block")]
AtHead: TypeAlias = Annotated[Index, _revalidated("block", "head", "finalized")]


def _camel_case(route: APIRoute) -> str:
    first, *others = route.name.split("_")
    return first + "".join(word.title() for word in others)


_PROBLEM: Final = {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}}
_ERRORS: Final = {
    "400": "A parameter is not valid; `detail` names it and what is allowed.",
    "404": "Not found.",
    "429": "Too many requests; `Retry-After` says how many seconds to wait.",
    "503": "The database does not respond.",
    "default": "An internal error.",
}
_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    "200": {"headers": {"ETag": {"schema": {"type": "string"}}}},
    "304": {"description": "Nothing changed since the response with this `ETag`."},
    **{code: {"description": text, "content": _PROBLEM} for code, text in _ERRORS.items()},
}
router = APIRouter(
    route_class=_Endpoint,
    dependencies=[Depends(_check_parameter_names)],
    generate_unique_id_function=_camel_case,
    responses=_RESPONSES,
    tags=["index"],
)


@cache
def document() -> dict[str, Any]:
    """Return the OpenAPI document."""
    openapi = get_openapi(
        title="DeepSquare explorer",
        version=__version__,
        description=_DESCRIPTION,
        routes=router.routes,
        servers=[{"url": PREFIX}],
        license_info={"name": "MIT", "identifier": "MIT"},
        tags=[{"name": "index", "description": "Read-only and public."}],
    )
    openapi["security"] = []
    openapi["components"]["schemas"]["Problem"] = Problem.model_json_schema(mode="serialization")
    return openapi


# -- endpoints


@router.get("/openapi.json", include_in_schema=False)
def describe(request: Request) -> Response:
    """Return the OpenAPI document."""
    body = json.dumps(document())
    headers = _etag_headers(request, body)
    return Response(body, media_type="application/json", headers=headers)


@router.get("/status")
def get_status(index: AtHead) -> rm.Status:
    """The state of the index, and its grid."""
    return index.status()


@router.get("/overview")
def get_overview(index: AtBlock) -> rm.Overview:
    """Summary of the grid."""
    return index.overview()


@router.get("/jobs")
def list_jobs(
    index: Tables,
    paging: Paging,
    *,
    status: Annotated[list[_Status], Query(description="Any of these; may be repeated.")] = [],  # noqa: B006
    customer: Annotated[_Text | None, Query(description="Address of their customer.")] = None,
    provider: Annotated[_Text | None, Query(description="Account of their provider.")] = None,
    name: Annotated[_Text | None, Query(description="Part of the name.")] = None,
    definition: Annotated[
        _Text | None, Query(description="SHA-256 of the definition, in hexadecimal.")
    ] = None,
) -> rm.Page[rm.JobRow]:
    """Jobs, latest first."""
    return index.jobs(
        *paging,
        statuses=[JobStatus[status_name] for status_name in status],
        customer=customer,
        provider=provider,
        name=name,
        definition=definition,
    )


@router.get("/jobs/{job}")
def get_job(index: Tables, job: JobId) -> rm.JobDetail:
    """A job with all its details."""
    return index.job(job)


@router.get("/jobs/{job}/events")
def list_events_of_job(index: Tables, job: JobId, paging: Paging) -> rm.Page[rm.EventRow]:
    """Events of a job, latest first."""
    return index.events(*paging, job_id=job)


@router.get("/transitions")
def list_transitions(index: Tables, paging: Paging) -> rm.Page[rm.TransitionRow]:
    """Status changes of all jobs, latest first."""
    return index.transitions(*paging)


@router.get("/events")
def list_events(index: Tables, paging: Paging) -> rm.Page[rm.EventRow]:
    """Events as the contracts emitted them, latest first."""
    return index.events(*paging)


@router.get("/exceptions")
def list_exceptions(
    index: Tables,
    paging: Paging,
    kind: Annotated[_Text | None, Query(description=f"One of {', '.join(ANOMALY_KINDS)}.")] = None,
) -> rm.Page[rm.AnomalyRow]:
    """Anomalies by the rules of `audit verify`, latest first: allowed but unusual."""
    return index.anomalies(*paging, kind=kind)


@router.get("/exceptions/open")
def list_open_exceptions(index: AtBlock) -> rm.OpenAnomalies:
    """Open anomalies that no transaction caused: overrun, idle and unanswered."""
    return index.open_anomalies()


@router.get("/settlements")
def list_settlements(
    index: Tables,
    paging: Paging,
    provider: Annotated[_Text | None, Query(description="Account of the paid provider.")] = None,
) -> rm.Page[rm.SettlementRow]:
    """Settlements of escrows, interim payments included, latest first."""
    return index.settlements(*paging, provider=provider)


@router.get("/movements")
def list_movements(index: Tables, paging: Paging) -> rm.Page[rm.MovementRow]:
    """Movements of all accounts, latest first."""
    return index.movements(*paging)


@router.get("/accounts/{account}")
def get_account(index: Tables, account: Account) -> rm.AccountRow:
    """An account: its balances and roles on the grid."""
    return index.account(account)


@router.get("/accounts/{account}/statement")
def list_statement(
    index: Tables,
    account: Account,
    paging: Paging,
    oldest_first: Annotated[
        bool, BeforeValidator(_flag), Query(description="Oldest first.")
    ] = False,
) -> rm.Page[rm.MovementRow]:
    """Payments of an account in both directions, with the balance after each."""
    return index.statement(account, *paging, oldest_first=oldest_first)


@router.get("/providers")
def list_providers(index: AtBlock) -> tuple[rm.ProviderRow, ...]:
    """All providers."""
    return index.providers()


@router.get("/providers/{provider}")
def get_provider(
    index: AtBlock, provider: Annotated[_Text, Path(description="Its account or ID.")]
) -> rm.ProviderDetail:
    """A provider with its history."""
    return index.provider(_number_or_text(provider))


@router.get("/providers/{account}/history")
def list_provider_history(
    index: Tables,
    account: Account,
    paging: Paging,
    kind: Annotated[_Text | None, Query(description="One kind of change, such as prices.")] = None,
) -> rm.Page[rm.ProviderChange]:
    """Changes of a provider, latest first."""
    return index.provider_history(account, *paging, kind=kind)


@router.get("/transactions")
def list_transactions(
    index: Tables,
    paging: Paging,
    *,
    sender: Annotated[
        _Text | None, Query(description="Address that sent them and paid their gas.")
    ] = None,
    signer: Annotated[
        _Text | None, Query(description="Address that signed requests in them, which a relay sent.")
    ] = None,
    block: Annotated[_Number | None, Query(description="Number of their block.")] = None,
) -> rm.Page[rm.TransactionRow]:
    """Transactions that emitted events of this grid, latest first."""
    return index.transactions(*paging, sender=sender, signer=signer, block=block)


@router.get("/transactions/{hash}")
def get_transaction(
    index: Tables, tx_hash: Annotated[_Text, Path(alias="hash", description="Its hash.")]
) -> rm.TransactionDetail:
    """A transaction with its effects."""
    return index.transaction(tx_hash)


@router.get("/blocks")
def list_blocks(index: Tables, paging: Paging) -> rm.Page[rm.BlockRow]:
    """Blocks with events of this grid, latest first."""
    return index.blocks(*paging)


@router.get("/blocks/{block}")
def get_block(
    index: Tables, block: Annotated[_Text, Path(description="Its number or hash.")]
) -> rm.BlockDetail:
    """A block with its transactions."""
    return index.block(_number_or_text(block))


@router.get("/search")
def search(
    index: Tables,
    q: Annotated[_Text, Query(description="ID, name, address, hash or number.")] = "",
) -> tuple[rm.Hit, ...]:
    """Objects that a text can refer to."""
    return index.search(q)


@router.get("/parameters")
def get_parameters(index: Tables) -> rm.ParameterHistory:
    """Fee, timeouts and addresses, with the history of the changeable ones."""
    return index.parameters()


@router.get("/roles")
def get_roles(index: Tables) -> rm.Roles:
    """Role grants in force, and the history of all grants and revocations."""
    return index.roles()


@router.get("/series/jobs")
def get_jobs_over_time(index: AtBlock, intervals: Intervals) -> tuple[rm.StatusPoint, ...]:
    """Jobs by status over time."""
    return index.jobs_by_status_over_time(**intervals)


@router.get("/series/escrow")
def get_escrow_over_time(index: AtBlock, intervals: Intervals) -> tuple[rm.EscrowPoint, ...]:
    """Totals of credits over time."""
    return index.escrow_over_time(**intervals)


@router.get("/series/utilisation")
def get_utilisation(
    index: AtBlock,
    intervals: Intervals,
    account: Annotated[_Text | None, Query(description="One provider alone.")] = None,
) -> tuple[rm.Utilisation, ...]:
    """CPU-seconds used and offered over time, by provider."""
    return index.utilisation(account=account, **intervals)


@router.get("/changes")
def list_changes(
    index: Tables,
    since: Annotated[_Number, Query(description="Number of the last known change.")] = 0,
) -> rm.Changes:
    """Changes after the given change number."""
    return index.changes(since)


def _number_or_text(text: str) -> int | str:
    return int(text) if _DIGITS.fullmatch(text) else text
