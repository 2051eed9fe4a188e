"""Data classes for the health of a service and for checks of its environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check.

    Attributes:
        name: Subject of the check.
        ok: Whether the check passed.
        text: Description of the result.
        hint: Recommended action; may be set even if the check passed.
        setting: Names of the settings that affect the check, joined by commas; may be empty.
    """

    name: str
    ok: bool
    text: str
    hint: str = ""
    setting: str = ""


@dataclass(frozen=True, slots=True)
class Health:
    """Current health of a service.

    Attributes:
        live: Whether its cycles still run; if not, restart the service.
        ready: Whether it completed its first full cycle and is not failing.
        details: Further information, as JSON values.
    """

    live: bool
    ready: bool
    details: Mapping[str, Any] = field(default_factory=dict)
