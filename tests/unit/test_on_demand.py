"""Detection of chains that mine on demand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from deepsquare_chain.chain.follower import Batch, Follower
from deepsquare_chain.chain.rpc import heads as heads_module
from deepsquare_chain.chain.rpc.heads import (
    OnDemandDetector,
    mines_on_demand,
    next_block_needs_transaction,
    seconds_idle,
)
from deepsquare_chain.chain.transactions.sender import Sender
from deepsquare_chain.store.database import Store
from tests.support.fakechain import FakeChain
from tests.unit.test_follower import CREDIT, IDENTITY, log
from tests.unit.test_sender import ACCOUNT, call


class Clock:
    """Clocks that tests set."""

    now = 10_000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    result = Clock()
    monkeypatch.setattr(heads_module, "time", result)
    return result


def headers(*times: int, empty: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """Return blocks with these times; those at the given positions are empty."""
    return [
        {
            "number": hex(number),
            "timestamp": hex(at),
            "transactions": [] if number in empty else [1],
        }
        for number, at in enumerate(times, 1)
    ]


@pytest.mark.parametrize(
    ("blocks", "seconds", "on_demand"),
    [
        # A development node: some transactions at once, then nothing.
        (headers(0, 0, 1, 1, 30, 30, 300), 5, True),
        (headers(0, 0, 1, 1, 30, 30, 300), 3, False),
        # Its transactions never came close together.
        (headers(0, 100, 220, 500), 50, False),
        (headers(0, 100, 220, 500), 61, True),
        # A chain that makes blocks by the clock, and is full.
        (headers(*range(0, 120, 12)), 36, False),
        (headers(*range(0, 120, 12)), 59, False),
        # The service missed a block, and its endpoint is stalled.
        (headers(*range(8), 9, 10), 59, False),
        (headers(*range(8), 9, 10), 60, True),
        # It paused before, so it has no schedule.
        (headers(*range(8), 12, 13), 5, True),
        # The same on a chain without transactions: its blocks are empty.
        (headers(*range(0, 120, 12), empty=(4, 5)), 500, False),
        (headers(*range(10), empty=(5, 9, 10)), 500, False),
        # Anvil, where two transactions that arrive at once make an empty block behind a full one.
        (headers(*range(10), 60, 61, empty=(4, 12)), 5, True),
        (headers(*range(10), 60, 62, empty=(12,)), 500, False),
        # The chain is too young to decide.
        (headers(5), 500, False),
        ([], 500, False),
        # The first block is empty on every chain.
        ([{"number": "0x0", "timestamp": "0x0", "transactions": []}, *headers(1, 2, 3)], 5, True),
    ],
)
def test_kinds_of_chains(blocks: list[dict[str, Any]], seconds: float, on_demand: bool) -> None:
    on_demand_detector = OnDemandDetector()
    on_demand_detector.record_headers(blocks)
    assert on_demand_detector.is_on_demand(seconds) is on_demand


@pytest.fixture
def quiet(clock: Clock) -> FakeChain:
    """Return a development chain shortly before it counts as mining on demand."""
    chain = FakeChain()
    for number in range(5):
        chain.mine([log(number)])
    chain.on_demand = OnDemandDetector()
    chain.on_demand.record_headers(headers(0, 0, 1, 2, 2))
    chain.on_demand.loaded = True
    chain.on_demand.record_head(5)
    clock.now += 3
    return chain


@pytest.fixture
def store() -> Iterator[Store]:
    with Store.open(None, **IDENTITY) as result:
        yield result


async def test_it_counts_as_idle_only_after_a_while(quiet: FakeChain, clock: Clock) -> None:
    assert await seconds_idle(quiet) == 0.0  # type: ignore[arg-type]
    clock.now += 2
    assert await seconds_idle(quiet) == 5.0  # type: ignore[arg-type]
    assert quiet.on_demand is not None
    quiet.on_demand.record_head(6)
    assert await seconds_idle(quiet) == 0.0  # type: ignore[arg-type]


async def test_blocks_from_before_are_read_once(clock: Clock) -> None:
    chain = FakeChain()
    for _ in range(5):
        chain.mine()  # a node that shows no transactions of its blocks counts as empty
    chain.on_demand = OnDemandDetector()
    chain.on_demand.record_head(5)
    clock.now += 500
    for _ in range(3):
        assert await seconds_idle(chain) == 0.0  # type: ignore[arg-type]
    assert len(chain.batches) == 1


async def test_the_last_block_is_followed_where_no_other_comes(
    quiet: FakeChain, clock: Clock, store: Store
) -> None:
    heads: list[int] = []

    def apply(batch: Batch, _: Any) -> None:
        heads.extend(event.amount for event in batch.events)  # type: ignore[attr-defined]

    follower = Follower(quiet, [CREDIT], store, start_block=1, confirmations=1)  # type: ignore[arg-type]
    await follower.poll(apply)
    assert heads == [0, 1, 2, 3]
    clock.now += 2
    await follower.poll(apply)
    assert heads == [0, 1, 2, 3, 4]


async def test_calls_are_simulated_on_the_block_that_they_bring_about(
    quiet: FakeChain, clock: Clock, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = Sender(quiet, ACCOUNT, store, chain_id=1, poll_interval=0.001)  # type: ignore[arg-type]
    monkeypatch.setattr(clock, "time", lambda: 1_005 + 1.0)  # its latest block is new
    await sender.simulate(call())
    clock.now += 2
    await sender.simulate(call())
    await sender.send(call())
    assert quiet.simulated == ["latest", "pending", "pending"]


async def test_a_young_connection_goes_by_the_age_of_the_latest_block(
    quiet: FakeChain, clock: Clock
) -> None:
    """A command ends before it can detect that no block is mined."""
    assert await next_block_needs_transaction(quiet)  # type: ignore[arg-type]
    quiet.provider.on_demand.record_head(quiet.provider.on_demand.head + 1)
    clock.now += 4
    quiet.provider.on_demand.record_head(quiet.provider.on_demand.head + 1)
    assert not await next_block_needs_transaction(quiet)  # type: ignore[arg-type]


async def test_users_are_notified_at_once(quiet: FakeChain, clock: Clock) -> None:
    """A command detects a chain that mines on demand by the age of the latest block."""
    clock.now = 1_005 + 3.0
    assert await mines_on_demand(quiet) is None  # type: ignore[arg-type]
    clock.now = 1_005 + 40.0
    assert await mines_on_demand(quiet) == 40  # type: ignore[arg-type]
