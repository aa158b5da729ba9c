"""A charge at the provider: which key protects it, and what the saved method's script makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from billing_orchestration.sandbox.provider.answers import Answer, Refused, invalid
from billing_orchestration.sandbox.provider.charge_requests import (
    ChargeRequest,
    charge_request,
    idempotence_key,
    parse_body,
)
from billing_orchestration.sandbox.provider.payment_books import PaymentBooks
from billing_orchestration.sandbox.provider.records import Payment
from billing_orchestration.sandbox.provider.state import IdempotenceRecord
from billing_orchestration.sandbox.provider.switches import Switches

KEY_LIFETIME = timedelta(hours=24)


def key_record(books: PaymentBooks, key: str, now: datetime) -> IdempotenceRecord | None:
    """What the key got first, if that was less than 24 hours ago."""
    record = books.state.keys.get(key)
    return record if record is not None and now - record.first_at < KEY_LIFETIME else None


def create_payment(
    books: PaymentBooks,
    body: bytes,
    key: str | None,
    now: datetime,
    switches: Switches,
    shop: dict[str, Any],
    *,
    looked_up: bool = False,
) -> Answer:
    """Carry out POST /payments, or give the answer that the key got first. `shop`: fields of each of its payments.

    `looked_up`: the key was unknown when this request came in, whatever happened since (switch `serialise_keys`).
    """
    try:
        key = idempotence_key(key)
        parsed = parse_body(body)
    except Refused as refused:
        return refused.answer()
    canonical = json.dumps(parsed, sort_keys=True)
    record = key_record(books, key, now)
    if record is not None and not looked_up:
        if record.body != canonical:
            return invalid("Idempotence key duplicated", "Idempotence-Key").answer()
        if switches.replay == "current" and record.payment_id is not None:
            return Answer(200, books.existing(record.payment_id).json())
        return record.answer
    payment_id = None
    try:
        payment = _charge(books, charge_request(parsed, switches), now, {**shop, "idempotence_key": key})
        payment_id, answer = payment.id, Answer(200, payment.json())
    except Refused as refused:
        answer = refused.answer()
    if record is None and (payment_id is not None or switches.remember_errors):
        books.state.keys[key] = IdempotenceRecord(canonical, now, answer, payment_id)
    return answer


def _charge(books: PaymentBooks, request: ChargeRequest, now: datetime, fields: dict[str, Any]) -> Payment:
    fields |= {
        "amount": request.amount,
        "currency": request.currency,
        "description": request.description,
        "metadata": request.metadata,
        "capture": request.capture,
    }
    if request.payment_method_id is None:
        return books.add_unconfirmed(now, method_type=request.method_type, save_method=request.save_method, **fields)
    method = books.state.methods.get(request.payment_method_id)
    if method is None:
        raise invalid("Payment method doesn't exist or access denied", "payment_method_id")
    if not method.saved:
        raise invalid("Payment method is not saved", "payment_method_id")
    result = method.next_outcome()
    if result.kind == "forbidden":
        raise Refused(403, "forbidden", "You can't make recurring payments. Contact your manager")
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
    if result.kind != "pending":
        books.apply(payment, result, now)
    elif result.then is not None:
        due = result.at or now + timedelta(seconds=result.after_s or 0)
        books.schedule(payment, due, replace(result, kind=result.then, then=None, after_s=None, at=None))
    return payment
