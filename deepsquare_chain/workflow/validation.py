"""Validation of whole documents: messages with path and line, unknown keys, and rules between keys.

`schema` validates single values.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import shlex
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Final, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from deepsquare_chain.errors import JobFileError
from deepsquare_chain.workflow import checks
from deepsquare_chain.workflow.checks import show
from deepsquare_chain.workflow.schema import (
    ContainerSection,
    ForSection,
    InterfaceSection,
    JobFileDocument,
    Runnable,
    RunSection,
    StepSection,
    TransferSection,
)
from deepsquare_chain.workflow.steps import has_network, uses_entrypoint
from deepsquare_chain.workflow.yamltree import KeyPath

MAX_SHOWN_PROBLEMS: Final = 5
HINT: Final = "Correct the file; docs/jobs.md explains every key, examples/ shows working files."

#: A problem: the path of the value, and the reason.
Problem = tuple[KeyPath, str]

#: Keys of older versions of the format, by section and name.
_REPLACED: Final[Mapping[tuple[str, str], str]] = {
    ("ResourcesSection", "gpusPerTask"): (
        "is a key from before November 2023, and resources.gpus is missing: gpus counts the GPUs "
        "of the whole job; `deepsquare convert` rewrites it"
    ),
    ("ResourcesSection", "ntasks"): "is not a key of the format; use resources.tasks",
    ("RunSection", "mapRoot"): "was replaced by mapUid: 0; `deepsquare convert` rewrites it",
    ("ContainerSection", "pyxis"): "is an option of an older version; enroot is the default",
}

#: Words of other workflow formats and schedulers in lower case, with the key of the same meaning.
_SYNONYMS: Final[Mapping[str, str]] = {
    "affinities": "requirements",
    "constraint": "requirements",
    "cmd": "command",
    "cpus": "cpusPerTask",
    "cwd": "workDir",
    "mem": "memPerCpu",
    "memory": "memPerCpu",
    "mempertask": "memPerCpu",
    "needs": "dependsOn",
    "script": "command",
    "volumes": "mounts",
    "walltime": "timeLimit",
    "when": "if",
    "workingdir": "workDir",
}

#: The message for `resources.gpusPerTask` next to the current key.
_GPUS_TWICE: Final = (
    "is a key from before November 2023; remove it: resources.gpus counts the GPUs of the whole job"
)
_MESSAGES: Final = {"missing": "is missing", "too_short": "must have at least one entry"}


def format_path(path: KeyPath) -> str:
    """Format a path, such as `steps[0].run.command`."""
    spelled = ""
    for part in path:
        if isinstance(part, int):
            spelled += f"[{part}]"
        else:
            shown = part if part.isidentifier() and len(part) <= 60 else checks.show(part)
            spelled += f".{shown}" if spelled else shown
    return spelled or "the file"


def path_of(error: ErrorDetails) -> KeyPath:
    """Return the path of the invalid value."""
    below = error.get("ctx", {}).get("below", ())
    return (*(part for part in error["loc"] if part != "[key]"), *below)


def keys_of(section: type[BaseModel]) -> tuple[str, ...]:
    """Return the allowed keys of a section of a job file."""
    return tuple(children_by_key(section))


@cache
def children_by_key(section: type[BaseModel]) -> Mapping[str, type[BaseModel] | None]:
    """Map the keys of a section to the nested section of each key, or to None."""
    hidden = {"commit", "module"} if section.__name__ == "UseSection" else set()
    return {
        field.alias or name: _section_in(field.annotation)
        for name, field in section.model_fields.items()
        if name not in hidden
    }


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in get_args(annotation):
        section = _section_in(part)
        if section is not None:
            return section
    return None


def _section_at(root: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    section: type[BaseModel] | None = root
    for part in path:
        if section is None:
            return None
        if isinstance(part, str):
            section = children_by_key(section).get(part)
    return section


def _keys_to(section: type[BaseModel], key: str) -> tuple[str, ...] | None:
    """Return the keys from a section to the nearest nested section that has the key."""
    queue: deque[tuple[type[BaseModel], tuple[str, ...]]] = deque([(section, ())])
    seen = {section}
    while queue:
        current, names = queue.popleft()
        for name, child in children_by_key(current).items():
            if child is None or child in seen:
                continue
            seen.add(child)
            if key in children_by_key(child):
                return (*names, name)
            queue.append((child, (*names, name)))
    return None


def message_of(error: ErrorDetails, root: type[BaseModel], tree: Any) -> str:
    """Return the message of one problem in a tree of plain values, without its path."""
    path = path_of(error)
    match error["type"]:
        case "extra_forbidden":
            return _unknown_key_message(path, root, tree)
        case "model_type" | "model_attributes_type" | "dict_type":
            section = _section_at(root, path)
            keys = f" with {', '.join(keys_of(section))}" if section else ""
            return f"must be a mapping{keys}, not {checks.show(error['input'])}"
        case "list_type":
            return f"must be a list, not {checks.show(error['input'])}"
        case "too_long":
            return f"has more than {error['ctx']['max_length']} entries"
        case kind:
            return _MESSAGES.get(kind, error["msg"])


def _unknown_key_message(path: KeyPath, root: type[BaseModel], tree: Any) -> str:
    key, section = str(path[-1]), _section_at(root, path[:-1])
    if section is None:
        return "is an unknown key"
    replaced = _REPLACED.get((section.__name__, key))
    if replaced:
        is_twice = key == "gpusPerTask" and "gpus" in _value_at(tree, path[:-1])
        return _GPUS_TWICE if is_twice else replaced
    below = _keys_to(section, key)
    if below:
        return f"is an unknown key here; it belongs under {format_path((*path[:-1], *below))}"
    known = keys_of(section)
    by_lower = {name.lower().replace("_", ""): name for name in known}
    written = key.lower().replace("_", "")[:60]
    synonym = _SYNONYMS.get(written)
    close = difflib.get_close_matches(written, by_lower, n=1)
    if synonym in known or close:
        meant = synonym if synonym in known else by_lower[close[0]]
        return f"is an unknown key; did you mean {meant}?"
    elsewhere = _nearest_section(path, root)
    if elsewhere:
        return f"is an unknown key here; it belongs under {elsewhere}"
    section_name = format_path(path[:-1]) if len(path) > 1 else "a job file"
    return f"is an unknown key; {section_name} has {', '.join(known)}"


def _nearest_section(path: KeyPath, root: type[BaseModel]) -> str | None:
    """Return the section for the key at the end of a path: the nearest around it, or below those."""
    key = str(path[-1])
    for length in range(len(path) - 2, -1, -1):
        section = _section_at(root, path[:length])
        if section is None or isinstance(path[length], int):
            continue  # a list
        if key in children_by_key(section):
            return format_path(path[:length]) if length else "the top level"
        below = _keys_to(section, key)
        if below:
            return format_path((*path[:length], *below))
    return None


def _value_at(tree: Any, path: KeyPath) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def problems_of(error: ValidationError, root: type[BaseModel], tree: Any) -> Iterator[Problem]:
    """Yield path and message of each problem in a tree of plain values."""
    for details in error.errors(include_url=False):
        yield path_of(details), message_of(details, root, tree)


def job_file_error(
    source: str, problems: Iterable[tuple[int | None, str]], hint: str = HINT
) -> JobFileError:
    """Return the error for a file: one line per problem, at most `MAX_SHOWN_PROBLEMS`."""
    texts = [f"{source}:{line}: {text}" if line else f"{source}: {text}" for line, text in problems]
    more = len(texts) - MAX_SHOWN_PROBLEMS
    shown = texts[:MAX_SHOWN_PROBLEMS] + ([f"... and {more} more"] if more > 0 else [])
    return JobFileError("\n".join(shown), hint=hint)


def with_line(problem: Problem, lines: Mapping[KeyPath, int]) -> tuple[int | None, str]:
    """Return line and message of a problem; a missing key has the line of its section."""
    path, text = problem
    known_path = next((path[:n] for n in range(len(path), -1, -1) if path[:n] in lines), None)
    return (lines[known_path] if known_path is not None else None), f"{format_path(path)} {text}"


def drop_unknown(tree: Any) -> list[Problem]:
    """Remove unknown keys from a tree in place, and return them as problems."""
    dropped: list[Problem] = []
    while True:
        try:
            JobFileDocument.model_validate(tree, by_name=False, by_alias=True)
        except ValidationError as error:
            problems = error.errors(include_url=False)
            unknown = [details for details in problems if details["type"] == "extra_forbidden"]
            if not unknown:
                return dropped
            for details in unknown:
                path = path_of(details)
                dropped.append((path, message_of(details, JobFileDocument, tree)))
                del _value_at(tree, path[:-1])[path[-1]]
        else:
            return dropped


#: Maximum iterations of a parallel loop; each is a process of the job.
MAX_PARALLEL: Final = 1_024
#: Variables that the grid sets for the whole job.
GRID_ENV: Final = (
    *("NTASKS", "CPUS_PER_TASK", "MEM_PER_CPU", "GPUS_PER_TASK", "GPUS", "CPUS", "MEM"),
    "STORAGE_PATH",
)
#: A condition that is a whole command of a shell: [[ ... ]], [ ... ] or test ...
_SHELL_TEST: Final = re.compile(
    r"\[\[?\s|test\s+(?!(?:[=!]=?|=~|[<>]|-(?:eq|ne|lt|le|gt|ge|nt|ot|ef))\s)"
)
_ACTIONS: Final = ("run", "for", "launch", "use", "steps")


def broken_rules(document: Runnable, *, is_definition: bool = False) -> Iterator[Problem]:
    """Yield the violations of rules in a document whose single values are valid.

    A definition, other than a job file, may contain fetched modules.
    """
    return _Rules(document, is_definition=is_definition).check()


def warnings_of(document: Runnable) -> Iterator[Problem]:
    """Yield the keys that are valid but have no effect in this document."""
    if document.continuous_output_sync and (document.output is None or document.output.s3 is None):
        yield ("continuousOutputSync",), "has an effect only with output.s3"
    if document.input_mode is not None and document.input is None:
        yield ("inputMode",), "has no effect without input"
    if document.input and document.input.s3 and document.input.s3.delete_sync:
        yield ("input", "s3", "deleteSync"), "has an effect only for output"
    if "USER" in document.env:
        yield ("env", "USER"), "has no effect: the grid sets it; a step may, under run.env"
    for path, step in walk(document.steps):
        if step.for_ and not iterations(step.for_):
            hint = "; write increment: -1" if step.for_.range else ""
            yield (*path, "for"), f"has no iterations, so its steps never run{hint}"


def walk(
    steps: Sequence[StepSection], path: KeyPath = ("steps",)
) -> Iterator[tuple[KeyPath, StepSection]]:
    """Yield path and step of all steps, including nested ones."""
    for index, step in enumerate(steps):
        step_path = (*path, index)
        yield step_path, step
        for inner, below in nested_steps(step):
            yield from walk(below, (*step_path, *inner))


def nested_steps(step: StepSection) -> Iterator[tuple[KeyPath, Sequence[StepSection]]]:
    """Yield path and content of the lists of steps within a step."""
    if step.for_:
        yield ("for", "steps"), step.for_.steps
    if step.launch:
        yield ("launch", "steps"), step.launch.steps
    if step.use:
        yield ("use", "steps"), step.use.steps
        if step.use.module:
            yield ("use", "module", "steps"), step.use.module.steps
    if step.steps:
        yield ("steps",), step.steps
    yield ("catch",), step.catch
    yield ("finally",), step.finally_


def handle(name: str) -> str:
    """Normalise a handle for comparison; handles are case-insensitive."""
    return name.upper()


def iterations(loop: ForSection) -> int:
    """Return the number of iterations of a loop."""
    if loop.items is not None:
        return len(loop.items)
    if loop.range is None:
        return 0
    step = loop.range.increment or 1
    return max(0, (loop.range.end - loop.range.begin) // step + 1)


class _Rules:
    def __init__(self, document: Runnable, *, is_definition: bool) -> None:
        self._document = document
        self._is_definition = is_definition
        networks = reversed([*enumerate(document.virtual_networks)])
        #: Index by name; the first of equal names.
        self._networks: Mapping[str, int] = {network.name: index for index, network in networks}

    def check(self) -> Iterator[Problem]:
        document = self._document
        for name in document.env:
            if name in GRID_ENV:
                yield (
                    ("env", name),
                    "can't be set for the whole job: the grid sets it; a step may, under run.env",
                )
        for index, network in enumerate(document.virtual_networks):
            if self._networks[network.name] != index:
                yield ("virtualNetworks", index, "name"), f"{network.name!r} occurs twice"
        yield from _transfer(("input",), document.input)
        yield from _transfer(("output",), document.output)
        count = 0
        for path, step in walk(document.steps):
            count += 1
            yield from self._step(path, step)
        if count > checks.MAX_STEPS:
            yield ("steps",), f"have more than {checks.MAX_STEPS:,} steps in total"
        yield from _handles(document.steps, ("steps",), frozenset())

    def _step(self, path: KeyPath, step: StepSection) -> Iterator[Problem]:
        values = (step.run, step.for_, step.launch, step.use, step.steps)
        actions = [name for name, value in zip(_ACTIONS, values, strict=True) if value is not None]
        if not actions and not step.depends_on:
            yield path, "has nothing to run; give it one of run, for, launch, use, steps"
        if len(actions) > 1:
            yield path, f"has {' and '.join(actions)}; a step has one of {', '.join(_ACTIONS)}"
        if step.if_ is not None and not self._is_definition:
            yield from _condition((*path, "if"), step.if_)
        if step.run:
            yield from self._run((*path, "run"), step.run)
        if step.for_:
            yield from _loop((*path, "for"), step.for_)
        if step.use and not self._is_definition:
            for key, value in (("commit", step.use.commit), ("module", step.use.module)):
                if value is not None:
                    yield (
                        (*path, "use", key),
                        "is written when the job is submitted; pin a commit by source: ...@COMMIT",
                    )

    def _run(self, path: KeyPath, run: RunSection) -> Iterator[Problem]:
        container = run.container
        if not run.command.strip() and container is None:
            yield (*path, "command"), "must be a command, such as: echo hello"
        if run.shell == "ENTRYPOINT":
            if container is None:
                yield (*path, "shell"), "ENTRYPOINT needs a container"
            try:
                shlex.split(run.command)
            except ValueError:
                yield (*path, "command"), "has an unclosed quote"
        yield from self._step_resources(path, run)
        isolated = has_network(run)
        if run.custom_network_interfaces and not isolated:
            yield (
                (*path, "customNetworkInterfaces"),
                "need network: slirp4netns or pasta; the network of the host can't have interfaces",
            )
        if run.dns and not isolated:
            yield (*path, "dns"), "needs network: slirp4netns or pasta"
        for index, interface in enumerate(run.custom_network_interfaces):
            interface_path = (*path, "customNetworkInterfaces", index)
            yield from self._interface(interface_path, interface)
        if container:
            yield from _container_rules(path, run, container)

    def _step_resources(self, path: KeyPath, run: RunSection) -> Iterator[Problem]:
        resources, job = run.resources, self._document.resources
        if resources is None:
            return
        tasks = resources.tasks or 1
        cpus = tasks * (resources.cpus_per_task or job.cpus_per_task)
        job_cpus = job.tasks * job.cpus_per_task
        memory = cpus * (resources.mem_per_cpu or job.mem_per_cpu)
        for asked, has, unit in (
            (cpus, job_cpus, "CPUs"),
            (memory, job_cpus * job.mem_per_cpu, "MB of memory"),
            (tasks * (resources.gpus_per_task or 0), job.gpus, "GPUs"),
        ):
            if asked > has:
                yield (*path, "resources"), f"ask for {asked:,} {unit}; the job has {has:,}"

    def _interface(self, path: KeyPath, interface: InterfaceSection) -> Iterator[Problem]:
        kinds = (interface.wireguard, interface.bore, interface.vnet)
        if sum(kind is not None for kind in kinds) != 1:
            yield path, "must be one of wireguard, bore, vnet"
        bore = interface.bore
        if bore and bore.bore_address is None and bore.address is None:
            yield (*path, "bore"), "needs boreAddress, the host:port of the server"
        if bore and bore.bore_address and (bore.address or bore.port):
            yield (*path, "bore"), "has boreAddress and the deprecated address or port; keep one"
        vnet = interface.vnet
        if vnet and vnet.name not in self._networks:
            known = ", ".join(self._networks) or "none"
            yield (*path, "vnet", "name"), f"is not one of virtualNetworks ({known})"
        elif vnet:
            network = self._document.virtual_networks[self._networks[vnet.name]]
            yield from _vnet_address(
                (*path, "vnet", "address"), vnet.address, network.gateway_address
            )


def _vnet_address(path: KeyPath, address: str, gateway: str) -> Iterator[Problem]:
    """Yield whether an address is none of a virtual network, or that of its gateway."""
    hub, peer = ipaddress.ip_interface(gateway), ipaddress.ip_interface(address)
    if peer.ip not in hub.network:
        yield path, f"is not in the network {hub.network}"
    elif peer.ip == hub.ip:
        yield path, f"is the address of the network's gateway, {hub.ip}"


def _condition(path: KeyPath, test: str) -> Iterator[Problem]:
    """Yield what bash would refuse only when the job runs, or take as true."""
    stripped = test.strip()
    if _SHELL_TEST.match(stripped):
        yield path, f"must be the inside of bash's [[ ]], such as -f file, not {show(stripped)}"
    elif stripped.lower() in {"false", "no", "0"}:
        meaning = f"where a text that is not empty is true: {show(stripped)}"
        yield path, f"is always true in bash, {meaning}; write a test, such as: 1 -eq 2"
    elif "${{" in stripped:
        yield path, f"must be a test of bash, which has no ${{{{ }}}}, not {show(stripped)}"
    elif "\\" not in stripped:  # only there are quotes of bash different
        try:
            shlex.split(stripped)
        except ValueError:
            yield path, f"has an unclosed quote: {show(stripped)}"


def _transfer(path: KeyPath, transfer: TransferSection | None) -> Iterator[Problem]:
    if transfer and (transfer.http is None) == (transfer.s3 is None):
        yield path, "must have one of http, s3"


def _container_rules(
    path: KeyPath, run: RunSection, container: ContainerSection
) -> Iterator[Problem]:
    yield from _container((*path, "container"), container)
    if container.runtime == "podman" and run.custom_network_interfaces:
        yield (*path, "customNetworkInterfaces"), "can't be used with Podman; leave runtime out"
    if container.runtime == "charliecloud" and uses_entrypoint(run):
        yield (*path, "shell"), "Charliecloud has no entrypoints; choose a shell"
    if container.apptainer or container.deepsquare_hosted:
        for key, value in (("mapUid", run.map_uid), ("mapGid", run.map_gid)):
            if value:
                yield (*path, key), "can only be 0 with Apptainer"


def _container(path: KeyPath, container: ContainerSection) -> Iterator[Problem]:
    login = (container.username, container.password)
    if any(login) and not (all(login) and container.registry):
        yield path, "needs username, password and registry together for a login"
    is_apptainer = container.apptainer or container.deepsquare_hosted
    if is_apptainer and container.runtime not in {None, "apptainer"}:
        yield (*path, "runtime"), "contradicts apptainer: true"


def _loop(path: KeyPath, loop: ForSection) -> Iterator[Problem]:
    if (loop.range is None) == (loop.items is None):
        yield path, "must have one of range, items"
    count = iterations(loop)
    if loop.parallel and count > MAX_PARALLEL:
        yield path, f"has {count:,} parallel iterations; at most {MAX_PARALLEL:,} are allowed"


def _handles(
    steps: Sequence[StepSection], path: KeyPath, known: frozenset[str]
) -> Iterator[Problem]:
    """Yield dependencies on handles that no earlier step launches, and duplicate handles."""
    for index, step in enumerate(steps):
        step_path = (*path, index)
        for number, name in enumerate(step.depends_on):
            if handle(name) not in known:
                yield (
                    (*step_path, "dependsOn", number),
                    f"refers to a step that is not launched before this one: {name!r}",
                )
        for inner, below in nested_steps(step):
            yield from _handles(below, (*step_path, *inner), known)
        launch = step.launch
        if launch and launch.handle_name is not None:
            if handle(launch.handle_name) in known:
                yield (
                    (*step_path, "launch", "handleName"),
                    f"{launch.handle_name!r} is used twice; case does not matter",
                )
            known |= {handle(launch.handle_name)}
