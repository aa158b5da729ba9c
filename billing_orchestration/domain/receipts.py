"""Fiscal receipts (54-FZ): what a charge tells the tax office and the customer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from billing_orchestration.domain.money import Money

# As long as the provider takes a description, of a payment and of an item.
LONGEST_DESCRIPTION = 128
_LONGEST_EMAIL = 254

# One address: no name around it, no list, nothing that does not print.
_EMAIL = re.compile(r"""[^@\s"'<>(),;:\\\[\]{}\x00-\x1f\x7f]+@[\w-]+(?:\.[\w-]+)+""")
# One number: what follows its digits is no extension and no second one, whose digits would make it a stranger's.
_NUMBER = re.compile(r"[^0-9]*([0-9][0-9\s().\u2010-\u2015-]*)[^0-9]*")
_PHONE = re.compile(r"[0-9]{4,15}")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True, slots=True)
class ReceiptRules:
    """What the shop's accountant decided. `item` is the template of the item's name."""

    vat_code: int
    payment_mode: str
    payment_subject: str = "service"
    measure: str = "piece"
    tax_system_code: int | None = None
    fallback_email: str | None = None
    item: str = "{plan}"


def contact_of(email: str | None, phone: str | None, fallback: str | None) -> dict[str, str] | None:
    """Where the receipt goes: the email, else the phone as digits only, else the shop's own address. None: nowhere."""
    email = (email or "").strip()
    if len(email) <= _LONGEST_EMAIL and _EMAIL.fullmatch(email):
        return {"email": email}
    number = _NUMBER.fullmatch(phone or "")
    digits = re.sub(r"[^0-9]", "", number[1] if number else "")
    if _PHONE.fullmatch(digits):
        return {"phone": digits}
    return {"email": fallback} if fallback else None


def receipt_of(rules: ReceiptRules, contact: dict[str, str], money: Money, **names: str) -> dict[str, Any]:
    """The receipt of one charge: one item, worth the whole amount. `names` fill the item's template."""
    item = {
        "description": fill(rules.item, **names) or "-",
        "quantity": 1,
        "amount": {"value": f"{money.amount:.2f}", "currency": money.currency},
        "vat_code": rules.vat_code,
        "payment_mode": rules.payment_mode,
        "payment_subject": rules.payment_subject,
        "measure": rules.measure,
    }
    receipt: dict[str, Any] = {"customer": contact, "items": [item]}
    if rules.tax_system_code is not None:
        receipt["tax_system_code"] = rules.tax_system_code
    return receipt


def fill(template: str, **names: str) -> str:
    """The template with its names filled in, cut to what the provider takes."""
    text = _PLACEHOLDER.sub(lambda found: names.get(found[1], found[0]), template)
    return " ".join(text.split())[:LONGEST_DESCRIPTION]
