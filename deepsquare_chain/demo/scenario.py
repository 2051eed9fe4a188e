"""The scenario of the demo: the jobs of each customer, and their expected ends. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from deepsquare_chain.client.history import History
from deepsquare_chain.job import Job, JobStatus, Objective


class Deed(StrEnum):
    """An action on a job while it runs."""

    NONE = "none"
    CANCEL = "its customer cancels it"
    KILL = "its provider's daemon is killed"


@dataclass(frozen=True, slots=True)
class Part:
    """One job file of the scenario.

    `ends` are the expected statuses of the job and of its successors, in order. `objective`
    replaces that of the file; None keeps it. `late` jobs are submitted after the killed daemon has
    been restarted.
    """

    name: str
    customer: str
    ends: tuple[JobStatus, ...]
    objective: Objective | None = None
    deed: Deed = Deed.NONE
    exit_code: int | None = None
    late: bool = False

    @property
    def file(self) -> str:
        """Name of the job file."""
        return f"{self.name}.yaml"


#: Alice minimises cost and Bob time, so that each uses one provider while both are available.
STORY: Final[Sequence[Part]] = (
    Part(
        "survives",
        "alice",
        (JobStatus.PANICKED, JobStatus.FINISHED),
        deed=Deed.KILL,
        exit_code=0,
    ),
    Part("hello", "bob", (JobStatus.FINISHED,), Objective.TIME, exit_code=0),
    Part("exits-3", "bob", (JobStatus.FAILED,), Objective.TIME, exit_code=3),
    Part("outlives", "bob", (JobStatus.OUT_OF_CREDITS,), Objective.TIME),
    Part("cancelled", "bob", (JobStatus.CANCELLED,), Objective.TIME, Deed.CANCEL),
    Part("pi", "bob", (JobStatus.FINISHED,), Objective.TIME, exit_code=0),
    Part("wordcount", "alice", (JobStatus.FINISHED,), exit_code=0, late=True),
)


@dataclass(frozen=True, slots=True)
class Line:
    """A part with the IDs of its job and of the known successors."""

    part: Part
    job_ids: tuple[int, ...]


def lines(parts: Mapping[int, Part], histories: Mapping[int, History]) -> list[Line]:
    """Return the jobs of each part; `parts` is keyed by the ID of the first job."""
    result = []
    for first, part in sorted(parts.items()):
        ids = [first]
        while (after := histories[ids[-1]].successor) is not None and after in histories:
            ids.append(after)
        result.append(Line(part, tuple(ids)))
    return result


def problems(
    parts: Iterable[Part],
    found: Iterable[Line],
    jobs: Mapping[int, Job],
    histories: Mapping[int, History],
) -> list[str]:
    """Return the differences from the scenario; empty if there are none."""
    by_name = {line.part.name: line for line in found}
    return [
        text for part in parts for text in _problems(part, by_name.get(part.name), jobs, histories)
    ]


def _problems(
    part: Part, line: Line | None, jobs: Mapping[int, Job], histories: Mapping[int, History]
) -> Iterable[str]:
    if line is None:
        yield f"{part.name} was never submitted"
        return
    ends = tuple(jobs[number].status for number in line.job_ids)
    if ends != part.ends:
        expected = " then ".join(status.name for status in part.ends)
        yield f"{part.name} ended {' then '.join(status.name for status in ends)}, not {expected}"
        return
    last = histories[line.job_ids[-1]]
    if part.exit_code is not None and last.exit_code != part.exit_code:
        yield f"{part.name} has exit code {last.exit_code}, not {part.exit_code}"
    hosts = [histories[number].provider for number in line.job_ids]
    if len(set(hosts)) != len(hosts):
        yield f"{part.name} went to the same provider again"
