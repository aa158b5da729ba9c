"""Ids of the service's rows as bigint: its tables may number past 2^31, and a charge must be written down then too.

The columns are rewritten under lock; stop the jobs meanwhile if the tables are large.

Revision ID: 0008
Revises: 0007
"""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_IDS = {
    "renewal_attempts": ("subscription_id", "plan_id", "payment_provider_id"),
    "settlements": ("payment_id", "subscription_id", "plan_id"),
    "saved_methods": ("subscription_id", "payment_provider_id"),
    "quarantine": ("payment_id", "subscription_id"),
}


def upgrade() -> None:
    """Widen them, table by table."""
    _alter("bigint")


def downgrade() -> None:
    """Narrow them again; PostgreSQL refuses where an id no longer fits."""
    _alter("integer")


def _alter(kind: str) -> None:
    for table, columns in _IDS.items():
        changes = ", ".join(f"ALTER COLUMN {column} TYPE {kind}" for column in columns)
        op.execute(f"ALTER TABLE billing_orchestration.{table} {changes}")
