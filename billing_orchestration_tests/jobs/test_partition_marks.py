"""The partition grid shows what was covered: a dry run marks nothing, and a launch for today marks today."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import dagster as dg
import pytest

from billing_orchestration_tests.jobs.service import Service

JOB = "expire_subscriptions_job"
PARTITION_SET = "expire_subscriptions_job_partition_set"
TODAY = "2026-03-12"


@pytest.fixture
def history() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as instance:
        yield instance


def marked(history: dg.DagsterInstance) -> dict[str, str]:
    """What the grid shows, as the UI asks for it."""
    found = history.get_run_partition_data(dg.RunsFilter(tags={"dagster/partition_set": PARTITION_SET}))
    return {data.partition: data.status.value for data in found}


def test_a_dry_run_marks_no_partition_and_can_be_told_from_a_real_one(
    service: Service, history: dg.DagsterInstance
) -> None:
    grid = {"dagster/partition_set": PARTITION_SET}
    assert service.run(JOB, dry_run=True, partition=TODAY, tags=grid, instance=history).ok
    assert service.run(JOB, dry_run=True, instance=history).ok

    assert marked(history) == {}
    runs = history.get_runs(dg.RunsFilter(tags={"billing/dry_run": "true"}))
    assert len(runs) == 2


def test_a_run_that_repeats_a_dry_run_for_real_marks_its_partition(
    service: Service, history: dg.DagsterInstance
) -> None:
    tags = {"dagster/partition_set": f"{PARTITION_SET} (dry runs)"}

    assert service.run(JOB, partition=TODAY, tags=tags, instance=history).ok

    assert marked(history) == {TODAY: "SUCCESS"}


def test_a_launch_for_today_marks_today(service: Service, history: dg.DagsterInstance) -> None:
    assert service.run(JOB, instance=history).ok

    assert marked(history) == {TODAY: "SUCCESS"}


def test_a_launch_for_another_day_marks_nothing(service: Service, history: dg.DagsterInstance) -> None:
    assert service.run(JOB, as_of=service.now - timedelta(days=3), instance=history).ok

    assert marked(history) == {}


def test_a_tag_on_a_backfill_makes_its_runs_dry(service: Service, history: dg.DagsterInstance) -> None:
    over = service.subscription(ended_at=service.now - timedelta(days=9))
    grid = {"dagster/partition_set": PARTITION_SET, "dagster/backfill": "a", "billing/dry_run": "true"}

    run = service.run(JOB, partition=TODAY, tags=grid, instance=history)

    assert run.ok
    assert service.status("subscriptions", over) == "ACTIVE"
    assert marked(history) == {}
