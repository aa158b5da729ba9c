"""Expiry: when a subscription or a payment is over, and what becomes of a payment that nobody paid."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import NamedTuple

from billing_orchestration.domain.billing_calendar import BillingCalendar
from billing_orchestration.domain.decisions import Code
from billing_orchestration.domain.money import Money
from billing_orchestration.domain.provider_payment import (
    CANCELED,
    SUCCEEDED,
    WAITING_FOR_CAPTURE,
    WEBHOOK_GRACE,
    ProviderPayment,
    UnusablePayment,
)


def subscriptions_over_before(as_of: datetime, calendar: BillingCalendar, grace_days: int) -> datetime:
    """The instant before which an end counts as over: the billing day of the end <= that of `as_of` minus the grace."""
    return calendar.end_of(calendar.day_of(as_of) - timedelta(days=grace_days))


def payments_over_before(as_of: datetime, ttl_days: int) -> datetime:
    """The instant before which a PENDING payment was created too long ago: more than `ttl_days` days of 24 hours."""
    return as_of - timedelta(days=ttl_days)


class StalePayment(NamedTuple):
    """A PENDING payment that is too old. `money` is None when its currency is null.

    There may be a hundred thousand of them, and as many decisions. A named tuple is made in a sixth of the time of a
    frozen dataclass.
    """

    id: int
    external_payment_id: str | None
    money: Money | None
    subscription_id: int | None = None
    created_at: datetime | None = None

    @property
    def subject(self) -> str:
        """How a person reads it in a report."""
        return f"payment {self.id}"


@dataclass(frozen=True, slots=True)
class SettleLate:
    """Paid at the provider: settled as the matching jobs would."""

    row: StalePayment
    payment: ProviderPayment


class ExpirePayment(NamedTuple):
    """PENDING -> EXPIRED, by its precondition."""

    row: StalePayment
    reason: str
    code: str


@dataclass(frozen=True, slots=True)
class KeepPending:
    """Left PENDING and reported. `needs_retry` makes the run red; `quarantine` opens an entry for a person."""

    row: StalePayment
    reason: str
    code: str = ""
    needs_retry: bool = False
    quarantine: UnusablePayment | None = None


PaymentExpiry = SettleLate | ExpirePayment | KeepPending


@dataclass(frozen=True, slots=True)
class NotFoundThere:
    """The provider knows no such payment."""


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """The provider gave no answer, with the reason."""

    reason: str


@dataclass(frozen=True, slots=True)
class ListedThere:
    """The provider's list shows it in a status of what nobody paid: canceled, or pending still."""

    status: str


ProviderAnswer = ProviderPayment | UnusablePayment | ListedThere | NotFoundThere | NoAnswer


class AskedPayment(NamedTuple):
    """A stale payment and the provider's answer (None: it has no provider id)."""

    row: StalePayment
    answer: ProviderAnswer | None


@lru_cache(maxsize=64)
def _unpaid(ttl_days: int, why: str) -> str:
    # Thousands share a reason: one text, not one each.
    return f"PENDING for more than {ttl_days} days, and {why}"


def decide_payment_expiry(
    row: StalePayment, answer: ProviderAnswer | None, ttl_days: int, now: datetime
) -> PaymentExpiry:
    """What becomes of a stale PENDING payment, by the provider's answer (None: it has no provider id)."""
    if answer is None:
        return ExpirePayment(row, _unpaid(ttl_days, "it never got a payment at the provider"), Code.NEVER_AT_PROVIDER)
    if isinstance(answer, NotFoundThere):
        return ExpirePayment(row, _unpaid(ttl_days, "the provider does not know it"), Code.UNKNOWN_AT_PROVIDER)
    if isinstance(answer, NoAnswer):
        return KeepPending(
            row,
            f"the provider did not answer, left for the next run: {answer.reason}",
            Code.NO_ANSWER,
            needs_retry=True,
        )
    if isinstance(answer, UnusablePayment):
        reason = f"the provider's record of it cannot be used: {answer.reason}"
        return KeepPending(row, reason, "unreadable", quarantine=answer)
    if isinstance(answer, ListedThere):
        return _unpaid_there(row, answer.status, ttl_days)
    if answer.status == SUCCEEDED and answer.succeeded_within(WEBHOOK_GRACE, now):
        reason = "paid this very minute: left to the service's webhook, then to the matching jobs"
        return KeepPending(row, reason, Code.LEFT_TO_WEBHOOK)
    if answer.status == SUCCEEDED:
        return SettleLate(row, answer)
    if answer.status == WAITING_FOR_CAPTURE:
        return KeepPending(
            row,
            "the customer's money is held at the provider (waiting_for_capture): capture or cancel it",
            Code.MONEY_HELD,
        )
    return _unpaid_there(row, answer.status, ttl_days)


def _unpaid_there(row: StalePayment, status: str, ttl_days: int) -> ExpirePayment:
    code = Code.CANCELED_AT_PROVIDER if status == CANCELED else Code.PENDING_AT_PROVIDER
    return ExpirePayment(row, _unpaid(ttl_days, f"{status} at the provider"), code)
