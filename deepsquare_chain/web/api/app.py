"""Routes of the JSON API for an explorer's web application."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route, Router

from deepsquare_chain import __version__
from deepsquare_chain.errors import GridError, NotFoundError, UsageError
from deepsquare_chain.indexer.queries import Index
from deepsquare_chain.indexer.read_models import Status
from deepsquare_chain.observe import get_logger
from deepsquare_chain.store.base import StoreError
from deepsquare_chain.web.api.limits import RateLimit
from deepsquare_chain.web.api.openapi import PREFIX, PROBLEM, document
from deepsquare_chain.web.api.routes import QUESTIONS, Question
from deepsquare_chain.web.api.shape import to_json

#: Requests a second of one client in the long run, and at once.
RATE: Final = 10.0
BURST: Final = 100
_JSON: Final = "application/json"
_RETRY_SECONDS: Final = 5
_METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
_log = get_logger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]


def api_routes(index: Index, *, rate: float = RATE, burst: int = BURST) -> list[BaseRoute]:
    """The API below `/api/v1`.

    Args:
        index: What answers.
        rate: Requests a second that one client may make; zero for no limit.
        burst: Requests that it may make at once.
    """
    api = _Api(index, RateLimit(rate, burst))
    answers = [("/openapi.json", api.describe), *((q.path, api.answer(q)) for q in QUESTIONS)]
    answers.append(("/{rest:path}", _nothing))
    # All methods, since what is not for reading is answered as a problem too.
    routes = [Route(path, api.guarded(each), methods=_METHODS) for path, each in answers]
    start = Route(PREFIX, api.guarded(api.describe), methods=_METHODS)
    return [start, Mount(PREFIX, Router(routes))]


class _Api:
    def __init__(self, index: Index, limit: RateLimit) -> None:
        self._index = index
        self._limit = limit
        self._document = json.dumps(document()).encode()

    def guarded(self, endpoint: Endpoint) -> Endpoint:
        """An endpoint behind the limit, whose errors are problems and never tracebacks."""

        async def guard(request: Request) -> Response:
            if request.method not in {"GET", "HEAD"}:
                return _problem(HTTPStatus.METHOD_NOT_ALLOWED, "This API is for reading")
            client = request.client.host if request.client else ""
            if wait := self._limit.wait(client):
                return _problem(
                    HTTPStatus.TOO_MANY_REQUESTS, "Too many requests", retry=math.ceil(wait)
                )
            try:
                return await endpoint(request)
            except GridError as error:
                return _failed(error)
            except HTTPException as error:
                return _problem(HTTPStatus(error.status_code), str(error.detail))
            except Exception as error:  # noqa: BLE001 - nobody outside learns what it was
                _log.error("api failed", path=request.url.path, exc_info=error)
                return _problem(HTTPStatus.INTERNAL_SERVER_ERROR, "Something went wrong here")

        return guard

    async def describe(self, request: Request) -> Response:
        """The OpenAPI document."""
        return _unless_known(request, _tag(self._document), lambda: self._document)

    def answer(self, question: Question) -> Endpoint:
        """The endpoint of a question."""
        names = {each.name for each in question.parameters if not each.in_path}

        async def endpoint(request: Request) -> Response:
            if unknown := sorted(set(request.query_params) - names):
                raise UsageError(
                    f"There is no parameter {unknown[0][:40]!r} here",
                    hint=f"There are: {', '.join(sorted(names)) or 'none'}.",
                )
            given = {
                each.name: each.read(
                    [request.path_params[each.name]]
                    if each.in_path
                    else request.query_params.getlist(each.name)
                )
                for each in question.parameters
            }
            # The tag is of a moment before the answer: at worst the next question asks once more.
            tag = _tag(await asyncio.to_thread(self._moment, question))
            if _knows(request, tag):
                return _not_modified(tag)
            body = await asyncio.to_thread(self._ask, question, given)
            return Response(body, media_type=_JSON, headers=_headers(tag))

        return endpoint

    def _moment(self, question: Question) -> bytes:
        status = self._index.status()
        return json.dumps([__version__, status.built_since, *_moves(question, status)]).encode()

    def _ask(self, question: Question, given: dict[str, Any]) -> bytes:
        found = to_json(question.ask(self._index, given))
        return json.dumps(found, separators=(",", ":")).encode()


def _moves(question: Question, status: Status) -> list[int]:
    """What an answer changes with."""
    found = [status.change]
    if question.timed or question.live:
        found.append(status.block)
    if question.live:
        found += [status.head, status.finalized]
    return found


async def _nothing(_: Request) -> Response:
    raise NotFoundError("There is no such path in this API", hint=f"See {PREFIX}/openapi.json.")


def _tag(moment: bytes) -> str:
    return f'W/"{hashlib.sha256(moment).hexdigest()[:20]}"'


def _knows(request: Request, tag: str) -> bool:
    known = request.headers.get("if-none-match", "")
    return any(each.strip() in {tag, "*"} for each in known.split(","))


def _unless_known(request: Request, tag: str, body: Callable[[], bytes]) -> Response:
    if _knows(request, tag):
        return _not_modified(tag)
    return Response(body(), media_type=_JSON, headers=_headers(tag))


def _not_modified(tag: str) -> Response:
    return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=_headers(tag))


def _headers(tag: str) -> dict[str, str]:
    # To be kept, and asked for again each time.
    return {"ETag": tag, "Cache-Control": "no-cache"}


def _failed(error: GridError) -> Response:
    if isinstance(error, NotFoundError):
        return _problem(HTTPStatus.NOT_FOUND, error.message, error.hint)
    if isinstance(error, UsageError):
        return _problem(HTTPStatus.BAD_REQUEST, error.message, error.hint)
    _log.error("api failed", error=error.message)
    if isinstance(error, StoreError):
        # Where the database is, is nobody's business here.
        return _problem(
            HTTPStatus.SERVICE_UNAVAILABLE, "The index can't be read now", retry=_RETRY_SECONDS
        )
    return _problem(HTTPStatus.INTERNAL_SERVER_ERROR, "Something went wrong here")


def _problem(
    status: HTTPStatus, detail: str, hint: str = "", *, retry: int | None = None
) -> Response:
    body = {
        "type": "about:blank",
        "title": status.phrase,
        "status": int(status),
        "detail": detail,
        **({"hint": hint} if hint else {}),
    }
    headers = {"Cache-Control": "no-store"}
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = "GET, HEAD"
    if retry is not None:
        headers["Retry-After"] = str(retry)
    return Response(json.dumps(body), status, headers, media_type=PROBLEM)
