"""The Slurm executor with a real cluster of two nodes on this machine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from deepsquare_chain.executors.contract import ExecutorContract, Harness
from tests.support.slurm import LocalSlurm


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalSlurm]:
    """A cluster that forgets ended jobs after two seconds, and has no accounting."""
    found = LocalSlurm("--min-job-age", "2")
    yield found
    found.close()


class TestSlurmExecutor(ExecutorContract):
    @pytest.fixture
    async def harness(self, cluster: LocalSlurm, tmp_path: Path) -> AsyncIterator[Harness]:
        (tmp_path / "scratch").mkdir()
        state = tmp_path / "state"
        yield Harness(
            lambda: cluster.executor(state),
            tmp_path / "scratch",
            enforces_memory=cluster.has_cgroups,
        )
        executor = cluster.executor(state)
        for key in await executor.keys():
            await executor.cancel(key)
