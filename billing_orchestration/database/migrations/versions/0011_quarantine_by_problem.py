"""Whether a person has resolved a problem for good is found by an index: it is asked whenever a problem is met again.

Revision ID: 0011
Revises: 0010
"""

from __future__ import annotations

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the index to our own table; opening an entry waits meanwhile."""
    op.execute("CREATE INDEX quarantine_problem_key ON billing_orchestration.quarantine (problem_key)")


def downgrade() -> None:
    """Drop it."""
    op.execute("DROP INDEX billing_orchestration.quarantine_problem_key")
