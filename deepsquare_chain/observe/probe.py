"""Health of a service as a value, apart from the pages that show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
