"""Assertions of the state machine show the compared values, as those of test modules do."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.invariants.machine", "tests.invariants.games")
