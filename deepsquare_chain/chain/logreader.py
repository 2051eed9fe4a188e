"""The one reader of logs: ranges as wide as the endpoint takes, with the headers that vouch for them.

An endpoint refuses a range in many words and with many codes, for its blocks or for what is in
them. Whatever it says, the range is halved, down to one block; `endpoint` remembers what it took.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import structlog
from web3 import AsyncWeb3
from web3.exceptions import Web3RPCError

from deepsquare_chain.chain.nodeerrors import NodeError, classify, node_message
from deepsquare_chain.chain.questions import ask_all
from deepsquare_chain.errors import EndpointError

#: Blocks of one question where the connection knows nothing of its endpoints.
DEFAULT_RANGE: Final = 10_000
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
    while True:
        step = min(last - first + 1, _step(w3))
        while True:
            until = first + step - 1
            try:
                return await _read(w3, addresses, filters, range(first, until + 1), more(until))
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


async def _read(
    w3: AsyncWeb3[Any],
    addresses: Sequence[str],
    filters: Sequence[Sequence[Any]],
    blocks: range,
    more: Sequence[Question],
) -> LogRange:
    first, last = blocks[0], blocks[-1]
    query = {"fromBlock": hex(first), "toBlock": hex(last), "address": list(addresses)}
    header: Question = ("eth_getBlockByNumber", [hex(last), False])
    logs: list[Question] = [("eth_getLogs", [{**query, "topics": list(each)}]) for each in filters]
    before, *rest = await ask_all(w3, [header, *logs, header, *more])
    found, (after, *further) = rest[: len(logs)], rest[len(logs) :]
    together = [log for some in found for log in some]
    return LogRange(first, last, together, before, after, tuple(further))


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


def _refusal(error: Web3RPCError) -> EndpointError:
    return EndpointError(f"The node refuses to give events: {node_message(error)}")
