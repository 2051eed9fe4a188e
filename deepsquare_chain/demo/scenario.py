"""The scenario of the demo: the jobs of each customer, and their expected ends. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from deepsquare_chain.client.jobs import History
from deepsquare_chain.job import Job, JobStatus, Objective


class DemoAction(StrEnum):
    """An action on a job while it runs."""

    NONE = "none"
    CANCEL = "its customer cancels it"
    KILL = "its provider's daemon is killed"


@dataclass(frozen=True, slots=True)
class ScenarioJob:
    """One job file of the scenario.

    `ends` are the expected statuses of the job and of its successors, in order. `objective`
    replaces that of the file; None keeps it. `late` jobs are submitted after the killed daemon has
    been restarted.
    """

    name: str
    customer: str
    ends: tuple[JobStatus, ...]
    objective: Objective | None = None
    action: DemoAction = DemoAction.NONE
    exit_code: int | None = None
    late: bool = False

    @property
    def file(self) -> str:
        """Name of the job file."""
        return f"{self.name}.yaml"


#: Alice minimises cost and Bob time, so that each uses one provider while both are available.
SCENARIO: Final[Sequence[ScenarioJob]] = (
    ScenarioJob(
        "survives",
        "alice",
        (JobStatus.PANICKED, JobStatus.FINISHED),
        action=DemoAction.KILL,
        exit_code=0,
    ),
    ScenarioJob("hello", "bob", (JobStatus.FINISHED,), Objective.TIME, exit_code=0),
    ScenarioJob("exits-3", "bob", (JobStatus.FAILED,), Objective.TIME, exit_code=3),
    ScenarioJob("outlives", "bob", (JobStatus.OUT_OF_CREDITS,), Objective.TIME),
    ScenarioJob("cancelled", "bob", (JobStatus.CANCELLED,), Objective.TIME, DemoAction.CANCEL),
    ScenarioJob("pi", "bob", (JobStatus.FINISHED,), Objective.TIME, exit_code=0),
    ScenarioJob("wordcount", "alice", (JobStatus.FINISHED,), exit_code=0, late=True),
)


@dataclass(frozen=True, slots=True)
class JobChain:
    """A scenario job, with the IDs of its job and of the known successors."""

    scenario_job: ScenarioJob
    job_ids: tuple[int, ...]


def job_chains(
    scenario_jobs: Mapping[int, ScenarioJob], histories: Mapping[int, History]
) -> list[JobChain]:
    """Return the jobs of each scenario job; `scenario_jobs` is keyed by the ID of the first job."""
    result = []
    for first, scenario_job in sorted(scenario_jobs.items()):
        ids = [first]
        while (after := histories[ids[-1]].successor) is not None and after in histories:
            ids.append(after)
        result.append(JobChain(scenario_job, tuple(ids)))
    return result


def problems(
    scenario_jobs: Iterable[ScenarioJob],
    chains: Iterable[JobChain],
    jobs: Mapping[int, Job],
    histories: Mapping[int, History],
) -> list[str]:
    """Return the differences from the scenario; empty if there are none."""
    by_name = {job_chain.scenario_job.name: job_chain for job_chain in chains}
    return [
        text
        for scenario_job in scenario_jobs
        for text in _problems(scenario_job, by_name.get(scenario_job.name), jobs, histories)
    ]


def _problems(
    scenario_job: ScenarioJob,
    job_chain: JobChain | None,
    jobs: Mapping[int, Job],
    histories: Mapping[int, History],
) -> Iterable[str]:
    if job_chain is None:
        yield f"{scenario_job.name} was never submitted"
        return
    ends = tuple(jobs[number].status for number in job_chain.job_ids)
    if ends != scenario_job.ends:
        expected = " then ".join(status.name for status in scenario_job.ends)
        yield f"{scenario_job.name} ended {' then '.join(status.name for status in ends)}, not {expected}"
        return
    last = histories[job_chain.job_ids[-1]]
    if scenario_job.exit_code is not None and last.exit_code != scenario_job.exit_code:
        yield f"{scenario_job.name} has exit code {last.exit_code}, not {scenario_job.exit_code}"
    hosts = [histories[number].provider for number in job_chain.job_ids]
    if len(set(hosts)) != len(hosts):
        yield f"{scenario_job.name} was assigned to the same provider again"
