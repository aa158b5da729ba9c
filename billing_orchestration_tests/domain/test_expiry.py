"""When a subscription or a payment is over, and what becomes of it."""

from __future__ import annotations

from datetime import datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing_orchestration.domain.decisions import Code
from billing_orchestration.domain.expiry import (
    ExpirePayment,
    KeepPending,
    NoAnswer,
    NotFoundThere,
    SettleLate,
    StalePayment,
    decide_payment_expiry,
    payments_over_before,
    subscriptions_over_before,
)
from billing_orchestration.domain.money import Money
from billing_orchestration.domain.provider_payment import (
    CANCELED,
    PENDING,
    STATUSES,
    WAITING_FOR_CAPTURE,
    UnusablePayment,
)
from billing_orchestration_tests.domain.given import (
    FIRST_MOMENT,
    IN_UTC,
    LAST_MOMENT,
    NOW,
    UTC,
    a_payment,
    at,
    calendar_of,
)

TTL_DAYS = 7
STALE = StalePayment(7, "pay-7", Money(Decimal("299.00"), "RUB"))


# --- expire_subscriptions_job


@pytest.mark.parametrize(
    ("ended_at", "over"),
    [
        ("2026-03-09T00:00:00", True),
        ("2026-03-09T23:59:59.999999", True),
        ("2026-03-10T00:00:00", False),
        ("2026-03-08T12:00:00", True),
        ("2026-03-12T02:59:00", False),
    ],
)
def test_a_subscription_is_over_when_the_billing_day_of_its_end_is_three_days_ago(ended_at: str, over: bool) -> None:
    assert (at(ended_at) < subscriptions_over_before(NOW, IN_UTC, grace_days=3)) is over


@settings(max_examples=100, deadline=None)
@given(
    zone=st.sampled_from(["UTC", "Europe/Moscow", "America/New_York", "Asia/Kolkata"]),
    as_of=st.datetimes(FIRST_MOMENT, LAST_MOMENT, timezones=st.just(UTC)),
    ago=st.timedeltas(timedelta(0), timedelta(days=8)),
    grace_days=st.integers(0, 7),
)
def test_the_grace_is_counted_in_billing_days_of_the_billing_time_zone(
    zone: str, as_of: datetime, ago: timedelta, grace_days: int
) -> None:
    billing = calendar_of(zone)
    ended_at = as_of - ago
    over = ended_at < subscriptions_over_before(as_of, billing, grace_days)
    assert over is (billing.day_of(ended_at) <= billing.day_of(as_of) - timedelta(days=grace_days))


# --- expire_payments_job


@pytest.mark.parametrize(("age", "over"), [(timedelta(days=7), False), (timedelta(days=7, microseconds=1), True)])
def test_a_payment_is_stale_when_it_was_created_more_than_seven_days_before(age: timedelta, over: bool) -> None:
    assert (NOW - age < payments_over_before(NOW, TTL_DAYS)) is over


def test_a_stale_payment_that_succeeded_there_is_settled() -> None:
    payment = a_payment()
    assert decide_payment_expiry(STALE, payment, TTL_DAYS, NOW) == SettleLate(STALE, payment)


def test_a_stale_payment_that_was_paid_this_very_minute_is_left_to_the_webhook_and_the_matching_jobs() -> None:
    decision = decide_payment_expiry(STALE, a_payment(captured_at=NOW - timedelta(seconds=59)), TTL_DAYS, NOW)
    assert isinstance(decision, KeepPending)
    assert (decision.code, decision.needs_retry, decision.quarantine) == ("left_to_webhook", False, None)
    payment = a_payment(captured_at=NOW - timedelta(seconds=60))
    assert decide_payment_expiry(STALE, payment, TTL_DAYS, NOW) == SettleLate(STALE, payment)


@pytest.mark.parametrize(
    ("answer", "word", "code"),
    [
        (a_payment(status=PENDING), "pending at the provider", Code.PENDING_AT_PROVIDER),
        (a_payment(status=CANCELED), "canceled at the provider", Code.CANCELED_AT_PROVIDER),
        (NotFoundThere(), "does not know it", Code.UNKNOWN_AT_PROVIDER),
        (None, "never got a payment", Code.NEVER_AT_PROVIDER),
    ],
)
def test_a_stale_payment_that_is_pending_canceled_or_not_found_there_expires(
    answer: object, word: str, code: str
) -> None:
    decision = decide_payment_expiry(STALE, answer, TTL_DAYS, NOW)  # type: ignore[arg-type]
    assert isinstance(decision, ExpirePayment)
    assert (decision.code, word in decision.reason) == (code, True)
    assert "7 days" in decision.reason


def test_a_stale_payment_whose_money_is_held_stays_pending_and_is_reported() -> None:
    decision = decide_payment_expiry(STALE, a_payment(status=WAITING_FOR_CAPTURE), TTL_DAYS, NOW)
    assert isinstance(decision, KeepPending)
    assert "held" in decision.reason
    assert (decision.needs_retry, decision.quarantine) == (False, None)


def test_a_stale_payment_about_which_the_provider_does_not_answer_stays_pending_and_makes_the_run_red() -> None:
    decision = decide_payment_expiry(STALE, NoAnswer("HTTP 502"), TTL_DAYS, NOW)
    assert isinstance(decision, KeepPending)
    assert decision.needs_retry
    assert "HTTP 502" in decision.reason


def test_a_stale_payment_whose_record_cannot_be_read_stays_pending_and_goes_to_a_person() -> None:
    odd = UnusablePayment("pay-1", "amount is missing", {"id": "pay-1"})
    decision = decide_payment_expiry(STALE, odd, TTL_DAYS, NOW)
    assert isinstance(decision, KeepPending)
    assert decision.quarantine == odd
    assert not decision.needs_retry


def test_every_status_of_the_provider_has_an_answer_and_only_unpaid_ones_expire() -> None:
    expired = {
        status
        for status in STATUSES
        if isinstance(decide_payment_expiry(STALE, a_payment(status=status), TTL_DAYS, NOW), ExpirePayment)
    }
    assert expired == {PENDING, CANCELED}


def test_what_is_kept_pending_is_no_change() -> None:
    answers = [a_payment(), None, NoAnswer("silence"), a_payment(status=WAITING_FOR_CAPTURE), NotFoundThere()]
    decisions = [decide_payment_expiry(STALE, answer, TTL_DAYS, NOW) for answer in answers]
    assert sum(isinstance(decision, (SettleLate, ExpirePayment)) for decision in decisions) == 3
