"""Liveness checks: which jobs to requeue, panic or cancel, and which providers to challenge. Pure.

All times are chain time in seconds. Each rule is at least as strict as the contract's, so that no
transaction is sent that the contract would refuse.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from deepsquare_chain.chain.bindings.records import Clock, Parameters
from deepsquare_chain.job import DAY, Job, JobStatus, Provider, ProviderStatus
from deepsquare_chain.metascheduler.eligibility import run_time


@dataclass(frozen=True, slots=True)
class Watch:
    """Thresholds of the liveness checks and of suspensions.

    Attributes:
        challenge_after: Seconds without a sign on chain after which a provider with jobs is
            challenged; None is twice the grid's claim timeout.
        claim_fraction: Part of the claim timeout after which an unclaimed job is suspicious.
        report_slack: Seconds past its allotment after which an unreported run is suspicious.
        strikes: Strikes (see `strikes`) within `strike_window` seconds after which a provider gets
            no new jobs until fewer are left in the window.
        strike_gap: Seconds within which all failures count as one strike.
    """

    challenge_after: int | None = None
    claim_fraction: Fraction = Fraction(1, 2)
    report_slack: int = 60
    strikes: int = 3
    strike_window: int = DAY
    strike_gap: int = 60


@dataclass(frozen=True, slots=True)
class Watched:
    """A provider with its challenge clock, last sign and strikes.

    `last_sign` is the chain time of its last sign, zero if there is none. `strikes` are the chain
    times of its recent failures, in order.
    """

    provider: Provider
    clock: Clock
    last_sign: int = 0
    strikes: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class BlockContext:
    """The block at which decisions are made: its number, its time and the grid's timeouts."""

    number: int
    now: int
    times: Parameters


@dataclass(frozen=True, slots=True)
class Suspicion:
    """A provider to challenge because of one of its jobs, and why."""

    job_id: int
    provider_id: int
    why: str


def struck(times: Sequence[int], now: int, watch: Watch) -> list[int]:
    """Return the chain times of strikes that count now, in order. Those close together are one."""
    counted: list[int] = []
    for at in sorted(times):
        if at > now - watch.strike_window and (not counted or at > counted[-1] + watch.strike_gap):
            counted.append(at)
    return counted


def suspended_until(times: Sequence[int], now: int, watch: Watch) -> int:
    """Return the chain time until which strikes keep a provider from new jobs; zero for none."""
    counted = struck(times, now, watch)
    return counted[-watch.strikes] + watch.strike_window if len(counted) >= watch.strikes else 0


def is_silent(clock: Clock, block_context: BlockContext) -> bool:
    """Return whether a provider gets no new jobs until it answers: the contract's rule."""
    return _unanswered(clock, block_context, block_context.times.response_timeout)


def is_gone(clock: Clock, block_context: BlockContext) -> bool:
    """Return whether all runs of a provider are lost: the contract's rule."""
    return _unanswered(clock, block_context, block_context.times.lost_timeout)


def _unanswered(clock: Clock, block_context: BlockContext, timeout: int) -> bool:
    """Return whether a challenge is unanswered for `timeout` seconds and `response_blocks`."""
    return (
        clock.challenged_at != 0
        and block_context.now > clock.challenged_at + timeout
        and block_context.number > clock.challenged_block + block_context.times.response_blocks
    )


def lost(
    jobs: Sequence[Job], watched: Mapping[int, Watched], block_context: BlockContext
) -> list[Job]:
    """Return RUNNING jobs that anyone may panic by the contract's rule.

    These are past the end of their run time and report grace, or their provider is gone.
    """

    def is_lost(job: Job) -> bool:
        deadline = job.since + run_time(job, job.rate) + block_context.times.report_grace
        provider = watched.get(job.provider_id)
        is_overdue = block_context.now > deadline
        return is_overdue or (provider is not None and is_gone(provider.clock, block_context))

    return [job for job in jobs if job.status == JobStatus.RUNNING and is_lost(job)]


def expired(jobs: Iterable[Job], block_context: BlockContext) -> list[Job]:
    """Return PENDING jobs that anyone may cancel by the contract's rule, oldest first.

    The refund always goes to the customer.
    """
    latest = block_context.now - block_context.times.pending_expiry
    pending = (job for job in jobs if job.status == JobStatus.PENDING)
    return sorted((j for j in pending if j.since <= latest), key=lambda job: (job.since, job.id))


def to_requeue(
    jobs: Sequence[Job], watched: Mapping[int, Watched], block_context: BlockContext
) -> list[Job]:
    """Return jobs not claimed in time, and jobs claimed by a silent or banned provider."""
    return [job for job in jobs if _is_stranded(job, watched, block_context)]


def stuck(
    jobs: Sequence[Job], watched: Mapping[int, Watched], block_context: BlockContext
) -> list[Job]:
    """Return jobs that were claimed longer than the claim timeout ago and have not started.

    Excludes jobs that `to_requeue` returns. A cluster is allowed to queue jobs: these are requeued
    only if another provider can start them.
    """
    return [
        job
        for job in jobs
        if job.status == JobStatus.SCHEDULED
        and block_context.now > job.since + block_context.times.claim_timeout
        and not _is_stranded(job, watched, block_context)
    ]


def suspicions(
    jobs: Sequence[Job], watched: Mapping[int, Watched], block_context: BlockContext, watch: Watch
) -> list[Suspicion]:
    """Return one suspicion for each provider that looks silent and can be challenged now."""
    by_provider: dict[int, Suspicion] = {}
    for job in sorted(jobs, key=lambda job: job.id):
        provider = watched.get(job.provider_id)
        if (
            provider is None
            or job.provider_id in by_provider
            or not _can_be_challenged(provider.clock, block_context)
        ):
            continue
        reason = _reason(job, provider, _last_sign(provider, jobs), block_context, watch)
        if reason:
            by_provider[job.provider_id] = Suspicion(job.id, job.provider_id, reason)
    return [by_provider[provider_id] for provider_id in sorted(by_provider)]


def _is_stranded(job: Job, watched: Mapping[int, Watched], block_context: BlockContext) -> bool:
    if job.status == JobStatus.META_SCHEDULED:
        return block_context.now > job.since + block_context.times.claim_timeout
    if job.status != JobStatus.SCHEDULED:
        return False
    provider = watched.get(job.provider_id)
    if provider is None:
        return False
    is_banned = provider.provider.status == ProviderStatus.BANNED
    return is_banned or is_silent(provider.clock, block_context)


def _can_be_challenged(clock: Clock, block_context: BlockContext) -> bool:
    return (
        clock.challenged_at == 0
        and block_context.now >= clock.answered_at + block_context.times.response_timeout
    )


def _last_sign(watched: Watched, jobs: Sequence[Job]) -> int:
    """Return the time of the last sign: a claim, start, collection or answer by the provider."""
    own_jobs = (job for job in jobs if job.provider_id == watched.provider.id)
    signs = [
        job.since for job in own_jobs if job.status in {JobStatus.SCHEDULED, JobStatus.RUNNING}
    ]
    return max([watched.last_sign, watched.clock.answered_at, *signs])


def _reason(
    job: Job, watched: Watched, last_sign: int, block_context: BlockContext, watch: Watch
) -> str:
    now, answered = block_context.now, watched.clock.answered_at
    if job.status == JobStatus.META_SCHEDULED:
        since = job.since + int(watch.claim_fraction * block_context.times.claim_timeout)
        # Challenge once for the same job: an answer proves liveness, not progress.
        if now > since > answered:
            return f"job {job.id} is unclaimed for {now - job.since} s"
        return ""
    if job.status == JobStatus.RUNNING:
        end = job.since + run_time(job, job.rate)
        since = end + min(watch.report_slack, block_context.times.claim_timeout)
        if now > since > answered:
            return f"job {job.id} is unreported {now - end} s after its end"
    if job.status not in {JobStatus.SCHEDULED, JobStatus.RUNNING}:
        return ""
    limit = watch.challenge_after
    quiet = 2 * block_context.times.claim_timeout if limit is None else limit
    if now - last_sign > quiet:
        return f"no sign of it for {now - last_sign} s while it has job {job.id}"
    return ""
