"""POST /payments: the form of its body and key. Strict rather than lax: what passes here should pass there.

A refusal has the provider's form: HTTP status, code, description, and the parameter that is wrong.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from billing_orchestration.sandbox.provider.answers import invalid
from billing_orchestration.sandbox.provider.records import METHOD_TYPES
from billing_orchestration.sandbox.provider.switches import Switches

# Fields of a payment's creation in the API (official OpenAPI file and SDK); anything else is a misspelling.
CREATE_FIELDS = frozenset((
    "airline", "amount", "capture", "client_ip", "confirmation", "deal", "description", "fraud_data",
    "merchant_customer_id", "metadata", "payment_method_data", "payment_method_id", "payment_order",
    "payment_token", "pos_link", "receipt", "receiver", "recipient", "save_payment_method", "statements",
    "transfers",
))  # fmt: skip
CURRENCIES = frozenset({"RUB", "USD", "EUR", "BYN", "CNY", "KZT", "UAH", "UZS", "TRY", "INR", "MDL", "AZN", "AMD"})
AMOUNT = re.compile(r"(0|[1-9][0-9]{0,11})\.[0-9]{2}")
DESCRIPTION_LENGTH = 128
METADATA_KEYS = 16
METADATA_KEY_LENGTH = 32
METADATA_VALUE_LENGTH = 512
IDEMPOTENCE_KEY_LENGTH = 64


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


def idempotence_key(key: str | None) -> str:
    """The key, if the API takes it."""
    if not key:
        raise invalid("Idempotence key is missing or empty", "Idempotence-Key")
    if len(key) > IDEMPOTENCE_KEY_LENGTH:
        raise invalid(f"Idempotence key is longer than {IDEMPOTENCE_KEY_LENGTH} characters", "Idempotence-Key")
    return key


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise invalid("A field is given twice")
    return document


def _no_constant(name: str) -> Any:
    raise invalid(f"{name} is not JSON")


def parse_body(body: bytes) -> Any:
    """The body as JSON, by the letter: no NaN, no field twice, UTF-8."""
    try:
        text = body.decode("utf-8")
        document = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
        if "\\ud" in text.lower():
            # Half a surrogate pair is JSON, but no text.
            json.dumps(document, ensure_ascii=False).encode()
        return document
    except (ValueError, RecursionError):
        raise invalid("Request body is not JSON") from None


def charge_request(body: Any, switches: Switches) -> ChargeRequest:
    """Check the form of a payment's creation, field by field."""
    if not isinstance(body, dict):
        raise invalid("Request body is not a JSON object")
    if switches.refuse_unknown_fields:
        for name in body:
            if name not in CREATE_FIELDS:
                raise invalid(f"Unknown field {name}", name)
    amount, currency = _amount(body)
    capture = _typed(body, "capture", bool, False)
    description = _typed(body, "description", str, None)
    if description is not None and len(description) > DESCRIPTION_LENGTH:
        raise invalid(f"Description is longer than {DESCRIPTION_LENGTH} characters", "description")
    method_id = _typed(body, "payment_method_id", str, None)
    if method_id is not None and not method_id:
        raise invalid("Payment method id is empty", "payment_method_id")
    method_data = _typed(body, "payment_method_data", dict, None)
    confirmation = _typed(body, "confirmation", dict, None)
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
        _typed(body, name, str, None)
    for name in ("airline", "deal", "fraud_data", "recipient", "receiver", "payment_order"):
        _typed(body, name, dict, None)
    for name in ("transfers", "statements"):
        _typed(body, name, list, None)
    _receipt(body, switches)
    return ChargeRequest(
        amount=amount,
        currency=currency,
        capture=capture,
        description=description,
        metadata=_metadata(body),
        payment_method_id=method_id,
        method_type=method_type,
        return_url=_return_url(confirmation),
        save_method=_typed(body, "save_payment_method", bool, False),
    )


def _typed(body: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    """The field, absent or of its JSON type; null is not absent."""
    if name not in body:
        return default
    value = body[name]
    if not isinstance(value, kind):
        raise invalid(f"Field {name} has a wrong type", name)
    return value


def _amount(body: dict[str, Any]) -> tuple[Decimal, str]:
    amount = _typed(body, "amount", dict, None)
    if amount is None:
        raise invalid("Amount is missing", "amount")
    for name in amount:
        if name not in {"value", "currency"}:
            raise invalid(f"Unknown field amount.{name}", f"amount.{name}")
    value = amount.get("value")
    if not isinstance(value, str) or not AMOUNT.fullmatch(value):
        raise invalid("Amount is not a string with two decimal places", "amount.value")
    if Decimal(value) <= 0:
        raise invalid("Amount is not above zero", "amount.value")
    currency = amount.get("currency")
    if not isinstance(currency, str) or currency not in CURRENCIES:
        raise invalid("Unknown currency", "amount.currency")
    return Decimal(value), currency


def _metadata(body: dict[str, Any]) -> dict[str, str]:
    metadata: dict[str, Any] = _typed(body, "metadata", dict, {})
    if len(metadata) > METADATA_KEYS:
        raise invalid(f"Metadata has more than {METADATA_KEYS} keys", "metadata")
    for key, value in metadata.items():
        if not key or len(key) > METADATA_KEY_LENGTH:
            raise invalid(f"A metadata key is empty or longer than {METADATA_KEY_LENGTH} characters", "metadata")
        if not isinstance(value, str):
            raise invalid("A metadata value is not a string", f"metadata.{key}")
        if len(value) > METADATA_VALUE_LENGTH:
            raise invalid(f"A metadata value is longer than {METADATA_VALUE_LENGTH} characters", f"metadata.{key}")
    return dict(metadata)


def _receipt(body: dict[str, Any], switches: Switches) -> None:
    receipt = _typed(body, "receipt", dict, None)
    if receipt is None:
        if switches.requires_receipt:
            raise invalid("Receipt is missing or illegal", "receipt")
        return
    customer = receipt.get("customer")
    contact = customer if isinstance(customer, dict) else receipt
    if not contact.get("email") and not contact.get("phone"):
        raise invalid("Receipt has neither the customer's email nor phone", "receipt.customer")
    items = receipt.get("items")
    if not isinstance(items, list) or not items:
        raise invalid("Receipt has no items", "receipt.items")


def _return_url(confirmation: dict[str, Any] | None) -> str | None:
    if confirmation is None:
        return None
    if confirmation.get("type") != "redirect":
        raise invalid("The sandbox confirms by redirect only", "confirmation.type")
    url = confirmation.get("return_url")
    if not isinstance(url, str) or not url:
        raise invalid("Return URL is missing", "confirmation.return_url")
    return url
