"""Tables of every service's database, and the column type for amounts of money."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
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

#: Other modules define their own tables with this metadata; `Store.open` creates them.
metadata: Final = MetaData()


class Amount(TypeDecorator[int]):
    """An integer of any size, stored as text: SQLite's numbers would lose precision in wei."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        """Convert to text for the database."""
        return None if value is None else str(int(value))

    def process_result_value(self, value: Any, dialect: Dialect) -> int | None:  # noqa: ARG002
        """Convert back to an integer."""
        return None if value is None else int(value)


identity: Final = Table(
    "identity",
    metadata,
    Column("key", String, primary_key=True),
    Column("value", Text, nullable=False),
)

blocks: Final = Table(
    "blocks",
    metadata,
    Column("name", String, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("hash", String, nullable=False),
)

outbox: Final = Table(
    "outbox",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("nonce", Integer, nullable=False),
    Column("key", String, nullable=True),
    Column("to", String, nullable=False),
    Column("data", LargeBinary, nullable=False),
    Column("value", Amount, nullable=False),
    Column("label", Text, nullable=False),
    Column("gas", Integer, nullable=False),
    Column("state", String, nullable=False),
    Column("mined_hash", String, nullable=False, default=""),
    Column("note", Text, nullable=False, default=""),
    Column("created", Integer, nullable=True),
    Column("fee", Amount, nullable=True),
)

# The nonce of an abandoned transaction is free again, and so is the key of a failed one.
_has_nonce = outbox.c.state != "abandoned"
_has_key = outbox.c.state.in_(["open", "mined"])
Index("outbox_nonce", outbox.c.nonce, unique=True, sqlite_where=_has_nonce)
Index("outbox_key", outbox.c.key, unique=True, sqlite_where=_has_key)
Index("outbox_state", outbox.c.state)

attempts: Final = Table(
    "outbox_attempts",
    metadata,
    # Not the hash: an abandoned transaction that is signed again has the same bytes.
    Column("entry_id", Integer, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("tx_hash", String, nullable=False),
    Column("raw", LargeBinary, nullable=False),
    Column("max_fee", Amount, nullable=False),
    Column("priority_fee", Amount, nullable=False),
    Column("sent_block", Integer, nullable=False),
    Column("cancels", Boolean, nullable=True),
)

#: Tables that got more columns, all nullable, after a release.
GROWN: Final = (outbox, attempts)
