#!/usr/bin/env python3
"""Measure how long the command line takes to answer with its help."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time

CASES = (
    [],
    ["--version"],
    ["--help"],
    ["job", "--help"],
    ["submit", "--help"],
    ["provider", "--help"],
)


def measure(arguments: list[str], runs: int) -> dict[str, float]:
    """Milliseconds of wall time and of CPU: median, and the best wall time."""
    walls, cpus = [], []
    for _ in range(runs):
        before, began = os.times(), time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "deepsquare_chain.cli", *arguments],
            check=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        walls.append((time.perf_counter() - began) * 1_000)
        after = os.times()
        spent = after.children_user + after.children_system
        cpus.append((spent - before.children_user - before.children_system) * 1_000)
    return {
        "wall_ms_median": round(statistics.median(walls), 1),
        "wall_ms_best": round(min(walls), 1),
        "cpu_ms_median": round(statistics.median(cpus), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    options = parser.parse_args()
    measure(["--help"], 1)  # compiled modules are written at the first start
    found = {" ".join(["deepsquare", *each]): measure(each, options.runs) for each in CASES}
    machine = {"python": platform.python_version(), "load": round(os.getloadavg()[0], 1)}
    if options.json:
        print(json.dumps({"machine": machine, "runs": options.runs, "commands": found}, indent=1))
        return
    print(machine)
    for name, figures in found.items():
        print(f"{name:28} {figures}")


if __name__ == "__main__":
    main()
