"""The first tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_INT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """From nothing."""
    op.create_table(
        "blocks",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("hash", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("name", "number"),
    )
    op.create_table(
        "changes",
        sa.Column("number", _INT, autoincrement=False, nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("first_block", _INT, nullable=False),
        sa.Column("last_block", _INT, nullable=False),
        sa.Column("jobs", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("number"),
    )
    op.create_table(
        "constants",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("value", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "events",
        sa.Column("block", _INT, nullable=False),
        sa.Column("log_index", _INT, nullable=False),
        sa.Column("position", _INT, nullable=False),
        sa.Column("contract", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("job_id", _INT, nullable=True),
        sa.Column("account", sa.String(), nullable=True),
        sa.Column("body", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("block", "log_index"),
    )
    op.create_index(
        "events_account",
        "events",
        ["account", "block", "log_index"],
        unique=False,
        sqlite_where=sa.text("account IS NOT NULL"),
        postgresql_where=sa.text("account IS NOT NULL"),
    )
    op.create_index("events_job", "events", ["job_id", "block", "log_index"], unique=False)
    op.create_index("events_transaction", "events", ["block", "position"], unique=False)
    op.create_table(
        "headers",
        sa.Column("number", _INT, autoincrement=False, nullable=False),
        sa.Column("hash", sa.String(), nullable=False),
        sa.Column("parent", sa.String(), nullable=False),
        sa.Column("time", _INT, nullable=False),
        sa.Column("gas_used", _INT, nullable=False),
        sa.Column("gas_limit", sa.Text(), nullable=False),
        sa.Column("base_fee", sa.Text(), nullable=False),
        sa.Column("all_transactions", _INT, nullable=False),
        sa.Column("transactions", _INT, nullable=False),
        sa.PrimaryKeyConstraint("number"),
        sa.UniqueConstraint("hash"),
    )
    op.create_table(
        "identity",
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("key"),
    )
    op.create_table(
        "jobs",
        sa.Column("id", _INT, autoincrement=False, nullable=False),
        sa.Column("customer", sa.String(), nullable=False),
        sa.Column("provider", sa.String(), nullable=True),
        sa.Column("status", _INT, nullable=False),
        sa.Column("since", _INT, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("name_key", sa.Text(), nullable=False),
        sa.Column("uses", sa.Text(), nullable=False),
        sa.Column("objective", _INT, nullable=False),
        sa.Column("definition", sa.String(), nullable=False),
        sa.Column("tasks", _INT, nullable=False),
        sa.Column("cpus_per_task", _INT, nullable=False),
        sa.Column("mem_per_cpu", _INT, nullable=False),
        sa.Column("gpus", _INT, nullable=False),
        sa.Column("time_limit", _INT, nullable=False),
        sa.Column("until_spent", _INT, nullable=False),
        sa.Column("retries", _INT, nullable=False),
        sa.Column("retries_left", _INT, nullable=False),
        sa.Column("amount", sa.Text(), nullable=False),
        sa.Column("first_limit", _INT, nullable=False),
        sa.Column("rate", sa.Text(), nullable=False),
        sa.Column("fee_bps", _INT, nullable=False),
        sa.Column("escrow", sa.Text(), nullable=False),
        sa.Column("funded", sa.Text(), nullable=False),
        sa.Column("carried_in", sa.Text(), nullable=False),
        sa.Column("carried_out", sa.Text(), nullable=False),
        sa.Column("paid", sa.Text(), nullable=False),
        sa.Column("fee", sa.Text(), nullable=False),
        sa.Column("refunded", sa.Text(), nullable=False),
        sa.Column("billed_seconds", _INT, nullable=False),
        sa.Column("settled", _INT, nullable=False),
        sa.Column("submitted_at", _INT, nullable=False),
        sa.Column("started_at", _INT, nullable=False),
        sa.Column("ended_at", _INT, nullable=False),
        sa.Column("exit_code", _INT, nullable=True),
        sa.Column("result", sa.String(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("retry_of", _INT, nullable=True),
        sa.Column("successor", _INT, nullable=True),
        sa.Column("block", _INT, nullable=False),
        sa.Column("position", _INT, nullable=False),
        sa.Column("log_index", _INT, nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("jobs_customer", "jobs", ["customer", "id"], unique=False)
    op.create_index("jobs_definition", "jobs", ["definition", "id"], unique=False)
    op.create_index("jobs_name", "jobs", ["name_key", "id"], unique=False)
    op.create_index("jobs_provider", "jobs", ["provider", "id"], unique=False)
    op.create_index("jobs_status", "jobs", ["status", "id"], unique=False)
    op.create_table(
        "movements",
        sa.Column("block", _INT, nullable=False),
        sa.Column("number", _INT, nullable=False),
        sa.Column("position", _INT, nullable=False),
        sa.Column("log_index", _INT, nullable=False),
        sa.Column("time", _INT, nullable=False),
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("job_id", _INT, nullable=True),
        sa.Column("counterparty", sa.String(), nullable=False),
        sa.Column("amount", sa.Text(), nullable=False),
        sa.Column("balance", sa.Text(), nullable=False),
        sa.Column("line", _INT, nullable=False),
        sa.PrimaryKeyConstraint("block", "number"),
    )
    op.create_index("movements_account", "movements", ["account", "line"], unique=True)
    op.create_index("movements_job", "movements", ["job_id", "block", "number"], unique=False)
    op.create_index("movements_transaction", "movements", ["block", "position"], unique=False)
    op.create_table(
        "parameters",
        sa.Column("block", _INT, nullable=False),
        sa.Column("log_index", _INT, nullable=False),
        sa.Column("position", _INT, nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("value", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("block", "log_index"),
    )
    op.create_table(
        "parkings",
        sa.Column("block", _INT, nullable=False),
        sa.Column("log_index", _INT, nullable=False),
        sa.Column("position", _INT, nullable=False),
        sa.Column("recipient", sa.String(), nullable=False),
        sa.Column("amount", sa.Text(), nullable=False),
        sa.Column("held", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("block", "log_index"),
    )
    op.create_index(
        "parkings_recipient", "parkings", ["recipient", "block", "log_index"], unique=False
    )
    op.create_table(
        "provider_figures",
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("block", _INT, nullable=False),
        sa.Column("time", _INT, nullable=False),
        sa.Column("assigned", _INT, nullable=False),
        sa.Column("started", _INT, nullable=False),
        sa.Column("returned", _INT, nullable=False),
        sa.Column("finished", _INT, nullable=False),
        sa.Column("failed", _INT, nullable=False),
        sa.Column("out_of_credits", _INT, nullable=False),
        sa.Column("cancelled", _INT, nullable=False),
        sa.Column("panicked", _INT, nullable=False),
        sa.Column("live", _INT, nullable=False),
        sa.Column("running", _INT, nullable=False),
        sa.Column("cpus_busy", _INT, nullable=False),
        sa.Column("gpus_busy", _INT, nullable=False),
        sa.Column("cpus_offered", _INT, nullable=False),
        sa.Column("busy_seconds", _INT, nullable=False),
        sa.Column("earned", sa.Text(), nullable=False),
        sa.Column("cpu_seconds", sa.Text(), nullable=False),
        sa.Column("offered_seconds", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("account", "block"),
    )
    op.create_index(
        "provider_figures_time", "provider_figures", ["account", "time", "block"], unique=False
    )
    op.create_table(
        "providers",
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("id", _INT, nullable=True),
        sa.Column("status", _INT, nullable=False),
        sa.Column("nodes", _INT, nullable=False),
        sa.Column("cpus_per_node", _INT, nullable=False),
        sa.Column("mem_per_node", _INT, nullable=False),
        sa.Column("gpus_per_node", _INT, nullable=False),
        sa.Column("offer_cpus", _INT, nullable=False),
        sa.Column("offer_memory", _INT, nullable=False),
        sa.Column("offer_gpus", _INT, nullable=False),
        sa.Column("price_cpu", sa.Text(), nullable=False),
        sa.Column("price_gpu", sa.Text(), nullable=False),
        sa.Column("price_mem", sa.Text(), nullable=False),
        sa.Column("labels", sa.Text(), nullable=False),
        sa.Column("version", _INT, nullable=False),
        sa.Column("pending_version", _INT, nullable=False),
        sa.Column("approved_until", _INT, nullable=False),
        sa.Column("draining", _INT, nullable=False),
        sa.Column("banned", _INT, nullable=False),
        sa.Column("answer_by", _INT, nullable=False),
        sa.PrimaryKeyConstraint("account"),
    )
    op.create_table(
        "roles",
        sa.Column("block", _INT, nullable=False),
        sa.Column("log_index", _INT, nullable=False),
        sa.Column("position", _INT, nullable=False),
        sa.Column("contract", sa.String(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("granted", sa.Boolean(), nullable=False),
        sa.Column("by", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("block", "log_index"),
    )
    op.create_index("roles_account", "roles", ["account", "block", "log_index"], unique=False)
    op.create_table(
        "settlements",
        sa.Column("block", _INT, nullable=False),
        sa.Column("log_index", _INT, nullable=False),
        sa.Column("position", _INT, nullable=False),
        sa.Column("time", _INT, nullable=False),
        sa.Column("job_id", _INT, nullable=False),
        sa.Column("status", _INT, nullable=False),
        sa.Column("customer", sa.String(), nullable=False),
        sa.Column("provider", sa.String(), nullable=True),
        sa.Column("billed_seconds", _INT, nullable=False),
        sa.Column("paid", sa.Text(), nullable=False),
        sa.Column("fee", sa.Text(), nullable=False),
        sa.Column("refunded", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("block", "log_index"),
    )
    op.create_index(
        "settlements_provider", "settlements", ["provider", "block", "log_index"], unique=False
    )
    op.create_table(
        "state",
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("value", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("key"),
    )
    op.create_table(
        "totals",
        sa.Column("block", _INT, autoincrement=False, nullable=False),
        sa.Column("time", _INT, nullable=False),
        sa.Column("pending", _INT, nullable=False),
        sa.Column("meta_scheduled", _INT, nullable=False),
        sa.Column("scheduled", _INT, nullable=False),
        sa.Column("running", _INT, nullable=False),
        sa.Column("cancelled", _INT, nullable=False),
        sa.Column("finished", _INT, nullable=False),
        sa.Column("failed", _INT, nullable=False),
        sa.Column("out_of_credits", _INT, nullable=False),
        sa.Column("panicked", _INT, nullable=False),
        sa.Column("minted", sa.Text(), nullable=False),
        sa.Column("burned", sa.Text(), nullable=False),
        sa.Column("escrow", sa.Text(), nullable=False),
        sa.Column("parked", sa.Text(), nullable=False),
        sa.Column("donated", sa.Text(), nullable=False),
        sa.Column("paid", sa.Text(), nullable=False),
        sa.Column("fees", sa.Text(), nullable=False),
        sa.Column("refunded", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("block"),
    )
    op.create_index("totals_time", "totals", ["time", "block"], unique=False)
    op.create_table(
        "transactions",
        sa.Column("block", _INT, nullable=False),
        sa.Column("position", _INT, nullable=False),
        sa.Column("hash", sa.String(), nullable=False),
        sa.Column("sender", sa.String(), nullable=False),
        sa.Column("to", sa.String(), nullable=True),
        sa.Column("contract", sa.String(), nullable=False),
        sa.Column("selector", sa.String(), nullable=False),
        sa.Column("method", sa.String(), nullable=False),
        sa.Column("ok", sa.Boolean(), nullable=False),
        sa.Column("gas_used", _INT, nullable=False),
        sa.Column("gas_price", sa.Text(), nullable=False),
        sa.Column("nonce", _INT, nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("input", sa.LargeBinary(), nullable=False),
        sa.Column("events", _INT, nullable=False),
        sa.PrimaryKeyConstraint("block", "position"),
        sa.UniqueConstraint("hash"),
    )
    op.create_index(
        "transactions_sender", "transactions", ["sender", "block", "position"], unique=False
    )
    op.create_table(
        "transitions",
        sa.Column("block", _INT, nullable=False),
        sa.Column("log_index", _INT, nullable=False),
        sa.Column("position", _INT, nullable=False),
        sa.Column("time", _INT, nullable=False),
        sa.Column("job_id", _INT, nullable=False),
        sa.Column("before", _INT, nullable=False),
        sa.Column("after", _INT, nullable=False),
        sa.Column("customer", sa.String(), nullable=False),
        sa.Column("provider", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("block", "log_index"),
    )
    op.create_index(
        "transitions_job", "transitions", ["job_id", "block", "log_index"], unique=False
    )
