"""Abilities: features that a job needs beyond a shell and files, as requirements on labels.

A provider's daemon publishes a label for each ability that it has tested. The scheduler assigns a
job only to providers whose labels match its requirements.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Final

from deepsquare_chain.workflow.definition import Definition
from deepsquare_chain.workflow.schema import ContainerSection, RunSection
from deepsquare_chain.workflow.steps import has_network, uses_entrypoint
from deepsquare_chain.workflow.validation import walk

#: Prefix of the labels of abilities, such as `ability.podman=yes`.
LABEL_PREFIX: Final = "ability."
_YES: Final = "yes"

#: All abilities, with the feature that each provides to jobs.
ABILITIES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "container": "containers, in any runtime",
        "apptainer": "containers in Apptainer",
        "charliecloud": "containers in Charliecloud",
        "enroot": "containers in Enroot",
        "podman": "containers in Podman",
        "hosted-images": "images that DeepSquare hosts",
        "internet": "connections to other machines",
        "s3": "S3 transfers (s5cmd)",
        "tasks": "steps of several tasks (srun or mpirun)",
        "mpi.pmix_v4": "MPI with PMIx 4",
        "mpi.pmi2": "MPI with PMI-2",
        "netns": "network namespaces of containers (slirp4netns or pasta)",
        "netns.host": "network namespaces of steps without a container",
        "netns.interfaces": "network interfaces of containers",
        "userns": "user namespaces (mapUid, mapGid)",
        "bore": "bore tunnels",
        "vnet": "virtual networks",
        "wireguard": "WireGuard interfaces",
        "x11": "X11",
    }
)
#: Container runtimes in the order of preference, for jobs that do not name one.
RUNTIMES: Final = ("enroot", "podman", "charliecloud", "apptainer")


def label_of(ability: str) -> tuple[str, str]:
    """Return key and value of an ability's label."""
    return f"{LABEL_PREFIX}{ability}", _YES


def needed_abilities(definition: Definition) -> tuple[str, ...]:
    """Return the abilities that a definition needs, in alphabetical order."""
    return tuple(sorted(set(_needed(definition))))


def requirements(abilities: Iterable[str]) -> tuple[str, ...]:
    """Convert abilities to requirements on labels."""
    return tuple("=".join(label_of(ability)) for ability in abilities)


def _needed(definition: Definition) -> Iterator[str]:
    for transfer in (definition.input, definition.output):
        if transfer is not None:
            yield "internet"
            if transfer.s3 is not None:
                yield "s3"
    for _, step in walk(definition.steps):
        if step.run:
            yield from _of_run(step.run)


def _of_run(run: RunSection) -> Iterator[str]:
    if run.container:
        yield from _of_container(run, run.container)
    if run.resources and (run.resources.tasks or 1) > 1:
        yield "tasks"
    if run.mpi in {"pmix_v4", "pmi2"}:
        yield f"mpi.{run.mpi}"
    if has_network(run):
        yield _namespace(run)
    if run.map_uid is not None or run.map_gid is not None:
        yield "userns"
    for interface in run.custom_network_interfaces:
        if interface.bore:
            yield from ("bore", "internet")
        if interface.vnet:
            yield "vnet"
        if interface.wireguard:
            yield "wireguard"
            if any(peer.endpoint for peer in interface.wireguard.peers):
                yield "internet"


def _namespace(run: RunSection) -> str:
    if run.container is None:
        return "netns.host"
    return "netns.interfaces" if run.custom_network_interfaces else "netns"


def _of_container(run: RunSection, container: ContainerSection) -> Iterator[str]:
    yield required_runtime(run, container) or "container"
    if container.deepsquare_hosted:
        yield "hosted-images"
    elif not container.image.startswith("/"):
        yield "internet"
    if container.x11:
        yield "x11"


def required_runtime(run: RunSection, container: ContainerSection) -> str | None:
    """Return the container runtime that a step needs; None if any is suitable."""
    if container.apptainer or container.deepsquare_hosted:
        return "apptainer"
    if container.runtime is None and uses_entrypoint(run):
        # Charliecloud has no entrypoints, and Podman no custom network interfaces.
        return "enroot" if run.custom_network_interfaces else "podman"
    return container.runtime
