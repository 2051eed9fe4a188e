"""Late binding: assigns waiting jobs to providers, in learned order, with reservations. Pure.

A job stays PENDING until an eligible provider has the free capacity to start it.

**Order.** Smallest first: dominant share x w, with w = max(u L, 10) / sqrt(10 h). The dominant
share is the largest of the job's shares of the grid's CPUs, memory and GPUs; L is its limit in
seconds; u and h are the expected used part of the limit and the expected 1 / max(run time, 10 s)
that `history` learns from finished runs.

**Reservations.** The first jobs in order that find no free capacity (`Rules.reservations`) hold
one each: a provider, and the time at which running jobs will have released enough there at the
latest, by time limits and not by estimates. A provider keeps at most one. Backfill: later jobs
still go there if they end before that time, or fit beside the reserved job.

**Overdue.** A job that has waited longer than `Rules.overdue_after` + `Rules.overdue_factor` x its
limit goes before all others, the worst ratio of wait to limit first. The first of those that finds
no free capacity holds a reservation too. No job starves: what is reserved for the worst of them
nobody takes.

**Choice.** Least w x log(cost of the work) + capacity left over, as a share of the largest
provider. The cost of the work is price / speed, 1 / speed or watts / speed, by the objective, and
times the number of tries that a provider needs by the faults that it had of late; its weight w decides how far apart costs must be to outweigh a better fit (`Rules.weights`).

Sources: smallest area first with a threshold: Carastan-Santos et al., CCGrid 2019; EASY
backfilling: Lifka, JSSPP 1995; dominant share: Ghodsi et al., NSDI 2011. The order's index, the
weight of a job's slowdown over its expected work, is our own.
"""

from __future__ import annotations

import gc
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np

from deepsquare_chain.job import Affinity, Job, Objective, Offer, Placement, matches
from deepsquare_chain.metascheduler.dependencies import conditions
from deepsquare_chain.metascheduler.eligibility import ProviderView, Waiting
from deepsquare_chain.metascheduler.free_capacity import within
from deepsquare_chain.metascheduler.history import SHORTEST_RUN, Estimate, RunHistory
from deepsquare_chain.metascheduler.tables import (
    Answers,
    Flags,
    Floats,
    HeldTable,
    Ints,
    ProviderTable,
    QueueTable,
)

_NEVER: Final = 2**62
#: Seconds after which ends of jobs are not told apart, some 35,000 years.
_FAR: Final = 2**40
#: Weight of faults in the choice beside that of the cost: a provider that gives half of its jobs up
#: must leave 0.7 x this of the largest provider less over.
FAULT_WEIGHT: Final = 1.0
#: Providers of a class's shortlist; when they are used up, the next ones in order follow.
_SHORT: Final = 128
#: Classes that are compared with all providers at once, so that the arrays stay in the cache.
_CHUNK: Final = 32
#: Of the classes compared so far, the part that is compared along with the next one.
_AHEAD: Final = 4
#: Largest difference that the place of a provider makes to its score, so that no two are equal and
#: every machine sorts them alike.
_TIE_BREAK: Final = 1e-4
#: What an unmet preference adds to the cost of a provider, more than costs ever differ.
_PREFERRED: Final = 1e8
#: The same of each other job of a customer that spreads its jobs, and the most that are counted.
_SPREAD: Final = 1e4
_COUNTED: Final = 9_999
#: Weight of free GPUs in the choice for a job without GPUs: their CPUs are kept for jobs with.
IDLE_GPUS: Final = 0.5


@dataclass(frozen=True, slots=True)
class Weights:
    """How much a difference of cost counts against capacity left over, by objective.

    Of two providers, one whose work costs e times (2.72 times) as much must leave less of its
    capacity over by this many largest providers to be preferred.
    """

    cost: float = 1_000.0
    time: float = 0.12
    energy: float = 1_000.0

    def of(self, objective: Objective) -> float:
        """The weight of an objective."""
        return (self.cost, self.time, self.energy)[objective]


@dataclass(frozen=True, slots=True)
class Rules:
    """How the queue is served; times in seconds of chain time.

    A job is overdue after waiting for `overdue_after` plus `overdue_factor` times its limit.
    `reservations` counts jobs without free capacity that hold one, `overdue_reservations` overdue
    ones. `start_margin` is allowed from an assignment to the start.

    `fair_share` lets customers who have used more than others of late wait longer: a job counts as
    (1 + use) ** fair_share times as large, use being in multiples of the mean; 0 turns it off.
    `priorities` makes jobs of customers, by address, count as so many times smaller. Both change
    the order alone: an overdue job still goes before all others. `max_running` is the most jobs
    that a customer may have at providers, 0 for any number.
    """

    overdue_after: int = 3_600
    overdue_factor: int = 10
    reservations: int = 4
    overdue_reservations: int = 1
    start_margin: int = 15
    weights: Weights = field(default_factory=Weights)
    fair_share: float = 0.0
    priorities: Mapping[str, float] = field(default_factory=dict, hash=False)
    max_running: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The grid at one block: `now` is its chain time, `assigned` all jobs that providers hold."""

    now: int
    providers: Sequence[ProviderView]
    waiting: Sequence[Waiting]
    assigned: Sequence[Job]


class Decision(NamedTuple):
    """A job to assign.

    Attributes:
        waiting: The job.
        provider_id: Where it goes.
        rate: Credit-wei per second there.
        overdue: Whether it went first because it had waited too long.
        choices: Providers that could start it when it, or the job of equal resources,
            requirements and objective before it, was compared with all.
    """

    waiting: Waiting
    provider_id: int
    rate: int
    overdue: bool
    choices: int


@dataclass(frozen=True, slots=True)
class Reservation:
    """Capacity that is kept for a job: at a provider, from chain time `at`, at the latest."""

    job_id: int
    provider_id: int
    at: int
    overdue: bool = False


class Ranking:
    """The order of the queue that a plan followed, with its rules and its customers' use."""

    def __init__(
        self,
        ids: Sequence[int] | Ints = (),
        history: RunHistory | None = None,
        rules: Rules | None = None,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        self.rules = rules or Rules()
        self.shares = shares or {}
        self._ids = ids
        self._history = history
        self._places: dict[int, int] | None = None

    def place(self, job_id: int) -> int | None:
        """Place of a job in the order, from 1."""
        if self._places is None:
            self._places = {int(each): place for place, each in enumerate(self._ids, 1)}
        return self._places.get(job_id)

    def __len__(self) -> int:
        return len(self._ids)

    def estimate(self, job: Job) -> Estimate:
        """What finished runs tell about a job."""
        resources = job.resources
        history = RunHistory() if self._history is None else self._history
        return history.estimate(job.customer, resources.cpus, resources.gpus, job.time_limit)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to assign now, in order; reservations by provider; what providers have left after it."""

    decisions: tuple[Decision, ...] = ()
    reservations: Mapping[int, Reservation] = field(default_factory=dict)
    free: Mapping[int, Offer] = field(default_factory=dict)
    ranking: Ranking = field(default_factory=Ranking, compare=False)

    def by_provider(self) -> dict[int, list[int]]:
        """Job ids by provider id, both in order of decision."""
        groups: dict[int, list[int]] = {}
        for decision in self.decisions:
            groups.setdefault(decision.provider_id, []).append(decision.waiting.job.id)
        return groups

    def reservation_of(self, job_id: int) -> Reservation | None:
        """What is reserved for a job."""
        kept = (each for each in self.reservations.values() if each.job_id == job_id)
        return next(kept, None)


def plan(snapshot: Snapshot, rules: Rules | None = None, history: RunHistory | None = None) -> Plan:
    """Decide about all waiting jobs.

    Equal snapshots, rules and histories give equal plans, whatever the order of their parts.
    """
    history = RunHistory() if history is None else history
    return Planner().plan(snapshot, rules or Rules(), history)


def is_overdue(waiting: Waiting, now: int, rules: Rules, seconds: int) -> bool:
    """Whether a job that may run for `seconds` has waited so long that it goes first."""
    return now - waiting.queued_at > rules.overdue_after + rules.overdue_factor * seconds


class Planner:
    """Plans again and again, and keeps the tables up to date in between.

    Each plan is the one that `plan` gives for the same snapshot, rules and history.
    """

    def __init__(self) -> None:
        self._providers = ProviderTable()
        self._queue = QueueTable()
        self._held = HeldTable()
        self._shares: Mapping[str, float] = {}
        self._shared: RunHistory | None = None
        self._paid = -1

    def plan(
        self, snapshot: Snapshot, rules: Rules, history: RunHistory, *, complete: bool = True
    ) -> Plan:
        """Decide about all waiting jobs of a snapshot.

        Without `complete` the decisions are the same, and what is only shown to people is left out:
        reservations that nobody could break now, and what is free. Simulations need no more.
        """
        replaced = self._providers.update(snapshot.providers, snapshot.now)
        self._held.update(snapshot.assigned, self._providers, replaced=replaced)
        self._queue.update(snapshot.waiting, self._providers, priced=True)
        self._queue.learn(history)
        if not self._providers.views:
            return Plan()
        tables = _Tables(self._providers, self._queue, self._held)
        if rules.fair_share and (history is not self._shared or history.payments != self._paid):
            self._shares = history.shares()
            self._shared, self._paid = history, history.payments
        with _without_collections():
            return self._decide(tables, snapshot.now, rules, history, complete=complete)

    def _decide(
        self, tables: _Tables, now: int, rules: Rules, history: RunHistory, *, complete: bool
    ) -> Plan:
        # A function of its own, so that its working set is gone before collections begin again.
        round_ = _Round(tables, now, rules, history, shares=self._shares)
        return round_.run(complete=complete)


@contextmanager
def _without_collections() -> Iterator[None]:
    """No garbage collection meanwhile: thousands of new decisions would make it walk all jobs."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True, slots=True)
class _Tables:
    providers: ProviderTable
    queue: QueueTable
    held: HeldTable


@dataclass(slots=True)
class _Shortlist:
    """Providers that fit a class of jobs, best first, as they were when all were compared.

    `places` are those that are tried next, from `next` on, and `rates` what they ask; of `order`
    those up to `read` were among them. `choices` counts all providers that could start a job of the class; none of those that
    still can asks less than `cheapest`, in credit-wei per second. `refused` are price ceilings and
    latest ends of jobs that found no provider: within a plan no job finds one that offers no more
    and ends no earlier.
    """

    order: Ints
    choices: int
    places: list[int] = field(default_factory=list)
    rates: list[int] = field(default_factory=list)
    next: int = 0
    read: int = 0
    cheapest: int = 0
    refused: list[tuple[int, int]] = field(default_factory=list)

    def refuses(self, ceiling: int, end: int) -> bool:
        """Whether a job that offered as much and ended as early found no provider."""
        return self.cheapest > ceiling or any(
            ceiling <= offered and end >= ended for offered, ended in self.refused
        )


class _Round:
    """One plan."""

    def __init__(
        self,
        tables: _Tables,
        now: int,
        rules: Rules,
        history: RunHistory,
        *,
        shares: Mapping[str, float],
    ) -> None:
        self._providers = providers = tables.providers
        self._queue = tables.queue
        self._held = tables.held
        self._now = now
        self._rules = rules
        self._history = history
        self._shares = shares
        self._faults = self._fault_costs()
        # Jobs at providers by customer, where they are limited.
        self._busy: Counter[str] = Counter()
        if rules.max_running:
            self._busy.update(job.customer for job in tables.held.jobs)
        self._earliest = now + rules.start_margin
        self._free: Ints = providers.offer - tables.held.load
        self._open = providers.open
        self._decisions: list[Decision] = []
        self._settled: set[int] = set()
        # Place, end and amounts of each job that was assigned.
        self._taken: list[tuple[int, int, int, int, int]] = []
        self._reservations: dict[int, Reservation] = {}
        # From when a provider is reserved, and what is left beside the reserved job then.
        self._reserved_at: Ints = np.full(len(providers.views), _NEVER, dtype=np.int64)
        self._spare: Ints = np.zeros_like(self._free)
        self._reserved: dict[int, int] = {}
        self._beside: dict[int, list[int]] = {}
        self._releases: tuple[Ints, Ints, Ints] | None = None
        # The same as `_free` by provider; where they differ, in `_changed`, this one is right.
        self._left: list[list[int]] = self._free.T.tolist()
        self._changed: set[int] = set()
        self._tie_break = np.arange(len(self._left)) * (_TIE_BREAK / max(1, len(self._left)))
        # By customer and place, jobs that are assigned; made when a job wants to know.
        self._jobs_at: defaultdict[str, Counter[int]] | None = None
        # Classes in the order in which they will be served first, those to come last.
        self._coming: list[int] = []
        self._shortlists: dict[int, _Shortlist] = {}
        # Classes that no provider has the free capacity for.
        self._full: set[int] = set()
        # Classes that no provider could run, were it empty.
        self._hopeless: set[int] = set()
        self._answers: dict[int, Answers] = {}
        self._costs: dict[int, Floats] = {}

    def run(self, *, complete: bool) -> Plan:
        if not (self._queue.count and self._open.any()):
            return Plan(free=self._free_offers())
        possible = self._possible()
        if not complete and not possible.any():
            return Plan()
        order = self._order()
        ranking = Ranking(self._queue.ids[order], self._history, self._rules, self._shares)
        self._serve_overdue()
        self._serve(order, possible, complete=complete)
        free = self._free_offers() if complete else {}
        return Plan(tuple(self._decisions), self._reservations, free, ranking)

    def _free_offers(self) -> dict[int, Offer]:
        """What open providers have left."""
        rows = zip(self._providers.ids, self._left, self._open.tolist(), strict=True)
        return {provider_id: Offer(*left) for provider_id, left, is_open in rows if is_open}

    # -- order

    def _order(self) -> Ints:
        """Rows of the queue, first to be served first."""
        queue = self._queue
        n = queue.count
        used, inverse = queue.estimates()
        totals = self._providers.totals
        share = np.maximum(queue.cpus[:n] / totals[0], queue.memory[:n] / totals[1])
        np.maximum(share, queue.gpus[:n] / totals[2], out=share)
        work = np.maximum(used * queue.seconds[:n], SHORTEST_RUN)
        index = share * work / np.sqrt(SHORTEST_RUN * inverse)
        if self._rules.fair_share or self._rules.priorities:
            index *= self._customers_factors()[queue.customer[:n]]
        order: Ints = np.lexsort((queue.ids[:n], queue.queued_at[:n], index))
        return order

    def _customers_factors(self) -> Floats:
        """By customer, how many times as large its jobs count."""
        rules = self._rules
        return np.array(
            [
                (1.0 + self._shares.get(customer, 0.0)) ** rules.fair_share
                / rules.priorities.get(customer, 1.0)
                for customer in self._queue.customers
            ]
        )

    def _fault_costs(self) -> Floats | None:
        """By provider, the logarithm of how often its jobs are tried until one ends; None for once."""
        if not self._history.has_faults:
            return None
        rates = [self._history.fault_rate(view.provider.account) for view in self._providers.views]
        return -np.log1p(-np.array(rates)) if any(rates) else None

    def _is_capped(self, row: int) -> bool:
        """Whether a job's customer has as many jobs at providers as it may."""
        most = self._rules.max_running
        return most > 0 and self._busy[self._queue.waiting[row].job.customer] >= most

    def _overdue(self) -> list[int]:
        queue, n = self._queue, self._queue.count
        waits = self._now - queue.queued_at[:n]
        seconds = queue.seconds[:n]
        limit = self._rules.overdue_after + float(self._rules.overdue_factor) * seconds
        rows = np.flatnonzero(waits > limit)
        if not len(rows):
            return []
        ratio = waits[rows] / seconds[rows]
        worst: list[int] = rows[np.lexsort((queue.ids[rows], -ratio))].tolist()
        return worst

    # -- serving

    def _serve_overdue(self) -> None:
        """Serve overdue jobs, the worst first, until they hold their reservations."""
        left = self._rules.overdue_reservations
        for row in self._overdue():
            if self._is_capped(row):
                continue
            cls, seconds = int(self._queue.cls[row]), int(self._queue.seconds[row])
            started = cls not in self._full and self._start(row, cls, seconds, overdue=True)
            if started or not self._reserve(row, overdue=True):
                continue
            left -= 1
            if left <= 0:
                return

    def _serve(self, order: Ints, possible: Flags, *, complete: bool) -> None:
        """Serve the queue in order: the first without free capacity get reservations.

        Only jobs of `possible` classes can start. After the last of them reservations change
        nothing, and are made for a `complete` plan only.
        """
        cls_of = self._queue.cls[order]
        candidates = possible[cls_of].nonzero()[0]
        last = int(candidates[-1]) + 1 if len(candidates) else 0
        classes, rows = cls_of.tolist(), order.tolist()
        self._coming = list(dict.fromkeys(cls_of[candidates].tolist()))[::-1]
        seconds = self._queue.seconds[order].tolist()
        left, at = self._rules.reservations, 0
        limited = bool(self._rules.max_running)
        until = len(rows) if complete else last
        while left > 0 and at < until:
            row, cls = rows[at], classes[at]
            at += 1
            if row in self._settled or (limited and self._is_capped(row)):
                continue
            if possible[cls] and cls not in self._full and self._start(row, cls, seconds[at - 1]):
                continue
            if self._can_run(row, cls):
                self._reserve(row)
                left -= 1
        if at < last:
            self._backfill(order[at:last], possible)

    def _backfill(self, order: Ints, possible: Flags) -> None:
        """Start what fits, as reservations allow."""
        cls = self._queue.cls[order]
        seconds = self._queue.seconds[order]
        mask = possible[cls]
        if self._reservations:
            mask &= self._earliest + seconds <= self._latest_ends(cls[mask])[cls]
        jobs = zip(order[mask].tolist(), cls[mask].tolist(), seconds[mask].tolist(), strict=True)
        limited = bool(self._rules.max_running)
        for row, each, limit in jobs:
            if each in self._full or row in self._settled or (limited and self._is_capped(row)):
                continue
            self._start(row, each, limit)

    def _possible(self) -> Flags:
        """Classes with jobs that some provider has the free capacity for."""
        possible = np.zeros(len(self._queue.class_keys), dtype=np.bool_)
        live = np.array(self._queue.members).nonzero()[0]
        free = np.where(self._open, self._free, -1)
        for some, need in self._in_chunks(live):
            possible[some] = _all_within(need, free).any(axis=1)
        return possible

    def _latest_ends(self, classes: Ints) -> Ints:
        """By class, the latest end of a job that reservations allow somewhere; 0 for nowhere."""
        until = np.zeros(len(self._queue.class_keys), dtype=np.int64)
        there = np.zeros(len(until), dtype=np.bool_)
        there[classes] = True
        reserved = np.array(list(self._reserved), dtype=np.int64)
        free = np.where(self._open, self._free, -1)
        for some, need in self._in_chunks(there.nonzero()[0]):
            fits = _all_within(need, free)
            beside = _all_within(need, self._spare[:, reserved])
            ends = np.where(beside, _NEVER, self._reserved_at[reserved])
            ends[~fits[:, reserved]] = 0
            until[some] = ends.max(axis=1)
            fits[:, reserved] = False
            until[some[fits.any(axis=1)]] = _NEVER
        return until

    def _in_chunks(self, classes: Ints) -> Iterator[tuple[Ints, Ints]]:
        """Classes with their sizes, to be compared with all providers."""
        sizes = np.array([self._queue.class_sizes[cls] for cls in classes.tolist()], dtype=np.int64)
        for first in range(0, len(classes), _CHUNK):
            yield classes[first : first + _CHUNK], sizes[first : first + _CHUNK].T[:, :, None]

    def _answer(self, cls: int) -> Answers:
        found = self._answers.get(cls)
        if found is None:
            resources, uses, objective = self._queue.class_keys[cls]
            found = self._answers[cls] = self._providers.answers(resources, uses)
            weight = self._rules.weights.of(objective)
            self._costs[cls] = found.weighted(objective, weight)
            wanted = conditions(uses)
            if wanted is not None and wanted.preferences:
                self._costs[cls] = self._costs[cls] + self._unpreferred(wanted.preferences)
            if self._faults is not None:
                self._costs[cls] = self._costs[cls] + (weight + FAULT_WEIGHT) * self._faults
        return found

    def _unpreferred(self, preferences: Sequence[Affinity]) -> Floats:
        """By provider, what the preferences that it does not meet add to its cost.

        Each counts more than all after it together, and than any difference of costs.
        """
        least = len(preferences) - 1
        return np.array(
            [
                sum(
                    _PREFERRED * 2.0 ** (least - rank)
                    for rank, each in enumerate(preferences)
                    if not matches([each], view.provider.labels)
                )
                for view in self._providers.views
            ]
        )

    def _can_run(self, row: int, cls: int) -> bool:
        """Whether any provider could run a job if it were empty."""
        if cls in self._hopeless:
            return False
        answers = self._answer(cls)
        eligible = answers.eligible & self._open
        if not eligible.any():
            self._hopeless.add(cls)
            return False
        self._narrow(eligible, answers, self._queue.waiting[row])
        return bool(eligible.any())

    def _narrow(self, eligible: Flags, answers: Answers, waiting: Waiting) -> None:
        """Leave the providers that the job's budget and exclusions allow."""
        job = waiting.job
        self._keep_affordable(eligible, answers, job.escrow // max(job.time_limit, 1))
        for provider_id in waiting.excluded:
            if (place := self._providers.rows.get(provider_id)) is not None:
                eligible[place] = False
        wanted = conditions(waiting.uses)
        if wanted is not None and wanted.patience:
            costs = answers.costs[waiting.objective]
            possible = answers.eligible & self._open
            self._keep_affordable(possible, answers, job.escrow // max(job.time_limit, 1))
            lowest = costs[possible].min(initial=np.inf)
            accepted = wanted.accepted_cost(max(0, self._now - waiting.queued_at))
            eligible &= costs <= lowest + math.log(accepted)

    @staticmethod
    def _keep_affordable(eligible: Flags, answers: Answers, ceiling: int) -> None:
        if answers.dearest > ceiling:
            # Rates that do not fit 64 bits are kept as objects; elsewhere a wider ceiling is none.
            eligible &= answers.rates <= ceiling

    def _start(self, row: int, cls: int, seconds: int, *, overdue: bool = False) -> bool:
        """Assign a job if a provider can start it now."""
        waiting = self._queue.waiting[row]
        special = row in self._queue.special
        if special:
            found = self._choose(row, cls, waiting)
        else:
            found = self._choose_again(cls, waiting.job, self._earliest + seconds)
        if found is None:
            return False
        place, rate, choices = found
        if special and waiting.job.until_spent:
            seconds = waiting.job.escrow // rate
        self._take(place, self._answers[cls], self._earliest + seconds)
        self._settled.add(row)
        if self._jobs_at is not None:
            self._jobs_at[waiting.job.customer][place] += 1
        if self._rules.max_running:
            self._busy[waiting.job.customer] += 1
        self._decisions.append(
            Decision(waiting, self._providers.ids[place], rate, overdue, choices)
        )
        return True

    def _choose_again(self, cls: int, job: Job, end: int) -> tuple[int, int, int] | None:
        """The best provider for a job that differs from others of its class by limit and budget."""
        shortlist = self._shortlists.get(cls) or self._compare(cls)
        ceiling = job.escrow // max(job.time_limit, 1)
        if shortlist is None or shortlist.refuses(ceiling, end):
            return None
        answers = self._answers[cls]
        found = self._first(shortlist, answers, ceiling, end)
        while found is None and shortlist.next >= len(shortlist.places):
            self._read_on(shortlist, answers)
            if not shortlist.places:
                self._full.add(cls)
                return None
            found = self._first(shortlist, answers, ceiling, end)
        if found is None:
            if shortlist.read < shortlist.choices:
                found = self._choose_for(cls, shortlist, ceiling, end)
            if found is None:
                shortlist.refused.append((ceiling, end))
        return found

    def _first(
        self, shortlist: _Shortlist, answers: Answers, ceiling: int, end: int
    ) -> tuple[int, int, int] | None:
        """The first place of a shortlist that can start a job, its rate, and the choices."""
        cpus, memory, gpus = answers.size
        left, reserved = self._left, self._reserved
        places, rates = shortlist.places, shortlist.rates
        for at in range(shortlist.next, len(places)):
            place = places[at]
            free = left[place]
            if cpus > free[0] or memory > free[1] or gpus > free[2]:
                # It never fits again in this plan.
                if at == shortlist.next:
                    shortlist.next += 1
            elif rates[at] <= ceiling and (
                place not in reserved or end <= reserved[place] or self._fits_beside(place, answers)
            ):
                return place, rates[at], shortlist.choices
        return None

    def _read_on(self, shortlist: _Shortlist, answers: Answers) -> None:
        """Put the next providers in order that still fit on a shortlist."""
        rest = shortlist.order[shortlist.read : shortlist.choices]
        if shortlist.read:
            self._write_changed()
            fitting = _all_within(answers.need, self._free[:, rest]).nonzero()[0]
            some: Any = fitting[:_SHORT]
            last = len(rest) if len(fitting) <= _SHORT else int(some[-1]) + 1
        else:
            some, last = slice(_SHORT), min(_SHORT, len(rest))
        places = rest[some]
        shortlist.places = places.tolist()
        shortlist.rates = answers.rates[places].tolist()
        shortlist.next = 0
        shortlist.read += last

    def _fits_beside(self, place: int, answers: Answers) -> bool:
        """Whether a job leaves the reservation of a provider alone however long it runs."""
        return within(answers.size, self._beside[place])

    def _compare(self, cls: int) -> _Shortlist | None:
        """Compare all providers that fit a class now; None where there is none.

        Some of the classes that come next are compared along with it.
        The more classes have been compared, the more: a comparison of many at once costs a third,
        and in a plan with few decisions each is made when it is needed.
        """
        classes = [cls]
        coming, known = self._coming, self._shortlists
        ahead = min(_CHUNK, 1 + len(known) // _AHEAD)
        while coming and len(classes) < ahead:
            upcoming = coming.pop()
            if upcoming != cls and upcoming not in known and upcoming not in self._full:
                classes.append(upcoming)
        self._write_changed()
        answers = [self._answer(each) for each in classes]
        need = np.array([each.size for each in answers], dtype=np.int64).T[:, :, None]
        fits = np.array([each.eligible for each in answers])
        fits &= _all_within(need, np.where(self._open, self._free, -1))
        score = np.array([self._costs[each] for each in classes])
        score += self._left_over_of(answers)
        score[~fits] = np.inf
        order = score.argsort(axis=1)
        counts = np.count_nonzero(fits, axis=1).tolist()
        for each, places, choices in zip(classes, order, counts, strict=True):
            if choices:
                known[each] = _Shortlist(places, choices, cheapest=self._answers[each].cheapest)
            else:
                self._full.add(each)
        return known.get(cls)

    def _left_over_of(self, answers: Sequence[Answers]) -> Floats:
        """By class and provider, free capacity as `_left_over` counts it, each a little different."""
        largest = self._providers.largest
        shares = self._free / np.array(largest)[:, None] + self._tie_break
        left: Floats = shares[[each.dominant(largest) for each in answers]]
        if self._providers.has_gpus:
            left[[not each.size[2] for each in answers]] += IDLE_GPUS * shares[2]
        return left

    def _write_changed(self) -> None:
        """Bring `_free` up to date."""
        if self._changed:
            places = list(self._changed)
            self._free[:, places] = np.array([self._left[place] for place in places]).T
            self._changed.clear()

    def _fitting(self, answers: Answers) -> Flags:
        self._write_changed()
        fits = _all_within(answers.need, self._free)
        fits &= answers.eligible
        fits &= self._open
        return fits

    def _choose_for(
        self, cls: int, shortlist: _Shortlist, ceiling: int, end: int
    ) -> tuple[int, int, int] | None:
        """The best of all providers under a job's budget and its end there."""
        answers = self._answers[cls]
        fits = self._fitting(answers)
        shortlist.cheapest = min(answers.rates[fits].tolist(), default=shortlist.cheapest)
        if shortlist.cheapest > ceiling:
            return None
        self._keep_affordable(fits, answers, ceiling)
        return self._pick(cls, answers, fits, end)

    def _choose(self, row: int, cls: int, waiting: Waiting) -> tuple[int, int, int] | None:
        """The same for a job with exclusions of its own, or without a fixed end."""
        answers = self._answer(cls)
        fits = self._fitting(answers)
        if not fits.any():
            self._full.add(cls)
            return None
        self._narrow(fits, answers, waiting)
        for provider_id, until in waiting.avoided.items():
            if until > self._now and (place := self._providers.rows.get(provider_id)) is not None:
                fits[place] = False
        wanted = conditions(waiting.uses)
        bias: Any = 0.0
        if wanted is not None and wanted.placement is not None:
            bias = self._bias(wanted.placement, waiting.job.customer)
        return self._pick(cls, answers, fits, self._ends(row, answers, waiting.job), bias)

    def _bias(self, placement: Placement, customer: str) -> Floats:
        """By provider, what a customer's other jobs there add to its cost."""
        if self._jobs_at is None:
            self._jobs_at = defaultdict(Counter)
            for job in self._held.jobs:
                place = self._providers.rows.get(job.provider_id)
                if place is not None:
                    self._jobs_at[job.customer][place] += 1
        step = _SPREAD if placement is Placement.SPREAD else -_SPREAD
        bias = np.zeros(len(self._left))
        for place, count in self._jobs_at[customer].items():
            bias[place] = step * min(count, _COUNTED)
        return bias

    def _pick(
        self, cls: int, answers: Answers, fits: Flags, end: Any, bias: Any = 0.0
    ) -> tuple[int, int, int] | None:
        if self._reservations:
            fits &= (self._reserved_at >= end) | _all_within(answers.need, self._spare)
        choices = int(np.count_nonzero(fits))
        if not choices:
            return None
        places = fits.nonzero()[0]
        score = (self._costs[cls] + bias)[places] + self._left_over(answers, places)
        best = int(places[score.argmin()])
        return best, int(answers.rates[best]), choices

    def _ends(self, row: int, answers: Answers, job: Job) -> Any:
        """By when a job has left a provider at the latest."""
        if not job.until_spent:
            return self._earliest + int(self._queue.seconds[row])
        rates = np.maximum(answers.rates, 1)
        return np.array([self._earliest + job.escrow // int(rate) for rate in rates])

    def _left_over(self, answers: Answers, places: Ints) -> Floats:
        """Free capacity in a job's dominant dimension; GPUs that it does not use count too."""
        largest = self._providers.largest
        dominant = answers.dominant(largest)
        left: Floats = self._free[dominant][places] / largest[dominant]
        if not answers.size[2] and self._providers.has_gpus:
            left += (IDLE_GPUS / largest[2]) * self._free[2][places]
        return left

    def _take(self, place: int, answers: Answers, end: int) -> None:
        left = self._left[place]
        cpus, memory, gpus = answers.size
        left[0] -= cpus
        left[1] -= memory
        left[2] -= gpus
        self._changed.add(place)
        if end > self._reserved.get(place, _NEVER):
            self._spare[:, place] -= answers.amounts
            self._beside[place] = self._spare[:, place].tolist()
        self._taken.append((place, end, cpus, memory, gpus))
        self._releases = None

    # -- reservations

    def _reserve(self, row: int, *, overdue: bool = False) -> bool:
        """Keep capacity for a job where it comes first; False if it can run nowhere.

        A job whose providers are all reserved for others holds nothing, and counts as served.
        """
        waiting = self._queue.waiting[row]
        cls = int(self._queue.cls[row])
        answers = self._answer(cls)
        eligible = answers.eligible & self._open
        self._narrow(eligible, answers, waiting)
        if not eligible.any():
            return False
        self._write_changed()
        eligible &= self._reserved_at == _NEVER
        need = answers.need
        at: Ints = np.full(len(eligible), _NEVER, dtype=np.int64)
        at[_all_within(need, self._free)] = self._now
        places, ends, given = self._sorted_releases()
        enough = _all_within(need, given).nonzero()[0]
        # Releases are in order of time at each provider: the first is what is left by a reversed
        # assignment.
        enough = enough[::-1]
        at[places[enough]] = np.minimum(ends[enough], at[places[enough]])
        for provider_id, until in waiting.avoided.items():
            if (place := self._providers.rows.get(provider_id)) is not None:
                at[place] = max(int(at[place]), until)
        at[~eligible] = _NEVER
        begin = int(at.min())
        if begin == _NEVER:
            return True
        first = (at == begin).nonzero()[0]
        best = int(first[self._costs[cls][first].argmin()])
        mine = ((places == best) & (ends <= begin)).nonzero()[0]
        free = given[:, mine[-1]] if len(mine) else self._free[:, best]
        self._spare[:, best] = free - answers.amounts
        self._beside[best] = self._spare[:, best].tolist()
        self._reserved_at[best] = self._reserved[best] = begin
        provider_id = self._providers.ids[best]
        self._reservations[provider_id] = Reservation(waiting.job.id, provider_id, begin, overdue)
        self._settled.add(row)
        return True

    def _sorted_releases(self) -> tuple[Ints, Ints, Ints]:
        """Releases by provider and time, with all that is free at a provider from then on."""
        if self._releases is None:
            places, ends, amounts = self._held.releases(self._now, self._rules.start_margin)
            if self._taken:
                taken = np.array(self._taken, dtype=np.int64).T
                places = np.concatenate([places, taken[0]])
                ends = np.concatenate([ends, taken[1]])
                amounts = np.concatenate([amounts, taken[2:]], axis=1)
            # One key sorts several times as fast as two; ends that far away are equal to a plan.
            far = np.clip(ends - self._now, 0, _FAR - 1)
            order = (places * _FAR + far).argsort()
            if len(order) and places[order[0]] < 0:
                order = order[places[order] >= 0]
            places, ends = places[order], ends[order]
            # Sums restart at each provider, from what is free there now.
            given = amounts[:, order].cumsum(axis=1)
            held = np.bincount(places, minlength=len(self._open))
            before = held.cumsum() - held
            start = np.zeros((3, len(given[0]) + 1), dtype=np.int64)
            start[:, 1:] = given
            given += (self._free - start[:, before])[:, places]
            self._releases = places, ends, given
        return self._releases


def _all_within(need: Ints, amounts: Ints) -> Flags:
    """Where there is enough of everything; written out since it is asked most often."""
    enough: Flags = amounts[0] >= need[0]
    enough &= amounts[1] >= need[1]
    enough &= amounts[2] >= need[2]
    return enough
