"""One endpoint of a node: each answer is checked, each failure said in plain words.

web3's own retries are off: they would resend transactions. Here everything is asked once; see
`pool` for what follows a failure.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final

import aiohttp
import pydantic_core
from eth_typing import URI
from web3 import AsyncHTTPProvider
from web3.exceptions import Web3RPCError
from web3.types import RPCEndpoint, RPCResponse

from deepsquare_chain.chain.answers import fits, is_error
from deepsquare_chain.chain.nodeerrors import NodeError, classify, node_message
from deepsquare_chain.chain.transport import (
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
_RATE_LIMIT_CODES: Final = frozenset({429, -32005})
_PLAIN: Final = Transport()


class TransientEndpointError(EndpointError):
    """The endpoint failed in a way that may pass: no connection, 5xx, nonsense, a busy signal."""


class WrongEndpointError(EndpointError):
    """It serves another chain, lacks our contracts, or is no such address: waiting won't help."""


class CheckedProvider(AsyncHTTPProvider):
    """HTTP provider that believes nothing: status, JSON, id and result of each answer are checked.

    Failures of the endpoint raise `EndpointError`; errors that the node reports are passed on to
    web3 as they are.
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
        self._session: aiohttp.ClientSession | None = None
        self._users: Counter[aiohttp.ClientSession] = Counter()  # questions on their way
        self._highest = (-1, 0.0)  # head that was told, and when

    async def make_request(self, method: RPCEndpoint, params: Any) -> RPCResponse:
        """Ask once."""
        request = self.form_request(method, params)
        answer = await self._post(self.encode_rpc_dict(request))
        checked = self._checked(request, answer)
        if self._is_behind([request], [checked]):
            await self._renew()
        if method not in SEND_METHODS:
            self._raise_if_behind(checked)
        return checked

    async def make_batch_request(
        self, batch_requests: list[tuple[RPCEndpoint, Any]]
    ) -> list[RPCResponse] | RPCResponse:
        """Ask several things at once; answers come in the order of the questions."""
        requests = [self.form_request(method, params) for method, params in batch_requests]
        answers = await self._post(self.encode_batch_request_dicts(requests))
        if isinstance(answers, dict) and "error" in answers:
            return answers  # type: ignore[return-value]
        if not isinstance(answers, list) or len(answers) != len(requests):
            raise self._nonsense("a batch answer of the wrong size")
        # An id may be anything, also what no dictionary takes as a key.
        by_id = {repr(each.get("id")): each for each in answers if isinstance(each, dict)}
        checked = [self._checked(request, by_id.get(repr(request["id"]))) for request in requests]
        if self._is_behind(requests, checked):
            await self._renew()
        return checked

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

    async def _post(self, body: bytes) -> Any:
        # Connections stay open for the next question. web3 opens a new one for each, which costs
        # a way to the node and back, and with TLS more.
        if self._session is None:
            self._session = aiohttp.ClientSession(raise_for_status=True)
        session = self._session
        self._users[session] += 1
        try:
            options = self.get_request_kwargs()
            options["headers"] = {**options.get("headers", {}), **self._own_headers}
            async with session.post(str(self.endpoint_uri), data=body, **options) as answer:
                raw = await answer.read()
        except aiohttp.ClientHttpProxyError as error:
            raise TransientEndpointError(
                f"The proxy {self._proxy} does not lead to {self.place}: HTTP status "
                f"{error.status}",
                hint="Check HTTPS_PROXY; NO_PROXY names hosts to be asked without it.",
            ) from None
        except aiohttp.ClientResponseError as error:
            kind = TransientEndpointError if _may_pass(error.status) else EndpointError
            raise kind(
                f"The endpoint {self.place} answered with HTTP status {error.status}",
                hint="Is it the JSON-RPC address of a node, and is the key in it valid?",
            ) from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._unreachable(error) from None
        finally:
            await self._leave(session)
        try:
            # Its depth is bounded; json's is not where a library has raised the recursion limit.
            return pydantic_core.from_json(raw, allow_inf_nan=False)
        except ValueError:
            raise self._nonsense("no JSON (a web page?)") from None

    def _unreachable(self, error: Exception) -> TransientEndpointError:
        words = tls_problem(error)
        hint = "Start the node (`deepsquare devnet up` for a local one) or give --endpoint."
        if "certificate" in words:
            hint = CERTIFICATE_HINT
        elif self._proxy is not None:
            hint = f"It was asked through the proxy {self._proxy}; NO_PROXY names exceptions."
        return TransientEndpointError(
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
            highest, told = self._highest
            if head < highest and now - told < _HEAD_MEMORY:
                behind = True
            else:
                self._highest = (head, now)
        return behind

    def _checked(self, request: Mapping[str, Any], answer: Any) -> RPCResponse:
        if not isinstance(answer, dict) or answer.get("jsonrpc") != "2.0":
            raise self._nonsense("no JSON-RPC answer")
        error = answer.get("error")
        if error is not None and not is_error(error):
            raise self._nonsense("an error that is none")
        if error is not None:
            if isinstance(error, dict) and error.get("code") in _RATE_LIMIT_CODES:
                self._raise_if_busy(error)
            # A node that could not read the id answers with null.
            if answer.get("id") in (None, request["id"]):
                return answer  # type: ignore[return-value]
        if answer.get("id") != request["id"]:
            raise self._nonsense("the answer to another question")
        if "result" not in answer or (answer["result"] is None and not _may_be_null(request)):
            raise self._nonsense(f"an empty answer to {request['method']}")
        if error is None and not fits(request["method"], answer["result"]):
            raise self._nonsense(f"no proper answer to {request['method']}")
        return answer  # type: ignore[return-value]

    def _raise_if_busy(self, error: Mapping[str, Any]) -> None:
        # -32005 is also what some nodes say to a too wide range of logs; that is no busy signal.
        words = str(error.get("message", "")).lower()
        if error.get("code") == 429 or "rate" in words or "too many requests" in words:
            raise TransientEndpointError(
                f"The endpoint {self.place} limits its requests: {words[:200]}"
            )

    def _raise_if_behind(self, answer: RPCResponse) -> None:
        # Behind one address may stand nodes of different heights: the next may have the block.
        if _lacks_block(answer):
            error = Web3RPCError("", rpc_response=answer)
            raise TransientEndpointError(
                f"The endpoint {self.place} lags behind: {node_message(error)}"
            )

    def _nonsense(self, what: str) -> TransientEndpointError:
        return TransientEndpointError(
            f"The endpoint {self.place} gave {what}",
            hint="Is it the JSON-RPC address of a node?",
        )


def _lacks_block(answer: RPCResponse) -> bool:
    """Whether it refused because it has not seen the block that was asked for."""
    if "error" not in answer:
        return False
    return classify(Web3RPCError("", rpc_response=answer)) is NodeError.UNKNOWN_BLOCK


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
    return status >= 500 or status in {408, 425, 429}


def _plain(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    cause = getattr(error, "os_error", None) or error
    if isinstance(cause, OSError) and cause.errno is not None and cause.errno > 0:
        return os.strerror(cause.errno).lower()
    if isinstance(cause, OSError) and cause.strerror:
        return str(cause.strerror)
    return type(error).__name__
