"""Follows the events of our contracts: in order, each once, through restarts and reorganisations.

Ranges of confirmed blocks are read with their boundary headers in one batch, so that one node
answers all of it; effects and cursor are committed in one transaction of the store.
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
from deepsquare_chain.chain.rpc.log_reader import Question, read_range
from deepsquare_chain.chain.rpc.node_errors import NodeError, classify, node_message
from deepsquare_chain.chain.rpc.on_demand import stands_still
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
    """The chain has replaced blocks that are too far back: nothing is undone without a person."""


@dataclass(frozen=True, slots=True)
class Block:
    """A block that was seen."""

    number: int
    hash: str


@dataclass(frozen=True, slots=True)
class Batch:
    """What happened in a range of blocks.

    With `rolled_back_to` it holds no events: everything after that block did not happen, and what
    replaced it follows in later batches. `time` is the chain time of `to_block`.
    """

    events: tuple[Event, ...]
    from_block: int
    to_block: int
    rolled_back_to: int | None = None
    time: int = 0


class CursorStore(Protocol[T]):
    """Durable memory of a follower; T is what its `begin` gives, such as a connection."""

    def begin(self) -> AbstractContextManager[T]:
        """A transaction: committed at the end of the block, undone if it raises."""

    def recent_blocks(self, name: str) -> Sequence[Block]:
        """The kept blocks of a follower, latest first; the first one is its cursor."""

    def advance(self, transaction: T, name: str, blocks: Sequence[Block], keep: int) -> None:
        """Move the cursor to the last of these blocks and keep the latest `keep`."""

    def rewind(self, transaction: T, name: str, number: int) -> None:
        """Move the cursor back to a kept block, or with a number below all to nothing."""


Apply = Callable[[Batch, T], None]
#: Reads more about a batch before it is applied; false where that does not fit the batch.
Prepare = Callable[[Batch], Awaitable[bool]]


class Follower(Generic[T]):
    """Reads events and remembers how far.

    Args:
        w3: Connection made by `connect`.
        addresses: Contracts whose events are wanted.
        store: Where the cursor is kept; effects go into the same transaction.
        start_block: First block that can hold events, such as the deployment's.
        confirmations: Blocks on top of a block before it is believed; none on a chain that mines
            only on demand and stands still.
        name: Of the cursor, where one store has several followers.
        filters: Topics of the wanted logs, as eth_getLogs takes them (see `event_filter`); logs of
            any of them are read, so that no log may fit two. All logs by default.
        max_range: Most blocks in one question.
        threaded: Apply batches in a thread, where that takes long; the store must allow it.
        settled: Blocks on top of a block after which something irreversible follows from it: its
            replacement stops the follower. None where everything can be undone.
        metrics: Where it shows how far it is behind, while it reads too.
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
        self.head = -1  # the highest head that was seen
        self._addresses = list(addresses)
        self._wanted = {each.lower() for each in self._addresses}
        self._store = store
        self._start = start_block
        self._confirmations = confirmations
        self._filters = [list(each) for each in filters]
        self._max_range = max_range
        self._threaded = threaded
        self._settled = None if settled is None else max(0, settled - confirmations)
        self._ground = f"{name}.settled"  # cursor of the highest settled block
        words = "Believed blocks whose events were not taken in yet."
        self._lag = None if metrics is None else metrics.gauge("follower_lag_blocks", words)

    @property
    def position(self) -> int:
        """The last block whose effects are committed; before the first one, start_block - 1."""
        known = self._store.recent_blocks(self.name)
        return known[0].number if known else self._start - 1

    async def poll(
        self, apply: Apply[T], *, prepare: Prepare | None = None, head: int | None = None
    ) -> int:
        """Read everything that is confirmed now; returns the number of events.

        `apply(batch, transaction)` is called in the order of the chain, inside the transaction
        that moves the cursor; it must not wait for anything. What it needs beyond the events is
        read by `prepare(batch)` before; if that says false (the blocks were replaced meanwhile),
        the next poll reads the batch again. `head` is the number of the latest block, for who
        knows it; it is asked for otherwise.

        Raises:
            EndpointError: The node does not answer, or refuses even a range of one block.
            ReorgTooDeepError: The chain replaced what was settled, or more blocks than are kept.
        """
        if head is None:
            head = int(await self.w3.eth.block_number)
        self.head = max(self.head, head)
        # Where the next block comes with the next transaction only, nobody confirms the last one.
        depth = 0 if self._confirmations and await stands_still(self.w3) else self._confirmations
        count = 0
        while True:
            known = self._store.recent_blocks(self.name)
            first = known[0].number + 1 if known else self._start
            self._show_lag(head - depth - first + 1)
            last = min(head - depth, first + self._max_range - 1)
            if last < first:
                # Nothing new; a branch of the same height shows itself in the cursor's hash.
                if known and not await self._holds(known[0]):
                    await self._roll_back(known, apply)
                    continue
                return count
            read = await self._read(known[0] if known else None, first, last)
            if read is None:
                return count
            if isinstance(read, _Moved):
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

    async def _read(self, cursor: Block | None, first: int, last: int) -> _Read | _Moved | None:
        """One range; None where the answers do not fit together, which the next poll repeats."""
        found = await read_range(
            self.w3,
            self._addresses,
            self._filters,
            first,
            last,
            more=lambda until: self._landmarks(cursor, until),
        )
        if found is None:
            return None
        before, after, rest, last = found.before, found.after, found.more, found.last
        if before is None or after is None or before["hash"] != after["hash"]:
            return None  # it lags behind the head that another node reported, or is being replaced
        if cursor is not None and (rest[0] is None or rest[0]["hash"] != cursor.hash):
            return None if rest[0] is None else _Moved()
        blocks = self._blocks(found.logs, first, Block(last, after["hash"]))
        if blocks is None:
            return None
        batch = Batch(tuple(decode_logs(found.logs)), first, last, time=int(after["timestamp"], 16))
        ground = last - (self._settled or 0)
        return _Read(batch, blocks, self._below(ground, after, rest[cursor is not None :]))

    def _landmarks(self, cursor: Block | None, last: int) -> list[Question]:
        """Headers that are read with a range: of the cursor, and of what is settled by it."""
        ground = last - (self._settled or 0)
        asked = [] if cursor is None else [cursor.number]
        asked += [ground] if self._settled and ground >= self._start else []
        return [("eth_getBlockByNumber", [hex(number), False]) for number in asked]

    def _below(self, number: int, last: Any, rest: Sequence[Any]) -> Block | None:
        """The block that is settled once a range is read, where somebody cares."""
        if self._settled is None or number < self._start:
            return None
        found = rest[0] if self._settled else last
        return None if found is None else Block(number, found["hash"])

    def _blocks(self, logs: Any, first: int, last: Block) -> list[Block] | None:
        """Blocks worth remembering: those with events and the last one; None if they disagree.

        Raises:
            EndpointError: These are not the logs that were asked for.
        """
        seen = {last.number: last.hash}
        try:
            found = [
                (int(log["blockNumber"], 16), str(log["blockHash"]), log["address"].lower())
                for log in logs
            ]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise EndpointError(f"The node gave no proper logs: {str(error)[:200]}") from None
        for number, block_hash, address in found:
            if not first <= number <= last.number or address not in self._wanted:
                raise EndpointError("The node gave no proper logs: not those that were asked for")
            if seen.setdefault(number, block_hash) != block_hash:
                return None
        return [Block(number, seen[number]) for number in sorted(seen)]

    async def _holds(self, block: Block) -> bool:
        """Whether a block is still on the chain; true where the node can't tell."""
        asked = [("eth_getBlockByNumber", [hex(block.number), False])]
        try:
            (found,) = await ask_all(self.w3, asked)
        except Web3RPCError as error:
            if classify(error) is NodeError.UNKNOWN_BLOCK:
                return True
            raise EndpointError(f"The node refuses to show blocks: {node_message(error)}") from None
        return found is None or found["hash"] == block.hash

    # -- committing

    def _commit(self, read: _Read, apply: Apply[T]) -> None:
        crash_point("follower.read")
        settled, known = read.settled, self._store.recent_blocks(self._ground)
        if settled is not None and known and known[0].number >= settled.number:
            settled = None  # read again after a rollback: what was settled stays so
        with self._store.begin() as transaction:
            apply(read.batch, transaction)
            crash_point("follower.applied")
            self._store.advance(transaction, self.name, read.blocks, KEPT_BLOCKS)
            if settled is not None:
                self._store.advance(transaction, self._ground, [settled], 1)
        crash_point("follower.committed")

    async def _roll_back(self, known: Sequence[Block], apply: Apply[T]) -> None:
        """Find the latest kept block that still stands and undo everything after it."""
        await self._stand_firm()
        for block in known[1:]:
            if await self._holds(block):
                break
        else:
            if len(known) >= KEPT_BLOCKS:
                raise _too_deep(known[-1])
            block = Block(self._start - 1, "")
        _log.warning("reorganisation", cursor=known[0].number, back_to=block.number)
        batch = Batch((), block.number + 1, known[0].number, rolled_back_to=block.number)
        with self._store.begin() as transaction:
            apply(batch, transaction)
            self._store.rewind(transaction, self.name, block.number)
        crash_point("follower.rolled_back")

    async def _stand_firm(self) -> None:
        """Undo nothing that irreversible things were built on: this takes a person."""
        for block in self._store.recent_blocks(self._ground):
            if not await self._holds(block):
                raise _too_deep(block)


def _too_deep(block: Block) -> ReorgTooDeepError:
    return ReorgTooDeepError(
        f"The chain replaced block {block.number}, which was believed, and everything after it",
        hint="Is it another chain, or restarted? Then begin with an empty state folder; otherwise "
        "look into it before going on, and think about more --confirmations.",
    )


@dataclass(frozen=True, slots=True)
class _Read:
    batch: Batch
    blocks: list[Block]
    settled: Block | None


@dataclass(frozen=True, slots=True)
class _Moved:
    """The cursor's block is no longer on the chain."""
