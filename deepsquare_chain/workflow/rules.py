"""Rules that involve several keys of a job. Each violation is reported with a path and a reason."""

from __future__ import annotations

import ipaddress
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from deepsquare_chain.workflow import checks
from deepsquare_chain.workflow.checks import show
from deepsquare_chain.workflow.containers import uses_entrypoint
from deepsquare_chain.workflow.networks import has_network
from deepsquare_chain.workflow.problems import Problem
from deepsquare_chain.workflow.schema import (
    ContainerSection,
    ForSection,
    InterfaceSection,
    Runnable,
    RunSection,
    StepSection,
    TransferSection,
)
from deepsquare_chain.workflow.yamltree import Path

#: Maximum rounds of a parallel loop; each is a process of the job.
MAX_PARALLEL: Final = 1_024
#: Variables that the grid sets for the whole job.
GRID_ENV: Final = (
    "NTASKS",
    "CPUS_PER_TASK",
    "MEM_PER_CPU",
    "GPUS_PER_TASK",
    "GPUS",
    "CPUS",
    "MEM",
    "STORAGE_PATH",
)
#: A condition that is a whole command of a shell: [[ ... ]], [ ... ] or test ...
_BRACKETS: Final = re.compile(
    r"\[\[?\s|test\s+(?!(?:[=!]=?|=~|[<>]|-(?:eq|ne|lt|le|gt|ge|nt|ot|ef))\s)"
)
_ACTIONS: Final = ("run", "for", "launch", "use", "steps")


def broken_rules(document: Runnable, *, is_definition: bool = False) -> Iterator[Problem]:
    """Yield the violations of rules in a document whose single values are valid.

    Args:
        document: A job file or a definition.
        is_definition: Whether the document may contain fetched modules.
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
    for path, step in walk(document.steps):
        if step.for_ and not rounds(step.for_):
            hint = "; write increment: -1" if step.for_.range else ""
            yield (*path, "for"), f"has no round, so its steps never run{hint}"


def walk(
    steps: Sequence[StepSection], path: Path = ("steps",)
) -> Iterator[tuple[Path, StepSection]]:
    """Yield path and step of all steps, including nested ones."""
    for index, step in enumerate(steps):
        step_path = (*path, index)
        yield step_path, step
        for inner, below in inner_steps(step):
            yield from walk(below, (*step_path, *inner))


def inner_steps(step: StepSection) -> Iterator[tuple[Path, Sequence[StepSection]]]:
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


def rounds(loop: ForSection) -> int:
    """Return the number of rounds of a loop."""
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
        self._networks: Mapping[str, int] = {
            network.name: index for index, network in enumerate(document.virtual_networks)
        }

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

    def _step(self, path: Path, step: StepSection) -> Iterator[Problem]:
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

    def _run(self, path: Path, run: RunSection) -> Iterator[Problem]:
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
            yield from self._interface(interface_path, interface, run)
        if container:
            yield from _contained(path, run, container)

    def _step_resources(self, path: Path, run: RunSection) -> Iterator[Problem]:
        resources, job = run.resources, self._document.resources
        if resources is None:
            return
        tasks = resources.tasks or 1
        cpus = resources.cpus_per_task or job.cpus_per_task
        resources_path = (*path, "resources")
        if tasks * cpus > job.tasks * job.cpus_per_task:
            yield (
                resources_path,
                f"ask for {tasks * cpus:,} CPUs of {job.tasks * job.cpus_per_task:,}",
            )
        memory = tasks * cpus * (resources.mem_per_cpu or job.mem_per_cpu)
        paid = job.tasks * job.cpus_per_task * job.mem_per_cpu
        if memory > paid:
            yield resources_path, f"ask for {memory:,} MB of memory of {paid:,}"
        if tasks * (resources.gpus_per_task or 0) > job.gpus:
            yield (
                resources_path,
                f"ask for {tasks * (resources.gpus_per_task or 0):,} GPUs of {job.gpus:,}",
            )

    def _interface(
        self, path: Path, interface: InterfaceSection, run: RunSection
    ) -> Iterator[Problem]:
        sections = [
            section
            for section in (interface.wireguard, interface.bore, interface.vnet)
            if section is not None
        ]
        if len(sections) != 1:
            yield path, "must be one of wireguard, bore, vnet"
        bore = interface.bore
        if bore and bore.bore_address is None and bore.address is None:
            yield (*path, "bore"), "needs boreAddress, the host:port of the server"
        if bore and bore.bore_address and (bore.address or bore.port):
            yield (*path, "bore"), "has boreAddress and the deprecated address or port; keep one"
        if interface.wireguard and run.map_uid != 0:
            yield (*path, "wireguard"), "needs mapUid: 0 in the same run"
        vnet = interface.vnet
        if vnet and vnet.name not in self._networks:
            known = ", ".join(self._networks) or "none"
            yield (*path, "vnet", "name"), f"is not one of virtualNetworks ({known})"
        elif vnet:
            network = self._document.virtual_networks[self._networks[vnet.name]]
            yield from _member((*path, "vnet", "address"), vnet.address, network.gateway_address)


def _member(path: Path, address: str, gateway: str) -> Iterator[Problem]:
    """Yield whether an address is none of a virtual network, or that of its gateway."""
    hub, peer = ipaddress.ip_interface(gateway), ipaddress.ip_interface(address)
    if peer.ip not in hub.network:
        yield path, f"is not in the network {hub.network}"
    elif peer.ip == hub.ip:
        yield path, f"is the address of the network's gateway, {hub.ip}"


def _condition(path: Path, test: str) -> Iterator[Problem]:
    """Yield what bash would refuse only when the job runs, or take as true."""
    stripped = test.strip()
    if _BRACKETS.match(stripped):
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


def _transfer(path: Path, transfer: TransferSection | None) -> Iterator[Problem]:
    if transfer and (transfer.http is None) == (transfer.s3 is None):
        yield path, "must have one of http, s3"


def _contained(path: Path, run: RunSection, container: ContainerSection) -> Iterator[Problem]:
    yield from _container((*path, "container"), container)
    if container.runtime == "podman" and run.custom_network_interfaces:
        yield (*path, "customNetworkInterfaces"), "can't be used with Podman; leave runtime out"
    if container.runtime == "charliecloud" and uses_entrypoint(run):
        yield (*path, "shell"), "Charliecloud has no entrypoints; choose a shell"
    if container.apptainer or container.deepsquare_hosted:
        for key, value in (("mapUid", run.map_uid), ("mapGid", run.map_gid)):
            if value:
                yield (*path, key), "can only be 0 with Apptainer"


def _container(path: Path, container: ContainerSection) -> Iterator[Problem]:
    login = (container.username, container.password)
    if any(login) and not (all(login) and container.registry):
        yield path, "needs username, password and registry together for a login"
    if container.runtime not in {None, "apptainer"} and (
        container.apptainer or container.deepsquare_hosted
    ):
        yield (*path, "runtime"), "contradicts apptainer: true"


def _loop(path: Path, loop: ForSection) -> Iterator[Problem]:
    if (loop.range is None) == (loop.items is None):
        yield path, "must have one of range, items"
    if loop.parallel and rounds(loop) > MAX_PARALLEL:
        yield path, f"has {rounds(loop):,} parallel rounds; at most {MAX_PARALLEL:,} are allowed"


def _handles(steps: Sequence[StepSection], path: Path, known: frozenset[str]) -> Iterator[Problem]:
    """Yield dependencies on handles that no earlier step launches, and duplicate handles."""
    for index, step in enumerate(steps):
        step_path = (*path, index)
        for number, name in enumerate(step.depends_on):
            if handle(name) not in known:
                yield (
                    (*step_path, "dependsOn", number),
                    f"refers to a step that is not launched before this one: {name!r}",
                )
        for inner, below in inner_steps(step):
            yield from _handles(below, (*step_path, *inner), known)
        launch = step.launch
        if launch and launch.handle_name is not None:
            if handle(launch.handle_name) in known:
                yield (
                    (*step_path, "launch", "handleName"),
                    f"{launch.handle_name!r} is used twice; case does not matter",
                )
            known |= {handle(launch.handle_name)}
