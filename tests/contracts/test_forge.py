"""The forge tests, run by the native binary: its npm wrapper exits 0 even when tests fail."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

# All of them are run once, by the first test: two minutes, and more on a busy machine.
pytestmark = [pytest.mark.contracts, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
FORGE = ROOT / "node_modules" / "@foundry-rs" / "forge-linux-amd64" / "bin" / "forge"
TREES = ROOT / "tests" / "forge" / "trees"
# With fewer tests than this, some were not found, which forge itself reports as a success.
LEAST_TESTS = 245
LEAF = re.compile(r"\[(\w+)\]\s*$")

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results() -> Results:
    """Run forge; return results by `Contract.test`."""
    if not FORGE.exists():
        missing = f"{FORGE} is missing. Run `npm ci` and try again."
        if os.environ.get("DEEPSQUARE_REQUIRE_REAL") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    completed = subprocess.run(
        [FORGE, "test", "--json"],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=540,
    )
    if not completed.stdout.startswith("{"):
        pytest.fail(f"forge ran no tests:\n{completed.stdout[-4000:]}{completed.stderr[-4000:]}")
    return {
        f"{suite.rpartition(':')[2]}.{name.partition('(')[0]}": result
        for suite, outcome in json.loads(completed.stdout).items()
        for name, result in outcome["test_results"].items()
    }


def test_every_forge_test_succeeds(results: Results) -> None:
    failed = {
        name: (result["reason"], result["counterexample"])
        for name, result in results.items()
        if result["status"] != "Success"
    }
    assert not failed


def test_no_forge_test_was_lost(results: Results) -> None:
    assert len(results) >= LEAST_TESTS


def test_the_stateful_fuzzer_made_calls_without_unexpected_reverts(results: Results) -> None:
    kind = results["InvariantsTest.invariant_the_numbered_promises_hold"]["kind"]["Invariant"]
    assert kind["calls"] >= 2_500
    assert kind["reverts"] == 0


def test_branch_trees_and_tests_mirror_each_other(results: Results) -> None:
    """Each leaf of a tree ends with the `[name]` of its test; each test of such a contract is a leaf."""
    leaves = {
        f"{tree.stem}.{match[1]}"
        for tree in TREES.glob("*.tree")
        for line in tree.read_text(encoding="utf-8").splitlines()
        if (match := LEAF.search(line))
    }
    contracts = {leaf.partition(".")[0] for leaf in leaves}
    tests = {name for name in results if name.partition(".")[0] in contracts}
    assert leaves == tests
