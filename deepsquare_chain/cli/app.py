"""The root of the command line."""

from __future__ import annotations

from typing import Annotated

import typer

from deepsquare_chain import __version__
from deepsquare_chain.cli import credit

app = typer.Typer(
    name="deepsquare",
    help="A grid of compute providers whose jobs and credits live on an Ethereum chain.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for name, group in {"credit": credit.app}.items():
    app.add_typer(group, name=name)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"deepsquare {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version."
        ),
    ] = False,
) -> None:
    """Read the options that stand before any command."""
