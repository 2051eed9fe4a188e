"""Health of a service and findings about its surroundings as values, apart from what shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was examined.

    Attributes:
        name: What was examined.
        ok: Whether it is in order.
        text: What was found.
        hint: What to do; may be there for something in order as well.
        setting: Settings that decide about it, joined by commas; empty where none does.
    """

    name: str
    ok: bool
    text: str
    hint: str = ""
    setting: str = ""


@dataclass(frozen=True, slots=True)
class Health:
    """Health of a service now.

    Attributes:
        live: It still turns; restart it when not.
        ready: It has done its first full cycle and is not failing.
        details: Whatever else is worth seeing; JSON values.
    """

    live: bool
    ready: bool
    details: Mapping[str, Any] = field(default_factory=dict)
