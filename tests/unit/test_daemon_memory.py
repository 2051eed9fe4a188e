"""A service's memory grows neither with its threads nor with rewritten tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

#: Allocates in many threads at once and writes glibc's account of its arenas.
THREADS = """
import ctypes, sys, threading
from deepsquare_chain.daemon.service import configure_malloc

if sys.argv[2] == "shared":
    configure_malloc()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.fopen.restype = ctypes.c_void_p
barrier = threading.Barrier(9)

def allocate():
    libc.malloc(5_000)
    barrier.wait()
    barrier.wait()

for _ in range(8):
    threading.Thread(target=allocate, daemon=True).start()
barrier.wait()
file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
barrier.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc has arenas for each thread")
def test_threads_share_two_arenas(tmp_path: Path) -> None:
    def arenas(setting: str) -> int:
        account = tmp_path / setting
        subprocess.run([sys.executable, "-c", THREADS, account, setting], check=True)
        return account.read_text().count("<heap nr=")

    assert arenas("shared") <= 2 < arenas("each its own")


#: glibc takes blocks as large as one that was freed from the heap; then says what it mapped alone.
BLOCKS = """
import ctypes, sys
from deepsquare_chain.daemon.service import configure_malloc

class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd",
        "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]

if sys.argv[1] == "bounded":
    configure_malloc()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.mallinfo2.restype = Mallinfo
libc.free(ctypes.c_void_p(libc.malloc(8 << 20)))
before = libc.mallinfo2().hblkhd
libc.malloc(4 << 20)
print(libc.mallinfo2().hblkhd - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc learns from what was freed")
def test_large_blocks_are_mapped_alone() -> None:
    def mapped(setting: str) -> int:
        result = subprocess.run(
            [sys.executable, "-c", BLOCKS, setting], check=True, capture_output=True, text=True
        )
        return int(result.stdout)

    assert mapped("bounded") >= 4 << 20 > mapped("as it is")
