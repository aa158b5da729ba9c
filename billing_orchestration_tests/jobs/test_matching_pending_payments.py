"""matching_pending_payments_job, whole: which PENDING payments are settled, which never are, and what nothing stops."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa

from billing_orchestration_tests.books import NOON, stored
from billing_orchestration_tests.jobs.service import Service
from billing_orchestration_tests.waiting import wait_for_a_blocked_session

UTC = timezone.utc
JOB = "matching_pending_payments_job"
OTHER_JOB = "matching_successful_payments_job"


def begun(service: Service, external_id: str | None, **row: Any) -> int:
    """A purchase as the service begins it: a PENDING row, ten minutes old, not linked to a subscription yet."""
    row.setdefault("created_at", service.now - timedelta(minutes=10))
    row.setdefault("method", None)
    return service.payment(external_id, **row)


def bought(service: Service, plan: int, external_id: str, *, user: str | None = None, **there: Any) -> int:
    """A purchase that was paid and that the service did not hear of: PENDING here, succeeded there."""
    there.setdefault("created_at", service.now - timedelta(minutes=10))
    service.paid_there(external_id, user=user or f"user of {external_id}", plan_id=plan, **there)
    return begun(service, external_id, created_at=there["created_at"])


# --- What is settled


def test_pending_here_and_succeeded_there_is_settled_and_a_subscription_is_created(service: Service) -> None:
    plan = service.plan("299.00")
    payment = bought(service, plan, "paid", user="anna", method_type="sbp")

    run = service.run(JOB)

    assert run.ok, run.failure
    [subscription] = service.rows("subscriptions")
    assert (subscription.user_id, subscription.plan_id, subscription.status) == ("anna", plan, "ACTIVE")
    # From the moment of settling, not from the payment's: the customer loses nothing by our being late.
    assert subscription.started_at == stored(2026, 3, 12, 12, 0)
    assert subscription.ended_at == stored(2026, 4, 12, 12, 0)
    row = service.row("payments", payment)
    assert (row.status, row.subscription_id, row.payment_method) == ("SUCCEEDED", subscription.id, "SBP")
    assert row.created_at == stored(2026, 3, 12, 11, 50)
    assert service.settled("paid") == ["created"]
    assert len(service.rows("payments")) == 1
    assert service.charges() == []
    service.check_books()


def test_an_active_subscription_on_that_plan_is_extended_from_its_own_end_and_keeps_its_anchor_day(
    service: Service,
) -> None:
    plan = service.plan()
    subscription = service.subscription(
        "anna",
        plan_id=plan,
        started_at=datetime(2026, 1, 31, 10, 0, tzinfo=UTC),
        ended_at=datetime(2026, 4, 30, 10, 0, tzinfo=UTC),
    )
    payment = bought(service, plan, "paid", user="anna")

    assert service.run(JOB).ok

    assert service.ended_at(subscription) == datetime(2026, 5, 31, 10, 0, tzinfo=UTC)
    assert [row.id for row in service.rows("subscriptions")] == [subscription]
    assert service.row("payments", payment).subscription_id == subscription
    assert service.settled("paid") == ["extended"]


def test_several_purchases_of_one_user_extend_one_subscription_one_after_the_other(service: Service) -> None:
    plan = service.plan()
    for name in ("first", "second", "third"):
        bought(service, plan, name, user="anna")

    run = service.run(JOB)

    assert run.ok, run.failure
    [subscription] = service.rows("subscriptions")
    assert subscription.ended_at == stored(2026, 6, 12, 12, 0)
    assert [service.settled(name) for name in ("first", "second", "third")] == [["created"], ["extended"], ["extended"]]
    assert {row.subscription_id for row in service.rows("payments")} == {subscription.id}


def test_the_period_of_a_purchase_is_counted_in_the_billing_time_zone(service_with: Callable[..., Service]) -> None:
    # 22:30 UTC on 30 January is half past one on the 31st in Moscow: a month later is 28 February there.
    service = service_with(billing_timezone="Europe/Moscow", now=datetime(2026, 1, 30, 22, 30, tzinfo=UTC))
    bought(service, service.plan(), "paid")

    assert service.run(JOB).ok

    [subscription] = service.rows("subscriptions")
    assert subscription.ended_at == stored(2026, 2, 27, 22, 30)


# --- The window


def test_a_card_that_is_paid_in_the_fifty_ninth_minute_is_settled(service: Service) -> None:
    plan = service.plan()
    purchase = service.provider.purchase(
        "299.00", metadata={"user_id": "anna", "plan_id": str(plan), "payment_provider_id": str(service.provider_id)}
    )
    payment = begun(service, purchase.id, created_at=service.now)
    service.advance(minutes=59)
    service.provider.pay(purchase.id)
    service.advance(minutes=2)

    assert service.run(JOB).ok

    assert service.status("payments", payment) == "SUCCEEDED"
    assert len(service.rows("subscriptions")) == 1


def test_cash_that_is_paid_on_the_eighth_day_is_settled(service: Service) -> None:
    plan = service.plan()
    purchase = service.provider.purchase(
        "299.00",
        method_type="cash",
        metadata={"user_id": "anna", "plan_id": str(plan), "payment_provider_id": str(service.provider_id)},
    )
    payment = begun(service, purchase.id, created_at=service.now)
    service.advance(days=8)
    service.provider.pay(purchase.id)
    service.advance(minutes=1)

    assert service.run(JOB).ok

    row = service.row("payments", payment)
    # The service has no label for cash: such a payment is as paid as any other.
    assert (row.status, row.payment_method) == ("SUCCEEDED", None)
    assert len(service.rows("subscriptions")) == 1


def test_a_row_of_any_age_counts_when_its_provider_payment_is_in_the_window(service: Service) -> None:
    payment = bought(service, service.plan(), "paid")
    service.execute("UPDATE payments SET created_at = '2024-02-29 00:00:00'")

    assert service.run(JOB).ok

    assert service.status("payments", payment) == "SUCCEEDED"


# --- What is not settled


def test_what_is_not_paid_or_not_known_at_the_provider_stays_pending(service: Service) -> None:
    plan = service.plan()
    for there in ("pending", "canceled", "waiting_for_capture"):
        service.paid_there(there, plan_id=plan, status=there)
        begun(service, there)
    begun(service, "never arrived there")
    before = service.snapshot()

    assert service.run(JOB).ok

    assert service.snapshot() == before


def test_only_pending_rows_are_this_jobs_business(service: Service) -> None:
    plan = service.plan()
    for state in ("CREATED", "EXPIRED", "CANCELED", "SUCCEEDED", "REFUNDED", None):
        service.paid_there(f"paid {state}", plan_id=plan)
        service.payment(f"paid {state}", status=state)
    before = service.snapshot()

    assert service.run(JOB).ok

    assert service.snapshot() == before


def test_a_provider_that_ignores_the_status_filter_gets_no_pending_payment_settled(service: Service) -> None:
    payment = bought(service, service.plan(), "unpaid", status="pending")
    service.sandbox.misbehave(
        "list",
        "change",
        times=None,
        transform=lambda page: {**page, "items": [service.provider.payment("unpaid").document()]},
    )

    assert service.run(JOB).ok

    assert service.status("payments", payment) == "PENDING"
    assert service.rows("subscriptions") == []


def test_a_pending_row_without_a_provider_id_is_reported_with_the_reason_and_others_go_on(service: Service) -> None:
    nameless = begun(service, None)
    payment = bought(service, service.plan(), "paid")

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.statuses("payments", nameless, payment) == ["PENDING", "SUCCEEDED"]
    [reason] = run.reasons(f"payment {nameless}")
    assert "no provider id" in reason


def test_of_several_rows_with_one_provider_id_one_is_settled_and_the_others_are_reported(service: Service) -> None:
    service.tolerate_duplicates()
    first = bought(service, service.plan(), "paid")
    second = begun(service, "paid")

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.statuses("payments", first, second) == ["SUCCEEDED", "PENDING"]
    assert len(service.rows("subscriptions")) == 1
    assert service.settled("paid") == ["created"]
    [reason] = run.reasons(f"payment {second}")
    assert "duplicate" in reason
    before = service.snapshot()
    assert service.run(JOB).ok
    assert service.snapshot() == before


# --- Settling, step by step


def test_one_refunded_in_full_is_recorded_as_refunded_and_grants_nothing(service: Service) -> None:
    payment = bought(service, service.plan(), "returned", refunded_amount="299.00")

    assert service.run(JOB).ok

    assert service.status("payments", payment) == "REFUNDED"
    assert service.rows("subscriptions") == []
    assert service.settled("returned") == ["refunded"]
    service.check_books()


def test_one_refunded_in_part_is_granted(service: Service) -> None:
    payment = bought(service, service.plan(), "partly returned", refunded_amount="298.99")

    assert service.run(JOB).ok

    assert service.status("payments", payment) == "SUCCEEDED"
    assert len(service.rows("subscriptions")) == 1


def in_a_live_shop(service: Service) -> None:
    service.provider.secret_key = "live_sandbox"
    service.settings = service.settings.model_copy(
        update={"yookassa_secret_key": type(service.settings.yookassa_secret_key)("live_sandbox")}
    )


def test_a_test_payment_in_a_live_shop_grants_nothing_and_goes_to_a_person(service: Service) -> None:
    in_a_live_shop(service)
    plan = service.plan()
    fake = bought(service, plan, "fake", test=True)
    real = bought(service, plan, "real", test=False)

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.statuses("payments", fake, real) == ["PENDING", "SUCCEEDED"]
    assert service.quarantined("fake") == ["test_payment"]
    assert [row.user_id for row in service.rows("subscriptions")] == ["user of real"]


def test_an_amount_or_a_currency_that_differs_goes_to_a_person(service: Service) -> None:
    plan = service.plan()
    differing: dict[str, dict[str, Any]] = {
        "a kopeck less": {"amount": "298.99"},
        "far more": {"amount": "999999.99"},
        "another currency": {"currency": "USD"},
        "no currency": {"currency": None},
    }
    for name, here in differing.items():
        service.paid_there(name, plan_id=plan, amount="299.00")
        begun(service, name, **here)

    run = service.run(JOB)

    assert run.ok, run.failure
    assert {row.status for row in service.rows("payments")} == {"PENDING"}
    assert {name: service.quarantined(name) for name in differing} == {key: ["amount_differs"] for key in differing}
    assert service.rows("subscriptions") == []


def test_metadata_that_is_missing_malformed_or_unknown_goes_to_a_person_and_others_go_on(service: Service) -> None:
    plan = service.plan()
    right = {"user_id": "anna", "plan_id": str(plan), "payment_provider_id": str(service.provider_id)}
    flaws: dict[str, Any] = {
        "no metadata": None,
        "not an object": ["user_id", "anna"],
        "no user": {**right, "user_id": None},
        "a plan that is not there": {**right, "plan_id": "31337"},
        "an injection": {**right, "plan_id": f"{plan}; DROP TABLE payments"},
    }
    rows = {}
    for flaw, metadata in flaws.items():
        service.paid_there(flaw, override={"metadata": metadata})
        rows[flaw] = begun(service, flaw)
    paid = bought(service, plan, "right")

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.status("payments", paid) == "SUCCEEDED"
    assert {flaw: (service.status("payments", row), service.quarantined(flaw)) for flaw, row in rows.items()} == {
        flaw: ("PENDING", ["metadata"]) for flaw in flaws
    }
    assert len(service.rows("subscriptions")) == 1


def test_metadata_of_another_user_than_the_rows_own_goes_to_a_person(service: Service) -> None:
    plan = service.plan()
    boris = service.subscription("boris", plan_id=plan, ended_at=NOON + timedelta(days=1))
    service.paid_there("paid", user="anna", plan_id=plan)
    payment = service.payment("paid", subscription_id=boris)
    before = service.row("subscriptions", boris)

    assert service.run(JOB).ok

    assert service.status("payments", payment) == "PENDING"
    assert service.quarantined("paid") == ["foreign_metadata"]
    assert service.row("subscriptions", boris) == before


def test_a_problem_alerts_once_however_many_ticks_see_it(service: Service) -> None:
    service.paid_there("odd", plan_id=service.plan())
    begun(service, "odd", amount="1.00")

    runs = [service.tick(JOB) for _ in range(3)]

    assert [run.report["newly quarantined"] for run in runs] == [1, 0, 0]
    assert [run.report["quarantined"] for run in runs] == [1, 1, 1]
    assert len(service.rows("quarantine")) == 1
    assert [len(service.audit(run)) for run in runs] == [1, 0, 0]
    assert [bool(run.materialized) for run in runs] == [True, False, False]


# --- What stops nobody


def test_a_row_that_the_services_own_trigger_refuses_never_stops_the_others(service: Service) -> None:
    plan = service.plan()
    payments = [bought(service, plan, name) for name in ("one", "refused", "two")]
    service.refuse_changes_of("payments", payments[1])

    run = service.run(JOB)

    assert service.statuses("payments", *payments) == ["SUCCEEDED", "PENDING", "SUCCEEDED"]
    assert service.quarantined("refused") == ["not_writable"]
    assert "not this one" in run.reasons("payment refused")[0]
    assert len(service.rows("subscriptions")) == 2


# One of each kind; provider/test_records.py has them all.
ODD_ITEMS: dict[str, dict[str, Any]] = {
    "a null amount": {"override": {"amount": None}},
    "an amount beyond the column": {"override": {"amount": {"value": "1000000.00", "currency": "RUB"}}},
    "an unknown status": {"override": {"status": "half_paid"}},
    "no time": {"without": ["created_at"]},
    "a null id": {"override": {"id": None}},
    "a null item": {"raw": [None]},
}


def test_one_odd_item_goes_to_a_person_and_the_other_payments_of_its_page_are_used(service: Service) -> None:
    plan = service.plan()
    for name, odd in ODD_ITEMS.items():
        service.paid_there(name, plan_id=plan, **odd)
        begun(service, name)
    payments = [bought(service, plan, f"right {number}") for number in range(30)]

    run = service.run(JOB)

    assert run.ok, run.failure
    assert {service.status("payments", payment) for payment in payments} == {"SUCCEEDED"}
    assert len(service.rows("subscriptions")) == 30
    problems = service.rows("quarantine")
    assert {row.kind for row in problems} == {"unreadable"}
    assert len(problems) == len(ODD_ITEMS)
    again = service.run(JOB)
    assert again.report["newly quarantined"] == 0


# --- Repeated, raced, changed meanwhile


def test_a_row_that_changes_between_reading_and_applying_is_decided_anew_under_lock(
    service: Service, engine: sa.Engine
) -> None:
    plan = service.plan()
    canceled, paid = bought(service, plan, "canceled meanwhile"), bought(service, plan, "paid")
    with engine.connect() as service_session:
        # The service's own transaction is under way when the job wants the row.
        service_session.execute(sa.text("UPDATE payments SET status = 'CANCELED' WHERE id = :id"), {"id": canceled})
        wait = service.begin(JOB)
        wait_for_a_blocked_session(engine)
        service_session.commit()
    run = wait()

    assert run.ok, run.failure
    assert service.statuses("payments", canceled, paid) == ["CANCELED", "SUCCEEDED"]
    assert service.quarantined("canceled meanwhile") == ["canceled_here"]
    assert [row.user_id for row in service.rows("subscriptions")] == ["user of paid"]


def test_a_row_that_somebody_keeps_locked_is_left_for_another_try_and_the_others_are_settled(
    service: Service, engine: sa.Engine
) -> None:
    plan = service.plan()
    locked, paid = bought(service, plan, "locked"), bought(service, plan, "paid")
    with engine.connect() as service_session:
        service_session.execute(sa.text("SELECT FROM payments WHERE id = :id FOR UPDATE"), {"id": locked})
        run = service.run(JOB, load=service.impatient)
        service_session.rollback()

    assert not run.ok
    assert "payment locked" in run.failure
    assert "1 must be retried" in run.failure
    assert service.statuses("payments", locked, paid) == ["PENDING", "SUCCEEDED"]
    assert service.watermark(JOB) is None
    assert service.run(JOB).ok
    assert service.status("payments", locked) == "SUCCEEDED"


# --- What a run tells


def test_every_change_is_in_the_audit_trail_with_run_id_old_and_new_value_and_reason(service: Service) -> None:
    plan = service.plan()
    subscription = service.subscription("anna", plan_id=plan, ended_at=NOON + timedelta(days=4))
    extends = bought(service, plan, "extends", user="anna")
    creates = bought(service, plan, "creates", user="boris")

    run = service.run(JOB)

    [_, new] = service.rows("subscriptions")
    entries = {(entry.entity, entry.entity_id, entry.action): entry for entry in service.audit(run)}
    assert set(entries) == {
        ("subscription", str(subscription), "extended"), ("subscription", str(new.id), "created"),
        ("payment", str(extends), "succeeded"), ("payment", str(creates), "succeeded"),
    }  # fmt: skip
    extended = entries["subscription", str(subscription), "extended"]
    assert (extended.old["ended_at"], extended.new["ended_at"]) == (
        "2026-03-16T12:00:00+00:00", "2026-04-16T12:00:00+00:00",
    )  # fmt: skip
    succeeded = entries["payment", str(creates), "succeeded"]
    assert (succeeded.old["status"], succeeded.new["status"], succeeded.new["subscription_id"]) == (
        "PENDING", "SUCCEEDED", new.id,
    )  # fmt: skip
    assert {(entry.job, entry.external_payment_id, entry.at) for entry in entries.values()} == {
        (JOB, "extends", NOON), (JOB, "creates", NOON),
    }  # fmt: skip
    assert all(entry.reason for entry in entries.values())


def test_a_run_shows_its_slices_decisions_sums_and_what_was_applied(service: Service) -> None:
    plan = service.plan("299.00")
    bought(service, plan, "one")
    bought(service, plan, "two")
    bought(service, plan, "odd", override={"metadata": {}})

    run = service.run(JOB)

    assert run.number("fetch_paid_for_pending", "succeeded payments") == 3
    assert run.number("fetch_pending_payments", "PENDING in the window") == 3
    assert (run.report["applied"], run.report["quarantined"]) == (2, 1)
    assert run.report["sum: create subscription, RUB"] == pytest.approx(float(Decimal("598.00")))
    assert run.reasons("payment one")[0].startswith("create subscription: PENDING here, paid at the provider")
    assert run.reasons("payment odd")[0].startswith("quarantine: ")


def test_no_text_of_a_run_holds_the_secret_key_or_the_databases_password(service: Service) -> None:
    bought(service, service.plan(), "paid")
    service.sandbox.misbehave("list", "html_before", times=None, body=f"<html>{service.sandbox.secret_key}</html>")

    run = service.run(JOB)

    assert not run.ok
    assert service.sandbox.secret_key not in repr(run)
