"""autopayment_job, whole: who is charged, what a success writes, what a decline means, and what never happens twice."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from billing_orchestration_tests.jobs.service import NOON, Service

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
