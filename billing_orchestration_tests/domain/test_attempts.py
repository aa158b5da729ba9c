"""An attempt: its identity, its frozen body, and how long its key may be used."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime, timedelta, timezone
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing_orchestration.domain.attempts import (
    ALL_STATES,
    KEY_LIFETIME,
    State,
    is_past_key_lifetime,
)
from billing_orchestration.domain.money import LARGEST_AMOUNT, Money
from billing_orchestration.domain.renewals import plan_attempt
from billing_orchestration_tests.domain.given import (
    HOUR,
    NOW,
    PRICE,
    RULES,
    UTC,
    a_due_subscription,
    a_sent_attempt,
    an_attempt,
)

SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)


# --- Identity, key and body


def test_the_key_of_an_attempt_is_the_same_for_ever() -> None:
    # Written down, not computed: another namespace or another spelling of the identity would be a second charge for
    # every attempt that was under way during an upgrade.
    attempt = an_attempt()
    assert str(attempt.id) == "0405b9fa-d837-5936-ad29-298da96e1a13"
    assert str(attempt.idempotence_key) == "13736a8d-eb64-5da4-a27a-a389edd2f232"


def test_the_identity_depends_on_subscription_period_start_and_number() -> None:
    due = a_due_subscription()
    others = [
        an_attempt(due),
        an_attempt(due, number=2),
        an_attempt(dataclasses.replace(due, id=13)),
        an_attempt(dataclasses.replace(due, ended_at=due.ended_at + timedelta(microseconds=1))),
        # No two identities may read alike when they are joined: 1 and 23, 12 and 3.
        an_attempt(dataclasses.replace(due, id=1), number=23),
        an_attempt(dataclasses.replace(due, id=12), number=3),
    ]
    assert len({attempt.id for attempt in others}) == len(others)
    assert len({attempt.idempotence_key for attempt in others}) == len(others)
    assert not {attempt.id for attempt in others} & {attempt.idempotence_key for attempt in others}


@settings(max_examples=50, deadline=None)
@given(
    user_id=st.text(min_size=1, max_size=20),
    plan_id=st.integers(1, 10**6),
    method_id=st.text(min_size=1, max_size=36),
    amount=st.decimals(Decimal("0.01"), LARGEST_AMOUNT, places=2),
    currency=st.sampled_from(["RUB", "USD", "EUR"]),
    provider_id=st.integers(1, 100),
)
def test_the_identity_depends_on_nothing_else(
    user_id: str, plan_id: int, method_id: str, amount: Decimal, currency: str, provider_id: int
) -> None:
    attempt = plan_attempt(
        a_due_subscription(prices=(), method_id=None, plan_duration=None),
        number=1,
        user_id=user_id,
        plan_id=plan_id,
        method_id=method_id,
        money=Money(amount, currency),
        provider_id=provider_id,
        rules=RULES,
    )
    assert (attempt.id, attempt.idempotence_key) == (an_attempt().id, an_attempt().idempotence_key)


def test_the_offset_that_an_end_is_written_with_changes_neither_key_nor_body() -> None:
    due = a_due_subscription(ended_at=datetime(2026, 3, 12, 22, 30, tzinfo=UTC))
    elsewhere = dataclasses.replace(due, ended_at=due.ended_at.astimezone(timezone(timedelta(hours=9))))
    assert an_attempt(elsewhere) == an_attempt(due)


def test_the_body_is_exactly_what_a_recurring_charge_needs() -> None:
    attempt = an_attempt()
    assert json.loads(attempt.body) == {
        "amount": {"value": "299.00", "currency": "RUB"},
        "capture": True,
        "payment_method_id": "card-of-ada",
        "description": "Subscription 12: renewal from 2026-03-12",
        "metadata": {
            "renewal_attempt_id": str(attempt.id),
            "subscription_id": "12",
            "period_start": "2026-03-12T09:00:00+00:00",
            "user_id": "ada",
            "plan_id": "3",
            "payment_provider_id": "1",
        },
    }


def test_a_new_attempt_is_planned_and_certainly_unsent() -> None:
    attempt = an_attempt()
    assert (attempt.state, attempt.first_sent_at, attempt.may_have_been_sent) == (State.PLANNED, None, False)
    assert (attempt.money, attempt.period_start) == (PRICE, a_due_subscription().ended_at)


@settings(max_examples=100, deadline=None)
@given(
    subscription_id=st.integers(1, 2**31 - 1),
    number=st.integers(1, 99),
    user_id=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=512),
    amount=st.decimals(Decimal("0.01"), LARGEST_AMOUNT, places=2),
    ended_at=st.datetimes(timezones=st.just(UTC)),
)
def test_every_body_keeps_the_providers_limits(
    subscription_id: int, number: int, user_id: str, amount: Decimal, ended_at: datetime
) -> None:
    due = a_due_subscription(id=subscription_id, ended_at=ended_at)
    attempt = plan_attempt(
        due,
        number=number,
        user_id=user_id,
        plan_id=2**31 - 1,
        method_id="m" * 36,
        money=Money(amount, "RUB"),
        provider_id=2**31 - 1,
        rules=RULES,
    )
    body = json.loads(attempt.body)
    assert len(body["description"]) <= 128
    assert len(body["metadata"]) <= 16
    assert all(
        len(key) <= 32 and isinstance(value, str) and len(value) <= 512 for key, value in body["metadata"].items()
    )
    assert body["metadata"]["user_id"] == user_id
    assert Decimal(body["amount"]["value"]) == amount
    assert body["amount"]["value"] == f"{amount:.2f}"
    assert 1 <= len(str(attempt.idempotence_key)) <= 64
    assert "confirmation" not in body


def test_every_state_is_open_taken_or_closed_and_only_one_of_these() -> None:
    assert len(set(ALL_STATES)) == len(ALL_STATES)


# --- A key's lifetime


@pytest.mark.parametrize(
    ("age", "past"), [(timedelta(0), False), (23 * HOUR - SECOND, False), (23 * HOUR, True), (24 * HOUR, True)]
)
def test_a_key_is_used_for_less_than_23_hours_after_the_first_send(age: timedelta, past: bool) -> None:
    assert KEY_LIFETIME == 23 * HOUR
    # However lately it was sent again: the provider counts from the first request.
    attempt = a_sent_attempt(ago=age, last_sent_at=NOW)
    assert is_past_key_lifetime(attempt, NOW) is past
    assert not is_past_key_lifetime(an_attempt(), NOW)


@pytest.mark.parametrize(
    ("first", "last", "absent", "past"),
    [
        (2 * MINUTE, 2 * MINUTE, None, False),
        (2 * MINUTE + SECOND, 2 * MINUTE + SECOND, None, True),
        (-HOUR, HOUR, None, True),
        (30 * HOUR, None, None, True),
        # It looks fresh by now, and was in the future when it was first searched for.
        (-HOUR, -HOUR, -2 * HOUR, True),
    ],
)
def test_a_key_that_a_wrong_clock_has_sent_counts_as_too_old(
    first: timedelta, last: timedelta | None, absent: timedelta | None, past: bool
) -> None:
    attempt = a_sent_attempt(
        first_sent_at=NOW + first,
        last_sent_at=None if last is None else NOW + last,
        first_absent_at=None if absent is None else NOW + absent,
    )
    assert is_past_key_lifetime(attempt, NOW) is past
