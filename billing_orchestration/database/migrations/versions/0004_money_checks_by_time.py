"""The hourly money checks look back some days: indexes of a few pages find those days in years of settlements.

Both tables are written in the order of time, so a block range index on the time is enough, and costs a charge nothing
that can be measured.

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_INDEXES = {
    "settlements_settled_at": "billing_orchestration.settlements USING brin (settled_at)",
    "renewal_attempts_closed_at": "billing_orchestration.renewal_attempts USING brin (closed_at)",
}


def upgrade() -> None:
    """Build them; writing to the two tables waits meanwhile."""
    for name, where in _INDEXES.items():
        op.execute(f"CREATE INDEX {name} ON {where} WITH (pages_per_range = 32)")


def downgrade() -> None:
    """Drop them."""
    for name in _INDEXES:
        op.execute(f"DROP INDEX billing_orchestration.{name}")
