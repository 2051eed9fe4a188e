"""The database: identity, transactions, and the guarantees of the outbox."""

from __future__ import annotations

import asyncio
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Column, Integer, Table, delete, insert, select, update

from deepsquare_chain.chain.bindings.calls import Call
from deepsquare_chain.chain.follower import Block
from deepsquare_chain.chain.transactions.outbox import Attempt, TxState
from deepsquare_chain.errors import NotFoundError, StoreError, UsageError, WaitTimeoutError
from deepsquare_chain.store import outbox as outbox_module
from deepsquare_chain.store.database import Amount, Store, metadata

IDENTITY: dict[str, Any] = {"chain_id": 1, "contract": "0xAA", "account": "0xBB"}
CALL = Call("0xcc", b"\x01", "a call", 5)
wealth = Table(
    "store_test_wealth", metadata, Column("id", Integer, primary_key=True), Column("amount", Amount)
)


def attempt(nonce: int, number: int = 0) -> Attempt:
    return Attempt(f"0x{nonce}-{number}", bytes([nonce % 256, number]), 10**30, 10**9, 7)


def add(store: Store, floor: int = 0, key: str | None = None) -> Any:
    return store.append(CALL, 21_000, floor, attempt, key)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "a.db"


def test_only_the_owner_can_read_the_database(path: Path) -> None:
    with Store.open(path, **IDENTITY):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chain_id": 2}, "another chain: 1, not 2"),
        ({"contract": "0xAC"}, "another contract: 0xaa, not 0xac"),
        ({"account": "0xBC"}, "another account"),
        ({"genesis": "0x02"}, "other genesis block"),
    ],
)
def test_another_identity_is_refused(path: Path, change: dict[str, Any], message: str) -> None:
    Store.open(path, **IDENTITY, genesis="0x01").close()
    with pytest.raises(UsageError, match=message) as error:
        Store.open(path, **{**IDENTITY, "genesis": "0x01", **change})
    assert str(path) in error.value.message
    Store.open(path, **{**IDENTITY, "contract": "0xaa"}).close()  # case is no difference


def test_a_wallets_database_serves_several_deployments_of_one_chain(path: Path) -> None:
    chain = {**IDENTITY, "genesis": "0x01", "shared": True}
    other = {**chain, "contract": "0xAC", "landmark": "0x6"}
    Store.open(path, **{**chain, "shared": False}).close()  # of an earlier version
    Store.open(path, **chain, landmark="0x5").close()
    Store.open(path, **other).close()
    with pytest.raises(UsageError, match="other block of the deployment"):
        Store.open(path, **chain, landmark="0x6")
    for change in ({"genesis": "0x02"}, {"account": "0xBC"}, {"chain_id": 2}):
        with pytest.raises(UsageError):
            Store.open(path, **{**other, **change})


def test_a_genesis_may_be_learned_later(path: Path) -> None:
    Store.open(path, **IDENTITY).close()
    Store.open(path, **IDENTITY, genesis="0x01").close()
    with pytest.raises(UsageError):
        Store.open(path, **IDENTITY, genesis="0x02")


def test_files_that_are_no_database_are_refused(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(UsageError, match="not a usable database"):
        Store.open(path, **IDENTITY)
    with pytest.raises(StoreError, match="can't be opened"):
        Store.open(path.parent, **IDENTITY)
    with pytest.raises(StoreError, match="can't be opened"):
        Store.open(path / "under" / "a.db", **IDENTITY)


def test_a_service_has_it_for_itself(path: Path) -> None:
    first = Store.open(path, **IDENTITY, exclusive=True)
    with pytest.raises(UsageError, match="used by another process"):
        Store.open(path, **IDENTITY, exclusive=True)
    first.close()
    Store.open(path, **IDENTITY, exclusive=True).close()


@pytest.mark.parametrize("location", [None, ":memory:"])
def test_memory(location: str | None) -> None:
    with Store.open(location, **IDENTITY) as store:
        add(store)
        assert len(store.open_entries()) == 1


def test_memory_is_taken_in_turns() -> None:
    """Threads read and write concurrently, like pages and indexer."""
    with Store.open(None, **IDENTITY) as store:
        with store.begin() as connection:
            connection.execute(insert(wealth).values(id=1, amount=0))

        def work(_: int) -> int:
            for _ in range(20):
                with store.begin() as connection:
                    amount = connection.execute(select(wealth.c.amount)).scalar_one()
                    connection.execute(update(wealth).values(amount=amount + 1))
                with store.read() as connection:
                    connection.execute(select(wealth)).all()
            return 20

        with ThreadPoolExecutor(8) as threads:
            total = sum(threads.map(work, range(8)))
        with store.read() as connection:
            assert connection.execute(select(wealth.c.amount)).scalar_one() == total


@pytest.mark.parametrize("amount", [0, 1, -1, 2**53 + 1, 2**63, 10**77])
def test_amounts_are_stored_exactly(amount: int) -> None:
    with Store.open(None, **IDENTITY) as store:
        with store.begin() as connection:
            connection.execute(insert(wealth).values(id=1, amount=amount))
        with store.read() as connection:
            assert connection.execute(select(wealth.c.amount)).scalar_one() == amount


def test_a_transaction_is_all_or_nothing(path: Path) -> None:
    def interrupted(store: Store) -> None:
        with store.begin() as connection:
            connection.execute(insert(wealth).values(id=1, amount=1))
            raise RuntimeError

    with Store.open(path, **IDENTITY) as store:
        with pytest.raises(RuntimeError):
            interrupted(store)
        with store.read() as connection:
            assert connection.execute(select(wealth)).all() == []


def test_writers_take_turns(path: Path) -> None:
    """Read, then write: without a lock from the start an update would be lost."""
    stores = [Store.open(path, **IDENTITY) for _ in range(4)]
    with stores[0].begin() as connection:
        connection.execute(insert(wealth).values(id=1, amount=0))

    def count(store: Store) -> None:
        for _ in range(25):
            with store.begin() as connection:
                now = connection.execute(select(wealth.c.amount)).scalar_one()
                connection.execute(delete(wealth))
                connection.execute(insert(wealth).values(id=1, amount=now + 1))

    threads = [threading.Thread(target=count, args=[store]) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with stores[0].read() as connection:
        assert connection.execute(select(wealth.c.amount)).scalar_one() == 100
    for store in stores:
        store.close()


def test_a_reader_does_not_wait_for_a_writer(path: Path) -> None:
    with (
        Store.open(path, **IDENTITY) as writer,
        Store.open(path, **IDENTITY) as reader,
        writer.begin() as connection,
    ):
        connection.execute(insert(wealth).values(id=1, amount=1))
        with reader.read() as other:
            assert other.execute(select(wealth)).all() == []


def test_nonces_are_dense_from_the_floor() -> None:
    with Store.open(None, **IDENTITY) as store:
        assert [add(store, 5).nonce for _ in range(3)] == [5, 6, 7]
        assert add(store, 9).nonce == 9
        assert add(store, 0).nonce == 0
        # A nonce that was given back is the next one, before any later one.
        store.set_state(store.entries_from(6)[0].id, TxState.ABANDONED)
        assert add(store, 5).nonce == 6
        assert add(store, 5).nonce == 8
        assert add(store, 5).nonce == 10


def test_a_failed_signature_takes_no_nonce() -> None:
    with Store.open(None, **IDENTITY) as store:
        with pytest.raises(RuntimeError):
            store.append(CALL, 1, 0, lambda _nonce: (_ for _ in ()).throw(RuntimeError()), None)
        assert (store.open_entries(), add(store).nonce) == ([], 0)


def test_entries_and_their_states(path: Path) -> None:
    with Store.open(path, **IDENTITY) as store:
        entry = add(store, key="k")
        assert (entry.call, entry.gas, entry.latest) == (CALL, 21_000, attempt(0))
        store.add_attempt(entry.id, attempt(0, 1))
        store.add_attempt(entry.id, attempt(0, 2))
        assert store.entry(entry.id).attempts == (attempt(0), attempt(0, 1), attempt(0, 2))
        store.set_state(entry.id, TxState.MINED, mined_hash="0x12", note="n" * 5_000)
    with Store.open(path, **IDENTITY) as store:
        result = store.by_key("k")
        assert result is not None
        assert (result.state, result.mined_hash, len(result.note)) == (TxState.MINED, "0x12", 1_000)
        assert store.open_entries() == []
        with pytest.raises(NotFoundError):
            store.entry(99)


def test_a_key_is_free_again_after_a_failure() -> None:
    with Store.open(None, **IDENTITY) as store:
        for state in (TxState.FAILED, TxState.ABANDONED):
            store.set_state(add(store, key="k").id, state)
            assert store.by_key("k") is None
        add(store, key="k")
        with pytest.raises(StoreError, match="UNIQUE"):
            add(store, key="k")


def test_settled_transactions_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "KEPT_NONCES", 10)
    with Store.open(None, **IDENTITY) as store:
        keyed = add(store, key="kept")
        pending = add(store)
        store.set_state(keyed.id, TxState.MINED)
        for number in range(40):
            store.set_state(add(store, floor=number).id, TxState.MINED)
        nonces = [entry.nonce for entry in reversed(store.recent_entries(100))]
        assert nonces == [0, 1, *range(31, 42)]
        assert store.entry(pending.id).state is TxState.OPEN
        assert len(store.recent_entries(5)) == 5


def test_cursors() -> None:
    with Store.open(None, **IDENTITY) as store:
        assert store.recent_blocks("a") == []
        with store.begin() as connection:
            store.advance(connection, "a", [Block(1, "x"), Block(5, "y")], 3)
            store.advance(connection, "a", [Block(6, "z"), Block(9, "w")], 3)
        assert store.recent_blocks("a") == [Block(9, "w"), Block(6, "z"), Block(5, "y")]
        with store.begin() as connection:
            store.rewind(connection, "a", 6)
        assert store.recent_blocks("a") == [Block(6, "z"), Block(5, "y")]
        with store.begin() as connection:
            store.advance(connection, "a", [Block(6, "other")], 3)
        assert store.recent_blocks("a")[0] == Block(6, "other")
        assert store.recent_blocks("b") == []


def test_a_full_disk_is_reported(path: Path) -> None:
    def fill(store: Store) -> None:
        with store.begin() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
            for number in range(2_000):
                connection.execute(insert(wealth).values(id=number, amount=10**70))

    with Store.open(path, **IDENTITY) as store:
        with pytest.raises(StoreError, match="full") as error:
            fill(store)
        assert "free disk space" in error.value.hint


@pytest.mark.parametrize("location", ["two files", "one store", "memory"])
async def test_a_wallets_lock_has_one_holder_at_a_time(tmp_path: Path, location: str) -> None:
    """Two programs, two tasks of one program, and a store without a file."""
    path = None if location == "memory" else tmp_path / "wallet.db"
    first = Store.open(path, chain_id=1, contract="0x1", account="0x2")
    second = first
    if location == "two files":
        second = Store.open(path, chain_id=1, contract="0x1", account="0x2")
    order: list[str] = []

    async def use(store: Store, name: str) -> None:
        async with store.spending(5):
            order.append(f"{name} begins")
            await asyncio.sleep(0.02)
            order.append(f"{name} ends")

    await asyncio.gather(use(first, "a"), use(second, "b"))
    assert order == ["a begins", "a ends", "b begins", "b ends"]
    async with first.spending(5):
        with pytest.raises(WaitTimeoutError, match="nothing was paid"):
            async with second.spending(0.01):
                pass
    async with second.spending(0.1):
        pass
    first.close()
    second.close()


async def test_two_state_folders_of_one_wallet_spend_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    wallet = {"chain_id": 1, "contract": "0x" + "11" * 20, "account": "0x" + "22" * 20}
    first, second, other_wallet = (
        Store.open(tmp_path / name / "wallet.db", **wallet, genesis=genesis)
        for name, genesis in (("a", "0x01"), ("b", "0x01"), ("c", "0x02"))
    )
    async with first.spending(5), other_wallet.spending(5):
        with pytest.raises(WaitTimeoutError, match="nothing was paid"):
            async with second.spending(0.05):
                pass
    # Without a common folder for locks, each state folder has its own lock.
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "a" / "wallet.db"))
    async with first.spending(5), second.spending(5):
        pass
    for value in (first, second, other_wallet):
        value.close()
