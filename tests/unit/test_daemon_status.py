"""A daemon's status file, as other processes such as `doctor` read it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from deepsquare_chain.client.doctor import _providers, _start_check
from deepsquare_chain.daemon.loop import read_status, running_services, service_folder
from deepsquare_chain.errors import GridError
from deepsquare_chain.settings import Settings
from deepsquare_chain.store.database import Store

pytestmark = pytest.mark.unit

ACCOUNT = "0x90F79bf6EB2c4f870365E785982E1f101E93b906"


def write(root: Path, **changes: Any) -> Path:
    folder = service_folder(root, "provider", ACCOUNT)
    folder.mkdir(parents=True, exist_ok=True)
    status = {"pid": os.getpid(), "state": "running", "fault": ""} | changes
    (folder / "provider.json").write_text(json.dumps(status))
    return folder


def test_services_of_two_deployments_have_a_folder_each(tmp_path: Path) -> None:
    folder = service_folder(tmp_path, "provider", ACCOUNT, "0xAAbb00000001")
    Store.open(folder / "provider.db", chain_id=1, contract="0xAAbb00000001", account="1").close()
    assert service_folder(tmp_path, "provider", ACCOUNT, "0xAAbb00000001") == folder
    second = service_folder(tmp_path, "provider", ACCOUNT, "0xCCdd00000002")
    assert second == folder.with_name(f"{folder.name}-ccdd0000")
    Store.open(second / "provider.db", chain_id=1, contract="0xCCdd00000002", account="1").close()
    assert service_folder(tmp_path, "provider", ACCOUNT, "0xCCdd00000002") == second


async def test_status_reports_why_runs_can_not_start(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path)
    folder = write(tmp_path, fault="no shell")
    with pytest.raises(GridError, match=f"{folder.name} can't start jobs: no shell") as error:
        await _providers(settings)
    assert "retries automatically" in error.value.hint
    check = _start_check(read_status(folder, "provider"))
    assert (check.ok, check.text) == (False, "no shell")
    write(tmp_path)
    assert await _providers(settings) == "1 running, each can start jobs"
    assert _start_check(read_status(folder, "provider")).ok


@pytest.mark.parametrize(
    "changes", [{"state": "stopped"}, {"pid": 2**22 + 1}, {"pid": "x"}, {"pid": None}]
)
async def test_an_ended_daemon_is_not_running(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = write(tmp_path, fault="no shell", **changes)
    assert list(running_services(tmp_path, "provider")) == []
    assert await _providers(Settings(state_dir=tmp_path)) == "none is running"
    assert "does not run on this machine" in _start_check(read_status(folder, "provider")).text


@pytest.mark.parametrize("text", ["", "[]", "{}", "5", "{"])
def test_a_damaged_status_file_is_ignored(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path)
    (folder / "provider.json").write_text(text)
    assert read_status(folder, "provider") is None
