"""Daemons are killed at crash points while a grid works: no job is lost, run twice or billed twice.

Events, contract storage, databases, balances and the real executions must agree to the wei. This
is a seeded part of all points; `make kills` takes every one of them.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from deepsquare_chain.devnet.node.embedded import ChainProcess
from tests.support.anvil import start_anvil
from tests.support.crash_scenarios import (
    LABELS,
    NEVER,
    PACKAGE,
    ROUGH_PARAMS,
    calm,
    daemon_grid,
    in_order,
    points,
    rough,
    shared,
)
from tests.support.customers import PARAMS

SEED = 20_261
#: Parts that these daemons do not use: relay, Slurm and gasless commands are killed by integration tests of their own.
ELSEWHERE = {"client", "relay", "slurm"}


def test_every_label_in_the_source_is_reached_in_a_scenario():
    labels = {
        label
        for service in ("provider", "metascheduler")
        for is_rough in (True, False)
        for label in points(service, rough=is_rough)
    }
    for file in PACKAGE.rglob("*.py"):
        if file.parent.name in ELSEWHERE:
            continue
        for line in file.read_text().splitlines():
            if "crash_point(" in line and "def crash_point" not in line:
                label = line.split('"')[1]
                for service in LABELS.values():
                    start = label.replace("{self._service}", service).split("{", 1)[0]
                    assert any(known.startswith(start) for known in labels), line
    assert not NEVER["provider"]
    calm_points = [*points("provider", rough=False), *points("metascheduler", rough=False)]
    assert 2 * len(calm_points) >= 60, "each at its first and its second passage"
    assert len(labels) > len(set(calm_points))


@pytest.mark.timeout(900)
async def test_kills_in_the_calm_scenario(tmp_path: Path):
    """On the embedded chain, which needs no other program."""
    rng = random.Random(SEED)
    provider = in_order(points("provider", rough=False), rng)
    scheduler = in_order(points("metascheduler", rough=False), rng)
    always = [item for item in provider if re.match(r"provider\.(claim|collect)", item)]
    some = [item for item in provider if item not in always][: 18 - len(always)]
    orders = {**shared(always + some), "scheduler": scheduler[:8]}
    async with (
        ChainProcess(block_time=1) as node,
        daemon_grid(node, tmp_path, PARAMS, queueing=["p0"]) as scenario,
    ):
        kills = await calm(scenario, orders)
    assert [kill for kill in kills if not kill.reached] == []
    assert len(kills) == sum(map(len, orders.values()))


@pytest.mark.timeout(900)
async def test_kills_in_the_rough_scenario(tmp_path: Path):
    """With lost runs and successors, requeues, challenges, top-ups, a high base fee, and reorgs."""
    rng = random.Random(SEED)
    rough_points = set(points("provider", rough=True)) - set(points("provider", rough=False))
    orders = {
        "p0": in_order(sorted(rough_points), rng)[:6],
        "scheduler": in_order(points("metascheduler", rough=True), rng)[:5],
    }
    async with (
        start_anvil(block_time=1) as node,
        daemon_grid(node, tmp_path, ROUGH_PARAMS) as scenario,
    ):
        kills = await rough(scenario, orders)
    assert [kill for kill in kills if not kill.reached] == []
    assert len(kills) == sum(map(len, orders.values()))
