"""A service's memory does not grow with the number of its threads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

#: Allocates in many threads at once and writes glibc's account of its arenas.
THREADS = """
import ctypes, sys, threading
from deepsquare_chain.daemon.service import share_arenas

if sys.argv[2] == "shared":
    share_arenas()
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
    def arenas(how: str) -> int:
        account = tmp_path / how
        subprocess.run([sys.executable, "-c", THREADS, account, how], check=True)
        return account.read_text().count("<heap nr=")

    assert arenas("shared") <= 2 < arenas("each its own")
