"""Rows of the service's `payments`, as every job reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from billing_orchestration.domain.money import Money
from billing_orchestration.domain.settlement import PaymentRow


def select_rows(connection: sa.Connection, where: str, values: Mapping[str, Any]) -> list[PaymentRow]:
    """The payment rows that fit. `where` is SQL of this package (never input), its values are bound."""
    rows = connection.execute(
        sa.text(f"""
            SELECT id, subscription_id, payment_provider_id, status::text AS status, amount,
                   currency::text AS currency, external_payment_id
            FROM payments WHERE {where}
        """),
        values,
    )
    return [
        PaymentRow(
            id=row.id,
            subscription_id=row.subscription_id,
            payment_provider_id=row.payment_provider_id,
            status=row.status,
            money=Money(row.amount, row.currency) if row.currency is not None else None,
            external_payment_id=row.external_payment_id,
        )
        for row in rows
    ]
