"""Choosing a context for good: one line of the user's own configuration file."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Final

from deepsquare_chain.errors import UsageError

_LINE: Final = re.compile(r"^[ \t]*context[ \t]*=.*$", re.MULTILINE)
_TABLE: Final = re.compile(r"^[ \t]*\[", re.MULTILINE)


def choose_context(path: Path, name: str) -> None:
    """Make `context = "NAME"` the file's choice; everything else in it stays as it is.

    Args:
        path: The configuration file; made where there is none.
        name: Of a context that a configuration file knows.

    Raises:
        UsageError: The file can't be read or written, or is too unusual to be changed safely.
    """
    try:
        before = path.read_text("utf-8-sig") if path.exists() else ""
        after = _with_context(before, name)
        safe = tomllib.loads(after) == tomllib.loads(before) | {"context": name}
        reason = "its text is unusual"
        if safe:
            _replace(path, after)
    except (OSError, ValueError) as error:
        safe, reason = False, getattr(error, "strerror", None) or str(error)
    if not safe:
        raise UsageError(
            f"{path} can't be changed: {reason[:200]}",
            hint=f'Write the line context = "{name}" into it yourself, above all tables.',
        )


def _with_context(text: str, name: str) -> str:
    """The text with the choice in it, above its first table."""
    table = _TABLE.search(text)
    end = table.start() if table else len(text)
    quoted = name.replace("\\", "\\\\").replace('"', '\\"')
    line = f'context = "{quoted}"'
    head, found = _LINE.subn(lambda _: line, text[:end], count=1)
    return (head if found else f"{line}\n{head}") + text[end:]


def _replace(path: Path, text: str) -> None:
    """Exchange the file in one step, with the rights that it had; a link stays a link."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(text)
    fresh.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o600)
    fresh.replace(path)
