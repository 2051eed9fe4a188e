"""The scheduling policy: backfill with reservations, smallest job first. Pure.

Binding is late: a job stays PENDING until an eligible provider has the free capacity to start it.

**Order.** The smallest job comes first: dominant share x w, with w = max(u L, 10) / sqrt(10 h). The
dominant share is the largest of the job's shares of the grid's CPUs, memory and GPUs. L is the
job's limit in seconds. u is the expected used part of the limit and h the expected
1 / max(run time, 10 s); `history` learns both from finished runs.

**Reservations.** The first `Rules.reservations` jobs in order without free capacity hold a
reservation each: a provider, and the time by which running jobs will have released enough there.
That time is an upper bound: it follows from time limits, not from estimates. A provider has at most
one reservation. Backfill: later jobs may still use the provider if they end before that time, or
fit next to the reserved job.

**Aging.** A job that has waited longer than `Rules.overdue_after` + `Rules.overdue_factor` x its
limit is overdue and precedes all others, the largest ratio of wait to limit first. The first
overdue job without free capacity holds a reservation too. No job starves: no other job takes the
capacity reserved for the most overdue one.

**Choice.** The provider with the least w x log(cost of the work) + capacity left over, as a share
of the largest provider. The cost of the work is price / speed, 1 / speed or watts / speed, by the
objective, times the expected number of tries given the provider's recent faults. The weight w sets
how far costs must differ to outweigh a better fit (`Rules.weights`).

**Hold.** At first, a job with the objective ENERGY accepts only providers with nearly the lowest
energy for its work (`Rules.energy_hold`). Jobs with the objective TIME leave these to others.

Sources: smallest area first with a threshold: Carastan-Santos et al., CCGrid 2019; EASY
backfilling: Lifka, JSSPP 1995; dominant share: Ghodsi et al., NSDI 2011. The index of the order,
which is the weight of a job's slowdown over its expected work, is our own.
"""

from __future__ import annotations

import gc
import math
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from deepsquare_chain.job import Affinity, Job, Objective, Offer, Placement, matches
from deepsquare_chain.metascheduler.dependencies import conditions
from deepsquare_chain.metascheduler.eligibility import (
    Amounts,
    ProviderView,
    Release,
    Waiting,
    capacity_at,
    fits_from,
    highest_rate,
    less,
    within,
)
from deepsquare_chain.metascheduler.history import SHORTEST_RUN, Estimate, RunHistory
from deepsquare_chain.metascheduler.tables import (
    KEPT_CLASSES,
    LONGEST_RUN,
    AssignedTable,
    ClassOptions,
    Flags,
    Floats,
    Ints,
    ProviderTable,
    QueueTable,
)

_NEVER: Final = 2**62
#: Ends of jobs further away than this many seconds (some 35,000 years) count as equal.
_FAR_END: Final = 2**40
#: Weight of faults in the choice, in addition to that of the cost. A provider that fails half of
#: its jobs must leave 0.7 x this less capacity over, in units of the largest provider.
FAULT_WEIGHT: Final = 1.0
#: Providers on the first shortlist of a class, and on each that follows when all are used up.
_FIRST_SHORTLIST: Final = 48
_NEXT_SHORTLIST: Final = 128
#: Classes compared with all providers at once: few enough for the arrays to fit the CPU cache.
_CHUNK: Final = 32
#: Most providers for which plain Python is faster than arrays; results are the same.
_MAX_PLAIN_PROVIDERS: Final = 32
#: Number of classes compared so far per upcoming class that is compared in advance.
_PREFETCH_FACTOR: Final = 4
#: Added to the cost of a provider for an unmet preference; exceeds any difference of costs.
_PREFERRED: Final = 1e8
#: Added for each other job of a customer that spreads its jobs, and the most jobs that count.
_SPREAD: Final = 1e4
_MAX_SPREAD_JOBS: Final = 9_999
#: Weight of free GPUs in the choice for a job without GPUs. It keeps their CPUs for GPU jobs.
IDLE_GPUS: Final = 0.5


@dataclass(frozen=True, slots=True)
class Weights:
    """Weight of a difference in cost against capacity left over, by objective.

    A provider whose work costs e (2.72) times as much is preferred only if the capacity that it
    leaves over is smaller by this many times the capacity of the largest provider. By
    `leave_frugal`, jobs with the objective TIME leave the providers with the least energy per work
    to others: it is the weight of 1 / energy in their cost.
    """

    cost: float = 1_000.0
    time: float = 0.24
    energy: float = 1_000.0
    leave_frugal: float = 0.36

    def of(self, objective: Objective) -> float:
        """Return the weight of an objective."""
        return (self.cost, self.time, self.energy)[objective]


@dataclass(frozen=True, slots=True)
class Rules:
    """Scheduling rules. Times are in seconds of chain time.

    A job is overdue after waiting for `overdue_after` plus `overdue_factor` times its limit.
    `reservations` is the number of jobs without free capacity that hold a reservation,
    `overdue_reservations` that of overdue jobs. `start_margin` is the time allowed from an
    assignment to the start.

    `fair_share` delays customers who recently used more than others: a job counts as
    (1 + use) ** fair_share times as large, where use is in multiples of the mean; 0 turns it off.
    `priorities` maps a customer's address to a factor: the customer's jobs count as that many times
    smaller. Both change only the order: an overdue job still precedes all others. `max_running` is
    the most jobs that a customer may have at providers, 0 for any number.

    At first, a job with the objective ENERGY accepts only providers whose energy for the work is at
    most `frugal_within` times the lowest of all that can run it, busy ones included. This hold ends
    after `energy_hold` / h seconds, with its expected 1 / max(run time, 10 s) h: so it adds at most
    `energy_hold` to the expected slowdown. It ends after `longest_hold` seconds in any case.
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
    energy_hold: float = 2.0
    frugal_within: float = 1.25
    longest_hold: int = 3_600


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The planner's input at a block: `now` is its chain time, `assigned` all jobs at providers."""

    now: int
    providers: Sequence[ProviderView]
    waiting: Sequence[Waiting]
    assigned: Sequence[Job]


class Decision(NamedTuple):
    """A job to assign.

    Attributes:
        waiting: The job.
        provider_id: The provider that gets the job.
        rate: Credit-wei per second at that provider.
        overdue: Whether the job went first because it was overdue.
        choices: Number of providers that could start the job. It was counted when this job, or an
            earlier one of equal resources, requirements and objective, was compared with all.
    """

    waiting: Waiting
    provider_id: int
    rate: int
    overdue: bool
    choices: int


@dataclass(frozen=True, slots=True)
class Reservation:
    """Capacity of a provider that is reserved for a job, free at chain time `at` at the latest."""

    job_id: int
    provider_id: int
    at: int
    overdue: bool = False


class Ranking:
    """The order in which a plan served the queue, with its rules and the use of its customers."""

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
        """Return the place of a job in the order, from 1; None if it is not in the queue."""
        if self._places is None:
            self._places = {int(ranked_id): rank for rank, ranked_id in enumerate(self._ids, 1)}
        return self._places.get(job_id)

    def __len__(self) -> int:
        return len(self._ids)

    def estimate(self, job: Job) -> Estimate:
        """Return the estimate of a job's run time, learned from finished runs."""
        resources = job.resources
        history = RunHistory() if self._history is None else self._history
        return history.estimate(job.customer, resources.cpus, resources.gpus, job.time_limit)


@dataclass(frozen=True, slots=True)
class Plan:
    """Decisions in order, reservations by provider id, and the free capacity that is left.

    `holds` maps waiting jobs that accept frugal providers only to the chain time until which.
    """

    decisions: tuple[Decision, ...] = ()
    reservations: Mapping[int, Reservation] = field(default_factory=dict)
    holds: Mapping[int, int] = field(default_factory=dict)
    free: Mapping[int, Offer] = field(default_factory=dict)
    ranking: Ranking = field(default_factory=Ranking, compare=False)

    def by_provider(self) -> dict[int, list[int]]:
        """Return job ids by provider id, both in order of decision."""
        groups: dict[int, list[int]] = {}
        for decision in self.decisions:
            groups.setdefault(decision.provider_id, []).append(decision.waiting.job.id)
        return groups

    def reservation_of(self, job_id: int) -> Reservation | None:
        """Return the reservation of a job, or None."""
        return next((r for r in self.reservations.values() if r.job_id == job_id), None)


def plan(snapshot: Snapshot, rules: Rules | None = None, history: RunHistory | None = None) -> Plan:
    """Plan all waiting jobs of a snapshot.

    Deterministic: equal snapshots, rules and histories give equal plans, in whatever order jobs and
    providers are listed.
    """
    history = RunHistory() if history is None else history
    return Planner().plan(snapshot, rules or Rules(), history)


def is_overdue(waiting: Waiting, now: int, rules: Rules, seconds: int) -> bool:
    """Return whether a job that may run for `seconds` is overdue."""
    return now - waiting.queued_at > rules.overdue_after + rules.overdue_factor * seconds


class Planner:
    """A planner that updates its tables incrementally from one plan to the next.

    Each plan equals the result of `plan` for the same snapshot, rules and history.
    """

    def __init__(self) -> None:
        self._providers = ProviderTable()
        self._queue = QueueTable()
        self._assigned = AssignedTable()
        self._classes = _ClassTable()
        self._shares: Mapping[str, float] = {}
        self._shared: RunHistory | None = None
        self._paid = -1

    def plan(
        self, snapshot: Snapshot, rules: Rules, history: RunHistory, *, complete: bool = True
    ) -> Plan:
        """Plan all waiting jobs of a snapshot.

        Without `complete` the decisions are the same, but the plan omits what is only displayed:
        reservations that no job could violate now, and free capacity. Simulations use this.
        """
        replaced = self._providers.update(snapshot.providers, snapshot.now)
        self._assigned.update(snapshot.assigned, self._providers, replaced=replaced)
        self._queue.update(snapshot.waiting, self._providers, priced=True)
        self._queue.learn(history)
        if not self._providers.views:
            return Plan()
        self._classes.update(self._providers, self._queue, rules)
        tables = _Tables(self._providers, self._queue, self._assigned, self._classes)
        if rules.fair_share and (history is not self._shared or history.payments != self._paid):
            self._shares = history.shares()
            self._shared, self._paid = history, history.payments
        with _without_collections():
            return self._decide(tables, snapshot.now, rules, history, complete=complete)

    def _decide(
        self, tables: _Tables, now: int, rules: Rules, history: RunHistory, *, complete: bool
    ) -> Plan:
        # A separate function, so that its working set is freed before garbage collection resumes.
        return _Round(tables, now, rules, history, shares=self._shares).run(complete=complete)


@contextmanager
def _without_collections() -> Iterator[None]:
    """Suspend garbage collection: thousands of new decisions would make it traverse all jobs."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Frugal(NamedTuple):
    """Which providers, by row, a held job of a class accepts, and the lowest rate among them."""

    flags: bytes
    cheapest: int


@dataclass(slots=True)
class _ClassTable:
    """Options, and weighted costs without recent faults, by class of jobs.

    They depend on the provider records, the numbering of the classes and the weights only, and are
    kept until one of these changes. `usable`, the providers that may get jobs and are eligible, and
    `frugal` depend on the standing of the providers too.
    """

    options: dict[int, ClassOptions] = field(default_factory=dict)
    costs: dict[int, Floats] = field(default_factory=dict)
    usable: dict[int, Flags] = field(default_factory=dict)
    frugal: dict[int, _Frugal] = field(default_factory=dict)
    version: tuple[int, int, Weights] | None = None
    frugal_version: tuple[int, float] | None = None

    def update(self, providers: ProviderTable, queue: QueueTable, rules: Rules) -> None:
        """Drop what is outdated, and everything if there is too much of it."""
        version = (providers.version, queue.numbering, rules.weights)
        frugal_version = (providers.standings, rules.frugal_within)
        if self.version != version or len(self.options) > KEPT_CLASSES:
            self.options, self.costs, self.version = {}, {}, version
            self.frugal_version = None
        if self.frugal_version != frugal_version:
            self.usable, self.frugal, self.frugal_version = {}, {}, frugal_version


@dataclass(frozen=True, slots=True)
class _Tables:
    providers: ProviderTable
    queue: QueueTable
    assigned: AssignedTable
    classes: _ClassTable


@dataclass(slots=True)
class _Shortlist:
    """Providers that fit a class of jobs, best first, as of the comparison with all providers.

    `provider_rows` are the rows of the providers to try next, from index `next` on, and `rates`
    their rates. `rest` are the rows that come after these by `scores`, in any order. `choices` counts all
    providers that could start a job of the class. `cheapest` is a lower bound, in credit-wei per
    second, of the rates of those that still can. `refused` are price ceilings and latest ends of
    jobs that found no provider: in the same plan, a job that offers no more and ends no earlier
    finds none either.
    """

    choices: int
    size: tuple[int, int, int]
    provider_rows: list[int]
    rates: list[int]
    scores: Floats
    rest: Ints
    cheapest: int
    next: int = 0
    refused: list[tuple[int, int]] = field(default_factory=list)

    def refuses(self, ceiling: int, end: int) -> bool:
        """Return whether a job can find no provider, given the jobs that were refused before."""
        if self.cheapest > ceiling:
            return True
        for refused_ceiling, refused_end in self.refused:
            if ceiling <= refused_ceiling and end >= refused_end:
                return True
        return False

    def refuse(self, ceiling: int, end: int) -> None:
        """Note a job that found no provider; it replaces the notes that it implies."""
        self.refused = [
            (refused_ceiling, refused_end)
            for refused_ceiling, refused_end in self.refused
            if refused_ceiling > ceiling or refused_end < end
        ]
        self.refused.append((ceiling, end))


#: Position in the order, row, class, seconds, and the highest rate that the budget covers.
_Entry: TypeAlias = tuple[int, int, int, int, int]


class _Round:
    """The computation of one plan. A `provider_row` is the row of a provider in `ProviderTable`."""

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
        self._assigned = tables.assigned
        self._now = now
        self._rules = rules
        self._history = history
        self._shares = shares
        self._faults = self._fault_costs()
        # Number of jobs at providers by customer; counted only if `max_running` limits it.
        self._busy: Counter[str] = Counter()
        if rules.max_running:
            self._busy.update(job.customer for job in tables.assigned.jobs)
        self._earliest = now + rules.start_margin
        # Free capacity by provider, and its rows as plain Python reads and writes them fastest.
        self._free: Ints = providers.offer - tables.assigned.load
        self._free_cpus: memoryview[int] = memoryview(self._free[0])
        self._free_memory: memoryview[int] = memoryview(self._free[1])
        self._free_gpus: memoryview[int] = memoryview(self._free[2])
        self._open = providers.open
        self._decisions: list[Decision] = []
        self._settled: set[int] = set()
        # Provider's row, end and amounts of each job assigned in this plan.
        self._taken: list[tuple[int, int, int, int, int]] = []
        self._reservations: dict[int, Reservation] = {}
        # By row of a provider with a reservation: its start, and the capacity that is left next
        # to the reserved job then.
        self._reserved: dict[int, int] = {}
        self._spare: dict[int, Amounts] = {}
        # Releases of assigned jobs, with those of the first `_released` jobs in `_taken`.
        self._releases: Ints | None = None
        self._released = 0
        self._releases_by_row: list[list[Release]] | None = None
        self._is_small = len(providers.views) <= _MAX_PLAIN_PROVIDERS
        self._tie_break = providers.tie_break
        # Number of assigned jobs by customer and provider's row; built when a job first needs it.
        self._jobs_at: defaultdict[str, Counter[int]] | None = None
        # Upcoming classes, in reverse of the order in which they are first served.
        self._upcoming: list[int] = []
        self._shortlists: dict[int, _Shortlist] = {}
        # Classes that no provider has the free capacity for.
        self._full_classes: set[int] = set()
        self._tables = tables.classes
        # By row of the queue: the end of its hold; 0 for none, and for jobs that this plan starts.
        self._hold_ends: list[int] = []

    def run(self, *, complete: bool) -> Plan:
        if not (self._queue.count and self._open.any()):
            return Plan(free=self._free_offers())
        possible = self._possible()
        if not complete and not possible.any():
            return Plan()
        used, inverse = self._queue.estimates()
        order = self._order(used, inverse)
        self._hold(inverse)
        ranking = Ranking(self._queue.ids[order], self._history, self._rules, self._shares)
        self._serve_overdue()
        self._serve(order, possible, complete=complete)
        free = self._free_offers() if complete else {}
        return Plan(tuple(self._decisions), self._reservations, self._holds(), free, ranking)

    def _free_offers(self) -> dict[int, Offer]:
        """Return the free capacity of open providers, by id."""
        rows = zip(self._providers.ids, self._free.T.tolist(), self._open.tolist(), strict=True)
        return {provider_id: Offer(*free) for provider_id, free, is_open in rows if is_open}

    # -- order

    def _order(self, used: Floats, inverse: Floats) -> Ints:
        """Return the rows of the queue in the order in which they are served."""
        queue = self._queue
        n = queue.count
        totals = self._providers.totals
        share = np.maximum(queue.cpus[:n] / totals[0], queue.memory[:n] / totals[1])
        np.maximum(share, queue.gpus[:n] / totals[2], out=share)
        work = np.maximum(used * queue.seconds[:n], SHORTEST_RUN)
        index = share * work / np.sqrt(SHORTEST_RUN * inverse)
        if self._rules.fair_share or self._rules.priorities:
            index *= self._customers_factors()[queue.customer[:n]]
        order: Ints = np.lexsort((queue.ids[:n], queue.queued_at[:n], index))
        return order

    # -- holds

    def _hold(self, inverse: Floats) -> None:
        """Let jobs with the objective ENERGY that came lately accept frugal providers only."""
        queue, n = self._queue, self._queue.count
        self._hold_ends = [0] * n
        if not (self._rules.energy_hold and self._providers.has_energy):
            return
        if not queue.may_hold[:n].any():
            return
        holds = np.minimum(self._rules.energy_hold / inverse, self._rules.longest_hold)
        ends = queue.queued_at[:n] + np.ceil(holds).astype(np.int64)
        rows = (queue.may_hold[:n] & (ends > self._now)).nonzero()[0]
        if not len(rows):
            return
        cls_of = queue.cls[rows]
        # A job that can pay no frugal provider need not wait for one.
        cheapest = np.zeros(len(queue.class_keys), dtype=object)
        for cls in set(cls_of.tolist()):
            cheapest[cls] = self._frugal(cls).cheapest or _NEVER
        rows = rows[cheapest[cls_of] <= queue.ceiling[rows]]
        hold_ends: Ints = np.zeros(n, dtype=np.int64)
        hold_ends[rows] = ends[rows]
        self._hold_ends = hold_ends.tolist()

    def _frugal(self, cls: int) -> _Frugal:
        """Return which providers a held job of a class accepts."""
        frugal = self._tables.frugal.get(cls)
        if frugal is None:
            options = self._options_of(cls)
            costs = options.costs[Objective.ENERGY]
            eligible = options.eligible & self._open
            lowest = costs[eligible].min(initial=np.inf)
            eligible &= costs <= lowest + math.log(self._rules.frugal_within)
            cheapest = min(options.rates[eligible].tolist(), default=0)
            frugal = self._tables.frugal[cls] = _Frugal(eligible.tobytes(), cheapest)
        return frugal

    def _is_held(self, row: int, cls: int, provider_row: int) -> bool:
        """Return whether a hold keeps a job from a provider."""
        return bool(self._hold_ends[row]) and not self._frugal(cls).flags[provider_row]

    def _holds(self) -> dict[int, int]:
        """Return the ends of the holds of the jobs that this plan does not start, by id."""
        ends = np.array(self._hold_ends, dtype=np.int64)
        rows = ends.nonzero()[0]
        return dict(zip(self._queue.ids[rows].tolist(), ends[rows].tolist(), strict=True))

    def _customers_factors(self) -> Floats:
        """Return, by customer, the factor by which its jobs count as larger."""
        rules, shares = self._rules, self._shares
        return np.array(
            [
                (1.0 + shares.get(name, 0.0)) ** rules.fair_share / rules.priorities.get(name, 1.0)
                for name in self._queue.customers
            ]
        )

    def _fault_costs(self) -> Floats | None:
        """Return, by provider, the log of the expected number of tries; None if all are one."""
        if not self._history.has_faults:
            return None
        rates = [self._history.fault_rate(view.provider.account) for view in self._providers.views]
        return -np.log1p(-np.array(rates)) if any(rates) else None

    def _is_capped(self, row: int) -> bool:
        """Return whether a job's customer has reached `max_running`."""
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
        """Serve overdue jobs, the most overdue first, until all overdue reservations are used."""
        remaining = self._rules.overdue_reservations
        for row in self._overdue():
            if self._is_capped(row):
                continue
            cls, seconds = int(self._queue.cls[row]), int(self._queue.seconds[row])
            started = cls not in self._full_classes and self._start(row, cls, seconds, overdue=True)
            if started or not self._reserve(row, cls, overdue=True):
                continue
            remaining -= 1
            if remaining <= 0:
                return

    def _serve(self, order: Ints, possible: Flags, *, complete: bool) -> None:
        """Serve the queue in order. The first jobs without free capacity get reservations.

        Only jobs of `possible` classes can start. After the last of them, reservations affect no
        decision, and only a `complete` plan makes them.
        """
        cls_of = self._queue.cls[order]
        candidates = possible[cls_of].nonzero()[0]
        last = int(candidates[-1]) + 1 if len(candidates) else 0
        self._upcoming = list(dict.fromkeys(cls_of[candidates].tolist()))[::-1]
        self._full_classes.update((~possible).nonzero()[0].tolist())
        jobs = self._in_order(order if complete else order[:last])
        remaining, served = self._rules.reservations, 0
        while remaining > 0:
            refused = self._start_jobs(jobs, until_refused=True)
            if refused is None:
                return
            position, row, cls = refused
            served = position + 1
            if self._reserve(row, cls):
                remaining -= 1
        if served < last:
            self._backfill(order[served:last], possible)

    def _backfill(self, order: Ints, possible: Flags) -> None:
        """Start the jobs that fit without violating a reservation."""
        cls = self._queue.cls[order]
        mask = possible[cls]
        if self._reservations:
            ends = self._earliest + self._queue.seconds[order]
            mask &= ends <= self._latest_ends(cls[mask])[cls]
        self._start_jobs(self._in_order(order[mask]), until_refused=False)

    def _in_order(self, order: Ints) -> Iterator[_Entry]:
        """Return position, row, class, seconds and highest affordable rate of the jobs in rows."""
        queue = self._queue
        columns = (order, queue.cls[order], queue.seconds[order], queue.ceiling[order])
        return zip(range(len(order)), *(column.tolist() for column in columns), strict=True)

    def _start_jobs(
        self, jobs: Iterator[_Entry], *, until_refused: bool
    ) -> tuple[int, int, int] | None:
        """Start jobs in order.

        With `until_refused`, stop at the first job that can't start and return its position, row
        and class. The common case of `_start` is inlined, because a plan may start thousands of
        jobs: a job that differs from its class only by limit and budget, and a provider without
        reservation on the shortlist of its class.
        """
        full, settled, special = self._full_classes, self._settled, self._queue.special
        shortlists, reserved, hold_ends = self._shortlists, self._reserved, self._hold_ends
        free_cpus, free_memory, free_gpus = self._free_cpus, self._free_memory, self._free_gpus
        waiting, ids, earliest = self._queue.waiting, self._providers.ids, self._earliest
        decide, taken = self._decisions.append, self._taken.append
        # Takes half the time of a call of the class.
        new = tuple.__new__
        limited = bool(self._rules.max_running)
        # Classes whose frugal providers have no free capacity left.
        without_frugal: set[int] = set()
        for position, row, cls, seconds, ceiling in jobs:
            if (
                row in settled
                or (hold_ends[row] and cls in without_frugal)
                or (limited and self._is_capped(row))
            ):
                continue
            is_ordinary = not limited and self._jobs_at is None and row not in special
            shortlist = shortlists.get(cls) if is_ordinary else None
            is_refused = shortlist is not None and shortlist.refuses(ceiling, earliest + seconds)
            if shortlist is not None and not is_refused:
                cpus, memory, gpus = shortlist.size
                provider_rows, rates = shortlist.provider_rows, shortlist.rates
                index = shortlist.next
                for provider_row in provider_rows[index:]:
                    if (
                        cpus <= free_cpus[provider_row]
                        and memory <= free_memory[provider_row]
                        and gpus <= free_gpus[provider_row]
                    ):
                        break
                    # Free capacity only shrinks within a plan: it never fits again.
                    index += 1
                else:
                    provider_row = -1
                shortlist.next = first = index
                if provider_row >= 0 and rates[index] > ceiling:
                    index = self._affordable(shortlist, ceiling)
                    provider_row = provider_rows[index] if index >= 0 else -1
                if provider_row >= 0 and hold_ends[row] and self._is_held(row, cls, provider_row):
                    if index == first:
                        without_frugal.add(cls)
                    continue
                if provider_row >= 0 and provider_row not in reserved:
                    free_cpus[provider_row] -= cpus
                    free_memory[provider_row] -= memory
                    free_gpus[provider_row] -= gpus
                    taken((provider_row, earliest + seconds, cpus, memory, gpus))
                    hold_ends[row] = 0
                    provider_id, rate = ids[provider_row], rates[index]
                    chosen = (waiting[row], provider_id, rate, False, shortlist.choices)
                    decide(new(Decision, chosen))
                    continue
            is_refused = is_refused or cls in full or not self._start(row, cls, seconds)
            if is_refused and until_refused:
                return position, row, cls
        return None

    def _affordable(self, shortlist: _Shortlist, ceiling: int) -> int:
        """Return the index of the best provider that fits and costs at most `ceiling`, or -1."""
        cpus, memory, gpus = shortlist.size
        provider_rows, rates = shortlist.provider_rows, shortlist.rates
        for index in range(shortlist.next, len(provider_rows)):
            provider_row = provider_rows[index]
            if (
                rates[index] <= ceiling
                and cpus <= self._free_cpus[provider_row]
                and memory <= self._free_memory[provider_row]
                and gpus <= self._free_gpus[provider_row]
            ):
                return index
        return -1

    def _possible(self) -> Flags:
        """Return, of the classes with jobs, those for which some provider has free capacity."""
        queue = self._queue
        fits = np.zeros(len(queue.sizes), dtype=np.bool_)
        free = np.where(self._open, self._free, -1)
        if self._is_small:
            amounts = list(set(zip(*free.tolist(), strict=True)))
            most_cpus = max(cpus for cpus, _, _ in amounts)
            for number, size in queue.live_sizes().items():
                if size[0] <= most_cpus:
                    fits[number] = any(within(size, available) for available in amounts)
        else:
            for chunk, need in self._in_chunks(np.array([*queue.live_sizes()], dtype=np.int64)):
                fits[chunk] = _all_within(need, free).any(axis=1)
        possible: Flags = fits[queue.class_sizes]
        return possible

    def _latest_ends(self, classes: Ints) -> Ints:
        """Return, by class, the latest end that reservations allow at any provider; 0 for none."""
        class_sizes = self._queue.class_sizes
        latest = np.zeros(len(self._queue.sizes), dtype=np.int64)
        requested = np.zeros(len(latest), dtype=np.bool_)
        requested[class_sizes[classes]] = True
        provider_rows = list(self._reserved)
        reserved_at = np.array(list(self._reserved.values()), dtype=np.int64)
        spare = np.array([self._spare[row] for row in provider_rows], dtype=np.int64).T
        free = np.where(self._open, self._free, -1)
        for chunk, need in self._in_chunks(requested.nonzero()[0]):
            fits = _all_within(need, free)
            ends = np.where(_all_within(need, spare), _NEVER, reserved_at)
            ends[~fits[:, provider_rows]] = 0
            latest[chunk] = ends.max(axis=1)
            fits[:, provider_rows] = False
            latest[chunk[fits.any(axis=1)]] = _NEVER
        by_class: Ints = latest[class_sizes]
        return by_class

    def _in_chunks(self, numbers: Ints) -> Iterator[tuple[Ints, Ints]]:
        """Yield chunks of sizes by number, shaped for comparison with all providers."""
        sizes = self._queue.sizes[numbers]
        for first in range(0, len(numbers), _CHUNK):
            yield numbers[first : first + _CHUNK], sizes[first : first + _CHUNK].T[:, :, None]

    def _options_of(self, cls: int) -> ClassOptions:
        options = self._tables.options.get(cls)
        if options is None:
            resources, uses, objective = self._queue.class_keys[cls]
            options = self._tables.options[cls] = self._providers.options(resources, uses)
            weights = self._rules.weights
            costs = weights.of(objective) * options.costs[objective]
            if objective is Objective.TIME:
                costs -= weights.leave_frugal * self._providers.log_energy
            job_conditions = conditions(uses)
            if job_conditions is not None and job_conditions.preferences:
                costs += self._unpreferred(job_conditions.preferences)
            self._tables.costs[cls] = costs
        return options

    def _costs_of(self, classes: Sequence[int]) -> Floats:
        """Return weighted costs by class and provider, with those of recent faults."""
        costs = np.array([self._tables.costs[cls] for cls in classes])
        if self._faults is not None:
            objectives = (self._queue.class_keys[cls][2] for cls in classes)
            weights = [self._rules.weights.of(objective) + FAULT_WEIGHT for objective in objectives]
            costs += np.array(weights)[:, None] * self._faults
        return costs

    def _costs_of_one(self, cls: int) -> Floats:
        """Return weighted costs by provider for a class; the result must not be changed."""
        return self._tables.costs[cls] if self._faults is None else self._costs_of([cls])[0]

    def _unpreferred(self, preferences: Sequence[Affinity]) -> Floats:
        """Return, by provider, the cost added for unmet preferences.

        Each preference outweighs all later ones together, and any difference of costs.
        """
        costs = [_PREFERRED * 2.0**rank for rank in reversed(range(len(preferences)))]
        priced = list(zip(preferences, costs, strict=True))
        labels = [view.provider.labels for view in self._providers.views]
        return np.array([sum(cost for p, cost in priced if not matches([p], of)) for of in labels])

    def _usable(self, cls: int) -> Flags:
        """Return the providers that could run a class if they were empty; must not be changed."""
        usable = self._tables.usable.get(cls)
        if usable is None:
            usable = self._tables.usable[cls] = self._options_of(cls).eligible & self._open
        return usable

    def _narrow(self, eligible: Flags, options: ClassOptions, waiting: Waiting) -> None:
        """Clear providers in `eligible` that the job's budget, exclusions or patience rule out."""
        self._keep_affordable(eligible, options, waiting.job)
        rows = self._providers.rows
        eligible[[rows[i] for i in waiting.excluded if i in rows]] = False
        job_conditions = conditions(waiting.uses)
        if job_conditions is not None and job_conditions.patience:
            costs = options.costs[waiting.objective]
            possible = options.eligible & self._open
            self._keep_affordable(possible, options, waiting.job)
            lowest = costs[possible].min(initial=np.inf)
            accepted = job_conditions.accepted_cost(max(0, self._now - waiting.queued_at))
            eligible &= costs <= lowest + math.log(accepted)

    @staticmethod
    def _keep_affordable(eligible: Flags, options: ClassOptions, job: Job) -> None:
        ceiling = highest_rate(job)
        if options.dearest > ceiling:
            # Rates wider than 64 bits are an object array. Otherwise a ceiling wider than 64 bits
            # never gets here.
            eligible &= options.rates <= ceiling

    def _start(self, row: int, cls: int, seconds: int, *, overdue: bool = False) -> bool:
        """Assign a job if a provider can start it now, unless it holds. Return whether one can."""
        waiting = self._queue.waiting[row]
        special = row in self._queue.special
        if special:
            choice = self._choose(row, cls, waiting)
        else:
            choice = self._choose_again(cls, waiting.job, self._earliest + seconds)
        if choice is None:
            return False
        provider_row, rate, choices = choice
        if not overdue and self._is_held(row, cls, provider_row):
            return True
        if special and waiting.job.until_spent:
            seconds = min(waiting.job.escrow // rate, LONGEST_RUN)
        self._take(provider_row, self._options_of(cls), self._earliest + seconds)
        self._settled.add(row)
        self._hold_ends[row] = 0
        if self._jobs_at is not None:
            self._jobs_at[waiting.job.customer][provider_row] += 1
        if self._rules.max_running:
            self._busy[waiting.job.customer] += 1
        self._decisions.append(
            Decision(waiting, self._providers.ids[provider_row], rate, overdue, choices)
        )
        return True

    def _choose_again(self, cls: int, job: Job, end: int) -> tuple[int, int, int] | None:
        """Return the best provider for a job that differs from its class only by limit and budget.

        The result is the provider's row, its rate and the number of choices; None if there is none.
        """
        shortlist = self._shortlists.get(cls) or self._compare(cls)
        ceiling = highest_rate(job)
        if shortlist is None or shortlist.refuses(ceiling, end):
            return None
        options = self._options_of(cls)
        choice = self._first(shortlist, options, ceiling, end)
        while choice is None and shortlist.next >= len(shortlist.provider_rows):
            self._refill(shortlist, options)
            if not shortlist.provider_rows:
                self._full_classes.add(cls)
                return None
            choice = self._first(shortlist, options, ceiling, end)
        if choice is None:
            if len(shortlist.rest):
                choice = self._choose_for(cls, shortlist, ceiling, end)
            if choice is None:
                shortlist.refuse(ceiling, end)
        return choice

    def _first(
        self, shortlist: _Shortlist, options: ClassOptions, ceiling: int, end: int
    ) -> tuple[int, int, int] | None:
        """Return the first provider of a shortlist that can start a job; see `_choose_again`."""
        cpus, memory, gpus = options.size
        free_cpus, free_memory, free_gpus = self._free_cpus, self._free_memory, self._free_gpus
        provider_rows, rates, reserved = shortlist.provider_rows, shortlist.rates, self._reserved
        for index in range(shortlist.next, len(provider_rows)):
            provider_row = provider_rows[index]
            if (
                cpus > free_cpus[provider_row]
                or memory > free_memory[provider_row]
                or gpus > free_gpus[provider_row]
            ):
                # Free capacity only shrinks within a plan: this provider never fits again.
                if index == shortlist.next:
                    shortlist.next += 1
            elif rates[index] <= ceiling and (
                provider_row not in reserved
                or self._respects_reservation(provider_row, options, end)
            ):
                return provider_row, rates[index], shortlist.choices
        return None

    def _refill(self, shortlist: _Shortlist, options: ClassOptions) -> None:
        """Refill a shortlist with the next providers in order that still fit."""
        rest = shortlist.rest
        rest = rest[self._fitting(options)[rest]]
        provider_rows, shortlist.rest = _lowest(shortlist.scores, rest, _NEXT_SHORTLIST)
        shortlist.provider_rows = provider_rows.tolist()
        shortlist.rates = options.rates[provider_rows].tolist()
        shortlist.next = 0

    def _respects_reservation(self, provider_row: int, options: ClassOptions, end: int) -> bool:
        """Return whether a job leaves the reserved job of a provider its capacity."""
        return end <= self._reserved[provider_row] or within(
            options.size, self._spare[provider_row]
        )

    def _compare(self, cls: int) -> _Shortlist | None:
        """Compare all providers that fit a class now; return None if there is none.

        Some upcoming classes are compared in the same pass, more of them the more classes have been
        compared. A comparison of many classes at once costs a third per class, while a plan with
        few decisions compares only the classes that it needs.
        """
        classes = [cls]
        if self._is_small:
            return self._compare_few(cls)
        coming, known = self._upcoming, self._shortlists
        ahead = min(_CHUNK, 1 + len(known) // _PREFETCH_FACTOR)
        while coming and len(classes) < ahead:
            upcoming = coming.pop()
            if upcoming != cls and upcoming not in known and upcoming not in self._full_classes:
                classes.append(upcoming)
        options = [self._options_of(job_class) for job_class in classes]
        need = np.array([of.size for of in options], dtype=np.int64).T[:, :, None]
        fits = np.array([class_options.eligible for class_options in options])
        fits &= _all_within(need, np.where(self._open, self._free, -1))
        scores = self._costs_of(classes)
        scores += self._left_over_of(options)
        for upcoming, class_options, class_fits, class_scores in zip(
            classes, options, fits, scores, strict=True
        ):
            provider_rows = class_fits.nonzero()[0]
            if not len(provider_rows):
                self._full_classes.add(upcoming)
                continue
            first, rest = _lowest(class_scores, provider_rows, _FIRST_SHORTLIST)
            rates = class_options.rates[first].tolist()
            size, cheapest = class_options.size, class_options.cheapest
            known[upcoming] = _Shortlist(
                len(provider_rows), size, first.tolist(), rates, class_scores, rest, cheapest
            )
        return known.get(cls)

    def _compare_few(self, cls: int) -> _Shortlist | None:
        """Compare all providers of a small grid that fit a class now; like `_compare`."""
        options = self._options_of(cls)
        cpus, memory, gpus = size = options.size
        largest = self._providers.largest
        dominant = options.dominant(largest)
        idle_gpus = IDLE_GPUS if not gpus and self._providers.has_gpus else 0.0
        costs, tie_breaks = self._costs_of_one(cls).tolist(), self._tie_break.tolist()
        scored = []
        for provider_row in self._usable(cls).nonzero()[0].tolist():
            free = (
                self._free_cpus[provider_row],
                self._free_memory[provider_row],
                self._free_gpus[provider_row],
            )
            if cpus <= free[0] and memory <= free[1] and gpus <= free[2]:
                tie_break = tie_breaks[provider_row]
                score = costs[provider_row] + (free[dominant] / largest[dominant] + tie_break)
                if idle_gpus:
                    score += idle_gpus * (free[2] / largest[2] + tie_break)
                scored.append((score, provider_row))
        if not scored:
            self._full_classes.add(cls)
            return None
        provider_rows = [provider_row for _, provider_row in sorted(scored)]
        rates = options.rates[provider_rows].tolist()
        shortlist = self._shortlists[cls] = _Shortlist(
            len(provider_rows), size, provider_rows, rates, _NO_SCORES, _NO_ROWS, options.cheapest
        )
        return shortlist

    def _left_over_of(self, options: Sequence[ClassOptions]) -> Floats:
        """Return free capacity by class and provider, as `_left_over` does, with ties broken."""
        largest = self._providers.largest
        shares = self._free / np.array(largest)[:, None] + self._tie_break
        rows = [class_options.dominant(largest) for class_options in options]
        if self._providers.has_gpus:
            shares = np.concatenate([shares, shares + IDLE_GPUS * shares[2]])
            rows = [row if of.size[2] else row + 3 for row, of in zip(rows, options, strict=True)]
        left_over: Floats = shares[rows]
        return left_over

    def _fitting(self, options: ClassOptions) -> Flags:
        fits = _all_within(options.need, self._free)
        fits &= options.eligible
        fits &= self._open
        return fits

    def _choose_for(
        self, cls: int, shortlist: _Shortlist, ceiling: int, end: int
    ) -> tuple[int, int, int] | None:
        """Return the best of all providers for a job's budget and latest end, or None."""
        options = self._options_of(cls)
        fits = self._fitting(options)
        provider_rows = fits.nonzero()[0]
        rates = options.rates[provider_rows]
        if len(provider_rows):
            shortlist.cheapest = int(rates.min())
        if shortlist.cheapest > ceiling:
            return None
        if options.dearest > ceiling:
            provider_rows = provider_rows[rates <= ceiling]
        return self._pick(cls, options, provider_rows, end)

    def _choose(self, row: int, cls: int, waiting: Waiting) -> tuple[int, int, int] | None:
        """Return the best provider for a job with its own exclusions or without a fixed end."""
        options = self._options_of(cls)
        fits = self._fitting(options)
        if not fits.any():
            self._full_classes.add(cls)
            return None
        self._narrow(fits, options, waiting)
        avoided = self._avoided_rows(waiting)
        fits[[provider_row for provider_row, until in avoided.items() if until > self._now]] = False
        job_conditions = conditions(waiting.uses)
        bias: Any = 0.0
        if job_conditions is not None and job_conditions.placement is not None:
            bias = self._bias(job_conditions.placement, waiting.job.customer)
        ends = self._ends(row, options, waiting.job)
        return self._pick(cls, options, fits.nonzero()[0], ends, bias)

    def _bias(self, placement: Placement, customer: str) -> Floats:
        """Return, by provider, the cost added for the customer's other jobs there."""
        if self._jobs_at is None:
            self._jobs_at = defaultdict(Counter)
            for job in self._assigned.jobs:
                provider_row = self._providers.rows.get(job.provider_id)
                if provider_row is not None:
                    self._jobs_at[job.customer][provider_row] += 1
            for decision in self._decisions:
                provider_row = self._providers.rows[decision.provider_id]
                self._jobs_at[decision.waiting.job.customer][provider_row] += 1
        step = _SPREAD if placement is Placement.SPREAD else -_SPREAD
        bias = np.zeros(len(self._providers.views))
        for provider_row, count in self._jobs_at[customer].items():
            bias[provider_row] = step * min(count, _MAX_SPREAD_JOBS)
        return bias

    def _pick(
        self, cls: int, options: ClassOptions, provider_rows: Ints, end: Any, bias: Any = 0.0
    ) -> tuple[int, int, int] | None:
        """Return the best of some providers for a job that leaves reserved jobs their capacity."""
        for provider_row in self._reserved:
            own_end = end[provider_row] if isinstance(end, np.ndarray) else end
            if not self._respects_reservation(provider_row, options, own_end):
                provider_rows = provider_rows[provider_rows != provider_row]
        if not len(provider_rows):
            return None
        score = (self._costs_of_one(cls) + bias)[provider_rows]
        score += self._left_over(options, provider_rows)
        best = int(provider_rows[score.argmin()])
        return best, int(options.rates[best]), len(provider_rows)

    def _ends(self, row: int, options: ClassOptions, job: Job) -> Any:
        """Return the latest end of a job; an array by provider if the job runs until spent."""
        if not job.until_spent:
            return self._earliest + int(self._queue.seconds[row])
        lengths = [min(job.escrow // max(int(rate), 1), LONGEST_RUN) for rate in options.rates]
        return np.array([self._earliest + length for length in lengths])

    def _left_over(self, options: ClassOptions, provider_rows: Ints) -> Floats:
        """Return free capacity in a job's dominant dimension, plus weighted GPUs if unused."""
        largest = self._providers.largest
        dominant = options.dominant(largest)
        left: Floats = self._free[dominant][provider_rows] / largest[dominant]
        if not options.size[2] and self._providers.has_gpus:
            left += (IDLE_GPUS / largest[2]) * self._free[2][provider_rows]
        return left

    def _take(self, provider_row: int, options: ClassOptions, end: int) -> None:
        cpus, memory, gpus = options.size
        self._free_cpus[provider_row] -= cpus
        self._free_memory[provider_row] -= memory
        self._free_gpus[provider_row] -= gpus
        if end > self._reserved.get(provider_row, _NEVER):
            self._spare[provider_row] = less(self._spare[provider_row], options.size)
        self._taken.append((provider_row, end, cpus, memory, gpus))

    # -- reservations

    def _reserve(self, row: int, cls: int, *, overdue: bool = False) -> bool:
        """Reserve the capacity that frees earliest for a job; return False if it can run nowhere.

        A job whose providers all have a reservation already holds none, and counts as served.
        """
        usable = self._usable(cls)
        if not usable.any():
            return False
        waiting, options, eligible = self._queue.waiting[row], self._options_of(cls), usable.copy()
        self._narrow(eligible, options, waiting)
        if not eligible.any():
            return False
        eligible[list(self._reserved)] = False
        reserve = self._reserve_few if self._is_small else self._reserve_any
        reserved = reserve(eligible, waiting, cls)
        if reserved is None:
            return True
        best, start, free = reserved
        self._spare[best] = less(free, options.size)
        self._reserved[best] = start
        provider_id = self._providers.ids[best]
        self._reservations[provider_id] = Reservation(waiting.job.id, provider_id, start, overdue)
        self._settled.add(row)
        return True

    def _reserve_any(
        self, eligible: Flags, waiting: Waiting, cls: int
    ) -> tuple[int, int, Sequence[int]] | None:
        """Return the row of the provider that fits a job earliest, when, and what is free then."""
        need = self._options_of(cls).need
        starts: Ints = np.full(len(eligible), _NEVER, dtype=np.int64)
        starts[_all_within(need, self._free)] = self._now
        provider_rows, ends, free_after = self._sorted_releases()
        enough = _all_within(need, free_after).nonzero()[0]
        # Releases are in order of time at each provider. Assigned in reverse, the earliest wins.
        enough = enough[::-1]
        starts[provider_rows[enough]] = np.minimum(ends[enough], starts[provider_rows[enough]])
        for provider_row, until in self._avoided_rows(waiting).items():
            starts[provider_row] = max(int(starts[provider_row]), until)
        starts[~eligible] = _NEVER
        start = int(starts.min())
        if start == _NEVER:
            return None
        earliest = (starts == start).nonzero()[0]
        best = int(earliest[self._costs_of_one(cls)[earliest].argmin()])
        own_releases = ((provider_rows == best) & (ends <= start)).nonzero()[0]
        free = free_after[:, own_releases[-1]] if len(own_releases) else self._free[:, best]
        return best, start, free.tolist()

    def _reserve_few(
        self, eligible: Flags, waiting: Waiting, cls: int
    ) -> tuple[int, int, Sequence[int]] | None:
        """Do what `_reserve_any` does, for few providers."""
        size = self._options_of(cls).size
        avoided = self._avoided_rows(waiting)
        costs = self._costs_of_one(cls).tolist()
        free_now, releases = self._free.T.tolist(), self._releases_by_provider()
        candidates = []
        for provider_row in eligible.nonzero()[0].tolist():
            fitting = fits_from(size, free_now[provider_row], releases[provider_row], self._now)
            if fitting is not None:
                start, free = fitting
                until = avoided.get(provider_row, 0)
                if until > start:
                    start = until
                    free = capacity_at(free_now[provider_row], releases[provider_row], until)
                candidates.append((start, costs[provider_row], provider_row, free))
        if not candidates:
            return None
        start, _, best, free = min(candidates)
        return best, start, free

    def _avoided_rows(self, waiting: Waiting) -> dict[int, int]:
        """Return the rows of providers that a job avoids, with the chain time until which."""
        rows = self._providers.rows
        return {rows[i]: until for i, until in waiting.avoided.items() if i in rows}

    def _new_releases(self) -> list[tuple[int, int, int, int, int]]:
        """Return the releases of jobs assigned since the last call."""
        new = self._taken[self._released :]
        self._released = len(self._taken)
        return new

    def _releases_by_provider(self) -> list[list[Release]]:
        """Return the releases of each provider, sorted by time, for few providers."""
        if self._releases_by_row is None:
            self._releases_by_row = [[] for _ in self._providers.views]
            columns = self._assigned.releases(self._now, self._rules.start_margin)
            provider_rows, ends, amounts = (column.tolist() for column in columns)
            sizes = zip(*amounts, strict=True)
            for provider_row, end, size in zip(provider_rows, ends, sizes, strict=True):
                if provider_row >= 0:
                    self._releases_by_row[provider_row].append((end, size))
            for releases in self._releases_by_row:
                releases.sort()
        for provider_row, end, cpus, memory, gpus in self._new_releases():
            insort(self._releases_by_row[provider_row], (end, (cpus, memory, gpus)))
        return self._releases_by_row

    def _sorted_releases(self) -> tuple[Ints, Ints, Ints]:
        """Return releases by provider and time, with the provider's free capacity from then on."""
        if self._releases is None:
            columns = self._assigned.releases(self._now, self._rules.start_margin)
            provider_rows, ends, amounts = columns
            known = provider_rows >= 0
            self._releases = np.stack([provider_rows, ends, *amounts])[:, known]
        new = self._new_releases()
        if new or not self._released:
            added = np.array(new, dtype=np.int64).reshape(-1, 5).T
            releases = np.concatenate([self._releases, added], axis=1)
            # Sorting by one combined key is several times as fast as by two, and a stable sort is
            # fast if only the new ones are out of order. Ends beyond `_FAR_END` count as equal.
            delays = np.clip(releases[1] - self._now, 0, _FAR_END - 1)
            order = (releases[0] * _FAR_END + delays).argsort(kind="stable")
            self._releases = releases[:, order]
        provider_rows, ends = self._releases[0], self._releases[1]
        # Cumulative sums restart at each provider, from its free capacity now.
        free_after = self._releases[2:].cumsum(axis=1)
        counts = np.bincount(provider_rows, minlength=len(self._open))
        before = counts.cumsum() - counts
        start = np.zeros((3, len(provider_rows) + 1), dtype=np.int64)
        start[:, 1:] = free_after
        free_after += (self._free - start[:, before])[:, provider_rows]
        return provider_rows, ends, free_after


_NO_SCORES: Final[Floats] = np.zeros(0)
_NO_ROWS: Final[Ints] = np.zeros(0, dtype=np.int64)


def _lowest(scores: Floats, provider_rows: Ints, count: int) -> tuple[Ints, Ints]:
    """Return the `count` rows with the lowest scores in order, and the others in any order."""
    if len(provider_rows) > count:
        parts = scores[provider_rows].argpartition(count)
        provider_rows, rest = provider_rows[parts[:count]], provider_rows[parts[count:]]
    else:
        rest = _NO_ROWS
    return provider_rows[scores[provider_rows].argsort()], rest


def _all_within(need: Ints, amounts: Ints) -> Flags:
    """Return where all three amounts suffice; unrolled because it is the hottest comparison."""
    enough: Flags = amounts[0] >= need[0]
    enough &= amounts[1] >= need[1]
    enough &= amounts[2] >= need[2]
    return enough
