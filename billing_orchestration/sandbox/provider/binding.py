"""POST /payment_methods: a payment method that is saved without a payment, once its owner has confirmed it."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from billing_orchestration.sandbox.provider.answers import NO_RECURRING, forbidden, invalid
from billing_orchestration.sandbox.provider.bodies import json_object, metadata_of, typed
from billing_orchestration.sandbox.provider.methods import SavedMethod
from billing_orchestration.sandbox.provider.payment_books import PaymentBooks
from billing_orchestration.sandbox.provider.records import Outcome
from billing_orchestration.sandbox.provider.switches import Switches

CREATE_FIELDS = frozenset({"type", "card", "holder", "client_ip", "confirmation", "metadata"})
# How its owner may confirm it. A card's data never reach the sandbox, so a card is always confirmed.
CONFIRMATIONS = {"bank_card": frozenset({"redirect"}), "sbp": frozenset({"redirect", "qr"})}
CONFIRM_WITHIN = timedelta(hours=1)


def bind(books: PaymentBooks, body: Any, now: datetime, account_id: str, switches: Switches) -> SavedMethod:
    """Carry out a binding: pending until its owner confirms it, inactive if that takes too long."""
    body = json_object(body, CREATE_FIELDS, switches)
    if not switches.recurring:
        raise forbidden(NO_RECURRING)
    allowed = CONFIRMATIONS.get(typed(body, "type", str, ""))
    if allowed is None:
        raise invalid("Payment method cannot be saved without a payment", "type")
    if "card" in body:
        raise invalid("The sandbox takes no card data", "card")
    typed(body, "holder", dict, None)
    typed(body, "client_ip", str, None)
    confirmation = typed(body, "confirmation", dict, {})
    way, return_url = typed(confirmation, "type", str, ""), confirmation.get("return_url")
    if way not in allowed:
        raise invalid(f"Confirmation is not by {' or '.join(sorted(allowed))}", "confirmation.type")
    if not (isinstance(return_url, str) and return_url) and (way == "redirect" or return_url is not None):
        raise invalid("Return URL is missing", "confirmation.return_url")
    method = SavedMethod(books.new_id(now), account_id, type=body["type"], status="pending")
    where = f"https://confirmation.invalid/binding?methodId={method.id}"
    method.confirmation = {"type": way, "confirmation_url" if way == "redirect" else "confirmation_data": where}
    if way == "redirect":
        method.confirmation["return_url"] = str(return_url)
    if "metadata" in body:
        method.metadata = metadata_of(body)
    books.state.methods[method.id] = method
    books.schedule(method.id, (now + CONFIRM_WITHIN, Outcome("canceled")))
    return method
