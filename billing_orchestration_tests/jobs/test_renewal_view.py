"""The service's own view: which method is charged, whether it may be, and who gets the receipt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from billing_orchestration.sandbox.provider.records import Outcome
from billing_orchestration_tests.jobs.service import Service

JOB = "autopayment_job"
ALL = "subscription_id, payment_method_id, may_charge, email, phone"


class WithView:
    """A service whose team has created the view over a table of its own."""

    def __init__(self, service: Service) -> None:
        self.service = service
        service.execute(
            "CREATE TABLE consents"
            " (subscription_id int, payment_method_id text, may_charge boolean, email text, phone text)"
        )
        service.execute(f"CREATE VIEW billing_renewals AS SELECT {ALL} FROM consents")

    def say(self, subscription_id: int, method: str | None, may_charge: bool | None = True, **contact: str) -> None:
        self.service.execute(
            "INSERT INTO consents VALUES (:id, :method, :may, :email, :phone)",
            id=subscription_id,
            method=method,
            may=may_charge,
            email=contact.get("email"),
            phone=contact.get("phone"),
        )


@pytest.fixture
def view(service_with: Callable[..., Service]) -> WithView:
    """The view, at a shop without receipts."""
    return WithView(service_with(billing_renewal_view="billing_renewals"))


@pytest.fixture
def receipts(service_with: Callable[..., Service]) -> WithView:
    """The view, at a shop that demands receipts."""
    with_view = WithView(
        service_with(
            billing_renewal_view="billing_renewals",
            receipts="with_payment",
            receipt_vat_code=11,
            receipt_payment_mode="full_payment",
        )
    )
    with_view.service.provider.switches.receipts = "demanded"
    return with_view


def test_the_views_method_is_charged_and_not_the_one_that_our_records_guess(view: WithView) -> None:
    service = view.service
    subscription = service.subscriber()
    service.provider.add_method("new-card", "succeeded")
    view.say(subscription, "new-card")

    assert service.run(JOB).ok

    assert [charge.payment_method_id for charge in service.charges()] == ["new-card"]
    service.check_books()


def test_a_method_that_was_bound_without_a_payment_is_charged(view: WithView) -> None:
    service = view.service
    subscription = service.subscription(plan_id=service.monthly)
    service.provider.add_method("bound", "succeeded")
    view.say(subscription, "bound")

    assert service.run(JOB).ok

    assert service.charged() == {subscription: 1}


def test_a_method_that_was_bound_without_a_payment_is_charged_for_the_first_of_the_shops_rows(view: WithView) -> None:
    service = view.service
    others = [service.insert("payment_providers", name="cards", **service._touched()) for _ in range(2)]
    ids = f"{others[0]},{service.provider_id}"
    service.settings = service.settings.model_copy(update={"yookassa_provider_ids": ids})
    subscription = service.subscription()
    service.provider.add_method("bound", "succeeded")
    view.say(subscription, "bound")

    assert service.run(JOB).ok

    assert service.charged() == {subscription: 1}
    [row] = service.rows("payments")
    assert row.payment_provider_id == service.provider_id
    service.check_books()


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([("card", False)], "the service says that it may not be charged (may_charge)"),
        ([("card", None)], "the service says that it may not be charged (may_charge)"),
        ([("card", True), ("card", False)], "the service says that it may not be charged (may_charge)"),
        ([("card", True), ("other", True)], "the service's view has 2 rows for it, which may contradict each other"),
        ([(None, True)], "the service's view has no payment method for it"),
        ([], "the service's view has no row for it"),
    ],
)
def test_without_consent_or_one_clear_row_nobody_is_charged(view: WithView, rows: list[Any], reason: str) -> None:
    service = view.service
    subscription = service.subscriber(method="card")
    for method, may_charge in rows:
        view.say(subscription, method, may_charge)

    run = service.run(JOB)

    assert run.ok
    assert service.charges() == []
    assert run.reasons(f"subscription {subscription}") == [f"leave: {reason}"]


def test_a_consent_that_is_withdrawn_after_the_reading_stops_the_charge(view: WithView) -> None:
    service = view.service
    # The first charge takes the second one's consent away, before the second is claimed.
    first, second = service.subscriber(method="card-1"), service.subscriber(method="card-2")
    view.say(first, "card-1")
    view.say(second, "card-2")
    service.meddle(
        "payments", "NEW.subscription_id IS NOT NULL", "UPDATE consents SET may_charge = false", event="INSERT"
    )

    run = service.run(JOB, ops={"charge_renewals": {"max_concurrency": 1}})

    assert service.charged() == {first: 1}
    [told] = run.reasons(f"subscription {second}")
    assert "the service says that it may not be charged" in told


def test_a_row_that_the_view_fails_for_stops_no_other_and_shows_no_contact(receipts: WithView) -> None:
    service = receipts.service
    subscriptions = [service.subscriber() for _ in range(5)]
    for subscription in subscriptions:
        receipts.say(subscription, f"method-{subscription}", email="anna@example.ru")
    poisoned = subscriptions[2]
    service.execute("DROP VIEW billing_renewals")
    service.execute(f"""
        CREATE VIEW billing_renewals AS SELECT subscription_id, payment_method_id, email, phone,
            CASE WHEN subscription_id = {poisoned} THEN email::integer > 0 ELSE may_charge END AS may_charge
        FROM consents
    """)

    run = service.run(JOB)

    assert not run.ok
    assert set(service.charged()) == {*subscriptions} - {poisoned}
    [told] = run.reasons(f"subscription {poisoned}")
    assert told.startswith("leave: the service's view cannot be read for it")
    assert "anna@" not in str(run.decisions) + run.failure

    service.execute("DROP VIEW billing_renewals")
    service.execute(f"CREATE VIEW billing_renewals AS SELECT {ALL} FROM consents")
    assert service.run(JOB).ok
    assert set(service.charged()) == {*subscriptions}


def test_an_unanswered_charge_is_not_sent_again_once_consent_is_withdrawn(view: WithView) -> None:
    service = view.service
    subscription = service.subscriber(method="card")
    view.say(subscription, "card")
    service.sandbox.misbehave("create", "error_before")
    service.run(JOB, ops={"charge_renewals": {"max_sends": 1}})
    service.execute("UPDATE consents SET may_charge = false")
    service.advance(minutes=10)

    service.run(JOB)

    assert service.charges() == []


def test_contacts_come_from_the_view_and_phones_become_digits(receipts: WithView) -> None:
    service = receipts.service
    by_email, by_phone, nobody = service.subscriber(), service.subscriber(), service.subscriber()
    receipts.say(by_email, f"method-{by_email}", email="anna@example.ru")
    receipts.say(by_phone, f"method-{by_phone}", phone="+7 (900) 123-45-67")
    receipts.say(nobody, f"method-{nobody}")

    run = service.run(JOB)

    assert service.charged() == {by_email: 1, by_phone: 1}
    customers = [service.provider.payment(charge.payment_id).receipt["customer"] for charge in service.charges()]  # type: ignore[index]
    assert customers == [{"email": "anna@example.ru"}, {"phone": "79001234567"}]
    shown = [str(run.decisions), *(str(row) for name in ("quarantine", "audit_trail") for row in service.rows(name))]
    assert not [text for text in shown if "anna@" in text or "1234567" in text]


@pytest.mark.parametrize("column", ["may_charge", "payment_method_id", "email"])
@pytest.mark.parametrize("shards", [None, 2])
def test_a_view_without_a_column_is_refused_before_anything_is_read(
    view: WithView, column: str, shards: int | None
) -> None:
    service = view.service
    view.say(service.subscriber(method="card"), "card")
    service.execute("DROP VIEW billing_renewals")
    kept = ", ".join(name for name in ALL.split(", ") if name != column)
    service.execute(f"CREATE VIEW billing_renewals AS SELECT {kept} FROM consents")

    run = service.run(JOB, shards=shards)

    assert not run.ok
    assert f"the view billing_renewals lacks {column}" in str(run.failure)
    assert service.sandbox.requests == []


def test_a_hard_decline_blocks_the_method_for_every_subscription_until_another_comes(view: WithView) -> None:
    service = view.service
    service.provider.add_method("card", Outcome("canceled", reason="card_expired", party="payment_network"))
    first = service.subscription(plan_id=service.monthly)
    view.say(first, "card")
    service.run(JOB)
    assert [attempt.state for attempt in service.attempts(first)] == ["STOPPED"]
    service.advance(days=2)
    second = service.subscription(plan_id=service.monthly, ended_at=service.now)
    view.say(second, "card")

    run = service.run(JOB)

    assert service.attempts(second) == []
    [told] = run.reasons(f"subscription {second}")
    assert told.startswith("leave: this payment method was stopped by a hard decline on 2026-03-12")

    service.provider.add_method("new-card", "succeeded")
    service.execute("UPDATE consents SET payment_method_id = 'new-card' WHERE subscription_id = :id", id=second)
    assert service.run(JOB).ok
    assert service.charged() == {second: 1}
