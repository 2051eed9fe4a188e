"""Decodes logs of the contracts to the frozen dataclasses of `event_types`, by topic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, get_type_hints

from eth_utils.crypto import keccak

from deepsquare_chain.chain.bindings import event_types
from deepsquare_chain.chain.bindings.abi import (
    Abi,
    AbiError,
    checksummed,
    decode_values,
    interfaces,
    signature_of,
)
from deepsquare_chain.chain.bindings.event_types import Event
from deepsquare_chain.chain.bindings.records import from_word, parse_labels, read_terms
from deepsquare_chain.job import (
    Hardware,
    JobStatus,
    Offer,
    Prices,
    Terms,
)

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
        pairs = zip(self.indexed, topics[1:], strict=True)
        from_topics = iter([decode_values((part,), topic)[0] for part, topic in pairs])
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
    kind = getattr(event_types, entry["name"], None)
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
