#!/usr/bin/env python3
"""Kill provider and scheduler at every crash point, in a calm and in a rough scenario.

Prints a table on stderr and JSON on stdout. Exits with 1 if a crash point was not reached, and with
an assertion error if the ledgers of a scenario do not agree to the wei.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deepsquare_chain.devnet.node.base import Anvil
from deepsquare_chain.observability import configure_logging
from tests.support.crash_scenarios import (
    ROUGH_PARAMS,
    Kill,
    as_rows,
    calm,
    daemon_grid,
    in_order,
    points,
    rough,
    shared,
)
from tests.support.customers import PARAMS

#: Required number of kills in each scenario.
WANTED: Final = 60
#: Kills per label: at the first passage of a process, then at the second.
PASSAGES: Final = {"calm": 2, "rough": 1}


def passages(labels: Sequence[str], count: int) -> list[str]:
    """Return all labels for the first passage, then all for the second, and so on."""
    later = [f"{label}:{number}" for number in range(2, count + 1) for label in labels]
    return [*labels, *later]


async def one_life(kind: str, seed: int) -> dict[str, Any]:
    """Run one scenario with all its crash points, and return its results."""
    count = PASSAGES[kind]
    rng, is_rough = random.Random(seed), kind == "rough"  # noqa: S311
    provider_labels = in_order(points("provider", rough=is_rough), rng)
    scheduler_labels = in_order(points("metascheduler", rough=is_rough), rng)
    orders: dict[str, Sequence[str]] = {"scheduler": passages(scheduler_labels, count)}
    if is_rough:
        # Retried jobs need a provider that is not killed.
        orders["p0"] = passages(provider_labels, count)
    else:
        orders |= shared(passages(provider_labels, count))
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="deepsquare-kills-") as temporary:
        async with (
            Anvil(block_time=1) as node,
            daemon_grid(
                node,
                Path(temporary),
                ROUGH_PARAMS if is_rough else PARAMS,
                queueing=[] if is_rough else ["p0"],
            ) as scenario,
        ):
            kills = await (rough if is_rough else calm)(scenario, orders)
            jobs = len(await scenario.customers.jobs())
    return {
        "life": kind,
        "kills": kills,
        "jobs": jobs,
        "seconds": round(time.monotonic() - start),
    }


def tell(console: Console, lives: Sequence[dict[str, Any]]) -> None:
    """Print a row per label and a column per scenario: seconds until the kill, or NEVER REACHED."""
    table = Table("role", "label", *(scenario["life"] for scenario in lives))
    roles: dict[tuple[str, str], dict[str, str]] = {}
    for scenario in lives:
        for kill in scenario["kills"]:
            service = "scheduler" if kill.role == "scheduler" else "provider"
            row = roles.setdefault((service, kill.point), {})
            row[scenario["life"]] = f"{kill.seconds:.1f} s" if kill.reached else "NEVER REACHED"
    for (service, point), row in sorted(roles.items()):
        table.add_row(service, point, *(row.get(scenario["life"], "") for scenario in lives))
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--life", choices=["calm", "rough", "both"], default="both")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    configure_logging("error", "console")  # faults are intended: do not log them
    console = Console(stderr=True)
    kinds = ["calm", "rough"] if options.life == "both" else [options.life]
    lives = []
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("killing", total=len(kinds))
        for kind in kinds:
            progress.update(bar, description=f"killing in a {kind} life")
            lives.append(asyncio.run(one_life(kind, options.seed)))
            progress.advance(bar)
    tell(console, lives)
    missed_kills: list[Kill] = [
        kill for scenario in lives for kill in scenario["kills"] if not kill.reached
    ]
    reached = {
        scenario["life"]: sum(kill.reached for kill in scenario["kills"]) for scenario in lives
    }
    results = {
        "lives": [{**scenario, "kills": as_rows(scenario["kills"])} for scenario in lives],
        "reached": reached,
        "never_reached": as_rows(missed_kills),
        "load_average": [round(scenario, 1) for scenario in os.getloadavg()],
    }
    print(json.dumps(results, indent=2))
    return 1 if missed_kills or min(reached.values()) < WANTED else 0


if __name__ == "__main__":
    sys.exit(main())
