"""A real node (anvil) for tests; if it is missing, tests are skipped, or fail if it is required."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from deepsquare_chain.devnet.node.base import Anvil, Node, find_anvil
from deepsquare_chain.devnet.node.embedded import ChainProcess
from deepsquare_chain.errors import NotFoundError

REQUIRE_REAL = "DEEPSQUARE_REQUIRE_REAL"
#: Option of anvil: besides its blocks by the clock, it mines a block at once for each transaction.
AT_ONCE = "--mixed-mining"


def has_anvil() -> bool:
    """Whether anvil is installed. It is quicker than the embedded chain."""
    try:
        find_anvil()
    except NotFoundError:
        return False
    return True


def require_anvil() -> Path:
    """Return anvil's path; without anvil, skip the test, or fail if real parts are required."""
    try:
        return find_anvil()
    except NotFoundError as error:
        missing = f"{error.message} {error.hint}"
    if os.environ.get(REQUIRE_REAL) == "1":
        pytest.fail(missing)
    pytest.skip(missing)


def start_anvil(**options: Any) -> Anvil:
    """Return a node to be used with `async with`.

    Args:
        options: Options of `Anvil`; the default `block_time=None` mines a block for each
            transaction.
    """
    require_anvil()
    return Anvil(**{"block_time": None, **options})


def start_ticking() -> Node:
    """Return a node with a block per second; anvil, if it is installed, also mines `AT_ONCE`."""
    return Anvil(options=(AT_ONCE,)) if has_anvil() else ChainProcess(block_time=1)
