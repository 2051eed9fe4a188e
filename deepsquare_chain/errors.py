"""Errors for users: what happened, to which job or file, and what to do next.

The command line prints `message` and `hint` and exits with `exit_code`. Exit codes are defined
only here.
"""

from __future__ import annotations

from typing import ClassVar


class GridError(Exception):
    """An error that the user or the calling service can act on.

    Args:
        message: What happened, naming the job, file or address.
        hint: What to do next, as a whole sentence; may be empty.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type[GridError], tuple[str], dict[str, object]]:
        # Pickle restores exceptions from their positional arguments; the state adds the hint.
        return type(self), (self.message,), dict(self.__dict__)


class UsageError(GridError):
    """Invalid options, arguments or settings."""

    exit_code = 2


class JobFileError(GridError):
    """An invalid job file or job definition."""

    exit_code = 3


class NotFoundError(GridError):
    """A job, provider, definition or file that does not exist."""

    exit_code = 4


class InsufficientFundsError(GridError):
    """Too few credits, or no coins to pay for gas."""

    exit_code = 5


class RevertedError(GridError):
    """The contract reverted the call."""

    exit_code = 6


class EndpointError(GridError):
    """An endpoint that is down, gives invalid responses, or serves another chain."""

    exit_code = 7


class StoreError(GridError):
    """A database that can't be read or written now: disk full, locked or removed."""


class NotAuthorisedError(GridError):
    """A missing role, a wrong password, or a job of another customer."""

    exit_code = 8


class WaitTimeoutError(GridError):
    """A timeout while waiting for an event."""

    exit_code = 9


class AuditError(GridError):
    """The audit found that the ledgers do not balance."""

    exit_code = 10


def number_problem(
    value: object,
    *,
    whole: bool,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    example: float | None = None,
) -> str:
    """Return the message for a value that is no number, or not in the allowed range.

    The range is `low` to `high`, or more than `above`; None for no limit. The message shows the
    allowed number `example`, or `low`.
    """
    allowed = ""
    if above is not None:
        allowed = f" above {_decimal(above)}"
        allowed += "" if high is None else f", at most {_decimal(high)}"
    elif low is not None:
        allowed = f" of {_decimal(low)} or more"
        allowed = allowed if high is None else f" from {_decimal(low)} to {_decimal(high)}"
    elif high is not None:
        allowed = f" of at most {_decimal(high)}"
    given = repr(str(value).strip()[:80])
    shown = low if example is None else example
    hint = "" if shown is None else f", such as {_decimal(shown)}"
    return f"{given} is not a {'whole ' * whole}number{allowed}{hint}"


def _decimal(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)
