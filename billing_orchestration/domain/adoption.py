"""A person accepts the provider's truth about a payment: which of our rows change, and to what. Nothing is granted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from billing_orchestration.domain.money import Money
from billing_orchestration.domain.provider_payment import CANCELED, SUCCEEDED, ProviderPayment
from billing_orchestration.domain.settlement_decisions import PaymentRow


@dataclass(frozen=True, slots=True)
class RowChange:
    """A payment row takes a status, and with `money` an amount and its currency."""

    row: PaymentRow
    status: str
    money: Money | None = None


def provider_truth(
    rows: Sequence[PaymentRow], payment: ProviderPayment | None, settled_row: int | None = None
) -> list[RowChange]:
    """What the paid rows of a payment become if they say what the provider says. None: it knows no such payment.

    Rows that are open or closed without money stay: the jobs see to them. `settled_row`: the one that was granted.
    """
    paid = [row for row in rows if row.status in ("SUCCEEDED", "REFUNDED")]
    if payment is None or payment.status != SUCCEEDED:
        status = _status_of_unpaid(payment)
        return [RowChange(row, status) for row in paid]
    if not paid:
        return []
    status = "REFUNDED" if payment.refunded_in_full else "SUCCEEDED"
    holder = min(
        paid, key=lambda row: (row.id != settled_row, row.subscription_id is None, row.status != status, row.id)
    )
    changes = [RowChange(row, "EXPIRED") for row in paid if row is not holder]
    money = None if holder.money == payment.money else payment.money
    if money is not None or holder.status != status:
        changes.append(RowChange(holder, status, money))
    return changes


def _status_of_unpaid(payment: ProviderPayment | None) -> str:
    """Of a payment that took no money. One that the provider does not know may turn up: EXPIRED can be revived."""
    if payment is None:
        return "EXPIRED"
    return "CANCELED" if payment.status == CANCELED else "PENDING"
