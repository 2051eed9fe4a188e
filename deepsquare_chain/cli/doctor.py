"""The command doctor, which checks the environment of commands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import typer

from deepsquare_chain.cli.frame import CommandContext, command
from deepsquare_chain.cli.output import Column, Kind

if TYPE_CHECKING:
    from deepsquare_chain.observability.probe import Check

app = typer.Typer()

CHECKS: Final = (
    Column("check", "check"),
    Column("ok", "OK", Kind.FLAG),
    Column("text", "found"),
    Column("hint", "what to do"),
    Column("setting", "setting"),
)


@command(app)
async def doctor(context: CommandContext) -> int:
    """Check endpoint, contracts, wallet and folders; exit 1 if a check fails."""
    from deepsquare_chain.client.doctor import examine

    checks = await examine(context.settings)
    return print_checks(context, checks)


def print_checks(context: CommandContext, found: Sequence[Check]) -> int:
    """Print the checks; return exit code 1 if one failed."""
    context.printer.rows(CHECKS, ((e.name, e.ok, e.text, e.hint, e.setting) for e in found))
    return 0 if all(check.ok for check in found) else 1
