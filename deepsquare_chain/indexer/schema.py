"""The tables of the index. All except the last two are derived only from the chain.

Amounts are credit-wei stored as text, and times are chain time in seconds. `block` and `position`
(the index of a transaction in its block) together identify a row of `transactions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import pydantic_core
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
)

from deepsquare_chain.job import JobFlags, JobStatus, Objective, ProviderStatus
from deepsquare_chain.store.base import Amount

metadata: Final = MetaData()

#: Largest number of an `Int` column.
MAX_INT: Final = 2**63 - 1
#: Keys per IN list, far below the limits of SQLite and PostgreSQL.
MAX_KEYS: Final = 5_000
#: Columns of `totals` that count jobs, by status.
STATUS_COLUMNS: Final = {status: status.name.lower() for status in JobStatus if status}

#: Block numbers, IDs and times need 64 bits, which SQLite's INTEGER provides.
Int: Final = BigInteger().with_variant(Integer, "sqlite")


class EscapedText(TypeDecorator[str]):
    """Untrusted text. Zero bytes are escaped, because PostgreSQL can't store them."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        """Escape the text for the database."""
        return None if value is None else value.replace("\\", "\\\\").replace("\0", "\\0")

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:  # noqa: ARG002
        """Restore the original text."""
        if value is None or "\\" not in value:
            return value
        return "\\".join(part.replace("\\0", "\0") for part in value.split("\\\\"))


class IntEnumColumn(TypeDecorator[int]):
    """An enum of integers or a truth value, stored as the number that the contracts use."""

    impl = Int
    cache_ok = True

    def __init__(self, kind: type[int]) -> None:
        super().__init__()
        self.kind = kind

    def process_bind_param(self, value: int | None, dialect: Dialect) -> int | None:  # noqa: ARG002
        """Convert to the number."""
        return None if value is None else int(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> int | None:  # noqa: ARG002
        """Convert back to the enum."""
        return None if value is None else self.kind(value)


class Json(TypeDecorator[Any]):
    """Plain values, stored as JSON text: integers of any size keep their precision."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str:  # noqa: ARG002
        """Convert to JSON."""
        value = dict(value) if isinstance(value, Mapping) else value
        return pydantic_core.to_json(value).decode()

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:  # noqa: ARG002
        """Parse the JSON."""
        return pydantic_core.from_json(value)


def _column(name: str, kind: Any, **options: Any) -> Column[Any]:
    return Column(name, kind, nullable=False, **options)


def _key(name: str, kind: Any = Int) -> Column[Any]:
    return _column(name, kind, primary_key=True, autoincrement=False)


def _ints(*names: str) -> list[Column[Any]]:
    return [_column(name, Int) for name in names]


def _texts(*names: str) -> list[Column[Any]]:
    return [_column(name, String) for name in names]


def _amounts(*names: str) -> list[Column[Any]]:
    return [_column(name, Amount) for name in names]


def _event_table(name: str, *columns: Column[Any]) -> Table:
    """Return a table with a row per event, identified by the position of the event's log."""
    key = (_key("block"), _key("log_index"), _column("position", Int))
    return Table(name, metadata, *key, *columns)


def _index(table: Table, suffix: str, *names: str, **options: Any) -> None:
    Index(f"{table.name}_{suffix}", *(table.c[name] for name in names), **options)


headers: Final = Table(
    "headers",
    metadata,
    _key("number"),
    _column("hash", String, unique=True),
    *_texts("parent"),
    *_ints("time", "gas_used"),
    *_amounts("gas_limit", "base_fee"),
    *_ints("all_transactions", "transactions"),
)

transactions: Final = Table(
    "transactions",
    metadata,
    _key("block"),
    _key("position"),
    _column("hash", String, unique=True),
    *_texts("sender"),
    Column("to", String),
    *_texts("contract", "selector", "method"),
    _column("ok", Boolean),
    *_ints("gas_used"),
    *_amounts("gas_price"),
    *_ints("nonce"),
    *_amounts("value"),
    _column("input", LargeBinary),
    *_ints("events"),
)
_index(transactions, "sender", "sender", "block", "position")

# Customers' signed requests in forwarder transactions; `number` is the index in a transaction.
forwarded: Final = Table(
    "forwarded",
    metadata,
    *(_key("block"), _key("position"), _key("number")),
    *_texts("signer", "to", "contract", "method"),
    _column("ok", Boolean),
)
_index(forwarded, "signer", "signer", "block", "position")

# `account` is the provider that a registry event or a challenge event concerns.
events: Final = _event_table(
    "events",
    *_texts("contract", "name"),
    Column("job_id", Int),
    Column("account", String),
    _column("body", Json),
)
_index(events, "job", "job_id", "block", "log_index")
_has_account = events.c.account.is_not(None)
_index(
    events,
    "account",
    *("account", "block", "log_index"),
    sqlite_where=_has_account,
    postgresql_where=_has_account,
)
_index(events, "transaction", "block", "position")

transitions: Final = _event_table(
    "transitions",
    *_ints("time", "job_id"),
    _column("before", IntEnumColumn(JobStatus)),
    _column("after", IntEnumColumn(JobStatus)),
    *_texts("customer"),
    Column("provider", String),
)
_index(transitions, "job", "job_id", "block", "log_index")

# `number` is the index of the line in its block; `log_index` is the log that caused it; `line` is
# the index of the line in the account's statement, from 1.
movements: Final = Table(
    "movements",
    metadata,
    _key("block"),
    _key("number"),
    *_ints("position", "log_index", "time"),
    *_texts("account", "kind"),
    Column("job_id", Int),
    *_texts("counterparty"),
    *_amounts("amount", "balance"),
    *_ints("line"),
)
_index(movements, "account", "account", "line", unique=True)
_index(movements, "job", "job_id", "block", "number")
_index(movements, "transaction", "block", "position")

# Settlements, and interim payments, whose status is RUNNING.
settlements: Final = _event_table(
    "settlements",
    *_ints("time", "job_id"),
    _column("status", IntEnumColumn(JobStatus)),
    *_texts("customer"),
    Column("provider", String),
    *_ints("billed_seconds"),
    *_amounts("paid", "fee", "refunded"),
)
_index(settlements, "job", "job_id", "block", "log_index")
_index(settlements, "provider", "provider", "block", "log_index")

# `name_key` is the case-folded name, for searches. The collected columns are the part of paid, fee
# and billed seconds that is due to interim payments. `block`, `position` and `log_index` are those
# of the last transition or interim payment.
jobs: Final = Table(
    "jobs",
    metadata,
    _key("id"),
    *_texts("customer"),
    Column("provider", String),
    _column("status", IntEnumColumn(JobStatus)),
    *_ints("since"),
    *(_column(name, EscapedText) for name in ("name", "name_key", "uses")),
    _column("objective", IntEnumColumn(Objective)),
    *_texts("definition"),
    *_ints("tasks", "cpus_per_task", "mem_per_cpu", "gpus", "time_limit"),
    _column("flags", IntEnumColumn(JobFlags)),
    *_ints("retries", "retries_left"),
    *_amounts("amount"),
    *_ints("first_limit"),
    *_amounts("rate"),
    *_ints("fee_bps"),
    *_amounts("escrow", "funded", "carried_in", "carried_out", "paid", "fee", "refunded"),
    *_ints("billed_seconds", "collected_seconds"),
    *_amounts("collected_paid", "collected_fee"),
    _column("settled", IntEnumColumn(bool)),
    *_ints("submitted_at", "started_at", "ended_at"),
    Column("exit_code", Int),
    *_texts("result"),
    _column("reason", EscapedText),
    Column("retry_of", Int),
    Column("successor", Int),
    *_ints("block", "position", "log_index"),
)
_index(jobs, "status", "status", "id")
_index(jobs, "customer", "customer", "id")
_index(jobs, "provider", "provider", "id")
_index(jobs, "name", "name_key", "id")
_index(jobs, "definition", "definition", "id")

providers: Final = Table(
    "providers",
    metadata,
    _key("account", String),
    Column("id", Int),
    _column("status", IntEnumColumn(ProviderStatus)),
    *_ints("nodes", "cpus_per_node", "mem_per_node", "gpus_per_node"),
    *_ints("offer_cpus", "offer_memory", "offer_gpus"),
    *_amounts("price_cpu", "price_gpu", "price_mem"),
    _column("labels", Json),
    *_ints("version", "pending_version", "approved_until"),
    _column("draining", IntEnumColumn(bool)),
    _column("banned", IntEnumColumn(bool)),
    *_ints("answer_by"),
)

# Running totals of a provider after each block that changed them.
provider_figures: Final = Table(
    "provider_figures",
    metadata,
    _key("account", String),
    _key("block"),
    *_ints("time", "assigned", "started", "returned", "finished", "failed", "out_of_credits"),
    *_ints("cancelled", "panicked", "live", "running", "cpus_busy", "gpus_busy"),
    *_ints("cpus_offered", "cpus_assigned", "memory_assigned", "gpus_assigned", "busy_seconds"),
    *_amounts("earned", "cpu_seconds", "offered_seconds"),
)
_index(provider_figures, "time", "account", "time", "block")

# Totals of the grid after each block with events.
totals: Final = Table(
    "totals",
    metadata,
    _key("block"),
    *_ints("time", *STATUS_COLUMNS.values()),
    *_amounts("minted", "burned", "escrow", "parked", "donated", "paid", "fees", "refunded"),
)
_index(totals, "time", "time", "block")

# Parked payments and withdrawals: signed amount, and the recipient's parked credits afterwards.
parkings: Final = _event_table("parkings", *_texts("recipient"), *_amounts("amount", "held"))
_index(parkings, "recipient", "recipient", "block", "log_index")

roles: Final = _event_table(
    "roles", *_texts("contract", "role", "account"), _column("granted", Boolean), *_texts("by")
)
_index(roles, "account", "account", "block", "log_index")

parameters: Final = _event_table("parameters", *_texts("name", "value"))

# Anomalies by the rules of the audit; `number` is the index in the block.
anomalies: Final = Table(
    "exceptions",
    metadata,
    _key("block"),
    _key("number"),
    *_ints("position"),
    *_texts("code", "subject", "severity"),
    Column("job_id", Int),
    Column("account", String),
    _column("message", EscapedText),
)
_index(anomalies, "code", "code", "block", "number")
_index(anomalies, "subject", "subject", "block", "number")

# Parameters that the deployment fixed permanently.
constants: Final = Table("constants", metadata, _key("name", String), *_texts("value"))

# -- state of the index

state: Final = Table("state", metadata, _key("key", String), *_texts("value"))

changes: Final = Table(
    "changes",
    metadata,
    _key("number"),
    *_texts("kind"),
    *_ints("first_block", "last_block"),
    _column("jobs", Json),
)

#: Tables that are derived from the chain, in a fixed order for comparisons.
DERIVED: Final = tuple(t for t in metadata.sorted_tables if t not in {state, changes})
