"""A grid on Hardhat; `make test-nodes` tries all kinds of nodes that npm has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deepsquare_chain.errors import NotFoundError
from tests.support.anvil import REQUIRE_REAL
from tests.support.nodes import CANDIDATES, JOBS, run_on_node


async def test_a_grid_on_hardhat(tmp_path: Path) -> None:
    (candidate,) = [candidate for candidate in CANDIDATES if candidate.name == "hardhat 3"]
    try:
        result = await run_on_node(candidate, tmp_path)
    except NotFoundError as error:
        if os.environ.get(REQUIRE_REAL) == "1":
            pytest.fail(f"{error.message} {error.hint}")
        pytest.skip(f"{error.message} {error.hint}")
    assert result.version.startswith("HardhatNetwork/3")
    assert result.steps == {
        "deploy": "ok",
        "jobs": f"{JOBS} finished",
        **dict.fromkeys(("doctor", "audit with proofs", "export", "replay"), "ok"),
    }
