"""A pool of endpoints of one chain, with failover, behind web3's provider interface.

One endpoint answers all requests while it is healthy. If it fails, limits its requests or lags
behind the others, the next one takes over, and the failed one has a cooldown. A batch is answered
by one endpoint. A transaction is sent to one endpoint, once: its sender decides on a retry.
`connect` opens the pool of the settings' URLs.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar
from urllib.parse import urlsplit

import stamina
import structlog
from eth_utils.address import to_checksum_address
from web3 import AsyncWeb3
from web3.exceptions import Web3Exception
from web3.middleware import AttributeDictMiddleware, ExtraDataToPOAMiddleware
from web3.providers.async_base import AsyncBaseProvider
from web3.types import RPCEndpoint, RPCResponse

from deepsquare_chain.chain.rpc.batching import RpcRequests, round_of
from deepsquare_chain.chain.rpc.endpoint import (
    REQUEST_TIMEOUT,
    SEND_METHODS,
    CheckedProvider,
    SplitResponses,
    TransientEndpointError,
    UnreachableEndpointError,
    WrongEndpointError,
    lacks_method,
)
from deepsquare_chain.chain.rpc.heads import OnDemandDetector
from deepsquare_chain.chain.rpc.transport import Transport
from deepsquare_chain.errors import EndpointError
from deepsquare_chain.notification import is_url
from deepsquare_chain.settings import safe_url, split_urls

if TYPE_CHECKING:
    from deepsquare_chain.observability.metrics import Metrics


class EndpointMetrics:
    """Metrics of the endpoints of a pool, by the host of each `safe_url`; None disables them."""

    def __init__(self, metrics: Metrics | None, urls: Sequence[str]) -> None:
        self._metrics = metrics
        self._names = _names(urls)
        if metrics is None:
            return
        hosts = sorted(self._names.values())
        self._requests = metrics.counter(
            "endpoint_requests", "Requests by endpoint.", endpoint=hosts, end=("ok", "failed")
        )
        self._changes = metrics.counter("endpoint_changes", "Failovers to another endpoint.")
        self._up = metrics.gauges(
            "endpoint_up", "Whether its last response was valid.", endpoint=hosts
        )
        self._lag = metrics.gauges(
            "endpoint_lag_blocks", "Blocks behind the best endpoint.", endpoint=hosts
        )

    def answered(self, url: str) -> None:
        """Count a valid response of an endpoint."""
        self._count(url, "ok")

    def failed(self, url: str) -> None:
        """Count a failed request to an endpoint."""
        self._count(url, "failed")

    def changed(self) -> None:
        """Count a failover to another endpoint."""
        if self._metrics is not None:
            self._metrics.add(self._changes)

    def compared(self, url: str, *, up: bool, lag: int | None = None) -> None:
        """Record the state of an endpoint compared to the others; `lag` in blocks."""
        if self._metrics is None:
            return
        self._metrics.set(self._up, up, self._names[url])
        if lag is not None:
            self._metrics.set(self._lag, lag, self._names[url])

    def _count(self, url: str, end: str) -> None:
        if self._metrics is not None:
            self._metrics.add(self._requests, self._names[url], end)
            self._metrics.set(self._up, end == "ok", self._names[url])


def _names(urls: Sequence[str]) -> dict[str, str]:
    """Return host and port of each URL, numbered if several URLs share them."""
    names: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for url in dict.fromkeys(urls):
        host = urlsplit(url).netloc
        counts[host] += 1
        names[url] = host if counts[host] == 1 else f"{host} ({counts[host]})"
    return names


MAX_LAG_BLOCKS: Final = 5
#: Confirmations after which a landmark block is final.
LANDMARK_DEPTH: Final = 64
#: Attempts to verify the chain of an endpoint, and seconds between them.
_VERIFY_ATTEMPTS: Final = 4
_VERIFY_PAUSE: Final = 0.1
#: Seconds between two comparisons of all heads, and timeout of each endpoint in seconds.
PROBE_SECONDS: Final = 10.0
_PROBE_TIMEOUT: Final = 5.0
#: Seconds for which the best head is remembered after its endpoint has failed.
_HEAD_MEMORY: Final = 60.0
#: Minimum and maximum cooldown in seconds; it doubles with each consecutive failure.
_COOLDOWN: Final = (1.0, 60.0)
_ANOTHER_CHAIN: Final = (
    "Give endpoints of one chain only. After a restart of a development chain use its own "
    "deployment record, and an empty --state-dir; nothing was sent to the new chain."
)
_log = structlog.get_logger(__name__)
# stamina's own log lines are too detailed; `_is_retryable` logs the failure instead.
stamina.instrumentation.set_on_retry_hooks(())

T = TypeVar("T")
Ask = Callable[[CheckedProvider], Awaitable[T]]


@dataclass
class Member:
    """State of one endpoint; times are monotonic seconds."""

    provider: CheckedProvider
    lag: int = 0  # blocks behind the best at the last comparison
    failures: int = 0  # consecutive
    cooldown_until: float = 0.0
    verified: bool = False  # its chain was verified since its last failure
    exclusion: WrongEndpointError | None = None  # it serves another chain and is never used again
    verify_lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # one verification at a time


class Pool(AsyncBaseProvider):
    """Sends requests to the endpoints of one chain.

    Args:
        providers: Endpoints in order of preference.
        chain_id: Chain ID that each must serve; if not given, that of the first to answer.
        landmark: Number of a block that identifies the chain in addition to the genesis block,
            which chains of the same genesis file share. Used once it has `LANDMARK_DEPTH`
            confirmations.
        attempts: Number of attempts of a read.
        max_lag_blocks: Blocks that an endpoint may lag behind the best and still be used.
    """

    def __init__(
        self,
        providers: Sequence[CheckedProvider],
        *,
        chain_id: int | None = None,
        landmark: int | None = None,
        attempts: int = 4,
        max_lag_blocks: int = MAX_LAG_BLOCKS,
        metrics: Metrics | None = None,
    ) -> None:
        super().__init__()
        self.global_ccip_read_enabled = False
        self.members = [Member(provider) for provider in providers]
        self._current = self.members[0]
        self.on_demand = OnDemandDetector()
        for provider in providers:
            provider.on_head = self.on_demand.record_head
        self._chain_id = chain_id
        self.genesis: str | None = None
        self.landmark: str | None = None  # hash of the landmark block
        self._landmark = landmark
        self._attempts = attempts
        self._max_lag = max_lag_blocks
        self._best_head = (-1, 0.0)  # highest head, and when it was reported
        self._compared_at = 0.0
        self._comparison: asyncio.Task[None] | None = None
        self._endpoint_metrics = EndpointMetrics(
            metrics, [provider.display_url for provider in providers]
        )

    @property
    def providers(self) -> list[CheckedProvider]:
        """The endpoints, in order of preference."""
        return [member.provider for member in self.members]

    @property
    def log_range(self) -> int:
        """Number of blocks per request for logs that the current endpoint accepts, if known."""
        return self._current.provider.log_range.size

    @property
    def batch_size(self) -> int:
        """Number of calls per request that the current endpoint accepts, if known."""
        return self._current.provider.batch_size.size

    def recheck_chain(self) -> None:
        """Verify the chain of each endpoint again with its next request."""
        for member in self.members:
            member.provider.doubtful = True

    async def open(self) -> None:
        """Verify the chain of all endpoints; retry until at least one is usable.

        Raises:
            WrongEndpointError: An endpoint serves another chain.
            EndpointError: No endpoint is up.
        """
        await self._with_retries(self._verify_all)

    async def disconnect(self) -> None:
        """Close the connections to all endpoints (idempotent)."""
        if self._comparison is not None:
            self._comparison.cancel()
            with suppress(asyncio.CancelledError):
                await self._comparison
            self._comparison = None
        for member in self.members:
            await member.provider.disconnect()

    async def make_request(self, method: RPCEndpoint, params: Any) -> RPCResponse:
        """Send a request: a transaction once to one endpoint, a read with retries and failover."""

        async def ask(provider: CheckedProvider) -> RPCResponse:
            return await provider.make_request(method, params)

        if method in SEND_METHODS:
            return await self._send(ask)
        self._compare_when_due()
        merged = await self._ask_merged([(method, params)])
        if merged is not None:
            return merged[0]
        return await self._with_retries(lambda: self._ask_in_turn(ask))

    async def make_batch_request(
        self, batch_requests: list[tuple[RPCEndpoint, Any]]
    ) -> list[RPCResponse] | RPCResponse:
        """Send a batch to one endpoint; responses are in the order of the requests."""

        async def ask(provider: CheckedProvider) -> list[RPCResponse] | RPCResponse:
            return await provider.make_batch_request(batch_requests)

        if any(method in SEND_METHODS for method, _ in batch_requests):
            return await self._send(ask)
        self._compare_when_due()
        merged = await self._ask_merged(batch_requests)
        if merged is not None:
            return merged
        return await self._with_retries(lambda: self._ask_in_turn(ask))

    async def _ask_merged(self, requests: RpcRequests) -> list[RPCResponse] | None:
        """Send requests in a batch shared with other tasks; None without one, or if it failed."""
        merging_round = round_of(self)
        if merging_round is None:
            return None

        async def ask_once(batch: RpcRequests) -> list[RPCResponse] | None:
            responses: Any = await self._ask_in_turn(lambda each: each.make_batch_request(batch))
            return None if isinstance(responses, SplitResponses) else responses

        return await merging_round.ask(requests, ask_once, self.batch_size)

    # -- choice of the endpoint

    def _candidates(self) -> list[Member]:
        """Return the endpoints that may be used now, best first.

        Raises:
            WrongEndpointError: All endpoints serve other chains.
            TransientEndpointError: All remaining endpoints lag too far behind.
        """
        right_chain = [member for member in self.members if member.exclusion is None]
        if not right_chain:
            raise self.members[0].exclusion or AssertionError("unreachable")
        synced = [member for member in right_chain if member.lag <= self._max_lag]
        if not synced:
            raise TransientEndpointError(
                "; ".join(
                    f"{member.provider.display_url} is {member.lag} blocks behind"
                    for member in right_chain
                ),
                hint="Wait until it has caught up, or give more endpoints.",
            )
        now = time.monotonic()
        synced.sort(
            key=lambda member: (max(0.0, member.cooldown_until - now), member is not self._current)
        )
        ready = [member for member in synced if member.cooldown_until <= now]
        # If all have a cooldown, use them anyway: there may be only one.
        return ready or synced

    async def _ask_in_turn(self, ask: Ask[T]) -> T:
        """Try the endpoints in turn until one answers, skipping those that lack the method."""
        errors: list[EndpointError] = []
        fallback: T | None = None
        for member in self._candidates():
            try:
                response = await self._ask(member, ask)
            except EndpointError as error:
                errors.append(error)
                continue
            if not _lacks_method(response):
                self._make_current(member)
                return response
            fallback = response if fallback is None else fallback
        if fallback is not None:
            return fallback
        raise _combined(errors)

    async def _send(self, ask: Ask[T]) -> T:
        """Send to the first endpoint whose chain is verified, and to no other."""
        errors: list[EndpointError] = []
        for member in self._candidates():
            try:
                await self._verify(member)
            except EndpointError as error:
                self._failed(member, error)
                errors.append(error)
                continue
            response = await self._ask(member, ask)
            self._make_current(member)
            return response
        raise _combined(errors)

    async def _ask(self, member: Member, ask: Ask[T]) -> T:
        """Return the response of an endpoint, after verifying that it is of our chain."""
        try:
            # With a single endpoint the request itself shows whether it is up again.
            if len(self.members) > 1:
                await self._verify(member)
            response = await ask(member.provider)
            await self._verify(member, answered=True)
        except EndpointError as error:
            self._failed(member, error)
            raise
        member.failures, member.cooldown_until = 0, 0.0
        self._endpoint_metrics.answered(member.provider.display_url)
        return response

    def _make_current(self, member: Member) -> None:
        """Make an endpoint the current one, which is tried first."""
        if member is not self._current:
            _log.warning("endpoint changed", endpoint=member.provider.display_url)
            self._current = member
            self._endpoint_metrics.changed()

    def _failed(self, member: Member, error: EndpointError) -> None:
        member.failures += 1
        self._endpoint_metrics.failed(member.provider.display_url)
        if len(self.members) == 1:
            # No failover is possible. A node that was unreachable may serve a restarted chain.
            member.verified = member.verified and not isinstance(error, UnreachableEndpointError)
            return
        member.verified = False
        minimum, maximum = _COOLDOWN
        cooldown = min(maximum, minimum * 2.0 ** min(member.failures - 1, 10))
        cooldown = max(cooldown, getattr(error, "retry_after", 0.0))
        member.cooldown_until = time.monotonic() + cooldown
        _log.warning(
            "endpoint cooldown started",
            seconds=cooldown,
            failures=member.failures,
            error=error.message,
        )

    async def _with_retries(self, work: Callable[[], Awaitable[T]]) -> T:
        async for attempt in stamina.retry_context(
            on=_is_retryable,
            attempts=self._attempts,
            wait_initial=0.1,
            wait_jitter=0.1,
            wait_max=5.0,
            timeout=None,
        ):
            with attempt:
                return await work()
        raise AssertionError("unreachable")

    # -- verification of the chain

    async def _verify_all(self) -> None:
        results = await asyncio.gather(
            *(self._verify_within_timeout(item) for item in self.members), return_exceptions=True
        )
        errors = [item for item in results if isinstance(item, BaseException)]
        for error in errors:
            if isinstance(error, WrongEndpointError) or not isinstance(error, EndpointError):
                raise error
        if len(errors) == len(self.members):
            raise _combined([item for item in errors if isinstance(item, EndpointError)])
        if len(self.members) > 1:
            await self._compare_heads()

    async def _verify_within_timeout(self, member: Member) -> None:
        limit = None if len(self.members) == 1 else _PROBE_TIMEOUT
        try:
            async with asyncio.timeout(limit):
                await self._verify(member)
        except TimeoutError:
            error = TransientEndpointError(
                f"The endpoint {member.provider.display_url} does not respond"
            )
            self._failed(member, error)
            raise error from None
        except EndpointError as error:
            self._failed(member, error)
            raise

    async def _verify(self, member: Member, *, answered: bool = False) -> None:
        """Verify that an endpoint serves our chain, after a failure or a decrease of its head.

        If it has just `answered`, the check is retried a few times, so as not to lose the response.

        Raises:
            WrongEndpointError: It serves another chain.
            EndpointError: The check failed.
        """
        if member.verified and not member.provider.doubtful:
            return
        async with member.verify_lock:
            await self._verify_locked(member, _VERIFY_ATTEMPTS if answered else 1)

    async def _verify_locked(self, member: Member, attempts: int) -> None:
        if member.exclusion is not None:
            raise member.exclusion
        if member.verified and not member.provider.doubtful:
            return  # another task has verified it meanwhile
        member.verified = False
        provider = member.provider
        provider.doubtful = False
        try:
            await self._compare_chains_with_retries(attempts, member)
        except (KeyError, TypeError, ValueError):
            raise EndpointError(
                f"The endpoint {provider.display_url} is not a usable node"
            ) from None
        except EndpointError:
            provider.doubtful = True
            raise
        member.verified = True
        provider.doubtful = False

    async def _compare_chains_with_retries(self, attempts: int, member: Member) -> None:
        for retries in range(attempts - 1, -1, -1):
            try:
                return await self._compare_chains(member)
            except TransientEndpointError:
                if not retries:
                    raise
                await asyncio.sleep(_VERIFY_PAUSE)
        raise AssertionError("unreachable")

    async def _compare_chains(self, member: Member) -> None:
        """Compare the endpoint's chain ID, genesis block and landmark with the known ones."""
        provider, landmark = member.provider, self._landmark
        requests: list[tuple[str, list[Any]]] = [
            ("eth_chainId", []),
            ("eth_getBlockByNumber", ["0x0", False]),
        ]
        if landmark is not None:
            by_number = ("eth_getBlockByNumber", [hex(landmark), False])
            requests.append(("eth_blockNumber", []) if self.landmark is None else by_number)
        chain_id, first, *more = await _results(provider, requests)
        self._compare_chain_ids(member, int(chain_id, 16))
        genesis = str(first["hash"])
        self.genesis = self.genesis or genesis
        if genesis != self.genesis:
            self._exclude(
                member,
                f"serves another chain {self._chain_id} than "
                f"{'before' if len(self.members) == 1 else 'the other endpoints, or than before'}: "
                f"its first block is {genesis}, not {self.genesis}",
                _ANOTHER_CHAIN,
            )
        if landmark is None:
            return
        if self.landmark is None:
            if int(more[0], 16) - landmark < LANDMARK_DEPTH:
                return
            more = await _results(provider, [by_number])
        if more[0] is None:
            raise TransientEndpointError(
                f"The endpoint {provider.display_url} does not know block {landmark} of this chain",
                hint="Wait until it has caught up. A restarted chain lacks it as well: "
                f"then {_ANOTHER_CHAIN[0].lower()}{_ANOTHER_CHAIN[1:]}",
            )
        block_hash = str(more[0]["hash"])
        self.landmark = self.landmark or block_hash
        if block_hash != self.landmark:
            self._exclude(
                member,
                f"serves another chain {self._chain_id} than before: its block {landmark} is "
                f"{block_hash}, not {self.landmark}",
                _ANOTHER_CHAIN,
            )

    def _compare_chain_ids(self, member: Member, chain_id: int) -> None:
        # The first endpoint to answer sets the chain ID that the others must have.
        self._chain_id = chain_id if self._chain_id is None else self._chain_id
        if chain_id != self._chain_id:
            self._exclude(
                member,
                f"serves chain {chain_id}, not chain {self._chain_id}",
                "Give an endpoint of the chain of the deployment record.",
            )

    def _exclude(self, member: Member, problem: str, hint: str) -> NoReturn:
        url = member.provider.display_url
        member.exclusion = WrongEndpointError(f"The endpoint {url} {problem}", hint=hint)
        _log.error("endpoint rejected", error=member.exclusion.message)
        raise member.exclusion

    # -- comparison of the heads

    def _compare_when_due(self) -> None:
        """Compare all heads periodically, in the background."""
        idle = self._comparison is None or self._comparison.done()
        if len(self.members) > 1 and idle and time.monotonic() - self._compared_at >= PROBE_SECONDS:
            self._comparison = asyncio.create_task(self._compare_heads(), name="endpoint heads")

    async def _compare_heads(self) -> None:
        """Read all heads concurrently and record each endpoint's lag behind the best one."""
        self._compared_at = time.monotonic()
        heads = await asyncio.gather(*(self._head(member) for member in self.members))
        best, seen_at = self._best_head
        if time.monotonic() - seen_at > _HEAD_MEMORY:
            best = -1
        if max(heads) >= best:
            self._best_head = (max(heads), time.monotonic())
        for member, head in zip(self.members, heads, strict=True):
            if head < 0:
                self._endpoint_metrics.compared(member.provider.display_url, up=False)
                continue
            lag, before = max(best, *heads) - head, member.lag
            member.lag = lag
            up = lag <= self._max_lag
            self._endpoint_metrics.compared(member.provider.display_url, up=up, lag=lag)
            if up != (before <= self._max_lag):
                event = "endpoint caught up" if up else "endpoint fell behind"
                _log.warning(event, endpoint=member.provider.display_url, blocks=lag, head=head)

    async def _head(self, member: Member) -> int:
        """Return the head of an endpoint; -1 if it fails, has a cooldown or is excluded."""
        if member.exclusion is not None or member.cooldown_until > time.monotonic():
            return -1
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT):
                await self._verify(member)
                return int(await _result(member.provider, "eth_blockNumber"), 16)
        except (EndpointError, TimeoutError, TypeError, ValueError) as error:
            if member is not self._current:
                self._failed(member, EndpointError(str(error) or "no answer in time"))
            return -1


async def _results(
    provider: CheckedProvider, requests: Sequence[tuple[str, list[Any]]]
) -> list[Any]:
    """Return the results of one batch."""
    responses: Any = await provider.make_batch_request(
        [(RPCEndpoint(method), params) for method, params in requests]
    )
    for response in responses:
        if "error" in response:
            message = str(response["error"])[:200]
            raise EndpointError(
                f"The endpoint {provider.display_url} is not a usable node: {message}"
            )
    return [response["result"] for response in responses]


async def _result(provider: CheckedProvider, method: str, *params: Any) -> Any:
    response = await provider.make_request(RPCEndpoint(method), list(params))
    if "error" in response:
        message = str(response["error"])[:200]
        raise EndpointError(f"The endpoint {provider.display_url} is not a usable node: {message}")
    return response["result"]


def _lacks_method(answer: Any) -> bool:
    """Return whether the endpoint lacks the method of the request, or of one in a batch."""
    return any(map(lacks_method, answer if isinstance(answer, list) else [answer]))


def _combined(errors: Sequence[EndpointError]) -> EndpointError:
    """Combine errors into one; it is transient if any of them is."""
    if len(errors) == 1 or all(isinstance(error, WrongEndpointError) for error in errors):
        return errors[0]
    transient = any(isinstance(error, TransientEndpointError) for error in errors)
    kind = TransientEndpointError if transient else EndpointError
    messages = "; ".join(error.message for error in errors)
    combined = kind(f"No endpoint answers. {messages}", hint=errors[0].hint)
    if isinstance(combined, TransientEndpointError):
        combined.retry_after = min(getattr(error, "retry_after", 0.0) for error in errors)
    return combined


def _is_retryable(error: Exception) -> bool | float:
    """Return whether to retry, or the seconds to wait first if the endpoint gave them."""
    if not isinstance(error, TransientEndpointError):
        return False
    _log.debug("endpoint failed", error=error.message)
    return error.retry_after or True


async def connect(
    url: str | Sequence[str],
    *,
    chain_id: int | None = None,
    contracts: Iterable[str] = (),
    landmark: int | None = None,
    attempts: int = 4,
    timeout: float = REQUEST_TIMEOUT,
    max_lag_blocks: int = MAX_LAG_BLOCKS,
    metrics: Metrics | None = None,
    transport: Transport | None = None,
) -> AsyncWeb3[Any]:
    """Connect to a chain and verify that it is the right one.

    Args:
        url: URL of a JSON-RPC endpoint, or several in order of preference, as a sequence or
            separated by commas.
        chain_id: Chain ID that each endpoint must serve, if known.
        contracts: Addresses that must hold code.
        landmark: Number of a block that identifies the chain, such as the deployment's.
        attempts: Number of attempts of a read; each tries all available endpoints.
        timeout: Seconds for one request.
        max_lag_blocks: Blocks that an endpoint may lag behind the best before it is excluded.

    Raises:
        UsageError: The environment names an invalid proxy.
        WrongEndpointError: An endpoint serves another chain or has no HTTP URL, or a contract is
            missing.
        EndpointError: All endpoints are down, or are not nodes.
    """
    urls = split_urls(url) if isinstance(url, str) else tuple(url)
    for endpoint in urls:
        if not is_url(endpoint, ("http", "https")):
            raise WrongEndpointError(
                f"The endpoint {safe_url(endpoint)} is not an http:// or https:// URL"
            )
    pool = Pool(
        [
            CheckedProvider(endpoint, timeout=timeout, transport=transport or Transport())
            for endpoint in urls
        ],
        chain_id=chain_id,
        landmark=landmark,
        attempts=attempts,
        max_lag_blocks=max_lag_blocks,
        metrics=metrics,
    )
    w3: AsyncWeb3[Any] = AsyncWeb3(
        pool,
        # No ENS lookups and no gas estimates: only attribute access to results, and support for
        # chains with long extra data.
        middleware=[(AttributeDictMiddleware, "attrdict"), (ExtraDataToPOAMiddleware, "extradata")],
    )
    try:
        await pool.open()
        await _check(w3, ", ".join(endpoint.display_url for endpoint in pool.providers), contracts)
    except BaseException:
        await close(w3)
        raise
    return w3


async def close(w3: AsyncWeb3[Any]) -> None:
    """Close the connection (idempotent)."""
    await w3.provider.disconnect()


@asynccontextmanager
async def connected(url: str | Sequence[str], **options: Any) -> AsyncIterator[AsyncWeb3[Any]]:
    """Connect for the duration of a with block; takes the options of `connect`."""
    w3 = await connect(url, **options)
    try:
        yield w3
    finally:
        await close(w3)


async def _check(w3: AsyncWeb3[Any], url: str, contracts: Iterable[str]) -> None:
    try:
        for address in contracts:
            if not await w3.eth.get_code(to_checksum_address(address)):
                raise WrongEndpointError(
                    f"There is no contract at {address} on the chain of {url}",
                    hint="A restarted local chain is empty: deploy again, or give the right "
                    "deployment record with --deployment.",
                )
    except (Web3Exception, ValueError) as error:
        raise EndpointError(
            f"The endpoint {url} is not a usable node: {str(error)[:200]}"
        ) from None


async def chain_time(w3: AsyncWeb3[Any]) -> int:
    """Return the time of the latest block in seconds; billing uses no other clock."""
    return int((await w3.eth.get_block("latest"))["timestamp"])
