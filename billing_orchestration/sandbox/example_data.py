"""A small subscription service on an eventful day: some 300 subscriptions and payments, and what the provider knows.

Every rule of the five jobs has at least one case, with a label and the expected outcome, so that the demo can print
what was expected beside what happened. Rows are written as the service writes them; the provider's side goes to the
sandbox. Expected dates are computed here, by arithmetic of its own: this data judges the jobs.
"""

from __future__ import annotations

import calendar
import random
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any, Protocol

import sqlalchemy as sa

from billing_orchestration.database.tables import (
    payment_providers,
    payments,
    plans,
    prices,
    renewal_attempts,
    service,
    subscriptions,
)
from billing_orchestration.domain.money import Money
from billing_orchestration.domain.renewals import DueSubscription, plan_attempt
from billing_orchestration.sandbox.provider.clock import iso
from billing_orchestration.sandbox.provider.records import new_payment_id

PENDING_JOB = "matching_pending_payments_job"
SUCCESSFUL_JOB = "matching_successful_payments_job"
PAYMENTS_JOB = "expire_payments_job"
AUTOPAYMENT_JOB = "autopayment_job"
SUBSCRIPTIONS_JOB = "expire_subscriptions_job"


class ProviderSide(Protocol):
    """What `fill` needs of the sandbox; `control.SandboxControl` is one."""

    def add_methods(self, methods: Sequence[Mapping[str, Any]]) -> None:
        """Put saved payment methods in."""

    def add_payments(self, payments: Sequence[Mapping[str, Any]]) -> None:
        """Put payments into the history."""

    def misbehave(self, rules: Sequence[Mapping[str, Any]]) -> None:
        """Add misbehaviours."""


@dataclass(slots=True, eq=False)
class Plan:
    """A row of `plans`, with its prices by currency (a list, since real data has two for one)."""

    name: str
    count: int | None
    unit: str | None
    prices: Sequence[tuple[str, str]]
    recurring: bool = True
    id: int = 0

    def price(self, currency: str = "RUB") -> str:
        """The first price in the currency."""
        return next(amount for name, amount in self.prices if name == currency)


@dataclass(slots=True, eq=False)
class Subscription:
    """A row of `subscriptions`; `id` is known once it is written. `method_id`: the saved method, if there is one."""

    user_id: str
    plan: Plan
    status: str
    started_at: datetime
    ended_at: datetime
    method_id: str | None = None
    currency: str = "RUB"
    id: int = 0


@dataclass(slots=True, eq=False)
class PaymentRow:
    """A row of `payments`; `id` is known once it is written."""

    status: str
    amount: str
    created_at: datetime
    external_id: str | None
    currency: str | None = "RUB"
    method: str | None = "BANK_CARD"
    subscription: Subscription | None = None
    id: int = 0


@dataclass(frozen=True, slots=True)
class Expectation:
    """What must be found after the runs. None: not looked at.

    `status` and `until` (the first ten characters of `ended_at`) of the subscription; `attempt` is the state of its
    newest renewal attempt; `charges` counts the provider's ledger entries for the period; `row` is the payment row's
    status; `grant` is renewed, extended, created, refunded or "" for none; `quarantine` its kind or "".
    """

    status: str | None = None
    until: str | None = None
    attempt: str | None = None
    charges: int | None = None
    row: str | None = None
    grant: str | None = None
    quarantine: str | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """One instance of a case. `external_id`: the provider's payment that the case is about."""

    subscription: Subscription | None = None
    row: PaymentRow | None = None
    external_id: str | None = None


@dataclass(slots=True)
class Case:
    """A situation of real life, what is expected of it, and its instances."""

    label: str
    job: str
    expected: str
    want: Expectation
    items: list[Item] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Story:
    """What was written: every case, every subscription as it was before the first run, the counts, and
    what `migrate` said."""

    now: datetime
    cases: tuple[Case, ...]
    subscriptions: tuple[Subscription, ...]
    payments: int
    provider_payments: int
    migrated: tuple[str, ...]


def fill(engine: sa.Engine, provider: ProviderSide, now: datetime, seed: int = 20) -> Story:
    """Write the example data into an empty database and into the sandbox. The same seed, the same data.

    The service's tables come first, with flaws that only a database without our indexes can have; then it is migrated,
    as an existing service's database is. `now` is aware; every date is relative to it, so that the jobs can run for the
    real present.
    """
    book = _Book(now.astimezone(timezone.utc).replace(microsecond=0), random.Random(seed))
    _renewals(book)
    _troubled_renewals(book)
    _not_charged(book)
    _earlier_attempts(book)
    _paid_within_the_hour(book)
    _unknown_here(book)
    _long_pending(book)
    _over(book)
    return book.write(engine, provider)


# ---------------------------------------------------------------------------------------------------- the cases


def _renewals(book: _Book) -> None:
    monthly, now = book.monthly, book.now
    renewed = "charged once, one period longer"
    case = book.case(
        AUTOPAYMENT_JOB,
        "ordinary monthly subscriptions, ended today or yesterday",
        renewed,
        status="ACTIVE",
        attempt="SUCCEEDED",
        charges=1,
        grant="renewed",
    )
    for number in range(36):
        case.items.append(book.due(monthly, now - timedelta(hours=0.4 + number * 0.6)))
    case = book.case(
        AUTOPAYMENT_JOB,
        "ends later today (23:59): its day has come",
        renewed,
        status="ACTIVE",
        attempt="SUCCEEDED",
        charges=1,
        grant="renewed",
    )
    for _ in range(3):
        case.items.append(book.due(monthly, datetime.combine(now.date(), time(23, 59), timezone.utc)))
    last, after = _month_ends(now)
    case = book.case(
        AUTOPAYMENT_JOB,
        f"month end: bought on a 31st, ended {last:%d %B}",
        f"until {after:%d %B}: the 31st stays the anchor",
        status="ACTIVE",
        until=f"{after:%Y-%m-%d}",
        attempt="SUCCEEDED",
        charges=1,
        grant="renewed",
    )
    for _ in range(2):
        case.items.append(book.due(monthly, last, started_at=_day_31_before(last)))
    ended = now - timedelta(hours=3)
    for plan, count, word in (
        (book.yearly, 3, "a year"),
        (book.ten_days, 4, "10 days"),
        (book.quarterly, 2, "3 months"),
    ):
        end = _later(ended, plan)
        case = book.case(
            AUTOPAYMENT_JOB,
            f"plan “{plan.name}”",
            f"charged {plan.price()} RUB, {word} longer: {end:%Y-%m-%d}",
            status="ACTIVE",
            until=f"{end:%Y-%m-%d}",
            attempt="SUCCEEDED",
            charges=1,
            grant="renewed",
        )
        for _ in range(count):
            case.items.append(book.due(plan, ended))
    case = book.case(
        AUTOPAYMENT_JOB,
        "first paid in dollars",
        "charged the plan's dollar price",
        status="ACTIVE",
        attempt="SUCCEEDED",
        charges=1,
        grant="renewed",
    )
    for _ in range(2):
        case.items.append(book.due(monthly, ended, currency="USD"))


def _troubled_renewals(book: _Book) -> None:
    """Charges that the provider declines, leaves open, or answers badly."""
    declined = (
        ("insufficient_funds", 5, "declined (soft): stays ACTIVE, tried again tomorrow", "DECLINED"),
        ("card_expired", 4, "declined (hard): this period is not charged again", "STOPPED"),
        ("3d_secure_failed", 1, "declined, the customer must act: not charged again", "STOPPED"),
        ("general_decline", 3, "declined without a reason: at most two more tries", "DECLINED"),
        ("not_in_any_documentation", 1, "an unknown reason is never taken for a hard one", "DECLINED"),
    )
    hours = 1.0
    for reason, count, expected, state in declined:
        case = book.case(
            AUTOPAYMENT_JOB, f"the card says {reason}", expected, status="ACTIVE", attempt=state, charges=0, grant=""
        )
        for _ in range(count):
            hours += 0.7
            case.items.append(book.due(book.monthly, book.ago(hours=hours), script=[f"canceled:{reason}"]))
    case = book.case(
        AUTOPAYMENT_JOB,
        "the provider says pending, and leaves it so",
        "asked about daily, never sent again, not expired",
        status="ACTIVE",
        attempt="PENDING",
        charges=0,
        grant="",
    )
    for days in (1, 4):
        case.items.append(book.due(book.monthly, book.ago(days=days, minutes=5), script=["pending"]))
    case = book.case(
        AUTOPAYMENT_JOB,
        "pending, and paid a moment later",
        "the next run asks, and grants it once",
        status="ACTIVE",
        attempt="SUCCEEDED",
        charges=1,
        grant="renewed",
    )
    case.items.append(book.due(book.monthly, book.ago(hours=5), script=["pending:succeeded:2"]))
    once = "the same key again: charged once, granted once"
    wires = (
        ("the answer was lost after the charge", "cut_after", 2, 1, once),
        ("the request was lost before the charge", "cut_before", 1, 1, once),
        ("HTTP 500 after the charge", "error_after", 1, 1, once),
        ("a page of HTML instead of the answer", "html_after", 1, 1, once),
        (
            "charged, and no answer during the whole run",
            "cut_after",
            1,
            None,
            "unknown; the next run, same key: one charge",
        ),
    )
    for label, effect, count, times, expected in wires:
        case = book.case(
            AUTOPAYMENT_JOB, label, expected, status="ACTIVE", attempt="SUCCEEDED", charges=1, grant="renewed"
        )
        for _ in range(count):
            # Far apart in the queue: six failures in a row would open the breaker.
            hours += 2.3
            item = book.due(book.monthly, book.ago(hours=hours))
            assert item.subscription is not None  # noqa: S101 - `due` makes one
            rule = {
                "call": "create",
                "effect": effect,
                "times": times,
                "payment_method_id": item.subscription.method_id,
            }
            book.misbehaviours.append(rule)
            case.items.append(item)
    case = book.case(
        AUTOPAYMENT_JOB,
        "the customer has withdrawn the saved card",
        "refused by the provider (400): reported, no money moved",
        status="ACTIVE",
        attempt="REJECTED",
        charges=0,
        grant="",
    )
    case.items.append(book.due(book.monthly, book.ago(hours=6), saved=False))


def _not_charged(book: _Book) -> None:
    def case(label: str, expected: str, **want: Any) -> Case:
        return book.case(AUTOPAYMENT_JOB, label, expected, charges=0, grant="", **want)

    yesterday = book.ago(hours=20)
    ordinary = {"status": "ACTIVE", "attempt": ""}
    group = case("given for free: no saved method", "not charged, reported", **ordinary)
    group.items.extend(book.due(book.monthly, yesterday, bought=False) for _ in range(2))
    group = case("a plan without a price", "not charged, reported", **ordinary)
    group.items.append(book.due(book.priceless, yesterday))
    group = case("a plan with two prices in one currency", "not charged, reported", **ordinary)
    group.items.append(book.due(book.ambiguous, yesterday))
    group = case("a plan that does not renew", "not charged", **ordinary)
    group.items.extend(book.due(book.one_off, yesterday) for _ in range(3))
    group = case("paused, or canceled by the customer", "untouched", attempt="", until=f"{yesterday:%Y-%m-%d}")
    group.items.extend(book.due(book.monthly, yesterday, status=status) for status in ("PAUSED", "CANCELED") * 2)
    group = case("not due yet", "untouched", **ordinary)
    for number in range(90):
        ended_at = book.now + timedelta(days=1 + number % 28, hours=1 + number % 5)
        group.items.append(book.due(book.monthly, ended_at, started_at=_months(ended_at, -1)))


def _earlier_attempts(book: _Book) -> None:
    """What yesterday's runs left behind."""
    sent = book.ago(hours=26)
    group = book.case(
        AUTOPAYMENT_JOB,
        "declined (soft) yesterday, the card is covered today",
        "second try with a new key: renewed",
        status="ACTIVE",
        attempt="SUCCEEDED",
        charges=1,
        grant="renewed",
    )
    for _ in range(2):
        item = book.due(book.monthly, book.ago(hours=30))
        book.attempt(item, "DECLINED", sent, reason="insufficient_funds", decline_class="soft")
        group.items.append(item)
    group = book.case(
        AUTOPAYMENT_JOB,
        "stopped by a hard decline yesterday",
        "not charged, whatever the card would say today",
        status="ACTIVE",
        attempt="STOPPED",
        charges=0,
        grant="",
    )
    item = book.due(book.monthly, book.ago(hours=31))
    book.attempt(item, "STOPPED", sent, reason="permission_revoked", decline_class="hard")
    group.items.append(item)
    group = book.case(
        AUTOPAYMENT_JOB,
        "outcome unknown for 26 h: the provider has forgotten the key",
        "not sent again: searched, found, granted",
        status="ACTIVE",
        attempt="SUCCEEDED",
        charges=1,
        grant="renewed",
    )
    item = book.due(book.monthly, book.ago(hours=32))
    book.attempt(item, "UNKNOWN", sent, executed=True)
    group.items.append(item)
    group = book.case(
        AUTOPAYMENT_JOB,
        "unknown for 26 h, and the provider never got it",
        "first scan misses it; no charge until a second one does",
        status="ACTIVE",
        attempt="UNKNOWN",
        charges=0,
        grant="",
    )
    item = book.due(book.monthly, book.ago(days=5))
    book.attempt(item, "UNKNOWN", sent)
    group.items.append(item)
    group = book.case(
        AUTOPAYMENT_JOB,
        "pending since yesterday, paid in the meantime",
        "asked about: granted once",
        status="ACTIVE",
        attempt="SUCCEEDED",
        charges=1,
        grant="renewed",
    )
    item = book.due(book.monthly, book.ago(hours=33))
    book.attempt(item, "PENDING", sent, executed=True, captured_at=book.ago(hours=20))
    group.items.append(item)


def _paid_within_the_hour(book: _Book) -> None:
    def case(label: str, expected: str, **want: Any) -> Case:
        return book.case(PENDING_JOB, label, expected, **want)

    settled = {"row": "SUCCEEDED", "quarantine": ""}
    group = case("paid, no subscription yet", "payment SUCCEEDED, subscription created", grant="created", **settled)
    for number in range(8):
        group.items.append(book.purchase("PENDING", minutes=5 + 6 * number))
    item = book.due(book.monthly, book.ago(hours=2))
    group = case(
        "renewed by hand half an hour ago, on the day it is due",
        "extended, and not charged again",
        status="ACTIVE",
        attempt="",
        charges=0,
        grant="extended",
        **settled,
    )
    group.items.append(book.paid_again(item, minutes=30))
    short, after = _next_short_month_end(book.now)
    item = book.due(book.monthly, short, started_at=_day_31_before(short))
    group = case(
        f"month end: paid ahead, bought on a 31st, ends {short:%d %B}",
        f"until {after:%d %B}: back to the anchor day",
        status="ACTIVE",
        until=f"{after:%Y-%m-%d}",
        grant="extended",
        **settled,
    )
    group.items.append(book.paid_again(item, minutes=12))
    group = case(
        "created three days ago, captured 20 minutes ago",
        "settled: the capture counts, not the creation",
        grant="created",
        **settled,
    )
    group.items.append(book.purchase("PENDING", days=3, captured_minutes=20))
    group = case(
        "paid in cash: a method the service has no label for", "settled, method left empty", grant="created", **settled
    )
    group.items.append(book.purchase("PENDING", minutes=25, method_type="cash"))
    group = case(
        "half of it was refunded since", "settled: only a full refund takes the grant", grant="created", **settled
    )
    group.items.append(book.purchase("PENDING", minutes=40, refunded="149.50"))
    group = case(
        "all of it was refunded since",
        "payment REFUNDED, nothing granted",
        grant="refunded",
        row="REFUNDED",
        quarantine="",
    )
    group.items.append(book.purchase("PENDING", minutes=41, refunded="299.00"))
    untouched = {"row": "PENDING", "grant": "", "quarantine": ""}
    group = case("the customer has not paid yet", "left PENDING", **untouched)
    for number in range(3):
        group.items.append(book.purchase("PENDING", minutes=3 + number, there="pending"))
    group = case("canceled there", "left PENDING until its seven days are over", **untouched)
    group.items.append(book.purchase("PENDING", minutes=50, there="canceled"))
    group = case("never reached the provider (no id)", "left PENDING", **untouched)
    group.items.append(book.purchase("PENDING", minutes=9, there=None))
    held = {"row": "PENDING", "grant": ""}
    group = case("299 here, 29.90 there", "quarantine: nothing granted", quarantine="amount_differs", **held)
    group.items.append(book.purchase("PENDING", minutes=15, paid="29.90"))
    group = case(
        "299 rubles here, 299 dollars there", "quarantine: nothing granted", quarantine="amount_differs", **held
    )
    group.items.append(book.purchase("PENDING", minutes=16, paid_currency="USD"))
    other = book.due(book.monthly, book.now + timedelta(days=9), started_at=_months(book.now + timedelta(days=9), -1))
    group = case(
        "the metadata names another customer than the row",
        "quarantine: nothing granted",
        quarantine="foreign_metadata",
        **held,
    )
    group.items.append(book.purchase("PENDING", minutes=17, linked=other.subscription))
    group = case("two rows with one provider id", "settled once", grant="created", **settled)
    item = book.purchase("PENDING", minutes=35)
    group.items.append(item)
    book.copy_of(item)


def _unknown_here(book: _Book) -> None:
    def case(label: str, expected: str, **want: Any) -> Case:
        return book.case(SUCCESSFUL_JOB, label, expected, **want)

    created = {"row": "SUCCEEDED", "grant": "created", "quarantine": ""}
    group = case("paid there, no row here (the service crashed)", "payment and subscription created", **created)
    for number in range(3):
        group.items.append(book.purchase(None, minutes=10 + number))
    item = book.due(book.monthly, book.now + timedelta(days=5), started_at=_months(book.now + timedelta(days=5), -1))
    until = f"{_months(book.now + timedelta(days=5), 1):%Y-%m-%d}"
    group = case(
        "the same, and the customer has the subscription already",
        f"extended: {until}",
        until=until,
        row="SUCCEEDED",
        grant="extended",
        quarantine="",
    )
    group.items.append(book.paid_again(item, minutes=33, row_status=None))
    group = case(
        "no row here, refunded in full there", "recorded as REFUNDED, nothing granted", row="REFUNDED", grant="refunded"
    )
    group.items.append(book.purchase(None, minutes=22, refunded="299.00"))
    group = case("EXPIRED here, paid ten days later", "revived: SUCCEEDED, subscription created", **created)
    group.items.append(book.purchase("EXPIRED", days=10, captured_minutes=14))
    group = case("CREATED here, paid there", "SUCCEEDED, subscription created", **created)
    group.items.append(book.purchase("CREATED", minutes=28))
    group = case("REFUNDED here, refunded there", "left alone", row="REFUNDED", grant="", quarantine="")
    group.items.append(book.purchase("REFUNDED", minutes=45, refunded="299.00"))
    group = case("SUCCEEDED on both sides", "left alone", row="SUCCEEDED", grant="", quarantine="")
    for number in range(5):
        group.items.append(book.purchase("SUCCEEDED", minutes=20 + number, subscribed=True))
    group = case(
        "a second row of it is still PENDING", "left alone: granted already", row="SUCCEEDED", grant="", quarantine=""
    )
    item = book.purchase("SUCCEEDED", minutes=47, subscribed=True)
    group.items.append(item)
    book.copy_of(item, status="PENDING")

    def odd(label: str, kind: str, **purchase: Any) -> None:
        group = case(label, "quarantine: nothing granted", grant="", quarantine=kind)
        group.items.append(book.purchase(purchase.pop("row", None), minutes=18, **purchase))

    odd("CANCELED here, paid there", "canceled_here", row="CANCELED")
    odd("no metadata at all", "metadata", metadata={})
    odd("the metadata's plan is “gold”", "metadata", metadata={"plan_id": "gold"})
    odd("the metadata's plan does not exist", "metadata", metadata={"plan_id": "4711"})
    odd("the metadata's payment provider does not exist", "metadata", metadata={"payment_provider_id": "99"})
    odd("a test payment in the live shop", "test_payment", test=True)
    odd(
        "it names a renewal that we never made",
        "unknown_attempt",
        metadata={"renewal_attempt_id": "7d0d5f0e-5f1c-5d5e-8e0e-000000000001"},
    )
    odd(
        "an item of the list that cannot be read",
        "unreadable",
        override={"amount": {"value": "1e12", "currency": "RUB"}},
    )


def _long_pending(book: _Book) -> None:
    def case(label: str, expected: str, **want: Any) -> Case:
        return book.case(PAYMENTS_JOB, f"PENDING for nine days: {label}", expected, **want)

    settled = {"row": "SUCCEEDED", "grant": "created"}
    group = case("paid there on the first day", "asked about: settled, subscription created", **settled)
    for _ in range(2):
        group.items.append(book.purchase("PENDING", days=9))
    expired = {"row": "EXPIRED", "grant": ""}
    group = case("still pending there (cash)", "EXPIRED; a later success would revive it", **expired)
    group.items.append(book.purchase("PENDING", days=9, there="pending", method_type="cash"))
    group = case("canceled there", "EXPIRED", **expired)
    for _ in range(6):
        group.items.append(book.purchase("PENDING", days=9, there="canceled"))
    group = case("not known there", "EXPIRED", **expired)
    group.items.append(book.purchase("PENDING", days=9, there="not found"))
    group = case("it never got an id", "EXPIRED", **expired)
    for _ in range(2):
        group.items.append(book.purchase("PENDING", days=9, there=None))
    group = case("the money is held (waiting_for_capture)", "left PENDING, reported", row="PENDING", grant="")
    group.items.append(book.purchase("PENDING", days=9, there="waiting_for_capture"))
    group = case("the provider has no answer about it", "left PENDING, the run is red; EXPIRED by the next", **expired)
    item = book.purchase("PENDING", days=9, there="canceled")
    book.misbehaviours.append({"call": "get", "payment_id": item.external_id, "effect": "error_before", "times": None})
    group.items.append(item)
    group = case("two rows with one provider id, paid", "settled once", **settled)
    item = book.purchase("PENDING", days=9)
    group.items.append(item)
    copy = book.copy_of(item)
    group = case("the second of these two rows", "EXPIRED as a duplicate", row="EXPIRED", grant="")
    group.items.append(copy)
    group = book.case(
        PAYMENTS_JOB, "PENDING for six days and 23 hours", "left PENDING: not seven days yet", row="PENDING", grant=""
    )
    group.items.append(book.purchase("PENDING", days=6, hours=23, there="canceled"))


def _over(book: _Book) -> None:
    def case(label: str, expected: str, status: str, count: int, ended_at: datetime, **how: Any) -> Case:
        group = book.case(SUBSCRIPTIONS_JOB, label, expected, status=status, charges=0, grant="")
        group.items.extend(
            book.due(how.get("plan", book.one_off), ended_at, **how.get("due", {})) for _ in range(count)
        )
        return group

    group = case(
        "stale for months, the saved card still works", "too old to charge (30 days): EXPIRED", "EXPIRED", 0, book.now
    )
    for number in range(24):
        group.items.append(book.due(book.monthly, book.ago(days=33 + 6 * number)))
    case("does not renew, ended three days ago", "EXPIRED: the grace is over", "EXPIRED", 4, book.on_day(3))
    case("does not renew, ended yesterday", "within the grace: left ACTIVE", "ACTIVE", 4, book.on_day(1))
    case(
        "no saved method, ended ten days ago",
        "could not be charged: EXPIRED",
        "EXPIRED",
        3,
        book.on_day(10),
        plan=book.monthly,
        due={"bought": False},
    )
    group = case("declined (soft) on every day of the grace", "not charged any more: EXPIRED", "EXPIRED", 0, book.now)
    for _ in range(2):
        item = book.due(book.monthly, book.on_day(5))
        for day in (4, 3, 2):
            book.attempt(item, "DECLINED", book.on_day(day), reason="insufficient_funds", decline_class="soft")
        group.items.append(item)


# ------------------------------------------------------------------------------------------------------ dates


def _months(instant: datetime, count: int, anchor_day: int | None = None) -> datetime:
    """The instant some months later (or earlier), on the anchor day or on the last day of a month that lacks it."""
    months = instant.year * 12 + instant.month - 1 + count
    year, month = months // 12, months % 12 + 1
    return instant.replace(
        year=year, month=month, day=min(anchor_day or instant.day, calendar.monthrange(year, month)[1])
    )


def _later(instant: datetime, plan: Plan) -> datetime:
    count = plan.count or 1
    return (
        instant + timedelta(days=count) if plan.unit == "days" else _months(instant, count * _MONTHS[plan.unit or ""])
    )


_MONTHS = {"month": 1, "year": 12}


def _month_ends(now: datetime) -> tuple[datetime, datetime]:
    """The latest last day of a month (today, if it is one), and the end of the month after it."""
    last = now
    if last.day != calendar.monthrange(last.year, last.month)[1]:
        last = last.replace(day=1) - timedelta(days=1)
    return last, _months(last, 1, 31)


def _next_short_month_end(now: datetime) -> tuple[datetime, datetime]:
    """The next last day of a month with fewer than 31 days, and the end of the month after it."""
    end = _months(now + timedelta(days=1), 0, 31)
    while end.day == 31:
        end = _months(end, 1, 31)
    return end, _months(end, 1, 31)


def _day_31_before(end: datetime) -> datetime:
    """The latest 31st from which whole months lead to this end."""
    months = -1
    while (start := _months(end, months, 31)).day != 31:
        months -= 1
    return start


# -------------------------------------------------------------------------------------------------- the writer


class _Book:
    """Collects rows and the provider's payments, then writes them all."""

    def __init__(self, now: datetime, generator: random.Random) -> None:
        self.now = now
        self.random = generator
        self.monthly = Plan("Monthly", 1, "month", [("RUB", "299.00"), ("USD", "4.99")])
        self.quarterly = Plan("Quarterly", 3, "month", [("RUB", "799.00")])
        self.yearly = Plan("Yearly", 1, "year", [("RUB", "2990.00")])
        self.ten_days = Plan("Ten days", 10, "days", [("RUB", "99.00")])
        self.one_off = Plan("Season pass", 90, "days", [("RUB", "1490.00")], recurring=False)
        self.priceless = Plan("Legacy", 1, "month", [])
        self.ambiguous = Plan("Twice priced", 1, "month", [("RUB", "199.00"), ("RUB", "249.00")])
        self.plans = [
            self.monthly,
            self.quarterly,
            self.yearly,
            self.ten_days,
            self.one_off,
            self.priceless,
            self.ambiguous,
        ]
        for number, plan in enumerate(self.plans, start=1):
            plan.id = number
        self.cases: list[Case] = []
        self.subscriptions: list[Subscription] = []
        self.rows: list[PaymentRow] = []
        self.there: list[dict[str, Any]] = []
        self.methods: list[dict[str, Any]] = []
        self.misbehaviours: list[dict[str, Any]] = []
        self.attempts: list[tuple[Subscription, dict[str, Any]]] = []
        self.users = 0

    def case(self, job: str, label: str, expected: str, **want: Any) -> Case:
        """Begin a case; its items follow."""
        case = Case(label, job, expected, Expectation(**want))
        self.cases.append(case)
        return case

    def ago(self, **span: float) -> datetime:
        """An instant before now."""
        return self.now - timedelta(**span)

    def on_day(self, days_ago: int) -> datetime:
        """Noon, some whole days ago: safely within that day."""
        return datetime.combine(self.now.date() - timedelta(days=days_ago), time(12), timezone.utc)

    def _user(self) -> str:
        self.users += 1
        return str(uuid.UUID(int=self.random.getrandbits(128), version=4))

    def _id(self, at: datetime) -> str:
        return new_payment_id(at, self.random)

    def _metadata(self, user_id: str, plan: Plan) -> dict[str, str]:
        return {"user_id": user_id, "plan_id": str(plan.id), "payment_provider_id": "1"}

    def due(
        self,
        plan: Plan,
        ended_at: datetime,
        *,
        started_at: datetime | None = None,
        status: str = "ACTIVE",
        currency: str = "RUB",
        script: Sequence[str] = ("succeeded",),
        saved: bool = True,
        bought: bool = True,
    ) -> Item:
        """A subscription with the purchase that began it, whose card was saved; `script` is what the card will do."""
        if started_at is None:
            span = {"days": timedelta(days=plan.count or 1)}.get(plan.unit or "")
            started_at = ended_at - span if span else _months(ended_at, -(plan.count or 1) * _MONTHS[plan.unit or ""])
        subscription = Subscription(self._user(), plan, status, started_at, ended_at, currency=currency)
        self.subscriptions.append(subscription)
        if bought:
            external_id = self._id(started_at)
            amount = plan.price(currency) if plan.prices else "299.00"
            self.rows.append(
                PaymentRow("SUCCEEDED", amount, started_at, external_id, currency, subscription=subscription)
            )
            subscription.method_id = external_id
            self.there.append(
                {
                    "id": external_id,
                    "amount": amount,
                    "currency": currency,
                    "status": "succeeded",
                    "created_at": iso(started_at),
                    "saved": True,
                    "script": list(script),
                    "metadata": self._metadata(subscription.user_id, plan),
                }
            )
            if not saved:
                self.methods.append({"id": external_id, "saved": False})
        return Item(subscription)

    def purchase(
        self,
        status: str | None,
        *,
        there: str | None = "succeeded",
        captured_minutes: float | None = None,
        paid: str | None = None,
        paid_currency: str = "RUB",
        refunded: str | None = None,
        method_type: str = "bank_card",
        metadata: Mapping[str, str] | None = None,
        linked: Subscription | None = None,
        subscribed: bool = False,
        test: bool = False,
        override: Mapping[str, Any] | None = None,
        **ago: float,
    ) -> Item:
        """A first purchase: its row here (`status`, None for no row) and the payment there (None: none was made)."""
        at, plan, user_id = self.ago(**ago), self.monthly, self._user()
        external_id = None if there is None else self._id(at)
        if subscribed:
            linked = Subscription(user_id, plan, "ACTIVE", at, _months(at, 1))
            self.subscriptions.append(linked)
        row = None
        if status is not None:
            row = PaymentRow(status, plan.price(), at, external_id, subscription=linked)
            row.method = "BANK_CARD" if method_type == "bank_card" else None
            self.rows.append(row)
        if there not in (None, "not found"):
            payment: dict[str, Any] = {
                "id": external_id,
                "amount": paid or plan.price(),
                "currency": paid_currency,
                "status": there,
                "created_at": iso(at),
                "metadata": self._metadata(user_id, plan),
                "method_type": method_type,
                "test": test,
            }
            if metadata is not None:
                payment["metadata"] = {**payment["metadata"], **metadata} if metadata else {}
            if captured_minutes is not None:
                payment["captured_at"] = iso(self.ago(minutes=captured_minutes))
            if refunded:
                payment["refunded_amount"] = refunded
            if override:
                payment["override"] = dict(override)
            self.there.append(payment)
        return Item(linked if subscribed else None, row, external_id)

    def paid_again(self, item: Item, *, minutes: float, row_status: str | None = "PENDING") -> Item:
        """The subscriber has paid another period by hand."""
        subscription = item.subscription
        assert subscription is not None  # noqa: S101 - the caller made it so
        at = self.ago(minutes=minutes)
        external_id, row = self._id(at), None
        if row_status is not None:
            row = PaymentRow(row_status, subscription.plan.price(), at, external_id, subscription=subscription)
            self.rows.append(row)
        self.there.append(
            {
                "id": external_id,
                "amount": subscription.plan.price(),
                "status": "succeeded",
                "created_at": iso(at),
                "metadata": self._metadata(subscription.user_id, subscription.plan),
            }
        )
        return Item(subscription, row, external_id)

    def copy_of(self, item: Item, status: str | None = None) -> Item:
        """A second row with the same provider id, as a double click leaves it."""
        row = item.row
        assert row is not None  # noqa: S101 - the caller made it so
        copy = PaymentRow(
            status or row.status, row.amount, row.created_at, row.external_id, subscription=row.subscription
        )
        self.rows.append(copy)
        return Item(None, copy, item.external_id)

    def attempt(
        self,
        item: Item,
        state: str,
        sent_at: datetime,
        *,
        reason: str | None = None,
        decline_class: str | None = None,
        executed: bool = False,
        captured_at: datetime | None = None,
    ) -> None:
        """An attempt of an earlier run. `executed`: the provider has charged it, and we do not know yet."""
        subscription = item.subscription
        assert subscription is not None  # noqa: S101 - the caller made it so
        closed = state in ("DECLINED", "STOPPED")
        self.attempts.append(
            (
                subscription,
                {
                    "state": state,
                    "planned_at": sent_at,
                    "first_sent_at": sent_at,
                    "last_sent_at": sent_at,
                    "sends": 1,
                    "decline_party": "payment_network" if closed else None,
                    "decline_reason": reason,
                    "decline_class": decline_class,
                    "closed_at": sent_at if closed else None,
                    "run_id": "an earlier run",
                    "external_payment_id": self._id(sent_at) if closed or executed else None,
                    "executed": executed,
                    "captured_at": captured_at,
                },
            )
        )

    def write(self, engine: sa.Engine, provider: ProviderSide) -> Story:
        """Both sides, the service's first."""
        from billing_orchestration.database.migrating import migrate

        with engine.begin() as connection:
            service.create_all(connection)
            self._write_catalogue(connection)
            self._write_rows(connection)
        migrated: list[str] = []
        migrate(engine, echo=migrated.append)
        with engine.begin() as connection:
            self._write_attempts(connection)
        provider.add_payments(self.there)
        if self.methods:
            provider.add_methods(self.methods)
        provider.misbehave(self.misbehaviours)
        return Story(
            self.now, tuple(self.cases), tuple(self.subscriptions), len(self.rows), len(self.there), tuple(migrated)
        )

    def _write_catalogue(self, connection: sa.Connection) -> None:
        began = self.ago(days=900)
        stamps = {"created_at": began, "updated_at": began}
        connection.execute(
            sa.insert(plans),
            [
                {
                    "name": plan.name,
                    "is_active": True,
                    "is_recurring": plan.recurring,
                    "duration": plan.count,
                    "duration_unit": plan.unit,
                    **stamps,
                }
                for plan in self.plans
            ],
        )
        connection.execute(
            sa.insert(prices),
            [
                {"plan_id": plan.id, "currency": currency, "amount": Decimal(amount)}
                for plan in self.plans
                for currency, amount in plan.prices
            ],
        )
        connection.execute(sa.insert(payment_providers), [{"name": "yookassa", "is_active": True, **stamps}])

    def _write_rows(self, connection: sa.Connection) -> None:
        written = connection.execute(
            sa.insert(subscriptions).returning(subscriptions.c.id, sort_by_parameter_order=True),
            [
                {
                    "user_id": row.user_id,
                    "status": row.status,
                    "started_at": row.started_at,
                    "ended_at": row.ended_at,
                    "plan_id": row.plan.id,
                    "created_at": row.started_at,
                    "updated_at": row.started_at,
                }
                for row in self.subscriptions
            ],
        ).scalars()
        for subscription, identity in zip(self.subscriptions, written, strict=True):
            subscription.id = identity
        paid = connection.execute(
            sa.insert(payments).returning(payments.c.id, sort_by_parameter_order=True),
            [
                {
                    "subscription_id": row.subscription.id if row.subscription else None,
                    "payment_provider_id": 1,
                    "payment_method": row.method,
                    "status": row.status,
                    "currency": row.currency,
                    "amount": Decimal(row.amount),
                    "external_payment_id": row.external_id,
                    "created_at": row.created_at,
                    "updated_at": row.created_at,
                }
                for row in self.rows
            ],
        ).scalars()
        for row, identity in zip(self.rows, paid, strict=True):
            row.id = identity

    def _write_attempts(self, connection: sa.Connection) -> None:
        """Earlier attempts, with the key and body that the job itself would have frozen."""
        numbers: dict[int, int] = {}
        for subscription, facts in self.attempts:
            numbers[subscription.id] = numbers.get(subscription.id, 0) + 1
            plan = subscription.plan
            amount = Decimal(plan.price(subscription.currency))
            attempt = plan_attempt(
                DueSubscription(
                    id=subscription.id,
                    user_id=subscription.user_id,
                    plan_id=plan.id,
                    started_at=subscription.started_at,
                    ended_at=subscription.ended_at,
                    plan_duration=plan.count,
                    plan_duration_unit=plan.unit,
                    method_id=subscription.method_id,
                    method_currency=subscription.currency,
                    method_provider_id=1,
                    prices=(amount,),
                ),
                number=numbers[subscription.id],
                user_id=subscription.user_id,
                plan_id=plan.id,
                method_id=subscription.method_id or "",
                money=Money(amount, subscription.currency),
                provider_id=1,
            )
            executed, captured_at = facts.pop("executed"), facts.pop("captured_at")
            if executed:
                metadata = {
                    "renewal_attempt_id": str(attempt.id),
                    "subscription_id": str(subscription.id),
                    "period_start": subscription.ended_at.isoformat(),
                    **self._metadata(subscription.user_id, plan),
                }
                self.there.append(
                    {
                        "id": facts["external_payment_id"],
                        "amount": f"{amount:.2f}",
                        "currency": subscription.currency,
                        "status": "succeeded",
                        "created_at": iso(facts["first_sent_at"]),
                        "captured_at": iso(captured_at or facts["first_sent_at"]),
                        "metadata": metadata,
                        "method_id": subscription.method_id,
                        "saved": True,
                    }
                )
                if facts["state"] == "UNKNOWN":
                    facts["external_payment_id"] = None
            connection.execute(
                sa.insert(renewal_attempts).values(
                    id=attempt.id,
                    subscription_id=subscription.id,
                    period_start=attempt.period_start,
                    number=attempt.number,
                    idempotence_key=attempt.idempotence_key,
                    body=attempt.body,
                    amount=amount,
                    currency=subscription.currency,
                    user_id=subscription.user_id,
                    plan_id=plan.id,
                    payment_provider_id=1,
                    payment_method_id=subscription.method_id,
                    **facts,
                )
            )
