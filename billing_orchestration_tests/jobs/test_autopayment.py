"""autopayment_job, whole: who is charged, what a success writes, what a decline means, and what never happens twice."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone

import pytest

from billing_orchestration_tests.books import NOON
from billing_orchestration_tests.jobs.service import Service

UTC = timezone.utc
JOB = "autopayment_job"


def test_a_due_subscription_is_charged_and_extended_by_a_month_from_its_old_end(service: Service) -> None:
    subscription = service.subscriber(ended_at=NOON - timedelta(hours=3))

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.ended_at(subscription) == datetime(2026, 4, 12, 9, 0, tzinfo=UTC)
    [charge] = service.charges()
    assert (charge.amount, charge.currency, charge.payment_method_id) == (299, "RUB", f"method-{subscription}")
    [renewal] = service.rows("payments", "external_payment_id = :id", id=charge.payment_id)
    assert (renewal.status, renewal.subscription_id, renewal.amount, renewal.currency, renewal.payment_method) == (
        "SUCCEEDED", subscription, 299, "RUB", "BANK_CARD",
    )  # fmt: skip
    [attempt] = service.attempts(subscription)
    assert (attempt.state, attempt.external_payment_id) == ("SUCCEEDED", charge.payment_id)
    service.check_books()


def test_a_second_run_changes_nothing(service: Service) -> None:
    for _ in range(3):
        service.subscriber()
    service.run(JOB)
    before = service.snapshot()

    assert service.run(JOB).ok

    assert service.snapshot() == before
    assert len(service.charges()) == 3


def test_a_subscription_that_ends_later_today_is_due(service: Service) -> None:
    today = service.subscriber(ended_at=NOON.replace(hour=23, minute=59))
    tomorrow = service.subscriber(ended_at=NOON + timedelta(days=1))

    service.run(JOB)

    assert [charge.metadata["subscription_id"] for charge in service.charges()] == [str(today)]
    assert service.attempts(tomorrow) == []


def test_the_billing_day_is_that_of_the_billing_time_zone(service_with: Callable[..., Service]) -> None:
    service = service_with(billing_timezone="Asia/Kolkata")
    # 19:00 UTC is half past midnight of the next day in Kolkata, 18:00 UTC is still half past eleven tonight.
    tomorrow = service.subscriber(ended_at=NOON.replace(hour=19))
    today = service.subscriber(ended_at=NOON.replace(hour=18))

    service.run(JOB)

    assert {charge.metadata["subscription_id"] for charge in service.charges()} == {str(today)}
    assert service.attempts(tomorrow) == []


def test_only_an_active_subscription_is_charged(service: Service) -> None:
    for status in ("CREATED", "EXPIRED", "CANCELED", "PAUSED", "DELETED", None):
        service.subscriber(status=status)

    assert service.run(JOB).ok

    assert service.charges() == []


def test_a_plan_that_is_not_recurring_is_not_charged(service: Service) -> None:
    service.subscriber(service.plan(recurring=False))
    service.subscriber(service.plan(recurring=None))

    run = service.run(JOB)

    assert service.charges() == []
    assert run.number("fetch_due_subscriptions", "not charged: the plan is not recurring") == 2


def test_each_refusal_is_reported_with_its_reason(service: Service) -> None:
    no_method = service.subscription(ended_at=NOON)
    no_price = service.subscriber(service.plan(price=None))
    two_prices_plan = service.plan()
    service.price(two_prices_plan, "399.00")
    two_prices = service.subscriber(two_prices_plan)
    no_period = service.subscriber(service.plan(duration=None))
    dollars = service.subscriber(service.plan(currency="USD"))

    run = service.run(JOB)

    assert run.ok
    assert service.charges() == []
    told = {row["subject"]: (row["action"], row["reason"]) for row in run.decisions}
    assert told == {
        f"subscription {no_method}": ("leave", "no saved payment method"),
        f"subscription {no_price}": ("leave", "no price in RUB"),
        f"subscription {two_prices}": ("leave", "several prices in RUB"),
        f"subscription {no_period}": ("leave", "the plan has no duration or no duration unit"),
        f"subscription {dollars}": ("leave", "no price in RUB"),
    }


def test_one_overdue_by_more_than_max_overdue_days_is_reported_and_not_charged(service: Service) -> None:
    thirty = service.subscriber(ended_at=NOON - timedelta(days=30))
    older = service.subscriber(ended_at=NOON - timedelta(days=31))

    run = service.run(JOB)

    assert [charge.metadata["subscription_id"] for charge in service.charges()] == [str(thirty)]
    assert run.number("fetch_due_subscriptions", "not charged: overdue by more than 30 days") == 1
    assert run.reasons(f"subscription {older}") == [
        "leave: ended 2026-02-09 12:00:00 UTC: overdue by more than max_overdue_days (30)"
    ]


def test_max_overdue_days_is_the_jobs_own_config(service: Service) -> None:
    service.subscriber(ended_at=NOON - timedelta(days=6))

    run = service.run(JOB, ops={"fetch_due_subscriptions": {"max_overdue_days": 5}})

    assert service.charges() == []
    assert run.number("fetch_due_subscriptions", "not charged: overdue by more than 5 days") == 1


def test_the_method_is_that_of_the_latest_payment_which_is_not_a_renewal_of_ours(service: Service) -> None:
    subscription = service.subscriber(service.plan(unit="days", duration=1))
    service.provider.add_method("newer-card")
    service.payment("newer-card", subscription_id=subscription, status="SUCCEEDED", created_at=NOON - timedelta(days=2))
    service.payment(
        "failed-later", subscription_id=subscription, status="CANCELED", created_at=NOON - timedelta(days=1)
    )
    service.run(JOB)
    service.advance(days=1)

    service.run(JOB)

    # The second renewal must not use the first renewal's payment id, the latest SUCCEEDED one by now.
    assert [charge.payment_method_id for charge in service.charges()] == ["newer-card", "newer-card"]
    service.check_books()


def test_the_method_that_our_own_records_hold_comes_first(service: Service) -> None:
    plan = service.plan(unit="days", duration=2)
    service.provider.add_method("kept-apart")
    service.paid_there(
        "purchase",
        user="anna",
        plan_id=plan,
        method_id="kept-apart",
        saved=True,
        created_at=NOON - timedelta(minutes=5),
    )
    service.run("matching_successful_payments_job")
    service.advance(days=2)

    assert service.run(JOB).ok

    assert [charge.payment_method_id for charge in service.charges()] == ["kept-apart"]


def test_the_price_is_the_plans_in_the_currency_of_the_payment_that_saved_the_method(service: Service) -> None:
    plan = service.plan("299.00", currency="RUB")
    service.price(plan, "4.99", "EUR")
    subscription = service.subscription(plan_id=plan, ended_at=NOON)
    service.provider.add_method("euro-card")
    service.payment("euro-card", subscription_id=subscription, status="SUCCEEDED", amount="3.99", currency="EUR")

    service.run(JOB)

    [charge] = service.charges()
    assert (str(charge.amount), charge.currency) == ("4.99", "EUR")
    [renewal] = service.rows("payments", "external_payment_id = :id", id=charge.payment_id)
    assert (str(renewal.amount), renewal.currency) == ("4.99", "EUR")


def test_the_anchor_day_survives_a_short_month(service: Service) -> None:
    service.set_time(datetime(2026, 2, 28, 8, 0, tzinfo=UTC))
    subscription = service.subscriber(
        started_at=datetime(2026, 1, 31, 10, 30, tzinfo=UTC), ended_at=datetime(2026, 2, 28, 10, 30, tzinfo=UTC)
    )

    service.run(JOB)

    assert service.ended_at(subscription) == datetime(2026, 3, 31, 10, 30, tzinfo=UTC)


def test_an_overdue_subscription_is_extended_from_its_old_end_not_from_today(service: Service) -> None:
    subscription = service.subscriber(ended_at=NOON - timedelta(days=10))

    service.run(JOB)

    assert service.ended_at(subscription) == datetime(2026, 4, 2, 12, 0, tzinfo=UTC)


def test_one_that_is_still_over_after_its_renewal_is_not_charged_again_today(service: Service) -> None:
    subscription = service.subscriber(service.plan(unit="days", duration=1), ended_at=NOON - timedelta(days=3))
    service.run(JOB)

    again = service.run(JOB)

    assert len(service.charges()) == 1
    assert again.reasons(f"subscription {subscription}") == ["leave: already attempted today"]


def test_a_hard_decline_stops_further_charges_for_the_period(service: Service) -> None:
    subscription = service.subscriber(script=["canceled:card_expired", "succeeded"])
    service.run(JOB)
    service.advance(days=1)

    run = service.run(JOB)

    assert [attempt.state for attempt in service.attempts(subscription)] == ["STOPPED"]
    assert service.charges() == []
    assert run.reasons(f"subscription {subscription}") == ["leave: stopped by a hard decline (card_expired)"]


def test_a_soft_decline_is_tried_again_on_a_later_day_with_a_new_key(service: Service) -> None:
    subscription = service.subscriber(script=["canceled:insufficient_funds", "succeeded"])
    service.run(JOB)
    same_day = service.run(JOB)
    service.advance(days=1)

    service.run(JOB)

    assert same_day.reasons(f"subscription {subscription}") == ["leave: already attempted today"]
    first, second = service.attempts(subscription)
    assert (first.state, first.decline_class, second.state) == ("DECLINED", "soft", "SUCCEEDED")
    assert first.idempotence_key != second.idempotence_key
    assert len(service.charges()) == 1
    assert service.ended_at(subscription) == datetime(2026, 4, 12, 12, 0, tzinfo=UTC)


def test_a_soft_decline_is_not_tried_again_when_the_grace_is_over(service: Service) -> None:
    subscription = service.subscriber(script="canceled:insufficient_funds")
    tries = []
    for _ in range(6):
        service.run(JOB)
        tries.append(len(service.attempts(subscription)))
        service.advance(days=1)

    # The day it ended, and each of the three days of grace.
    assert tries == [1, 2, 3, 4, 4, 4]


def test_a_decline_without_a_usable_reason_is_tried_three_times(service: Service) -> None:
    subscription = service.subscriber(script="canceled:a_word_nobody_knows")
    for _ in range(5):
        service.run(JOB)
        service.advance(days=1)

    attempts = service.attempts(subscription)
    assert [attempt.state for attempt in attempts] == ["DECLINED"] * 3
    assert attempts[0].decline_reason == "a_word_nobody_knows"


def test_a_backfill_of_three_days_is_not_three_tries_on_one_card(service: Service) -> None:
    subscription = service.subscriber(script="canceled:insufficient_funds", ended_at=NOON - timedelta(days=3))
    days = ["2026-03-09", "2026-03-10", "2026-03-11"]

    runs = [service.run(JOB, partition=day) for day in days]

    assert [run.ok for run in runs] == [True, True, True]
    assert len(service.attempts(subscription)) == 1
    assert runs[2].reasons(f"subscription {subscription}") == ["leave: already attempted today"]


def test_a_backfill_stands_for_its_own_day(service: Service) -> None:
    early = service.subscriber(ended_at=NOON - timedelta(days=3))
    late = service.subscriber(ended_at=NOON - timedelta(days=2))

    service.run(JOB, partition="2026-03-09")

    assert len(service.attempts(early)) == 1
    assert service.attempts(late) == []


def day_key(days_ago: int) -> str:
    return f"{NOON - timedelta(days=days_ago):%Y-%m-%d}"


def test_a_backfill_of_old_days_charges_nobody_for_periods_that_are_over(service: Service) -> None:
    # Today's own run charges none of them, and the same morning's expiry ends them.
    old = [service.subscriber(ended_at=NOON - timedelta(days=days)) for days in (40, 41, 42, 43)]

    runs = [service.run(JOB, partition=day_key(days)) for days in (43, 42, 41, 40)]

    assert all(run.ok for run in runs)
    assert service.charges() == []
    assert runs[3].number("fetch_due_subscriptions", "not charged: overdue by more than 30 days") == 4
    assert runs[0].reasons(f"subscription {old[3]}") == [
        "leave: ended 2026-01-28 12:00:00 UTC: overdue by more than max_overdue_days (30)"
    ]


def test_a_backfill_of_nine_weeks_on_three_days_charges_no_customer_twice(service: Service) -> None:
    for days in (66, 45, 36, 31):
        service.subscriber(ended_at=NOON - timedelta(days=days))
    weekly = service.plan(unit="days", duration=7)
    over = service.subscriber(weekly, ended_at=NOON - timedelta(days=24))
    late = service.subscriber(ended_at=NOON - timedelta(days=20))
    days = [day_key(days) for days in (66, 60, 45, 36, 31, 20, 10, 2, 0)]

    for _ in range(3):
        for day in days:
            assert service.run(JOB, partition=day).ok
        service.advance(days=1)

    assert service.charged() == {late: 1}
    assert service.attempts(over) == []
    service.check_books()


def test_a_decline_whose_grace_is_over_is_not_tried_again_through_its_old_day(service: Service) -> None:
    subscription = service.subscriber(script="canceled:insufficient_funds", ended_at=NOON)
    service.run(JOB)
    service.advance(days=20)

    run = service.run(JOB, partition="2026-03-13")

    assert len(service.attempts(subscription)) == 1
    assert run.reasons(f"subscription {subscription}") == [
        "leave: declined (insufficient_funds) and the grace of 3 days is over"
    ]


def test_an_end_that_is_moved_back_into_a_settled_period_brings_no_second_charge(service: Service) -> None:
    subscription = service.subscriber()
    service.run(JOB)
    service.execute("UPDATE subscriptions SET ended_at = ended_at - interval '30 days'")
    service.advance(days=1)

    run = service.run(JOB)

    assert service.charged() == {subscription: 1}
    assert run.reasons(f"subscription {subscription}") == [
        "leave: its end lies within a period that was paid and settled, until 2026-04-12: it was moved back"
    ]


def test_of_two_active_subscriptions_of_one_user_and_plan_only_the_last_is_charged_and_a_person_is_told_once(
    service: Service,
) -> None:
    first, last = (service.subscriber(user="anna", ended_at=NOON - timedelta(days=days)) for days in (2, 0))

    runs = [service.run(JOB) for _ in range(2)]

    assert service.charged() == {last: 1}
    assert [run.ok for run in runs] == [True, True]
    assert [run.report["quarantined"] for run in runs] == [1, 1]
    [entry] = service.rows("quarantine")
    assert (entry.kind, entry.subscription_id, entry.external_payment_id) == ("two_active", first, None)
    assert f"subscription {last}" in entry.reason


def test_a_pending_charge_is_asked_about_and_never_sent_again(service: Service) -> None:
    subscription = service.subscriber(script="pending")
    service.run(JOB)
    [attempt] = service.attempts(subscription)
    assert (attempt.state, len(service.charges())) == ("PENDING", 0)
    service.advance(days=1)
    before = service.sandbox.count("create")
    again = service.run(JOB)

    assert service.sandbox.count("create") == before
    assert again.reasons(f"subscription {subscription}, attempt 1") == [
        "leave: an open attempt is still pending at the provider"
    ]
    service.provider.pay(attempt.external_payment_id)
    service.run(JOB)

    assert [attempt.state for attempt in service.attempts(subscription)] == ["SUCCEEDED"]
    assert service.ended_at(subscription) == datetime(2026, 4, 12, 12, 0, tzinfo=UTC)
    service.check_books()


def test_a_pending_charge_that_succeeds_is_closed_by_a_matching_job_within_minutes(service: Service) -> None:
    subscription = service.subscriber(script="pending")
    service.run(JOB)
    [attempt] = service.attempts(subscription)
    service.advance(minutes=5)
    service.provider.pay(attempt.external_payment_id)
    service.advance(minutes=1)

    run = service.run("matching_successful_payments_job")

    assert run.ok, run.failure
    [attempt] = service.attempts(subscription)
    assert attempt.state == "SUCCEEDED"
    assert len(service.rows("subscriptions")) == 1
    assert service.ended_at(subscription) == datetime(2026, 4, 12, 12, 0, tzinfo=UTC)
    service.check_books()


def test_a_dry_run_shows_every_decision_and_sends_and_writes_nothing(service: Service) -> None:
    subscription = service.subscriber()
    before = service.snapshot()

    run = service.run(JOB, dry_run=True)

    assert run.ok
    assert service.snapshot() == before
    assert service.sandbox.count("create") == 0
    assert run.reasons(f"subscription {subscription}") == ["charge: ends today"]


def test_the_charge_names_its_attempt_subscription_period_user_plan_and_provider(service: Service) -> None:
    plan = service.plan()
    subscription = service.subscriber(plan, user="anna")

    service.run(JOB)

    [attempt] = service.attempts(subscription)
    [charge] = service.charges()
    assert charge.metadata == {
        "renewal_attempt_id": str(attempt.id),
        "subscription_id": str(subscription),
        "period_start": "2026-03-12T12:00:00+00:00",
        "user_id": "anna",
        "plan_id": str(plan),
        "payment_provider_id": str(service.provider_id),
    }
    [sent] = [request for request in service.sandbox.requests if request.method == "POST"]
    assert sent.json()["capture"] is True
    assert "confirmation" not in sent.json()
    assert sent.body.decode() == attempt.body
    assert sent.idempotence_key == str(attempt.idempotence_key)


def test_every_change_is_in_the_audit_trail_with_run_old_and_new_value_and_reason(service: Service) -> None:
    subscription = service.subscriber()

    run = service.run(JOB)

    trail = {(row.entity, row.action): row for row in service.rows("audit_trail")}
    assert set(trail) == {("subscription", "renewed"), ("payment", "created"), ("attempt", "succeeded")}
    assert {row.run_id for row in trail.values()} == {run.run_id}
    renewed = trail["subscription", "renewed"]
    assert renewed.entity_id == str(subscription)
    assert (renewed.old["ended_at"], renewed.new["ended_at"]) == (
        "2026-03-12T12:00:00+00:00",
        "2026-04-12T12:00:00+00:00",
    )
    assert "renewal paid" in renewed.reason


def test_numbers_of_the_day_are_plotted(service: Service) -> None:
    service.subscriber()
    service.subscriber(script="canceled:insufficient_funds")

    run = service.run(JOB)

    numbers = run.materialized["autopayment"]
    assert (numbers["charged"], numbers["declined"], numbers["declines: soft"], numbers["charged, RUB"]) == (
        1, 1, 1, 299.0,
    )  # fmt: skip


def test_a_requests_per_second_cap_is_the_jobs_own_config(service: Service) -> None:
    for _ in range(3):
        service.subscriber()

    run = service.run(JOB, ops={"charge_renewals": {"max_requests_per_second": 50.0, "max_concurrency": 2}})

    assert run.ok, run.failure
    assert len(service.charges()) == 3
    assert service.sandbox.peak_in_flight <= 2


@pytest.mark.parametrize("max_concurrency", [1, 8])
def test_a_card_of_two_subscriptions_that_is_declined_for_one_is_not_tried_for_the_other(
    service: Service, max_concurrency: int
) -> None:
    service.tolerate_duplicates()
    first = service.subscriber(script="canceled:insufficient_funds", method="one-card")
    second = service.subscription(ended_at=service.now)
    service.payment("one-card", subscription_id=second, status="SUCCEEDED")

    run = service.run(JOB, ops={"charge_renewals": {"max_concurrency": max_concurrency}})

    assert run.ok, run.failure
    assert service.sandbox.count("create") == 1
    assert len(service.attempts(first)) == 1
    assert service.attempts(second) == []
    assert run.reasons(f"subscription {second}") == [
        "skipped: this payment method was declined a moment ago; tried again on another day"
    ]


def test_a_card_pays_for_two_subscriptions_in_one_run(service: Service) -> None:
    service.tolerate_duplicates()
    first = service.subscriber(method="one-card")
    second = service.subscription(ended_at=service.now)
    service.payment("one-card", subscription_id=second, status="SUCCEEDED")

    run = service.run(JOB)

    assert run.ok, run.failure
    assert [attempt.state for one in (first, second) for attempt in service.attempts(one)] == ["SUCCEEDED"] * 2
    service.check_books()
