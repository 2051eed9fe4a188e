"""Bounds and forms of single values in a job file; each check says in one clause what is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

from pydantic_core import PydanticCustomError

from deepsquare_chain.credits import format_credits, parse_credits
from deepsquare_chain.job import Objective, parse_uses

UINT16_MAX: Final = 2**16 - 1
UINT24_MAX: Final = 2**24 - 1
AMOUNT_MAX: Final = 2**96 - 1
MAX_NAME_BYTES: Final = 64
MAX_USES_BYTES: Final = 512
MAX_RETRIES: Final = 5
MAX_STEPS: Final = 1_000
MAX_ENV: Final = 256
# Linux passes no single argument or variable of 128 KiB or more; quoting needs room as well.
MAX_COMMAND_BYTES: Final = 65_536
MAX_ENV_VALUE_BYTES: Final = 32_768

#: Names that the grid itself sets for a job.
RESERVED_ENV_PREFIX: Final = "DEEPSQUARE_"
_READONLY_IN_BASH: Final = frozenset(
    {"BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID"}
)
_ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
# Forms of a time limit: hours, minutes and seconds each, the clock read as Slurm reads it.
_DURATIONS: Final = tuple(
    map(
        re.compile,
        (
            r"()()([0-9]{1,8})",
            r"()([0-9]{1,6}):([0-5][0-9])",
            r"([0-9]{1,4}):([0-5][0-9]):([0-5][0-9])",
            r"(?:([0-9]{1,8})h)?(?:([0-9]{1,8})m)?(?:([0-9]{1,8})s)?",
        ),
    )
)


def problem(text: str) -> PydanticCustomError:
    """An error of a field, worded to follow the field's name."""
    return PydanticCustomError("job_file", "{text}", {"text": text})


def show(value: Any) -> str:
    """A value as a message may show it: short, on one line, without control characters."""
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case dict():
            return "a mapping"
        case list():
            return "a list"
        case str():
            shown = ascii(value[:80])
        case _:
            shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def whole(low: int, high: int) -> Callable[[Any], int]:
    """A check for integers of the contract; text, booleans and decimals are none."""

    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise problem(f"must be a whole number from {low} to {high}, not {show(value)}")
        return value

    return check


def text(value: Any) -> str:
    """Text; a plain `5` or `true` is taken as it was written."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        raise problem(f"must be text, not {show(value)}")
    if "\0" in value:
        raise problem("holds a NUL byte")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise problem("holds a character that is not Unicode text") from None
    return value


def name(value: Any) -> str:
    """A name for people, as the chain keeps it."""
    checked = text(value)
    if len(checked.encode()) > MAX_NAME_BYTES:
        raise problem(f"is longer than {MAX_NAME_BYTES} bytes")
    if not checked.isprintable():
        raise problem("holds characters that can't be printed")
    return checked


def command(value: Any) -> str:
    """What a step runs."""
    checked = text(value)
    if not checked.strip():
        raise problem("must be a command, such as: echo hello")
    if len(checked.encode()) > MAX_COMMAND_BYTES:
        raise problem(f"is longer than {MAX_COMMAND_BYTES:,} bytes; put it in several steps")
    return checked


def env_name(value: Any) -> str:
    """Name of an environment variable that a shell can export."""
    checked = text(value)
    if not _ENV_NAME.fullmatch(checked):
        raise problem("is no name of a variable: letters, digits and _, no digit first")
    if checked.startswith(RESERVED_ENV_PREFIX):
        raise problem(f"can't be set: names beginning with {RESERVED_ENV_PREFIX} are the grid's")
    if checked in _READONLY_IN_BASH:
        raise problem("can't be set: bash keeps this variable for itself")
    return checked


def env_value(value: Any) -> str:
    """Value of an environment variable."""
    checked = text(value)
    if len(checked.encode()) > MAX_ENV_VALUE_BYTES:
        raise problem(f"is longer than {MAX_ENV_VALUE_BYTES:,} bytes")
    return checked


def affinity(value: Any) -> str:
    """One affinity in its canonical form."""
    checked = text(value)
    try:
        found = parse_uses(checked)
    except ValueError as error:
        raise problem(f"is not understood: {error}") from None
    if len(found) != 1 or not str(found[0]).isprintable():
        raise problem("must hold one affinity, such as gpu.model=h100")
    return str(found[0])


def objective(value: Any) -> Objective:
    """COST, TIME or ENERGY."""
    if isinstance(value, str) and value in Objective.__members__:
        return Objective[value]
    raise problem(f"must be COST, TIME or ENERGY, not {show(value)}")


def amount(value: Any) -> int:
    """Credit-wei of an escrow written in credits."""
    written = text(value)
    try:
        parsed = parse_credits(written)
    except ValueError as error:
        raise problem(f"is not understood: {error}") from None
    return bounded_amount(parsed)


def bounded_amount(value: int) -> int:
    """An escrow in credit-wei that the contract can hold."""
    if not 0 < value <= AMOUNT_MAX:
        raise problem(f"must be more than 0 and at most {format_credits(AMOUNT_MAX)}")
    return value


def duration(value: Any) -> int:
    """Seconds of a time limit."""
    if type(value) is int:
        return whole(1, UINT24_MAX)(value)
    if not isinstance(value, str):
        raise problem(f"must be seconds or a text such as 1h30m, not {show(value)}")
    try:
        return parse_duration(value)
    except ValueError as error:
        raise problem(str(error)) from None


def parse_duration(written: str) -> int:
    """Seconds of `90`, `90s`, `10m`, `1h30m`, `10:00` or `01:30:00`.

    Raises:
        ValueError: Another form, zero, or more than the contract can hold (about 194 days).
    """
    stripped = written.strip()
    found = next((found for form in _DURATIONS if (found := form.fullmatch(stripped))), None)
    if found is None or not stripped:
        raise ValueError(
            f"must be seconds or a text such as 90s, 10m, 1h30m or 01:30:00, not {show(written)}"
        )
    hours, minutes, seconds = (int(part or 0) for part in found.groups())
    total = hours * 3_600 + minutes * 60 + seconds
    if not 1 <= total <= UINT24_MAX:
        raise ValueError(f"must be from 1 to {UINT24_MAX} seconds, not {show(written)}")
    return total


def total_uses(values: list[str]) -> list[str]:
    """Affinities that fit on chain when joined by commas."""
    if len(",".join(values).encode()) > MAX_USES_BYTES:
        raise problem(f"are longer than {MAX_USES_BYTES} bytes in all")
    return values
