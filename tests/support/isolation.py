"""Isolation of jobs in tests; required if real parts are required."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from deepsquare_chain.executors.cgroups import find_cgroups
from deepsquare_chain.executors.sandbox import Isolation, SandboxOptions, probe_sandbox
from tests.support.anvil import REQUIRE_REAL

#: Settings with which a test can start a provider as any user, without isolation.
ALLOWED: dict[str, bool] = {"allow_root": True, "allow_unisolated": True}
#: The same settings as environment variables.
ALLOWED_ENVIRONMENT = {"DEEPSQUARE_ALLOW_ROOT": "1", "DEEPSQUARE_ALLOW_UNISOLATED": "1"}


def require(present: object, reason: str) -> None:
    """If `present` is false, skip the test, or fail if real parts are required."""
    if present:
        return
    if os.environ.get(REQUIRE_REAL) == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def require_sandbox(private: tuple[Path, ...] = (), **options: Any) -> Isolation:
    """Return this machine's isolation by a sandbox, with these options."""
    probe = probe_sandbox()
    require(probe.sandbox, f"{probe.reason} (Debian: bubblewrap)")
    return Isolation(probe.sandbox, SandboxOptions(**options), find_cgroups(), private)
