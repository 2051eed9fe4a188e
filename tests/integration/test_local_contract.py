"""The local executor keeps the contract of executors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from deepsquare_chain.executors.contract import ExecutorContract, Harness
from deepsquare_chain.executors.local import LocalExecutor
from deepsquare_chain.job import Offer


class TestLocalExecutor(ExecutorContract):
    @pytest.fixture
    async def harness(self, tmp_path: Path) -> AsyncIterator[Harness]:
        offer = Offer(cpus=8, memory=8192, gpus=0)
        (tmp_path / "scratch").mkdir()
        yield Harness(lambda: LocalExecutor(tmp_path / "state", offer), tmp_path / "scratch")
        executor = LocalExecutor(tmp_path / "state", offer)
        for key in await executor.keys():
            await executor.cancel(key)
