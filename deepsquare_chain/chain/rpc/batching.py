"""RPC batches: several calls in one request, if the endpoint supports it.

One node then answers the whole batch. The parts of a split batch may reach nodes of different
heights.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Final, TypeVar

from web3 import AsyncWeb3
from web3.exceptions import Web3RPCError
from web3.types import RPCEndpoint, RPCResponse

from deepsquare_chain.chain.rpc.endpoint import SplitResponses
from deepsquare_chain.errors import EndpointError

T = TypeVar("T")
#: Calls per RPC batch, small enough for hosted endpoints.
BATCH: Final = 100


async def ask_all(w3: AsyncWeb3[Any], requests: Sequence[tuple[str, list[Any]]]) -> list[Any]:
    """Send calls as a batch and return their raw results in order; None for a null result.

    Raises:
        EndpointError: The node does not answer.
        Web3RPCError: The node rejected one of the calls.
    """
    results, _ = await ask_with_split(w3, requests)
    return results


async def block_headers(
    w3: AsyncWeb3[Any], numbers: Sequence[int]
) -> AsyncIterator[tuple[int, Mapping[str, Any] | None]]:
    """Yield blocks without their transactions, by number; None for one that the node lacks.

    Raises the errors of `ask_all`.
    """
    for chunk in chunks(numbers, BATCH):
        requests = [("eth_getBlockByNumber", [hex(number), False]) for number in chunk]
        for number, header in zip(chunk, await ask_all(w3, requests), strict=True):
            yield number, header


def chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Split items into chunks of at most `size`."""
    return [items[start : start + size] for start in range(0, len(items), size)]


async def ask_with_split(
    w3: AsyncWeb3[Any], requests: Sequence[tuple[str, list[Any]]]
) -> tuple[list[Any], bool]:
    """Return the raw results of calls in order, and whether one request held all of them.

    Raises:
        EndpointError: The node does not answer.
        Web3RPCError: The node rejected one of the calls.
    """
    if not requests:
        return [], True
    batch = [(RPCEndpoint(method), params) for method, params in requests]
    provider: Any = w3.provider
    responses: list[RPCResponse] | RPCResponse = await provider.make_batch_request(batch)
    if not isinstance(responses, list):
        # This provider does not split batches itself.
        responses = SplitResponses(
            [await provider.make_request(method, params) for method, params in batch]
        )
    for response in responses:
        if "error" in response:
            raise Web3RPCError(str(response["error"])[:300], rpc_response=response)
    return [response["result"] for response in responses], not isinstance(responses, SplitResponses)


RpcRequests = list[tuple[RPCEndpoint, Any]]
#: Sends a batch; returns None if more than one request was needed.
AskOnce = Callable[[RpcRequests], Awaitable[list[RPCResponse] | None]]
#: The calls of a waiting task, and its responses; None if it must send the calls itself.
_Waiting = tuple[RpcRequests, asyncio.Future[list[RPCResponse] | None]]

_ROUND: ContextVar[MergingRound | None] = ContextVar("requests to merge", default=None)


class MergingRound:
    """Merges the calls of concurrent tasks into common batches."""

    def __init__(self, provider: object) -> None:
        self.provider = provider
        self._waiting: list[_Waiting] = []
        self._task: asyncio.Task[None] | None = None

    async def ask(
        self, requests: RpcRequests, ask_once: AskOnce, max_batch: int
    ) -> list[RPCResponse] | None:
        """Return responses in the order of the calls; None if the caller must send them itself.

        Args:
            requests: Calls of one task; they stay in one batch.
            ask_once: Sends a batch with the calls of several tasks.
            max_batch: Number of calls that the endpoint accepts in one request, if known.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[RPCResponse] | None] = loop.create_future()
        self._waiting.append((requests, future))
        if len(self._waiting) == 1:
            loop.call_soon(self._begin, 0, ask_once, max_batch)
        return await future

    def _begin(self, waiting_before: int, ask_once: AskOnce, max_batch: int) -> None:
        """Send the batches once an iteration of the event loop has added no further calls."""
        if len(self._waiting) != waiting_before:
            asyncio.get_running_loop().call_soon(
                self._begin, len(self._waiting), ask_once, max_batch
            )
            return
        waiting, self._waiting = self._waiting, []
        # The reference keeps the task alive; the event loop holds only a weak one.
        self._task = asyncio.ensure_future(_send_all(waiting, ask_once, max_batch))


async def _send_all(waiting: Sequence[_Waiting], ask_once: AskOnce, max_batch: int) -> None:
    """Send all calls in as few batches as possible; the calls of one task stay together."""
    groups: list[list[_Waiting]] = []
    free = 0
    for requests, future in waiting:
        if not groups or len(requests) > free:
            groups.append([])
            free = max_batch
        groups[-1].append((requests, future))
        free -= len(requests)
    try:
        await asyncio.gather(*(_send_group(group, ask_once) for group in groups))
    finally:
        for _, future in waiting:
            if not future.done():
                future.set_result(None)


async def _send_group(group: Sequence[_Waiting], ask_once: AskOnce) -> None:
    responses: list[RPCResponse] | None = None
    if len(group) > 1:
        # After a failure each task sends its own calls, with its own retries.
        with suppress(EndpointError):
            responses = await ask_once([item for requests, _ in group for item in requests])
    start = 0
    for requests, future in group:
        task_responses = None if responses is None else responses[start : start + len(requests)]
        start += len(requests)
        if task_responses is not None and any("error" in item for item in task_responses):
            task_responses = None
        if not future.done():  # the waiting task may be cancelled
            future.set_result(task_responses)


@contextmanager
def merged(w3: AsyncWeb3[Any]) -> Iterator[None]:
    """Merge the concurrent calls to this connection by tasks that are created inside."""
    token = _ROUND.set(MergingRound(w3.provider))
    try:
        yield
    finally:
        _ROUND.reset(token)


def round_of(provider: object) -> MergingRound | None:
    """Return the round of the running task; None if its calls are not merged."""
    current = _ROUND.get()
    return current if current is not None and current.provider is provider else None


async def gather_all(*work: Awaitable[T]) -> list[T]:
    """Run awaitables concurrently and return their results in order.

    An error is raised only after all have ended, so that no work of one cycle runs into the next.
    """
    results = await asyncio.gather(*work, return_exceptions=True)
    done: list[T] = []
    for result in results:
        if isinstance(result, BaseException):
            raise result
        done.append(result)
    return done
