"""Job files: a definition and the terms of its submission; conversion of older job files; modules.

Modules are reusable steps, copied into the definition of a job when it is submitted. A module.yaml
may include the steps of the job that uses it by `{{ .Step.Use.Steps | toYaml | nindent N }}`, and an
argument as a YAML value, in the forms of DeepSquare's modules. Other template expressions are
refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from deepsquare_chain.errors import JobFileError
from deepsquare_chain.job import (
    Conditions,
    JobFlags,
    Objective,
    Placement,
    Resources,
    Terms,
    parse_uses,
)
from deepsquare_chain.notification import Notify, parse_occasions
from deepsquare_chain.workflow import checks
from deepsquare_chain.workflow.abilities import needed_abilities, requirements
from deepsquare_chain.workflow.checks import StartTime
from deepsquare_chain.workflow.definition import MAX_BYTES, Definition, definition_of, from_document
from deepsquare_chain.workflow.schema import (
    ContainerSection,
    JobFileDocument,
    ModuleDocument,
    NotifySection,
    RunSection,
    StepSection,
)
from deepsquare_chain.workflow.validation import (
    Problem,
    broken_rules,
    drop_unknown,
    format_path,
    job_file_error,
    keys_of,
    problems_of,
    walk,
    warnings_of,
    with_line,
)
from deepsquare_chain.workflow.yamltree import KeyPath, Lines, PlainText, TreeError, read_tree

MAX_FILE_BYTES: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class JobFile:
    """A valid job file.

    `time_limit` is in seconds and `credits` in credit-wei; None means that the command line must
    give them. `uses` holds requirements on labels joined by commas: those of the file, and the
    abilities that the job needs. `warnings` report keys that have no effect. `depends_on` names
    the jobs after which this one runs, in the form of `--depends`. `notify` holds the targets that
    `notify run` notifies of the job. `start_after`, `start_before`, `patience` (in seconds),
    `preferences` and `placement` are conditions for the scheduler.
    """

    source: str
    definition: Definition
    name: str
    time_limit: int | None
    credits: int | None
    objective: Objective
    retries: int
    until_spent: bool
    interim_payments: bool
    uses: str
    warnings: tuple[str, ...] = ()
    depends_on: tuple[str, ...] = ()
    notify: Notify = field(default_factory=Notify)
    start_after: StartTime | None = None
    start_before: StartTime | None = None
    patience: int = 0
    preferences: tuple[str, ...] = ()
    placement: Placement | None = None

    def conditions(self, now: int, *, repeatable: bool = False) -> Conditions:
        """Return the conditions of a submission at chain time `now`, without dependencies.

        A `repeatable` submission may be retried later, and must be idempotent.

        Raises:
            JobFileError: The job could never start, or each retry would submit a different job.
        """
        times = [time for time in (self.start_after, self.start_before) if time is not None]
        if repeatable and any(time.relative for time in times):
            raise JobFileError(
                f"{self.source}: startAfter and startBefore are relative to the submission, so that a "
                "repetition would be another job",
                hint="Write a date and time, such as 2030-01-31T08:00Z, or submit without a key.",
            )
        after = self.start_after.at(now) if self.start_after else 0
        before = self.start_before.at(now) if self.start_before else 0
        if before and before <= max(after, 0 if repeatable else now):
            raise JobFileError(
                f"{self.source}: startBefore leaves no time to start",
                hint="Write a time after startAfter and after now, such as startBefore: 2h.",
            )
        return Conditions(
            start_after=after,
            start_before=before,
            patience=self.patience,
            placement=self.placement,
            preferences=parse_uses(",".join(self.preferences)),
        )

    def terms(self, *, credits: int | None = None, time_limit: int | None = None) -> Terms:
        """Return the terms to submit; arguments, in credit-wei and seconds, override the file.

        Raises:
            JobFileError: A value is given neither by the file nor by the argument, the contract
                can't hold it, or a module was not fetched.
        """
        for _, step in walk(self.definition.steps):
            if step.use and step.use.module is None:
                raise JobFileError(
                    f"{self.source}: the module {step.use.source} is not fetched",
                    hint="Submit the file with `deepsquare submit`, which fetches modules.",
                )
        amount = self.credits if credits is None else credits
        limit = self.time_limit if time_limit is None else time_limit
        if amount is None or limit is None:
            missing = [
                words
                for value, words in (
                    (amount, ("credits", 'credits: "1.5"', "--credits 1.5")),
                    (limit, ("timeLimit", "timeLimit: 10m", "--time-limit 10m")),
                )
                if value is None
            ]
            names, lines, options = zip(*missing, strict=True)
            verb = "is" if len(missing) == 1 else "are"
            raise JobFileError(
                f"{self.source}: {' and '.join(names)} {verb} missing",
                hint=f"Write {' and '.join(lines)} in the file, or give {' '.join(options)}.",
            )
        name = "credits" if credits is None else "the given credits"
        try:
            checks.bounded_amount(amount)
            name = "timeLimit"
            checks.duration(limit)
        except PydanticCustomError as error:
            raise JobFileError(f"{self.source}: {name} {error.message()}") from None
        return Terms(
            amount=amount,
            time_limit=limit,
            resources=self.definition.resources,
            retries=self.retries,
            flags=self._flags(),
            objective=self.objective,
            name=self.name,
            uses=self.uses,
        )

    def _flags(self) -> JobFlags:
        flags = JobFlags.NONE
        if self.until_spent:
            flags |= JobFlags.UNTIL_SPENT
        if self.interim_payments:
            flags |= JobFlags.INTERIM_PAYMENTS
        if self.uses:
            # The contract can't check labels, so no provider may take the job by itself.
            flags |= JobFlags.NO_SELF_SCHEDULING
        return flags


def _notify(section: NotifySection | None) -> Notify:
    if section is None:
        return Notify()
    return Notify(tuple(dict.fromkeys(section.to)), parse_occasions(section.on))


def load_job_file(path: str | Path, *, lenient: bool = False) -> JobFile:
    """Read and check a job file; `lenient` ignores unknown keys with a warning.

    Raises:
        JobFileError: The file can't be read or does not contain a valid job.
    """
    return parse_job_file(read_file(path), str(path), lenient=lenient)


def read_file(path: str | Path) -> bytes:
    """Read a job file, at most one byte more than the maximum size.

    Raises:
        JobFileError: The file can't be read.
    """
    try:
        with Path(path).open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise JobFileError(
            f"{path}: can't be read: {reason}", hint="Check the path of the job file."
        ) from None


def parse_job_file(text: bytes, source: str = "job file", *, lenient: bool = False) -> JobFile:
    """Check the bytes of a job file, YAML or JSON, that messages call `source`.

    `lenient` ignores unknown keys with a warning instead of refusing them.

    Raises:
        JobFileError: The job file is invalid; the message names each problem, with its line if known.
    """
    tree, lines = read_job_tree(text, source)
    if isinstance(tree, dict) and isinstance(tree.get("job"), dict) and len(tree) > 1:
        other = next(key for key in tree if key != "job")
        message = "is next to the key job; with that key, all other keys must be under it"
        raise job_file_error(source, [with_line(((other,), message), lines)])
    tree, lines = unwrap(tree, lines)
    warnings: list[Problem] = list(drop_unknown(tree)) if lenient else []
    document = _document(tree, lines, source)
    warnings += warnings_of(document)
    definition = from_document(document)
    if len(definition.to_bytes()) > MAX_BYTES:
        raise job_file_error(
            source, [(None, f"defines more than {MAX_BYTES:,} bytes")], "Shorten it."
        )
    located = [with_line(warning, lines) for warning in warnings]
    needed = requirements(needed_abilities(definition))
    all_uses = ",".join(dict.fromkeys([*document.uses, *document.requirements, *needed]))
    if len(all_uses.encode()) > checks.MAX_USES_BYTES:
        raise job_file_error(
            source,
            [(None, f"requirements and needed abilities exceed {checks.MAX_USES_BYTES} bytes")],
            "Shorten the requirements.",
        )
    return JobFile(
        source=source,
        definition=definition,
        name=document.name,
        time_limit=document.time_limit,
        credits=document.credits,
        objective=document.objective,
        retries=document.retries,
        until_spent=document.until_spent,
        interim_payments=document.interim_payments,
        uses=all_uses,
        depends_on=tuple(document.depends_on),
        notify=_notify(document.notify),
        start_after=document.start_after,
        start_before=document.start_before,
        patience=document.patience or 0,
        preferences=tuple(document.preferences),
        placement=None if document.placement is None else Placement(document.placement),
        warnings=tuple(_format_warning(source, warning) for warning in sorted(located, key=_line)),
    )


def read_job_tree(text: bytes, source: str) -> tuple[Any, Lines]:
    """Parse a job file to plain values and their line numbers.

    Raises:
        JobFileError: The file is too large, empty, not UTF-8 text, or not YAML.
    """
    if len(text) > MAX_FILE_BYTES:
        raise job_file_error(
            source,
            [(None, f"larger than {MAX_FILE_BYTES:,} bytes")],
            "Keep data out of the job file; let a step fetch it.",
        )
    try:
        tree, lines = read_tree(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise job_file_error(
            source, [(line, "not UTF-8 text")], "Save the file as UTF-8."
        ) from None
    except TreeError as error:
        _refuse_script(text, source)
        raise job_file_error(source, [(error.line, error.problem)]) from None
    if not isinstance(tree, dict):
        _refuse_script(text, source)
    if tree is None:
        raise job_file_error(
            source, [(None, "the file is empty")], "examples/ shows working job files."
        )
    return tree, lines


def _refuse_script(text: bytes, source: str) -> None:
    if text.startswith(b"#!"):
        raise job_file_error(
            source,
            [(1, "is a script, not a job file")],
            "Put its commands under steps; docs/jobs.md lists the equivalents of Slurm's options.",
        )


def unwrap(tree: Any, lines: Lines) -> tuple[Any, Lines]:
    """Return the content of the key `job` if it is the only key; otherwise the tree unchanged."""
    if not isinstance(tree, dict) or list(tree) != ["job"]:
        return tree, lines
    return tree["job"], {path[1:]: line for path, line in lines.items() if path[:1] == ("job",)}


def _document(tree: Any, lines: Lines, source: str) -> JobFileDocument:
    try:
        document = JobFileDocument.model_validate(tree, by_name=False, by_alias=True)
    except ValidationError as error:
        problems = list(problems_of(error, JobFileDocument, tree))
    else:
        problems = list(broken_rules(document))
        if document.uses and document.requirements:
            problems.append((("uses",), "is another name of requirements; use only one of them"))
    if problems:
        located = [with_line(problem, lines) for problem in problems]
        raise job_file_error(source, sorted(located, key=_line))
    return document


def _line(located: tuple[int | None, str]) -> int:
    return located[0] or 0


def _format_warning(source: str, located: tuple[int | None, str]) -> str:
    line, text = located
    return f"{source}:{line}: {text}" if line else f"{source}: {text}"


JOB_FILE: Final = """\
# A job of the grid. Check it with `deepsquare validate`, see its price with `deepsquare quote`,
# and submit it with `deepsquare submit --wait`.
name: my-job

# Resources of the whole job: tasks x cpusPerTask CPUs, with memPerCpu MB of memory per CPU.
resources: {tasks: 1, cpusPerTask: 1, memPerCpu: 64, gpus: 0}

# Maximum run time. The job pays for the time that it uses; the rest is refunded.
timeLimit: 10m

# Credits for escrow: the maximum cost of the job. They must cover the time limit.
credits: "1"

# COST (cheapest provider), TIME (fastest) or ENERGY (most frugal).
objective: COST

# Maximum number of restarts at other providers if its provider is lost, up to 5.
retries: 0

# true: keep running until the credits are spent, instead of stopping at the time limit.
untilSpent: false

# Labels that the provider must have, such as gpu.model=h100 or compute.gflops>=1000.
requirements: []

# Environment variables of all steps; a step can have its own under run.env.
env:
  GREETING: Hello from the grid

# Steps run in order, each in its own shell. The first step that fails ends the job.
steps:
  - name: greet
    run:
      command: echo "$GREETING, job $DEEPSQUARE_JOB_ID"
"""


#: Keys that belong under `run`, and not on a step; and under `container`, and not under `run`.
_RUN_KEYS: Final = frozenset(keys_of(RunSection)) - frozenset(keys_of(StepSection))
_CONTAINER_KEYS: Final = frozenset(keys_of(ContainerSection)) - frozenset(keys_of(RunSection))


def convert(tree: Any) -> list[str]:
    """Rewrite the plain values of a job file in place; return one line per change.

    Old keys are replaced by the current ones, and keys of `run` that are set on the step are moved
    into `run`. Ambiguous cases are left unchanged.
    """
    if not isinstance(tree, dict):
        return []
    changes = list(_convert_resources(tree))
    for path, step in _steps_of(tree.get("steps"), ("steps",)):
        changes += _convert_step(path, step)
    return changes


def dump(tree: Any, text: str) -> str:
    """Format plain values as a job file, below the leading comments of the original text."""
    head = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        head.append(line)
    body = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return "\n".join([*head, body])


def _convert_resources(tree: dict[str, Any]) -> Iterator[str]:
    resources = tree.get("resources")
    if not isinstance(resources, dict):
        return
    if "ntasks" in resources and "tasks" not in resources:
        resources["tasks"] = resources.pop("ntasks")
        yield "resources.ntasks is now resources.tasks"
    per_task, tasks = resources.get("gpusPerTask"), resources.get("tasks", 1)
    if type(per_task) is int and type(tasks) is int and "gpus" not in resources:
        del resources["gpusPerTask"]
        resources["gpus"] = per_task * tasks
        yield f"resources.gpusPerTask is now resources.gpus: {per_task * tasks}, of the whole job"
    elif type(per_task) is int and resources.get("gpus") == per_task * tasks:
        del resources["gpusPerTask"]
        yield "resources.gpusPerTask is removed; resources.gpus says the same"


def _steps_of(steps: Any, path: KeyPath) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    """Yield path and plain values of all steps, each before the steps within it."""
    if not isinstance(steps, list):
        return
    for index, step in enumerate(steps):
        if not isinstance(step, dict):
            continue
        step_path = (*path, index)
        yield step_path, step
        for key in ("steps", "catch", "finally"):
            yield from _steps_of(step.get(key), (*step_path, key))
        for key in ("for", "launch", "use"):
            inner = step.get(key)
            if isinstance(inner, dict):
                yield from _steps_of(inner.get("steps"), (*step_path, key, "steps"))


def _convert_step(path: KeyPath, step: dict[str, Any]) -> Iterator[str]:
    if "command" in step:
        step.setdefault("run", {})
    run = step.get("run")
    if not isinstance(run, dict):
        return
    yield from _move(path, step, _RUN_KEYS, "run")
    if "image" in run:
        run.setdefault("container", {})
    yield from _move((*path, "run"), run, _CONTAINER_KEYS, "container")
    if run.get("mapRoot") is True and "mapUid" not in run:
        del run["mapRoot"]
        run["mapUid"] = run["mapGid"] = 0
        yield f"{format_path((*path, 'run', 'mapRoot'))} is now mapUid: 0 and mapGid: 0"
    interfaces = run.get("customNetworkInterfaces")
    for index, interface in enumerate(interfaces if isinstance(interfaces, list) else []):
        yield from _convert_bore(
            (*path, "run", "customNetworkInterfaces", index, "bore"), interface
        )


def _move(
    path: KeyPath, section: dict[str, Any], keys: Collection[str], name: str
) -> Iterator[str]:
    """Move keys of a section into its section `name`, which does not have them."""
    target = section.get(name)
    if not isinstance(target, dict):
        return
    for key in [key for key in section if key in keys]:
        if key not in target:
            target[key] = section.pop(key)
            yield f"{format_path((*path, key))} is now {format_path((*path, name, key))}"
        elif section[key] is None:
            del section[key]
            yield f"{format_path((*path, key))} is removed; it has no value"


def _convert_bore(path: KeyPath, interface: Any) -> Iterator[str]:
    bore = interface.get("bore") if isinstance(interface, dict) else None
    if isinstance(bore, dict) and {"address", "port"} <= bore.keys() and "boreAddress" not in bore:
        bore["boreAddress"] = f"{bore.pop('address')}:{bore.pop('port')}"
        yield f"{format_path(path)}: address and port are now boreAddress"


class _Dumper(yaml.SafeDumper):
    """Writes text without quotes if the original had none, and commands as block scalars."""

    def ignore_aliases(self, _data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


def _represent_plain(dumper: yaml.SafeDumper, value: PlainText) -> yaml.ScalarNode:
    if "\n" in value:
        return _represent_text(dumper, value)
    tag = dumper.resolve(yaml.ScalarNode, str(value), (True, False))  # type: ignore[no-untyped-call]
    return dumper.represent_scalar(tag, str(value))


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(PlainText, _represent_plain)


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
    """Return the job file with its modules, fetched by their sources, in the definition.

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
    for path, step in _steps_of(steps, ("steps",)):
        use = step.get("use")
        if use is None or "module" in use:
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
