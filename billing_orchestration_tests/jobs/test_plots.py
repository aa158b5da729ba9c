"""What is plotted: above all the numbers of the red runs."""

from __future__ import annotations

from datetime import timedelta

import pytest
import sqlalchemy as sa

from billing_orchestration_tests.jobs.service import Service


@pytest.mark.parametrize(("shards", "op"), [
    (None, "charge_renewals"),
    (2, "renew_shard"),
], ids=["whole", "divided"])  # fmt: skip
def test_the_numbers_of_a_red_renewal_run_are_plotted(service: Service, shards: int | None, op: str) -> None:
    lost, _ = service.subscriber(), service.subscriber()
    service.sandbox.misbehave("create", "error_after", payment_method_id=f"method-{lost}", times=None)

    run = service.run("autopayment_job", ops={op: {"max_sends": 1}}, shards=shards)

    assert not run.ok
    numbers = run.materialized.get("autopayment", {})
    assert (numbers.get("charged"), numbers.get("unknown")) == (1, 1)


@pytest.mark.parametrize("job", ["matching_pending_payments_job", "matching_successful_payments_job"])
def test_the_numbers_of_a_red_matching_run_are_plotted(service: Service, engine: sa.Engine, job: str) -> None:
    plan = service.plan()
    created_at = service.now - timedelta(minutes=20)
    for name in ("locked", "paid"):
        service.paid_there(name, user=name, plan_id=plan, created_at=created_at)
        service.payment(name, created_at=created_at)
    with engine.connect() as service_session:
        service_session.execute(sa.text("SELECT FROM payments WHERE external_payment_id = 'locked' FOR UPDATE"))

        run = service.run(job, load=service.impatient)

        service_session.rollback()

    assert not run.ok
    assert run.materialized == {job.removesuffix("_job"): {"corrections": 1, "quarantined": 0, "to retry": 1}}


def test_the_numbers_of_a_red_expiry_of_payments_are_plotted(service: Service) -> None:
    long_ago = service.now - timedelta(days=8)
    for name in ("silent", "unpaid"):
        service.paid_there(name, status="canceled", created_at=long_ago)
        service.payment(name, created_at=long_ago)
    service.sandbox.misbehave("get", "error_before", payment_id="silent", times=None)

    run = service.run("expire_payments_job")

    assert not run.ok
    assert run.materialized.get("expire_payments", {}).get("expired") == 1


def test_the_numbers_of_a_red_expiry_of_subscriptions_are_plotted(service: Service) -> None:
    plan = service.plan()
    locked, _ = (service.subscription(plan_id=plan, ended_at=service.now - timedelta(days=9)) for _ in range(2))
    with service.locking("subscriptions", locked):
        run = service.run("expire_subscriptions_job", load=service.impatient)

    assert not run.ok
    assert run.materialized.get("expire_subscriptions", {}).get("expired") == 1
