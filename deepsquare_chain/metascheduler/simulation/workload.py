"""Workloads: read in the Standard Workload Format or generated, and folded to a given load.

Format: Chapin et al., JSSPP 1999. Each line describes a job by 18 numbers, -1 where unknown; lines
that begin with a semicolon are comments.

Synthetic workloads have the properties that matter to a scheduler: customers submit bursts of
similar jobs, sizes are mostly powers of two, limits are round and far above the run times, and the
arrival rate follows the time of day. `STYLES` has two that resemble recorded traces, and others
that are extreme in one property each.
"""

from __future__ import annotations

import gzip
import lzma
import math
import random
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from deepsquare_chain.errors import UsageError
from deepsquare_chain.job import DAY, Objective
from deepsquare_chain.workflow.checks import UINT24_MAX

_FIELDS: Final = 18
#: Most bytes of a trace, after decompression.
_MAX_BYTES: Final = 2 * 10**9
#: Functions that open compressed files, by the first bytes of those.
_COMPRESSED: Final = ((b"\x1f\x8b", gzip.open), (b"\xfd7zXZ\x00", lzma.open))
#: Processors of a machine or job from which on a number counts as unknown.
_TOO_WIDE: Final = 10**9


@dataclass(frozen=True, slots=True)
class TraceJob:
    """A job of a workload; times in seconds, `seconds` is its run time at speed 1.

    `memory` is in MB per CPU. `patience` is that of the job file, 0 for none.
    """

    id: int
    at: float
    cpus: int
    limit: int
    seconds: float
    customer: str
    memory: int = 1
    objective: Objective = Objective.COST
    patience: int = 0

    def run_at(self, speed: float) -> float:
        """Return the run time in seconds at a speed: at most the limit, which stops the job."""
        return min(self.seconds / speed, float(self.limit))


@dataclass(frozen=True, slots=True)
class Trace:
    """Jobs in order of submission, and the processors of the machine that ran them.

    `left_out` counts the jobs of the file that `read_trace` leaves out.
    """

    name: str
    jobs: tuple[TraceJob, ...]
    processors: int
    left_out: int = 0

    @property
    def work(self) -> float:
        """CPU seconds at speed 1."""
        return sum(job.cpus * job.seconds for job in self.jobs)


def read_trace(path: Path) -> Trace:
    """Read a trace in the Standard Workload Format, as text or compressed by gzip or xz.

    Jobs without a submission time, without processors or without a run time are left out. A job
    without a requested time gets its run time as limit. A limit is at most the longest one of a job
    record, 194 days. Preceding jobs and think times are ignored.

    Raises:
        UsageError: The file can't be read, has no job, or has an invalid line, which is named.
    """
    jobs: list[TraceJob] = []
    processors = left_out = 0
    for number, line in enumerate(_lines(path), 1):
        text = line.strip()
        if not text:
            continue
        if text.startswith(";"):
            processors = _machine_processors(text) or processors
            continue
        job = _read_job(path, number, text)
        if job is None:
            left_out += 1
        else:
            jobs.append(job)
    if not jobs:
        raise UsageError(
            f"{path} does not contain a job that ran",
            hint="Give a trace in the Standard Workload Format: a line of 18 numbers for each job.",
        )
    jobs.sort(key=lambda job: (job.at, job.id))
    first = jobs[0].at
    numbered = tuple(replace(job, id=i, at=job.at - first) for i, job in enumerate(jobs, 1))
    widest = max(job.cpus for job in numbered)
    return Trace(path.name, numbered, max(processors, widest), left_out)


def _lines(path: Path) -> Iterable[str]:
    try:
        with path.open("rb") as file:
            head = file.peek(6)
            unpack = next((unpack for magic, unpack in _COMPRESSED if head.startswith(magic)), None)
            content = (file if unpack is None else unpack(file)).read(_MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UsageError(
            f"the trace {path} can't be read: {error}",
            hint="Give a file in the Standard Workload Format.",
        ) from error
    if len(content) > _MAX_BYTES:
        raise UsageError(f"the trace {path} has more than {_MAX_BYTES} bytes", hint="Shorten it.")
    return content.decode("utf-8-sig", errors="replace").splitlines()


def _machine_processors(comment: str) -> int:
    key, _, value = comment.lstrip("; ").partition(":")
    words = value.split()
    if key.strip() == "MaxProcs" and words and words[0].isdecimal() and len(words[0]) < 10:
        return int(words[0])
    return 0


def _read_job(path: Path, number: int, text: str) -> TraceJob | None:
    try:
        values = [float(word) for word in text.split()]
    except ValueError:
        values = []
    if len(values) < _FIELDS or not all(map(math.isfinite, values)):
        raise UsageError(
            f"line {number} of {path} is not a job: it needs {_FIELDS} numbers",
            hint="Give a trace in the Standard Workload Format, or remove the line.",
        )
    submitted, run_time, allocated = values[1], values[3], values[4]
    requested_cpus, requested_time, memory = values[7], values[8], values[9]
    cpus = int(requested_cpus if requested_cpus > 0 else allocated)
    if submitted < 0 or not 0 < cpus < _TOO_WIDE or run_time <= 0:
        return None
    limit = min(math.ceil(requested_time if requested_time > 0 else run_time), UINT24_MAX)
    return TraceJob(
        id=int(values[0]),
        at=submitted,
        cpus=cpus,
        limit=limit,
        seconds=min(run_time, float(limit)),
        customer=f"user {int(values[11])}" if values[11] >= 0 else "unknown",
        memory=max(1, math.ceil(memory / 1024)) if memory > 0 else 1,
    )


def scaled(trace: Trace, width: int, memory: int = 1) -> Trace:
    """Return the trace with job sizes scaled down to a machine of `width` CPUs.

    The sizes of a trace of a smaller machine are kept. Memory is capped at `memory` MB per CPU.
    """
    factor = min(1.0, width / trace.processors)

    def scale(job: TraceJob) -> TraceJob:
        cpus = max(1, math.ceil(job.cpus * factor - 1e-9))
        return replace(job, cpus=cpus, memory=min(job.memory, memory))

    jobs = tuple(map(scale, trace.jobs))
    return replace(trace, jobs=jobs, processors=min(trace.processors, width))


def fold(trace: Trace, *, capacity: float, load: float, seed: int) -> list[TraceJob]:
    """Overlay pieces of a trace so that they give a grid the load `load`.

    All jobs are kept. The trace is cut into pieces whose length is its work / (capacity x load).
    Each piece is rotated by a random number of whole days, which makes seeds differ and keeps the
    daily pattern. Pieces shorter than two days are rotated by a random time.

    Args:
        trace: The workload.
        capacity: CPUs x speed of the grid.
        load: Work over capacity, such as 0.9.
        seed: Equal seeds give equal workloads.
    """
    rng = random.Random(seed)  # noqa: S311 - a simulation, not a secret
    length = trace.work / (capacity * load)
    days = max(1, int(length // DAY))
    shifts: dict[int, float] = {}
    folded: list[tuple[float, int, TraceJob]] = []
    for job in trace.jobs:
        piece = int(job.at // length)
        if piece not in shifts:
            shifts[piece] = rng.randrange(days) * DAY if days > 1 else rng.random() * length
        folded.append(((job.at - piece * length + shifts[piece]) % length, job.id, job))
    folded.sort(key=lambda entry: entry[:2])
    return [replace(job, id=i, at=at) for i, (at, _, job) in enumerate(folded, 1)]


#: Objectives from which the one of each job is drawn at random, by name of the mix.
MIXES: Final[dict[str, tuple[Objective, ...]]] = {
    "COST": (Objective.COST,),
    "TIME": (Objective.TIME,),
    "ENERGY": (Objective.ENERGY,),
    "MIXED": (Objective.COST, Objective.ENERGY, Objective.TIME),
}


def with_objectives(jobs: Sequence[TraceJob], mix: str, seed: int) -> list[TraceJob]:
    """Return the jobs with objectives; MIXED draws COST, ENERGY and TIME with equal probability."""
    rng = random.Random(f"objectives {seed}")  # noqa: S311
    choices = MIXES[mix]
    return [replace(job, objective=rng.choice(choices)) for job in jobs]


def with_patience(jobs: Sequence[TraceJob], part: float) -> list[TraceJob]:
    """Return the jobs with a patience of a part of the limit for those that want COST or ENERGY."""
    return [
        job
        if job.objective is Objective.TIME
        else replace(job, patience=max(1, round(part * job.limit)))
        for job in jobs
    ]


_LIMITS: Final = (300, 900, 1_800, 3_600, 7_200, 14_400, 28_800, 43_200, 86_400)


@dataclass(frozen=True, slots=True)
class Style:
    """Parameters of a workload; times in seconds.

    `burst` is the mean number of similar jobs in a row, `typical` the median run time, `spread` the
    standard deviation of its logarithm among kinds of jobs. `failed` is the part of jobs that end
    within a minute.
    """

    customers: int
    processors: int
    burst: float
    typical: float
    spread: float
    sizes: tuple[int, ...]
    failed: float = 0.12


_POWERS: Final = (1, 2, 4, 8, 16, 32, 64)

STYLES: Final[dict[str, Style]] = {
    # Many customers with short jobs.
    "mixed": Style(40, 128, 4.0, 400.0, 1.9, (1, 1, 1, 2, 2, 4, 4, 8, 8, 16, 24, 32, 64)),
    # Few customers with wide, long jobs.
    "campaign": Style(12, 128, 6.0, 2_400.0, 1.2, (4, 8, 8, 16, 16, 32, 32, 48, 64, 96)),
    "bursts": Style(20, 128, 200.0, 600.0, 1.0, _POWERS[:-1]),
    "small": Style(30, 128, 20.0, 40.0, 0.7, (1,)),
    "wide": Style(10, 128, 4.0, 7_200.0, 0.8, (64, 96, 128)),
    "heavy-tailed": Style(20, 128, 4.0, 300.0, 3.0, _POWERS),
    "one-customer": Style(1, 128, 4.0, 1_200.0, 1.5, _POWERS),
    # Three of four jobs end within a minute, and nothing that is known in advance tells which.
    "unpredictable": Style(20, 128, 4.0, 20_000.0, 0.3, (1, 2, 4, 8), 0.75),
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
        limit = next((limit for limit in _LIMITS if limit >= requested), _LIMITS[-1])
        for _ in range(1 + int(rng.expovariate(1.0 / parameters.burst))):
            failed = rng.random() < parameters.failed
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
