"""Parses periods of calendar time in UTC, and finds their blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final

from web3 import AsyncWeb3

from deepsquare_chain.errors import UsageError

_MONTH: Final = re.compile(r"([0-9]{4})-(0[1-9]|1[0-2])")
_HINT: Final = "Write 2026-11-27, 2026-11-27T13:00, or the number of a block."


@dataclass(frozen=True, slots=True)
class Period:
    """A period from `start` (inclusive) to `end` (exclusive) in epoch seconds; None for no bound.

    A bound may be a block instead: `first_block` and `last_block`, both inclusive.
    """

    start: int | None = None
    end: int | None = None
    first_block: int | None = None
    last_block: int | None = None


def parse_period(month: str | None, since: str | None, until: str | None) -> Period:
    """Parse a month (`2026-11`), or two bounds, both inclusive: dates, times or block numbers.

    Raises:
        UsageError: A text is invalid, or the period is empty.
    """
    if month is not None:
        if since is not None or until is not None:
            raise UsageError("--month is a whole period", hint="Leave out --from and --to.")
        match = _MONTH.fullmatch(month)
        if match is None:
            raise UsageError(f"{month[:40]!r} is not a month", hint="Write it as 2026-11.")
        year, month_number = int(match[1]), int(match[2])
        if not 1970 <= year <= 9998:
            raise UsageError(
                f"{month[:40]!r} is not a month of this calendar", hint="Write 2026-11."
            )
        following = (year + 1, 1) if month_number == 12 else (year, month_number + 1)
        return Period(_midnight(year, month_number), _midnight(*following))
    start, first_block = _bound(since, is_end=False)
    end, last_block = _bound(until, is_end=True)
    empty_time = start is not None and end is not None and end <= start
    empty_blocks = first_block is not None and last_block is not None and last_block < first_block
    if empty_time or empty_blocks:
        raise UsageError(
            f"No time lies from {since} on and up to {until}", hint="Swap the two bounds."
        )
    return Period(start, end, first_block, last_block)


async def blocks_of(w3: AsyncWeb3[Any], period: Period, lowest: int) -> tuple[int, int | None]:
    """Return the first and last block of a period; None for the newest. At most about 50 requests.

    `lowest` is the first block of the search: the block of the deployment.

    Raises:
        UsageError: The period contains no block, or a bound is a block that does not exist.
        EndpointError: The endpoint does not answer.
    """
    newest = int(await w3.eth.block_number)
    missing = max(period.first_block or 0, period.last_block or 0)
    if missing > newest:
        raise UsageError(
            f"Block {missing} does not exist yet", hint=f"The newest block is {newest}."
        )
    first = period.first_block if period.first_block is not None else 0
    last = period.last_block
    if period.start is not None:
        first = await _first_block_from(w3, period.start, min(lowest, newest), newest)
    if period.end is not None:
        after = await _first_block_from(w3, period.end, min(lowest, newest), newest)
        last = after - 1 if after <= newest else None
    if (last is not None and last < first) or (period.start is not None and first > newest):
        raise UsageError(
            "No block of this grid is in this period",
            hint=f"The deployment's first block is {lowest}, the newest block {newest}.",
        )
    return first, last


async def _first_block_from(w3: AsyncWeb3[Any], moment: int, low: int, newest: int) -> int:
    """Return the first block at or after a time (binary search); newest + 1 if there is none."""
    high = newest + 1
    while low < high:
        middle = (low + high) // 2
        if int((await w3.eth.get_block(middle))["timestamp"]) >= moment:
            high = middle
        else:
            low = middle + 1
    return low


def _bound(text: str | None, *, is_end: bool) -> tuple[int | None, int | None]:
    """Parse a bound into epoch seconds or a block; an end includes its day or second."""
    if text is None:
        return None, None
    if re.fullmatch(r"[0-9]{1,15}", text):
        return None, int(text)
    try:
        if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
            day = date.fromisoformat(text) + timedelta(days=1 if is_end else 0)
            return _midnight(day.year, day.month, day.day), None
        time = datetime.fromisoformat(text)
        utc = time.replace(tzinfo=UTC) if time.tzinfo is None else time
        return int(utc.timestamp()) + (1 if is_end else 0), None
    except (ValueError, OverflowError):
        raise UsageError(f"{text[:40]!r} is not a date", hint=_HINT) from None


def _midnight(year: int, month: int, day: int = 1) -> int:
    return int(datetime(year, month, day, tzinfo=UTC).timestamp())
