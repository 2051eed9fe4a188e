#!/usr/bin/env python3
"""Measure the time that the command line takes to show its help: root, groups and commands."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import typer
from rich.console import Console
from rich.progress import track

from deepsquare_chain.cli.app import app

#: Target for `--help` on an idle core, in milliseconds.
AIM_MS = 300


def cases(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the arguments that show the help of the root, each group and each command."""
    yield (*path, "--help")
    if hasattr(command, "list_commands"):
        for name in command.list_commands(None):
            yield from cases(command.get_command(None, name), (*path, name))


def measure(arguments: tuple[str, ...], runs: int) -> dict[str, float]:
    """Return median wall time, best wall time and median CPU time in milliseconds."""
    walls, cpus = [], []
    for _ in range(runs):
        before, start = os.times(), time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "deepsquare_chain.cli", *arguments],
            check=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        walls.append((time.perf_counter() - start) * 1_000)
        after = os.times()
        cpu_time = after.children_user + after.children_system
        cpus.append((cpu_time - before.children_user - before.children_system) * 1_000)
    return {
        "wall_ms_median": round(statistics.median(walls), 1),
        "wall_ms_best": round(min(walls), 1),
        "cpu_ms_median": round(statistics.median(cpus), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="starts of each command")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    options = parser.parse_args()
    measure(("--help",), 1)  # the first run writes the compiled modules
    arguments = [(), ("--version",), *cases(typer.main.get_command(app))]
    paths = track(arguments, "commands", console=Console(stderr=True), transient=True)
    results = {" ".join(["deepsquare", *result]): measure(result, options.runs) for result in paths}
    machine = {"python": platform.python_version(), "load": round(os.getloadavg()[0], 1)}
    slowest = max(results, key=lambda name: results[name]["wall_ms_median"])
    summary = {
        "commands": len(results),
        "aim_ms": AIM_MS,
        "over_aim": [name for name in results if results[name]["wall_ms_median"] > AIM_MS],
        "slowest": slowest,
        "wall_ms_median": statistics.median(
            result["wall_ms_median"] for result in results.values()
        ),
        "wall_ms_slowest": results[slowest]["wall_ms_median"],
    }
    if options.json:
        document = {
            "machine": machine,
            "runs": options.runs,
            "summary": summary,
            "commands": results,
        }
        print(json.dumps(document, indent=1))
        return
    for name, figures in results.items():
        print(f"{name:44} {figures}")
    print(machine, summary)


if __name__ == "__main__":
    main()
