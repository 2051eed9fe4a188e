"""Keeps the beginning and the end of what a run prints, and never more than its bound."""

from __future__ import annotations

import os

_NOTE_ROOM = 80


class OutputKeeper:
    """Writes a bounded file that only grows, so an offset into it stays true.

    The first half of the bound is written as it comes. Of what follows the last half is held in
    memory and written at the end, after a note of how many bytes were left out. A full disk
    loses output, never the run.

    Args:
        handle: Descriptor of the file.
        limit: Bytes that the file may hold.
    """

    def __init__(self, handle: int, limit: int) -> None:
        self._handle = handle
        self._room = limit // 2
        self._keep = max(0, limit - self._room - _NOTE_ROOM)
        self._tail = bytearray()
        self._left_out = 0

    def take(self, data: bytes) -> None:
        """Keep a piece of output."""
        rest = data
        if self._room:
            written = self._write(data[: self._room])
            self._room -= written
            rest = data[written:]
        if not rest:
            return
        # Output after a gap would stand in the wrong place: the head is over.
        self._room = 0
        self._tail += rest
        if len(self._tail) > 2 * self._keep + 65536:
            self._trim()

    def close(self) -> None:
        """Write what is held of the end, and close the file."""
        self._trim()
        if self._left_out:
            self._write(f"\n[... {self._left_out} bytes left out ...]\n".encode())
        self._write(bytes(self._tail))
        os.close(self._handle)

    def _trim(self) -> None:
        excess = len(self._tail) - self._keep
        if excess > 0:
            del self._tail[:excess]
            self._left_out += excess

    def _write(self, data: bytes) -> int:
        written = 0
        try:
            while written < len(data):
                written += os.write(self._handle, data[written:])
        except OSError:
            pass
        return written
