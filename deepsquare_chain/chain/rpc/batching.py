"""RPC batches: several questions to a node, in one request where the endpoint takes that.

One node then answers all of them. The parts of a split batch may reach nodes of different heights.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from web3 import AsyncWeb3
from web3.exceptions import Web3RPCError
from web3.types import RPCEndpoint, RPCResponse

from deepsquare_chain.chain.rpc.endpoint import SplitAnswers
from deepsquare_chain.errors import EndpointError


async def ask_all(w3: AsyncWeb3[Any], asked: Sequence[tuple[str, list[Any]]]) -> list[Any]:
    """Raw results in the order of the questions; null where the node has nothing.

    Raises:
        EndpointError: The node does not answer.
        Web3RPCError: It refused one of them.
    """
    results, _ = await ask_together(w3, asked)
    return results


async def ask_together(
    w3: AsyncWeb3[Any], asked: Sequence[tuple[str, list[Any]]]
) -> tuple[list[Any], bool]:
    """Raw results in the order of the questions, and whether one request held all of them.

    Raises:
        EndpointError: The node does not answer.
        Web3RPCError: It refused one of them.
    """
    if not asked:
        return [], True
    batch = [(RPCEndpoint(method), params) for method, params in asked]
    provider: Any = w3.provider
    answers: list[RPCResponse] | RPCResponse = await provider.make_batch_request(batch)
    if not isinstance(answers, list):
        # A connection that does not split batches itself.
        answers = SplitAnswers(
            [await provider.make_request(method, params) for method, params in batch]
        )
    for answer in answers:
        if "error" in answer:
            raise Web3RPCError(str(answer["error"])[:300], rpc_response=answer)
    return [answer["result"] for answer in answers], not isinstance(answers, SplitAnswers)


Questions = list[tuple[RPCEndpoint, Any]]
#: Asks a batch; None where more than one request was needed.
AskOnce = Callable[[Questions], Awaitable[list[RPCResponse] | None]]

T = TypeVar("T")
_ROUND: ContextVar[Round | None] = ContextVar("requests to merge", default=None)


class Round:
    """Questions of tasks that run at the same time.

    Args:
        provider: The connection whose questions are merged.
    """

    def __init__(self, provider: object) -> None:
        self.provider = provider
        self._waiting: list[tuple[Questions, asyncio.Future[list[RPCResponse] | None]]] = []
        self._task: asyncio.Task[None] | None = None

    async def ask(
        self, questions: Questions, ask_once: AskOnce, most: int
    ) -> list[RPCResponse] | None:
        """Answers in the order of the questions; None where the reader must ask by itself.

        Args:
            questions: Of one reader; they stay in one batch.
            ask_once: Asks a batch of several readers.
            most: Questions that the endpoint takes in one request, as far as is known.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[RPCResponse] | None] = loop.create_future()
        self._waiting.append((questions, future))
        if len(self._waiting) == 1:
            loop.call_soon(self._begin, 0, ask_once, most)
        return await future

    def _begin(self, seen: int, ask_once: AskOnce, most: int) -> None:
        """Ask as soon as a turn of the event loop has brought no further question."""
        if len(self._waiting) != seen:
            asyncio.get_running_loop().call_soon(self._begin, len(self._waiting), ask_once, most)
            return
        waiting, self._waiting = self._waiting, []
        # Kept, as the event loop does not keep its tasks alive.
        self._task = asyncio.ensure_future(_ask_all(waiting, ask_once, most))


async def _ask_all(
    waiting: Sequence[tuple[Questions, asyncio.Future[list[RPCResponse] | None]]],
    ask_once: AskOnce,
    most: int,
) -> None:
    """Ask for all in as few batches as the endpoint takes; each reader's stay together."""
    packs: list[list[int]] = []
    free = 0
    for place, (questions, _) in enumerate(waiting):
        if not packs or len(questions) > free:
            packs.append([])
            free = most
        packs[-1].append(place)
        free -= len(questions)
    try:
        await asyncio.gather(
            *(_ask_pack([waiting[place] for place in pack], ask_once) for pack in packs)
        )
    finally:
        for _, future in waiting:
            if not future.done():
                future.set_result(None)


async def _ask_pack(
    pack: Sequence[tuple[Questions, asyncio.Future[list[RPCResponse] | None]]], ask_once: AskOnce
) -> None:
    answers: list[RPCResponse] | None = None
    if len(pack) > 1:
        try:
            answers = await ask_once([each for questions, _ in pack for each in questions])
        except EndpointError:
            answers = None  # each reader finds out by itself, and tries again as it sees fit
    at = 0
    for questions, future in pack:
        own = None if answers is None else answers[at : at + len(questions)]
        at += len(questions)
        if own is not None and any("error" in each for each in own):
            own = None
        if not future.done():  # its reader may be cancelled
            future.set_result(own)


@contextmanager
def merged(w3: AsyncWeb3[Any]) -> Iterator[None]:
    """Merge what tasks that begin inside ask of this connection at the same moment."""
    token = _ROUND.set(Round(w3.provider))
    try:
        yield
    finally:
        _ROUND.reset(token)


def round_of(provider: object) -> Round | None:
    """The round that the running task belongs to; None where its requests are not merged."""
    found = _ROUND.get()
    return found if found is not None and found.provider is provider else None


async def gather_all(*work: Awaitable[T]) -> list[T]:
    """Results in order; an error is raised only after everything has ended.

    What a cycle began must not go on behind the back of the next one.
    """
    results = await asyncio.gather(*work, return_exceptions=True)
    done: list[T] = []
    for result in results:
        if isinstance(result, BaseException):
            raise result
        done.append(result)
    return done
