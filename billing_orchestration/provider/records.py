"""The provider's JSON to records, item by item: one odd payment is set aside with its reason, the others are used.

No foreign data raises here, whatever it holds, and nothing that PostgreSQL cannot store (NUL, lone surrogates, NaN)
gets through.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from functools import lru_cache
from typing import Any

from billing_orchestration.domain.money import CURRENCIES, Money, parse_amount
from billing_orchestration.domain.personal import mask_personal, mask_value
from billing_orchestration.domain.provider_payment import (
    REFUND_STATUSES,
    STATUSES,
    SUCCEEDED,
    ProviderPayment,
    ProviderRefund,
    UnusablePayment,
)

_NO_MONEY = Decimal("0.00")
# The provider documents 36 characters; payments.external_payment_id is an unbounded varchar, an index entry is not.
_LONGEST_ID = 255
# The longest type in the provider's specification has 22 characters.
_LONGEST_METHOD_TYPE = 60
# The provider opened in the 2000s; an instant far outside is garbage that would poison every comparison of dates.
_FIRST_YEAR, _LAST_YEAR = 2000, 2099
# Evidence is one JSONB value that a person reads: what is deeper, wider or longer is cut.
_EVIDENCE_DEPTH, _EVIDENCE_WIDTH, _EVIDENCE_TEXT = 8, 60, 500
# int() of more digits than this is refused by Python itself (4,300 by default); no field of a payment needs 30.
_LONGEST_INTEGER = 30

_INSTANT = re.compile(
    r"(\d{4}-\d{2}-\d{2})[Tt ](\d{2}:\d{2}:\d{2})(?:[.,](\d{1,9}))?\s?(?:([Zz])|([+-])(\d{2}):?(\d{2}))", re.ASCII
)
# What JSON can hold and PostgreSQL's text and jsonb cannot: NUL, and halves of surrogate pairs.
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_UNSTORABLE_ESCAPE = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")


class _Odd(Exception):
    """Why an item cannot be used."""


# --- JSON text ---------------------------------------------------------------------------------------------------


def _read_float(text: str) -> float | str:
    number = float(text)
    return number if math.isfinite(number) else text


def _read_int(text: str) -> int | str:
    return int(text) if len(text) <= _LONGEST_INTEGER else text


# A literal that the database cannot hold (1e999, NaN, 5,000 digits) stays text, as it was written.
_decoder = json.JSONDecoder(parse_float=_read_float, parse_int=_read_int, parse_constant=str, strict=False)


def read_json(body: bytes) -> Any:
    """Decode an answer's body. Raises ValueError when it is not JSON (HTML, cut off, nested too deeply)."""
    try:
        document = _decoder.decode(body.decode("utf-8-sig", "replace"))
        # Plain searches first: a regular expression over a whole page costs as much as decoding it.
        suspect = b"\0" in body or (b"\\u" in body and _UNSTORABLE_ESCAPE.search(body))
        return _storable(document) if suspect else document
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _storable(value: Any) -> Any:
    """The same document with U+FFFD for every character that PostgreSQL refuses."""
    if isinstance(value, str):
        return _UNSTORABLE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_storable(key): _storable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_storable(part) for part in value]
    return value


# --- One payment -------------------------------------------------------------------------------------------------


def parse_payment(item: object) -> ProviderPayment | UnusablePayment:
    """Read one payment. Never raises: one that cannot be used says why."""
    try:
        return _parse(item)
    except _Odd as odd:
        reason = str(odd)
    except Exception as unforeseen:  # noqa: BLE001 - foreign data must not stop its neighbours, whatever it holds
        reason = f"cannot be read ({type(unforeseen).__name__})"
    return UnusablePayment(readable_id(item), reason, evidence(item))


def parse_refund(item: object) -> ProviderRefund | UnusablePayment:
    """Read one refund. Never raises: one that cannot be used says why, and of which payment it is."""
    try:
        return _parse_refund(item)
    except _Odd as odd:
        reason = str(odd)
    except Exception as unforeseen:  # noqa: BLE001 - as for payments
        reason = f"cannot be read ({type(unforeseen).__name__})"
    name = f"refund {readable_id(item)}" if readable_id(item) else "a refund"
    return UnusablePayment(readable_id(item, "payment_id"), f"{name}: {reason}", evidence(item))


def readable_id(item: object, name: str = "id") -> str | None:
    """The payment's id, if that much can be read."""
    payment_id = item.get(name) if isinstance(item, dict) else None
    if isinstance(payment_id, str) and 0 < len(payment_id) <= _LONGEST_ID and payment_id.isprintable():
        return payment_id
    return None


def raw_status(item: object) -> str | None:
    """The item's status, if it is one that the provider documents."""
    status = item.get("status") if isinstance(item, dict) else None
    return status if isinstance(status, str) and status in STATUSES else None


def _parse(item: object) -> ProviderPayment:
    if not isinstance(item, dict):
        raise _Odd(f"is {_kind(item)}, not an object")
    payment_id = readable_id(item)
    if payment_id is None:
        raise _Odd(f"id {_shown(item.get('id'))} is not a payment id")
    status = item.get("status")
    if not isinstance(status, str) or status not in STATUSES:
        raise _Odd(f"status {_shown(status)} is unknown")
    money = _money(item.get("amount"), "amount")
    if money.amount <= 0:
        raise _Odd(f"amount {money} is not above zero")
    refunded = item.get("refunded_amount")
    refunded_amount = _NO_MONEY if refunded is None else _refunded(refunded, money)
    succeeded = status == SUCCEEDED
    if succeeded and item.get("paid") not in (None, True):
        raise _Odd(f"status is succeeded and paid is {_shown(item['paid'])}: a contradiction")
    is_test = item.get("test", False)
    if not isinstance(is_test, bool):
        raise _Odd(f"test {_shown(is_test)} is neither true nor false")
    captured_at = item.get("captured_at")
    method = item.get("payment_method")
    method_type, method_id, method_saved = (
        (None, None, False) if method is None else _method(method, succeeded=succeeded)
    )
    cancellation = item.get("cancellation_details")
    party, reason = (None, None) if cancellation is None else _cancellation(cancellation)
    metadata = item.get("metadata")
    return ProviderPayment(
        id=payment_id,
        status=status,
        money=money,
        created_at=_instant(item.get("created_at"), "created_at"),
        captured_at=None if captured_at is None else _instant(captured_at, "captured_at"),
        refunded_amount=refunded_amount,
        is_test=is_test,
        method_type=method_type,
        method_id=method_id,
        method_saved=method_saved,
        metadata=_metadata(metadata) if isinstance(metadata, dict) else {},
        cancellation_party=party,
        cancellation_reason=reason,
        income_amount=_income(item.get("income_amount"), money),
        receipt_registration=raw_status({"status": item.get("receipt_registration")}),
    )


def _parse_refund(item: object) -> ProviderRefund:
    if not isinstance(item, dict):
        raise _Odd(f"is {_kind(item)}, not an object")
    refund_id, payment_id, status = readable_id(item), readable_id(item, "payment_id"), item.get("status")
    if refund_id is None:
        raise _Odd(f"id {_shown(item.get('id'))} is not a refund id")
    if payment_id is None:
        raise _Odd(f"payment_id {_shown(item.get('payment_id'))} is not a payment id")
    if not isinstance(status, str) or status not in REFUND_STATUSES:
        raise _Odd(f"status {_shown(status)} is unknown")
    money = _money(item.get("amount"), "amount")
    if money.amount <= 0:
        raise _Odd(f"amount {money} is not above zero")
    return ProviderRefund(refund_id, payment_id, status, money, _instant(item.get("created_at"), "created_at"))


@lru_cache(maxsize=4096)
def _priced(value: str, currency: str) -> Money:
    # A service has a handful of prices, a slice has thousands of payments.
    return Money(parse_amount(value), currency)


def _money(part: object, name: str) -> Money:
    if not isinstance(part, dict):
        raise _Odd(f"{name} is {_kind(part)}, not an object")
    value, currency = part.get("value"), part.get("currency")
    if not isinstance(currency, str) or currency not in CURRENCIES:
        raise _Odd(f"{name} is in currency {_shown(currency)}, which the service does not know")
    try:
        return _priced(value, currency) if isinstance(value, str) else Money(parse_amount(value), currency)
    except ValueError as fault:
        raise _Odd(f"{name}: {_cut(str(fault))}") from None


def _refunded(part: object, paid: Money) -> Decimal:
    refunded = _money(part, "refunded_amount")
    if refunded.currency != paid.currency:
        raise _Odd(f"refunded_amount is in {refunded.currency}, amount in {paid.currency}")
    if refunded.amount < 0:
        raise _Odd(f"refunded_amount {refunded} is below zero")
    return refunded.amount


def _income(part: object, paid: Money) -> Decimal | None:
    """What the shop gets of it. No grant depends on it, so an odd one is as good as none."""
    if part is None:
        return None
    try:
        income = _money(part, "income_amount")
    except _Odd:
        return None
    return income.amount if income.currency == paid.currency and 0 <= income.amount <= paid.amount else None


def _method(part: object, *, succeeded: bool) -> tuple[str | None, str | None, bool]:
    """Type, id and whether it is saved. Only a success is granted, so a malformed method matters only there."""
    if not isinstance(part, dict):
        if succeeded:
            raise _Odd(f"payment_method is {_kind(part)}, not an object")
        return None, None, False
    method_type, method_id = part.get("type"), part.get("id")
    if succeeded and not (method_type is None or isinstance(method_type, str)):
        raise _Odd(f"payment_method type {_shown(method_type)} is unknown")
    return (
        _cut(method_type, _LONGEST_METHOD_TYPE) if isinstance(method_type, str) else None,
        method_id if isinstance(method_id, str) and method_id else None,
        part.get("saved") is True,
    )


def _cancellation(part: object) -> tuple[str | None, str | None]:
    if not isinstance(part, dict):
        return None, None
    party, reason = part.get("party"), part.get("reason")
    return party if isinstance(party, str) else None, reason if isinstance(reason, str) else None


def _metadata(metadata: dict[str, Any]) -> Mapping[str, Any]:
    """As received. The provider documents texts; anything else is kept, cut to what can be stored."""
    if all(type(value) is str for value in metadata.values()):
        return metadata
    return {key: value if isinstance(value, str) else evidence(value) for key, value in metadata.items()}


# --- Instants ----------------------------------------------------------------------------------------------------


def _instant(value: object, name: str) -> datetime:
    if not isinstance(value, str):
        raise _Odd(f"{name} is {_kind(value)}, not an instant")
    try:
        # The provider's own form, `2026-03-01T10:00:00.123Z`; Python 3.10 does not know the Z.
        if len(value) == 24 and value[-1] == "Z":
            instant = datetime.fromisoformat(value[:-1] + "+00:00").replace(tzinfo=timezone.utc)
        else:
            instant = _other_form(value)
    except (ValueError, OverflowError):
        raise _Odd(f"{name} {_shown(value)} is not an instant with its offset") from None
    if not _FIRST_YEAR <= instant.year <= _LAST_YEAR:
        raise _Odd(f"{name} {_shown(value)} is in the year {instant.year}")
    return instant


def _other_form(value: str) -> datetime:
    found = _INSTANT.fullmatch(value.strip())
    if found is None:
        raise ValueError(value)
    day, time, fraction, _zulu, sign, hours, minutes = found.groups()
    local = datetime.fromisoformat(f"{day}T{time}").replace(tzinfo=timezone.utc)
    if fraction:
        local = local.replace(microsecond=int(fraction[:6].ljust(6, "0")))
    if sign is None:
        return local
    offset = timedelta(hours=int(hours), minutes=int(minutes))
    return local - offset if sign == "+" else local + offset


def provider_instant(instant: datetime, *, round_up: bool = False) -> str:
    """An aware instant in the provider's form, with milliseconds and Z. Cut to the millisecond, or rounded up to it."""
    if instant.tzinfo is None:
        raise ValueError(f"{instant} has no offset; the provider is asked in UTC")
    instant = instant.astimezone(timezone.utc).replace(tzinfo=None)
    if round_up and instant.microsecond % 1000:
        instant += timedelta(microseconds=1000 - instant.microsecond % 1000)
    return instant.isoformat(timespec="milliseconds") + "Z"


# --- Evidence ----------------------------------------------------------------------------------------------------


def evidence(item: object, depth: int = _EVIDENCE_DEPTH, name: str = "") -> Any:
    """The raw item in a form that JSON and PostgreSQL can hold, cut to what a person can read.

    Without contacts, and of a card without all but its last four digits. `name`: the field that holds it.
    """
    if isinstance(item, int) and not isinstance(item, bool) and abs(item) >= 10**_LONGEST_INTEGER:
        return "a number of more than 30 digits"
    if isinstance(item, (Mapping, list, tuple)):
        if depth == 0:
            return "…"
        cut = {"…": f"{len(item) - _EVIDENCE_WIDTH} more"} if len(item) > _EVIDENCE_WIDTH else None
        if isinstance(item, Mapping):
            kept = list(item.items())[:_EVIDENCE_WIDTH]
            return {
                _storable(_cut(mask_personal(str(key)))): evidence(part, depth - 1, str(key)) for key, part in kept
            } | (cut or {})
        return [evidence(part, depth - 1, name) for part in item[:_EVIDENCE_WIDTH]] + ([cut] if cut else [])
    value = mask_value(name, item)
    if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return _storable(_cut(str(value), _EVIDENCE_TEXT))


_KINDS = {dict: "an object", list: "a list", str: "a text", bool: "a flag", int: "a number", float: "a number"}


def _kind(value: object) -> str:
    return "missing" if value is None else _KINDS.get(type(value), type(value).__name__)


def _shown(value: object) -> str:
    if value is None or isinstance(value, (dict, list)):
        return f"({_kind(value)})"
    return _cut(mask_personal(repr(value)), 80)


def _cut(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[:limit] + "…"
