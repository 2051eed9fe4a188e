"""Late binding: assigns waiting jobs to providers, with aging and backfill around a reservation. Pure.

A job stays PENDING until an eligible provider has the free capacity to start it. Small jobs go
first: by area, CPUs x the seconds that the job may run; ties by age, then ID. Aging (`Rules`): a
job that has waited too long is served before all others, oldest first. The first of those that
finds no free capacity holds a reservation: a provider, and the time at which running jobs will
have released enough there at the latest. Backfill: later jobs still go to that provider if they
end before that time, or fit beside the reserved job. No job starves, because aging is finite and
nobody else takes what is reserved for the oldest job.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from deepsquare_chain.job import Job, Objective, Offer, Resources
from deepsquare_chain.metascheduler.eligibility import (
    ProviderView,
    Refusal,
    Waiting,
    affordable,
    eligible_rate,
    run_time,
    standing,
)
from deepsquare_chain.metascheduler.free_capacity import (
    Amounts,
    Release,
    amounts,
    free_room,
    less,
    release,
    room_from,
    within,
)

_NUMBER: Final = re.compile(r"[0-9]{1,15}(\.[0-9]{1,15})?")

#: Label and sign (-1: more is better) by falling weight.
_LABELS: Final[Mapping[Objective, tuple[tuple[str, int], ...]]] = {
    Objective.COST: (),
    Objective.TIME: (("compute.gflops", -1), ("cpu.speed", -1)),
    Objective.ENERGY: (("energy.watts_per_cpu", 1), ("energy.grams_per_kwh", 1)),
}


def preference(
    objective: Objective, labels: Mapping[str, str], rate: int
) -> tuple[tuple[float, ...], int]:
    """A key that sorts the preferred provider first.

    Args:
        objective: What the job's customer favours.
        labels: The provider's labels.
        rate: What the job would cost there, in credit-wei a second.
    """
    values = tuple(_measure(labels.get(key), sign) for key, sign in _LABELS[objective])
    return values, rate


def _measure(label: str | None, sign: int) -> float:
    if label is None or not _NUMBER.fullmatch(label):
        return math.inf
    return sign * float(label)


#: Free cpus are compared in millionths of the offer.
_SHARES: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Rules:
    """How the queue is served; all in seconds of chain time.

    A job is aged after waiting for `aging` plus `aging_factor` times the time it may run, and
    after `max_aging` at the latest. `start_margin` is allowed from an assignment to the start.
    """

    aging: int = 300
    aging_factor: int = 4
    max_aging: int = 86_400
    start_margin: int = 15


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The grid at one block: `now` is its chain time, `assigned` all jobs that providers hold."""

    now: int
    providers: Sequence[ProviderView]
    waiting: Sequence[Waiting]
    assigned: Sequence[Job]


@dataclass(frozen=True, slots=True)
class Decision:
    """A job to assign: `rate` in credit-wei a second, `choices` counts providers with room now."""

    waiting: Waiting
    provider_id: int
    rate: int
    aged: bool
    choices: int


@dataclass(frozen=True, slots=True)
class Reservation:
    """Room that is kept for a job: at a provider, from chain time `at`, at the latest."""

    job_id: int
    provider_id: int
    at: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What to assign now, in order; `free` is what providers have left after it."""

    decisions: tuple[Decision, ...] = ()
    reservation: Reservation | None = None
    free: Mapping[int, Offer] = field(default_factory=dict)

    def by_provider(self) -> dict[int, list[int]]:
        """Job ids by provider id, both in order of decision."""
        groups: dict[int, list[int]] = {}
        for decision in self.decisions:
            groups.setdefault(decision.provider_id, []).append(decision.waiting.job.id)
        return groups


def plan(snapshot: Snapshot, rules: Rules | None = None) -> Plan:
    """Decide about all waiting jobs.

    Equal snapshots give equal plans, whatever the order of their parts.
    """
    return _Planner(snapshot, rules or Rules()).run()


def is_aged(waiting: Waiting, now: int, rules: Rules, seconds: int) -> bool:
    """Whether a job that may run for `seconds` has waited so long that it goes first."""
    limit = min(rules.aging + rules.aging_factor * seconds, rules.max_aging)
    return now - waiting.queued_at > limit


@dataclass(slots=True)
class _Need:
    """A waiting job with what is asked of it again and again."""

    waiting: Waiting
    amounts: Amounts
    seconds: int
    area: int


class _Slot:
    """A provider that takes jobs, and its room as the plan fills it."""

    def __init__(self, view: ProviderView, free: Amounts) -> None:
        self.provider = view.provider
        self.id = view.provider.id
        self.free = free
        self.releases: list[Release] = []
        self._rates: dict[tuple[Resources, str], int | None] = {}

    def take(self, wanted: Amounts, until: int) -> None:
        self.free = less(self.free, wanted)
        self.releases.append((until, wanted))

    def rate(self, waiting: Waiting) -> int | None:
        """The job's rate here, None if it can't run here at all."""
        job = waiting.job
        if self.id in waiting.excluded:
            return None
        key = (job.resources, waiting.uses)
        if key not in self._rates:
            found = eligible_rate(self.provider, job, waiting.uses)
            self._rates[key] = None if isinstance(found, Refusal) else found
        rate = self._rates[key]
        return rate if rate is not None and affordable(job, rate) else None


class _Planner:
    def __init__(self, snapshot: Snapshot, rules: Rules) -> None:
        self._now = snapshot.now
        self._rules = rules
        free = free_room(snapshot.providers, snapshot.assigned)
        views = sorted(snapshot.providers, key=lambda view: view.provider.id)
        self._slots = {
            view.provider.id: _Slot(view, free[view.provider.id])
            for view in views
            if standing(view, snapshot.now) is None
        }
        for job in snapshot.assigned:
            if slot := self._slots.get(job.provider_id):
                slot.releases.append(release(job, snapshot.now, rules.start_margin))
        self._needs = [self._need(waiting) for waiting in snapshot.waiting]
        self._decisions: list[Decision] = []
        self._settled: set[int] = set()
        self._reservation: Reservation | None = None
        # What the reserved provider has left beside the reserved job, from that time on.
        self._spare: Amounts = (0, 0, 0)

    def run(self) -> Plan:
        if self._slots:
            self._serve_aged()
            self._serve_by_area()
        free = {slot.id: Offer(*slot.free) for slot in self._slots.values()}
        return Plan(tuple(self._decisions), self._reservation, free)

    def _need(self, waiting: Waiting) -> _Need:
        job = waiting.job
        seconds = job.time_limit
        if job.until_spent:
            # A short limit with a large escrow is a long job: the cheapest rate tells how long.
            rates = [rate for slot in self._slots.values() if (rate := slot.rate(waiting))]
            seconds = max([seconds, *(job.escrow // rate for rate in rates)])
        wanted = amounts(job.resources)
        return _Need(waiting, wanted, seconds, wanted[0] * seconds)

    def _serve_aged(self) -> None:
        """Serve aged jobs, oldest first, until one finds no free capacity: it gets the reservation."""
        aged = (
            need
            for need in self._needs
            if is_aged(need.waiting, self._now, self._rules, need.seconds)
        )
        for need in sorted(aged, key=lambda n: (n.waiting.queued_at, n.waiting.job.id)):
            if self._assign(need, aged=True):
                continue
            if self._reserve(need):
                return

    def _serve_by_area(self) -> None:
        needs = [need for need in self._needs if need.waiting.job.id not in self._settled]
        needs.sort(key=lambda n: (n.area, n.waiting.queued_at, n.waiting.job.id))
        # Nothing fits any more once less is free than the smallest job takes.
        least = [min((need.amounts[i] for need in needs), default=0) for i in range(3)]
        smallest = (least[0], least[1], least[2])
        room = self._open(smallest)
        for need in needs:
            if not room:
                return
            if self._assign(need, aged=False):
                room = self._open(smallest)

    def _open(self, wanted: Amounts) -> bool:
        return any(within(wanted, slot.free) for slot in self._slots.values())

    def _assign(self, need: _Need, *, aged: bool) -> bool:
        choices = list(self._choices(need))
        if not choices:
            return False
        _, slot, rate = min(choices, key=lambda choice: choice[0])
        end = self._end(need, rate)
        if self._blocks_reservation(slot, end):
            self._spare = less(self._spare, need.amounts)
        slot.take(need.amounts, end)
        self._settled.add(need.waiting.job.id)
        self._decisions.append(Decision(need.waiting, slot.id, rate, aged, len(choices)))
        return True

    def _choices(self, need: _Need) -> Iterator[tuple[tuple[object, ...], _Slot, int]]:
        """Providers that can start a job now, each with its sort key and the job's rate."""
        waiting = need.waiting
        for slot in self._slots.values():
            if not within(need.amounts, slot.free):
                continue
            rate = slot.rate(waiting)
            if rate is None or waiting.avoided.get(slot.id, 0) > self._now:
                continue
            blocks = self._blocks_reservation(slot, self._end(need, rate))
            if blocks and not within(need.amounts, self._spare):
                continue
            wanted, price = preference(waiting.objective, slot.provider.labels, rate)
            share = slot.free[0] * _SHARES // max(slot.provider.offer.cpus, 1)
            yield (wanted, price, -share, slot.id), slot, rate

    def _end(self, need: _Need, rate: int) -> int:
        return self._now + self._rules.start_margin + run_time(need.waiting.job, rate)

    def _blocks_reservation(self, slot: _Slot, end: int) -> bool:
        kept = self._reservation
        return kept is not None and kept.provider_id == slot.id and end > kept.at

    def _room_at(self, slot: _Slot, need: _Need) -> tuple[int, Amounts] | None:
        return room_from(need.amounts, slot.free, slot.releases, self._now)

    def _reserve(self, need: _Need) -> bool:
        """Keep room for a job where it comes first; False if it can't run anywhere."""
        best: tuple[int, tuple[object, ...], _Slot, Amounts] | None = None
        for slot in self._slots.values():
            rate = slot.rate(need.waiting)
            found = None if rate is None else self._room_at(slot, need)
            if rate is None or found is None:
                continue
            at = max(found[0], need.waiting.avoided.get(slot.id, 0))
            wanted = preference(need.waiting.objective, slot.provider.labels, rate)
            if best is None or (at, (*wanted, slot.id)) < best[:2]:
                best = at, (*wanted, slot.id), slot, found[1]
        if best is None:
            return False
        at, _, slot, free = best
        self._settled.add(need.waiting.job.id)
        self._reservation = Reservation(need.waiting.job.id, slot.id, at)
        self._spare = less(free, need.amounts)
        return True
