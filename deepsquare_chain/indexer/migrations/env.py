"""The script that alembic runs for each upgrade; `migrate` passes the connection."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
with context.begin_transaction():
    context.run_migrations()
