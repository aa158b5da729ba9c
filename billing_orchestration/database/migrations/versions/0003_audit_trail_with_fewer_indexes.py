"""The audit trail is written by the million and read by the case: one index less, and a small one for a large one.

The primary key begins with the entity's id, so it finds an entity's entries as well; the runs' entries are found by
when they were written, in an index of a few pages.

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_TABLE = "billing_orchestration.audit_trail"


def upgrade() -> None:
    """Build the new ones, then let them take the place of the others: reading goes on all the while."""
    op.execute(f"CREATE INDEX audit_trail_at ON {_TABLE} USING brin (at) WITH (pages_per_range = 32)")
    _replace_primary_key("entity_id, id")
    op.execute("DROP INDEX billing_orchestration.audit_trail_entity")
    op.execute("DROP INDEX billing_orchestration.audit_trail_run_id")


def downgrade() -> None:
    """Put the former four back."""
    op.execute(f"CREATE INDEX audit_trail_entity ON {_TABLE} (entity, entity_id)")
    op.execute(f"CREATE INDEX audit_trail_run_id ON {_TABLE} (run_id)")
    _replace_primary_key("id")
    op.execute("DROP INDEX billing_orchestration.audit_trail_at")


def _replace_primary_key(columns: str) -> None:
    op.execute(f"CREATE UNIQUE INDEX audit_trail_pkey_new ON {_TABLE} ({columns})")
    op.execute(
        f"ALTER TABLE {_TABLE} DROP CONSTRAINT audit_trail_pkey,"
        " ADD CONSTRAINT audit_trail_pkey PRIMARY KEY USING INDEX audit_trail_pkey_new"
    )
