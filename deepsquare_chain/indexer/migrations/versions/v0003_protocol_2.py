"""Flags, interim payments, load and forwarded calls: they follow from all events, read again."""

import time
from typing import Literal

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_INT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_READ_AGAIN = (
    *("blocks", "constants", "events", "exceptions", "headers", "jobs", "movements", "parameters"),
    *("parkings", "provider_figures", "providers", "roles", "settlements", "totals"),
    *("transactions", "transitions"),
)


def upgrade() -> None:
    """From the tables of the first protocol."""
    for name in _READ_AGAIN:
        op.execute(sa.table(name).delete())
    # SQLite adds no column without a default to a table, even to an empty one.
    copied: Literal["always", "never"] = (
        "always" if op.get_bind().dialect.name == "sqlite" else "never"
    )
    with op.batch_alter_table("jobs", recreate=copied) as table:
        table.drop_column("until_spent")
        table.add_column(sa.Column("flags", _INT, nullable=False))
        table.add_column(sa.Column("collected_seconds", _INT, nullable=False))
        table.add_column(sa.Column("collected_paid", sa.Text(), nullable=False))
        table.add_column(sa.Column("collected_fee", sa.Text(), nullable=False))
    with op.batch_alter_table("provider_figures", recreate=copied) as table:
        table.add_column(sa.Column("cpus_assigned", _INT, nullable=False))
        table.add_column(sa.Column("memory_assigned", _INT, nullable=False))
        table.add_column(sa.Column("gpus_assigned", _INT, nullable=False))
    op.create_index(
        "settlements_job", "settlements", ["job_id", "block", "log_index"], unique=False
    )
    op.create_table(
        "forwarded",
        sa.Column("block", _INT, nullable=False),
        sa.Column("position", _INT, nullable=False),
        sa.Column("number", _INT, nullable=False),
        sa.Column("signer", sa.String(), nullable=False),
        sa.Column("to", sa.String(), nullable=False),
        sa.Column("contract", sa.String(), nullable=False),
        sa.Column("method", sa.String(), nullable=False),
        sa.Column("ok", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("block", "position", "number"),
    )
    op.create_index("forwarded_signer", "forwarded", ["signer", "block", "position"], unique=False)
    state = sa.table("state", sa.column("key"), sa.column("value"))
    begun = {"block": "-1", "time": "0", "finalized": "-1", "built_since": f"{time.time():.3f}"}
    for key, value in begun.items():
        op.execute(state.update().where(state.c.key == key).values(value=value))
