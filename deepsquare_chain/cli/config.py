"""The settings in force, and whether everything is in order."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import typer

from deepsquare_chain.cli.frame import Desk, command
from deepsquare_chain.cli.output import Column, Kind

app = typer.Typer(help="Show the settings.", no_args_is_help=True)
doctor_app = typer.Typer()

_SETTINGS: Final = (
    Column("setting", "setting"),
    Column("value", "value"),
    Column("meaning", "meaning"),
)
_CHECKS: Final = (
    Column("check", "check"),
    Column("ok", "in order", Kind.FLAG),
    Column("text", "found"),
    Column("hint", "what to do"),
)


@app.callback()
def group() -> None:
    """Show the settings."""


@command(app)
async def show(desk: Desk) -> None:
    """Show every setting in force: flag > environment > .deepsquare.toml > user > default."""
    from deepsquare_chain.settings import PROJECT_FILE, Settings, safe_url, user_config_path

    values = desk.settings.model_dump()
    values["endpoint"] = safe_url(desk.settings.endpoint)
    desk.printer.rows(
        _SETTINGS,
        (
            (name, None if values[name] is None else str(values[name]), field.description)
            for name, field in Settings.model_fields.items()
        ),
    )
    for path in (Path.cwd() / PROJECT_FILE, user_config_path()):
        desk.printer.note(f"{path}: {'read' if path.is_file() else 'not there'}")


@command(doctor_app)
async def doctor(desk: Desk) -> int:
    """Look at all that a command needs; exit 1 if something is wrong."""
    from deepsquare_chain.client.doctor import examine

    found = await examine(desk.settings)
    desk.printer.rows(_CHECKS, ((each.name, each.ok, each.text, each.hint) for each in found))
    return 0 if all(each.ok for each in found) else 1
