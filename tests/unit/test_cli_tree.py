"""The command tree: the table of the root matches the modules, and every command has help."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import deepsquare_chain.cli
from deepsquare_chain.cli.app import COMMANDS, GROUPS, app, behind_verb
from deepsquare_chain.cli.frame import SETTING_FLAGS
from deepsquare_chain.cli.types import size

pytestmark = pytest.mark.unit

ROOT = typer.main.get_command(app)
# Modules without commands.
NO_COMMANDS = {
    "app",
    "frame",
    "output",
    "job_output",
    "services",
    "top_screen",
    "types",
    "why",
}


def walk(command: Any = ROOT, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Return every command that is not a group, by its words."""
    if not hasattr(command, "list_commands"):
        yield path, command
        return
    for name in command.list_commands(None):
        yield from walk(command.get_command(None, name), (*path, name))


TREE = dict(walk())


def test_every_file_of_commands_is_in_the_table() -> None:
    folder = Path(deepsquare_chain.cli.__file__).parent
    files = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    modules = {part.module for part in (*COMMANDS.values(), *GROUPS.values())}
    assert files - NO_COMMANDS == modules


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_without_a_command_shows_its_help(name: str) -> None:
    done = CliRunner().invoke(app, [name])
    assert done.exit_code == 2
    assert GROUPS[name].help in " ".join(done.output.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_the_help_of_its_function(name: str) -> None:
    assert TREE[(name,)].help.splitlines()[0] == COMMANDS[name].help


def test_the_documented_commands_are_there() -> None:
    groups = {
        "job": "list get why watch logs cancel topup retry",
        "credit": "balance transfer approve withdraw statement faucet",
        "relay": "serve show requests",
        "wallet": "new import list show",
        "provider": "register offer price labels status run drain resume jobs",
        "metascheduler": "run",
        "admin": "approve ban unban params open close",
        "audit": "verify statement job exceptions export",
        "contracts": "deploy verify addresses",
        "devnet": "up",
        "config": "show",
    }
    documented = {(noun, verb) for noun, verbs in groups.items() for verb in verbs.split()}
    documented |= {
        (name,) for name in ("demo", "validate", "convert", "schema", "quote", "submit", "doctor")
    }
    assert documented <= set(TREE)


@pytest.mark.parametrize("path", TREE, ids=" ".join)
def test_every_command_has_help_formats_and_settings(path: tuple[str, ...]) -> None:
    command = TREE[path]
    assert command.help
    flags = {flag for parameter in command.params for flag in parameter.opts}
    assert {"-o", "--output", "--debug"} <= flags
    assert {f"--{name.replace('_', '-')}" for name in SETTING_FLAGS} <= flags
    for parameter in command.params:
        assert getattr(parameter, "help", None) or parameter.param_type_name == "argument"
    result = CliRunner().invoke(app, [*path, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


@pytest.mark.parametrize("name", ["", *GROUPS])
def test_every_group_lists_its_commands(name: str) -> None:
    result = CliRunner().invoke(app, [*([name] if name else []), "--help"])
    assert result.exit_code == 0
    group_commands = [path[-1] for path in TREE if path[:-1] == ((name,) if name else ())]
    assert all(value in result.output for value in (*group_commands, *([] if name else GROUPS)))


@pytest.mark.parametrize("arguments", [["jbo"], ["job", "gte"], ["job", "get", "--nonsense"]])
def test_unknown_commands_are_usage_errors(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_the_roots_help_loads_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} was loaded")

    monkeypatch.setattr("deepsquare_chain.cli.app.import_module", refuse)
    assert CliRunner().invoke(app, ["--help"]).exit_code == 0
    with pytest.raises(AssertionError, match=r"cli\.job was loaded"):
        CliRunner().invoke(app, ["job", "--help"], catch_exceptions=False)


# Modules that take 0.1 s or more to import, or that imply the import of such modules.
HEAVY = (
    *("web3", "eth_account", "eth_abi", "eth_utils", "pydantic", "pydantic_core"),
    *("pydantic_settings", "sqlalchemy", "starlette", "uvicorn", "httpx2", "aiohttp", "jinja2"),
    *("structlog", "prometheus_client", "yaml", "asyncio", "numpy", "rich.live", "rich.progress"),
)
# One process shows every help in turn, and reports the first one that imported a slow module.
ASK_ALL = f"""
import contextlib, io, json, sys
from deepsquare_chain.cli import main
for words in json.load(sys.stdin):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as output:
        main([*words, "--help"])
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    if loaded or "Usage: deepsquare" not in output.getvalue():
        sys.exit(f"{{' '.join(words)}} --help loads {{loaded}}")
print("done")
"""


def test_no_help_loads_anything_heavy() -> None:
    """Modules that are slow to import are imported only by commands that need them."""
    paths = [[], *([name] for name in GROUPS), *map(list, TREE)]
    completed = subprocess.run(
        [sys.executable, "-c", ASK_ALL],
        input=json.dumps(paths),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (completed.returncode, completed.stdout) == (0, "done\n"), completed.stderr


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["--context", "main", "job", "list"], ["job", "list", "--context", "main"]),
        (["-o=json", "--wide", "jobs"], ["jobs", "-o=json", "--wide"]),
        (["-o", "json", "job", "get", "--", "7"], ["job", "get", "-o", "json", "--", "7"]),
        (["--help"], ["--help"]),
        (["--context", "main"], ["--context", "main"]),
        (["--nonsense", "job"], ["--nonsense", "job"]),
    ],
)
def test_common_options_may_precede_the_verb(arguments: list[str], meant: list[str]) -> None:
    assert behind_verb(arguments) == meant


@pytest.mark.parametrize(
    ("arguments", "usage"),
    [
        (["jobs", "--help"], "deepsquare job list"),
        (["list", "--help"], "deepsquare job list"),
        (["status", "--help"], "deepsquare job list"),
        (["status", "x"], "deepsquare job get"),
        (["jobs", "get", "--help"], "deepsquare job get"),
        (["cancel", "--help"], "deepsquare job cancel"),
        (["squeue"], "In this program it is `deepsquare job list`"),
        (["jbo"], "Did you mean job"),
    ],
)
def test_short_forms_work_or_name_the_command(arguments: list[str], usage: str) -> None:
    assert usage in " ".join(CliRunner().invoke(app, arguments).output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["job", "get", "abc"], "'abc' is not a whole number from 1 to"),
        (["credit", "burn", "-5"], "'-5' is not a valid amount of credits"),
        (["job", "challenge", "-1"], "'-1' is not a whole number from 1 to"),
        (["job", "list", "--limit", "0"], "'0' is not a whole number of 1 or more, such as 50"),
        (["explorer", "serve", "--port", "65536"], "from 0 to 65535, such as 8545"),
        (["provider", "offer", "--cpus", "1", "--memory", "4X"], "such as 4096, 512M or 4G"),
        (["job", "watch", "1", "--wait-timeout", "soon"], "such as 90, 10m, 1h30m or 2d"),
        (["credit", "transfer", "0xab", "much"], "'much' is not a valid amount of credits"),
    ],
)
def test_invalid_values_are_named_with_the_allowed_ones(
    arguments: list[str], expected: str
) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert expected in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("text", "megabytes"),
    [("512", 512), ("4G", 4_096), ("4gb", 4_096), ("2TiB", 2_097_152), ("2048K", 2)],
)
def test_sizes(text: str, megabytes: int) -> None:
    assert size(text) == megabytes


@pytest.mark.parametrize("text", ["", "0", "1K", "-4G", "1.5G", "G"])
def test_invalid_sizes_are_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not a size"):
        size(text)
