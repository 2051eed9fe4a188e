"""What people and machines see of a running service: logs, metrics, health.

`metrics` and `health` are imported by those who serve them; logs are everybody's, but loaded when
they are asked for: what cleans text for a terminal starts without them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from deepsquare_chain.observability.redaction import hide_secret, redact_text

if TYPE_CHECKING:
    from deepsquare_chain.observability.logs import configure_logging as configure_logging
    from deepsquare_chain.observability.logs import get_logger as get_logger

__all__ = ["configure_logging", "get_logger", "hide_secret", "redact_text"]


def __getattr__(name: str) -> Any:
    """The functions of `logs`, which bring the logging library with them."""
    if name in {"configure_logging", "get_logger"}:
        return getattr(import_module("deepsquare_chain.observability.logs"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
