"""Parts of the local executor that need no job: output bound, records, processes, checks."""

from __future__ import annotations

import asyncio
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepsquare_chain.executors import local, orphaned_processes, procfs, rundir
from deepsquare_chain.executors.base import (
    MAX_SCRIPT_BYTES,
    MAX_WALLTIME,
    ExecutorUnavailableError,
    RunRefusedError,
    RunSpec,
    check_key,
    check_spec,
)
from deepsquare_chain.executors.launch import make_run
from deepsquare_chain.executors.local import LocalExecutor
from deepsquare_chain.executors.procfs import Identity, Process
from deepsquare_chain.executors.rundir import (
    FolderClaim,
    OutputWriter,
    RunFolder,
    exit_record,
    read_kept,
    read_output,
)
from deepsquare_chain.job import Offer, Resources


def spec(**changes: object) -> RunSpec:
    fields: dict[str, object] = {
        "key": "31337-5fbdb231-42",
        "script": b"true",
        "resources": Resources(1, 1, 1, 0),
        "walltime": 1,
        "env": {},
    }
    return RunSpec(**(fields | changes))  # type: ignore[arg-type]


# -- what is refused


@pytest.mark.parametrize(
    "changes",
    [
        {"key": "../x"},
        {"key": "a" * 121},
        {"resources": Resources(0, 1, 1, 0)},
        {"resources": Resources(1, 0, 1, 0)},
        {"resources": Resources(1, 1, 0, 0)},
        {"resources": Resources(1, 1, 1, -1)},
        {"walltime": 0},
        {"walltime": MAX_WALLTIME + 1},
        {"script": b"x" * (MAX_SCRIPT_BYTES + 1)},
        {"env": {"1A": "x"}},
        {"env": {"A-B": "x"}},
        {"env": {"LD_PRELOAD": "/tmp/x.so"}},
        {"env": {"BASH_ENV": "/tmp/x"}},
        {"env": {"PATH": "/tmp"}},
        {"env": {"A": "\0"}},
        {"env": {"A": "\ud800"}},
        {"env": {"A": "x" * 131_072}},
        {"env": {f"A{number}": "x" * 100_000 for number in range(11)}},
    ],
)
def test_specification_that_can_not_run_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(RunRefusedError):
        check_spec(spec(**changes))


def test_plain_specification_is_taken() -> None:
    check_spec(spec())
    check_spec(spec(env={"_A1": "anything = goes\n$HOME", "MY_PATH": "x"}, walltime=MAX_WALLTIME))


@given(st.text(max_size=130))
def test_key_is_always_one_plain_name(key: str) -> None:
    try:
        check_key(key)
    except RunRefusedError:
        return
    path = Path("/base", key)
    assert path.parent == Path("/base")
    assert path.name == key
    assert not key.startswith(".")


# -- output


def kept(tmp_path: Path, limit: int, pieces: list[bytes]) -> bytes:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    writer = OutputWriter(folder / "output", limit)
    for piece in pieces:
        writer.take(piece)
        assert sum(file.stat().st_size for file in folder.iterdir()) <= limit
    writer.close()
    return read_kept(folder / "output", 0, 10**6)


def follow(path: Path, position: int = 0) -> tuple[bytes, int]:
    """Read everything from an offset on, as a follower of the log does."""
    result = b""
    while (part := read_output(path, position, 100)).data:
        result += part.data
        position = part.position
    return result, position


@given(pieces=st.lists(st.binary(max_size=400), max_size=20), limit=st.integers(200, 2000))
def test_output_is_whole_or_has_both_ends(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes], limit: int
) -> None:
    whole_output = b"".join(pieces)
    result = kept(tmp_path_factory.getbasetemp(), limit, pieces)
    assert len(result) <= limit
    if result == whole_output:
        return
    assert len(whole_output) > limit - 80 - limit // 8
    assert result[: limit // 2] == whole_output[: limit // 2]
    head, _, after_gap = result[limit // 2 :].partition(b"[... ")
    note, _, tail = after_gap.partition(b" bytes left out ...]\n")
    assert head == b"\n"
    assert whole_output.endswith(tail)
    assert int(note) + limit // 2 + len(tail) == len(whole_output)


def test_output_flows_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "output"
    writer, position, followed = OutputWriter(path, 1000), 0, b""
    lines = [f"line {number}\n".encode() for number in range(1_000)]
    for line in lines:
        writer.take(line)
        part, position = follow(path, position)
        assert part == line  # at once, also long after the beginning is full
        followed += part
    assert followed == b"".join(lines)
    assert len(list(tmp_path.iterdir())) <= 5


def test_a_slow_reader_gets_a_note_about_skipped_output(tmp_path: Path) -> None:
    path = tmp_path / "output"
    writer = OutputWriter(path, 1000)
    writer.take(b"a" * 300)
    _, position = follow(path)
    writer.take(b"b" * 5_000 + b"end\n")
    text, position = follow(path, position)
    assert text.startswith(b"b" * 200 + b"\n[... ")
    assert text.endswith(b"bbend\n")
    assert position == 5_304
    assert follow(path, position) == (b"", position)


def test_a_writer_that_is_killed_leaves_the_end(tmp_path: Path) -> None:
    path = tmp_path / "output"
    OutputWriter(path, 1000).take(b"a" * 10_000 + b"last words")  # and is never closed
    assert read_kept(path, 0, 10_000).endswith(b"last words")


def test_a_full_disk_only_loses_output() -> None:
    writer = OutputWriter(Path("/dev/full"), 1000)
    writer.take(b"x" * 5000)
    writer.take(b"y")
    writer.close()


def test_output_lost_by_a_full_disk_is_marked_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "output"
    writer = OutputWriter(path, 1000)
    writer.take(b"one ")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        writer.take(b"two ")
    writer.take(b"three")
    writer.close()
    assert read_kept(path, 0, 1000) == b"one \n[... 4 bytes left out ...]\nthree"


def test_files_that_a_job_puts_next_to_its_output_are_not_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "output"
    OutputWriter(path, 1000).take(b"text")
    (tmp_path / "secret").write_text("private")
    (tmp_path / "output.4").symlink_to(tmp_path / "secret")
    for name in ("output.-1", "output.x", "output.1", "outputs"):
        (tmp_path / name).write_text("no")
    with pytest.raises(OSError, match="symbolic"):
        read_kept(path, 0, 1000)
    (tmp_path / "output.4").unlink()
    assert read_kept(path, 0, 1000) == b"text"


# -- records


def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.fill({"walltime": 5}, b"script", 5)
    return run


def test_run_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        with pytest.raises(OSError, match="No space"):
            make_run(tmp_path, spec())
    assert list(tmp_path.iterdir()) == []
    run = make_run(tmp_path, spec())
    second_run = make_run(tmp_path, spec(script=b"another"))
    assert second_run.path == run.path
    assert run.script.read_bytes() == b"true"
    assert len(list(tmp_path.iterdir())) == 1


def test_run_is_taken_once_and_for_ever(tmp_path: Path) -> None:
    run = folder(tmp_path)
    assert run.taken() is None
    me = procfs.identify(os.getpid())
    assert run.claim(me, "token")
    assert not run.claim(Identity(1, 2, "other"), "other")
    claim = run.taken()
    assert claim is not None
    assert claim[:2] == (me, "token")
    assert claim.since <= time.monotonic()
    assert [path.name for path in run.path.iterdir() if path.name.startswith(".")] == []


def test_control_changes_keep_each_other(tmp_path: Path) -> None:
    run = folder(tmp_path)
    run.set_control(cancel=True)
    run.set_control(walltime=9)
    assert run.control() == {"walltime": 9, "cancel": True}


def test_exit_record_uses_the_blocks_laid_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folder(tmp_path)
    reserved = run.reserve_exit()
    assert run.exit() is None
    inode = reserved.stat().st_ino
    record = exit_record(3, "exited", 7, 1.5, 8.25)

    def no_new_file(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(rundir, "write_new", no_new_file)
    run.set_exit(record, reserved)
    assert run.exit() == record
    assert (run.path / "exit.json").stat().st_ino == inode


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"1", b'"x"', b"\xff", b"[" * 100_000, b'{"a":' * 99_999]
)
def test_damaged_records_are_errors_and_never_absent(tmp_path: Path, content: bytes) -> None:
    run = folder(tmp_path)
    for name in ("exit.json", "supervisor.json", "job.json"):
        (run.path / name).write_bytes(content)
    for read in (run.exit, run.taken, run.job):
        with pytest.raises(OSError):  # noqa: PT011 - any error of the system will do
            read()


@pytest.mark.parametrize(
    "record",
    [
        {"since": 1},
        {"since": 1, "pid": "x"},
        {"since": 1, "pid": 1, "ticks": None, "boot": ""},
        {"since": 1, "pid": math.inf, "ticks": 1, "boot": ""},
    ],
    ids=["missing", "text", "null", "infinite"],
)
def test_records_without_a_process_are_errors(tmp_path: Path, record: dict[str, object]) -> None:
    run = folder(tmp_path)
    (run.path / "supervisor.json").write_text(json.dumps(record))
    with pytest.raises(OSError, match="names no process"):
        run.taken()


@pytest.mark.parametrize(
    "since",
    [{}, {"since": "x"}, {"since": 10**400}, {"since": math.inf}, {"since": math.nan}],
    ids=["missing", "text", "large", "infinite", "not a number"],
)
def test_records_without_a_finite_time_are_errors(tmp_path: Path, since: dict[str, Any]) -> None:
    run = folder(tmp_path)
    record = {"pid": 1, "ticks": 1, "boot": "", **since}
    (run.path / "supervisor.json").write_text(json.dumps(record))
    with pytest.raises(OSError, match="since"):
        run.taken()


def test_a_walltime_that_is_not_a_finite_number_is_ignored(tmp_path: Path) -> None:
    run = folder(tmp_path)
    claim = FolderClaim(Identity(1, 1, ""), "", since=0.0)
    (run.path / "control.json").write_text(json.dumps({"walltime": 10**400}))
    assert not local._is_overdue(run, claim)
    (run.path / "control.json").write_text(json.dumps({"walltime": -(10**9)}))
    assert local._is_overdue(run, claim)


def test_only_plain_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("secret")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(OSError):  # noqa: PT011
            rundir.read_bytes(tmp_path / name, 0, 10)


def test_replace_leaves_the_old_record_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folder(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rundir, "write_all", full)
    with pytest.raises(OSError, match="No space"):
        run.set_control(walltime=9)
    assert run.control()["walltime"] == 5
    assert len(list(run.path.iterdir())) == 4


# -- processes


def test_identity_is_more_than_a_pid() -> None:
    me = procfs.identify(os.getpid())
    result = procfs.find(me)
    assert result is not None
    assert result.parent == os.getppid()
    assert procfs.find(me._replace(ticks=me.ticks + 1)) is None
    assert procfs.find(me._replace(boot="another")) is None
    assert procfs.find(me._replace(pid=0)) is None
    with pytest.raises(ProcessLookupError):
        procfs.identify(2**22 + 1)


def test_signal_reaches_only_that_very_process() -> None:
    me = procfs.identify(os.getpid())
    procfs.send(me._replace(ticks=me.ticks + 1), 9)
    procfs.send(me._replace(boot="another"), 9)
    procfs.send(Identity(2**22 + 1, 1, me.boot), 9)


def test_stat_survives_hostile_process_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "7").mkdir()
    name = b"evil) R 1 1 1 (\n"
    fields = b" ".join(str(number).encode() for number in range(4, 53))
    (tmp_path / "7" / "stat").write_bytes(b"7 (" + name + b") S " + fields)
    monkeypatch.setattr(procfs, "PROC", str(tmp_path))
    assert procfs.read_process(7) == Process(pid=7, state="S", parent=4, session=6, ticks=22)
    assert procfs.everything() == [Process(7, "S", 4, 6, 22)]
    assert procfs.read_process(8) is None


def test_descendants_by_scan_and_by_lists_of_children() -> None:
    tree = [
        Process(pid, "S", parent, 1, 1)
        for pid, parent in [(2, 1), (3, 2), (4, 3), (5, 1), (6, 9), (9, 1)]
    ]
    assert set(procfs.descendants_in(tree, {2})) == {3, 4}
    assert set(procfs.descendants_in(tree, {3, 9})) == {4, 6}
    assert procfs.descendants_in(tree, {4}) == []
    assert os.getpid() in procfs.descendants(os.getppid())
    assert os.getpid() in procfs.descendants_in(procfs.everything(), {os.getppid()})


def test_descendants_where_the_kernel_lists_no_children(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_listed(_: int) -> list[int]:
        raise FileNotFoundError

    monkeypatch.setattr(procfs, "_descendants_by_children", none_listed)
    assert os.getpid() in procfs.descendants(os.getppid())


def test_memory_of_processes_is_summed() -> None:
    own_memory = procfs.resident([os.getpid()])
    assert own_memory > 10 * 2**20
    assert procfs.resident([os.getpid(), os.getpid()]) >= 2 * own_memory * 0.9
    assert procfs.resident([2**22 + 1]) == 0


def test_the_own_process_group_is_never_signalled(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []
    pids: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda group, _: groups.append(group))
    monkeypatch.setattr(os, "kill", lambda pid, _: pids.append(pid))
    monkeypatch.setattr(os, "getpgid", lambda pid: {10: os.getpgrp(), 11: 11, 12: 11}[pid])
    procfs.signal_trees([10, 11, 12], 15)
    assert groups == [11]
    assert pids == [10, 11, 12]


def test_time_of_a_lost_run_ends_with_its_last_sign_of_life(tmp_path: Path) -> None:
    run = folder(tmp_path)
    run.set_job(procfs.identify(os.getpid()), 1_000.0, 5.0)
    run.output.write_bytes(b"x")
    for path in (run.output, run.work):
        os.utime(path, (1_060.5, 1_060.5))
    exit_record = orphaned_processes._lost(run)
    assert (exit_record["reason"], exit_record["seconds"], exit_record["started_at"]) == (
        "lost",
        61,
        1_000.0,
    )
    # A job may date its files into the future, which is no sign of life.
    os.utime(run.output, (10**11, 10**11))
    assert orphaned_processes._lost(run)["ended_at"] < 10**10
    (run.path / "job.json").write_text("spoilt")
    assert orphaned_processes._lost(run)["code"] == 137


def test_processes_that_can_not_be_killed_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orphaned_processes, "EXIT_TIMEOUT", -1.0)
    monkeypatch.setattr(procfs, "signal_trees", lambda *_: None)
    with pytest.raises(orphaned_processes.UnkillableError):
        orphaned_processes._kill_until_gone(lambda: {1})


def test_state_folder_that_can_not_be_made_is_a_plain_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExecutorUnavailableError, match="Not a directory") as error_info:
        LocalExecutor(tmp_path / "file", Offer(1, 1, 0))
    assert error_info.value.hint


async def test_a_start_is_detected_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait for a supervisor sleeps until the supervisor writes; it does not poll."""
    results: list[bool] = []
    read, write = os.pipe()

    class SlowRun:
        def begin(self, _spec: RunSpec, _gpus: object) -> bool:
            return False

        def report_pipe(self, _key: str) -> int:
            return read

        def taken(self, _key: str) -> bool:
            results.append(bool(os.read(read, 1)))
            return True

    executor = LocalExecutor(tmp_path, Offer(1, 1, 0))
    monkeypatch.setattr(executor, "_runs", SlowRun())
    starting = asyncio.create_task(executor.submit(spec()))
    await asyncio.sleep(0.1)
    assert results == []
    os.write(write, b"t")
    assert await starting == spec().key
    assert results == [True]
    os.close(read)
    os.close(write)
