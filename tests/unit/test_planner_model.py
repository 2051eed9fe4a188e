"""A provider that is killed anywhere, with random actions of chain, customers and executor.

Never two submits for an assignment, never a known key again, never a report without an end, never
a bill for time that did not pass; and once the world calms down, nothing is left running.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from deepsquare_chain.credits import allotment
from deepsquare_chain.executors.base import Exit, RunState, RunStatus
from deepsquare_chain.job import Job, JobFlags, JobStatus, Offer, can_transition
from deepsquare_chain.provider import model
from deepsquare_chain.provider.model import (
    CachedDefinition,
    Collecting,
    DefinitionState,
    Lookup,
    Phase,
    Run,
    View,
)
from deepsquare_chain.provider.planner import plan
from tests.support.workloads import job

pytestmark = pytest.mark.unit

T0 = 1_700_000_000
ME, OTHER = 1, 2
S = JobStatus


class Killed(BaseException):
    """The daemon was killed here."""


@dataclass
class Process:
    """A run of the executor."""

    began: int
    walltime: int
    queued: bool
    exit: Exit | None = None


@dataclass
class SimulatedRun:
    """Chain, executor and the daemon's database, for one job."""

    queues: bool
    job: Job
    wall: int = T0
    lag: int = 0
    settled: bool = True
    online: bool = True
    run: Run = field(default_factory=lambda: Run(1, "c-1"))
    misses: int = 0
    runs: dict[str, Process] = field(default_factory=dict)
    assignment: int = 0
    submits: dict[int, int] = field(default_factory=dict)
    collected: int = 0

    def move(self, to: JobStatus, provider: int | None = None) -> None:
        assert can_transition(self.job.status, to)
        provider = self.job.provider_id if provider is None else provider
        self.job = dataclasses.replace(self.job, status=to, since=self.now, provider_id=provider)
        self.settled = False

    @property
    def now(self) -> int:
        """Time of the latest block; the executor has a clock of its own."""
        return self.wall - self.lag

    @property
    def mine(self) -> bool:
        return self.job.status.is_assigned and self.job.provider_id == ME

    # -- the executor

    def status(self, handle: str) -> RunStatus:
        process = self.runs[handle]
        if process.exit is not None:
            return RunStatus(RunState.ENDED, process.exit)
        return RunStatus(RunState.QUEUED if process.queued else RunState.RUNNING)

    def finish(self, process: Process, reason: str, code: int) -> None:
        took = 0 if process.queued else self.wall - process.began
        process.exit = Exit(code, reason, took, float(process.began), float(self.wall))

    def tick(self, seconds: int) -> None:
        for _ in range(seconds):
            self.wall += 1
            for process in self.runs.values():
                is_over = self.wall - process.began >= process.walltime
                if process.exit is None and not process.queued and is_over:
                    self.finish(process, "walltime", 143)
        self.settled = True

    # -- the daemon

    def step(self, kill_after: int) -> model.Action:
        """One cycle for this job; a kill falls between any two effects."""
        effects = 0

        def effect() -> None:
            nonlocal effects
            effects += 1
            if effects > kill_after:
                raise Killed

        view = self.view()
        situation = model.Situation(
            now=self.now,
            queues=self.queues,
            free=Offer(8, 800, 0) if self.online else None,
            collecting=Collecting(3),
        )
        [(_, action)] = plan([view], situation)
        try:
            self.apply(action, effect)
        except Killed:
            self.misses = 0
        return action

    def view(self) -> View:
        status = lookup = None
        if self.online:
            lookup = Lookup(self.run.key if self.run.key in self.runs else None)
            status = self.status(self.run.handle) if self.run.handle in self.runs else None
        return View(
            job=self.job,
            run=self.run,
            mine=self.mine,
            settled=self.settled,
            status=status,
            lookup=lookup,
            cached_definition=CachedDefinition(DefinitionState.READY),
            collected=self.collected,
        )

    def apply(self, action: model.Action, effect) -> None:
        getattr(self, f"do_{type(action).__name__.lower()}")(action, effect)

    def do_wait(self, action, effect) -> None:
        pass

    def do_claim(self, action, effect) -> None:
        assert self.mine
        effect()
        self.move(S.SCHEDULED)

    def do_claimandstart(self, action, effect) -> None:
        assert self.mine
        assert not self.queues
        effect()
        self.run = self.run.starting()
        effect()
        self.move(S.SCHEDULED)
        self.move(S.RUNNING)

    def do_collect(self, action, effect) -> None:
        """Pay like the contract, which refuses a payment that is too early or after the allotment."""
        job, elapsed = self.job, self.now - self.job.since
        remaining = allotment(job.time_limit, job.until_spent, job.escrow, job.rate)
        assert self.mine
        assert self.runs[self.run.key].exit is None, "a run that has ended is reported"
        assert 3 <= elapsed < remaining
        effect()
        escrow = job.escrow - job.rate * elapsed
        limit = (
            max(1, job.time_limit * escrow // job.escrow)
            if job.until_spent
            else remaining - elapsed
        )
        self.job = dataclasses.replace(job, escrow=escrow, time_limit=limit, since=self.now)
        self.collected += elapsed
        self.settled = False

    def do_start(self, action, effect) -> None:
        assert self.mine
        if self.queues:
            process = self.runs[self.run.handle]
            assert not process.queued or process.exit is not None
        effect()
        self.run = self.run.starting()
        effect()
        self.move(S.RUNNING)

    def do_requeue(self, action, effect) -> None:
        assert self.mine
        effect()
        self.move(S.PENDING, 0)

    def do_panic(self, action, effect) -> None:
        assert self.mine
        effect()
        self.move(S.PANICKED)

    def do_submit(self, action, effect) -> None:
        assert self.mine
        assert self.settled
        assert self.job.status is S.RUNNING or (self.queues and self.job.status is S.SCHEDULED)
        assert self.run.key not in self.runs, "a key runs at most once"
        effect()
        self.run = self.run.submitting(action)
        effect()
        self.submits[self.assignment] = self.submits.get(self.assignment, 0) + 1
        self.runs[self.run.key] = Process(self.wall, action.walltime, queued=self.queues)
        effect()
        self.run = dataclasses.replace(self.run, phase=Phase.SUBMITTED, handle=self.run.key)

    def do_adopt(self, action, effect) -> None:
        effect()
        self.run = dataclasses.replace(self.run, phase=Phase.SUBMITTED, handle=action.handle)

    def do_extend(self, action, effect) -> None:
        effect()
        self.runs[self.run.handle].walltime = action.walltime
        effect()
        self.run = dataclasses.replace(self.run, allotment=action.allotment)

    def do_recordend(self, action, effect) -> None:
        effect()
        self.run = self.run.ended(action.exit, b"\x01" * 32)

    def do_cancel(self, action, effect) -> None:
        assert not self.mine or (self.queues and self.job.status is S.META_SCHEDULED)
        effect()
        process = self.runs[self.run.handle]
        if process.exit is None:
            self.finish(process, "cancelled", 143)

    def do_release(self, action, effect) -> None:
        process = self.runs.get(self.run.key)
        assert process is None or process.exit is not None
        effect()
        self.run = self.run.released(f"c-1.{self.run.attempt + 1}")

    def do_close(self, action, effect) -> None:
        assert self.job.status.is_final
        effect()
        self.run = dataclasses.replace(self.run, phase=Phase.CLOSED)

    def do_runreport(self, action, effect) -> None:
        assert self.mine
        assert self.job.status is S.RUNNING
        exit_ = self.runs[self.run.key].exit
        assert exit_ is not None, "a report needs an end"
        assert exit_.reason not in {"lost", "cancelled"}
        allotted = allotment(
            self.job.time_limit, self.job.until_spent, self.job.escrow, self.job.rate
        )
        assert action.seconds <= self.now - self.job.since
        assert action.seconds <= allotted
        if exit_.reason != "walltime":
            run_seconds = min(exit_.seconds, allotted + self.collected)
            assert action.seconds == max(0, run_seconds - self.collected)
        effect()
        spent = action.seconds >= allotted
        status = S.OUT_OF_CREDITS if spent else S.FAILED if action.exit_code else S.FINISHED
        self.move(status)


class Provider(RuleBasedStateMachine):
    """One job, with actions of all parties in any order."""

    @initialize(queues=st.booleans(), until_spent=st.booleans(), interim=st.booleans())
    def begin(self, queues: bool, until_spent: bool, interim: bool) -> None:
        record = job(
            1,
            customer="0x" + "11" * 20,
            since=T0,
            mem_per_cpu=1,
            flags=JobFlags(
                until_spent * JobFlags.UNTIL_SPENT | interim * JobFlags.INTERIM_PAYMENTS
            ),
            escrow=80,
            rate=1,
            time_limit=40,
        )
        self.simulation = SimulatedRun(queues, record)

    @rule(kill_after=st.sampled_from([0, 1, 2, 9, 9, 9, 9]))
    def daemon(self, kill_after: int) -> None:
        self.simulation.step(kill_after)

    @rule(cycles=st.integers(2, 6), seconds=st.integers(1, 4))
    def run_daemon(self, cycles: int, seconds: int) -> None:
        for _ in range(cycles):
            self.simulation.step(9)
            self.simulation.tick(seconds)

    @rule(cycles=st.integers(2, 5), kill_after=st.integers(0, 2))
    def run_daemon_until_a_kill(self, cycles: int, kill_after: int) -> None:
        for _ in range(cycles):
            self.simulation.step(9)
            self.simulation.tick(1)
        self.simulation.step(kill_after)

    @rule(seconds=st.integers(1, 15))
    def time(self, seconds: int) -> None:
        self.simulation.tick(seconds)

    @rule(seconds=st.integers(1, 9))
    def stop_chain(self, seconds: int) -> None:
        settled = self.simulation.settled
        self.simulation.tick(seconds)
        self.simulation.lag += seconds
        self.simulation.settled = settled

    @rule(provider=st.sampled_from([ME, ME, ME, OTHER]))
    def assign(self, provider: int) -> None:
        if self.simulation.job.status is S.PENDING:
            self.assign_to(provider)

    def assign_to(self, provider: int) -> None:
        self.simulation.move(S.META_SCHEDULED, provider)
        self.simulation.assignment += provider == ME

    @rule(
        caller=st.sampled_from(
            [
                *("timeout", "bounce", "bounce", "other", "other", "top_up", "top_up", "mood"),
                *(
                    "mood",
                    "queue",
                    "queue",
                    "queue",
                    "replaced",
                    "database",
                    "customer",
                    "stranger",
                ),
            ]
        ),
        to=st.sampled_from([S.SCHEDULED, S.RUNNING, S.PENDING, S.FINISHED]),
    )
    def somebody_acts(self, caller: str, to: JobStatus) -> None:
        simulation, status = self.simulation, self.simulation.job.status
        if caller in {"timeout", "bounce"} and status in {S.META_SCHEDULED, S.SCHEDULED}:
            simulation.move(S.PENDING, 0)
            if caller == "bounce":
                self.assign_to(ME)
        elif (
            caller == "other" and simulation.job.provider_id == OTHER and can_transition(status, to)
        ):
            simulation.move(to, 0 if to is S.PENDING else None)
        elif caller == "top_up" and status.is_live:
            self.top_up()
        elif caller == "mood":
            simulation.online = not simulation.online
        elif caller == "queue":
            self.queue_moves()
        elif caller == "replaced" and status is S.RUNNING and not simulation.settled:
            # Of a job that was claimed and started at once, both are undone.
            before = S.SCHEDULED if simulation.queues else S.META_SCHEDULED
            simulation.job = dataclasses.replace(simulation.job, status=before)
        elif caller == "database":
            self.lose_database()
        elif caller == "customer" and status.is_live:
            simulation.move(S.CANCELLED)
        elif caller == "stranger" and status is S.RUNNING:
            simulation.move(S.PANICKED)

    def top_up(self) -> None:
        job = self.simulation.job
        more = 0 if job.until_spent else 7
        self.simulation.job = dataclasses.replace(
            job, escrow=job.escrow + 7, time_limit=job.time_limit + more
        )

    @rule(code=st.sampled_from([0, 0, 3]), reason=st.sampled_from(["exited", "memory", "lost"]))
    def run_ends(self, code: int, reason: str) -> None:
        for process in self.simulation.runs.values():
            if process.exit is None and not process.queued:
                self.simulation.finish(process, reason, code if reason == "exited" else 137)

    def queue_moves(self) -> None:
        for process in self.simulation.runs.values():
            if process.queued and process.exit is None:
                process.queued, process.began = False, self.simulation.wall

    def lose_database(self) -> None:
        simulation = self.simulation
        attempts = [int(key.partition(".")[2] or 0) for key in simulation.runs]
        newest = max(attempts, default=0)
        simulation.run = Run(1, f"c-1.{newest}" if newest else "c-1", attempt=newest)

    @invariant()
    def at_most_one_submit_for_an_assignment(self) -> None:
        assert all(count == 1 for count in self.simulation.submits.values())

    @invariant()
    def one_live_run_at_most(self) -> None:
        assert sum(process.exit is None for process in self.simulation.runs.values()) <= 1

    def teardown(self) -> None:
        """Without further faults, the job reaches a final status and no run is left."""
        simulation = getattr(self, "world", None)
        if simulation is None:
            return
        simulation.online = True
        reassigned = not simulation.mine
        for _ in range(5):
            simulation.tick(1)
            simulation.step(9)
        if reassigned:
            assert all(process.exit is not None for process in simulation.runs.values())
        for _ in range(200):
            simulation.tick(3)
            self.queue_moves()
            simulation.step(9)
        if simulation.mine:
            raise AssertionError(
                f"{simulation.job.status.name} stays for ever with {simulation.run}"
            )
        assert all(process.exit is not None for process in simulation.runs.values())
        if simulation.job.status.is_final:
            assert simulation.run.phase is Phase.CLOSED


TestProvider = Provider.TestCase
TestProvider.settings = settings(max_examples=250, stateful_step_count=50, deadline=None)
