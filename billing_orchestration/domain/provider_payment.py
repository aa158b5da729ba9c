"""A payment as the provider tells it, after its JSON was checked: the only form in which rules meet one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any

from billing_orchestration.domain.money import Money

PENDING = "pending"
WAITING_FOR_CAPTURE = "waiting_for_capture"
SUCCEEDED = "succeeded"
CANCELED = "canceled"
STATUSES = frozenset({PENDING, WAITING_FOR_CAPTURE, SUCCEEDED, CANCELED})

# Provider method types that have a label in the service's enum `paymentmethodsenum`.
METHOD_LABELS: Mapping[str, str] = {
    "bank_card": "BANK_CARD",
    "yoo_money": "YOO_MONEY",
    "sberbank": "SBERBANK",
    "tinkoff_bank": "TINKOFF_BANK",
    "sbp": "SBP",
}
# Types the provider documents that the service has no label for: such a payment is as paid as any other, and
# payments.payment_method (nullable) stays NULL. A type outside both sets is an unknown enum: a person looks at it.
METHODS_WITHOUT_LABEL = frozenset(
    {
        "alfabank",
        "apple_pay",
        "b2b_sberbank",
        "cash",
        "electronic_certificate",
        "google_pay",
        "installments",
        "mobile_balance",
        "psb",
        "qiwi",
        "sber_bnpl",
        "sber_loan",
        "webmoney",
        "wechat",
    }
)


@dataclass(frozen=True, slots=True)
class ProviderPayment:
    """One payment at the provider. Instants are aware UTC; `metadata` is as received (foreign data, not trusted)."""

    id: str
    status: str
    money: Money
    created_at: datetime
    captured_at: datetime | None = None
    refunded_amount: Decimal = Decimal("0.00")
    is_test: bool = False
    method_type: str | None = None
    method_id: str | None = None
    method_saved: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)
    cancellation_party: str | None = None
    cancellation_reason: str | None = None

    @property
    def method_label(self) -> str | None:
        """The service's label for the method, or None where it has none."""
        return METHOD_LABELS.get(self.method_type) if self.method_type else None

    @property
    def refunded_in_full(self) -> bool:
        """A success whose whole amount went back. The provider keeps such a payment `succeeded`."""
        return self.refunded_amount >= self.money.amount


@dataclass(frozen=True, slots=True)
class UnusablePayment:
    """An item of a provider's answer that cannot be read as a payment. The other items of its page still can.

    `payment_id` is None when not even that could be read; `evidence` is the raw item.
    """

    payment_id: str | None
    reason: str
    evidence: Any
