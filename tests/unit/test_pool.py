"""Several endpoints of one chain: selection, cooldown, and no repeated request."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from deepsquare_chain.chain.rpc import pool as pool_module
from deepsquare_chain.chain.rpc.endpoint import (
    CheckedProvider,
    TransientEndpointError,
    UnreachableEndpointError,
    WrongEndpointError,
)
from deepsquare_chain.chain.rpc.pool import Pool
from deepsquare_chain.errors import EndpointError
from deepsquare_chain.observability.metrics import Metrics

SEND = "eth_sendRawTransaction"


class Node:
    """A fake endpoint; it raises `down`, if set."""

    def __init__(
        self, name: str, *, head: int = 100, chain: int = 7, genesis: str = "0xaa"
    ) -> None:
        self.display_url = f"https://{name}:1/..."
        self.head, self.chain, self.genesis = head, chain, genesis
        self.down: EndpointError | None = None
        self.requests: list[str] = []
        self.blocks: dict[str, str | None] = {}  # hashes of blocks but the first
        self.closed = 0
        self.doubtful = False

    async def make_request(self, method: str, params: Any) -> Any:
        self.requests.append(method)
        await asyncio.sleep(0)
        if self.down is not None:
            raise self.down
        answers = {
            "eth_chainId": hex(self.chain),
            "eth_blockNumber": hex(self.head),
        }
        if method == "eth_getBlockByNumber":
            genesis = self.genesis if params[0] == "0x0" else self.blocks.get(params[0], "0xdd")
            return {"result": None if genesis is None else {"hash": genesis}}
        return {"result": answers.get(method, self.display_url)}

    async def make_batch_request(self, batch: list[tuple[str, Any]]) -> Any:
        return [await self.make_request(method, params) for method, params in batch]

    async def disconnect(self) -> None:
        self.closed += 1

    def fail(self, message: str = "busy") -> None:
        self.down = TransientEndpointError(f"The endpoint {self.display_url} is {message}")


class Clock:
    """A monotonic clock that tests set."""

    now = 1_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    result = Clock()
    monkeypatch.setattr(pool_module, "time", result)
    return result


@pytest.fixture
def nodes() -> list[Node]:
    return [Node("a"), Node("b"), Node("c")]


async def opened(nodes: list[Node], **options: Any) -> Pool:
    pool = Pool(nodes, **{"chain_id": 7, "attempts": 1, **options})  # type: ignore[arg-type]
    await pool.open()
    for node in nodes:
        node.requests.clear()
    return pool


async def ask(pool: Pool, method: str = "eth_getLogs") -> str:
    answer = await pool.make_request(method, [])  # type: ignore[arg-type]
    return str(answer["result"]).split("//")[1][:1]


async def settle(pool: Pool) -> None:
    """Wait for the end of a due comparison of heads."""
    if pool._comparison is not None:
        await pool._comparison


async def test_the_first_endpoint_is_used_while_it_works(clock: Clock, nodes: list[Node]) -> None:
    pool = await opened(nodes)
    assert [await ask(pool) for _ in range(5)] == ["a"] * 5
    assert (nodes[1].requests, nodes[2].requests) == ([], [])


async def test_after_a_failure_the_next_endpoint_is_used(clock: Clock, nodes: list[Node]) -> None:
    pool = await opened(nodes)
    nodes[0].fail()
    assert [await ask(pool), await ask(pool)] == ["b", "b"]
    assert nodes[0].requests == ["eth_getLogs"]
    # The first endpoint has recovered; the pool does not switch back to it.
    nodes[0].down = None
    clock.now += 3_600
    assert await ask(pool) == "b"
    nodes[1].fail()
    assert await ask(pool) == "a"


async def test_a_refused_request_is_sent_to_the_next_endpoint(
    clock: Clock, nodes: list[Node]
) -> None:
    pool = await opened(nodes)
    nodes[0].down = EndpointError("HTTP status 403")
    assert await ask(pool) == "b"


async def test_cooldowns_grow_with_failures(clock: Clock, nodes: list[Node]) -> None:
    pool = await opened(nodes[:2])
    first = pool.members[0]
    cooldowns = []
    for _ in range(9):
        nodes[0].fail()
        pool._current = first
        clock.now = max(clock.now, first.cooldown_until)
        assert await ask(pool) == "b"
        cooldowns.append(first.cooldown_until - clock.now)
    assert cooldowns == [1, 2, 4, 8, 16, 32, 60, 60, 60]


async def test_endpoints_are_used_although_all_are_in_cooldown(
    clock: Clock, nodes: list[Node]
) -> None:
    pool = await opened(nodes)
    for node in nodes:
        node.fail(f"ill ({node.display_url})")
    with pytest.raises(TransientEndpointError, match=r"No endpoint answers\. .*a:1.*b:1.*c:1"):
        await ask(pool)
    nodes[2].down = None
    assert await ask(pool) == "c"


async def test_reads_are_tried_again(clock: Clock, nodes: list[Node]) -> None:
    pool = await opened(nodes[:1], attempts=3)
    nodes[0].fail()
    with pytest.raises(TransientEndpointError, match="is busy"):
        await ask(pool)
    assert nodes[0].requests == ["eth_getLogs"] * 3


async def test_a_busy_endpoint_is_retried_after_its_retry_after(
    clock: Clock, nodes: list[Node]
) -> None:
    pool = await opened(nodes[:2], attempts=2)
    for node, seconds in zip(nodes, (30.0, 0.5), strict=False):
        node.fail()
        node.down.retry_after = seconds  # type: ignore[union-attr]
    start = time.monotonic()
    with pytest.raises(TransientEndpointError):
        await ask(pool)
    assert 0.5 <= time.monotonic() - start < 20.0, "the endpoint with the shortest Retry-After"
    assert [member.cooldown_until - clock.now for member in pool.members] == [30.0, 2.0]


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("3", 3.0), ("0", 0.0), ("86400", 10.0), ("", 0.0), ("soon", 0.0), ("-5", 0.0),
     ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("Wed, 21 Oct 2099 07:28:00 GMT", 10.0)],
)  # fmt: skip
def test_retry_after_of_a_busy_node_is_bounded(header: str, seconds: float) -> None:
    with pytest.raises(TransientEndpointError) as error:
        CheckedProvider("http://node.example")._raise_for(429, header)
    assert error.value.retry_after == seconds


@pytest.mark.parametrize("attempts", [1, 4])
async def test_a_send_goes_to_one_endpoint_once(
    clock: Clock, nodes: list[Node], attempts: int
) -> None:
    pool = await opened(nodes, attempts=attempts)
    nodes[0].fail()
    with pytest.raises(TransientEndpointError):
        await pool.make_request(SEND, ["0x00"])  # type: ignore[arg-type]
    nodes[1].fail()
    with pytest.raises(TransientEndpointError):
        await pool.make_batch_request([("eth_chainId", []), (SEND, ["0x00"])])  # type: ignore[list-item]
    assert [node.requests.count(SEND) for node in nodes] == [1, 0, 0]
    # The second broadcast, which is the sender's decision, went elsewhere.
    assert nodes[1].requests == ["eth_chainId"]


async def test_a_batch_goes_to_one_endpoint(clock: Clock, nodes: list[Node]) -> None:
    pool = await opened(nodes)
    calls = 0

    async def fail_halfway(batch: Any) -> Any:
        nonlocal calls
        calls += 1
        raise TransientEndpointError("half of it")

    nodes[0].make_batch_request = fail_halfway  # type: ignore[method-assign]
    batch_request = await pool.make_batch_request([("x", []), ("y", [])])  # type: ignore[list-item]
    assert calls == 1
    assert [item["result"] for item in batch_request] == [nodes[1].display_url] * 2  # type: ignore[index]


async def test_a_lagging_endpoint_is_not_used(clock: Clock, nodes: list[Node]) -> None:
    pool = await opened(nodes, max_lag_blocks=3)
    for node, head in zip(nodes, (103, 107, 104), strict=True):
        node.head = head
    assert await ask(pool) == "a"
    clock.now += 11
    await ask(pool)
    await settle(pool)
    assert [member.lag for member in pool.members] == [4, 0, 3]
    assert await ask(pool) == "b"
    # Only the lagging endpoint is left: no response is better than an old one.
    nodes[1].fail()
    nodes[2].fail()
    with pytest.raises(TransientEndpointError):
        await ask(pool)
    assert nodes[0].requests.count("eth_getLogs") == 2
    # It catches up, and is used again.
    nodes[0].head = 107
    clock.now += 11
    with pytest.raises(TransientEndpointError):
        await ask(pool)
    await settle(pool)
    assert await ask(pool) == "a"


async def test_a_lagging_endpoint_is_used_if_it_is_the_only_one(
    clock: Clock, nodes: list[Node]
) -> None:
    pool = await opened(nodes[:2], max_lag_blocks=3)
    nodes[0].head, nodes[1].head = 120, 100
    clock.now += 11
    await ask(pool)
    await settle(pool)
    pool.members[0].exclusion = WrongEndpointError("gone")
    with pytest.raises(TransientEndpointError, match=r"b:1/\.\.\. is 20 blocks behind"):
        await ask(pool)
    # No endpoint has confirmed the higher head for a minute: the current heads count.
    clock.now += 61
    with pytest.raises(TransientEndpointError):
        await ask(pool)
    await settle(pool)
    assert await ask(pool) == "b"


async def test_the_wrong_chain_is_reported_at_once(clock: Clock, nodes: list[Node]) -> None:
    nodes[1].chain = 8
    with pytest.raises(WrongEndpointError, match=r"b:1/\.\.\. serves chain 8, not chain 7"):
        await opened(nodes)


async def test_another_first_block_is_another_chain(clock: Clock, nodes: list[Node]) -> None:
    nodes[2].genesis = "0xbb"
    with pytest.raises(WrongEndpointError, match="first block is 0xbb, not 0xaa"):
        await opened(nodes, chain_id=None)


async def test_an_endpoint_that_returns_with_another_chain_is_not_used(
    clock: Clock, nodes: list[Node]
) -> None:
    pool = await opened(nodes[:2])
    nodes[0].fail()
    assert await ask(pool) == "b"
    nodes[0].down, nodes[0].genesis = None, "0xcc"
    nodes[1].fail()
    clock.now += 5
    with pytest.raises(EndpointError, match="first block is 0xcc"):
        await ask(pool)
    nodes[0].genesis, nodes[0].requests = "0xaa", []
    with pytest.raises(EndpointError):
        await ask(pool)
    assert nodes[0].requests == []
    pool.members[1].exclusion = WrongEndpointError("as well")
    with pytest.raises(WrongEndpointError):
        await ask(pool)


@pytest.mark.parametrize("sign", ["a failure", "its head fell", "a doubt of the sender"])
@pytest.mark.parametrize("change", ["genesis", "a known block", "chain id"])
async def test_a_restarted_chain_is_detected_and_gets_no_transaction(
    clock: Clock, nodes: list[Node], sign: str, change: str
) -> None:
    (node,) = nodes = nodes[:1]
    pool = await opened(nodes, landmark=10)
    assert (pool.genesis, pool.landmark) == ("0xaa", "0xdd")
    if sign == "a failure":
        node.down = UnreachableEndpointError("can't be reached")
        with pytest.raises(TransientEndpointError):
            await ask(pool)
        node.down = None
    elif sign == "its head fell":
        node.doubtful = True
    else:
        pool.recheck_chain()
    if change == "genesis":
        node.genesis = "0xbb"
    elif change == "chain id":
        node.chain = 8
    else:
        node.blocks["0xa"] = "0xee"
    with pytest.raises(WrongEndpointError, match="serves") as error_info:
        await pool.make_request(SEND, ["0x00"])  # type: ignore[arg-type]
    assert SEND not in node.requests
    assert error_info.value.hint
    with pytest.raises(WrongEndpointError):
        await ask(pool)
    assert SEND not in node.requests


@pytest.mark.parametrize("sign", ["a failure", "its head fell"])
async def test_the_same_chain_continues(clock: Clock, nodes: list[Node], sign: str) -> None:
    (node,) = nodes = nodes[:1]
    pool = await opened(nodes, landmark=10)
    if sign == "a failure":
        node.down = UnreachableEndpointError("can't be reached")
        with pytest.raises(TransientEndpointError):
            await ask(pool)
        node.down = None
    else:
        node.doubtful = True
    assert await ask(pool) == "a"
    node.requests.clear()
    assert await ask(pool) == "a"
    assert node.requests == ["eth_getLogs"], "it is looked at once"


async def test_a_short_chain_is_identified_by_its_first_block(
    clock: Clock, nodes: list[Node]
) -> None:
    """A reorg of recent blocks does not count as another chain."""
    (node,) = nodes = nodes[:1]
    pool = await opened(nodes, landmark=60)
    assert pool.landmark is None
    node.blocks["0x3c"] = "0xee"
    pool.recheck_chain()
    assert await ask(pool) == "a"
    # An endpoint that lacks a known block lags or was restarted: nothing is sent to it.
    node.head = 200
    pool.recheck_chain()
    assert await ask(pool) == "a"
    assert pool.landmark == "0xee"
    node.blocks["0x3c"] = None
    pool.recheck_chain()
    with pytest.raises(TransientEndpointError, match="does not know block 60"):
        await pool.make_request(SEND, ["0x00"])  # type: ignore[arg-type]
    assert SEND not in node.requests


async def test_an_endpoint_that_was_down_is_checked_before_use(
    clock: Clock, nodes: list[Node]
) -> None:
    nodes[0].fail()
    pool = await opened(nodes[:2])
    nodes[0].down, nodes[0].chain = None, 9
    nodes[1].fail()
    clock.now += 5
    with pytest.raises(EndpointError, match="is busy"):
        await pool.make_request(SEND, ["0x00"])  # type: ignore[arg-type]
    assert (nodes[0].requests, nodes[1].requests) == (
        ["eth_chainId", "eth_getBlockByNumber"],
        [SEND],
    )


async def test_no_endpoint_is_there_at_first(clock: Clock, nodes: list[Node]) -> None:
    for node in nodes:
        node.fail()
    with pytest.raises(TransientEndpointError, match="No endpoint answers"):
        await opened(nodes)


async def test_a_hanging_endpoint_does_not_delay_the_others(
    nodes: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "_PROBE_TIMEOUT", 0.01)

    async def silence(_method: str, _params: Any) -> Any:
        await asyncio.Event().wait()

    nodes[0].make_request = silence  # type: ignore[method-assign]
    pool = await opened(nodes)
    assert await ask(pool) == "b"


@pytest.mark.parametrize("genesis", [None, {}, "text"])
async def test_no_endpoint_responds(clock: Clock, genesis: Any) -> None:
    nodes = [Node("a"), Node("b")]

    async def odd(method: str, _params: Any) -> Any:
        return {"result": genesis if method == "eth_getBlockByNumber" else "0x7"}

    nodes[0].make_request = odd  # type: ignore[method-assign]
    pool = await opened(nodes)
    assert await ask(pool) == "b"
    nodes[1].make_request = odd  # type: ignore[method-assign]
    with pytest.raises(EndpointError, match="not a usable node"):
        await opened(nodes)


async def test_metrics_contain_only_host_names(clock: Clock) -> None:
    metrics = Metrics("x")
    nodes = [Node("a"), Node("b")]
    pool = await opened(nodes, metrics=metrics)
    nodes[0].fail()
    nodes[1].head = 98
    await ask(pool)
    clock.now += 11
    await ask(pool)
    await settle(pool)
    text = metrics.render().decode()
    assert "..." not in text
    assert "https" not in text
    assert metrics.value("endpoint_requests_total", endpoint="a:1", end="failed") == 2
    assert metrics.value("endpoint_requests_total", endpoint="b:1", end="ok") == 2
    assert metrics.value("endpoint_changes_total") == 1
    assert (
        metrics.value("endpoint_up", endpoint="a:1"),
        metrics.value("endpoint_up", endpoint="b:1"),
    ) == (0, 1)
    assert metrics.value("endpoint_lag_blocks", endpoint="b:1") == 2


async def test_closing_ends_all_tasks(clock: Clock, nodes: list[Node]) -> None:
    pool = await opened(nodes)
    clock.now += 11
    await ask(pool)
    await pool.disconnect()
    await pool.disconnect()
    assert [node.closed for node in nodes] == [2, 2, 2]
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "endpoint heads"]
