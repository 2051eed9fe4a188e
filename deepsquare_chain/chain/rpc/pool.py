"""Several endpoints of one chain behind web3's provider interface.

One of them answers everything as long as it is good; when it fails, limits its requests or falls
behind the others, the next takes its place and it cools down. A batch is answered by one endpoint. A
transaction goes to one endpoint, once: whether its bytes go to another is its sender's decision.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar
from urllib.parse import urlsplit

import stamina
import structlog
from web3.providers.async_base import AsyncBaseProvider
from web3.types import RPCEndpoint, RPCResponse

from deepsquare_chain.chain.rpc.batching import Questions, round_of
from deepsquare_chain.chain.rpc.endpoint import (
    SEND_METHODS,
    AwayEndpointError,
    CheckedProvider,
    SplitAnswers,
    TransientEndpointError,
    WrongEndpointError,
    lacks_method,
)
from deepsquare_chain.chain.rpc.on_demand import OnDemandDetector
from deepsquare_chain.errors import EndpointError

if TYPE_CHECKING:
    from deepsquare_chain.observability.metrics import Metrics


class EndpointMetrics:
    """Counts what endpoints do.

    Args:
        metrics: Where the figures go; None counts nothing.
        places: The endpoints, as `safe_url` shows them.
    """

    def __init__(self, metrics: Metrics | None, places: Sequence[str]) -> None:
        self._metrics = metrics
        self._names = _names(places)
        if metrics is None:
            return
        hosts = sorted(self._names.values())
        self._asked = metrics.counter(
            "endpoint_requests", "Requests by endpoint.", endpoint=hosts, end=("ok", "failed")
        )
        self._changes = metrics.counter("endpoint_changes", "Times that another took over.")
        self._up = metrics.gauges(
            "endpoint_up", "Whether it answered and was believed last.", endpoint=hosts
        )
        self._lag = metrics.gauges(
            "endpoint_lag_blocks", "Blocks behind the best endpoint.", endpoint=hosts
        )

    def answered(self, place: str) -> None:
        """It gave a proper answer."""
        self._count(place, "ok")

    def failed(self, place: str) -> None:
        """It gave none."""
        self._count(place, "failed")

    def changed(self) -> None:
        """Another endpoint took over."""
        if self._metrics is not None:
            self._metrics.add(self._changes)

    def compared(self, place: str, *, up: bool, lag: int | None = None) -> None:
        """Its state in comparison with the others."""
        if self._metrics is None:
            return
        self._metrics.set(self._up, up, self._names[place])
        if lag is not None:
            self._metrics.set(self._lag, lag, self._names[place])

    def _count(self, place: str, end: str) -> None:
        if self._metrics is not None:
            self._metrics.add(self._asked, self._names[place], end)
            self._metrics.set(self._up, end == "ok", self._names[place])


def _names(places: Sequence[str]) -> dict[str, str]:
    """Host and port of each place; numbered where several share them."""
    found: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for place in dict.fromkeys(places):
        host = urlsplit(place).netloc
        seen[host] += 1
        found[place] = host if seen[host] == 1 else f"{host} ({seen[host]})"
    return found


MAX_LAG_BLOCKS: Final = 5
#: Blocks on top of a landmark: it is not replaced any more.
LANDMARK_DEPTH: Final = 64
#: Looks at the chain of an endpoint, and seconds between them.
_LOOKS: Final = 4
_LOOK_PAUSE: Final = 0.1
#: Seconds between two comparisons of all heads, and for one of them.
PROBE_SECONDS: Final = 10.0
_PROBE_TIMEOUT: Final = 5.0
#: Seconds for which the best head counts, although the endpoint that reported it is gone.
_HEAD_MEMORY: Final = 60.0
#: Seconds of rest after a failure, doubled with each in a row.
_REST: Final = (1.0, 60.0)
_ANOTHER_CHAIN: Final = (
    "Give endpoints of one chain only. After a restart of a development chain use its own "
    "deployment record, and an empty --state-dir; nothing was sent to the new chain."
)
_log = structlog.get_logger(__name__)
# Its own lines would hold whole tracebacks' worth of detail; `_may_pass_later` says what matters.
stamina.instrumentation.set_on_retry_hooks(())

T = TypeVar("T")
Ask = Callable[[CheckedProvider], Awaitable[T]]


@dataclass
class Member:
    """What is known of one endpoint; times are monotonic seconds."""

    provider: CheckedProvider
    head: int = -1
    lag: int = 0  # blocks behind the best when all were compared last
    failures: int = 0  # in a row
    cooldown_until: float = 0.0
    known: bool = False  # serves the right chain, as far as was seen since it was away
    wrong: WrongEndpointError | None = None  # it serves another one, and is never asked again
    looking: asyncio.Lock = field(default_factory=asyncio.Lock)  # one look at its chain at a time


class Pool(AsyncBaseProvider):
    """Asks the endpoints of one chain.

    Args:
        providers: In the order of preference.
        chain_id: Chain that each must serve; that of the first to answer if unknown.
        landmark: Number of a block by which the chain is known again, besides its first one, once
            it is `LANDMARK_DEPTH` blocks deep: chains of one genesis file begin with one block.
        attempts: How often a read is tried.
        max_lag_blocks: Blocks that an endpoint may be behind the best and still be believed.
        metrics: Where the figures of each endpoint go.
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
        self.members = [Member(each) for each in providers]
        self._current = self.members[0]
        self.on_demand = OnDemandDetector()
        for each in providers:
            each.on_head = self.on_demand.saw
        self._chain_id = chain_id
        self.genesis: str | None = None
        self.landmark: str | None = None  # hash of the block by which the chain is known again
        self._landmark = landmark
        self._attempts = attempts
        self._max_lag = max_lag_blocks
        self._best = (-1, 0.0)  # highest head, and when it was reported
        self._compared = 0.0
        self._comparing: asyncio.Task[None] | None = None
        self._figures = EndpointMetrics(metrics, [each.place for each in providers])

    @property
    def providers(self) -> list[CheckedProvider]:
        """Its endpoints, in the order of preference."""
        return [each.provider for each in self.members]

    @property
    def log_range(self) -> int:
        """Blocks of which the endpoint that answers now gives logs at once, as far as is known."""
        return self._current.provider.log_range.size

    @property
    def batch_size(self) -> int:
        """Calls that the endpoint that answers now takes in one request, as far as is known."""
        return self._current.provider.batch_size.size

    def doubt(self) -> None:
        """Look again whether the endpoints serve this chain, with the next question to each."""
        for member in self.members:
            member.provider.doubtful = True

    async def open(self) -> None:
        """Look at all endpoints, until one is good.

        Raises:
            WrongEndpointError: One of them serves another chain.
            EndpointError: None is up.
        """
        await self._patiently(self._meet)

    async def disconnect(self) -> None:
        """Close the connections to all of them; harmless when closed."""
        if self._comparing is not None:
            self._comparing.cancel()
            with suppress(asyncio.CancelledError):
                await self._comparing
            self._comparing = None
        for each in self.members:
            await each.provider.disconnect()

    async def make_request(self, method: RPCEndpoint, params: Any) -> RPCResponse:
        """Ask one endpoint: for a send once, for a read until one of them answers."""

        async def ask(provider: CheckedProvider) -> RPCResponse:
            return await provider.make_request(method, params)

        if method in SEND_METHODS:
            return await self._send(ask)
        self._compare_when_due()
        merged = await self._ask_merged([(method, params)])
        if merged is not None:
            return merged[0]
        return await self._patiently(lambda: self._ask_around(ask))

    async def make_batch_request(
        self, batch_requests: list[tuple[RPCEndpoint, Any]]
    ) -> list[RPCResponse] | RPCResponse:
        """Ask one endpoint several things at once; answers are in the order of the questions."""

        async def ask(provider: CheckedProvider) -> list[RPCResponse] | RPCResponse:
            return await provider.make_batch_request(batch_requests)

        if any(method in SEND_METHODS for method, _ in batch_requests):
            return await self._send(ask)
        self._compare_when_due()
        merged = await self._ask_merged(batch_requests)
        if merged is not None:
            return merged
        return await self._patiently(lambda: self._ask_around(ask))

    async def _ask_merged(self, questions: Questions) -> list[RPCResponse] | None:
        """Answers of a batch that others share; None where there is none, or it failed."""
        found = round_of(self)
        if found is None:
            return None

        async def ask_once(batch: Questions) -> list[RPCResponse] | None:
            answers: Any = await self._ask_around(lambda each: each.make_batch_request(batch))
            return None if isinstance(answers, SplitAnswers) else answers

        return await found.ask(questions, ask_once, self.batch_size)

    # -- whom to ask

    def _candidates(self) -> list[Member]:
        """Who may be asked now, best first.

        Raises:
            WrongEndpointError: All serve other chains.
            TransientEndpointError: Those that are left are behind what was seen.
        """
        right = [each for each in self.members if each.wrong is None]
        if not right:
            raise self.members[0].wrong or AssertionError("unreachable")
        believed = [each for each in right if each.lag <= self._max_lag]
        if not believed:
            raise TransientEndpointError(
                "; ".join(f"{each.provider.place} is {each.lag} blocks behind" for each in right),
                hint="Wait until it has caught up, or give further endpoints.",
            )
        now = time.monotonic()
        believed.sort(
            key=lambda each: (max(0.0, each.cooldown_until - now), each is not self._current)
        )
        ready = [each for each in believed if each.cooldown_until <= now]
        # Where all of them rest, asking is better than waiting: there may be only one.
        return ready or believed

    async def _ask_around(self, ask: Ask[T]) -> T:
        """Ask until somebody answers; who does not serve such a question is no reason to end."""
        errors: list[EndpointError] = []
        fallback: T | None = None
        for member in self._candidates():
            try:
                answer = await self._ask(member, ask)
            except EndpointError as error:
                errors.append(error)
                continue
            if not _lacks(answer):
                self._answered(member)
                return answer
            fallback = answer if fallback is None else fallback
        if fallback is not None:
            return fallback
        raise _together(errors)

    async def _send(self, ask: Ask[T]) -> T:
        """Hand over to the first that is sure to serve the right chain, and to no other."""
        errors: list[EndpointError] = []
        for member in self._candidates():
            try:
                await self._know(member)
            except EndpointError as error:
                self._failed(member, error)
                errors.append(error)
                continue
            answer = await self._ask(member, ask)
            self._answered(member)
            return answer
        raise _together(errors)

    async def _ask(self, member: Member, ask: Ask[T]) -> T:
        """Its answer, once it is sure to be of our chain."""
        try:
            # Where there is no other, one question tells whether it is back.
            if len(self.members) > 1:
                await self._know(member)
            answer = await ask(member.provider)
            await self._know(member, answered=True)
        except EndpointError as error:
            self._failed(member, error)
            raise
        member.failures, member.cooldown_until = 0, 0.0
        self._figures.answered(member.provider.place)
        return answer

    def _answered(self, member: Member) -> None:
        """It is asked first from now on."""
        if member is not self._current:
            _log.warning("endpoint_changed", endpoint=member.provider.place)
            self._current = member
            self._figures.changed()

    def _failed(self, member: Member, error: EndpointError) -> None:
        member.failures += 1
        self._figures.failed(member.provider.place)
        if len(self.members) == 1:
            # There is no other to go to meanwhile. One that was away may be a restarted chain.
            member.known = member.known and not isinstance(error, AwayEndpointError)
            return
        member.known = False
        low, high = _REST
        rest = min(high, low * 2.0 ** min(member.failures - 1, 10))
        rest = max(rest, getattr(error, "retry_after", 0.0))
        member.cooldown_until = time.monotonic() + rest
        _log.warning("endpoint_rests", seconds=rest, failures=member.failures, error=error.message)

    async def _patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        async for attempt in self._retries():
            with attempt:
                return await work()
        raise AssertionError("unreachable")

    def _retries(self) -> AsyncIterator[stamina.Attempt]:
        return stamina.retry_context(
            on=_may_pass_later,
            attempts=self._attempts,
            wait_initial=0.1,
            wait_jitter=0.1,
            wait_max=5.0,
            timeout=None,
        )

    # -- whether they serve the same chain

    async def _meet(self) -> None:
        found = await asyncio.gather(
            *(self._greet(each) for each in self.members), return_exceptions=True
        )
        errors = [each for each in found if isinstance(each, BaseException)]
        for error in errors:
            if isinstance(error, WrongEndpointError) or not isinstance(error, EndpointError):
                raise error
        if len(errors) == len(self.members):
            raise _together([each for each in errors if isinstance(each, EndpointError)])
        if len(self.members) > 1:
            await self._compare()

    async def _greet(self, member: Member) -> None:
        limit = None if len(self.members) == 1 else _PROBE_TIMEOUT
        try:
            async with asyncio.timeout(limit):
                await self._know(member)
        except TimeoutError:
            error = TransientEndpointError(f"The endpoint {member.provider.place} hangs")
            self._failed(member, error)
            raise error from None
        except EndpointError as error:
            self._failed(member, error)
            raise

    async def _know(self, member: Member, *, answered: bool = False) -> None:
        """Make sure that it serves our chain: after a failure, and after its head fell.

        One that has just `answered` is asked a few times: no answer is thrown away for this.

        Raises:
            WrongEndpointError: It serves another.
            EndpointError: It does not say.
        """
        if member.known and not member.provider.doubtful:
            return
        async with member.looking:
            await self._look_at(member, _LOOKS if answered else 1)

    async def _look_at(self, member: Member, looks: int) -> None:
        if member.wrong is not None:
            raise member.wrong
        if member.known and not member.provider.doubtful:
            return  # another question has led there meanwhile
        member.known = False
        provider = member.provider
        provider.doubtful = False
        try:
            await self._compare_chains_in(looks, member)
        except (KeyError, TypeError, ValueError):
            raise EndpointError(f"The endpoint {provider.place} is no usable node") from None
        except EndpointError:
            provider.doubtful = True
            raise
        member.known = True
        provider.doubtful = False

    async def _compare_chains_in(self, looks: int, member: Member) -> None:
        for left in range(looks - 1, -1, -1):
            try:
                return await self._compare_chains(member)
            except TransientEndpointError:
                if not left:
                    raise
                await asyncio.sleep(_LOOK_PAUSE)
        raise AssertionError("unreachable")

    async def _compare_chains(self, member: Member) -> None:
        """Hold its chain id, its first block and the landmark against what is known."""
        provider, landmark = member.provider, self._landmark
        asked: list[tuple[str, list[Any]]] = [
            ("eth_chainId", []),
            ("eth_getBlockByNumber", ["0x0", False]),
        ]
        if landmark is not None:
            by_number = ("eth_getBlockByNumber", [hex(landmark), False])
            asked.append(("eth_blockNumber", []) if self.landmark is None else by_number)
        chain_id, first, *more = await _results(provider, asked)
        self._compare_ids(member, int(chain_id, 16))
        genesis = str(first["hash"])
        self.genesis = self.genesis or genesis
        if genesis != self.genesis:
            self._turn_away(
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
                f"The endpoint {provider.place} does not know block {landmark} of this chain",
                hint="Wait until it has caught up. A chain that was begun anew lacks it as well: "
                f"then {_ANOTHER_CHAIN[0].lower()}{_ANOTHER_CHAIN[1:]}",
            )
        found = str(more[0]["hash"])
        self.landmark = self.landmark or found
        if found != self.landmark:
            self._turn_away(
                member,
                f"serves another chain {self._chain_id} than before: its block {landmark} is "
                f"{found}, not {self.landmark}",
                _ANOTHER_CHAIN,
            )

    def _compare_ids(self, member: Member, chain_id: int) -> None:
        # Whoever answers first says what the others are held against.
        self._chain_id = chain_id if self._chain_id is None else self._chain_id
        if chain_id != self._chain_id:
            self._turn_away(
                member,
                f"serves chain {chain_id}, not chain {self._chain_id}",
                "Give the endpoint of the chain that the deployment record was made on.",
            )

    def _turn_away(self, member: Member, words: str, hint: str) -> NoReturn:
        place = member.provider.place
        member.wrong = WrongEndpointError(f"The endpoint {place} {words}", hint=hint)
        _log.error("endpoint_is_wrong", error=member.wrong.message)
        raise member.wrong

    # -- whether they agree on the head

    def _compare_when_due(self) -> None:
        """Compare all heads periodically, in the background."""
        idle = self._comparing is None or self._comparing.done()
        if len(self.members) > 1 and idle and time.monotonic() - self._compared >= PROBE_SECONDS:
            self._comparing = asyncio.create_task(self._compare(), name="endpoint heads")

    async def _compare(self) -> None:
        """Ask all for their heads at the same time; who is too far behind is not believed."""
        self._compared = time.monotonic()
        heads = await asyncio.gather(*(self._head(each) for each in self.members))
        best, seen_at = self._best
        if time.monotonic() - seen_at > _HEAD_MEMORY:
            best = -1
        if max(heads) >= best:
            self._best = (max(heads), time.monotonic())
        for member, head in zip(self.members, heads, strict=True):
            if head < 0:
                self._figures.compared(member.provider.place, up=False)
                continue
            lag, before = max(best, *heads) - head, member.lag
            member.head, member.lag = head, lag
            good = lag <= self._max_lag
            self._figures.compared(member.provider.place, up=good, lag=lag)
            if good != (before <= self._max_lag):
                news = "endpoint_caught_up" if good else "endpoint_behind"
                _log.warning(news, endpoint=member.provider.place, blocks=lag, head=head)

    async def _head(self, member: Member) -> int:
        """Its head; -1 where it does not say, or must be left alone."""
        if member.wrong is not None or member.cooldown_until > time.monotonic():
            return -1
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT):
                await self._know(member)
                return int(await _result(member.provider, "eth_blockNumber"), 16)
        except (EndpointError, TimeoutError, TypeError, ValueError) as error:
            if member is not self._current:
                self._failed(member, EndpointError(str(error) or "no answer in time"))
            return -1


async def _results(provider: CheckedProvider, asked: Sequence[tuple[str, list[Any]]]) -> list[Any]:
    """Results of one batch."""
    answers: Any = await provider.make_batch_request(
        [(RPCEndpoint(method), params) for method, params in asked]
    )
    for answer in answers:
        if "error" in answer:
            words = str(answer["error"])[:200]
            raise EndpointError(f"The endpoint {provider.place} is no usable node: {words}")
    return [answer["result"] for answer in answers]


async def _result(provider: CheckedProvider, method: str, *params: Any) -> Any:
    answer = await provider.make_request(RPCEndpoint(method), list(params))
    if "error" in answer:
        words = str(answer["error"])[:200]
        raise EndpointError(f"The endpoint {provider.place} is no usable node: {words}")
    return answer["result"]


def _lacks(answer: Any) -> bool:
    """Whether the endpoint does not serve this question, or one of a batch."""
    return any(map(lacks_method, answer if isinstance(answer, list) else [answer]))


def _together(errors: Sequence[EndpointError]) -> EndpointError:
    """One error for all of them; it may pass if one of theirs may."""
    if len(errors) == 1 or all(isinstance(each, WrongEndpointError) for each in errors):
        return errors[0]
    passing = any(isinstance(each, TransientEndpointError) for each in errors)
    kind = TransientEndpointError if passing else EndpointError
    words = "; ".join(each.message for each in errors)
    found = kind(f"No endpoint answers. {words}", hint=errors[0].hint)
    if isinstance(found, TransientEndpointError):
        found.retry_after = min(getattr(each, "retry_after", 0.0) for each in errors)
    return found


def _may_pass_later(error: Exception) -> bool | float:
    """Whether to ask again; the seconds until then where the endpoint says so."""
    if not isinstance(error, TransientEndpointError):
        return False
    _log.debug("endpoint_failed", error=error.message)
    return error.retry_after or True
