"""The output log of a run: written continuously, limited by rotation, readable at any time.

The file `output` holds the beginning. Later output goes to segments `output.POSITION`, named by
the position (bytes printed before) of their first byte; the oldest segments are removed. Readers
use positions and insert a note for removed output. The log needs no final step, so that a killed
supervisor loses no output.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final, NamedTuple

from deepsquare_chain.executors.rundir import read_bytes

#: The beginning gets half of the limit, a segment an eighth.
_HEAD_SHARE: Final = 2
_SEGMENT_SHARE: Final = 8
#: Maximum number of segments, of any size: a full disk causes small ones.
_MAX_SEGMENTS: Final = 32
_NOTE_BYTES: Final = 80
_TRIES: Final = 5
_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class OutputWriter:
    """Writes the log of one run. On a full disk output is lost, but the run continues.

    Args:
        path: File of the beginning; segments are in the same folder.
        limit: Maximum total bytes of all files.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self._path = path
        self._head_limit = limit // _HEAD_SHARE
        self._tail_limit = max(0, limit - self._head_limit - _NOTE_BYTES)
        self._segment_limit = max(1, min(limit // _SEGMENT_SHARE, self._tail_limit))
        self._position = 0
        self._segments: list[tuple[Path, int]] = []
        self._handle = -1
        with contextlib.suppress(OSError):
            self._handle = os.open(path, _FLAGS | os.O_APPEND, 0o600)

    def take(self, data: bytes) -> None:
        """Write a part of the output."""
        view = memoryview(data)
        while view:
            if self._head_limit <= 0 or self._handle < 0:
                self._rotate()
            part = view[: self._head_limit]
            written = self._write(part)
            self._position += len(part)
            self._head_limit -= len(part)
            if written < len(part):
                # Bytes are missing, so the next ones need a new segment with their position.
                self.close()
            view = view[len(part) :]

    def close(self) -> None:
        """Close the current file."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _rotate(self) -> None:
        """Begin a segment, and remove the oldest ones above the limits."""
        self.close()
        self._head_limit = self._segment_limit
        segment = self._path.with_name(f"{self._path.name}.{self._position}")
        with contextlib.suppress(OSError):
            self._handle = os.open(segment, _FLAGS | os.O_EXCL, 0o600)
            self._segments.append((segment, self._segment_limit))
        while self._segments and (
            len(self._segments) > _MAX_SEGMENTS
            or sum(size for _, size in self._segments) > self._tail_limit
        ):
            with contextlib.suppress(OSError):
                self._segments[0][0].unlink()
            del self._segments[0]

    def _write(self, data: memoryview) -> int:
        written = 0
        if self._handle >= 0:
            with contextlib.suppress(OSError):
                while written < len(data):
                    written += os.write(self._handle, data[written:])
        return written


class OutputPart(NamedTuple):
    """A part of a log, and the position of the next part; empty at the end."""

    data: bytes
    position: int


def read_output(path: Path, position: int = 0, limit: int = 65536) -> OutputPart:
    """Return a part of a log from a position; a note replaces removed output.

    Raises:
        OSError: The log can't be read, or is not a regular file. A missing log is empty.
    """
    for _ in range(_TRIES):
        for start, file in _files(path):
            size = _size(file)
            if position >= start + size:
                continue
            if position < start:
                note = f"\n[... {start - position} bytes left out ...]\n"
                return OutputPart(note.encode(), start)
            data = read_bytes(file, position - start, limit) if size else b""
            if not data:
                break  # removed meanwhile: retry
            return OutputPart(data, position + len(data))
        else:
            break
    return OutputPart(b"", position)


def read_kept(path: Path, offset: int, limit: int) -> bytes:
    """Return up to `limit` bytes of the log as one text, notes included, from byte `offset`.

    The result is stable only for a run that has ended.

    Raises:
        OSError: As `read_output`.
    """
    text, position, bytes_read = bytearray(), 0, 0
    while len(text) < limit:
        part = read_output(path, position, limit)
        if not part.data:
            break
        skip = max(0, offset - bytes_read)
        text += part.data[skip:]
        bytes_read += len(part.data)
        position = part.position
    return bytes(text[:limit])


def last_write(path: Path) -> float:
    """Return the time of the last write to the log, in seconds since the epoch.

    Raises:
        OSError: There is no log.
    """
    return max(file.stat().st_mtime for _, file in _files(path))


def _files(path: Path) -> list[tuple[int, Path]]:
    """Return the files of a log in order, each with the position of its first byte."""
    files = [(0, path)]
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(path.parent):
            start = entry.name.removeprefix(f"{path.name}.")
            if start != entry.name and start.isascii() and start.isdigit() and len(start) <= 18:
                files.append((int(start), Path(entry.path)))
    return sorted(files)


def _size(file: Path) -> int:
    try:
        return file.lstat().st_size
    except FileNotFoundError:
        return 0
