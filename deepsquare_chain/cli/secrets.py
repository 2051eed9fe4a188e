"""Input of secrets: from a file or typed without echo, never as a flag; new passwords typed twice."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path

from deepsquare_chain.errors import NotAuthorisedError, UsageError


def new_password(file: Path, password_file: Path | None) -> str:
    """Return the password for a new wallet, from the password file or typed twice.

    Raises:
        NotAuthorisedError: Stdin is no terminal.
        UsageError: The two inputs differ, or the password file is not usable.
    """
    from deepsquare_chain.chain.wallet import read_password

    typed = read_password(file, password_file)
    if password_file is None and getpass.getpass("Repeat the password: ") != typed:
        raise UsageError("The two passwords differ", hint="Nothing was written; try again.")
    return typed


def ask_secret(prompt: str) -> str:
    """Prompt for a private key or mnemonic without echo.

    Raises:
        NotAuthorisedError: Stdin is no terminal.
    """
    if not sys.stdin.isatty():
        raise NotAuthorisedError(
            "A secret can only be entered on a terminal",
            hint="Give its file with --key-file or --mnemonic-file, import a keystore with --from, "
            "or use a terminal.",
        )
    return getpass.getpass(prompt)


def or_stdin(path: Path) -> Path:
    """Return the path, or that of standard input for `-`."""
    return Path("/dev/stdin") if str(path) == "-" else path
