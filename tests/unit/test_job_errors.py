"""Errors keep their messages, hints and exit codes."""

from __future__ import annotations

import pickle

import pytest

from deepsquare_chain import errors

EXIT_CODES = {
    "GridError": 1,
    "UsageError": 2,
    "JobFileError": 3,
    "NotFoundError": 4,
    "InsufficientFundsError": 5,
    "RevertedError": 6,
    "EndpointError": 7,
    "NotAuthorisedError": 8,
    "WaitTimeoutError": 9,
    "AuditError": 10,
}


@pytest.mark.parametrize(("name", "code"), EXIT_CODES.items())
def test_exit_codes_are_those_of_the_command_line(name: str, code: int) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, errors.GridError)
    assert kind.exit_code == code


def test_message_and_hint() -> None:
    error = errors.NotFoundError("There is no job 7.", hint="List jobs with `deepsquare job list`.")
    assert str(error) == error.message == "There is no job 7."
    assert error.hint == "List jobs with `deepsquare job list`."
    assert errors.GridError("x").hint == ""


def test_errors_cross_process_borders() -> None:
    error = pickle.loads(pickle.dumps(errors.UsageError("what", hint="do")))  # noqa: S301
    assert type(error) is errors.UsageError
    assert (error.message, error.hint, error.exit_code) == ("what", "do", 2)
