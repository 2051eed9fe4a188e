"""Workloads in the Standard Workload Format, folded to a wanted load.

Format: Chapin et al., JSSPP 1999. Each line describes a job by 18 numbers, -1 where unknown; lines
that begin with a semicolon are comments.
"""

from __future__ import annotations

import gzip
import io
import math
import random
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from deepsquare_chain.errors import UsageError
from deepsquare_chain.job import Objective

_FIELDS: Final = 18
_DAY: Final = 86_400
#: Bytes of a trace, unpacked, that are read at most.
_MAX_BYTES: Final = 2 * 10**9
_GZIP: Final = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class TraceJob:
    """A job of a workload; times in seconds, `seconds` is its run time at speed 1.

    `memory` is in MB per CPU.
    """

    id: int
    at: float
    cpus: int
    limit: int
    seconds: float
    customer: str
    memory: int = 1
    objective: Objective = Objective.COST

    def run_at(self, speed: float) -> float:
        """Seconds that the job runs at a speed: it is stopped at its limit."""
        return min(self.seconds / speed, float(self.limit))


@dataclass(frozen=True, slots=True)
class Trace:
    """Jobs in order of submission, and the processors of the machine that ran them."""

    name: str
    jobs: tuple[TraceJob, ...]
    processors: int

    @property
    def work(self) -> float:
        """CPU seconds at speed 1."""
        return sum(job.cpus * job.seconds for job in self.jobs)


def read_trace(path: Path) -> Trace:
    """Read a trace in the Standard Workload Format, as text or packed by gzip.

    Jobs that never ran, or that name neither processors nor a time, are left out. A job without a
    requested time gets its run time as limit.

    Raises:
        UsageError: The file can't be read, or a line is no job; the message names it.
    """
    jobs: list[TraceJob] = []
    processors = 0
    for number, line in enumerate(_lines(path), 1):
        text = line.strip()
        if not text:
            continue
        if text.startswith(";"):
            processors = _told_processors(text) or processors
            continue
        job = _read_job(path, number, text)
        if job is not None:
            jobs.append(job)
    if not jobs:
        raise UsageError(
            f"{path} holds no job that ran",
            hint="Give a trace in the Standard Workload Format: a line of 18 numbers for each job.",
        )
    jobs.sort(key=lambda job: (job.at, job.id))
    first = jobs[0].at
    numbered = tuple(replace(job, id=i, at=job.at - first) for i, job in enumerate(jobs, 1))
    widest = max(job.cpus for job in numbered)
    return Trace(path.name, numbered, max(processors, widest))


def _lines(path: Path) -> Iterable[str]:
    try:
        content = path.read_bytes()
        if content.startswith(_GZIP):
            with gzip.open(io.BytesIO(content)) as file:
                content = file.read(_MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(
            f"the trace {path} can't be read: {error}",
            hint="Name a file in the Standard Workload Format.",
        ) from error
    if len(content) > _MAX_BYTES:
        raise UsageError(f"the trace {path} holds more than {_MAX_BYTES} bytes", hint="Cut it.")
    return content.decode("utf-8", errors="replace").splitlines()


def _told_processors(comment: str) -> int:
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
            f"line {number} of {path} is no job: it needs {_FIELDS} numbers",
            hint="Give a trace in the Standard Workload Format, or remove the line.",
        )
    submitted, ran, allocated = values[1], values[3], values[4]
    asked, wanted, memory = values[7], values[8], values[9]
    cpus = int(asked if asked > 0 else allocated)
    if cpus <= 0 or ran <= 0:
        return None
    limit = math.ceil(wanted if wanted > 0 else ran)
    return TraceJob(
        id=int(values[0]),
        at=submitted,
        cpus=cpus,
        limit=limit,
        seconds=min(ran, float(limit)),
        customer=f"user {int(values[11])}" if values[11] >= 0 else "unknown",
        memory=max(1, math.ceil(memory / 1024)) if memory > 0 else 1,
    )


def scaled(trace: Trace, width: int, memory: int = 1) -> Trace:
    """The trace with its sizes scaled so that its machine becomes `width` CPUs wide.

    A trace of a smaller machine stays as it is. No job takes more than `memory` MB per CPU.
    """
    factor = min(1.0, width / trace.processors)
    jobs = tuple(
        replace(
            job,
            cpus=max(1, math.ceil(job.cpus * factor - 1e-9)),
            memory=min(job.memory, memory),
        )
        for job in trace.jobs
    )
    return replace(trace, jobs=jobs, processors=min(trace.processors, width))


def fold(trace: Trace, *, capacity: float, load: float, seed: int) -> list[TraceJob]:
    """Lay pieces of a trace over each other, so that a grid has a wanted load.

    All jobs are kept. The trace is cut into pieces as long as its work divided by the wanted
    throughput; each is turned by a random number of whole days, so that seeds differ and the daily
    pattern stays.

    Args:
        trace: The workload.
        capacity: CPUs x speed of the grid.
        load: Work over capacity, such as 0.9.
        seed: Equal seeds give equal workloads.
    """
    dice = random.Random(seed)  # noqa: S311 - a simulation, not a secret
    length = trace.work / (capacity * load)
    days = max(1, int(length // _DAY))
    shifts: dict[int, float] = {}
    jobs = []
    for job in trace.jobs:
        piece = int(job.at // length)
        if piece not in shifts:
            shifts[piece] = dice.randrange(days) * _DAY if days > 1 else dice.random() * length
        jobs.append(replace(job, at=(job.at - piece * length + shifts[piece]) % length))
    jobs.sort(key=lambda job: (job.at, job.id))
    return [replace(job, id=i) for i, job in enumerate(jobs, 1)]


#: Which objectives jobs have, in turn by a random draw.
WISHES: Final[dict[str, tuple[Objective, ...]]] = {
    "COST": (Objective.COST,),
    "TIME": (Objective.TIME,),
    "ENERGY": (Objective.ENERGY,),
    "MIXED": (Objective.COST, Objective.ENERGY, Objective.TIME),
}


def with_objectives(jobs: Sequence[TraceJob], wish: str, seed: int) -> list[TraceJob]:
    """The same jobs with objectives; MIXED draws COST, ENERGY and TIME, a third each."""
    dice = random.Random(f"objectives {seed}")  # noqa: S311
    choices = WISHES[wish]
    return [replace(job, objective=dice.choice(choices)) for job in jobs]
