"""What the package imports is declared, so that the wheel alone is enough."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
#: Parts of a declared package that are packages of their own name: pydantic pins its core to itself,
#: and eth-tester's extra brings py-evm.
PARTS = {"pydantic-core": "pydantic", "py-evm": "eth-tester"}


def imported() -> set[str]:
    """Top-level names of other projects that any module imports, at its top or inside a function."""
    found: set[str] = set()
    for path in (ROOT / "deepsquare_chain").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names - {"deepsquare_chain"}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_import_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(each for some in extras.values() for each in some)]
    declared = {plain(re.split(r"[\[<>=~! ]", line)[0]) for line in lines}
    homes = packages_distributions()
    missing = {
        name
        for name in imported()
        if not {PARTS.get(plain(home), plain(home)) for home in homes.get(name, [])} & declared
    }
    assert missing == set()
