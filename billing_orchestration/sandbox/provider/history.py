"""Payments that were there before: put into the books as they are to be found, whatever their age and state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from billing_orchestration.sandbox.provider.clock import aware_utc
from billing_orchestration.sandbox.provider.methods import METHOD_STATUSES, METHOD_TYPES, SavedMethod
from billing_orchestration.sandbox.provider.payment_books import PaymentBooks
from billing_orchestration.sandbox.provider.payments import Payment
from billing_orchestration.sandbox.provider.records import Outcome, OutcomeLike, money, outcome

# Fields that the payment takes as they are, with their defaults.
_PLAIN = {
    "currency": "RUB", "description": None, "method_type": "bank_card", "card_last4": "4444", "cancellation": None,
    "raw": None, "registration": None, "gateway_id": None,
}  # fmt: skip


def add_payment(books: PaymentBooks, now: datetime, shop: dict[str, Any], given: Mapping[str, Any]) -> Payment:
    """Add one payment; `SandboxProvider.add_payments` lists its fields. `shop`: fields of its every payment."""
    fields = dict(given)
    status = fields.pop("status", "succeeded")
    created_at = aware_utc(fields.pop("created_at", None) or now)
    captured_at = fields.pop("captured_at", None) or (created_at if status == "succeeded" else None)
    saved, script = bool(fields.pop("saved", False)), fields.pop("script", None)
    refunded, refunded_at = money(fields.pop("refunded_amount", "0.00")), fields.pop("refunded_at", None)
    built = {
        "payment_id": fields.pop("id", None),
        "amount": money(fields.pop("amount", "990.00")),
        "status": status,
        "metadata": dict(fields.pop("metadata", None) or {}),
        "method_id": fields.pop("method_id", None),
        "method_saved": saved,
        "override": dict(fields.pop("override", None) or {}),
        "without": tuple(fields.pop("without", ())),
        **shop,
        **({"test": bool(fields.pop("test"))} if "test" in fields else {}),
        **{name: fields.pop(name, default) for name, default in _PLAIN.items()},
    }
    if fields:
        raise ValueError(f"a payment has no field {', '.join(sorted(fields))}")
    payment = books.add(created_at, **built)
    if captured_at is not None:
        payment.captured_at = payment.changed_at = aware_utc(captured_at)
        books.list.captured(payment)
    if status == "succeeded":
        books.record(payment, "charge", payment.amount, payment.changed_at)
        if refunded:
            books.add_refund(payment, refunded, aware_utc(refunded_at or payment.changed_at), Outcome("succeeded"))
    elif status == "canceled" and payment.cancellation is None:
        payment.cancellation = {"party": "yoo_money", "reason": "expired_on_confirmation"}
    if saved and (script is not None or payment.method_id not in books.state.methods):
        add_method(
            books,
            payment.method_id or payment.id,
            "succeeded" if script is None else script,
            account_id=payment.account_id,
            type=payment.method_type or "bank_card",
            card_last4=payment.card_last4,
        )
    return payment


def add_method(
    books: PaymentBooks, method_id: str, script: OutcomeLike | Iterable[OutcomeLike], **fields: Any
) -> SavedMethod:
    """Add a saved payment method, or replace it."""
    given = [script] if isinstance(script, (str, Outcome, Mapping)) else list(script)
    if not given:
        raise ValueError("a script needs at least one outcome")
    method = SavedMethod(id=method_id, script=[outcome(item) for item in given], **fields)
    if method.type not in METHOD_TYPES:
        raise ValueError(f"unknown payment method type {method.type!r}")
    if method.status not in METHOD_STATUSES:
        raise ValueError(f"a payment method is {', '.join(sorted(METHOD_STATUSES))}")
    books.state.methods[method.id] = method
    return method
