"""Nodes for audits: one that serves recorded logs without a socket, and manipulations of logs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from deepsquare_chain.chain.bindings.deployment import Deployment
from tests.support.recorded import RecordedGrid

Falsification = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


def spelled(log: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded log in the format of JSON-RPC."""
    return {
        "address": log["address"].lower(),
        "topics": ["0x" + bytes(topic).hex() for topic in log["topics"]],
        "data": "0x" + bytes(log["data"]).hex(),
        "blockNumber": hex(log["blockNumber"]),
        "blockHash": "0x" + log["blockHash"].hex(),
        "transactionHash": "0x" + log["transactionHash"].hex(),
        "logIndex": hex(log["logIndex"]),
        "removed": False,
    }


class RecordedNode:
    """The parts of a node that are needed to read events."""

    def __init__(self, grid: RecordedGrid, deployment: Deployment | None = None) -> None:
        self.logs = [spelled(log) for log in grid.chain.logs]
        self.times = dict(grid.chain.block_times)
        self.last = grid.chain.block
        self.deployment = deployment or grid.deployment
        self.w3 = SimpleNamespace(provider=self, eth=self)

    @property
    async def block_number(self) -> int:
        return self.last

    async def make_batch_request(self, batch: list[Any]) -> list[dict[str, Any]]:
        return [{"result": self.answer(method, params)} for method, params in batch]

    def answer(self, method: str, params: list[Any]) -> Any:
        if method == "eth_getBlockByNumber":
            number = int(params[0], 16)
            if number > self.last:
                return None
            time = self.times.get(number, 10**9 + number)
            block_hash = "0x" + number.to_bytes(32, "big").hex()
            return {"number": hex(number), "hash": block_hash, "timestamp": hex(time)}
        assert method == "eth_getLogs"
        query = params[0]
        first, last = int(query["fromBlock"], 16), int(query["toBlock"], 16)
        contract_addresses = {contract.lower() for contract in query["address"]}
        return [
            log
            for log in self.logs
            if first <= int(log["blockNumber"], 16) <= last and log["address"] in contract_addresses
        ]


def drop(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop the last log."""
    return logs[:-1]


def alter_data(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Change the last digit of the last log's data."""
    last = logs[-1]
    data = last["data"]
    changed = data[:-1] + ("0" if data[-1] != "0" else "1") if len(data) > 2 else "0x01"
    return [*logs[:-1], {**last, "data": changed}]


def alter_topic(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Change the last topic of the last log, so that it names another job or account."""
    last = logs[-1]
    topic = last["topics"][-1]
    changed = topic[:-1] + ("7" if topic[-1] != "7" else "8")
    return [*logs[:-1], {**last, "topics": [*last["topics"][:-1], changed]}]


def add(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Duplicate the last log, with the next log index."""
    last = logs[-1]
    return [*logs, {**last, "logIndex": hex(int(last["logIndex"], 16) + 1)}]


def other_block(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Change the block hash of the last log to that of an unknown block."""
    return [*logs[:-1], {**logs[-1], "blockHash": "0x" + "ab" * 32}]


FALSIFICATIONS: dict[str, Falsification] = {
    "drops a log": drop,
    "alters data": alter_data,
    "alters a topic": alter_topic,
    "adds a log": add,
}
