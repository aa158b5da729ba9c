"""What Alembic runs: it migrates the schema `billing_orchestration` on the connection that `migrating.py` hands over.

The caller owns the transaction, so that a migration is there as a whole or not at all.
"""

from __future__ import annotations

from alembic import context

from billing_orchestration.database.conventions import SCHEMA
from billing_orchestration.database.health import VERSION_TABLE
from billing_orchestration.database.tables import ours

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=ours,
    # In our schema and under a name of its own: the service keeps its revision in public.alembic_version.
    version_table=VERSION_TABLE,
    version_table_schema=SCHEMA,
)
with context.begin_transaction():
    context.run_migrations()
