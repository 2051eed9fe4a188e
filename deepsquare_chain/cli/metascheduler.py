"""Running the meta-scheduler."""

from __future__ import annotations

import typer

from deepsquare_chain.cli.frame import Desk, command

app = typer.Typer(help="Run the meta-scheduler.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Run the meta-scheduler."""


@command(app)
async def run(desk: Desk) -> None:
    """Run the meta-scheduler until Ctrl-C: assign jobs, watch over silent providers."""
    from deepsquare_chain.cli.services import schedule

    await schedule(desk.settings)
