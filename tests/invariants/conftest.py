"""The asserts of the machine say what they compared, as those of a test module do."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.invariants.machine", "tests.invariants.games")
