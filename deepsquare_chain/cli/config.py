"""The settings in force."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import typer

from deepsquare_chain.cli.frame import Desk, command
from deepsquare_chain.cli.output import Column

app = typer.Typer(help="Show the settings.", no_args_is_help=True)

_SETTINGS: Final = (
    Column("setting", "setting"),
    Column("value", "value"),
    Column("meaning", "meaning"),
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
