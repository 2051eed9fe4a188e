"""Running the meta-scheduler."""

from __future__ import annotations

from typing import Annotated

import typer

from deepsquare_chain.cli.frame import Desk, command

app = typer.Typer(help="Run the meta-scheduler.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Run the meta-scheduler."""


@command(app)
async def run(
    desk: Desk,
    challenge_after: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="SECONDS",
            help="Ask a provider that holds work after so long without a sign of it; twice the "
            "claim timeout by default.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Without a wallet: say what it would do.")
    ] = False,
) -> None:
    """Run the meta-scheduler until Ctrl-C: assign jobs, watch over silent providers."""
    from deepsquare_chain.cli.services import schedule

    await schedule(desk.settings, challenge_after=challenge_after, dry_run=dry_run)
