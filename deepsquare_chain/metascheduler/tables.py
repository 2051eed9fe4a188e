"""Providers, the queue and assigned jobs as arrays, for the planner. Pure.

The tables persist between plans and are updated incrementally. The updates do not affect results:
tables that are built from scratch give the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, Final, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from deepsquare_chain.job import HOUR, Job, JobStatus, Objective, Resources, matches
from deepsquare_chain.metascheduler.dependencies import conditions
from deepsquare_chain.metascheduler.eligibility import (
    MAX_RATE,
    ProviderView,
    Waiting,
    demands,
    highest_rate,
    run_time,
    standing,
)
from deepsquare_chain.metascheduler.history import (
    NO_SUMS,
    PRIOR_OF_ALL,
    PRIOR_OF_CUSTOMER,
    PRIOR_OF_KIND,
    SHORTEST_RUN,
    Key,
    RunHistory,
    keys_of,
)
from deepsquare_chain.metascheduler.provider_labels import (
    changes_daily,
    energy_costs,
    relative_speeds,
    watts_of,
)

Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]
Flags: TypeAlias = npt.NDArray[np.bool_]
T = TypeVar("T")

#: Larger amounts are kept as Python integers: slower, but exact as well.
_WIDE: Final = 2**62
_FOREVER: Final = 2**62
#: Runs of more seconds (some 36 billion years) count as this long, so that ends fit 64 bits.
LONGEST_RUN: Final = 2**60
#: Classes of jobs for which `ClassOptions` are cached.
KEPT_CLASSES: Final = 2_000
_START: Final = 64
#: Largest amount that the index of a provider adds to its score. It breaks ties.
TIE_BREAK: Final = 1e-4
_MAX_ENERGY_FACTOR: Final = 2.0


def _exact(values: Sequence[int]) -> Any:
    """Return integers as an array: of objects if any is too wide for 64 bits."""
    wide = max(map(abs, values), default=0) >= _WIDE
    return np.array(values, dtype=object if wide else np.int64)


class ClassOptions:
    """Eligibility, rates and costs of all providers for a class of jobs.

    The jobs of a class have equal resources and requirements.

    Attributes:
        need, amounts, size: CPUs, MB and GPUs of a job: as a column, as a row, and as numbers.
        eligible: Whether hardware, offer, labels and prices allow the class, regardless of load.
        rates: Credit-wei per second at each provider; exact.
        costs: By objective, the logarithm of the cost of the work at each provider.
    """

    __slots__ = (
        *("amounts", "cheapest", "costs", "dearest", "eligible", "need", "rates", "size"),
        "_dominant",
    )

    def __init__(self, need: Ints, eligible: Flags, rates: Any, costs: Sequence[Floats]) -> None:
        self.need = need
        self.amounts = need[:, 0]
        self.size: tuple[int, int, int] = tuple(self.amounts.tolist())
        self.eligible = eligible
        self.rates = rates
        self.costs = costs
        eligible_rates = rates[eligible].tolist()
        self.cheapest: int = min(eligible_rates, default=0)
        self.dearest: int = max(eligible_rates, default=0)
        self._dominant: int | None = None

    def dominant(self, largest: Sequence[float]) -> int:
        """Return the dimension in which a job takes the largest share of the largest provider."""
        if self._dominant is None:
            shares = [amount / most for amount, most in zip(self.size, largest, strict=True)]
            self._dominant = shares.index(max(shares))
        return self._dominant


class ProviderTable:
    """Providers by ascending id, with amounts in rows of CPUs, MB and GPUs."""

    def __init__(self) -> None:
        self.views: list[ProviderView] = []
        #: A number that grows with each change of a provider record or of carbon by hour.
        self.version = 0
        #: A number that grows when the standing of a provider changes.
        self.standings = 0
        self._last_views: Sequence[ProviderView] | None = None
        self._stands: tuple[int, int] = (0, -1)
        self.rows: dict[int, int] = {}
        self.open: Flags = np.zeros(0, dtype=np.bool_)
        self._options: dict[tuple[Resources, str], ClassOptions] = {}
        # Whether carbon depends on the time of day, and the hour for which costs were computed.
        self._changes_daily = False
        self._hour = 0

    def update(self, views: Sequence[ProviderView], now: int) -> bool:
        """Update from the providers of a snapshot; return whether any provider record changed."""
        changed = False
        if views is not self._last_views:
            ordered = sorted(views, key=lambda view: view.provider.id)
            changed = [v.provider for v in ordered] != [v.provider for v in self.views]
            self.views, self._last_views = ordered, views
            if changed:
                self._rebuild(now)
            self._stands = (0, -1)
        if self._changes_daily and self._hour != now // HOUR:
            self._rebuild(now)
        if not self._stands[0] <= now <= self._stands[1]:
            self._update_eligible(now)
        return changed

    def _update_eligible(self, now: int) -> None:
        is_open = np.array([standing(v, now) is None for v in self.views], dtype=np.bool_)
        if not np.array_equal(is_open, self.open):
            self.open = is_open
            self.standings += 1
        expiries = [
            expiry - 1
            for v in self.views
            for expiry in (v.provider.approved_until, v.suspended_until, v.cooldown_until)
            if expiry > now
        ]
        # Valid until the next approval, suspension or cooldown ends.
        self._stands = (now, min(expiries, default=_FOREVER))

    def _rebuild(self, now: int) -> None:
        self.version += 1
        providers = [view.provider for view in self.views]
        self.ids = [provider.id for provider in providers]
        self.rows = {provider_id: row for row, provider_id in enumerate(self.ids)}
        offers = [(p.offer.cpus, p.offer.memory, p.offer.gpus) for p in providers]
        self.offer: Ints = np.array(offers, dtype=np.int64).reshape(-1, 3).T.copy()
        #: Added to scores by provider's row, so that every machine sorts providers alike.
        self.tie_break: Floats = np.arange(len(providers), dtype=np.float64)
        self.tie_break *= TIE_BREAK / max(1, len(providers))
        self.largest = [float(max(values.tolist(), default=0)) or 1.0 for values in self.offer]
        self.has_gpus = bool(self.offer[2].any())
        self.totals = [float(values.sum()) or 1.0 for values in self.offer]
        nodes = [
            (h.nodes, h.cpus_per_node, h.mem_per_node) for h in (p.hardware for p in providers)
        ]
        columns = np.array(nodes, dtype=np.int64).reshape(-1, 3).T.copy()
        self._nodes, self._cpus_per_node, self._mem_per_node = columns
        self._cpu = _exact([p.prices.cpu for p in providers])
        self._gpu = _exact([p.prices.gpu for p in providers])
        self._mem = _exact([p.prices.mem for p in providers])
        prices = (self._cpu, self._gpu, self._mem)
        self._dearest = [max(map(int, values), default=0) for values in prices]
        labels = [provider.labels for provider in providers]
        self.speeds = relative_speeds(labels)
        self._log_speeds: Floats = np.array([math.log(speed) for speed in self.speeds])
        self._changes_daily = any(map(changes_daily, labels))
        self._hour = now // HOUR
        self._energy: Floats = np.array(energy_costs(labels, self.speeds, now))
        self.has_energy = bool(self._energy.any())
        self.log_energy = _log_energy(self._energy, [watts_of(of) is not None for of in labels])
        self._labelled: dict[str, Flags] = {}
        self._options.clear()

    def options(self, resources: Resources, uses: str) -> ClassOptions:
        """Return the `ClassOptions` for a class of jobs, cached."""
        key = (resources, uses)
        options = self._options.get(key)
        if options is None:
            if len(self._options) >= KEPT_CLASSES:
                del self._options[next(iter(self._options))]
            options = self._options[key] = self._compute_options(resources, uses)
        return options

    def _compute_options(self, resources: Resources, uses: str) -> ClassOptions:
        need = np.array([[resources.cpus], [resources.memory], [resources.gpus]], dtype=np.int64)
        rates = self._rates(resources)
        eligible = self._fitting(resources, need) & self._with_labels(uses)
        eligible &= (rates > 0) & (rates <= MAX_RATE) if rates.dtype == object else rates > 0
        log_rates = np.log(np.maximum(rates, 1).astype(np.float64))
        price = log_rates - self._log_speeds
        # A millionth of the price breaks ties.
        energy = self._energy + 1e-6 * price if self.has_energy else price
        costs = [price, -self._log_speeds + 1e-6 * price, energy]
        return ClassOptions(need, eligible, rates, costs)

    def _rates(self, resources: Resources) -> Any:
        amounts = (resources.cpus, resources.gpus, resources.memory)
        most = sum(a * price for a, price in zip(amounts, self._dearest, strict=True))
        prices = (self._cpu, self._gpu, self._mem)
        if most >= _WIDE:
            prices = tuple(values.astype(object) for values in prices)
        cpu, gpu, mem = prices
        return amounts[0] * cpu + amounts[1] * gpu + amounts[2] * mem

    def _fitting(self, resources: Resources, need: Ints) -> Flags:
        """Return `credits.fits` for all providers."""
        per_task, memory = resources.cpus_per_task, resources.cpus_per_task * resources.mem_per_cpu
        if per_task < 1 or memory < 1:
            return np.zeros(len(self.views), dtype=np.bool_)
        by_node = np.minimum(self._cpus_per_node // per_task, self._mem_per_node // memory)
        is_offered = (self.offer >= need).all(axis=0)
        fitting: Flags = (resources.tasks <= self._nodes * by_node) & is_offered
        return fitting

    def _with_labels(self, uses: str) -> Flags:
        matching = self._labelled.get(uses)
        if matching is None:
            affinities = demands(uses)
            matching = np.zeros(len(self.views), dtype=np.bool_)
            if affinities is not None:
                matching[:] = [matches(affinities, view.provider.labels) for view in self.views]
            if len(self._labelled) >= KEPT_CLASSES:
                self._labelled.clear()
            self._labelled[uses] = matching
        return matching


def _log_energy(energy: Floats, known: Sequence[bool]) -> Floats:
    """Return the logarithm of the energy per work against the median of providers that state it.

    Others count as the median. A factor of more than `_MAX_ENERGY_FACTOR` counts as that: the energy of
    others must not decide alone where a job with the objective TIME goes.
    """
    stated = np.array(known, dtype=np.bool_)
    if not stated.any():
        return np.zeros_like(energy)
    relative = np.where(stated, energy - np.median(energy[stated]), 0.0)
    most = math.log(_MAX_ENERGY_FACTOR)
    log_energy: Floats = np.clip(relative, -most, most)
    return log_energy


def _doubled(array: Any) -> Any:
    """Return an array of twice as many rows, the new ones zero."""
    return np.concatenate([array, np.zeros_like(array)])


class _Columns:
    """Columns of equal length that grow together. The last row replaces a removed one."""

    def __init__(self, **kinds: Any) -> None:
        self.count = 0
        self.rows: dict[int, int] = {}
        self._items: Sequence[Any] = ()
        self._seen: dict[int, Any] = {}
        self._names = tuple(kinds)
        for name, kind in kinds.items():
            setattr(self, name, np.zeros(_START, dtype=kind))

    def _changes(self, items: Sequence[T]) -> tuple[list[T], list[T]]:
        """Return the objects added and those dropped since the items of the last call.

        Compares identities, so that unchanged items need no Python-level comparison, and an
        unchanged sequence needs none at all.
        """
        if items is self._items and isinstance(items, tuple):
            return [], []
        self._items, seen = items, self._seen
        ids = set(map(id, items))
        new = ids.difference(seen)
        unchanged = len(ids) - len(new) == len(seen)
        dropped = [] if unchanged else [seen.pop(key) for key in seen.keys() - ids]
        added: list[T] = []
        for item in reversed(items):  # new items usually come last
            if len(added) == len(new):
                break
            if id(item) in new:
                added.append(item)
        added.reverse()
        seen.update(zip(map(id, added), added, strict=True))
        return added, dropped

    def _apply_changes(
        self,
        items: Sequence[T],
        current: list[T],
        id_of: Callable[[T], int],
        add: Callable[[T], None],
    ) -> None:
        """Add and remove the rows of items that changed; `current` holds the items by row."""
        rows = self.rows
        added, dropped = self._changes(items)
        for item in added:
            job_id = id_of(item)
            row = rows.get(job_id)
            if row is not None and current[row] == item:
                current[row] = item
                continue
            if row is not None:
                self._remove(job_id)
            add(item)
        for item in dropped:
            row = rows.get(id_of(item))
            if row is not None and current[row] is item:
                self._remove(id_of(item))

    def _remove(self, job_id: int) -> None:
        raise NotImplementedError

    def _take_row(self, job_id: int) -> int:
        row = self.count
        if row == len(getattr(self, self._names[0])):
            for name in self._names:
                setattr(self, name, _doubled(getattr(self, name)))
        self.count += 1
        self.rows[job_id] = row
        return row

    def _drop_row(self, job_id: int, ids: list[Any], moved_id: int) -> int:
        """Free a row by moving the last row into it."""
        row = self.rows.pop(job_id)
        self.count = last = self.count - 1
        if row != last:
            for name in self._names:
                column = getattr(self, name)
                column[row] = column[last]
            ids[row] = ids[last]
            self.rows[moved_id] = row
        ids.pop()
        return row


class QueueTable(_Columns):
    """PENDING jobs.

    `seconds` is the longest run time of a job: its limit or, for a job that runs until its credits
    are spent, the seconds that they buy at the cheapest price. `kind`, `own` and `everybody` are
    the slots of its sums. `ceiling` is the highest rate that its budget covers, in credit-wei per
    second; `may_hold` tells whether it may wait for a frugal provider.
    """

    ids: Ints
    seconds: Ints
    queued_at: Ints
    cls: Ints
    customer: Ints
    kind: Ints
    own: Ints
    everybody: Ints
    ceiling: Any
    cpus: Floats
    memory: Floats
    gpus: Floats
    may_hold: Flags

    def __init__(self) -> None:
        super().__init__(
            **dict.fromkeys(("ids", "seconds", "queued_at", "cls", "customer"), np.int64),
            **dict.fromkeys(("kind", "own", "everybody"), np.int64),
            **dict.fromkeys(("cpus", "memory", "gpus"), np.float64),
            ceiling=object,
            may_hold=np.bool_,
        )
        self.waiting: list[Waiting] = []
        self.classes: dict[tuple[Resources, str, Objective], int] = {}
        self.class_keys: list[tuple[Resources, str, Objective]] = []
        #: By number of a class: its jobs, and the number of its size. Longer than `class_keys`.
        self.members: Ints = np.zeros(_START, dtype=np.int64)
        self.class_sizes: Ints = np.zeros(_START, dtype=np.int64)
        #: CPUs, MB and GPUs of the classes, each combination once.
        self.sizes: Ints = np.zeros((_START, 3), dtype=np.int64)
        self._size_numbers: dict[tuple[int, int, int], int] = {}
        self._live_sizes: dict[int, tuple[int, int, int]] | None = None
        #: A number that grows with each renumbering of the classes.
        self.numbering = 0
        self.customers: list[str] = []
        self._customer_rows: dict[str, int] = {}
        self._history: RunHistory | None = None
        self._version = -1
        self._slots: dict[Key, int] = {}
        self._sums: Floats = np.zeros((3, _START))
        #: Ids of jobs that run until their credits are spent: their length depends on prices.
        self.open_ended: set[int] = set()
        #: Rows of jobs that differ from their class by more than limit and budget.
        self.special: set[int] = set()

    def update(self, waiting: Sequence[Waiting], providers: ProviderTable, *, priced: bool) -> None:
        """Update from the queue of a snapshot; `priced` means that prices may have changed."""
        add = partial(self._add, providers)
        self._apply_changes(waiting, self.waiting, attrgetter("job.id"), add)
        if priced:
            for job_id in self.open_ended:
                row = self.rows[job_id]
                self.seconds[row] = _longest(self.waiting[row].job, self.waiting[row], providers)
        if len(self.class_keys) > 2 * KEPT_CLASSES + 2 * self.count:
            self._compact()
        if len(self.customers) > 2 * KEPT_CLASSES + 2 * self.count:
            self._renumber_customers()

    def _add(self, providers: ProviderTable, waiting: Waiting) -> None:
        job = waiting.job
        row = self._take_row(job.id)
        self.waiting.append(waiting)
        resources = job.resources
        self.ids[row] = job.id
        self.queued_at[row] = waiting.queued_at
        size = resources.cpus, resources.memory, resources.gpus
        self.cpus[row], self.memory[row], self.gpus[row] = size
        self.ceiling[row] = highest_rate(job)
        key = (resources, waiting.uses, waiting.objective)
        cls = self.classes.get(key)
        if cls is None:
            cls = self.classes[key] = len(self.class_keys)
            self.class_keys.append(key)
            if cls >= len(self.members):
                self.members, self.class_sizes = _doubled(self.members), _doubled(self.class_sizes)
            self.members[cls], self.class_sizes[cls] = 0, self._size_number(resources)
        self.cls[row] = cls
        self.members[cls] += 1
        if self.members[cls] == 1:
            self._live_sizes = None
        customer = self._customer_rows.setdefault(job.customer, len(self.customers))
        if customer == len(self.customers):
            self.customers.append(job.customer)
        self.customer[row] = customer
        seconds = job.time_limit
        job_conditions = conditions(waiting.uses)
        restricted = job_conditions is not None and (
            job_conditions.patience > 0 or job_conditions.placement is not None
        )
        special = job.until_spent or waiting.excluded or waiting.avoided or restricted
        if special:
            self.special.add(row)
        # No hold for a job with conditions of its own, nor for one that was returned.
        has_preferences = job_conditions is not None and bool(job_conditions.preferences)
        is_for_energy = waiting.objective is Objective.ENERGY
        self.may_hold[row] = is_for_energy and not special and not has_preferences
        if job.until_spent:
            self.open_ended.add(job.id)
            seconds = _longest(job, waiting, providers)
        self.seconds[row] = seconds
        keys = keys_of(job.customer, resources.cpus, resources.gpus, job.time_limit)
        self.kind[row], self.own[row], self.everybody[row] = map(self._slot, keys)

    def _remove(self, job_id: int) -> None:
        row = self.rows[job_id]
        cls = self.cls[row]
        self.members[cls] -= 1
        if not self.members[cls]:
            self._live_sizes = None
        self.open_ended.discard(job_id)
        last = self.count - 1
        row = self._drop_row(job_id, self.waiting, int(self.ids[last]))
        self.special.discard(row)
        if last in self.special:
            self.special.remove(last)
            self.special.add(row)

    def _size_number(self, resources: Resources) -> int:
        size = (resources.cpus, resources.memory, resources.gpus)
        number = self._size_numbers.get(size)
        if number is None:
            number = self._size_numbers[size] = len(self._size_numbers)
            if number >= len(self.sizes):
                self.sizes = _doubled(self.sizes)
            self.sizes[number] = size
        return number

    def live_sizes(self) -> Mapping[int, tuple[int, int, int]]:
        """Return the sizes of the jobs in the queue, by number."""
        if self._live_sizes is None:
            live = set(self.class_sizes[self.members > 0].tolist())
            self._live_sizes = {
                number: size for size, number in self._size_numbers.items() if number in live
            }
        return self._live_sizes

    def _compact(self) -> None:
        """Renumber the classes and drop those without jobs."""
        self.numbering += 1
        live = self.members.nonzero()[0].tolist()
        numbers = np.zeros(len(self.class_keys), dtype=np.int64)
        numbers[live] = np.arange(len(live))
        self.cls[: self.count] = numbers[self.cls[: self.count]]
        self.class_keys = [self.class_keys[cls] for cls in live]
        self._size_numbers, self._live_sizes = {}, None
        for cls, (resources, _, _) in enumerate(self.class_keys):
            self.class_sizes[cls] = self._size_number(resources)
        self.members[: len(live)] = self.members[live]
        self.members[len(live) :] = 0
        self.classes = {key: cls for cls, key in enumerate(self.class_keys)}

    def _renumber_customers(self) -> None:
        """Renumber the customers and drop those without jobs."""
        self.customers = list(dict.fromkeys(waiting.job.customer for waiting in self.waiting))
        self._customer_rows = {customer: i for i, customer in enumerate(self.customers)}
        for row, waiting in enumerate(self.waiting):
            self.customer[row] = self._customer_rows[waiting.job.customer]

    # -- estimates from finished runs

    def _slot(self, key: Key) -> int:
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = len(self._slots)
            if slot >= self._sums.shape[1]:
                self._sums = np.concatenate([self._sums, np.zeros_like(self._sums)], axis=1)
            self._sums[:, slot] = NO_SUMS if self._history is None else self._history.sums(key)
        return slot

    def learn(self, history: RunHistory) -> None:
        """Copy the sums that changed from a history."""
        if len(self._slots) > 4 * self.count + 100_000:
            self._slots.clear()
            for row, waiting in enumerate(self.waiting):
                job = waiting.job
                keys = keys_of(job.customer, job.resources.cpus, job.resources.gpus, job.time_limit)
                self.kind[row], self.own[row], self.everybody[row] = map(self._slot, keys)
        changed = history.changed_since(self._version) if history is self._history else None
        self._history, self._version = history, history.version
        for key in self._slots if changed is None else changed:
            slot = self._slots.get(key)
            if slot is not None:
                self._sums[:, slot] = history.sums(key)

    def estimates(self) -> tuple[Floats, Floats]:
        """Return the expected used part of the limit and expected 1 / run time, by row."""
        n = self.count
        used: Any = 1.0
        inverse: Any = 1.0 / np.maximum(self.seconds[:n], SHORTEST_RUN)
        for slots, prior in (
            (self.everybody, PRIOR_OF_ALL),
            (self.own, PRIOR_OF_CUSTOMER),
            (self.kind, PRIOR_OF_KIND),
        ):
            weight, parts, inverses = self._sums.take(slots[:n], axis=1)
            weight += prior
            used = (parts + prior * used) / weight
            inverse = (inverses + prior * inverse) / weight
        return used, inverse


def _longest(job: Job, waiting: Waiting, providers: ProviderTable) -> int:
    """Return the longest run time of a job that runs until its credits are spent."""
    options = providers.options(job.resources, waiting.uses)
    rates = [int(rate) for rate in options.rates[options.eligible & providers.open]]
    longest = max([job.time_limit, *(job.escrow // rate for rate in rates)])
    return min(longest, LONGEST_RUN)


class AssignedTable(_Columns):
    """Jobs at providers, and the load that they cause.

    `provider_row` is the row of the provider in `ProviderTable`, -1 if it is unknown. `end` is the chain
    time at which a running job ends at the latest. For a job that does not run yet (`queued` is
    set), it is the number of seconds that the job may run.
    """

    provider_row: Ints
    end: Ints
    queued: Flags
    cpus: Ints
    memory: Ints
    gpus: Ints

    def __init__(self) -> None:
        whole = dict.fromkeys(("provider_row", "end", "cpus", "memory", "gpus"), np.int64)
        super().__init__(queued=np.bool_, **whole)
        self.jobs: list[Job] = []
        self.load: Ints = np.zeros((3, 0), dtype=np.int64)

    def update(self, assigned: Sequence[Job], providers: ProviderTable, *, replaced: bool) -> None:
        """Update from the assigned jobs; `replaced` means that provider records have changed."""
        if replaced:
            self.__init__()  # type: ignore[misc]
            self.load = np.zeros((3, len(providers.views)), dtype=np.int64)
        add = partial(self._add, providers)
        self._apply_changes(assigned, self.jobs, attrgetter("id"), add)

    def _add(self, providers: ProviderTable, job: Job) -> None:
        row = self._take_row(job.id)
        self.jobs.append(job)
        provider_row = providers.rows.get(job.provider_id, -1)
        resources = job.resources
        amounts = resources.cpus, resources.memory, resources.gpus
        self.provider_row[row] = provider_row
        self.cpus[row], self.memory[row], self.gpus[row] = amounts
        allotted = min(run_time(job, job.rate), LONGEST_RUN)
        self.queued[row] = job.status != JobStatus.RUNNING
        self.end[row] = allotted + (0 if self.queued[row] else job.since)
        if provider_row >= 0:
            self.load[:, provider_row] += amounts

    def _remove(self, job_id: int) -> None:
        row = self.rows[job_id]
        if self.provider_row[row] >= 0:
            size = self.cpus[row], self.memory[row], self.gpus[row]
            self.load[:, self.provider_row[row]] -= size
        self._drop_row(job_id, self.jobs, self.jobs[-1].id)

    def releases(self, now: int, start_margin: int) -> tuple[Ints, Ints, Ints]:
        """Return the provider's row, chain time and amounts of each future release."""
        n = self.count
        end = np.where(
            self.queued[:n], self.end[:n] + (now + start_margin), np.maximum(self.end[:n], now + 1)
        )
        amounts = np.stack([self.cpus[:n], self.memory[:n], self.gpus[:n]])
        return self.provider_row[:n], end, amounts
