"""The time at which a provider has capacity for a job, from the limits of its running jobs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepsquare_chain.client.offers import _offer, quote
from deepsquare_chain.job import Job, JobStatus, Offer, Resources
from tests.unit.test_client import JOB, PROVIDER, TERMS

pytestmark = pytest.mark.unit

NOW = 500
SMALL = Resources(tasks=1, cpus_per_task=4, mem_per_cpu=10, gpus=0)


def running_job(since: int, *, status: JobStatus = JobStatus.RUNNING, provider: int = 1) -> Job:
    """A job of four cpus with a limit of a hundred seconds."""
    return replace(JOB, status=status, since=since, provider_id=provider, resources=SMALL, rate=1)


def starts_in(live_jobs: list[Job], resources: Resources = SMALL) -> int | None:
    result = quote(PROVIDER, replace(TERMS, resources=resources), now=NOW)
    return _offer(result, resources, TERMS.time_limit, live_jobs, NOW).starts_in


def test_an_empty_provider_starts_now() -> None:
    assert starts_in([]) == 0
    assert starts_in([running_job(450)]) == 0


def test_a_full_provider_starts_when_its_first_run_is_used_up() -> None:
    assert starts_in([running_job(450), running_job(480)]) == 50
    assert starts_in([running_job(480), running_job(450)]) == 50


def test_a_whole_provider_is_free_when_its_last_run_is_used_up() -> None:
    whole = Resources(tasks=2, cpus_per_task=4, mem_per_cpu=10, gpus=0)
    assert starts_in([running_job(450), running_job(480)], whole) == 80


def test_a_job_that_has_not_started_counts_with_its_full_time_limit() -> None:
    waiting = running_job(100, status=JobStatus.SCHEDULED)
    assert starts_in([waiting, waiting]) == 100


def test_jobs_of_other_customers_use_no_quota() -> None:
    assert starts_in([running_job(450, provider=2), running_job(450, provider=2)]) == 0


def test_a_refused_job_has_no_start() -> None:
    banned = replace(PROVIDER, offer=Offer(2, 800, 0))
    result = quote(banned, replace(TERMS, resources=SMALL), now=NOW)
    assert not result.eligible
    offer = _offer(result, SMALL, TERMS.time_limit, [], NOW)
    assert (offer.starts_in, offer.start) == (None, "-")
    assert offer.refusal


@given(st.lists(st.integers(401, 500), max_size=8))
def test_more_jobs_never_start_one_earlier(starts: list[int]) -> None:
    jobs = [running_job(since) for since in starts]
    times = [starts_in(jobs[:count]) for count in range(len(jobs) + 1)]
    assert all(time is not None for time in times[:3])
    known = [time for time in times if time is not None]
    assert known == sorted(known)
