"""Stores of definitions by SHA-256: the interface, and a folder for a local grid."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from pathlib import Path
from typing import Final, Protocol

from deepsquare_chain.errors import GridError, JobFileError, NotFoundError
from deepsquare_chain.workflow import digest

MAX_BYTES: Final = 1_000_000
#: Folder for marks of providers that read the store, and seconds for which a mark is valid.
_READERS: Final = ".readers"
_READER_SECONDS: Final = 300.0


class DefinitionMismatch(GridError):  # noqa: N818 - the name that callers know
    """A store returned bytes that do not match the digest; they must not run."""


class DefinitionStore(Protocol):
    """Stores definitions; untrusted, as each response is verified by its digest."""

    async def put(self, data: bytes) -> bytes:
        """Store a definition and return its digest; idempotent.

        Raises:
            JobFileError: The bytes are larger than a definition may be.
            GridError: The definition can't be stored now.
        """
        ...

    async def get(self, digest: bytes, job_id: int | None = None) -> bytes:
        """Return the bytes of a definition; gateways check the permission by its job.

        Raises:
            NotFoundError: The store does not have it.
            DefinitionMismatch: The store has other bytes.
            GridError: The store can't answer now; the definition may exist.
        """
        ...


class FolderDefinitionStore:
    """Definitions as files `<digest>.json` in one folder, created when first needed."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    async def put(self, data: bytes) -> bytes:
        """See `DefinitionStore`."""
        if len(data) > MAX_BYTES:
            raise JobFileError(f"A definition of {len(data):,} bytes is larger than {MAX_BYTES:,}")
        key = digest(data)
        try:
            await asyncio.to_thread(self._write, self._file(key), data)
        except OSError as error:
            raise GridError(
                f"Definition {key.hex()} can't be kept in {self.path}: {error.strerror}",
                hint="Check the setting store, and that folder's free space and permissions.",
            ) from None
        return key

    async def get(self, digest: bytes, job_id: int | None = None) -> bytes:  # noqa: ARG002
        """See `DefinitionStore`."""
        file = self._file(digest)
        try:
            return await asyncio.to_thread(self._read, file, digest)
        except FileNotFoundError:
            raise NotFoundError(f"There is no definition {digest.hex()} in {self.path}") from None
        except OSError as error:
            raise GridError(
                f"Definition {digest.hex()} can't be read in {self.path}: {error.strerror}"
            ) from None

    def mark_reader(self, account: str) -> None:
        """Mark the folder as read by a provider, for its other users.

        Raises:
            OSError: The folder is not writable; it can still be read.
        """
        folder = self.path / _READERS
        folder.mkdir(parents=True, exist_ok=True)
        (folder / account.lower()).touch()

    def readers(self) -> list[str]:
        """Return the accounts of providers that marked the folder as read in the last 5 minutes."""
        try:
            marks = list((self.path / _READERS).iterdir())
            is_recent = [
                abs(time.time() - mark.stat().st_mtime) < _READER_SECONDS for mark in marks
            ]
        except OSError:
            return []
        return sorted(mark.name for mark, reads in zip(marks, is_recent, strict=True) if reads)

    def _file(self, key: bytes) -> Path:
        if len(key) != 32:
            raise NotFoundError(f"A digest has 32 bytes, not {len(key)}")
        return self.path / f"{key.hex()}.json"

    def _write(self, file: Path, data: bytes) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        # Atomic rename: readers see a whole file or none, even if the writer is killed.
        temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
        try:
            with temporary.open("xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)

    @staticmethod
    def _read(file: Path, key: bytes) -> bytes:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        if digest(data) != key:
            raise DefinitionMismatch(
                f"{file} does not contain the definition of its name",
                hint="Delete it, and submit the job file again to restore it.",
            )
        return data
