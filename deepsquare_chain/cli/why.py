"""A job's situation in words, by the meta-scheduler's own reasoning in a dry run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from deepsquare_chain.chain.bindings.contracts import Contracts
from deepsquare_chain.chain.rpc.on_demand import mines_on_demand
from deepsquare_chain.client.history import histories
from deepsquare_chain.credits import format_credits
from deepsquare_chain.job import Conditions, Job, JobStatus, Terms
from deepsquare_chain.metascheduler.dependencies import Hold, chain_time, conditions
from deepsquare_chain.metascheduler.eligibility import Refusal
from deepsquare_chain.metascheduler.explain import (
    explain_assigned,
    explain_challenge,
    explain_decision,
    explain_wait,
)
from deepsquare_chain.metascheduler.forecast import Prospect, forecast, prospect
from deepsquare_chain.metascheduler.policy import Rules
from deepsquare_chain.metascheduler.service import SchedulerService, SchedulerSettings
from deepsquare_chain.observability import get_logger
from deepsquare_chain.store.database import Store

_log = get_logger(__name__)
_NOBODY = "0x" + "00" * 20
_LOOKS = 3
#: Refusals that waiting does not end, and another submission may.
_LASTING = frozenset(
    {
        Refusal.EXCLUDED,
        Refusal.LABELS,
        Refusal.RATE,
        Refusal.TOO_LARGE,
        Refusal.UNREADABLE_USES,
    }
)


@dataclass(frozen=True, slots=True)
class JobSituation:
    """Why a job is where it is.

    Attributes:
        job: As it was found.
        text: The reason in a sentence, or a few lines for a job that ended.
        details: What each provider has to do with it.
        advice: What its customer may do next; empty where there is nothing to do.
        cause: Equal as long as nothing but times and amounts in the text has changed; None where
            no reason is known.
        unmet: Whether a dependency of the job can't hold any more.
    """

    job: Job
    text: str
    details: tuple[str, ...] = ()
    advice: str = ""
    cause: Hashable = None
    unmet: bool = False

    @property
    def words(self) -> str:
        """All of it for people, a line each."""
        lines = [self.text, *(f"  {each}" for each in self.details)]
        return "\n".join([*lines, f"Next: {self.advice}"] if self.advice else lines)


async def explain(contracts: Contracts, job_id: int) -> JobSituation:
    """Why a job is where it is.

    Raises:
        NotFoundError: There is no such job.
        EndpointError: The node does not answer.
    """
    job = await contracts.scheduler.get_job(job_id)
    if job.status.is_final:
        return JobSituation(job, await _ended(contracts, job))
    with DryRunScheduler(contracts) as dry_run:
        return await dry_run.situation(job)


class DryRunScheduler:
    """A scheduler without a wallet; it remembers what it has seen from one look to the next."""

    def __init__(self, contracts: Contracts, rules: Rules | None = None) -> None:
        deployment = contracts.deployment
        self._contracts = contracts
        self._store = Store.open(
            None, chain_id=deployment.chain_id, contract=deployment.scheduler, account=_NOBODY
        )
        self._settings = SchedulerSettings(
            state_dir=Path(), confirmations=0, rules=rules or Rules()
        )
        self._service = SchedulerService(contracts, None, self._store, settings=self._settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    async def look(self) -> SchedulerService:
        """The service after it has seen the grid as it is now.

        Raises:
            EndpointError: The node does not answer.
        """
        self._forget()
        for _ in range(_LOOKS):
            await self._service.cycle()
            if self._service.cluster is not None:
                break
            await asyncio.sleep(self._settings.poll_interval)
        return self._service

    async def prospect(self, terms: Terms) -> Prospect | None:
        """What a job would meet if it were submitted now; None where the grid could not be read.

        Raises:
            EndpointError: The node does not answer.
        """
        service = await self.look()
        cluster = service.cluster
        if cluster is None:
            return None
        return prospect(cluster.snapshot, service.rules, service.state.history(), terms)

    def _forget(self) -> None:
        """What an earlier look saw must not pass for what this one sees."""
        self._service.cluster = None

    async def situation(self, job: Job) -> JobSituation:
        """Why a live job is where it is.

        Raises:
            EndpointError: The node does not answer.
        """
        service = await self.look()
        cluster = service.cluster
        still = await _on_demand(self._contracts)
        if cluster is not None and job.status is not JobStatus.PENDING:
            text = explain_assigned(job, cluster.block_context.now)
            advice = _claim_advice(job, cluster.block_context.times.claim_timeout)
            held = cluster.watched.get(job.provider_id)
            challenge = explain_challenge(job, held.clock, cluster.block_context) if held else ""
            open_challenge = (challenge,) if challenge else ()
            details = (*open_challenge, *still)
            return JobSituation(
                job, text, details, advice, (job.status, job.provider_id, bool(challenge))
            )
        found = next((each for each in _reasons(service) if each.job_id == job.id), None)
        if found is None:
            return JobSituation(job, f"job {job.id} is {job.status.name}")
        cause = (found.provider_id, found.refusals, found.hold)
        at_expiry: tuple[str, ...] = ()
        if cluster is not None:
            expiry = chain_time(job.since + cluster.block_context.times.pending_expiry)
            at_expiry = (f"if it is still PENDING at {expiry}, it is cancelled with a full refund",)
        details = (*found.details, *self._expected_start(job, found), *at_expiry, *still)
        unmet = found.hold is not None and found.hold.final
        return JobSituation(job, found.text, details, _advice(found), cause, unmet)

    def _expected_start(self, job: Job, reason: Reason) -> tuple[str, ...]:
        """When a job without a place is expected to start, where that can be said."""
        cluster = self._service.cluster
        if cluster is None or reason.hold is not None or reason.provider_id is not None:
            return ()
        history = self._service.state.history()
        found = forecast(cluster.snapshot, self._service.rules, history, job.id)
        if found is None:
            return ()
        where = f"about {chain_time(found.at)} at provider {found.provider_id}"
        return (f"it is expected to start {where}, if nothing else is submitted meanwhile",)


async def _on_demand(contracts: Contracts) -> tuple[str, ...]:
    """That the chain mines only on demand, where it does."""
    age = await mines_on_demand(contracts.w3)
    if age is None:
        return ()
    words = f"this chain makes a block only when somebody sends: its latest is {age} s old"
    return (f"{words}, and services act on it after some seconds without another",)


class Teller:
    """Tells why a job that is waited for does not move, and tells it again when that changes.

    It looks in the background, one look at a time: on a long chain the first one takes a while.
    """

    def __init__(
        self,
        contracts: Contracts,
        tell: Callable[[str], None],
        on_unmet: Callable[[Job], Awaitable[None]] | None = None,
    ) -> None:
        self._contracts = contracts
        self._tell = tell
        self._on_unmet = on_unmet
        self._dry_run: DryRunScheduler | None = None
        self._looking: asyncio.Task[None] | None = None
        self._reported: Hashable = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])
        self._close()

    @property
    def idle(self) -> bool:
        """Whether no look is under way."""
        return self._looking is None or self._looking.done()

    def look(self, job: Job) -> None:
        """Begin to find out why this job stands still, unless that is being done."""
        if self.idle:
            self._looking = asyncio.create_task(self._look(job))

    async def _look(self, job: Job) -> None:
        try:
            self._dry_run = self._dry_run or DryRunScheduler(self._contracts)
            found = await self._dry_run.situation(job)
        except Exception as error:  # noqa: BLE001 - a reason that can't be found must not end the wait
            # A failing endpoint is reported by the wait itself. What was seen may be of a
            # branch that is gone: the next look begins anew.
            _log.debug("no reason found", job=job.id, error=str(error))
            self._close()
            return
        cause = (job.id, found.cause)
        if found.cause is not None and cause != self._reported:
            self._reported = cause
            self._tell(found.words)
            if found.unmet and self._on_unmet is not None:
                await self._on_unmet(found.job)

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
        used, back = history.paid + history.fee, history.refunded
        lines.append(
            f"{history.billed_seconds} s were billed: {format_credits(used)} credits used, "
            f"{format_credits(back)} refunded"
        )
    if history.successor is not None:
        lines.append(f"job {history.successor} goes on with its credits")
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Reason:
    """What a meta-scheduler would do with a waiting job; `provider_id` is None if it must wait.

    `refusals` says of each provider why the job can't go there, None where it can. `hold` is set
    where a dependency or its array's throttle keeps the job back.
    """

    job_id: int
    provider_id: int | None
    text: str
    details: tuple[str, ...] = ()
    refusals: tuple[Refusal | None, ...] = ()
    hold: Hold | None = None


async def reasons(contracts: Contracts, rules: Rules | None = None) -> tuple[list[Reason], float]:
    """What a meta-scheduler would decide now, in its own order, and the fair share error.

    The default rules are used if none are given.

    Raises:
        EndpointError: The node does not answer.
    """
    with DryRunScheduler(contracts, rules) as dry_run:
        service = await dry_run.look()
        return list(_reasons(service)), service.state.history().share_error()


async def unmet_jobs(contracts: Contracts, customer: str) -> list[int]:
    """A customer's jobs whose dependencies can't hold any more, and those that wait for these.

    Raises:
        EndpointError: The node does not answer.
    """
    with DryRunScheduler(contracts) as dry_run:
        cluster = (await dry_run.look()).cluster
    if cluster is None:
        return []
    own = {each.job.id: each for each in cluster.waiting if each.job.customer == customer}
    lost = {number for number, hold in cluster.held.items() if hold.final and number in own}
    while True:
        # Cancelled, they meet `afterany` and `afternotok` of others and nothing else.
        more = {
            number
            for number, each in own.items()
            for kind, other in (conditions(each.uses) or Conditions()).after
            if other in lost and not kind.holds(JobStatus.CANCELLED)
        }
        if more <= lost:
            return sorted(lost)
        lost |= more


def _reasons(service: SchedulerService) -> Iterator[Reason]:
    cluster, decided = service.cluster, set()
    if cluster is None:
        return
    for decision in service.plan.decisions:
        job_id = decision.waiting.job.id
        decided.add(job_id)
        text = f"a meta-scheduler would assign it now: {explain_decision(decision, service.plan)}"
        yield Reason(job_id, decision.provider_id, text)
    for waiting in cluster.waiting:
        hold = cluster.held.get(waiting.job.id)
        if hold is not None:
            text = f"job {waiting.job.id} waits: {hold.text}"
            yield Reason(waiting.job.id, None, text, hold=hold)
        elif waiting.job.id not in decided:
            found = explain_wait(waiting, cluster.snapshot, service.plan, service.rules)
            order = (found.order,) if found.order else ()
            details = (*order, *(each.text for each in found.verdicts))
            refusals = tuple(each.why for each in found.verdicts)
            yield Reason(waiting.job.id, None, found.text, details, refusals)


def _advice(reason: Reason) -> str:
    """What the customer of a PENDING job may do next."""
    back = f"`deepsquare job cancel {reason.job_id}` gives all of its credits back"
    if reason.provider_id is not None:
        return (
            "a running meta-scheduler does that within seconds; if it does not, none is running: "
            f"ask who runs the grid, or start `deepsquare metascheduler run`; {back}"
        )
    if reason.hold is not None and reason.hold.final:
        return f"it can't run any more: {back}"
    others = set(reason.refusals) - {Refusal.BANNED}
    if Refusal.BUDGET in reason.refusals and None not in reason.refusals:
        return f"`deepsquare job topup {reason.job_id} CREDITS` raises its escrow; {back}"
    if others and others <= _LASTING:
        return f"{back}; then submit it with what `deepsquare quote FILE` shows to suit"
    return f"nothing, it goes on by itself when that changes; {back}"


def _claim_advice(job: Job, timeout: int) -> str:
    """What comes next of a job that a provider holds; `timeout` is in seconds."""
    if job.status is not JobStatus.META_SCHEDULED:
        return ""
    return (
        f"nothing; if provider {job.provider_id} does not claim it within {timeout} s, a "
        "meta-scheduler takes it back and gives it to another"
    )
