"""Reads logs in ranges as wide as the endpoint accepts, with the headers that verify them.

Endpoints reject a range with many different messages and codes, for its number of blocks or of
logs. After any rejection the range is halved, down to one block; `endpoint` remembers the accepted
size.

Logs and headers of one request come from one node. If the endpoint does not accept such a batch,
a lagging node may return no logs of a range while another node returns the headers of all of it.
Logs of the latest blocks are then requested by block hash, which fails if the node lacks the block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import structlog
from web3 import AsyncWeb3
from web3.exceptions import Web3RPCError

from deepsquare_chain.chain.rpc.batching import ask_all, ask_with_split
from deepsquare_chain.chain.rpc.responses import NodeError, classify, node_message
from deepsquare_chain.errors import EndpointError

#: Blocks per request if the provider has no limit of its own.
DEFAULT_RANGE: Final = 10_000
#: Confirmations after which every node behind an address is assumed to have a block.
COMMON_DEPTH: Final = 64
_log = structlog.get_logger(__name__)

RpcRequest = tuple[str, list[Any]]


@dataclass(frozen=True, slots=True)
class LogRange:
    """Raw logs of the blocks `first` to `last`, in JSON-RPC form.

    `before` and `after` are the header of the last block, read before and after the logs; None if
    the node does not have it. `more` holds the results of additional calls.
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
    more: Callable[[int], Sequence[RpcRequest]] = lambda _last: (),
) -> LogRange | None:
    """Read logs from a block on, as many blocks as the endpoint allows, up to `last`.

    Args:
        filters: Topics in the form of eth_getLogs; logs that match any of them are read.
        more: Returns additional calls for the same batch, given the last block that is read.

    Returns:
        The range; None if the node does not have all of it.

    Raises:
        EndpointError: The node does not answer, or rejects even one block.
    """
    split = False
    while True:
        batch_size = 2 + len(filters) + len(more(last))
        split = split or _batch_size(w3) < batch_size
        if split and last - first < COMMON_DEPTH:
            return await _read_block(w3, addresses, filters, first, more(first))
        common = last - COMMON_DEPTH if split else last
        step = min(common - first + 1, _log_range(w3))
        while True:
            until = first + step - 1
            try:
                blocks = range(first, until + 1)
                log_range, single_request = await _read(w3, addresses, filters, blocks, more(until))
            except Web3RPCError as error:
                if classify(error) is NodeError.UNKNOWN_BLOCK:
                    return None
                if step == 1:
                    raise _rejection(error) from None
                step //= 2
                _log.debug("log range halved", blocks=step)
            except EndpointError:
                if _log_range(w3) >= step:
                    raise
                break  # the failures have lowered the endpoint's range: retry with less
            else:
                if single_request or until <= last - COMMON_DEPTH:
                    return log_range
                split = True
                break


async def _read(
    w3: AsyncWeb3[Any],
    addresses: Sequence[str],
    filters: Sequence[Sequence[Any]],
    blocks: range,
    more: Sequence[RpcRequest],
) -> tuple[LogRange, bool]:
    """Read a range as one batch; also return whether one request held it."""
    first, last = blocks[0], blocks[-1]
    query = {"fromBlock": hex(first), "toBlock": hex(last), "address": list(addresses)}
    header: RpcRequest = ("eth_getBlockByNumber", [hex(last), False])
    logs: list[RpcRequest] = [
        ("eth_getLogs", [{**query, "topics": list(topics)}]) for topics in filters
    ]
    results, single_request = await ask_with_split(w3, [header, *logs, header, *more])
    before, *rest = results
    log_lists, (after, *further) = rest[: len(logs)], rest[len(logs) :]
    flat = [log for part in log_lists for log in part]
    return LogRange(first, last, flat, before, after, tuple(further)), single_request


async def _read_block(
    w3: AsyncWeb3[Any],
    addresses: Sequence[str],
    filters: Sequence[Sequence[Any]],
    number: int,
    more: Sequence[RpcRequest],
) -> LogRange | None:
    """Read one block, its logs by block hash (EIP-234); None if a node does not have it yet."""
    requests: list[RpcRequest] = [("eth_getBlockByNumber", [hex(number), False]), *more]
    try:
        header, *further = await ask_all(w3, requests)
        if header is None:
            return None
        query = {"blockHash": header["hash"], "address": list(addresses)}
        log_lists = await ask_all(
            w3, [("eth_getLogs", [{**query, "topics": list(topics)}]) for topics in filters]
        )
    except Web3RPCError as error:
        if classify(error) is NodeError.UNKNOWN_BLOCK:
            return None
        raise _rejection(error) from None
    flat = [log for part in log_lists for log in part]
    return LogRange(number, number, flat, header, header, tuple(further))


async def read_logs(
    w3: AsyncWeb3[Any],
    addresses: Sequence[str],
    topics: Sequence[Any],
    first: int,
    last: int | None = None,
) -> list[Mapping[str, Any]]:
    """Read all logs of contracts from block `first` to `last`, by default the head.

    Raises:
        EndpointError: The node does not answer, rejects even one block, or lacks a block.
    """
    head = int(await w3.eth.block_number) if last is None else last
    logs: list[Mapping[str, Any]] = []
    while first <= head:
        log_range = await read_range(w3, addresses, [topics], first, head)
        if log_range is None or log_range.after is None:
            raise EndpointError(
                f"The node does not have all blocks up to {head}", hint="Try again."
            )
        logs += log_range.logs
        first = log_range.last + 1
    return logs


def _log_range(w3: AsyncWeb3[Any]) -> int:
    """Return the number of blocks per request that the endpoint accepts, if known."""
    return int(getattr(w3.provider, "log_range", DEFAULT_RANGE))


def _batch_size(w3: AsyncWeb3[Any]) -> int:
    """Return the number of calls per request that the endpoint accepts, if known."""
    return int(getattr(w3.provider, "batch_size", DEFAULT_RANGE))


def _rejection(error: Web3RPCError) -> EndpointError:
    return EndpointError(f"The node rejected a request for logs: {node_message(error)}")
