"""Crash points: labelled places where a test may kill this process, as a power cut would.

`DEEPSQUARE_CRASH_AT=label` kills the process when it first reaches the label, `label:3` the third
time; the last line on stderr reports it. Without the variable, a crash point only reads the
environment. The supervisors of runs have crash points too and run without third-party packages, so
this module imports only the standard library.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from typing import Final

VARIABLE: Final = "DEEPSQUARE_CRASH_AT"
_passed: Final[Counter[str]] = Counter()


def crash_point(label: str) -> None:
    """Kill the process with SIGKILL if a test has selected this label."""
    ordered = os.environ.get(VARIABLE)
    if not ordered:
        return
    selected, _, count = ordered.partition(":")
    if selected != label:
        return
    _passed[label] += 1
    if _passed[label] == int(count or 1):
        os.write(2, f"killed at {ordered}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)
