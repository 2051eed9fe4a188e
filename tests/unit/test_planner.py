"""The planner's table: chain status x run record x executor state, with one expected action each."""

from __future__ import annotations

import dataclasses

import pytest

from deepsquare_chain.executors.base import MAX_WALLTIME, Exit, RunState, RunStatus
from deepsquare_chain.job import Job, JobFlags, JobStatus, Offer, Resources
from deepsquare_chain.provider.model import (
    Adopt,
    CachedDefinition,
    Cancel,
    Claim,
    ClaimAndStart,
    Close,
    Collect,
    Collecting,
    DefinitionState,
    Extend,
    Lookup,
    Panic,
    Phase,
    RecordEnd,
    Release,
    Requeue,
    Run,
    RunReport,
    Situation,
    Start,
    Submit,
    View,
    Wait,
    parse_key,
    run_key,
)
from deepsquare_chain.provider.planner import clip, plan, plan_job
from tests.support import workloads

pytestmark = pytest.mark.unit

T0 = 1_700_000_000
RATE = 10**12
READY = CachedDefinition(DefinitionState.READY)
NOWHERE = Lookup(None)
HERE = Lookup("h1")
LIVE = RunStatus(RunState.RUNNING)
QUEUED = RunStatus(RunState.QUEUED)
UNKNOWN = RunStatus(RunState.UNKNOWN)
LOCAL = Situation(now=T0 + 2, queues=False, free=Offer(8, 4096, 0))
QUEUE = dataclasses.replace(LOCAL, queues=True)


def job(status: JobStatus = JobStatus.RUNNING, **changes) -> Job:
    defaults = {
        "since": T0,
        "provider_id": 1,
        "resources": Resources(1, 2, 32, 0),
        "retries_left": 1,
        "escrow": 100 * RATE,
        "rate": RATE,
        "fee_bps": 500,
    }
    return workloads.job(7, status=status, **(defaults | changes))


def row(phase: Phase = Phase.WATCHED, **changes) -> Run:
    handle = "h1" if phase in {Phase.SUBMITTED, Phase.ENDED} else None
    last_allotment = 60 if phase in {Phase.SUBMITTING, Phase.SUBMITTED, Phase.ENDED} else 0
    base = Run(
        job_id=7, key="31337-5fbdb231-7", phase=phase, handle=handle, allotment=last_allotment
    )
    return dataclasses.replace(base, **changes)


def ended(reason: str = "exited", code: int = 0, seconds: int = 5) -> Exit:
    return Exit(code=code, reason=reason, seconds=seconds, started_at=1.0, ended_at=6.0)


def over(exit_: Exit) -> RunStatus:
    return RunStatus(RunState.ENDED, exit_)


def view(chain: JobStatus, run: Run, /, *, is_own: bool = True, **changes) -> View:
    fields = {"cached_definition": READY} | changes
    record = fields.pop("job", None) or job(chain)
    return View(job=record, run=run, mine=is_own, **fields)


def act(chain: JobStatus, run: Run, situation: Situation = LOCAL, /, **changes):
    [(_, action)] = plan([view(chain, run, **changes)], situation)
    return action


S = JobStatus
FOREIGN = [S.PENDING, S.META_SCHEDULED, S.SCHEDULED, S.RUNNING]
FINAL = [S.CANCELLED, S.FINISHED, S.FAILED, S.OUT_OF_CREDITS, S.PANICKED]


class TestJobsOfOthers:
    @pytest.mark.parametrize("status", FINAL)
    @pytest.mark.parametrize(
        ("run", "report", "lookup", "expected"),
        [
            (row(), None, None, Close),
            (row(), None, NOWHERE, Close),
            (row(), None, HERE, Adopt),
            (row(Phase.REFUSED), None, None, Close),
            (row(Phase.CLOSED), None, None, Wait),
            (row(Phase.SUBMITTING), None, None, Wait),
            (row(Phase.SUBMITTING), None, NOWHERE, Close),
            (row(Phase.SUBMITTING), None, HERE, Adopt),
            (row(Phase.SUBMITTED), LIVE, None, Cancel),
            (row(Phase.SUBMITTED), QUEUED, None, Cancel),
            (row(Phase.SUBMITTED), None, None, Wait),
            (row(Phase.SUBMITTED), UNKNOWN, HERE, Wait),
            (row(Phase.SUBMITTED), UNKNOWN, NOWHERE, Wait),
            (row(Phase.SUBMITTED), over(ended("cancelled", 143)), None, Close),
            (row(Phase.ENDED, exit=ended()), None, None, Close),
        ],
    )
    def test_final(self, status, run, report, lookup, expected):
        action = act(status, run, is_own=False, status=report, lookup=lookup)
        assert isinstance(action, expected)

    @pytest.mark.parametrize("status", FOREIGN)
    @pytest.mark.parametrize(
        ("run", "report", "expected"),
        [
            (row(), None, Wait),
            (row(Phase.REFUSED), None, Wait),
            (row(Phase.SUBMITTED), LIVE, Cancel),
            (row(Phase.SUBMITTED), over(ended("cancelled", 143)), Release),
            (row(Phase.ENDED, exit=ended()), None, Release),
        ],
    )
    def test_live_elsewhere(self, status, run, report, expected):
        assert isinstance(act(status, run, is_own=False, status=report), expected)

    def test_nothing_irreversible_before_it_is_confirmed(self):
        run = row(Phase.SUBMITTED)
        assert isinstance(act(S.PANICKED, run, is_own=False, status=LIVE, settled=False), Wait)

    def test_a_run_that_surely_vanished_closes(self):
        run = row(Phase.SUBMITTED)
        action = act(S.PANICKED, run, is_own=False, status=UNKNOWN, lookup=NOWHERE, misses=3)
        assert isinstance(action, Close)

    def test_an_unknown_id_is_treated_as_gone(self):
        assert isinstance(act(S.NONE, row(Phase.SUBMITTED), is_own=False, status=LIVE), Cancel)


class TestMetaScheduled:
    def test_claims_and_starts_at_once_unless_the_executor_has_a_queue(self):
        assert act(S.META_SCHEDULED, row()) == ClaimAndStart()
        assert act(S.META_SCHEDULED, row(Phase.STARTING)) == ClaimAndStart()
        assert act(S.META_SCHEDULED, row(), QUEUE) == Claim()

    @pytest.mark.parametrize(
        ("state", "early", "late"),
        [
            (DefinitionState.PENDING, Wait, Wait),
            (DefinitionState.MISSING, Wait, Panic),
            (DefinitionState.UNREACHABLE, Wait, Requeue),
            (DefinitionState.INVALID, Panic, Panic),
        ],
    )
    def test_without_its_definition(self, state, early, late):
        cached_definition = CachedDefinition(state, "definition x is not there")
        assert isinstance(act(S.META_SCHEDULED, row(), cached_definition=cached_definition), early)
        after_timeout = dataclasses.replace(LOCAL, now=T0 + LOCAL.assignment_timeout)
        action = act(S.META_SCHEDULED, row(), after_timeout, cached_definition=cached_definition)
        assert isinstance(action, late)
        if late is not Wait:
            assert action.reason == "definition x is not there"

    def test_refused_before(self):
        run = row(Phase.REFUSED, note="its environment is too large")
        assert act(S.META_SCHEDULED, run) == Panic("its environment is too large")

    def test_a_run_of_an_earlier_assignment_is_ended_first(self):
        run = row(Phase.SUBMITTED)
        assert isinstance(act(S.META_SCHEDULED, run, QUEUE, status=LIVE), Cancel)
        finished = over(ended("cancelled", 143))
        assert act(S.META_SCHEDULED, run, QUEUE, status=finished) == Release()

    def test_starts_again_after_a_replaced_block(self):
        assert act(S.META_SCHEDULED, row(Phase.SUBMITTED), status=LIVE) == ClaimAndStart()
        assert act(S.META_SCHEDULED, row(Phase.SUBMITTING), lookup=NOWHERE) == ClaimAndStart()


class TestScheduledLocal:
    def test_starts(self):
        assert act(S.SCHEDULED, row()) == Start()
        assert act(S.SCHEDULED, row(Phase.STARTING)) == Start()

    def test_starts_again_after_a_replaced_block(self):
        assert act(S.SCHEDULED, row(Phase.SUBMITTED), status=LIVE) == Start()
        assert act(S.SCHEDULED, row(Phase.SUBMITTING), lookup=NOWHERE) == Start()

    def test_definition_lost_since_the_claim(self):
        cached_definition = CachedDefinition(DefinitionState.MISSING, "gone")
        after_timeout = dataclasses.replace(LOCAL, now=T0 + LOCAL.assignment_timeout)
        assert isinstance(act(S.SCHEDULED, row(), cached_definition=cached_definition), Wait)
        assert act(S.SCHEDULED, row(), after_timeout, cached_definition=cached_definition) == Panic(
            "gone"
        )

    def test_refused(self):
        assert act(S.SCHEDULED, row(Phase.REFUSED, note="no")) == Requeue("no")


class TestScheduledQueue:
    @pytest.mark.parametrize(
        ("run", "report", "lookup", "expected"),
        [
            (row(), None, None, Wait),
            (row(), None, NOWHERE, Submit(60, 60, 0)),
            (row(), None, HERE, Adopt("h1")),
            (row(Phase.SUBMITTING), None, None, Wait),
            (row(Phase.SUBMITTING), None, NOWHERE, Submit(60, 60, 0)),
            (row(Phase.SUBMITTING), None, HERE, Adopt("h1")),
            (row(Phase.SUBMITTED), QUEUED, None, Wait),
            (row(Phase.SUBMITTED), None, None, Wait),
            (row(Phase.SUBMITTED), UNKNOWN, NOWHERE, Wait),
            (row(Phase.SUBMITTED), LIVE, None, Start()),
            (row(Phase.SUBMITTED), over(ended()), None, Start()),
            (row(Phase.SUBMITTED), over(ended("lost", 137)), None, Requeue),
            (row(Phase.ENDED, exit=ended()), None, None, Start()),
        ],
    )
    def test_table(self, run, report, lookup, expected):
        action = act(S.SCHEDULED, run, QUEUE, status=report, lookup=lookup)
        assert isinstance(action, expected) if isinstance(expected, type) else action == expected

    def test_vanished(self):
        action = act(
            S.SCHEDULED, row(Phase.SUBMITTED), QUEUE, status=UNKNOWN, lookup=NOWHERE, misses=3
        )
        assert isinstance(action, Requeue)


class TestRunning:
    @pytest.mark.parametrize("phase", [Phase.STARTING, Phase.SUBMITTING])
    @pytest.mark.parametrize("situation", [LOCAL, QUEUE])
    def test_without_a_handle(self, phase, situation):
        assert isinstance(act(S.RUNNING, row(phase), situation), Wait)
        assert act(S.RUNNING, row(phase), situation, lookup=HERE) == Adopt("h1")
        action = act(S.RUNNING, row(phase), situation, lookup=NOWHERE)
        assert action == Submit(walltime=58, allotment=60, lead=2)
        early = act(S.RUNNING, row(phase), situation, lookup=NOWHERE, settled=False)
        assert isinstance(early, Wait)

    def test_started_by_a_database_that_is_lost(self):
        assert act(S.RUNNING, row(), lookup=HERE) == Adopt("h1")
        assert isinstance(act(S.RUNNING, row(), lookup=NOWHERE, settled=False), Wait)
        assert isinstance(act(S.RUNNING, row(), lookup=NOWHERE), Panic)

    @pytest.mark.parametrize(
        ("delay", "expected"),
        [
            (0, Submit(60, 60, 0)),
            (29, Submit(31, 60, 29)),
            (45, Submit(30, 60, 30)),
            (60, Submit(30, 60, 30)),
            (61, Panic),
        ],
    )
    def test_a_late_start_leaves_half_the_time_or_gives_up(self, delay, expected):
        situation = dataclasses.replace(LOCAL, now=T0 + delay)
        action = act(S.RUNNING, row(Phase.STARTING), situation, lookup=NOWHERE)
        assert isinstance(action, expected) if isinstance(expected, type) else action == expected

    def test_until_spent_runs_as_long_as_the_escrow_buys(self):
        record = job(flags=JobFlags.UNTIL_SPENT)
        action = act(S.RUNNING, row(Phase.STARTING), lookup=NOWHERE, job=record)
        assert action == Submit(walltime=98, allotment=100, lead=2)
        endless = job(flags=JobFlags.UNTIL_SPENT, escrow=2**95, rate=1)
        assert (
            act(S.RUNNING, row(Phase.STARTING), lookup=NOWHERE, job=endless).walltime
            == MAX_WALLTIME
        )

    def test_watching(self):
        run = row(Phase.SUBMITTED)
        assert act(S.RUNNING, run, status=LIVE) == Wait("runs")
        assert isinstance(act(S.RUNNING, run, status=None), Wait)
        assert isinstance(act(S.RUNNING, run, status=UNKNOWN, lookup=HERE, misses=9), Wait)
        assert isinstance(act(S.RUNNING, run, status=UNKNOWN, lookup=NOWHERE, misses=2), Wait)
        assert isinstance(act(S.RUNNING, run, status=UNKNOWN, lookup=None, misses=3), Wait)
        action = act(S.RUNNING, run, status=UNKNOWN, lookup=NOWHERE, misses=3)
        assert action == Panic("the run vanished")

    def test_top_up_extends_by_the_remaining_time(self):
        run = row(Phase.SUBMITTED, lead=2)
        record = job(time_limit=90)
        assert act(S.RUNNING, run, status=LIVE, job=record) == Extend(88, 90)

    def test_the_end_is_recorded_first(self):
        report = over(ended(code=3))
        assert act(S.RUNNING, row(Phase.SUBMITTED), status=report) == RecordEnd(ended(code=3))

    def test_refused(self):
        assert act(S.RUNNING, row(Phase.REFUSED, note="too large")) == Panic("too large")


class TestCollect:
    """A run of 1,000 s with interim payments, 600 s after the last one."""

    WHEN = dataclasses.replace(
        LOCAL, now=T0 + 600, collecting=Collecting(interval=600, min_unbilled=570 * RATE)
    )

    def act(self, situation: Situation = WHEN, /, report: RunStatus | None = LIVE, **changes):
        fields = {"flags": JobFlags.INTERIM_PAYMENTS, "time_limit": 1_000} | changes
        collected = fields.pop("collected", 0)
        settled = fields.pop("settled", True)
        run = row(Phase.SUBMITTED, allotment=1_000 + (collected or 0))
        return act(
            S.RUNNING,
            run,
            situation,
            status=report,
            job=job(**fields),
            collected=collected,
            settled=settled,
        )

    def test_when_it_is_due(self):
        assert self.act() == Collect()
        # A later interval: billed time is subtracted from the limit, and the end has not changed.
        assert self.act(collected=600, time_limit=1_000) == Collect()

    def test_only_with_the_flag_and_the_setting(self):
        assert self.act(flags=JobFlags.NONE) == Wait("runs")
        assert self.act(dataclasses.replace(self.WHEN, collecting=None)) == Wait("runs")

    def test_not_too_early_and_not_for_less_than_its_gas(self):
        assert self.act(dataclasses.replace(self.WHEN, now=T0 + 599)) == Wait("runs")
        # The provider gets 95 % of 600 s.
        high_gas = dataclasses.replace(self.WHEN, collecting=Collecting(600, 570 * RATE + 1))
        assert self.act(high_gas) == Wait("runs")

    def test_the_end_bills_the_rest_of_a_run_that_is_nearly_over(self):
        assert self.act(dataclasses.replace(self.WHEN, now=T0 + 984)) == Collect()
        assert self.act(dataclasses.replace(self.WHEN, now=T0 + 985)) == Wait("runs")

    @pytest.mark.parametrize("report", [over(ended()), QUEUED, UNKNOWN, None])
    def test_never_for_a_run_that_is_not_known_to_be_alive(self, report):
        assert not isinstance(self.act(report=report), Collect)

    def test_not_before_its_cause_is_confirmed(self):
        assert self.act(settled=False) == Wait("runs")
        assert isinstance(self.act(collected=None), Wait)

    def test_it_is_no_change_of_the_allotment(self):
        """A run of 1,000 s keeps its walltime, whatever was billed; a top-up extends it."""
        assert self.act(LOCAL, collected=400, time_limit=1_000) == Wait("runs")
        run = row(Phase.SUBMITTED, allotment=1_000, lead=2)
        record = job(time_limit=700)
        assert act(S.RUNNING, run, status=LIVE, job=record, collected=300) == Wait("runs")
        assert act(S.RUNNING, run, status=LIVE, job=record, collected=400) == Extend(1_098, 1_100)


class TestEnd:
    def end(self, exit_: Exit, elapsed: int, run: Run | None = None, **changes):
        situation = dataclasses.replace(LOCAL, now=T0 + elapsed)
        run = dataclasses.replace(run or row(Phase.ENDED), exit=exit_)
        return act(S.RUNNING, run, situation, job=job(**changes))

    @pytest.mark.parametrize(
        ("exit_", "expected"),
        [
            (ended(), RunReport(5, 0, "")),
            (ended(code=3), RunReport(5, 3, "exited with code 3")),
            (ended("signalled", 139), RunReport(5, 139, "ended by signal 11")),
            (ended("memory", 137), RunReport(5, 137, "memory limit of 64 MB exceeded")),
        ],
    )
    def test_reports_its_own_seconds(self, exit_, expected):
        assert self.end(exit_, elapsed=9) == expected
        assert self.end(exit_, elapsed=5) == expected

    def test_waits_for_the_clock_of_the_chain(self):
        assert isinstance(self.end(ended(), elapsed=4), Wait)

    @pytest.mark.parametrize("reason", ["lost", "cancelled", "unstarted", "full"])
    def test_gives_up_runs_that_the_customer_must_not_pay_for(self, reason):
        assert isinstance(self.end(ended(reason, 137), elapsed=9), Panic)

    def test_walltime_bills_the_whole_allotment_and_waits_for_it(self):
        exit_ = ended("walltime", 143, seconds=58)
        assert isinstance(self.end(exit_, elapsed=59), Wait)
        assert self.end(exit_, elapsed=60) == RunReport(60, 143, "time limit reached")

    def test_a_top_up_that_did_not_extend_the_run_is_not_billed(self):
        exit_ = ended("walltime", 143, seconds=58)
        action = self.end(exit_, elapsed=60, time_limit=90)
        assert isinstance(action, RunReport)
        assert action.seconds == 58
        assert "too late" in action.reason

    def test_walltime_of_an_adopted_run_of_a_lost_database(self):
        run = row(Phase.ENDED, allotment=0)
        full = self.end(ended("walltime", 143, seconds=58), 60, run)
        assert full == RunReport(60, 143, "time limit reached")
        part = self.end(ended("walltime", 143, seconds=29), 60, run)
        assert isinstance(part, RunReport)
        assert part.seconds == 29

    @pytest.mark.parametrize(
        ("seconds", "collected", "reported"), [(25, 20, 5), (20, 20, 0), (18, 20, 0), (25, 0, 25)]
    )
    def test_seconds_billed_by_interim_payments_are_not_reported_again(
        self, seconds, collected, reported
    ):
        """A run of 80 s; `since` is the time of the last interim payment."""
        run = row(Phase.ENDED, exit=ended(seconds=seconds), allotment=80)
        record = job(time_limit=80 - collected)
        situation = dataclasses.replace(LOCAL, now=T0 + 30)
        action = act(S.RUNNING, run, situation, job=record, collected=collected)
        assert action == RunReport(reported, 0, "")
        early = dataclasses.replace(LOCAL, now=T0 + max(0, reported - 1))
        sooner = act(S.RUNNING, run, early, job=record, collected=collected)
        assert isinstance(sooner, Wait if reported else RunReport)

    def test_the_whole_rest_is_billed_where_the_time_is_used_up(self):
        run = row(Phase.ENDED, exit=ended("walltime", 143, seconds=79), allotment=80)
        situation = dataclasses.replace(LOCAL, now=T0 + 50)
        action = act(S.RUNNING, run, situation, job=job(time_limit=50), collected=30)
        assert action == RunReport(50, 143, "time limit reached")

    def test_nothing_is_reported_before_the_interim_payments_are_known(self):
        run = row(Phase.ENDED, exit=ended())
        assert isinstance(act(S.RUNNING, run, job=job(), collected=None), Wait)

    def test_never_reports_more_than_the_allotment(self):
        assert self.end(ended(seconds=70), elapsed=61) == RunReport(60, 0, "")


class TestAdmission:
    def views(self, *statuses: JobStatus, since: int = T0, run: Run | None = None):
        views_of_all = []
        for number, status in enumerate(statuses):
            record = dataclasses.replace(job(status), id=number + 1, since=since + number)
            views_of_all.append(view(status, run or row(), job=record, lookup=NOWHERE))
        return views_of_all

    def kinds(self, views, situation):
        return {v.job.id: type(action) for v, action in plan(views, situation)}

    def test_claims_only_jobs_that_fit_next_to_claimed_ones(self):
        situation = dataclasses.replace(LOCAL, free=Offer(4, 4096, 0))
        views = self.views(S.META_SCHEDULED, S.META_SCHEDULED, S.META_SCHEDULED)
        assert self.kinds(views, situation) == {1: ClaimAndStart, 2: ClaimAndStart, 3: Wait}
        views = self.views(S.META_SCHEDULED, S.SCHEDULED, S.RUNNING, run=row(Phase.STARTING))
        assert self.kinds(views, situation) == {1: Wait, 2: Start, 3: Submit}

    @pytest.mark.parametrize(("placed", "expected"), [(False, Wait), (True, ClaimAndStart)])
    def test_a_pending_start_uses_capacity_once(self, placed, expected):
        going = view(S.RUNNING, row(Phase.SUBMITTING), lookup=NOWHERE, placed=placed)
        new = self.views(S.META_SCHEDULED)
        situation = dataclasses.replace(LOCAL, free=Offer(3, 4096, 0))
        assert self.kinds([going, *new], situation) == {7: Submit, 1: expected}

    def test_a_large_new_job_does_not_hold_up_a_small_one(self):
        large = view(S.META_SCHEDULED, row(), job=job(resources=Resources(1, 6, 32, 0)))
        large = dataclasses.replace(
            large, job=dataclasses.replace(large.job, status=S.META_SCHEDULED)
        )
        small = self.views(S.META_SCHEDULED, since=T0 + 1)[0]
        situation = dataclasses.replace(LOCAL, free=Offer(4, 4096, 0))
        assert self.kinds([large, small], situation) == {7: Wait, 1: ClaimAndStart}

    @pytest.mark.parametrize("status", [S.META_SCHEDULED, S.SCHEDULED])
    def test_is_requeued_when_no_capacity_is_free_for_long(self, status):
        full = dataclasses.replace(LOCAL, free=Offer(1, 4096, 0))
        assert isinstance(act(status, row(), full), Wait)
        after_timeout = dataclasses.replace(full, now=T0 + full.assignment_timeout)
        assert isinstance(act(status, row(), after_timeout), Requeue)

    def test_short_of_disk(self):
        short = dataclasses.replace(LOCAL, has_disk_space=False)
        assert isinstance(act(S.META_SCHEDULED, row(), short), Wait)
        assert act(S.SCHEDULED, row(), short) == Start()

    @pytest.mark.parametrize("status", [S.META_SCHEDULED, S.SCHEDULED])
    def test_jobs_that_can_not_be_started_are_requeued_at_once(self, status):
        faulty = dataclasses.replace(LOCAL, fault="no process left")
        action = act(status, row(), faulty)
        assert action == Requeue("the provider can't start jobs: no process left")

    def test_runs_continue_on_a_machine_that_can_not_start_more(self):
        faulty = dataclasses.replace(LOCAL, fault="no process left")
        submitted = row(Phase.SUBMITTED, handle="h1", allotment=60)
        assert isinstance(act(S.RUNNING, submitted, faulty, status=LIVE), Wait)

    def test_executor_that_does_not_answer(self):
        silent = dataclasses.replace(LOCAL, free=None)
        assert isinstance(act(S.META_SCHEDULED, row(), silent), Wait)
        assert isinstance(act(S.SCHEDULED, row(), silent), Wait)
        assert act(S.META_SCHEDULED, row(), dataclasses.replace(silent, queues=True)) == Claim()


class TestReasonsAndKeys:
    def test_reasons_are_clipped_to_the_limit_of_the_contract(self):
        assert clip("a\nb\x1b[0m") == "a b [0m"
        assert len(clip("é" * 300).encode()) <= 256
        cached_definition = CachedDefinition(DefinitionState.INVALID, "ü\n" * 400)
        action = act(S.META_SCHEDULED, row(), cached_definition=cached_definition)
        assert len(action.reason.encode()) <= 256
        assert "\n" not in action.reason

    def test_keys(self):
        contract = "0x5FbDB2315678afecb367f032d93F642f64180aa3"
        assert run_key(31337, contract, 42) == "31337-5fbdb231-42"
        assert parse_key(31337, contract, "31337-5fbdb231-42") == (42, 0)
        assert parse_key(31337, contract, run_key(31337, contract, 42, 3)) == (42, 3)
        for other in ("1-5fbdb231-42", "31337-5fbdb231-", "31337-5fbdb231-x", "31337-5fbdb231-042"):
            assert parse_key(31337, contract, other) is None
        for other in ("31337-5fbdb231-42.", "31337-5fbdb231-4.0", "31337-5fbdb231-1.2.3", "q"):
            assert parse_key(31337, contract, other) is None


def test_every_combination_has_an_answer():
    """Every combination of status, run record, executor state and lookup has an action."""
    reports = [None, UNKNOWN, QUEUED, LIVE, over(ended()), over(ended("lost", 137))]
    for status in JobStatus:
        for is_own in {status.is_assigned, False}:
            for phase in Phase:
                exit_ = ended() if phase is Phase.ENDED else None
                for report in reports:
                    for lookup in (None, NOWHERE, HERE):
                        for situation in (LOCAL, QUEUE):
                            case = view(
                                status,
                                row(phase, exit=exit_),
                                is_own=is_own,
                                status=report,
                                lookup=lookup,
                            )
                            action = plan_job(case, situation)
                            if isinstance(action, RunReport):
                                assert phase is Phase.ENDED
                            if isinstance(action, Submit):
                                assert is_own
                                assert lookup == NOWHERE
                                assert phase not in {Phase.SUBMITTED, Phase.ENDED, Phase.REFUSED}


@pytest.mark.parametrize(
    ("situation", "status", "phase", "given_back"),
    [
        (LOCAL, JobStatus.META_SCHEDULED, Phase.WATCHED, True),
        (LOCAL, JobStatus.SCHEDULED, Phase.WATCHED, True),
        (QUEUE, JobStatus.META_SCHEDULED, Phase.WATCHED, True),
        (QUEUE, JobStatus.SCHEDULED, Phase.WATCHED, True),
        # The meter runs, or the executor has it: it goes on to its end.
        (LOCAL, JobStatus.RUNNING, Phase.STARTING, False),
        (LOCAL, JobStatus.RUNNING, Phase.SUBMITTED, False),
        (QUEUE, JobStatus.SCHEDULED, Phase.SUBMITTED, False),
        (QUEUE, JobStatus.SCHEDULED, Phase.SUBMITTING, False),
    ],
)
def test_maintenance_requeues_jobs_that_have_not_begun(situation, status, phase, given_back):
    state = {"status": QUEUED, "lookup": NOWHERE}
    before = act(status, row(phase), situation, **state)
    after = act(status, row(phase), dataclasses.replace(situation, draining=True), **state)
    assert not isinstance(before, Requeue)
    if given_back:
        assert after == Requeue("the provider is draining for maintenance")
    else:
        assert after == before
