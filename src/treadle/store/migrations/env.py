"""Alembic runs this file for every command. The connection, and its transaction, come from the caller."""

from __future__ import annotations

from alembic import context

from treadle.store.tables import metadata

connection = context.config.attributes.get("connection")
if connection is None:
    raise RuntimeError("migrations run through treadle.store.migrate, on a connection that it opened")

# SQLite cannot alter columns: batch mode copies the table instead.
context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
