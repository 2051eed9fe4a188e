"""Adds the anomalies of the audit. They follow from all events, which are read again."""

import time

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_INT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_READ_AGAIN = (
    *("blocks", "constants", "events", "headers", "jobs", "movements", "parameters", "parkings"),
    *("provider_figures", "providers", "roles", "settlements", "totals", "transactions"),
    "transitions",
)


def upgrade() -> None:
    """Upgrade from the first version."""
    op.create_table(
        "exceptions",
        sa.Column("block", _INT, nullable=False),
        sa.Column("number", _INT, nullable=False),
        sa.Column("position", _INT, nullable=False),
        sa.Column("code", sa.String(), nullable=False),
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("severity", sa.String(), nullable=False),
        sa.Column("job_id", _INT, nullable=True),
        sa.Column("account", sa.String(), nullable=True),
        sa.Column("message", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("block", "number"),
    )
    op.create_index("exceptions_code", "exceptions", ["code", "block", "number"], unique=False)
    op.create_index(
        "exceptions_subject", "exceptions", ["subject", "block", "number"], unique=False
    )
    for name in _READ_AGAIN:
        op.execute(sa.table(name).delete())
    state = sa.table("state", sa.column("key"), sa.column("value"))
    begun = {"block": "-1", "time": "0", "finalized": "-1", "built_since": f"{time.time():.3f}"}
    for key, value in begun.items():
        op.execute(state.update().where(state.c.key == key).values(value=value))
