"""The sender with a node that fails on request: each effect once, no nonce lost."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from eth_account import Account
from eth_account.datastructures import SignedTransaction
from web3.exceptions import ContractCustomError, TransactionNotFound

from deepsquare_chain.chain.bindings import reverts
from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.chain.signers import ExternalSigner
from deepsquare_chain.chain.transactions.fees import Fees, is_gas_free, market
from deepsquare_chain.chain.transactions.outbox import TxState
from deepsquare_chain.chain.transactions.sender import (
    NonceTakenError,
    OutOfGasError,
    Sender,
    TransactionCancelledError,
)
from deepsquare_chain.errors import (
    EndpointError,
    InsufficientFundsError,
    RevertedError,
    StoreError,
    UsageError,
    WaitTimeoutError,
)
from deepsquare_chain.observability.metrics import Metrics
from deepsquare_chain.store.database import Store
from tests.support.fakechain import GWEI, FakeBlock, FakeChain, Tx, refusal

ACCOUNT = Account.from_key(b"\x11" * 32)
TARGET = "0x" + "51" * 20
LOST = EndpointError("the connection was closed")


def call(number: int = 1) -> Call:
    return Call(to=TARGET, data=number.to_bytes(4, "big"), label=f"call {number}")


@pytest.fixture
def chain() -> FakeChain:
    return FakeChain()


@pytest.fixture
def store() -> Iterator[Store]:
    with Store.open(None, chain_id=1, contract=TARGET, account=ACCOUNT.address) as result:
        yield result


@pytest.fixture
def sender(chain: FakeChain, store: Store) -> Sender:
    return make(chain, store)


def make(chain: FakeChain, store: Store, **options: Any) -> Sender:
    settings = {"chain_id": 1, "poll_interval": 0.001, "stuck_blocks": 2, **options}
    return Sender(chain, ACCOUNT, store, **settings)  # type: ignore[arg-type]


async def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds that another task causes."""
    while not condition():  # noqa: ASYNC110 - nobody sets an event in a fake
        await asyncio.sleep(0.001)


class SlowSigner(ExternalSigner):
    """Signs once the event loop allows it: never, if the loop is blocked by the signature."""

    def __init__(self) -> None:
        self.address = ACCOUNT.address
        self.asked = 0
        self.go = threading.Event()

    def sign_transaction(self, transaction_dict: Any, /) -> SignedTransaction:
        self.asked += 1
        assert self.go.wait(30), "the event loop waits for the signer"
        return ACCOUNT.sign_transaction(transaction_dict)


async def mining(chain: FakeChain, pause: float = 0.01) -> None:
    """Make blocks until cancelled."""
    while True:
        await asyncio.sleep(pause)
        chain.mine()


def use_nonce_elsewhere(chain: FakeChain) -> None:
    """Put a transaction of another program with the account's nonce 0 into the mempool."""
    raw = ACCOUNT.sign_transaction(
        {
            "type": 2, "chainId": 1, "nonce": 0, "to": TARGET, "value": 0, "data": b"other",
            "gas": 50_000, "maxFeePerGas": 10 * GWEI, "maxPriorityFeePerGas": GWEI,
        }
    ).raw_transaction  # fmt: skip
    chain._pool(Tx.read(bytes(raw)))


def states(store: Store) -> list[TxState]:
    return [entry.state for entry in store.recent_entries()]


async def test_a_call_is_mined(chain: FakeChain, store: Store, sender: Sender) -> None:
    receipt = await sender.send(call())
    assert receipt.block_number == 1
    assert receipt.fee_wei == 21_000 * (chain.base_fee + GWEI)
    assert (receipt.label, receipt.events) == ("call 1", ())
    (tx,) = chain.mined()
    assert 0 <= 50_000 * 3 // 2 + 100_000 - tx.gas < 1_000
    assert tx.nonce == 0
    assert states(store) == [TxState.MINED]
    assert store.recent_entries()[0].mined_hash == receipt.hash
    assert sender.pending() == []


async def test_many_at_once_get_a_nonce_each(chain: FakeChain, sender: Sender) -> None:
    chain.automine = False
    task = asyncio.create_task(mining(chain))
    await asyncio.gather(*(sender.send(call(number)) for number in range(20)))
    task.cancel()
    assert sorted(tx.nonce for tx in chain.mined()) == list(range(20))
    assert len({tx.data for tx in chain.mined()}) == 20


async def test_a_call_that_would_revert_is_not_signed(
    chain: FakeChain, store: Store, sender: Sender
) -> None:
    data = "0x" + (reverts.TooEarly.selector + (7).to_bytes(32, "big")).hex()
    chain.estimate_error = ContractCustomError(data, data=data)
    with pytest.raises(reverts.TooEarly) as early:
        await sender.send(call())
    assert early.value.job_id == 7
    assert (chain.sent, states(store)) == ([], [])
    # A given gas limit skips the estimate, so that only the simulation checks the call; it can be skipped too.
    chain.call_error = chain.estimate_error
    with pytest.raises(reverts.TooEarly):
        await sender.send(call(), gas=100_000)
    with pytest.raises(reverts.TooEarly):
        await sender.simulate(call())
    await sender.send(call(), gas=100_000, simulate=False)
    assert len(chain.mined()) == 1


async def test_a_node_that_gives_the_reason_to_calls_only(chain: FakeChain, sender: Sender) -> None:
    data = "0x" + (reverts.NotLost.selector + (9).to_bytes(32, "big")).hex()
    chain.estimate_error = refusal("execution reverted")
    chain.call_error = ContractCustomError(data, data=data)
    with pytest.raises(reverts.NotLost):
        await sender.send(call())


async def test_already_known_is_success(chain: FakeChain, sender: Sender) -> None:
    chain.faults = [("lost", refusal("already known"))]
    chain.automine = False
    task = asyncio.create_task(mining(chain))
    await sender.send(call())
    task.cancel()
    assert len(chain.mined()) == len(chain.sent) == 1


async def test_a_nonce_used_by_another_program_is_skipped(
    chain: FakeChain, store: Store, sender: Sender
) -> None:
    def use_nonce_of_other(_tx: Any) -> None:
        use_nonce_elsewhere(chain)
        chain.mine()

    chain.faults = [use_nonce_of_other]
    receipt = await sender.send(call())
    assert [tx.nonce for tx in chain.mined()] == [0, 1]
    assert states(store) == [TxState.MINED, TxState.ABANDONED]
    assert receipt.hash == store.recent_entries()[0].mined_hash


async def test_an_unclear_response_neither_repeats_nor_loses_a_transaction(
    chain: FakeChain, sender: Sender
) -> None:
    chain.automine = False
    task = asyncio.create_task(mining(chain))
    chain.faults = [("lost", LOST)]  # it accepted the transaction, the response was lost
    await sender.send(call(1))
    chain.faults = [LOST]  # it never received the transaction
    await sender.send(call(2))
    task.cancel()
    assert [tx.data for tx in chain.mined()] == [call(1).data, call(2).data]
    assert [tx.nonce for tx in chain.sent] == [0, 1, 1]
    assert chain.sent[1].hash == chain.sent[2].hash  # the stored bytes, not a new signature


async def test_a_dropped_transaction_is_sent_again(chain: FakeChain, sender: Sender) -> None:
    chain.automine = False
    task = asyncio.create_task(sender.send(call()))
    await until(lambda: chain.pool)
    chain.pool.clear()
    blocks = asyncio.create_task(mining(chain))
    await task
    blocks.cancel()
    assert len(chain.mined()) == 1


async def test_a_stuck_transaction_is_replaced_with_higher_fees(
    chain: FakeChain, store: Store, sender: Sender
) -> None:
    chain.automine = False
    task = asyncio.create_task(sender.send(call()))
    await until(lambda: chain.pool)
    chain.base_fee = 10 * GWEI  # above what it offers
    for _ in range(20):
        chain.mine()
        await asyncio.sleep(0.005)
    await task
    (mined,) = chain.mined()
    first = chain.sent[0]
    assert mined.nonce == first.nonce
    assert mined.max_fee * 8 >= first.max_fee * 9
    assert mined.priority_fee * 8 >= first.priority_fee * 9
    (entry,) = store.recent_entries()
    assert len(entry.attempts) >= 2
    assert bytes.fromhex(entry.mined_hash[2:]) == mined.hash


async def test_the_first_attempt_may_still_be_mined(chain: FakeChain, sender: Sender) -> None:
    chain.automine = False
    task = asyncio.create_task(sender.send(call()))
    while len(chain.sent) < 2:
        await asyncio.sleep(0.001)
        if chain.pool and not chain.mined():
            pooled = dict(chain.pool)
            chain.pool.clear()
            chain.mine()
            chain.pool.update(pooled)
    first = chain.sent[0]
    chain.pool = {(first.sender, first.nonce): first}
    chain.mine()
    receipt = await task
    assert receipt.hash == "0x" + first.hash.hex()


async def test_a_raised_ceiling_lets_waiting_and_stuck_transactions_through(
    chain: FakeChain, store: Store
) -> None:
    sender = make(chain, store, max_fee_per_gas=5 * GWEI)
    chain.automine, chain.base_fee = False, 4 * GWEI
    stuck = asyncio.create_task(sender.send(call(1), timeout=5))
    await until(lambda: chain.pool)
    chain.base_fee = 8 * GWEI
    waiting = asyncio.create_task(sender.send(call(2), timeout=5))
    for _ in range(6):
        chain.mine()
        await asyncio.sleep(0.004)
    assert len(chain.sent) == 1
    sender.max_fee_per_gas = 50 * GWEI
    blocks = asyncio.create_task(mining(chain))
    try:
        await asyncio.gather(stuck, waiting)
    finally:
        blocks.cancel()
    assert max(tx.max_fee for tx in chain.sent) <= 50 * GWEI
    assert sender.max_fee_per_gas == 50 * GWEI


async def test_fees_stay_below_the_ceiling(chain: FakeChain, store: Store) -> None:
    sender = make(chain, store, max_fee_per_gas=5 * GWEI)
    chain.base_fee = 6 * GWEI
    with pytest.raises(WaitTimeoutError, match="ceiling"):
        await sender.send(call(), timeout=0.02)
    assert (chain.sent, states(store)) == ([], [])
    chain.base_fee = 4 * GWEI
    chain.automine = False
    task = asyncio.create_task(sender.send(call(), timeout=5))
    await until(lambda: chain.pool)
    assert chain.sent[0].max_fee == 5 * GWEI
    chain.base_fee = 8 * GWEI
    for _ in range(6):
        chain.mine()
        await asyncio.sleep(0.004)
    assert len(chain.sent) == 1  # no higher fee is possible below the ceiling: it waits
    chain.base_fee = GWEI
    chain.mine()
    await task


async def test_no_money_for_gas(chain: FakeChain, store: Store, sender: Sender) -> None:
    chain.balance = 10**12
    with pytest.raises(InsufficientFundsError) as error_info:
        await sender.send(call())
    assert ACCOUNT.address in error_info.value.message
    assert "0.000001" in error_info.value.message
    chain.balance = 10**21
    chain.faults = [refusal("insufficient funds for gas * price + value")]
    with pytest.raises(InsufficientFundsError):
        await sender.send(call())
    assert states(store) == [TxState.ABANDONED]
    await sender.send(call())
    assert [tx.nonce for tx in chain.mined()] == [0]


async def test_a_refusal_frees_the_nonce(chain: FakeChain, store: Store, sender: Sender) -> None:
    chain.faults = [refusal("exceeds block gas limit")]
    with pytest.raises(EndpointError, match="exceeds block gas limit"):
        await sender.send(call())
    await sender.send(call())
    assert [tx.nonce for tx in chain.mined()] == [0]


async def test_an_error_for_an_accepted_transaction(chain: FakeChain, sender: Sender) -> None:
    chain.automine = False
    chain.faults = [("lost", refusal("internal error", -32603))]
    task = asyncio.create_task(mining(chain))
    await sender.send(call())
    task.cancel()
    assert len(chain.sent) == len(chain.mined()) == 1


async def test_a_transaction_that_no_node_accepts_is_replaced(
    chain: FakeChain, store: Store, sender: Sender
) -> None:
    """An unknown error text is not a refusal; in the end the nonce is used by another transaction."""
    chain.automine = False
    chain.faults = [refusal("the moon is full")] * 10_000
    task = asyncio.create_task(sender.send(call(), timeout=5))
    await until(lambda: len(chain.sent) > 3)
    assert states(store) == [TxState.OPEN]
    while not any(tx.data == b"" for tx in chain.sent):
        chain.mine()
        await asyncio.sleep(0.002)
    chain.faults.clear()
    blocks = asyncio.create_task(mining(chain))
    with pytest.raises(TransactionCancelledError):
        await task
    blocks.cancel()
    assert [tx.data for tx in chain.mined()] == [b""]
    assert states(store) == [TxState.CANCELLED]


async def test_a_rejection_with_an_unknown_message_is_reported_in_time(
    chain: FakeChain, store: Store, sender: Sender
) -> None:
    chain.faults = [refusal("the moon is full")] * 10_000
    with pytest.raises(WaitTimeoutError, match=r"was sent .* the moon is full") as error_info:
        await sender.send(call(), timeout=0.05)
    assert "tx cancel 1" in error_info.value.hint
    assert states(store) == [TxState.OPEN]


@pytest.mark.parametrize("error", [LOST, refusal("transaction indexing is in progress")])
async def test_a_transaction_that_the_node_does_not_show_is_not_abandoned(
    chain: FakeChain, store: Store, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nonce is used and the node shows neither receipt nor transaction: it may be the wallet's own."""
    sender = make(chain, store)

    async def hidden(*_: Any, **__: Any) -> Any:
        raise error

    async def unknown(*_: Any, **__: Any) -> Any:
        raise TransactionNotFound("not found")

    real = chain.eth.get_transaction_receipt, chain.eth.get_block
    monkeypatch.setattr(chain.eth, "get_transaction_receipt", unknown)
    task = asyncio.create_task(sender.send(call(), timeout=5))
    await until(store.recent_entries)
    monkeypatch.setattr(chain.eth, "get_block", hidden)
    for _ in range(30):
        chain.mine()
        await asyncio.sleep(0.002)
    assert states(store) == [TxState.OPEN]
    monkeypatch.setattr(chain.eth, "get_transaction_receipt", hidden)
    await asyncio.sleep(0.02)
    monkeypatch.setattr(chain.eth, "get_transaction_receipt", real[0])
    monkeypatch.setattr(chain.eth, "get_block", real[1])
    assert (await task).block_number == 1
    assert len(chain.mined()) == 1


async def test_observations_of_a_short_wait_count_for_the_next(
    chain: FakeChain, store: Store, sender: Sender
) -> None:
    """Short waits add up: after several of them, another program's transaction is recognised."""
    chain.automine = False
    with pytest.raises(WaitTimeoutError):
        await sender.send(call(), timeout=0)
    chain.pool.clear()
    use_nonce_elsewhere(chain)
    blocks = asyncio.create_task(mining(chain, 0.005))
    while sender.pending():
        await sender.recover(timeout=0.002)
    blocks.cancel()
    assert states(store) == [TxState.ABANDONED]


async def test_an_underpriced_transaction_is_sent_with_higher_fees(
    chain: FakeChain, sender: Sender
) -> None:
    chain.faults = [refusal("transaction underpriced")]
    await sender.send(call())
    assert [tx.nonce for tx in chain.sent] == [0, 0]
    assert chain.sent[1].max_fee * 8 >= chain.sent[0].max_fee * 9


async def test_another_programs_pending_nonce_is_waited_for(chain: FakeChain, store: Store) -> None:
    """Two programs share a wallet but no outbox: no call is lost."""
    chain.automine = False
    other = Store.open(None, chain_id=1, contract=TARGET, account=ACCOUNT.address)
    first, second = make(chain, store), make(chain, other)
    tasks = [asyncio.create_task(first.send(call(1)))]
    await until(lambda: chain.pool)
    tasks.append(asyncio.create_task(second.send(call(2))))
    blocks = asyncio.create_task(mining(chain))
    await asyncio.gather(*tasks)
    blocks.cancel()
    other.close()
    assert sorted(tx.data for tx in chain.mined()) == [call(1).data, call(2).data]


async def test_a_mined_failure_is_typed(chain: FakeChain, store: Store, sender: Sender) -> None:
    data = "0x" + (reverts.NotCustomer.selector + (3).to_bytes(32, "big")).hex()
    chain.failing.add(call().data)
    chain.call_error = ContractCustomError(data, data=data)
    with pytest.raises(reverts.NotCustomer):
        await sender.send(call())
    chain.call_error = None  # the reason can no longer be requested later
    with pytest.raises(RevertedError, match="rejected by the contract"):
        await sender.send(call())
    assert states(store) == [TxState.FAILED, TxState.FAILED]


async def test_out_of_gas_is_tried_once_more(chain: FakeChain, sender: Sender) -> None:
    chain.out_of_gas_below = 300_000
    receipt = await sender.send(call())
    first, second = (tx.gas for tx in chain.sent)
    assert 0 <= 175_000 - first < 1_000
    assert second == 2 * first
    assert receipt.hash == "0x" + chain.sent[1].hash.hex()
    chain.out_of_gas_below = 10**9
    with pytest.raises(OutOfGasError, match="ran out of gas"):
        await sender.send(call())
    assert len(chain.sent) == 4


async def test_a_nonce_taken_while_waiting(chain: FakeChain, store: Store, sender: Sender) -> None:
    chain.automine = False
    task = asyncio.create_task(sender.send(call()))
    await until(lambda: chain.pool)
    chain.pool.clear()
    use_nonce_elsewhere(chain)
    blocks = asyncio.create_task(mining(chain, 0.005))
    with pytest.raises(NonceTakenError, match="nonce 0"):
        await task
    blocks.cancel()
    assert states(store) == [TxState.ABANDONED]


async def test_receipts_may_lag_behind_the_nonce(chain: FakeChain, sender: Sender) -> None:
    """At a load-balanced endpoint the nonce may be used before the receipt is available."""
    chain.hidden_receipts = 20
    assert (await sender.send(call(), timeout=5)).block_number == 1
    chain.automine = False
    blocks = asyncio.create_task(mining(chain, 0.002))  # many blocks, but too few polls
    chain.hidden_receipts = 5
    await sender.send(call(2), timeout=5)
    blocks.cancel()
    assert len(chain.mined()) == 2


async def test_a_receipt_without_a_new_head(
    chain: FakeChain, sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Head and nonce come from a stalled node, the receipt from another one."""
    chain.automine = False
    task = asyncio.create_task(sender.send(call(), timeout=5))
    await until(lambda: chain.pool)
    await asyncio.sleep(0.01)
    monkeypatch.setattr(FakeChain, "head", property(lambda _self: 0))
    monkeypatch.setattr(FakeChain, "nonce", lambda _self, *_: 0)
    tx = chain.pool.popitem()[1]
    chain.blocks.append(FakeBlock(1, "0x" + "aa" * 32, [tx]))
    assert (await task).block_number == 1


async def test_a_reorganisation_is_repaired(chain: FakeChain, store: Store, sender: Sender) -> None:
    await sender.send(call(1))
    await sender.send(call(2))
    assert len(chain.reorg(2)) == 2
    chain.automine = False
    await sender.reconcile()
    assert states(store) == [TxState.OPEN, TxState.OPEN]
    chain.mine()
    await sender.reconcile()
    assert [tx.data for tx in chain.mined()] == [call(1).data, call(2).data]
    assert states(store) == [TxState.MINED, TxState.MINED]


async def test_a_new_call_after_a_reorganisation_waits_its_turn(
    chain: FakeChain, sender: Sender
) -> None:
    await sender.send(call(1))
    chain.reorg(1)
    await sender.send(call(2))
    assert [(tx.nonce, tx.data) for tx in chain.mined()] == [(0, call(1).data), (1, call(2).data)]


async def test_an_idempotency_key_is_used_once(chain: FakeChain, store: Store) -> None:
    first = await make(chain, store).send(call(), key="job 7")
    repeated = await make(chain, store).send(call(), key="job 7")
    assert first == repeated
    assert len(chain.mined()) == 1
    chain.failing.add(call(2).data)
    with pytest.raises(RevertedError):
        await make(chain, store).send(call(2), key="job 8")
    chain.failing.clear()
    await make(chain, store).send(call(2), key="job 8")  # without effect so far, so that it counts
    assert len(chain.mined(call(2).data)) == 2


async def test_a_full_disk_hides_no_payment(
    chain: FakeChain, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transaction is mined and the full disk can't record it: its sender gets the receipt."""
    full = StoreError("The database failed: database or disk is full")

    def refuse(*_: Any, **__: Any) -> None:
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(store, "set_state", refuse)
        receipt = await make(chain, store).send(call(), key="job 7")
    assert states(store) == [TxState.OPEN]
    assert await make(chain, store).send(call(), key="job 7") == receipt
    assert len(chain.mined()) == 1
    assert states(store) == [TxState.MINED]


async def test_a_full_disk_does_not_end_a_wait(
    chain: FakeChain, store: Store, sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Higher fees can't be recorded and thus are not sent; the sent transaction is tracked."""
    chain.automine = False
    attempts = []

    def refuse(*_: Any) -> None:
        attempts.append(1)
        raise StoreError("The database failed: database or disk is full")

    monkeypatch.setattr(store, "add_attempt", refuse)
    task = asyncio.create_task(sender.send(call()))
    await until(lambda: chain.pool)
    chain.base_fee = 10 * GWEI  # above what it offers
    for _ in range(6):
        chain.mine()
        await asyncio.sleep(0.005)
    await until(lambda: attempts)
    chain.base_fee = 1
    chain.mine()
    assert (await task).label == "call 1"
    assert len({bytes(item.hash) for item in chain.sent}) == 1


async def test_a_transaction_mined_after_the_timeout_is_found(
    chain: FakeChain, store: Store, sender: Sender
) -> None:
    chain.automine = False
    with pytest.raises(WaitTimeoutError, match="not mined in time"):
        await sender.send(call(), timeout=0.02)
    assert [entry.call.label for entry in sender.pending()] == ["call 1"]
    chain.mine()
    assert [receipt.label for receipt in await make(chain, store).recover()] == ["call 1"]
    assert sender.pending() == []


async def test_concurrent_sends_share_requests(chain: FakeChain, store: Store) -> None:
    """Concurrent sends share the requests for fees, coin, head and nonce."""
    sender = make(chain, store, poll_interval=60)
    requests: Counter[str] = Counter()
    for name in ("get_balance", "get_block"):
        plain = getattr(chain.eth, name)

        async def counting(*arguments: Any, name: str = name, plain: Any = plain) -> Any:
            requests[name] += 1
            return await plain(*arguments)

        setattr(chain.eth, name, counting)
    chain.automine = False
    tasks = [asyncio.create_task(sender.send(call(number))) for number in range(3)]
    await until(lambda: len(chain.pool) == 3)
    assert requests == {"get_balance": 1, "get_block": 1}
    assert sorted(tx.nonce for tx in chain.sent) == [0, 1, 2]
    # One poll of the sender, and one that all waiting calls share.
    await until(lambda: len(sender.unattended()) == 0)
    assert len(chain.batches) <= 2
    for task in tasks:
        task.cancel()


async def test_a_slow_node_is_polled_once_for_all_waiting_calls(
    chain: FakeChain, store: Store
) -> None:
    """The interval between polls counts from the response, however long it took."""
    sender = make(chain, store, poll_interval=0.5)
    requests = 0

    async def slowly(*_: Any) -> int:
        nonlocal requests
        requests += 1
        await asyncio.sleep(0.6)
        return chain.balance

    chain.eth.get_balance = slowly  # type: ignore[method-assign]
    await asyncio.gather(*(sender.send(call(number)) for number in range(4)))
    assert requests == 1


async def test_waits_of_concurrent_senders(chain: FakeChain, store: Store, sender: Sender) -> None:
    """Recovery only handles transactions that no task waits for."""
    chain.automine = False
    task = asyncio.create_task(sender.send(call(1), timeout=5))
    await until(lambda: chain.pool)
    assert ([item.nonce for item in sender.pending()], sender.unattended()) == ([0], [])
    assert await sender.recover(timeout=0) == []
    assert not task.done()
    with pytest.raises(WaitTimeoutError):
        await sender.send(call(2), timeout=0.02)
    assert [item.nonce for item in sender.unattended()] == [1]
    task.cancel()
    await asyncio.wait([task])
    assert [item.nonce for item in sender.unattended()] == [0, 1]
    chain.mine()
    assert [receipt.label for receipt in await sender.recover()] == ["call 1", "call 2"]
    assert (sender.pending(), sender.unattended()) == ([], [])


async def test_a_failure_after_recording_ends_the_wait(
    chain: FakeChain, store: Store, sender: Sender
) -> None:
    def refused_and_gone(_tx: Tx) -> None:
        chain.down = True
        raise refusal("transaction underpriced")

    chain.faults = [refused_and_gone]
    with pytest.raises(EndpointError):
        await sender.send(call())
    chain.down = False
    assert [item.nonce for item in sender.unattended()] == [0]


async def test_sending_continues_when_the_endpoint_is_up_again(
    chain: FakeChain, sender: Sender
) -> None:
    chain.automine = False
    task = asyncio.create_task(sender.send(call(), timeout=5))
    await until(lambda: chain.pool)
    chain.down = True
    await asyncio.sleep(0.02)
    assert not task.done()
    chain.mine()
    chain.down = False
    await task
    chain.down = True
    with pytest.raises(EndpointError):
        await sender.send(call())


async def test_a_gap_is_closed(chain: FakeChain, store: Store, sender: Sender) -> None:
    """A nonce is released while a transaction with a later one is already sent."""
    chain.automine = False
    tasks = [asyncio.create_task(sender.send(call(number))) for number in (1, 2)]
    await until(lambda: len(chain.pool) == 2)
    tasks[0].cancel()
    store.set_state(sender.pending()[0].id, TxState.ABANDONED)
    del chain.pool[ACCOUNT.address, 0]
    blocks = asyncio.create_task(mining(chain, 0.005))
    await tasks[1]
    blocks.cancel()
    assert [(tx.nonce, tx.data) for tx in chain.mined()] == [(0, b""), (1, call(2).data)]


async def test_a_gap_waits_for_cheaper_gas(chain: FakeChain, store: Store) -> None:
    sender = make(chain, store, max_fee_per_gas=5 * GWEI)
    chain.automine = False
    tasks = [asyncio.create_task(sender.send(call(number), timeout=5)) for number in (1, 2)]
    await until(lambda: len(chain.pool) == 2)
    tasks[0].cancel()
    store.set_state(sender.pending()[0].id, TxState.ABANDONED)
    del chain.pool[ACCOUNT.address, 0]
    chain.base_fee = 8 * GWEI
    blocks = asyncio.create_task(mining(chain, 0.005))
    await asyncio.sleep(0.2)
    assert not tasks[1].done()
    chain.base_fee = GWEI
    await tasks[1]
    blocks.cancel()
    assert [(tx.nonce, tx.data) for tx in chain.mined()] == [(0, b""), (1, call(2).data)]


async def test_confirmations_are_waited_for(
    chain: FakeChain, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A receipt is requested once when mined, and once when confirmed."""
    sender, requests = make(chain, store, confirmations=3), 0
    get_receipt = chain.eth.get_transaction_receipt

    async def counted(tx_hash: bytes) -> dict[str, Any]:
        nonlocal requests
        requests += 1
        return await get_receipt(tx_hash)

    monkeypatch.setattr(chain.eth, "get_transaction_receipt", counted)
    task = asyncio.create_task(sender.send(call()))
    await until(lambda: requests == 1 and bool(chain.mined()))
    for _ in range(3):
        await asyncio.sleep(0.02)
        assert not task.done()
        assert requests == 1
        chain.mine()
    assert (await task).block_number == 1
    assert requests == 2


async def test_a_reorganisation_before_the_confirmations(chain: FakeChain, store: Store) -> None:
    sender = make(chain, store, confirmations=3)
    task = asyncio.create_task(sender.send(call()))
    await until(lambda: bool(chain.mined()))
    await asyncio.sleep(0.02)
    chain.automine = False
    assert len(chain.reorg(1)) == 1
    for _ in range(4):  # until it is mined again
        await until(lambda: bool(chain.pool) or bool(chain.mined()))
        chain.mine()
        await asyncio.sleep(0.02)
    assert (await asyncio.wait_for(task, 30)).block_number >= 1
    assert len(chain.mined()) == 1


async def test_speed_up(chain: FakeChain, sender: Sender) -> None:
    chain.automine = False
    task = asyncio.create_task(sender.send(call()))
    await until(lambda: chain.pool)
    await sender.speed_up(sender.pending()[0])
    chain.mine()
    receipt = await task
    assert receipt.hash == "0x" + chain.sent[1].hash.hex()


def test_two_processes_share_an_outbox(chain: FakeChain, tmp_path: Any) -> None:
    """The database reserves nonces, so that processes use different ones."""
    identity = {"chain_id": 1, "contract": TARGET, "account": ACCOUNT.address}
    first = Store.open(tmp_path / "a.db", **identity)
    second = Store.open(tmp_path / "a.db", **identity)
    chain.automine = False

    async def both() -> None:
        senders = [make(chain, first), make(chain, second)]
        task = asyncio.create_task(mining(chain))
        await asyncio.gather(*(senders[n % 2].send(call(n)) for n in range(10)))
        task.cancel()

    asyncio.run(both())
    assert sorted(tx.nonce for tx in chain.mined()) == list(range(10))
    first.close()
    second.close()


@pytest.mark.parametrize("hidden", [0, 2])
async def test_own_transaction_behind_a_used_nonce_is_not_sent_again(
    chain: FakeChain, sender: Sender, monkeypatch: pytest.MonkeyPatch, hidden: int
) -> None:
    """Another task may have resent the transaction, so that it is mined before its first broadcast."""
    send, broadcasts = chain.eth.send_raw_transaction, []

    async def late(raw: bytes) -> Any:
        await send(raw)
        if not broadcasts:
            broadcasts.append(raw)
            raise refusal("nonce too low")

    monkeypatch.setattr(chain.eth, "send_raw_transaction", late)
    chain.hidden_receipts = hidden
    await sender.send(call(7), key="once")
    assert len(chain.mined(call(7).data)) == 1
    assert sender.pending() == []


async def test_a_transaction_that_another_process_sent_is_not_sent_twice(
    chain: FakeChain, store: Store, sender: Sender
) -> None:
    """Between record and broadcast another process that shares the outbox resends it."""

    def first(tx: Any) -> None:
        chain._pool(tx)
        chain.mine()  # so that our own broadcast hears "nonce too low"

    chain.faults = [first]
    await sender.send(call())
    assert len(chain.mined(call().data)) == 1
    assert states(store) == [TxState.MINED]


def transaction_of_other(chain: FakeChain, nonce: int, data: bytes = b"other") -> Tx:
    """Return a transaction of the same wallet, signed by another program."""
    fields = {
        "type": 2, "chainId": 1, "nonce": nonce, "to": TARGET, "value": 0, "data": data,
        "gas": 50_000, "maxFeePerGas": 10 * GWEI, "maxPriorityFeePerGas": GWEI,
    }  # fmt: skip
    tx = Tx.read(bytes(ACCOUNT.sign_transaction(fields).raw_transaction))
    chain._pool(tx)
    return tx


async def test_an_account_that_sends_without_a_pause_starves_no_other(
    chain: FakeChain, store: Store, sender: Sender
) -> None:
    """Another program always has one pending transaction."""
    chain.automine = False

    def again(_tx: Any) -> None:
        chain.mine()
        transaction_of_other(chain, chain.nonce(ACCOUNT.address), b"more")

    transaction_of_other(chain, 0)
    chain.faults = [again] * 5
    task = asyncio.create_task(sender.send(call(), timeout=10))
    await until(lambda: any(tx.data == call().data for tx in chain.pool.values()))
    chain.mine()
    await task
    assert len(chain.mined(call().data)) == 1


async def test_a_nonce_conflict_is_logged(
    chain: FakeChain, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = Metrics("x")
    sender = make(chain, store, metrics=metrics)
    await sender.send(call())
    await sender.reconcile()
    tx = transaction_of_other(chain, 1)
    block = chain.mine()
    await sender.reconcile()
    logged = capsys.readouterr().out
    assert logged.count("nonce conflict detected") == 1
    assert f"in transaction 0x{tx.hash.hex()} of block {block.number}" in logged
    assert metrics.value("nonce_conflicts_total") == 1
    # Own transactions are not reported, the other program's one is reported once.
    await sender.send(call(2))
    await sender.reconcile()
    assert metrics.value("nonce_conflicts_total") == 1


@pytest.mark.parametrize("moment", ["idle", "while one waits", "before its first broadcast"])
async def test_calls_of_another_program_are_recorded(
    chain: FakeChain, store: Store, moment: str
) -> None:
    """The log shows the calls of another program that uses the wallet by mistake."""
    sender = make(chain, store)
    await sender.reconcile()
    for _ in range(10):
        chain.mine()
    await sender.reconcile()
    chain.automine = False
    blocks = None
    if moment == "idle":
        transaction_of_other(chain, 0)
        chain.mine()
        await sender.reconcile()
    elif moment == "while one waits":
        task = asyncio.create_task(sender.send(call()))
        await until(lambda: chain.pool)
        chain.pool.clear()
        transaction_of_other(chain, 0)
        blocks = asyncio.create_task(mining(chain, 0.005))
        with pytest.raises(NonceTakenError):
            await task
    else:

        def first(_tx: Tx) -> None:
            transaction_of_other(chain, 0)
            chain.mine()

        chain.faults = [first]
        task = asyncio.create_task(sender.send(call()))
        blocks = asyncio.create_task(mining(chain, 0.005))
        await task
    if blocks is not None:
        blocks.cancel()
    (result,) = sender.nonce_conflicts()
    assert result.data == chain.mined()[0].data


async def test_transactions_from_before_the_start_are_no_conflict(
    chain: FakeChain, store: Store
) -> None:
    """A restart with an empty folder: transactions of the earlier process are mined only now."""
    sender = make(chain, store)
    chain.automine = False
    await sender.reconcile()
    transaction_of_other(chain, 0)
    chain.mine()
    await sender.reconcile()
    assert sender.nonce_conflicts() == []


async def test_a_nonce_taken_while_waiting_names_the_transaction(
    chain: FakeChain, store: Store
) -> None:
    chain.automine = False
    sender = make(chain, store)
    task = asyncio.create_task(sender.send(call()))
    await until(lambda: chain.pool)
    chain.pool.clear()
    tx = transaction_of_other(chain, 0)
    blocks = asyncio.create_task(mining(chain))
    with pytest.raises(NonceTakenError, match=f"used nonce 0 of .* 0x{tx.hash.hex()} of block 1"):
        await task
    blocks.cancel()
    assert tx.hash.hex() in store.recent_entries()[0].note


async def test_a_lagging_node_does_not_reset_the_nonce(
    chain: FakeChain, store: Store, sender: Sender, capsys: pytest.CaptureFixture[str]
) -> None:
    await sender.send(call(1))
    await sender.send(call(2))
    await sender.reconcile()
    blocks = chain.blocks
    chain.blocks = blocks[:-1]  # another node of the pool, one block behind
    await sender.reconcile()
    chain.blocks = blocks
    await sender.reconcile()
    assert "transaction reopened" not in capsys.readouterr().out
    assert states(store) == [TxState.MINED, TxState.MINED]
    assert len(chain.sent) == 2
    # A branch of the same height does not mean a lagging node.
    chain.reorg(1)
    await sender.reconcile()
    assert "transaction reopened" in capsys.readouterr().out


async def test_a_cancelling_replacement_is_mined(
    chain: FakeChain, store: Store, sender: Sender
) -> None:
    chain.automine = False
    task = asyncio.create_task(sender.send(call(), key="k"))
    await until(lambda: chain.pool)
    before = sender.pending()[0].latest
    await sender.cancel(sender.pending()[0])
    (entry,) = sender.pending()
    assert entry.latest.cancels
    assert entry.latest.max_fee * 8 >= before.max_fee * 9
    assert entry.latest.priority_fee * 8 >= before.priority_fee * 9
    # Later recovery continues the cancellation and does not send the call again.
    await sender.speed_up(entry)
    assert sender.pending()[0].latest.cancels
    chain.mine()
    with pytest.raises(TransactionCancelledError, match="'call 1' was cancelled"):
        await task
    assert (states(store), chain.mined(call().data)) == ([TxState.CANCELLED], [])
    assert store.by_key("k") is None
    assert sender.pending() == []


async def test_a_cancelling_replacement_comes_too_late(
    chain: FakeChain, store: Store, sender: Sender
) -> None:
    chain.automine = False
    task = asyncio.create_task(sender.send(call()))
    await until(lambda: chain.pool)
    (entry,) = sender.pending()
    first = chain.pool.copy()
    await sender.cancel(entry)
    chain.pool = first
    chain.mine()
    assert (await task).hash == entry.latest.tx_hash
    assert states(store) == [TxState.MINED]
    with pytest.raises(UsageError, match="is not pending"):
        await sender.cancel(store.entry(entry.id))


async def test_outbidding_respects_the_ceiling(chain: FakeChain, store: Store) -> None:
    chain.automine = False
    sender = make(chain, store, max_fee_per_gas=3 * GWEI)
    task = asyncio.create_task(sender.send(call()))
    await until(lambda: chain.pool)
    for order in (sender.speed_up, sender.cancel):
        with pytest.raises(UsageError, match=r"must offer 3\.375 gwei, the ceiling is 3\.000 gwei"):
            await order(sender.pending()[0])
    assert len(chain.sent) == len(sender.pending()[0].attempts) == 1
    chain.mine()
    await task


async def test_a_refused_replacement_is_reported(chain: FakeChain, sender: Sender) -> None:
    chain.automine = False
    task = asyncio.create_task(sender.send(call()))
    await until(lambda: chain.pool)
    chain.faults = [refusal("insufficient funds for gas * price + value")]
    with pytest.raises(InsufficientFundsError, match="for a replacement"):
        await sender.speed_up(sender.pending()[0])
    # The waiting call may resend its bytes in between.
    chain.faults = [refusal("transaction type not supported")] * 8
    with pytest.raises(EndpointError, match="rejected the replacement: transaction type"):
        await sender.speed_up(sender.pending()[0])
    chain.mine()
    await task


async def test_gas_that_runs_out_is_reported_once(
    chain: FakeChain, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = Metrics("x")
    sender = make(chain, store, metrics=metrics)
    await sender.send(call())
    fee = store.recent_entries()[0].fee
    assert fee == 21_000 * (chain.base_fee + GWEI)
    chain.balance = fee * 49
    await sender.reconcile()
    assert metrics.value("gas_runway_transactions") == 49
    sender._gas_monitor._checked_at = None
    await sender.reconcile()
    logged = capsys.readouterr().out
    assert logged.count("gas ran low") == 1
    assert "enough for about 49 transactions" in logged


@pytest.mark.parametrize(("base_fee", "tip", "free"), [(0, 0, True), (0, 5, False), (7, 0, False)])
async def test_gas_prices_on_private_chains(
    chain: FakeChain, base_fee: int, tip: int, free: bool
) -> None:
    chain.base_fee, chain.tip = base_fee, tip
    result = await market(chain)  # type: ignore[arg-type]
    assert result.minimum >= base_fee
    if not base_fee:
        assert result.fees == Fees(tip, tip)
    assert await is_gas_free(chain) is free  # type: ignore[arg-type]


async def test_where_gas_is_free_an_account_without_coin_sends(
    chain: FakeChain, store: Store, sender: Sender
) -> None:
    chain.base_fee = chain.tip = chain.balance = 0
    receipt = await sender.send(call())
    assert (receipt.fee_wei, states(store)) == (0, [TxState.MINED])


async def test_where_gas_is_free_a_stuck_transaction_is_sent_again_as_it_is(
    chain: FakeChain, store: Store, sender: Sender
) -> None:
    chain.base_fee = chain.tip = chain.balance = 0
    chain.automine = False
    task = asyncio.create_task(sender.send(call()))
    for _ in range(5):  # blocks that leave it out
        await until(lambda: chain.pool)
        chain.pool.clear()
        chain.mine()
        await asyncio.sleep(0.01)
    await until(lambda: chain.pool)
    chain.mine()
    assert (await task).fee_wei == 0
    assert [len(entry.attempts) for entry in store.recent_entries()] == [1]


async def test_other_work_continues_while_an_external_signer_signs(
    chain: FakeChain, store: Store
) -> None:
    signer = SlowSigner()
    sender = Sender(chain, signer, store, chain_id=1, poll_interval=0.001)  # type: ignore[arg-type]
    miner = asyncio.create_task(mining(chain))
    sends = [asyncio.create_task(sender.send(call(number))) for number in (1, 2)]
    await until(lambda: signer.asked)
    assert store.recent_entries() == []
    # Another process uses the nonce meanwhile: the transaction is signed for the next one.
    own_sender = make(chain, store)
    await own_sender.send(call(3))
    signer.go.set()
    receipts = await asyncio.gather(*sends)
    miner.cancel()
    assert len({receipt.hash for receipt in receipts}) == 2
    assert sorted(entry.nonce for entry in store.recent_entries()) == [0, 1, 2]
    assert signer.asked == 3
