"""What a run left is taken as data: no link is followed, nothing is overwritten."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from deepsquare_chain.errors import UsageError
from deepsquare_chain.provider.outputs import result_files

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
    found = result_files(run)
    assert [(each.name, each.size) for each in found] == [
        ("output", 8),
        ("work/b.txt", 1),
        ("work/deep/a.bin", 2560),
    ]
    assert found[0].digest == hashlib.sha256(b"printed\n").hexdigest()


def test_copies_are_the_same_bytes_in_a_new_folder(run: Path, tmp_path: Path) -> None:
    to = tmp_path / "new" / "place"
    assert result_files(run, to) == result_files(run)
    assert (to / "output").read_bytes() == b"printed\n"
    assert (to / "work/deep/a.bin").read_bytes() == bytes(range(256)) * 10
    with pytest.raises(UsageError, match="can't be made"):
        result_files(run, to)


def test_links_pipes_and_devices_are_passed_over(run: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("private")
    (run / "work" / "link").symlink_to(secret / "key")
    (run / "work" / "linked").symlink_to(secret)
    os.mkfifo(run / "work" / "pipe")
    to = tmp_path / "copy"
    names = [each.name for each in result_files(run, to)]
    assert names == ["output", "work/b.txt", "work/deep/a.bin"]
    assert not list(to.rglob("key"))
    assert not (to / "work" / "link").exists()


def test_an_output_that_became_a_link_is_refused(run: Path, tmp_path: Path) -> None:
    (run / "output").unlink()
    (run / "output").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("private")
    with pytest.raises(Exception, match="output of 1-abc-7 can't be copied"):
        result_files(run)


def test_a_run_that_printed_nothing_has_its_files(run: Path) -> None:
    (run / "output").unlink()
    assert [each.name for each in result_files(run)] == ["work/b.txt", "work/deep/a.bin"]
