"""Logs: one event a line, JSON for machines, columns for people, on standard error.

Libraries that use the standard `logging` go through the same processors.
"""

from __future__ import annotations

import logging
import sys
from typing import Final, TextIO

import structlog
from structlog.stdlib import BoundLogger, ProcessorFormatter
from structlog.types import Processor

from deepsquare_chain.errors import UsageError
from deepsquare_chain.observability.redaction import redact

FORMATS: Final = ("auto", "console", "json")
LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
# Chatty below warning, and no news to anybody who runs a grid.
_QUIET: Final = ("asyncio", "httpx", "httpcore", "urllib3", "uvicorn", "web3", "websockets")


def configure_logging(
    level: str = "info", fmt: str = "auto", stream: TextIO | None = None, **bound: object
) -> None:
    """Send all logs of this process to one stream. May be called again.

    Args:
        level: debug, info, warning or error.
        fmt: json, console, or auto: console on a terminal, JSON elsewhere.
        stream: Standard error by default.
        bound: Fields that every line carries, such as the service's name.

    Raises:
        UsageError: The level or the format is unknown.
    """
    if level.lower() not in LEVELS or fmt not in FORMATS:
        raise UsageError(
            f"Log level {level!r} with format {fmt!r} is unknown",
            hint=f"Levels: {', '.join(LEVELS)}. Formats: {', '.join(FORMATS)}.",
        )
    target = stream or sys.stderr
    handler = logging.StreamHandler(target)
    handler.setFormatter(
        ProcessorFormatter(
            foreign_pre_chain=_shared(),
            processors=[ProcessorFormatter.remove_processors_meta, *_final(fmt, target)],
        )
    )
    root = logging.getLogger()
    for old in list(root.handlers):
        if getattr(old, "_deepsquare", False):
            root.removeHandler(old)
    handler._deepsquare = True  # type: ignore[attr-defined]  # noqa: SLF001
    root.addHandler(handler)
    root.setLevel(LEVELS[level.lower()])
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(LEVELS[level.lower()], logging.WARNING))
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**bound)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_shared(),
            ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        # A module's logger is made at import, before this ran.
        cache_logger_on_first_use=False,
    )


def get_logger(name: str) -> BoundLogger:
    """Logger of a module. Events are short phrases; everything variable is a field."""
    logger: BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def _shared() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]


def _final(fmt: str, stream: TextIO) -> list[Processor]:
    terminal = stream.isatty()
    # Tracebacks become text before redaction, and never show local variables.
    last: list[Processor] = [structlog.processors.format_exc_info, redact]
    if fmt == "json" or (fmt == "auto" and not terminal):
        return [*last, structlog.processors.JSONRenderer(sort_keys=True, default=str)]
    return [*last, structlog.dev.ConsoleRenderer(colors=terminal)]
