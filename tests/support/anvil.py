"""A real node for tests: the devnet's own launcher, skipped or required where it is missing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from deepsquare_chain.devnet.node.anvil import Anvil, find_anvil
from deepsquare_chain.errors import NotFoundError

REQUIRE_REAL = "DEEPSQUARE_REQUIRE_REAL"


def require_anvil() -> Path:
    """The binary; without it the test is skipped, or fails where real parts are required."""
    try:
        return find_anvil()
    except NotFoundError as error:
        missing = f"{error.message} {error.hint}"
    if os.environ.get(REQUIRE_REAL) == "1":
        pytest.fail(missing)
    pytest.skip(missing)


def start_anvil(**options: Any) -> Anvil:
    """A node that lives as long as its `async with`.

    Args:
        options: Those of `Anvil`; `block_time=None`, the default here, makes a block for each
            transaction.
    """
    require_anvil()
    return Anvil(**{"block_time": None, **options})
