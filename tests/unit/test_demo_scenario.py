"""The demo detects jobs that end differently than its scenario expects."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from deepsquare_chain.client.jobs import History
from deepsquare_chain.demo import main
from deepsquare_chain.demo.runner import DemoDisplay, Row
from deepsquare_chain.demo.scenario import SCENARIO, ScenarioJob, job_chains, problems
from deepsquare_chain.job import Job, JobStatus
from deepsquare_chain.workflow import load_job_file
from tests.support.workloads import job

EXAMPLES = Path(__file__).parents[2] / "examples"
PART = ScenarioJob("work", "alice", (JobStatus.PANICKED, JobStatus.FINISHED), exit_code=0)
BASE = job(1, status=JobStatus.PANICKED, provider_id=1, retries_left=1)


def expected_result() -> tuple[dict[int, Job], dict[int, History]]:
    jobs = {1: BASE, 2: replace(BASE, id=2, status=JobStatus.FINISHED, retry_of=1)}
    histories = {
        1: History(1, provider="0xB", successor=2),
        2: History(2, provider="0xC", exit_code=0, retry_of=1),
    }
    return jobs, histories


def problems_of(jobs: dict[int, Job], histories: dict[int, History]) -> list[str]:
    return problems([PART], job_chains({1: PART}, histories), jobs, histories)


def test_an_expected_result_has_no_problems() -> None:
    assert problems_of(*expected_result()) == []


def test_every_unexpected_result_is_reported() -> None:
    jobs, histories = expected_result()
    assert "never submitted" in problems([PART], [], jobs, histories)[0]
    jobs, histories = expected_result()
    jobs[2] = replace(jobs[2], status=JobStatus.FAILED)
    assert "PANICKED then FAILED" in problems_of(jobs, histories)[0]
    jobs, histories = expected_result()
    histories[1].successor = None
    assert "ended PANICKED, not PANICKED then FINISHED" in problems_of(jobs, histories)[0]
    jobs, histories = expected_result()
    histories[2].exit_code = 1
    assert "exit code 1" in problems_of(jobs, histories)[0]
    jobs, histories = expected_result()
    histories[2].provider = "0xB"
    assert "same provider" in problems_of(jobs, histories)[0]


def test_the_scenario_has_every_final_status() -> None:
    statuses = {status for scenario_job in SCENARIO for status in scenario_job.ends}
    assert statuses == {status for status in JobStatus if status.is_final}


@pytest.mark.parametrize("scenario_job", SCENARIO, ids=lambda scenario_job: scenario_job.name)
def test_every_part_has_its_job_file(scenario_job: ScenarioJob) -> None:
    job_file = load_job_file(EXAMPLES / scenario_job.file)
    assert job_file.name == scenario_job.name
    assert job_file.retries == len(scenario_job.ends) - 1


ROW = Row(1, "[b]x\x1b", "alice", JobStatus.PENDING, "", 10**18, None, 5 * 10**9)


def test_display_without_a_terminal_prints_changes_once() -> None:
    output = io.StringIO()
    with DemoDisplay(Console(file=output, width=200), "title") as board:
        board.show([ROW])
        board.show([ROW])
        finished_row = replace(ROW, status=JobStatus.FINISHED, provider="alpine", used=10**17)
        board.show([finished_row])
        board.print_output("x", 1, "hi\x1b[2J[red]")
    text = output.getvalue()
    assert text.count("PENDING") == 1
    assert "FINISHED at alpine, used 0.1 credits" in text
    assert "x#1 | hi\\x1b[2J[red]" in text
    assert "\x1b" not in text


def test_board_on_a_terminal_shows_a_table() -> None:
    output = io.StringIO()
    console = Console(file=output, width=120, force_terminal=True, color_system=None)
    with DemoDisplay(console, "title") as board:
        board.show([ROW])
        board.step("now this")
    assert "gas (gwei)" in output.getvalue()
    assert "now this" in output.getvalue()


class EmptyGrid:
    """A grid without processes; `ended` says that it was stopped."""

    ended = False

    def __init__(self, *_: object, **__: object) -> None:
        type(self).ended = False

    async def __aenter__(self) -> EmptyGrid:
        return self

    async def __aexit__(self, *_: object) -> None:
        type(self).ended = True

    async def start_explorer(self, port: int) -> str:
        return f"port {port}"


class FinishedRunner:
    """A scenario that ends at once."""

    tracker, problems, signed = None, (), 2

    def __init__(self, *_: object) -> None: ...

    async def run(self) -> None: ...


@pytest.mark.parametrize("is_ok", [True, False])
async def test_a_finished_demo_stops_its_grid_and_then_reports(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_ok: bool
) -> None:
    """Without `serve`; tests/e2e/test_demo.py has the one that continues to serve."""
    stream = io.StringIO()

    def show(console: Console) -> None:
        assert EmptyGrid.ended
        console.print("the summary")

    async def audit(*_: object) -> SimpleNamespace:
        problems = [] if is_ok else ["a job is missing"]
        return SimpleNamespace(document={"jobs": []}, ok=is_ok, problems=problems, show=show)

    monkeypatch.setattr(main, "LocalGrid", EmptyGrid)
    monkeypatch.setattr(main, "DemoRunner", FinishedRunner)
    monkeypatch.setattr(main, "audit_grid_ledgers", audit)
    result = await main.run_demo(chain="embedded", folder=tmp_path / "demo", stream=stream)
    assert (result.ok, result.document["jobs"]) == (is_ok, [])
    texts = ["the summary", "deepsquare demo --serve", "All jobs ended as expected"]
    if not is_ok:
        texts[2:] = ["NOT AS EXPECTED: a job is missing", "The demo failed"]
    positions = [stream.getvalue().index(text) for text in texts]
    assert positions == sorted(positions)
