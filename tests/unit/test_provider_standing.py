"""Checks of a registration by `provider doctor`, and earnings by day."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deepsquare_chain.chain.bindings.events import JobCollected, JobSettled
from deepsquare_chain.client.doctor import standing
from deepsquare_chain.client.jobs import Accrued, accrued, by_period
from deepsquare_chain.job import Offer, Prices, Provider, ProviderStatus
from tests.support.workloads import NOW, running
from tests.unit.test_client import PROVIDER

pytestmark = pytest.mark.unit

GOOD = replace(PROVIDER, offer=Offer(1, 1, 0), approved_until=100 * 86_400)


def wrong(provider: Provider, *, silent: bool = False, now: int = 0) -> list[str]:
    return [item.name for item in standing(provider, silent=silent, now=now) if not item.ok]


def test_a_provider_in_good_standing_has_no_problems() -> None:
    assert wrong(GOOD) == []
    assert all(item.text for item in standing(GOOD, silent=False, now=0))


@pytest.mark.parametrize("status", [item for item in ProviderStatus if item.name != "ACTIVE"])
def test_every_other_status_keeps_jobs_away(status: ProviderStatus) -> None:
    assert "status" in wrong(replace(GOOD, status=status))


def test_an_approval_that_ran_out_or_soon_will() -> None:
    assert wrong(GOOD, now=100 * 86_400) == ["approval"]
    assert wrong(GOOD, now=100 * 86_400 - 1) == []
    (result,) = [e for e in standing(GOOD, silent=False, now=95 * 86_400) if e.name == "approval"]
    assert (result.text, result.hint) == ("for 5 more days", "Ask the approver to renew it soon.")


def test_silence_free_prices_and_too_large_offers_are_reported() -> None:
    assert wrong(GOOD, silent=True) == ["challenges"]
    assert wrong(replace(GOOD, prices=Prices(0, 0, 0))) == ["prices"]
    assert wrong(replace(GOOD, offer=Offer(100_000, 1, 0))) == ["offer"]
    assert wrong(replace(GOOD, offer=Offer(1, 10**9, 0))) == ["offer"]
    assert wrong(replace(GOOD, offer=Offer(0, 0, 0))) == ["offer"]
    more_nodes = replace(GOOD.hardware, nodes=9)
    assert wrong(replace(GOOD, hardware=more_nodes, offer=Offer(100_000, 1, 0))) == []


def settled(job_id: int, block: int, paid: int, seconds: int = 1) -> JobSettled:
    return JobSettled(job_id, GOOD.account, "", seconds, paid, 0, 0, block_number=block)


def collected(job_id: int, block: int, paid: int, seconds: int = 1) -> JobCollected:
    return JobCollected(job_id, GOOD.account, "", seconds, paid, 0, 0, 0, block_number=block)


def test_earnings_are_summed_by_day_of_the_payment() -> None:
    day = 86_400
    times = {1: 5, 2: 9, 3: day, 4: day + 5, 5: day + 6}
    payments = [
        *(settled(1, 4, 10, 3), collected(1, 1, 7), settled(2, 3, 1), collected(2, 2, 4, 2)),
        settled(3, 5, 0, 0),  # cancelled before its start
    ]
    entry = by_period(payments, times)
    assert [(item.day, item.jobs, item.seconds, item.paid, item.sum) for item in entry] == [
        ("1970-01-01", 2, 3, 11, 11),
        ("1970-01-02", 2, 4, 11, 22),
    ]
    assert by_period([], {}) == []


def test_unbilled_revenue_of_runs() -> None:
    short = running(1, since=NOW - 500, time_limit=60, rate=100, fee_bps=1_000)
    long = running(2, since=NOW - 500, time_limit=900, rate=10)
    result = accrued([short, long], NOW)
    assert result == Accrued(runs=2, amount=60 * 90 + 5_000, at_risk=60 * 90, job_id=1)
    assert accrued([], NOW) == Accrued()
