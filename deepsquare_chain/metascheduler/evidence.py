"""Measured run times against the claimed speeds of providers. Pure.

Speeds are labels, which providers state themselves. If the claims are right, jobs of one kind
(customer, resources, limit) take equally long at all providers in seconds x claimed speed. The
deviation of a provider is how much longer its runs took than runs of the same kinds elsewhere.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

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
    """Run times of a provider in multiples of what its claimed speed lets expect.

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

    Args:
        runs: Finished runs.
        speeds: Claimed speed by provider, relative to the median.
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
