"""The methods that a hard decline has stopped are found by an index: they are looked up at each renewal run.

Revision ID: 0007
Revises: 0006
"""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the index to our own table."""
    op.execute("""
        CREATE INDEX renewal_attempts_stopped_methods ON billing_orchestration.renewal_attempts (payment_method_id)
        WHERE state = 'STOPPED' AND decline_class = 'hard'
    """)


def downgrade() -> None:
    """Drop it."""
    op.execute("DROP INDEX billing_orchestration.renewal_attempts_stopped_methods")
