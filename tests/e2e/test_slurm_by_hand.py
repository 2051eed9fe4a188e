"""The steps of docs/provider.md by hand: from a Slurm cluster to the first earned credit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Outcome, devnet, run, running
from tests.support.local_devnet import commands_in, make_light
from tests.support.slurm import LocalSlurm

JOB = """\
name: hello
resources:
  tasks: 8
  cpusPerTask: 1
  memPerCpu: 100
credits: 1
timeLimit: 5m
uses:
  - site=here
env: {}
steps:
  - name: hello
    run:
      command: echo "hello from $(srun hostname | wc -l) tasks"; sleep 1
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalSlurm]:
    local_slurm = LocalSlurm()
    yield local_slurm
    local_slurm.close()


def data(outcome: Outcome) -> Any:
    assert outcome.code == 0, outcome
    return json.loads(outcome.out)


def test_from_a_cluster_to_the_first_credit(
    cluster: LocalSlurm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scheduler = ["metascheduler", "run", "--keystore", ".deepsquare/wallets/scheduler.json"]
    with devnet(tmp_path), ExitStack() as stack:
        stack.enter_context(running(scheduler, tmp_path, "scheduler"))
        settings = tmp_path / ".deepsquare.toml"
        grid = settings.read_text()
        provider_folder = tmp_path / "provider"
        provider_folder.mkdir()
        customer = commands_in(tmp_path, monkeypatch, capsys)
        provider = commands_in(provider_folder, monkeypatch, capsys)
        options = f'executor = "slurm"\n[executor_options]\nconf = "{cluster.conf}"\n'
        home = tmp_path / ".deepsquare/alice"
        settings_of_alice = grid.replace(str(home), str(provider_folder))
        (provider_folder / ".deepsquare.toml").write_text(
            settings_of_alice.replace("wallet.json", "provider.json") + options
        )
        for name in ("password", "deployment.json"):
            shutil.copy(home / name, provider_folder / name)

        wallet = ["wallet", "new", "provider.json", "--password-file", "password", "-o", "json"]
        address = data(provider(*wallet))["address"]
        make_light(provider_folder / "provider.json", provider_folder / "password")
        assert provider("credit", "faucet", address).code == 0
        prices = ["--cpu-price", "0.05", "--mem-price", "0.00001", "--label", "site=here"]
        assert provider("provider", "register", "--from-slurm", "--nodes", "3", *prices).code == 2
        registered = provider("provider", "register", "--from-slurm", *prices)
        assert registered.code == 0, registered
        assert "Slurm has 2 nodes with 4 CPUs, 2048 MB and 1 GPU each." in registered.err
        admin = ["admin", "approve", address, "--keystore", ".deepsquare/wallets/admin.json"]
        assert customer(*admin).code == 0
        stack.enter_context(running(["provider", "run"], provider_folder, "provider"))

        (tmp_path / "job.yaml").write_text(JOB)
        (job,) = data(run(["submit", "job.yaml", "--wait", "-o", "json"], tmp_path, 300))
        assert (job["status"], job["exit_code"]) == ("FINISHED", 0)
        assert customer("job", "logs", "1").out == "hello from 8 tasks\n"
        (earned,) = data(provider("provider", "earnings", "-o", "json"))
        assert (earned["jobs"], earned["paid"]) == (1, job["paid"])
