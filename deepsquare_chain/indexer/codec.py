"""Encodes events as plain values for storage and display, and decodes them. Pure.

Enums are represented by names, flags by lists of names, bytes by 0x-hexadecimal, structs by
mappings, and integers by integers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from enum import IntEnum, IntFlag
from functools import cache
from typing import Any, Final, get_type_hints

from deepsquare_chain.chain.bindings import event_types
from deepsquare_chain.chain.bindings.event_types import Event

_PLACE: Final = frozenset(Event.__annotations__)


def plain(event: Event) -> dict[str, Any]:
    """Return the fields of an event as plain values, without its position on the chain."""
    kind: Any = type(event)
    return {name: _plain(getattr(event, name)) for name in _fields(kind)}


def event_of(name: str, values: Mapping[str, Any], **place: Any) -> Event:
    """Rebuild an event from its class name, its `plain` values and its position on the chain.

    Raises:
        KeyError: The event name is unknown, or a value is missing.
    """
    kind: Any = _kinds()[name]
    event: Event = kind(*(read(values[field_name]) for field_name, read in _readers(kind)), **place)
    return event


def _plain(value: Any) -> Any:
    if isinstance(value, IntEnum):
        return value.name
    if isinstance(value, IntFlag):
        return [each.name for each in value]
    if isinstance(value, bytes):
        return "0x" + value.hex()
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value):
        kind: Any = type(value)
        return {each: _plain(getattr(value, each)) for each in _fields(kind)}
    return value


@cache
def _fields(kind: Any) -> tuple[str, ...]:
    return tuple(
        field.name
        for field in dataclasses.fields(kind)
        if not (issubclass(kind, Event) and field.name in _PLACE)
    )


@cache
def _kinds() -> dict[str, type[Event]]:
    return {kind.__name__: kind for kind in vars(event_types).values() if _is_event(kind)}


def _is_event(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Event) and kind is not Event


@cache
def _readers(kind: Any) -> tuple[tuple[str, Callable[[Any], Any]], ...]:
    hints = get_type_hints(kind)
    return tuple((name, _reader(hints[name])) for name in _fields(kind))


def _reader(hint: Any) -> Callable[[Any], Any]:
    if hint is bytes:
        return lambda text: bytes.fromhex(text[2:])
    if isinstance(hint, type) and issubclass(hint, IntEnum):
        return lambda name: hint[name]
    if isinstance(hint, type) and issubclass(hint, IntFlag):
        return lambda names: hint(sum(hint[each] for each in names))
    if dataclasses.is_dataclass(hint):
        struct: Any = hint
        return lambda values: struct(*(read(values[each]) for each, read in _readers(struct)))
    return lambda value: value
