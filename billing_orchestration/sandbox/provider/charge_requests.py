"""POST /payments: the form of its body. Strict rather than lax: what passes here should pass there."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from billing_orchestration.sandbox.provider.answers import invalid
from billing_orchestration.sandbox.provider.bodies import amount_of, json_object, metadata_of, text, typed
from billing_orchestration.sandbox.provider.methods import METHOD_TYPES
from billing_orchestration.sandbox.provider.receipts import receipt_of
from billing_orchestration.sandbox.provider.switches import Switches

# Fields of a payment's creation in the API (official OpenAPI file and SDK); anything else is a misspelling.
CREATE_FIELDS = frozenset((
    "airline", "amount", "capture", "client_ip", "confirmation", "deal", "description", "fraud_data",
    "merchant_customer_id", "metadata", "payment_method_data", "payment_method_id", "payment_order",
    "payment_token", "pos_link", "receipt", "receiver", "recipient", "save_payment_method", "statements",
    "transfers",
))  # fmt: skip
DESCRIPTION_LENGTH = 128


@dataclass(frozen=True, slots=True)
class ChargeRequest:
    """A creation of a payment that passed every check of form."""

    amount: Decimal
    currency: str
    capture: bool
    description: str | None
    metadata: dict[str, str]
    payment_method_id: str | None
    method_type: str | None
    return_url: str | None
    save_method: bool
    gateway_id: str | None
    receipt: dict[str, Any] | None


def charge_request(body: Any, switches: Switches) -> ChargeRequest:
    """Check the form of a payment's creation, field by field."""
    body = json_object(body, CREATE_FIELDS, switches)
    amount, currency = amount_of(body)
    capture = typed(body, "capture", bool, False)
    method_id = typed(body, "payment_method_id", str, None)
    if method_id is not None and not method_id:
        raise invalid("Payment method id is empty", "payment_method_id")
    method_data = typed(body, "payment_method_data", dict, None)
    confirmation = typed(body, "confirmation", dict, None)
    if method_id is not None and method_data is not None:
        raise invalid("payment_method_id and payment_method_data exclude each other", "payment_method_id")
    if "payment_token" in body:
        raise invalid("Payment tokens are not supported by the sandbox", "payment_token")
    if method_id is None and method_data is None and confirmation is None:
        raise invalid("Neither a saved payment method nor a confirmation is given", "payment_method_id")
    method_type = None
    if method_data is not None:
        method_type = method_data.get("type")
        if method_type not in METHOD_TYPES:
            raise invalid("Unknown payment method type", "payment_method_data.type")
    for name in ("client_ip", "merchant_customer_id", "pos_link"):
        typed(body, name, str, None)
    for name in ("airline", "deal", "fraud_data", "receiver", "payment_order"):
        typed(body, name, dict, None)
    for name in ("transfers", "statements"):
        typed(body, name, list, None)
    return ChargeRequest(
        amount=amount,
        currency=currency,
        capture=capture,
        description=text(body, "description", DESCRIPTION_LENGTH),
        metadata=metadata_of(body),
        payment_method_id=method_id,
        method_type=method_type,
        return_url=_return_url(confirmation),
        save_method=typed(body, "save_payment_method", bool, False),
        gateway_id=_gateway_id(body),
        receipt=receipt_of(body, amount, currency, switches),
    )


def _gateway_id(body: dict[str, Any]) -> str | None:
    recipient = typed(body, "recipient", dict, None)
    if recipient is None:
        return None
    gateway_id = recipient.get("gateway_id")
    if not isinstance(gateway_id, str) or not gateway_id or len(recipient) > 1:
        raise invalid("A recipient is its gateway_id", "recipient.gateway_id")
    return gateway_id


def _return_url(confirmation: dict[str, Any] | None) -> str | None:
    if confirmation is None:
        return None
    if confirmation.get("type") != "redirect":
        raise invalid("The sandbox confirms by redirect only", "confirmation.type")
    url = confirmation.get("return_url")
    if not isinstance(url, str) or not url:
        raise invalid("Return URL is missing", "confirmation.return_url")
    return url
