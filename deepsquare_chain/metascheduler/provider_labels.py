"""Relative speed, energy and carbon of providers, from their labels; measured speeds. Pure.

Labels are claims of the provider. `compute.gflops`, or else `cpu.speed`, gives the speed;
`energy.watts_per_cpu` the energy and `energy.grams_per_kwh` the carbon, which may depend on the
time of day.

Measured run times are evidence about claimed speeds. If the claims are right, jobs of one kind
(customer, resources, limit) take equally long at all providers in seconds x claimed speed. The
deviation of a provider is how much longer its runs took than runs of the same kinds elsewhere.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from deepsquare_chain.job import DAY

_NUMBER: Final = re.compile(r"[0-9]{1,15}(\.[0-9]{1,15})?")
SPEED_LABELS: Final = ("compute.gflops", "cpu.speed")
WATTS_LABEL: Final = "energy.watts_per_cpu"
CARBON_LABEL: Final = "energy.grams_per_kwh"
#: The count of numbers in a carbon label must divide this number of hours of a day.
_HOURS: Final = 24
#: Joules of a kilowatt-hour.
_KWH: Final = 3_600_000
#: A claimed speed is clamped to at most this many times the median, and at least the inverse.
_SPREAD: Final = 16.0
#: Speed of a provider without a speed label, in multiples of the slowest labelled one.
_UNLABELLED_SPEED: Final = 0.9


def measure(label: str | None) -> float | None:
    """Return the positive number in a label; None for anything else."""
    if label is None or not _NUMBER.fullmatch(label):
        return None
    value = float(label)
    return value if value > 0.0 else None


def relative_speeds(providers: Sequence[Mapping[str, str]]) -> list[float]:
    """Return the speeds of providers in multiples of the median, from their labels.

    A provider with `compute.gflops` is compared with the median of that label, any other by
    `cpu.speed`. One with neither counts as a little slower than the slowest that has one.
    """
    measured = [[measure(labels.get(key)) for key in SPEED_LABELS] for labels in providers]
    medians = [
        statistics.median([value for row in measured if (value := row[i]) is not None] or [1.0])
        for i in range(len(SPEED_LABELS))
    ]
    speeds = [
        next((v / median for v, median in zip(row, medians, strict=True) if v is not None), None)
        for row in measured
    ]
    known = [speed for speed in speeds if speed is not None]
    slowest = _UNLABELLED_SPEED * min(known, default=1 / _UNLABELLED_SPEED)
    completed = (slowest if speed is None else speed for speed in speeds)
    return [min(max(speed, 1.0 / _SPREAD), _SPREAD) for speed in completed]


def watts_of(labels: Mapping[str, str]) -> float | None:
    """Return the watts per busy CPU; None without the label."""
    return measure(labels.get(WATTS_LABEL))


def grams_of(labels: Mapping[str, str], now: int) -> float | None:
    """Return the grams of carbon dioxide per kWh at chain time `now`; None without the label.

    A label of 2, 3, 4, 6, 8, 12 or 24 numbers, as in `300/120`, divides the UTC day into as many
    equal parts.
    """
    parts = _parts_of_day(labels)
    return parts[now % DAY * len(parts) // DAY] if parts else None


def changes_daily(labels: Mapping[str, str]) -> bool:
    """Return whether the carbon of a provider depends on the time of day."""
    return len(_parts_of_day(labels)) > 1


def _parts_of_day(labels: Mapping[str, str]) -> list[float]:
    """Return the grams of carbon dioxide per kWh by part of the day; empty for an invalid label."""
    texts = labels.get(CARBON_LABEL, "").split("/")
    values = [value for text in texts if (value := measure(text)) is not None]
    return values if len(values) == len(texts) and _HOURS % len(values) == 0 else []


def energy_use(
    labels: Mapping[str, str], cpus: int, seconds: int, now: int
) -> tuple[int | None, float | None]:
    """Return joules and grams of carbon dioxide of a run, by labels; None without the label.

    All CPUs count as busy for the whole run, so this is an upper bound. If carbon depends on the
    time of day, the run is assumed to begin at chain time `now`.
    """
    watts = watts_of(labels)
    if watts is None:
        return None, None
    joules = watts * cpus * seconds
    grams = _mean_grams(_parts_of_day(labels), now, seconds)
    return round(joules), None if grams is None else grams * joules / _KWH


def _mean_grams(parts: Sequence[float], begin: int, seconds: int) -> float | None:
    """Return the mean over a run: whole days by the daily mean, the rest by seconds per part."""
    if not parts:
        return None
    if len(parts) == 1 or seconds <= 0:
        return parts[begin % DAY * len(parts) // DAY]
    days, rest = divmod(seconds, DAY)
    length = DAY / len(parts)
    total = days * DAY * statistics.fmean(parts)
    at, end = float(begin % DAY), float(begin % DAY + rest)
    while at < end:
        number = int(at // length)
        until = min(end, (number + 1) * length)
        total += parts[number % len(parts)] * (until - at)
        at = until
    return total / seconds


def energy_costs(
    providers: Sequence[Mapping[str, str]], speeds: Sequence[float], now: int
) -> list[float]:
    """Return the energy cost of work: log(watts per CPU / speed).

    Watts are multiplied by carbon if all providers with a watts label have a carbon label too. A
    provider without a watts label ranks after all that have one.
    """
    watts = [watts_of(labels) for labels in providers]
    grams = [grams_of(labels, now) for labels in providers]
    known = [gram for gram, watt in zip(grams, watts, strict=True) if watt is not None]
    by_carbon = bool(known) and all(gram is not None for gram in known)
    costs = [
        None
        if watt is None
        else math.log(watt * (gram if by_carbon and gram is not None else 1.0) / speed)
        for watt, gram, speed in zip(watts, grams, speeds, strict=True)
    ]
    worst = max((cost for cost in costs if cost is not None), default=None)
    return [0.0 if worst is None else worst + 1.0 if cost is None else cost for cost in costs]


#: Fewest runs for a statement about a provider.
FEWEST_RUNS: Final = 5
#: A factor below this, in either direction, counts as agreement.
TOLERANCE: Final = 1.1


class MeasuredRun(NamedTuple):
    """The run of a job that finished: its provider, what it has in common with others, seconds."""

    provider: str
    kind: Hashable
    seconds: float


@dataclass(frozen=True, slots=True)
class SpeedEvidence:
    """Run times of a provider in multiples of those that its claimed speed suggests.

    `factor` is a geometric mean; above 1 the provider is slower than it claims. `runs` is the
    number of its runs that were compared, `kinds` that of the kinds of jobs.
    """

    factor: float
    runs: int
    kinds: int

    @property
    def text(self) -> str:
        """The evidence as a sentence without its end."""
        if 1.0 / TOLERANCE < self.factor < TOLERANCE:
            how = "about as long as its claimed speed suggests"
        elif self.factor > 1.0:
            how = f"{self.factor:.2f} times as long as its claimed speed suggests"
        else:
            how = f"{1.0 / self.factor:.2f} times shorter than its claimed speed suggests"
        return f"jobs took {how}"


def speed_evidence(
    runs: Iterable[MeasuredRun], speeds: Mapping[str, float]
) -> dict[str, SpeedEvidence]:
    """Return the evidence about each provider with enough comparable runs.

    `speeds` are the claimed speeds by provider, relative to the median.
    """
    logs: defaultdict[Hashable, defaultdict[str, list[float]]]
    logs = defaultdict(lambda: defaultdict(list))
    for run in runs:
        speed = speeds.get(run.provider)
        if speed is not None and run.seconds > 0:
            logs[run.kind][run.provider].append(math.log(run.seconds * speed))
    deviations: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
    for by_provider in logs.values():
        means = {provider: statistics.fmean(values) for provider, values in by_provider.items()}
        for provider, mean in means.items():
            others = [other_mean for other, other_mean in means.items() if other != provider]
            if others:
                deviation = mean - statistics.fmean(others)
                deviations[provider].append((deviation, len(by_provider[provider])))
    return {
        provider: _evidence(values)
        for provider, values in deviations.items()
        if sum(count for _, count in values) >= FEWEST_RUNS
    }


def _evidence(deviations: Iterable[tuple[float, int]]) -> SpeedEvidence:
    values = list(deviations)
    runs = sum(count for _, count in values)
    mean = sum(deviation * count for deviation, count in values) / runs
    return SpeedEvidence(math.exp(mean), runs, len(values))
