#!/usr/bin/env python3
"""Lines and branches of our contracts that the forge tests reach; anything below 100 % ends with 1.

Compiled without via-IR, whose source maps lose inline assembly; the default profile needs none.
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
    """The lcov report of all forge tests but the stateful one; ends the program where a test fails."""
    report = folder / "lcov.info"
    # Outputs of its own: what forge builds for coverage must not be what `forge test` finds next.
    environment = {
        **os.environ,
        "FOUNDRY_OUT": str(folder / "out"),
        "FOUNDRY_CACHE_PATH": str(folder / "cache"),
        "FOUNDRY_FUZZ_RUNS": str(fuzz_runs),
    }
    command = [FORGE, "coverage", "--report", "lcov", "--report-file", report]
    done = subprocess.run(
        [*command, "--no-match-contract", "Invariants"],
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode or not report.exists():
        sys.exit(f"forge coverage failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return report.read_text(encoding="utf-8")


def missed(report: str) -> dict[str, tuple[int, int, list[str]]]:
    """Lines, branches, and those that nothing reached, by source of ours."""
    found: dict[str, tuple[int, int, list[str]]] = {}
    source = ""
    for line in report.splitlines():
        kind, _, rest = line.partition(":")
        if kind == "SF":
            source = rest
        if not source.startswith(OURS) or source.startswith(HELPERS):
            continue
        lines, branches, left = found.get(source, (0, 0, []))
        fields = rest.split(",")
        if kind == "DA":
            lines += 1
            left += [f"line {fields[0]}"] if fields[1] == "0" else []
        elif kind == "BRDA":
            branches += 1
            left += [f"branch at line {fields[0]}"] if fields[3] in ("0", "-") else []
        found[source] = (lines, branches, left)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--fuzz-runs", type=int, default=16, help="runs of each fuzz test")
    options = parser.parse_args()
    if not FORGE.exists():
        sys.exit(f"{FORGE} is missing. Run `npm ci` and try again.")
    with tempfile.TemporaryDirectory() as folder:
        found = missed(measure(Path(folder), options.fuzz_runs))
    if not found:
        sys.exit("forge measured no contract of ours.")
    for source, (lines, branches, left) in sorted(found.items()):
        print(
            f"{source:42} {lines:4} lines {branches:4} branches  {', '.join(left) or 'all reached'}"
        )
    if any(left for _, _, left in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
