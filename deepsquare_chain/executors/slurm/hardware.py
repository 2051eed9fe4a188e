"""The hardware of a cluster as the registry takes it: nodes that are all alike; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepsquare_chain.errors import UsageError
from deepsquare_chain.executors.slurm.parsing import SlurmNode
from deepsquare_chain.job import Hardware


@dataclass(frozen=True, slots=True)
class FoundHardware:
    """What can be registered; `left_out` names nodes that are down or smaller than the others."""

    hardware: Hardware
    left_out: tuple[str, ...]


def registered_hardware(nodes: Sequence[SlurmNode]) -> FoundHardware:
    """The largest hardware that nodes in service hold together.

    A registered provider has nodes of one size. The size is that of one of the nodes, and every
    node counts that has at least as much of everything: most CPUs in all, then GPUs, then memory.

    Raises:
        UsageError: No node is in service.
    """
    usable = [node for node in nodes if node.is_up and node.cpus and node.memory]
    if not usable:
        raise UsageError(
            "No node of the cluster is in service",
            hint="Look at `sinfo`, and at the partitions in executor_options.",
        )
    sizes = {(node.cpus, node.memory, node.gpus) for node in usable}
    best = max((_hardware(size, usable) for size in sizes), key=_worth)
    size = best.cpus_per_node, best.mem_per_node, best.gpus_per_node
    left_out = (node.name for node in nodes if node not in usable or not _holds(node, size))
    return FoundHardware(best, tuple(left_out))


def _hardware(size: tuple[int, int, int], nodes: Sequence[SlurmNode]) -> Hardware:
    return Hardware(sum(_holds(node, size) for node in nodes), *size)


def _holds(node: SlurmNode, size: tuple[int, int, int]) -> bool:
    cpus, memory, gpus = size
    return node.cpus >= cpus and node.memory >= memory and node.gpus >= gpus


def _worth(hardware: Hardware) -> tuple[int, int, int]:
    count = hardware.nodes
    return (
        count * hardware.cpus_per_node,
        count * hardware.gpus_per_node,
        count * hardware.mem_per_node,
    )
