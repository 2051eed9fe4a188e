"""Choosing a default context changes one line of one file."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deepsquare_chain.cli.app import app
from deepsquare_chain.errors import UsageError
from deepsquare_chain.settings import choose_context

TABLES = (
    '# networks\n[contexts.test]\nendpoint = "http://127.0.0.1:1"\n[contexts.main]\ncontext = 1\n'
)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", 'context = "main"\n'),
        (TABLES, 'context = "main"\n' + TABLES),
        (
            'timeout = 5\ncontext = "test"  # now\n' + TABLES,
            'timeout = 5\ncontext = "main"\n' + TABLES,
        ),
        ("  context='test'\n", 'context = "main"\n'),
        ("\ufefftimeout = 5\n", 'context = "main"\ntimeout = 5\n'),
    ],
)
def test_one_line_is_changed(tmp_path: Path, before: str, after: str) -> None:
    path = tmp_path / "folder" / "config.toml"
    if before:
        path.parent.mkdir()
        path.write_text(before)
        path.chmod(0o640)
    choose_context(path, "main")
    assert path.read_text() == after
    assert path.stat().st_mode & 0o777 == (0o640 if before else 0o600)
    assert [item.name for item in path.parent.iterdir()] == ["config.toml"]


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a.b c"])
def test_any_name_is_quoted(tmp_path: Path, name: str) -> None:
    path = tmp_path / "config.toml"
    choose_context(path, name)
    assert tomllib.loads(path.read_text()) == {"context": name}


@pytest.mark.parametrize("text", ['x = """\ncontext = 1\n"""\n', "broken", "context = [\n1]\n"])
def test_a_file_that_can_not_be_changed_safely_stays(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match="can't be changed") as error_info:
        choose_context(path, "main")
    assert 'context = "main"' in error_info.value.hint
    assert path.read_text() == text


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    real = tmp_path / "dotfiles.toml"
    real.write_text("timeout = 5\n")
    path = tmp_path / "config.toml"
    path.symlink_to(real)
    choose_context(path, "main")
    assert path.is_symlink()
    assert real.read_text() == 'context = "main"\ntimeout = 5\n'


def test_the_command_chooses_and_names_overriding_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("DEEPSQUARE_CONTEXT", raising=False)
    path = tmp_path / "deepsquare" / "config.toml"
    path.parent.mkdir()
    # A chosen context that no longer exists does not prevent another choice.
    path.write_text('context = "gone"\n[contexts.test]\n[contexts.main]\n')
    result = CliRunner().invoke(app, ["config", "use", "main", "-o", "json"])
    assert result.exit_code == 0
    in_use = {item["name"]: item["used"] for item in json.loads(result.stdout)}
    assert {name for name, is_used in in_use.items() if is_used} == {"main"}
    assert {"test", "sepolia", "base-sepolia", "arbitrum-sepolia"} <= set(in_use)
    assert tomllib.loads(path.read_text())["context"] == "main"
    refusal = CliRunner().invoke(app, ["config", "use", "prod"])
    assert refusal.exit_code == 2
    assert "Contexts: arbitrum-sepolia, base-sepolia, main, sepolia, test;" in refusal.stderr
    monkeypatch.setenv("DEEPSQUARE_CONTEXT", "test")
    result = CliRunner().invoke(app, ["config", "use", "main"])
    assert result.exit_code == 0
    assert "the environment (DEEPSQUARE_CONTEXT) overrides it" in result.stderr
