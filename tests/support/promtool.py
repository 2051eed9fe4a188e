"""promtool, the checker of Prometheus."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.anvil import REQUIRE_REAL

PROMTOOL = shutil.which("promtool")


def promtool(*arguments: str | Path, text: bytes = b"") -> subprocess.CompletedProcess[str]:
    """Run promtool; without it, skip the test, or fail if real parts are required."""
    if PROMTOOL is None:
        if os.environ.get(REQUIRE_REAL) == "1":
            pytest.fail("promtool is missing: install the Debian package prometheus")
        pytest.skip("promtool is not installed (Debian: prometheus)")
    process = subprocess.run(
        [PROMTOOL, *map(str, arguments)], input=text, capture_output=True, timeout=60, check=False
    )
    return subprocess.CompletedProcess(
        process.args, process.returncode, process.stdout.decode(), process.stderr.decode()
    )
