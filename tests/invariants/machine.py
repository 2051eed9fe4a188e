"""What every step of the stateful test does: call the contract, ask the model, check the promises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import note
from hypothesis.stateful import RuleBasedStateMachine

from deepsquare_chain import credits as money
from deepsquare_chain.job import JobStatus, ProviderStatus
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

    def __init__(self, grid: Grid, storage: Storage, checks: Counter[int], seen: Counter) -> None:
        super().__init__()
        self.grid, self.storage, self.checks, self.seen = grid, storage, checks, seen
        self.chain = grid.chain
        self.saved = self.chain.snapshot()
        self.customers = [grid.alice, grid.bob]
        self.hosts = [person(f"host {i}") for i in range(3)]
        self.ghost = Ghost(grid.scheduler.address, grid.treasury, grid.meta, grid.admin, FEE_BPS)
        self.accounts = [*self.customers, *self.hosts, grid.stranger, grid.treasury, grid.meta]
        self.accounts.append(grid.admin)
        people = ("alice", "bob", "stranger", "treasury", "meta", "admin")
        self.names = {getattr(grid, name): f"grid.{name}" for name in people}
        self.names |= {host: f'person("host {i}")' for i, host in enumerate(self.hosts)}
        for name in ("credit", "registry", "scheduler"):
            self.names[getattr(grid, name).address] = f"grid.{name}"
        self.replay = Replay()
        self.turns, self.broken = 0, False
        for customer in self.customers:
            self.ghost.mint(customer, WEALTH)
            self.ghost.allowed.add(customer)
            self.replay.balances[customer] = WEALTH
            self.replay.balances[ZERO] -= WEALTH

    # ------------------------------------------------------------------ one call

    def check(self, number: int, holds: bool, what: object) -> None:
        """One of the numbered invariants of the protocol."""
        self.checks[number] += 1
        assert holds, f"invariant {number}: {what}"

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
        words = {job_id: self.storage.record(job_id) for job_id in jobs}
        balances = self.balances()
        one_by_one = self.in_turn(singles)
        try:
            outcome, refusal = model() or Outcome(), ""
        except Refused as refused:
            outcome, refusal = Outcome(), str(refused)
        receipt, met = self.attempt(real)
        self.tell(met)
        assert met == refusal, f"{met or 'success'} instead of {refusal or 'success'}"
        self.seen[refusal or "done"] += 1
        for event in receipt.events:
            self.replay.feed(event, self.chain.now)
        self.compare(receipt, outcome)
        self.check_frozen(jobs, words)
        self.check_moves(sender, receipt, jobs)
        self.check_money(receipt, jobs)
        if sender == self.grid.stranger:
            self.check_stranger(receipt, jobs, balances)
        if one_by_one is not None:
            self.check(12, one_by_one == self.state(), "a batch is not the sequence of its items")
        self.broken = False

    def tell(self, met: str = "") -> None:
        """Print the last call of a failing game as a line of a test; see `reverts`."""
        contract, name, values, sender = self.chain.last_call
        line = f"{contract.address}.{name}({', '.join(map(repr, values))}, sender={sender!r})"
        for account, words in self.names.items():
            line = line.replace(f"'{account}'", words).replace(account, words)
        note(f'with reverts("{met}"): {line}' if met else line)

    def wait_for(self, seconds: int, blocks: int | None = None) -> None:
        self.chain.advance(seconds, blocks)
        note(f"grid.chain.advance({seconds}, {blocks})")

    @staticmethod
    def attempt(real: Callable[[], Receipt]) -> tuple[Receipt, str]:
        """What a call did, or the name of its error."""
        try:
            return real(), ""
        except Reverted as reverted:
            return Receipt(None, [], 0), reverted.name

    def balances(self) -> dict[str, int]:
        accounts = [*self.accounts, self.grid.scheduler.address]
        return {account: self.storage.balance(account) for account in accounts}

    def state(self) -> State:
        """Everything that a batch can change."""
        ids = range(1, self.storage.job_count() + 1)
        return (
            [self.storage.record(job_id) for job_id in ids],
            self.balances(),
            [self.storage.parked(account) for account in self.accounts],
        )

    def in_turn(self, singles: Sequence[Callable[[], object]]) -> State | None:
        """The state after the items of a batch one by one, without leaving a trace."""
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
        """Events are those that the model foretells, and all balances and touched records too."""
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
        assert [(e.jobId, e.successor) for e in receipt.named("JobRetried")] == outcome.retried
        self.check(4, self.storage.job_count() == len(self.ghost.jobs), "ids are not dense")
        touched = {m[0] for m in moves} | {e.jobId for e in receipt.named("JobToppedUp")}
        for job_id in sorted(touched):
            self.compare_record(job_id)
        for account in self.accounts:
            expected = self.ghost.balances[account]
            assert self.storage.balance(account) == expected, f"balance of {account}"
        self.check(
            1, self.storage.balance(self.grid.scheduler.address) == self.ghost.held(), "escrow"
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
            "untilSpent": job.until_spent,
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
        told = self.replay.jobs[job_id]
        self.check(14, not self.replay.differences(job_id, record), "events tell another record")
        kept = record.escrow if job.status.is_live else told.paid_out + told.carried_out
        self.check(2, told.funded + told.carried_in == kept, f"money of job {job_id}")

    # --------------------------------------------------------------- invariants

    def check_frozen(self, jobs: dict[int, GhostJob], words: dict[int, State]) -> None:
        """What the model did not touch is the same to the bit; final records always are."""
        for job_id, word in words.items():
            same = self.storage.record(job_id) == word
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
            moved = self.ghost.jobs[event.jobId]
            if job is None:
                parent = current.get(moved.retry_of)
                born = moved.customer == sender or (parent and parent.status is S.RUNNING)
                self.check(5, bool(born), "birth by somebody else")
                continue
            self.check(5, self.entitled(sender, job, moved, after), f"{sender} moved {event}")
            if after is S.META_SCHEDULED:
                self.check_assignment(job, moved)
            elif job.status.is_assigned and after is not S.PENDING:
                kept = (moved.rate, moved.fee_bps) == (job.rate, job.fee_bps)
                self.check(7, kept, f"price of job {job.id} changed")

    def entitled(self, sender: str, job: GhostJob, moved: GhostJob, to: JobStatus) -> bool:
        """Who may cause an arrow: the table of the protocol's page, once more."""
        ghost = self.ghost
        now, late = ghost.now, ghost.now > job.since + TIMES["claimTimeout"]
        if job.status is S.PENDING and to is S.META_SCHEDULED:
            waited = now >= job.since + TIMES["pendingTimeout"]
            return sender == ghost.meta or (
                waited and sender == ghost.by_id(moved.provider).account
            )
        if to is S.CANCELLED:
            return sender == job.customer
        holder = ghost.holder(job)
        if sender == holder.account:
            return True
        if job.status is S.RUNNING:
            return to is S.PANICKED and ghost.is_lost(job)
        if to is not S.PENDING:
            return False
        if job.status is S.META_SCHEDULED:
            return late
        gone = ghost.is_silent(holder) or holder.status is ProviderStatus.BANNED
        return gone or (late and sender in {job.customer, ghost.meta})

    def check_assignment(self, job: GhostJob, moved: GhostJob) -> None:
        provider = self.ghost.by_id(moved.provider)
        good = (
            provider.status is ProviderStatus.ACTIVE
            and provider.approved_until >= self.ghost.now
            and not self.ghost.is_silent(provider)
        )
        self.check(10, good, f"job {job.id} went to a provider out of standing")
        lost_it = {p.provider for p in self.ghost.line(job)}
        lawful = (
            money.fits(provider.hardware, provider.offer, job.resources)
            and money.cost(moved.rate, job.limit) <= job.escrow
            and provider.id not in lost_it
        )
        self.check(11, lawful, f"job {job.id} does not belong at provider {provider.id}")

    def check_money(self, receipt: Receipt, jobs: dict[int, GhostJob]) -> None:
        for event in receipt.named("JobSettled"):
            job = jobs[event.jobId]
            used = event.paid + event.fee
            ran = job.status is S.RUNNING
            elapsed = self.ghost.now - job.since if ran else 0
            self.check(6, used <= job.rate * elapsed and used <= job.escrow, event)
            if not ran or self.ghost.jobs[job.id].status is S.PANICKED:
                self.check(8, event.refunded == job.escrow and not used, event)
        for event in receipt.named("JobRetried"):
            old, new = jobs[event.jobId], self.ghost.jobs[event.successor]
            first = ([new, *self.ghost.line(new)])[-1]
            self.check(13, event.escrow == old.escrow, "a successor carries another sum")
            self.check(13, self.grid.job(new.id).escrow == old.escrow, "a sum was lost")
            promised = first.retries
            self.check(13, len(self.ghost.line(new)) <= promised <= 5, "more than its retries")

    def check_stranger(
        self, receipt: Receipt, jobs: dict[int, GhostJob], balances: dict[str, int]
    ) -> None:
        now = self.balances()
        for account, amount in balances.items():
            if account not in {self.grid.stranger, self.grid.scheduler.address}:
                self.check(15, now[account] >= amount, f"a stranger cost {account} credits")
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
            told = self.replay.balances[account]
            self.check(14, told == self.storage.balance(account), f"balance of {account}")
            parked = self.grid.scheduler.parkedOf(account)
            self.check(14, self.replay.parked[account] == parked, f"parked for {account}")
            assert self.ghost.parked[account] == parked

    def drain(self) -> None:
        """Providers, scheduler and administrator are gone; customers and strangers end everything."""
        grid, ghost = self.grid, self.ghost
        for job in [j for j in ghost.jobs.values() if j.status is S.RUNNING]:
            _, refusal = self.attempt(
                lambda i=job.id: grid.scheduler.challenge(i, sender=grid.stranger)
            )
            assert refusal in {"", "ChallengeRefused"}
        self.chain.advance(2 * TIMES["responseTimeout"] + 2, 2 * TIMES["responseBlocks"] + 2)
        for customer in self.customers:
            ids = [j.id for j in ghost.jobs.values() if j.customer == customer and j.status.is_live]
            if ids:
                grid.scheduler.cancel(ids, sender=customer)
        statuses = [job.status for job in grid.scheduler.getJobs(sorted(ghost.jobs))]
        self.check(9, all(S(status).is_final for status in statuses), "jobs can't be ended")
        for account in self.accounts:
            if grid.scheduler.parkedOf(account):
                grid.scheduler.withdraw(person("safe"), sender=account)
        left = self.storage.balance(grid.scheduler.address)
        self.check(9, left == ghost.gifts, f"{left - ghost.gifts} wei are stuck")
