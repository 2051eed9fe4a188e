"""Labelled points at which a test may kill this process, as a power cut would.

`DEEPSQUARE_CRASH_AT=label` kills at the first passage of the label, `label:3` at the third; the
last word on stderr says so. Without the variable a point costs one look at the environment and
does nothing. Supervisors of runs pass labels too, without any package: nothing is imported here.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from typing import Final

VARIABLE: Final = "DEEPSQUARE_CRASH_AT"
_passed: Final[Counter[str]] = Counter()


def crash_point(label: str) -> None:
    """End the process with SIGKILL if a test ordered it here."""
    ordered = os.environ.get(VARIABLE)
    if not ordered:
        return
    wanted, _, count = ordered.partition(":")
    if wanted != label:
        return
    _passed[label] += 1
    if _passed[label] == int(count or 1):
        os.write(2, f"killed at {ordered}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)
