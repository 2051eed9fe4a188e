"""The sender on real chains: killed at each crash point, stuck, reorganised, and many at once."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from deepsquare_chain.chain.transactions.outbox import TxState
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.devnet.node.base import Node
from deepsquare_chain.errors import InsufficientFundsError
from deepsquare_chain.store.database import Store
from tests.support.anvil import start_anvil
from tests.support.livegrid import LiveGrid, live_grid
from tests.support.sendonce import account_of

LABELS = (
    "sender.intent",
    "sender.signed",
    "sender.recorded",
    "sender.broadcast",
    "sender.receipt",
    "sender.settled",
    "follower.read",
    "follower.applied",
    "follower.committed",
)


async def test_killed_at_each_label_it_acts_once(grid: LiveGrid, tmp_path: Path) -> None:
    record = tmp_path / "deployment.json"
    grid.deployment.save(record)
    # In sequence: they use one wallet.
    for label in LABELS:
        await grid.node.fund(account_of(label).address, 10**18)
    await asyncio.gather(
        *(
            grid.send(grid.admin, grid.contracts.credit.mint(account_of(label).address, CREDIT))
            for label in LABELS
        )
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.sendonce"),
        *(grid.node.url, str(record), str(tmp_path), *LABELS),
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    output, _ = await asyncio.wait_for(process.communicate(), 120)
    results = [json.loads(line) for line in output.splitlines()]
    assert [item["label"] for item in results] == list(LABELS)
    for item in results:
        assert item["first"] == -signal.SIGKILL, item
        assert item["second"] == 0, item
        # One transfer, one nonce, one row: neither repeated nor lost.
        assert (item["received"], item["nonce"], item["counted"], item["open"]) == (1, 1, 1, 0), (
            item
        )


async def test_fifty_transactions_sent_at_once(grid: LiveGrid) -> None:
    credit = grid.contracts.credit
    target = account_of("fifty").address
    receipts = await asyncio.gather(
        *(grid.send(grid.customers[0], credit.transfer(target, 1)) for _ in range(50))
    )
    assert await credit.balance_of(target) == 50
    assert len({receipt.hash for receipt in receipts}) == 50


async def test_missing_coin_for_gas_is_reported_plainly(grid: LiveGrid) -> None:
    account_without_coin = account_of("poor")
    with pytest.raises(
        InsufficientFundsError, match=f"{account_without_coin.address} can't pay the gas"
    ):
        await grid.send(account_without_coin, grid.contracts.credit.approve(grid.admin.address, 1))
    # Enough for a little, not for this.
    await grid.node.fund(account_without_coin.address, 10**9)
    with pytest.raises(InsufficientFundsError, match=r"it has 0\.000000001"):
        await grid.send(account_without_coin, grid.contracts.credit.approve(grid.admin.address, 1))


@pytest.fixture
async def own_anvil() -> AsyncIterator[Node]:
    """A node of one test, which mines its blocks itself after the deployment."""
    async with start_anvil() as anvil:
        yield anvil


async def test_a_stuck_transaction_is_replaced(own_anvil: Node) -> None:
    async with live_grid(own_anvil) as grid:
        store = grid.store(grid.stranger)
        sender = grid.sender(grid.stranger, store=store, stuck_blocks=2)
        await own_anvil.rpc("evm_setAutomine", False)
        task = asyncio.create_task(
            sender.send(grid.contracts.credit.approve(grid.admin.address, 7))
        )
        await _until(sender.pending)
        first = sender.pending()[0].latest
        # Recorded is not yet broadcast: it must wait at the node before the fee jumps.
        await _until_waiting(own_anvil)
        # The base fee rises above the transaction's, so that blocks do not include it.
        for _ in range(4):
            await own_anvil.rpc("anvil_setNextBlockBaseFeePerGas", hex(first.max_fee * 3))
            await own_anvil.mine()
            await asyncio.sleep(0.3)
        await _until(lambda: len(store.recent_entries()[0].attempts) > 1)
        await own_anvil.mine()
        receipt = await task
        (entry,) = store.recent_entries()
        assert entry.state is TxState.MINED
        assert receipt.hash == entry.mined_hash != first.tx_hash
        assert entry.latest.max_fee * 8 >= first.max_fee * 9
        assert entry.latest.priority_fee * 8 >= first.priority_fee * 9
        count = await grid.w3.eth.get_transaction_count(grid.stranger.address)
        assert count == 1
        allowed = await grid.contracts.credit.allowance(grid.stranger.address, grid.admin.address)
        assert allowed == 7


async def test_a_reorganised_transaction_is_sent_again(own_anvil: Node) -> None:
    async with live_grid(own_anvil) as grid:
        credit = grid.contracts.credit
        sender = grid.sender(grid.customers[0])
        target = account_of("reorg").address
        for _ in range(3):
            await sender.send(credit.transfer(target, 1))
        await own_anvil.rpc("anvil_reorg", 3, [])
        assert await credit.balance_of(target) == 0
        await sender.send(credit.transfer(target, 10))
        await sender.recover()
        assert await credit.balance_of(target) == 13


async def test_a_dropped_transaction_is_sent_again(own_anvil: Node) -> None:
    async with live_grid(own_anvil) as grid:
        sender = grid.sender(grid.customers[0])
        await own_anvil.rpc("evm_setAutomine", False)
        target = account_of("dropped").address
        task = asyncio.create_task(sender.send(grid.contracts.credit.transfer(target, 1)))
        await _until_waiting(own_anvil)
        tx_hash = sender.pending()[0].latest.tx_hash
        assert await own_anvil.rpc("anvil_dropTransaction", tx_hash) == tx_hash
        # It is sent again when a block has passed without it.
        async with asyncio.timeout(60):
            while not task.done():
                await own_anvil.mine()
                await asyncio.sleep(0.1)
        await task
        assert await grid.contracts.credit.balance_of(target) == 1


async def test_a_database_is_kept_after_a_restart(grid: LiveGrid, tmp_path: Path) -> None:
    store = grid.store(grid.stranger, tmp_path / "stranger.db")
    sender = grid.sender(grid.stranger, store=store)
    await sender.send(grid.contracts.credit.approve(grid.admin.address, 5))
    store.close()
    with Store.open(
        tmp_path / "stranger.db",
        chain_id=grid.deployment.chain_id,
        contract=grid.deployment.scheduler,
        account=grid.stranger.address,
    ) as reopened:
        (entry,) = reopened.recent_entries()
        assert entry.state is TxState.MINED


async def _until_waiting(node: Node) -> None:
    async with asyncio.timeout(60):
        while (await node.rpc("txpool_status"))["pending"] == "0x0":  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def _until(condition: object) -> None:
    async with asyncio.timeout(60):
        while not condition():  # type: ignore[operator]  # noqa: ASYNC110
            await asyncio.sleep(0.02)
