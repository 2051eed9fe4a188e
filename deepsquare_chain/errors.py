"""Errors for people: what happened, to which job or file, and what to do next.

The command line prints `message` and `hint` and ends with `exit_code`; nothing else of the
program decides about exit codes.
"""

from __future__ import annotations

from typing import ClassVar


class GridError(Exception):
    """Something the person or service in front of it can act on.

    Args:
        message: What happened, naming the job, file or address.
        hint: What to do next, as a whole sentence; empty when there is nothing to add.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type[GridError], tuple[str], dict[str, object]]:
        # Exceptions cross process borders by their positional arguments; the hint rides along.
        return type(self), (self.message,), dict(self.__dict__)


class UsageError(GridError):
    """Options, arguments or settings that can't be meant."""

    exit_code = 2


class JobFileError(GridError):
    """A job file, or a job definition, that does not hold what it must."""

    exit_code = 3


class NotFoundError(GridError):
    """A job, provider, definition or file that does not exist."""

    exit_code = 4


class InsufficientFundsError(GridError):
    """Too few credits, or no gas."""

    exit_code = 5


class RevertedError(GridError):
    """A contract refused the call."""

    exit_code = 6


class EndpointError(GridError):
    """An endpoint that is down, answers nonsense, or serves another chain."""

    exit_code = 7


class StoreError(GridError):
    """A database can't be read or written now: disk full, locked, taken away."""


class NotAuthorisedError(GridError):
    """A missing role, a wrong password, or somebody else's job."""

    exit_code = 8


class WaitTimeoutError(GridError):
    """What was waited for did not happen in time."""

    exit_code = 9


class AuditError(GridError):
    """The books do not add up."""

    exit_code = 10
