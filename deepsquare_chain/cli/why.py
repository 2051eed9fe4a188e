"""Explains why a job waits, with the decisions of a meta-scheduler in a dry run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Self

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.rpc.heads import mines_on_demand
from deepsquare_chain.client.jobs import histories
from deepsquare_chain.credits import credit_count, format_credits
from deepsquare_chain.job import Conditions, Job, JobStatus
from deepsquare_chain.metascheduler.dependencies import Hold, chain_time, conditions
from deepsquare_chain.metascheduler.dry_run import DryRunScheduler
from deepsquare_chain.metascheduler.eligibility import Refusal
from deepsquare_chain.metascheduler.explain import (
    explain_assigned,
    explain_challenge,
    explain_decision,
    explain_wait,
)
from deepsquare_chain.metascheduler.forecast import Prospect
from deepsquare_chain.metascheduler.policy import Rules
from deepsquare_chain.metascheduler.service import SchedulerService
from deepsquare_chain.observability import get_logger

_log = get_logger(__name__)
#: Refusals that do not end by waiting; only a different submission may avoid them.
_LASTING = frozenset(
    {Refusal.EXCLUDED, Refusal.LABELS, Refusal.RATE, Refusal.TOO_LARGE, Refusal.UNREADABLE_USES}
)


@dataclass(frozen=True, slots=True)
class JobSituation:
    """Explanation of a job's current status.

    Attributes:
        job: The job as read from the chain.
        text: The reason in a sentence, or a few lines for a job that ended.
        details: Further lines, such as the verdict on each provider and the expected start.
        advice: What the customer can do next; empty if there is nothing to do.
        cause: Key of the reason, which ignores times and amounts in the text; None if no reason
            is known.
        unmet: Whether a dependency of the job can no longer be met.
    """

    job: Job
    text: str
    details: tuple[str, ...] = ()
    advice: str = ""
    cause: Hashable = None
    unmet: bool = False

    @property
    def words(self) -> str:
        """The text, details and advice, one per line."""
        lines = [self.text, *(f"  {detail}" for detail in self.details)]
        return "\n".join([*lines, f"Next: {self.advice}"] if self.advice else lines)


async def explain(contracts: Contracts, job_id: int) -> JobSituation:
    """Explain why a job has its current status.

    Raises:
        NotFoundError: The job does not exist.
        EndpointError: The node does not answer.
    """
    job = await contracts.scheduler.get_job(job_id)
    if job.status.is_final:
        return JobSituation(job, await _ended(contracts, job))
    with ExplainingScheduler(contracts) as dry_run:
        return await dry_run.situation(job)


class ExplainingScheduler(DryRunScheduler):
    """A dry run that explains the status of jobs."""

    def __init__(self, contracts: Contracts) -> None:
        super().__init__(contracts)
        self._contracts = contracts

    async def situation(self, job: Job) -> JobSituation:
        """Explain why a live job has its current status.

        Raises:
            EndpointError: The node does not answer.
        """
        service = await self.read()
        cluster = service.cluster
        on_demand = await _on_demand(self._contracts)
        if cluster is not None and job.status is not JobStatus.PENDING:
            text = explain_assigned(job, cluster.block_context.now)
            advice = _claim_advice(job, cluster.block_context.times.claim_timeout)
            watched = cluster.watched.get(job.provider_id)
            challenge = (
                explain_challenge(job, watched.clock, cluster.block_context) if watched else ""
            )
            open_challenge = (challenge,) if challenge else ()
            details = (*open_challenge, *on_demand)
            return JobSituation(
                job, text, details, advice, (job.status, job.provider_id, bool(challenge))
            )
        reason = next(
            (candidate for candidate in _reasons(service) if candidate.job_id == job.id), None
        )
        if reason is None:
            return JobSituation(job, f"job {job.id} is {job.status.name}")
        cause = (reason.provider_id, reason.refusals, reason.hold)
        await self.judge_starts()
        expiry_line: tuple[str, ...] = ()
        if cluster is not None:
            expiry = chain_time(job.since + cluster.block_context.times.pending_expiry)
            expiry_line = (
                f"if it is still PENDING at {expiry}, it is cancelled with a full refund",
            )
        details = (
            *reason.details,
            *_expected_start(self.known_prospect(job.id), reason),
            *expiry_line,
            *on_demand,
        )
        unmet = reason.hold is not None and reason.hold.final
        return JobSituation(job, reason.text, details, _advice(reason), cause, unmet)


def _expected_start(expected: Prospect | None, reason: Reason) -> tuple[str, ...]:
    """Return lines with the expected start of a job that can't be assigned now, if it is known."""
    if reason.hold is not None or reason.provider_id is not None:
        return ()
    if expected is None or expected.forecast is None:
        return ()
    start = expected.forecast
    when = f"about {chain_time(start.at)} at provider {start.provider_id}"
    text = f"it is expected to start {when}, if no other job is submitted meanwhile"
    return (f"{text}; {expected.reliability}",)


async def _on_demand(contracts: Contracts) -> tuple[str, ...]:
    """Return a line that says that the chain mines only on demand, if it does."""
    age = await mines_on_demand(contracts.w3)
    if age is None:
        return ()
    text = f"this chain mines on demand: its latest block is {age} s old"
    return (f"{text}, and services act on it after some seconds without another",)


class ReasonPrinter:
    """Prints why a job that is waited for does not progress, and again when the reason changes.

    The reason is determined in one background task at a time, since the first read of a long
    chain takes a while.
    """

    def __init__(
        self,
        contracts: Contracts,
        print_line: Callable[[str], None],
        on_unmet: Callable[[Job], Awaitable[None]] | None = None,
    ) -> None:
        self._contracts = contracts
        self._print_line = print_line
        self._on_unmet = on_unmet
        self._dry_run: ExplainingScheduler | None = None
        self._task: asyncio.Task[None] | None = None
        self._reported: Hashable = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._close()

    @property
    def idle(self) -> bool:
        """Whether no background task is running."""
        return self._task is None or self._task.done()

    def start_explaining(self, job: Job) -> None:
        """Start to determine why a job does not progress, unless a task is running already."""
        if self.idle:
            self._task = asyncio.create_task(self._explain(job))

    async def _explain(self, job: Job) -> None:
        try:
            self._dry_run = self._dry_run or ExplainingScheduler(self._contracts)
            situation = await self._dry_run.situation(job)
        except Exception as error:  # noqa: BLE001 - a reason that can't be found must not end the wait
            # A failing endpoint is reported by the wait itself. The state may be of a branch that
            # a reorg removed, so the next read starts with an empty one.
            _log.debug("reason not found", job=job.id, error=str(error))
            self._close()
            return
        cause = (job.id, situation.cause)
        if situation.cause is not None and cause != self._reported:
            self._reported = cause
            self._print_line(situation.words)
            if situation.unmet and self._on_unmet is not None:
                await self._on_unmet(situation.job)

    def _close(self) -> None:
        dry_run, self._dry_run = self._dry_run, None
        if dry_run is not None:
            dry_run.__exit__()


async def _ended(contracts: Contracts, job: Job) -> str:
    history = (await histories(contracts, [job.id]))[job.id]
    where = f" at provider {job.provider_id}" if job.provider_id else ""
    lines = [f"job {job.id} ended {job.status.name}{where}"]
    if history.exit_code is not None:
        lines.append(f"its exit code is {history.exit_code}")
    if history.reason:
        lines.append(f"the reason given is {history.reason!r}")
    if history.billed_seconds is not None:
        spent, refunded = history.paid + history.fee, history.refunded
        lines.append(
            f"{history.billed_seconds} s were billed: {credit_count(spent)} used, "
            f"{format_credits(refunded)} refunded"
        )
    if history.successor is not None:
        lines.append(f"job {history.successor} continues with its credits")
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Reason:
    """Decision of a meta-scheduler on a waiting job; `provider_id` is None if it must wait.

    `refusals` holds why each provider is not eligible, None for an eligible one. `hold` is set if
    a dependency or the throttle of its array delays the job.
    """

    job_id: int
    provider_id: int | None
    text: str
    details: tuple[str, ...] = ()
    refusals: tuple[Refusal | None, ...] = ()
    hold: Hold | None = None


async def reasons(contracts: Contracts, rules: Rules | None = None) -> tuple[list[Reason], float]:
    """Return the decisions a meta-scheduler would make now, in its order, and the fair share error.

    The default rules are used if none are given.

    Raises:
        EndpointError: The node does not answer.
    """
    with DryRunScheduler(contracts, rules) as dry_run:
        service = await dry_run.read()
        return list(_reasons(service)), service.state.history().share_error()


async def unmet_jobs(contracts: Contracts, customer: str) -> list[int]:
    """Return a customer's jobs whose dependencies can no longer be met, and jobs that depend on these.

    Raises:
        EndpointError: The node does not answer.
    """
    with DryRunScheduler(contracts) as dry_run:
        cluster = (await dry_run.read()).cluster
    if cluster is None:
        return []
    waiting_jobs = {
        waiting.job.id: waiting for waiting in cluster.waiting if waiting.job.customer == customer
    }
    unmet = {
        job_id for job_id, hold in cluster.held.items() if hold.final and job_id in waiting_jobs
    }
    while True:
        # A cancelled job meets `afterany` and `afternotok` dependencies, and no others.
        dependents = {
            job_id
            for job_id, waiting in waiting_jobs.items()
            for kind, required_id in (conditions(waiting.uses) or Conditions()).after
            if required_id in unmet and not kind.holds(JobStatus.CANCELLED)
        }
        if dependents <= unmet:
            return sorted(unmet)
        unmet |= dependents


def _reasons(service: SchedulerService) -> Iterator[Reason]:
    cluster, decided_ids = service.cluster, set()
    if cluster is None:
        return
    for decision in service.plan.decisions:
        job_id = decision.waiting.job.id
        decided_ids.add(job_id)
        text = f"a meta-scheduler would assign it now: {explain_decision(decision, service.plan)}"
        yield Reason(job_id, decision.provider_id, text)
    for waiting in cluster.waiting:
        hold = cluster.held.get(waiting.job.id)
        if hold is not None:
            text = f"job {waiting.job.id} waits: {hold.text}"
            yield Reason(waiting.job.id, None, text, hold=hold)
        elif waiting.job.id not in decided_ids:
            explanation = explain_wait(waiting, cluster.snapshot, service.plan, service.rules)
            order = (explanation.order,) if explanation.order else ()
            details = (*order, *(verdict.text for verdict in explanation.verdicts))
            refusals = tuple(verdict.why for verdict in explanation.verdicts)
            yield Reason(waiting.job.id, None, explanation.text, details, refusals)


def _advice(reason: Reason) -> str:
    """Return what the customer of a PENDING job can do next."""
    cancel_hint = f"`deepsquare job cancel {reason.job_id}` refunds all of its credits"
    if reason.provider_id is not None:
        return (
            "a running meta-scheduler does that within seconds; if it does not, none is running: "
            f"ask the operator of the grid, or start `deepsquare metascheduler run`; {cancel_hint}"
        )
    if reason.hold is not None and reason.hold.final:
        return f"it can't run any more: {cancel_hint}"
    refusals = set(reason.refusals) - {Refusal.BANNED}
    if Refusal.BUDGET in reason.refusals and None not in reason.refusals:
        return f"`deepsquare job topup {reason.job_id} CREDITS` raises its escrow; {cancel_hint}"
    if refusals and refusals <= _LASTING:
        return f"{cancel_hint}; then submit it with what `deepsquare quote FILE` shows as eligible"
    return f"nothing, it continues automatically when that changes; {cancel_hint}"


def _claim_advice(job: Job, timeout: int) -> str:
    """Return what happens next to an assigned job; `timeout` is in seconds."""
    if job.status is not JobStatus.META_SCHEDULED:
        return ""
    return (
        f"nothing; if provider {job.provider_id} does not claim it within {timeout} s, a "
        "meta-scheduler requeues it for another provider"
    )
