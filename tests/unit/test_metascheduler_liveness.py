"""Timeouts, challenges and lost runs, to the second of the contract."""

from __future__ import annotations

from typing import Any

import pytest

from deepsquare_chain.chain.bindings.records import Clock, Parameters
from deepsquare_chain.job import Job, JobStatus, ProviderStatus
from deepsquare_chain.metascheduler.liveness import (
    BlockContext,
    Watch,
    Watched,
    expired,
    is_gone,
    is_silent,
    lost,
    stuck,
    suspicions,
    to_requeue,
)
from tests.support.workloads import NOW, job, provider, running

TIMES = Parameters(
    claim_timeout=100,
    pending_timeout=200,
    pending_expiry=1_000,
    response_timeout=50,
    response_blocks=7,
    lost_timeout=150,
    report_grace=3_600,
    top_up_notice=30,
    collect_interval=600,
    fee_bps=500,
    submissions_open=True,
    credit="",
    registry="",
    treasury="",
    forwarder="",
)
BLOCK = 5_000
MOMENT = BlockContext(BLOCK, NOW, TIMES)
IDLE = Clock("", 0, 0, 0)
SILENT = Clock("", NOW - 51, BLOCK - 8, 0)
GONE = Clock("", NOW - 151, BLOCK - 8, 0)


def watched_provider(
    clock: Clock = IDLE, last_sign: int = NOW, **changes: Any
) -> dict[int, Watched]:
    return {1: Watched(provider(1, **changes).provider, clock, last_sign)}


def claimed(since: int, **changes: Any) -> Job:
    return running(1, status=JobStatus.SCHEDULED, since=since, **changes)


def assigned(since: int) -> Job:
    return running(1, status=JobStatus.META_SCHEDULED, since=since)


@pytest.mark.parametrize(
    ("clock", "silent"),
    [
        (IDLE, False),
        (SILENT, True),
        (Clock("", NOW - 50, BLOCK - 8, 0), False),
        (Clock("", NOW - 51, BLOCK - 7, 0), False),
    ],
)
def test_silence_needs_seconds_and_blocks(clock: Clock, silent: bool) -> None:
    assert is_silent(clock, MOMENT) is silent


@pytest.mark.parametrize(("since", "is_lost"), [(NOW - 3_660, False), (NOW - 3_661, True)])
def test_overdue_runs_are_lost(since: int, is_lost: bool) -> None:
    assert (
        bool(lost([running(1, since=since, time_limit=60)], watched_provider(), MOMENT)) is is_lost
    )


@pytest.mark.parametrize(
    ("clock", "is_lost"),
    [
        (SILENT, False),
        (Clock("", NOW - 150, BLOCK - 8, 0), False),
        (GONE, True),
        (Clock("", NOW - 151, BLOCK - 7, 0), False),
    ],
)
def test_a_silent_provider_loses_no_run_before_the_lost_timeout(
    clock: Clock, is_lost: bool
) -> None:
    run, other = running(1), running(2, 2)
    jobs = [run, other, claimed(NOW), job(4)]
    assert lost(jobs, watched_provider(clock), MOMENT) == ([run] if is_lost else [])
    assert is_gone(clock, MOMENT) is is_lost


def test_pending_jobs_expire_oldest_first() -> None:
    queue = [job(1, since=NOW - 1_000), job(2, since=NOW - 999), job(3, since=NOW - 2_000)]
    assert [item.id for item in expired([*queue, running(4, since=0)], MOMENT)] == [3, 1]


@pytest.mark.parametrize(("since", "is_requeued"), [(NOW - 100, False), (NOW - 101, True)])
def test_unclaimed_jobs_go_back_after_the_timeout(since: int, is_requeued: bool) -> None:
    assert bool(to_requeue([assigned(since)], watched_provider(), MOMENT)) is is_requeued


def test_claimed_jobs_are_requeued_if_no_provider_will_start_them() -> None:
    fresh = claimed(NOW)
    assert to_requeue([fresh], watched_provider(), MOMENT) == []
    assert to_requeue([fresh], watched_provider(SILENT), MOMENT) == [fresh]
    assert to_requeue([fresh], watched_provider(status=ProviderStatus.BANNED), MOMENT) == [fresh]
    assert to_requeue([running(1)], watched_provider(SILENT), MOMENT) == []
    # An unclaimed job waits for its timeout, even if its provider is silent.
    assert to_requeue([assigned(NOW)], watched_provider(SILENT), MOMENT) == []


@pytest.mark.parametrize(("since", "is_stuck"), [(NOW - 100, False), (NOW - 101, True)])
def test_stuck_is_claimed_long_ago_at_a_provider_in_good_standing(
    since: int, is_stuck: bool
) -> None:
    assert bool(stuck([claimed(since)], watched_provider(), MOMENT)) is is_stuck
    assert stuck([claimed(since)], watched_provider(SILENT), MOMENT) == []
    assert stuck([assigned(since)], watched_provider(), MOMENT) == []


class TestSuspicion:
    def why(self, work: Job, watched: dict[int, Watched], watch: Watch | None = None) -> str:
        result = suspicions([work], watched, MOMENT, watch or Watch())
        assert len(result) <= 1
        if not result:
            return ""
        assert (result[0].job_id, result[0].provider_id) == (work.id, 1)
        return result[0].why

    @pytest.mark.parametrize(("since", "expected"), [(NOW - 50, False), (NOW - 51, True)])
    def test_half_of_the_claim_timeout(self, since: int, expected: bool) -> None:
        message = "job 1 is unclaimed for 51 s" if expected else ""
        assert self.why(assigned(since), watched_provider()) == message

    @pytest.mark.parametrize(("since", "expected"), [(NOW - 120, False), (NOW - 121, True)])
    def test_unreported_past_its_end(self, since: int, expected: bool) -> None:
        work = running(1, since=since, time_limit=60)
        message = "job 1 is unreported 61 s after its end" if expected else ""
        assert self.why(work, watched_provider()) == message

    def test_the_slack_follows_short_grids(self) -> None:
        times = Parameters(10, *(getattr(TIMES, name) for name in list(TIMES.__slots__)[1:]))
        block_context = BlockContext(BLOCK, NOW, times)
        work = running(1, since=NOW - 71, time_limit=60)
        assert suspicions([work], watched_provider(), block_context, Watch())
        earlier = running(1, since=NOW - 70, time_limit=60)
        assert not suspicions([earlier], watched_provider(), block_context, Watch())

    @pytest.mark.parametrize("make", [claimed, lambda since: running(1, since=since)])
    @pytest.mark.parametrize(("quiet", "expected"), [(200, False), (201, True)])
    def test_no_sign_for_twice_the_claim_timeout(
        self, make: Any, quiet: int, expected: bool
    ) -> None:
        work = make(NOW - quiet)
        if work.status is JobStatus.RUNNING:
            work = running(1, since=NOW - quiet, time_limit=10_000)
        words = f"no sign of it for {quiet} s while it has job 1" if expected else ""
        assert self.why(work, watched_provider(last_sign=0)) == words
        assert self.why(work, watched_provider(last_sign=NOW - 5)) == ""
        assert self.why(work, watched_provider(Clock("", 0, 0, NOW - 60))) == ""
        early_watch = Watch(challenge_after=quiet - 1)
        assert "no sign of it" in self.why(work, watched_provider(last_sign=0), early_watch)

    def test_the_start_of_another_of_its_jobs_is_a_sign(self) -> None:
        old = running(1, since=NOW - 500, time_limit=10_000)
        new = running(2, since=NOW - 3, time_limit=10_000)
        assert suspicions([old, new], watched_provider(last_sign=0), MOMENT, Watch()) == []
        other_run = running(2, 2, since=NOW - 3, time_limit=10_000)
        assert suspicions([old, other_run], watched_provider(last_sign=0), MOMENT, Watch())

    def test_one_challenge_a_provider(self) -> None:
        jobs = [running(n, since=NOW - 900, time_limit=10_000) for n in (7, 5, 6)]
        result = suspicions(jobs, watched_provider(last_sign=0), MOMENT, Watch())
        assert [item.job_id for item in result] == [5]

    def test_no_challenge_that_the_contract_refuses(self) -> None:
        late_job = assigned(NOW - 90)
        assert self.why(late_job, watched_provider(Clock("", NOW - 5, BLOCK - 5, 0))) == ""
        assert self.why(late_job, watched_provider(Clock("", 0, 0, NOW - 49))) == ""
        answered_before_it_was_late = Clock("", 0, 0, NOW - 50)
        assert self.why(late_job, watched_provider(answered_before_it_was_late))

    def test_an_answer_settles_the_same_suspicion(self) -> None:
        late_job = assigned(NOW - 120)
        assert self.why(late_job, watched_provider(Clock("", 0, 0, NOW - 60))) == ""
        assert self.why(late_job, watched_provider(Clock("", 0, 0, NOW - 71)))
        unreported = running(1, since=NOW - 190, time_limit=60)
        assert self.why(unreported, watched_provider(Clock("", 0, 0, NOW - 60))) == ""

    def test_providers_without_jobs_are_not_challenged(self) -> None:
        assert suspicions([], watched_provider(last_sign=0), MOMENT, Watch()) == []
        assert (
            suspicions([running(1, 9, since=0)], watched_provider(last_sign=0), MOMENT, Watch())
            == []
        )
