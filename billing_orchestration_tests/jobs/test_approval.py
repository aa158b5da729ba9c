"""Dry run as a preview: the second run is bound to the plan that was shown, and refuses what changed since."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import dagster as dg
import pytest
import yaml

from billing_orchestration.definitions import build_definitions
from billing_orchestration_tests.books import NOON
from billing_orchestration_tests.jobs.service import Run, Service

JOBS = [
    "autopayment_job",
    "expire_payments_job",
    "expire_subscriptions_job",
    "matching_pending_payments_job",
    "matching_successful_payments_job",
    "reconciliation_job",
]


def a_change_for_every_job(service: Service) -> None:
    """One thing to do for each job."""
    service.subscriber()
    plan = service.plan()
    service.subscription(plan_id=plan, ended_at=NOON - timedelta(days=40))
    service.payment(None, created_at=NOON - timedelta(days=9))
    service.payment("paid-pending", created_at=NOON - timedelta(minutes=30))
    service.paid_there("paid-pending", user="boris", plan_id=plan)
    service.paid_there("paid-orphan", user="anna", plan_id=plan)
    service.paid_there("paid-yesterday", user="vera", plan_id=plan, created_at=NOON - timedelta(days=1))


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


def test_the_link_of_the_preview_opens_the_launchpad_that_applies_it(service: Service) -> None:
    service.subscriber()
    run = service.run("autopayment_job", dry_run=True, ops={"fetch_due_subscriptions": {"max_overdue_days": 9}})

    shown: dict[str, Any] = {}
    for entry in service.instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ASSET_OBSERVATION):
        assert entry.dagster_event is not None
        shown = dict(entry.dagster_event.asset_observation_data.asset_observation.metadata)

    [link] = re.findall(r"\]\((.*)\)", shown["to approve it"].value)
    config = yaml.safe_load(parse_qs(urlsplit(link).query)["config"][0])
    assert config["resources"]["run"]["config"] == {
        "as_of": NOON.isoformat(),
        "approved_plan": plan_of(run, service),
    }
    assert config["ops"]["fetch_due_subscriptions"]["config"] == {"max_overdue_days": 9}
    definitions = build_definitions(
        load=lambda: service.settings,
        now=service.host_now,
        steady_s=service.steady_s,
        database_now=service.database_now,
        connect=service.connect_provider,
    )
    job = definitions.get_job_def("autopayment_job")
    assert job.execute_in_process(instance=service.instance, run_config=config).success
    assert len(service.charges()) == 1


@pytest.mark.parametrize(
    ("given", "label", "wanted"),
    [
        ({"max_changes": 0}, "next: look at a dry run", {"dry_run": True}),
        ({"approved_plan": "0123456789abcdef", "as_of": NOON}, "next: look at a dry run",
         {"as_of": NOON.isoformat(), "dry_run": True}),
        ({"as_of": "yesterday"}, "next: launch it again", {"as_of": "yesterday"}),
    ],
    ids=["too many changes", "another plan", "a run that was refused"],
)  # fmt: skip
def test_a_red_run_links_to_its_next_step(
    service: Service, given: dict[str, Any], label: str, wanted: dict[str, Any]
) -> None:
    service.subscriber()
    run = service.run("autopayment_job", **given)
    assert not run.ok
    assert [name for name in run.report if name.startswith("next: ")] == [label]
    assert run.report["runbook"] == "/docs/operations.md#autopayment_job"
    assert _run_options(run.report[label]) == wanted


def test_a_red_tick_launched_again_stands_for_its_day_and_not_for_the_tick(service: Service) -> None:
    service.provider.secret_key = "test_another"
    for job, day in (("autopayment_job", "2026-03-12"), ("matching_pending_payments_job", "2026-03-12-11:00")):
        service.subscriber()
        run = service.tick(job, partition=day)
        assert not run.ok
        link = run.report["next: launch it again"]
        assert _run_options(link) == {}
        is_daily = job == "autopayment_job"
        assert parse_qs(urlsplit(link).query).get("tags[0][value]", []) == ([day] if is_daily else [])


def _run_options(link: str) -> dict[str, Any]:
    config = yaml.safe_load(parse_qs(urlsplit(link).query).get("config", ["{}"])[0])
    return dict(config.get("resources", {}).get("run", {}).get("config", {}))
