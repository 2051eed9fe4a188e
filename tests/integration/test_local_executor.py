"""The local executor with real processes, in addition to test_local_contract.py."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from structlog.testing import capture_logs

from deepsquare_chain.errors import NotFoundError
from deepsquare_chain.executors import local, orphaned_processes, procfs, rundir
from deepsquare_chain.executors.base import (
    ExecutorError,
    ExecutorUnavailableError,
    Exit,
    RunRefusedError,
    RunSpec,
    RunState,
)
from deepsquare_chain.executors.launch import device_environment, make_run
from deepsquare_chain.executors.local import LocalExecutor
from deepsquare_chain.executors.rundir import OUTPUT_LIMIT, RunFolder
from deepsquare_chain.job import Offer, Resources

OFFER = Offer(cpus=8, memory=8192, gpus=1)
ROOT = Path(__file__).resolve().parents[2]
# Every descendant of a test's jobs carries this, even if its parents end.
MARK = "GRID_EXECUTOR_TEST"


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """A state folder; processes that a failed test leaves are ended."""
    folder = tmp_path / "state"
    yield folder
    for process in alive_in(folder):
        with contextlib.suppress(psutil.Error):
            process.kill()


@pytest.fixture
def executor(state: Path) -> LocalExecutor:
    return LocalExecutor(state, OFFER)


def alive_in(state: Path) -> list[psutil.Process]:
    """Return the processes of jobs of this state folder, and their supervisors."""
    result = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
                continue
            env = process.environ()
            if env.get(MARK) == str(state) or any(str(state) in part for part in process.cmdline()):
                result.append(process)
    return result


def make(state: Path, key: str, script: str | bytes, **options: Any) -> RunSpec:
    body = script if isinstance(script, bytes) else textwrap.dedent(script).encode()
    return RunSpec(
        key=key,
        script=body,
        resources=options.get("resources", Resources(1, 1, options.get("memory", 256), 0)),
        walltime=options.get("walltime", 60),
        env={MARK: str(state), **options.get("env", {})},
    )


async def until(check: Callable[[], Awaitable[Any] | Any], seconds: float = 90.0) -> Any:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while True:
        result = check()
        result = await result if asyncio.iscoroutine(result) else result
        if result:
            return result
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.02)


async def ended(executor: LocalExecutor, key: str, seconds: float = 90.0) -> Exit:
    async def look() -> Exit | None:
        return (await executor.poll([key]))[key].exit

    result: Exit = await until(look, seconds)
    return result


async def printed(executor: LocalExecutor, key: str, text: bytes) -> bytes:
    """Wait until a run has printed something."""

    async def look() -> bytes:
        output = await executor.output(key)
        return output if text in output else b""

    result: bytes = await until(look)
    return result


def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, **options)


def owner_pid(state: Path, key: str) -> int:
    claim = RunFolder(state / "runs" / key).taken()
    assert claim is not None
    return claim.owner.pid


# -- how runs end


async def test_walltime_ends_even_a_run_that_ignores_term(
    executor: LocalExecutor, state: Path
) -> None:
    trapping = "trap 'echo trapped; exit 0' TERM; sleep 60 & wait"
    ignoring = "trap '' TERM; echo started; while :; do sleep 1; done"
    for key, script in (("plain", "sleep 60"), ("trap", trapping), ("deaf", ignoring)):
        await executor.submit(make(state, key, script, walltime=1))
    plain, trap, ignoring_term = [await ended(executor, key) for key in ("plain", "trap", "deaf")]
    assert [end.reason for end in (plain, trap, ignoring_term)] == ["walltime"] * 3
    # A run that was stopped never counts as a success.
    assert (plain.code, trap.code, ignoring_term.code) == (143, 143, 137)
    assert b"trapped" in await executor.output("trap")
    assert 1 <= plain.ended_at - plain.started_at < 2.5
    assert 3 <= ignoring_term.ended_at - ignoring_term.started_at < 6
    assert alive_in(state) == []


async def test_memory_of_the_whole_tree_is_limited(executor: LocalExecutor, state: Path) -> None:
    # Each of three detached processes stays below the limit that they exceed together.
    memory_holder = (
        "import time; block = bytearray(40 * 2**20); print('held', flush=True); time.sleep(60)"
    )
    script = "\n".join([f'setsid {sys.executable} -S -c "{memory_holder}" &'] * 3) + "\nwait"
    await executor.submit(make(state, "big", script, memory=100))
    await executor.submit(make(state, "fits", script.replace("60", "1"), memory=400))
    end = await ended(executor, "big")
    assert (end.reason, end.code) == ("memory", 143)
    assert (await ended(executor, "fits")).reason == "exited"
    assert alive_in(state) == []


async def test_runs_of_one_gpu_each_get_different_ones(state: Path) -> None:
    for key in ("one", "two", "none"):
        # A new executor each time, as after a restart of the daemon.
        executor = LocalExecutor(state, Offer(4, 4096, 2))
        resources = Resources(1, 1, 64, 0 if key == "none" else 1)
        script = "echo $CUDA_VISIBLE_DEVICES $ROCR_VISIBLE_DEVICES; sleep 60"
        await executor.submit(make(state, key, script, resources=resources))
    outputs = [await printed(executor, key, b"\n") for key in ("one", "two", "none")]
    assert outputs == [b"0 0\n", b"1 1\n", b"-1 -1\n"]
    assert (await executor.capacity()).gpus == 0
    for key in ("one", "two", "none"):
        await executor.cancel(key)
    assert (await executor.capacity()).gpus == 2


# -- output


async def test_output_is_bounded_and_keeps_both_ends(executor: LocalExecutor, state: Path) -> None:
    await executor.submit(
        make(state, "long", "echo first; yes middle | head -c 5000000; echo last")
    )
    await executor.submit(make(state, "endless", "echo begin; yes", walltime=2))
    end = await ended(executor, "long")
    assert (end.code, end.reason) == (0, "exited")
    output = await executor.output("long", 0, OUTPUT_LIMIT)
    assert output.startswith(b"first\nmiddle\n")
    assert output.endswith(b"last\n")
    note = re.search(rb"\n\[\.\.\. (\d+) bytes left out \.\.\.\]\n", output)
    assert note is not None
    assert len(output) - len(note.group()) + int(note.group(1)) == 5_000_000 + len("first\nlast\n")
    assert (await ended(executor, "endless")).reason == "walltime"
    for key in ("long", "endless"):
        files = (state / "runs" / key).glob("output*")
        size = sum(file.stat().st_size for file in files)
        assert OUTPUT_LIMIT // 2 < size <= OUTPUT_LIMIT


async def test_background_processes_do_not_outlive_the_script(
    executor: LocalExecutor, state: Path
) -> None:
    script = "setsid sleep 300 & (sleep 301 & disown) ; nohup sleep 302 & echo over; exit 4"
    await executor.submit(make(state, "left", script))
    end = await ended(executor, "left")
    assert (end.code, end.reason) == (4, "exited")
    assert alive_in(state) == []


# -- cancel


def sleep_durations(count: int) -> list[str]:
    """Unique durations of `sleep`, by which a test recognises its own processes."""
    return [f"{random.randrange(10**5, 10**6)}.{random.randrange(10**6)}" for _ in range(count)]


def sleeping(durations: list[str]) -> list[psutil.Process]:
    result = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = process.cmdline()
            if len(line) == 2 and line[1] in durations and process.status() != "zombie":
                result.append(process)
    return result


@contextlib.contextmanager
def killed_at_exit(durations: list[str]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in sleeping(durations):
            process.kill()


RUNAWAY = """
    trap '' TERM HUP INT
    sleep {} &
    setsid bash -c "trap '' TERM; sleep {} & setsid sleep {} & wait" &
    (setsid env -i /bin/bash -c 'exec -a hidden sleep {}' &)
    echo up
    while :; do sleep 1; done
"""


async def test_cancel_ends_descendants_in_other_sessions(
    executor: LocalExecutor, state: Path
) -> None:
    durations = sleep_durations(4)
    with killed_at_exit(durations):
        await executor.submit(make(state, "run", RUNAWAY.format(*durations)))
        await until(lambda: len(sleeping(durations)) == 4)
        start = time.monotonic()
        await executor.cancel("run")
        assert sleeping(durations) == []
        assert time.monotonic() - start < 60
    assert alive_in(state) == []
    end = await ended(executor, "run")
    assert (end.reason, end.code) == ("cancelled", 137)
    await executor.cancel("run")
    assert await ended(executor, "run") == end


async def test_cancel_of_unknown_and_of_never_started_runs(
    executor: LocalExecutor, state: Path
) -> None:
    await executor.cancel("never-heard-of")
    # The daemon died between making the folder and starting the supervisor.
    make_run(state / "runs", make(state, "early", "echo ran"))
    assert (await executor.poll(["early"]))["early"].state is RunState.QUEUED
    assert await executor.find("early") is None
    assert await executor.keys() == ["early"]
    assert (await executor.capacity()).cpus == OFFER.cpus - 1
    await executor.cancel("early")
    end = await ended(executor, "early")
    assert (end.reason, end.seconds) == ("cancelled", 0)
    assert await executor.submit(make(state, "early", "echo ran")) == "early"
    assert await ended(LocalExecutor(state, OFFER), "early") == end
    assert await executor.output("early") == b""


async def test_supervisor_ends_its_run_when_it_is_terminated(
    executor: LocalExecutor, state: Path
) -> None:
    await executor.submit(make(state, "run", "echo up; sleep 300"))
    await printed(executor, "run", b"up")
    os.kill(owner_pid(state, "run"), signal.SIGTERM)
    assert (await ended(executor, "run")).reason == "cancelled"
    assert alive_in(state) == []


# -- at most once


async def test_a_key_runs_once_however_often_it_is_submitted(
    executor: LocalExecutor, state: Path, tmp_path: Path
) -> None:
    script = f"echo x >> {tmp_path}/count; sleep 0.3; echo ran"
    others = [LocalExecutor(state, OFFER) for _ in range(3)]
    spec = make(state, "once", script)
    handles = await asyncio.gather(
        *(submitter.submit(spec) for submitter in [executor, *others] for _ in "12")
    )
    assert set(handles) == {"once"}
    assert await executor.find("once") == "once"
    await ended(executor, "once")
    await executor.submit(spec)
    await others[0].submit(make(state, "once", "echo another script"))
    assert (tmp_path / "count").read_text() == "x\n"
    assert await executor.output("once") == b"ran\n"
    assert await executor.keys() == ["once"]


async def test_submit_continues_a_run_whose_supervisor_was_never_started(
    executor: LocalExecutor, state: Path
) -> None:
    spec = make(state, "early", "echo ran")
    make_run(state / "runs", spec)
    later = LocalExecutor(state, OFFER)
    assert await later.submit(spec) == "early"
    assert (await ended(later, "early")).code == 0
    assert await later.output("early") == b"ran\n"


DAEMON = """
import asyncio, sys
from pathlib import Path
from deepsquare_chain.executors.base import RunSpec
from deepsquare_chain.executors.launch import make_run
from deepsquare_chain.executors.local import LocalExecutor
from deepsquare_chain.job import Offer, Resources

async def main():
    executor = LocalExecutor(Path(sys.argv[1]), Offer(4, 4096, 0))
    script = b"echo begin; sleep 1.5; echo end"
    env = {"GRID_EXECUTOR_TEST": sys.argv[1]}
    await executor.submit(RunSpec("job", script, Resources(1, 1, 64, 0), 60, env))
    await executor.submit(RunSpec("orphan", b"sleep 300", Resources(1, 1, 64, 0), 60, env))
    print("submitted", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_runs_survive_the_daemon_and_are_adopted(
    executor: LocalExecutor, state: Path
) -> None:
    daemon = start(
        [sys.executable, "-c", DAEMON, str(state)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert daemon.stdout is not None
    assert await asyncio.to_thread(daemon.stdout.readline) == b"submitted\n"
    daemon.send_signal(signal.SIGKILL)
    daemon.wait()
    daemon.stdout.close()
    assert await executor.find("job") == "job"
    statuses = await executor.poll(["job", "orphan"])
    assert {status.state for status in statuses.values()} == {RunState.RUNNING}
    assert await executor.submit(make(state, "job", "echo again")) == "job"
    assert await executor.capacity() == Offer(OFFER.cpus - 2, OFFER.memory - 128, OFFER.gpus)
    await executor.cancel("orphan")  # whose parent the executor is not
    assert (await ended(executor, "orphan")).reason == "cancelled"
    end = await ended(executor, "job")
    assert (end.code, end.reason, end.seconds) == (0, "exited", 2)
    assert await executor.output("job") == b"begin\nend\n"


# -- a supervisor that dies, hangs, or is mistaken for another


async def test_killed_supervisor_is_lost_and_leaves_nothing_behind(
    executor: LocalExecutor, state: Path
) -> None:
    durations = sleep_durations(3)
    script = "setsid sleep {} & sleep {} & sleep {}".format(*durations)
    with killed_at_exit(durations):
        await executor.submit(make(state, "run", script))
        await until(lambda: len(sleeping(durations)) == 3)
        os.kill(owner_pid(state, "run"), signal.SIGKILL)
        end = await ended(executor, "run")
        assert sleeping(durations) == []
    assert (end.reason, end.code) == ("lost", 137)
    assert end.seconds <= 5
    assert alive_in(state) == []
    assert await ended(LocalExecutor(state, OFFER), "run") == end
    assert await executor.capacity() == OFFER


async def test_the_end_of_a_run_is_reported_after_its_supervisor_is_gone(
    executor: LocalExecutor, state: Path
) -> None:
    await executor.submit(make(state, "run", "exit 5"))
    await until((state / "runs/run/exit.json").exists)
    with contextlib.suppress(ProcessLookupError):
        os.kill(owner_pid(state, "run"), signal.SIGKILL)
    end = await ended(LocalExecutor(state, OFFER), "run")
    assert (end.reason, end.code) == ("exited", 5)


async def test_reused_pid_is_not_mistaken_for_the_supervisor(
    executor: LocalExecutor, state: Path
) -> None:
    await executor.submit(make(state, "run", "echo up; sleep 300"))
    await printed(executor, "run", b"up")
    os.kill(owner_pid(state, "run"), signal.SIGKILL)
    await asyncio.sleep(0.05)  # start times of processes have a resolution of 10 ms
    innocent = start(["sleep", "300"], start_new_session=True)
    try:
        # Both recorded PIDs now belong to other processes.
        for name in ("supervisor.json", "job.json"):
            path = state / "runs/run" / name
            path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": innocent.pid}))
        end = await ended(LocalExecutor(state, OFFER), "run")
        assert end.reason == "lost"
        assert innocent.poll() is None
        assert alive_in(state) == []
    finally:
        innocent.kill()
        innocent.wait()


async def test_a_record_of_another_boot_counts_as_ended(
    executor: LocalExecutor, state: Path
) -> None:
    await executor.submit(make(state, "run", "true"))
    await ended(executor, "run")
    folder = state / "runs/run"
    (folder / "exit.json").unlink()
    record = json.loads((folder / "supervisor.json").read_text())
    record |= {"pid": os.getpid(), "boot": "another"}
    (folder / "supervisor.json").write_text(json.dumps(record))
    with capture_logs() as logs:
        for _ in range(2):  # the second start of the daemon logs nothing
            assert (await ended(LocalExecutor(state, OFFER), "run")).reason == "lost"
    assert [entry["event"] for entry in logs] == ["supervisor lost"]


async def test_run_that_stops_its_supervisor_gains_nothing(
    executor: LocalExecutor, state: Path
) -> None:
    await executor.submit(make(state, "run", "kill -STOP $PPID; sleep 300", walltime=1))
    end = await ended(executor, "run")
    assert (end.reason, end.seconds) == ("walltime", 2)
    assert alive_in(state) == []


def never_continue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a job that stops its supervisor again and again."""
    send = procfs.send

    def others(identity: procfs.Identity, number: int) -> None:
        if number != signal.SIGCONT:
            send(identity, number)

    monkeypatch.setattr(procfs, "send", others)


async def test_walltime_is_enforced_if_the_supervisor_hangs(
    executor: LocalExecutor, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never_continue(monkeypatch)
    monkeypatch.setattr(local, "HUNG", -1.5)
    durations = sleep_durations(2)
    script = "setsid env -i sleep {} & kill -STOP $PPID; sleep {}".format(*durations)
    with killed_at_exit(durations):
        await executor.submit(make(state, "run", script, walltime=1))
        end = await ended(executor, "run")
        assert sleeping(durations) == []
    assert end.reason == "walltime"
    assert end.code != 0
    assert alive_in(state) == []


async def test_cancel_does_without_a_supervisor_that_hangs(
    executor: LocalExecutor, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never_continue(monkeypatch)
    monkeypatch.setattr("deepsquare_chain.executors.local.HUNG", -1.5)
    await executor.submit(make(state, "run", "kill -STOP $PPID; sleep 300"))
    await executor.cancel("run")
    assert (await ended(executor, "run")).reason == "cancelled"
    assert alive_in(state) == []


# -- hostile content


async def test_runs_have_a_lower_priority_than_the_daemon(
    executor: LocalExecutor, state: Path
) -> None:
    await executor.submit(make(state, "1", "sleep 60"))
    behind = os.getpriority(os.PRIO_PROCESS, owner_pid(state, "1"))
    assert behind == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 5)
    await executor.cancel("1")


async def test_environment_of_the_daemon_does_not_leak(
    executor: LocalExecutor, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSQUARE_PASSWORD_FILE", "/secret/place")
    monkeypatch.setenv("AWS_SECRET", "leak")
    script = "env -0; tr '\\0' '\\n' < /proc/$PPID/environ; ls -l /proc/$$/fd | grep -o '[^ ]*$'"
    await executor.submit(make(state, "run", script, env={"MINE": "a b\nc", "LANG": "de"}))
    await ended(executor, "run")
    output = (await executor.output("run")).decode()
    assert "secret" not in output.lower()
    assert "DEEPSQUARE_" not in output
    pairs = dict(line.split("=", 1) for line in output.split("\0")[:-1])
    allowed_names = {MARK, "MINE", "LANG", "PATH", "HOME", "PWD", "SHLVL", "_", "GRID_RUN"}
    assert set(pairs) == allowed_names | set(device_environment([]))
    assert (pairs["MINE"], pairs["LANG"]) == ("a b\nc", "de")
    assert pairs["HOME"] == pairs["PWD"] == str(state / "runs/run/work")


async def test_hostile_specifications_are_refused_or_harmless(
    executor: LocalExecutor, state: Path
) -> None:
    for key in ("", ".", "..", "../up", "a/b", ".hidden", "a b", "a\0b", "a\n", "k" * 121, "-x"):
        with pytest.raises(RunRefusedError):
            await executor.submit(make(state, key, "true"))
        with pytest.raises(RunRefusedError):
            await executor.cancel(key)
    for env in ({"A=B": "x"}, {"": "x"}, {"A": "x\0y"}, {"A": "\udc80"}, {"A": "x" * 140_000}):
        with pytest.raises(RunRefusedError):
            await executor.submit(make(state, "env", "true", env=env))
    hostile = "$(touch pwned) `touch pwned` '; touch pwned; \" %s \\ \x1b[31m ../../ 🙂"
    await executor.submit(make(state, "words", 'printf %s "$NASTY"; ls', env={"NASTY": hostile}))
    await executor.submit(make(state, "bytes", b"\x00\xff\xfe echo \x00 ran"))
    await executor.submit(make(state, "empty", b""))
    assert (await ended(executor, "words")).code == 0
    assert (await executor.output("words")).decode() == hostile
    assert (await ended(executor, "bytes")).code in (126, 127, 2)
    assert (await ended(executor, "empty")).code == 0


@pytest.mark.parametrize(
    "control",
    ["nonsense", json.dumps({"walltime": 10**400, "cancel": False})],
    ids=["no record", "a number too large for a float"],
)
async def test_forged_records_do_not_end_a_run(
    executor: LocalExecutor, state: Path, control: str
) -> None:
    script = f"""
        echo '{{"code":0,"reason":"exited","seconds":1,"started_at":1,"ended_at":2}}' > ../exit.json
        echo '{control}' > ../control.json
        echo up
        sleep 1.2
        exit 9
    """
    await executor.submit(make(state, "run", script))
    await printed(executor, "run", b"up")
    assert (await executor.poll(["run"]))["run"].state is RunState.RUNNING
    end = await ended(executor, "run")
    assert (end.code, end.seconds) == (9, 2)


async def test_output_that_became_a_link_is_not_followed(
    executor: LocalExecutor, state: Path, tmp_path: Path
) -> None:
    (tmp_path / "keystore").write_text("the key")
    await executor.submit(make(state, "run", f"ln -sf {tmp_path}/keystore ../output"))
    await ended(executor, "run")
    with pytest.raises(ExecutorUnavailableError):
        await executor.output("run")


# The supervisor may still be writing into the folder while the first attempt removes it.
REMOVER = 'until rm -rf "${HOME%/work}"; do :; done; sleep 300'


async def test_run_that_removes_its_own_folder_can_be_cancelled(
    executor: LocalExecutor, state: Path
) -> None:
    await executor.submit(make(state, "run", REMOVER))
    await until(lambda: not (state / "runs/run").exists())
    assert (await executor.poll(["run"]))["run"].state is RunState.UNKNOWN
    await executor.cancel("run")
    assert alive_in(state) == []


@pytest.mark.parametrize("name", ['"${HOME%/work}"', '"${HOME%/work}/supervisor.json"'])
async def test_run_that_removes_its_claim_is_never_begun_again(
    executor: LocalExecutor, state: Path, name: str
) -> None:
    """The run began, even if its records were removed: another submit of its key changes nothing."""
    mark = state.parent / "began"
    spec = make(state, "run", f"echo x >> {mark}; until rm -rf {name}; do :; done; sleep 300")
    for _ in range(2):
        await executor.submit(spec)
        await until(lambda: not (state / "runs/run/supervisor.json").exists())
    assert mark.read_text() == "x\n"
    assert len([item for item in alive_in(state) if "supervisor" in " ".join(item.cmdline())]) == 1


async def test_run_that_removes_its_folder_and_ends_was_begun(
    executor: LocalExecutor, state: Path
) -> None:
    mark = state.parent / "began"
    remover = 'until rm -rf "${HOME%/work}"; do :; done'
    await executor.submit(make(state, "run", f"echo x >> {mark}; {remover}"))
    await until(lambda: alive_in(state) == [])
    assert (await executor.poll(["run"]))["run"].state is RunState.UNKNOWN
    assert mark.read_text() == "x\n"


async def test_input_is_empty_and_the_folder_is_private(
    executor: LocalExecutor, state: Path
) -> None:
    await executor.submit(make(state, "run", "cat; echo data > file; stat -c %a . file ../output"))
    assert (await ended(executor, "run")).code == 0
    assert await executor.output("run") == b"700\n600\n600\n"


# -- the machine's own trouble


async def test_full_disk_at_submit_leaves_no_half_run(
    executor: LocalExecutor, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("write_all", "sync_folder"):
        with monkeypatch.context() as patch:
            patch.setattr(rundir, name, full)
            with pytest.raises(ExecutorUnavailableError, match="No space left") as error_info:
                await executor.submit(make(state, "run", "echo ran"))
            assert error_info.value.hint
        assert list((state / "runs").iterdir()) == []
    assert await executor.submit(make(state, "run", "echo ran")) == "run"
    assert (await ended(executor, "run")).code == 0


async def test_supervisor_that_can_not_start_leaves_no_half_run(
    executor: LocalExecutor, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(orphaned_processes, "SUPERVISOR_MODULE", "deepsquare_chain.executors.nothing")
        with pytest.raises(ExecutorUnavailableError, match=r"could not be started.*nothing"):
            await executor.submit(make(state, "run", "echo ran"))
    assert list((state / "runs").iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/no/such/python")
        with pytest.raises(ExecutorUnavailableError):
            await executor.submit(make(state, "run", "echo ran"))
    assert await executor.submit(make(state, "run", "echo ran")) == "run"
    assert (await ended(executor, "run")).code == 0


async def test_unknown_is_not_gone(
    executor: LocalExecutor, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await executor.submit(make(state, "run", "sleep 0.5"))

    def unreadable(_: RunFolder) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "taken", unreadable)
        patch.setattr(RunFolder, "spec", unreadable)
        assert (await executor.poll(["run"]))["run"].state is RunState.UNKNOWN
        assert (await executor.capacity()) == Offer(0, 0, 0)
        with pytest.raises(ExecutorUnavailableError):
            await executor.find("run")
    assert (await executor.poll(["away"]))["away"].state is RunState.UNKNOWN
    assert await executor.find("away") is None
    assert (await ended(executor, "run")).code == 0
    (state / "runs").rename(state / "unmounted")
    for question in (executor.find("run"), executor.find("new"), executor.keys()):
        with pytest.raises(ExecutorUnavailableError):
            await question
    (state / "unmounted").rename(state / "runs")


async def test_capacity_is_the_offer_minus_live_runs(executor: LocalExecutor, state: Path) -> None:
    assert await executor.capacity() == OFFER
    resources = Resources(tasks=2, cpus_per_task=2, mem_per_cpu=100, gpus=1)
    await executor.submit(make(state, "run", "sleep 300", resources=resources))
    assert await executor.capacity() == Offer(cpus=4, memory=8192 - 400, gpus=0)
    executor.offer = Offer(cpus=2, memory=8192, gpus=1)
    assert (await executor.capacity()).cpus == 0
    await executor.cancel("run")
    assert await executor.capacity() == executor.offer
    assert await LocalExecutor(state, OFFER, min_free=10**12).capacity() == Offer(0, 0, 0)


async def test_forget_removes_ended_runs_only(executor: LocalExecutor, state: Path) -> None:
    await executor.submit(make(state, "run", "mkdir -p a/b; chmod 0 a/b a; echo up; sleep 300"))
    await printed(executor, "run", b"up")
    with pytest.raises(ExecutorError):
        await executor.forget("run")
    await executor.cancel("run")
    assert await executor.keys() == ["run"]
    await executor.forget("run")
    await executor.forget("run")
    assert await executor.keys() == []
    assert await executor.find("run") is None
    assert list((state / "runs").iterdir()) == []
    with pytest.raises(NotFoundError):
        await executor.output("run")


async def test_stale_remains_are_swept_away(state: Path) -> None:
    folder = state / "runs"
    for name in (".new-old", ".new-young", ".gone-1", "kept"):
        (folder / name / "work").mkdir(parents=True)
    os.utime(folder / ".new-old", (1, 1))
    LocalExecutor(state, OFFER)
    assert sorted(path.name for path in folder.iterdir()) == [".new-young", "kept"]


async def test_nothing_is_leaked_by_many_runs(executor: LocalExecutor, state: Path) -> None:
    await executor.submit(make(state, "warm", "true"))
    await ended(executor, "warm")
    me = psutil.Process()
    before, children = me.num_fds(), {child.pid for child in me.children()}
    keys = [f"run-{number}" for number in range(12)]
    await asyncio.gather(*(executor.submit(make(state, key, "echo $$")) for key in keys))
    for key in keys:
        assert (await ended(executor, key)).code == 0
    await executor.poll(keys)
    assert me.num_fds() <= before
    # Ended supervisors are collected, not left as zombies.
    assert {child.pid for child in me.children()} <= children
    assert executor._runs._children == {}
