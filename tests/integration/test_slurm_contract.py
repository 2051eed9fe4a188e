"""The Slurm executor passes the test suite of executors, on a real cluster of two nodes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from deepsquare_chain.executors.contract import ExecutorContract, Harness
from tests.support.slurm import LocalSlurm


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalSlurm]:
    local_slurm = LocalSlurm()
    yield local_slurm
    local_slurm.close()


class TestSlurmExecutor(ExecutorContract):
    @pytest.fixture
    async def harness(self, cluster: LocalSlurm, tmp_path: Path) -> AsyncIterator[Harness]:
        # Slurm keeps the names of jobs, so each test is another provider.
        owner, state = tmp_path.name, tmp_path / "state"
        (tmp_path / "scratch").mkdir()
        yield Harness(
            lambda: cluster.executor(state, owner=owner),
            tmp_path / "scratch",
            enforces_memory=cluster.has_cgroups,
        )
        executor = cluster.executor(state, owner=owner)
        for key in await executor.keys():
            await executor.cancel(key)
