"""Whether everything that a command needs is in order."""

from __future__ import annotations

from typing import Final

import typer

from deepsquare_chain.cli.frame import Desk, command
from deepsquare_chain.cli.output import Column, Kind

app = typer.Typer()

CHECKS: Final = (
    Column("check", "check"),
    Column("ok", "in order", Kind.FLAG),
    Column("text", "found"),
    Column("hint", "what to do"),
)


@command(app)
async def doctor(desk: Desk) -> int:
    """Look at all that a command needs; exit 1 if something is wrong."""
    from deepsquare_chain.client.doctor import examine

    found = await examine(desk.settings)
    desk.printer.rows(CHECKS, ((each.name, each.ok, each.text, each.hint) for each in found))
    return 0 if all(each.ok for each in found) else 1
