"""Steps of the stateful test: call the contract, ask the model, check the invariants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from hypothesis import note
from hypothesis.stateful import RuleBasedStateMachine

from deepsquare_chain import credits as money
from deepsquare_chain.job import JobStatus, Load, ProviderStatus
from tests.invariants.ghost import Ghost
from tests.invariants.records import ARROWS, GhostJob, Outcome, Refused
from tests.invariants.replay import Replay
from tests.invariants.storage import Storage
from tests.support.evm import ZERO, Receipt, Reverted, person
from tests.support.grid import FEE_BPS, TIMES, WEALTH, Grid

S = JobStatus
State = tuple[Any, ...]


class GridMachine(RuleBasedStateMachine):
    """The contracts, the model, and the checks between them; the rules are in a subclass."""

    def __init__(
        self, grid: Grid, storage: Storage, checks: Counter[int], call_counts: Counter
    ) -> None:
        super().__init__()
        self.grid, self.storage, self.checks, self.seen = grid, storage, checks, call_counts
        self.chain = grid.chain
        self.saved = self.chain.snapshot()
        self.customers = [grid.alice, grid.bob]
        self.hosts = [person(f"host {i}") for i in range(3)]
        self.ghost = Ghost(grid.scheduler.address, grid.treasury, grid.meta, grid.admin, FEE_BPS)
        self.accounts = [*self.customers, *self.hosts, grid.stranger, grid.treasury, grid.meta]
        self.accounts.append(grid.admin)
        roles = ("alice", "bob", "stranger", "treasury", "meta", "admin")
        self.names = {getattr(grid, name): f"grid.{name}" for name in roles}
        self.names |= {host: f'person("host {i}")' for i, host in enumerate(self.hosts)}
        for name in ("credit", "registry", "scheduler", "forwarder"):
            self.names[getattr(grid, name).address] = f"grid.{name}"
        self.replay = Replay()
        self.turns, self.broken = 0, False
        for customer in self.customers:
            self.ghost.mint(customer, WEALTH)
            self.ghost.allowed.add(customer)
            self.replay.balances[customer] = WEALTH
            self.replay.balances[ZERO] -= WEALTH

    # ------------------------------------------------------------------ one call

    def check(self, number: int, holds: bool, detail: object) -> None:
        """Mark a method as a numbered invariant of the protocol."""
        self.checks[number] += 1
        assert holds, f"invariant {number}: {detail}"

    def call(
        self,
        sender: str,
        real: Callable[[], Receipt],
        model: Callable[[], Outcome | None],
        singles: Sequence[Callable[[], object]] = (),
    ) -> None:
        """Call contract and model; both refuse for the same reason, or both do the same."""
        self.broken = True  # until all checks of this call have passed
        ghost = self.ghost
        ghost.now, ghost.block = self.chain.now, self.chain.block
        jobs = dict(ghost.jobs)
        records = {job_id: self.storage.record(job_id) for job_id in jobs}
        balances = self.balances()
        one_by_one = self.in_turn(singles)
        try:
            outcome, refusal = model() or Outcome(), ""
        except Refused as refused:
            outcome, refusal = Outcome(), str(refused)
        receipt, error = self.attempt(real)
        self.note_call(error)
        assert error == refusal, f"{error or 'success'} instead of {refusal or 'success'}"
        self.seen[refusal or "done"] += 1
        for event in receipt.events:
            self.replay.feed(event, self.chain.now)
        self.compare(receipt, outcome)
        self.check_frozen(jobs, records)
        self.check_moves(sender, receipt, jobs)
        self.check_money(receipt, jobs)
        self.check_load()
        if sender == self.grid.stranger:
            self.check_stranger(receipt, jobs, balances)
        if one_by_one is not None:
            self.check(12, one_by_one == self.state(), "a batch is not the sequence of its items")
        self.broken = False

    def note_call(self, error: str = "") -> None:
        """Print the last call of a failing sequence as a line of a test; see `reverts`."""
        contract, name, values, sender = self.chain.last_call
        line = f"{contract.address}.{name}({', '.join(map(repr, values))}, sender={sender!r})"
        for account, message in self.names.items():
            line = line.replace(f"'{account}'", message).replace(account, message)
        note(f'with reverts("{error}"): {line}' if error else line)

    def wait_for(self, seconds: int, blocks: int | None = None) -> None:
        self.chain.advance(seconds, blocks)
        note(f"grid.chain.advance({seconds}, {blocks})")

    @staticmethod
    def attempt(real: Callable[[], Receipt]) -> tuple[Receipt, str]:
        """Return a call's effects, or the name of its error."""
        try:
            return real(), ""
        except Reverted as reverted:
            return Receipt(None, [], 0), reverted.name

    def forwarded(self, sender: str, name: str, *values: Any) -> Receipt:
        """A relayed call has the effects of the signer's own call, once."""
        grid = self.grid
        before = self.chain.snapshot()
        own_result, refusal = self.attempt(
            lambda: getattr(grid.scheduler, name)(*values, sender=sender)
        )
        after = self.state()
        self.chain.revert(before)
        request = grid.signed_request(sender, name, *values)
        relayed, error = self.attempt(lambda: grid.forwarder.execute(request, sender=grid.stranger))
        if refusal:
            self.check(17, error == "FailedCall", f"{error or 'success'} instead of {refusal}")
            raise Reverted(refusal, (), b"")
        events = [event for event in relayed.events if event.name != "ExecutedForwardRequest"]
        self.check(
            17, list(map(repr, events)) == list(map(repr, own_result.events)), "other events"
        )
        self.check(17, self.state() == after, f"{name} by a signature did something else")
        _, error = self.attempt(lambda: grid.forwarder.execute(request, sender=grid.stranger))
        self.check(17, error == "ERC2771ForwarderInvalidSigner", "a signature was used twice")
        return Receipt(own_result.value, events, relayed.gas)

    def balances(self) -> dict[str, int]:
        accounts = [*self.accounts, self.grid.scheduler.address]
        return {account: self.storage.balance(account) for account in accounts}

    def state(self) -> State:
        """Return all state that a batch can change."""
        ids = range(1, self.storage.job_count() + 1)
        return (
            [self.storage.record(job_id) for job_id in ids],
            self.balances(),
            [self.storage.parked(account) for account in self.accounts],
            [self.storage.load(provider.id) for provider in self.ghost.providers.values()],
        )

    def in_turn(self, singles: Sequence[Callable[[], object]]) -> State | None:
        """Return the state after separate calls per item; the chain is reverted."""
        if not singles:
            return None
        before = self.chain.snapshot()
        for single in singles:
            try:
                single()
            except Reverted:
                continue
        after = self.state()
        self.chain.revert(before)
        return after

    # -------------------------------------------------------------- comparisons

    def compare(self, receipt: Receipt, outcome: Outcome) -> None:
        """Events, balances and changed records equal those of the model."""
        moves = [
            (e.jobId, S(e.parameters["from"]), S(e.to)) for e in receipt.named("JobTransition")
        ]
        births = [m for m in moves if m[1] is S.NONE]
        if not outcome.moves and births == moves:
            outcome.moves = births  # a submission; its records are compared below
        assert moves == outcome.moves
        assert [
            (e.jobId, S(e.status), self.chain.error_name(e.reason))
            for e in receipt.named("TransitionSkipped")
        ] == outcome.skipped
        assert [
            (e.jobId, money.Settlement(e.billedSeconds, e.paid, e.fee, e.refunded))
            for e in receipt.named("JobSettled")
        ] == outcome.settled
        assert [
            (e.jobId, e.billedSeconds, e.paid, e.fee) for e in receipt.named("JobCollected")
        ] == outcome.collected
        if outcome.moves or outcome.collected:
            answered = [e.provider for e in receipt.named("ProviderAnswered")]
            assert answered == outcome.answered
        assert [(e.jobId, e.successor) for e in receipt.named("JobRetried")] == outcome.retried
        self.check(4, self.storage.job_count() == len(self.ghost.jobs), "ids are not dense")
        touched = {m[0] for m in moves}
        touched |= {e.jobId for e in receipt.named("JobToppedUp", "JobCollected")}
        for job_id in sorted(touched):
            self.compare_record(job_id)
        for account in self.accounts:
            expected = self.ghost.balances[account]
            assert self.storage.balance(account) == expected, f"balance of {account}"
        self.check(
            1, self.storage.balance(self.grid.scheduler.address) == self.ghost.escrowed(), "escrow"
        )
        self.check(
            3, self.storage.supply() == self.ghost.supply, "supply changed without mint or burn"
        )

    def compare_record(self, job_id: int) -> None:
        record, job = self.grid.job(job_id), self.ghost.jobs[job_id]
        size = job.resources
        assert record._asdict() == {
            "customer": job.customer,
            "status": job.status,
            "since": job.since,
            "providerId": job.provider,
            "memPerCpu": size.mem_per_cpu,
            "retriesLeft": job.retries,
            "flags": job.flags,
            "escrow": job.escrow,
            "rate": job.rate,
            "timeLimit": job.limit,
            "tasks": size.tasks,
            "cpusPerTask": size.cpus_per_task,
            "gpus": size.gpus,
            "feeBps": job.fee_bps,
            "definition": job.definition,
            "retryOf": job.retry_of,
        }
        replayed = self.replay.jobs[job_id]
        self.check(
            14, not self.replay.differences(job_id, record), "the events give another record"
        )
        expected = (
            replayed.paid_out + replayed.carried_out + (record.escrow if job.status.is_live else 0)
        )
        assert replayed.used == job.paid + job.fee
        self.check(2, replayed.funded + replayed.carried_in == expected, f"money of job {job_id}")

    # --------------------------------------------------------------- invariants

    def check_frozen(self, jobs: dict[int, GhostJob], records: dict[int, State]) -> None:
        """Records that the model did not change are unchanged; final records always are."""
        for job_id, record in records.items():
            same = self.storage.record(job_id) == record
            if jobs[job_id].status.is_final:
                self.check(4, same, f"final job {job_id} changed")
            elif self.ghost.jobs[job_id] == jobs[job_id]:
                self.check(12, same, f"job {job_id} was changed by another one's call")

    def check_moves(self, sender: str, receipt: Receipt, jobs: dict[int, GhostJob]) -> None:
        current = dict(jobs)
        for event in receipt.named("JobTransition"):
            before, after = S(event.parameters["from"]), S(event.to)
            self.seen[before, after] += 1
            job = current.get(event.jobId)
            self.check(4, after in ARROWS.get(before, ()), f"{before.name} to {after.name}")
            self.check(4, before == (job.status if job else S.NONE), "status jumped")
            new_job = self.ghost.jobs[event.jobId]
            if job is None:
                parent = jobs.get(new_job.retry_of)
                created_by_party = new_job.customer == sender or (
                    parent and parent.status.is_assigned
                )
                self.check(5, bool(created_by_party), "birth by somebody else")
                continue
            self.check(5, self.entitled(sender, job, new_job, after), f"{sender} moved {event}")
            # An item of a batch sees the effects of the items before it.
            current[job.id] = replace(job, status=after, since=self.ghost.now)
            if after is S.META_SCHEDULED:
                self.check_assignment(job, new_job, current)
                current[job.id] = replace(
                    current[job.id],
                    provider=new_job.provider,
                    rate=new_job.rate,
                    fee_bps=new_job.fee_bps,
                )
            elif job.status.is_assigned and after is not S.PENDING:
                prices_kept = (new_job.rate, new_job.fee_bps) == (job.rate, job.fee_bps)
                self.check(7, prices_kept, f"price of job {job.id} changed")

    def entitled(self, sender: str, job: GhostJob, new_job: GhostJob, to: JobStatus) -> bool:
        """Which accounts may cause a transition, as in the table of the protocol's page."""
        ghost = self.ghost
        now, is_late = ghost.now, ghost.now > job.since + TIMES["claimTimeout"]
        if job.status is S.PENDING and to is S.META_SCHEDULED:
            has_waited = now >= job.since + TIMES["pendingTimeout"]
            return sender == ghost.meta or (
                has_waited and sender == ghost.by_id(new_job.provider).account
            )
        if to is S.CANCELLED:
            expired = job.status is S.PENDING and now >= job.since + TIMES["pendingExpiry"]
            return expired or sender == job.customer
        holder = ghost.holder(job)
        if sender == holder.account:
            return True
        if job.status is S.RUNNING:
            return to is S.PANICKED and ghost.is_lost(job)
        if to is not S.PENDING:
            return False
        if job.status is S.META_SCHEDULED:
            return is_late
        is_gone = ghost.is_silent(holder) or holder.status is ProviderStatus.BANNED
        return is_gone or (is_late and sender in {job.customer, ghost.meta})

    def check_assignment(
        self, job: GhostJob, new_job: GhostJob, current: dict[int, GhostJob]
    ) -> None:
        provider = self.ghost.by_id(new_job.provider)
        good = (
            provider.status is ProviderStatus.ACTIVE
            and provider.approved_until >= self.ghost.now
            and not self.ghost.is_silent(provider)
        )
        self.check(10, good, f"job {job.id} went to a provider out of standing")
        loads = [j.load for j in current.values() if j.provider == new_job.provider]
        offer, required = provider.offer, sum(loads, start=Load.of(job.resources))
        within = (
            required.cpus <= offer.cpus
            and required.memory <= offer.memory
            and required.gpus <= offer.gpus
        )
        self.check(16, within, f"provider {provider.id} holds {required} and offers {offer}")
        lost_it = {p.provider for p in self.ghost.line(job)}
        lawful = (
            money.fits(provider.hardware, provider.offer, job.resources)
            and money.cost(new_job.rate, job.limit) <= job.escrow
            and provider.id not in lost_it
        )
        self.check(11, lawful, f"job {job.id} does not belong at provider {provider.id}")

    def check_load(self) -> None:
        for provider in self.ghost.providers.values():
            if provider.id:
                expected_load, storage_load = (
                    self.ghost.load(provider.id),
                    self.storage.load(provider.id),
                )
                self.check(
                    16,
                    expected_load == storage_load,
                    f"{expected_load} at {provider.id}, not {storage_load}",
                )

    def check_money(self, receipt: Receipt, jobs: dict[int, GhostJob]) -> None:
        for event in receipt.named("JobSettled", "JobCollected"):
            replayed = self.replay.jobs[event.jobId]
            # All that was ever billed, interim payments included.
            elapsed = self.ghost.now - replayed.started if replayed.started else 0
            self.check(6, replayed.used <= jobs[event.jobId].rate * elapsed, event)
            self.check(6, replayed.used <= replayed.funded + replayed.carried_in, event)
        self.seen["collected"] += len(receipt.named("JobCollected"))
        for event in receipt.named("JobSettled"):
            job = jobs[event.jobId]
            cost = event.paid + event.fee
            was_running = job.status is S.RUNNING
            if not was_running or self.ghost.jobs[job.id].status is S.PANICKED:
                self.check(8, event.refunded == job.escrow and not cost, event)
        for event in receipt.named("JobRetried"):
            old, new = jobs[event.jobId], self.ghost.jobs[event.successor]
            first = ([new, *self.ghost.line(new)])[-1]
            self.check(13, event.escrow == old.escrow, "a successor carries another sum")
            self.check(13, self.grid.job(new.id).escrow == old.escrow, "a sum was lost")
            retries = first.retries
            self.check(13, len(self.ghost.line(new)) <= retries <= 5, "more than its retries")

    def check_stranger(
        self, receipt: Receipt, jobs: dict[int, GhostJob], balances: dict[str, int]
    ) -> None:
        now = self.balances()
        for account, amount in balances.items():
            if account not in {self.grid.stranger, self.grid.scheduler.address}:
                self.check(15, now[account] >= amount, f"a stranger cost {account} credits")
        for job_id, job in jobs.items():
            if job.customer != self.grid.stranger:
                shorter = self.ghost.jobs[job_id].limit <= job.limit
                self.check(15, shorter, f"a stranger lengthened job {job_id}")
        for event in receipt.named("JobTransition"):
            job = jobs.get(event.jobId)
            if job and job.status is S.RUNNING and job.customer != self.grid.stranger:
                self.check(15, self.ghost.is_lost(job), "a stranger ended good work")

    # ------------------------------------------------------------------- the end

    def teardown(self) -> None:
        try:
            if self.ghost.jobs and not self.broken:
                self.compare_all()
                self.drain()
        finally:
            self.chain.revert(self.saved)

    def compare_all(self) -> None:
        assert self.grid.scheduler.jobCount() == len(self.ghost.jobs)
        assert self.grid.credit.totalSupply() == self.ghost.supply
        for job_id in self.ghost.jobs:
            self.compare_record(job_id)
        for account in self.accounts:
            replayed = self.replay.balances[account]
            self.check(14, replayed == self.storage.balance(account), f"balance of {account}")
            parked = self.grid.scheduler.parkedOf(account)
            self.check(14, self.replay.parked[account] == parked, f"parked for {account}")
            assert self.ghost.parked[account] == parked

    def drain(self) -> None:
        """Providers, scheduler and administrator are gone, in every second sequence the customers too."""
        grid, scheduler = self.grid, self.grid.scheduler
        self.chain.advance(TIMES["responseTimeout"])
        for job in self.live(*(s for s in S if s.is_assigned)):
            _, refusal = self.attempt(lambda i=job: scheduler.challenge(i, sender=grid.stranger))
            assert refusal in {"", "ChallengeRefused"}
        self.chain.advance(TIMES["lostTimeout"] + 1, TIMES["responseBlocks"] + 1)
        if self.turns % 2:
            for customer in self.customers:
                ids = [i for i in self.live() if grid.job(i).customer == customer]
                if ids:
                    scheduler.cancel(ids, sender=customer)
        for statuses, act in (
            ({S.RUNNING}, lambda ids: scheduler.panic(ids, "", sender=grid.stranger)),
            (
                {S.META_SCHEDULED, S.SCHEDULED},
                lambda ids: scheduler.requeue(ids, "", sender=grid.stranger),
            ),
        ):
            ids = self.live(*statuses)
            if ids:
                act(ids)
        self.chain.advance(TIMES["pendingExpiry"])
        if self.live():
            scheduler.cancel(self.live(), sender=grid.stranger)
        self.check(9, not self.live(), "jobs can't be ended")
        for account in self.accounts:
            if grid.scheduler.parkedOf(account):
                grid.scheduler.withdraw(person("safe"), sender=account)
        balance = self.storage.balance(grid.scheduler.address)
        self.check(9, balance == self.ghost.gifts, f"{balance - self.ghost.gifts} wei are stuck")
        for provider in self.ghost.providers.values():
            self.check(16, self.storage.load(provider.id) == Load(), "a load without jobs")

    def live(self, *statuses: JobStatus) -> list[int]:
        """Ids of live jobs of these statuses, or of any, as the contract has them now."""
        ids = range(1, self.grid.scheduler.jobCount() + 1)
        records = zip(ids, self.grid.scheduler.getJobs(list(ids)), strict=True)
        selected_statuses = set(statuses) or {s for s in S if s.is_live}
        return [job_id for job_id, record in records if S(record.status) in selected_statuses]
