"""Arguments that are more than text: amounts, prices, job ids, labels."""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Final

import typer

from deepsquare_chain.credits import parse_credits
from deepsquare_chain.errors import UsageError

#: Ids are dense and counted in 64 bits.
MAX_JOB_ID: Final = 2**64 - 1


_SIZE: Final = re.compile(r"([0-9]{1,15})([KMGT]?)(?:i?B)?", re.IGNORECASE)
#: MB of a size with this unit; a bare number is in MB, as in Slurm.
_UNITS: Final = {"": 1.0, "K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2}


def whole(low: int, high: int | None = None, example: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers that says what is allowed.

    Args:
        low: The least number.
        high: The largest one; None for no limit.
        example: A number that people would give; the least one by default.
    """
    allowed = f"from {low} to {high}" if high is not None else f"of {low} or more"

    def number(text: str) -> int:
        written = str(text).strip()
        value = int(written) if re.fullmatch(r"[+-]?[0-9]{1,30}", written) else None
        if value is None or value < low or (high is not None and value > high):
            raise typer.BadParameter(
                f"{written[:80]!r} is not a whole number {allowed}, such as "
                f"{low if example is None else example}"
            )
        return value

    return number


def size(text: str) -> int:
    """MB of a size such as 4096, 4096M or 4G, as Slurm reads it."""
    found = _SIZE.fullmatch(str(text).strip())
    value = int(found[1]) * _UNITS[found[2].upper()] if found else 0
    if value < 1 or value != int(value):
        raise typer.BadParameter(
            f"{str(text)[:80]!r} is not a size of whole MB, such as 4096, 512M or 4G"
        )
    return int(value)


def wait(text: str) -> float:
    """Seconds of a time such as 90, 2.5, 10m, 1h30m or 2d; 0 is allowed."""
    from deepsquare_chain.workflow import parse_duration

    written = str(text).strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", written):
        return float(written)
    try:
        return float(parse_duration(written))
    except ValueError:
        raise typer.BadParameter(
            f"{written[:80]!r} is not a time of 0 or more, such as 90, 10m, 1h30m or 2d"
        ) from None


def amount(text: str) -> int:
    """Credit-wei of an amount of credits."""
    try:
        return parse_credits(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def some(text: str) -> int:
    """Credit-wei of an amount of credits that is not zero."""
    found = amount(text)
    if not found:
        raise typer.BadParameter(f"{text[:80]!r} is not more than 0; write an amount such as 1.5")
    return found


def price(text: str) -> int:
    """Credit-wei per second of a price in credits per hour, rounded down to the wei."""
    from deepsquare_chain.client.registration import price_per_second

    wanted = amount(text)
    try:
        return price_per_second(wanted, text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def label(text: str) -> tuple[str, str]:
    """A label as key and value."""
    key, separator, value = text.partition("=")
    if not (key and separator and value):
        raise UsageError(
            f"{text[:80]!r} is not a label",
            hint="Write KEY=VALUE, such as gpu.model=h100 or region=ch.",
        )
    return key, value


CreditsArgument = Annotated[int, typer.Argument(parser=amount, metavar="CREDITS")]
_job_id = whole(1, MAX_JOB_ID, 42)
JobArgument = Annotated[int, typer.Argument(parser=_job_id, metavar="JOB", help="Job id.")]
JobArguments = Annotated[
    list[str],
    typer.Argument(
        metavar="JOB...",
        help="Ids, ranges (3-7), a submission (sub-1f3a9c04) or names of own jobs (train-*).",
    ),
]
AccountArgument = Annotated[
    str | None, typer.Argument(help="Address; the keystore's own by default.")
]

GaslessOption = Annotated[
    bool,
    typer.Option(
        "--gasless", help="Sign a request and let a relay pay the gas; the wallet needs no coin."
    ),
]
AgreeOption = Annotated[
    bool, typer.Option("--yes", "-y", help="Do not ask before something is undone or looks odd.")
]
YesOption = Annotated[
    bool, typer.Option("--yes", "-y", help="Sign a --gasless request without asking.")
]


LimitOption = Annotated[
    int, typer.Option("--limit", parser=whole(1, example=50), metavar="N", help="The newest N.")
]
WaitTimeoutOption = Annotated[
    float | None,
    typer.Option(
        "--wait-timeout",
        parser=wait,
        metavar="TIME",
        help="Longest wait, such as 90 or 10m (exit 9).",
    ),
]
port = whole(0, 65_535, 8545)


MonthOption = Annotated[
    str | None,
    typer.Option("--month", metavar="YYYY-MM", help="A month in UTC, such as 2026-11."),
]
FromOption = Annotated[
    str | None,
    typer.Option("--from", metavar="DATE", help="From this day, moment (UTC) or block on."),
]
ToOption = Annotated[
    str | None,
    typer.Option("--to", metavar="DATE", help="Up to this day, moment (UTC) or block, included."),
]


class ChainKind(StrEnum):
    """Chains that a local grid can stand on."""

    EMBEDDED = "embedded"
    ANVIL = "anvil"


class TableKind(StrEnum):
    """How the tables of an export are written."""

    CSV = "csv"
    JSONL = "jsonl"
