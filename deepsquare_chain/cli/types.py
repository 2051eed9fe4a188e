"""Arguments that are more than text: amounts, prices, job ids, labels."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

import typer

from deepsquare_chain.credits import parse_credits
from deepsquare_chain.errors import UsageError

#: Ids are dense and counted in 64 bits.
MAX_JOB_ID: Final = 2**64 - 1


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
        raise typer.BadParameter("it must be more than 0")
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
        raise UsageError(f"{text[:80]!r} is no label", hint="Write key=value.")
    return key, value


CreditsArgument = Annotated[int, typer.Argument(parser=amount, metavar="CREDITS")]
JobArgument = Annotated[int, typer.Argument(min=1, max=MAX_JOB_ID, metavar="JOB", help="Job id.")]
JobArguments = Annotated[
    list[int], typer.Argument(min=1, max=MAX_JOB_ID, metavar="JOB...", help="Job ids.")
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
YesOption = Annotated[
    bool, typer.Option("--yes", "-y", help="Sign a --gasless request without asking.")
]


class ChainKind(StrEnum):
    """Chains that a local grid can stand on."""

    EMBEDDED = "embedded"
    ANVIL = "anvil"


class TableKind(StrEnum):
    """How the tables of an export are written."""

    CSV = "csv"
    JSONL = "jsonl"
