"""What the sandbox provider's books are made of: amounts, ids, scripted outcomes, movements of money.

Nothing in here comes from `billing_orchestration.provider` or `.domain`: the sandbox judges that code, so it must not
share its mistakes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from billing_orchestration.sandbox.provider.clock import aware_utc, iso

CENT = Decimal("0.01")
# The first eight digits of a payment's id are the seconds since this instant, as in the provider's real ids.
IDS_BEGIN = datetime(2000, 1, 1, tzinfo=timezone.utc)
REFUND_STATUSES = frozenset({"pending", "succeeded", "canceled"})


def money(value: Decimal | str | int) -> Decimal:
    """An amount with two places."""
    return Decimal(value).quantize(CENT, rounding=ROUND_HALF_UP)


def new_payment_id(at: datetime, generator: random.Random) -> str:
    """36 characters in the shape of the provider's ids (`22e12f66-000f-5000-8000-18db351245c7`)."""
    seconds = max(0, int((at - IDS_BEGIN).total_seconds())) & 0xFFFFFFFF
    return f"{seconds:08x}-000f-5000-{generator.choice('89ab')}000-{generator.getrandbits(48):012x}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a saved method does with one new charge, or a bank with one refund.

    `kind`: succeeded | canceled | pending | forbidden (HTTP 403) | bad_request (HTTP 400). A pending one may settle
    itself later: `then` succeeded or canceled, `after_s` seconds later or at the instant `at`.
    """

    kind: str
    reason: str = "general_decline"
    party: str = "payment_network"
    then: str | None = None
    after_s: float | None = None
    at: datetime | None = None

    def __post_init__(self) -> None:
        if self.kind not in {"succeeded", "canceled", "pending", "forbidden", "bad_request"}:
            raise ValueError(f"unknown outcome {self.kind!r}")
        if self.then is not None and (self.kind != "pending" or self.then not in {"succeeded", "canceled"}):
            raise ValueError(f"{self.kind!r} cannot become {self.then!r}")
        if self.then is not None and (self.after_s is None) == (self.at is None):
            raise ValueError("a later outcome needs either after_s or at")

    def later(self, now: datetime) -> tuple[datetime, Outcome] | None:
        """When a pending one settles itself, and to what; None: never."""
        if self.then is None:
            return None
        due = self.at or now + timedelta(seconds=self.after_s or 0)
        return due, replace(self, kind=self.then, then=None, after_s=None, at=None)


@dataclass(frozen=True, slots=True)
class Registration:
    """What becomes of a payment's receipt: succeeded or canceled."""

    status: str


OutcomeLike = str | Outcome | Mapping[str, Any]


def outcome(value: OutcomeLike) -> Outcome:
    """Read an outcome from a script.

    As text: `succeeded`, `canceled:insufficient_funds`, `pending`, `pending:succeeded:60` (after 60 s),
    `pending:canceled:general_decline:60`, `forbidden`, `bad_request`. As a mapping: the fields of Outcome.
    """
    if isinstance(value, Outcome):
        return value
    if isinstance(value, Mapping):
        fields = dict(value)
        if fields.get("at") is not None:
            fields["at"] = aware_utc(fields["at"])
        try:
            return Outcome(**fields)
        except TypeError as error:
            raise ValueError(f"outcome {value!r}: {error}") from None
    match value.split(":"):
        case ["succeeded" | "pending" | "forbidden" | "bad_request" | "canceled" as kind]:
            return Outcome(kind)
        case ["canceled", reason]:
            return Outcome("canceled", reason=reason)
        case ["pending", "succeeded", seconds]:
            return Outcome("pending", then="succeeded", after_s=float(seconds))
        case ["pending", "canceled", reason, seconds]:
            return Outcome("pending", then="canceled", reason=reason, after_s=float(seconds))
        case _:
            raise ValueError(f"unknown outcome {value!r}")


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One movement of money: `kind` is charge (from the customer) or refund (back). Holds are no movement.

    `idempotence_key` is None where the money moved without a call to the API: a customer's own purchase, a refund
    in the shop's cabinet, a payment put in as history.
    """

    payment_id: str
    kind: str
    amount: Decimal
    currency: str
    at: datetime
    idempotence_key: str | None
    payment_method_id: str | None
    metadata: Mapping[str, Any]
    refund_id: str | None = None

    def document(self) -> dict[str, Any]:
        """The entry as JSON."""
        return {
            "payment_id": self.payment_id,
            "kind": self.kind,
            "amount": f"{self.amount:.2f}",
            "currency": self.currency,
            "at": iso(self.at),
            "idempotence_key": self.idempotence_key,
            "payment_method_id": self.payment_method_id,
            "metadata": dict(self.metadata),
            "refund_id": self.refund_id,
        }


def plain_json(document: Any) -> bytes:
    """As the API sends it: no spaces, letters as they are."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def shown_money(amount: Decimal, currency: str) -> dict[str, str]:
    """An amount as the API shows it."""
    return {"value": f"{amount:.2f}", "currency": currency}
