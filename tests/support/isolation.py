"""Isolation of jobs in tests: required where real parts are, and chosen by the machine elsewhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from deepsquare_chain.executors.cgroups import find_cgroups
from deepsquare_chain.executors.sandbox import Isolation, SandboxOptions, probe_sandbox
from tests.support.anvil import REQUIRE_REAL

#: What lets a test start a provider whoever runs the test.
ALLOWED: dict[str, bool] = {"allow_root": True, "allow_unisolated": True}
#: The same for commands, by the environment.
ALLOWED_ENVIRONMENT = {"DEEPSQUARE_ALLOW_ROOT": "1", "DEEPSQUARE_ALLOW_UNISOLATED": "1"}


def require(present: object, reason: str) -> None:
    """Skip, or fail where real parts are required, on a machine that lacks something."""
    if present:
        return
    if os.environ.get(REQUIRE_REAL) == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def require_sandbox(private: tuple[Path, ...] = (), **options: Any) -> Isolation:
    """Isolation of this machine with these options, by a sandbox."""
    probe = probe_sandbox()
    require(probe.sandbox, f"{probe.reason} (Debian: bubblewrap)")
    return Isolation(probe.sandbox, SandboxOptions(**options), find_cgroups(), private)
