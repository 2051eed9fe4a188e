"""Text as words of a bash script."""

from __future__ import annotations

import shlex
from collections.abc import Mapping


def quote(text: str) -> str:
    """One word of bash, which is on one line whatever the text holds, and at most twice as long.

    Raises:
        ValueError: The text holds a NUL byte.
    """
    if "\0" in text:
        raise ValueError("a NUL byte can't be passed to a program")
    if "\n" not in text and "'" not in text:
        return shlex.quote(text)
    # A newline in quoted text would let that text begin a line of the script.
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"$'{escaped}'"


def exports(env: Mapping[str, str]) -> list[str]:
    """Lines that export variables.

    Raises:
        ValueError: A name is no identifier, or a value holds a NUL byte.
    """
    return [f"export {identifier(key)}={quote(value)}" for key, value in env.items()]


def identifier(name: str) -> str:
    """The name of a variable.

    Raises:
        ValueError: It is none.
    """
    if not (name.isascii() and name.isidentifier()):
        raise ValueError(f"{name[:60]!r} is no name of a variable")
    return name
