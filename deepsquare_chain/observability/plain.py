"""Other people's text on a terminal: names, reasons and logs are data, never control codes."""

from __future__ import annotations

import unicodedata
from typing import Final

# Cc moves the cursor or worse; Cf holds the marks that turn the reading direction.
_UNSAFE: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def plain(text: str, *, keep: str = "") -> str:
    """The text with every control character written out as an escape, but for those to keep."""
    return "".join(char if char in keep or _is_safe(char) else _escape(char) for char in text)


def _is_safe(char: str) -> bool:
    return " " <= char <= "~" or unicodedata.category(char) not in _UNSAFE


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
