"""Rules of the state machine: which calls are made by whom, and how often."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from deepsquare_chain.job import Hardware, JobFlags, JobStatus, Offer, Prices
from tests.invariants.machine import GridMachine
from tests.invariants.records import Refused
from tests.support.evm import Receipt
from tests.support.grid import TIMES, assignment, digest

S = JobStatus
HARDWARE = [Hardware(5, 4, 1_000, 1), Hardware(2, 8, 4_000, 0), Hardware(9, 2, 500, 2)]
PRICES = [Prices(10, 100, 1), Prices(20, 50, 0), Prices(0, 0, 0), Prices(7, 0, 3)]
WAITS = sorted(
    {1, 2, 5, 3_000, 15 * 86_400}
    | {value + d for value in TIMES.values() for d in (-1, 0, 1)}
    | {2 * value + 1 for value in TIMES.values()}
)
# Mostly more than any provider asks, sometimes less than some do.
NAMED = [*[Prices(2**64 - 1, 2**64 - 1, 2**64 - 1)] * 3, Prices(15, 100, 1)]
FLAGS = [
    JobFlags.NONE,
    JobFlags.UNTIL_SPENT,
    JobFlags.NO_SELF_SCHEDULING,
    *[JobFlags.INTERIM_PAYMENTS] * 3,
    *[JobFlags.INTERIM_PAYMENTS | JobFlags.UNTIL_SPENT] * 3,
]
LONG_REASON = "r" * 257


SEEDS = st.integers(0, 2**64 - 1)
Rng = random.Random


class Games(GridMachine):
    """The rules: which accounts may make which calls."""

    # ----------------------------------------------------------------- choosing

    def pick_ids(self, rng: Rng, *statuses: JobStatus, limit: int = 4) -> list[int]:
        """Choose jobs: mostly of a suitable status, sometimes any, foreign, unknown or repeated ones."""
        fitting = [i for i, job in self.ghost.jobs.items() if job.status in statuses]
        count = rng.choice([0, *[1] * 9, *[2] * 4, 3, 3, 4]) if limit > 1 else 1
        ids = []
        for _ in range(count):
            stray = not fitting or rng.random() < 0.1
            ids.append(rng.randint(0, len(self.ghost.jobs) + 1) if stray else rng.choice(fitting))
        return ids

    def pick_sender(self, rng: Rng, ids: Sequence[int], role: str) -> str:
        """Choose a provider: mostly the one that the job is assigned to."""
        job = self.ghost.job(ids[0]) if ids else None
        if job is None or rng.randint(0, 3) == 3:
            return rng.choice([self.grid.stranger, *self.accounts])
        if role == "customer":
            return job.customer
        account = self.ghost.holder(job).account
        return account if account in self.accounts else self.grid.stranger

    def singles(
        self, rng: Rng, items: Sequence[Any], call: Callable[[Any], object]
    ) -> list[Callable[[], object]]:
        """Return, for some batches, calls of one item each; the checks compare the two."""
        if len(items) < 2 or rng.random() < 0.5:
            return []
        return [lambda item=item: call(item) for item in items]

    def by_customer(self, rng: Rng, sender: str, name: str, *values: Any) -> Callable[[], Receipt]:
        """Make a customer's call: directly, or signed and relayed."""
        if rng.random() < 0.3:
            return lambda: self.forwarded(sender, name, *values)
        return lambda: getattr(self.grid.scheduler, name)(*values, sender=sender)

    # ---------------------------------------------------------------- the start

    @initialize(seed=SEEDS)
    def providers_and_jobs(self, seed: int) -> None:
        for account in self.hosts[:2]:
            self.do_register(account, HARDWARE[0], PRICES[0])
            self.do_approve(account, 1)
        self.submit(Rng(seed))

    # -------------------------------------------------------------------- the rules

    # One rule with uniform random choices: Hypothesis prefers simple values, and would seldom carry a
    # job to its end. It still finds out which steps a failure needs.
    @rule(seed=SEEDS)
    def turn(self, seed: int) -> None:
        self.turns += 1
        rng = Rng(f"{seed} in turn {self.turns}")
        luck = rng.randint(0, 99)
        if luck < 62:
            self.do_work(rng)
        elif luck < 74:
            self.wait_for_a_bound(rng)
        elif luck < 80:
            self.wait(rng)
        elif luck < 90:
            self.meddle(rng)
        else:
            self.govern(rng)

    def do_work(self, rng: Rng) -> None:
        """Make a call that can succeed now; calls that advance a job are the most frequent."""
        by_status = {
            S.NONE: [self.submit],
            S.PENDING: [*[self.meta_schedule] * 7, self.self_schedule, self.cancel, self.expire],
            S.META_SCHEDULED: [
                *[self.claim] * 5,
                *[self.claim_and_start] * 4,
                self.requeue,
                self.panic,
                self.cancel,
            ],
            S.SCHEDULED: [*[self.start] * 9, self.requeue, self.panic, self.cancel],
            S.RUNNING: [
                *[self.finish] * 2,
                *[self.collect] * 3,
                *[self.panic] * 2,
                *[self.challenge] * 3,
                *[self.wait_for_a_bound] * 4,
                self.strangers_panic,
                self.cancel,
                self.top_up,
            ],
        }
        statuses = {S.NONE, *(job.status for job in self.ghost.jobs.values())}
        # Later steps come first; otherwise few jobs would reach their end.
        status = rng.choice([s for s in by_status if s in statuses for _ in range(1 + s)])
        calls = by_status[status]
        if any(provider.challenged_at for provider in self.ghost.providers.values()):
            calls.append(self.answer)
        if any(self.ghost.why_not_active(p) for p in self.ghost.providers.values()):
            calls.append(self.repair)
        if self.ghost.parked:
            calls.append(self.withdraw)
        rng.choice(calls)(rng)

    def repair(self, _: Rng) -> None:
        """Make inactive providers active again, and open submissions."""
        for account, provider in self.ghost.providers.items():
            if provider.banned:
                self.do_ban(account, banned=False)
            if provider.draining:
                self.do_drain(account, draining=False)
            if provider.challenged_at:
                self.do_answer(account)
            self.do_approve(account, provider.pending_version)
        if not self.ghost.open:
            self.do_open(value=True)

    def meddle(self, rng: Rng) -> None:
        """Make any call, whether or not it can succeed."""
        calls = [
            self.cancel,
            self.top_up,
            self.meta_schedule,
            self.self_schedule,
            self.claim,
            self.start,
            self.claim_and_start,
            self.collect,
            self.finish,
            self.requeue,
            self.panic,
            self.strangers_panic,
            self.challenge,
            self.answer,
            self.withdraw,
        ]
        rng.choice(calls)(rng)

    def govern(self, rng: Rng) -> None:
        """Make a call to the registry, an administrative call, or a call to the token."""
        calls = [
            self.register,
            self.offer,
            self.prices_or_maintenance,
            self.ban_or_unban,
            self.parameters,
            self.mint_burn_or_give,
            self.block,
        ]
        rng.choice(calls)(rng)

    # ------------------------------------------------------------------- customers

    def submit(self, rng: Rng) -> None:
        amount = rng.choice([*[10**6] * 8, *[50_000] * 4, 3_000, 10**19])
        limit = rng.choice([*[60] * 6, *[600] * 4, 1, 10**6])
        retries = rng.choice([*[1, 0, 2] * 6, 5, 6])
        flags = rng.choice([*FLAGS * 4, 8])
        counts = rng.choice([[1], [1], [2], [1, 1], [0, 2], [0]])
        if rng.randint(0, 19) == 19:
            counts = []
        sender = rng.choice([*self.customers * 6, self.grid.stranger])
        shape = rng.choice([*[(1, 1, 100, 0), (2, 2, 10, 1), (4, 1, 25, 0)] * 4, (9, 3, 1, 0)])
        changes = dict(zip(("tasks", "cpusPerTask", "memPerCpu", "gpus"), shape, strict=True))
        changes |= {"amount": amount, "timeLimit": limit, "flags": flags, "retries": retries}
        requests = [self.grid.request(count, **changes) for count in counts]
        pairs = [(changes, [digest(n) for n in range(count)]) for count in counts]
        self.call(
            sender,
            self.by_customer(rng, sender, "submitJobs", requests),
            lambda: self.ghost.submit(sender, pairs),
        )

    def cancel(self, rng: Rng) -> None:
        ids = self.pick_ids(rng, S.RUNNING, S.PENDING, S.META_SCHEDULED, S.SCHEDULED)
        sender = self.pick_sender(rng, ids, "customer")
        real = self.grid.scheduler.cancel
        self.call(
            sender,
            self.by_customer(rng, sender, "cancel", ids),
            lambda: self.ghost.cancel(sender, ids),
            self.singles(rng, ids, lambda i: real([i], sender=sender)),
        )

    def expire(self, rng: Rng) -> None:
        """A stranger cancels expired jobs, which refunds their customers."""
        pending = [job for job in self.ghost.jobs.values() if job.status is S.PENDING]
        if pending and rng.random() < 0.5:
            oldest = min(job.since for job in pending)
            self.wait_for(max(1, oldest + TIMES["pendingExpiry"] - self.chain.now))
        ids = self.pick_ids(rng, S.PENDING)
        sender = self.grid.stranger
        self.call(
            sender,
            lambda: self.grid.scheduler.cancel(ids, sender=sender),
            lambda: self.ghost.cancel(sender, ids),
        )

    def top_up(self, rng: Rng) -> None:
        times = rng.choice([60, 60, 61, 59, 1_000, 0])
        extra = rng.randint(0, 9)
        (job_id,) = self.pick_ids(rng, S.RUNNING, S.META_SCHEDULED, S.SCHEDULED, limit=1)
        job = self.ghost.job(job_id)
        amount = times * (job.rate if job else 1) + extra
        sender = self.pick_sender(rng, [job_id], "customer")
        customer = job.customer if job else sender
        if rng.randint(0, 9) == 9:
            customer = self.grid.stranger
        self.call(
            sender,
            self.by_customer(rng, sender, "topUp", job_id, customer, amount),
            lambda: self.ghost.top_up(sender, job_id, customer, amount),
        )

    # ------------------------------------------------------------------- scheduler

    def meta_schedule(self, rng: Rng) -> None:
        self.do_meta_schedule(rng, rng.randint(1, 2))

    def do_meta_schedule(self, rng: Rng, groups: int) -> None:
        sender = self.grid.meta if rng.randint(0, 9) else self.grid.stranger
        good = [p.id for p in self.ghost.providers.values() if not self.ghost.why_not_active(p)]
        ids_of_providers = [*good * 8, 0, 1, 2, 3]
        assignments, choices = [], []
        for _ in range(groups):
            ids, provider_id = self.pick_ids(rng, S.PENDING), rng.choice(ids_of_providers)
            chosen_prices = rng.choice(NAMED)
            assignments.append(assignment(provider_id, *ids, prices=asdict(chosen_prices)))
            choices += [(job_id, provider_id, chosen_prices) for job_id in ids]

        def model() -> Any:
            if sender != self.grid.meta:
                raise Refused("AccessControlUnauthorizedAccount")
            return self.ghost.assign(choices)

        real = self.grid.scheduler.metaSchedule
        self.call(
            sender,
            lambda: real(assignments, sender=sender),
            model,
            self.singles(
                rng,
                choices,
                lambda c: real([assignment(c[1], c[0], prices=asdict(c[2]))], sender=sender),
            ),
        )

    # ------------------------------------------------------------------- providers

    def self_schedule(self, rng: Rng) -> None:
        ids = self.pick_ids(rng, S.PENDING)
        sender = rng.choice([*self.hosts, *self.hosts, self.grid.stranger])
        known = self.ghost.providers.get(sender)
        choices = [(i, known.id if known else 0, None) for i in ids]
        real = self.grid.scheduler.selfSchedule
        self.call(
            sender,
            lambda: real(ids, sender=sender),
            lambda: self.ghost.assign(choices, mover=sender),
            self.singles(rng, ids, lambda i: real([i], sender=sender)),
        )

    def claim(self, rng: Rng) -> None:
        self.do_advance(rng, "claim", S.META_SCHEDULED, S.SCHEDULED)

    def claim_and_start(self, rng: Rng) -> None:
        self.do_advance(rng, "claimAndStart", S.META_SCHEDULED, S.SCHEDULED, S.RUNNING)

    def start(self, rng: Rng) -> None:
        self.do_advance(rng, "start", S.SCHEDULED, S.RUNNING)

    def do_advance(self, rng: Rng, name: str, before: S, *steps: S) -> None:
        ids = self.pick_ids(rng, before)
        sender = self.pick_sender(rng, ids, "provider")
        real = getattr(self.grid.scheduler, name)
        self.call(
            sender,
            lambda: real(ids, sender=sender),
            lambda: self.ghost.advance(sender, ids, *steps),
            self.singles(rng, ids, lambda i: real([i], sender=sender)),
        )

    def collect(self, rng: Rng) -> None:
        running = [job for job in self.ghost.jobs.values() if job.status is S.RUNNING]
        if running and rng.random() < 0.5:
            due = rng.choice(running).since + TIMES["collectInterval"]
            self.wait_for(max(1, due - self.chain.now))
        ids = self.pick_ids(rng, S.RUNNING)
        sender = self.pick_sender(rng, ids, "provider")
        real = self.grid.scheduler.collect
        self.call(
            sender,
            lambda: real(ids, sender=sender),
            lambda: self.ghost.collect(sender, ids),
            self.singles(rng, ids, lambda i: real([i], sender=sender)),
        )

    def finish(self, rng: Rng) -> None:
        ids = self.pick_ids(rng, S.RUNNING)
        sender = self.pick_sender(rng, ids, "provider")
        reports = [(i, rng.choice([5, 0, 60, 2**32 - 1]), rng.randint(0, 1)) for i in ids]
        real = self.grid.scheduler.finish
        self.call(
            sender,
            lambda: real([self.grid.report(*end) for end in reports], sender=sender),
            lambda: self.ghost.finish(sender, reports),
            self.singles(rng, reports, lambda end: real([self.grid.report(*end)], sender=sender)),
        )

    def requeue(self, rng: Rng) -> None:
        reason = rng.choice([*["", "no room"] * 6, LONG_REASON])
        ids = self.pick_ids(rng, S.SCHEDULED, S.META_SCHEDULED)
        sender = self.pick_sender(rng, ids, rng.choice(["provider", "customer"]))
        real = self.grid.scheduler.requeue
        self.call(
            sender,
            lambda: real(ids, reason, sender=sender),
            lambda: self.ghost.requeue(sender, ids, reason),
            self.singles(rng, ids, lambda i: real([i], reason, sender=sender)),
        )

    def panic(self, rng: Rng) -> None:
        reason = rng.choice([*["", "broken"] * 6, LONG_REASON])
        ids = self.pick_ids(rng, S.RUNNING, S.SCHEDULED, S.META_SCHEDULED)
        sender = self.pick_sender(rng, ids, "provider")
        real = self.grid.scheduler.panic
        self.call(
            sender,
            lambda: real(ids, reason, sender=sender),
            lambda: self.ghost.panic(sender, ids, reason),
            self.singles(rng, ids, lambda i: real([i], reason, sender=sender)),
        )

    def strangers_panic(self, rng: Rng) -> None:
        ids = self.pick_ids(rng, S.RUNNING)
        sender = self.grid.stranger
        self.call(
            sender,
            lambda: self.grid.scheduler.panic(ids, "me too", sender=sender),
            lambda: self.ghost.panic(sender, ids, "me too"),
        )

    def challenge(self, rng: Rng) -> None:
        (job_id,) = self.pick_ids(rng, S.RUNNING, S.SCHEDULED, S.META_SCHEDULED, limit=1)
        sender = rng.choice([self.grid.stranger, self.grid.alice])
        self.call(
            sender,
            lambda: self.grid.scheduler.challenge(job_id, sender=sender),
            lambda: self.ghost.challenge(job_id),
        )

    def answer(self, rng: Rng) -> None:
        self.do_answer(rng.choice([*self.hosts, self.grid.stranger]))

    def do_answer(self, sender: str) -> None:
        self.call(
            sender,
            lambda: self.grid.scheduler.answer(sender=sender),
            lambda: self.ghost.answer(sender),
        )

    # -------------------------------------------------------------------- registry

    def register(self, rng: Rng) -> None:
        hardware, prices = (rng.choice(choice) for choice in (HARDWARE, PRICES))
        account = rng.choice(self.hosts)
        self.do_register(account, hardware, prices)
        if rng.random() < 0.5:
            known = self.ghost.providers[account]
            self.do_approve(account, rng.choice([known.pending_version, 0, 1]))

    def do_register(self, account: str, hardware: Hardware, prices: Prices) -> None:
        names = ("nodes", "cpusPerNode", "memPerNode", "gpusPerNode")
        values = (
            hardware.nodes,
            hardware.cpus_per_node,
            hardware.mem_per_node,
            hardware.gpus_per_node,
        )
        arguments = dict(zip(names, values, strict=True))
        tariff = {"cpu": prices.cpu, "gpu": prices.gpu, "mem": prices.mem}
        self.call(
            account,
            lambda: self.grid.registry.register(arguments, tariff, ["a=b"], sender=account),
            lambda: self.ghost.register(account, hardware, prices),
        )

    def do_approve(self, account: str, version: int) -> None:
        self.call(
            self.grid.admin,
            lambda: self.grid.registry.approve(account, version, sender=self.grid.admin),
            lambda: self.ghost.approve(account, version),
        )

    def offer(self, rng: Rng) -> None:
        cpus, gpus = rng.randint(0, 20), rng.randint(0, 2)
        account = rng.choice(self.hosts)
        self.call(
            account,
            lambda: self.grid.registry.setOffer(
                {"cpus": cpus, "mem": 1_000, "gpus": gpus}, sender=account
            ),
            lambda: self.ghost.set_offer(account, Offer(cpus, 1_000, gpus)),
        )

    def prices_or_maintenance(self, rng: Rng) -> None:
        prices, draining = rng.choice(PRICES), rng.random() < 0.5
        account = rng.choice(self.hosts)
        registry = self.grid.registry
        if rng.random() < 0.5:
            tariff = {"cpu": prices.cpu, "gpu": prices.gpu, "mem": prices.mem}
            self.call(
                account,
                lambda: registry.setPrices(tariff, sender=account),
                lambda: setattr(self.ghost.known(account), "prices", prices),
            )
        else:
            self.do_drain(account, draining=draining)

    def do_drain(self, account: str, *, draining: bool) -> None:
        self.call(
            account,
            lambda: self.grid.registry.setDraining(draining, sender=account),
            lambda: setattr(self.ghost.known(account), "draining", draining),
        )

    # ----------------------------------------------------------------------- admin

    def ban_or_unban(self, rng: Rng) -> None:
        self.do_ban(rng.choice(self.hosts), banned=rng.random() < 0.5)

    def do_ban(self, account: str, *, banned: bool) -> None:
        admin, registry = self.grid.admin, self.grid.registry
        real = (
            (lambda: registry.ban(account, "", sender=admin))
            if banned
            else (lambda: registry.unban(account, sender=admin))
        )
        self.call(admin, real, lambda: setattr(self.ghost.known(account), "banned", banned))

    def parameters(self, rng: Rng) -> None:
        fee = rng.choice([500, 0, 2_000, 2_001])
        open_ = rng.random() < 0.9
        scheduler, admin = self.grid.scheduler, self.grid.admin

        def set_fee() -> None:
            if fee > 2_000:
                raise Refused("OutOfBounds")
            self.ghost.fee_bps = fee

        self.call(admin, lambda: scheduler.setFee(fee, sender=admin), set_fee)
        self.do_open(value=open_)

    def do_open(self, *, value: bool) -> None:
        admin = self.grid.admin
        self.call(
            admin,
            lambda: self.grid.scheduler.setSubmissionsOpen(value, sender=admin),
            lambda: setattr(self.ghost, "open", value),
        )

    # ---------------------------------------------------------------------- money

    def mint_burn_or_give(self, rng: Rng) -> None:
        amount = rng.randint(1, 10**6)
        credit, admin, ghost = self.grid.credit, self.grid.admin, self.ghost
        account = rng.choice(self.customers)
        kind = rng.choice(["mint", "burn", "mistake"])

        def lose() -> None:
            if ghost.balances[account] < amount:
                raise Refused("ERC20InsufficientBalance")
            ghost.balances[account] -= amount
            if kind == "burn":
                ghost.supply -= amount
            else:
                ghost.gifts += amount

        target = self.grid.scheduler.address
        if kind == "mint" and account not in ghost.blocked:
            self.call(
                admin,
                lambda: credit.mint(account, amount, sender=admin),
                lambda: ghost.mint(account, amount),
            )
        elif kind == "burn":
            self.call(account, lambda: credit.burn(amount, sender=account), lose)
        elif kind == "mistake":
            self.call(account, lambda: credit.transfer(target, amount, sender=account), lose)

    def block(self, rng: Rng) -> None:
        """Block or unblock a recipient, if the token supports it."""
        if not hasattr(self.grid.credit, "setBlocked"):
            return
        everyone = [*self.customers, *self.hosts, self.grid.treasury]
        account = rng.choice(everyone)
        value = account not in self.ghost.blocked
        self.grid.credit.setBlocked(account, value, sender=self.grid.admin)
        self.note_call()
        (self.ghost.blocked.add if value else self.ghost.blocked.discard)(account)

    def withdraw(self, rng: Rng) -> None:
        parked = [account for account, amount in self.ghost.parked.items() if amount]
        sender = rng.choice([*parked, self.grid.stranger])
        to = rng.choice([sender, self.grid.alice, self.grid.stranger])
        self.call(
            sender,
            self.by_customer(rng, sender, "withdraw", to),
            lambda: self.ghost.withdraw(sender, to),
        )

    # ----------------------------------------------------------------------- time

    def wait(self, rng: Rng) -> None:
        seconds = rng.choice(WAITS)
        self.wait_for(seconds, rng.choice([None, 1, 7, 8, 10_000]))

    def wait_for_a_bound(self, rng: Rng) -> None:
        """Advance to one second before, at, or after a deadline of a live job."""
        offset = rng.randint(-1, 1)
        live_jobs = [job for job in self.ghost.jobs.values() if job.status.is_live]
        if not live_jobs:
            return
        job = rng.choice(live_jobs[::-1])
        end = job.since + job.allotment
        names = ("claimTimeout", "pendingTimeout", "pendingExpiry", "collectInterval")
        bounds = [end, *(job.since + TIMES[name] for name in names)]
        bounds += [end - TIMES["topUpNotice"], end + TIMES["reportGrace"]]
        clock = self.ghost.holder(job)
        bounds += [clock.challenged_at + TIMES[name] for name in ("responseTimeout", "lostTimeout")]
        bounds += [clock.answered_at + TIMES["responseTimeout"]]
        ahead = [bound + offset for bound in bounds if bound + offset > self.chain.now]
        # A day is enough for any of them but a very long run.
        near = [bound for bound in ahead if bound - self.chain.now < 86_400]
        if near:
            self.wait_for(rng.choice(near) - self.chain.now)
