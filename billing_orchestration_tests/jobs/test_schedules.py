"""The schedules: what a tick stands for, which partition it marks, and when it is skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import dagster as dg
import pytest
from dagster._core.remote_origin import InProcessCodeLocationOrigin, RemoteRepositoryOrigin
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin

from billing_orchestration.definitions import build_definitions
from billing_orchestration.jobs.partitions import RECONCILED, reconciled_days
from billing_orchestration_tests.books import NOON
from billing_orchestration_tests.jobs.service import Service, evaluate

UTC = timezone.utc
DAILY = {
    "autopayment_daily_schedule": ("autopayment_job", "0 3 * * *"),
    "expire_payments_daily_schedule": ("expire_payments_job", "0 4 * * *"),
    "expire_subscriptions_daily_schedule": ("expire_subscriptions_job", "0 5 * * *"),
}
MATCHING = {
    "matching_pending_payments_every_2_minutes_schedule": ("matching_pending_payments_job", "*/2 * * * *"),
    "matching_successful_payments_every_2_minutes_schedule": ("matching_successful_payments_job", "*/2 * * * *"),
}
RECONCILIATION = "reconciliation_daily_schedule"
ALL = {**DAILY, **MATCHING, RECONCILIATION: ("reconciliation_job", "30 6 * * *")}
MATCHING_SCHEDULE = "matching_pending_payments_every_2_minutes_schedule"
UNFINISHED = ("QUEUED", "NOT_STARTED", "STARTING", "STARTED", "CANCELING")


@pytest.fixture(scope="module")
def history() -> Iterator[dg.DagsterInstance]:
    """A run history on disk, as a schedule asks for one."""
    with dg.instance_for_test() as instance:
        yield instance


@pytest.fixture
def instance(history: dg.DagsterInstance) -> Iterator[dg.DagsterInstance]:
    """The same, without the runs of other tests."""
    yield history
    for record in history.get_run_records():
        history.delete_run(record.dagster_run.run_id)


def tick(instance: dg.DagsterInstance, schedule: str, at: datetime) -> Any:
    """What a schedule makes of a tick."""
    return evaluate(schedule, instance, at)


def requested(instance: dg.DagsterInstance, schedule: str, at: datetime) -> dg.RunRequest:
    """The run that a tick requests."""
    request = tick(instance, schedule, at)
    assert isinstance(request, dg.RunRequest), request
    return request


# --- What there is


@pytest.mark.parametrize("name", ALL)
def test_each_job_has_a_schedule_that_is_off_until_a_person_switches_it_on(name: str) -> None:
    job, cron = ALL[name]
    schedule = build_definitions().resolve_schedule_def(name)

    assert (schedule.job_name, schedule.cron_schedule, schedule.execution_timezone) == (job, cron, "UTC")
    assert schedule.default_status is dg.DefaultScheduleStatus.STOPPED
    assert schedule.description


def test_no_job_has_a_second_schedule() -> None:
    schedules = build_definitions().get_repository_def().schedule_defs

    for job, _ in ALL.values():
        assert len([schedule.name for schedule in schedules if schedule.job_name == job]) == 1, job


@pytest.mark.parametrize("job", sorted(job for job, _ in ALL.values()))
def test_every_run_of_a_job_says_that_it_is_the_only_one_and_when_it_hangs(job: str) -> None:
    tags = build_definitions().get_job_def(job).tags

    assert tags["billing/singleton"] == job
    assert int(tags["dagster/max_runtime"]) > 0


# --- What a tick requests


@pytest.mark.parametrize("name", ALL)
def test_a_tick_stands_for_its_own_instant(instance: dg.DagsterInstance, name: str) -> None:
    request = requested(instance, name, NOON)

    assert request.run_config["resources"] == {"run": {"config": {"as_of": "2026-03-12T12:00:00+00:00"}}}
    assert request.tags["dagster/priority"] == "10"


@pytest.mark.parametrize("name", ALL)
def test_a_tick_that_is_evaluated_twice_is_one_run(instance: dg.DagsterInstance, name: str) -> None:
    keys = {requested(instance, name, NOON).run_key for _ in range(2)}

    assert keys == {"2026-03-12T12:00:00+00:00"}
    assert requested(instance, name, NOON + timedelta(minutes=2)).run_key not in keys


@pytest.mark.parametrize("name", DAILY)
def test_a_daily_tick_marks_its_own_day(instance: dg.DagsterInstance, name: str) -> None:
    assert requested(instance, name, datetime(2026, 3, 12, 3, 0, tzinfo=UTC)).partition_key == "2026-03-12"


@pytest.mark.parametrize(
    ("at", "hour"),
    [
        (datetime(2026, 3, 12, 12, 0, tzinfo=UTC), "2026-03-12-11:00"),
        (datetime(2026, 3, 12, 12, 58, tzinfo=UTC), "2026-03-12-11:00"),
        (datetime(2026, 3, 12, 13, 0, tzinfo=UTC), "2026-03-12-12:00"),
        (datetime(2026, 3, 1, 0, 2, tzinfo=UTC), "2026-02-28-23:00"),
    ],
)
@pytest.mark.parametrize("name", MATCHING)
def test_a_matching_tick_marks_the_last_whole_hour(
    instance: dg.DagsterInstance, name: str, at: datetime, hour: str
) -> None:
    assert requested(instance, name, at).partition_key == hour


def test_a_reconciling_tick_marks_the_day_before(instance: dg.DagsterInstance) -> None:
    assert requested(instance, RECONCILIATION, datetime(2026, 3, 1, 6, 30, tzinfo=UTC)).partition_key == "2026-02-28"


@pytest.mark.parametrize("now", [NOON, NOON.replace(hour=0, minute=0), NOON.replace(hour=23, minute=59)], ids=str)
def test_three_years_can_be_reconciled_and_no_day_that_is_not_over(now: datetime) -> None:
    keys = reconciled_days(now).get_partition_keys(current_time=now)

    assert (keys[0], keys[-1]) == ("2023-03-13", "2026-03-11")
    assert build_definitions().get_job_def("reconciliation_job").partitions_def is RECONCILED


@pytest.mark.parametrize("name", [*DAILY, *MATCHING])
def test_a_tick_before_the_grid_begins_marks_nothing_and_runs(instance: dg.DagsterInstance, name: str) -> None:
    assert requested(instance, name, datetime(2025, 12, 31, 23, 58, tzinfo=UTC)).partition_key is None


@pytest.mark.parametrize("name", ALL)
def test_the_partition_of_a_tick_is_one_of_its_jobs_keys(instance: dg.DagsterInstance, name: str) -> None:
    partitions = build_definitions().get_job_def(ALL[name][0]).partitions_def
    assert partitions is not None

    for at in (NOON, datetime(2026, 1, 1, 1, 0, tzinfo=UTC)):
        key = requested(instance, name, at).partition_key
        assert key in partitions.get_partition_keys(current_time=at)


@pytest.mark.parametrize("name", ALL)
def test_what_a_tick_requests_runs(service: Service, instance: dg.DagsterInstance, name: str) -> None:
    request = requested(instance, name, NOON)
    job = ALL[name][0]

    run = service.run(
        job,
        as_of=request.run_config["resources"]["run"]["config"]["as_of"],
        ops={op: dict(given["config"]) for op, given in request.run_config.get("ops", {}).items()},
        tags={"dagster/schedule_name": name},
        partition=request.partition_key,
    )

    assert run.ok, run.failure
    assert run.report["as_of"] == "2026-03-12T12:00:00+00:00 (from config)"
    assert dg.validate_run_config(build_definitions().get_job_def(job), request.run_config)


@pytest.mark.parametrize("what", ["pending_payments", "successful_payments"])
def test_a_tick_of_either_matching_leaves_a_minute_to_the_webhook(instance: dg.DagsterInstance, what: str) -> None:
    request = requested(instance, f"matching_{what}_every_2_minutes_schedule", NOON)

    assert request.run_config["ops"] == {f"diff_{what}": {"config": {"webhook_grace_s": 60}}}


# --- When it is skipped


def begin(instance: dg.DagsterInstance, job: str, status: str, **tags: str) -> dg.DagsterRun:
    """A run in the history."""
    location = InProcessCodeLocationOrigin(LoadableTargetOrigin(module_name="billing_orchestration.definitions"))
    return instance.create_run_for_job(
        build_definitions().get_job_def(job),
        status=dg.DagsterRunStatus[status],
        tags={name.replace("__", "/"): value for name, value in tags.items()},
        # Where a run comes from: the history takes no queued one without it.
        remote_job_origin=RemoteRepositoryOrigin(location, "__repository__").get_job_origin(job),
    )


@pytest.mark.parametrize("name", ALL)
def test_a_tick_is_skipped_while_the_run_of_an_earlier_one_is_unfinished(
    instance: dg.DagsterInstance, name: str
) -> None:
    run = begin(instance, ALL[name][0], "STARTED", dagster__schedule_name=name)

    skipped = tick(instance, name, NOON)

    assert isinstance(skipped, dg.SkipReason)
    assert f"run {run.run_id[:8]} of an earlier tick is still STARTED" in str(skipped.skip_message)


@pytest.mark.parametrize("status", UNFINISHED)
def test_a_run_is_unfinished_from_the_queue_to_its_end(instance: dg.DagsterInstance, status: str) -> None:
    begin(instance, ALL[MATCHING_SCHEDULE][0], status, dagster__schedule_name=MATCHING_SCHEDULE)

    assert isinstance(tick(instance, MATCHING_SCHEDULE, NOON), dg.SkipReason)


@pytest.mark.parametrize("status", ["SUCCESS", "FAILURE", "CANCELED"])
def test_a_run_that_ended_stops_no_tick(instance: dg.DagsterInstance, status: str) -> None:
    begin(instance, ALL[MATCHING_SCHEDULE][0], status, dagster__schedule_name=MATCHING_SCHEDULE)

    assert isinstance(tick(instance, MATCHING_SCHEDULE, NOON), dg.RunRequest)


def test_a_tick_that_is_evaluated_again_does_not_take_its_own_run_for_an_earlier_ones(
    instance: dg.DagsterInstance,
) -> None:
    # The daemon was killed between creating the tick's run and launching it.
    name = "autopayment_daily_schedule"
    key = requested(instance, name, NOON).run_key
    begin(instance, ALL[name][0], "NOT_STARTED", dagster__schedule_name=name, dagster__run_key=str(key))

    assert requested(instance, name, NOON).run_key == key
    assert isinstance(tick(instance, name, NOON + timedelta(days=1)), dg.SkipReason)


def test_a_backfill_a_manual_launch_and_another_jobs_tick_stop_no_tick(instance: dg.DagsterInstance) -> None:
    job = ALL[MATCHING_SCHEDULE][0]
    begin(instance, job, "STARTED", dagster__backfill="abc")
    begin(instance, job, "QUEUED")
    other = "matching_successful_payments_every_2_minutes_schedule"
    begin(instance, ALL[other][0], "STARTED", dagster__schedule_name=other)

    assert isinstance(tick(instance, MATCHING_SCHEDULE, NOON), dg.RunRequest)


# --- Another billing time zone

_SHOWN = """
from datetime import datetime
from zoneinfo import ZoneInfo
from billing_orchestration.jobs.autopayment import autopayment_daily_schedule
from billing_orchestration.jobs.matching_pending_payments import matching_pending_payments_every_2_minutes_schedule
from billing_orchestration.jobs.partitions import DAILY, HOURLY, RECONCILED, day_before_key, day_key
window = DAILY.time_window_for_partition_key("2026-03-12")
print(autopayment_daily_schedule.execution_timezone)
print(matching_pending_payments_every_2_minutes_schedule.execution_timezone)
print(window.start.astimezone(ZoneInfo("UTC")).isoformat(), HOURLY.timezone)
print(day_key(datetime(2026, 3, 12, 3, 0, tzinfo=ZoneInfo("Asia/Vladivostok"))))
print(RECONCILED.timezone, day_before_key(datetime(2026, 3, 12, 6, 30, tzinfo=ZoneInfo("Asia/Vladivostok"))))
"""


def test_days_begin_in_the_billing_time_zone_and_matching_hours_in_utc() -> None:
    # The grid is made when the code location loads: another time zone is another process.
    shown = subprocess.run(
        [sys.executable, "-c", _SHOWN],
        env={**os.environ, "BILLING_TIMEZONE": "Asia/Vladivostok", "RECONCILIATION_TIMEZONE": "Europe/Moscow"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()

    days, hours, reconciled = shown[:2], shown[2:5], shown[5:]
    assert days == ["Asia/Vladivostok", "UTC"]
    assert hours == ["2026-03-11T14:00:00+00:00", "UTC", "2026-03-12"]
    # Half past six of the 12th there is half past eleven of the 11th in Moscow: the 10th is over.
    assert reconciled == ["Europe/Moscow", "2026-03-10"]
    # 03:00 on 12 March there is still 11 March in UTC.
    assert datetime(2026, 3, 12, 3, 0, tzinfo=ZoneInfo("Asia/Vladivostok")).astimezone(UTC).day == 11
