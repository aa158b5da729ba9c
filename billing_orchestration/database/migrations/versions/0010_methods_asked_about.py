"""What the provider said about a payment method before its first charge, so that it is asked once.

Revision ID: 0010
Revises: 0009
"""

from __future__ import annotations

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table: one row for each payment or method that was asked about."""
    op.execute("""
        CREATE TABLE billing_orchestration.asked_methods (
            payment_provider_id bigint NOT NULL,
            about text NOT NULL,
            name text NOT NULL,
            answer text NOT NULL,
            payment_method_id text,
            asked_at timestamptz NOT NULL,
            run_id text NOT NULL,
            CONSTRAINT asked_methods_pkey PRIMARY KEY (payment_provider_id, about, name)
        )
    """)
    op.execute("COMMENT ON COLUMN billing_orchestration.asked_methods.about IS 'payment | method'")
    op.execute("COMMENT ON COLUMN billing_orchestration.asked_methods.payment_method_id IS 'what is charged'")


def downgrade() -> None:
    """Drop it."""
    op.execute("DROP TABLE billing_orchestration.asked_methods")
