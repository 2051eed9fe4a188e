"""Explanations of decisions and waits."""

from __future__ import annotations

import dataclasses

import pytest

from deepsquare_chain.chain.bindings.records import Clock
from deepsquare_chain.credits import CREDIT
from deepsquare_chain.job import Job, JobStatus, Objective, Prices, ProviderStatus
from deepsquare_chain.metascheduler.eligibility import ProviderView, Refusal, Waiting
from deepsquare_chain.metascheduler.explain import (
    Explanation,
    chain_time,
    explain_assigned,
    explain_challenge,
    explain_decision,
    explain_wait,
)
from deepsquare_chain.metascheduler.history import FinishedRun, RunHistory
from deepsquare_chain.metascheduler.policy import Rules, Snapshot, plan
from tests.support.workloads import NOW, address, provider, running, waiting
from tests.unit.test_metascheduler_liveness import BLOCK, MOMENT

RULES = Rules(overdue_after=100, overdue_factor=0, reservations=0, start_margin=0)


def why(
    wait: Waiting,
    providers: list[ProviderView],
    assigned: list[Job] | None = None,
    others: list[Waiting] | None = None,
) -> Explanation:
    snapshot = Snapshot(NOW, providers, [wait, *(others or [])], assigned or [])
    job_plan = plan(snapshot, RULES)
    assert wait.job.id not in {d.waiting.job.id for d in job_plan.decisions}
    return explain_wait(wait, snapshot, job_plan, RULES)


def test_too_expensive_everywhere() -> None:
    price = Prices(CREDIT // 100, 0, 0)
    explanation = why(
        waiting(escrow=CREDIT // 2),
        [provider(1, prices=Prices(CREDIT, 0, 0)), provider(2, prices=price)],
    )
    assert explanation.text == (
        "job 1 can't start at any provider now: too expensive at every provider that could run it; the "
        "cheapest, provider 2, asks 0.6 credits for 60 s and the escrow is 0.5; top it up by at "
        "least 0.1"
    )
    assert [verdict.why for verdict in explanation.verdicts] == [Refusal.BUDGET, Refusal.BUDGET]
    assert explanation.verdicts[0].text == "provider 1 costs 60 credits, more than the escrow"


def test_no_provider_has_the_label() -> None:
    explanation = why(waiting(uses="gpu.model=h100"), [provider(1), provider(2)])
    assert "no provider of sufficient size has the labels 'gpu.model=h100'" in explanation.text


def test_affinities_that_cannot_be_read() -> None:
    explanation = why(waiting(uses="a==b\x1b[31m" + "x" * 500), [provider()])
    assert "can't be read, so no provider matches; cancel it" in explanation.text
    assert "\x1b" not in explanation.text
    assert len(explanation.text) < 300


def test_too_large_for_all() -> None:
    explanation = why(waiting(cpus=64, gpus=4), [provider()])
    assert "no provider offers 64 CPUs with 6400 MB and 4 GPUs, node by node" in explanation.text
    assert explanation.verdicts[0].text == (
        "provider 1 offers 8 CPUs with 8000 MB and 2 GPUs: too little"
    )


def test_no_providers_at_all() -> None:
    assert why(waiting(), []).text.endswith("no provider is registered")


def test_no_provider_is_available() -> None:
    grid = [
        provider(1, status=ProviderStatus.DRAINING),
        provider(2, silent=True),
        provider(3, status=ProviderStatus.BANNED),
        provider(4, approved_until=NOW - 1),
        provider(5, status=ProviderStatus.WAITING_APPROVAL),
    ]
    assert [v.text for v in why(waiting(), grid).verdicts] == [
        "provider 1 is in maintenance",
        "provider 2 has not answered a challenge and gets no new jobs until it answers",
        "provider 3 is banned",
        "provider 4 has an expired approval",
        "provider 5 waits for approval",
    ]
    assert "is in maintenance" in why(waiting(), grid[:1]).text


def test_the_reason_is_the_condition_that_comes_closest() -> None:
    grid = [provider(1, silent=True), provider(2, price=10**18), provider(3, cpus=1)]
    assert "too expensive" in why(waiting(cpus=2), grid).text


def test_a_provider_that_gave_it_back() -> None:
    explanation = why(waiting(avoided={1: NOW + 60, 7: NOW + 5}), [provider()])
    assert "provider 1 recently returned this job; it is eligible again from" in explanation.text
    assert chain_time(NOW + 60) in explanation.text


def test_waits_for_free_capacity() -> None:
    running_jobs = [running(5, 1, cpus=8, time_limit=900), running(6, 2, cpus=8, time_limit=300)]
    explanation = why(waiting(), [provider(1), provider(2)], running_jobs)
    assert explanation.text == (
        "job 1 waits for free capacity at provider 1 or 2, until about "
        f"{chain_time(NOW + 300)} at the latest"
    )
    assert explanation.verdicts[0].text == (
        "provider 1 is eligible at 0.0000000000036 credits per hour; "
        "free: 0 of 8 CPUs, 7200 of 8000 MB, 2 of 2 GPUs"
    )


def test_a_delayed_job_shows_until_when_it_waits_for_a_frugal_provider() -> None:
    grid = [
        provider(1, labels={"energy.watts_per_cpu": "10"}),
        provider(2, labels={"energy.watts_per_cpu": "15"}),
    ]
    job = waiting(1, objective=Objective.ENERGY, time_limit=100)
    assert why(job, grid, [running(9, 1, cpus=8)]).text == (
        f"job 1 waits for a frugal provider: until {chain_time(NOW + 200)} it accepts only those "
        "whose energy for its work is within 25% of the lowest, then provider 1 or 2"
    )


def test_a_long_list_of_providers_is_shortened() -> None:
    grid = [provider(n) for n in range(1, 9)]
    running_jobs = [running(10 + n, n, cpus=8) for n in range(1, 9)]
    assert "1 or 2 or 3 or 4 or 5 or 3 others" in why(waiting(), grid, running_jobs).text


def test_capacity_reserved_for_it_and_for_another() -> None:
    big = waiting(1, cpus=8, queued_at=NOW - 500)
    small = waiting(2, time_limit=900)
    running_jobs = [running(9, cpus=4, time_limit=300)]
    assert why(big, [provider()], running_jobs, [small]).text == (
        "job 1 waits for free capacity at provider 1: it is overdue, and provider 1 is reserved for it, "
        f"from {chain_time(NOW + 300)} at the latest"
    )
    assert why(small, [provider()], running_jobs, [big]).text == (
        "job 2 waits for provider 1: the free capacity there is used by jobs before it in the queue, or "
        "is reserved for job 1"
    )


def test_smaller_ones_go_first() -> None:
    small = waiting(2, cpus=8, time_limit=10)
    explanation = why(waiting(1, cpus=8), [provider()], [], [small])
    assert explanation.text.endswith(
        "the free capacity there is used by jobs before it in the queue"
    )


@pytest.mark.parametrize(
    ("objective", "reason"),
    [
        (Objective.COST, "the cheapest for the work of 2"),
        (Objective.TIME, "the best by speed and fit of 2"),
        (Objective.ENERGY, "the one with the lowest energy for the work of 2"),
    ],
)
def test_decisions(objective: Objective, reason: str) -> None:
    snapshot = Snapshot(NOW, [provider(1), provider(2)], [waiting(objective=objective)], [])
    job_plan = plan(snapshot, RULES)
    text = explain_decision(job_plan.decisions[0], job_plan)
    assert text == (
        f"job 1 goes to provider 1, {reason} eligible providers with free capacity "
        "(0.00000000000006 credits for 60 s); it is number 1 of 1 in the queue, smallest first; "
        "there are no finished runs to estimate it from, so its limit of 60 s counts in full"
    )


def test_a_decision_without_choice_for_an_overdue_job() -> None:
    snapshot = Snapshot(NOW, [provider(1)], [waiting(queued_at=NOW - 500)], [])
    text = explain_decision(plan(snapshot, RULES).decisions[0])
    assert "the only eligible provider with free capacity" in text
    assert text.endswith("it is overdue and is served first")


@pytest.mark.parametrize(
    ("customer", "limit", "message"),
    [
        (
            address(7),
            3_600,
            "25% of its limit of 3600 s, from its customer's runs of the same size",
        ),
        (address(7), 3_500, "34% of its limit of 3500 s, from its customer's runs with similar"),
        (address(8), 3_500, "60% of its limit of 3500 s, from all customers' runs with similar"),
        (
            address(8),
            60,
            "there are no finished runs to estimate it from, so its limit of 60 s counts in full",
        ),
    ],
)
def test_the_expected_use_and_where_it_comes_from(customer: str, limit: int, message: str) -> None:
    history = RunHistory()
    for _ in range(2):
        history.record(FinishedRun(address(7), 8, 0, 3_600, 720.0))
    wait = waiting(1, cpus=8, customer=customer, time_limit=limit)
    other = waiting(2, cpus=1, time_limit=10)
    snapshot = Snapshot(NOW, [provider()], [wait, other], [running(9, cpus=8)])
    job_plan = plan(snapshot, RULES, history)
    order = explain_wait(wait, snapshot, job_plan, RULES).order
    assert order.startswith("it is number 2 of 2 in the queue, smallest first; ")
    assert message in order


def test_the_first_without_free_capacity_have_a_reservation() -> None:
    rules = dataclasses.replace(RULES, overdue_after=10**6, reservations=1)
    wait = waiting(1, cpus=8)
    snapshot = Snapshot(NOW, [provider()], [wait], [running(9, cpus=4, time_limit=300)])
    text = explain_wait(wait, snapshot, plan(snapshot, rules), rules).text
    assert text == (
        "job 1 waits for free capacity at provider 1: it is among the first in the queue, and "
        f"provider 1 is reserved for it, from {chain_time(NOW + 300)} at the latest"
    )


def test_use_priority_and_the_limit_of_a_customer_are_explained() -> None:
    history = RunHistory()
    history.record(FinishedRun(address(7), 1, 0, 60, None, 3.0))
    history.record(FinishedRun(address(8), 1, 0, 60, None, 1.0))
    rules = dataclasses.replace(RULES, fair_share=0.5, priorities={address(7): 4.0}, max_running=1)
    wait = waiting(1, customer=address(7))
    running_jobs = [running(9, customer=address(7))]
    snapshot = Snapshot(NOW, [provider()], [wait], running_jobs)
    explanation = explain_wait(wait, snapshot, plan(snapshot, rules, history), rules)
    assert explanation.text == (
        "job 1 waits: its customer has 1 jobs at providers, and this scheduler allows 1"
    )
    assert explanation.order.endswith(
        "; the recent use of its customer is 1.5 times the mean; its customer has priority 4; from "
        f"{chain_time(NOW + 100)} it is overdue and is served first"
    )


def test_an_overdue_job_behind_another_has_this_reason() -> None:
    worse = waiting(2, cpus=8, queued_at=NOW - 10**6)
    explanation = why(
        waiting(1, cpus=8, queued_at=NOW - 5_000), [provider()], [running(9)], [worse]
    )
    assert "(it is overdue, but other jobs are longer overdue)" in explanation.text


def test_assigned_jobs() -> None:
    job = running(4, 2, since=NOW - 10)
    assert explain_assigned(job, NOW) == "job 4 runs at provider 2; 50 s of its 60 s are left"
    assert explain_assigned(job, NOW + 60) == "job 4 runs at provider 2; its time is over"
    claimed = dataclasses.replace(job, status=JobStatus.SCHEDULED)
    assert explain_assigned(claimed, NOW) == "job 4 is SCHEDULED at provider 2 for 10 s"


@pytest.mark.parametrize(
    ("status", "seconds", "message"),
    [
        (JobStatus.RUNNING, 0, ""),
        (JobStatus.RUNNING, 100, "for 100 s; after 150 s the run is lost"),
        (JobStatus.RUNNING, 151, "for 151 s: the run is lost, and anyone may panic it"),
        (JobStatus.SCHEDULED, 50, "for 50 s; after 50 s its queued jobs are requeued"),
        (JobStatus.SCHEDULED, 51, "for 51 s: it is silent, and its queued jobs are requeued"),
    ],
)
def test_an_open_challenge(status: JobStatus, seconds: int, message: str) -> None:
    clock = Clock("", NOW - seconds if seconds else 0, BLOCK - 8, 0)
    text = explain_challenge(running(4, 2, status=status), clock, MOMENT)
    head = "provider 2 has not answered a challenge "
    assert text == (head + message if message else "")


def test_a_provider_that_refused_an_assignment() -> None:
    view = dataclasses.replace(provider(), cooldown_until=NOW + 2)
    [verdict] = why(waiting(), [view]).verdicts
    assert verdict.why is Refusal.COOLDOWN
    assert verdict.text.startswith("provider 1 recently rejected an assignment")
    assert verdict.text.endswith(chain_time(NOW + 2))


def test_times_beyond_the_calendar() -> None:
    assert chain_time(0) == "1970-01-01 00:00:00 UTC"
    assert chain_time(2**62) == "no foreseeable time"
