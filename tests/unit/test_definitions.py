"""The folder of definitions: complete files, verified digests, clear errors."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from deepsquare_chain.errors import GridError, JobFileError, NotFoundError
from deepsquare_chain.store.definitions import (
    DefinitionMismatch,
    DefinitionStore,
    FolderDefinitionStore,
)
from deepsquare_chain.workflow import digest

DATA = b'{"version":1}'


@pytest.fixture
def store(tmp_path: Path) -> FolderDefinitionStore:
    return FolderDefinitionStore(tmp_path / "deep" / "definitions")


def file_of(store: FolderDefinitionStore, data: bytes = DATA) -> Path:
    return store.path / f"{digest(data).hex()}.json"


async def test_stored_definitions_are_returned(store: DefinitionStore) -> None:
    key = await store.put(DATA)
    assert key == digest(DATA)
    assert await store.get(key) == DATA


async def test_a_definition_is_stored_under_its_digest_and_nothing_else_remains(
    store: FolderDefinitionStore,
) -> None:
    await store.put(DATA)
    await store.put(DATA)
    assert [path.name for path in store.path.iterdir()] == [f"{digest(DATA).hex()}.json"]
    assert file_of(store).read_bytes() == DATA


async def test_another_program_finds_it(store: FolderDefinitionStore) -> None:
    key = await store.put(DATA)
    assert await FolderDefinitionStore(str(store.path)).get(key) == DATA


async def test_a_missing_definition(store: FolderDefinitionStore) -> None:
    with pytest.raises(NotFoundError, match=digest(DATA).hex()):
        await store.get(digest(DATA))


@pytest.mark.parametrize("key", [b"", b"x" * 31, b"../../etc/passwd"])
async def test_invalid_digests_are_not_found(store: FolderDefinitionStore, key: bytes) -> None:
    with pytest.raises(NotFoundError, match="32 bytes"):
        await store.get(key)


@pytest.mark.parametrize("stored", [b"", DATA[:-1], DATA + b"\n", b"x" * 2_000_000])
async def test_other_bytes_are_never_returned(store: FolderDefinitionStore, stored: bytes) -> None:
    key = await store.put(DATA)
    file_of(store).write_bytes(stored)
    with pytest.raises(DefinitionMismatch, match="does not contain the definition") as error_info:
        await store.get(key)
    assert error_info.value.hint
    # Submitting again restores it.
    await store.put(DATA)
    assert await store.get(key) == DATA


async def test_a_definition_has_a_bounded_size(store: FolderDefinitionStore) -> None:
    await store.put(b"x" * 1_000_000)
    with pytest.raises(JobFileError, match="larger than"):
        await store.put(b"x" * 1_000_001)


async def test_a_folder_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = FolderDefinitionStore(tmp_path / "file" / "definitions")
    with pytest.raises(GridError, match="can't be kept") as error_info:
        await store.put(DATA)
    assert "store" in error_info.value.hint


async def test_an_error_of_the_folder_is_not_a_missing_definition(
    store: FolderDefinitionStore,
) -> None:
    file_of(store).mkdir(parents=True)
    with pytest.raises(GridError, match="can't be read") as error_info:
        await store.get(digest(DATA))
    assert not isinstance(error_info.value, NotFoundError | DefinitionMismatch)


async def test_a_failed_write_leaves_nothing_behind(
    store: FolderDefinitionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    await store.put(b"first")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(GridError, match="No space left on device"):
        await store.put(DATA)
    assert [path.name for path in store.path.iterdir()] == [file_of(store, b"first").name]


async def test_many_at_once(store: FolderDefinitionStore) -> None:
    texts = [b"%d" % (n % 10) for n in range(100)]
    keys = await asyncio.gather(*map(store.put, texts))
    assert await asyncio.gather(*map(store.get, keys)) == texts
    assert len(list(store.path.iterdir())) == 10


def test_the_last_read_of_a_folder_by_each_provider_is_recorded(tmp_path: Path) -> None:
    store = FolderDefinitionStore(tmp_path / "store")
    assert store.readers() == []
    store.mark_reader("0xAB")
    store.mark_reader("0xCD")
    assert store.readers() == ["0xab", "0xcd"]
    long_ago = time.time() - 301
    os.utime(tmp_path / "store" / ".readers" / "0xab", (long_ago, long_ago))
    assert store.readers() == ["0xcd"]
