"""The fixture `cli` for tests that define a `local_devnet`."""

from __future__ import annotations

from tests.support.local_devnet import cli  # noqa: F401 - a fixture
