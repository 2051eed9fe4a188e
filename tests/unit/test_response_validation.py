"""Response validation: used fields must be valid, unused fields are ignored."""

from __future__ import annotations

from typing import Any

import pytest

from deepsquare_chain.chain.rpc.responses import InvalidResultError, checked

HASH = "0x" + "11" * 32
OTHER = "0x" + "22" * 32
ADDRESS = "0x" + "33" * 20
LOG = {
    "address": ADDRESS,
    "topics": [HASH],
    "data": "0x01",
    "blockNumber": "0x5",
    "blockHash": HASH,
    "transactionHash": OTHER,
    "logIndex": "0x0",
    "removed": False,
}
TRANSACTION = {"hash": HASH, "nonce": "0x1", "from": ADDRESS, "to": ADDRESS, "input": "0x"}
RECEIPT = {
    "transactionHash": HASH,
    "blockHash": OTHER,
    "blockNumber": "0x5",
    "gasUsed": "0x5208",
    "status": "0x1",
    "logs": [LOG],
    "from": ADDRESS,
}
BLOCK = {"number": "0x5", "hash": HASH, "timestamp": "0x6", "transactions": [HASH]}

#: Fields that nobody here reads, as real chains have them.
UNUSED: dict[str, dict[str, Any]] = {
    "EIP-7702": {"type": "0x4", "authorizationList": [{"chainId": "0x1", "address": ADDRESS}]},
    "a deposit of a rollup": {"type": "0x7e", "sourceHash": HASH, "mint": "0x0", "r": "0x"},
    "a type of a chain of its own": {"type": "0x68", "chainId": None, "v": "none"},
    "odd signatures": {"v": {}, "r": 5.5, "s": None, "yParity": "yes"},
    "odd lists": {"accessList": 7, "withdrawals": "none", "blobVersionedHashes": [1]},
    "null where there is nothing": {"extraData": None, "logsBloom": None, "type": None},
    "extra": {"l1BlockNumber": "0x1", "timeboosted": False, "anything": {"a": [None]}},
}


@pytest.mark.parametrize("kind", UNUSED)
@pytest.mark.parametrize(
    ("method", "result"),
    [
        ("eth_getTransactionByHash", TRANSACTION),
        ("eth_getTransactionReceipt", RECEIPT),
        ("eth_getBlockByNumber", BLOCK),
        ("eth_getLogs", LOG),
    ],
)
def test_unread_fields_change_nothing(method: str, result: dict[str, Any], kind: str) -> None:
    with_unused = result | UNUSED[kind]
    is_list = method == "eth_getLogs"
    outcome = checked(method, [with_unused] if is_list else with_unused)
    outcome = outcome[0] if is_list else outcome
    assert {name: outcome[name] for name in result} == result
    # web3 can format the remaining fields without an error.
    assert all(outcome.get(name) is None or name in result for name in ("v", "r", "accessList"))


@pytest.mark.parametrize(
    ("method", "result", "name"),
    [
        ("eth_getTransactionByHash", TRANSACTION, "nonce"),
        ("eth_getTransactionReceipt", RECEIPT, "status"),
        ("eth_getTransactionReceipt", RECEIPT, "gasUsed"),
        ("eth_getBlockByNumber", BLOCK, "hash"),
        ("eth_getBlockByNumber", BLOCK, "timestamp"),
    ],
)
@pytest.mark.parametrize("value", [None, "odd", 5, [], "0x"])
def test_read_values_must_be_valid(
    method: str, result: dict[str, Any], name: str, value: Any
) -> None:
    with pytest.raises(InvalidResultError):
        checked(method, result | {name: value})


def test_a_log_of_one_position_counts_once() -> None:
    second = LOG | {"logIndex": "0x1"}
    assert checked("eth_getLogs", [LOG, second, LOG, second | {"extra": 1}]) == [LOG, second]
    assert checked("eth_getLogs", [LOG | {"removed": True}, second]) == [second]
    # The same index of another block, as a reorganisation leaves it, is another log.
    other_block_log = LOG | {"blockHash": OTHER}
    assert checked("eth_getLogs", [LOG, other_block_log]) == [LOG, other_block_log]
    result = checked("eth_getTransactionReceipt", RECEIPT | {"logs": [LOG, LOG, second]})
    assert result["logs"] == [LOG, second]


@pytest.mark.parametrize(
    "change", [{"data": "0x02"}, {"topics": [OTHER]}, {"address": "0x" + "44" * 20}]
)
def test_two_logs_of_one_position_are_invalid(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidResultError, match="same block and index"):
        checked("eth_getLogs", [LOG, LOG | change])


def test_a_receipt_without_a_block_is_none() -> None:
    """Some nodes return a receipt for a pending transaction."""
    waiting = RECEIPT | {"blockHash": None, "blockNumber": None, "logs": []}
    assert checked("eth_getTransactionReceipt", waiting) is None
