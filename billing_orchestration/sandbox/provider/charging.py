"""A charge at the provider: what the saved method's script makes of it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from billing_orchestration.sandbox.provider.answers import NO_RECURRING, forbidden, invalid
from billing_orchestration.sandbox.provider.charge_requests import ChargeRequest
from billing_orchestration.sandbox.provider.payment_books import PaymentBooks
from billing_orchestration.sandbox.provider.payments import Payment
from billing_orchestration.sandbox.provider.switches import Switches


def charge(
    books: PaymentBooks, request: ChargeRequest, now: datetime, switches: Switches, fields: dict[str, Any]
) -> Payment:
    """Carry out a creation of a payment. `fields`: what its shop and its key add to it."""
    if not switches.recurring and (request.payment_method_id is not None or request.save_method):
        raise forbidden(NO_RECURRING)
    fields = {
        **fields,
        "amount": request.amount,
        "currency": request.currency,
        "description": request.description,
        "metadata": request.metadata,
        "capture": request.capture,
        "gateway_id": request.gateway_id,
    }
    if request.receipt is not None and switches.receipts != "off":
        fields["receipt"] = request.receipt
        fields["registration"] = "pending"
        fields["registers"] = (switches.registration, switches.registration_s)
    if request.payment_method_id is None:
        return books.add_unconfirmed(now, method_type=request.method_type, save_method=request.save_method, **fields)
    method = books.state.methods.get(request.payment_method_id)
    if method is None:
        raise invalid("Payment method doesn't exist or access denied", "payment_method_id")
    if not method.saved:
        raise invalid(f"Payment method is not saved: it is {method.status}", "payment_method_id")
    result = method.next_outcome()
    if result.kind == "forbidden":
        raise forbidden(NO_RECURRING)
    if result.kind == "bad_request":
        raise invalid("Payment method is not available for this payment", "payment_method_id")
    payment = books.add(
        now,
        status="pending",
        method_type=method.type,
        method_id=method.id,
        method_saved=True,
        card_last4=method.card_last4,
        **fields,
    )
    if payment.receipt is not None and switches.receipts == "receipt_first":
        payment.after_receipt = result
        books.send_receipt(payment, now)
    else:
        books.come_to(payment, result, now)
    return payment
