"""Explanations, as text, of decisions and of why jobs wait. Pure.

Text from customers (affinities) is untrusted: it is quoted and truncated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from deepsquare_chain.chain.bindings.records import Clock
from deepsquare_chain.credits import cost, format_credits, hourly, job_rate
from deepsquare_chain.job import Job, JobStatus, Objective
from deepsquare_chain.metascheduler.dependencies import chain_time, conditions
from deepsquare_chain.metascheduler.eligibility import (
    Amounts,
    ProviderView,
    Refusal,
    Waiting,
    amounts,
    available_capacity,
    demands,
    fits_from,
    refusal,
    release,
    run_time,
    within,
)
from deepsquare_chain.metascheduler.history import EstimateSource
from deepsquare_chain.metascheduler.liveness import BlockContext, is_gone, is_silent
from deepsquare_chain.metascheduler.policy import (
    Decision,
    Plan,
    Ranking,
    Rules,
    Snapshot,
    is_overdue,
)

_CHOSEN: Final = {
    Objective.COST: "the cheapest for the work",
    Objective.TIME: "the best by speed and fit",
    Objective.ENERGY: "the one with the lowest energy for the work",
}

_SOURCES: Final = {
    EstimateSource.KIND: "from its customer's runs of the same size and limit",
    EstimateSource.CUSTOMER: "from its customer's runs with similar limits",
    EstimateSource.EVERYBODY: "from all customers' runs with similar limits",
}

_PROVIDER_STATES: Final = {
    Refusal.WAITING_APPROVAL: "waits for approval",
    Refusal.DRAINING: "is in maintenance",
    Refusal.BANNED: "is banned",
    Refusal.EXPIRED: "has an expired approval",
    Refusal.SILENT: "has not answered a challenge and gets no new jobs until it answers",
    Refusal.CHALLENGED: "is challenged and has not answered yet",
    Refusal.EXCLUDED: "lost this job before",
    Refusal.SUSPENDED: "is suspended",
    Refusal.COOLDOWN: "recently rejected an assignment, because its prices or its load had changed",
    Refusal.AVOIDED: "recently returned this job",
}

#: Refusals, the one closest to a start first; the first that occurs explains the wait.
_NEAREST_FIRST: Final = (
    Refusal.AVOIDED,
    Refusal.COOLDOWN,
    Refusal.BUDGET,
    Refusal.LABELS,
    Refusal.TOO_LARGE,
    Refusal.RATE,
    *(why for why in _PROVIDER_STATES if why not in {Refusal.AVOIDED, Refusal.COOLDOWN}),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The eligibility of one provider for a job; `why` is None if it is eligible."""

    provider_id: int
    why: Refusal | None
    rate: int
    text: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a job waits, in one sentence, with a verdict per provider and its order in the queue."""

    job_id: int
    text: str
    verdicts: tuple[Verdict, ...] = ()
    order: str = ""


def explain_decision(decision: Decision, decided: Plan | None = None) -> str:
    """Explain why a job goes to its provider, and why now."""
    job = decision.waiting.job
    price = f"{format_credits(cost(decision.rate, job.time_limit))} credits for {job.time_limit} s"
    if decision.choices == 1:
        choice = "the only eligible provider with free capacity"
    else:
        choice = (
            f"{_CHOSEN[decision.waiting.objective]} of {decision.choices} eligible providers "
            "with free capacity"
        )
    job_conditions = conditions(decision.waiting.uses)
    if decision.choices > 1 and job_conditions is not None and job_conditions.preferences:
        choice += " that meet its preferences best"
    text = f"job {job.id} goes to provider {decision.provider_id}, {choice} ({price})"
    if decision.overdue:
        return f"{text}; it is overdue and is served first"
    order = "" if decided is None else explain_order(job, decided)
    return f"{text}; {order}" if order else text


def explain_order(job: Job, decided: Plan) -> str:
    """Explain a job's place in the queue; return an empty text for a job not in the queue."""
    place = decided.ranking.place(job.id)
    if place is None:
        return ""
    estimate = decided.ranking.estimate(job)
    if estimate.source is EstimateSource.LIMIT:
        expectation = (
            "there are no finished runs to estimate it from, so its limit of "
            f"{job.time_limit} s counts in full"
        )
    else:
        expectation = (
            f"it is expected to use {estimate.used:.0%} of its limit of {job.time_limit} s, "
            f"{_SOURCES[estimate.source]}"
        )
    text = (
        f"it is number {place} of {len(decided.ranking)} in the queue, smallest first; "
        f"{expectation}"
    )
    return text + "".join(f"; {words}" for words in _customer_reasons(job, decided.ranking))


def _customer_reasons(job: Job, ranking: Ranking) -> Iterator[str]:
    """Yield how the customer's use and priority affect a job's place."""
    rules = ranking.rules
    if rules.fair_share and (share := ranking.shares.get(job.customer, 0.0)):
        yield f"the recent use of its customer is {share:.1f} times the mean"
    if (priority := rules.priorities.get(job.customer, 1.0)) != 1.0:
        yield f"its customer has priority {priority:g}"


def explain_wait(
    waiting: Waiting, snapshot: Snapshot, decided: Plan, rules: Rules | None = None
) -> Explanation:
    """Explain why a PENDING job that the plan does not assign waits, and for what."""
    free = available_capacity(snapshot.providers, snapshot.assigned)
    verdicts = tuple(
        _verdict(waiting, view, free[view.provider.id], snapshot.now)
        for view in sorted(snapshot.providers, key=lambda view: view.provider.id)
    )
    possible = [verdict for verdict in verdicts if verdict.why is None]
    if possible:
        text = _waits_for_capacity(waiting, possible, snapshot, decided, rules or Rules())
        text += _patience_text(waiting, snapshot.now)
        order = explain_order(waiting.job, decided)
        order += _overdue_at(waiting, rules or Rules(), snapshot.now) if order else ""
        return Explanation(waiting.job.id, text, verdicts, order)
    return Explanation(waiting.job.id, _no_provider_reason(waiting, verdicts), verdicts)


def _overdue_at(waiting: Waiting, rules: Rules, now: int) -> str:
    """Return the time from which a job is overdue, as text."""
    seconds = waiting.job.time_limit
    if is_overdue(waiting, now, rules, seconds):
        return "; it is overdue: it is served before all jobs that are not"
    at = waiting.queued_at + rules.overdue_after + rules.overdue_factor * seconds
    return f"; from {chain_time(at)} it is overdue and is served first"


def _patience_text(waiting: Waiting, now: int) -> str:
    job_conditions = conditions(waiting.uses)
    if job_conditions is None or not job_conditions.patience:
        return ""
    accepted = job_conditions.accepted_cost(max(0, now - waiting.queued_at)) - 1
    return f"; its patience accepts a cost of the work of up to {accepted:.0%} above the lowest now"


def explain_assigned(job: Job, now: int) -> str:
    """Return the state of a job at a provider, as text; `now` is chain time."""
    allotted = run_time(job, job.rate)
    if job.status == JobStatus.RUNNING:
        left = job.since + allotted - now
        tail = f"{left} s of its {allotted} s are left" if left > 0 else "its time is over"
        return f"job {job.id} runs at provider {job.provider_id}; {tail}"
    duration = f"for {max(now - job.since, 0)} s"
    return f"job {job.id} is {job.status.name} at provider {job.provider_id} {duration}"


def explain_challenge(job: Job, clock: Clock, block_context: BlockContext) -> str:
    """Explain the effect of an open challenge of a job's provider; empty without a challenge."""
    if clock.challenged_at == 0:
        return ""
    times, provider = block_context.times, f"provider {job.provider_id}"
    waited = block_context.now - clock.challenged_at
    head = f"{provider} has not answered a challenge for {waited} s"
    if job.status == JobStatus.RUNNING:
        if is_gone(clock, block_context):
            return f"{head}: the run is lost, and anyone may panic it"
        return f"{head}; after {times.lost_timeout} s the run is lost"
    if is_silent(clock, block_context):
        return f"{head}: it is silent, and its queued jobs are requeued"
    return f"{head}; after {times.response_timeout} s its queued jobs are requeued"


def explain_suspension(view: ProviderView) -> str:
    """Explain why a provider is suspended (gets no new jobs), and until when."""
    return (
        f"is suspended until {chain_time(view.suspended_until)}: {view.strikes} times within a day it left "
        "jobs unclaimed, or lost or did not report a run"
    )


def _verdict(waiting: Waiting, view: ProviderView, free: Amounts, now: int) -> Verdict:
    provider, job = view.provider, waiting.job
    rate = job_rate(provider.prices, job.resources)
    reason = refusal(waiting, view, now)
    if reason is None:
        words = f"is eligible at {hourly(rate)} credits per hour; {_free_text(view, free)}"
        return Verdict(provider.id, None, rate, f"provider {provider.id} {words}")
    return Verdict(provider.id, reason, rate, _reason(reason, waiting, view, rate))


def _free_text(view: ProviderView, free: Amounts) -> str:
    """Return the free part of a provider's offer, as text."""
    offer = view.provider.offer
    cpus, memory, gpus = (max(amount, 0) for amount in free)
    gpu = f", {gpus} of {offer.gpus} GPUs" if offer.gpus else ""
    return f"free: {cpus} of {offer.cpus} CPUs, {memory} of {offer.memory} MB{gpu}"


def _reason(why: Refusal, waiting: Waiting, view: ProviderView, rate: int) -> str:
    name, offer = f"provider {view.provider.id}", view.provider.offer
    if why is Refusal.SUSPENDED:
        return f"{name} {explain_suspension(view)}"
    if why is Refusal.COOLDOWN:
        return f"{name} {_PROVIDER_STATES[why]}; it is eligible again from {chain_time(view.cooldown_until)}"
    if why in _PROVIDER_STATES:
        return f"{name} {_PROVIDER_STATES[why]}"
    price = format_credits(cost(rate, waiting.job.time_limit))
    words = {
        Refusal.TOO_LARGE: f"offers {_size_text(offer.cpus, offer.memory, offer.gpus)}: too little",
        Refusal.BUDGET: f"costs {price} credits, more than the escrow",
        Refusal.RATE: "has prices that give no valid rate",
        Refusal.LABELS: f"does not have the labels {_quoted(waiting.uses)}",
        Refusal.UNREADABLE_USES: f"can't read the affinities {_quoted(waiting.uses)}",
    }
    return f"{name} {words[why]}"


def _no_provider_reason(waiting: Waiting, verdicts: Sequence[Verdict]) -> str:
    head = f"job {waiting.job.id} can't start at any provider now"
    if not verdicts:
        return f"{head}: no provider is registered"
    if demands(waiting.uses) is None:
        return (
            f"{head}: its affinities {_quoted(waiting.uses)} can't be read, so no provider "
            "matches; cancel it and submit it with correct ones"
        )
    reasons = {verdict.why for verdict in verdicts}
    nearest = next(reason for reason in _NEAREST_FIRST if reason in reasons)
    nearest_verdicts = [verdict for verdict in verdicts if verdict.why is nearest]
    return f"{head}: {_nearest_miss(nearest, waiting, nearest_verdicts)}"


def _nearest_miss(nearest: Refusal, waiting: Waiting, those: Sequence[Verdict]) -> str:
    if nearest is Refusal.BUDGET:
        return _too_expensive(waiting.job, those)
    if nearest is Refusal.LABELS:
        return f"no provider of sufficient size has the labels {_quoted(waiting.uses)}"
    if nearest is Refusal.TOO_LARGE:
        size = waiting.job.resources
        needed = _size_text(size.cpus, size.memory, size.gpus)
        return f"no provider offers {needed}, node by node"
    words = ", ".join(verdict.text for verdict in those)
    if nearest is Refusal.AVOIDED:
        retry_at = min(waiting.avoided[verdict.provider_id] for verdict in those)
        return f"{words}; it is eligible again from {chain_time(retry_at)}"
    return words


def _too_expensive(job: Job, verdicts: Sequence[Verdict]) -> str:
    cheapest = min(verdicts, key=lambda verdict: (verdict.rate, verdict.provider_id))
    price = cost(cheapest.rate, job.time_limit)
    return (
        f"too expensive at every provider that could run it; the cheapest, provider "
        f"{cheapest.provider_id}, asks {format_credits(price)} credits for {job.time_limit} s "
        f"and the escrow is {format_credits(job.escrow)}; top it up by at least "
        f"{format_credits(price - job.escrow)}"
    )


def _waits_for_capacity(
    waiting: Waiting,
    possible: Sequence[Verdict],
    snapshot: Snapshot,
    decided: Plan,
    rules: Rules,
) -> str:
    job = waiting.job
    reservation = decided.reservation_of(job.id)
    names = _provider_names([verdict.provider_id for verdict in possible])
    if reservation is not None:
        why = "is overdue" if reservation.overdue else "is among the first in the queue"
        return (
            f"job {job.id} waits for free capacity at {names}: it {why}, and provider "
            f"{reservation.provider_id} is reserved for it, from {chain_time(reservation.at)} "
            "at the latest"
        )
    if (hold_end := decided.holds.get(job.id)) is not None:
        return (
            f"job {job.id} waits for a frugal provider: until {chain_time(hold_end)} it accepts only "
            f"those whose energy for its work is within {rules.frugal_within - 1:.0%} of the "
            f"lowest, then {names}"
        )
    assigned_count = sum(other.customer == job.customer for other in snapshot.assigned)
    if rules.max_running and assigned_count >= rules.max_running:
        return (
            f"job {job.id} waits: its customer has {assigned_count} jobs at providers, and this "
            f"scheduler allows {rules.max_running}"
        )
    overdue = is_overdue(waiting, snapshot.now, rules, job.time_limit)
    late = " (it is overdue, but other jobs are longer overdue)" if overdue else ""
    free = available_capacity(snapshot.providers, snapshot.assigned)
    needed, ids = amounts(job.resources), [verdict.provider_id for verdict in possible]
    free_now = [provider_id for provider_id in ids if within(needed, free[provider_id])]
    if free_now:
        reserved = [r.job_id for r in decided.reservations.values() if r.provider_id in free_now]
        others = "jobs before it in the queue"
        if reserved:
            others += f", or is reserved for job {' and '.join(map(str, sorted(reserved)))}"
        return f"job {job.id} waits for {names}{late}: the free capacity there is used by {others}"
    earliest = min(_fits_from(job, provider_id, snapshot, rules) for provider_id in ids)
    until = f"until about {chain_time(earliest)} at the latest"
    return f"job {job.id} waits for free capacity at {names}{late}, {until}"


def _fits_from(job: Job, provider_id: int, snapshot: Snapshot, rules: Rules) -> int:
    """Return the chain time from which a job fits at a provider, regardless of the queue."""
    free = available_capacity(snapshot.providers, snapshot.assigned)[provider_id]
    own_jobs = (other for other in snapshot.assigned if other.provider_id == provider_id)
    releases = [release(other, snapshot.now, rules.start_margin) for other in own_jobs]
    earliest = fits_from(amounts(job.resources), free, releases, snapshot.now)
    return snapshot.now if earliest is None else earliest[0]


def _size_text(cpus: int, memory: int, gpus: int) -> str:
    gpu = f" and {gpus} GPUs" if gpus else ""
    return f"{cpus} CPUs with {memory} MB{gpu}"


def _provider_names(ids: Sequence[int]) -> str:
    shown = " or ".join(str(i) for i in ids[:5])
    return f"provider {shown}" + (f" or {len(ids) - 5} others" if len(ids) > 5 else "")


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
