"""Expiry: when a subscription or a payment is over, and the guard that stops a run which would end too many."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import NamedTuple

from billing_orchestration.domain.billing_calendar import BillingCalendar
from billing_orchestration.domain.money import Money
from billing_orchestration.domain.provider_payment import (
    SUCCEEDED,
    WAITING_FOR_CAPTURE,
    ProviderPayment,
    UnusablePayment,
)

# A run that would end more than a fifth of all active subscriptions, and more than a hundred, is more likely a
# mistake (a wrong clock, a broken import, renewals that did not run) than a fact.
GUARD_SHARE = 0.20
GUARD_COUNT = 100


def subscriptions_over_before(as_of: datetime, calendar: BillingCalendar, grace_days: int) -> datetime:
    """The instant before which an end counts as over: the billing day of the end <= that of `as_of` minus the grace."""
    return calendar.end_of(calendar.day_of(as_of) - timedelta(days=grace_days))


def payments_over_before(as_of: datetime, ttl_days: int) -> datetime:
    """The instant before which a PENDING payment was created too long ago: more than `ttl_days` days of 24 hours."""
    return as_of - timedelta(days=ttl_days)


def guard_verdict(changes: int, active: int, max_changes: int | None) -> str | None:
    """Why a run of expire_subscriptions_job must stop before it changes anything; None when it may go on."""
    if max_changes is not None:
        return over_limit(changes, max_changes)
    if changes > GUARD_COUNT and changes > GUARD_SHARE * active:
        return (
            f"it would expire {changes} of {active} ACTIVE subscriptions, more than {GUARD_SHARE:.0%} of them and more"
            f" than {GUARD_COUNT}. If that is right, launch it again with max_changes: {changes}"
        )
    return None


def over_limit(changes: int, max_changes: int | None) -> str | None:
    """Why a run stops because of max_changes; None when it may go on."""
    if max_changes is None or changes <= max_changes:
        return None
    return (
        f"it would make {changes} changes, max_changes is {max_changes}. If they are right, launch it again with"
        f" max_changes: {changes}"
    )


class StalePayment(NamedTuple):
    """A PENDING payment that is too old. `money` is None when its currency is null.

    There may be a hundred thousand of them, and as many decisions: named tuples, which are made in a sixth of the time
    of frozen dataclasses.
    """

    id: int
    external_payment_id: str | None
    money: Money | None

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


@dataclass(frozen=True, slots=True)
class KeepPending:
    """Left PENDING and reported. `needs_retry` makes the run red, `quarantine` asks for a person once."""

    row: StalePayment
    reason: str
    needs_retry: bool = False
    quarantine: UnusablePayment | None = None


PaymentExpiry = SettleLate | ExpirePayment | KeepPending


@dataclass(frozen=True, slots=True)
class NotFoundThere:
    """The provider says that it has no such payment."""


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """The provider could not be asked, with the reason."""

    reason: str


ProviderAnswer = ProviderPayment | UnusablePayment | NotFoundThere | NoAnswer


class AskedPayment(NamedTuple):
    """A stale payment and what the provider says of it (None: it has no provider id)."""

    row: StalePayment
    answer: ProviderAnswer | None


@lru_cache(maxsize=64)
def _unpaid(ttl_days: int, why: str) -> str:
    # Thousands share a reason: one text, not one each.
    return f"PENDING for more than {ttl_days} days, and {why}"


def decide_payment_expiry(row: StalePayment, answer: ProviderAnswer | None, ttl_days: int) -> PaymentExpiry:
    """What becomes of a stale PENDING payment, from what the provider says of it (None: it has no provider id)."""
    if answer is None:
        return ExpirePayment(row, _unpaid(ttl_days, "it never got a payment at the provider"))
    if isinstance(answer, NotFoundThere):
        return ExpirePayment(row, _unpaid(ttl_days, "the provider does not know it"))
    if isinstance(answer, NoAnswer):
        return KeepPending(
            row, f"the provider did not answer, left for the next run: {answer.reason}", needs_retry=True
        )
    if isinstance(answer, UnusablePayment):
        return KeepPending(row, f"the provider's record of it cannot be used: {answer.reason}", quarantine=answer)
    if answer.status == SUCCEEDED:
        return SettleLate(row, answer)
    if answer.status == WAITING_FOR_CAPTURE:
        return KeepPending(
            row, "the customer's money is held at the provider (waiting_for_capture): capture or cancel it"
        )
    return ExpirePayment(row, _unpaid(ttl_days, f"{answer.status} at the provider"))
