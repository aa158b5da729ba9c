"""The audit trail's index on the provider's payment id leaves out the entries that have none: expiry writes many.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_TABLE = "billing_orchestration.audit_trail"
_NAME = "audit_trail_external_payment_id"


def upgrade() -> None:
    """Build the smaller index, then let it take the place of the other: reading goes on all the while."""
    _replace("(external_payment_id) WHERE external_payment_id IS NOT NULL")


def downgrade() -> None:
    """Index all entries again."""
    _replace("(external_payment_id)")


def _replace(definition: str) -> None:
    op.execute(f"CREATE INDEX {_NAME}_new ON {_TABLE} {definition}")
    op.execute(f"DROP INDEX billing_orchestration.{_NAME}")
    op.execute(f"ALTER INDEX billing_orchestration.{_NAME}_new RENAME TO {_NAME}")
