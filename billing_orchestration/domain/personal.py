"""What a text says about a customer, made unrecognisable: addresses, telephone numbers, card numbers.

Texts of the provider and of customers pass here before they are kept as evidence or shown. A card is known by its last
four digits only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

_EMAIL = re.compile(r"""[^\s@"'<>(),;:=\[\]{}]+@[^\s@"'<>(),;:=\[\]{}]+\.[^\s@."'<>(),;:=\[\]{}]+""")
# A telephone number has eleven digits and more; ids of ours have ten at most.
_PHONE = re.compile(r"(?<![\w.-])\+?([0-9]{11,15})(?![\w-])")
# ISO/IEC 7812: 12 to 19 digits, of which the shortest are telephone numbers here. Never inside a name such as a UUID.
_CARD = re.compile(
    r"(?<![\w.-])(?![0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-)[0-9](?:[ -]?[0-9]){8,14}[ -]?([0-9]{4})(?![\w-])"
)
# Fields of a card, as providers name them, that are nobody's business here.
_CARD_FIELDS = frozenset(
    {"first6", "bin", "number", "pan", "card_number", "csc", "cvc", "cvv", "expiry_month", "expiry_year", "cardholder"}
)
_LONGEST_PLAIN = 10**12


def mask_personal(text: str) -> str:
    """A foreign text with each address, telephone and card number as `a…@e….ru`, `7…67` and `…1111`."""
    text = _EMAIL.sub(lambda found: _mask(found[0]), text)
    return _PHONE.sub(lambda found: _mask(found[1]), _CARD.sub(r"…\1", text))


def mask_value(name: str, value: Any) -> Any:
    """A foreign field's value, which is no list and no object, as it may be kept. `name`: the field's."""
    if name.lower() in _CARD_FIELDS:
        return "…"
    if isinstance(value, str):
        return mask_personal(value)
    if isinstance(value, (int, float)) and not abs(value) < _LONGEST_PLAIN:
        return mask_personal(f"{value:.0f}" if isinstance(value, float) and value == value // 1 else str(value))
    return value


def mask_fields(value: Any, name: str = "") -> Any:
    """The same for a whole document. The service's own id of its user stays: entries are found and locked by it."""
    if isinstance(value, Mapping):
        return {
            mask_personal(str(key)): part if key == "user_id" else mask_fields(part, str(key))
            for key, part in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [mask_fields(part, name) for part in value]
    return mask_value(name, value)


def without_names(text: str, names: Collection[str]) -> str:
    """A foreign text without these names of people (ids, contacts), where they stand as words of their own."""
    for name in sorted(names, key=len, reverse=True):
        if name in text:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "(a customer)", text)
    return text


# Words with a digit, a sign or a capital inside; and whatever follows the word for a person.
_IDENTITY = re.compile(r"(?i:(?<=\buser )|(?<=\bcustomer )|(?<=\bclient )|(?<=\buser_id ))\S+|\S*[\d@_-]\S*")


def without_identities(text: str) -> str:
    """Words of somebody who may name people, where it is not known whom: without what may be an id or a contact."""
    return _IDENTITY.sub("…", text)


def names_in_body(body: str) -> frozenset[str]:
    """Whom a charge's body names: the service's user, and where the receipt goes."""
    try:
        document = json.loads(body)
        customer = document.get("receipt", {}).get("customer", {})
        return frozenset({document.get("metadata", {}).get("user_id", ""), *customer.values()} - {""})
    except (ValueError, AttributeError):  # no body of ours
        return frozenset()


def mask_body(body: str) -> str:
    """The body of a charge as a person may see it."""
    document = json.loads(body)
    customer = document.get("receipt", {}).get("customer") if isinstance(document, dict) else None
    if not customer:
        return body
    document["receipt"]["customer"] = {name: _mask(contact) for name, contact in customer.items()}
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def _mask(contact: str) -> str:
    name, sign, domain = contact.rpartition("@")
    if not sign:
        return f"{contact[:1]}…{contact[-2:]}"
    return f"{name[:1]}…@{domain[:1]}….{domain.rpartition('.')[2]}"
