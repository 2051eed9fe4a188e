"""Experiments over schedulers, objectives, loads and seeds, in several processes; their measures.

Measures exclude the first 5 % of the jobs. The bounded slowdown of a job is (wait + run) /
max(run, 10 s), at least 1 (Feitelson et al., JSSPP 1997). Ratios are computed within a seed and
averaged over seeds, so that a hard seed does not outweigh the others.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from deepsquare_chain.job import Objective
from deepsquare_chain.metascheduler.history import SHORTEST_RUN
from deepsquare_chain.metascheduler.policy import Rules
from deepsquare_chain.metascheduler.simulation.engine import (
    Cluster,
    SimulatedRun,
    first_come_first_served,
    run_clusters,
    run_policy,
    smallest_area_first,
    to_the_earliest_completion,
    to_the_least_loaded,
    to_the_less_loaded_of_two,
    to_the_only_one,
)
from deepsquare_chain.metascheduler.simulation.grid_file import SimulatedGrid
from deepsquare_chain.metascheduler.simulation.workload import (
    Trace,
    TraceJob,
    fold,
    scaled,
    with_objectives,
    with_patience,
)

#: Part of the jobs that all measures exclude, because the grid is still filling up.
_WARM_UP_PART: Final = 0.05
#: Number of points of a time series.
_BINS: Final = 160
#: Fewest jobs of a customer for it to enter the comparison of customers.
_MIN_CUSTOMER_JOBS: Final = 20


class Scheduler(StrEnum):
    """The real policy, or a baseline."""

    POLICY = "policy"
    MERGED_SAF = "merged SAF-EASY"
    MERGED_FCFS = "merged FCFS-EASY"
    LEAST_LOADED = "least loaded"
    POWER_OF_TWO = "power of two"
    EARLIEST_COMPLETION = "earliest completion"


#: Baselines of one merged cluster, with the order of their queue.
_MERGED_ORDERS: Final = {
    Scheduler.MERGED_SAF: smallest_area_first,
    Scheduler.MERGED_FCFS: first_come_first_served,
}
BASELINES: Final = tuple(scheduler for scheduler in Scheduler if scheduler is not Scheduler.POLICY)


@dataclass(frozen=True, slots=True)
class Case:
    """The parameters of one simulation; baselines have no objective and no chain delay."""

    scheduler: Scheduler
    load: float
    seed: int
    mix: str = ""
    block: float = 0.0


@dataclass(frozen=True, slots=True)
class ResultSeries:
    """Time series with a value for each bin of `width` seconds.

    `busy` is the part of CPUs in use, `queued` the mean number of waiting jobs, `wait` the mean
    wait in seconds of jobs submitted in the bin, `slowdown` their mean bounded slowdown, `money`
    credits per hour and `power` watts.
    """

    width: float
    busy: Sequence[float]
    queued: Sequence[float]
    wait: Sequence[float]
    slowdown: Sequence[float]
    money: Sequence[float]
    power: Sequence[float]


@dataclass(frozen=True, slots=True)
class Measures:
    """The results of a case.

    `money` is the cost of jobs with objective COST over their cost at the grid's mean price,
    `energy` the energy of jobs with objective ENERGY over that at the grid's mean watts; None
    without such jobs. `unfairness` is the mean slowdown of the worst customer over that of the
    median customer.
    """

    case: Case
    slowdown: float
    wait_mean: float
    wait_p99: float
    wait_longest: float
    utilisation: float
    money: float | None
    energy: float | None
    unfairness: float | None
    series: ResultSeries | None = None


@dataclass(frozen=True, slots=True)
class ResultRow:
    """A scheduler's measures as means over seeds; ratios are None without their baseline."""

    scheduler: Scheduler
    mix: str
    load: float
    block: float
    seeds: int
    slowdown: float
    vs_merged_saf: float | None
    wait_mean: float
    wait_p99: float
    wait_p99_vs_fcfs: float | None
    wait_longest: float
    wait_longest_vs_fcfs: float | None
    better_than_least_loaded: float | None
    utilisation: float
    money: float | None
    energy: float | None
    unfairness: float | None
    each_vs_merged_saf: tuple[float, ...] = ()


def default_width(trace: Trace, grid: SimulatedGrid) -> int:
    """Return the width in CPUs to scale a trace's machine to: at most that of the mean cluster.

    The widest jobs then fit about half of the clusters. Jobs as wide as the largest cluster would
    fit only that one, which leaves a policy no choice.
    """
    return min(trace.processors, grid.cpus // len(grid.providers))


@dataclass(frozen=True, slots=True)
class Experiment:
    """The parameters of an experiment; the trace's machine is scaled to `width` CPUs.

    `patience` is that of jobs with the objectives COST and ENERGY, as a part of their limit.
    """

    trace: Trace
    grid: SimulatedGrid
    loads: Sequence[float]
    seeds: int
    mixes: Sequence[str]
    baselines: Sequence[Scheduler] = BASELINES
    blocks: Sequence[float] = (0.0,)
    rules: Rules = field(default_factory=Rules)
    width: int = 0
    patience: float = 0.0

    def __post_init__(self) -> None:
        if not self.width:
            object.__setattr__(self, "width", default_width(self.trace, self.grid))
        trace = scaled(self.trace, self.width, self.grid.memory_per_cpu)
        object.__setattr__(self, "trace", trace)

    def cases(self) -> list[Case]:
        """Return all cases, those that take longest first."""
        policy = [
            Case(Scheduler.POLICY, load, seed, mix, block)
            for load in sorted(self.loads, reverse=True)
            for block in self.blocks
            for mix in self.mixes
            for seed in range(self.seeds)
        ]
        return policy + [
            Case(scheduler, load, seed)
            for load in self.loads
            for scheduler in self.baselines
            for seed in range(self.seeds)
        ]


def run_experiment(
    experiment: Experiment, *, processes: int, progress: Callable[[int, int], None]
) -> list[Measures]:
    """Run all cases; `progress` is called with the number of finished cases and of all cases.

    Results are in the order of the cases and do not depend on the number of processes.
    """
    cases = experiment.cases()
    progress(0, len(cases))
    results: dict[Case, Measures] = {}
    if processes <= 1:
        for case in cases:
            results[case] = run_case(experiment, case)
            progress(len(results), len(cases))
    else:
        with ProcessPoolExecutor(
            processes,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_set_worker_experiment,
            initargs=(experiment,),
        ) as pool:
            for future in as_completed([pool.submit(_run_in_worker, case) for case in cases]):
                measures = future.result()
                results[measures.case] = measures
                progress(len(results), len(cases))
    return [results[case] for case in cases]


_worker_experiment: list[Experiment] = []


def _set_worker_experiment(experiment: Experiment) -> None:
    _worker_experiment[:] = [experiment]


def _run_in_worker(case: Case) -> Measures:
    return run_case(_worker_experiment[0], case)


def run_case(experiment: Experiment, case: Case) -> Measures:
    """Simulate one case."""
    grid = experiment.grid
    jobs = fold(experiment.trace, capacity=grid.capacity, load=case.load, seed=case.seed)
    if case.scheduler is Scheduler.POLICY:
        jobs = with_objectives(jobs, case.mix, case.seed)
        if experiment.patience:
            jobs = with_patience(jobs, experiment.patience)
        outcomes = run_policy(jobs, grid.views(), grid.speeds, experiment.rules, block=case.block)
    else:
        outcomes = _run_baseline(case, jobs, grid)
    return _measure(case, outcomes, grid, merged=case.scheduler in _MERGED_ORDERS)


def _run_baseline(case: Case, jobs: Sequence[TraceJob], grid: SimulatedGrid) -> list[SimulatedRun]:
    scheduler = case.scheduler
    if scheduler in _MERGED_ORDERS:
        merged = Cluster(grid.cpus, grid.capacity / grid.cpus, _MERGED_ORDERS[scheduler])
        return run_clusters(jobs, [merged], to_the_only_one)
    route = {
        Scheduler.LEAST_LOADED: to_the_least_loaded,
        Scheduler.POWER_OF_TWO: to_the_less_loaded_of_two(case.seed),
        Scheduler.EARLIEST_COMPLETION: to_the_earliest_completion,
    }[scheduler]
    clusters = [Cluster(p.cpus, p.speed, first_come_first_served) for p in grid.providers]
    return run_clusters(jobs, clusters, route)


# -- measures


def slowdown(outcome: SimulatedRun) -> float:
    """Return the bounded slowdown of a job."""
    run = outcome.end - outcome.start
    return max(1.0, (outcome.wait + run) / max(run, SHORTEST_RUN))


def _measure(
    case: Case, outcomes: Sequence[SimulatedRun], grid: SimulatedGrid, *, merged: bool
) -> Measures:
    counted = outcomes[int(_WARM_UP_PART * len(outcomes)) :]
    waits = sorted(outcome.wait for outcome in counted)
    slowdowns = [slowdown(outcome) for outcome in counted]
    first, last = counted[0].job.at, max(outcome.job.at for outcome in counted)
    span = max(last - first, 1.0)
    busy = sum(
        outcome.job.cpus * max(0.0, min(outcome.end, last) - max(outcome.start, first))
        for outcome in outcomes
    )
    return Measures(
        case=case,
        slowdown=statistics.fmean(slowdowns),
        wait_mean=statistics.fmean(waits),
        wait_p99=waits[int(0.99 * (len(waits) - 1))],
        wait_longest=waits[-1],
        utilisation=busy / (span * grid.cpus),
        money=None if merged else against_blind(counted, grid, Objective.COST),
        energy=None if merged else against_blind(counted, grid, Objective.ENERGY),
        unfairness=_unfairness(counted, slowdowns),
        series=_series(outcomes, slowdowns, grid, merged=merged) if case.seed == 0 else None,
    )


def against_blind(
    outcomes: Sequence[SimulatedRun], grid: SimulatedGrid, objective: Objective
) -> float | None:
    """Return the price or watts of jobs with an objective, over those of the same work at the mean.

    The mean is that of a grid whose CPUs are all used alike. None if no job has the objective.
    """
    used = work = 0.0
    for outcome in outcomes:
        if outcome.job.objective is objective:
            cluster = grid.providers[outcome.provider]
            cpu_hours = outcome.job.cpus * (outcome.end - outcome.start)
            by_money = objective is Objective.COST
            used += cpu_hours * (float(cluster.cpu_price) if by_money else cluster.watts_per_cpu)
            work += cpu_hours * cluster.speed
    if not work:
        return None
    blind = grid.price_of_work if objective is Objective.COST else grid.watts_of_work
    return used / (work * blind)


def _unfairness(outcomes: Sequence[SimulatedRun], slowdowns: Sequence[float]) -> float | None:
    by_customer: defaultdict[str, list[float]] = defaultdict(list)
    for outcome, value in zip(outcomes, slowdowns, strict=True):
        by_customer[outcome.job.customer].append(value)
    frequent = (values for values in by_customer.values() if len(values) >= _MIN_CUSTOMER_JOBS)
    means = [statistics.fmean(values) for values in frequent]
    return max(means) / statistics.median(means) if len(means) > 1 else None


def _series(
    outcomes: Sequence[SimulatedRun],
    slowdowns: Sequence[float],
    grid: SimulatedGrid,
    *,
    merged: bool,
) -> ResultSeries:
    end = max(outcome.job.at for outcome in outcomes)
    width = max(end / _BINS, 1.0)
    busy, queued, money, power = ([0.0] * _BINS for _ in range(4))
    waits: list[list[float]] = [[] for _ in range(_BINS)]
    slow: list[list[float]] = [[] for _ in range(_BINS)]
    skipped = len(outcomes) - len(slowdowns)
    for index, outcome in enumerate(outcomes):
        bin_index = min(int(outcome.job.at / width), _BINS - 1)
        waits[bin_index].append(outcome.wait)
        if index >= skipped:
            slow[bin_index].append(slowdowns[index - skipped])
        cluster = grid.providers[outcome.provider]
        price, watts = float(cluster.cpu_price), cluster.watts_per_cpu
        if merged:
            speed = grid.capacity / grid.cpus
            price, watts = grid.price_of_work * speed, grid.watts_of_work * speed
        for i, part in _parts(outcome.start, outcome.end, width):
            cpus = outcome.job.cpus * part
            busy[i] += cpus / grid.cpus
            money[i] += cpus * price
            power[i] += cpus * watts
        for i, part in _parts(outcome.job.at, outcome.start, width):
            queued[i] += part
    return ResultSeries(width, busy, queued, _means(waits), _means(slow), money, power)


def _parts(start: float, end: float, width: float) -> Iterable[tuple[int, float]]:
    """Yield each bin that an interval overlaps, with the covered part of the bin."""
    for i in range(int(start / width), min(int(end / width), _BINS - 1) + 1):
        part = (min(end, (i + 1) * width) - max(start, i * width)) / width
        if part > 0.0:
            yield i, part


def _means(bins: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(values) if values else 0.0 for values in bins]


# -- rows


def summarise(measures: Sequence[Measures]) -> list[ResultRow]:
    """Return means over seeds: a row for each scheduler, objective, load and block time."""
    by_case = {result.case: result for result in measures}
    groups: dict[tuple[Scheduler, str, float, float], list[Measures]] = {}
    for result in measures:
        case = result.case
        groups.setdefault((case.scheduler, case.mix, case.load, case.block), []).append(result)
    rows = [_row(key, group, by_case) for key, group in groups.items()]
    order = list(Scheduler)
    return sorted(rows, key=lambda row: (row.load, row.block, order.index(row.scheduler)))


def _row(
    key: tuple[Scheduler, str, float, float],
    group: Sequence[Measures],
    by_case: Mapping[Case, Measures],
) -> ResultRow:
    scheduler, mix, load, block = key

    def ratios(
        baseline: Scheduler, value: Callable[[Measures], float], *, inverse: bool = False
    ) -> list[float]:
        seed_ratios = []
        for result in group:
            baseline_result = by_case.get(Case(baseline, load, result.case.seed))
            if baseline_result is not None and value(result) > 0.0 and value(baseline_result) > 0.0:
                ratio = value(result) / value(baseline_result)
                seed_ratios.append(1.0 / ratio if inverse else ratio)
        return seed_ratios

    vs_saf = ratios(Scheduler.MERGED_SAF, lambda m: m.slowdown)
    vs_least_loaded = ratios(Scheduler.LEAST_LOADED, lambda m: m.slowdown, inverse=True)
    means: dict[str, Any] = {
        name: _mean(getattr(measures, name) for measures in group) for name in _AVERAGED
    }
    return ResultRow(
        scheduler=scheduler,
        mix=mix,
        load=load,
        block=block,
        seeds=len(group),
        vs_merged_saf=_mean(vs_saf),
        wait_p99_vs_fcfs=_mean(ratios(Scheduler.MERGED_FCFS, lambda m: m.wait_p99)),
        wait_longest_vs_fcfs=_mean(ratios(Scheduler.MERGED_FCFS, lambda m: m.wait_longest)),
        better_than_least_loaded=_mean(vs_least_loaded),
        each_vs_merged_saf=tuple(vs_saf),
        **means,
    )


#: Measures of which a row has the mean, under the same name.
_AVERAGED: Final = (
    *("slowdown", "wait_mean", "wait_p99", "wait_longest", "utilisation"),
    *("money", "energy", "unfairness"),
)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
