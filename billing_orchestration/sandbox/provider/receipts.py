"""The form of a fiscal receipt (54-FZ) in a request: which data a shop sends for it, and that they add up.

Stricter than the published schema where public reports say that live shops are refused: subject, mode and measure of an
item are mandatory, and phones are digits only. A parameter names no position: `receipt.items.vat_code`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from billing_orchestration.sandbox.provider.answers import Refused, invalid
from billing_orchestration.sandbox.provider.bodies import amount_of, typed
from billing_orchestration.sandbox.provider.records import CENT
from billing_orchestration.sandbox.provider.switches import Switches

RECEIPT_FIELDS = frozenset((
    "customer", "internet", "items", "receipt_industry_details", "receipt_operational_details", "tax_system_code",
    "timezone",
))  # fmt: skip
CUSTOMER_FIELDS = frozenset({"email", "full_name", "inn", "phone"})
ITEM_FIELDS = frozenset((
    "amount", "country_of_origin_code", "customs_declaration_number", "description", "excise", "mark_code_info",
    "mark_mode", "mark_quantity", "measure", "payment_mode", "payment_subject", "payment_subject_industry_details",
    "planned_status", "product_code", "quantity", "vat_code",
))  # fmt: skip
MEASURES = frozenset((
    "another", "centimeter", "cubic_meter", "day", "decimeter", "gigabyte", "gigacalorie", "gram", "hour",
    "kilobyte", "kilogram", "kilowatt_hour", "liter", "megabyte", "meter", "milliliter", "minute", "piece", "second",
    "square_centimeter", "square_decimeter", "square_meter", "terabyte", "ton",
))  # fmt: skip
SUBJECTS = frozenset((
    "agent_commission", "agent_withdrawals", "another", "casino", "commodity", "composite", "cost", "excise", "fine",
    "gambling_bet", "gambling_prize", "health_insurance", "health_insurance_with_payouts",
    "health_insurance_without_payouts", "insurance_premium", "intellectual_activity", "job", "lien", "lottery",
    "lottery_prize", "marked", "marked_excise", "non_marked", "non_marked_excise", "non_operating_gain", "payment",
    "pension_insurance_with_payouts", "pension_insurance_without_payouts", "property_right", "resort_fee",
    "sales_tax", "service", "tax",
))  # fmt: skip
MODES = frozenset((
    "advance", "credit", "credit_payment", "full_payment", "full_prepayment", "partial_payment", "partial_prepayment",
))  # fmt: skip
# Receipts of the provider's own go to an email address only.
OWN_REGISTERS = frozenset({"avanpost", "yoo_receipt"})
EMAIL = re.compile(r"[^@\s]+@[^@\s.]+(?:\.[^@\s.]+)+")
PHONE = re.compile(r"[0-9]{4,15}")
TAXPAYER = re.compile(r"[0-9]{10}|[0-9]{12}")
DESCRIPTION_LENGTH = 128
EMAIL_LENGTH = 254
MOST_ITEMS = 100
MOST_OF_AN_ITEM = Decimal("99999.999")


def receipt_of(body: dict[str, Any], amount: Decimal, currency: str, switches: Switches) -> dict[str, Any] | None:
    """The receipt of a request for this amount, checked; None when there is none and none is demanded."""
    receipt: dict[str, Any] | None = typed(body, "receipt", dict, None)
    if receipt is None and switches.receipts == "off":
        return None
    if not receipt:
        raise invalid("Receipt is missing or illegal", "receipt")
    try:
        _check(receipt, amount, currency, switches)
    except Refused as refused:
        inside = f"receipt.{refused.parameter}" if refused.parameter else "receipt"
        raise invalid(refused.description, inside) from None
    return receipt


def _check(receipt: dict[str, Any], amount: Decimal, currency: str, switches: Switches) -> None:
    _known(receipt, RECEIPT_FIELDS, "", switches)
    _contact(receipt, switches)
    _code(receipt, "tax_system_code", 6)
    _code(receipt, "timezone", 11)
    typed(receipt, "internet", bool, None)
    items = typed(receipt, "items", list, [])
    if not 1 <= len(items) <= MOST_ITEMS:
        raise invalid(f"A receipt has 1 to {MOST_ITEMS} items", "items")
    total = Decimal(0)
    for item in items:
        if not isinstance(item, dict):
            raise invalid("An item is not an object", "items")
        try:
            total += _price(item, currency, switches)
        except Refused as refused:
            raise invalid(refused.description, f"items.{refused.parameter}") from None
    if total.quantize(CENT, rounding=ROUND_HALF_UP) != amount:
        raise invalid(f"The items are worth {total}, the payment is {amount}", "items.amount")


def _known(given: dict[str, Any], fields: Collection[str], where: str, switches: Switches) -> None:
    if switches.refuse_unknown_fields:
        for name in given:
            if name not in fields:
                raise invalid(f"Unknown field {name}", f"{where}{name}")


def _contact(receipt: dict[str, Any], switches: Switches) -> None:
    customer = typed(receipt, "customer", dict, {})
    _known(customer, CUSTOMER_FIELDS, "customer.", switches)
    email, phone = customer.get("email"), customer.get("phone")
    if email is None and (phone is None or switches.fiscalization_provider in OWN_REGISTERS):
        raise invalid("The customer has no contact that a receipt can be sent to", "customer")
    if email is not None and not (_is(EMAIL, email) and len(email) <= EMAIL_LENGTH):
        raise invalid("Not an email address", "customer.email")
    if phone is not None and not _is(PHONE, phone):
        raise invalid("A phone is 4 to 15 digits, and nothing else", "customer.phone")
    if "inn" in customer and not _is(TAXPAYER, customer["inn"]):
        raise invalid("A taxpayer's number is 10 or 12 digits", "customer.inn")


def _price(item: dict[str, Any], currency: str, switches: Switches) -> Decimal:
    """What an item adds to the receipt: its price times its quantity."""
    _known(item, ITEM_FIELDS, "", switches)
    description = item.get("description")
    if not isinstance(description, str) or not 1 <= len(description) <= DESCRIPTION_LENGTH:
        raise invalid(f"An item's description has 1 to {DESCRIPTION_LENGTH} characters", "description")
    quantity = item.get("quantity")
    if isinstance(quantity, bool) or not isinstance(quantity, (int, float)):
        raise invalid("A quantity is a number", "quantity")
    count = Decimal(str(quantity))
    if not 0 < count <= MOST_OF_AN_ITEM or count != round(count, 3):
        raise invalid(f"A quantity is above 0, at most {MOST_OF_AN_ITEM}, with three places at most", "quantity")
    if "vat_code" not in item:
        raise invalid("An item has no VAT code", "vat_code")
    _code(item, "vat_code", 12)
    for name, allowed in (("payment_subject", SUBJECTS), ("payment_mode", MODES), ("measure", MEASURES)):
        value = item.get(name)
        if not isinstance(value, str) or value not in allowed:
            raise invalid(f"Unknown {name}", name)
    price, item_currency = amount_of(item)
    if item_currency != currency:
        raise invalid("An item's currency is not the payment's", "amount.currency")
    return price * count


def _code(given: dict[str, Any], name: str, highest: int) -> None:
    code = given.get(name, 1)
    if isinstance(code, bool) or not isinstance(code, int) or not 1 <= code <= highest:
        raise invalid(f"Not a whole number of 1 to {highest}", name)


def _is(form: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and form.fullmatch(value) is not None
