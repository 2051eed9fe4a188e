"""Run time estimates for waiting jobs, learned from finished runs. Pure.

A time limit is an upper bound that customers choose generously. Two values of a job are estimated
from finished runs: the part of its limit that it will use, and the mean of 1 / run time, which
weighs its slowdown. Runs are counted in seconds at the grid's median speed.

Each run is added to three exponentially decaying sums: that of its kind (customer, CPUs, GPUs,
limit), that of its customer at this magnitude of limit, and that of everybody at this magnitude.
Each run multiplies its sums by a constant below one, so that old runs fade. An estimate begins with
"the whole limit is used"; each sum in turn, coarsest first, corrects it in proportion to the weight
of its runs (shrinkage).

The history is computed only from events in chain order, so that every scheduler has the same one.
Its size is bounded: the least recently updated sums are evicted first.

The idea to learn run times for backfilling: Tsafrir, Etsion, Feitelson, TPDS 2007; Gaussier et al.,
SC 2015. The sums and the shrinkage are our own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, TypeAlias

#: Shorter runs count as this many seconds, in slowdowns too.
SHORTEST_RUN: Final = 10.0
#: Decay factor of a sum per run: of a kind or customer, and of everybody.
MEMORY: Final = 0.9
MEMORY_OF_ALL: Final = 0.995
#: Decay factor of a customer's use per payment in the grid: half is left after 700.
MEMORY_OF_USE: Final = 0.999
#: Decay factor of a provider's record per job that it ends: half is left after 14 jobs.
MEMORY_OF_PROVIDERS: Final = 0.95
#: Prior: the number of ends without a fault that every provider starts with.
PRIOR_OF_PROVIDERS: Final = 5.0
#: Weights, in runs, of the next coarser estimate at each level.
PRIOR_OF_KIND: Final = 1.0
PRIOR_OF_CUSTOMER: Final = 1.0
PRIOR_OF_ALL: Final = 2.0

#: Most sums per level.
MAX_SUMS: Final = 20_000
#: Most changed keys that are logged for holders of copies.
_MAX_CHANGES: Final = 4_096

#: (customer, CPUs, GPUs, limit), (customer, magnitude) or (magnitude).
Key: TypeAlias = tuple[str, int, int, int] | tuple[str, int] | tuple[int]
#: Weight of the runs, sum of used parts, sum of 1 / run time.
Sums: TypeAlias = tuple[float, float, float]

NO_SUMS: Final[Sums] = (0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A run that ended; `seconds` are at the grid's median speed, `time_limit` is in seconds.

    `paid` is in credits. A run that its customer stopped does not show how long it would have
    taken: its `seconds` are None, and only the payment counts.
    """

    customer: str
    cpus: int
    gpus: int
    time_limit: int
    seconds: float | None
    paid: float = 0.0


class EstimateSource(StrEnum):
    """The source of an estimate: the finest level that has runs."""

    KIND = "kind"
    CUSTOMER = "customer"
    EVERYBODY = "everybody"
    LIMIT = "limit"


@dataclass(frozen=True, slots=True)
class Estimate:
    """The estimate of a run.

    Attributes:
        used: Part of the time limit that it uses at the grid's median speed.
        inverse: Expected 1 / max(run time, 10 s), per second.
        source: The finest level that has runs.
        runs: Weight of the runs at that level, at most 10 for a customer's own.
    """

    used: float
    inverse: float
    source: EstimateSource
    runs: float


def magnitude(time_limit: int) -> int:
    """Return floor(2 log2 L) for a limit of L seconds, in integer arithmetic."""
    return (time_limit * time_limit).bit_length() - 1


def keys_of(customer: str, cpus: int, gpus: int, time_limit: int) -> tuple[Key, Key, Key]:
    """Return the keys of the three sums of a job, finest first; a limit of 0 counts as 1 s."""
    time_limit = max(time_limit, 1)
    size = magnitude(time_limit)
    return (customer, cpus, gpus, time_limit), (customer, size), (size,)


class RunHistory:
    """Decaying sums over finished runs, recorded in chain order."""

    def __init__(self) -> None:
        #: By length of the key: kinds 4, customers 2, everybody 1; least recently changed first.
        self._levels: dict[int, dict[Key, Sums]] = {4: {}, 2: {}, 1: {}}
        self._changes: list[Key] = []
        self._first_change = 0
        #: Payments so far; by customer, decayed credits and the payment count of the last update.
        self._payments = 0
        self._usage: dict[str, tuple[float, int]] = {}
        #: Decayed number of judged estimates, and sum of the logarithms of their errors.
        self._errors: tuple[float, float] = (0.0, 0.0)
        #: By provider: decayed numbers of jobs that it ended or gave up, and of those it gave up.
        self._providers: dict[str, tuple[float, float]] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RunHistory) and self.rows() == other.rows()

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return sum(len(level) for level in self._levels.values())

    def record(self, run: FinishedRun) -> None:
        """Record a run; runs must be recorded in chain order."""
        if run.paid > 0.0:
            self._record_payment(run.customer, run.paid)
        if run.seconds is None:
            return
        limit = max(run.time_limit, 1)
        self._record_error(run, limit)
        used = run.seconds / limit
        inverse = 1.0 / max(run.seconds, SHORTEST_RUN)
        for key in keys_of(run.customer, run.cpus, run.gpus, run.time_limit):
            keep = MEMORY_OF_ALL if len(key) == 1 else MEMORY
            level = self._levels[len(key)]
            weight, parts, inverses = level.pop(key, NO_SUMS)
            level[key] = (keep * weight + 1.0, keep * parts + used, keep * inverses + inverse)
            self._record_change(key)
            if len(level) > MAX_SUMS:
                oldest = next(iter(level))
                del level[oldest]
                self._record_change(oldest)

    def _record_error(self, run: FinishedRun, limit: int) -> None:
        """Record how far the estimate of a run was off that would have been made just before."""
        estimate = self.estimate(run.customer, run.cpus, run.gpus, run.time_limit)
        expected = max(estimate.used * limit, SHORTEST_RUN)
        error = abs(math.log(max(run.seconds or 0.0, SHORTEST_RUN) / expected))
        weight, errors = self._errors
        self._errors = (MEMORY_OF_ALL * weight + 1.0, MEMORY_OF_ALL * errors + error)

    @property
    def typical_error(self) -> float | None:
        """The factor by which recent runs were longer or shorter than estimated; None without runs.

        It is the geometric mean of max(run, estimate) / min(run, estimate); 1 is perfect. A run's
        weight halves after 138 runs.
        """
        weight, errors = self._errors
        return math.exp(errors / weight) if weight else None

    def _record_payment(self, customer: str, paid: float) -> None:
        credits, at = self._usage.pop(customer, (0.0, self._payments))
        self._payments += 1
        use = credits * _decayed_part(self._payments - at) + paid
        self._usage[customer] = (use, self._payments)
        if len(self._usage) > MAX_SUMS:
            del self._usage[next(iter(self._usage))]

    def shares(self) -> dict[str, float]:
        """Return each customer's recent use, in multiples of the mean of customers with any use."""
        used = {
            customer: credits * _decayed_part(self._payments - at)
            for customer, (credits, at) in self._usage.items()
        }
        # Summed in a fixed order, so that every scheduler gets the same bits.
        total = sum(used[customer] for customer in sorted(used))
        return {customer: credits * len(used) / total for customer, credits in used.items()}

    def share_error(self) -> float:
        """Return the distance of recent use from equal shares: 0 if equal, near 1 if one has all.

        This is the part of the credits that would have to move to other customers (half of the
        total variation).
        """
        shares = self.shares()
        if not shares:
            return 0.0
        return math.fsum(abs(share - 1.0) for share in shares.values()) / (2.0 * len(shares))

    def record_end(self, provider: str, *, given_up: bool) -> None:
        """Record that a provider ended a job by itself, or gave it up."""
        ended, faults = self._providers.pop(provider, (0.0, 0.0))
        keep = MEMORY_OF_PROVIDERS
        self._providers[provider] = (keep * ended + 1.0, keep * faults + float(given_up))
        if len(self._providers) > MAX_SUMS:
            del self._providers[next(iter(self._providers))]

    @property
    def has_faults(self) -> bool:
        """Whether any provider has ended or given up a job."""
        return bool(self._providers)

    def fault_rate(self, provider: str) -> float:
        """Return the part of its recent jobs that a provider gave up; 0 if unknown."""
        ended, faults = self._providers.get(provider, (0.0, 0.0))
        return faults / (ended + PRIOR_OF_PROVIDERS)

    def sums(self, key: Key) -> Sums:
        """Return the sums of a key, zeros for an unknown one."""
        return self._levels[len(key)].get(key, NO_SUMS)

    def estimate(self, customer: str, cpus: int, gpus: int, time_limit: int) -> Estimate:
        """Return the estimate for a job of this customer, size and limit."""
        kind, own, everybody = (self.sums(key) for key in keys_of(customer, cpus, gpus, time_limit))
        used, inverse = 1.0, 1.0 / max(time_limit, SHORTEST_RUN)
        levels = ((everybody, PRIOR_OF_ALL), (own, PRIOR_OF_CUSTOMER), (kind, PRIOR_OF_KIND))
        for sums, prior in levels:
            used = (sums[1] + prior * used) / (sums[0] + prior)
            inverse = (sums[2] + prior * inverse) / (sums[0] + prior)
        for source, sums in (
            (EstimateSource.KIND, kind),
            (EstimateSource.CUSTOMER, own),
            (EstimateSource.EVERYBODY, everybody),
        ):
            if sums[0] > 0.0:
                return Estimate(used, inverse, source, sums[0])
        return Estimate(used, inverse, EstimateSource.LIMIT, 0.0)

    @property
    def payments(self) -> int:
        """Number of payments so far; `shares` changes only when it does."""
        return self._payments

    # -- for copies

    @property
    def version(self) -> int:
        """A number that grows with each change of a sum."""
        return self._first_change + len(self._changes)

    def changed_since(self, version: int) -> Sequence[Key] | None:
        """Return the keys whose sums changed since a version; None if it is too old."""
        if not self._first_change <= version <= self.version:
            return None
        return self._changes[version - self._first_change :]

    def _record_change(self, key: Key) -> None:
        self._changes.append(key)
        if len(self._changes) > _MAX_CHANGES:
            dropped = len(self._changes) // 2
            del self._changes[:dropped]
            self._first_change += dropped

    # -- for storage

    def rows(self) -> dict[str, Any]:
        """Return the history as JSON-ready data: exact floats, in the order of last update."""
        return {
            "sums": [
                [list(key), *sums] for level in self._levels.values() for key, sums in level.items()
            ],
            "errors": list(self._errors),
            "payments": self._payments,
            "usage": [[customer, *used] for customer, used in self._usage.items()],
            "providers": [[provider, *ends] for provider, ends in self._providers.items()],
        }

    @classmethod
    def of_rows(cls, rows: Mapping[str, Any]) -> RunHistory:
        """Restore a history from the result of `rows`; empty for an empty mapping."""
        history = cls()
        for key, weight, used, inverse in rows.get("sums", ()):
            history._levels[len(key)][tuple(key)] = (weight, used, inverse)
        weight, errors = rows.get("errors", (0.0, 0.0))
        history._errors = (weight, errors)
        history._payments = rows.get("payments", 0)
        history._usage = {customer: (used, at) for customer, used, at in rows.get("usage", ())}
        history._providers = {
            provider: (ended, faults) for provider, ended, faults in rows.get("providers", ())
        }
        return history


def _decayed_part(payments: int) -> float:
    """Return the part of an amount that is left after this many payments in the grid."""
    return float(MEMORY_OF_USE**payments)
