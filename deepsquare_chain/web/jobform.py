"""The job form: what somebody typed becomes a job file, judged as any other. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import yaml

from deepsquare_chain.errors import JobFileError
from deepsquare_chain.workflow import JobFile, parse_job_file

#: A form is for small things; larger definitions go by the command line.
MAX_DEFINITION: Final = 64_000
#: What messages call a job file of the editor.
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
    """The job that a form describes: its fields, or a whole job file in `file`.

    Raises:
        JobFileError: Naming what is wrong, in words of the form.
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
    """The fields of the form as a job file (YAML)."""
    return yaml.dump(_document(given), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def problems(error: JobFileError) -> list[tuple[int | None, str]]:
    """What is wrong with a job, each with its line where it has one."""
    found = []
    for line in error.message.splitlines():
        place = _PLACE.match(line)
        text = line[place.end() :] if place else line
        if text:
            found.append((int(place[2]) if place and place[2] else None, text))
    return found


def _has_file(given: Mapping[str, Any]) -> bool:
    return given.get("mode") == "file" or ("mode" not in given and bool(given.get("file")))


class _Dumper(yaml.SafeDumper):
    """Writes scripts as people do."""


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
        "uses": [each for each in re.split(r"[\s,]+", text("uses")) if each],
        "resources": {key: _number(text(name)) for name, key in _NUMBERS.items()},
        # A browser's text field ends lines as the web does; a shell does not.
        "steps": [{"run": {"command": str(given.get("script") or "").replace("\r\n", "\n")}}],
    }
    defaults = {"name": "", "retries": 0, "untilSpent": False, "interimPayments": False, "uses": []}
    return {key: value for key, value in document.items() if defaults.get(key) != value}


def _ticked(value: Any) -> bool:
    return value in {True, "on", "true"}


def _number(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else text


def _in_words_of_the_form(message: str) -> str:
    found = _PLACE.sub("", message)
    for key, label in _LABELS.items():
        found = found.replace(key, label)
    return "\n".join(line[:1].upper() + line[1:] for line in found.splitlines())
