"""What became of each day that was reconciled, for the money check and beyond the run history's own years.

Revision ID: 0006
Revises: 0005
"""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table: one row a day."""
    op.execute("""
        CREATE TABLE billing_orchestration.reconciled_days (
            day date PRIMARY KEY,
            starts_at timestamptz NOT NULL,
            ends_at timestamptz NOT NULL,
            lines integer NOT NULL,
            differences integer NOT NULL,
            unexplained integer NOT NULL,
            run_id text NOT NULL,
            reconciled_at timestamptz NOT NULL
        )
    """)
    op.execute("COMMENT ON COLUMN billing_orchestration.reconciled_days.differences IS 'left after repairs'")
    op.execute(
        "COMMENT ON COLUMN billing_orchestration.reconciled_days.unexplained IS 'of them, those that are before nobody'"
    )


def downgrade() -> None:
    """Drop it."""
    op.execute("DROP TABLE billing_orchestration.reconciled_days")
