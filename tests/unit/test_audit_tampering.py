"""Altered histories: every changed, dropped or added event is a finding."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from enum import IntEnum
from typing import Any

import pytest

from deepsquare_chain.audit.conservation import Storage, verify
from deepsquare_chain.audit.entries import MovementKind
from deepsquare_chain.audit.ledger import Ledger
from deepsquare_chain.chain.bindings import events as ev
from deepsquare_chain.job import Hardware, JobFlags, JobStatus, Offer, Prices, Terms
from tests.support.recorded import (
    RecordedGrid,
    record_history,
    record_payments,
    recorded_grid,
)

STRANGER = "0x" + "42" * 20


@dataclasses.dataclass(frozen=True)
class Recording:
    grid: RecordedGrid
    events: list[ev.Event]
    storage: Storage
    jobs: Mapping[str, int]

    def codes(self, events: list[ev.Event]) -> set[str]:
        """Return the codes of findings from events alone."""
        return {finding.code for finding in self.grid.ledger(events).findings}

    def is_found(self, events: list[ev.Event]) -> bool:
        return not verify(self.grid.ledger(events), self.storage).ok

    def changed(self, at: int, **values: Any) -> list[ev.Event]:
        return [
            dataclasses.replace(event, **values) if n == at else event
            for n, event in enumerate(self.events)
        ]


def recorded(record: Callable[[RecordedGrid], Mapping[str, int]]) -> Recording:
    grid = recorded_grid()
    jobs = record(grid)
    return Recording(grid, grid.events, grid.storage(grid.ledger()), jobs)


@pytest.fixture(scope="module")
def recording() -> Recording:
    return recorded(record_history)


@pytest.fixture(scope="module")
def payments() -> Recording:
    return recorded(record_payments)


@pytest.fixture(params=["recording", "payments"])
def any_recording(request: pytest.FixtureRequest) -> Recording:
    result: Recording = request.getfixturevalue(request.param)
    return result


# Fields that no balance, record or rule can contradict: texts, digests of results, allowances,
# roles, and proposals that were not approved.
WORDS = {
    ("JobResult", "result"),
    ("JobResult", "reason"),
    ("JobRequeued", "by"),
    ("JobRequeued", "reason"),
    ("JobPanicked", "by"),
    ("JobPanicked", "reason"),
    ("TransitionSkipped", "reason"),
    ("ProviderChallenged", "job_id"),
    ("ProviderChallenged", "by"),
    ("ProviderChallenged", "answer_by"),
    ("BanChanged", "reason"),
    ("HardwareProposed", "hardware"),
    ("SubmissionsChanged", "open"),
    ("terms", "name"),
    ("terms", "uses"),
    ("terms", "objective"),
}
SILENT = (ev.Approval, ev.RoleGranted, ev.RoleRevoked, ev.SubmissionsChanged)


def other(value: Any) -> Iterator[Any]:
    """Return values close to a value."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, IntEnum):
        yield from (item for item in type(value) if item is not value)
    elif isinstance(value, JobFlags):
        yield from (value ^ number for number in (1, 2, 4))
    elif isinstance(value, int):
        yield value + 1
        if value:
            yield value - 1
    elif isinstance(value, bytes):
        yield bytes(len(value) - 1) + b"\x07"
    elif isinstance(value, str) and value.startswith("0x"):
        yield STRANGER
    elif isinstance(value, str):
        yield value + "!"
    elif isinstance(value, Mapping):
        yield {**value, "more": "labels"}
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            for changed in other(getattr(value, field.name)):
                yield dataclasses.replace(value, **{field.name: changed})
    else:
        raise AssertionError(f"no other value for {value!r}")


def own_fields(event: ev.Event) -> list[str]:
    common = {field.name for field in dataclasses.fields(ev.Event)}
    return [field.name for field in dataclasses.fields(event) if field.name not in common]


def tamperings(event: ev.Event) -> Iterator[tuple[str, Any]]:
    for name in own_fields(event):
        if (type(event).__name__, name) in WORDS:
            continue
        value = getattr(event, name)
        for changed in other(value):
            if isinstance(value, Terms):
                parts = [f.name for f in dataclasses.fields(Terms)]
                differing = [p for p in parts if getattr(changed, p) != getattr(value, p)]
                if ("terms", differing[0]) in WORDS:
                    continue
            yield name, changed


def test_every_changed_field_is_found(any_recording: Recording) -> None:
    undetected = []
    attempts = 0
    for at, event in enumerate(any_recording.events):
        if isinstance(event, SILENT):
            continue
        for name, changed in tamperings(event):
            attempts += 1
            if not any_recording.is_found(any_recording.changed(at, **{name: changed})):
                undetected.append((event, name, changed))
    assert attempts > 400
    assert [miss for miss in undetected if not is_self_reported(*miss)] == []


def is_self_reported(event: ev.Event, name: str, changed: Any) -> bool:
    """Whether only its sender knows it: the exit code of a failed job, or a skipped unknown job."""
    if isinstance(event, ev.JobResult) and name == "exit_code":
        return event.exit_code != 0 or event.reason == "spent"
    return isinstance(event, ev.TransitionSkipped) and name == "job_id" and event.job_id == 999


MONEY = {
    ev.JobSubmitted: {"job_id", "customer"},
    ev.JobTransition: {"job_id", "customer", "provider", "before", "after"},
    ev.JobPriced: {"job_id", "provider", "rate", "fee_bps"},
    ev.JobToppedUp: {"job_id", "payer", "amount", "escrow", "time_limit"},
    ev.JobSettled: {
        *("job_id", "provider", "customer", "billed_seconds", "paid", "fee", "refunded"),
    },
    ev.JobRetried: {"job_id", "successor", "escrow"},
    ev.JobCollected: {
        *("job_id", "provider", "customer", "billed_seconds", "paid", "fee", "escrow"),
        "time_limit",
    },
}


def test_false_amounts_are_found_without_storage(recording: Recording, payments: Recording) -> None:
    attempts: Counter[str] = Counter()
    for recorded in (recording, payments):
        for at, event in enumerate(recorded.events):
            for name in MONEY.get(type(event), ()):
                for changed in other(getattr(event, name)):
                    attempts[type(event).__name__] += 1
                    codes = recorded.codes(recorded.changed(at, **{name: changed}))
                    assert codes, f"{event} with {name}={changed} was not noticed"
            if isinstance(event, ev.JobSubmitted):
                terms = dataclasses.replace(event.terms, amount=event.terms.amount - 1)
                assert "escrow" in recorded.codes(recorded.changed(at, terms=terms))
    assert set(attempts) == {kind.__name__ for kind in MONEY}


def test_transfers_of_the_scheduler_are_matched(any_recording: Recording) -> None:
    scheduler = any_recording.grid.ledger().deployment.scheduler
    attempts = 0
    for at, event in enumerate(any_recording.events):
        if isinstance(event, ev.Transfer) and scheduler in {event.sender, event.recipient}:
            changed = any_recording.changed(at, amount=event.amount + 1)
            gift = event.amount == 11
            assert gift or any_recording.codes(changed) & {"escrow", "payment"}
            attempts += 1
    assert attempts > 15


def test_every_dropped_event_is_found(any_recording: Recording) -> None:
    # Events whose absence no rule can detect.
    kinds = (*SILENT, ev.TransitionSkipped, ev.ProviderAnswered)
    undetected = [
        event
        for at, event in enumerate(any_recording.events)
        if not isinstance(event, kinds)
        and not any_recording.is_found(
            [other_event for n, other_event in enumerate(any_recording.events) if n != at]
        )
    ]
    assert undetected == []


def test_every_duplicated_event_is_found(recording: Recording) -> None:
    for at, event in enumerate(recording.events):
        assert "order" in recording.codes(
            [*recording.events[: at + 1], event, *recording.events[at + 1 :]]
        )


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_shifted_end_is_found(recording: Recording, shift: int) -> None:
    """A run that its customer cancelled is billed to the second."""
    cancelled = next(
        event
        for event in recording.events
        if isinstance(event, ev.JobTransition) and event.after is JobStatus.CANCELLED
    )
    times = dict(recording.grid.chain.block_times)
    times[cancelled.block_number] += shift
    codes = {
        f.code for f in Ledger.replay(recording.events, recording.grid.deployment, times).findings
    }
    assert "billing" in codes


def forged(recording: Recording, job_id: int, seconds: int) -> list[ev.Event]:
    """A bill for other seconds, whose settlement and transfers are consistent."""
    recorded = next(
        e for e in recording.events if isinstance(e, ev.JobSettled) and e.job_id == job_id
    )
    job = recording.grid.ledger().jobs[job_id]
    cost = seconds * job.rate
    share = cost * job.fee_bps // 10_000
    ledger = recording.grid.ledger()
    changes = {
        recorded.provider: cost - share - recorded.paid,
        ledger.deployment.treasury: share - recorded.fee,
        recorded.customer: job.funded - cost - recorded.refunded,
    }
    bill = {"paid": cost - share, "fee": share, "refunded": job.funded - cost}

    def forge(event: ev.Event) -> ev.Event:
        if event is recorded:
            return dataclasses.replace(event, billed_seconds=seconds, **bill)
        if event.tx_hash == recorded.tx_hash and isinstance(event, ev.Transfer):
            return dataclasses.replace(event, amount=event.amount + changes[event.recipient])
        return event

    return [forge(event) for event in recording.events]


@pytest.mark.parametrize(
    ("name", "seconds", "reason"),
    [
        ("cancelled", 0, "0 s were billed, but 37 s were used"),
        ("cancelled", 36, "36 s were billed, but 37 s were used"),
        ("cancelled", 38, "38 s were billed, but 37 s were used"),
        ("spent", 599, "599 of 600 s do not make it OUT_OF_CREDITS"),
        ("spent", 601, "601 s were billed, but at most 600 s may be"),
        ("rescued", 10, "10 s were billed, but"),
    ],
)
def test_a_bill_for_other_seconds_is_found(
    recording: Recording, name: str, seconds: int, reason: str
) -> None:
    findings = recording.grid.ledger(forged(recording, recording.jobs[name], seconds)).findings
    assert any(reason in finding.message for finding in findings)
    honest = recording.grid.ledger().jobs[recording.jobs[name]].billed_seconds
    assert recording.grid.ledger(forged(recording, recording.jobs[name], honest)).findings == []


def test_findings_name_job_and_transaction(recording: Recording) -> None:
    at, event = next(
        (at, event) for at, event in enumerate(recording.events) if isinstance(event, ev.JobSettled)
    )
    finding = recording.grid.ledger(recording.changed(at, paid=event.paid + 1)).findings[0]
    assert finding.job_id == event.job_id
    assert finding.tx_hash == event.tx_hash
    assert event.tx_hash in str(finding)
    assert "settled with" in finding.message


class TestParked:
    """A recipient that can't be paid: the transfer is replaced by a parked payment."""

    @pytest.fixture
    def parked(self, recording: Recording) -> list[ev.Event]:
        ledger = recording.grid.ledger()
        scheduler = ledger.deployment.scheduler
        at, payment = next(
            (at, event)
            for at, event in enumerate(recording.events)
            if isinstance(event, ev.Transfer)
            and event.sender == scheduler
            and event.recipient in ledger.providers
        )
        position = {"block_number": payment.block_number, "tx_hash": payment.tx_hash}
        recorded = ev.PaymentParked(
            payment.recipient,
            payment.amount,
            **position,
            log_index=payment.log_index,
            address=scheduler,
        )
        return [recorded if n == at else event for n, event in enumerate(recording.events)]

    def withdrawal(
        self, parked: list[ev.Event], recording: Recording, **changes: Any
    ) -> list[ev.Event]:
        recorded = next(event for event in parked if isinstance(event, ev.PaymentParked))
        last = parked[-1]
        position = {"block_number": last.block_number, "tx_hash": "0xabc"}
        withdrawn = ev.PaymentWithdrawn(
            recorded.recipient,
            STRANGER,
            recorded.amount,
            **position,
            log_index=last.log_index + 1,
            address=recorded.address,
        )
        credit = recording.grid.ledger().deployment.credit
        paid = ev.Transfer(
            recorded.address,
            STRANGER,
            recorded.amount,
            **position,
            log_index=last.log_index + 2,
            address=credit,
        )
        return [*parked, dataclasses.replace(withdrawn, **changes), paid]

    def test_parked_credits_stay_in_the_ledger(
        self, recording: Recording, parked: list[ev.Event]
    ) -> None:
        ledger = recording.grid.ledger(parked)
        recorded = next(event for event in parked if isinstance(event, ev.PaymentParked))
        assert ledger.findings == []
        assert ledger.parked == {recorded.recipient: recorded.amount}
        assert ledger.totals.parked == recorded.amount
        assert ledger.totals.difference == 0
        rows = [
            row for row in ledger.statement(recorded.recipient) if row.kind is MovementKind.PARKED
        ]
        assert [row.amount for row in rows] == [-recorded.amount]

    def test_parked_credits_can_be_withdrawn(
        self, recording: Recording, parked: list[ev.Event]
    ) -> None:
        ledger = recording.grid.ledger(self.withdrawal(parked, recording))
        assert ledger.findings == []
        assert ledger.parked == {}
        assert [row.kind for row in ledger.statement(STRANGER)] == [MovementKind.WITHDRAWAL]

    @pytest.mark.parametrize("change", [{"amount": 1}, {"to": "0x" + "43" * 20}])
    def test_a_false_withdrawal_is_found(
        self, recording: Recording, parked: list[ev.Event], change: dict[str, Any]
    ) -> None:
        assert recording.codes(self.withdrawal(parked, recording, **change)) & {"parked", "payment"}

    def test_parking_more_than_was_owed_is_found(
        self, recording: Recording, parked: list[ev.Event]
    ) -> None:
        more = [
            dataclasses.replace(event, amount=event.amount + 1)
            if isinstance(event, ev.PaymentParked)
            else event
            for event in parked
        ]
        assert "payment" in recording.codes(more)


class TestPaymentRules:
    """Changes that neither sums nor statuses reveal."""

    def replayed(self, payments: Recording, **times: int) -> set[str]:
        """Return the codes of findings if the deployment had other timeouts."""
        recorded = payments.grid.deployment
        changed = {**recorded.timeouts, **times}
        arguments = {"MetaScheduler": {"timeouts": list(changed.values())}}
        deployment = dataclasses.replace(recorded, constructor_args=arguments)
        ledger = Ledger.replay(payments.events, deployment, payments.grid.chain.block_times)
        return {finding.code for finding in ledger.findings}

    def test_an_interim_payment_that_came_too_early(self, payments: Recording) -> None:
        interval = payments.grid.deployment.timeouts["collect_interval"]
        assert self.replayed(payments, collect_interval=interval) == set()
        assert self.replayed(payments, collect_interval=interval + 1) == {"interim"}

    def test_an_interim_payment_that_the_customer_forbids(self, payments: Recording) -> None:
        at, recorded = next(
            (at, event)
            for at, event in enumerate(payments.events)
            if isinstance(event, ev.JobSubmitted) and event.job_id == payments.jobs["signed"]
        )
        terms = dataclasses.replace(recorded.terms, flags=JobFlags.NO_SELF_SCHEDULING)
        assert payments.codes(payments.changed(at, terms=terms)) == {"interim"}

    def test_an_interim_payment_after_the_allotment(self, payments: Recording) -> None:
        """Only the submitted time limit differs, with all values that follow from it."""
        short = -400  # so that the second payment comes a few seconds too late

        def forge(event: ev.Event) -> ev.Event:
            if isinstance(event, ev.JobSubmitted):
                limit = event.terms.time_limit + short
                terms = dataclasses.replace(event.terms, time_limit=limit)
                return dataclasses.replace(event, terms=terms)
            if isinstance(event, ev.JobCollected | ev.JobToppedUp):
                return dataclasses.replace(event, time_limit=event.time_limit + short)
            return event

        signed = payments.jobs["signed"]
        findings = payments.grid.ledger([forge(event) for event in payments.events]).findings
        recorded = {finding.message for finding in findings if finding.job_id == signed}
        assert any("when its" in message and "were used up" in message for message in recorded)

    def test_a_transition_that_did_not_answer_the_challenge(self, payments: Recording) -> None:
        answers = [e for e in payments.events if isinstance(e, ev.ProviderAnswered)]
        assert len(answers) == 1
        other_events = [event for event in payments.events if event not in answers]
        findings = payments.grid.ledger(other_events).findings
        assert {finding.code for finding in findings} == {"challenge"}
        assert "did not answer its open challenge" in findings[0].message

    def test_an_unresponsive_provider_is_not_lost_yet(self, recording: Recording) -> None:
        times = recording.grid.deployment.timeouts
        assert self.replayed(recording, lost_timeout=times["lost_timeout"]) == set()
        # The stranger's panic and the customer's free cancellation came too early then.
        codes = self.replayed(recording, lost_timeout=times["lost_timeout"] + 10)
        assert codes == {"party", "billing"}

    def test_a_refund_where_retries_were_left(self, recording: Recording) -> None:
        at, recorded = next(
            (at, event)
            for at, event in enumerate(recording.events)
            if isinstance(event, ev.JobSubmitted) and event.job_id == recording.jobs["queued"]
        )
        terms = dataclasses.replace(recorded.terms, retries=1)
        assert recording.codes(recording.changed(at, terms=terms)) == {"retry"}

    def test_a_job_that_the_forwarder_pays(self, payments: Recording) -> None:
        ledger = payments.grid.ledger()
        customer = ledger.jobs[payments.jobs["signed"]].customer
        forwarder = ledger.deployment.forwarder

        def forge(event: ev.Event) -> ev.Event:
            names = [name for name in own_fields(event) if getattr(event, name) == customer]
            return dataclasses.replace(event, **dict.fromkeys(names, forwarder))

        assert payments.codes([forge(event) for event in payments.events]) == {"forwarder"}

    def test_an_assignment_beyond_the_offer_less_the_load(self, payments: Recording) -> None:
        """Four jobs of six cpus in one call: the offer is lowered before the last of them."""
        at, last = next(
            (at, event)
            for at, event in enumerate(payments.events)
            if isinstance(event, ev.JobTransition)
            and event.after is JobStatus.META_SCHEDULED
            and event.job_id == payments.jobs["given up"]
        )
        wide = [dataclasses.replace(e, log_index=10 * e.log_index) for e in payments.events]
        for cpus, codes in ((24, set()), (23, {"eligible"})):
            lowered = ev.OfferChanged(
                last.provider,
                Offer(cpus, 10**6, 10),
                block_number=last.block_number,
                tx_hash="0xfeed",
                log_index=wide[at].log_index - 5,
                address=payments.grid.ledger().deployment.registry,
            )
            assert payments.codes([*wide[:at], lowered, *wide[at:]]) == codes


class TestInvalidAssignments:
    """Each condition of the contract is replayed: transitions that it would refuse are findings."""

    def with_event(
        self, recording: Recording, event: ev.Event
    ) -> tuple[list[ev.Event], ev.JobTransition]:
        """Insert an event of the registry right before the last assignment."""
        at, assignment = [
            (n, other_event)
            for n, other_event in enumerate(recording.events)
            if isinstance(other_event, ev.JobTransition)
            and other_event.after is JobStatus.META_SCHEDULED
        ][-1]
        wide = [
            dataclasses.replace(event, log_index=10 * event.log_index) for event in recording.events
        ]
        recorded = dataclasses.replace(
            event,
            provider=assignment.provider,
            block_number=assignment.block_number,
            tx_hash="0xfeed",
            log_index=wide[at].log_index - 5,
            address=recording.grid.ledger().deployment.registry,
        )
        return [*wide[:at], recorded, *wide[at:]], assignment

    def hardware(self, recording: Recording) -> tuple[Hardware, int]:
        [approved, *_] = [e for e in recording.events if isinstance(e, ev.ProviderApproved)]
        return approved.hardware, approved.approved_until

    @pytest.mark.parametrize(
        "event",
        [
            ev.DrainingChanged("", True),
            ev.BanChanged("", True, "why"),
            ev.OfferChanged("", Offer(5, 10**6, 10)),
            ev.OfferChanged("", Offer(100, 599, 10)),
            ev.OfferChanged("", Offer(100, 10**6, 0)),
            ev.PricesChanged("", Prices(10**6, 1, 1)),
        ],
        ids=lambda event: f"{type(event).__name__} {event}"[-40:],
    )
    def test_to_a_provider_that_could_not_take_it(
        self, recording: Recording, event: ev.Event
    ) -> None:
        events, assignment = self.with_event(recording, event)
        findings = recording.grid.ledger(events).findings
        assert {finding.job_id for finding in findings} == {assignment.job_id}
        assert findings[0].code in {"eligible", "rate"}

    def test_after_its_approval_ran_out(self, recording: Recording) -> None:
        hardware, approved_until = self.hardware(recording)
        events, assignment = self.with_event(
            recording, ev.ProviderApproved("", 1, hardware, approved_until)
        )
        assert recording.grid.ledger(events).findings == []
        now = recording.grid.chain.block_times[assignment.block_number]
        for seconds_left, codes in ((0, {"version"}), (-1, {"version", "eligible"})):
            short = ev.ProviderApproved("", 1, hardware, now + seconds_left)
            events, _ = self.with_event(recording, short)
            assert {f.code for f in recording.grid.ledger(events).findings} == codes

    def test_to_smaller_hardware(self, recording: Recording) -> None:
        hardware, approved_until = self.hardware(recording)
        small = dataclasses.replace(hardware, nodes=1, cpus_per_node=5)
        events, _ = self.with_event(recording, ev.ProviderApproved("", 1, small, approved_until))
        assert {f.code for f in recording.grid.ledger(events).findings} == {"eligible"}

    def test_assignment_to_the_provider_that_lost_the_predecessor(
        self, recording: Recording
    ) -> None:
        ledger = recording.grid.ledger()
        successor = ledger.jobs[recording.jobs["successor"]]
        loser, winner = ledger.jobs[successor.retry_of].provider, successor.provider

        def forge(event: ev.Event) -> ev.Event:
            if getattr(event, "job_id", 0) != successor.id:
                return event
            names = {field.name for field in dataclasses.fields(event)}
            if "provider" in names and getattr(event, "provider", "") == winner:
                return dataclasses.replace(event, provider=loser)
            return event

        codes = {
            f.code for f in recording.grid.ledger([forge(e) for e in recording.events]).findings
        }
        assert "excluded" in codes

    @pytest.mark.parametrize(("bps", "is_valid"), [(2_000, True), (2_001, False)])
    def test_the_highest_fee(self, recording: Recording, bps: int, is_valid: bool) -> None:
        last = recording.events[-1]
        scheduler = recording.grid.ledger().deployment.scheduler
        position = {"block_number": last.block_number, "log_index": last.log_index + 1}
        recorded = ev.FeeChanged(bps, **position, tx_hash="0xfeed", address=scheduler)
        assert (recording.codes([*recording.events, recorded]) == set()) is is_valid
