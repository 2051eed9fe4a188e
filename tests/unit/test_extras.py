"""Imported packages are declared as dependencies; a missing optional part is named in the error."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deepsquare_chain.cli.app import app
from deepsquare_chain.cli.frame import EXTRAS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "deepsquare_chain"
#: Packages and modules that belong to an optional part.
PARTS = {
    "web": "explorer",
    "indexer": "explorer",
    "gateway": "gateway",
    "devnet": "devnet",
    "demo": "devnet",
    "cli/top_screen.py": "top",
}
#: A program that jobs start with the Python of the provider's machine.
PROGRAM = PACKAGE / "workflow" / "bore_client.py"
#: Not imported: a faster backend of another package, and the driver of a database URL.
UNSEEN = {"coincurve", "psycopg", "s5cmd"}


@cache
def declared() -> dict[str, set[str]]:
    """Names of required distributions by extra; "" has those of every installation."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    parts = {"": project["dependencies"], **project["optional-dependencies"]}

    def names(part: str) -> set[str]:
        results: set[str] = set()
        for text in parts[part]:
            name, extras = re.match(r"([A-Za-z0-9-]+)(?:\[([^\]]+)\])?", text).groups()  # type: ignore[union-attr]
            if name == "deepsquare-chain":
                results.update(*(names(part) for part in extras.split(",")))
            else:
                results.add(name.lower())
        return results

    return {part: names(part) for part in parts}


def imports(path: Path) -> set[str]:
    """Return top-level names of third-party modules that a file imports, also within functions."""
    results: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            results |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            results.add(node.module.partition(".")[0])
    return results - set(sys.stdlib_module_names) - {"deepsquare_chain", "__future__"}


def part_of(path: Path) -> str:
    name = path.relative_to(PACKAGE).as_posix()
    return next((part for prefix, part in PARTS.items() if name.startswith(prefix)), "")


def test_imports_are_declared_and_declarations_are_used() -> None:
    names, imported = packages_distributions(), set()
    for path in set(PACKAGE.rglob("*.py")) - {PROGRAM}:
        allowed = declared()[""] | declared().get(part_of(path), set())
        for module in imports(path):
            distributions = {item.lower().replace("_", "-") for item in names.get(module, [module])}
            assert distributions & allowed, f"{path} imports {module}, which is not declared"
            imported |= distributions
    declared_packages = set().union(*(declared()[part] for part in ("", *EXTRAS)))
    assert declared_packages - imported - UNSEEN == set(), "declared and not imported"


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_table_of_modules_is_that_of_the_metadata(extra: str) -> None:
    names = packages_distributions()
    packages = {names[module][0].lower().replace("_", "-") for module in EXTRAS[extra]}
    assert packages == declared()[extra]


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["demo"], "devnet"),
        (["devnet", "up"], "devnet"),
        (["explorer", "serve"], "explorer"),
        (["explorer", "index"], "explorer"),
        (["gateway", "serve"], "gateway"),
        (["top"], "top"),
    ],
)
def test_a_command_names_the_part_that_is_missing(
    arguments: list[str], extra: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    real, missing = importlib.util.find_spec, EXTRAS[extra][0]

    def find_spec(name: str, *more: Any) -> Any:
        return None if name == missing else real(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert f"pip install 'deepsquare-chain[{extra}]'" in result.output
    assert missing in result.output
    assert not list(tmp_path.iterdir()), "nothing was begun"
