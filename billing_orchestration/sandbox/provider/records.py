"""What the sandbox provider remembers: payments, saved methods with their scripts, movements of money.

Nothing in here comes from `billing_orchestration.provider` or `.domain`: the sandbox judges that code, so it must not
share its mistakes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from billing_orchestration.sandbox.provider.clock import aware_utc, iso

CENT = Decimal("0.01")
# The provider keeps 3.5 %: income_amount is what is left.
INCOME_SHARE = Decimal("0.965")
# The first eight digits of a payment's id are the seconds since this instant, as in the provider's real ids.
IDS_BEGIN = datetime(2000, 1, 1, tzinfo=timezone.utc)

METHOD_TYPES = frozenset((
    "alfabank", "apple_pay", "b2b_sberbank", "bank_card", "cash", "electronic_certificate", "google_pay",
    "installments", "mobile_balance", "psb", "qiwi", "sber_bnpl", "sber_loan", "sberbank", "sbp", "tinkoff_bank",
    "webmoney", "wechat", "yoo_money",
))  # fmt: skip
# How long a customer has to confirm. None: for ever (cash).
CONFIRM_WITHIN_S: Mapping[str, int | None] = {"cash": None, "b2b_sberbank": 8 * 3600, "sber_loan": 72 * 3600}
CONFIRM_WITHIN_DEFAULT_S = 3600
HOLD_DAYS = 7


def money(value: Decimal | str | int) -> Decimal:
    """An amount with two places."""
    return Decimal(value).quantize(CENT, rounding=ROUND_HALF_UP)


def new_payment_id(at: datetime, generator: random.Random) -> str:
    """36 characters in the shape of the provider's ids (`22e12f66-000f-5000-8000-18db351245c7`)."""
    seconds = max(0, int((at - IDS_BEGIN).total_seconds())) & 0xFFFFFFFF
    return f"{seconds:08x}-000f-5000-{generator.choice('89ab')}000-{generator.getrandbits(48):012x}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a saved method does with one new charge.

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


@dataclass(slots=True)
class SavedMethod:
    """A payment method at the provider; chargeable without its owner when `saved`. `script` is consumed one outcome
    for each NEW charge, the last one repeating."""

    id: str
    type: str = "bank_card"
    saved: bool = True
    script: list[Outcome] = field(default_factory=lambda: [Outcome("succeeded")])
    card_last4: str = "4444"

    def next_outcome(self) -> Outcome:
        return self.script.pop(0) if len(self.script) > 1 else self.script[0]


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
        }


def _plain_json(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


@dataclass(slots=True, eq=False)
class Payment:
    """One payment, with what the API does not show: whether a success is captured at once, who asked for it."""

    id: str
    account_id: str
    sequence: int
    amount: Decimal
    currency: str
    status: str
    created_at: datetime
    changed_at: datetime
    captured_at: datetime | None = None
    expires_at: datetime | None = None
    description: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    method_type: str | None = "bank_card"
    method_id: str | None = None
    method_saved: bool = False
    card_last4: str = "4444"
    capture: bool = True
    save_method: bool = False
    test: bool = False
    refunded: Decimal = Decimal("0.00")
    cancellation: dict[str, str] | None = None
    confirmation_url: str | None = None
    idempotence_key: str | None = None
    override: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    raw: Any = None
    _json: bytes | None = None

    def touch(self, at: datetime) -> None:
        """Note a change of state."""
        self.changed_at = at
        self._json = None

    def json(self) -> bytes:
        """The payment as the API sends it; kept until it changes, so that long lists stay cheap."""
        if self._json is None:
            self._json = _plain_json(self.document())
        return self._json

    def document(self) -> Any:
        """The payment as the API shows it, with the oddities asked for (`override`, `without`, `raw`)."""
        if self.raw is not None:
            return self.raw
        shown: dict[str, Any] = {
            "id": self.id,
            "status": self.status,
            "amount": self._money(self.amount),
        }
        captured = self.status == "succeeded"
        if captured:
            shown["income_amount"] = self._money(money(self.amount * INCOME_SHARE))
        if self.description is not None:
            shown["description"] = self.description
        shown["recipient"] = {"account_id": self.account_id, "gateway_id": "1" + self.account_id}
        method = self._method()
        if method is not None:
            shown["payment_method"] = method
        if self.captured_at is not None:
            shown["captured_at"] = iso(self.captured_at)
        shown["created_at"] = iso(self.created_at)
        if self.expires_at is not None and self.status == "waiting_for_capture":
            shown["expires_at"] = iso(self.expires_at)
        if self.confirmation_url is not None and self.status == "pending":
            shown["confirmation"] = {"type": "redirect", "confirmation_url": self.confirmation_url}
        shown["test"] = self.test
        if captured:
            shown["refunded_amount"] = self._money(self.refunded)
        shown["paid"] = self.status in {"succeeded", "waiting_for_capture"}
        shown["refundable"] = captured and self.refunded < self.amount
        shown["metadata"] = self.metadata
        if self.cancellation is not None:
            shown["cancellation_details"] = self.cancellation
        shown.update(self.override)
        for name in self.without:
            shown.pop(name, None)
        return shown

    def _money(self, amount: Decimal) -> dict[str, str]:
        return {"value": f"{amount:.2f}", "currency": self.currency}

    def _method(self) -> dict[str, Any] | None:
        if self.method_type is None:
            return None
        shown: dict[str, Any] = {
            "type": self.method_type,
            "id": self.method_id or self.id,
            "saved": self.method_saved,
            "status": "active" if self.method_saved else "inactive",
        }
        if self.method_type == "bank_card":
            shown["title"] = f"Bank card *{self.card_last4}"
            shown["card"] = {
                "first6": "555555",
                "last4": self.card_last4,
                "expiry_year": "2031",
                "expiry_month": "12",
                "card_type": "MasterCard",
                "issuer_country": "RU",
            }
        elif self.method_type == "yoo_money":
            shown["title"] = "YooMoney wallet 4100116****6504"
            shown["account_number"] = "41001161446504"
        return shown
