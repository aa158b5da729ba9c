"""A refund that is asked for through the API: of which payment, and how much of it at most."""

from __future__ import annotations

from datetime import datetime

from billing_orchestration.sandbox.provider.answers import invalid
from billing_orchestration.sandbox.provider.pages import HISTORY
from billing_orchestration.sandbox.provider.payment_books import PaymentBooks
from billing_orchestration.sandbox.provider.records import outcome
from billing_orchestration.sandbox.provider.refunds import Refund, RefundRequest
from billing_orchestration.sandbox.provider.switches import Switches


def refund(books: PaymentBooks, request: RefundRequest, now: datetime, switches: Switches, key: str) -> Refund:
    """Carry out a creation of a refund."""
    payment = books.state.payments.get(request.payment_id)
    if payment is None:
        raise invalid("Payment doesn't exist or access denied", "payment_id")
    if payment.status != "succeeded":
        raise invalid(f"A payment in the status {payment.status} cannot be refunded", "payment_id")
    if now - payment.created_at > HISTORY:
        raise invalid("A payment can be refunded within three years", "payment_id")
    if request.currency != payment.currency:
        raise invalid("Currency differs from the payment's", "amount.currency")
    if request.amount > books.refundable(payment):
        raise invalid("Refund amount exceeds what is left of the payment", "amount")
    return books.add_refund(
        payment,
        request.amount,
        now,
        outcome(switches.refunds),
        description=request.description,
        metadata=request.metadata,
        idempotence_key=key,
    )
