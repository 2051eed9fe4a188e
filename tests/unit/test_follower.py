"""The follower: every event once and in order, through reorgs and faulty nodes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from eth_utils import keccak
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Column, Connection, Integer, Table, delete, insert, select

from deepsquare_chain.chain.bindings.events import Transfer, event_filter
from deepsquare_chain.chain.follower import KEPT_BLOCKS, Batch, Follower, ReorgTooDeepError
from deepsquare_chain.chain.rpc.endpoint import SplitResponses
from deepsquare_chain.chain.rpc.log_reader import COMMON_DEPTH
from deepsquare_chain.errors import EndpointError
from deepsquare_chain.observability.metrics import Metrics
from deepsquare_chain.store.database import Amount, Store, metadata
from tests.support.fakechain import FakeChain

CREDIT = "0x" + "51" * 20
PERSON = bytes(12) + b"\x77" * 20
IDENTITY = {"chain_id": 1, "contract": CREDIT, "account": CREDIT}

amounts = Table(
    "follower_test_amounts",
    metadata,
    Column("block", Integer, primary_key=True),
    Column("log", Integer, primary_key=True),
    Column("amount", Amount),
)


def log(amount: int, payer: bytes = PERSON) -> dict[str, Any]:
    """Return a transfer in JSON-RPC format; the chain adds block and index."""
    topic = keccak(text="Transfer(address,address,uint256)")
    return {
        "address": CREDIT,
        "topics": ["0x" + value.hex() for value in (topic, payer, PERSON)],
        "data": "0x" + amount.to_bytes(32, "big").hex(),
    }


class EventStore:
    """Stores the effects of events, as a service does."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.batches: list[Batch] = []
        self.fail_at: int | None = None

    def apply(self, batch: Batch, connection: Connection) -> None:
        self.batches.append(batch)
        if batch.rolled_back_to is not None:
            connection.execute(delete(amounts).where(amounts.c.block > batch.rolled_back_to))
        for event in batch.events:
            assert isinstance(event, Transfer)
            assert batch.from_block <= event.block_number <= batch.to_block
            row = {"block": event.block_number, "log": event.log_index, "amount": event.amount}
            connection.execute(insert(amounts).values(row))
            if event.amount == self.fail_at:
                raise RuntimeError("no")

    def amounts(self) -> list[int]:
        with self.store.read() as connection:
            query = select(amounts.c.amount).order_by(amounts.c.block, amounts.c.log)
            return list(connection.execute(query).scalars())


def truth(chain: FakeChain, confirmations: int = 0, start: int = 1) -> list[int]:
    """Return the amounts on the chain itself."""
    last = chain.head - confirmations
    blocks = [block for block in chain.blocks if start <= block.number <= last]
    return [int(item["data"], 16) for block in blocks for item in block.logs]


@pytest.fixture
def chain() -> FakeChain:
    return FakeChain()


@pytest.fixture
def store() -> Iterator[Store]:
    with Store.open(None, **IDENTITY) as result:
        yield result


@pytest.fixture
def event_store(store: Store) -> EventStore:
    return EventStore(store)


def follower(chain: FakeChain, store: Store, **options: Any) -> Follower[Connection]:
    settings_ = {"start_block": 1, "confirmations": 0, **options}
    return Follower(chain, [CREDIT], store, **settings_)  # type: ignore[arg-type]


async def test_each_event_once_and_in_order(
    chain: FakeChain, store: Store, event_store: EventStore
) -> None:
    for number in range(5):
        chain.mine([log(2 * number), log(2 * number + 1)])
    result = follower(chain, store)
    assert result.position == 0
    assert await result.poll(event_store.apply) == 10
    assert (result.position, result.head) == (5, 5)
    assert await result.poll(event_store.apply) == 0
    chain.mine([log(10**30)])
    # A restart has the same result as continuing.
    assert await follower(chain, store).poll(event_store.apply) == 1
    assert event_store.amounts() == [*range(10), 10**30]
    assert event_store.batches[-1].time == 1_006


async def test_only_confirmed_blocks_are_read(
    chain: FakeChain, store: Store, event_store: EventStore
) -> None:
    result = follower(chain, store, confirmations=3)
    for number in range(3):
        chain.mine([log(number)])
        assert await result.poll(event_store.apply) == 0
    chain.mine()
    assert await result.poll(event_store.apply) == 1
    assert event_store.amounts() == [0]


async def test_effects_and_cursor_go_together(
    chain: FakeChain, store: Store, event_store: EventStore
) -> None:
    chain.mine([log(1), log(2)])
    event_store.fail_at = 2
    with pytest.raises(RuntimeError):
        await follower(chain, store).poll(event_store.apply)
    assert (event_store.amounts(), store.recent_blocks("main")) == ([], [])
    event_store.fail_at = None
    assert await follower(chain, store).poll(event_store.apply) == 2
    assert event_store.amounts() == [1, 2]


@pytest.mark.parametrize("depth", [1, 2, 7, 32, 64])
async def test_reorganisations(
    chain: FakeChain, store: Store, event_store: EventStore, depth: int
) -> None:
    result = follower(chain, store)
    for number in range(100):
        chain.mine([log(number)])
        await result.poll(event_store.apply)
    chain.reorg(depth)
    assert await result.poll(event_store.apply) == 0
    assert event_store.amounts() == truth(chain) == list(range(100 - depth))
    (rolled,) = [batch for batch in event_store.batches if batch.rolled_back_to is not None]
    assert rolled.rolled_back_to == 100 - depth
    assert rolled.events == ()
    chain.mine([log(10**9)])
    await result.poll(event_store.apply)
    assert event_store.amounts() == truth(chain)


async def test_a_branch_of_the_same_height_is_seen(
    chain: FakeChain, store: Store, event_store: EventStore
) -> None:
    result = follower(chain, store)
    chain.mine([log(1)])
    chain.mine([log(2)])
    await result.poll(event_store.apply)
    chain.reorg(1, keep=True)
    chain.mine([log(3)])
    await result.poll(event_store.apply)
    assert event_store.amounts() == [1, 3]


async def test_a_shorter_branch_is_not_applied_until_it_is_longer(
    chain: FakeChain, store: Store, event_store: EventStore
) -> None:
    result = follower(chain, store)
    for number in range(4):
        chain.mine([log(number)])
        await result.poll(event_store.apply)
    chain.reorg(2, keep=True)
    assert await result.poll(event_store.apply) == 0  # a node that lags looks the same
    assert event_store.amounts() == [0, 1, 2, 3]
    for number in range(3):
        chain.mine([log(100 + number)])
    await result.poll(event_store.apply)
    assert event_store.amounts() == [0, 1, 100, 101, 102]


async def test_a_reorganisation_of_all_blocks(
    chain: FakeChain, store: Store, event_store: EventStore
) -> None:
    result = follower(chain, store)
    for number in range(3):
        chain.mine([log(number)])
        await result.poll(event_store.apply)
    chain.reorg(3, keep=True)
    for number in range(4):
        chain.mine([log(50 + number)])
    await result.poll(event_store.apply)
    assert event_store.amounts() == [50, 51, 52, 53]


async def test_too_deep_a_reorganisation_halts(
    chain: FakeChain, store: Store, event_store: EventStore
) -> None:
    result = follower(chain, store)
    for number in range(KEPT_BLOCKS + 10):
        chain.mine([log(number)])
        await result.poll(event_store.apply)
    before = event_store.amounts()
    chain.reorg(KEPT_BLOCKS + 5)
    with pytest.raises(ReorgTooDeepError, match="replaced block"):
        await result.poll(event_store.apply)
    assert event_store.amounts() == before


@pytest.mark.parametrize(("lag", "settled"), [(0, 3), (2, 3), (3, 3), (0, 1), (0, 0)])
@pytest.mark.parametrize("gulp", [1, 4, 30])
async def test_settled_blocks_are_never_rolled_back(
    chain: FakeChain, store: Store, event_store: EventStore, lag: int, settled: int, gulp: int
) -> None:
    """A follower that read block by block, or all at once, halts at the same depth."""
    options = {"confirmations": lag, "settled": settled}
    for number in range(1, 31):
        chain.mine([log(number)] if number % 5 == 0 else [])
        if number % gulp == 0:
            await follower(chain, store, **options).poll(event_store.apply)
    await follower(chain, store, **options).poll(event_store.apply)
    before = event_store.amounts()
    if settled > lag:
        chain.reorg(settled)
        chain.mine([])
        await follower(chain, store, **options).poll(event_store.apply)
        assert event_store.amounts() == truth(chain, lag)
        before = event_store.amounts()
    chain.reorg(settled + 2)
    chain.mine([log(99)])
    chain.mine([])
    with pytest.raises(ReorgTooDeepError, match="had enough confirmations") as error_info:
        await follower(chain, store, **options).poll(event_store.apply)
    assert "--confirmations" in error_info.value.hint
    assert event_store.amounts() == before
    # It does not depend on timing: a restart halts again.
    with pytest.raises(ReorgTooDeepError):
        await follower(chain, store, **options).poll(event_store.apply)


async def test_memory_is_bounded(chain: FakeChain, store: Store, event_store: EventStore) -> None:
    result = follower(chain, store)
    for number in range(KEPT_BLOCKS + 20):
        chain.mine([log(number)])
    await result.poll(event_store.apply)
    for number in range(20):
        chain.mine([log(number)])
        await result.poll(event_store.apply)
    known = store.recent_blocks("main")
    assert len(known) == KEPT_BLOCKS
    assert known[0].number == chain.head


async def test_ranges_are_halved_and_grow_again(
    chain: FakeChain, store: Store, event_store: EventStore
) -> None:
    for number in range(100):
        chain.mine([log(number)])
    chain.log_limit = 10
    result = follower(chain, store)
    assert await result.poll(event_store.apply) == 100
    assert event_store.amounts() == list(range(100))
    assert max(batch.to_block - batch.from_block + 1 for batch in event_store.batches) <= 10
    chain.log_limit = None
    for number in range(200):
        chain.mine([log(number)])
    event_store.batches.clear()
    await result.poll(event_store.apply)
    assert max(batch.to_block - batch.from_block + 1 for batch in event_store.batches) > 10


@pytest.mark.parametrize(
    "message",
    [
        "internal error",
        "Requested range exceeds maximum RPC range limit",
        "eth_getLogs is limited to a 500 range",
        "something that no node has said before",
    ],
)
async def test_any_refusal_halves_down_to_one_block(
    chain: FakeChain, store: Store, event_store: EventStore, message: str
) -> None:
    for number in range(40):
        chain.mine([log(number)])
    chain.log_limit, chain.log_words = 3, message
    assert await follower(chain, store).poll(event_store.apply) == 40
    chain.mine([log(40)])
    chain.log_limit = 0
    with pytest.raises(EndpointError, match=message):
        await follower(chain, store).poll(event_store.apply)


async def test_a_lagging_node_is_not_trusted(
    chain: FakeChain, store: Store, event_store: EventStore
) -> None:
    """The head comes from one node, the logs from another that does not have that block yet."""
    for number in range(3):
        chain.mine([log(number)])
    hidden: list[Any] = []

    def lag(_batch: Any) -> None:
        if not hidden:
            hidden.append(chain.blocks.pop())

    chain.before_batch = lag
    result = follower(chain, store)
    assert await result.poll(event_store.apply) == 0
    chain.before_batch = None
    chain.blocks.append(hidden[0])
    assert await result.poll(event_store.apply) == 3
    # The same data in another spelling is accepted.
    chain.mine([log(3)])
    chain.log_limit, chain.log_words = 0, "header not found"
    assert await result.poll(event_store.apply) == 0
    chain.log_limit = None
    assert await result.poll(event_store.apply) == 1


async def test_the_lag_is_shown_while_it_reads(
    chain: FakeChain, store: Store, event_store: EventStore
) -> None:
    metrics = Metrics("test")
    result = follower(chain, store, metrics=metrics, max_range=4, confirmations=1)
    for _ in range(10):
        chain.mine([log(1)])
    lags: list[float | None] = []

    def apply(batch: Batch, connection: Connection) -> None:
        lags.append(metrics.value("follower_lag_blocks"))
        event_store.apply(batch, connection)

    await result.poll(apply)
    # Nine of the ten blocks are accepted.
    assert lags == [9, 5, 1]
    assert metrics.value("follower_lag_blocks") == 0
    chain.mine()
    chain.mine()
    chain.log_limit = 0
    with pytest.raises(EndpointError):
        await result.poll(apply)
    assert metrics.value("follower_lag_blocks") == 2


async def test_events_of_several_filters_are_merged_in_order(
    chain: FakeChain, store: Store, event_store: EventStore
) -> None:
    topics = [bytes(12) + bytes([number]) * 20 for number in range(3)]
    for number in range(9):
        chain.mine([log(10 * number, topics[number % 3]), log(10 * number + 1, topics[0])])
    filters = [
        event_filter(Transfer, sender="0x" + topic[12:].hex(), recipient="0x" + PERSON[12:].hex())
        for topic in topics[:2]
    ]
    result = follower(chain, store, filters=filters)
    assert await result.poll(event_store.apply) == len(event_store.amounts()) == 15
    assert event_store.amounts() == [item for item in truth(chain) if item % 30 != 20]
    chain.reorg(3)
    await result.poll(event_store.apply)
    assert event_store.amounts() == [item for item in truth(chain) if item % 30 != 20]
    assert len(event_store.amounts()) == 10


async def test_a_change_while_reading_is_noticed(
    chain: FakeChain, store: Store, event_store: EventStore
) -> None:
    """The chain changes between the requests for logs and for the header that verifies them."""
    chain.mine([log(1)])
    chain.mine()  # the last block has no log whose hash could show it
    answer = chain._answer

    def moving(method: str, params: list[Any]) -> dict[str, Any]:
        result = answer(method, params)
        if method == "eth_getLogs":
            chain._answer = answer  # type: ignore[method-assign]
            chain.reorg(2)
        return result

    chain._answer = moving  # type: ignore[method-assign]
    result = follower(chain, store)
    assert await result.poll(event_store.apply) == 0
    assert event_store.amounts() == []
    await result.poll(event_store.apply)
    assert event_store.amounts() == truth(chain) == []


@pytest.mark.parametrize(
    "change",
    [
        {"blockNumber": "0x63"},
        {"blockNumber": None},
        {"address": "0x" + "52" * 20},
        {"address": 5},
    ],
)
async def test_logs_that_were_not_requested(
    chain: FakeChain, store: Store, event_store: EventStore, change: dict[str, Any]
) -> None:
    chain.mine([log(1)]).logs[0].update(change)
    with pytest.raises(EndpointError, match="invalid logs"):
        await follower(chain, store).poll(event_store.apply)
    assert event_store.amounts() == []


async def test_unknown_and_malformed_events_are_skipped(
    chain: FakeChain, store: Store, event_store: EventStore
) -> None:
    unknown = log(1) | {"topics": ["0x" + "ab" * 32]}
    chain.mine([unknown, log(2) | {"data": "0x01"}, log(3)])
    assert await follower(chain, store).poll(event_store.apply) == 1
    assert event_store.amounts() == [3]


async def test_followers_of_one_store_are_independent(
    chain: FakeChain, store: Store, event_store: EventStore
) -> None:
    chain.mine([log(1)])
    await follower(chain, store, name="a").poll(event_store.apply)
    assert store.recent_blocks("b") == []
    assert await follower(chain, store, name="b").poll(lambda *_: None) == 1


async def test_an_endpoint_without_batches(
    chain: FakeChain, store: Store, event_store: EventStore
) -> None:
    chain.mine([log(1)])

    async def refuse(_batch: Any) -> Any:
        return {"error": {"code": -32600, "message": "batch requests are not supported"}}

    async def single(method: str, params: list[Any]) -> Any:
        return chain._answer(method, params)

    chain.make_batch_request = refuse  # type: ignore[method-assign]
    chain.make_request = single  # type: ignore[attr-defined]
    assert await follower(chain, store).poll(event_store.apply) == 1


@pytest.mark.parametrize("remembered", [True, False])
async def test_a_node_that_lags_behind_a_split_batch_is_not_trusted(
    chain: FakeChain, store: Store, event_store: EventStore, remembered: bool
) -> None:
    """Headers come from one node of a URL, logs from another that does not have the blocks."""
    for number in range(COMMON_DEPTH + 10):
        chain.mine([log(number)])
    answer, behind, requests = chain._answer, 5, []

    async def split(batch: Any) -> Any:
        return SplitResponses([lagging(method, params) for method, params in batch])

    def lagging(method: str, params: list[Any]) -> Any:
        requests.append(params[0])
        if method != "eth_getLogs":
            return answer(method, params)
        hidden = chain.blocks[len(chain.blocks) - behind :]
        del chain.blocks[len(chain.blocks) - behind :]
        try:
            return answer(method, params)
        finally:
            chain.blocks.extend(hidden)

    chain.make_batch_request = split  # type: ignore[method-assign]
    if remembered:
        chain.batch_size = 1  # type: ignore[attr-defined]
    result = follower(chain, store)
    assert await result.poll(event_store.apply) == len(chain.blocks) - 1 - behind
    assert await result.poll(event_store.apply) == 0
    behind = 0
    assert await result.poll(event_store.apply) == 5
    assert event_store.amounts() == truth(chain)
    ranges = [
        request for request in requests if isinstance(request, dict) and "fromBlock" in request
    ]
    if remembered:
        assert len(ranges) == 1, "deep blocks are read as one range all the same"


async def test_a_missing_header_of_a_split_batch_is_retried(
    chain: FakeChain, store: Store, event_store: EventStore
) -> None:
    chain.mine([log(1)])
    chain.batch_size = 1  # type: ignore[attr-defined]
    answer, message = chain._answer, "header not found"

    def refusing(method: str, params: list[Any]) -> dict[str, Any]:
        if method == "eth_getBlockByNumber" and message:
            return {"error": {"code": -32000, "message": message}}
        return answer(method, params)

    chain._answer = refusing  # type: ignore[method-assign]
    result = follower(chain, store)
    assert await result.poll(event_store.apply) == 0
    message = "no"
    with pytest.raises(EndpointError, match="rejected a request for logs: no"):
        await result.poll(event_store.apply)
    message = ""
    assert await result.poll(event_store.apply) == 1


steps = st.lists(
    st.one_of(
        st.tuples(st.just("mine"), st.integers(0, 3)),
        st.tuples(st.just("reorg"), st.integers(1, 6)),
        st.tuples(st.just("shorten"), st.integers(1, 3)),
        st.tuples(st.just("poll"), st.just(0)),
        st.tuples(st.just("restart"), st.just(0)),
        st.tuples(st.just("limit"), st.integers(1, 5)),
    ),
    max_size=40,
)


@settings(max_examples=150)
@given(steps=steps, confirmations=st.integers(0, 3))
async def test_any_history_gives_the_events_of_the_final_chain(
    steps: list[tuple[str, int]], confirmations: int
) -> None:
    chain = FakeChain()
    with Store.open(None, **IDENTITY) as store:
        event_store = EventStore(store)
        result = follower(chain, store, confirmations=confirmations)
        count = 0
        for action, number in [*steps, ("mine", 1), ("mine", 0), ("poll", 0)]:
            if action == "mine":
                chain.mine([log(count := count + 1) for _ in range(number)])
            elif action in ("reorg", "shorten"):
                depth = min(number, chain.head)
                if depth:
                    chain.reorg(depth, keep=action == "shorten")
            elif action == "limit":
                chain.log_limit = number
            elif action == "restart":
                result = follower(chain, store, confirmations=confirmations)
            else:
                await result.poll(event_store.apply)
        # Nothing is applied while the chain is shorter than the blocks that were read.
        while chain.head - confirmations < result.position:
            chain.mine()
        await result.poll(event_store.apply)
        assert event_store.amounts() == truth(chain, confirmations)


def test_a_cursor_is_kept_after_a_restart(chain: FakeChain, tmp_path: Path) -> None:
    import asyncio  # noqa: PLC0415

    chain.mine([log(1)])
    with Store.open(tmp_path / "a.db", **IDENTITY) as store:
        asyncio.run(follower(chain, store).poll(EventStore(store).apply))
    chain.mine([log(2)])
    with Store.open(tmp_path / "a.db", **IDENTITY) as store:
        event_store = EventStore(store)
        assert asyncio.run(follower(chain, store).poll(event_store.apply)) == 1
        assert event_store.amounts() == [1, 2]


async def test_more_is_read_before_a_batch_is_applied(
    chain: FakeChain, store: Store, event_store: EventStore
) -> None:
    chain.mine([log(1)])
    prepared: list[Batch] = []
    answers = [False, True]

    async def prepare(batch: Batch) -> bool:
        assert event_store.batches == []
        prepared.append(batch)
        return answers.pop(0)

    result = follower(chain, store)
    assert await result.poll(event_store.apply, prepare=prepare) == 0
    assert (event_store.amounts(), result.position) == ([], 0)
    assert await result.poll(event_store.apply, prepare=prepare) == 1
    assert event_store.amounts() == [1]
    assert prepared[0] == prepared[1] == event_store.batches[0]
