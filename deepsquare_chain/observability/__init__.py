"""Logs, metrics and health of a running service.

Services that export metrics and health import `metrics` themselves. Logging is
exported here but loaded on first use, so that code that only cleans text for a terminal starts
without the logging library.
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
    """Load the functions of `logs` lazily, because they import the logging library."""
    if name in {"configure_logging", "get_logger"}:
        return getattr(import_module("deepsquare_chain.observability.logs"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
