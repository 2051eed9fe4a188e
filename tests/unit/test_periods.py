"""Periods in UTC, and their blocks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from deepsquare_chain.client.periods import Period, blocks_of, parse_period
from deepsquare_chain.errors import UsageError

pytestmark = pytest.mark.unit

NOVEMBER, DECEMBER, DAY = 1_793_491_200, 1_796_083_200, 86_400


@pytest.mark.parametrize(
    ("bounds", "period"),
    [
        (("2026-11", None, None), Period(NOVEMBER, DECEMBER)),
        (("2026-12", None, None), Period(DECEMBER, DECEMBER + 31 * DAY)),
        ((None, "2026-11-01", "2026-11-30"), Period(NOVEMBER, DECEMBER)),
        ((None, "2026-11-01", "2026-11-01"), Period(NOVEMBER, NOVEMBER + DAY)),
        ((None, "2026-11-01T01:00", None), Period(NOVEMBER + 3_600)),
        ((None, "2026-11-01T01:00+01:00", None), Period(NOVEMBER)),
        ((None, "17", "2026-11-30"), Period(None, DECEMBER, 17)),
        ((None, "17", "17"), Period(None, None, 17, 17)),
        ((None, None, None), Period()),
    ],
)
def test_periods(bounds: tuple[str | None, ...], period: Period) -> None:
    assert parse_period(*bounds) == period


@pytest.mark.parametrize(
    "bounds",
    [
        ("2026-13", None, None),
        ("2026", None, None),
        ("0000-01", None, None),
        ("2026-11", "2026-11-01", None),
        (None, "2026-11-02", "2026-11-01"),
        (None, "9", "8"),
        (None, "2026-02-30", None),
        (None, "yesterday", None),
        (None, None, "9999-12-31"),
    ],
)
def test_invalid_periods_are_refused(bounds: tuple[str | None, ...]) -> None:
    with pytest.raises(UsageError) as error_info:
        parse_period(*bounds)
    assert error_info.value.hint


#: Blocks of a grid that was deployed in block 3; some come in the same second.
TIMES = [0, 10, 20, 100, 100, 110, 130, 131, 150]


def chain() -> Any:
    async def number() -> int:
        return len(TIMES) - 1

    async def get_block(number: int) -> dict[str, int]:
        return {"timestamp": TIMES[number]}

    class Eth:
        block_number = property(lambda _: number())

    eth = Eth()
    eth.get_block = get_block  # type: ignore[attr-defined]
    return SimpleNamespace(eth=eth)


@pytest.mark.parametrize(
    ("start", "end", "blocks"),
    [
        (100, 131, (3, 6)),
        (101, 1_000, (5, None)),
        (0, 101, (3, 4)),
        (110, 111, (5, 5)),
        (None, 150, (0, 7)),
        (None, None, (0, None)),
    ],
)
async def test_blocks_of_a_period(
    start: int | None, end: int | None, blocks: tuple[int, int | None]
) -> None:
    assert await blocks_of(chain(), Period(start, end), 3) == blocks


@pytest.mark.parametrize(("start", "end"), [(151, None), (111, 130), (None, 90)])
async def test_periods_without_a_block_are_refused(start: int | None, end: int | None) -> None:
    period = Period(start, end)
    if start is None:
        # Before the deployment no credits moved: an empty statement, from the first block on.
        assert await blocks_of(chain(), period, 3) == (0, 2)
        return
    with pytest.raises(UsageError, match="No block"):
        await blocks_of(chain(), period, 3)


@pytest.mark.parametrize("period", [Period(last_block=9), Period(first_block=9)])
async def test_a_bound_that_is_a_future_block_is_refused(period: Period) -> None:
    with pytest.raises(UsageError, match="Block 9 does not exist yet") as error_info:
        await blocks_of(chain(), period, 3)
    assert "newest block is 8" in error_info.value.hint
