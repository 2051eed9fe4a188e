"""The root of the command line."""

from __future__ import annotations

from typing import Annotated

import typer

from deepsquare_chain import __version__
from deepsquare_chain.cli import (
    admin,
    audit,
    config,
    contracts,
    credit,
    demo,
    devnet,
    explorer,
    job,
    metascheduler,
    provider,
    submit,
    wallet,
)

app = typer.Typer(
    name="deepsquare",
    help="A grid of compute providers whose jobs and credits live on an Ethereum chain.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
# Without a name the commands of a group stand at the top.
for top in (demo.app, submit.app, config.doctor_app):
    app.add_typer(top)
for group in (
    job,
    credit,
    wallet,
    provider,
    metascheduler,
    admin,
    audit,
    explorer,
    contracts,
    devnet,
    config,
):
    app.add_typer(group.app, name=group.__name__.rpartition(".")[2])


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"deepsquare {__version__}")
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """A grid of compute providers whose jobs and credits live on an Ethereum chain."""
