"""The command line `deepsquare GROUP COMMAND`: modules of command groups, without domain logic.

Expensive imports are inside the commands that need them, so that `--help` is fast.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit the process with its exit code."""
    from deepsquare_chain.cli.app import app

    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        app(args=arguments, prog_name="deepsquare")
    except Exception as error:
        if "--debug" in arguments:
            raise
        from deepsquare_chain.cli.frame import print_unexpected

        print_unexpected(error)
        sys.exit(1)
