"""The books, rebuilt from events alone."""

from __future__ import annotations

import typer

from deepsquare_chain.cli.frame import Desk, command

app = typer.Typer(help="Check the books from events alone.", no_args_is_help=True)


@command(app)
async def verify(desk: Desk) -> None:
    """Rebuild every balance and job from events, and compare; exit 10 if it does not add up."""


async def print_statement(desk: Desk, account: str | None) -> None:
    """All movements of an account."""
