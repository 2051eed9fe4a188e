"""The one reader of logs: ranges as wide as the endpoint takes, with the headers that vouch for them.

An endpoint refuses a range in many words and with many codes, for its blocks or for what is in
them. Whatever it says, the range is halved, down to one block; `endpoint` remembers what it took.

Logs and headers of one request come from one node. Where the endpoint takes no such batch, a node
that lags may return no logs of a range while another node returns the headers of all of it.
Logs of the latest blocks are then asked for by block hash: a node knows the block or says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import structlog
from web3 import AsyncWeb3
from web3.exceptions import Web3RPCError

from deepsquare_chain.chain.rpc.batching import ask_all, ask_together
from deepsquare_chain.chain.rpc.node_errors import NodeError, classify, node_message
from deepsquare_chain.errors import EndpointError

#: Blocks of one question where the connection knows nothing of its endpoints.
DEFAULT_RANGE: Final = 10_000
#: Blocks on top of a block that every node behind an address has seen.
COMMON_DEPTH: Final = 64
_log = structlog.get_logger(__name__)

Question = tuple[str, list[Any]]


@dataclass(frozen=True, slots=True)
class LogRange:
    """Raw logs of the blocks `first` to `last`, as JSON-RPC gives them.

    `before` and `after` are the header of the last block, asked for before and after the logs;
    None where the node does not know it. `more` answers further questions.
    """

    first: int
    last: int
    logs: list[Mapping[str, Any]]
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None
    more: tuple[Any, ...] = ()


async def read_range(
    w3: AsyncWeb3[Any],
    addresses: Sequence[str],
    filters: Sequence[Sequence[Any]],
    first: int,
    last: int,
    *,
    more: Callable[[int], Sequence[Question]] = lambda _last: (),
) -> LogRange | None:
    """Logs from a block on, as far as the endpoint gives them at once, at most to `last`.

    Args:
        w3: The connection.
        addresses: Contracts whose logs are wanted.
        filters: Topics as eth_getLogs takes them; logs of any of these are read.
        first: First block.
        last: Last block, not before the first.
        more: Further questions of the same batch, given the last block that is read.

    Returns:
        The range; None where the node has not seen all of it.

    Raises:
        EndpointError: The node does not answer, or refuses even one block.
    """
    split = False
    while True:
        questions = 2 + len(filters) + len(more(last))
        split = split or _batch(w3) < questions
        if split and last - first < COMMON_DEPTH:
            return await _read_block(w3, addresses, filters, first, more(first))
        common = last - COMMON_DEPTH if split else last
        step = min(common - first + 1, _step(w3))
        while True:
            until = first + step - 1
            try:
                blocks = range(first, until + 1)
                found, gather_all = await _read(w3, addresses, filters, blocks, more(until))
            except Web3RPCError as error:
                if classify(error) is NodeError.UNKNOWN_BLOCK:
                    return None
                if step == 1:
                    raise _refusal(error) from None
                step //= 2
                _log.debug("range_halved", blocks=step)
            except EndpointError:
                if _step(w3) >= step:
                    raise
                break  # it failed so often that a smaller range is tried
            else:
                if gather_all or until <= last - COMMON_DEPTH:
                    return found
                split = True
                break


async def _read(
    w3: AsyncWeb3[Any],
    addresses: Sequence[str],
    filters: Sequence[Sequence[Any]],
    blocks: range,
    more: Sequence[Question],
) -> tuple[LogRange, bool]:
    """A range in one batch, and whether one request held it."""
    first, last = blocks[0], blocks[-1]
    query = {"fromBlock": hex(first), "toBlock": hex(last), "address": list(addresses)}
    header: Question = ("eth_getBlockByNumber", [hex(last), False])
    logs: list[Question] = [("eth_getLogs", [{**query, "topics": list(each)}]) for each in filters]
    answers, gather_all = await ask_together(w3, [header, *logs, header, *more])
    before, *rest = answers
    found, (after, *further) = rest[: len(logs)], rest[len(logs) :]
    flat = [log for some in found for log in some]
    return LogRange(first, last, flat, before, after, tuple(further)), gather_all


async def _read_block(
    w3: AsyncWeb3[Any],
    addresses: Sequence[str],
    filters: Sequence[Sequence[Any]],
    number: int,
    more: Sequence[Question],
) -> LogRange | None:
    """One block, its logs by its hash (EIP-234); None where a node does not know it yet."""
    asked: list[Question] = [("eth_getBlockByNumber", [hex(number), False]), *more]
    try:
        header, *further = await ask_all(w3, asked)
        if header is None:
            return None
        query = {"blockHash": header["hash"], "address": list(addresses)}
        found = await ask_all(
            w3, [("eth_getLogs", [{**query, "topics": list(each)}]) for each in filters]
        )
    except Web3RPCError as error:
        if classify(error) is NodeError.UNKNOWN_BLOCK:
            return None
        raise _refusal(error) from None
    flat = [log for some in found for log in some]
    return LogRange(number, number, flat, header, header, tuple(further))


async def read_logs(
    w3: AsyncWeb3[Any],
    addresses: Sequence[str],
    topics: Sequence[Any],
    first: int,
    last: int | None = None,
) -> list[Mapping[str, Any]]:
    """Logs of contracts from block `first` to `last`, the head by default; for one who waits.

    Raises:
        EndpointError: The node does not answer, refuses even one block, or has not seen all.
    """
    head = int(await w3.eth.block_number) if last is None else last
    logs: list[Mapping[str, Any]] = []
    while first <= head:
        found = await read_range(w3, addresses, [topics], first, head)
        if found is None or found.after is None:
            raise EndpointError(
                f"The node does not know all blocks up to {head}", hint="Try again."
            )
        logs += found.logs
        first = found.last + 1
    return logs


def _step(w3: AsyncWeb3[Any]) -> int:
    """Blocks that the endpoint takes, as far as is known."""
    return int(getattr(w3.provider, "log_range", DEFAULT_RANGE))


def _batch(w3: AsyncWeb3[Any]) -> int:
    """Questions that the endpoint takes in one request, as far as is known."""
    return int(getattr(w3.provider, "batch_size", DEFAULT_RANGE))


def _refusal(error: Web3RPCError) -> EndpointError:
    return EndpointError(f"The node refuses to give events: {node_message(error)}")
