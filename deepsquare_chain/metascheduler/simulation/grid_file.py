"""Reads the grid of a simulation from a YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deepsquare_chain.credits import CREDIT
from deepsquare_chain.job import HOUR, Hardware, Offer, Prices, Provider, ProviderStatus
from deepsquare_chain.metascheduler.eligibility import ProviderView
from deepsquare_chain.metascheduler.provider_labels import CARBON_LABEL, WATTS_LABEL
from deepsquare_chain.metascheduler.rules_file import read_yaml

#: Chain time until which all providers of a simulation are approved.
_APPROVED: Final = 2**60
_HINT: Final = "examples/grid.yaml shows a grid of eight clusters with every key."


class SimulatedProvider(BaseModel):
    """A cluster; memory in MB, prices in credits per hour, power in watts per busy CPU."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=80)
    nodes: int = Field(ge=1, le=100_000)
    cpus_per_node: int = Field(ge=1, le=65_535)
    mem_per_node: int = Field(default=1_000_000, ge=1, le=10**9)
    gpus_per_node: int = Field(default=0, ge=0, le=1_000)
    speed: float = Field(default=1.0, ge=0.001, le=1_000, allow_inf_nan=False)
    cpu_price: Decimal = Field(default=Decimal(1), ge=Decimal("0.000001"), le=1_000_000)
    gpu_price: Decimal = Field(default=Decimal(0), ge=0, le=1_000_000)
    mem_price: Decimal = Field(default=Decimal(0), ge=0, le=1_000_000)
    watts_per_cpu: float = Field(default=10.0, gt=0, le=100_000, allow_inf_nan=False)
    grams_per_kwh: float | None = Field(default=None, gt=0, le=10_000, allow_inf_nan=False)
    labels: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_memory_for_its_cpus(self) -> SimulatedProvider:
        if self.mem_per_node < self.cpus_per_node:
            raise ValueError("mem_per_node is in MB, and jobs need at least 1 MB per CPU")
        return self

    @property
    def cpus(self) -> int:
        """CPUs of the cluster."""
        return self.nodes * self.cpus_per_node


class _GridFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    providers: Annotated[tuple[SimulatedProvider, ...], Field(min_length=1, max_length=10_000)]


@dataclass(frozen=True, slots=True)
class SimulatedGrid:
    """The clusters of a grid in the order of the file; the first has id 1."""

    providers: tuple[SimulatedProvider, ...]

    @property
    def cpus(self) -> int:
        """CPUs of all clusters."""
        return sum(provider.cpus for provider in self.providers)

    @property
    def capacity(self) -> float:
        """Sum of CPUs x speed over all clusters."""
        return sum(provider.cpus * provider.speed for provider in self.providers)

    @property
    def largest(self) -> int:
        """CPUs of the largest cluster."""
        return max(provider.cpus for provider in self.providers)

    @property
    def memory_per_cpu(self) -> int:
        """MB per CPU of the largest cluster."""
        widest = max(self.providers, key=lambda provider: provider.cpus)
        return max(1, widest.mem_per_node // widest.cpus_per_node)

    @property
    def speeds(self) -> Sequence[float]:
        """Speeds of the clusters."""
        return [provider.speed for provider in self.providers]

    @property
    def price_of_work(self) -> float:
        """Mean credits per hour of a CPU at speed 1, if all CPUs are used alike."""
        return sum(float(p.cpu_price) * p.cpus for p in self.providers) / self.capacity

    @property
    def watts_of_work(self) -> float:
        """Mean watts of a CPU at speed 1, if all CPUs are used alike."""
        return sum(p.watts_per_cpu * p.cpus for p in self.providers) / self.capacity

    def views(self) -> tuple[ProviderView, ...]:
        """Return the planner's views of the clusters; labels hold their true speeds and watts."""
        return tuple(_view(number, provider) for number, provider in enumerate(self.providers, 1))


def read_grid(path: Path) -> SimulatedGrid:
    """Read the clusters of a simulation.

    Raises:
        UsageError: The file can't be read or is invalid; the message names the error.
    """
    return SimulatedGrid(read_yaml(path, _GridFile, content="the grid", hint=_HINT).providers)


def _view(number: int, cluster: SimulatedProvider) -> ProviderView:
    memory, gpus = cluster.nodes * cluster.mem_per_node, cluster.nodes * cluster.gpus_per_node
    labels = {"cpu.speed": f"{cluster.speed:.6f}", WATTS_LABEL: f"{cluster.watts_per_cpu:.6f}"}
    if cluster.grams_per_kwh is not None:
        labels[CARBON_LABEL] = f"{cluster.grams_per_kwh:.6f}"
    provider = Provider(
        id=number,
        account=f"0x{number:040x}",
        status=ProviderStatus.ACTIVE,
        approved_until=_APPROVED,
        version=1,
        pending_version=1,
        hardware=Hardware(
            cluster.nodes, cluster.cpus_per_node, cluster.mem_per_node, cluster.gpus_per_node
        ),
        offer=Offer(cluster.cpus, memory, gpus),
        prices=Prices(*map(_per_second, (cluster.cpu_price, cluster.gpu_price, cluster.mem_price))),
        labels=labels | cluster.labels,
    )
    return ProviderView(provider)


def _per_second(per_hour: Decimal) -> int:
    """Convert credits per hour to credit-wei per second."""
    return int(per_hour * CREDIT) // HOUR
