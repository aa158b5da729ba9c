"""Rows of the service's `payments`, as every job reads them."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from functools import lru_cache
from typing import Any

import sqlalchemy as sa

from billing_orchestration.domain.money import Money
from billing_orchestration.domain.settlement_decisions import PaymentRow


def select_rows(connection: sa.Connection, where: str, values: Mapping[str, Any]) -> list[PaymentRow]:
    """The payment rows that fit. `where` is SQL of this package (never input), its values are bound."""
    return [_row(*columns) for columns in connection.execute(_statement(where), values).tuples()]


def _statement(where: str) -> sa.TextClause:
    return sa.text(f"""
        SELECT id, subscription_id, payment_provider_id, status::text AS status, amount,
               currency::text AS currency, external_payment_id
        FROM payments WHERE {where}
    """)


def _row(
    id_: int,
    subscription_id: int | None,
    payment_provider_id: int | None,
    status: str | None,
    amount: Decimal,
    currency: str | None,
    external_payment_id: str | None,
) -> PaymentRow:
    money = None if currency is None else _money(amount, currency)
    return PaymentRow(id_, subscription_id, payment_provider_id, status, money, external_payment_id)


@lru_cache(maxsize=4096)
def _money(amount: Decimal, currency: str) -> Money:
    # A service has a handful of prices, a slice has thousands of payments.
    return Money(amount, currency)
