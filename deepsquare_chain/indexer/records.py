"""Converts ledger entries and events to table rows, and back. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import asdict
from enum import IntEnum, IntFlag
from functools import cache
from typing import Any, Final, get_type_hints

from sqlalchemy import Row, Table

from deepsquare_chain.audit.entries import (
    ZERO_ADDRESS,
    ZERO_HARDWARE,
    JobEntry,
    ProviderEntry,
    from_attributes,
)
from deepsquare_chain.chain.bindings.events import EVENT_CLASSES, Event
from deepsquare_chain.indexer.schema import jobs, providers
from deepsquare_chain.job import NO_LOAD, Hardware, Offer, Prices, Resources, Terms

#: Block, position of the transaction, log index.
LogPosition = tuple[int, int, int]


def row_values(record: Any, table: Table, /, **values: Any) -> dict[str, Any]:
    """Return the values of a table's row: `values`, and attributes of the record by their names."""
    names = (column.name for column in table.columns if column.name not in values)
    return {**values, **{name: getattr(record, name) for name in names}}


def job_values(job: JobEntry, position: LogPosition) -> dict[str, Any]:
    """Return the values of a row of `jobs`.

    `position` is the position of the last transition or interim payment.
    """
    terms, resources = job.terms, job.terms.resources
    return row_values(
        job,
        jobs,
        provider=account_or_none(job.provider),
        name_key=terms.name.casefold(),
        uses=terms.uses,
        objective=terms.objective,
        definition=job.definition.hex(),
        **asdict(resources),
        flags=terms.flags,
        retries=terms.retries,
        amount=terms.amount,
        first_limit=terms.time_limit,
        result=job.result.hex(),
        retry_of=job.retry_of or None,
        successor=job.successor or None,
        block=position[0],
        position=position[1],
        log_index=position[2],
    )


def job_entry(row: Row[Any]) -> JobEntry:
    """Return the ledger entry of a row of `jobs`, without transitions."""
    resources = from_attributes(Resources, row)
    return from_attributes(
        JobEntry,
        row,
        definition=bytes.fromhex(row.definition),
        terms=from_attributes(Terms, row, time_limit=row.first_limit, resources=resources),
        provider=row.provider or ZERO_ADDRESS,
        result=bytes.fromhex(row.result),
        retry_of=row.retry_of or 0,
        successor=row.successor or 0,
        transitions=[],
    )


def provider_values(entry: ProviderEntry) -> dict[str, Any]:
    """Return the values of a row of `providers`."""
    return row_values(
        entry,
        providers,
        id=entry.id or None,
        **asdict(entry.hardware),
        **{f"offer_{name}": amount for name, amount in asdict(entry.offer).items()},
        **{f"price_{name}": price for name, price in asdict(entry.prices).items()},
    )


def provider_entry(row: Row[Any]) -> ProviderEntry:
    """Return the ledger entry of a row of `providers`.

    The index does not store its proposed hardware, its load and the time of its challenge.
    """
    return from_attributes(
        ProviderEntry,
        row,
        id=row.id or 0,
        **offering(row),
        pending_hardware=ZERO_HARDWARE,
        challenged_at=0,
        load=NO_LOAD,
    )


def offering(row: Row[Any]) -> dict[str, Any]:
    """Return hardware, offer and prices of a row of `providers`."""
    return {
        "hardware": from_attributes(Hardware, row),
        "offer": Offer(row.offer_cpus, row.offer_memory, row.offer_gpus),
        "prices": Prices(row.price_cpu, row.price_gpu, row.price_mem),
    }


def account_or_none(account: str) -> str | None:
    """Return the account, or None for the zero address."""
    return None if account == ZERO_ADDRESS else account


# -- events as plain values for storage and display
#
# Enums are represented by names, flags by lists of names, bytes by 0x-hexadecimal, structs by
# mappings, and integers by integers.

_KINDS: Final = {kind.__name__: kind for kind in EVENT_CLASSES.values()}


def event_values(event: Event) -> dict[str, Any]:
    """Return the fields of an event as plain values, without its position on the chain."""
    kind: Any = type(event)
    return {name: _json_value(getattr(event, name)) for name in _fields(kind)}


def event_of(name: str, values: Mapping[str, Any], **position: Any) -> Event:
    """Rebuild an event from its class name, its `event_values` values and its position on the chain.

    Raises:
        KeyError: The event name is unknown, or a value is missing.
    """
    kind: Any = _KINDS[name]
    event: Event = kind(
        *(read(values[field_name]) for field_name, read in _readers(kind)), **position
    )
    return event


def _json_value(value: Any) -> Any:
    if isinstance(value, IntEnum):
        return value.name
    if isinstance(value, IntFlag):
        return [member.name for member in value]
    if isinstance(value, bytes):
        return "0x" + value.hex()
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value):
        kind: Any = type(value)
        return {name: _json_value(getattr(value, name)) for name in _fields(kind)}
    return value


@cache
def _fields(kind: Any) -> tuple[str, ...]:
    # The position of an event consists of its keyword-only fields.
    return tuple(field.name for field in dataclasses.fields(kind) if not field.kw_only)


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
        return lambda names: hint(sum(hint[name] for name in names))
    if dataclasses.is_dataclass(hint):
        struct: Any = hint
        return lambda values: struct(*(read(values[name]) for name, read in _readers(struct)))
    return lambda value: value
