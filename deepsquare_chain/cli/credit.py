"""Credits: balances, transfers, allowances, statements."""

from __future__ import annotations

from typing import Annotated

import typer

from deepsquare_chain.cli.frame import Desk, command

app = typer.Typer(help="Credits: balances, transfers, allowances, statements.", no_args_is_help=True)


@command(app)
async def balance(
    desk: Desk,
    account: Annotated[str | None, typer.Argument(help="Address; your own by default.")] = None,
) -> None:
    """Show credits and gas of an account."""
    print(desk.settings, account)
