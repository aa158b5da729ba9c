"""Money: a decimal amount with its currency, and the bounds that the service's database can hold."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

# payments.amount is numeric(8,2): six digits before the point.
LARGEST_AMOUNT = Decimal("999999.99")
# The labels of the service's enum `currencyenum`.
CURRENCIES = frozenset({"RUB", "USD", "EUR"})
# Decimal accepts more notations (1e2, 1_000, other scripts' digits) than the provider documents.
_PLAIN = re.compile(r"-?[0-9]+(\.[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Money:
    """An amount in a currency. 5 RUB is not 5 USD."""

    amount: Decimal
    currency: str

    def __str__(self) -> str:
        return f"{self.amount:.2f} {self.currency}"


def parse_amount(value: object) -> Decimal:
    """Read an amount as the provider writes it (`"123.45"`).

    Raises ValueError, with the reason, for anything that is not a plain, finite decimal with at most two places
    that fits numeric(8,2). Zero and below are the caller's concern: a refunded amount may be zero.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, Decimal)):
        raise ValueError(f"amount {value!r} is not a decimal string")
    if isinstance(value, str) and not _PLAIN.fullmatch(value.strip()):
        raise ValueError(f"amount {value!r} is not a number")
    amount = Decimal(value.strip() if isinstance(value, str) else value)
    if not amount.is_finite():
        raise ValueError(f"amount {value!r} is not finite")
    if abs(amount) > LARGEST_AMOUNT:
        raise ValueError(f"amount {value!r} does not fit numeric(8,2)")
    cents = amount.quantize(Decimal("0.01"))
    if cents != amount:
        raise ValueError(f"amount {value!r} has more than two decimal places")
    return cents
