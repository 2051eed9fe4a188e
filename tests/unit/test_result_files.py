"""Files of an ended run are untrusted data: no link is followed, nothing is overwritten."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepsquare_chain.errors import UsageError
from deepsquare_chain.provider import outputs
from deepsquare_chain.provider.model import run_key
from deepsquare_chain.provider.outputs import closed_folder, find_run, result_files

pytestmark = pytest.mark.unit


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "1-abc-7"
    (folder / "work" / "deep").mkdir(parents=True)
    (folder / "output").write_bytes(b"printed\n")
    (folder / "work" / "b.txt").write_bytes(b"b")
    (folder / "work" / "deep" / "a.bin").write_bytes(bytes(range(256)) * 10)
    return folder


def test_output_comes_first_and_then_the_files_by_name(run: Path) -> None:
    files = result_files(run)
    assert [(file.name, file.size) for file in files] == [
        ("output", 8),
        ("work/b.txt", 1),
        ("work/deep/a.bin", 2560),
    ]
    assert files[0].digest == hashlib.sha256(b"printed\n").hexdigest()


def test_files_of_the_script_itself_are_no_results(run: Path) -> None:
    before = result_files(run)
    (run / "work/.deepsquare/network").mkdir(parents=True)
    (run / "work/.deepsquare/network/wg0.wireguard").write_text("PrivateKey = x\n")
    assert result_files(run) == before
    (run / "work/deep/.deepsquare").mkdir()
    (run / "work/deep/.deepsquare/mine").write_text("x")
    assert [result_file.name for result_file in result_files(run)][
        -2
    ] == "work/deep/.deepsquare/mine"


def test_copies_are_the_same_bytes_in_a_new_folder(run: Path, tmp_path: Path) -> None:
    to = tmp_path / "new" / "place"
    assert result_files(run, to) == result_files(run)
    assert (to / "output").read_bytes() == b"printed\n"
    assert (to / "work/deep/a.bin").read_bytes() == bytes(range(256)) * 10
    with pytest.raises(UsageError, match="can't be created"):
        result_files(run, to)


def test_links_pipes_and_sockets_are_named_and_not_copied(run: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("private")
    work, to = run / "work", tmp_path / "copy"
    (work / "outside").symlink_to(secret / "key")
    (work / "folder").symlink_to(secret)
    (work / "dangling").symlink_to("nowhere")
    (work / "loop").symlink_to("loop")
    (work / "round").symlink_to(".")
    os.mkfifo(work / "pipe")
    os.mknod(work / "socket", stat.S_IFSOCK | 0o600)
    files = result_files(run, to)
    links = ["work/dangling", "work/folder", "work/loop", "work/outside", "work/round"]
    assert {file.name: file.problem for file in files if file.special} == {
        **dict.fromkeys(links, "a symbolic link, not copied"),
        "work/pipe": "a named pipe, not copied",
        "work/socket": "a socket, not copied",
    }
    copied = [file.name for file in files if not file.special]
    assert copied == ["output", "work/b.txt", "work/deep/a.bin"]
    assert sorted(path.name for path in (to / "work").iterdir()) == ["b.txt", "deep"]


def test_a_working_folder_that_became_a_link_is_not_followed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "key").write_text("private")
    (run / "work").rename(run / "moved")
    (run / "work").symlink_to(tmp_path / "home")
    files = result_files(run, tmp_path / "copy")
    assert [(file.name, file.problem, file.special) for file in files] == [
        ("output", "", False),
        ("work", "a symbolic link, not copied", True),
    ]
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["output"]


def test_folders_of_other_users_hide_no_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several providers below one folder, one of which is closed to this user."""
    root, contract = tmp_path / "state", "0x" + "ab" * 20
    for name in ("closed", "open"):
        (root / name / "runs").mkdir(parents=True)
    closed, stat_of = str(root / "closed"), os.stat
    run_folder = root / "open" / "runs" / run_key(1, contract, 7)
    run.rename(run_folder)

    def refuse(path: Any, *more: Any, **options: Any) -> Any:
        if str(path).startswith(f"{closed}/"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat_of(path, *more, **options)

    def access(path: Any, _: int) -> bool:
        return str(path) != closed

    monkeypatch.setattr(os, "stat", refuse)
    monkeypatch.setattr(os, "access", access)
    assert find_run(root, 1, contract, 7) == run_folder
    assert find_run(root, 1, contract, 8) is None
    assert closed_folder(root) == root / "closed"


def test_an_output_that_became_a_link_is_reported_and_the_rest_copied(
    run: Path, tmp_path: Path
) -> None:
    (run / "output").unlink()
    (run / "output").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("private")
    output, *others = result_files(run, tmp_path / "copy")
    assert (output.name, output.digest) == ("output", "")
    assert output.problem.startswith("can't be read: ")
    assert [other.problem for other in others] == ["", ""]
    assert not (tmp_path / "copy" / "output").exists()


def test_the_output_of_several_files_is_one(run: Path, tmp_path: Path) -> None:
    (run / "output.20").write_bytes(b"end\n")
    text = b"printed\n\n[... 12 bytes left out ...]\nend\n"
    output = result_files(run, tmp_path / "copy")[0]
    assert (output.size, output.digest) == (len(text), hashlib.sha256(text).hexdigest())
    assert (tmp_path / "copy" / "output").read_bytes() == text


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Make the system refuse some names, as for an ordinary user; root may read everything."""
    names: set[str] = set()

    def guard(function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(path: Any, *arguments: Any, **options: Any) -> Any:
            if Path(os.fsdecode(path)).name in names:
                raise PermissionError(errno.EACCES, "Permission denied", os.fsdecode(path))
            return function(path, *arguments, **options)

        return guarded

    monkeypatch.setattr(os, "open", guard(os.open))
    monkeypatch.setattr(os, "scandir", guard(os.scandir))
    return names


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("b.txt", ("work/b.txt", 1)),
        ("deep", ("work/deep", 0)),
        ("a.bin", ("work/deep/a.bin", 2560)),
    ],
)
def test_unreadable_files_are_named_and_affect_no_other(
    run: Path, tmp_path: Path, closed: set[str], name: str, problem: tuple[str, int]
) -> None:
    whole = {result_file.name: result_file for result_file in result_files(run)}
    closed.add(name)
    result = {result_file.name: result_file for result_file in result_files(run, tmp_path / "copy")}
    bad = result.pop(problem[0])
    assert (bad.size, bad.digest) == (problem[1], "")
    assert bad.problem == "can't be read: Permission denied"
    assert result
    assert result.items() <= whole.items()
    for item in result:
        assert (tmp_path / "copy" / item).is_file()


def test_a_full_disk_is_the_copys_problem(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(outputs, "_copy", full)
    output, *others = result_files(run, tmp_path / "copy")
    assert output.problem == ""
    assert {other.problem for other in others} == {"can't be copied: No space left on device"}
    assert [path.name for path in (tmp_path / "copy").rglob("*") if path.is_file()] == ["output"]


@pytest.mark.parametrize(
    "data",
    [{0: b"x" * 5000}, {3 * 2**20: b"middle", 9 * 2**20: b"z" * 9000}, {}, {2**21 - 1: b"e"}],
)
def test_holes_stay_holes(run: Path, tmp_path: Path, data: dict[int, bytes]) -> None:
    path, size = run / "work" / "sparse", 12 * 2**20
    with path.open("wb") as file:
        for at, part in data.items():
            file.seek(at)
            file.write(part)
        file.truncate(size)
    result = {
        result_file.name: result_file for result_file in result_files(run, tmp_path / "copy")
    }["work/sparse"]
    copy = tmp_path / "copy" / "work" / "sparse"
    assert copy.read_bytes() == path.read_bytes()
    assert (result.size, result.digest) == (size, hashlib.sha256(path.read_bytes()).hexdigest())
    assert copy.stat().st_blocks <= path.stat().st_blocks + 16


def test_a_file_of_holes_is_read_quickly(run: Path, tmp_path: Path) -> None:
    with (run / "work" / "vast").open("wb") as file:
        file.truncate(2**40)
    result = {
        result_file.name: result_file for result_file in result_files(run, tmp_path / "copy")
    }["work/vast"]
    assert (result.size, result.digest) == (2**40, "")
    assert "are holes" in result.problem
    assert (tmp_path / "copy" / "work" / "vast").stat().st_size == 2**40


def test_names_that_are_no_text_are_copied(run: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    (run / "work" / name).write_text("x")
    assert f"work/{name}" in [
        result_file.name for result_file in result_files(run, tmp_path / "copy")
    ]
    assert (tmp_path / "copy" / "work" / name).read_text() == "x"


def test_a_run_that_printed_nothing_has_its_files(run: Path) -> None:
    (run / "output").unlink()
    assert [result_file.name for result_file in result_files(run)] == [
        "work/b.txt",
        "work/deep/a.bin",
    ]
