"""Measured memory of runs: shared pages count once, and shared memory files count."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepsquare_chain.executors.base import Exit, RunSpec
from deepsquare_chain.executors.local import LocalExecutor
from deepsquare_chain.job import Offer, Resources

pytestmark = pytest.mark.integration

#: What a run holds that does nothing but start Python; MB.
LIMIT = 64
SHARED = Path("/dev/shm")

FORKED = """
    data = bytearray(os.urandom(1 << 20)) * 30
    children = []
    for _ in range(5):
        child = os.fork()
        if child == 0:
            time.sleep(1)
            os._exit(data[5] & 0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
"""
FORKED_AND_WRITTEN = """
    data = bytearray(30 << 20)
    for _ in range(5):
        if os.fork() == 0:
            data[:] = os.urandom(1 << 20) * 30
            time.sleep(30)
    time.sleep(30)
"""
FILE = """
    with open(name, "wb") as file:
        for _ in range(150):
            file.write(bytes(1 << 20))
    time.sleep(30)
"""
IN_A_FOLDER = """
    os.mkdir(name)
    file = open(name + "/data", "wb")
    file.write(bytes(150 << 20))
    file.flush()
    time.sleep(0.5)
    file.close()
    time.sleep(30)
"""
DELETED = """
    file = open(name, "wb")
    os.unlink(name)
    file.write(bytes(150 << 20))
    file.flush()
    time.sleep(30)
"""
MEMORY_FILE = """
    file = os.memfd_create("m")
    for _ in range(150):
        os.write(file, bytes(1 << 20))
    time.sleep(30)
"""
MAPPED_BY_ALL = """
    import mmap
    data = mmap.mmap(-1, 30 << 20)
    data.write(bytes(30 << 20))
    for _ in range(5):
        if os.fork() == 0:
            sum(data[::4096])
            time.sleep(1)
            os._exit(0)
    time.sleep(1.2)
"""


@pytest.fixture
def name(tmp_path: Path) -> Iterator[Path]:
    path = SHARED / f"test-{tmp_path.name}-{time.time_ns()}"
    yield path
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


async def end_of(folder: Path, script: str, name: Path) -> Exit:
    body = f"import os, time\nname = {str(name)!r}\n{textwrap.dedent(script)}"
    (folder / "script.py").write_text(body)
    executor = LocalExecutor(folder / "state", Offer(2, 4096, 0))
    command = f"{sys.executable} -S {folder / 'script.py'}".encode()
    await executor.submit(RunSpec("run", command, Resources(1, 1, LIMIT, 0), 20, {}))
    for _ in range(1_000):
        result = (await executor.poll(["run"]))["run"].exit
        if result is not None:
            return result
        await asyncio.sleep(0.02)
    raise AssertionError("the run did not end")


@pytest.mark.parametrize("script", [FORKED, MAPPED_BY_ALL], ids=["forked", "mapped by all"])
async def test_shared_memory_counts_once(tmp_path: Path, name: Path, script: str) -> None:
    assert (await end_of(tmp_path, script, name)).reason == "exited"


@pytest.mark.parametrize(
    "script",
    [FORKED_AND_WRITTEN, FILE, IN_A_FOLDER, DELETED, MEMORY_FILE],
    ids=["forked and written", "file", "in a folder", "deleted", "memory file"],
)
async def test_resident_memory_of_a_run_counts(tmp_path: Path, name: Path, script: str) -> None:
    end = await end_of(tmp_path, script, name)
    assert (end.reason, end.code) == ("memory", 143)


async def test_files_of_a_run_in_shared_memory_are_removed(tmp_path: Path, name: Path) -> None:
    other = name.with_name(f"{name.name}-other")
    other.write_text("of another program")
    try:
        script = """
        open(name + "-other").read()
        file = open(name, "wb")
        file.write(bytes(1 << 20))
        time.sleep(0.5)
        """
        await asyncio.sleep(1.2)  # the other file is surely older than the run
        assert (await end_of(tmp_path, script, name)).reason == "exited"
        assert name.name not in await asyncio.to_thread(os.listdir, SHARED)
        assert other.read_text() == "of another program"
    finally:
        other.unlink()
