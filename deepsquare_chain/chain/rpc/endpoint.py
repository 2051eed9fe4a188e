"""One endpoint of a node: each answer is checked, each failure said in plain words.

web3's own retries are off: they would resend transactions. Here everything is asked once; see
`pool` for what follows a failure.
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

from deepsquare_chain.chain.rpc.ceiling import Ceiling
from deepsquare_chain.chain.rpc.node_errors import (
    NodeError,
    is_busy,
    is_unsupported,
    is_verdict,
    kind_of,
)
from deepsquare_chain.chain.rpc.response_validation import UnfitError, checked, is_error
from deepsquare_chain.chain.rpc.transport import (
    CERTIFICATE_HINT,
    Transport,
    proxy_for,
    tls_problem,
)
from deepsquare_chain.errors import EndpointError
from deepsquare_chain.settings import safe_url

REQUEST_TIMEOUT: Final = 30.0
SEND_METHODS: Final = frozenset({"eth_sendRawTransaction", "eth_sendTransaction"})
#: Methods for which null is no answer of a sane node.
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
_ALWAYS_THERE: Final = frozenset({"0x0", "earliest", "latest"})
#: Seconds for which the highest head counts: a chain may shrink.
_HEAD_MEMORY: Final = 30.0
_PLAIN: Final = Transport()
#: Failures in a row of one part of a batch until all of it fails, and seconds after each.
_TRIES: Final = 4
_TRY_PAUSE: Final = 0.1
#: Calls of one batch, and blocks of one question for logs: to begin with, and at most.
_BATCH: Final = (128, 1_024)
_LOG_RANGE: Final = (1_000, 50_000)
#: Statuses of 400 to 499 that say nothing about the size of what was asked for.
_NO_SIZE: Final = frozenset({401, 402, 404, 407, 408, 425, 429})
#: Characters of an error that did not come as JSON-RPC has it.
_LONGEST_WORDS: Final = 300
#: Seconds for which an endpoint that asks to come again later is left alone at most.
_LONGEST_WAIT: Final = 10.0
#: A new connection may lead to another chain; nobody restarts one within these seconds unseen.
_KNOWN_SECONDS: Final = 60.0


class TransientEndpointError(EndpointError):
    """The endpoint failed in a way that may pass: no connection, 5xx, nonsense, a busy signal.

    Attributes:
        retry_after: Seconds after which it wants to be asked again; 0 where it does not say.
    """

    retry_after: float = 0.0


class AwayEndpointError(TransientEndpointError):
    """Nobody answered, or a gateway in place of the node: it may be another one when it is back."""


class WrongEndpointError(EndpointError):
    """It serves another chain, lacks our contracts, or is no such address: waiting won't help."""


class SplitAnswers(list[RPCResponse]):
    """Answers to a batch that went out in parts, of which each may have reached another node."""


class _StatusError(EndpointError):
    """An HTTP status without a JSON-RPC answer that may be about the size of the request."""


class CheckedProvider(AsyncHTTPProvider):
    """HTTP provider that believes nothing: status, JSON, id and result of each answer are checked.

    Failures of the endpoint raise `EndpointError`. So does an error object instead of an answer
    to a read, as it may be different a moment later; those that are an answer are passed on to
    web3: what the EVM made of a call, a refused range of logs, an unknown method, and whatever is
    said to a transaction.

    Attributes:
        batch_size: Calls that it takes in one request.
        log_range: Blocks of which it gives logs in one answer.
        doubtful: Whether it may serve another chain than before: its head fell, or connections
            were opened anew after a while. Who has looked sets it to false.
        on_head: Called with each head, and with its header where that came with it.
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
        self.place = safe_url(url)
        self.batch_size = Ceiling(*_BATCH)
        self.log_range = Ceiling(*_LOG_RANGE)
        self.doubtful = False
        self.on_head: Callable[[int, Mapping[str, Any] | None], None] | None = None
        self._looked = time.monotonic()  # when its chain was known last, or a connection opened
        self._session: aiohttp.ClientSession | None = None
        self._users: Counter[aiohttp.ClientSession] = Counter()  # questions on their way
        self._highest = (-1, 0.0)  # head that was reported, and when

    async def make_request(self, method: RPCEndpoint, params: Any) -> RPCResponse:
        """Ask once."""
        request = self.form_request(method, params)
        answer = await self._ask_alone(request)
        if self._is_behind([request], [answer]):
            await self._renew()
        if method not in SEND_METHODS:
            self._raise_if_behind(answer)
        return answer

    async def make_batch_request(
        self, batch_requests: list[tuple[RPCEndpoint, Any]]
    ) -> list[RPCResponse] | RPCResponse:
        """Ask several things, in as few requests as the endpoint takes.

        Answers come in the order of the questions. A batch that is refused is split, down to
        single questions, and its answers are `SplitAnswers`; the size that was taken is remembered.
        """
        requests = [self.form_request(method, params) for method, params in batch_requests]
        answers: list[RPCResponse] = []
        alone = False
        most, tries = self.batch_size.size, _TRIES
        while len(answers) < len(requests):
            some = requests[len(answers) :][:most]
            alone = alone or len(some) == 1
            try:
                found = await self._ask_some(some)
            except TransientEndpointError as error:
                tries -= 1
                if len(some) == len(requests) or tries <= 0:
                    self.batch_size.refused(1)  # the size was not what it minded
                    raise
                # Part of the batch is answered: that is not thrown away for the rest.
                await asyncio.sleep(max(_TRY_PAUSE, error.retry_after))
                continue
            tries = _TRIES
            if found is None:
                self.batch_size.refused(len(some))
                most = max(1, len(some) // 2)
            else:
                answers += found
        if alone and len(requests) > 1:
            if any("error" in each for each in answers):
                self.batch_size.refused(1)
            else:
                self.batch_size.worked(1)
        if self._is_behind(requests, answers):
            await self._renew()
        return SplitAnswers(answers) if most < len(requests) else answers

    async def disconnect(self) -> None:
        """Close its connections; harmless when closed, and the next question opens them again."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _renew(self) -> None:
        """Ask over new connections from now on: another node of this address may answer them."""
        old, self._session = self._session, None
        if old is not None and not self._users[old]:
            await old.close()

    # -- one request

    async def _ask_alone(self, request: Mapping[str, Any]) -> RPCResponse:
        """One question, not as a batch."""
        blocks = _blocks_of(request)
        try:
            answer = await self._post(self.encode_rpc_dict(request))  # type: ignore[arg-type]
        except _StatusError as error:
            if blocks <= 1:
                raise
            answer = _refusal(request, error.message)
        except TransientEndpointError:
            self.log_range.failed(blocks)
            raise
        return self._judged(request, self._checked(request, answer))

    async def _ask_some(self, requests: list[RPCRequest]) -> list[RPCResponse] | None:
        """Answers to as many questions as one request may hold; None where it was too many."""
        if len(requests) == 1:
            return [await self._ask_alone(requests[0])]
        found = await self._ask_together(requests)
        if found is not None:
            self.batch_size.worked(len(requests))
        return found

    async def _ask_together(self, requests: list[RPCRequest]) -> list[RPCResponse] | None:
        """Some questions in one request; None where that was refused, for whatever reason.

        Raises:
            TransientEndpointError: It failed in a way that has nothing to do with batches.
        """
        try:
            answers = await self._post(self.encode_batch_request_dicts(requests))
        except _StatusError:
            return None
        except TransientEndpointError:
            self.batch_size.failed(len(requests))
            raise
        if not isinstance(answers, list) or len(answers) != len(requests):
            error = answers.get("error") if isinstance(answers, dict) else None
            if isinstance(error, dict):
                self._raise_if_busy(error)
            return None
        by_id = {_id_of(each): each for each in answers if isinstance(each, dict)}
        if any(_id_of(request) not in by_id for request in requests):
            return None  # errors that name no question, or answers that can't be distinguished
        found = [self._checked(request, by_id[_id_of(request)]) for request in requests]
        if all("error" in each for each in found) and not all(
            is_verdict(request["method"], _error_of(each))
            for request, each in zip(requests, found, strict=True)
        ):
            return None
        if any(
            self._is_unknown(request, each) for request, each in zip(requests, found, strict=True)
        ):
            return None
        for request, each in zip(requests, found, strict=True):
            self._note_range(request, each)
        return found

    def _judged(self, request: Mapping[str, Any], answer: RPCResponse) -> RPCResponse:
        """The answer, unless it is an error that may be gone when it is asked again.

        Raises:
            TransientEndpointError: It is.
        """
        self._note_range(request, answer)
        if self._is_unknown(request, answer):
            words = str(_error_of(answer).get("message", ""))[:200]
            raise TransientEndpointError(
                f"The endpoint {self.place} answered {request['method']} with an error: {words}"
            )
        return answer

    @staticmethod
    def _is_unknown(request: Mapping[str, Any], answer: RPCResponse) -> bool:
        """Whether it is an error to a read that says nothing about what was asked for."""
        method = request["method"]
        if "error" not in answer or method in SEND_METHODS or _blocks_of(request) > 1:
            return False
        error = _error_of(answer)
        return not (is_verdict(method, error) or is_unsupported(error) or _lacks_block(answer))

    def _note_range(self, request: Mapping[str, Any], answer: RPCResponse) -> None:
        """Remember of how many blocks it gives logs, or does not."""
        blocks = _blocks_of(request)
        if not blocks or _lacks_block(answer):
            return
        if "error" in answer:
            self.log_range.refused(blocks)
        else:
            self.log_range.worked(blocks)

    async def _post(self, body: bytes) -> Any:
        # Connections stay open for the next question. web3 opens a new one for each, which costs
        # a way to the node and back, and with TLS more.
        if self._session is None:
            trace = aiohttp.TraceConfig()
            trace.on_connection_create_end.append(self._connected)
            self._session = aiohttp.ClientSession(trace_configs=[trace])
        session = self._session
        self._users[session] += 1
        try:
            options = self.get_request_kwargs()
            options["headers"] = {**options.get("headers", {}), **self._own_headers}
            async with session.post(str(self.endpoint_uri), data=body, **options) as answer:
                status, raw = answer.status, await answer.read()
                retry_after = answer.headers.get("Retry-After", "")
        except aiohttp.ClientHttpProxyError as error:
            raise TransientEndpointError(
                f"The proxy {self._proxy} does not lead to {self.place}: HTTP status "
                f"{error.status}",
                hint="Check HTTPS_PROXY; NO_PROXY names hosts to be asked without it.",
            ) from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._unreachable(error) from None
        finally:
            await self._leave(session)
        try:
            # Its depth is bounded; json's is not where a library has raised the recursion limit.
            found = pydantic_core.from_json(raw, allow_inf_nan=False)
        except ValueError:
            self._raise_for(status, retry_after)
            raise self._nonsense("no JSON (a web page?)") from None
        if not _is_rpc(found) or status == HTTPStatus.TOO_MANY_REQUESTS:
            self._raise_for(status, retry_after)
        return found

    def _raise_for(self, status: int, retry_after: str) -> None:
        """An error for a status with which no JSON-RPC answer came.

        `retry_after` is the HTTP header of that name.
        """
        if status < HTTPStatus.BAD_REQUEST:
            return
        kind: type[EndpointError] = EndpointError
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            kind = AwayEndpointError
        elif _may_pass(status):
            kind = TransientEndpointError
        elif status not in _NO_SIZE:
            kind = _StatusError
        error = kind(
            f"The endpoint {self.place} answered with HTTP status {status}",
            hint="Is it the JSON-RPC address of a node, and is the key in it valid?",
        )
        if isinstance(error, TransientEndpointError):
            error.retry_after = _seconds_of(retry_after)
        raise error

    async def _connected(self, *_: object) -> None:
        now = time.monotonic()
        if now - self._looked >= _KNOWN_SECONDS:
            self.doubtful = True
        self._looked = now

    def _unreachable(self, error: Exception) -> AwayEndpointError:
        words = tls_problem(error)
        hint = "Start the node (`deepsquare devnet up` for a local one) or give --endpoint."
        if "certificate" in words:
            hint = CERTIFICATE_HINT
        elif self._proxy is not None:
            hint = f"It was asked through the proxy {self._proxy}; NO_PROXY names exceptions."
        return AwayEndpointError(
            f"The endpoint {self.place} can't be reached: {words or _plain(error)}", hint=hint
        )

    async def _leave(self, session: aiohttp.ClientSession) -> None:
        self._users[session] -= 1
        if not self._users[session]:
            del self._users[session]
            if session is not self._session:
                await session.close()

    def _is_behind(
        self, requests: Iterable[Mapping[str, Any]], answers: Iterable[RPCResponse]
    ) -> bool:
        """Whether a node of this address answered that has seen less than another one of it.

        Connections that stay open would otherwise lead there for ever.
        """
        behind = False
        for request, answer in zip(requests, answers, strict=True):
            behind = behind or _lacks_block(answer)
            head, now = _head_of(request, answer), time.monotonic()
            if head is None:
                continue
            if self.on_head is not None:
                block: Any = answer.get("result")
                self.on_head(head, block if isinstance(block, dict) else None)
            highest, seen_at = self._highest
            if head < highest:
                self.doubtful = True
            if head < highest and now - seen_at < _HEAD_MEMORY:
                behind = True
            else:
                self._highest = (head, now)
        return behind

    def _checked(self, request: Mapping[str, Any], answer: Any) -> RPCResponse:
        """The answer to a question, in the form that web3 expects."""
        if not isinstance(answer, dict) or not _is_rpc(answer):
            raise self._nonsense("no JSON-RPC answer")
        error = _proper_error(answer.get("error"))
        # A node that could not read the id answers with null.
        unread = error is not None and answer.get("id") is None
        if error is not None:
            self._raise_if_busy(error)
        if not unread and _id_of(answer) != _id_of(request):
            raise self._nonsense("the answer to another question")
        found: Any = {"jsonrpc": "2.0", "id": request["id"]}
        if error is not None:
            return found | {"error": error}  # type: ignore[no-any-return]
        if "result" not in answer or (answer["result"] is None and not _may_be_null(request)):
            raise self._nonsense(f"an empty answer to {request['method']}")
        try:
            found["result"] = checked(request["method"], answer["result"])
        except UnfitError:
            raise self._nonsense(f"no proper answer to {request['method']}") from None
        return found  # type: ignore[no-any-return]

    def _raise_if_busy(self, error: Mapping[str, Any]) -> None:
        if is_busy(error):
            words = str(error.get("message", ""))[:200]
            raise TransientEndpointError(f"The endpoint {self.place} limits its requests: {words}")

    def _raise_if_behind(self, answer: RPCResponse) -> None:
        # Behind one address may stand nodes of different heights: the next may have the block.
        if _lacks_block(answer):
            words = str(_error_of(answer).get("message", ""))[:200]
            raise TransientEndpointError(f"The endpoint {self.place} lags behind: {words}")

    def _nonsense(self, what: str) -> TransientEndpointError:
        return TransientEndpointError(
            f"The endpoint {self.place} gave {what}",
            hint="Is it the JSON-RPC address of a node?",
        )


def _is_rpc(found: Any) -> bool:
    """Whether it looks like JSON-RPC, so that it counts more than the HTTP status."""
    if isinstance(found, list):
        return bool(found) and all(map(_is_rpc, found))
    if not isinstance(found, dict):
        return False
    # Some gateways leave the version out, and nobody here reads it.
    return (
        "jsonrpc" in found or ("id" in found and "result" in found) or is_error(found.get("error"))
    )


def _proper_error(error: Any) -> dict[str, Any] | None:
    """An error object as JSON-RPC has it, from whatever stands in its place; None for none."""
    if error is None or is_error(error):
        return error  # type: ignore[no-any-return]
    fields = error if isinstance(error, dict) else {}
    words = fields.get("message") or error
    return {**fields, "code": -32000, "message": str(words)[:_LONGEST_WORDS]}


def _id_of(message: Mapping[str, Any]) -> str:
    """The id of a question or an answer; gateways turn numbers into text or decimals."""
    found = message.get("id")
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    return found if isinstance(found, str) else repr(found)


def _seconds_of(header: str) -> float:
    """Seconds that a Retry-After header asks for, bounded; 0 where it says nothing usable."""
    try:
        seconds = float(header) if header.isdigit() else _until(header)
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return min(_LONGEST_WAIT, max(0.0, seconds))


def _until(moment: str) -> float:
    """Seconds until a moment as HTTP writes it."""
    return parsedate_to_datetime(moment).timestamp() - time.time()


def _refusal(request: Mapping[str, Any], words: str) -> dict[str, Any]:
    """A refusal that did not come as JSON-RPC has it, as if it did."""
    return {"jsonrpc": "2.0", "id": request["id"], "error": {"code": -32000, "message": words}}


def _error_of(answer: RPCResponse) -> Mapping[str, Any]:
    error: Any = answer.get("error")
    return error if isinstance(error, Mapping) else {}


def _blocks_of(request: Mapping[str, Any]) -> int:
    """Blocks whose logs are asked for; 0 where something else is, or a range without numbers."""
    if request["method"] != "eth_getLogs":
        return 0
    try:
        (query,) = request["params"]
        return int(query["toBlock"], 16) - int(query["fromBlock"], 16) + 1
    except (KeyError, TypeError, ValueError):
        return 0


def lacks_method(answer: RPCResponse) -> bool:
    """Whether this endpoint does not serve such a question, so that another may."""
    return "error" in answer and is_unsupported(_error_of(answer))


def _lacks_block(answer: RPCResponse) -> bool:
    """Whether it refused because it has not seen the block that was asked for."""
    if "error" not in answer:
        return False
    return kind_of(str(_error_of(answer).get("message", ""))) is NodeError.UNKNOWN_BLOCK


def _head_of(request: Mapping[str, Any], answer: RPCResponse) -> int | None:
    """The head that an answer tells, None where the question was another."""
    found: Any = answer.get("result")
    if request["method"] == "eth_getBlockByNumber" and list(request["params"])[:1] == ["latest"]:
        found = found["number"] if isinstance(found, dict) else None
    elif request["method"] != "eth_blockNumber":
        return None
    try:
        return int(found, 16)
    except (TypeError, ValueError):
        return None


def _may_be_null(request: Mapping[str, Any]) -> bool:
    method, params = request["method"], request["params"]
    if method == "eth_getBlockByNumber" and params:
        return params[0] not in _ALWAYS_THERE
    return method not in _NEVER_NULL


def _may_pass(status: int) -> bool:
    return status in {408, 425, 429}


def _plain(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    cause = getattr(error, "os_error", None) or error
    if isinstance(cause, OSError) and cause.errno is not None and cause.errno > 0:
        return os.strerror(cause.errno).lower()
    if isinstance(cause, OSError) and cause.strerror:
        return str(cause.strerror)
    return type(error).__name__
