"""`deepsquare demo` as a user runs it: its document, its exit code, and no process left."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from deepsquare_chain.demo import main as demo_main
from deepsquare_chain.demo.main import run_demo
from deepsquare_chain.demo.runner import processes_of
from deepsquare_chain.errors import NotFoundError, UsageError
from tests.support.anvil import require_anvil
from tests.support.cli import PROGRAM, Outcome, clean_environment, run
from tests.support.slurm import require_slurm

#: Status of every job, in the order of their names' first submission.
ENDS = {
    "survives": ["PANICKED", "FINISHED"],
    "hello": ["FINISHED"],
    "exits-3": ["FAILED"],
    "outlives": ["OUT_OF_CREDITS"],
    "cancelled": ["CANCELLED"],
    "pi": ["FINISHED"],
    "wordcount": ["FINISHED"],
}
FIELDS = {
    "id",
    "name",
    "status",
    "customer",
    "provider",
    "funded",
    "paid",
    "fee",
    "refunded",
    "retry_of",
}


@dataclass(frozen=True)
class DemoRun:
    """A whole demo: its outcome, its folder, and what the explorer of its finished grid said."""

    outcome: Outcome
    folder: Path
    jobs_page: str
    audit_page: str

    @property
    def document(self) -> Any:
        return json.loads(self.outcome.out)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    """A whole demo on the embedded chain that serves its finished grid until Ctrl-C.

    `test_an_interrupted_demo_ends_all_its_processes` has the other chain and the other executor.
    """
    folder = tmp_path_factory.mktemp("demo")
    outcome = run_and_browse(["demo", "-o", "json", "--folder", "here", "--serve"], folder)
    assert outcome.code == 0, outcome.err[-3_000:]
    pages = [(folder / name).read_text() for name in ("jobs.json", "audit.html")]
    return DemoRun(outcome, folder / "here", *pages)


def run_and_browse(arguments: list[str], folder: Path) -> Outcome:
    """Run a demo that serves its finished grid: keep what its pages say, then press Ctrl-C."""
    err = ""
    with (
        (folder / "out.json").open("wb") as output,
        subprocess.Popen(
            [*PROGRAM, *arguments],
            cwd=folder,
            env=clean_environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        assert process.stderr is not None
        guard = threading.Timer(500, process.kill)
        guard.start()
        for line in process.stderr:
            err += line
            if match := re.search(r"Explorer: (http://\S+)", line):
                try:
                    save_pages(match[1], folder)
                finally:
                    process.send_signal(signal.SIGINT)
        code = process.wait(120)
        guard.cancel()
    return Outcome(code, (folder / "out.json").read_text(), err)


def save_pages(url: str, folder: Path) -> None:
    """Save pages of the explorer once its index is complete."""
    with httpx2.Client(base_url=url, trust_env=False, timeout=30) as web:
        deadline = time.monotonic() + 180
        while not web.get("/api/v1/jobs", params={"limit": 1}).json()["items"]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        while (status := web.get("/api/v1/status").json())["lag"]:
            assert time.monotonic() < deadline, status
            time.sleep(0.1)
        (folder / "jobs.json").write_text(web.get("/api/v1/jobs").text)
        (folder / "audit.html").write_text(web.get("/audit").text)


def test_every_job_ends_as_planned(demo: DemoRun) -> None:
    jobs = demo.document["jobs"]
    assert all(set(job) == FIELDS for job in jobs)
    assert [job["id"] for job in jobs] == list(range(1, len(jobs) + 1))
    for name, statuses in ENDS.items():
        assert [job["status"] for job in jobs if job["name"] == name] == statuses
    lost_job, successor = (job for job in jobs if job["name"] == "survives")
    assert (lost_job["retry_of"], successor["retry_of"]) == (None, lost_job["id"])
    assert lost_job["provider"] != successor["provider"]
    assert len({job["customer"] for job in jobs}) == 2


def test_every_wei_is_accounted_for(demo: DemoRun) -> None:
    document = demo.document
    assert document["audit"] == {"difference": "0", "ok": True}
    sums = {
        key: sum(int(job[key]) for job in document["jobs"])
        for key in ("funded", "paid", "fee", "refunded")
    }
    assert sums["funded"] == sums["paid"] + sums["fee"] + sums["refunded"]
    for job in document["jobs"]:
        amounts = [job[key] for key in sums]
        assert all(isinstance(amount, str) and int(amount) >= 0 for amount in amounts)
        # The fee is five percent of what was consumed, floored.
        consumed = int(job["paid"]) + int(job["fee"])
        assert int(job["fee"]) == consumed * 500 // 10_000
        if job["status"] == "PANICKED":
            assert consumed == int(job["refunded"]) == 0
        elif job["retry_of"] is None:
            assert int(job["funded"]) == consumed + int(job["refunded"])
        if job["status"] in {"FINISHED", "OUT_OF_CREDITS", "CANCELLED"}:
            assert consumed > 0


def test_a_long_run_is_paid_while_it_continues(demo: DemoRun) -> None:
    """Providers of the demo have no queue: they claim and start in one transaction."""
    outcome, folder = demo.outcome, demo.folder
    lost_job, successor = (job for job in demo.document["jobs"] if job["name"] == "survives")
    assert re.search(rf"collects 0\.\d+ credits for \d+ s of job {successor['id']}, ", outcome.err)
    logs = "".join(log.read_text() for log in (folder / "logs").iterdir())
    for job in (lost_job, successor):
        assert re.search(rf"claimAndStart job {job['id']}\b|claimAndStart \d+ jobs", logs)


def test_the_second_customer_holds_no_coin(demo: DemoRun) -> None:
    document = demo.document
    gasless = document["gasless"]
    assert (gasless["coin_wei"], gasless["requests"]) == ("0", 2)
    customer_jobs = [job for job in document["jobs"] if job["customer"] == gasless["customer"]]
    assert {job["name"] for job in customer_jobs} == {
        "hello",
        "exits-3",
        "outlives",
        "cancelled",
        "pi",
    }


def test_progress_is_printed_apart_from_the_document(demo: DemoRun) -> None:
    outcome, folder = demo.outcome, demo.folder
    for message in (
        "SIGKILL to alpine's daemon",
        "alpine is challenged",
        "daemon has ended the orphaned processes",
        "bob cancels cancelled while it is RUNNING",
        "bob signs: function submitJobs",
        "bob signs: function cancel",
        "bob had no coin and sent no transaction",
        "| Hello from the grid, reader",
        "| work complete",
        "difference 0",
        "Gas paid by account",
        str(folder / "deployment.json"),
        str(folder / "logs"),
        "All jobs ended as expected",
    ):
        assert message in outcome.err
    assert "Traceback" not in outcome.err


def test_logs_and_record_are_kept_and_secrets_are_private(demo: DemoRun) -> None:
    folder = demo.folder
    assert json.loads((folder / "deployment.json").read_text())["chain_id"] == 1337
    assert {path.name for path in (folder / "logs").iterdir()} == {
        "alpine.log",
        "explorer.log",
        "gateway.log",
        "jura.log",
        "relay.log",
        "scheduler.log",
    }
    password = folder / "wallets" / "password"
    assert stat.S_IMODE(password.stat().st_mode) == 0o600
    for keystore in (folder / "wallets").glob("*.json"):
        assert stat.S_IMODE(keystore.stat().st_mode) == 0o600
        assert "crypto" in json.loads(keystore.read_text())
    secret = password.read_text().strip()
    for log in (folder / "logs").iterdir():
        assert secret not in log.read_text(errors="replace")


def test_the_finished_grid_can_be_browsed(demo: DemoRun) -> None:
    listed_jobs = {(row["id"], row["status"]) for row in json.loads(demo.jobs_page)["items"]}
    assert listed_jobs == {(job["id"], job["status"]) for job in demo.document["jobs"]}
    assert "Every credit is accounted for" in demo.audit_page


def test_nothing_is_left_running(demo: DemoRun) -> None:
    assert processes_of(demo.folder) == []


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder with a short path, because paths of sockets are limited; all users may traverse it."""
    folder = Path(tempfile.mkdtemp(prefix="demo-", dir="/tmp"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


def slurm_daemons(folder: Path) -> list[psutil.Process]:
    """Return the daemons of Slurm clusters below a folder."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("LOCAL_SLURM", "").startswith(str(folder)):
                processes.append(process)
    return processes


@pytest.mark.parametrize(("chain", "executor"), [("anvil", "local"), ("embedded", "slurm")])
def test_an_interrupted_demo_ends_all_its_processes(
    tmp_path: Path, short_folder: Path, chain: str, executor: str
) -> None:
    """Ctrl-C twice while jobs run, as users do."""
    if executor == "slurm":
        require_slurm()
    if chain == "anvil":
        require_anvil()
    folder = tmp_path / "here"
    process = subprocess.Popen(
        [*PROGRAM, "demo", "--folder", str(folder), "--chain", chain, "--executor", executor],
        cwd=tmp_path,
        env={**clean_environment(tmp_path), "TMPDIR": str(short_folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        if "outlives#" in line:
            assert processes_of(folder)
            assert bool(slurm_daemons(short_folder)) == (executor == "slurm")
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGINT)
            break
    output += process.stdout.read()
    assert process.wait(120) == 130, output
    assert "Interrupted: everything was stopped." in output
    assert "Traceback" not in output
    assert processes_of(folder) == []
    assert slurm_daemons(short_folder) == list(short_folder.iterdir()) == []


async def refusal(folder: Path, **options: Any) -> UsageError | NotFoundError:
    """Return the error of a demo that does not start; its folder is `folder`."""
    settings: dict[str, Any] = {"chain": "embedded", "folder": folder, "stream": StringIO()}
    with pytest.raises((UsageError, NotFoundError)) as error_info:
        await run_demo(**(settings | options))
    return error_info.value


async def test_unknown_executor_is_refused(tmp_path: Path) -> None:
    error = await refusal(tmp_path / "x", executor="pbs")
    assert "can't run jobs with executor pbs" in error.message
    assert not (tmp_path / "x").exists()


async def test_missing_slurm_gives_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_main, "_SYSTEM_PATH", "/nowhere")
    error = await refusal(tmp_path / "x", executor="slurm")
    assert "slurmctld" in error.message
    assert "apt-get install slurm-wlm" in str(error.hint)


async def test_missing_anvil_gives_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSQUARE_ANVIL", "/nowhere")
    error = await refusal(tmp_path / "x", chain="anvil")
    assert (error.exit_code, "/nowhere" in error.message) == (2, True)


def test_a_folder_that_exists_is_refused(tmp_path: Path) -> None:
    outcome = run(["demo", "--folder", str(tmp_path)], tmp_path)
    assert (outcome.code, "already exists" in outcome.err) == (2, True)
    assert "Traceback" not in outcome.err
