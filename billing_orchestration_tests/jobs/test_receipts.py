"""Receipts at a shop that demands them: who is charged, who waits for a contact, and what nobody may read."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from billing_orchestration_tests.books import NOON
from billing_orchestration_tests.jobs.service import Service

JOB = "autopayment_job"
WITH_PAYMENT: dict[str, Any] = {
    "receipts": "with_payment",
    "receipt_vat_code": 11,
    "receipt_payment_mode": "full_payment",
}
FALLBACK = {**WITH_PAYMENT, "receipt_fallback_email": "receipts@example.ru"}


@pytest.fixture
def shop(service_with: Callable[..., Service]) -> Service:
    """A shop that demands receipts, and has an address of its own for them."""
    service = service_with(**FALLBACK)
    service.provider.switches.receipts = "demanded"
    return service


def test_a_shop_that_demands_receipts_charges_with_one(shop: Service) -> None:
    subscription = shop.subscriber()

    assert shop.run(JOB).ok

    [charge] = shop.charges()
    assert charge.amount == 299
    assert "receipts@example.ru" in shop.attempts(subscription)[0].body
    receipt = shop.provider.payment(charge.payment_id).receipt
    assert receipt is not None
    assert receipt["customer"] == {"email": "receipts@example.ru"}
    assert [(item["amount"]["value"], item["vat_code"]) for item in receipt["items"]] == [("299.00", 11)]
    shop.check_books()


def test_a_pending_under_receipt_first_is_asked_about_like_any_other(shop: Service) -> None:
    shop.provider.switches.receipts, shop.provider.switches.registration = "receipt_first", "pending"
    subscription = shop.subscriber()
    shop.run(JOB)
    [attempt] = shop.attempts(subscription)
    assert attempt.state == "PENDING"
    assert shop.charges() == []

    shop.provider.register_receipt(attempt.external_payment_id)
    assert shop.run(JOB).ok

    assert shop.attempts(subscription)[0].state == "SUCCEEDED"
    assert shop.charged() == {subscription: 1}
    shop.check_books()


def test_without_a_contact_nobody_is_charged_and_one_person_is_told_once(service_with: Callable[..., Service]) -> None:
    service = service_with(**WITH_PAYMENT)
    subscription = service.subscriber()

    first, second = service.run(JOB), service.run(JOB)

    assert first.ok
    assert service.charges() == []
    assert first.reasons(f"subscription {subscription}") == [
        "leave: no email and no phone that its receipt can be sent to"
    ]
    assert (first.report["newly quarantined"], second.report["newly quarantined"]) == (1, 0)
    [entry] = service.rows("quarantine")
    assert (entry.kind, entry.subscription_id, entry.resolved_at) == ("no_contact", subscription, None)


def test_one_that_waits_for_a_contact_is_held_back_from_expiry_until_it_is_charged(
    service_with: Callable[..., Service],
) -> None:
    service = service_with(**WITH_PAYMENT)
    subscription = service.subscriber(ended_at=NOON - timedelta(days=3, hours=13))
    service.run(JOB)

    service.run("expire_subscriptions_job")
    assert service.status("subscriptions", subscription) == "ACTIVE"

    service.settings = service.settings.model_copy(update={"receipt_fallback_email": "receipts@example.ru"})
    assert service.run(JOB).ok
    assert service.charged() == {subscription: 1}
    [entry] = service.rows("quarantine")
    assert (entry.resolution, entry.resolved_by) == ("mended", JOB)


def test_one_that_a_person_gave_up_expires(service_with: Callable[..., Service]) -> None:
    service = service_with(**WITH_PAYMENT)
    subscription = service.subscriber(ended_at=NOON - timedelta(days=3, hours=13))
    service.run(JOB)
    service.execute("UPDATE billing_orchestration.quarantine SET resolved_at = now(), resolution = 'ignored'")

    service.run("expire_subscriptions_job")

    assert service.status("subscriptions", subscription) == "EXPIRED"


def test_a_canceled_registration_is_a_persons_and_the_grant_stands(shop: Service) -> None:
    subscription = shop.subscriber()
    shop.provider.switches.registration = "pending"
    shop.run(JOB)
    [charge] = shop.charges()
    end = shop.ended_at(subscription)
    shop.advance(minutes=2)
    shop.provider.cancel_receipt(charge.payment_id)

    told = [shop.run("matching_successful_payments_job") for _ in range(2)]

    assert [run.report["newly quarantined"] for run in told] == [1, 0]
    [entry] = shop.rows("quarantine")
    assert (entry.kind, entry.external_payment_id) == ("receipt", charge.payment_id)
    assert shop.ended_at(subscription) == end
    shop.check_books()


def test_a_registration_that_is_canceled_late_is_found_by_the_days_reconciliation(shop: Service) -> None:
    subscription = shop.subscriber()
    shop.provider.switches.registration = "pending"
    shop.run(JOB)
    [charge] = shop.charges()
    end = shop.ended_at(subscription)
    shop.advance(hours=18)
    shop.provider.cancel_receipt(charge.payment_id)
    assert shop.run("matching_successful_payments_job").ok
    assert shop.rows("quarantine") == []

    preview = shop.run("reconciliation_job", dry_run=True)
    assert preview.report["quarantined"] == 1
    assert shop.rows("quarantine") == []
    told = [shop.run("reconciliation_job") for _ in range(2)]

    assert [(run.ok, run.report["newly quarantined"]) for run in told] == [(True, 1), (True, 0)]
    [entry] = shop.rows("quarantine")
    assert (entry.kind, entry.external_payment_id) == ("receipt", charge.payment_id)
    assert shop.ended_at(subscription) == end
    shop.check_books()


def test_a_refused_receipt_shows_its_contact_nowhere(shop: Service) -> None:
    subscription = shop.subscriber()
    # Refused as this customer's, and the sandbox repeats the address.
    shop.settings = shop.settings.model_copy(update={"receipt_fallback_email": "receipts@example..ru"})

    run = shop.run(JOB)

    assert shop.charges() == []
    shown = [
        *map(str, run.decisions),
        str(run.failure),
        *(str(row) for table in ("quarantine", "audit_trail") for row in shop.rows(table)),
        *(str(attempt.last_error) for attempt in shop.attempts(subscription)),
    ]
    assert not [text for text in shown if "receipts@example.ru" in text]
    [entry] = shop.rows("quarantine")
    assert "r…@e….ru" in str(entry.evidence)


@pytest.mark.parametrize(
    ("settings", "description"),
    [
        ({}, "Подписка «Pro»: продление с 2026-03-12"),
        ({"billing_language": "en"}, "Subscription 1: renewal from 2026-03-12"),
        ({"charge_description": "{plan} from {period_start} ({subscription_id})"}, "Pro from 2026-03-12 (1)"),
        ({"charge_description": "Ж" * 200}, "Ж" * 128),
    ],
)
def test_the_payer_reads_what_the_shop_says(
    service_with: Callable[..., Service], settings: dict[str, str], description: str
) -> None:
    service = service_with(**settings)
    service.execute("UPDATE plans SET name = 'Pro' WHERE id = :id", id=service.monthly)
    subscription = service.subscriber()
    assert subscription == 1

    assert service.run(JOB).ok

    assert service.charged() == {subscription: 1}
    assert json.loads(service.attempts(subscription)[0].body)["description"] == description


def test_a_charge_goes_through_the_gateway_of_the_shop(service_with: Callable[..., Service]) -> None:
    service = service_with(yookassa_gateway_id="1234567")
    subscription = service.subscriber()

    assert service.run(JOB).ok

    assert service.charged() == {subscription: 1}
    [charge] = service.charges()
    assert service.provider.payment(charge.payment_id).gateway_id == "1234567"
