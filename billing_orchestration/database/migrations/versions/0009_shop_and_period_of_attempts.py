"""An attempt remembers its shop, and the period that is paid for.

Attempts that exist keep NULL: nobody wrote down which shop was asked. One that was never sent is planned anew; one that
may have been sent is asked about and searched for, and neither sent again nor given up (docs/operations.md).

Revision ID: 0009
Revises: 0008
"""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

_COLUMNS = {
    "shop_id": ("text", "the shop that it is charged by; NULL: planned before revision 0009"),
    "period_count": ("integer", "the period that is paid for, frozen with the price"),
    "period_unit": ("text", None),
}


def upgrade() -> None:
    """Add the columns to our own table; no row is rewritten."""
    for column, (kind, comment) in _COLUMNS.items():
        op.execute(f"ALTER TABLE billing_orchestration.renewal_attempts ADD {column} {kind}")
        if comment:
            op.execute(f"COMMENT ON COLUMN billing_orchestration.renewal_attempts.{column} IS '{comment}'")


def downgrade() -> None:
    """Drop them."""
    for column in _COLUMNS:
        op.execute(f"ALTER TABLE billing_orchestration.renewal_attempts DROP {column}")
