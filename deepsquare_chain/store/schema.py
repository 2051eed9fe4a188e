"""Tables that every service has, and the column type for money."""

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

#: Modules that own further tables define them with this; `Store.open` creates them.
metadata: Final = MetaData()


class Amount(TypeDecorator[int]):
    """An integer of any size, kept as text: SQLite's numbers lose wei."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        """Text for the database."""
        return None if value is None else str(int(value))

    def process_result_value(self, value: Any, dialect: Dialect) -> int | None:  # noqa: ARG002
        """The integer back."""
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

# An abandoned transaction gives its nonce back, a failed one the key of its effect.
_has_nonce = outbox.c.state != "abandoned"
_has_key = outbox.c.state.in_(["open", "mined"])
Index("outbox_nonce", outbox.c.nonce, unique=True, sqlite_where=_has_nonce)
Index("outbox_key", outbox.c.key, unique=True, sqlite_where=_has_key)
Index("outbox_state", outbox.c.state)

attempts: Final = Table(
    "outbox_attempts",
    metadata,
    # Not the hash: an abandoned transaction that is signed again is the same bytes.
    Column("entry_id", Integer, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("tx_hash", String, nullable=False),
    Column("raw", LargeBinary, nullable=False),
    Column("max_fee", Amount, nullable=False),
    Column("priority_fee", Amount, nullable=False),
    Column("sent_block", Integer, nullable=False),
    Column("cancels", Boolean, nullable=True),
)

#: Tables that got further columns, all of which may be null, after databases of them existed.
GROWN: Final = (outbox, attempts)
