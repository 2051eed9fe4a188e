"""Liveness checks: when jobs are requeued, providers challenged, runs panicked, and queued jobs expire.

Pure. All times are chain time in seconds. Each rule is at least as strict as the contract's own,
so that no call is made which the contract would refuse.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from deepsquare_chain.chain.bindings.records import Clock, Parameters
from deepsquare_chain.job import Job, JobStatus, Provider, ProviderStatus
from deepsquare_chain.metascheduler.eligibility import run_time


@dataclass(frozen=True, slots=True)
class Watch:
    """How closely providers are watched, and when one rests.

    Attributes:
        challenge_after: Seconds without any sign on chain of a provider that holds work, after
            which it is asked; None is twice the grid's claim timeout.
        claim_fraction: Part of the claim timeout after which an unclaimed job is suspicious.
        report_slack: Seconds past its allotment after which an unreported run is suspicious.
        strikes: Strikes (see `strikes`) within `strike_window` seconds after which a provider gets
            nothing new until fewer are left in the window.
        strike_gap: Seconds within which everything that is neglected makes one strike.
    """

    challenge_after: int | None = None
    claim_fraction: Fraction = Fraction(1, 2)
    report_slack: int = 60
    strikes: int = 3
    strike_window: int = 86_400
    strike_gap: int = 60


@dataclass(frozen=True, slots=True)
class Watched:
    """A provider with its clock and what events told of it.

    `last_sign` is the chain time of the last sign of it, zero if there is none; `strikes` are the
    chain times of all that it neglected lately, in order.
    """

    provider: Provider
    clock: Clock
    last_sign: int = 0
    strikes: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class BlockContext:
    """The block that decides: its number and time, and the times of the grid."""

    number: int
    now: int
    times: Parameters


@dataclass(frozen=True, slots=True)
class Suspicion:
    """A provider to challenge over one of its jobs, and why."""

    job_id: int
    provider_id: int
    why: str


def struck(times: Sequence[int], now: int, watch: Watch) -> list[int]:
    """Chain times of the strikes that count now, in order; what comes together is one."""
    counted: list[int] = []
    for at in sorted(times):
        if at > now - watch.strike_window and (not counted or at > counted[-1] + watch.strike_gap):
            counted.append(at)
    return counted


def rests_until(times: Sequence[int], now: int, watch: Watch) -> int:
    """Chain time until which a provider gets nothing new for its strikes; zero when it may work."""
    counted = struck(times, now, watch)
    return counted[-watch.strikes] + watch.strike_window if len(counted) >= watch.strikes else 0


def is_silent(clock: Clock, block_context: BlockContext) -> bool:
    """Whether a provider gets no new jobs until it answers: the contract's rule."""
    return _unanswered(clock, block_context, block_context.times.response_timeout)


def is_gone(clock: Clock, block_context: BlockContext) -> bool:
    """Whether all runs of a provider are lost: the contract's rule."""
    return _unanswered(clock, block_context, block_context.times.lost_timeout)


def _unanswered(clock: Clock, block_context: BlockContext, timeout: int) -> bool:
    """Whether a challenge is unanswered for `timeout` seconds, and for enough blocks."""
    return (
        clock.challenged_at != 0
        and block_context.now > clock.challenged_at + timeout
        and block_context.number > clock.challenged_block + block_context.times.response_blocks
    )


def lost(
    jobs: Sequence[Job], watched: Mapping[int, Watched], block_context: BlockContext
) -> list[Job]:
    """RUNNING jobs that anyone may panic: overdue, or their provider is gone. The contract's rule."""
    return [
        job
        for job in jobs
        if job.status == JobStatus.RUNNING
        and (
            block_context.now
            > job.since + run_time(job, job.rate) + block_context.times.report_grace
            or (
                (held := watched.get(job.provider_id)) is not None
                and is_gone(held.clock, block_context)
            )
        )
    ]


def expired(jobs: Iterable[Job], block_context: BlockContext) -> list[Job]:
    """PENDING jobs that anyone may cancel, oldest first: the contract's rule.

    The refund goes to the customer, whoever cancels.
    """
    found = [
        job
        for job in jobs
        if job.status == JobStatus.PENDING
        and block_context.now >= job.since + block_context.times.pending_expiry
    ]
    return sorted(found, key=lambda job: (job.since, job.id))


def to_requeue(
    jobs: Sequence[Job], watched: Mapping[int, Watched], block_context: BlockContext
) -> list[Job]:
    """Jobs that nobody will start: unclaimed in time, or claimed by a silent or banned provider."""
    return [job for job in jobs if _is_stranded(job, watched, block_context)]


def stuck(
    jobs: Sequence[Job], watched: Mapping[int, Watched], block_context: BlockContext
) -> list[Job]:
    """Claimed long ago and not started, at a provider in good standing.

    A cluster may queue lawfully: these are taken back only if another provider can start them.
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
    """One challenge for each provider that looks silent and can be challenged now."""
    found: dict[int, Suspicion] = {}
    for job in sorted(jobs, key=lambda job: job.id):
        held = watched.get(job.provider_id)
        if (
            held is None
            or job.provider_id in found
            or not _can_be_challenged(held.clock, block_context)
        ):
            continue
        why = _why(job, held, _last_sign(held, jobs), block_context, watch)
        if why:
            found[job.provider_id] = Suspicion(job.id, job.provider_id, why)
    return [found[provider_id] for provider_id in sorted(found)]


def _is_stranded(job: Job, watched: Mapping[int, Watched], block_context: BlockContext) -> bool:
    if job.status == JobStatus.META_SCHEDULED:
        return block_context.now > job.since + block_context.times.claim_timeout
    if job.status != JobStatus.SCHEDULED:
        return False
    held = watched.get(job.provider_id)
    banned = held is not None and held.provider.status == ProviderStatus.BANNED
    return banned or _silent_provider(job, watched, block_context)


def _silent_provider(job: Job, watched: Mapping[int, Watched], block_context: BlockContext) -> bool:
    held = watched.get(job.provider_id)
    return held is not None and is_silent(held.clock, block_context)


def _can_be_challenged(clock: Clock, block_context: BlockContext) -> bool:
    return (
        clock.challenged_at == 0
        and block_context.now >= clock.answered_at + block_context.times.response_timeout
    )


def _last_sign(held: Watched, jobs: Sequence[Job]) -> int:
    """Only the provider itself claims, starts, collects and answers."""
    acts = [
        job.since
        for job in jobs
        if job.provider_id == held.provider.id
        and job.status in {JobStatus.SCHEDULED, JobStatus.RUNNING}
    ]
    return max([held.last_sign, held.clock.answered_at, *acts])


def _why(job: Job, held: Watched, last_sign: int, block_context: BlockContext, watch: Watch) -> str:
    now, answered = block_context.now, held.clock.answered_at
    if job.status == JobStatus.META_SCHEDULED:
        since = job.since + int(watch.claim_fraction * block_context.times.claim_timeout)
        # Asked once over the same thing: an answer tells that it lives, not that it hurries.
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
        return f"no sign of it for {now - last_sign} s while it holds job {job.id}"
    return ""
