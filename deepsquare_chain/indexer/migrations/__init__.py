"""Versions of the index's tables, brought up to date by alembic.

A new version is a file of `versions/` with the next number. What an old one does never changes:
databases in the field were made by it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import Connection

from deepsquare_chain.errors import UsageError

_FOLDER: Final = Path(__file__).parent


def migrate(connection: Connection, place: str, *, writer: bool) -> None:
    """Bring the tables up to this program's version, in the caller's transaction.

    Args:
        connection: Of the database.
        place: What to call it.
        writer: Whether tables of an older version may be changed.

    Raises:
        UsageError: They are of a newer version, or of an older one and nobody here may write.
    """
    config = Config()
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    scripts = ScriptDirectory.from_config(config)
    found = MigrationContext.configure(connection).get_current_revision()
    if found == scripts.get_current_head():
        return
    if found is not None and not writer:
        raise UsageError(
            f"The index {place} has version {found}, but this program reads version "
            f"{scripts.get_current_head()}",
            hint="Update it with `deepsquare explorer index`.",
        )
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError:
        raise UsageError(
            f"The index {place} has version {found}, which this program does not support",
            hint="Use the newer program that created it, or give another --database.",
        ) from None
