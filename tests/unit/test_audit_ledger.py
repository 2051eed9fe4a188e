"""The ledger rebuilt from events equals the storage of the contracts that emitted them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
from eth_utils import to_checksum_address

from deepsquare_chain.audit.conservation import verify
from deepsquare_chain.audit.entries import MovementKind
from deepsquare_chain.audit.ledger import Ledger
from deepsquare_chain.errors import AuditError
from deepsquare_chain.job import JobStatus, Load
from tests.support.grid import RATE, TERMS, WEALTH, fee_of
from tests.support.recorded import (
    RecordedGrid,
    record_history,
    record_payments,
    recorded_grid,
)

ESCROW = TERMS["amount"]


@pytest.fixture(scope="module")
def grid() -> RecordedGrid:
    return recorded_grid()


@pytest.fixture(scope="module")
def jobs(grid: RecordedGrid) -> Mapping[str, int]:
    return record_history(grid)


@pytest.fixture(scope="module")
def ledger(grid: RecordedGrid, jobs: Mapping[str, int]) -> Ledger:
    return grid.ledger()


def test_a_valid_history_has_no_findings(ledger: Ledger) -> None:
    assert ledger.findings == []
    assert verify(ledger).ok
    assert verify(ledger).ok


def test_the_history_has_every_status(ledger: Ledger, jobs: Mapping[str, int]) -> None:
    recorded = {name: ledger.jobs[job_id].status.name for name, job_id in jobs.items()}
    assert recorded == {
        "finished": "FINISHED",
        "failed": "FAILED",
        "failed at once": "FAILED",
        "spent": "OUT_OF_CREDITS",
        "cancelled": "CANCELLED",
        "lost": "PANICKED",
        "rescued": "CANCELLED",
        "queued": "PANICKED",
        "successor": "FINISHED",
        "until_spent": "RUNNING",
        "early": "META_SCHEDULED",
        "withdrawn": "CANCELLED",
        "pending": "PENDING",
    }


def test_replay_equals_storage(grid: RecordedGrid, ledger: Ledger) -> None:
    audit = verify(ledger, grid.storage(ledger))
    assert audit.findings == ()
    assert audit.compared
    assert audit.difference == 0


def test_different_storage_is_detected(grid: RecordedGrid, ledger: Ledger) -> None:
    storage = grid.storage(ledger)
    job = storage.jobs[2]
    for changed in (
        dataclasses.replace(storage, supply=storage.supply + 1),
        dataclasses.replace(storage, jobs=storage.jobs[:-1]),
        dataclasses.replace(storage, jobs=[dataclasses.replace(job, escrow=job.escrow - 1)]),
        dataclasses.replace(storage, jobs=[dataclasses.replace(job, since=job.since - 1)]),
        dataclasses.replace(storage, balances={**storage.balances, ledger.accounts[1]: 5}),
        dataclasses.replace(storage, parked={ledger.accounts[1]: 5}),
        dataclasses.replace(storage, loads={account: Load(1, 2, 3) for account in storage.loads}),
    ):
        audit = verify(ledger, changed)
        assert {finding.code for finding in audit.findings} == {"storage"}
        assert not audit.ok
        assert all("events say" in finding.message for finding in audit.findings)


def test_totals(grid: RecordedGrid, ledger: Ledger) -> None:
    totals = ledger.totals
    assert totals.minted == 2 * WEALTH
    assert totals.burned == 7
    assert totals.supply == grid.credit.totalSupply()
    assert totals.donated == 11
    assert totals.difference == 0
    assert totals.scheduler_balance == grid.balance(grid.scheduler.address)
    assert totals.escrow == totals.scheduler_balance - 11
    assert totals.jobs == grid.scheduler.jobCount()


def test_a_finished_job(ledger: Ledger, jobs: Mapping[str, int]) -> None:
    job = ledger.jobs[jobs["finished"]]
    cost = 30 * RATE
    assert (job.paid, job.fee) == (cost - fee_of(cost), fee_of(cost))
    assert job.funded == ESCROW + 10**9
    assert job.refunded == ESCROW + 10**9 - cost
    assert job.billed_seconds == 30
    assert job.exit_code == 0
    assert job.ended_at - job.started_at == 37
    # A top-up by another account is billed at the agreed rate.
    assert job.time_limit == TERMS["timeLimit"]
    assert [status for _, status, _ in job.transitions] == [
        JobStatus.PENDING,
        JobStatus.META_SCHEDULED,
        JobStatus.SCHEDULED,
        JobStatus.RUNNING,
        JobStatus.FINISHED,
    ]


def test_cancelling_a_lost_run_is_free(ledger: Ledger, jobs: Mapping[str, int]) -> None:
    job = ledger.jobs[jobs["rescued"]]
    assert job.started_at > 0
    assert (job.billed_seconds, job.paid, job.fee, job.refunded) == (0, 0, 0, ESCROW)


def test_a_carried_escrow_is_neither_payment_nor_refund(
    ledger: Ledger, jobs: Mapping[str, int]
) -> None:
    lost_job, successor = ledger.jobs[jobs["lost"]], ledger.jobs[jobs["successor"]]
    assert (lost_job.paid, lost_job.fee, lost_job.refunded, lost_job.carried_out) == (
        0,
        0,
        0,
        ESCROW,
    )
    assert lost_job.successor == successor.id
    assert (successor.funded, successor.carried_in, successor.retry_of) == (0, ESCROW, lost_job.id)
    assert successor.fee_bps == 700
    assert (lost_job.retries_left, successor.retries_left) == (2, 1)


def test_statements_show_each_movement(
    grid: RecordedGrid, ledger: Ledger, jobs: Mapping[str, int]
) -> None:
    alice = to_checksum_address(grid.alice)
    rows = ledger.statement(alice)
    assert rows[-1].balance == grid.balance(grid.alice)
    assert rows[0].kind is MovementKind.MINT
    movements = [(row.kind, row.amount) for row in rows if row.job_id == jobs["cancelled"]]
    assert movements[0] == (MovementKind.ESCROW, -ESCROW)
    assert movements[1] == (MovementKind.REFUND, ESCROW - 37 * RATE)
    assert sum(row.amount for row in rows) == rows[-1].balance
    kinds = {row.kind for row in rows}
    assert kinds == {
        MovementKind.MINT,
        MovementKind.ESCROW,
        MovementKind.REFUND,
        MovementKind.TOP_UP,
        MovementKind.TRANSFER,
    }


def test_every_statement_ends_at_the_balance(grid: RecordedGrid, ledger: Ledger) -> None:
    for account in ledger.accounts:
        assert ledger.statement(account)[-1].balance == grid.balance(account)
    kinds = {row.kind for account in ledger.accounts for row in ledger.statement(account)}
    assert kinds == set(MovementKind) - {
        MovementKind.PARKED,
        MovementKind.WITHDRAWAL,
        MovementKind.INTERIM,
    }
    assert ledger.statement("0x" + "99" * 20) == []
    # In any spelling of the address.
    assert ledger.statement(grid.alice.lower()) == ledger.statement(to_checksum_address(grid.alice))


def test_the_order_of_reading_does_not_matter(grid: RecordedGrid, ledger: Ledger) -> None:
    reversed_ledger = grid.ledger(list(reversed(grid.events)))
    assert reversed_ledger.totals == ledger.totals
    assert reversed_ledger.findings == []


def test_events_of_other_contracts_are_skipped(grid: RecordedGrid, ledger: Ledger) -> None:
    alien = [dataclasses.replace(event, address="0x" + "77" * 20) for event in grid.events]
    assert grid.ledger([*grid.events, *alien]).totals == ledger.totals


def test_a_missing_block_time_is_reported(grid: RecordedGrid) -> None:
    with pytest.raises(AuditError, match=r"time of block \d+ is missing"):
        Ledger.replay(grid.events, grid.deployment, {})


def test_an_empty_chain_balances(grid: RecordedGrid) -> None:
    empty = Ledger.replay([], grid.deployment, {})
    assert verify(empty).ok
    assert empty.totals.difference == 0


def test_each_line_of_a_statement_names_the_log_that_caused_it(
    grid: RecordedGrid, ledger: Ledger
) -> None:
    recorded = {(event.block_number, event.log_index): event for event in grid.events}
    causes = {
        MovementKind.MINT: {"Transfer"},
        MovementKind.BURN: {"Transfer"},
        MovementKind.ESCROW: {"JobSubmitted", "Transfer"},
        MovementKind.TOP_UP: {"JobToppedUp"},
        MovementKind.REFUND: {"JobSettled"},
        MovementKind.PAYMENT: {"JobSettled", "Transfer"},
        MovementKind.FEE: {"JobSettled"},
        MovementKind.TRANSFER: {"Transfer"},
    }
    rows = [row for account in ledger.accounts for row in ledger.statement(account)]
    for row in rows:
        event = recorded[row.block, row.log_index]
        assert event.tx_hash == row.tx_hash
        assert type(event).__name__ in causes[row.kind]
        if row.job_id:
            assert event.job_id == row.job_id  # type: ignore[attr-defined]
    assert {row.kind for row in rows} == set(causes)


@pytest.fixture(scope="module")
def payments() -> tuple[RecordedGrid, Mapping[str, int], Ledger]:
    grid = recorded_grid()
    jobs = record_payments(grid)
    return grid, jobs, grid.ledger()


class TestPayments:
    """Interim payments, load and signed requests, against the contracts that emitted them."""

    @pytest.fixture
    def grid(self, payments: tuple[RecordedGrid, Mapping[str, int], Ledger]) -> RecordedGrid:
        return payments[0]

    @pytest.fixture
    def jobs(self, payments: tuple[RecordedGrid, Mapping[str, int], Ledger]) -> Mapping[str, int]:
        return payments[1]

    @pytest.fixture
    def ledger(self, payments: tuple[RecordedGrid, Mapping[str, int], Ledger]) -> Ledger:
        return payments[2]

    def test_replay_equals_storage(self, grid: RecordedGrid, ledger: Ledger) -> None:
        storage = grid.storage(ledger)
        assert verify(ledger, storage).findings == ()
        # One run continues; ended and returned jobs use no capacity.
        size = ledger.jobs[1].terms.resources
        assert list(storage.loads.values()) == [Load.of(size)]

    def test_interim_payments_add_up(self, ledger: Ledger, jobs: Mapping[str, int]) -> None:
        job = ledger.jobs[jobs["signed"]]
        parts = [120, 174, 5]
        fees = [fee_of(seconds * RATE) for seconds in parts]
        assert (job.billed_seconds, job.collected_seconds) == (299, 294)
        assert (job.paid, job.fee) == (299 * RATE - sum(fees), sum(fees))
        assert job.collected_fee == sum(fees[:2])
        assert job.refunded == ESCROW + 2 * 10**9 - 299 * RATE

    def test_only_credits_of_the_customer_extend_the_limit(
        self, ledger: Ledger, jobs: Mapping[str, int]
    ) -> None:
        job = ledger.jobs[jobs["signed"]]
        assert job.funded == ESCROW + 2 * 10**9
        assert job.time_limit == TERMS["timeLimit"] + 10**9 // RATE - 294

    def test_a_forwarded_job_belongs_to_the_signer(
        self, grid: RecordedGrid, ledger: Ledger, jobs: Mapping[str, int]
    ) -> None:
        bob = to_checksum_address(grid.bob)
        assert ledger.jobs[jobs["signed"]].customer == bob
        kinds = [row.kind for row in ledger.statement(bob) if row.job_id == jobs["signed"]]
        assert kinds == [MovementKind.ESCROW, MovementKind.TOP_UP, MovementKind.REFUND]
        assert ledger.statement(grid.stranger) == []

    def test_a_claimed_job_with_retries_continues(
        self, ledger: Ledger, jobs: Mapping[str, int]
    ) -> None:
        given_up, successor = ledger.jobs[jobs["given up"]], ledger.jobs[jobs["heir"]]
        assert (given_up.started_at, given_up.refunded, given_up.carried_out) == (0, 0, ESCROW)
        assert (successor.carried_in, successor.retry_of) == (ESCROW, given_up.id)
        # After interim payments the rest is carried, at the same price ceiling.
        spent, carried_on = ledger.jobs[jobs["until spent"]], ledger.jobs[jobs["carried on"]]
        assert carried_on.carried_in == spent.funded - spent.paid - spent.fee
        assert carried_on.time_limit == 580 < TERMS["timeLimit"]
        assert spent.refunded == 0

    def test_statements_show_interim_payments(
        self, grid: RecordedGrid, ledger: Ledger, jobs: Mapping[str, int]
    ) -> None:
        job = ledger.jobs[jobs["signed"]]
        rows = [row for row in ledger.statement(job.provider) if row.job_id == job.id]
        assert [row.kind for row in rows] == [
            MovementKind.INTERIM,
            MovementKind.INTERIM,
            MovementKind.PAYMENT,
        ]
        assert sum(row.amount for row in rows) == job.paid
