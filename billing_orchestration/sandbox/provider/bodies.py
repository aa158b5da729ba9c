"""The form of what is posted: its JSON, its idempotence key, and the fields that several calls share.

A refusal has the provider's form: HTTP status, code, description, and the parameter that is wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from decimal import Decimal
from typing import Any

from billing_orchestration.sandbox.provider.answers import invalid
from billing_orchestration.sandbox.provider.switches import Switches

CURRENCIES = frozenset({"RUB", "USD", "EUR", "BYN", "KZT", "UAH", "UZS", "TRY", "INR", "MDL", "AZN", "AMD"})
AMOUNT = re.compile(r"(0|[1-9][0-9]{0,11})\.[0-9]{2}")
METADATA_KEYS = 16
METADATA_KEY_LENGTH = 32
METADATA_VALUE_LENGTH = 512
IDEMPOTENCE_KEY_LENGTH = 64


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


def json_object(body: Any, fields: Collection[str], switches: Switches) -> dict[str, Any]:
    """The body as an object that has no other fields than these."""
    if not isinstance(body, dict):
        raise invalid("Request body is not a JSON object")
    if switches.refuse_unknown_fields:
        for name in body:
            if name not in fields:
                raise invalid(f"Unknown field {name}", name)
    return body


def typed(body: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    """The field, absent or of its JSON type; null is not absent."""
    if name not in body:
        return default
    value = body[name]
    if not isinstance(value, kind):
        raise invalid(f"Field {name} has a wrong type", name)
    return value


def text(body: dict[str, Any], name: str, longest: int) -> str | None:
    """A text of at most so many characters, or nothing."""
    value: str | None = typed(body, name, str, None)
    if value is not None and len(value) > longest:
        raise invalid(f"Field {name} is longer than {longest} characters", name)
    return value


def amount_of(body: dict[str, Any]) -> tuple[Decimal, str]:
    """Value and currency of the field `amount`."""
    amount = typed(body, "amount", dict, None)
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


def metadata_of(body: dict[str, Any]) -> dict[str, str]:
    """The field `metadata`."""
    metadata: dict[str, Any] = typed(body, "metadata", dict, {})
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
