"""Modules: reusable steps, copied into the definition of a job when it is submitted. Pure.

A module.yaml may include the steps of the job that uses it by
`{{ .Step.Use.Steps | toYaml | nindent N }}`, and an argument as a YAML value, in the forms of
DeepSquare's modules. Other template expressions are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import yaml
from pydantic import ValidationError

from deepsquare_chain.errors import JobFileError
from deepsquare_chain.job import Resources
from deepsquare_chain.workflow.abilities import needed_abilities, requirements
from deepsquare_chain.workflow.definition import MAX_BYTES, Definition, definition_of
from deepsquare_chain.workflow.jobfile import JobFile, read_job_tree
from deepsquare_chain.workflow.schema import ModuleDocument
from deepsquare_chain.workflow.validation import (
    format_path,
    job_file_error,
    problems_of,
    walk,
    with_line,
)
from deepsquare_chain.workflow.yamltree import KeyPath

#: Maximum nesting of modules that use modules.
_MAX_DEPTH: Final = 8
_STEPS_EXPRESSION: Final = re.compile(
    r"[ \t]*\n?[ \t]*\{\{-?\s*\.Step\.Use\.Steps\s*\|\s*toYaml\s*\|\s*n?indent\s+(\d{1,2})\s*-?\}\}"
)

#: The value of one argument, or a default if there are no arguments, in place of a YAML value.
_ARGUMENT_EXPRESSION: Final = re.compile(
    r"\{\{\s*if \.Step\.Use\.Args\s*\}\}\{\{\s*range \.Step\.Use\.Args\s*\}\}"
    r"\{\{\s*if eq \.Key \"(\w+)\"\s*\}\}\{\{\s*\.Value\s*\}\}\{\{\s*end\s*\}\}\{\{\s*end\s*\}\}"
    r"\{\{\s*else\s*\}\}([^{}\n]*)\{\{\s*end\s*\}\}"
)


@dataclass(frozen=True, slots=True)
class FetchedModule:
    """The text of a module.yaml, and its commit."""

    text: bytes
    commit: str


Fetch = Callable[[str], FetchedModule]


def uses_modules(definition: Definition) -> bool:
    """Whether a step uses a module that has not been fetched into the definition."""
    return any(step.use and step.use.module is None for _, step in walk(definition.steps))


def resolve_modules(job: JobFile, fetch: Fetch) -> JobFile:
    """Return the job file with its modules in the definition.

    Args:
        job: The parsed job file.
        fetch: Fetches a module by its source.

    Raises:
        JobFileError: A module can't be fetched, is not valid, or does not fit the job.
    """
    if not uses_modules(job.definition):
        return job
    document = job.definition.document()
    _resolve(document["steps"], job.source, job.definition.resources, fetch, 0)
    definition = definition_of(document, job.source)
    if len(definition.to_bytes()) > MAX_BYTES:
        raise JobFileError(
            f"{job.source}: defines more than {MAX_BYTES:,} bytes with its modules",
            hint="Use fewer or smaller modules.",
        )
    uses = [requirement for requirement in job.uses.split(",") if requirement]
    needed = requirements(needed_abilities(definition))
    return replace(job, definition=definition, uses=",".join(dict.fromkeys([*uses, *needed])))


def _resolve(
    steps: Sequence[dict[str, Any]], source: str, job: Resources, fetch: Fetch, depth: int
) -> None:
    """Resolve the modules of steps in place. `source` names the file of the steps in messages."""
    if depth > _MAX_DEPTH:
        raise JobFileError(
            f"Modules use modules deeper than {_MAX_DEPTH} levels",
            hint="Check for a module that uses itself.",
        )
    for path, step in _uses(steps, ("steps",)):
        use = step["use"]
        if "module" in use:
            continue
        # Resolve these steps first: the module includes them, if it takes steps.
        _resolve(use.get("steps", []), source, job, fetch, depth + 1)
        try:
            module, commit = _module(use, job, fetch)
        except JobFileError as error:
            user = f"{source}: {format_path((*path, 'use'))} uses this module"
            raise JobFileError(f"{error}\n{user}", hint=error.hint) from None
        _resolve(module["steps"], f"module {use['source']}", job, fetch, depth + 1)
        use.pop("steps", None)
        use["commit"], use["module"] = commit, module


def _uses(
    steps: Sequence[dict[str, Any]], path: KeyPath
) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    for index, step in enumerate(steps):
        step_path = (*path, index)
        if "use" in step:
            yield step_path, step
        for name in ("", "for", "launch"):
            holder, holder_path = (
                (step.get(name, {}), (*step_path, name)) if name else (step, step_path)
            )
            for key in ("steps", "catch", "finally"):
                yield from _uses(holder.get(key, []), (*holder_path, key))


def _module(use: Mapping[str, Any], job: Resources, fetch: Fetch) -> tuple[dict[str, Any], str]:
    name = f"module {use['source']}"
    fetched = fetch(use["source"])
    document = parse_module(_expand_template(fetched.text, use, name), name)
    _check_resources(document, job, name)
    inputs = {item.key: item.default for item in document.inputs}
    for key in use.get("args", {}):
        if key not in inputs:
            raise JobFileError(
                f"{name} has no input {key!r}",
                hint=f"Its inputs are {', '.join(inputs) or 'none'}.",
            )
    module = {
        "env": inputs | use.get("args", {}),
        "outputs": [output.key for output in document.outputs],
        "steps": [step.model_dump(by_alias=True, exclude_defaults=True) for step in document.steps],
    }
    return {key: value for key, value in module.items() if value}, fetched.commit


def parse_module(text: bytes, name: str) -> ModuleDocument:
    """Parse a module.yaml.

    Raises:
        JobFileError: The module is invalid; the message names each problem with its line.
    """
    tree, lines = read_job_tree(text, name)
    try:
        return ModuleDocument.model_validate(tree, by_name=False, by_alias=True)
    except ValidationError as error:
        problems = problems_of(error, ModuleDocument, tree)
        raise job_file_error(
            name,
            (with_line(problem, lines) for problem in problems),
            "Ask the author of the module to correct it.",
        ) from None


def _expand_template(text: bytes, use: Mapping[str, Any], name: str) -> bytes:
    """Fill the steps and arguments of the job into the template of a module."""
    steps, args = use.get("steps", []), use.get("args", {})

    def argument(match: re.Match[str]) -> str:
        return json.dumps(args.get(match[1], match[2]))

    def steps_yaml(match: re.Match[str]) -> str:
        if not steps:
            return ""
        margin = " " * int(match[1])
        lines = yaml.safe_dump(list(steps), sort_keys=False, allow_unicode=True).splitlines()
        return "\n" + "\n".join(f"{margin}{line}" for line in lines)

    whole = _ARGUMENT_EXPRESSION.sub(argument, text.decode("utf-8", "replace"))
    filled, count = _STEPS_EXPRESSION.subn(steps_yaml, whole)
    if steps and not count:
        raise JobFileError(f"{name} does not accept steps", hint="Remove use.steps.")
    for number, line in enumerate(whole.splitlines(), 1):
        if "{{" in _STEPS_EXPRESSION.sub("", line) and not line.lstrip().startswith("#"):
            raise JobFileError(
                f"{name}:{number}: contains a template expression that is not supported",
                hint="Modules of this kind can't be used here; put its steps into the job file.",
            )
    return filled.encode()


def _check_resources(document: ModuleDocument, job: Resources, name: str) -> None:
    least = document.minimum_resources
    for key, needed, available in (
        ("tasks", least.tasks, job.tasks),
        ("cpusPerTask", least.cpus_per_task, job.cpus_per_task),
        ("memPerCpu", least.mem_per_cpu, job.mem_per_cpu),
        ("gpus", max(least.gpus, least.gpus_per_task * least.tasks), job.gpus),
    ):
        if available < needed:
            raise JobFileError(
                f"{name} needs resources.{key} of {needed:,}, and the job has {available:,}",
                hint=f"Raise resources.{key} of the job.",
            )
