"""Blocks and transactions of the index, from nodes that omit fields."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from deepsquare_chain.chain.rpc import batching
from deepsquare_chain.chain.rpc.responses import checked
from deepsquare_chain.indexer import block_data
from deepsquare_chain.indexer.block_data import read_block_data

pytestmark = pytest.mark.unit

BLOCK_HASH, FIRST, SECOND = ("0x" + text * 32 for text in ("b1", "c1", "c2"))
SENDER = "0x" + "22" * 20
BLOCK = {
    "number": "0x5",
    "hash": BLOCK_HASH,
    "parentHash": FIRST,
    "timestamp": "0x6",
    "gasUsed": "0x1",
    "gasLimit": "0x2",
    "transactions": [FIRST, SECOND],
}
SENT = {"hash": SECOND, "nonce": "0x7", "from": SENDER, "to": SENDER, "input": "0x", "value": "0x0"}
RECEIPT = {
    "transactionHash": SECOND,
    "blockHash": BLOCK_HASH,
    "blockNumber": "0x5",
    "gasUsed": "0x5208",
    "status": "0x1",
    "logs": [],
}
SIGNED = {"v": "0x1ffffffffffffffff", "r": "0x1", "s": "0x1", "gasPrice": "0x9"}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "bare": ({}, {}, 0),
    "a legacy transaction": (SIGNED, {"transactionIndex": "0x1"}, 9),
    "blobs": (
        SIGNED | {"type": "0x3", "blobVersionedHashes": ["0x01" + "ab" * 31], "yParity": None},
        {"type": "0x3", "effectiveGasPrice": "0x4", "blobGasUsed": "0x20000"},
        4,
    ),
    "a deposit of a rollup": (
        {"type": "0x7e", "sourceHash": FIRST, "mint": "0x5"},
        {"type": "0x7e", "depositNonce": "0x7", "l1Fee": "bogus", "effectiveGasPrice": "0x0"},
        0,
    ),
    "unknown": (SIGNED | {"type": "0x55", "calls": [{}]}, {"type": "0x55", "feePayer": SENDER}, 9),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_a_transaction_of_any_kind_is_read(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    sent_transaction, receipt, price = KINDS[kind]
    answers = {
        "eth_getBlockByNumber": BLOCK,
        "eth_getTransactionByHash": SENT | sent_transaction,
        "eth_getTransactionReceipt": RECEIPT | receipt,
    }

    async def ask_all(_w3: Any, requests: list[tuple[str, list[Any]]]) -> list[Any]:
        return [checked(method, answers[method]) for method, _ in requests]

    for module in (block_data, batching):
        monkeypatch.setattr(module, "ask_all", ask_all)
    event: Any = SimpleNamespace(block_number=5, block_hash=BLOCK_HASH, tx_hash=SECOND)
    data = await read_block_data(SimpleNamespace(), [event])  # type: ignore[arg-type]
    assert data is not None
    transaction = data.transactions[SECOND]
    assert (transaction.position, transaction.nonce, transaction.gas_price) == (1, 7, price)
    assert transaction.ok
    assert data.headers[5].transactions == 2
