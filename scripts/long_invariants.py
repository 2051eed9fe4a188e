#!/usr/bin/env python3
"""Play the stateful fuzz of the contracts until so many calls were made, a seed after the other.

Short games see more beginnings, long ones more of a crowded grid, where each check looks at more jobs: three
of four pieces are short, one is long. Any unplanned revert or broken promise ends the run with forge's own
counterexample and exit code 1.
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
    """One piece; calls that were made, and reverts.

    Raises:
        SystemExit: A promise was broken, or forge found no test.
    """
    environment = {
        **os.environ,
        "FOUNDRY_PROFILE": "long",
        "FOUNDRY_INVARIANT_RUNS": str(max(1, calls // depth)),
        "FOUNDRY_INVARIANT_DEPTH": str(depth),
    }
    command = [FORGE, "test", "--match-contract", "InvariantsTest", "--fuzz-seed", str(seed)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    found = _CALLS.search(done.stdout)
    if done.returncode or found is None:
        print(done.stdout[-20_000:], done.stderr[-4_000:], sep="\n", file=sys.stderr)
        sys.exit(f"seed {seed}, depth {depth}: a promise does not hold, or no test was run")
    return int(found[2]), int(found[3])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--calls", type=int, default=2_000_000, help="at least so many")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    options = parser.parse_args()
    calls = reverts = 0
    seed, began = options.first_seed, time.monotonic()
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, disable=options.json) as bar:
        task = bar.add_task("calls", total=options.calls)
        while calls < options.calls:
            depth = SHORT if seed % 4 else LONG
            made, refused = play(seed, depth, min(PIECE, options.calls - calls))
            calls, reverts, seed = calls + made, reverts + refused, seed + 1
            bar.update(task, completed=calls)
    figures = {
        "calls": calls,
        "reverts": reverts,
        "first_seed": options.first_seed,
        "last_seed": seed - 1,
        "seconds": round(time.monotonic() - began),
    }
    print(json.dumps(figures) if options.json else figures)


if __name__ == "__main__":
    main()
