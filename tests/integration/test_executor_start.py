"""Machines on which nothing can be started: told apart from jobs that fail, and found out early."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deepsquare_chain.executors import launch, startprobe
from deepsquare_chain.executors.base import ExecutorUnavailableError, RunSpec
from deepsquare_chain.executors.local import LocalExecutor
from deepsquare_chain.executors.outputlog import read_kept
from deepsquare_chain.executors.rundir import RunFolder
from deepsquare_chain.executors.startprobe import StartProbe
from deepsquare_chain.job import Offer, Resources

pytestmark = pytest.mark.integration

NO_PROCESS_LEFT = """
def refuse(*_, **__): raise BlockingIOError(11, "Resource temporarily unavailable")
os.posix_spawn = refuse
"""


def shell(path: Path, text: str, mode: int = 0o755) -> None:
    path.write_text(text)
    path.chmod(mode)


def run(folder: Path, script: bytes, change: str = "") -> tuple[dict[str, Any], bytes]:
    """The exit record and output of a script, run by a supervisor with something changed."""
    run = RunFolder(folder)
    run.fill({"env": {}, "walltime": 30, "memory": 256}, script, 30)
    code = f"""if True:
        import os, sys
        from deepsquare_chain.executors import supervisor
        exec({change!r})
        sys.exit(supervisor.main([{str(folder)!r}]))
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdout=subprocess.PIPE)
    return json.loads((folder / "exit.json").read_text()), read_kept(run.output, 0, 10_000)


@pytest.mark.parametrize("kind", ["missing", "closed", "no program", "does nothing", "lacks parts"])
def test_what_no_shell_executed_is_no_failure_of_the_job(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "shell"
    if kind == "closed":
        shell(path, "#!/bin/sh\n", 0o600)
    elif kind == "no program":
        shell(path, "\x7fELF")
    elif kind == "does nothing":
        path.symlink_to("/bin/false")
    elif kind == "lacks parts":
        shell(path, "#!/bin/sh\necho 'error while loading' >&2; exit 127\n")
    change = f"supervisor._SHELLS = ({str(path)!r},)"
    record, _ = run(tmp_path / "run", b"echo hi", change)
    assert (record["reason"], record["seconds"]) == ("unstarted", 0)
    assert record["code"] != 0


def test_no_process_left_is_no_failure_of_the_job(tmp_path: Path) -> None:
    record, output = run(tmp_path / "run", b"echo hi", NO_PROCESS_LEFT)
    assert (record["reason"], record["seconds"]) == ("unstarted", 0)
    assert b"could not be started: Resource temporarily unavailable" in output


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (b"no-such-interpreter program", 127),
        (b"printf '#!/no/such/interpreter\\n' > it; chmod +x it; ./it", 126),
        (b"touch it; ./it", 126),
        (b"exit 1", 1),
        (b"if", 2),
    ],
)
def test_what_the_job_itself_lacks_is_its_failure(tmp_path: Path, script: bytes, code: int) -> None:
    record, _ = run(tmp_path / "run", script)
    assert record["reason"] == "exited"
    assert record["code"] in {code, 127}


# -- the probe


def test_a_good_machine_passes_and_keeps_nothing(tmp_path: Path) -> None:
    assert StartProbe(tmp_path).fault() == ""
    assert list(tmp_path.iterdir()) == []


def spoil(kind: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Break the machine; the words that the probe must find."""

    def refuse(number: int) -> Any:
        def refusing(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        return refusing

    if kind == "no process":
        monkeypatch.setattr(subprocess, "Popen", refuse(errno.EAGAIN))
        return "Resource temporarily unavailable"
    if kind == "full disk":
        monkeypatch.setattr(RunFolder, "fill", refuse(errno.ENOSPC))
        return "No space left on device"
    if kind == "no python":
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        return "No such file or directory"
    if kind == "broken python":
        monkeypatch.setattr(sys, "executable", "/bin/false")
        return "supervisor of a test script failed"
    monkeypatch.setattr(startprobe, "_SCRIPT", b"exit 126")
    return "ended with code 126"


@pytest.mark.parametrize(
    "kind", ["no process", "full disk", "no python", "broken python", "broken shell"]
)
async def test_a_machine_that_starts_nothing_says_so_and_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    now = [1_000.0]
    executor = LocalExecutor(tmp_path, Offer(1, 512, 0))
    monkeypatch.setattr(startprobe.time, "monotonic", lambda: now[0])
    if kind == "broken python":
        monkeypatch.setattr(startprobe, "_PATIENCE", 5.0)
    with monkeypatch.context() as patch:
        words = spoil(kind, patch)
        assert words in await executor.fault()
    # Nothing was asked of the machine meanwhile; the next look is due after a pause.
    assert words in await executor.fault()
    now[0] += startprobe._RETRY[0] + 1
    assert await executor.fault() == ""


async def test_a_run_that_could_not_be_started_makes_the_executor_look_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = LocalExecutor(tmp_path, Offer(1, 512, 0))
    assert await executor.fault() == ""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert await executor.fault() == ""  # a good answer counts for a while
    spec = RunSpec("run", b"true", Resources(1, 1, 64, 0), 10, {})
    with pytest.raises(ExecutorUnavailableError):
        await executor.submit(spec)
    assert "failed" in await executor.fault()
    monkeypatch.setattr(launch, "start_supervisor", None)  # not asked again before its time
    assert "failed" in await executor.fault()
