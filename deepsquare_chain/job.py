"""The data types of the grid: jobs, providers, and the requirements of jobs.

Units: credit-wei, seconds of chain time, MB. The enums have the names and numbers of the contracts.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from enum import IntEnum, IntFlag, StrEnum
from types import MappingProxyType
from typing import Final


class JobStatus(IntEnum):
    """The status of a job; NONE means that no such job exists."""

    NONE = 0
    PENDING = 1
    META_SCHEDULED = 2
    SCHEDULED = 3
    RUNNING = 4
    CANCELLED = 5
    FINISHED = 6
    FAILED = 7
    OUT_OF_CREDITS = 8
    PANICKED = 9

    @property
    def is_live(self) -> bool:
        """Whether the job holds escrow and can still change its status."""
        return JobStatus.PENDING <= self <= JobStatus.RUNNING

    @property
    def is_final(self) -> bool:
        """Whether the job has ended; its record no longer changes."""
        return self >= JobStatus.CANCELLED

    @property
    def is_reported(self) -> bool:
        """Whether the job ended with a provider's report of its run."""
        return self in {JobStatus.FINISHED, JobStatus.FAILED, JobStatus.OUT_OF_CREDITS}

    @property
    def is_assigned(self) -> bool:
        """Whether the job is assigned to a provider now."""
        return JobStatus.META_SCHEDULED <= self <= JobStatus.RUNNING

    @property
    def meaning(self) -> str:
        """A description of the status for people, one line."""
        return _MEANINGS[self]


_MEANINGS: Final[Mapping[JobStatus, str]] = {
    JobStatus.NONE: "no such job",
    JobStatus.PENDING: "waiting for a provider",
    JobStatus.META_SCHEDULED: "assigned to a cluster",
    JobStatus.SCHEDULED: "queued by the cluster",
    JobStatus.RUNNING: "running",
    JobStatus.CANCELLED: "cancelled",
    JobStatus.FINISHED: "completed successfully",
    JobStatus.FAILED: "ended with an error",
    JobStatus.OUT_OF_CREDITS: "time limit or credits used up",
    JobStatus.PANICKED: "killed or lost, refunded",
}

#: Bytes of one MB, the unit of memory in offers and jobs, as Slurm counts it.
MEGABYTE: Final = 1024 * 1024
#: Seconds of an hour and of a day.
HOUR: Final = 3_600
DAY: Final = 24 * HOUR
_ENDS: Final = frozenset({JobStatus.CANCELLED, JobStatus.PANICKED})

#: Allowed transitions: twelve of the life cycle, three of redistribution, and NONE to PENDING.
TRANSITIONS: Final[Mapping[JobStatus, frozenset[JobStatus]]] = MappingProxyType(
    {
        JobStatus.NONE: frozenset({JobStatus.PENDING}),
        JobStatus.PENDING: frozenset({JobStatus.META_SCHEDULED, JobStatus.CANCELLED}),
        JobStatus.META_SCHEDULED: _ENDS | {JobStatus.SCHEDULED, JobStatus.PENDING},
        JobStatus.SCHEDULED: _ENDS | {JobStatus.RUNNING, JobStatus.PENDING},
        JobStatus.RUNNING: _ENDS | {JobStatus.FINISHED, JobStatus.FAILED, JobStatus.OUT_OF_CREDITS},
        JobStatus.CANCELLED: frozenset(),
        JobStatus.FINISHED: frozenset(),
        JobStatus.FAILED: frozenset(),
        JobStatus.OUT_OF_CREDITS: frozenset(),
        JobStatus.PANICKED: frozenset(),
    }
)


def can_transition(before: JobStatus, after: JobStatus) -> bool:
    """Whether `TRANSITIONS` allows this transition; submission is NONE to PENDING."""
    return after in TRANSITIONS[before]


class Objective(IntEnum):
    """What the scheduler minimises when it chooses among eligible providers."""

    COST = 0
    TIME = 1
    ENERGY = 2


class JobFlags(IntFlag):
    """Options of a job, with the numbers of the contract.

    Only the contract sets SUCCESSOR, on a job that continues another one.
    """

    NONE = 0
    UNTIL_SPENT = 1
    NO_SELF_SCHEDULING = 2
    INTERIM_PAYMENTS = 4
    SUCCESSOR = 128


class ProviderStatus(IntEnum):
    """The status of a provider; NONE means that it never registered."""

    NONE = 0
    WAITING_APPROVAL = 1
    ACTIVE = 2
    DRAINING = 3
    BANNED = 4


@dataclass(frozen=True, slots=True)
class Resources:
    """Resources that a job occupies while it is assigned.

    `mem_per_cpu` is in MB; `gpus` is the number of GPUs of the whole job.
    """

    tasks: int
    cpus_per_task: int
    mem_per_cpu: int
    gpus: int

    @property
    def cpus(self) -> int:
        """CPUs of the whole job."""
        return self.tasks * self.cpus_per_task

    @property
    def memory(self) -> int:
        """Memory of the whole job, in MB."""
        return self.cpus * self.mem_per_cpu


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms of a submission, without the definition.

    `amount` is the escrow in credit-wei and `time_limit` is in seconds. `uses` holds affinities
    joined by commas.
    """

    amount: int
    time_limit: int
    resources: Resources
    retries: int
    flags: JobFlags
    objective: Objective
    name: str
    uses: str

    @property
    def until_spent(self) -> bool:
        """Whether the job runs until its credits are spent instead of stopping at its limit."""
        return JobFlags.UNTIL_SPENT in self.flags


@dataclass(frozen=True, slots=True)
class Job:
    """A job record on chain.

    `since` is the chain time of the last transition; while RUNNING, the time up to which the run
    is billed (its start, or its last interim payment). `escrow` is the amount held while the job is
    live; once it is final, the amount that its settlement consumed, without earlier interim
    payments. `time_limit` is in seconds, less the seconds billed by interim payments. `rate` is in
    credit-wei per second, zero until the job is assigned. `retry_of` is the ID of the predecessor,
    or zero.
    """

    id: int
    customer: str
    status: JobStatus
    since: int
    provider_id: int
    resources: Resources
    retries_left: int
    flags: JobFlags
    escrow: int
    rate: int
    time_limit: int
    fee_bps: int
    definition: bytes
    retry_of: int

    @property
    def until_spent(self) -> bool:
        """Whether the job runs until its credits are spent instead of stopping at its limit."""
        return JobFlags.UNTIL_SPENT in self.flags

    @property
    def allows_interim_payments(self) -> bool:
        """Whether the provider may collect payments while the job runs."""
        return JobFlags.INTERIM_PAYMENTS in self.flags


@dataclass(frozen=True, slots=True)
class Hardware:
    """The hardware of a cluster; `mem_per_node` is in MB."""

    nodes: int
    cpus_per_node: int
    mem_per_node: int
    gpus_per_node: int


@dataclass(frozen=True, slots=True)
class Offer:
    """The part of its hardware that a provider offers to the grid now; `memory` is in MB."""

    cpus: int
    memory: int
    gpus: int


@dataclass(frozen=True, slots=True)
class Load:
    """Resources that the assigned jobs of a provider occupy; `memory` is in MB."""

    cpus: int = 0
    memory: int = 0
    gpus: int = 0

    @classmethod
    def of(cls, resources: Resources) -> Load:
        """Return the load of one job."""
        return cls(resources.cpus, resources.memory, resources.gpus)

    def __add__(self, other: Load) -> Load:
        return Load(self.cpus + other.cpus, self.memory + other.memory, self.gpus + other.gpus)

    def __sub__(self, other: Load) -> Load:
        return Load(self.cpus - other.cpus, self.memory - other.memory, self.gpus - other.gpus)


NO_LOAD: Final = Load()


@dataclass(frozen=True, slots=True)
class Prices:
    """Prices in credit-wei per second, per CPU, per GPU and per MB."""

    cpu: int
    gpu: int
    mem: int


@dataclass(frozen=True, slots=True)
class Provider:
    """A provider's record in the registry; `approved_until` is chain time in seconds."""

    id: int
    account: str
    status: ProviderStatus
    approved_until: int
    version: int
    pending_version: int
    hardware: Hardware
    offer: Offer
    prices: Prices
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Affinity:
    """One requirement on a provider's labels, such as `compute.gflops>=1000`."""

    key: str
    op: str
    value: str

    def __str__(self) -> str:
        return f"{self.key}{self.op}{self.value}"


#: Prefix of the keys in `uses` that are conditions for the scheduler, not requirements on labels.
CONDITION_PREFIX: Final = "deepsquare."
_ARRAY: Final = f"{CONDITION_PREFIX}array"
_PREFERENCE: Final = f"{CONDITION_PREFIX}prefer"
_PLACEMENT: Final = f"{CONDITION_PREFIX}placement"
#: Conditions with a number as value: name in `uses`, and attribute of `Conditions`.
_NUMBERS: Final[Mapping[str, str]] = MappingProxyType(
    {"begin": "start_after", "deadline": "start_before", "patience": "patience"}
)
#: Maximum number of preferences of a job.
MAX_PREFERENCES: Final = 4
#: Maximum number of jobs that a condition or a command may name.
MAX_LISTED_JOBS: Final = 10_000


class Dependency(StrEnum):
    """How another job must have ended before this one may be assigned, as in Slurm."""

    AFTER_OK = "afterok"  # it ended as FINISHED
    AFTER_ANY = "afterany"  # it ended, with any status
    AFTER_NOT_OK = "afternotok"  # it ended with a status other than FINISHED

    def holds(self, end: JobStatus) -> bool:
        """Whether a job with this final status meets the dependency.

        If it does not, the dependency can never be met.
        """
        if self is Dependency.AFTER_ANY:
            return True
        return (end is JobStatus.FINISHED) is (self is Dependency.AFTER_OK)


class Placement(StrEnum):
    """How a job relates to the other jobs of its customer that are assigned to providers."""

    SPREAD = "spread"  # where the fewest of them are
    PACK = "pack"  # where the most of them are


@dataclass(frozen=True, slots=True)
class Conditions:
    """Conditions of a customer, given in `uses`, for when a job may be assigned.

    `after` holds the kind and the job ID of each dependency. `array` is the ID of the submission
    that the job belongs to, or empty. At most `throttle` of its jobs are assigned at once; zero
    means no limit. `start_after` and `start_before` are chain times, zero for none; the latter does
    not apply to retried jobs. `patience` is in seconds: the job waits for a provider whose cost of
    the work, by the job's objective, is at most 1.1 + wait / patience times the lowest; zero accepts
    any cost. `preferences` are affinities that rank the providers that can start the job, the most
    important one first; `placement` ranks those that meet them alike.
    """

    after: tuple[tuple[Dependency, int], ...] = ()
    array: str = ""
    throttle: int = 0
    start_after: int = 0
    start_before: int = 0
    patience: int = 0
    preferences: tuple[Affinity, ...] = ()
    placement: Placement | None = None

    def accepted_cost(self, waited: int) -> float:
        """Return the highest accepted cost of the work, in multiples of the lowest cost."""
        return _PATIENT_FROM + waited / self.patience if self.patience else math.inf

    def to_uses(self) -> str:
        """Format the conditions for `uses`."""
        parts = [
            f"{CONDITION_PREFIX}{kind}={spell_ids(number for value, number in self.after if value is kind)}"
            for kind in Dependency
            if any(value is kind for value, _ in self.after)
        ]
        if self.array:
            parts.append(f"{_ARRAY}={self.array}" + (f"%{self.throttle}" if self.throttle else ""))
        numbers = ((name, getattr(self, attribute)) for name, attribute in _NUMBERS.items())
        parts += (f"{CONDITION_PREFIX}{name}={number}" for name, number in numbers if number)
        parts += (f"{_PREFERENCE}={value}" for value in self.preferences)
        if self.placement is not None:
            parts.append(f"{_PLACEMENT}={self.placement}")
        return ",".join(parts)


def parse_conditions(uses: str) -> Conditions:
    """Parse the conditions in `uses`; requirements on labels are ignored.

    Raises:
        ValueError: A condition is invalid; the message names it.
    """
    after: list[tuple[Dependency, int]] = []
    preferences: list[Affinity] = []
    numbers: dict[str, int] = {}
    placement: Placement | None = None
    array, throttle = "", 0
    for affinity in parse_uses(uses):
        if not affinity.key.startswith(CONDITION_PREFIX):
            continue
        name = affinity.key.removeprefix(CONDITION_PREFIX)
        array_match = _ARRAY_VALUE.fullmatch(affinity.value)
        if affinity.op == "=" and name in set(Dependency):
            after += ((Dependency(name), number) for number in parse_ids(affinity.value, ":"))
        elif affinity.op == "=" and affinity.key == _ARRAY and array_match:
            array, throttle = array_match[1], int(array_match[2] or 0)
        elif affinity.op == "=" and name in _NUMBERS and _SECONDS.fullmatch(affinity.value):
            numbers[_NUMBERS[name]] = int(affinity.value)
        elif affinity.op == "=" and affinity.key == _PREFERENCE:
            preferences += parse_uses(affinity.value)
        elif affinity.op == "=" and affinity.key == _PLACEMENT and affinity.value in set(Placement):
            placement = Placement(affinity.value)
        else:
            raise ValueError(f"{str(affinity)[:80]!r} is not a condition of a job")
    if len(preferences) > MAX_PREFERENCES:
        raise ValueError(f"a job has at most {MAX_PREFERENCES} preferences")
    return Conditions(
        tuple(after),
        array,
        throttle,
        preferences=tuple(preferences),
        placement=placement,
        **numbers,
    )


def parse_ids(text: str, separator: str = ",") -> list[int]:
    """Parse numbers and ranges, such as `3,7-9`.

    Raises:
        ValueError: A part is not a number or range, or there are more than `MAX_LISTED_JOBS`.
    """
    numbers: list[int] = []
    for part in text.split(separator):
        ends = _ID_RANGE.fullmatch(part.strip())
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if not 0 <= last - first < MAX_LISTED_JOBS - len(numbers):
            raise ValueError(
                f"{part[:40]!r} is not a number or a range such as 3-7, or names more than "
                f"{MAX_LISTED_JOBS}"
            )
        numbers += range(first, last + 1)
    return numbers


def spell_ids(numbers: Iterable[int]) -> str:
    """Format job IDs in a short form: `3:7-9`."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ":".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)


_ID_RANGE: Final = re.compile(r"([0-9]{1,19})(?:-([0-9]{1,19}))?")
#: Cost of the work that a job with patience accepts immediately, in multiples of the lowest.
_PATIENT_FROM: Final = 1.1
_SECONDS: Final = re.compile(r"[1-9][0-9]{0,11}")
_ARRAY_VALUE: Final = re.compile(r"(sub-[0-9a-f]{8})(?:%([1-9][0-9]{0,4}))?")
#: The format of submission IDs.
SUBMISSION_ID: Final = re.compile(r"sub-[0-9a-f]{8}")

# A value can't begin with an operator, so that `a==b` is an error.
_AFFINITY: Final = re.compile(
    r"(?P<key>[A-Za-z0-9][A-Za-z0-9._/-]*)\s*"
    r"(?P<op>:in:|!=|<=|>=|=|<|>)\s*"
    r"(?P<value>[^\s=<>!,\x00-\x1f\x7f][^,\x00-\x1f\x7f]*)"
)
_NUMBER: Final = re.compile(r"[+-]?[0-9]{1,40}(\.[0-9]{1,40})?([eE][+-]?[0-9]{1,3})?")
_ORDER: Final[Mapping[str, Callable[[Decimal, Decimal], bool]]] = MappingProxyType(
    {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
)


def parse_uses(text: str) -> tuple[Affinity, ...]:
    """Parse affinities joined by commas; an empty text gives an empty tuple.

    Raises:
        ValueError: A part is not of the form `key operator value`; the message names it.
    """
    if not text.strip():
        return ()
    return tuple(_parse_affinity(part) for part in text.split(","))


def _parse_affinity(part: str) -> Affinity:
    match = _AFFINITY.fullmatch(part.strip())
    if match is None:
        raise ValueError(
            f"{part.strip()[:80]!r} is not an affinity: write key, one of = != < <= > >= :in:, and a value"
        )
    return Affinity(match["key"], match["op"], match["value"].strip())


def matches(affinities: Iterable[Affinity], labels: Mapping[str, str]) -> bool:
    """Whether a provider's labels meet all affinities.

    A missing label meets `!=` only. `<`, `<=`, `>` and `>=` compare numbers, and are not met if a
    side is not a number. The value of `:in:` lists alternatives, as in `eu|ch`.
    """
    return not unmet(affinities, labels)


def unmet(affinities: Iterable[Affinity], labels: Mapping[str, str]) -> tuple[Affinity, ...]:
    """Return the affinities that a provider's labels do not meet; see `matches`."""
    return tuple(
        affinity for affinity in affinities if not _meets(affinity, labels.get(affinity.key))
    )


def _meets(affinity: Affinity, label: str | None) -> bool:
    if affinity.key.startswith(CONDITION_PREFIX):
        return True  # the scheduler checks conditions; they do not concern labels
    if label is None or affinity.op == "!=":
        return affinity.op == "!=" and label != affinity.value
    if affinity.op == "=":
        return label == affinity.value
    if affinity.op == ":in:":
        return label in affinity.value.split("|")
    compare = _ORDER.get(affinity.op)
    if compare is None or not _NUMBER.fullmatch(label) or not _NUMBER.fullmatch(affinity.value):
        return False
    return compare(Decimal(label), Decimal(affinity.value))
