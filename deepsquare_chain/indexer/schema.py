"""The tables of the index. All except the last two are derived only from the chain.

Amounts are credit-wei stored as text, times are chain time in seconds, and statuses are the numbers
of the contracts. `position` is the index of a transaction in its block; `block` and `position`
together identify a row of `transactions`.
"""

from __future__ import annotations

from typing import Any, Final

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

from deepsquare_chain.store.base import Amount

metadata: Final = MetaData()

#: Block numbers, IDs and times need 64 bits, which SQLite's INTEGER provides.
Int: Final = BigInteger().with_variant(Integer, "sqlite")


class Words(TypeDecorator[str]):
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


def _int(name: str, **options: Any) -> Column[Any]:
    return Column(name, Int, nullable=False, **options)


def _amount(name: str) -> Column[Any]:
    return Column(name, Amount, nullable=False)


def _text(name: str, **options: Any) -> Column[Any]:
    return Column(name, String, nullable=False, **options)


headers: Final = Table(
    "headers",
    metadata,
    _int("number", primary_key=True, autoincrement=False),
    _text("hash", unique=True),
    _text("parent"),
    _int("time"),
    _int("gas_used"),
    _amount("gas_limit"),
    _amount("base_fee"),
    _int("all_transactions"),
    _int("transactions"),
)

transactions: Final = Table(
    "transactions",
    metadata,
    _int("block", primary_key=True),
    _int("position", primary_key=True),
    _text("hash", unique=True),
    _text("sender"),
    Column("to", String),
    _text("contract"),
    _text("selector"),
    _text("method"),
    Column("ok", Boolean, nullable=False),
    _int("gas_used"),
    _amount("gas_price"),
    _int("nonce"),
    _amount("value"),
    Column("input", LargeBinary, nullable=False),
    _int("events"),
)
Index("transactions_sender", transactions.c.sender, transactions.c.block, transactions.c.position)

# Customers' signed requests in forwarder transactions; `number` is the index in a transaction.
forwarded: Final = Table(
    "forwarded",
    metadata,
    _int("block", primary_key=True),
    _int("position", primary_key=True),
    _int("number", primary_key=True),
    _text("signer"),
    _text("to"),
    _text("contract"),
    _text("method"),
    Column("ok", Boolean, nullable=False),
)
Index("forwarded_signer", forwarded.c.signer, forwarded.c.block, forwarded.c.position)

# `account` is the provider that a registry event or a challenge event concerns.
events: Final = Table(
    "events",
    metadata,
    _int("block", primary_key=True),
    _int("log_index", primary_key=True),
    _int("position"),
    _text("contract"),
    _text("name"),
    Column("job_id", Int),
    Column("account", String),
    Column("body", Text, nullable=False),
)
Index("events_job", events.c.job_id, events.c.block, events.c.log_index)
Index(
    "events_account",
    events.c.account,
    events.c.block,
    events.c.log_index,
    sqlite_where=events.c.account.is_not(None),
    postgresql_where=events.c.account.is_not(None),
)
Index("events_transaction", events.c.block, events.c.position)

transitions: Final = Table(
    "transitions",
    metadata,
    _int("block", primary_key=True),
    _int("log_index", primary_key=True),
    _int("position"),
    _int("time"),
    _int("job_id"),
    _int("before"),
    _int("after"),
    _text("customer"),
    Column("provider", String),
)
Index("transitions_job", transitions.c.job_id, transitions.c.block, transitions.c.log_index)

# `number` is the index of the line in its block; `log_index` is the log that caused it.
movements: Final = Table(
    "movements",
    metadata,
    _int("block", primary_key=True),
    _int("number", primary_key=True),
    _int("position"),
    _int("log_index"),
    _int("time"),
    _text("account"),
    _text("kind"),
    Column("job_id", Int),
    _text("counterparty"),
    _amount("amount"),
    _amount("balance"),
    # Index of the line in the account's statement, from 1.
    _int("line"),
)
Index("movements_account", movements.c.account, movements.c.line, unique=True)
Index("movements_job", movements.c.job_id, movements.c.block, movements.c.number)
Index("movements_transaction", movements.c.block, movements.c.position)

# Settlements, and interim payments, whose status is RUNNING.
settlements: Final = Table(
    "settlements",
    metadata,
    _int("block", primary_key=True),
    _int("log_index", primary_key=True),
    _int("position"),
    _int("time"),
    _int("job_id"),
    _int("status"),
    _text("customer"),
    Column("provider", String),
    _int("billed_seconds"),
    _amount("paid"),
    _amount("fee"),
    _amount("refunded"),
)
Index("settlements_job", settlements.c.job_id, settlements.c.block, settlements.c.log_index)
Index("settlements_provider", settlements.c.provider, settlements.c.block, settlements.c.log_index)

jobs: Final = Table(
    "jobs",
    metadata,
    _int("id", primary_key=True, autoincrement=False),
    _text("customer"),
    Column("provider", String),
    _int("status"),
    _int("since"),
    Column("name", Words, nullable=False),
    # The case-folded name, for searches.
    Column("name_key", Words, nullable=False),
    Column("uses", Words, nullable=False),
    _int("objective"),
    _text("definition"),
    _int("tasks"),
    _int("cpus_per_task"),
    _int("mem_per_cpu"),
    _int("gpus"),
    _int("time_limit"),
    _int("flags"),
    _int("retries"),
    _int("retries_left"),
    _amount("amount"),
    _int("first_limit"),
    _amount("rate"),
    _int("fee_bps"),
    _amount("escrow"),
    _amount("funded"),
    _amount("carried_in"),
    _amount("carried_out"),
    _amount("paid"),
    _amount("fee"),
    _amount("refunded"),
    _int("billed_seconds"),
    # The part of paid, fee and billed seconds that is due to interim payments.
    _int("collected_seconds"),
    _amount("collected_paid"),
    _amount("collected_fee"),
    _int("settled"),
    _int("submitted_at"),
    _int("started_at"),
    _int("ended_at"),
    Column("exit_code", Int),
    _text("result"),
    Column("reason", Words, nullable=False),
    Column("retry_of", Int),
    Column("successor", Int),
    # Position of the last transition or interim payment.
    _int("block"),
    _int("position"),
    _int("log_index"),
)
Index("jobs_status", jobs.c.status, jobs.c.id)
Index("jobs_customer", jobs.c.customer, jobs.c.id)
Index("jobs_provider", jobs.c.provider, jobs.c.id)
Index("jobs_name", jobs.c.name_key, jobs.c.id)
Index("jobs_definition", jobs.c.definition, jobs.c.id)

providers: Final = Table(
    "providers",
    metadata,
    _text("account", primary_key=True),
    Column("id", Int),
    _int("status"),
    _int("nodes"),
    _int("cpus_per_node"),
    _int("mem_per_node"),
    _int("gpus_per_node"),
    _int("offer_cpus"),
    _int("offer_memory"),
    _int("offer_gpus"),
    _amount("price_cpu"),
    _amount("price_gpu"),
    _amount("price_mem"),
    Column("labels", Text, nullable=False),
    _int("version"),
    _int("pending_version"),
    _int("approved_until"),
    _int("draining"),
    _int("banned"),
    _int("answer_by"),
)

# Running totals of a provider after each block that changed them.
provider_figures: Final = Table(
    "provider_figures",
    metadata,
    _text("account", primary_key=True),
    _int("block", primary_key=True),
    _int("time"),
    *(
        _int(name)
        for name in (
            *("assigned", "started", "returned", "finished", "failed", "out_of_credits"),
            *("cancelled", "panicked", "live", "running", "cpus_busy", "gpus_busy"),
            *("cpus_offered", "cpus_assigned", "memory_assigned", "gpus_assigned"),
            "busy_seconds",
        )
    ),
    _amount("earned"),
    _amount("cpu_seconds"),
    _amount("offered_seconds"),
)
Index(
    "provider_figures_time",
    provider_figures.c.account,
    provider_figures.c.time,
    provider_figures.c.block,
)

# Totals of the grid after each block with events.
totals: Final = Table(
    "totals",
    metadata,
    _int("block", primary_key=True, autoincrement=False),
    _int("time"),
    *(
        _int(name)
        for name in (
            *("pending", "meta_scheduled", "scheduled", "running", "cancelled"),
            *("finished", "failed", "out_of_credits", "panicked"),
        )
    ),
    *(
        _amount(name)
        for name in (
            *("minted", "burned", "escrow", "parked", "donated"),
            *("paid", "fees", "refunded"),
        )
    ),
)
Index("totals_time", totals.c.time, totals.c.block)

# Parked payments and withdrawals: signed amount, and the recipient's parked credits afterwards.
parkings: Final = Table(
    "parkings",
    metadata,
    _int("block", primary_key=True),
    _int("log_index", primary_key=True),
    _int("position"),
    _text("recipient"),
    _amount("amount"),
    _amount("held"),
)
Index("parkings_recipient", parkings.c.recipient, parkings.c.block, parkings.c.log_index)

roles: Final = Table(
    "roles",
    metadata,
    _int("block", primary_key=True),
    _int("log_index", primary_key=True),
    _int("position"),
    _text("contract"),
    _text("role"),
    _text("account"),
    Column("granted", Boolean, nullable=False),
    _text("by"),
)
Index("roles_account", roles.c.account, roles.c.block, roles.c.log_index)

parameters: Final = Table(
    "parameters",
    metadata,
    _int("block", primary_key=True),
    _int("log_index", primary_key=True),
    _int("position"),
    _text("name"),
    _text("value"),
)

# Anomalies by the rules of the audit; `number` is the index in the block.
exceptions: Final = Table(
    "exceptions",
    metadata,
    _int("block", primary_key=True),
    _int("number", primary_key=True),
    _int("position"),
    _text("code"),
    _text("subject"),
    _text("severity"),
    Column("job_id", Int),
    Column("account", String),
    Column("message", Words, nullable=False),
)
Index("exceptions_code", exceptions.c.code, exceptions.c.block, exceptions.c.number)
Index("exceptions_subject", exceptions.c.subject, exceptions.c.block, exceptions.c.number)

# Parameters that the deployment fixed permanently.
constants: Final = Table(
    "constants",
    metadata,
    _text("name", primary_key=True),
    _text("value"),
)

# -- state of the index

state: Final = Table(
    "state",
    metadata,
    _text("key", primary_key=True),
    _text("value"),
)

changes: Final = Table(
    "changes",
    metadata,
    _int("number", primary_key=True, autoincrement=False),
    _text("kind"),
    _int("first_block"),
    _int("last_block"),
    Column("jobs", Text, nullable=False),
)

#: Tables that are derived from the chain, in a fixed order for comparisons.
DERIVED: Final = tuple(t for t in metadata.sorted_tables if t not in {state, changes})
