"""Retention removes the expired folders of ended runs, and nothing else."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from deepsquare_chain.errors import GridError
from deepsquare_chain.executors.base import ExecutorError, Exit, Stored, stored_in
from deepsquare_chain.provider.model import Phase, Run, run_key
from deepsquare_chain.provider.service import (
    MIN_FOLDER_AGE,
    KeptRun,
    Retention,
    RetentionLimits,
    expired_runs,
)
from deepsquare_chain.provider.state import RunTable
from deepsquare_chain.store.database import Store

pytestmark = pytest.mark.unit

CHAIN, CONTRACT, ME = 31337, "0x" + "44" * 20, "0x" + "55" * 20
NOW = 1_000_000.0
DAY = 86_400.0


def kept(key: str, age: float, size: int = 10) -> KeptRun:
    return KeptRun(key, NOW - age, size)


@pytest.mark.parametrize(
    ("runs", "limits", "removed"),
    [
        ([kept("a", 3 * DAY), kept("b", DAY)], RetentionLimits(2 * DAY), ["a"]),
        ([kept("a", 3 * DAY), kept("b", DAY)], RetentionLimits(9 * DAY), []),
        # Oldest first until the rest is small enough.
        (
            [kept("b", DAY), kept("a", 2 * DAY), kept("c", DAY / 2)],
            RetentionLimits(9 * DAY, 20),
            ["a"],
        ),
        (
            [kept("b", DAY), kept("a", 2 * DAY), kept("c", DAY / 2)],
            RetentionLimits(9 * DAY, 19),
            ["a", "b"],
        ),
        ([kept("b", DAY), kept("a", 2 * DAY)], RetentionLimits(9 * DAY, 20), []),
        # Folders removed by age count as freed.
        ([kept("a", 3 * DAY), kept("b", DAY)], RetentionLimits(2 * DAY, 10), ["a"]),
        # Results can be fetched for an hour, however short the limits are.
        ([kept("a", MIN_FOLDER_AGE - 1, 99)], RetentionLimits(1, 1), []),
        ([kept("a", MIN_FOLDER_AGE + 1, 99)], RetentionLimits(1), ["a"]),
    ],
)
def test_folders_above_the_age_or_the_total_size_expire(
    runs: list[KeptRun], limits: RetentionLimits, removed: list[str]
) -> None:
    assert [run.key for run in expired_runs(runs, limits, NOW)] == removed


class Folders:
    """An executor with folders; those in `undeletable` can't be removed."""

    def __init__(self, *keys: str, undeletable: str = "") -> None:
        self.stored_keys = list(keys)
        self.undeletable = undeletable
        self.measured: list[str] = []

    async def keys(self) -> list[str]:
        return list(self.stored_keys)

    async def stored(self, key: str) -> Stored:
        self.measured.append(key)
        return Stored(10, time.time() - 2 * DAY)

    async def forget(self, key: str) -> None:
        if key == self.undeletable:
            raise ExecutorError("it has not ended")
        self.stored_keys.remove(key)


def retention(executor: Any, *runs: Run, limits: RetentionLimits) -> tuple[Retention, list[Any]]:
    store = Store.open(None, chain_id=CHAIN, contract=CONTRACT, account=ME)
    table = RunTable(store, ME, chain_id=CHAIN, contract=CONTRACT)
    table.put(*runs)
    outcomes: list[Any] = []
    cleaner = Retention(executor, table, limits, show=lambda *figures: outcomes.append(figures))
    return cleaner, outcomes


def row(job_id: int, phase: Phase, ended_at: float | None = None, attempt: int = 0) -> Run:
    exit_record = None if ended_at is None else Exit(0, "exited", 5, ended_at - 5, ended_at)
    key = run_key(CHAIN, CONTRACT, job_id, attempt)
    return Run(job_id, key, phase, attempt, key, exit=exit_record)


async def test_only_settled_runs_of_this_grid_are_removed() -> None:
    now = time.time()
    key = [run_key(CHAIN, CONTRACT, number, 0) for number in range(6)]
    other_chain = run_key(CHAIN + 1, CONTRACT, 1, 0)
    folders = Folders(*key[1:], other_chain, "somebody-elses")
    rows = [
        row(1, Phase.CLOSED, now - 3 * DAY),
        row(2, Phase.CLOSED, now - 60),  # too young
        row(3, Phase.ENDED, now - 3 * DAY),  # not settled yet
        row(4, Phase.CLOSED),  # cancelled without an end: its folder's own age counts
        # 5 has no run record, so its state is unknown.
    ]
    cleaner, outcomes = retention(folders, *rows, limits=RetentionLimits(DAY))
    assert await cleaner.clean() == 2
    assert folders.stored_keys == [key[2], key[3], key[5], other_chain, "somebody-elses"]
    assert outcomes == [(1, 10)]
    assert await cleaner.clean() == 0
    assert folders.measured == [key[1], key[2], key[4]]  # each once


async def test_the_folder_of_an_earlier_assignment_is_removed_while_the_job_runs_again() -> None:
    first, second = (run_key(CHAIN, CONTRACT, 1, attempt) for attempt in (0, 1))
    folders = Folders(first, second)
    cleaner, _ = retention(folders, row(1, Phase.SUBMITTED, attempt=1), limits=RetentionLimits(DAY))
    assert await cleaner.clean() == 1
    assert folders.stored_keys == [second]


async def test_a_folder_that_can_not_be_removed_affects_no_other() -> None:
    old = time.time() - 3 * DAY
    keys = [run_key(CHAIN, CONTRACT, number, 0) for number in (1, 2)]
    folders = Folders(*keys, undeletable=keys[0])
    rows = [row(number, Phase.CLOSED, old) for number in (1, 2)]
    cleaner, outcomes = retention(folders, *rows, limits=RetentionLimits(DAY))
    assert await cleaner.clean() == 1
    assert (folders.stored_keys, outcomes) == ([keys[0]], [(1, 10)])

    async def away() -> list[str]:
        raise GridError("away")

    folders.keys = away  # type: ignore[method-assign]
    assert await cleaner.clean() == 0


def test_the_size_of_a_folder_follows_no_link(tmp_path: Path) -> None:
    folder, outside = tmp_path / "run", tmp_path / "outside"
    (folder / "deep").mkdir(parents=True)
    outside.mkdir()
    (outside / "large").write_bytes(os.urandom(1_000_000))
    (folder / "deep" / "data").write_bytes(os.urandom(300_000))
    (folder / "link").symlink_to(outside)
    stored = stored_in(folder)
    assert stored is not None
    assert 300_000 <= stored.size < 400_000
    assert abs(stored.changed_at - time.time()) < 60
    assert stored_in(tmp_path / "missing") is None
