"""Validation of single values in a job file; each check reports the problem in one clause."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from urllib.parse import urlsplit

from pydantic_core import PydanticCustomError
from pyrage import RecipientError, x25519

from deepsquare_chain.credits import format_credits, parse_credits
from deepsquare_chain.job import CONDITION_PREFIX, Objective, parse_uses
from deepsquare_chain.notification import parse_target
from deepsquare_chain.workflow.yamltree import PlainText

UINT16_MAX: Final = 2**16 - 1
UINT24_MAX: Final = 2**24 - 1
AMOUNT_MAX: Final = 2**96 - 1
MAX_NAME_BYTES: Final = 64
MAX_USES_BYTES: Final = 512
MAX_RETRIES: Final = 5
MAX_STEPS: Final = 1_000
MAX_ENV: Final = 256
# Linux limits a single argument or variable to less than 128 KiB; quoting takes space too.
MAX_COMMAND_BYTES: Final = 65_536
MAX_ENV_VALUE_BYTES: Final = 32_768

MAX_STEP_NAME_BYTES: Final = 256
MAX_LIST: Final = 256
MAX_RECIPIENTS: Final = 20
MAX_SECRETS_BYTES: Final = 262_144
MAX_TEXT_BYTES: Final = 4_096
_DATE: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")

#: Prefix of the variables that the grid sets for a job.
RESERVED_ENV_PREFIX: Final = "DEEPSQUARE_"
_REFUSED_ENV: Final = frozenset({"PATH", "LD_LIBRARY_PATH"})
_READONLY_IN_BASH: Final = frozenset(
    {"BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID"}
)
_BASE64: Final = re.compile(r"[A-Za-z0-9+/]+={0,2}")
_ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_IMAGE: Final = re.compile(
    r"(?:[A-Za-z0-9][A-Za-z0-9.-]*:[0-9]{1,5}/)?[a-z0-9]+(?:[._-]+[a-z0-9]+)*(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?"
)
_IMAGE_FILE: Final = re.compile(r"\.(?:sif|sqsh|squashfs|img|tar|tar\.gz|tgz)$")
_HOST: Final = r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])"
_REGISTRY: Final = re.compile(rf"{_HOST}(?::[0-9]{{1,5}})?")
_ENDPOINT: Final = re.compile(rf"{_HOST}:[0-9]{{1,5}}")
_BUCKET: Final = re.compile(r"s3://[A-Za-z0-9][A-Za-z0-9._-]{1,253}")
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_HANDLE: Final = re.compile(r"[A-Za-z0-9_]{1,64}")
_REMOTE_MODULE: Final = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9.-]*(?::[0-9]{1,5})?(?:/[A-Za-z0-9_][A-Za-z0-9_.-]*){2,12}(?:@[A-Za-z0-9_][A-Za-z0-9_./-]{0,127})?"
)
_DEPENDENCY: Final = re.compile(r"(?:(?:afterok|afterany|afternotok):)?[^,:\s]+(?::[^,:\s]+)*")
_LOCAL_MODULE: Final = re.compile(r"(?:\.{1,2})?/[^\0\n]{0,1023}|\.{1,2}")
#: Boolean words of YAML's core schema besides `true` and `false`, which the parser resolves.
_BOOLEANS: Final[Mapping[str, bool]] = {
    "True": True,
    "TRUE": True,
    "False": False,
    "FALSE": False,
}
# Formats of a time limit: days, hours, minutes and seconds; clock formats as in Slurm.
_DURATIONS: Final = tuple(
    map(
        re.compile,
        (
            r"()()()([0-9]{1,8})",
            r"()()([0-9]{1,6}):([0-5][0-9])",
            r"(?:([0-9]{1,3})-)?([0-9]{1,4}):([0-5][0-9]):([0-5][0-9])",
            r"(?:([0-9]{1,6})d)?(?:([0-9]{1,8})h)?(?:([0-9]{1,8})m)?(?:([0-9]{1,8})s)?",
        ),
    )
)


def problem(text: str, *below: str | int) -> PydanticCustomError:
    """Return the error of a field; the text follows the field's name in the message.

    `below` is the path from the field to the invalid value.
    """
    return PydanticCustomError("job_file", "{text}", {"text": text, "below": below})


def show(value: Any) -> str:
    """Format a value for a message: short, on one line, without control characters."""
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


def whole(low: int, high: int, unit: str = "") -> Callable[[Any], int]:
    """Return a check for integers in a range; refuses text, booleans and decimals."""
    last = f"{high} {unit}".rstrip()

    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise problem(f"must be a whole number from {low} to {last}, not {show(value)}")
        return value

    return check


def text(value: Any) -> str:
    """Check a text; integers and booleans without quotes are converted to text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        raise problem(f"must be text, not {show(value)}")
    if "\0" in value:
        raise problem("contains a NUL byte")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise problem("contains a character that is not Unicode text") from None
    return str(value)


def _up_to(limit: int, advice: str = "", *, printable: bool = False) -> Callable[[Any], str]:
    """Return a check for texts of at most `limit` bytes."""

    def check(value: Any) -> str:
        checked = text(value)
        if len(checked.encode()) > limit:
            raise problem(f"is longer than {limit:,} bytes{advice}")
        if printable and not checked.isprintable():
            raise problem("contains characters that can't be printed")
        return checked

    return check


#: The name of a job, as stored on chain, and of a step, which is shown in the output.
name = _up_to(MAX_NAME_BYTES, printable=True)
step_name = _up_to(MAX_STEP_NAME_BYTES, printable=True)
command = _up_to(MAX_COMMAND_BYTES, "; put it in several steps")
env_value = _up_to(MAX_ENV_VALUE_BYTES)


def boolean(value: Any) -> bool:
    """Check an unquoted `true` or `false`."""
    if isinstance(value, bool):
        return value
    if isinstance(value, PlainText) and str(value) in _BOOLEANS:
        return _BOOLEANS[value]
    raise problem(f"must be true or false, not {show(value)}")


def choice(*allowed: str) -> Callable[[Any], str]:
    """Return a check for one of several words."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            words = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
            raise problem(f"must be {words}, not {show(value)}")
        return str(value)

    return check


def line(value: Any) -> str:
    """Check a text that is one line and not empty."""
    checked = text(value)
    if not checked or len(checked.encode()) > MAX_TEXT_BYTES:
        raise problem(f"must have from 1 to {MAX_TEXT_BYTES:,} bytes")
    if any(ord(character) < 32 or ord(character) == 127 for character in checked):
        raise problem("contains control characters")
    return checked


def _matching(form: re.Pattern[str], words: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        checked = line(value)
        if not form.fullmatch(checked):
            raise problem(f"must be {words}, not {show(checked)}")
        return checked

    return check


registry = _matching(_REGISTRY, "the host name of a registry, such as ghcr.io")


def endpoint(value: Any) -> str:
    """Check a host and port."""
    checked = line(value)
    if not _ENDPOINT.fullmatch(checked) or not 0 < int(checked.rpartition(":")[2]) <= 65_535:
        raise problem(f"must be host:port, not {show(checked)}")
    return checked


hostname = _matching(re.compile(_HOST), "an IP address or a host name")
bucket_url = _matching(_BUCKET, "s3://BUCKET without a slash at the end")
plain_name = _matching(_PLAIN_NAME, "a name of letters, digits, _, . and -")
handle_name = _matching(_HANDLE, "a name of letters, digits and _")


def image(value: Any) -> str:
    """Check an image in a registry, or a file of the job."""
    checked = line(value)
    if "://" in checked:
        raise problem(
            "must be an image without a protocol, such as alpine:3.20, with its registry under "
            f"registry, not {show(checked)}"
        )
    if not checked.startswith("/") and _IMAGE_FILE.search(checked):
        raise problem(
            f"must be an absolute path below STORAGE_PATH if it is a file, not {show(checked)}"
        )
    if not _IMAGE.fullmatch(checked) and not checked.startswith("/"):
        raise problem(
            "must be an image such as alpine:3.20 or user/app@sha256:DIGEST in lower case, or an "
            f"absolute path below STORAGE_PATH, not {show(checked)}"
        )
    if checked.startswith("/"):
        return absolute_path(checked)
    return checked


def absolute_path(value: Any) -> str:
    """Check an absolute path without `..`."""
    checked = line(value)
    if not checked.startswith("/"):
        raise problem(f"must be an absolute path, which begins with /, not {show(checked)}")
    if ".." in checked.split("/"):
        raise problem("must not contain ..")
    return checked


def mount_path(value: Any) -> str:
    """Check a path that is mounted, in which some container runtimes can't have separators."""
    checked = absolute_path(value)
    if re.search(r"[\s:,]", checked):
        raise problem("must not contain spaces, : or ,")
    return checked


def bucket_path(value: Any) -> str:
    """Check a path in a bucket."""
    checked = line(value)
    if not checked.startswith("/"):
        raise problem(f"must begin with /, not {show(checked)}")
    if any(character in checked for character in "*?[]"):
        raise problem("must not contain wildcards (* ? [ ])")
    return checked


def web_url(value: Any) -> str:
    """Check an http or https URL."""
    checked = line(value)
    try:
        parts = urlsplit(checked)
        valid = parts.scheme in {"http", "https"} and parts.hostname and " " not in checked
        _ = parts.port
    except ValueError:
        valid = False
    if not valid:
        raise problem(f"must be an http or https address, not {show(checked)}")
    return checked


def _parsed_by(parse: Callable[[str], object], words: str) -> Callable[[Any], str]:
    """Return a check for lines that `parse` accepts without a ValueError."""

    def check(value: Any) -> str:
        checked = line(value)
        try:
            parse(checked)
        except ValueError:
            raise problem(f"must be {words}, not {show(checked)}") from None
        return checked

    return check


ip_address = _parsed_by(ipaddress.ip_address, "an IP address")
cidr = _parsed_by(ipaddress.ip_interface, "an address such as 10.0.0.2/24")


def file_mode(value: Any) -> int:
    """Check a file mode: decimal as DeepSquare documents it, or octal with a leading zero (YAML 1.1)."""
    if isinstance(value, PlainText) and re.fullmatch(r"0o?[0-7]{3}", value):
        return int(str(value).replace("o", ""), 8)
    if type(value) is not int or not 0 <= value <= 511:
        raise problem(
            f"must be a whole number from 0 to 511 (decimal: 493 is 0755), not {show(value)}"
        )
    return value


def module_source(value: Any) -> str:
    """Check the source of a module: a git repository or a folder."""
    checked = line(value)
    if not _REMOTE_MODULE.fullmatch(checked) and not _LOCAL_MODULE.fullmatch(checked):
        raise problem(
            "must be HOST/OWNER/REPOSITORY[/FOLDER][@TAG or @COMMIT], or a folder that begins "
            f"with / or ./, not {show(checked)}"
        )
    return checked


def dependency(value: Any) -> str:
    """Check a dependency on other jobs."""
    checked = line(value)
    if not _DEPENDENCY.fullmatch(checked):
        raise problem(f"must be afterok:JOB, afterany:JOB or afternotok:JOB, not {show(checked)}")
    return checked


def notify_target(value: Any) -> str:
    """Check an e-mail address or the URL of a webhook."""
    checked = line(value)
    try:
        return parse_target(checked)
    except ValueError as error:
        raise problem(f"{error}, not {show(checked)}") from None


def condition(value: Any) -> str:
    """Check the expression of a bash test."""
    checked = text(value)
    if not checked.strip() or len(checked.encode()) > MAX_TEXT_BYTES:
        raise problem('must be a test of bash, such as: "$index" -gt 2')
    return checked


def env_list(value: Any) -> Any:
    """Convert a list of `key` and `value` to a mapping of variables; other values pass unchanged."""
    if not isinstance(value, list):
        return value
    variables: dict[Any, Any] = {}
    for index, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise problem(f"must be a mapping with key, value, not {show(entry)}", index)
        unknown = [key for key in entry if key not in {"key", "value"}]
        if unknown:
            raise problem("is an unknown key; a variable has key, value", index, unknown[0])
        for key in ("key", "value"):
            if key not in entry:
                raise problem("is missing", index, key)
        name = entry["key"]
        if not isinstance(name, str):
            raise problem(f"must be text, not {show(name)}", index, "key")
        if name in variables:
            raise problem(f"sets {show(name)} a second time", index)
        variables[str(name)] = entry["value"]
    return variables


def env_name(value: Any) -> str:
    """Check the name of an environment variable that a shell can export."""
    checked = text(value)
    if not _ENV_NAME.fullmatch(checked):
        raise problem(
            "is not a name of a variable: letters, digits and _, not beginning with a digit"
        )
    if checked.startswith(RESERVED_ENV_PREFIX):
        raise problem(
            f"can't be set: names that begin with {RESERVED_ENV_PREFIX} are reserved for the grid"
        )
    if checked in _REFUSED_ENV:
        raise problem(f"can't be set here: set it in the command, as in export {checked}=...")
    if checked in _READONLY_IN_BASH:
        raise problem("can't be set: bash reserves this variable")
    return checked


def affinity(value: Any) -> str:
    """Check one affinity, and return its canonical form."""
    checked = text(value)
    try:
        affinities = parse_uses(checked)
    except ValueError as error:
        raise problem(f"is not understood: {error}") from None
    if len(affinities) != 1 or not str(affinities[0]).isprintable():
        raise problem("must be one affinity, such as gpu.model=h100")
    if affinities[0].key.startswith(CONDITION_PREFIX):
        raise problem(
            f"can't be set: keys that begin with {CONDITION_PREFIX} are reserved for the grid"
        )
    return str(affinities[0])


def recipient(value: Any) -> str:
    """Check a public key of age, to which results are encrypted."""
    checked = line(value)
    try:
        x25519.Recipient.from_str(checked)
    except RecipientError:
        raise problem(f"must be a public key of age such as age1..., not {show(checked)}") from None
    return checked


def encrypted(value: Any) -> str:
    """Check encrypted data in base64."""
    checked = text(value)
    if not _BASE64.fullmatch(checked) or len(checked) > MAX_SECRETS_BYTES:
        raise problem(f"must be base64 of at most {MAX_SECRETS_BYTES:,} bytes")
    return checked


def objective(value: Any) -> Objective:
    """Check an objective: COST, TIME or ENERGY."""
    if isinstance(value, str) and value in Objective.__members__:
        return Objective[value]
    raise problem(f"must be COST, TIME or ENERGY, not {show(value)}")


@dataclass(frozen=True, slots=True)
class StartTime:
    """A chain time in seconds, or, if relative, seconds from the submission."""

    seconds: int
    relative: bool = False

    def at(self, now: int) -> int:
        """Return the chain time for a submission at chain time `now`."""
        return self.seconds + (now if self.relative else 0)


def amount(value: Any) -> int:
    """Check an escrow in credits, and return it in credit-wei."""
    written = text(value)
    try:
        parsed = parse_credits(written)
    except ValueError as error:
        raise problem(f"is not understood: {error}") from None
    return bounded_amount(parsed)


def bounded_amount(value: int) -> int:
    """Check that the contract can hold an escrow in credit-wei."""
    if not 0 < value <= AMOUNT_MAX:
        raise problem(f"must be more than 0 and at most {format_credits(AMOUNT_MAX)}")
    return value


def duration(value: Any) -> int:
    """Check a time limit, and return it in seconds."""
    if type(value) is int:
        return whole(1, UINT24_MAX)(value)
    if not isinstance(value, str):
        raise problem(f"must be seconds or a text such as 1h30m, not {show(value)}")
    try:
        return parse_duration(value)
    except ValueError as error:
        raise problem(str(error)) from None


def parse_duration(written: str) -> int:
    """Convert `90`, `90s`, `10m`, `1h30m`, `10:00` or `01:30:00` to seconds.

    Raises:
        ValueError: Another format, zero, or more than the contract can hold (about 194 days).
    """
    stripped = written.strip()
    match = next((match for form in _DURATIONS if (match := form.fullmatch(stripped))), None)
    if match is None or not stripped:
        raise ValueError(
            f"must be seconds or a text such as 90s, 10m, 1h30m, 2d or 01:30:00, not {show(written)}"
        )
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    total = (days * 24 + hours) * 3_600 + minutes * 60 + seconds
    if not 1 <= total <= UINT24_MAX:
        raise ValueError(f"must be from 1 to {UINT24_MAX} seconds, not {show(written)}")
    return total


def start_time(value: Any) -> StartTime:
    """Check a start time: an ISO 8601 date and time with a zone, or a duration from the submission."""
    if isinstance(value, StartTime):
        return value
    if isinstance(value, datetime) or (isinstance(value, str) and _DATE.match(value.strip())):
        try:
            parsed = datetime.fromisoformat(str(value).strip())
        except ValueError:
            parsed = None
        if parsed is None or parsed.tzinfo is None:
            raise problem(
                f"must be a date and time with a zone, such as 2030-01-31T08:00Z, not {show(value)}"
            )
        if parsed.timestamp() < 1:
            raise problem(f"is before 1970: {show(value)}")
        return StartTime(int(parsed.timestamp()))
    return StartTime(duration(value), relative=True)


def total_uses(values: list[str]) -> list[str]:
    """Check that affinities fit on chain when joined by commas."""
    if len(",".join(values).encode()) > MAX_USES_BYTES:
        raise problem(f"are longer than {MAX_USES_BYTES} bytes in total")
    return values
