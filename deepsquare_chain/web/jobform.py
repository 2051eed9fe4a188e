"""The job form: converts its fields to a job file, which is validated as usual. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import yaml

from deepsquare_chain.errors import JobFileError
from deepsquare_chain.workflow import JobFile, parse_job_file

#: Largest definition in bytes; larger ones are submitted with the command line.
MAX_DEFINITION: Final = 64_000
#: Name of the editor's job file in messages.
SOURCE: Final = "job file"
_FORM: Final = "form"
_PLACE: Final = re.compile(rf"^(?:{SOURCE}|{_FORM})(:(\d+))?: ", re.MULTILINE)
_NUMBERS: Final = {
    "tasks": "tasks",
    "cpus_per_task": "cpusPerTask",
    "mem_per_cpu": "memPerCpu",
    "gpus": "gpus",
}
_LABELS: Final = {
    "resources.memPerCpu": "memory per CPU",
    "resources.cpusPerTask": "CPUs per task",
    "resources.tasks": "tasks",
    "resources.gpus": "GPUs",
    "steps[0].run.command": "script",
    "timeLimit": "time limit",
}


def read_form(given: Mapping[str, Any]) -> JobFile:
    """Return the job of a form: its fields, or a whole job file in `file`.

    Raises:
        JobFileError: The job is invalid; the message uses the labels of the form.
    """
    file = _has_file(given)
    text = str(given.get("file") or "") if file else form_as_file(given)
    if len(text.encode("utf-8", "replace")) > MAX_DEFINITION:
        raise JobFileError(
            f"The job is larger than {MAX_DEFINITION:,} bytes",
            hint="Submit it with `deepsquare submit FILE`.",
        )
    try:
        job = parse_job_file(text.encode("utf-8", "replace"), SOURCE if file else _FORM)
    except JobFileError as error:
        if file:
            raise
        raise JobFileError(_in_words_of_the_form(error.message), hint="Correct it above.") from None
    return job


def form_as_file(given: Mapping[str, Any]) -> str:
    """Convert the fields of the form to a job file (YAML)."""
    return yaml.dump(_document(given), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def problems(error: JobFileError) -> list[tuple[int | None, str]]:
    """Split an error into problems, each with its line number or None."""
    result = []
    for line in error.message.splitlines():
        match = _PLACE.match(line)
        text = line[match.end() :] if match else line
        if text:
            result.append((int(match[2]) if match and match[2] else None, text))
    return result


def _has_file(given: Mapping[str, Any]) -> bool:
    return given.get("mode") == "file" or ("mode" not in given and bool(given.get("file")))


class _Dumper(yaml.SafeDumper):
    """Writes multi-line strings, such as scripts, as block scalars."""


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _block)


def _document(given: Mapping[str, Any]) -> dict[str, Any]:
    def text(name: str) -> str:
        return str(given.get(name) or "").strip()

    document = {
        "name": text("name"),
        "credits": text("credits"),
        "timeLimit": text("time_limit"),
        "objective": text("objective").upper() or "COST",
        "retries": _number(text("retries") or "0"),
        "untilSpent": _ticked(given.get("until_spent")),
        "interimPayments": _ticked(given.get("interim_payments")),
        "uses": [use for use in re.split(r"[\s,]+", text("uses")) if use],
        "resources": {key: _number(text(name)) for name, key in _NUMBERS.items()},
        # Browsers submit CRLF line ends; shells need LF.
        "steps": [{"run": {"command": str(given.get("script") or "").replace("\r\n", "\n")}}],
    }
    defaults = {"name": "", "retries": 0, "untilSpent": False, "interimPayments": False, "uses": []}
    return {key: value for key, value in document.items() if defaults.get(key) != value}


def _ticked(value: Any) -> bool:
    return value is True or value in ("on", "true")  # JSON bodies hold unhashable values too


def _number(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else text


def _in_words_of_the_form(message: str) -> str:
    text = _PLACE.sub("", message)
    for key, label in _LABELS.items():
        text = text.replace(key, label)
    return "\n".join(line[:1].upper() + line[1:] for line in text.splitlines())
