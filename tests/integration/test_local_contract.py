"""The local executor passes the test suite of executors, with jobs in the sandbox."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from deepsquare_chain.executors.contract import ExecutorContract, Harness
from deepsquare_chain.executors.local import LocalExecutor
from deepsquare_chain.job import Offer
from tests.support.isolation import require_sandbox


class TestLocalExecutor(ExecutorContract):
    @pytest.fixture
    async def harness(self, tmp_path: Path) -> AsyncIterator[Harness]:
        (tmp_path / "scratch").mkdir()
        isolation = require_sandbox(writable=(tmp_path / "scratch",))

        def make() -> LocalExecutor:
            offer = Offer(cpus=8, memory=8192, gpus=0)
            return LocalExecutor(tmp_path / "state", offer, isolation=isolation)

        yield Harness(make, tmp_path / "scratch")
        executor = make()
        for key in await executor.keys():
            await executor.cancel(key)
