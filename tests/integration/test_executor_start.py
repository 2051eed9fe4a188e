"""Machines that can start nothing: the fault is detected early, and no job is blamed for it."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from deepsquare_chain.executors import launch
from deepsquare_chain.executors.base import ExecutorUnavailableError, Exit, RunSpec, RunState
from deepsquare_chain.executors.launch import ForkServer, StartProbe
from deepsquare_chain.executors.local import LocalExecutor
from deepsquare_chain.executors.rundir import RunFolder, read_kept
from deepsquare_chain.job import Offer, Resources

pytestmark = pytest.mark.integration

NO_PROCESS_LEFT = """
def refuse(*_, **__): raise BlockingIOError(11, "Resource temporarily unavailable")
os.posix_spawn = refuse
"""


def shell(path: Path, text: str, mode: int = 0o755) -> None:
    path.write_text(text)
    path.chmod(mode)


def run(folder: Path, script: bytes, change: str = "", **spec: Any) -> tuple[dict[str, Any], bytes]:
    """Run a script under a supervisor with one changed function; return exit record and output."""
    run = RunFolder(folder)
    run.fill({"env": {}, "walltime": 30, "memory": 256, **spec}, script, 30)
    code = f"""if True:
        import os, sys
        from deepsquare_chain.executors import supervisor
        exec({change!r})
        sys.exit(supervisor.main([{str(folder)!r}]))
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdout=subprocess.PIPE)
    return json.loads((folder / "exit.json").read_text()), read_kept(run.output, 0, 10_000)


@pytest.mark.parametrize("kind", ["missing", "closed", "no program", "does nothing", "lacks parts"])
def test_script_that_no_shell_executed_is_no_failure_of_the_job(tmp_path: Path, kind: str) -> None:
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


def test_a_sandbox_that_failed_once_is_no_failure_of_the_job(tmp_path: Path) -> None:
    """The sandbox fails once: that run ends as unstarted, and the next run works."""
    sandbox = tmp_path / "sandbox"
    shell(sandbox, f'#!/bin/sh\n[ -e {tmp_path}/once ] && exec "$@"\n: >{tmp_path}/once\nexit 1\n')
    change = f"""
from deepsquare_chain.executors.supervisor import Confinement
Confinement.command = lambda self, inner: [{str(sandbox)!r}, *inner]
"""
    record, output = run(tmp_path / "run", b"echo hi", change)
    assert (record["reason"], record["seconds"], record["code"]) == ("unstarted", 0, 1)
    assert b"not executed" in output
    record, output = run(tmp_path / "again", b"echo hi; exit 1", change)
    assert (record["reason"], record["code"], output) == ("exited", 1, b"hi\n")


FULL_DISK = """
from types import SimpleNamespace
os.statvfs = lambda _: SimpleNamespace(f_bavail=10, f_frsize=4096)
"""


@pytest.mark.parametrize(
    ("script", "change", "reason"),
    [
        (b"exit 1", FULL_DISK, "full"),
        (b"true", FULL_DISK, "exited"),
        (b"exit 1", "", "exited"),
        # It may have filled the disk itself.
        (
            b"fallocate -l 70M big || head -c 70000000 /dev/urandom > big; exit 1",
            FULL_DISK,
            "exited",
        ),
        (b"kill -9 $$", FULL_DISK, "full"),
    ],
)
def test_a_full_disk_is_no_failure_of_a_job_that_did_not_fill_it(
    tmp_path: Path, script: bytes, change: str, reason: str
) -> None:
    record, _ = run(tmp_path / "run", script, change, isolation={"disk": 1_000})
    assert record["reason"] == reason


def test_a_script_gets_no_arguments_or_descriptors_of_its_supervisor(tmp_path: Path) -> None:
    script = b'echo "$0 $# $- $SHLVL"; ls /proc/self/fd'
    record, output = run(tmp_path / "run", script)
    assert record["code"] == 0
    name, *descriptors = output.decode().split("\n")[:-1]
    assert name == f"{tmp_path}/run/script 0 hB 1"
    # 3 is the folder that `ls` reads.
    assert descriptors == ["0", "1", "2", "3"]


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
def test_an_invalid_script_is_a_failure_of_the_job(
    tmp_path: Path, script: bytes, code: int
) -> None:
    record, _ = run(tmp_path / "run", script)
    assert record["reason"] == "exited"
    assert record["code"] in {code, 127}


# -- the probe


def test_the_probe_of_a_working_machine_passes_and_leaves_nothing(tmp_path: Path) -> None:
    assert StartProbe(tmp_path, ForkServer(tmp_path)).fault() == ""
    assert list(tmp_path.iterdir()) == []


def spoil(kind: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Break the machine in one way; return words that the probe must report."""

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
    monkeypatch.setattr(launch, "_PROBE_SCRIPT", b"exit 126")
    return "ended with code 126"


@pytest.mark.parametrize(
    "kind", ["no process", "full disk", "no python", "broken python", "broken shell"]
)
async def test_a_machine_that_starts_nothing_reports_a_fault_and_retries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    now = [1_000.0]
    executor = LocalExecutor(tmp_path, Offer(1, 512, 0))
    monkeypatch.setattr(launch.time, "monotonic", lambda: now[0])
    if kind == "broken python":
        monkeypatch.setattr(launch, "_PROBE_TIMEOUT", 5.0)
    with monkeypatch.context() as patch:
        reason = spoil(kind, patch)
        assert reason in await executor.fault()
    # The machine was not probed meanwhile; the next probe is due after a pause.
    assert reason in await executor.fault()
    now[0] += launch._PROBE_RETRY[0] + 1
    assert await executor.fault() == ""


@pytest.mark.parametrize("kind", ["no process for a fork", "no thread"])
async def test_a_start_without_a_process_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """No verdict is recorded: the same run starts once the machine has free resources."""
    executor = LocalExecutor(tmp_path, Offer(1, 64, 0))
    spec = RunSpec("full", b"echo hi", Resources(1, 1, 64, 0), 30, {})
    with monkeypatch.context() as patch:
        if kind == "no thread":

            def refuse(*_: object) -> None:
                raise RuntimeError("can't start new thread")

            patch.setattr(threading.Thread, "start", refuse)
        else:
            number = str(errno.EAGAIN).encode()
            patch.setattr(socket, "recv_fds", lambda *_: (number, [], 0, None))
        with pytest.raises(ExecutorUnavailableError, match=r"thread|temporarily unavailable"):
            await asyncio.wait_for(executor.submit(spec), 20)
    executor._runs.fork_server.close()
    handle = await executor.submit(spec)
    while (status := (await executor.poll([handle]))[handle]).exit is None:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    assert (status.exit.code, status.exit.reason) == (0, "exited")


async def test_a_run_that_could_not_be_started_makes_the_executor_look_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = LocalExecutor(tmp_path, Offer(1, 512, 0))
    assert await executor.fault() == ""
    executor._runs.fork_server.close()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert await executor.fault() == ""  # a successful probe is valid for a while
    spec = RunSpec("run", b"true", Resources(1, 1, 64, 0), 10, {})
    with pytest.raises(ExecutorUnavailableError):
        await executor.submit(spec)
    assert "failed" in await executor.fault()
    monkeypatch.setattr(ForkServer, "start", None)  # must not be used again before the pause ends
    assert "failed" in await executor.fault()


# -- the fork server


async def ended(executor: LocalExecutor, key: str) -> Exit:
    async with asyncio.timeout(90):
        while (result := (await executor.poll([key]))[key].exit) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return result


def counting_run(key: str, tally: Path, more: str = "") -> RunSpec:
    script = f"echo {key} >> {tally}; {more}".encode()
    return RunSpec(key, script, Resources(1, 1, 64, 0), 60, {})


def server_of(executor: LocalExecutor) -> psutil.Process:
    process = executor._runs.fork_server._process
    assert process is not None
    return psutil.Process(process.pid)


async def test_runs_do_not_depend_on_the_fork_server(tmp_path: Path) -> None:
    executor, tally = LocalExecutor(tmp_path / "state", Offer(4, 512, 0)), tmp_path / "tally"
    await executor.submit(
        counting_run("long", tally, f"until [ -e {tmp_path}/go ]; do sleep 0.1; done")
    )
    first = server_of(executor)
    [supervisor] = first.children()
    # `ps` tells the runs apart.
    assert supervisor.cmdline()[:2] == [
        "deepsquare_chain.executors.supervisor",
        str(tmp_path / "state/runs/long"),
    ]
    first.kill()
    first.wait(5)
    await executor.submit(counting_run("next", tally))
    assert server_of(executor) != first
    assert (await ended(executor, "next")).code == 0
    assert (await executor.poll(["long"]))["long"].state is RunState.RUNNING
    (tmp_path / "go").touch()
    end = await ended(executor, "long")
    assert (end.code, end.reason) == (0, "exited")
    assert tally.read_text().split() == ["long", "next"]


async def test_hanging_fork_server_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, tally = LocalExecutor(tmp_path / "state", Offer(4, 512, 0)), tmp_path / "tally"
    await executor.submit(counting_run("first", tally))
    monkeypatch.setattr(launch, "_REPLY_TIMEOUT", 2.0)
    stopped = server_of(executor)
    stopped.suspend()
    await executor.submit(counting_run("second", tally))
    assert not stopped.is_running()
    for key in ("first", "second"):
        assert (await ended(executor, key)).code == 0
    assert tally.read_text().split() == ["first", "second"]


async def test_a_lost_response_of_the_fork_server_starts_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, tally = LocalExecutor(tmp_path / "state", Offer(4, 512, 0)), tmp_path / "tally"
    assert await executor.fault() == ""
    ask, dropped = ForkServer._ask, []

    def ask_and_drop_response(server: ForkServer, *arguments: Any) -> tuple[int, int] | None:
        answer = ask(server, *arguments)
        if dropped or answer is None:
            return answer
        dropped.append(answer)
        os.close(answer[0])
        server._end_server()
        return None

    monkeypatch.setattr(ForkServer, "_ask", ask_and_drop_response)
    await executor.submit(counting_run("once", tally, "sleep 0.3"))
    assert len(dropped) == 1
    assert (await ended(executor, "once")).code == 0
    assert tally.read_text() == "once\n"


@pytest.mark.parametrize("cause", ["idle", "daemon gone"])
def test_fork_server_ends_when_it_is_not_needed(cause: str) -> None:
    parent_end, child_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    idle = 0.1 if cause == "idle" else 60.0
    code = f"""if True:
        import socket
        from deepsquare_chain.executors import supervisor
        supervisor._SERVER_IDLE = {idle}
        supervisor.serve(socket.socket(fileno=0))
    """
    with (
        parent_end,
        subprocess.Popen([sys.executable, "-c", code], stdin=child_end.fileno()) as server,
    ):
        child_end.close()
        if cause != "idle":
            parent_end.close()
        assert server.wait(20) == 0
