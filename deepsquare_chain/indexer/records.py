"""Converts ledger entries and events to table rows, and back. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import fields
from enum import IntEnum, IntFlag
from functools import cache
from typing import Any, Final, get_type_hints

import pydantic_core
from sqlalchemy import Row, Table

from deepsquare_chain.audit.entries import ZERO_ADDRESS, JobEntry, ProviderEntry
from deepsquare_chain.chain.bindings import event_types
from deepsquare_chain.chain.bindings.event_types import Event
from deepsquare_chain.indexer.schema import jobs, providers
from deepsquare_chain.job import (
    Hardware,
    JobFlags,
    JobStatus,
    Objective,
    Offer,
    Prices,
    Resources,
    Terms,
)

#: Fields of an entry that need conversion for their table.
_CONVERTED: Final = frozenset(
    {"provider", "status", "definition", "settled", "result", "retry_of", "successor"}
)
_CONVERTED_OF_PROVIDER: Final = frozenset({"id", "status", "labels", "draining", "banned"})


def _shared(kind: type, table: Table, converted: frozenset[str]) -> tuple[str, ...]:
    """Return the fields that table and entry share without conversion."""
    names = {field.name for field in fields(kind)} & set(table.c.keys())
    return tuple(sorted(names - converted))


_OF_JOB: Final = _shared(JobEntry, jobs, _CONVERTED)
_OF_PROVIDER: Final = _shared(ProviderEntry, providers, _CONVERTED_OF_PROVIDER)

#: Block, position of the transaction, log index.
Spot = tuple[int, int, int]


def job_values(job: JobEntry, spot: Spot) -> dict[str, Any]:
    """Return the values of a row of `jobs`.

    `spot` is the position of the last transition or interim payment.
    """
    terms, resources = job.terms, job.terms.resources
    return {
        "provider": known(job.provider),
        "status": int(job.status),
        "name": terms.name,
        "name_key": terms.name.casefold(),
        "uses": terms.uses,
        "objective": int(terms.objective),
        "definition": job.definition.hex(),
        "tasks": resources.tasks,
        "cpus_per_task": resources.cpus_per_task,
        "mem_per_cpu": resources.mem_per_cpu,
        "gpus": resources.gpus,
        "flags": int(terms.flags),
        "retries": terms.retries,
        "amount": terms.amount,
        "first_limit": terms.time_limit,
        "settled": int(job.settled),
        "result": job.result.hex(),
        "retry_of": job.retry_of or None,
        "successor": job.successor or None,
        "block": spot[0],
        "position": spot[1],
        "log_index": spot[2],
        **{name: getattr(job, name) for name in _OF_JOB},
    }


def job_entry(row: Row[Any]) -> JobEntry:
    """Return the ledger entry of a row of `jobs`, without transitions."""
    resources = Resources(row.tasks, row.cpus_per_task, row.mem_per_cpu, row.gpus)
    terms = Terms(
        amount=row.amount,
        time_limit=row.first_limit,
        resources=resources,
        retries=row.retries,
        flags=JobFlags(row.flags),
        objective=Objective(row.objective),
        name=row.name,
        uses=row.uses,
    )
    return JobEntry(
        definition=bytes.fromhex(row.definition),
        terms=terms,
        status=JobStatus(row.status),
        provider=row.provider or ZERO_ADDRESS,
        settled=bool(row.settled),
        result=bytes.fromhex(row.result),
        retry_of=row.retry_of or 0,
        successor=row.successor or 0,
        **{name: getattr(row, name) for name in _OF_JOB},
    )


def provider_values(entry: ProviderEntry) -> dict[str, Any]:
    """Return the values of a row of `providers`."""
    hardware, offer, prices = entry.hardware, entry.offer, entry.prices
    return {
        "id": entry.id or None,
        "status": int(entry.status),
        "nodes": hardware.nodes,
        "cpus_per_node": hardware.cpus_per_node,
        "mem_per_node": hardware.mem_per_node,
        "gpus_per_node": hardware.gpus_per_node,
        "offer_cpus": offer.cpus,
        "offer_memory": offer.memory,
        "offer_gpus": offer.gpus,
        "price_cpu": prices.cpu,
        "price_gpu": prices.gpu,
        "price_mem": prices.mem,
        "labels": pydantic_core.to_json(dict(entry.labels)).decode(),
        "draining": int(entry.draining),
        "banned": int(entry.banned),
        **{name: getattr(entry, name) for name in _OF_PROVIDER},
    }


def provider_entry(row: Row[Any]) -> ProviderEntry:
    """Return the ledger entry of a row of `providers`."""
    return ProviderEntry(
        id=row.id or 0,
        hardware=Hardware(row.nodes, row.cpus_per_node, row.mem_per_node, row.gpus_per_node),
        offer=Offer(row.offer_cpus, row.offer_memory, row.offer_gpus),
        prices=Prices(row.price_cpu, row.price_gpu, row.price_mem),
        labels=pydantic_core.from_json(row.labels),
        draining=bool(row.draining),
        banned=bool(row.banned),
        **{name: getattr(row, name) for name in _OF_PROVIDER},
    )


def known(account: str) -> str | None:
    """Return the account, or None for the zero address."""
    return None if account == ZERO_ADDRESS else account


# -- events as plain values for storage and display
#
# Enums are represented by names, flags by lists of names, bytes by 0x-hexadecimal, structs by
# mappings, and integers by integers.

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
