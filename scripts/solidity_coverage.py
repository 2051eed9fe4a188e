#!/usr/bin/env python3
"""Measure line and branch coverage of our contracts by forge tests; exit with 1 below 100 %.

Compiled without via-IR, whose source maps omit inline assembly; the default profile does not use it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORGE = ROOT / "node_modules" / "@foundry-rs" / "forge-linux-amd64" / "bin" / "forge"
OURS = "contracts/"
HELPERS = "contracts/test/"


def measure(folder: Path, fuzz_runs: int) -> str:
    """Return the lcov report of all forge tests but the stateful one; exit if a test fails."""
    report = folder / "lcov.info"
    # Separate output folders, because `forge test` must not reuse the build output for coverage.
    environment = {
        **os.environ,
        "FOUNDRY_OUT": str(folder / "out"),
        "FOUNDRY_CACHE_PATH": str(folder / "cache"),
        "FOUNDRY_FUZZ_RUNS": str(fuzz_runs),
    }
    command = [FORGE, "coverage", "--report", "lcov", "--report-file", report]
    process = subprocess.run(
        [*command, "--no-match-contract", "Invariants"],
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if process.returncode or not report.exists():
        sys.exit(f"forge coverage failed:\n{process.stdout[-4000:]}{process.stderr[-4000:]}")
    return report.read_text(encoding="utf-8")


def missed(report: str) -> dict[str, tuple[int, int, list[str]]]:
    """Return the numbers of lines and branches, and the missed ones, by source."""
    coverage: dict[str, tuple[int, int, list[str]]] = {}
    source = ""
    for line in report.splitlines():
        kind, _, rest = line.partition(":")
        if kind == "SF":
            source = rest
        if not source.startswith(OURS) or source.startswith(HELPERS):
            continue
        lines, branches, missed_items = coverage.get(source, (0, 0, []))
        fields = rest.split(",")
        if kind == "DA":
            lines += 1
            missed_items += [f"line {fields[0]}"] if fields[1] == "0" else []
        elif kind == "BRDA":
            branches += 1
            missed_items += [f"branch at line {fields[0]}"] if fields[3] in ("0", "-") else []
        coverage[source] = (lines, branches, missed_items)
    return coverage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--fuzz-runs", type=int, default=16, help="runs of each fuzz test")
    options = parser.parse_args()
    if not FORGE.exists():
        sys.exit(f"{FORGE} is missing. Run `npm ci` and try again.")
    with tempfile.TemporaryDirectory() as folder:
        coverage = missed(measure(Path(folder), options.fuzz_runs))
    if not coverage:
        sys.exit("forge measured no contract of ours.")
    for source, (lines, branches, missed_items) in sorted(coverage.items()):
        print(
            f"{source:42} {lines:4} lines {branches:4} branches  {', '.join(missed_items) or 'all reached'}"
        )
    if any(missed_items for _, _, missed_items in coverage.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
