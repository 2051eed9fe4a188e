"""Types of read model fields: their units and their JSON representation. Pure.

An amount becomes two JSON members, such as `paid` in credit-wei and `paid_credits` in credits. Both
are strings, because a JSON number can't represent them exactly. A rate also gets its price per
hour. Enums are represented by their names, flags by a list of the names that are set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from enum import IntEnum, IntFlag
from typing import Annotated, Any, Final, TypeAlias, get_origin, get_type_hints

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, PlainSerializer, WithJsonSchema
from pydantic_core import CoreSchema, core_schema

from deepsquare_chain import job
from deepsquare_chain.credits import format_credits, hourly

_AS_TEXT: Final = PlainSerializer(str, return_type=str)


def _whole(unit: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": "^-?[0-9]+$", "description": unit})


@dataclass(frozen=True, slots=True)
class Companion:
    """Annotation that adds a decimal JSON member, named like the field plus a suffix."""

    suffix: str
    show: Callable[[int], str]

    def field(self, name: str) -> core_schema.ComputedField:
        """Return the computed field for the field of this name."""
        shown = core_schema.plain_serializer_function_ser_schema(
            self.show, return_schema=core_schema.str_schema(pattern=r"^-?[0-9]+(\.[0-9]+)?$")
        )
        schema = core_schema.int_schema(serialization=shown)
        return core_schema.computed_field(name, schema, alias=f"{name}_{self.suffix}")


@dataclass(frozen=True, slots=True)
class ByName:
    """Annotation that serialises an enum as its name, and a flag as a list of names."""

    kind: type[IntEnum | IntFlag]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        shown = core_schema.plain_serializer_function_ser_schema(self._show)
        return core_schema.is_instance_schema(self.kind, serialization=shown)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        name_schema = {"type": "string", "enum": [member.name for member in self.kind]}
        return (
            {"type": "array", "items": name_schema}
            if issubclass(self.kind, IntFlag)
            else name_schema
        )

    def _show(self, value: Any) -> Any:
        return [member.name for member in value] if issubclass(self.kind, IntFlag) else value.name


@dataclass(frozen=True, slots=True)
class Record:
    """Annotation that serialises a dataclass of `deepsquare_chain.job` with its properties.

    `member` replaces the type of all fields if the record does not declare their unit.
    """

    member: Any = None

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return _with_properties(source, handler, self.member)


class ReadModel:
    """Base of read models. JSON includes fields, properties, and the companions of amounts."""

    __slots__ = ()

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return _with_properties(source, handler)


def _with_properties(source: Any, handler: GetCoreSchemaHandler, member: Any = None) -> CoreSchema:
    schema = handler(source)
    model: Any = handler.resolve_ref_schema(schema)
    model["config"] = {**model.get("config", {}), "extra_fields_behavior": "forbid"}
    kind = get_origin(source) or source
    computed: list[core_schema.ComputedField] = []
    hints = get_type_hints(kind, include_extras=True)
    for dataclass_field in fields(kind):
        computed += _companions(dataclass_field.name, member or hints[dataclass_field.name])
    if member is not None:
        for field in model["schema"]["fields"]:
            field["schema"] = handler.generate_schema(member)
    for name, attribute in vars(kind).items():
        if isinstance(attribute, property) and attribute.fget is not None:
            hint = get_type_hints(attribute.fget, include_extras=True)["return"]
            computed.append(core_schema.computed_field(name, handler.generate_schema(hint)))
            computed += _companions(name, hint)
    model["schema"]["computed_fields"] = computed
    return schema


def _companions(name: str, hint: Any) -> list[core_schema.ComputedField]:
    notes = getattr(hint, "__metadata__", ())
    return [note.field(name) for note in notes if isinstance(note, Companion)]


def _integers_as_text(value: Any) -> Any:
    """Convert integers of event values to strings, because they may exceed a JSON number."""
    if isinstance(value, Mapping):
        return {key: _integers_as_text(member) for key, member in value.items()}
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value


def _by_status(value: Mapping[job.JobStatus, int]) -> dict[str, int]:
    return {status.name: count for status, count in value.items()}


#: Credit-wei.
Credits: TypeAlias = Annotated[
    int, _AS_TEXT, _whole("credit-wei"), Companion("credits", format_credits)
]
#: Credit-wei per second.
Rate: TypeAlias = Annotated[
    int, _AS_TEXT, _whole("credit-wei per second"), Companion("credits_per_hour", hourly)
]
#: Wei of the chain's native coin.
Coin: TypeAlias = Annotated[int, _AS_TEXT, _whole("wei of the chain's own coin")]
#: Units of gas.
Gas: TypeAlias = Annotated[int, _AS_TEXT, _whole("units of gas")]
#: Fields of an event by name.
Values: TypeAlias = Annotated[
    Mapping[str, Any], PlainSerializer(_integers_as_text), WithJsonSchema({"type": "object"})
]
JobStatus: TypeAlias = Annotated[job.JobStatus, ByName(job.JobStatus)]
JobFlags: TypeAlias = Annotated[job.JobFlags, ByName(job.JobFlags)]
Objective: TypeAlias = Annotated[job.Objective, ByName(job.Objective)]
ProviderStatus: TypeAlias = Annotated[job.ProviderStatus, ByName(job.ProviderStatus)]
JobCounts: TypeAlias = Annotated[
    Mapping[job.JobStatus, int],
    PlainSerializer(_by_status),
    WithJsonSchema(
        {
            "type": "object",
            "additionalProperties": {"type": "integer"},
            "propertyNames": {"enum": [each.name for each in job.JobStatus]},
        }
    ),
]
Resources: TypeAlias = Annotated[job.Resources, Record()]
Hardware: TypeAlias = Annotated[job.Hardware, Record()]
Offer: TypeAlias = Annotated[job.Offer, Record()]
Load: TypeAlias = Annotated[job.Load, Record()]
Prices: TypeAlias = Annotated[job.Prices, Record(Rate)]
