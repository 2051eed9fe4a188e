"""Rows of the index as JSON, and the JSON Schema of what comes out, from the same type hints. Pure.

An amount of credits becomes two members, `paid` in credit-wei and `paid_credits` in credits, both
texts: a JSON number can't hold them. A rate gets its price per hour in the same way. Enums stand
as their names, statuses exactly as on chain, flags as a list of the names of those that are set.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping
from enum import IntEnum, IntFlag
from functools import cache
from typing import Annotated, Any, Final, get_args, get_origin, get_type_hints

from deepsquare_chain.credits import format_credits, hourly
from deepsquare_chain.indexer.read_models import Page
from deepsquare_chain.indexer.units import Unit
from deepsquare_chain.job import Prices

_PLAIN: Final[Mapping[type, Mapping[str, Any]]] = {
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    bool: {"type": "boolean"},
}
_BESIDE: Final[Mapping[Unit, tuple[str, Callable[[int], str]]]] = {
    Unit.CREDITS: ("credits", format_credits),
    Unit.RATE: ("credits_per_hour", hourly),
}
#: Units of the vocabulary's own records.
_UNITS: Final = {Prices: Unit.RATE}
_REFS: Final = "#/components/schemas/"


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """A field or property of a row, with its unit where it is an amount."""

    name: str
    kind: Any
    unit: Unit | None


def to_json(value: Any) -> Any:
    """A row, or anything in one, as `json` takes it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found: dict[str, Any] = {}
        for member in members(type(value)):
            found |= _member(member, getattr(value, member.name))
        return found
    if isinstance(value, IntEnum):
        return value.name
    if isinstance(value, IntFlag):
        return [each.name for each in value]
    if isinstance(value, Mapping):
        return {_key(key): to_json(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(each) for each in value]
    return value


def _member(member: Member, value: Any) -> dict[str, Any]:
    if member.unit is None:
        return {member.name: to_json(value)}
    if member.unit is Unit.RAW:
        return {member.name: _texts(value)}
    found = {member.name: str(value)}
    if (beside := _BESIDE.get(member.unit)) is not None:
        suffix, show = beside
        found[f"{member.name}_{suffix}"] = show(value)
    return found


def _texts(value: Any) -> Any:
    """Values of an event: every integer as text, since any may be larger than a JSON number."""
    if isinstance(value, Mapping):
        return {key: _texts(each) for key, each in value.items()}
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value


def _key(key: Any) -> str:
    return key.name if isinstance(key, IntEnum) else str(key)


@cache
def members(kind: Any) -> tuple[Member, ...]:
    """Fields of a row's class, then its properties."""
    return tuple(_members(kind))


def _members(kind: Any) -> Iterator[Member]:
    hints = get_type_hints(kind, include_extras=True)
    for each in dataclasses.fields(kind):
        inner, unit = _unit(hints[each.name])
        yield Member(each.name, inner, unit or _UNITS.get(kind))
    for name, found in vars(kind).items():
        if isinstance(found, property) and found.fget is not None:
            yield Member(name, *_unit(get_type_hints(found.fget, include_extras=True)["return"]))


def _unit(hint: Any) -> tuple[Any, Unit | None]:
    if get_origin(hint) is Annotated:
        inner, *notes = get_args(hint)
        return inner, next((each for each in notes if isinstance(each, Unit)), None)
    return hint, None


# -- schemas


def schema_of(kind: Any, components: dict[str, Any]) -> dict[str, Any]:
    """The JSON Schema of a type; those of rows are added to the components it refers to."""
    inner, _ = _unit(kind)
    origin = get_origin(inner)
    if origin is types.UnionType:
        return {"anyOf": [schema_of(each, components) for each in get_args(inner)]}
    if origin is not None:
        return _of_origin(origin, get_args(inner), components)
    if inner is types.NoneType:
        return {"type": "null"}
    if isinstance(inner, type) and issubclass(inner, IntEnum | IntFlag):
        return _of_names(inner)
    if dataclasses.is_dataclass(inner):
        return _reference(inner, components)
    return dict(_PLAIN[inner])


def _of_names(kind: type[IntEnum | IntFlag]) -> dict[str, Any]:
    one = {"type": "string", "enum": [each.name for each in kind]}
    return {"type": "array", "items": one} if issubclass(kind, IntFlag) else one


def _of_origin(origin: Any, parts: tuple[Any, ...], components: dict[str, Any]) -> dict[str, Any]:
    if origin is Page:
        return _page(parts[0], components)
    if origin is tuple:
        return {"type": "array", "items": schema_of(parts[0], components)}
    return _mapping(parts[0], parts[1], components)


def _mapping(key: Any, value: Any, components: dict[str, Any]) -> dict[str, Any]:
    found = {"type": "object", "additionalProperties": schema_of(value, components)}
    if isinstance(key, type) and issubclass(key, IntEnum):
        found["propertyNames"] = {"enum": [each.name for each in key]}
    return found


def _page(item: Any, components: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "items": {"type": "array", "items": schema_of(item, components)},
            "next": {"type": ["string", "null"], "description": "`cursor` of the page after."},
        },
        "required": ["items", "next"],
        "additionalProperties": False,
    }


def _reference(kind: Any, components: dict[str, Any]) -> dict[str, Any]:
    name = kind.__name__
    if name not in components:
        components[name] = {}  # rows that hold each other end here
        properties: dict[str, Any] = {}
        for member in members(kind):
            properties |= _properties(member, components)
        components[name] = {
            "type": "object",
            "description": " ".join((kind.__doc__ or "").split()),
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
    return {"$ref": _REFS + name}


def _properties(member: Member, components: dict[str, Any]) -> dict[str, Any]:
    if member.unit is None:
        return {member.name: schema_of(member.kind, components)}
    if member.unit is Unit.RAW:
        return {member.name: {"type": "object"}}
    whole = {"type": "string", "pattern": "^-?[0-9]+$", "description": member.unit.value}
    found: dict[str, Any] = {member.name: whole}
    if (beside := _BESIDE.get(member.unit)) is not None:
        decimal = {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]+)?$"}
        found[f"{member.name}_{beside[0]}"] = decimal
    return found
