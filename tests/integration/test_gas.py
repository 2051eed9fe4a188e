"""The committed gas table equals the gas of a real node, and its limits hold."""

from __future__ import annotations

import json

import pytest

from scripts import gas_report
from tests.support.anvil import require_anvil


@pytest.fixture(scope="module")
def committed() -> dict[str, object]:
    table: dict[str, object] = json.loads(gas_report.TABLE.read_text(encoding="utf-8"))
    return table


async def test_the_table_equals_the_gas_of_a_real_node(committed: dict[str, object]) -> None:
    require_anvil()
    measured = await gas_report.run()
    assert measured == committed, "run `scripts/gas_report.py --write` and look at the difference"


@pytest.mark.parametrize("name", sorted(gas_report.HOLD))
def test_the_promised_figure_holds(name: str, committed: dict[str, object]) -> None:
    assert gas_report.headline(committed)[name] <= gas_report.HOLD[name]
