"""Removes secrets from log records and escapes untrusted text.

Secrets are recognised in three ways: by the name of a field, by a pattern in the text, and by the
values of the secrets that the program loaded. Log lines may be read by third parties.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, MutableMapping
from typing import Any, Final

HIDDEN: Final = "[hidden]"
MAX_TEXT: Final = 8192
_MAX_DEPTH: Final = 6
_MAX_ITEMS: Final = 100
_MIN_SECRET_LENGTH: Final = 4

# Compared with names in lower case without separators.
_SECRET_NAME: Final = re.compile(
    r"(?:pass(?:word|wd|phrase)|secret|private(?:key)?|mnemonic|seed(?:phrase)?|apikey|accesskey"
    r"|authorization|cookie|credentials?|token|bearer)s?$|^(?:pwd|pass|auth|jwt)$"
)
_WORDS: Final = (
    r"pass(?:word|wd|phrase)|secret(?:[ _-]?key)?|private[ _-]?key|mnemonic|seed[ _-]?phrase"
    r"|api[ _-]?key|access[ _-]?(?:key|token)|auth(?:orization)?[ _-]?token|token|bearer"
)
_ASSIGNED: Final = re.compile(
    rf"(?P<name>(?:{_WORDS})[\"']?\s*(?:=|:)\s*)"
    r"(?P<value>\"[^\"]*\"|'[^']*'|[^\s,;&)\]}\"']+)",
    re.IGNORECASE,
)
_BEARER: Final = re.compile(r"\b(?P<name>(?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)
_USER_INFO: Final = re.compile(r"\b(?P<scheme>[a-z][a-z0-9+.-]{1,20}://)[^\s/?#@]*@", re.IGNORECASE)
_URL: Final = re.compile(r"\b(?:https?|wss?)://[^\s\"'<>]+", re.IGNORECASE)
# URLs of hosted endpoints contain the API key as a long path segment, or in the query.
_KEY_SEGMENT: Final = re.compile(r"(?<=/)(?!0x)(?=[^/?#]*\d)[A-Za-z0-9_-]{20,}(?=[/?#]|$)")
_QUERY: Final = re.compile(
    r"(?<=[?&])(?P<name>[^=&#\s]*(?:key|token|secret|pass|auth)[^=&#\s]*=)[^&#\s]+"
)
_CONTROL: Final = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)
_secrets: set[str] = set()


def hide_secret(secret: str | bytes) -> None:
    """Hide a value in all later log lines. Values of less than 4 characters are ignored.

    Bytes are hidden in their hexadecimal form, which is how keys are displayed.
    """
    text = secret.hex() if isinstance(secret, bytes) else secret.strip()
    if len(text) >= _MIN_SECRET_LENGTH:
        _secrets.add(text)


def redact_text(text: str) -> str:
    """Return the text without URL credentials, `password=...` values and registered secrets."""
    # Longest first: a secret may be a prefix of another.
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _USER_INFO.sub(rf"\g<scheme>{HIDDEN}@", text)
    text = _URL.sub(_redact_url, text)
    text = _BEARER.sub(rf"\g<name>{HIDDEN}", text)
    return _ASSIGNED.sub(rf"\g<name>{HIDDEN}", text)


def redact(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Structlog processor: removes secrets, escapes control characters, truncates long texts."""
    for name, value in event.items():
        if name.startswith("_"):
            continue  # structlog's own
        event[name] = _redacted(name, value, 0)
    return event


def _redact_url(match: re.Match[str]) -> str:
    url = _QUERY.sub(rf"\g<name>{HIDDEN}", match.group())
    return _KEY_SEGMENT.sub(HIDDEN, url)


def _redacted(name: str, value: Any, depth: int) -> Any:
    if _is_secret(name) and value not in (None, ""):
        return HIDDEN
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return _plain("0x" + bytes(value).hex())
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        return _redacted_container(value, depth) if depth < _MAX_DEPTH else "..."
    return _plain(str(value), lines=name in {"exception", "stack"})


def _redacted_container(value: Any, depth: int) -> Any:
    if isinstance(value, Mapping):
        items = list(value.items())[:_MAX_ITEMS]
        return {_plain(str(key)): _redacted(str(key), inner, depth + 1) for key, inner in items}
    return [_redacted("", inner, depth + 1) for inner in list(value)[:_MAX_ITEMS]]


def _is_secret(name: str) -> bool:
    folded = re.sub(r"[^a-z0-9]", "", name.lower())
    return _SECRET_NAME.search(folded) is not None


def _plain(text: str, *, lines: bool = False) -> str:
    if len(text) > MAX_TEXT:
        # A secret may span the cut, so redact a longer prefix first.
        text = redact_text(text[: 2 * MAX_TEXT])[:MAX_TEXT] + f"... {len(text)} characters in all"
    else:
        text = redact_text(text)
    if not lines:
        text = text.replace("\n", "\\n")
    return _CONTROL.sub(lambda match: f"\\x{ord(match.group()):02x}", text)


# Cc contains terminal control codes; Cf contains the bidirectional override marks.
_UNSAFE: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def plain(text: str, *, keep: str = "") -> str:
    """Return the text with every control character escaped, except those in `keep`."""
    return "".join(char if char in keep or _is_safe(char) else _escape(char) for char in text)


def csv_text(text: str) -> str:
    """Return a text of a user as a CSV cell: `plain`, and no formula for a spreadsheet."""
    cell = plain(text)
    return f"'{cell}" if cell[:1] in {"=", "+", "-", "@"} else cell


def _is_safe(char: str) -> bool:
    return " " <= char <= "~" or unicodedata.category(char) not in _UNSAFE


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
