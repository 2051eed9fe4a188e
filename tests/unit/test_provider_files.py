"""The files that `provider init` writes."""

from __future__ import annotations

import re
import stat
from pathlib import Path

import pytest

from deepsquare_chain.cli.frame import SETTING_FLAGS
from deepsquare_chain.client.registration import (
    _EXAMPLES,
    _OTHERS,
    _REQUIRED,
    configuration,
    provider_files,
    write_provider_files,
)
from deepsquare_chain.errors import UsageError
from deepsquare_chain.settings import PROJECT_FILE, Settings, load_settings

pytestmark = pytest.mark.unit

NAMES = [
    PROJECT_FILE,
    "deepsquare-provider.service",
    "hardened.conf",
    "alerts.yml",
    "dashboard.json",
]


def load(folder: Path, text: str) -> Settings:
    (folder / PROJECT_FILE).write_text(text)
    return load_settings(project_dir=folder, user_config=folder / "none.toml")


def test_the_written_configuration_loads_and_describes_every_setting(tmp_path: Path) -> None:
    text = configuration("slurm")
    result = load(tmp_path, text)
    assert (result.executor, result.keystore) == ("slurm", tmp_path / "provider.json")
    # Uncommented lines are the defaults, or examples of settings without a default.
    plain = load(tmp_path, re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE))
    defaults = Settings()
    for name in Settings.model_fields:
        if name in {"executor", "executor_options"} | set(_REQUIRED) | set(_EXAMPLES):
            continue
        default, loaded = getattr(defaults, name), getattr(plain, name)
        assert loaded == (tmp_path / default if isinstance(default, Path) else default), name
        assert name in text or name in _OTHERS
    assert plain.executor_options == {
        "namespaces": True,
        "partitions": ["batch"],
        "account": "grid",
    }
    for name in set(SETTING_FLAGS) - _OTHERS:
        assert re.search(rf"^(# )?(\[{name}\]|{name} = )|^\[{name}\]", text, re.MULTILINE), name


def test_files_are_written_once_and_never_over_others(tmp_path: Path) -> None:
    folder = tmp_path / "grid"
    assert write_provider_files(folder, "local") == [folder / name for name in NAMES]
    before = {path.name: path.read_text() for path in folder.iterdir()}
    with pytest.raises(UsageError, match="already exists, so that nothing was written"):
        write_provider_files(folder, "slurm")
    assert {path.name: path.read_text() for path in folder.iterdir()} == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "alerts.yml").write_text("mine")
    with pytest.raises(UsageError, match=r"alerts\.yml already exists"):
        write_provider_files(other, "local")
    assert [path.name for path in other.iterdir()] == ["alerts.yml"]
    blocked = tmp_path / "blocked"
    blocked.touch()
    with pytest.raises(UsageError, match="can't be written"):
        write_provider_files(blocked / "grid", "local")
    assert not stat.S_IMODE((folder / PROJECT_FILE).stat().st_mode) & stat.S_IWOTH


def test_the_unit_leaves_running_jobs_and_names_this_installation(tmp_path: Path) -> None:
    unit = provider_files(tmp_path / "a folder", "local")["deepsquare-provider.service"]
    # The default would end the jobs with their daemon.
    assert "\nKillMode=process\n" in unit
    assert f"WorkingDirectory={tmp_path}/a\\x20folder" in unit
    assert re.search(r"^ExecStart=/\S*/deepsquare provider run ", unit, re.MULTILINE)
    assert not any(
        re.search(r"@[A-Z]+@", text) for text in provider_files(tmp_path, "local").values()
    )
