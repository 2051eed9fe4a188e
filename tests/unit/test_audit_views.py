"""Views for auditors: conservation, bills, anomalies and statements."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from eth_utils import to_checksum_address

from deepsquare_chain.audit import runner as auditing
from deepsquare_chain.audit.anomalies import Code, Severity, name_self_scheduled
from deepsquare_chain.audit.bill import recompute_bill
from deepsquare_chain.audit.conservation import (
    ConservationCheck,
    NodeRequest,
    closing_check,
    conservation,
    job_conservation,
)
from deepsquare_chain.audit.entries import JobEntry
from deepsquare_chain.audit.ledger import Ledger, statement
from deepsquare_chain.chain.bindings import events as ev
from deepsquare_chain.chain.bindings.abi import interface
from deepsquare_chain.chain.bindings.events import event_topics
from deepsquare_chain.job import JobFlags, JobStatus
from tests.support.grid import RATE, TERMS, TIMES
from tests.support.recorded import (
    RecordedGrid,
    record_history,
    record_payments,
    recorded_grid,
)


@dataclasses.dataclass(frozen=True)
class RecordedAudit:
    grid: RecordedGrid
    ledger: Ledger
    jobs: Mapping[str, int]

    def job(self, name: str) -> JobEntry:
        return self.ledger.jobs[self.jobs[name]]

    def of(self, code: Code) -> dict[int, Any]:
        return {row.job_id: row for row in self.ledger.anomalies if row.code is code}

    def ask(self, repeat: NodeRequest) -> bytes:
        """Return a node's response to a request that is repeated by hand."""
        request = json.loads(repeat.body)
        assert request["method"] == "eth_call"
        body = request["params"][0]
        data = bytes.fromhex(body["data"][2:])
        outcome = self.grid.chain.run(body["to"], data, self.grid.stranger, keep=False)
        return bytes(outcome.output)


@pytest.fixture(scope="module")
def recorded() -> RecordedAudit:
    grid = recorded_grid()
    jobs = record_history(grid)
    return RecordedAudit(grid, grid.ledger(), jobs)


@pytest.fixture(scope="module")
def paid() -> RecordedAudit:
    grid = recorded_grid()
    jobs = record_payments(grid)
    return RecordedAudit(grid, grid.ledger(), jobs)


def sums(recorded: RecordedAudit, **changes: Any) -> list[ConservationCheck]:
    ledger = recorded.ledger
    totals = dataclasses.replace(ledger.totals, **changes)
    live_ids = [job.id for job in ledger.jobs.values() if job.status.is_live]
    return conservation(
        totals,
        ledger.deployment,
        ledger.block,
        supply=recorded.grid.credit.totalSupply(),
        scheduler_balance=recorded.grid.balance(recorded.grid.scheduler.address),
        live=live_ids,
        parked=[recorded.grid.alice],
    )


def test_the_sums_agree_on_both_sides(recorded: RecordedAudit) -> None:
    checks = sums(recorded)
    assert [check.difference for check in checks] == [0, 0, 0, 0]
    assert all(check.ok and check.requests for check in checks)
    assert checks[0].left.amount == recorded.ledger.totals.supply > 0
    assert ("sent to it by mistake", 11) in checks[1].right.terms


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"minted": 5}, [0, 2]),
        ({"burned": 8}, [0, 2]),
        ({"balances": 5}, [0]),
        ({"scheduler_balance": 5}, [1]),
        ({"escrow": 5}, [1, 3]),
        ({"parked": 5}, [1, 3]),
    ],
)
def test_each_total_is_checked(
    recorded: RecordedAudit, changes: dict[str, int], wrong: list[int]
) -> None:
    assert [n for n, check in enumerate(sums(recorded, **changes)) if not check.ok] == wrong


def test_calls_repeat_the_numbers_by_hand(recorded: RecordedAudit) -> None:
    calls = {r.description.split("(")[0]: r for check in sums(recorded) for r in check.requests}
    supply = recorded.ask(calls["Credit.totalSupply"])
    assert int.from_bytes(supply, "big") == recorded.ledger.totals.supply
    balance = recorded.ask(calls["Credit.balanceOf"])
    assert int.from_bytes(balance, "big") == recorded.ledger.totals.scheduler_balance
    function = interface("MetaScheduler").function("getJobs")
    (records,) = function.decode(recorded.ask(calls["MetaScheduler.getJobs"]))
    names = [part["name"] for part in function.outputs[0]["components"]]
    assert sum(record[names.index("escrow")] for record in records) == recorded.ledger.totals.escrow
    assert recorded.ask(calls["MetaScheduler.parkedOf"]) == bytes(32)


def test_log_queries_find_the_numbers_by_hand(recorded: RecordedAudit) -> None:
    """The requests' filters, applied to raw logs, give the printed sums."""
    first, second = sums(recorded)[:2]

    def total(repeat: NodeRequest) -> int:
        query = json.loads(repeat.body)["params"][0]
        assert query["toBlock"] == hex(recorded.ledger.block)
        topic_filters = [None if t is None else bytes.fromhex(t[2:]) for t in query["topics"]]
        return sum(
            int.from_bytes(log["data"], "big")
            for log in recorded.grid.chain.logs
            if to_checksum_address(log["address"]) == query["address"]
            and all(w is None or w == t for w, t in zip(topic_filters, log["topics"], strict=False))
        )

    mints, burns, _ = first.requests
    assert (total(mints), total(burns)) == (
        recorded.ledger.totals.minted,
        recorded.ledger.totals.burned,
    )
    into, out_of = second.requests[:2]
    assert total(into) - total(out_of) == recorded.ledger.totals.scheduler_balance
    assert "cast logs --address" in into.cast


def test_every_job_keeps_the_second_invariant(recorded: RecordedAudit, paid: RecordedAudit) -> None:
    for job in (*recorded.ledger.jobs.values(), *paid.ledger.jobs.values()):
        check = job_conservation(job, recorded.ledger.deployment, recorded.ledger.block)
        assert (check.difference, check.job_id) == (0, job.id)
        assert ("while live" in check.name) is job.status.is_live
        assert check.left.amount > 0
        for field in ("funded", "escrow"):
            wrong = dataclasses.replace(job, **{field: getattr(job, field) + 1})
            assert not job_conservation(wrong, recorded.ledger.deployment, recorded.ledger.block).ok
    finished = recorded.job("finished")
    assert not job_conservation(
        dataclasses.replace(finished, refunded=0), recorded.ledger.deployment, 1
    ).ok


class TestBill:
    def test_every_bill_is_right(self, recorded: RecordedAudit, paid: RecordedAudit) -> None:
        for job in (*recorded.ledger.jobs.values(), *paid.ledger.jobs.values()):
            bill = recompute_bill(job)
            assert bill.ok, bill
            assert bill.settled is job.status.is_final
            total = sum(line.expected for line in bill.lines) - bill.collected
            assert total in {0, bill.escrow, bill.cost} or not bill.settled

    def test_interim_payments_are_billed_once(self, paid: RecordedAudit) -> None:
        job = paid.job("signed")
        bill = recompute_bill(job, reported=5)
        assert (bill.seconds, bill.collected_seconds, bill.billed_seconds) == (5, 294, 299)
        assert bill.collected == 294 * RATE
        assert bill.escrow == TERMS["amount"] + 2 * 10**9 - 294 * RATE
        assert bill.allotment == TERMS["timeLimit"] + 10**9 // RATE - 294
        assert recompute_bill(paid.job("stopped")).seconds == 301 - 120
        running = paid.job("paid on")
        assert recompute_bill(running, now=running.billed_until + 9).seconds == 9
        for field in ("paid", "fee", "refunded", "billed_seconds"):
            wrong = dataclasses.replace(job, **{field: getattr(job, field) + 1})
            assert not recompute_bill(wrong, reported=5).ok

    def test_its_inputs_are_shown(self, recorded: RecordedAudit) -> None:
        bill = recompute_bill(recorded.job("finished"), reported=30)
        assert (bill.elapsed, bill.seconds, bill.reported, bill.rate) == (37, 30, 30, RATE)
        assert bill.allotment == TERMS["timeLimit"]
        assert bill.cost == 30 * RATE
        assert {line.name for line in bill.lines} == {"paid", "fee", "refunded", "carried_out"}

    def test_more_than_reported_is_found(self, recorded: RecordedAudit) -> None:
        assert not recompute_bill(recorded.job("finished"), reported=29).ok
        # No more than the elapsed chain time is billed, whatever is reported.
        assert recompute_bill(recorded.job("spent"), reported=10**6).ok

    @pytest.mark.parametrize("field", ["paid", "fee", "refunded"])
    @pytest.mark.parametrize("name", ["finished", "spent", "cancelled"])
    def test_a_wrong_sum_is_found(self, recorded: RecordedAudit, name: str, field: str) -> None:
        job = recorded.job(name)
        wrong = dataclasses.replace(job, **{field: getattr(job, field) + 1})
        bill = recompute_bill(wrong)
        assert not bill.ok
        assert [line.name for line in bill.lines if line.difference] == [field]

    @pytest.mark.parametrize("name", ["finished", "cancelled", "spent"])
    def test_too_many_seconds_are_found(self, recorded: RecordedAudit, name: str) -> None:
        job = recorded.job(name)
        bill = recompute_bill(dataclasses.replace(job, billed_seconds=10**6))
        assert not bill.ok
        assert bill.maximum < 10**6

    def test_runs_and_losses(self, recorded: RecordedAudit) -> None:
        assert recompute_bill(recorded.job("rescued")).seconds == 0
        lost_bill = recompute_bill(recorded.job("lost"))
        assert (lost_bill.cost, lost_bill.escrow) == (0, recorded.job("lost").carried_out)
        running = recorded.job("until_spent")
        bill = recompute_bill(running, now=running.started_at + 9)
        assert (bill.settled, bill.seconds, bill.cost) == (False, 9, 9 * running.rate)
        assert recompute_bill(running, now=10**10).seconds == running.allotment
        assert recompute_bill(recorded.job("pending")).cost == 0


class TestExceptions:
    def test_a_valid_history_has_anomalies_and_no_findings(self, recorded: RecordedAudit) -> None:
        assert recorded.ledger.findings == []
        codes = {row.code for row in recorded.ledger.anomalies}
        unseen = {Code.PARKED, Code.UNANSWERED, Code.SELF_SCHEDULED, Code.IDLE_CLAIM, Code.EXPIRED}
        assert codes == set(Code) - unseen

    def test_each_names_position_and_cause(self, recorded: RecordedAudit) -> None:
        places = {(e.block_number, e.tx_hash) for e in recorded.grid.events}
        for row in recorded.ledger.anomalies:
            assert row.message
            assert row.time == recorded.grid.chain.block_times[row.block]
            assert not row.tx_hash or (row.block, row.tx_hash) in places

    def test_runs_past_their_allotment(self, recorded: RecordedAudit) -> None:
        result = recorded.of(Code.OVERRUN)
        assert recorded.jobs["spent"] in result
        assert recorded.jobs["finished"] not in result
        assert recorded.jobs["cancelled"] not in result
        spent = recorded.job("spent")
        overrun = spent.ended_at - spent.started_at - TERMS["timeLimit"]
        assert f"ran {overrun} s past its {TERMS['timeLimit']} s" in result[spent.id].message
        assert result[spent.id].severity is Severity.NOTICE

    def test_a_run_that_continues_past_its_allotment(self, recorded: RecordedAudit) -> None:
        running = recorded.job("until_spent")
        late_end = running.started_at + running.allotment + 1

        def at(now: int) -> Ledger:
            times = recorded.grid.chain.block_times
            return Ledger.replay(recorded.grid.events, recorded.grid.deployment, times, now=now)

        ledger = at(late_end)
        codes = {(row.job_id, row.code) for row in at(late_end - 1).anomalies}
        assert (running.id, Code.OVERRUN) not in codes
        [row] = [r for r in ledger.anomalies if r.job_id == running.id and r.code is Code.OVERRUN]
        assert "runs 1 s past" in row.message
        assert row.tx_hash == ""
        assert running.id not in recorded.of(Code.OVERRUN)
        # A repeated request gives the same result.
        assert ledger.anomalies == ledger.anomalies

    def test_requeues_and_panics(self, recorded: RecordedAudit) -> None:
        queued = recorded.of(Code.REQUEUE)[recorded.jobs["queued"]]
        assert "was refused by" in queued.message
        assert queued.message.endswith(": no room")
        assert queued.severity is Severity.NOTICE
        panics = recorded.of(Code.PANIC)
        assert set(panics) == {recorded.jobs["lost"], recorded.jobs["queued"]}
        panic = panics[recorded.jobs["lost"]]
        assert f"its escrow moved to job {recorded.jobs['successor']}" in panic.message
        assert panic.account == recorded.job("lost").provider

    def test_self_scheduling_is_found_by_the_sender(self, recorded: RecordedAudit) -> None:
        row = recorded.of(Code.LATE_ASSIGNMENT)[recorded.jobs["early"]]
        assert f"waited {TIMES['pendingTimeout']} s" in row.message
        rows = recorded.ledger.anomalies
        rows_named = name_self_scheduled(rows, {row.tx_hash: row.account})
        [anomaly] = [item for item in rows_named if item.code is Code.SELF_SCHEDULED]
        assert anomaly.job_id == row.job_id
        assert anomaly.message.endswith("its provider took it itself")
        assert name_self_scheduled(rows, {row.tx_hash: recorded.grid.admin}) == rows

    async def test_the_sender_is_read_from_the_node_once(self, recorded: RecordedAudit) -> None:
        row = recorded.of(Code.LATE_ASSIGNMENT)[recorded.jobs["early"]]
        transactions: list[str] = []

        async def get_transaction(tx_hash: bytes) -> dict[str, Any]:
            transactions.append("0x" + tx_hash.hex())
            return {"from": row.account, "input": recorded.grid.chain.sent[transactions[-1]][2]}

        node: Any = SimpleNamespace(w3=SimpleNamespace(eth=SimpleNamespace()))
        node.w3.eth.get_transaction = get_transaction
        honest = auditing._report(recorded.ledger, None, [], "", proven=False)
        report = await auditing._with_senders(node, honest)
        anomalies = report.anomalies
        assert transactions.count(row.tx_hash) == 1
        assert row.job_id in {e.job_id for e in anomalies if e.code is Code.SELF_SCHEDULED}
        assert Code.LATE_ASSIGNMENT not in {e.code for e in anomalies if e.account == row.account}
        assert report.ok

        # The same assignment, of a job whose customer forbids self-scheduling.
        forbidden = recorded.grid.ledger(
            [
                dataclasses.replace(
                    event,
                    terms=dataclasses.replace(event.terms, flags=JobFlags.NO_SELF_SCHEDULING),
                )
                if isinstance(event, ev.JobSubmitted) and event.job_id == row.job_id
                else event
                for event in recorded.grid.events
            ]
        )
        report = await auditing._with_senders(
            node, auditing._report(forbidden, None, [], "", proven=False)
        )
        [finding] = report.audit.findings
        assert (finding.code, finding.job_id) == ("flags", row.job_id)
        assert "its customer forbids" in finding.message
        [late_anomaly] = [
            anomaly for anomaly in forbidden.anomalies if anomaly.tx_hash == row.tx_hash
        ]
        assert late_anomaly.message.endswith("s")

    def test_administrators_and_money(self, recorded: RecordedAudit) -> None:
        messages = {row.code: row.message for row in recorded.ledger.anomalies}
        assert messages[Code.FEE] == "the fee became 700 basis points"
        assert messages[Code.BAN].endswith("was banned: enough")
        assert "sent to the scheduler without a job" in messages[Code.GIFT]
        # A payment for a job is not a transfer without a job.
        assert [row.code for row in recorded.ledger.anomalies].count(Code.GIFT) == 1
        assert any("APPROVER_ROLE" in row.message for row in recorded.ledger.anomalies)
        assert any(
            "role administrator of Credit" in row.message for row in recorded.ledger.anomalies
        )
        warned = {r.code for r in recorded.ledger.anomalies if r.severity is Severity.WARNING}
        assert {Code.BAN, Code.GIFT, Code.PANIC, Code.LATE_ANSWER} <= warned

    def test_a_challenge_without_an_answer(self, recorded: RecordedAudit) -> None:
        silent = [e for e in recorded.grid.events if not isinstance(e, ev.ProviderAnswered)]
        ledger = recorded.grid.ledger(silent)
        [row] = [anomaly for anomaly in ledger.anomalies if anomaly.code is Code.UNANSWERED]
        assert "has not answered a challenge" in row.message
        assert Code.LATE_ANSWER not in {anomaly.code for anomaly in ledger.anomalies}

    def test_an_answer_in_time_is_not_an_anomaly(self, recorded: RecordedAudit) -> None:
        timely = [
            dataclasses.replace(event, answer_by=2**40)
            if isinstance(event, ev.ProviderChallenged)
            else event
            for event in recorded.grid.events
        ]
        codes = {row.code for row in recorded.grid.ledger(timely).anomalies}
        assert not codes & {Code.LATE_ANSWER, Code.UNANSWERED}
        assert recorded.of(Code.LATE_ANSWER)

    def test_jobs_that_anyone_could_cancel(self, paid: RecordedAudit) -> None:
        [row] = [anomaly for anomaly in paid.ledger.anomalies if anomaly.code is Code.EXPIRED]
        assert row.job_id == paid.jobs["expired"]
        assert f"after {TIMES['pendingExpiry']} s without a provider" in row.message

    def test_a_run_with_interim_payments_is_late_by_its_whole_time(
        self, paid: RecordedAudit
    ) -> None:
        running = paid.job("paid on")
        [row] = [anomaly for anomaly in paid.ledger.anomalies if anomaly.code is Code.OVERRUN]
        overrun = paid.ledger.time - running.started_at - TERMS["timeLimit"]
        assert f"runs {overrun} s past its {TERMS['timeLimit']} s" in row.message
        assert row.job_id == running.id

    def test_claims_that_lie_idle(self) -> None:
        grid = recorded_grid()
        host = grid.provider("provider")
        started, balance, given_back = (grid.submit() for _ in range(3))
        grid.assign(host, started, balance, given_back)
        grid.scheduler.claim([started, balance, given_back], sender=host.account)
        limit = TIMES["claimTimeout"]
        grid.chain.advance(limit + 1)
        grid.scheduler.start([started], sender=host.account)
        grid.scheduler.requeue([given_back], "", sender=grid.alice)
        rows = {row.job_id: row for row in grid.ledger().anomalies if row.code is Code.IDLE_CLAIM}
        assert set(rows) == {started, balance, given_back}
        assert f"became RUNNING {limit + 1} s later" in rows[started].message
        assert "has not started" in rows[balance].message
        assert rows[balance].severity is Severity.WARNING
        [requeue] = [row for row in grid.ledger().anomalies if row.code is Code.REQUEUE]
        assert requeue.severity is Severity.WARNING
        timely = dataclasses.replace(
            grid.deployment, constructor_args={"MetaScheduler": {"timeouts": [limit + 1, 600]}}
        )
        calm = Ledger.replay(grid.events, timely, grid.chain.block_times)
        assert Code.IDLE_CLAIM not in {row.code for row in calm.anomalies}

    def test_a_payment_that_had_to_be_parked(self, recorded: RecordedAudit) -> None:
        last = recorded.grid.events[-1]
        position = {"block_number": last.block_number, "log_index": last.log_index + 1}
        parked = ev.PaymentParked(
            recorded.grid.stranger,
            10**18,
            **position,
            tx_hash="0xfeed",
            address=recorded.ledger.deployment.scheduler,
        )
        ledger = recorded.grid.ledger([*recorded.grid.events, parked])
        [row] = [anomaly for anomaly in ledger.anomalies if anomaly.code is Code.PARKED]
        assert (row.account, row.severity) == (recorded.grid.stranger, Severity.WARNING)
        assert row.message.startswith("1 credit for")


class TestStatement:
    def test_a_range_opens_and_closes(self, recorded: RecordedAudit) -> None:
        alice = to_checksum_address(recorded.grid.alice)
        whole = statement(recorded.ledger, alice)
        assert (whole.opening, whole.closing) == (0, recorded.grid.balance(alice))
        blocks = sorted({row.block for row in whole.rows})
        middle = blocks[len(blocks) // 2]
        early = statement(recorded.ledger, alice, 0, middle - 1)
        later_statement = statement(recorded.ledger, alice.lower(), middle)
        assert early.rows + later_statement.rows == whole.rows
        assert early.closing == later_statement.opening != 0
        assert (
            later_statement.closing
            == later_statement.opening + later_statement.credits - later_statement.debits
            == whole.closing
        )

    def test_an_empty_history(self, recorded: RecordedAudit) -> None:
        alice = to_checksum_address(recorded.grid.alice)
        after = statement(
            recorded.ledger, alice, recorded.ledger.block + 1, recorded.ledger.block + 9
        )
        assert after.rows == ()
        assert after.opening == after.closing == recorded.grid.balance(alice)

    def test_the_statement_must_end_at_the_balance(self, recorded: RecordedAudit) -> None:
        whole = statement(recorded.ledger, recorded.grid.alice)
        check = closing_check(recorded.ledger, whole, recorded.grid.balance(recorded.grid.alice))
        assert check.ok
        assert "Credit.balanceOf" in check.requests[0].description
        assert int.from_bytes(recorded.ask(check.requests[0]), "big") == whole.closing
        assert not closing_check(recorded.ledger, whole, whole.closing + 1).ok


def test_status_names_are_in_bills(recorded: RecordedAudit) -> None:
    assert recompute_bill(recorded.job("spent")).status is JobStatus.OUT_OF_CREDITS


def test_the_documented_event_topics_are_correct() -> None:
    text = (Path(__file__).parents[2] / "docs" / "auditing.md").read_text(encoding="utf-8")
    for name, kind in (("PRICED", ev.JobPriced), ("SETTLED", ev.JobSettled)):
        assert f"{name}={event_topics(kind)[0]}" in text
    assert f"TRANSFER={event_topics(ev.Transfer)[0]}" in text
