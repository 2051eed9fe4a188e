#!/usr/bin/env python3
"""Run the stateful fuzz tests of the contracts with one seed after the other, for a number of calls.

Short sequences cover more initial states; long ones cover crowded grids, where each check covers more
jobs: three of four parts are short, one is long. An unexpected revert or a violated invariant ends the
run with forge's counterexample and exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from rich.progress import MofNCompleteColumn, Progress

ROOT = Path(__file__).resolve().parent.parent
FORGE = ROOT / "node_modules" / "@foundry-rs" / "forge-linux-amd64" / "bin" / "forge"
PIECE = 50_000
SHORT, LONG = 100, 400
_CALLS = re.compile(r"runs: (\d+), calls: (\d+), reverts: (\d+)")


def play(seed: int, depth: int, calls: int) -> tuple[int, int]:
    """Run one part; return the number of calls and of reverts.

    Raises:
        SystemExit: An invariant was violated, or forge found no test.
    """
    environment = {
        **os.environ,
        "FOUNDRY_PROFILE": "long",
        "FOUNDRY_INVARIANT_RUNS": str(max(1, calls // depth)),
        "FOUNDRY_INVARIANT_DEPTH": str(depth),
    }
    command = [FORGE, "test", "--match-contract", "InvariantsTest", "--fuzz-seed", str(seed)]
    process = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    summary = _CALLS.search(process.stdout)
    if process.returncode or summary is None:
        print(process.stdout[-20_000:], process.stderr[-4_000:], sep="\n", file=sys.stderr)
        sys.exit(f"seed {seed}, depth {depth}: a promise does not hold, or no test was run")
    return int(summary[2]), int(summary[3])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--calls", type=int, default=2_000_000, help="at least so many")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    options = parser.parse_args()
    calls = reverts = 0
    seed, start = options.first_seed, time.monotonic()
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, disable=options.json) as bar:
        task = bar.add_task("calls", total=options.calls)
        while calls < options.calls:
            depth = SHORT if seed % 4 else LONG
            new_calls, new_reverts = play(seed, depth, min(PIECE, options.calls - calls))
            calls, reverts, seed = calls + new_calls, reverts + new_reverts, seed + 1
            bar.update(task, completed=calls)
    figures = {
        "calls": calls,
        "reverts": reverts,
        "first_seed": options.first_seed,
        "last_seed": seed - 1,
        "seconds": round(time.monotonic() - start),
    }
    print(json.dumps(figures) if options.json else figures)


if __name__ == "__main__":
    main()
