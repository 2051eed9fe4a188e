"""Structured logs on standard error: one event per line, as JSON or as columns for a terminal.

Libraries that use the standard `logging` module go through the same processors.
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
# Verbose below warning, and not useful to operators of a grid.
_QUIET: Final = ("asyncio", "httpx2", "httpcore2", "urllib3", "uvicorn", "web3", "websockets")


def configure_logging(
    level: str = "info", fmt: str = "auto", stream: TextIO | None = None, **bound: object
) -> None:
    """Send all logs of this process to one stream. May be called repeatedly.

    Args:
        level: debug, info, warning or error.
        fmt: json, console, or auto (console on a terminal, JSON elsewhere).
        stream: Output stream; standard error by default.
        bound: Fields added to every line, such as the service's name.

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
    for old_handler in list(root.handlers):
        if getattr(old_handler, "_deepsquare", False):
            root.removeHandler(old_handler)
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
        # Modules create their loggers at import, before this function runs.
        cache_logger_on_first_use=False,
    )


def get_logger(name: str) -> BoundLogger:
    """Return the logger of a module. Events are short, constant phrases; data goes into fields."""
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
    # Tracebacks are rendered to text before redaction, without local variables.
    processors: list[Processor] = [structlog.processors.format_exc_info, redact]
    if fmt == "json" or (fmt == "auto" and not terminal):
        return [*processors, structlog.processors.JSONRenderer(sort_keys=True, default=str)]
    return [*processors, structlog.dev.ConsoleRenderer(colors=terminal)]
