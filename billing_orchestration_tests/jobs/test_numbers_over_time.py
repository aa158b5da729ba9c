"""What Dagster plots: a day's point tells of all runs of that day, whichever of them came last."""

from __future__ import annotations

from datetime import timedelta

import dagster as dg

from billing_orchestration.definitions import build_definitions
from billing_orchestration_tests.books import NOON
from billing_orchestration_tests.jobs.service import Service

AUTOPAYMENT = "autopayment_job"
EXPIRY = "expire_subscriptions_job"


def test_a_later_run_of_a_day_adds_to_what_the_first_has_charged(service: Service) -> None:
    plan = service.plan()
    service.subscriber(plan, ended_at=NOON, user="anna", method="card-1")
    service.subscriber(plan, ended_at=NOON, user="poor", method="card-2", script="canceled:insufficient_funds")
    first = service.run(AUTOPAYMENT).materialized[AUTOPAYMENT.removesuffix("_job")]
    assert (first["charged"], first["charged, RUB"], first["declines: soft"]) == (1, 299.0, 1)

    again = service.run(AUTOPAYMENT).materialized[AUTOPAYMENT.removesuffix("_job")]
    assert again == first

    service.subscriber(plan, ended_at=NOON, user="bob", method="card-3")
    third = service.run(AUTOPAYMENT).materialized[AUTOPAYMENT.removesuffix("_job")]
    assert (third["charged"], third["charged, RUB"], third["declines: soft"]) == (2, 598.0, 1)


def test_the_next_day_begins_at_nothing(service: Service) -> None:
    service.subscriber(service.plan(), ended_at=NOON, user="anna", method="card-1")
    service.run(AUTOPAYMENT)
    service.advance(days=1)

    assert service.run(AUTOPAYMENT).materialized[AUTOPAYMENT.removesuffix("_job")]["charged"] == 0


def test_what_is_no_count_is_not_added_up(service: Service) -> None:
    plan = service.plan()
    for days in (10, 11):
        service.subscription(plan_id=plan, ended_at=NOON - timedelta(days=days))
    service.subscription(plan_id=plan, ended_at=NOON + timedelta(days=10))
    assert service.run(EXPIRY).materialized[EXPIRY.removesuffix("_job")] == {"expired": 2, "held back": 0, "active": 1}

    assert service.run(EXPIRY).materialized[EXPIRY.removesuffix("_job")] == {"expired": 2, "held back": 0, "active": 1}


def test_everything_that_a_run_plots_or_links_to_is_an_asset_with_a_description(service: Service) -> None:
    assets = build_definitions(load=lambda: service.settings).get_repository_def().asset_graph
    described = {key.path[-1]: assets.get(key).description for key in assets.get_all_asset_keys()}
    service.subscriber(service.plan(), ended_at=NOON, user="anna", method="card-1")
    dry = service.run(AUTOPAYMENT, dry_run=True)
    observed = service.instance.all_logs(dry.run_id, of_type=dg.DagsterEventType.ASSET_OBSERVATION)
    seen = {entry.dagster_event.asset_key.path[-1] for entry in observed if entry.dagster_event.asset_key}  # type: ignore[union-attr]
    seen |= set(service.run(AUTOPAYMENT).materialized)

    assert seen == {"plans", "autopayment"}
    for name in (*seen, "money", "quarantine"):
        assert described[name]
