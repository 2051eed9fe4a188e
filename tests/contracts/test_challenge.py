"""challenge and answer: when a provider counts as unresponsive."""

from __future__ import annotations

import pytest

from deepsquare_chain.job import JobStatus
from tests.support.evm import reverts
from tests.support.grid import TIMES, Grid, Host

pytestmark = pytest.mark.contracts
SECONDS = TIMES["responseTimeout"]
LOST = TIMES["lostTimeout"]
BLOCKS = TIMES["responseBlocks"]


def challenge(grid: Grid, job_id: int) -> object:
    return grid.scheduler.challenge(job_id, sender=grid.stranger)


@pytest.mark.parametrize("status", [s for s in JobStatus if s.is_assigned])
def test_anyone_starts_the_clock_for_an_assigned_job(
    grid: Grid, host: Host, status: JobStatus
) -> None:
    job_id = grid.in_status(status, host)
    receipt = grid.scheduler.challenge(job_id, sender=grid.stranger)
    assert receipt.one("ProviderChallenged").parameters == {
        "jobId": job_id,
        "provider": host.account,
        "by": grid.stranger,
        "answerBy": grid.chain.now + SECONDS,
    }
    clock = grid.scheduler.clockOf(host.id)
    assert clock.account == host.account
    assert (clock.challengedAt, clock.challengedBlock) == (grid.chain.now, grid.chain.block)
    assert clock.answeredAt == 0
    assert grid.status(job_id) is status


def test_not_for_a_job_without_a_provider(grid: Grid, host: Host) -> None:
    for status in JobStatus:
        if status.is_assigned:
            continue
        job_id = grid.in_status(status, host)
        with reverts("WrongStatus", job_id, status):
            challenge(grid, job_id)


def test_a_running_clock_is_not_moved(grid: Grid, host: Host) -> None:
    first, second = grid.assigned(host), grid.assigned(host)
    challenge(grid, first)
    started = grid.scheduler.clockOf(host.id)
    for job_id in (first, second):
        grid.chain.advance(SECONDS + 5)
        with reverts("ChallengeRefused", job_id):
            challenge(grid, job_id)
    assert grid.scheduler.clockOf(host.id) == started


def test_one_clock_for_each_provider(grid: Grid, host: Host, other: Host) -> None:
    challenge(grid, grid.assigned(host))
    challenge(grid, grid.assigned(other))
    grid.chain.advance(SECONDS + 1, BLOCKS + 1)
    grid.scheduler.answer(sender=other.account)
    assert grid.scheduler.isSilent(host.id)
    assert not grid.scheduler.isSilent(other.id)


def test_an_answer_stops_the_clock_and_delays_the_next_challenge(grid: Grid, host: Host) -> None:
    job_id = grid.assigned(host)
    challenge(grid, job_id)
    grid.chain.advance(3)
    receipt = grid.scheduler.answer(sender=host.account)
    assert receipt.one("ProviderAnswered").provider == host.account
    clock = grid.scheduler.clockOf(host.id)
    assert (clock.challengedAt, clock.challengedBlock) == (0, 0)
    assert clock.answeredAt == grid.chain.now
    grid.chain.advance(SECONDS - 1)
    with reverts("ChallengeRefused", job_id):
        challenge(grid, job_id)
    grid.chain.advance(1)
    challenge(grid, job_id)


def test_only_the_challenged_provider_answers(grid: Grid, host: Host, other: Host) -> None:
    challenge(grid, grid.assigned(host))
    for caller in (other.account, grid.alice, grid.meta, grid.admin, grid.stranger):
        with reverts("NothingToAnswer"):
            grid.scheduler.answer(sender=caller)
    grid.scheduler.answer(sender=host.account)
    with reverts("NothingToAnswer"):
        grid.scheduler.answer(sender=host.account)


@pytest.mark.parametrize(
    ("seconds", "blocks", "is_silent", "is_lost"),
    [
        (SECONDS, BLOCKS + 1, False, False),
        (SECONDS + 1, BLOCKS, False, False),
        (SECONDS + 1, BLOCKS + 1, True, False),
        (LOST, BLOCKS + 1, True, False),
        (LOST + 1, BLOCKS, False, False),
        (LOST + 1, BLOCKS + 1, True, True),
        # after a halt of a week no provider counts as silent
        (7 * 86_400, 1, False, False),
        (7 * 86_400, BLOCKS, False, False),
        (7 * 86_400, BLOCKS + 1, True, True),
        # neither on a chain with many blocks per second
        (1, 10_000, False, False),
        (SECONDS, 10_000, False, False),
    ],
)
def test_silence_and_loss_take_seconds_and_blocks(
    grid: Grid, host: Host, seconds: int, blocks: int, is_silent: bool, is_lost: bool
) -> None:
    job_id = grid.running(host, timeLimit=10**6, amount=10**14)
    challenge(grid, job_id)
    grid.chain.advance(seconds, blocks)
    assert grid.scheduler.isSilent(host.id) is is_silent
    assert grid.scheduler.isLost(job_id) is is_lost


def test_silence_ends_with_an_answer_at_any_time(grid: Grid, host: Host) -> None:
    job_id = grid.assigned(host)
    grid.silence(host, job_id)
    grid.chain.advance(10**5)
    grid.scheduler.answer(sender=host.account)
    assert not grid.scheduler.isSilent(host.id)


def test_the_clock_continues_after_the_job(grid: Grid, host: Host) -> None:
    job_id = grid.running(host)
    challenge(grid, job_id)
    grid.scheduler.cancel([job_id], sender=grid.alice)
    grid.chain.advance(SECONDS + 1, BLOCKS + 1)
    assert grid.scheduler.isSilent(host.id)
    with reverts("ProviderSilent"):
        grid.assigned(host)


def test_challenge_clocks_of_unknown_providers_are_empty(grid: Grid) -> None:
    assert not grid.scheduler.isSilent(0)
    assert not grid.scheduler.isSilent(65_535)
    assert tuple(grid.scheduler.clockOf(9)) == ("0x" + "00" * 20, 0, 0, 0)
