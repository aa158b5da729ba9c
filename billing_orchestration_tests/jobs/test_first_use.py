"""Before a method is charged for the first time: its payment is asked about once, and must have saved it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from billing_orchestration.desk.upcoming import find_upcoming
from billing_orchestration_tests.books import NOON
from billing_orchestration_tests.jobs.service import Run, Service

JOB = "autopayment_job"
A_DAY = timedelta(days=1)


def customer(service: Service, payment: str, **there: Any) -> int:
    """A customer whose subscription ends today, with the first payment on both sides."""
    subscription = service.subscription()
    service.paid_row(payment, subscription, created_at=NOON - 30 * A_DAY)
    service.provider.add_payment(
        id=payment, amount="299.00", created_at=NOON - 30 * A_DAY, **{"saved": True, "script": "succeeded", **there}
    )
    return subscription


def asked(service: Service) -> list[str]:
    """The payments that the provider was asked about, in order."""
    return [request.path.rpartition("/")[2] for request in service.sandbox.requests if request.call == "get"]


def code(run: Run, subscription: int) -> str:
    [row] = [row for row in run.decisions if row["subject"] == f"subscription {subscription}"]
    return str(row["code"])


def test_what_the_payment_says_is_charged_by_the_methods_own_id_and_asked_once(service: Service) -> None:
    subscription = customer(service, "first", method_id="card-of-anna")

    assert service.run(JOB).ok
    service.advance(days=31)
    assert service.run(JOB).ok

    assert [charge.payment_method_id for charge in service.charges()] == ["card-of-anna"] * 2
    assert asked(service) == ["first"]
    assert service.charged() == {subscription: 2}
    service.check_books()


def test_a_method_that_was_not_saved_is_not_charged_and_one_person_is_told_once(service: Service) -> None:
    service.provider.add_method("first", "succeeded")
    subscription = customer(service, "first", saved=False, script=None)

    first, second = service.run(JOB), service.run(JOB)

    assert first.ok
    assert service.charges() == []
    assert code(first, subscription) == code(second, subscription) == "method_not_saved"
    assert (first.report["newly quarantined"], second.report["newly quarantined"]) == (1, 0)
    [entry] = service.rows("quarantine")
    assert (entry.kind, entry.subscription_id, entry.resolved_at) == ("method_unusable", subscription, None)
    assert asked(service) == ["first"]


def test_the_entry_closes_with_another_method(service: Service) -> None:
    subscription = customer(service, "first", saved=False, script=None)
    service.run(JOB)
    service.paid_row("second", subscription, created_at=NOON)
    service.provider.add_payment(id="second", amount="299.00", saved=True, script="succeeded", created_at=NOON)

    assert service.run(JOB).ok

    assert [charge.payment_method_id for charge in service.charges()] == ["second"]
    [entry] = service.rows("quarantine")
    assert (entry.resolution, entry.resolved_by) == ("mended", JOB)


def test_the_entry_closes_with_the_subscription(service: Service) -> None:
    subscription = customer(service, "first", saved=False, script=None)
    service.run(JOB)
    service.execute("UPDATE subscriptions SET status = 'EXPIRED' WHERE id = :id", id=subscription)
    other = customer(service, "other")

    assert service.run(JOB).ok

    assert service.charged() == {other: 1}
    [entry] = service.rows("quarantine")
    assert (entry.resolution, entry.resolution_reason) == ("mended", "the subscription is no longer ACTIVE")


def test_a_payment_that_was_given_back_says_no(service: Service) -> None:
    subscription = customer(service, "first", refunded_amount="299.00")

    run = service.run(JOB)

    assert run.ok
    assert service.charges() == []
    [told] = run.reasons(f"subscription {subscription}")
    assert "was refunded in full" in told


def settled(service: Service, payment: str, **there: Any) -> int:
    """A customer whose first payment these jobs have settled, and whose subscription ends today."""
    plan = service.plan("299.00")
    service.paid_there(payment, user="anna", plan_id=plan, saved=True, script="succeeded", **there)
    assert service.run("matching_successful_payments_job").ok
    [row] = service.rows("subscriptions", "user_id = 'anna'")
    service.advance(days=31)
    [kept] = service.rows("saved_methods")
    assert (kept.subscription_id, kept.saved_by_external_payment_id) == (row.id, payment)
    return int(row.id)


def newer(service: Service, payment: str, subscription: int, days_ago: int = 1, **there: Any) -> None:
    """A later payment for the same subscription that the service's webhook settled."""
    later = service.now - days_ago * A_DAY
    service.paid_row(payment, subscription, created_at=later)
    service.provider.add_payment(id=payment, amount="299.00", created_at=later, **there)


def charged_by(service: Service) -> list[str | None]:
    return [charge.payment_method_id for charge in service.charges()]


def test_a_newer_card_that_a_webhook_settled_takes_the_place_of_the_kept_one(service: Service) -> None:
    subscription = settled(service, "first", method_id="old-card")
    newer(service, "second", subscription, saved=True, script="succeeded", method_id="new-card")

    assert service.run(JOB).ok
    service.advance(days=31)
    assert service.run(JOB).ok

    assert charged_by(service) == ["new-card"] * 2
    assert asked(service) == ["second"]
    service.check_books()


def test_a_newer_card_of_another_customers_subscription_is_nobody_elses(service: Service) -> None:
    subscription = settled(service, "first", method_id="old-card")
    newer(service, "second", service.subscription("berta"), saved=True, script="succeeded", method_id="new-card")

    assert service.run(JOB).ok

    assert service.charged()[subscription] == 1
    assert "old-card" in charged_by(service)


@pytest.mark.parametrize("there", [{"saved": False}, {"saved": True, "refunded_amount": "299.00"}], ids=["no", "back"])
def test_a_newer_payment_that_saved_nothing_or_was_given_back_leaves_the_kept_card(
    service: Service, there: dict[str, Any]
) -> None:
    subscription = settled(service, "first", method_id="old-card")
    newer(service, "second", subscription, **there)

    assert service.run(JOB).ok
    service.advance(days=31)
    assert service.run(JOB).ok

    assert charged_by(service) == ["old-card"] * 2
    assert asked(service) == ["second", "first"]
    assert service.rows("quarantine") == []
    service.check_books()


@pytest.mark.parametrize("is_kept", [True, False])
def test_of_several_cards_the_newest_that_was_saved_and_not_refunded_is_charged_at_once(
    service: Service, is_kept: bool
) -> None:
    subscription = (settled if is_kept else customer)(service, "first", method_id="old-card")
    newer(service, "second", subscription, days_ago=4, saved=True, script="succeeded", method_id="new-card")
    newer(service, "third", subscription, days_ago=3, saved=True, refunded_amount="299.00", method_id="given-back")
    newer(service, "fourth", subscription, days_ago=2, saved=False)

    run = service.run(JOB)
    service.advance(days=31)

    assert run.ok
    assert service.run(JOB).ok
    assert charged_by(service) == ["new-card"] * 2
    assert asked(service) == ["fourth", "third", "second"]
    assert service.rows("quarantine") == []


def test_a_newer_row_that_the_provider_does_not_know_leaves_the_kept_card(service: Service) -> None:
    subscription = settled(service, "first", method_id="old-card")
    service.paid_row("gift-2026", subscription, created_at=service.now - A_DAY)

    assert service.run(JOB).ok
    service.advance(days=31)
    assert service.run(JOB).ok

    assert charged_by(service) == ["old-card"] * 2


def test_a_kept_card_whose_payment_the_service_holds_as_refunded_is_not_charged(service: Service) -> None:
    subscription = settled(service, "first", method_id="old-card")
    service.execute("UPDATE payments SET status = 'REFUNDED' WHERE external_payment_id = 'first'")

    run = service.run(JOB)

    assert run.ok
    assert service.charges() == []
    assert code(run, subscription) == "no_method"


def test_a_kept_card_whose_payment_was_given_back_at_the_provider_alone_is_not_charged(service: Service) -> None:
    subscription = settled(service, "first", method_id="old-card")
    service.provider.refund("first")

    run = service.run(JOB)

    assert run.ok
    assert service.charges() == []
    assert code(run, subscription) == "method_not_saved"


def test_after_a_refund_the_older_saved_card_counts_again(service: Service) -> None:
    subscription = customer(service, "first", method_id="old-card")
    newer(service, "second", subscription, saved=True, script="succeeded", method_id="new-card")
    service.execute("UPDATE payments SET status = 'REFUNDED' WHERE external_payment_id = 'second'")

    assert service.run(JOB).ok

    assert charged_by(service) == ["old-card"]


def test_without_an_answer_nobody_is_charged_and_the_next_run_asks_again(service: Service) -> None:
    silent, other = customer(service, "silent"), customer(service, "other")
    service.sandbox.misbehave("get", "error_before", payment_id="silent", times=None)

    run = service.run(JOB)

    assert not run.ok
    assert service.charged() == {other: 1}
    assert code(run, silent) == "method_unknown"
    assert service.rows("quarantine") == []

    service.sandbox.behave()
    service.advance(minutes=5)
    assert service.run(JOB).ok
    assert service.charged() == {other: 1, silent: 1}


def test_an_id_that_is_no_payments_is_taken_for_the_methods_own(service: Service) -> None:
    subscription = service.subscriber(method="bound")

    assert service.run(JOB).ok
    service.advance(days=31)
    assert service.run(JOB).ok

    assert service.charged() == {subscription: 2}
    assert asked(service) == ["bound"]


def test_a_dry_run_decides_the_same_and_remembers_nothing(service: Service) -> None:
    customer(service, "yes", method_id="card")
    no = customer(service, "no", saved=False, script=None)

    preview = service.run(JOB, dry_run=True)

    assert code(preview, no) == "method_not_saved"
    assert service.rows("asked_methods") == service.rows("quarantine") == []
    run = service.run(JOB)
    assert code(run, no) == "method_not_saved"
    assert [charge.payment_method_id for charge in service.charges()] == ["card"]


def test_a_hard_decline_of_the_methods_own_id_counts(service: Service) -> None:
    stranger = service.subscription("a stranger", status="CANCELED")
    service.attempt(stranger, state="STOPPED", method="card", decline_class="hard", first_sent_at=NOON - 2 * A_DAY)
    subscription = customer(service, "first", method_id="card")

    run = service.run(JOB)

    assert service.charges() == []
    assert code(run, subscription) == "method_stopped"


def test_a_planned_charge_that_was_never_sent_is_given_up_if_its_method_was_not_saved(service: Service) -> None:
    service.provider.add_method("first", "succeeded")
    subscription = customer(service, "first", saved=False, script=None)
    attempt = service.attempt(subscription, state="PLANNED", method="first", first_sent_at=None)

    assert service.run(JOB).ok

    assert service.charges() == []
    assert service.read_attempt(attempt.id).state == "VOID"


def test_a_planned_charge_stays_planned_while_the_provider_is_silent_about_its_method(service: Service) -> None:
    subscription = customer(service, "first")
    attempt = service.attempt(subscription, state="PLANNED", method="first", first_sent_at=None)
    service.sandbox.misbehave("get", "error_before", times=None)

    run = service.run(JOB)

    assert not run.ok
    assert service.charges() == []
    assert service.read_attempt(attempt.id).state == "PLANNED"
    service.sandbox.behave()
    assert service.run(JOB).ok
    assert [row.state for row in service.attempts(subscription)] == ["SUCCEEDED"]


def test_who_is_not_charged_anyway_is_not_asked_about(service: Service) -> None:
    customer(service, "first")
    service.execute("UPDATE plans SET duration = NULL")

    assert service.run(JOB).ok

    assert asked(service) == []


def test_upcoming_asks_like_the_run_and_remembers_nothing(service: Service) -> None:
    yes, no = customer(service, "yes", method_id="card"), customer(service, "no", saved=False, script=None)

    provider = service.connect_provider(service.settings)
    told = {line.subscription: line for line in find_upcoming(service.engine, provider, service.settings, NOON, 1)}

    assert (told[yes].charged, told[yes].card) == ("yes", "4444")
    assert (told[no].charged, told[no].code) == ("no", "method_not_saved")
    assert service.rows("asked_methods") == []


def test_what_the_view_names_is_charged_whatever_became_of_the_kept_card(service_with: Callable[..., Service]) -> None:
    service = service_with(billing_renewal_view="billing_renewals")
    service.execute(
        "CREATE VIEW billing_renewals AS SELECT id AS subscription_id, 'new-card'::text AS payment_method_id,"
        " true AS may_charge, NULL::text AS email, NULL::text AS phone FROM subscriptions"
    )
    service.provider.add_method("new-card", "succeeded")
    subscription = settled(service, "first", method_id="old-card")
    service.execute("UPDATE payments SET status = 'REFUNDED' WHERE external_payment_id = 'first'")

    assert service.run(JOB).ok

    assert charged_by(service) == ["new-card"]
    assert service.charged() == {subscription: 1}


@pytest.mark.parametrize("state", ["inactive", "pending"])
def test_a_method_of_the_view_that_is_not_active_is_told_as_such(
    service_with: Callable[..., Service], state: str
) -> None:
    service = service_with(billing_renewal_view="billing_renewals")
    service.execute(
        "CREATE VIEW billing_renewals AS SELECT id AS subscription_id, 'bound'::text AS payment_method_id,"
        " true AS may_charge, NULL::text AS email, NULL::text AS phone FROM subscriptions"
    )
    service.provider.add_method("bound", "succeeded", status=state)
    subscription = service.subscription()

    run = service.run(JOB)

    assert run.ok
    assert service.charges() == []
    assert run.reasons(f"subscription {subscription}") == [f"leave: its payment method is {state} at the provider"]
    [entry] = service.rows("quarantine")
    assert entry.kind == "method_unusable"

    service.provider.add_method("bound", "succeeded")
    assert service.run(JOB).ok
    service.advance(days=31)
    assert service.run(JOB).ok
    assert service.charged() == {subscription: 2}
    # Twice until it was active, and no more.
    assert service.sandbox.count("get_method") == 2
