"""The demo's story: who submits which job, and how each must end. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from deepsquare_chain.client.history import History
from deepsquare_chain.job import Job, JobStatus, Objective


class Deed(StrEnum):
    """What happens to a job while it runs."""

    NONE = "none"
    CANCEL = "its customer cancels it"
    KILL = "its provider's daemon is killed"


@dataclass(frozen=True, slots=True)
class Part:
    """One job file of the story.

    `ends` are the statuses of the job and of its successors, in order; `objective` stands in for
    the file's own, None keeps it. `late` jobs are submitted once the killed daemon is back.
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
        """Name of its job file."""
        return f"{self.name}.yaml"


#: Alice takes what is cheapest, Bob is in a hurry: so each keeps to one provider while both live.
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
    """A part with the ids of its job and successors, as far as they are known."""

    part: Part
    job_ids: tuple[int, ...]


def lines(parts: Mapping[int, Part], histories: Mapping[int, History]) -> list[Line]:
    """Each part's line of jobs; `parts` is by the id of the first job."""
    found = []
    for first, part in sorted(parts.items()):
        ids = [first]
        while (after := histories[ids[-1]].successor) is not None and after in histories:
            ids.append(after)
        found.append(Line(part, tuple(ids)))
    return found


def problems(
    parts: Iterable[Part],
    found: Iterable[Line],
    jobs: Mapping[int, Job],
    histories: Mapping[int, History],
) -> list[str]:
    """What went otherwise than the story says; empty when all is well."""
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
        wanted = " then ".join(each.name for each in part.ends)
        yield f"{part.name} ended {' then '.join(each.name for each in ends)}, not {wanted}"
        return
    last = histories[line.job_ids[-1]]
    if part.exit_code is not None and last.exit_code != part.exit_code:
        yield f"{part.name} has exit code {last.exit_code}, not {part.exit_code}"
    hosts = [histories[number].provider for number in line.job_ids]
    if len(set(hosts)) != len(hosts):
        yield f"{part.name} went to the same provider again"
