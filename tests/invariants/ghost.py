"""A model of the grid in plain Python: the expected effect of every call, from the protocol.

It shares nothing with the contracts but the arithmetic of `deepsquare_chain.credits`, and says for
every call which items are refused and why, who is paid, and what each record holds afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from deepsquare_chain import credits as money
from deepsquare_chain.job import (
    Hardware,
    JobFlags,
    JobStatus,
    Load,
    Offer,
    Prices,
    ProviderStatus,
    Resources,
)
from tests.invariants.records import (
    ARROWS,
    GhostJob,
    GhostProvider,
    Outcome,
    Refused,
    S,
    whole,
)
from tests.support.evm import ZERO
from tests.support.grid import APPROVAL_PERIOD, TIMES


def exceeds(prices: Prices, limits: Prices) -> bool:
    """Whether any price is above the one that an assignment names."""
    return prices.cpu > limits.cpu or prices.gpu > limits.gpu or prices.mem > limits.mem


class Ghost:
    """The expected state of the grid; `now` and `block` are set before every call."""

    def __init__(self, scheduler: str, treasury: str, meta: str, admin: str, fee_bps: int) -> None:
        self.scheduler, self.treasury, self.meta, self.admin = scheduler, treasury, meta, admin
        self.fee_bps = fee_bps
        self.open = True
        self.now = self.block = 0
        self.jobs: dict[int, GhostJob] = {}
        self.providers: dict[str, GhostProvider] = {}
        self.balances: Counter[str] = Counter()
        self.parked: Counter[str] = Counter()
        self.allowed: set[str] = set()
        self.blocked: set[str] = set()
        self.gifts = 0
        self.supply = 0

    # --------------------------------------------------------------- questions

    def job(self, job_id: int) -> GhostJob | None:
        return self.jobs.get(job_id)

    def status(self, job_id: int) -> JobStatus:
        return self.jobs[job_id].status if job_id in self.jobs else S.NONE

    def holder(self, job: GhostJob) -> GhostProvider:
        return self.by_id(job.provider)

    def by_id(self, provider_id: int) -> GhostProvider:
        matches = (p for p in self.providers.values() if p.id == provider_id and provider_id)
        return next(matches, GhostProvider(ZERO))

    def unanswered(self, provider: GhostProvider, timeout: str) -> bool:
        return (
            provider.challenged_at > 0
            and self.now - provider.challenged_at > TIMES[timeout]
            and self.block - provider.challenged_block > TIMES["responseBlocks"]
        )

    def is_silent(self, provider: GhostProvider) -> bool:
        return self.unanswered(provider, "responseTimeout")

    def is_lost(self, job: GhostJob) -> bool:
        overdue = self.now > job.since + job.allotment + TIMES["reportGrace"]
        is_unresponsive = self.unanswered(self.holder(job), "lostTimeout")
        return job.status is S.RUNNING and (overdue or is_unresponsive)

    def is_expired(self, job: GhostJob) -> bool:
        return job.status is S.PENDING and self.now >= job.since + TIMES["pendingExpiry"]

    def load(self, provider_id: int) -> Load:
        """Count the resources that live jobs occupy at a provider."""
        loads = (job.load for job in self.jobs.values() if job.provider == provider_id)
        return sum(loads, start=Load())

    def escrowed(self) -> int:
        """Return the credits that the scheduler must hold, in credit-wei."""
        in_escrow = sum(job.escrow for job in self.jobs.values() if job.status.is_live)
        return in_escrow + sum(self.parked.values()) + self.gifts

    def line(self, job: GhostJob) -> list[GhostJob]:
        """Return the predecessors of a job, latest first."""
        predecessors = []
        while job.retry_of:
            job = self.jobs[job.retry_of]
            predecessors.append(job)
        return predecessors

    def why_not_active(self, provider: GhostProvider) -> str:
        if provider.status is not ProviderStatus.ACTIVE or provider.approved_until < self.now:
            return "ProviderNotActive"
        return "ProviderSilent" if self.is_silent(provider) else ""

    def why_not_here(self, job: GhostJob, provider: GhostProvider) -> str:
        if provider.id in {p.provider for p in self.line(job)}:
            return "ProviderExcluded"
        if not money.fits(provider.hardware, provider.offer, job.resources, self.load(provider.id)):
            return "DoesNotFit"
        rate = money.job_rate(provider.prices, job.resources)
        if not 0 < rate < 2**72:
            return "RateOutOfRange"
        return "OverBudget" if money.cost(rate, job.limit) > job.escrow else ""

    # ------------------------------------------------------------------- money

    def mint(self, account: str, amount: int) -> None:
        self.balances[account] += amount
        self.supply += amount

    def pay(self, due: Counter[str]) -> None:
        for account, amount in due.items():
            if account in self.blocked:
                self.parked[account] += amount
            else:
                self.balances[account] += amount

    def take(self, account: str, amount: int) -> None:
        if account not in self.allowed:
            raise Refused("ERC20InsufficientAllowance")
        if self.balances[account] < amount:
            raise Refused("ERC20InsufficientBalance")
        self.balances[account] -= amount

    def withdraw(self, caller: str, to: str) -> None:
        if not self.parked[caller]:
            raise Refused("NothingParked")
        if to in self.blocked:
            raise Refused("Blocked")
        self.balances[to] += self.parked.pop(caller)

    # --------------------------------------------------------------- customers

    def submit(self, caller: str, requests: Sequence[tuple[dict[str, Any], list[bytes]]]) -> None:
        if not self.open:
            raise Refused("SubmissionsClosed")
        new: list[GhostJob] = []
        for terms, definitions in requests:
            shape = Resources(
                terms["tasks"], terms["cpusPerTask"], terms["memPerCpu"], terms["gpus"]
            )
            least = (terms["amount"], terms["timeLimit"], shape.tasks, shape.mem_per_cpu)
            sizes_given = all(least) and shape.cpus_per_task
            if not sizes_given or terms["retries"] > 5 or terms["flags"] > 7:
                raise Refused("InvalidTerms")
            for definition in definitions:
                job = GhostJob(
                    id=len(self.jobs) + len(new) + 1,
                    customer=caller,
                    status=S.PENDING,
                    since=self.now,
                    resources=shape,
                    retries=terms["retries"],
                    flags=JobFlags(terms["flags"]),
                    escrow=terms["amount"],
                    limit=terms["timeLimit"],
                    definition=definition,
                    funded=terms["amount"],
                )
                new.append(job)
        if not new:
            raise Refused("EmptyBatch")
        self.take(caller, sum(job.escrow for job in new))
        self.jobs |= {job.id: job for job in new}

    def top_up(self, payer: str, job_id: int, customer: str, amount: int) -> None:
        job = self.job(job_id)
        if job is None or not job.status.is_live:
            raise Refused("WrongStatus")
        if job.customer != customer:
            raise Refused("NotCustomer")
        if amount < max(1, 60 * job.rate):
            raise Refused("TopUpTooSmall")
        end = job.since + job.allotment
        if job.status is S.RUNNING and self.now >= end - TIMES["topUpNotice"]:
            raise Refused("TopUpTooLate")
        lengthens = job.rate and not job.until_spent and payer == job.customer
        longer = amount // job.rate if lengthens else 0
        if job.escrow + amount >= 2**96 or job.limit + longer >= 2**24:
            raise Refused("TopUpTooLarge")
        self.take(payer, amount)
        self.jobs[job_id] = replace(
            job,
            escrow=job.escrow + amount,
            limit=job.limit + longer,
            funded=job.funded + amount,
        )

    # ------------------------------------------------------------------ batches

    def batch(
        self, items: Iterable[Any], step: Callable[[Any, Outcome], str], mover: str = ""
    ) -> Outcome:
        """Apply a step to each item; a step returns the reason of a refusal, or None.

        `mover` is the caller of a provider's function: one of its jobs that moved answers for it.
        """
        outcome = Outcome()
        count = 0
        for item in items:
            count += 1
            job_id = item if isinstance(item, int) else item[0]
            status = self.status(job_id)
            refusal = step(item, outcome)
            if refusal:
                outcome.skipped.append((job_id, status, refusal))
        if not count:
            raise Refused("EmptyBatch")
        if len(outcome.skipped) == count:
            raise Refused(outcome.skipped[0][2])
        self.pay(outcome.due)
        if mover in outcome.movers and self.providers[mover].challenged_at:
            self.answer(mover)
            outcome.answered.append(mover)
        return outcome

    def move(self, outcome: Outcome, job: GhostJob, to: JobStatus, **changes: Any) -> GhostJob:
        assert to in ARROWS.get(job.status, set())
        outcome.moves.append((job.id, job.status, to))
        new_job = replace(job, status=to, since=self.now, **changes)
        self.jobs[job.id] = new_job
        outcome.movers |= {self.holder(job).account, self.holder(new_job).account}
        return new_job

    def movable(self, job_id: int, to: JobStatus) -> GhostJob | None:
        job = self.job(job_id)
        return job if job and to in ARROWS.get(job.status, set()) else None

    def assign(self, choices: Sequence[tuple[int, int, Prices | None]], mover: str = "") -> Outcome:
        """`choices` of job id, provider id and the maximum prices; without prices, by the provider itself."""

        def step(choice: tuple[int, int, Prices | None], outcome: Outcome) -> str:
            job_id, provider_id, limits = choice
            job = self.movable(job_id, S.META_SCHEDULED)
            if job is None:
                return "InvalidTransition"
            provider = self.by_id(provider_id)
            refusal = self.why_not_active(provider)
            if not refusal and limits is not None and exceeds(provider.prices, limits):
                refusal = "PriceRaised"
            if not refusal and limits is None:
                if JobFlags.NO_SELF_SCHEDULING in job.flags:
                    refusal = "SelfSchedulingForbidden"
                elif self.now < job.since + TIMES["pendingTimeout"]:
                    refusal = "TooEarly"
                elif provider.id in job.barred:
                    refusal = "ProviderExcluded"
            refusal = refusal or self.why_not_here(job, provider)
            if not refusal:
                rate = money.job_rate(provider.prices, job.resources)
                self.move(
                    outcome,
                    job,
                    S.META_SCHEDULED,
                    provider=provider.id,
                    rate=rate,
                    fee_bps=self.fee_bps,
                )
            return refusal

        return self.batch(choices, step, mover)

    def advance(self, caller: str, job_ids: Sequence[int], *steps: JobStatus) -> Outcome:
        """Move an item through the statuses; the first one decides whether it is refused."""

        def step(job_id: int, outcome: Outcome) -> str:
            job = self.movable(job_id, steps[0])
            if job is None:
                return "InvalidTransition"
            if self.holder(job).account != caller:
                return "NotAssignedProvider"
            for to in steps:
                started = self.now if to is S.RUNNING else job.started
                job = self.move(outcome, job, to, started=started)
            return ""

        return self.batch(job_ids, step, caller)

    def collect(self, caller: str, job_ids: Sequence[int]) -> Outcome:
        def step(job_id: int, outcome: Outcome) -> str:
            job = self.job(job_id)
            if job is None or job.status is not S.RUNNING:
                return "InvalidTransition"
            refusal = self.why_not_collect(caller, job)
            if not refusal:
                self.collect_one(outcome, job)
            return refusal

        return self.batch(job_ids, step, caller)

    def why_not_collect(self, caller: str, job: GhostJob) -> str:
        elapsed = self.now - job.since
        if self.holder(job).account != caller:
            return "NotAssignedProvider"
        if JobFlags.INTERIM_PAYMENTS not in job.flags:
            return "InterimPaymentsForbidden"
        if elapsed < TIMES["collectInterval"]:
            return "TooEarly"
        if elapsed >= job.allotment:
            return "AllotmentUsedUp"
        return "RunLost" if self.is_lost(job) else ""

    def collect_one(self, outcome: Outcome, job: GhostJob) -> None:
        seconds = self.now - job.since
        consumed = seconds * job.rate
        # The price ceiling of a job that runs until its credits are spent, escrow / limit, stays.
        remaining = job.limit * (job.escrow - consumed) // job.escrow
        limit = max(1, remaining) if job.until_spent else job.limit - seconds
        fee = consumed * job.fee_bps // 10_000
        provider = self.holder(job).account
        for account, amount in ((provider, consumed - fee), (self.treasury, fee)):
            if amount:
                outcome.due[account] += amount
        outcome.collected.append((job.id, seconds, consumed - fee, fee))
        outcome.movers.add(provider)
        self.jobs[job.id] = replace(
            job,
            since=self.now,
            escrow=job.escrow - consumed,
            limit=limit,
            paid=job.paid + consumed - fee,
            fee=job.fee + fee,
        )

    def finish(self, caller: str, reports: Sequence[tuple[int, int, int]]) -> Outcome:
        """`reports` of job id, seconds and exit code."""

        def step(report: tuple[int, int, int], outcome: Outcome) -> str:
            job_id, seconds, exit_code = report
            job = self.movable(job_id, S.FINISHED)
            if job is None:
                return "InvalidTransition"
            if self.holder(job).account != caller:
                return "NotAssignedProvider"
            settlement = self.settlement(job, seconds)
            if settlement.billed_seconds == job.allotment:
                to = S.OUT_OF_CREDITS
            else:
                to = S.FAILED if exit_code else S.FINISHED
            self.settle(outcome, job, to, settlement)
            return ""

        return self.batch(reports, step, caller)

    def cancel(self, caller: str, job_ids: Sequence[int]) -> Outcome:
        def step(job_id: int, outcome: Outcome) -> str:
            job = self.movable(job_id, S.CANCELLED)
            if job is None:
                return "InvalidTransition"
            if job.customer != caller and not self.is_expired(job):
                return "NotCustomer"
            free = job.status is not S.RUNNING or self.is_lost(job)
            settlement = self.settlement(job, 0 if free else 2**32)
            self.settle(outcome, job, S.CANCELLED, settlement)
            return ""

        return self.batch(job_ids, step)

    def requeue(self, caller: str, job_ids: Sequence[int], reason: str) -> Outcome:
        def step(job_id: int, outcome: Outcome) -> str:
            job = self.movable(job_id, S.PENDING)
            if job is None:
                return "InvalidTransition"
            if len(reason) > 256:
                return "ReasonTooLong"
            if not self.may_requeue(caller, job):
                return "TooEarly"
            barred = job.barred | {job.provider}
            self.move(outcome, job, S.PENDING, provider=0, rate=0, fee_bps=0, barred=barred)
            return ""

        return self.batch(job_ids, step, caller)

    def may_requeue(self, caller: str, job: GhostJob) -> bool:
        provider = self.holder(job)
        is_late = self.now > job.since + TIMES["claimTimeout"]
        if caller == provider.account:
            return True
        if job.status is S.META_SCHEDULED:
            return is_late
        is_gone = self.is_silent(provider) or provider.status is ProviderStatus.BANNED
        return is_gone or (is_late and caller in {job.customer, self.meta})

    def panic(self, caller: str, job_ids: Sequence[int], reason: str) -> Outcome:
        def step(job_id: int, outcome: Outcome) -> str:
            job = self.movable(job_id, S.PANICKED)
            if job is None:
                return "InvalidTransition"
            if len(reason) > 256:
                return "ReasonTooLong"
            if caller != self.holder(job).account:
                if job.status is not S.RUNNING:
                    return "NotAssignedProvider"
                if not self.is_lost(job):
                    return "NotLost"
            if job.retries:
                self.succeed(outcome, job)
            else:
                self.settle(outcome, job, S.PANICKED, self.settlement(job, 0))
            return ""

        return self.batch(job_ids, step, caller)

    def succeed(self, outcome: Outcome, job: GhostJob) -> None:
        self.move(outcome, job, S.PANICKED, escrow=0, carried_out=job.escrow)
        successor = replace(
            job,
            id=len(self.jobs) + 1,
            status=S.PENDING,
            since=self.now,
            retries=job.retries - 1,
            flags=job.flags | JobFlags.SUCCESSOR,
            retry_of=job.id,
            provider=0,
            rate=0,
            fee_bps=0,
            barred=frozenset(),
            started=0,
            funded=0,
            carried_in=job.escrow,
            paid=0,
            fee=0,
        )
        self.jobs[successor.id] = successor
        outcome.moves.append((successor.id, S.NONE, S.PENDING))
        outcome.retried.append((job.id, successor.id))

    def settlement(self, job: GhostJob, reported: int) -> money.Settlement:
        return money.settle(
            escrow=job.escrow,
            rate=job.rate,
            fee_bps=job.fee_bps,
            time_limit=job.limit,
            until_spent=job.until_spent,
            reported=reported,
            elapsed=self.now - job.since,
        )

    def settle(
        self, outcome: Outcome, job: GhostJob, to: JobStatus, split: money.Settlement
    ) -> None:
        outcome.settled.append((job.id, split))
        # One account may stand for two of them.
        for account, amount in (
            (self.holder(job).account, split.paid),
            (self.treasury, split.fee),
            (job.customer, split.refunded),
        ):
            if amount:
                outcome.due[account] += amount
        self.move(
            outcome,
            job,
            to,
            escrow=split.paid + split.fee,
            paid=job.paid + split.paid,
            fee=job.fee + split.fee,
            refunded=split.refunded,
        )

    # ------------------------------------------------------- challenges, registry

    def challenge(self, job_id: int) -> None:
        job = self.job(job_id)
        if job is None or not job.status.is_assigned:
            raise Refused("WrongStatus")
        provider = self.holder(job)
        fresh = self.now - provider.answered_at < TIMES["responseTimeout"]
        if provider.challenged_at or fresh:
            raise Refused("ChallengeRefused")
        provider.challenged_at, provider.challenged_block = self.now, self.block

    def answer(self, caller: str) -> None:
        provider = self.providers.get(caller)
        if provider is None or not provider.challenged_at:
            raise Refused("NothingToAnswer")
        provider.challenged_at = provider.challenged_block = 0
        provider.answered_at = self.now

    def register(self, caller: str, hardware: Hardware, prices: Prices) -> None:
        provider = self.providers.setdefault(caller, GhostProvider(caller))
        if provider.banned:
            raise Refused("ProviderBanned")
        provider.pending_version += 1
        provider.pending, provider.prices = hardware, prices

    def approve(self, account: str, version: int) -> None:
        provider = self.known(account)
        if provider.banned:
            raise Refused("ProviderBanned")
        if not version or version not in {provider.version, provider.pending_version}:
            raise Refused("VersionMismatch")
        if not provider.id:
            provider.id = 1 + max((p.id for p in self.providers.values()), default=0)
        provider.approved_until = self.now + APPROVAL_PERIOD
        if version == provider.version:
            return
        before, after, offer = whole(provider.hardware), whole(provider.pending), provider.offer
        pairs = zip(
            (offer.cpus, offer.memory, offer.gpus),
            (before.cpus, before.memory, before.gpus),
            (after.cpus, after.memory, after.gpus),
            strict=True,
        )
        follow = [new if now == old or now > new else now for now, old, new in pairs]
        provider.offer = Offer(*follow)
        provider.version, provider.hardware = version, provider.pending

    def known(self, account: str) -> GhostProvider:
        provider = self.providers.get(account)
        if provider is None or not provider.pending_version:
            raise Refused("NotRegistered")
        return provider

    def set_offer(self, caller: str, offer: Offer) -> None:
        provider = self.known(caller)
        if not provider.version:
            raise Refused("NotApproved")
        top = whole(provider.hardware)
        if offer.cpus > top.cpus or offer.memory > top.memory or offer.gpus > top.gpus:
            raise Refused("OfferTooLarge")
        provider.offer = offer
