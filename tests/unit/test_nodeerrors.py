"""Classification of the error texts of nodes and hosted services; transaction fees."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from web3.exceptions import Web3RPCError

from deepsquare_chain.chain.rpc.responses import (
    NodeError,
    classify,
    is_unsupported,
    node_message,
)
from deepsquare_chain.chain.transactions.fees import Fees, market
from tests.support.fakechain import FakeChain, refusal

SAYINGS = [
    ("already known", NodeError.ALREADY_KNOWN),
    ("ALREADY_EXISTS: already known", NodeError.ALREADY_KNOWN),
    ("INTERNAL_ERROR: existing tx with same hash", NodeError.ALREADY_KNOWN),
    ("Known transaction", NodeError.ALREADY_KNOWN),
    ("AlreadyKnown", NodeError.ALREADY_KNOWN),
    ("transaction already imported", NodeError.ALREADY_KNOWN),
    ("nonce too low: next nonce 5, tx nonce 4", NodeError.NONCE_TOO_LOW),
    ("OldNonce, Current nonce: 3, nonce of rejected tx: 2", NodeError.NONCE_TOO_LOW),
    ("Nonce too high", NodeError.NONCE_TOO_HIGH),
    ("replacement transaction underpriced", NodeError.REPLACEMENT_UNDERPRICED),
    ("Replacement transaction underpriced", NodeError.REPLACEMENT_UNDERPRICED),
    ("transaction underpriced", NodeError.UNDERPRICED),
    ("max fee per gas less than block base fee", NodeError.UNDERPRICED),
    ("FeeTooLow, MaxFeePerGas too low", NodeError.UNDERPRICED),
    ("insufficient funds for gas * price + value: balance 0", NodeError.INSUFFICIENT_FUNDS),
    ("Insufficient funds for gas * price + value", NodeError.INSUFFICIENT_FUNDS),
    ("Upfront cost exceeds account balance", NodeError.INSUFFICIENT_FUNDS),
    ("InsufficientFunds, Account balance: 0", NodeError.INSUFFICIENT_FUNDS),
    ("txpool is full", NodeError.POOL_FULL),
    ("rate limit exceeded", NodeError.RATE_LIMITED),
    ("daily request limit exceeded", NodeError.RATE_LIMITED),
    ("Your app has exceeded its compute units per second capacity", NodeError.RATE_LIMITED),
    ("query returned more than 10000 results", NodeError.RANGE_TOO_LARGE),
    ("Log response size exceeded. You can make", NodeError.RANGE_TOO_LARGE),
    ("eth_getLogs is limited to a 10,000 range", NodeError.RANGE_TOO_LARGE),
    ("block range is too wide", NodeError.RANGE_TOO_LARGE),
    ("exceed maximum block range: 50000", NodeError.RANGE_TOO_LARGE),
    ("eth_getLogs range is too large, max is 1k blocks", NodeError.RANGE_TOO_LARGE),
    ("query timeout exceeded", NodeError.RANGE_TOO_LARGE),
    ("limit exceeded", NodeError.RANGE_TOO_LARGE),
    ("range 1000000 exceeds limit of 10000", NodeError.RANGE_TOO_LARGE),
    ("range 9009594 is bigger than range limit 2000", NodeError.RANGE_TOO_LARGE),
    ("ranges over 10000 blocks are not supported on freetier", NodeError.RANGE_TOO_LARGE),
    ("query exceeds max results 20000, retry with the range 1-9", NodeError.RANGE_TOO_LARGE),
    (
        "eth_getLogs and eth_newFilter are limited to a 10,000 blocks range",
        NodeError.RANGE_TOO_LARGE,
    ),
    ("header not found", NodeError.UNKNOWN_BLOCK),
    ("unknown block", NodeError.UNKNOWN_BLOCK),
    ("exceeds block gas limit", NodeError.INVALID),
    ("intrinsic gas too low", NodeError.INVALID),
    ("NonceGap, Future nonce. Expected nonce: 3", NodeError.NONCE_TOO_HIGH),
    (
        "Transaction nonce is too distant from current sender nonce",
        NodeError.NONCE_TOO_HIGH,
    ),
    ("could not replace existing tx", NodeError.REPLACEMENT_UNDERPRICED),
    ("future transaction tries to replace pending", NodeError.POOL_FULL),
    ("in-flight transaction limit reached for delegated accounts", NodeError.POOL_FULL),
    ("project ID request rate exceeded", NodeError.RATE_LIMITED),
    ("You've exceeded the RPS limit available on the current plan.", NodeError.RATE_LIMITED),
    # erigon 3: a sender's own transaction again, a full sub-pool, names in one word
    ("existing txn with same hash", NodeError.ALREADY_KNOWN),
    ("pending sub-pool is full", NodeError.POOL_FULL),
    ("spammer", NodeError.POOL_FULL),
    ("IntrinsicGas", NodeError.INVALID),
    # Nethermind since 2026
    ("nonce too far in future", NodeError.NONCE_TOO_HIGH),
    ("delegation nonce gap", NodeError.NONCE_TOO_HIGH),
    ("gas limit reached", NodeError.INVALID),
    # Besu
    ("An invalid transaction with a lower nonce exists", NodeError.NONCE_TOO_HIGH),
    ("Requested range exceeds maximum RPC range limit", NodeError.RANGE_TOO_LARGE),
    ("Wrong chainId", NodeError.INVALID),
    # geth: no limit of a range of logs, although it sounds like one
    ("account limit exceeded", NodeError.POOL_FULL),
    ("address already reserved", NodeError.POOL_FULL),
    # reth
    ("transaction priority fee below minimum required priority fee 1", NodeError.UNDERPRICED),
    ("exceeds max transaction gas limit", NodeError.INVALID),
    # anvil
    (
        "Tx: [0x01] insufficient gas price to replace existing transaction",
        NodeError.REPLACEMENT_UNDERPRICED,
    ),
    # hardhat
    ("Known transaction: 0x01", NodeError.ALREADY_KNOWN),
    (
        "Sender doesn't have enough funds to send tx. The max upfront cost is: 2",
        NodeError.INSUFFICIENT_FUNDS,
    ),
    # EthereumJS
    ("0x01: this transaction is already in the TxPool", NodeError.ALREADY_KNOWN),
    ("replacement gas too low, got tip 1, min: 2", NodeError.REPLACEMENT_UNDERPRICED),
    (
        "Cannot add tx for 0x01: already have max amount of txs for this account",
        NodeError.POOL_FULL,
    ),
    ("Payment Required", NodeError.RATE_LIMITED),
    ("15/second request limit reached", NodeError.RATE_LIMITED),
    ("internal error", NodeError.OTHER),
    ("", NodeError.OTHER),
]


@pytest.mark.parametrize(("message", "kind"), SAYINGS)
def test_error_messages_of_nodes_are_recognised(message: str, kind: NodeError) -> None:
    assert classify(refusal(message)) is kind


def test_answers_without_a_proper_error() -> None:
    assert classify(Web3RPCError("nonce too low")) is NodeError.NONCE_TOO_LOW
    odd = Web3RPCError("x", rpc_response={"error": "insufficient funds"})  # type: ignore[typeddict-item]
    assert node_message(odd) == "x"
    assert len(node_message(refusal("w" * 5_000))) == 300


def test_a_code_of_several_meanings() -> None:
    """The code means an unsupported method in EIP-1474, but an account that can't pay in Besu."""
    assert is_unsupported({"code": -32004, "message": "Method not supported"})
    assert is_unsupported({"code": -32004, "message": "no"})
    assert not is_unsupported({"code": -32004, "message": "Upfront cost exceeds account balance"})


wei = st.integers(0, 10**14)


@given(old=st.tuples(wei, wei), fresh=st.tuples(wei, wei))
def test_raised_fees_are_enough_for_every_pool(
    old: tuple[int, int], fresh: tuple[int, int]
) -> None:
    raised = Fees(*old).bumped(Fees(*fresh))
    for new, before, required in zip(
        (raised.max_fee, raised.priority_fee), old, fresh, strict=True
    ):
        assert new * 8 >= before * 9
        assert new >= required


@given(fees=st.tuples(wei, wei), ceiling=wei)
def test_a_ceiling_limits_both_fees(fees: tuple[int, int], ceiling: int) -> None:
    limited = Fees(*fees).within(ceiling)
    assert limited.max_fee <= ceiling
    assert limited.priority_fee <= max(limited.max_fee, 0)


async def test_a_node_without_the_tip_method_gets_no_other_request(
    recwarn: pytest.WarningsRecorder,
) -> None:
    """web3's own property would warn on stderr, outside all logs."""
    chain = FakeChain()
    chain.tip_error = refusal("the method eth_maxPriorityFeePerGas does not exist/is not available")
    result = await market(chain)  # type: ignore[arg-type]
    assert result.fees == Fees(max_fee=3 * 10**9, priority_fee=10**9)
    # Files that another test left open may be collected now, and warn too.
    assert not [item for item in recwarn if item.category is not ResourceWarning]
