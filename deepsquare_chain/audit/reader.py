"""Reads all events of a grid and the storage of its contracts from a node, without the index."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from web3 import AsyncWeb3
from web3.exceptions import Web3RPCError

from deepsquare_chain.audit.conservation import Storage
from deepsquare_chain.audit.ledger import Ledger
from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.bindings.deployment import Deployment
from deepsquare_chain.chain.bindings.events import Event, decode_logs
from deepsquare_chain.chain.rpc.batching import block_headers, chunks
from deepsquare_chain.chain.rpc.log_reader import read_range
from deepsquare_chain.chain.rpc.responses import node_message
from deepsquare_chain.errors import EndpointError

T = TypeVar("T")
_BATCH: Final = 50
_ATTEMPTS: Final = 3


class LogSink(Protocol):
    """Receives the raw logs while events are read, in chain order."""

    def begin(self) -> None:
        """Start a new read. Called again if a reorg forces the read to restart."""

    def take(self, logs: Sequence[Mapping[str, Any]]) -> None:
        """Receive the logs of some blocks in JSON-RPC form."""


#: Called with the last block that was read and the last block to read.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class EventHistory:
    """All events of the three contracts up to a block, with the time of each block that has events.

    `block_hash` and `time` belong to the last block. Times are chain time in seconds.
    """

    events: tuple[Event, ...]
    block_times: Mapping[int, int]
    to_block: int
    block_hash: str
    time: int

    def ledger(self, deployment: Deployment) -> Ledger:
        """Replay the events into a ledger.

        Raises:
            AuditError: The time of a block is missing.
        """
        return Ledger.replay(
            self.events, deployment, self.block_times, to_block=self.to_block, now=self.time
        )


async def read_history(
    w3: AsyncWeb3[Any],
    deployment: Deployment,
    *,
    to_block: int | None = None,
    progress: Progress | None = None,
    sink: LogSink | None = None,
) -> EventHistory:
    """Read all events from the deployment up to a block, by default the current head.

    Raw logs are not kept; pass a `sink` to receive them.

    Raises:
        EndpointError: The node does not answer, refuses a range of even one block, or reorgs
            interrupt every attempt.
    """
    for _ in range(_ATTEMPTS):
        last = int(await w3.eth.block_number) if to_block is None else to_block
        try:
            history = await _read_once(w3, deployment, last, progress, sink)
        except Web3RPCError as error:
            message = f"The node rejected a request for logs: {node_message(error)}"
            raise EndpointError(message) from None
        if history is not None:
            return history
    raise EndpointError(
        "The chain was reorganised while it was read",
        hint="Try again, or read up to an older block.",
    )


async def read_storage(contracts: Contracts, ledger: Ledger, block: int) -> Storage:
    """Read the contracts' storage at a block: all jobs, all providers, and the ledger's accounts.

    Raises:
        EndpointError: The node does not answer, or has no state of that block.
    """
    credit, scheduler = contracts.credit, contracts.scheduler
    accounts = sorted({*ledger.accounts, *ledger.balances})
    count = await scheduler.job_count(block=block)
    jobs, providers, supply = await asyncio.gather(
        scheduler.get_jobs(range(1, count + 1), block=block),
        contracts.registry.providers(block=block),
        credit.total_supply(block=block),
    )
    balances, parked = await asyncio.gather(
        request_each(lambda key: credit.balance_of(key, block=block), accounts),
        request_each(lambda key: scheduler.parked_of(key, block=block), accounts),
    )
    ids = {provider.account: provider.id for provider in providers}
    loads = await request_each(lambda key: scheduler.load_of(ids[key], block=block), list(ids))
    return Storage(block, jobs, providers, balances, parked, supply, loads)


async def request_each(request: Callable[[str], Awaitable[T]], keys: Sequence[str]) -> dict[str, T]:
    """Return the result of the request for each key; 50 requests are sent concurrently."""
    results: dict[str, T] = {}
    for batch in chunks(keys, _BATCH):
        results |= zip(batch, await asyncio.gather(*map(request, batch)), strict=True)
    return results


async def read_ledger(
    contracts: Contracts, *, to_block: int | None = None, progress: Progress | None = None
) -> tuple[Ledger, int]:
    """Return the ledger of a grid and its last block. Raises the errors of `read_history`."""
    history = await read_history(
        contracts.w3, contracts.deployment, to_block=to_block, progress=progress
    )
    return history.ledger(contracts.deployment), history.to_block


async def _read_once(
    w3: AsyncWeb3[Any],
    deployment: Deployment,
    last: int,
    progress: Progress | None,
    sink: LogSink | None,
) -> EventHistory | None:
    """Read all events from the deployment to a block; None if a reorg happened meanwhile."""
    anchor = await _header(w3, last)
    events: list[Event] = []
    hashes: dict[int, str] = {}  # of every block with a log, also of events that the audit ignores
    first = deployment.block
    if sink is not None:
        sink.begin()
    while first <= last:
        chunk = await read_range(w3, deployment.addresses, [()], first, last)
        if chunk is None or chunk.after is None:
            # The node lags behind. Blocks that it does not have yet are not empty.
            raise EndpointError(
                f"The node does not have all blocks up to {last} yet", hint="Try again."
            )
        events += decode_logs(chunk.logs)
        hashes |= {int(log["blockNumber"], 16): log["blockHash"] for log in chunk.logs}
        if sink is not None:
            sink.take(sorted(chunk.logs, key=log_position))
        first = chunk.last + 1
        if progress is not None:
            progress(chunk.last, last)
    times = await _times(w3, hashes)
    if times is None or (await _header(w3, last))["hash"] != anchor["hash"]:
        return None
    return EventHistory(tuple(events), times, last, anchor["hash"], int(anchor["timestamp"], 16))


async def _times(w3: AsyncWeb3[Any], hashes: Mapping[int, str]) -> dict[int, int] | None:
    """Return the time of each block of these hashes by number; None if a block was replaced."""
    times: dict[int, int] = {}
    async for number, header in block_headers(w3, sorted(hashes)):
        if header is None or header["hash"] != hashes[number]:
            return None
        times[number] = int(header["timestamp"], 16)
    return times


async def _header(w3: AsyncWeb3[Any], number: int) -> Mapping[str, Any]:
    [(_, header)] = [answer async for answer in block_headers(w3, [number])]
    if header is None:
        raise EndpointError(f"The node does not have block {number}")
    return header


def log_position(log: Mapping[str, Any]) -> tuple[int, int]:
    """Return block number and log index of a log in JSON-RPC form.

    Raises:
        ValueError: One of them is missing or invalid.
    """
    try:
        return int(str(log["blockNumber"]), 16), int(str(log["logIndex"]), 16)
    except KeyError as error:
        raise ValueError(f"{error} is missing") from None
