"""Fuzzing by mutation: changes valid samples in one or a few places."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from typing import Any

WORDS = (
    b"", b" ", b"\n", b"\r\n", b"\t", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"{", b"}",
    b"[", b"]", b":", b",", b'"', b"'", b"#", b"=", b"-", b"0x", b"null", b"true", b"NaN", b"1e999",
    b"-1", b"9" * 400, b"\\u0000", b"\\ud800", b"<html>", b"&a *a", b"!!python/object:os.system x",
    b"[" * 2_000, b'{"a":' * 500, b"../../etc/passwd", b"\x1b[31m", b"~nobody/", b"a" * 5_000,
)  # fmt: skip
STRANGERS: Sequence[Any] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 2**64, 2**255, 10**40, -(10**40), 0.5, -0.0, 1e308,
    "", " ", "0", "0x", "0x0", "0xzz", "-0x1", "latest", "x" * 3_000, "\x00", "\x1b[2J", "\u202e",
    "\U0001f600", "0x" + "f" * 64, "0x" + "0" * 40, "..", "/etc/passwd", "$(id)", "~nobody/x", [], {}, [[]], [None],
    {"a": {"b": []}}, [1, "a", None], {"": ""}, ["0x"], [10**10], {"code": -32000, "message": None},
)  # fmt: skip


def mutated_bytes(sample: bytes, rng: random.Random) -> bytes:
    """Return the sample with one to three random changes."""
    mutated = bytearray(sample)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(mutated) + 1)
        to = min(len(mutated), at + rng.choice((0, 1, 1, 2, 8, 64)))
        match rng.randrange(6):
            case 0:
                del mutated[at:to]
            case 1:
                mutated[at:to] = rng.choice(WORDS)
            case 2:
                mutated[at:at] = mutated[at:to] * rng.choice((1, 2, 50))
            case 3:
                del mutated[at:]
            case 4:
                mutated[at:to] = rng.randbytes(to - at)
            case _:
                other = rng.randrange(len(sample) + 1)
                mutated[at:to] = sample[other : other + 16]
    return bytes(mutated)


def mutated_tree(sample: Any, rng: random.Random) -> Any:
    """Return a copy of a tree of dicts, lists and leaves with one to three random changes."""
    tree = copy.deepcopy(sample)
    for _ in range(rng.choice((1, 1, 2, 3))):
        entries = list(_places(tree))
        if not entries:
            return rng.choice(STRANGERS)
        holder, key = rng.choice(entries)
        match rng.randrange(5):
            case 0 if isinstance(holder, dict):
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[rng.choice(("", "unknown", key.upper(), key + " ", "\x00"))] = holder[key]
            case 2 if isinstance(holder, list):
                holder.insert(key, rng.choice(STRANGERS))
            case _:
                holder[key] = copy.deepcopy(rng.choice(STRANGERS))
    return rng.choice(STRANGERS) if rng.random() < 0.02 else tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield container and key of all values in a tree."""
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from _places(tree[key])
