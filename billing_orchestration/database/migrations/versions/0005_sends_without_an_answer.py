"""An attempt remembers whether its last send was answered: one that was not may still be in work at the provider.

An attempt that is open now counts as unanswered. That only makes it wait 45 s after its last send.

Revision ID: 0005
Revises: 0004
"""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_COMMENT = "the last send was claimed, and nothing says that the provider has finished with it"


def upgrade() -> None:
    """Add the column to our own table."""
    op.execute("ALTER TABLE billing_orchestration.renewal_attempts ADD unanswered boolean NOT NULL DEFAULT false")
    op.execute(f"COMMENT ON COLUMN billing_orchestration.renewal_attempts.unanswered IS '{_COMMENT}'")
    op.execute("""
        UPDATE billing_orchestration.renewal_attempts SET unanswered = true
        WHERE state IN ('PLANNED', 'UNKNOWN') AND last_sent_at IS NOT NULL
    """)


def downgrade() -> None:
    """Drop it."""
    op.execute("ALTER TABLE billing_orchestration.renewal_attempts DROP unanswered")
