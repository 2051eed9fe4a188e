"""The job form: what somebody typed becomes a job file, judged as any other. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from deepsquare_chain.errors import JobFileError
from deepsquare_chain.workflow import JobFile, parse_job_file

#: A form is for small things; larger definitions go by the command line.
MAX_DEFINITION: Final = 64_000
_SOURCE: Final = "form"
_PLACE: Final = re.compile(rf"^{_SOURCE}(:\d+)?: ", re.MULTILINE)
_NUMBERS: Final = {
    "tasks": "tasks",
    "cpus_per_task": "cpusPerTask",
    "mem_per_cpu": "memPerCpu",
    "gpus": "gpus",
}
_LABELS: Final = {
    "resources.memPerCpu": "memory per CPU",
    "resources.cpusPerTask": "cpus a task",
    "resources.tasks": "tasks",
    "resources.gpus": "gpus",
    "steps[0].run.command": "script",
    "timeLimit": "time limit",
}


def read_form(given: Mapping[str, Any]) -> JobFile:
    """The job that a form describes: its fields, or a whole job file in `file`.

    Raises:
        JobFileError: Naming what is wrong, in words of the form.
    """
    file = given.get("file")
    text = str(file) if file else json.dumps(_document(given), ensure_ascii=False)
    if len(text.encode("utf-8", "replace")) > MAX_DEFINITION:
        raise JobFileError(
            f"The job is larger than {MAX_DEFINITION:,} bytes",
            hint="Submit it with `deepsquare submit FILE`.",
        )
    try:
        job = parse_job_file(text.encode("utf-8", "replace"), "job file" if file else _SOURCE)
    except JobFileError as error:
        if file:
            raise
        raise JobFileError(_in_words_of_the_form(error.message), hint="Correct it above.") from None
    if job.depends_on:
        raise JobFileError(
            "A job that depends on others can't be submitted by this form",
            hint="Submit it with `deepsquare submit FILE`.",
        )
    return job


def _document(given: Mapping[str, Any]) -> dict[str, Any]:
    def text(name: str) -> str:
        return str(given.get(name) or "").strip()

    return {
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
        "steps": [
            {"name": "", "run": {"command": str(given.get("script") or "").replace("\r\n", "\n")}}
        ],
    }


def _ticked(value: Any) -> bool:
    return value in {True, "on", "true"}


def _number(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else text


def _in_words_of_the_form(message: str) -> str:
    found = _PLACE.sub("", message)
    for key, label in _LABELS.items():
        found = found.replace(key, label)
    return found[:1].upper() + found[1:]
