"""Parsers and types of command arguments: amounts, prices, job IDs, labels."""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any, Final

import typer

from deepsquare_chain.credits import parse_credits
from deepsquare_chain.errors import UsageError, number_problem

#: The contract counts jobs in 64 bits.
MAX_JOB_ID: Final = 2**64 - 1

_SIZE: Final = re.compile(r"([0-9]{1,15})([KMGT]?)(?:i?B)?", re.IGNORECASE)
#: MB of a size with this unit; a bare number is in MB, as in Slurm.
_UNITS: Final = {"": 1.0, "K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2}


def whole_number(
    low: int, high: int | None = None, example: int | None = None
) -> Callable[[str], int]:
    """Return a parser of whole numbers, whose error message states the allowed range.

    `high` is None for no limit; `example` for the error message is `low` by default.
    """

    def number(text: str) -> int:
        stripped = str(text).strip()
        value = int(stripped) if re.fullmatch(r"[+-]?[0-9]{1,30}", stripped) else None
        if value is None or value < low or (high is not None and value > high):
            raise typer.BadParameter(
                number_problem(stripped, whole=True, low=low, high=high, example=example)
            )
        return value

    return number


def number_option(
    help_text: str, low: int, high: int | None = None, example: int | None = None, **more: Any
) -> Any:
    """Return an option for whole numbers; `more` are further arguments of `typer.Option`."""
    parser = whole_number(low, high, example)
    return typer.Option(parser=parser, help=help_text, **{"metavar": "N", **more})


def port_option(help_text: str) -> Any:
    """Return an option for a port."""
    return number_option(help_text, 0, 65_535, 8545, metavar="PORT")


def size(text: str) -> int:
    """Parse a size such as 4096, 4096M or 4G to MB, as Slurm does."""
    match = _SIZE.fullmatch(str(text).strip())
    value = int(match[1]) * _UNITS[match[2].upper()] if match else 0
    if value < 1 or value != int(value):
        raise typer.BadParameter(
            f"{str(text)[:80]!r} is not a size of whole MB, such as 4096, 512M or 4G"
        )
    return int(value)


def wait(text: str) -> float:
    """Parse a time such as 90, 2.5, 10m, 1h30m or 2d to seconds; 0 is allowed."""
    from deepsquare_chain.workflow import parse_duration

    stripped = str(text).strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", stripped):
        return float(stripped)
    try:
        return float(parse_duration(stripped))
    except ValueError:
        raise typer.BadParameter(
            f"{stripped[:80]!r} is not a time of 0 or more, such as 90, 10m, 1h30m or 2d"
        ) from None


def amount(text: str) -> int:
    """Parse an amount of credits to credit-wei."""
    try:
        return parse_credits(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def positive_credits(text: str) -> int:
    """Parse a positive amount of credits to credit-wei."""
    wei = amount(text)
    if not wei:
        raise typer.BadParameter(f"{text[:80]!r} is not more than 0; write an amount such as 1.5")
    return wei


def price(text: str) -> int:
    """Parse a price in credits per hour to credit-wei per second, rounded down."""
    from deepsquare_chain.client.registration import price_per_second

    wei_per_hour = amount(text)
    try:
        return price_per_second(wei_per_hour, text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def label(text: str) -> tuple[str, str]:
    """Parse a label KEY=VALUE."""
    key, separator, value = text.partition("=")
    if not (key and separator and value):
        raise UsageError(
            f"{text[:80]!r} is not a label",
            hint="Write KEY=VALUE, such as gpu.model=h100 or region=ch.",
        )
    return key, value


CreditsArgument = Annotated[int, typer.Argument(parser=amount, metavar="CREDITS")]
_job_id = whole_number(1, MAX_JOB_ID, 42)
JobArgument = Annotated[int, typer.Argument(parser=_job_id, metavar="JOB", help="Job ID.")]
_JOBS: Final = typer.Argument(
    metavar="JOB...",
    help="IDs, ranges (3-7), a submission (sub-1f3a9c04) or names of your jobs (train-*).",
)
JobArguments = Annotated[list[str], _JOBS]
OptionalJobArguments = Annotated[list[str] | None, _JOBS]
AccountArgument = Annotated[
    str | None, typer.Argument(help="Address; that of the keystore by default.")
]
ProviderArgument = Annotated[
    str | None,
    typer.Argument(metavar="PROVIDER", help="ID or address; that of the keystore by default."),
]
GaslessOption = Annotated[
    bool,
    typer.Option(
        "--gasless", help="Sign a request and let a relay pay the gas; the wallet needs no coin."
    ),
]
AgreeOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]
YesOption = Annotated[
    bool, typer.Option("--yes", "-y", help="Sign a --gasless request without a confirmation.")
]
LimitOption = Annotated[int, number_option("Show only the newest N.", 1, example=50)]
WaitTimeoutOption = Annotated[
    float | None,
    typer.Option(
        parser=wait, metavar="TIME", help="Maximum wait, such as 90 or 10m (exit code 9)."
    ),
]
HostOption = Annotated[str, typer.Option(help="Address to listen on.")]
MonthOption = Annotated[
    str | None, typer.Option("--month", metavar="YYYY-MM", help="A month in UTC, such as 2026-11.")
]
FromOption = Annotated[
    str | None, typer.Option("--from", metavar="DATE", help="Start: day, time (UTC) or block.")
]
ToOption = Annotated[
    str | None,
    typer.Option("--to", metavar="DATE", help="End, inclusive: day, time (UTC) or block."),
]


class ChainKind(StrEnum):
    """Chains that a local grid can use."""

    EMBEDDED = "embedded"
    ANVIL = "anvil"


class TableKind(StrEnum):
    """Formats of the tables of an export."""

    CSV = "csv"
    JSONL = "jsonl"
