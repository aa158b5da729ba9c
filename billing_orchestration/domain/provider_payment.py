"""A payment as the provider reports it, after its JSON was checked: the only form that rules see."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any, NamedTuple

from billing_orchestration.domain.money import Money

# How long what has just succeeded is left to the service's own webhook, which usually comes within seconds.
WEBHOOK_GRACE = timedelta(minutes=1)

PENDING = "pending"
WAITING_FOR_CAPTURE = "waiting_for_capture"
SUCCEEDED = "succeeded"
CANCELED = "canceled"
STATUSES = frozenset({PENDING, WAITING_FOR_CAPTURE, SUCCEEDED, CANCELED})
REFUND_STATUSES = frozenset({PENDING, SUCCEEDED, CANCELED})

# Provider method types that have a label in the service's enum `paymentmethodsenum`.
METHOD_LABELS: Mapping[str, str] = {
    "bank_card": "BANK_CARD",
    "yoo_money": "YOO_MONEY",
    "sberbank": "SBERBANK",
    "tinkoff_bank": "TINKOFF_BANK",
    "sbp": "SBP",
}
# Documented types without a label in the service: such a payment is as paid as any other, and payments.payment_method
# (nullable) stays NULL. A type outside both sets is one that the provider added since: it is settled in the same way,
# and the decision says so.
METHODS_WITHOUT_LABEL = frozenset(
    {
        "alfa_pay",
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


# The metadata key by which a payment names the renewal attempt it belongs to.
ATTEMPT_KEY = "renewal_attempt_id"


class Claims(NamedTuple):
    """What a payment's metadata says the payment is for. None: missing, or malformed; `malformed` names those keys.

    The service writes ids as decimal strings; numbers are read as well.
    """

    user_id: str | None = None
    plan_id: int | None = None
    payment_provider_id: int | None = None
    renewal_attempt_id: uuid.UUID | None = None
    malformed: frozenset[str] = frozenset()

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Claims:
        """Read foreign metadata. Never raises."""
        claims: list[Any] = []
        malformed: frozenset[str] = frozenset()
        for key, read in _READERS:
            value = metadata.get(key)
            claim = None if value is None else read(value)
            if claim is None and value is not None:
                malformed |= {key}
            claims.append(claim)
        return cls._make([*claims, malformed])

    @property
    def names_an_attempt(self) -> bool:
        """Whether it names a renewal attempt at all, readably or not."""
        return self.renewal_attempt_id is not None or ATTEMPT_KEY in self.malformed

    def describe_gaps(self, *keys: str) -> list[str]:
        """Which of these keys have no usable value, and why."""
        return [
            f"{key} ({'malformed' if key in self.malformed else 'missing'})"
            for key in keys
            if getattr(self, key) is None
        ]


def _read_name(value: object) -> str | None:
    # U+FFFD stands for what is not text (NUL, half a surrogate pair): a name with it names nobody.
    return value if isinstance(value, str) and value.strip() and "\ufffd" not in value else None


def _read_id(value: object) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 19:
        number = int(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        number = value
    else:
        return None
    return number if 1 <= number <= 2**63 - 1 else None


def _read_instant(value: object) -> datetime | None:
    try:
        instant = datetime.fromisoformat(value) if isinstance(value, str) else None
        return None if instant is None or instant.tzinfo is None else instant.astimezone(timezone.utc)
    except (ValueError, OverflowError):
        return None


def _read_uuid(value: object) -> uuid.UUID | None:
    try:
        return uuid.UUID(value) if isinstance(value, str) else None
    except ValueError:
        return None


# In the order of the claims.
_READERS: tuple[tuple[str, Callable[[object], object]], ...] = (
    ("user_id", _read_name),
    ("plan_id", _read_id),
    ("payment_provider_id", _read_id),
    (ATTEMPT_KEY, _read_uuid),
)
_OUR_KEYS = frozenset({*(key for key, _ in _READERS), "subscription_id", "period_start"})


@dataclass(frozen=True, slots=True)
class ProviderPayment:
    """One payment at the provider. Instants are aware UTC; `metadata` is as received (foreign data, not trusted).

    `income_amount`: what the shop gets of it, after the provider's fee; None where it is not said.
    `claims` is the metadata, parsed when the payment is made: rules read it and never the metadata.
    """

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
    income_amount: Decimal | None = None
    # It changes while a payment stays the same: two lists that differ in it alone do not contradict each other.
    receipt_registration: str | None = field(default=None, compare=False)
    claims: Claims = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "claims", Claims.of(self.metadata))

    @property
    def is_ours(self) -> bool:
        """Whether its metadata has any of our keys, readable or not. Without one it is another seller's payment."""
        return not _OUR_KEYS.isdisjoint(self.metadata)

    @property
    def claimed_period(self) -> tuple[int, datetime] | None:
        """The period that it names. Read when it is asked for: few payments are ever asked."""
        return claimed_period(self.metadata)

    @property
    def lock_name(self) -> str:
        """The name under which it is settled: its user's, or its own where it names no user."""
        return self.claims.user_id or f"payment {self.id}"

    @property
    def method_label(self) -> str | None:
        """The service's label for the method, or None where it has none."""
        return METHOD_LABELS.get(self.method_type) if self.method_type else None

    @property
    def method_is_new(self) -> bool:
        """Whether it was paid by a type of method that this version does not know."""
        return self.method_type not in (None, *METHOD_LABELS, *METHODS_WITHOUT_LABEL)

    @property
    def lacks_receipt(self) -> bool:
        """Whether it is a renewal of ours that was paid, and whose fiscal receipt was not registered."""
        canceled = self.receipt_registration == CANCELED and self.status == SUCCEEDED
        return canceled and self.claims.renewal_attempt_id is not None

    @property
    def succeeded_at(self) -> datetime:
        """When a success succeeded, by the provider's clock."""
        return self.captured_at or self.created_at

    def succeeded_within(self, grace: timedelta, now: datetime) -> bool:
        """Whether a success is younger than that. A provider whose clock is ahead says "now", never "in the future"."""
        return max(now - self.succeeded_at, timedelta(0)) < grace

    @property
    def refunded_in_full(self) -> bool:
        """Whether the whole amount was refunded. The provider keeps such a payment `succeeded`."""
        return self.refunded_amount >= self.money.amount


def claimed_subscription(metadata: Mapping[str, Any]) -> int | None:
    """The subscription that a renewal of ours names in its metadata, if that can be read."""
    return _read_id(metadata.get("subscription_id"))


def claimed_period(metadata: Mapping[str, Any]) -> tuple[int, datetime] | None:
    """The subscription and the start of the period that a renewal of ours names in its metadata."""
    subscription_id = claimed_subscription(metadata)
    period_start = _read_instant(metadata.get("period_start"))
    return None if subscription_id is None or period_start is None else (subscription_id, period_start)


@dataclass(frozen=True, slots=True)
class ProviderRefund:
    """One refund at the provider: money of a payment on its way back, given back, or kept after all."""

    id: str
    payment_id: str
    status: str
    money: Money
    created_at: datetime


@dataclass(frozen=True, slots=True)
class UnusablePayment:
    """An item of a provider's answer that cannot be read as a payment. The other items of its page still can.

    `payment_id` is None when not even that could be read; `evidence` is the raw item. Of a refund it is the payment's.
    """

    payment_id: str | None
    reason: str
    evidence: Any
