"""The command line: `deepsquare`, noun then verb; one file a command group, no logic in it.

Heavy parts load inside the commands that need them, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and leave the process with its exit code."""
    from deepsquare_chain.cli.app import app

    app(args=None if argv is None else list(argv), prog_name="deepsquare")
