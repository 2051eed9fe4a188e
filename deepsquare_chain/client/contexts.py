"""Saves the chosen context in the user's configuration file."""

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
    """Set `context = "NAME"` in the file; everything else is unchanged.

    Args:
        path: The configuration file; created if missing.
        name: Name of a context of a configuration file.

    Raises:
        UsageError: The file can't be read or written, or can't be edited safely.
    """
    try:
        before = path.read_text("utf-8-sig") if path.exists() else ""
        after = _with_context(before, name)
        safe = tomllib.loads(after) == tomllib.loads(before) | {"context": name}
        reason = "its format is not supported"
        if safe:
            _replace(path, after)
    except (OSError, ValueError) as error:
        safe, reason = False, getattr(error, "strerror", None) or str(error)
    if not safe:
        raise UsageError(
            f"{path} can't be changed: {reason[:200]}",
            hint=f'Write the line context = "{name}" into the file by hand, above all tables.',
        )


def _with_context(text: str, name: str) -> str:
    """Return the text with the context set above its first table."""
    table = _TABLE.search(text)
    end = table.start() if table else len(text)
    quoted = name.replace("\\", "\\\\").replace('"', '\\"')
    line = f'context = "{quoted}"'
    head, replacements = _LINE.subn(lambda _: line, text[:end], count=1)
    return (head if replacements else f"{line}\n{head}") + text[end:]


def _replace(path: Path, text: str) -> None:
    """Replace the file atomically; file mode and symbolic links are kept."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o600)
    temporary.replace(path)
