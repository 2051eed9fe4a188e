"""Forecasts of the start of a job."""

from __future__ import annotations

import dataclasses

import pytest

from deepsquare_chain.job import JobFlags, JobStatus, Objective, Prices, Resources, Terms
from deepsquare_chain.metascheduler import forecast as forecasting
from deepsquare_chain.metascheduler.forecast import Forecast, forecast, prospect, prospect_of
from deepsquare_chain.metascheduler.history import FinishedRun, RunHistory
from deepsquare_chain.metascheduler.policy import Rules, Snapshot
from deepsquare_chain.metascheduler.provider_labels import energy_use
from tests.support.workloads import NOW, address, provider, running, waiting

pytestmark = pytest.mark.unit

RULES = Rules(start_margin=0)
WIDE = waiting(1, cpus=8, time_limit=500)


def test_without_runs_it_is_the_end_by_limits() -> None:
    load = [running(9, cpus=8, time_limit=300), running(8, 2, cpus=8, time_limit=400)]
    snapshot = Snapshot(NOW, [provider(1), provider(2)], [WIDE], load)
    assert forecast(snapshot, RULES, RunHistory(), 1) == Forecast(1, 1, NOW + 300)


def test_finished_runs_bring_it_forward() -> None:
    history = RunHistory()
    for _ in range(40):
        history.record(FinishedRun(address(10**6), 8, 0, 300, 30.0))
    snapshot = Snapshot(NOW, [provider()], [WIDE], [running(9, cpus=8, time_limit=300)])
    result = forecast(snapshot, RULES, history, 1)
    assert result is not None
    assert NOW + 30 <= result.at <= NOW + 45


def test_jobs_before_it_run_first() -> None:
    small = waiting(2, cpus=8, time_limit=100)
    snapshot = Snapshot(NOW, [provider()], [WIDE, small], [running(9, cpus=8, time_limit=300)])
    assert forecast(snapshot, RULES, RunHistory(), 1) == Forecast(1, 1, NOW + 400)
    assert forecast(snapshot, RULES, RunHistory(), 2) == Forecast(2, 1, NOW + 300)


def test_a_run_past_its_expected_end_takes_half_of_the_rest() -> None:
    history = RunHistory()
    for _ in range(200):
        history.record(FinishedRun(address(10**6), 8, 0, 300, 1.0))
    load = running(9, cpus=8, time_limit=300, since=NOW - 100)
    result = forecast(Snapshot(NOW, [provider()], [WIDE], [load]), RULES, history, 1)
    assert result == Forecast(1, 1, NOW + 100)


def test_a_job_before_its_submission_has_a_position_and_a_start() -> None:
    small = waiting(2, cpus=8, time_limit=100)
    snapshot = Snapshot(NOW, [provider()], [WIDE, small], [running(9, cpus=8, time_limit=300)])
    terms = Terms(10**18, 200, Resources(8, 1, 100, 0), 0, JobFlags.NONE, Objective.COST, "", "")
    result = prospect(snapshot, RULES, RunHistory(), terms)
    assert (result.place, result.length, result.starts_in) == (2, 3, {1: 400})
    assert result.text == (
        "Now it would be number 2 of 3 in the queue, and is expected to start in about 400 s at "
        "provider 1, if no other job is submitted meanwhile. No finished run shows yet how "
        "accurate such estimates are."
    )
    free = prospect(Snapshot(NOW, [provider()], [], []), RULES, RunHistory(), terms)
    assert (free.place, free.starts_in) == (1, {1: 0})
    assert "to start at once at provider 1" in free.text
    # A claimed run has no expected end.
    claimed = dataclasses.replace(running(9, cpus=8), status=JobStatus.SCHEDULED)
    nowhere = prospect(Snapshot(NOW, [provider(cpus=4)], [], [claimed]), RULES, RunHistory(), terms)
    assert (
        nowhere.text
        == "Now it would be number 1 of 1 in the queue; when it would start is not known."
    )


def test_it_reports_how_accurate_estimates_were() -> None:
    history = RunHistory()
    history.record(FinishedRun(address(10**6), 8, 0, 300, 100.0))
    result = prospect_of(Snapshot(NOW, [provider()], [WIDE], []), RULES, history, 1)
    assert result.text.endswith(
        "Estimates of recent run times were off by a factor of 3.0 on average."
    )


def test_without_running_jobs_it_is_when_a_provider_is_back() -> None:
    suspended = dataclasses.replace(provider(), suspended_until=NOW + 60)
    snapshot = Snapshot(NOW, [suspended], [WIDE], [])
    assert forecast(snapshot, RULES, RunHistory(), 1) == Forecast(1, 1, NOW + 60)
    avoiding = waiting(1, cpus=8, time_limit=500, avoided={1: NOW + 70})
    assert forecast(Snapshot(NOW, [provider()], [avoiding], []), RULES, RunHistory(), 1) == (
        Forecast(1, 1, NOW + 70)
    )


def test_a_patient_job_starts_when_it_accepts_the_price() -> None:
    cheap = provider(1, prices=Prices(10, 1, 0))
    expensive = provider(2, prices=Prices(20, 1, 0))
    patient_job = waiting(1, cpus=8, time_limit=500, uses="deepsquare.patience=1000")
    load = [running(9, cpus=8, time_limit=10**5)]
    result = forecast(
        Snapshot(NOW, [cheap, expensive], [patient_job], load), RULES, RunHistory(), 1
    )
    assert result is not None
    assert result.provider_id == 2
    assert NOW + 700 <= result.at <= NOW + 1_100


def test_unknown_values_give_no_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    claimed = dataclasses.replace(running(9, cpus=8), status=JobStatus.SCHEDULED)
    nowhere = Snapshot(NOW, [provider(cpus=4)], [WIDE], [claimed])
    assert forecast(nowhere, RULES, RunHistory(), 1) is None
    monkeypatch.setattr(forecasting, "MAX_QUEUE", 0)
    assert forecast(Snapshot(NOW, [provider()], [WIDE], []), RULES, RunHistory(), 1) is None


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({}, (None, None)),
        ({"energy.watts_per_cpu": "10"}, (144_000, None)),
        ({"energy.watts_per_cpu": "10", "energy.grams_per_kwh": "50"}, (144_000, 2.0)),
        ({"energy.grams_per_kwh": "50"}, (None, None)),
        ({"energy.watts_per_cpu": "nan"}, (None, None)),
    ],
)
def test_energy_and_carbon_of_a_job(
    labels: dict[str, str], expected: tuple[int | None, float | None]
) -> None:
    """10 W x 4 CPUs x 3,600 s are 0.04 kWh."""
    assert energy_use(labels, 4, 3_600, NOW) == expected


@pytest.mark.parametrize(
    ("label", "hour", "hours", "grams"),
    [
        ("300/100", 6, 1, 300.0),
        ("300/100", 11, 2, 200.0),  # an hour of each half of the day
        ("300/100", 23, 2, 200.0),
        ("300/100", 18, 30, 180.0),  # a whole day, then six hours of the second half
        ("/".join(str(10 + number) for number in range(24)), 23, 1, 33.0),
        ("300/100/1/2/3", 0, 1, None),  # five parts of a day are no whole hours
        ("300/", 0, 1, None),
        ("300/much", 0, 1, None),
    ],
)
def test_carbon_by_the_time_of_day(label: str, hour: int, hours: int, grams: float | None) -> None:
    labels = {"energy.watts_per_cpu": "1000", "energy.grams_per_kwh": label}
    begin = NOW - NOW % 86_400 + 3_600 * hour
    _, result = energy_use(labels, 1, 3_600 * hours, begin)
    assert result == (None if grams is None else pytest.approx(grams * hours))
