"""What is frozen in an attempt besides its key and body: the shop that it is charged by, and the period it pays for."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from pydantic import SecretStr

from billing_orchestration_tests.books import UTC, naive
from billing_orchestration_tests.jobs.service import Service

JOB = "autopayment_job"


def move_to_another_shop(service: Service) -> None:
    """The service's contract changes: another shop id and key from now on."""
    service.sandbox.add_shop("100501", "test_of_another_shop")
    secret = SecretStr("test_of_another_shop")
    service.settings = service.settings.model_copy(update={"yookassa_shop_id": "100501", "yookassa_secret_key": secret})


@pytest.mark.parametrize("hours", [1, 24, 30], ids=["within the key's life", "past it", "long past it"])
def test_a_charge_whose_answer_the_old_shop_owes_is_not_made_again_by_the_new_one(service: Service, hours: int) -> None:
    subscription = service.subscriber()
    service.sandbox.misbehave("create", "reset_after", times=None)
    assert not service.run(JOB, ops={"charge_renewals": {"max_sends": 1}}).ok
    service.sandbox.behave()
    ours = service.settings
    move_to_another_shop(service)

    runs = []
    for wait in (hours, 2, 24):
        service.advance(hours=wait)
        runs.append(service.run(JOB))

    assert [run.ok for run in runs] == [False] * 3
    assert "left to shop 100500" in runs[0].failure
    [attempt] = service.attempts(subscription)
    assert (attempt.state, attempt.sends, attempt.first_absent_at) == ("UNKNOWN", 1, None)
    # As it says: one run with the old shop's settings finds it.
    service.settings = ours
    assert service.run(JOB).ok
    assert [attempt.state for attempt in service.attempts(subscription)] == ["SUCCEEDED"]
    service.check_books()


def test_a_year_that_was_paid_is_granted_although_the_plan_is_monthly_by_now(service: Service) -> None:
    plan = service.plan(duration=1, unit="year")
    subscription = service.subscriber(plan, ended_at=datetime(2026, 3, 12, 9, tzinfo=UTC))
    service.sandbox.misbehave("create", "reset_after", times=None)
    assert not service.run(JOB, ops={"charge_renewals": {"max_sends": 1}}).ok
    service.sandbox.behave()
    service.execute("UPDATE plans SET duration_unit = 'month' WHERE id = :id", id=plan)
    service.advance(minutes=10)

    assert service.run("matching_successful_payments_job").ok

    assert service.ended_at(subscription) == datetime(2027, 3, 12, 9, tzinfo=UTC)
    service.check_books()


def test_a_paid_renewal_whose_end_was_moved_back_waits_for_a_person_and_is_not_charged_for_again(
    service: Service,
) -> None:
    subscription = service.subscriber()
    service.sandbox.misbehave("create", "cut_after", times=None)
    service.run(JOB)
    service.sandbox.behave()
    moved = service.ended_at(subscription) - timedelta(days=20)
    service.execute("UPDATE subscriptions SET ended_at = :end", end=naive(moved))

    for days in (1, 1, 7, 1, 19):
        service.advance(days=days)
        service.run(JOB)

    assert service.charged() == {subscription: 1}
    assert service.ended_at(subscription) == moved
    [entry] = service.rows("quarantine")
    assert (entry.kind, entry.resolved_at) == ("unclear_grant", None)
    service.run("expire_subscriptions_job")
    assert service.row("subscriptions", subscription).status == "ACTIVE"
