"""Concurrent requests are merged into one RPC batch; after a failure they are sent one by one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from web3 import AsyncWeb3

from deepsquare_chain.chain.rpc.batching import ask_all, gather_all, merged
from deepsquare_chain.chain.rpc.endpoint import CheckedProvider, SplitResponses
from deepsquare_chain.chain.rpc.pool import Pool
from deepsquare_chain.errors import EndpointError


class Endpoint(CheckedProvider):
    """Responds with the block that a request names, and counts requests."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:1")
        self.requests: list[list[Any]] = []
        self.refused: set[str] = set()
        self.split = False
        self.down_above = 10**9

    async def make_request(self, method: Any, params: Any) -> Any:
        self.requests.append([(method, params)])
        if method == "eth_chainId":
            return {"result": "0x1"}
        if params[0] in self.refused:
            return {"error": {"code": 3, "message": "execution reverted"}}
        return {"result": params[0]}

    async def make_batch_request(self, batch_requests: Any) -> Any:
        if any(method == "eth_chainId" for method, _ in batch_requests):
            return [{"result": "0x1"}, {"result": {"hash": "0x00"}}]
        self.requests.append(batch_requests)
        if len(batch_requests) > self.down_above:
            raise EndpointError("down")
        result = [
            {"error": {"code": 3, "message": "execution reverted"}}
            if params[0] in self.refused
            else {"result": params[0]}
            for _, params in batch_requests
        ]
        return SplitResponses(result) if self.split else result


@pytest.fixture
def endpoint() -> Endpoint:
    return Endpoint()


@pytest.fixture
def w3(endpoint: Endpoint) -> Any:
    return AsyncWeb3(Pool([endpoint]))


async def one(w3: Any, params: str) -> Any:
    answer = await w3.provider.make_request("eth_call", [params])
    return answer.get("result", "refused")


async def several(w3: Any, *params: str) -> Any:
    """Nested readers, such as an observer in a cycle."""
    return await asyncio.gather(*(one(w3, item) for item in params))


def sizes(endpoint: Endpoint) -> list[int]:
    return [len(request) for request in endpoint.requests]


async def ask(w3: Any) -> list[Any]:
    with merged(w3):
        return await gather_all(
            one(w3, "a"),
            ask_all(w3, [("eth_call", ["b"]), ("eth_call", ["c"])]),
            several(w3, "d", "e"),
        )


async def test_concurrent_calls_are_one_request(w3: Any, endpoint: Endpoint) -> None:
    assert await ask(w3) == ["a", ["b", "c"], ["d", "e"]]
    assert sizes(endpoint) == [5]
    await several(w3, "f", "g")  # without a block that merges
    assert sizes(endpoint) == [5, 1, 1]


async def test_a_rejected_call_is_retried_alone(w3: Any, endpoint: Endpoint) -> None:
    endpoint.refused = {"d"}
    assert await ask(w3) == ["a", ["b", "c"], ["refused", "e"]]
    assert sizes(endpoint) == [5, 1]


@pytest.mark.parametrize("fault", ["down", "split"])
async def test_after_an_incomplete_response_each_reader_sends_its_own_request(
    w3: Any, endpoint: Endpoint, fault: str
) -> None:
    endpoint.split = fault == "split"
    endpoint.down_above = 2 if fault == "down" else 10**9
    assert await ask(w3) == ["a", ["b", "c"], ["d", "e"]]
    assert sorted(sizes(endpoint)) == [1, 1, 1, 2, 5]


async def test_batches_respect_the_endpoints_limit_without_splitting_a_reader(
    w3: Any, endpoint: Endpoint
) -> None:
    while endpoint.batch_size.size > 2:
        endpoint.batch_size.refused(endpoint.batch_size.size)
    assert await ask(w3) == ["a", ["b", "c"], ["d", "e"]]
    assert sorted(sizes(endpoint)) == [1, 2, 2]


async def test_a_cancelled_reader_delays_no_other(w3: Any, endpoint: Endpoint) -> None:
    with merged(w3):
        first, second = (asyncio.ensure_future(one(w3, item)) for item in "ab")
        await asyncio.sleep(0)
        first.cancel()
        assert await second == "b"
