"""Follows the events of our contracts: in order, exactly once, across restarts and reorgs.

Each range of confirmed blocks is read with its boundary headers in one batch, so that one node
answers all of it. Effects and cursor are committed in one transaction of the store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

import structlog
from web3 import AsyncWeb3
from web3.exceptions import Web3RPCError

from deepsquare_chain.chain.bindings.events import Event, decode_logs
from deepsquare_chain.chain.rpc.batching import ask_all
from deepsquare_chain.chain.rpc.heads import seconds_idle
from deepsquare_chain.chain.rpc.log_reader import RpcRequest, read_range
from deepsquare_chain.chain.rpc.responses import NodeError, classify, node_message
from deepsquare_chain.errors import EndpointError, GridError
from deepsquare_chain.faults import crash_point

if TYPE_CHECKING:
    from deepsquare_chain.observability.metrics import Metrics

MAX_RANGE: Final = 10_000
#: Hashes kept to find the common ancestor of two branches.
KEPT_BLOCKS: Final = 256
_log = structlog.get_logger(__name__)

T = TypeVar("T")


class ReorgTooDeepError(GridError):
    """A reorg replaced blocks that are too old; it is not rolled back without an operator."""


@dataclass(frozen=True, slots=True)
class Block:
    """Number and hash of a block."""

    number: int
    hash: str


@dataclass(frozen=True, slots=True)
class Batch:
    """The events of a range of blocks, or a rollback.

    A batch with `rolled_back_to` holds no events: everything after that block is undone, and later
    batches contain the new events. `time` is the chain time of `to_block`.
    """

    events: tuple[Event, ...]
    from_block: int
    to_block: int
    rolled_back_to: int | None = None
    time: int = 0


class CursorStore(Protocol[T]):
    """Durable cursor of a follower; T is the type that `begin` yields, such as a connection."""

    def begin(self) -> AbstractContextManager[T]:
        """Open a transaction: committed at the end of the with block, rolled back if it raises."""

    def recent_blocks(self, name: str) -> Sequence[Block]:
        """Return the kept blocks of a follower, latest first; the first one is its cursor."""

    def advance(self, transaction: T, name: str, blocks: Sequence[Block], keep: int) -> None:
        """Move the cursor to the last of these blocks and keep the latest `keep`."""

    def rewind(self, transaction: T, name: str, number: int) -> None:
        """Move the cursor back to a kept block; a number below all kept blocks removes it."""


Apply = Callable[[Batch, T], None]
#: Reads more data about a batch before it is applied; False if the data does not match the batch.
Prepare = Callable[[Batch], Awaitable[bool]]


class Follower(Generic[T]):
    """Reads the events of contracts in batches and keeps a durable cursor.

    Args:
        store: Stores the cursor; effects are committed in the same transaction.
        start_block: First block that can hold events, such as the deployment's.
        confirmations: Blocks required on top of a block before it is read; 0 is used on a chain
            that mines on demand and is idle.
        name: Name of the cursor, for a store with several followers.
        filters: Topics of the wanted logs, in the form of eth_getLogs (see `event_filter`). Logs
            that match any filter are read; no log may match two. All logs by default.
        max_range: Maximum number of blocks in one request.
        threaded: Apply batches in a thread, for slow effects; the store must support it.
        settled: Confirmations after which irreversible actions may follow from a block: a reorg
            that replaces such a block stops the follower. None if everything can be undone.
        metrics: Receives the number of blocks that the follower lags behind, also during reads.
    """

    def __init__(
        self,
        w3: AsyncWeb3[Any],
        addresses: Iterable[str],
        store: CursorStore[T],
        *,
        start_block: int,
        confirmations: int = 1,
        name: str = "main",
        filters: Sequence[Sequence[Any]] = ((),),
        max_range: int = MAX_RANGE,
        threaded: bool = False,
        settled: int | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.w3 = w3
        self.name = name
        self.head = -1  # the highest head that was reported
        self._addresses = list(addresses)
        self._lower_addresses = {item.lower() for item in self._addresses}
        self._store = store
        self._start = start_block
        self._confirmations = confirmations
        self._filters = [list(item) for item in filters]
        self._max_range = max_range
        self._threaded = threaded
        self._settled = None if settled is None else max(0, settled - confirmations)
        self._settled_cursor = f"{name}.settled"  # cursor of the highest settled block
        description = "Confirmed blocks whose events were not processed yet."
        self._lag = None if metrics is None else metrics.gauge("follower_lag_blocks", description)

    @property
    def position(self) -> int:
        """Last block whose effects are committed; start_block - 1 before the first one."""
        known = self._store.recent_blocks(self.name)
        return known[0].number if known else self._start - 1

    async def poll(
        self, apply: Apply[T], *, prepare: Prepare | None = None, head: int | None = None
    ) -> int:
        """Read and apply all confirmed blocks; return the number of events.

        Args:
            apply: Called as `apply(batch, transaction)` in chain order, inside the transaction
                that moves the cursor; it must not block.
            prepare: Called as `prepare(batch)` before `apply`, to read data beyond the events. If
                it returns False (a reorg replaced the blocks), the next poll reads the batch again.
            head: Number of the latest block; requested from the node if not given.

        Raises:
            EndpointError: The node does not answer, or rejects even a range of one block.
            ReorgTooDeepError: A reorg replaced a settled block, or more blocks than are kept.
        """
        if head is None:
            head = int(await self.w3.eth.block_number)
        self.head = max(self.head, head)
        # If blocks are mined on demand only, the last block would never get confirmations.
        depth = 0 if self._confirmations and await seconds_idle(self.w3) else self._confirmations
        count = 0
        while True:
            known = self._store.recent_blocks(self.name)
            first = known[0].number + 1 if known else self._start
            self._show_lag(head - depth - first + 1)
            last = min(head - depth, first + self._max_range - 1)
            if last < first:
                # No new blocks; the cursor's hash still reveals a reorg to the same height.
                if known and not await self._is_canonical(known[0]):
                    await self._roll_back(known, apply)
                    continue
                return count
            read = await self._read(known[0] if known else None, first, last)
            if read is None:
                return count
            if isinstance(read, _Reorg):
                await self._roll_back(known, apply)
                continue
            if prepare is not None and not await prepare(read.batch):
                return count
            if self._threaded:
                await asyncio.to_thread(self._commit, read, apply)
            else:
                self._commit(read, apply)
            count += len(read.batch.events)
            if read.batch.to_block == head - depth:
                self._show_lag(0)
                return count

    def _show_lag(self, blocks: int) -> None:
        if self._lag is not None:
            self._lag.set(max(0, blocks))

    # -- reading

    async def _read(
        self, cursor: Block | None, first: int, last: int
    ) -> _ReadRange | _Reorg | None:
        """Read one range; None if the responses are inconsistent, so that the next poll retries."""
        log_range = await read_range(
            self.w3,
            self._addresses,
            self._filters,
            first,
            last,
            more=lambda until: self._landmarks(cursor, until),
        )
        if log_range is None:
            return None
        before, after, headers = log_range.before, log_range.after, log_range.more
        last = log_range.last
        if before is None or after is None or before["hash"] != after["hash"]:
            return None  # the node lags behind the head of another node, or a reorg is under way
        if cursor is not None and (headers[0] is None or headers[0]["hash"] != cursor.hash):
            return None if headers[0] is None else _Reorg()
        blocks = self._blocks(log_range.logs, first, Block(last, after["hash"]))
        if blocks is None:
            return None
        batch = Batch(
            tuple(decode_logs(log_range.logs)), first, last, time=int(after["timestamp"], 16)
        )
        settled_number = last - (self._settled or 0)
        return _ReadRange(
            batch, blocks, self._settled_block(settled_number, after, headers[cursor is not None :])
        )

    def _landmarks(self, cursor: Block | None, last: int) -> list[RpcRequest]:
        """Return requests for the headers of the cursor and of the block that becomes settled."""
        settled_number = last - (self._settled or 0)
        numbers = [] if cursor is None else [cursor.number]
        numbers += [settled_number] if self._settled and settled_number >= self._start else []
        return [("eth_getBlockByNumber", [hex(number), False]) for number in numbers]

    def _settled_block(self, number: int, last: Any, rest: Sequence[Any]) -> Block | None:
        """Return the block that is settled once a range is read; None without `settled`."""
        if self._settled is None or number < self._start:
            return None
        header = rest[0] if self._settled else last
        return None if header is None else Block(number, header["hash"])

    def _blocks(self, logs: Any, first: int, last: Block) -> list[Block] | None:
        """Return the blocks to keep: those with events, and the last one.

        None if two logs give different hashes for one block.

        Raises:
            EndpointError: The response has other logs than requested.
        """
        hashes = {last.number: last.hash}
        try:
            sources = [
                (int(log["blockNumber"], 16), str(log["blockHash"]), log["address"].lower())
                for log in logs
            ]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise EndpointError(f"The node returned invalid logs: {str(error)[:200]}") from None
        for number, block_hash, address in sources:
            if not first <= number <= last.number or address not in self._lower_addresses:
                raise EndpointError("The node returned invalid logs: other logs than requested")
            if hashes.setdefault(number, block_hash) != block_hash:
                return None
        return [Block(number, hashes[number]) for number in sorted(hashes)]

    async def _is_canonical(self, block: Block) -> bool:
        """Return whether a block is still on the chain; True if the node can't tell."""
        requests = [("eth_getBlockByNumber", [hex(block.number), False])]
        try:
            (header,) = await ask_all(self.w3, requests)
        except Web3RPCError as error:
            if classify(error) is NodeError.UNKNOWN_BLOCK:
                return True
            raise EndpointError(
                f"The node rejected a request for blocks: {node_message(error)}"
            ) from None
        return header is None or header["hash"] == block.hash

    # -- committing

    def _commit(self, read: _ReadRange, apply: Apply[T]) -> None:
        crash_point("follower.read")
        settled, known = read.settled, self._store.recent_blocks(self._settled_cursor)
        if settled is not None and known and known[0].number >= settled.number:
            settled = None  # read again after a rollback: the settled block never moves back
        with self._store.begin() as transaction:
            apply(read.batch, transaction)
            crash_point("follower.applied")
            self._store.advance(transaction, self.name, read.blocks, KEPT_BLOCKS)
            if settled is not None:
                self._store.advance(transaction, self._settled_cursor, [settled], 1)
        crash_point("follower.committed")

    async def _roll_back(self, known: Sequence[Block], apply: Apply[T]) -> None:
        """Find the latest kept block that is still on the chain, and undo everything after it.

        Raises:
            ReorgTooDeepError: A settled block, or all kept blocks, were replaced.
        """
        await self._check_settled()
        for block in known[1:]:
            if await self._is_canonical(block):
                break
        else:
            if len(known) >= KEPT_BLOCKS:
                raise _too_deep_error(known[-1])
            block = Block(self._start - 1, "")
        _log.warning("chain reorganised", cursor=known[0].number, back_to=block.number)
        batch = Batch((), block.number + 1, known[0].number, rolled_back_to=block.number)
        with self._store.begin() as transaction:
            apply(batch, transaction)
            self._store.rewind(transaction, self.name, block.number)
        crash_point("follower.rolled_back")

    async def _check_settled(self) -> None:
        """Raise `ReorgTooDeepError` if a settled block was replaced: an operator must decide."""
        for block in self._store.recent_blocks(self._settled_cursor):
            if not await self._is_canonical(block):
                raise _too_deep_error(block)


def _too_deep_error(block: Block) -> ReorgTooDeepError:
    return ReorgTooDeepError(
        f"The chain replaced block {block.number}, which had enough confirmations, and everything after it",
        hint="If the chain is another one or was restarted, start with an empty state folder. Otherwise "
        "find the cause before you restart the service, and consider more --confirmations.",
    )


@dataclass(frozen=True, slots=True)
class _ReadRange:
    batch: Batch
    blocks: list[Block]
    settled: Block | None


@dataclass(frozen=True, slots=True)
class _Reorg:
    """The cursor's block is no longer on the chain."""
