"""Events of the contracts as frozen dataclasses, and decoding of logs to them, by topic.

All code works with these classes instead of raw logs; they have the contracts' fields in their order.
`before` and `after` are the contracts' `from` and `to`. Amounts are in credit-wei, times in seconds of
chain time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, get_type_hints

from eth_utils.crypto import keccak

from deepsquare_chain.chain.bindings.abi import (
    Abi,
    AbiError,
    checksummed,
    decode_values,
    interfaces,
    signature_of,
)
from deepsquare_chain.chain.bindings.records import from_word, parse_labels, read_terms
from deepsquare_chain.chain.bindings.reverts import selector_name
from deepsquare_chain.job import Hardware, JobStatus, Offer, Prices, Terms


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Position of an event on the chain; `address` is the contract that emitted it."""

    block_number: int = 0
    block_hash: str = ""
    tx_hash: str = ""
    log_index: int = 0
    address: str = ""

    @property
    def position(self) -> tuple[int, int]:
        """Block number and log index, the sort key in chain order."""
        return self.block_number, self.log_index


# -- MetaScheduler: jobs


@dataclass(frozen=True, slots=True)
class JobSubmitted(Event):
    """A customer submitted a job and paid `terms.amount` into escrow.

    The terms' `name` and `uses` are contained in this event only.
    """

    job_id: int
    customer: str
    definition: bytes
    terms: Terms


@dataclass(frozen=True, slots=True)
class JobTransition(Event):
    """A job changed its status; `provider` is the zero address while none is assigned."""

    job_id: int
    customer: str
    provider: str
    before: JobStatus
    after: JobStatus


@dataclass(frozen=True, slots=True)
class JobPriced(Event):
    """The rate and the fee of a job were fixed at its assignment."""

    job_id: int
    provider: str
    rate: int
    fee_bps: int


@dataclass(frozen=True, slots=True)
class JobToppedUp(Event):
    """The escrow of a job was raised; `escrow` and `time_limit` are the new values."""

    job_id: int
    payer: str
    amount: int
    escrow: int
    time_limit: int


@dataclass(frozen=True, slots=True)
class JobSettled(Event):
    """A job was settled: `paid` to the provider, `fee` to the treasury, the rest refunded."""

    job_id: int
    provider: str
    customer: str
    billed_seconds: int
    paid: int
    fee: int
    refunded: int


@dataclass(frozen=True, slots=True)
class JobCollected(Event):
    """An interim payment of a running job; `escrow` and `time_limit` are what remains."""

    job_id: int
    provider: str
    customer: str
    billed_seconds: int
    paid: int
    fee: int
    escrow: int
    time_limit: int


@dataclass(frozen=True, slots=True)
class JobRetried(Event):
    """A job is retried: its escrow moved to a successor job, without payment or refund."""

    job_id: int
    successor: int
    escrow: int


@dataclass(frozen=True, slots=True)
class JobResult(Event):
    """A provider's report of a job's end."""

    job_id: int
    exit_code: int
    result: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class JobRequeued(Event):
    """A job was returned to PENDING."""

    job_id: int
    by: str
    reason: str


@dataclass(frozen=True, slots=True)
class JobPanicked(Event):
    """A job was moved to PANICKED."""

    job_id: int
    by: str
    reason: str


@dataclass(frozen=True, slots=True)
class TransitionSkipped(Event):
    """An item of a batch was skipped; `reason` is the selector of an error."""

    job_id: int
    status: JobStatus
    reason: bytes

    @property
    def reason_name(self) -> str:
        """Name of the error, or its selector in hex if unknown."""
        return selector_name(self.reason)


# -- MetaScheduler: providers, payments, parameters


@dataclass(frozen=True, slots=True)
class ProviderChallenged(Event):
    """A provider was challenged because of a job; it must answer by `answer_by`."""

    job_id: int
    provider: str
    by: str
    answer_by: int


@dataclass(frozen=True, slots=True)
class ProviderAnswered(Event):
    """A provider answered a challenge."""

    provider: str


@dataclass(frozen=True, slots=True)
class PaymentParked(Event):
    """A payment failed and was parked for its recipient."""

    recipient: str
    amount: int


@dataclass(frozen=True, slots=True)
class PaymentWithdrawn(Event):
    """Parked credits were withdrawn."""

    recipient: str
    to: str
    amount: int


@dataclass(frozen=True, slots=True)
class FeeChanged(Event):
    """The fee for jobs assigned from now on was changed."""

    fee_bps: int


@dataclass(frozen=True, slots=True)
class SubmissionsChanged(Event):
    """New submissions were opened or closed."""

    open: bool


# -- ERC2771Forwarder


@dataclass(frozen=True, slots=True)
class ExecutedForwardRequest(Event):
    """A signed request was executed; `success` is whether the inner call succeeded.

    Emitted after the events of the inner call.
    """

    signer: str
    nonce: int
    success: bool


# -- ProviderRegistry


@dataclass(frozen=True, slots=True)
class ProviderRegistered(Event):
    """A provider was approved for the first time and got its ID."""

    id: int
    provider: str


@dataclass(frozen=True, slots=True)
class HardwareProposed(Event):
    """A provider proposed hardware, which needs approval."""

    provider: str
    version: int
    hardware: Hardware


@dataclass(frozen=True, slots=True)
class ProviderApproved(Event):
    """A version of a provider's hardware was approved."""

    provider: str
    version: int
    hardware: Hardware
    approved_until: int


@dataclass(frozen=True, slots=True)
class OfferChanged(Event):
    """A provider changed the resources that it offers."""

    provider: str
    offer: Offer


@dataclass(frozen=True, slots=True)
class PricesChanged(Event):
    """A provider changed its prices for jobs assigned from now on."""

    provider: str
    prices: Prices


@dataclass(frozen=True, slots=True)
class LabelsChanged(Event):
    """A provider replaced its labels; `labels` holds all of them."""

    provider: str
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class DrainingChanged(Event):
    """Maintenance began or ended."""

    provider: str
    draining: bool


@dataclass(frozen=True, slots=True)
class BanChanged(Event):
    """An approver banned a provider, or lifted the ban."""

    provider: str
    banned: bool
    reason: str


# -- Credit, and the roles of all three


@dataclass(frozen=True, slots=True)
class Transfer(Event):
    """Credits were transferred; from the zero address if minted, to it if burned."""

    sender: str
    recipient: str
    amount: int


@dataclass(frozen=True, slots=True)
class Approval(Event):
    """An owner allowed a spender to transfer up to `amount`."""

    owner: str
    spender: str
    amount: int


@dataclass(frozen=True, slots=True)
class RoleGranted(Event):
    """A role was granted to an account."""

    role: bytes
    account: str
    sender: str


@dataclass(frozen=True, slots=True)
class RoleRevoked(Event):
    """A role was revoked from an account."""

    role: bytes
    account: str
    sender: str


_READERS: Final[Mapping[Any, Callable[[Any], Any]]] = MappingProxyType(
    {
        JobStatus: JobStatus,
        Terms: read_terms,
        Hardware: lambda values: Hardware(*values),
        Offer: lambda values: Offer(*values),
        Prices: lambda values: Prices(*values),
        Mapping[str, str]: parse_labels,
    }
)


@dataclass(frozen=True, slots=True)
class _Shape:
    """Decoder of the logs of one event class."""

    kind: type[Event]
    indexed: tuple[Abi, ...]
    plain: tuple[Abi, ...]
    order: tuple[bool, ...]  # for each field, whether it is indexed
    readers: tuple[Callable[[Any], Any] | None, ...]

    def read(self, topics: list[bytes], data: bytes, position: Mapping[str, Any]) -> Event:
        if len(topics) != len(self.indexed) + 1:
            raise AbiError("wrong number of topics")
        # Each is one word, so that together they are encoded like the arguments of a function.
        from_topics = iter(decode_values(self.indexed, b"".join(topics[1:])))
        from_data = iter(decode_values(self.plain, data))
        values = [next(from_topics if indexed else from_data) for indexed in self.order]
        return self.kind(
            *(
                value if reader is None else reader(value)
                for value, reader in zip(values, self.readers, strict=True)
            ),
            **position,
        )


def _shape(entry: Abi) -> _Shape | None:
    kind = globals().get(entry["name"])
    if not (isinstance(kind, type) and issubclass(kind, Event)):
        return None  # events that are not used, such as handovers of the administrator
    inputs = tuple(entry["inputs"])
    hints = get_type_hints(kind)
    names: tuple[str, ...] = kind.__match_args__
    field_names = [name for name in names if name not in Event.__annotations__]
    if len(field_names) != len(inputs):
        raise AssertionError(f"{kind.__name__} has other fields than the event of the contract")
    return _Shape(
        kind=kind,
        indexed=tuple(part for part in inputs if part["indexed"]),
        plain=tuple(part for part in inputs if not part["indexed"]),
        order=tuple(bool(part["indexed"]) for part in inputs),
        readers=tuple(
            _reader(hints[name], part) for name, part in zip(field_names, inputs, strict=True)
        ),
    )


def _reader(hint: Any, part: Abi) -> Callable[[Any], Any] | None:
    if hint is str and part["type"] == "bytes32":
        return from_word
    return _READERS.get(hint)


def _build() -> dict[bytes, _Shape]:
    shapes = {
        keccak(text=signature_of(entry)): _shape(entry)
        for contract in interfaces()
        for entry in contract.entries("event")
    }
    return {topic: shape for topic, shape in shapes.items() if shape is not None}


_SHAPES: Final[Mapping[bytes, _Shape]] = MappingProxyType(_build())
#: The class of each event by its first topic.
EVENT_CLASSES: Final[Mapping[bytes, type[Event]]] = MappingProxyType(
    {topic: shape.kind for topic, shape in _SHAPES.items()}
)


def decode_log(log: Mapping[str, Any]) -> Event | None:
    """Decode a log in the form of web3 or JSON-RPC.

    Returns None for unknown events, invalid data, and logs that a reorg removed; a follower skips
    them.
    """
    try:
        topics = [_bytes(topic) for topic in log["topics"]]
        shape = _SHAPES.get(topics[0]) if topics else None
        if shape is None or log.get("removed"):
            return None
        position = {
            "block_number": _number(log["blockNumber"]),
            "block_hash": _hex(log["blockHash"]),
            "tx_hash": _hex(log["transactionHash"]),
            "log_index": _number(log["logIndex"]),
            "address": checksummed(str(log["address"])),
        }
        return shape.read(topics, _bytes(log["data"]), position)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        return None


def decode_logs(logs: Iterable[Mapping[str, Any]]) -> list[Event]:
    """Decode logs, skipping unknown ones, and return the events in chain order."""
    decoded = (decode_log(log) for log in logs)
    return sorted(
        (event for event in decoded if event is not None), key=lambda event: event.position
    )


def event_topics(*kinds: type[Event]) -> list[str]:
    """Return the first topics of the given event classes, by default of all, for a log filter."""
    return [
        "0x" + topic.hex() for topic, kind in EVENT_CLASSES.items() if not kinds or kind in kinds
    ]


def event_filter(kind: type[Event], *others: type[Event], **wanted: str) -> list[Any]:
    """Return the topics for eth_getLogs that select events by indexed address fields.

    Example: `event_filter(JobSettled, provider=account)`. Classes that have these fields at the
    same positions can share a filter, which saves requests.
    """
    if others:
        first, *rest = (event_filter(other, **wanted) for other in (kind, *others))
        if any(other[1:] != first[1:] for other in rest):
            raise AssertionError(
                f"{kind.__name__} and others have these fields at different places"
            )
        return [event_topics(kind, *others), *first[1:]]
    [topic] = (topic for topic, event_class in EVENT_CLASSES.items() if event_class is kind)
    names: tuple[str, ...] = kind.__match_args__
    fields = zip(names, _SHAPES[topic].order, strict=False)
    indexed = [name for name, is_indexed in fields if is_indexed]
    if unknown := wanted.keys() - set(indexed):
        raise AssertionError(f"{kind.__name__} has no indexed {', '.join(sorted(unknown))}")
    last_position = max(
        (position for position, name in enumerate(indexed, 1) if name in wanted), default=0
    )
    topics = [
        topic_of(wanted[name]) if name in wanted else None for name in indexed[:last_position]
    ]
    return ["0x" + topic.hex(), *topics]


def topic_of(address: str) -> str:
    """Return an address as the topic of an indexed field."""
    return "0x" + address.removeprefix("0x").lower().rjust(64, "0")


def _bytes(value: Any) -> bytes:
    if isinstance(value, str):
        return bytes.fromhex(value.removeprefix("0x"))
    if isinstance(value, int):
        raise TypeError("a number")  # bytes(number) would return that many zeros
    return bytes(value)


def _hex(value: Any) -> str:
    return "0x" + _bytes(value).hex()


def _number(value: Any) -> int:
    return int(value, 16) if isinstance(value, str) else int(value)
