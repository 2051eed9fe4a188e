"""Versions of the index's tables, brought up to date by alembic.

A new version is a file of `versions/` with the next number. Existing versions never change, because
databases in use were created by them.
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
        connection: Connection to the database.
        place: Location of the database, for messages.
        writer: Whether tables of an older version may be changed.

    Raises:
        UsageError: The tables have a newer version, or an older one and `writer` is false.
    """
    config = Config()
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    scripts = ScriptDirectory.from_config(config)
    version = MigrationContext.configure(connection).get_current_revision()
    if version == scripts.get_current_head():
        return
    if version is not None and not writer:
        raise UsageError(
            f"The index {place} has version {version}, but this program reads version "
            f"{scripts.get_current_head()}",
            hint="Update it with `deepsquare explorer index`.",
        )
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError:
        raise UsageError(
            f"The index {place} has version {version}, which this program does not support",
            hint="Use the newer program that created it, or give another --database.",
        ) from None
