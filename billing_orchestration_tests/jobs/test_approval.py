"""Dry run as a preview: the second run is bound to the plan that was shown, and refuses what changed since."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import dagster as dg
import pytest

from billing_orchestration_tests.books import NOON
from billing_orchestration_tests.jobs.service import Run, Service

JOBS = [
    "autopayment_job",
    "expire_payments_job",
    "expire_subscriptions_job",
    "matching_pending_payments_job",
    "matching_successful_payments_job",
]


def a_change_for_every_job(service: Service) -> None:
    """One thing to do for each of the five jobs."""
    service.subscriber()
    plan = service.plan()
    service.subscription(plan_id=plan, ended_at=NOON - timedelta(days=40))
    service.payment(None, created_at=NOON - timedelta(days=9))
    service.payment("paid-pending", created_at=NOON - timedelta(minutes=30))
    service.paid_there("paid-pending", user="boris", plan_id=plan)
    service.paid_there("paid-orphan", user="anna", plan_id=plan)


def plan_of(run: Run, service: Service) -> str:
    """The hash that a dry run has shown."""
    record = service.instance.get_run_by_id(run.run_id)
    assert record is not None
    return str(record.tags["billing/plan"])


@pytest.mark.parametrize("job", JOBS)
def test_an_approved_plan_is_applied_as_it_was_shown(service: Service, job: str) -> None:
    a_change_for_every_job(service)
    preview = service.run(job, dry_run=True)
    before = service.snapshot()

    run = service.run(job, as_of=NOON, approved_plan=plan_of(preview, service))

    assert run.ok, run.failure
    assert run.report["applied"] >= 1
    assert service.snapshot() != before
    service.check_books()


def test_what_changed_since_the_preview_is_refused_and_the_rest_is_applied(service: Service) -> None:
    kept, changed = service.subscriber(), service.subscriber(service.plan())
    preview = service.run("autopayment_job", dry_run=True)
    service.execute(
        "UPDATE prices SET amount = 399 WHERE plan_id = (SELECT plan_id FROM subscriptions WHERE id = :id)", id=changed
    )
    late = service.subscriber()

    run = service.run("autopayment_job", as_of=NOON, approved_plan=plan_of(preview, service))

    assert run.ok, run.failure
    assert [charge.metadata["subscription_id"] for charge in service.charges()] == [str(kept)]
    for subscription in (changed, late):
        assert run.reasons(f"subscription {subscription}") == [
            "refuse: not in the approved plan, changed since: ends today"
        ]


def test_a_plan_that_differs_is_refused_as_a_whole_when_the_preview_is_not_in_the_history(service: Service) -> None:
    service.subscriber()

    run = service.run("autopayment_job", as_of=NOON, approved_plan="0123456789abcdef")

    assert not run.ok
    assert "stopped before anything was applied: the plan is now" in run.failure
    assert service.charges() == []


def test_an_approved_expiry_of_subscriptions_holds_for_exactly_the_set_that_was_shown(service: Service) -> None:
    plan = service.plan()
    for _ in range(2):
        service.subscription(plan_id=plan, ended_at=NOON - timedelta(days=40))
    preview = service.run("expire_subscriptions_job", dry_run=True)
    service.subscription(plan_id=plan, ended_at=NOON - timedelta(days=41))

    run = service.run("expire_subscriptions_job", as_of=NOON, approved_plan=plan_of(preview, service))

    assert not run.ok
    assert "no longer those of the approved plan" in run.failure
    assert service.rows("subscriptions", "status = 'EXPIRED'") == []


def test_the_preview_tells_how_to_approve_it(service: Service) -> None:
    service.subscriber()
    run = service.run("autopayment_job", dry_run=True)

    shown: dict[str, Any] = {}
    for entry in service.instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ASSET_OBSERVATION):
        assert entry.dagster_event is not None
        shown = dict(entry.dagster_event.asset_observation_data.asset_observation.metadata)

    assert f'approved_plan: "{plan_of(run, service)}"' in shown["to approve it"].value
    assert f'as_of: "{NOON.isoformat()}"' in shown["to approve it"].value
