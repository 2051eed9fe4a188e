"""Parts of bash scripts: the functions that scripts begin with, and quoting. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from importlib.resources import files
from types import MappingProxyType
from typing import Final

#: Files of this package that scripts contain. Read on import, so that rendering does no I/O.
LIBRARIES: Final[Mapping[str, str]] = MappingProxyType(
    {
        name: files("deepsquare_chain.workflow").joinpath(name).read_text(encoding="utf-8")
        for name in ("runtime.sh", "transfers.sh", "containers.sh", "networks.sh", "bore_client.py")
    }
)


def quote(text: str) -> str:
    """Quote a text as one bash word, always on one line, and at most about twice as long.

    Raises:
        ValueError: The text contains a NUL byte.
    """
    if "\0" in text:
        raise ValueError("a NUL byte can't be passed to a program")
    if "\n" not in text and "'" not in text:
        return shlex.quote(text)
    # A raw newline in the quoted text would start a line of the script with customer text.
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"$'{escaped}'"


def command_argument(command: str) -> str:
    """Quote a command as the argument of a shell's `-c`, which takes a leading - or + for an option."""
    return quote(f" {command}" if command.startswith(("-", "+")) else command)


def exports(env: Mapping[str, str]) -> list[str]:
    """Return lines that export variables.

    Raises:
        ValueError: A name is not an identifier, or a value contains a NUL byte.
    """
    return [f"export {identifier(key)}={quote(value)}" for key, value in env.items()]


def identifier(name: str) -> str:
    """Return the name unchanged if it is a valid variable name.

    Raises:
        ValueError: The name is not an ASCII identifier.
    """
    if not (name.isascii() and name.isidentifier()):
        raise ValueError(f"{name[:60]!r} is not a name of a variable")
    return name
