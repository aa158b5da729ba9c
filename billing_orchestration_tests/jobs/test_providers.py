"""Several payment providers in one database: every job keeps to this shop's."""

from __future__ import annotations

from datetime import timedelta

import pytest

from billing_orchestration.settings import Settings
from billing_orchestration_tests.books import NOON
from billing_orchestration_tests.jobs.service import Service

A_DAY = timedelta(days=1)
JOBS = (
    "autopayment_job",
    "expire_subscriptions_job",
    "expire_payments_job",
    "matching_pending_payments_job",
    "matching_successful_payments_job",
)


@pytest.fixture
def other(service: Service) -> int:
    """Another shop's row."""
    at = NOON.replace(tzinfo=None)
    return service.insert("payment_providers", name="another shop", is_active=True, created_at=at, updated_at=at)


def of_shop(service: Service, ids: str | None = None) -> Settings:
    return service.settings.model_copy(update={"yookassa_provider_ids": ids or str(service.provider_id)})


@pytest.mark.parametrize("job", JOBS)
def test_several_rows_are_refused_until_it_is_known_which_are_this_shop(service: Service, other: int, job: str) -> None:
    run = service.run(job)
    assert not run.ok
    assert "put those that are this shop into YOOKASSA_PROVIDER_IDS" in str(run.failure)
    assert service.run(job, load=lambda: of_shop(service)).ok
    wrong = service.run(job, load=lambda: of_shop(service, f"{service.provider_id},{other + 1}"))
    assert not wrong.ok
    assert f"YOOKASSA_PROVIDER_IDS names {other + 1}" in str(wrong.failure)


def test_a_pending_payment_of_another_provider_is_neither_asked_about_nor_expired(service: Service, other: int) -> None:
    theirs = service.payment("theirs", created_at=NOON - 30 * A_DAY, provider_id=other)
    ours = service.payment("ours", created_at=NOON - 30 * A_DAY)

    assert service.run("expire_payments_job", load=lambda: of_shop(service)).ok

    assert service.row("payments", theirs).status == "PENDING"
    assert service.row("payments", ours).status == "EXPIRED"


def test_a_method_of_another_provider_is_not_charged(service: Service, other: int) -> None:
    plan = service.plan()
    subscription = service.subscription("anna", plan_id=plan, ended_at=NOON)
    service.payment("theirs", status="SUCCEEDED", subscription_id=subscription, provider_id=other)

    run = service.run("autopayment_job", load=lambda: of_shop(service))

    assert run.ok, run.failure
    assert [row["code"] for row in run.decisions if row["subject"] == f"subscription {subscription}"] == [
        "method_elsewhere"
    ]
    assert service.charges() == []


def test_a_payment_whose_row_is_another_providers_is_before_a_person(service: Service, other: int) -> None:
    service.paid_there("odd", plan_id=service.plan())
    row = service.payment("odd", provider_id=other)

    assert service.run("matching_successful_payments_job", load=lambda: of_shop(service)).ok

    assert service.row("payments", row).status == "PENDING"
    assert service.quarantined("odd") == ["metadata"]
