"""matching_successful_payments_job, whole: what is paid there and missing here is created, and only once."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
import sqlalchemy as sa

from billing_orchestration.domain.provider_payment import ATTEMPT_KEY
from billing_orchestration_tests.books import NOON, stored
from billing_orchestration_tests.jobs.service import Service
from billing_orchestration_tests.waiting import wait_for_a_blocked_session

UTC = timezone.utc
JOB = "matching_successful_payments_job"


# --- No row at all


def test_a_payment_without_any_row_gets_its_payment_and_its_subscription(service: Service) -> None:
    plan = service.plan()
    at = NOON - timedelta(minutes=20, seconds=1)
    service.paid_there("orphan", user="anna", plan_id=plan, amount="299.00", method_type="yoo_money", created_at=at)

    run = service.run(JOB)

    assert run.ok, run.failure
    [subscription] = service.rows("subscriptions")
    assert (subscription.user_id, subscription.plan_id, subscription.status) == ("anna", plan, "ACTIVE")
    assert (subscription.started_at, subscription.ended_at) == (stored(2026, 3, 12, 12, 0), stored(2026, 4, 12, 12, 0))
    [row] = service.rows("payments")
    assert (row.status, row.external_payment_id, row.subscription_id) == ("SUCCEEDED", "orphan", subscription.id)
    assert (row.amount, row.currency, row.payment_method) == (299, "RUB", "YOO_MONEY")
    assert row.payment_provider_id == service.provider_id
    # A created row takes the provider's instant of creation; that we wrote it now is in updated_at.
    assert (row.created_at, row.updated_at) == (stored(2026, 3, 12, 11, 39, 59), stored(2026, 3, 12, 12, 0))
    assert service.settled("orphan") == ["created"]
    assert service.charges() == []
    service.check_books()


def test_a_payment_without_any_row_extends_the_users_active_subscription_on_that_plan(service: Service) -> None:
    plan = service.plan()
    subscription = service.subscription(
        "anna",
        plan_id=plan,
        started_at=datetime(2025, 12, 31, 8, 0, tzinfo=UTC),
        ended_at=datetime(2026, 2, 28, 8, 0, tzinfo=UTC),
    )
    service.paid_there("orphan", user="anna", plan_id=plan)

    assert service.run(JOB).ok

    # From its old end, although that is past: as a renewal would, back on the anchor day.
    assert service.ended_at(subscription) == datetime(2026, 3, 31, 8, 0, tzinfo=UTC)
    assert len(service.rows("subscriptions")) == 1
    assert service.settled("orphan") == ["extended"]


def test_a_purchase_that_saved_its_method_is_renewed_with_that_method(service: Service) -> None:
    plan = service.plan("299.00")
    service.paid_there("orphan", user="anna", plan_id=plan, method_id="her card", saved=True)
    assert service.run(JOB).ok
    [subscription] = service.rows("subscriptions")
    service.set_time(subscription.ended_at.replace(tzinfo=UTC))

    assert service.run("autopayment_job").ok

    [charge] = service.charges()
    assert charge.payment_method_id == "her card"
    service.check_books()


def test_one_refunded_after_it_was_granted_stays_as_it_is(service: Service) -> None:
    service.paid_there("orphan", plan_id=service.plan())
    service.run(JOB)
    service.provider.refund("orphan")
    before = service.snapshot()

    assert service.run(JOB).ok

    assert service.snapshot() == before


def test_a_charge_of_another_installation_creates_nothing_and_goes_to_a_person(service: Service) -> None:
    plan = service.plan()
    metadata = {"user_id": "anna", "plan_id": str(plan), "payment_provider_id": str(service.provider_id)}
    service.paid_there("foreign", metadata={**metadata, ATTEMPT_KEY: "7c8a7b52-53a9-5d5c-9a0c-0f3f58e3f4a1"})

    assert service.run(JOB).ok

    assert service.quarantined("foreign") == ["unknown_attempt"]
    assert service.rows("payments") == []


# --- A row in any status, of any age


def test_a_row_that_is_created_pending_or_expired_is_settled_itself(service: Service) -> None:
    plan = service.plan()
    rows = {}
    for state in ("CREATED", "PENDING", "EXPIRED"):
        service.paid_there(state, user=state, plan_id=plan)
        rows[state] = service.payment(state, status=state, created_at=NOON - timedelta(minutes=20))

    assert service.run(JOB).ok

    assert [row.id for row in service.rows("payments")] == sorted(rows.values())
    users = {row.id: row.user_id for row in service.rows("subscriptions")}
    for state, payment in rows.items():
        row = service.row("payments", payment)
        assert (row.status, users[row.subscription_id]) == ("SUCCEEDED", state)
        assert service.settled(state) == ["created"]
    service.check_books()


def test_a_late_success_revives_an_expired_payment(service: Service) -> None:
    plan = service.plan()
    purchase = service.provider.purchase(
        "299.00",
        method_type="cash",
        metadata={"user_id": "anna", "plan_id": str(plan), "payment_provider_id": str(service.provider_id)},
    )
    payment = service.payment(purchase.id, created_at=service.now)
    service.advance(days=8)
    assert service.run("expire_payments_job").ok
    assert service.status("payments", payment) == "EXPIRED"
    service.advance(days=1)
    service.provider.pay(purchase.id)
    service.advance(minutes=1)

    assert service.run(JOB).ok

    assert service.status("payments", payment) == "SUCCEEDED"
    assert len(service.rows("subscriptions")) == 1
    service.check_books()


def test_a_row_that_is_succeeded_or_refunded_is_left(service: Service) -> None:
    plan = service.plan()
    subscription = service.subscription("anna", plan_id=plan, ended_at=NOON + timedelta(days=30))
    for state in ("SUCCEEDED", "REFUNDED"):
        service.paid_there(state, user="anna", plan_id=plan)
        service.payment(state, subscription_id=subscription, status=state)
    before = service.snapshot()

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.snapshot() == before
    assert run.number("diff_successful_payments", "both sides agree") == 2


def test_a_row_that_is_canceled_goes_to_a_person(service: Service) -> None:
    service.paid_there("paid", plan_id=service.plan())
    payment = service.payment("paid", status="CANCELED")

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.status("payments", payment) == "CANCELED"
    assert service.quarantined("paid") == ["canceled_here"]
    assert service.rows("subscriptions") == []
    assert service.run(JOB).report["newly quarantined"] == 0


def test_rows_are_looked_up_by_id_so_that_no_orphan_is_invented_at_the_edge_of_the_window(service: Service) -> None:
    plan = service.plan()
    subscription = service.subscription("anna", plan_id=plan, ended_at=NOON + timedelta(days=30))
    ages = {
        "at the start": timedelta(hours=1),
        "just before the start": timedelta(hours=1, milliseconds=1),
        "a week ago": timedelta(days=7),
        "two years ago": timedelta(days=730),
        "in the future": -timedelta(days=1),
    }
    for name, age in ages.items():
        service.paid_there(name, user="anna", plan_id=plan, created_at=NOON - timedelta(hours=1))
        service.payment(name, subscription_id=subscription, status="SUCCEEDED", created_at=NOON - age)
    before = service.snapshot()

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.snapshot() == before


def test_a_success_whose_webhook_died_before_the_grant_is_granted_and_linked(service: Service) -> None:
    plan = service.plan()
    subscription = service.subscription("boris", plan_id=plan, ended_at=NOON + timedelta(days=3))
    for user in ("anna", "boris"):
        service.paid_there(f"of {user}", user=user, plan_id=plan)
        service.payment(f"of {user}", status="SUCCEEDED")
    service.paid_there("of vera", user="vera", plan_id=plan, amount="1.00")
    service.payment("of vera", status="SUCCEEDED")

    run = service.tick(JOB)

    assert run.ok, run.failure
    assert [service.settled(f"of {user}") for user in ("anna", "boris", "vera")] == [["created"], ["extended"], []]
    assert service.ended_at(subscription) == datetime(2026, 4, 15, 12, 0, tzinfo=UTC)
    [created] = service.rows("subscriptions", "user_id = 'anna'")
    linked = {row.external_payment_id: row.subscription_id for row in service.rows("payments")}
    assert linked == {"of anna": created.id, "of boris": subscription, "of vera": None}
    assert service.quarantined("of vera") == ["amount_differs"]
    after = service.snapshot()
    assert service.tick(JOB).ok
    assert service.snapshot() == after


def test_a_rouble_without_a_row_buys_no_plan_until_a_person_accepts_it(service: Service) -> None:
    service.paid_there("cheap", plan_id=service.plan("2990.00"), amount="1.00")

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.rows("subscriptions") == []
    assert service.quarantined("cheap") == ["amount_differs"]


def test_of_several_rows_with_one_id_a_settled_one_speaks_for_all(service: Service) -> None:
    service.tolerate_duplicates()
    plan = service.plan()
    subscription = service.subscription("anna", plan_id=plan, ended_at=NOON + timedelta(days=30))
    service.paid_there("twice", user="anna", plan_id=plan)
    twin = service.payment("twice")
    service.payment("twice", subscription_id=subscription, status="SUCCEEDED")
    before = service.snapshot()

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.snapshot() == before
    assert "duplicate" in run.reasons(f"payment {twin}")[0]


# --- Our own renewals


def with_a_lost_answer(service: Service) -> int:
    """A subscription whose renewal was charged, and nobody here knows it."""
    subscription = service.subscriber(ended_at=service.now - timedelta(hours=1), user="anna")
    service.sandbox.misbehave("create", "cut_after", times=None)
    assert not service.run("autopayment_job").ok
    service.sandbox.behave()
    assert [attempt.state for attempt in service.attempts(subscription)] == ["UNKNOWN"]
    assert len(service.charges()) == 1
    service.advance(minutes=2)
    return subscription


def test_a_success_of_our_own_renewal_closes_its_attempt_and_extends_that_subscription(service: Service) -> None:
    subscription = with_a_lost_answer(service)
    # Another one of the same user on the same plan, which lasts longer: the renewal is not its.
    other = service.subscription(
        "anna", plan_id=service.row("subscriptions", subscription).plan_id, ended_at=NOON + timedelta(days=90)
    )
    before = service.row("subscriptions", other)

    run = service.run(JOB)

    assert run.ok, run.failure
    [attempt] = service.attempts(subscription)
    [charge] = service.charges()
    assert (attempt.state, attempt.external_payment_id) == ("SUCCEEDED", charge.payment_id)
    assert service.ended_at(subscription) == datetime(2026, 4, 12, 11, 0, tzinfo=UTC)
    assert service.row("subscriptions", other) == before
    assert service.settled(charge.payment_id) == ["renewed"]
    service.check_books()
    after = service.snapshot()
    assert service.run("autopayment_job").ok
    assert service.snapshot() == after
    assert len(service.charges()) == 1


def test_a_renewal_that_the_services_webhook_has_granted_only_closes_the_attempt(service: Service) -> None:
    subscription = with_a_lost_answer(service)
    [charge] = service.charges()
    service.payment(charge.payment_id, subscription_id=subscription, status="SUCCEEDED", created_at=service.now)
    service.execute("UPDATE subscriptions SET ended_at = ended_at + interval '1 month'")
    granted = service.ended_at(subscription)

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.ended_at(subscription) == granted
    assert [attempt.state for attempt in service.attempts(subscription)] == ["SUCCEEDED"]
    assert len(service.rows("payments", "external_payment_id = :id", id=charge.payment_id)) == 1
    service.check_books()


# --- The webhook


def test_a_scheduled_run_leaves_a_payment_younger_than_a_minute_to_the_webhook(service: Service) -> None:
    plan = service.plan()
    service.paid_there("fresh", user="anna", plan_id=plan, created_at=NOON - timedelta(seconds=59))
    service.paid_there("older", user="boris", plan_id=plan, created_at=NOON - timedelta(seconds=60))
    service.paid_there("long begun, just paid", user="vera", plan_id=plan, created_at=NOON - timedelta(days=2),
                       captured_at=NOON - timedelta(seconds=59))  # fmt: skip

    run = service.tick(JOB)

    assert run.ok, run.failure
    assert [row.external_payment_id for row in service.rows("payments")] == ["older"]
    assert "webhook" in run.reasons("payment fresh")[0]
    service.advance(minutes=2)
    assert service.tick(JOB).ok
    assert {row.user_id for row in service.rows("subscriptions")} == {"anna", "boris", "vera"}


@pytest.mark.parametrize("job", [JOB, "matching_pending_payments_job"])
def test_a_webhook_without_locks_is_not_granted_beside(service: Service, job: str) -> None:
    plan = service.plan()
    service.paid_there("fresh", user="anna", plan_id=plan, created_at=NOON - timedelta(seconds=30))
    payment = service.payment("fresh", created_at=NOON - timedelta(seconds=40))
    # The handler has read the row as PENDING; the tick comes; then the handler writes by the row's id.
    run = service.tick(job)
    assert run.ok, run.failure
    assert service.status("payments", payment) == "PENDING"
    assert "webhook" in run.reasons("payment fresh")[0]
    granted = service.subscription("anna", plan_id=plan, ended_at=NOON + timedelta(days=31))
    service.execute(
        "UPDATE payments SET status = 'SUCCEEDED', subscription_id = :granted WHERE id = :id",
        granted=granted,
        id=payment,
    )
    service.advance(minutes=2)

    assert service.tick(job).ok

    assert [row.id for row in service.rows("subscriptions")] == [granted]
    assert service.settled("fresh") == []


@pytest.mark.parametrize("job", [JOB, "matching_pending_payments_job"])
def test_what_was_left_to_a_webhook_that_never_comes_is_settled_by_a_later_tick(service: Service, job: str) -> None:
    service.paid_there("fresh", plan_id=service.plan(), created_at=NOON - timedelta(seconds=59))
    service.payment("fresh", created_at=NOON - timedelta(days=1))
    assert service.tick(job).ok
    assert service.watermark(job) == NOON - timedelta(seconds=59)
    service.advance(hours=3)

    assert service.tick(job).ok

    assert service.settled("fresh") == ["created"]


def test_a_manual_launch_repairs_a_payment_of_any_youth(service: Service) -> None:
    service.paid_there("fresh", plan_id=service.plan(), created_at=NOON)

    assert service.run(JOB).ok

    assert service.settled("fresh") == ["created"]


def test_a_row_that_the_webhook_writes_while_the_provider_is_read_is_seen_and_nothing_is_granted_twice(
    service: Service,
) -> None:
    plan = service.plan()
    subscription = service.subscription("anna", plan_id=plan, ended_at=NOON + timedelta(days=30))
    service.paid_there("paid", user="anna", plan_id=plan)

    def webhook(page: Any) -> Any:
        service.payment("paid", subscription_id=subscription, status="SUCCEEDED")
        return page

    service.sandbox.misbehave("list", "change", transform=webhook)

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.ended_at(subscription) == NOON + timedelta(days=30)
    assert len(service.rows("payments")) == 1
    assert service.settled("paid") == []


@pytest.mark.parametrize("unique", [True, False], ids=["with the unique index", "without it"])
def test_a_webhook_that_commits_while_the_job_applies_wins_and_nothing_is_granted_twice(
    service: Service, engine: sa.Engine, unique: bool
) -> None:
    if not unique:
        service.tolerate_duplicates()
    plan = service.plan()
    subscription = service.subscription("anna", plan_id=plan, ended_at=NOON + timedelta(days=30))
    payment = service.payment("paid")
    service.paid_there("paid", user="anna", plan_id=plan)
    with engine.connect() as webhook:
        webhook.execute(
            sa.text("UPDATE payments SET status = 'SUCCEEDED', subscription_id = :subscription WHERE id = :id"),
            {"subscription": subscription, "id": payment},
        )
        webhook.execute(sa.text("UPDATE subscriptions SET ended_at = ended_at + interval '1 month'"))
        wait = service.begin(JOB)
        wait_for_a_blocked_session(engine)
        webhook.commit()
    run = wait()

    assert run.ok, run.failure
    assert service.ended_at(subscription) == datetime(2026, 5, 11, 12, 0, tzinfo=UTC)
    assert len(service.rows("payments")) == 1
    assert len(service.rows("subscriptions")) == 1


def test_a_webhook_that_inserts_the_row_while_the_job_applies_is_found_by_the_unique_index(
    service: Service, engine: sa.Engine
) -> None:
    plan = service.plan()
    subscription = service.subscription("anna", plan_id=plan, ended_at=NOON + timedelta(days=30))
    service.paid_there("paid", user="anna", plan_id=plan)
    service.paid_there("another", user="boris", plan_id=plan)
    with engine.connect() as webhook:
        webhook.execute(
            sa.text("""
                INSERT INTO payments (subscription_id, payment_provider_id, status, currency, amount,
                                      external_payment_id, created_at, updated_at)
                VALUES (:subscription, :provider, 'SUCCEEDED', 'RUB', 299, 'paid', '2026-03-12', '2026-03-12')
            """),
            {"subscription": subscription, "provider": service.provider_id},
        )
        wait = service.begin(JOB)
        wait_for_a_blocked_session(engine)
        webhook.commit()
    run = wait()

    assert run.ok, run.failure
    assert service.ended_at(subscription) == NOON + timedelta(days=30)
    assert service.settled("paid") == []
    assert service.settled("another") == ["created"]
    assert len(service.rows("payments")) == 2


# --- Repeated, raced, broken


def test_two_runs_of_it_at_once_create_each_payment_once(service: Service) -> None:
    service.tolerate_duplicates()
    plan = service.plan()
    for number in range(30):
        service.paid_there(f"paid-{number}", user=f"user-{number % 5}", plan_id=plan)
    service.sandbox.misbehave("list", "none", delay_s=0.2, times=4)
    running = [service.begin(JOB) for _ in range(2)]
    runs = [wait() for wait in running]

    assert [run.failure for run in runs] == ["", ""]
    assert sorted(row.external_payment_id for row in service.rows("payments")) == sorted(
        f"paid-{number}" for number in range(30)
    )
    assert [row.ended_at for row in service.rows("subscriptions")] == [stored(2026, 9, 12, 12, 0)] * 5
    service.check_books()


def test_a_user_id_that_the_database_cannot_hold_stops_nobody(service: Service) -> None:
    plan = service.plan()
    service.paid_there("nul", user="an\x00na", plan_id=plan)
    service.paid_there("right", user="anna", plan_id=plan)

    run = service.run(JOB)

    assert run.ok, run.failure
    assert "right" in {row.external_payment_id for row in service.rows("payments")}


# --- What a run tells


def test_every_change_is_in_the_audit_trail_with_run_id_new_value_and_reason(service: Service) -> None:
    plan = service.plan()
    service.paid_there("orphan", user="anna", plan_id=plan)

    run = service.run(JOB)

    [subscription] = service.rows("subscriptions")
    [payment] = service.rows("payments")
    entries = {(entry.entity, entry.entity_id, entry.action): entry for entry in service.audit(run)}
    assert set(entries) == {
        ("subscription", str(subscription.id), "created"), ("payment", str(payment.id), "created"),
    }  # fmt: skip
    assert entries["payment", str(payment.id), "created"].new == {
        "status": "SUCCEEDED", "amount": "299.00", "currency": "RUB", "subscription_id": subscription.id,
    }  # fmt: skip
    assert {(entry.job, entry.external_payment_id) for entry in entries.values()} == {(JOB, "orphan")}
    assert all("unknown here" in entry.reason for entry in entries.values())


def test_a_webhook_grace_that_is_negative_or_longer_than_what_an_outage_covers_again_is_refused(
    service: Service,
) -> None:
    service.paid_there("orphan", plan_id=service.plan())
    for grace in (-1, 15 * 60 + 1):
        run = service.run(JOB, ops={"diff_successful_payments": {"webhook_grace_s": grace}})
        assert not run.ok
        assert "webhook_grace_s" in run.failure
    assert service.rows("payments") == []


def test_a_foreign_payment_is_shown_and_is_before_a_person_only_on_demand(service: Service) -> None:
    service.paid_there("goods", metadata={"order": "7"})
    before = service.snapshot()

    run = service.run(JOB)

    assert run.ok, run.failure
    assert [(row["subject"], row["action"], row["code"]) for row in run.decisions] == [
        ("payment goods", "leave", "foreign")
    ]
    assert run.report["newly quarantined"] == 0
    assert service.quarantined("goods") == []
    assert service.snapshot() == before

    strict = service.settings.model_copy(update={"foreign_payments": "quarantine"})
    assert service.run(JOB, load=lambda: strict).ok
    assert service.quarantined("goods") == ["metadata"]
