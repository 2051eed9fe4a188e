"""One JSON-RPC endpoint: every response is validated, every failure becomes a readable error.

web3's own retries are off, because they would resend transactions. A request is sent once here;
`pool` retries it and fails over to other endpoints.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, Final

import aiohttp
import pydantic_core
from eth_typing import URI
from web3 import AsyncHTTPProvider
from web3.types import RPCEndpoint, RPCRequest, RPCResponse

from deepsquare_chain.chain.rpc.responses import (
    InvalidResultError,
    NodeError,
    checked,
    is_busy,
    is_error,
    is_execution_error,
    is_unsupported,
    kind_of,
)
from deepsquare_chain.chain.rpc.transport import CERTIFICATE_HINT, Transport, proxy_for, tls_problem
from deepsquare_chain.errors import EndpointError
from deepsquare_chain.settings import safe_url

# -- the largest request size that an endpoint accepts, learned from rejections and rare probes
#
# An occasional failure is not a rejection: a size counts as rejected only after it failed twice in a
# row, each time with a smaller size accepted.

#: Consecutive successes at the ceiling after which twice the size is probed once; doubled with each
#: rejected probe.
_PROBE_AFTER: Final = 64
_MAX_PROBE_AFTER: Final = 4_096
#: Consecutive failures, of a kind that may not depend on the size, that count as a rejection.
_FAILURES_TO_REJECT: Final = 3


class Ceiling:
    """Maximum size of a request to one endpoint, such as calls per batch or blocks per log range.

    It grows from `first` until the first rejection, up to `maximum`.
    """

    def __init__(self, first: int, maximum: int) -> None:
        self.size = first
        self._maximum = maximum
        self._limited = False  # a size was rejected and a smaller one was accepted
        self._descending = False
        self._ceiling_before = first  # ceiling at the start of a descent
        self._suspected_size = 0  # size that was rejected once while a smaller one was accepted
        self._refused_at = 0  # rejected size at which the descent began
        self._streak = 0
        self._probe_after = _PROBE_AFTER
        self._probing = False
        self._failures = 0

    def refused(self, size: int) -> None:
        """Record a rejection of this size; a rejection of size 1 says nothing about sizes."""
        self._failures = 0
        if not self._descending:
            self._ceiling_before, self._refused_at, self._descending = self.size, size, True
        if size <= 1:
            self.size, self._descending = self._ceiling_before, False
            return
        self.size = max(1, min(self.size, size // 2))

    def failed(self, size: int) -> None:
        """Record a failure that may not depend on the size: a timeout, a gateway's error page."""
        if size <= 1:
            return
        self._failures += 1
        if self._failures >= _FAILURES_TO_REJECT:
            self.refused(size)

    def worked(self, size: int) -> None:
        """Record a success at this size."""
        self._failures = 0
        if self._descending:
            self._descending, self._streak = False, 0
            if not self._limited and not self._suspected_size:
                # Errors occur at any size: only a second rejection lowers the ceiling.
                self._suspected_size, self.size = self._refused_at, self._ceiling_before
                return
            self._limited = True
            if self._probing:
                self._probe_after = min(_MAX_PROBE_AFTER, 2 * self._probe_after)
        elif self._probing and size >= self.size:
            self._probe_after = _PROBE_AFTER  # the endpoint accepts more than before
        elif size >= self._suspected_size:
            self._suspected_size = 0
        self._probing = self._probing and size < self.size
        if size < self.size:
            return
        self._streak += 1
        if not self._limited or self._streak >= self._probe_after:
            self._probing = self._limited
            self.size, self._streak = min(self._maximum, 2 * self.size), 0


REQUEST_TIMEOUT: Final = 30.0
SEND_METHODS: Final = frozenset({"eth_sendRawTransaction", "eth_sendTransaction"})
#: Methods for which null is not a valid result.
_NEVER_NULL: Final = frozenset(
    {
        "eth_blockNumber",
        "eth_call",
        "eth_chainId",
        "eth_estimateGas",
        "eth_feeHistory",
        "eth_gasPrice",
        "eth_getBalance",
        "eth_getCode",
        "eth_getLogs",
        "eth_getTransactionCount",
        "eth_maxPriorityFeePerGas",
        "eth_sendRawTransaction",
    }
)
#: Blocks that every node has.
_PERMANENT_BLOCKS: Final = frozenset({"0x0", "earliest", "latest"})
#: Seconds for which the highest head is remembered; a chain may become shorter.
_HEAD_MEMORY: Final = 30.0
_PLAIN: Final = Transport()
#: Consecutive failures of one part of a batch before the batch fails, and seconds between retries.
_TRIES: Final = 4
_TRY_PAUSE: Final = 0.1
#: Initial and maximum number of calls per batch, and of blocks per request for logs.
_BATCH: Final = (128, 1_024)
_LOG_RANGE: Final = (1_000, 50_000)
#: HTTP statuses of 400 to 499 that a retry may fix.
_TRANSIENT: Final = frozenset({408, 425, 429})
#: HTTP statuses of 400 to 499 that do not depend on the size of the request.
_SIZE_INDEPENDENT: Final = frozenset({401, 402, 404, 407, 408, 425, 429})
#: Maximum number of characters kept of an error that is not a valid JSON-RPC error.
_MAX_ERROR_CHARS: Final = 300
#: Maximum seconds that are waited for a Retry-After header.
_MAX_RETRY_AFTER: Final = 10.0
#: A new connection may reach a restarted node with another chain. The chain is checked again if the
#: previous connection is this many seconds old; a faster restart would cause a failed request.
_RECHECK_SECONDS: Final = 60.0


class TransientEndpointError(EndpointError):
    """A failure that a retry may fix: no connection, 5xx, an invalid response, a rate limit."""

    #: Seconds after which the endpoint asks for a retry; 0 if it does not say.
    retry_after: float = 0.0


class UnreachableEndpointError(TransientEndpointError):
    """The node was unreachable, or a gateway answered for it; it may be another node afterwards."""


class WrongEndpointError(EndpointError):
    """The endpoint serves another chain, lacks our contracts, or its URL is invalid; permanent."""


class SplitResponses(list[RPCResponse]):
    """Responses to a batch that was sent in parts, which different nodes may have answered."""


class _StatusError(EndpointError):
    """An HTTP status without a JSON-RPC response that may be caused by the request's size."""


class CheckedProvider(AsyncHTTPProvider):
    """HTTP provider that validates status, JSON, ID and result of each response.

    Failures of the endpoint raise `EndpointError`. So does an error object in response to a read,
    because a retry may succeed. Error objects that are a result are passed on to web3: the outcome
    of a simulated call, a rejected log range, an unknown method, and any response to a
    transaction.

    Attributes:
        batch_size: Number of calls that the endpoint accepts in one request.
        log_range: Number of blocks for which the endpoint returns logs in one response.
        doubtful: Whether it may serve another chain than before: its head decreased, or a
            connection was reopened after a while. The caller that checks the chain resets it.
        on_head: Called with each reported head, and with its header if the response has it.
    """

    def __init__(
        self, url: str, *, timeout: float = REQUEST_TIMEOUT, transport: Transport = _PLAIN
    ) -> None:
        context, proxy = transport.context(), proxy_for(url)
        super().__init__(
            URI(url),
            request_kwargs={
                "timeout": aiohttp.ClientTimeout(total=timeout),
                "proxy": proxy,
                **({} if context is None else {"ssl": context}),
            },
            exception_retry_configuration=None,
        )
        self._own_headers = transport.headers_for(url)
        self._proxy = None if proxy is None else safe_url(proxy)
        self.global_ccip_read_enabled = False
        self.display_url = safe_url(url)
        self.batch_size = Ceiling(*_BATCH)
        self.log_range = Ceiling(*_LOG_RANGE)
        self.doubtful = False
        self.on_head: Callable[[int, Mapping[str, Any] | None], None] | None = None
        self._connected_at = time.monotonic()  # when a connection was opened last
        self._session: aiohttp.ClientSession | None = None
        self._open_requests: Counter[aiohttp.ClientSession] = Counter()  # open requests per session
        self._highest_head = (-1, 0.0)  # highest head that was reported, and when

    async def make_request(self, method: RPCEndpoint, params: Any) -> RPCResponse:
        """Send one request, without retries."""
        request = self.form_request(method, params)
        response = await self._send_single(request)
        if self._is_behind([request], [response]):
            await self._renew()
        if method not in SEND_METHODS:
            self._raise_if_behind(response)
        return response

    async def make_batch_request(
        self, batch_requests: list[tuple[RPCEndpoint, Any]]
    ) -> list[RPCResponse] | RPCResponse:
        """Send a batch in as few requests as the endpoint accepts.

        Responses are in the order of the requests. A rejected batch is split, down to single
        requests, and returned as `SplitResponses`; the accepted size is remembered.
        """
        requests = [self.form_request(method, params) for method, params in batch_requests]
        responses: list[RPCResponse] = []
        single = False
        size, tries = self.batch_size.size, _TRIES
        while len(responses) < len(requests):
            part = requests[len(responses) :][:size]
            single = single or len(part) == 1
            try:
                part_responses = await self._send_batch(part)
            except TransientEndpointError as error:
                tries -= 1
                if len(part) == len(requests) or tries <= 0:
                    self.batch_size.refused(1)  # the size was not the cause
                    raise
                # Part of the batch was answered: keep that and retry only the rest.
                await asyncio.sleep(max(_TRY_PAUSE, error.retry_after))
                continue
            tries = _TRIES
            if part_responses is None:
                self.batch_size.refused(len(part))
                size = max(1, len(part) // 2)
            else:
                responses += part_responses
        if single and len(requests) > 1:
            if any("error" in response for response in responses):
                self.batch_size.refused(1)
            else:
                self.batch_size.worked(1)
        if self._is_behind(requests, responses):
            await self._renew()
        return SplitResponses(responses) if size < len(requests) else responses

    async def disconnect(self) -> None:
        """Close all connections (idempotent); the next request opens new ones."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _renew(self) -> None:
        """Use new connections from now on, which may reach another node behind this address."""
        old, self._session = self._session, None
        if old is not None and not self._open_requests[old]:
            await old.close()

    # -- one request

    async def _send_single(self, request: Mapping[str, Any]) -> RPCResponse:
        """Send a single request, not as a batch."""
        blocks = _blocks_of(request)
        try:
            response = await self._post(self.encode_rpc_dict(request))  # type: ignore[arg-type]
        except _StatusError as error:
            if blocks <= 1:
                raise
            response = _rejection(request, error.message)
        except TransientEndpointError:
            self.log_range.failed(blocks)
            raise
        return self._raise_if_transient(request, self._checked(request, response))

    async def _send_batch(self, requests: list[RPCRequest]) -> list[RPCResponse] | None:
        """Send requests as one batch; None if the endpoint rejected a batch of this size."""
        if len(requests) == 1:
            return [await self._send_single(requests[0])]
        responses = await self._try_batch(requests)
        if responses is not None:
            self.batch_size.worked(len(requests))
        return responses

    async def _try_batch(self, requests: list[RPCRequest]) -> list[RPCResponse] | None:
        """Send requests as one batch; None if the endpoint rejected it, for any reason.

        Raises:
            TransientEndpointError: It failed for a reason that does not depend on batches.
        """
        try:
            body = await self._post(self.encode_batch_request_dicts(requests))
        except _StatusError:
            return None
        except TransientEndpointError:
            self.batch_size.failed(len(requests))
            raise
        if not isinstance(body, list) or len(body) != len(requests):
            error = body.get("error") if isinstance(body, dict) else None
            if isinstance(error, dict):
                self._raise_if_busy(error)
            return None
        by_id = {_id_of(response): response for response in body if isinstance(response, dict)}
        if any(_id_of(request) not in by_id for request in requests):
            return None  # errors without an ID, or responses with ambiguous IDs
        responses = [self._checked(request, by_id[_id_of(request)]) for request in requests]
        if all("error" in response for response in responses) and not all(
            is_execution_error(request["method"], _error_of(response))
            for request, response in zip(requests, responses, strict=True)
        ):
            return None
        if any(
            self._is_unclassified(request, response)
            for request, response in zip(requests, responses, strict=True)
        ):
            return None
        for request, response in zip(requests, responses, strict=True):
            self._record_range(request, response)
        return responses

    def _raise_if_transient(self, request: Mapping[str, Any], response: RPCResponse) -> RPCResponse:
        """Return the response, unless it is an error that a retry may fix.

        Raises:
            TransientEndpointError: It is such an error.
        """
        self._record_range(request, response)
        if self._is_unclassified(request, response):
            message = str(_error_of(response).get("message", ""))[:200]
            raise TransientEndpointError(
                f"The endpoint {self.display_url} answered {request['method']} with an error: {message}"
            )
        return response

    @staticmethod
    def _is_unclassified(request: Mapping[str, Any], response: RPCResponse) -> bool:
        """Return whether a read failed with an error that is not about the requested data."""
        method = request["method"]
        if "error" not in response or method in SEND_METHODS or _blocks_of(request) > 1:
            return False
        error = _error_of(response)
        return not (
            is_execution_error(method, error) or is_unsupported(error) or _lacks_block(response)
        )

    def _record_range(self, request: Mapping[str, Any], response: RPCResponse) -> None:
        """Record whether the endpoint returned logs for this number of blocks."""
        blocks = _blocks_of(request)
        if not blocks or _lacks_block(response):
            return
        if "error" in response:
            self.log_range.refused(blocks)
        else:
            self.log_range.worked(blocks)

    async def _post(self, body: bytes) -> Any:
        # Connections are reused. web3 opens a new one for each request, which costs a round trip,
        # and more with TLS.
        if self._session is None:
            trace = aiohttp.TraceConfig()
            trace.on_connection_create_end.append(self._connected)
            self._session = aiohttp.ClientSession(trace_configs=[trace])
        session = self._session
        self._open_requests[session] += 1
        try:
            options = self.get_request_kwargs()
            options["headers"] = {**options.get("headers", {}), **self._own_headers}
            async with session.post(str(self.endpoint_uri), data=body, **options) as http_response:
                status, content = http_response.status, await http_response.read()
                retry_after = http_response.headers.get("Retry-After", "")
        except aiohttp.ClientHttpProxyError as error:
            raise TransientEndpointError(
                f"The proxy {self._proxy} could not reach {self.display_url}: HTTP status {error.status}",
                hint="Check HTTPS_PROXY; NO_PROXY lists hosts to reach without it.",
            ) from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._unreachable(error) from None
        finally:
            await self._release_session(session)
        try:
            # Bounds the nesting depth; json does not if a library has raised the recursion limit.
            response = pydantic_core.from_json(content, allow_inf_nan=False)
        except ValueError:
            self._raise_for(status, retry_after)
            raise self._invalid_response("a response that is not JSON (a web page?)") from None
        if not _is_json_rpc(response) or status == HTTPStatus.TOO_MANY_REQUESTS:
            self._raise_for(status, retry_after)
        return response

    def _raise_for(self, status: int, retry_after: str) -> None:
        """Raise the error for an HTTP status that came without a JSON-RPC response.

        `retry_after` is the HTTP header of that name.
        """
        if status < HTTPStatus.BAD_REQUEST:
            return
        kind: type[EndpointError] = EndpointError
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            kind = UnreachableEndpointError
        elif status in _TRANSIENT:
            kind = TransientEndpointError
        elif status not in _SIZE_INDEPENDENT:
            kind = _StatusError
        error = kind(
            f"The endpoint {self.display_url} responded with HTTP status {status}",
            hint="Is it the JSON-RPC address of a node, and is the key in it valid?",
        )
        if isinstance(error, TransientEndpointError):
            error.retry_after = _seconds_of(retry_after)
        raise error

    async def _connected(self, *_: object) -> None:
        now = time.monotonic()
        if now - self._connected_at >= _RECHECK_SECONDS:
            self.doubtful = True
        self._connected_at = now

    def _unreachable(self, error: Exception) -> UnreachableEndpointError:
        problem = tls_problem(error)
        hint = "Start the node (`deepsquare devnet up` for a local one) or give --endpoint."
        if "certificate" in problem:
            hint = CERTIFICATE_HINT
        elif self._proxy is not None:
            hint = f"The request went through the proxy {self._proxy}; NO_PROXY lists exceptions."
        return UnreachableEndpointError(
            f"The endpoint {self.display_url} can't be reached: {problem or _error_text(error)}",
            hint=hint,
        )

    async def _release_session(self, session: aiohttp.ClientSession) -> None:
        self._open_requests[session] -= 1
        if not self._open_requests[session]:
            del self._open_requests[session]
            if session is not self._session:
                await session.close()

    def _is_behind(
        self, requests: Iterable[Mapping[str, Any]], responses: Iterable[RPCResponse]
    ) -> bool:
        """Return whether the node that answered lags behind another node of this address.

        Persistent connections would otherwise keep using the lagging node.
        """
        behind = False
        for request, response in zip(requests, responses, strict=True):
            behind = behind or _lacks_block(response)
            head, now = _head_of(request, response), time.monotonic()
            if head is None:
                continue
            if self.on_head is not None:
                block: Any = response.get("result")
                self.on_head(head, block if isinstance(block, dict) else None)
            highest, seen_at = self._highest_head
            if head < highest:
                self.doubtful = True
            if head < highest and now - seen_at < _HEAD_MEMORY:
                behind = True
            else:
                self._highest_head = (head, now)
        return behind

    def _checked(self, request: Mapping[str, Any], response: Any) -> RPCResponse:
        """Validate a response and return it in the form that web3 expects."""
        if not isinstance(response, dict) or not _is_json_rpc(response):
            raise self._invalid_response("a response that is not JSON-RPC")
        error = _valid_error(response.get("error"))
        # A node that could not parse the request's ID responds with null.
        unread = error is not None and response.get("id") is None
        if error is not None:
            self._raise_if_busy(error)
        if not unread and _id_of(response) != _id_of(request):
            raise self._invalid_response("a response to another request")
        valid: Any = {"jsonrpc": "2.0", "id": request["id"]}
        if error is not None:
            return valid | {"error": error}  # type: ignore[no-any-return]
        if "result" not in response or (response["result"] is None and not _is_nullable(request)):
            raise self._invalid_response(f"an empty result for {request['method']}")
        try:
            valid["result"] = checked(request["method"], response["result"])
        except InvalidResultError:
            raise self._invalid_response(f"an invalid result for {request['method']}") from None
        return valid  # type: ignore[no-any-return]

    def _raise_if_busy(self, error: Mapping[str, Any]) -> None:
        if is_busy(error):
            message = str(error.get("message", ""))[:200]
            raise TransientEndpointError(
                f"The endpoint {self.display_url} limits its requests: {message}"
            )

    def _raise_if_behind(self, response: RPCResponse) -> None:
        # One address may have several nodes of different heights: a retry may reach the block.
        if _lacks_block(response):
            message = str(_error_of(response).get("message", ""))[:200]
            raise TransientEndpointError(f"The endpoint {self.display_url} lags behind: {message}")

    def _invalid_response(self, detail: str) -> TransientEndpointError:
        return TransientEndpointError(
            f"The endpoint {self.display_url} returned {detail}",
            hint="Is it the JSON-RPC address of a node?",
        )


def _is_json_rpc(response: Any) -> bool:
    """Return whether a body looks like JSON-RPC, so that it outweighs the HTTP status."""
    if isinstance(response, list):
        return bool(response) and all(map(_is_json_rpc, response))
    if not isinstance(response, dict):
        return False
    # Some gateways omit the version, which is not used here.
    return (
        "jsonrpc" in response
        or ("id" in response and "result" in response)
        or is_error(response.get("error"))
    )


def _valid_error(error: Any) -> dict[str, Any] | None:
    """Convert the value of `error` to a valid JSON-RPC error object; None if there is no error."""
    if error is None or is_error(error):
        return error  # type: ignore[no-any-return]
    fields = error if isinstance(error, dict) else {}
    message = fields.get("message") or error
    return {**fields, "code": -32000, "message": str(message)[:_MAX_ERROR_CHARS]}


def _id_of(message: Mapping[str, Any]) -> str:
    """Return the ID of a request or response; gateways turn numbers into strings or floats."""
    message_id = message.get("id")
    if isinstance(message_id, float) and message_id.is_integer():
        message_id = int(message_id)
    return message_id if isinstance(message_id, str) else repr(message_id)


def _seconds_of(header: str) -> float:
    """Return the seconds of a Retry-After header, bounded; 0 if it is missing or invalid."""
    try:
        if header.isdigit():
            seconds = float(header)
        else:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return min(_MAX_RETRY_AFTER, max(0.0, seconds))


def _rejection(request: Mapping[str, Any], message: str) -> dict[str, Any]:
    """Build a JSON-RPC error response for a rejection that was not one."""
    return {"jsonrpc": "2.0", "id": request["id"], "error": {"code": -32000, "message": message}}


def _error_of(response: RPCResponse) -> Mapping[str, Any]:
    error: Any = response.get("error")
    return error if isinstance(error, Mapping) else {}


def _blocks_of(request: Mapping[str, Any]) -> int:
    """Return the number of blocks of a request for logs; 0 for other requests or block tags."""
    if request["method"] != "eth_getLogs":
        return 0
    try:
        (query,) = request["params"]
        return int(query["toBlock"], 16) - int(query["fromBlock"], 16) + 1
    except (KeyError, TypeError, ValueError):
        return 0


def lacks_method(response: RPCResponse) -> bool:
    """Return whether the endpoint does not support the method; another endpoint may."""
    return "error" in response and is_unsupported(_error_of(response))


def _lacks_block(response: RPCResponse) -> bool:
    """Return whether the node rejected the request because it lacks the block."""
    if "error" not in response:
        return False
    return kind_of(str(_error_of(response).get("message", ""))) is NodeError.UNKNOWN_BLOCK


def _head_of(request: Mapping[str, Any], response: RPCResponse) -> int | None:
    """Return the head that a response reports; None if the request was for something else."""
    head: Any = response.get("result")
    if request["method"] == "eth_getBlockByNumber" and list(request["params"])[:1] == ["latest"]:
        head = head["number"] if isinstance(head, dict) else None
    elif request["method"] != "eth_blockNumber":
        return None
    try:
        return int(head, 16)
    except (TypeError, ValueError):
        return None


def _is_nullable(request: Mapping[str, Any]) -> bool:
    method, params = request["method"], request["params"]
    if method == "eth_getBlockByNumber" and params:
        return params[0] not in _PERMANENT_BLOCKS
    return method not in _NEVER_NULL


def _error_text(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    cause = getattr(error, "os_error", None) or error
    if isinstance(cause, OSError) and cause.errno is not None and cause.errno > 0:
        return os.strerror(cause.errno).lower()
    if isinstance(cause, OSError) and cause.strerror:
        return str(cause.strerror)
    return type(error).__name__
