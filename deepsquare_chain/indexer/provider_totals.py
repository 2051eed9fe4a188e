"""Running totals of a provider, updated with each event. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from deepsquare_chain.audit.entries import ProviderEntry
from deepsquare_chain.job import JobStatus, Resources

_ENDS: Final = {each: each.name.lower() for each in JobStatus if each.is_final}


@dataclass(slots=True)
class ProviderTotals:
    """Totals of a provider up to `time`.

    `cpu_seconds` are the used CPU-seconds, `offered_seconds` the offered ones. The `_assigned`
    fields are its load on chain (memory in MB), the `_busy` fields the part used by running jobs.
    """

    time: int = 0
    assigned: int = 0
    started: int = 0
    returned: int = 0
    finished: int = 0
    failed: int = 0
    out_of_credits: int = 0
    cancelled: int = 0
    panicked: int = 0
    live: int = 0
    running: int = 0
    cpus_busy: int = 0
    gpus_busy: int = 0
    cpus_offered: int = 0
    cpus_assigned: int = 0
    memory_assigned: int = 0
    gpus_assigned: int = 0
    busy_seconds: int = 0
    earned: int = 0
    cpu_seconds: int = 0
    offered_seconds: int = 0

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> ProviderTotals:
        """Return the totals in a row of `provider_figures`."""
        return cls(**{field.name: row[field.name] for field in fields(cls)})

    def values(self) -> dict[str, Any]:
        """Return the values of a row of `provider_figures`, without account and block."""
        return asdict(self)

    def pass_time(self, now: int) -> None:
        """Add the CPU-seconds that were used and offered since the last update."""
        self.cpu_seconds += self.cpus_busy * (now - self.time)
        self.offered_seconds += self.cpus_offered * (now - self.time)
        self.time = now

    def move(self, before: JobStatus, after: JobStatus, resources: Resources) -> None:
        """Apply a transition of one of its jobs."""
        if after is JobStatus.META_SCHEDULED:
            self.assigned += 1
            self._load(1, resources)
        elif before.is_assigned and not after.is_assigned:
            self._load(-1, resources)
        if JobStatus.RUNNING in {before, after}:
            sign = 1 if after is JobStatus.RUNNING else -1
            self.running += sign
            self.cpus_busy += sign * resources.cpus
            self.gpus_busy += sign * resources.gpus
        if after is JobStatus.RUNNING:
            self.started += 1
        elif after is JobStatus.PENDING:
            self.returned += 1
        elif after.is_final:
            name = _ENDS[after]
            setattr(self, name, getattr(self, name) + 1)

    def _load(self, sign: int, resources: Resources) -> None:
        self.live += sign
        self.cpus_assigned += sign * resources.cpus
        self.memory_assigned += sign * resources.memory
        self.gpus_assigned += sign * resources.gpus

    def settle(self, seconds: int, paid: int) -> None:
        """Apply a payment for one of its jobs."""
        self.busy_seconds += seconds
        self.earned += paid

    def offer(self, entry: ProviderEntry) -> None:
        """Apply a change of its offer or status. A draining provider still counts as offering."""
        approved = entry.version > 0 and not entry.banned
        self.cpus_offered = entry.offer.cpus if approved else 0
