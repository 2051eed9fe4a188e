"""Synthetic workloads with the properties that matter to a scheduler.

Customers submit bursts of similar jobs. Sizes are mostly powers of two, limits are round and far
above the run times, and the arrival rate follows the time of day. There are two styles: `mixed` has
many customers and short jobs, `campaign` has few customers with wide, long jobs.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Final

from deepsquare_chain.job import DAY
from deepsquare_chain.metascheduler.simulation.workload import Trace, TraceJob

_LIMITS: Final = (300, 900, 1_800, 3_600, 7_200, 14_400, 28_800, 43_200, 86_400)


@dataclass(frozen=True, slots=True)
class Style:
    """Parameters of a workload; times in seconds.

    `burst` is the mean number of similar jobs in a row, `typical` the median run time, `spread` the
    standard deviation of its logarithm among kinds of jobs.
    """

    customers: int
    processors: int
    burst: float
    typical: float
    spread: float
    sizes: tuple[int, ...]


STYLES: Final[dict[str, Style]] = {
    "mixed": Style(40, 128, 4.0, 400.0, 1.9, (1, 1, 1, 2, 2, 4, 4, 8, 8, 16, 24, 32, 64)),
    "campaign": Style(12, 128, 6.0, 2_400.0, 1.2, (4, 8, 8, 16, 16, 32, 32, 48, 64, 96)),
}


def synthetic(style: str, count: int, seed: int) -> Trace:
    """Generate a trace with a load of about 0.7 on its own machine; deterministic."""
    rng, parameters = random.Random(f"{style} {seed}"), STYLES[style]  # noqa: S311
    shapes: list[tuple[str, int, int, float]] = []
    while len(shapes) < count:
        customer = f"user {1 + int(parameters.customers * rng.random() ** 2)}"
        cpus = min(rng.choice(parameters.sizes), parameters.processors)
        typical = parameters.typical * math.exp(rng.gauss(0.0, parameters.spread))
        requested = typical * rng.uniform(1.2, 6.0)
        limit = next(
            (limit_choice for limit_choice in _LIMITS if limit_choice >= requested), _LIMITS[-1]
        )
        for _ in range(1 + int(rng.expovariate(1.0 / parameters.burst))):
            failed = rng.random() < 0.12
            run = rng.uniform(2.0, 60.0) if failed else typical * math.exp(rng.gauss(0.0, 0.35))
            shapes.append((customer, cpus, limit, max(1.0, min(run, float(limit)))))
    shapes = shapes[:count]
    length = sum(cpus * run for _, cpus, _, run in shapes) / (0.7 * parameters.processors)
    jobs: list[TraceJob] = []
    at = 0.0
    for customer, cpus, limit, run in shapes:
        # Three times as many submissions at the busiest hour as at the quietest.
        pace = 1.0 + 0.5 * math.sin(2.0 * math.pi * at / DAY)
        at += rng.expovariate(count * pace / length)
        jobs.append(TraceJob(len(jobs) + 1, round(at), cpus, limit, round(run), customer))
    return Trace(style, tuple(jobs), parameters.processors)
