"""A payment at the provider, and how its API shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any

from billing_orchestration.sandbox.provider.clock import iso
from billing_orchestration.sandbox.provider.methods import shown_method
from billing_orchestration.sandbox.provider.records import Outcome, money, plain_json, shown_money

# How long a customer has to confirm. None: for ever (cash).
CONFIRM_WITHIN_S: Mapping[str, int | None] = {"cash": None, "b2b_sberbank": 8 * 3600, "sber_loan": 72 * 3600}
CONFIRM_WITHIN_DEFAULT_S = 3600
HOLD_DAYS = 7


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
    fee_percent: float | None = None
    refunded: Decimal = Decimal("0.00")
    cancellation: dict[str, str] | None = None
    confirmation_url: str | None = None
    idempotence_key: str | None = None
    gateway_id: str | None = None
    # The receipt, the state of its registration, what becomes of that (and how many seconds later), and the outcome
    # that waits for it.
    receipt: dict[str, Any] | None = None
    registration: str | None = None
    registers: tuple[str, float] = ("succeeded", 0.0)
    after_receipt: Outcome | None = None
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
            self._json = plain_json(self.document())
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
        if captured and self.fee_percent is not None:
            shown["income_amount"] = self._money(money(self.amount * (100 - Decimal(str(self.fee_percent))) / 100))
        if self.description is not None:
            shown["description"] = self.description
        shown["recipient"] = {
            "account_id": self.account_id,
            "gateway_id": self.gateway_id or "1" + self.account_id,
        }
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
        if self.registration is not None:
            shown["receipt_registration"] = self.registration
        shown["metadata"] = self.metadata
        if self.cancellation is not None:
            shown["cancellation_details"] = self.cancellation
        shown.update(self.override)
        for name in self.without:
            shown.pop(name, None)
        return shown

    def _money(self, amount: Decimal) -> dict[str, str]:
        return shown_money(amount, self.currency)

    def _method(self) -> dict[str, Any] | None:
        if self.method_type is None:
            return None
        status = "active" if self.method_saved else "inactive"
        if self.save_method and self.status == "pending":
            status = "pending"
        return shown_method(self.method_type, self.method_id or self.id, status, self.card_last4)
