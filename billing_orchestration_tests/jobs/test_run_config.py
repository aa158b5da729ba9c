"""The run config that all five jobs share, and their partitions: what a run stands for, and what it may change."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from billing_orchestration.definitions import build_definitions
from billing_orchestration.jobs.run_failures import failure_of
from billing_orchestration.resources import RunSettings
from billing_orchestration_tests.books import NOON, stored
from billing_orchestration_tests.jobs.service import Service

UTC = timezone.utc
DAILY_JOBS = ("autopayment_job", "expire_payments_job", "expire_subscriptions_job", "reconciliation_job")
MATCHING_JOBS = ("matching_pending_payments_job", "matching_successful_payments_job")
ALL_JOBS = (*DAILY_JOBS, *MATCHING_JOBS)
RUN_CONFIGS = Path(__file__).parents[2] / "run_configs"


def with_work_for(service: Service, job: str) -> None:
    """Three things that the job would change."""
    plan = service.plan("299.00")
    for number in range(3):
        match job:
            case "autopayment_job":
                service.subscriber(plan)
            case "expire_subscriptions_job":
                service.subscription(plan_id=plan, ended_at=service.now - timedelta(days=30 + number))
            case "expire_payments_job":
                # One without an id, one that is not found, one that is paid.
                external_id = (None, "not found", "paid")[number]
                if external_id == "paid":
                    service.paid_there("paid", plan_id=plan, created_at=service.now - timedelta(days=8))
                service.payment(external_id, created_at=service.now - timedelta(days=8))
            case "matching_pending_payments_job":
                name = service.paid_there(user=f"user-{number}", plan_id=plan)
                service.payment(name, created_at=service.now - timedelta(minutes=20))
            case "reconciliation_job":
                service.paid_there(user=f"user-{number}", plan_id=plan, created_at=service.now - timedelta(days=1))
            case _:
                service.paid_there(user=f"user-{number}", plan_id=plan)


def everything(service: Service) -> dict[str, Any]:
    """Both sides' books, with the watermarks."""
    return {
        **service.snapshot(),
        "watermarks": service.rows("watermarks"),
        "ledger": service.provider.ledger(),
        "payments there": [payment.document() for payment in service.provider.payments()],
    }


# --- dry_run


@pytest.mark.parametrize("job", ALL_JOBS)
def test_a_dry_run_shows_what_the_run_would_do_and_writes_nothing_anywhere(service: Service, job: str) -> None:
    with_work_for(service, job)
    before = everything(service)

    dry = service.run(job, dry_run=True)

    assert dry.ok, dry.failure
    assert everything(service) == before
    assert dry.materialized == {}
    assert service.sandbox.count("create") == 0
    assert dry.report["result"].startswith("dry run: would change ")
    assert dry.report["applied"] == 3
    # The same subjects as the run that follows. (A charge is called by its outcome then.)
    real = service.run(job)
    assert real.ok, real.failure
    assert sorted(row["subject"] for row in dry.decisions) == sorted(row["subject"] for row in real.decisions)
    if job != "autopayment_job":
        assert sorted(row["action"] for row in dry.decisions) == sorted(row["action"] for row in real.decisions)
    assert real.report["applied"] == 3


@pytest.mark.parametrize("job", MATCHING_JOBS)
def test_a_dry_run_shows_what_would_go_to_a_person_and_alerts_nobody(service: Service, job: str) -> None:
    service.paid_there("odd", metadata={})
    service.payment("odd", created_at=NOON)
    service.paid_there("nulls", override={"amount": None})

    run = service.run(job, dry_run=True)

    assert run.ok, run.failure
    assert {row["subject"]: row["action"] for row in run.decisions} == {
        "payment odd": "quarantine", "payment nulls": "quarantine",
    }  # fmt: skip
    assert service.rows("quarantine") == []


def test_a_dry_run_that_gets_no_answer_does_not_claim_to_have_applied_anything(service: Service) -> None:
    service.paid_there("silent", status="canceled", created_at=NOON - timedelta(days=8))
    service.payment("silent", created_at=NOON - timedelta(days=8))
    service.sandbox.misbehave("get", "error_before", times=None)

    run = service.run("expire_payments_job", dry_run=True)

    assert not run.ok
    assert "1 must be retried" in run.failure
    assert "applied" not in run.failure


# --- max_changes


@pytest.mark.parametrize("job", ALL_JOBS)
def test_a_run_that_would_change_more_than_max_changes_stops_before_applying_and_says_how_to_go_on(
    service: Service, job: str
) -> None:
    with_work_for(service, job)
    before = everything(service)

    stopped = service.run(job, max_changes=2)

    assert not stopped.ok
    assert "stopped before anything was applied: it would make 3 changes, max_changes is 2" in stopped.failure
    assert "launch it again with max_changes: 3" in stopped.failure
    assert len(stopped.decisions) == 3
    assert stopped.materialized == {}
    assert service.sandbox.count("create") == 0
    assert everything(service) == before
    assert service.run(job, max_changes=3).report["applied"] == 3


@pytest.mark.parametrize("job", ALL_JOBS)
def test_max_changes_0_lets_a_run_without_changes_pass(service: Service, job: str) -> None:
    run = service.run(job, max_changes=0)

    assert run.ok, run.failure


# --- What is refused before anything is read


def nowhere(service: Service) -> Callable[[], Any]:
    """Settings with a database that would fail the run at the first read."""
    settings = service.settings.model_copy(
        update={"billing_database_url": "postgresql+psycopg://nobody@127.0.0.1:1/nothing"}
    )
    return lambda: settings


@pytest.mark.parametrize("job", ALL_JOBS)
def test_an_as_of_that_is_naive_or_in_the_future_is_refused_before_any_read(service: Service, job: str) -> None:
    for as_of in ("2026-03-12T03:00:00", "2026-03-12T12:00:01Z"):
        run = service.run(job, as_of=as_of, load=nowhere(service))
        assert not run.ok
        assert run.failure.startswith("as_of"), run.failure
        assert run.failure.endswith("Nothing was read or written"), run.failure
    assert service.sandbox.count() == 0


@pytest.mark.parametrize("job", ALL_JOBS)
def test_a_negative_max_changes_is_refused_before_any_read(service: Service, job: str) -> None:
    run = service.run(job, max_changes=-1, load=nowhere(service))

    assert not run.ok
    assert run.failure == "max_changes is -1; it must be 0 or more. Nothing was read or written"
    assert service.sandbox.count() == 0


@pytest.mark.parametrize("job", ALL_JOBS)
@pytest.mark.parametrize("config", [{"as-of": "2026-03-12T03:00:00Z"}, {"dry_run": "maybe"}, {"max_changes": "ten"}])
def test_a_field_that_is_misspelt_or_of_another_type_is_refused_before_the_run_starts(
    job: str, config: dict[str, Any]
) -> None:
    definition = build_definitions().get_job_def(job)

    with pytest.raises(dg.DagsterInvalidConfigError):
        dg.validate_run_config(definition, {"resources": {"run": {"config": config}}})


# --- as_of


def test_an_as_of_with_an_offset_is_that_instant(service: Service) -> None:
    subscription = service.subscription(plan_id=None, ended_at=datetime(2026, 3, 7, 23, 59, tzinfo=UTC))

    # In UTC it is still 10 March: three days before is the 7th.
    run = service.run("expire_subscriptions_job", as_of="2026-03-11T02:00:00+03:00")

    assert run.ok, run.failure
    assert run.report["as_of"] == "2026-03-10T23:00:00+00:00 (from config)"
    assert service.row("subscriptions", subscription).status == "EXPIRED"


def test_an_empty_as_of_as_the_launchpad_sends_it_is_none(service: Service) -> None:
    run = service.run("expire_subscriptions_job", as_of="")

    assert run.ok, run.failure
    assert run.report["as_of"] == "2026-03-12T12:00:00+00:00 (from now)"


# --- Partitions


def test_the_partition_of_a_day_stands_for_its_last_instant(service: Service) -> None:
    on_the_second = service.subscription(plan_id=None, ended_at=datetime(2026, 3, 2, 23, 59, tzinfo=UTC))
    on_the_third = service.subscription(plan_id=None, ended_at=datetime(2026, 3, 3, 0, 0, tzinfo=UTC))

    run = service.run("expire_subscriptions_job", partition="2026-03-05")

    assert run.ok, run.failure
    assert run.report["as_of"] == "2026-03-05T23:59:59.999999+00:00 (from partition)"
    assert service.row("subscriptions", on_the_second).status == "EXPIRED"
    assert service.row("subscriptions", on_the_third).status == "ACTIVE"


@pytest.mark.parametrize("job", MATCHING_JOBS)
def test_the_partition_of_an_hour_covers_that_hour(service: Service, job: str) -> None:
    plan = service.plan()
    hour = datetime(2026, 3, 5, 10, 0, tzinfo=UTC)
    second = timedelta(seconds=1)
    for name, at in (
        ("before", hour - second),
        ("first", hour),
        ("last", hour + timedelta(hours=1) - second),
        ("after", hour + timedelta(hours=1) + second),
    ):
        service.paid_there(name, user=name, plan_id=plan, created_at=at)
        service.payment(name, created_at=at)

    run = service.run(job, partition="2026-03-05-10:00")

    assert run.ok, run.failure
    assert {row.user_id for row in service.rows("subscriptions")} == {"first", "last"}


def test_an_explicit_as_of_goes_before_the_partition(service: Service) -> None:
    run = service.run("expire_subscriptions_job", as_of="2026-03-11T04:00:00Z", partition="2026-03-05")

    assert run.ok, run.failure
    assert run.report["as_of"] == "2026-03-11T04:00:00+00:00 (from config)"


@pytest.mark.parametrize(
    ("job", "partition"),
    [
        ("expire_subscriptions_job", "2026-03-13"),
        ("expire_payments_job", "2027-01-01"),
        ("autopayment_job", "2026-03-13"),
        ("matching_pending_payments_job", "2026-03-12-13:00"),
        ("matching_successful_payments_job", "2026-03-13-00:00"),
    ],
)
def test_a_partition_of_the_future_is_refused_before_any_read(service: Service, job: str, partition: str) -> None:
    run = service.run(job, partition=partition, load=nowhere(service))

    assert not run.ok
    assert "in the future. Nothing was read or written" in run.failure
    assert service.sandbox.count() == 0


@pytest.mark.parametrize("partition", ["yesterday", "2026-02-30", "2026-3-5", "2026-03-05-10:00", "9999-12-31"])
def test_a_partition_that_is_none_of_the_jobs_keys_is_refused_before_any_read(service: Service, partition: str) -> None:
    run = service.run("expire_subscriptions_job", partition=partition, load=nowhere(service))

    assert not run.ok
    assert "Nothing was read or written" in run.failure
    assert partition in run.failure or "in the future" in run.failure


@pytest.mark.parametrize("partition", ["2026-03-05", "2026-03-05-10:30", "2026-03-05-10"])
def test_an_hour_that_is_not_whole_is_no_partition_of_a_matching_job(service: Service, partition: str) -> None:
    run = service.run("matching_pending_payments_job", partition=partition, load=nowhere(service))

    assert not run.ok
    assert f"the partition {partition!r} is not one of this job's keys" in run.failure


PAST = {
    "expire_subscriptions_job": "2026-03-10",
    "expire_payments_job": "2026-03-11",
    "autopayment_job": "2026-03-12",
    "reconciliation_job": "2026-03-11",
    "matching_pending_payments_job": "2026-03-12-11:00",
    "matching_successful_payments_job": "2026-03-12-11:00",
}


@pytest.mark.parametrize("job", ALL_JOBS)
def test_a_backfill_of_a_past_partition_changes_nothing_the_second_and_the_third_time(
    service: Service, job: str
) -> None:
    with_work_for(service, job)
    service.advance(minutes=1)
    first = service.run(job, partition=PAST[job])
    assert first.ok, first.failure
    assert first.report["applied"] == 3
    before = everything(service)

    for _ in range(2):
        again = service.run(job, partition=PAST[job])
        assert again.ok, again.failure
        assert again.report["applied"] == 0

    assert everything(service) == before


@pytest.mark.parametrize("job", ["expire_subscriptions_job", "expire_payments_job"])
def test_a_backfill_of_several_days_is_the_same_in_any_order(service: Service, job: str) -> None:
    for days in range(1, 20):
        service.subscription(plan_id=None, ended_at=NOON - timedelta(days=days))
        service.payment(None, created_at=NOON - timedelta(days=days))

    for day in ("2026-03-11", "2026-03-09", "2026-03-10", "2026-03-09"):
        assert service.run(job, partition=day).ok

    expired = service.rows("subscriptions", "status = 'EXPIRED'")
    assert len(expired) in (0, 16)
    if expired:
        assert max(row.ended_at for row in expired) == stored(2026, 3, 8, 12, 0)
    else:
        gone = service.rows("payments", "status = 'EXPIRED'")
        assert max(row.created_at for row in gone) == stored(2026, 3, 4, 12, 0)


# --- What the launchpad and the ready-made files offer


def test_every_field_of_the_run_config_is_optional_and_described() -> None:
    for name, field in RunSettings.model_fields.items():
        assert not field.is_required(), name
        assert field.description, name


def test_nothing_of_a_runs_data_goes_through_an_io_manager_which_could_write_it_to_a_disk() -> None:
    for job in build_definitions().resolve_all_job_defs():
        for node in job.nodes_in_topological_order if not job.name.startswith("__") else ():
            for output in node.definition.output_defs:
                assert output.dagster_type.is_nothing, node.name


@pytest.mark.parametrize(("job", "op"), [
    ("expire_payments_job", "apply_payment_expiry"),
    ("expire_subscriptions_job", "apply_subscription_expiry"),
    ("matching_pending_payments_job", "apply_pending_matches"),
    ("matching_successful_payments_job", "apply_successful_matches"),
    ("run_history_job", "delete_old_runs"),
])  # fmt: skip
def test_an_op_that_is_launched_without_those_before_it_says_so_and_changes_nothing(
    service: Service, job: str, op: str
) -> None:
    with_work_for(service, job)
    before = everything(service)
    definitions = build_definitions(
        load=lambda: service.settings,
        now=service.host_now,
        database_now=service.database_now,
        steady_s=service.steady_s,
    )
    definition = definitions.get_job_def(job)

    result = definition.execute_in_process(instance=service.instance, op_selection=[op], raise_on_error=False)

    assert "Launch the whole job" in failure_of(service.instance, result.run_id).words
    assert everything(service) == before


def test_every_op_and_every_field_of_an_ops_config_is_described() -> None:
    for job in ALL_JOBS:
        for node in build_definitions().get_job_def(job).graph.node_defs:
            assert node.description, node.name
            schema = node.config_schema.config_type  # type: ignore[union-attr]
            for name, field in getattr(schema, "fields", {}).items():
                assert field.description, (node.name, name)
                assert not field.is_required, (node.name, name)


@pytest.mark.parametrize("file", sorted(path.name for path in RUN_CONFIGS.glob("*.yaml")))
@pytest.mark.parametrize("job", ALL_JOBS)
def test_the_ready_made_run_configs_fit_their_jobs(job: str, file: str) -> None:
    config = yaml.safe_load((RUN_CONFIGS / file).read_text())

    assert dg.validate_run_config(build_definitions().get_job_def(job), config)


def test_there_are_ready_made_run_configs_for_a_dry_run_and_an_as_of() -> None:
    assert {path.stem for path in RUN_CONFIGS.glob("*.yaml")} >= {"dry_run", "as_of"}
