"""A daily job's missed day is run once more on the same day; a day that was worked on is not."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta, timezone

import dagster as dg
import pytest
from dagster._core.definitions.run_request import InstigatorType
from dagster._core.remote_origin import InProcessCodeLocationOrigin, RemoteRepositoryOrigin
from dagster._core.scheduler.instigation import InstigatorState, InstigatorStatus, ScheduleInstigatorData
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin

from billing_orchestration.definitions import build_definitions
from billing_orchestration.jobs.autopayment import autopayment_daily_schedule
from billing_orchestration.jobs.missed_days import missed_days, missed_days_sensor
from billing_orchestration.resources import Clock

JOB = "autopayment_job"
# The run history stamps its runs by the real clock, so these tests play on the day of the latest tick.
_REAL = datetime.now(timezone.utc)
TICK = (_REAL - timedelta(hours=3)).replace(hour=3, minute=0, second=0, microsecond=0)
NOW = max(_REAL, TICK + timedelta(hours=1))
ORIGIN = RemoteRepositoryOrigin(
    InProcessCodeLocationOrigin(LoadableTargetOrigin(module_name="billing_orchestration.definitions")), "__repository__"
)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as instance:
        yield instance


def switch_on(instance: dg.DagsterInstance, since: datetime, status: InstigatorStatus) -> None:
    name = autopayment_daily_schedule.name
    data = ScheduleInstigatorData("0 3 * * *", since.timestamp())
    instance.add_instigator_state(
        InstigatorState(ORIGIN.get_instigator_origin(name), InstigatorType.SCHEDULE, status, data)
    )


def missed(instance: dg.DagsterInstance, now: datetime = NOW) -> list[dg.RunRequest]:
    return list(missed_days(instance, [autopayment_daily_schedule], now))


def run_of_the_day(instance: dg.DagsterInstance, status: str, **tags: str) -> dg.DagsterRun:
    """A run in the history, of today's partition."""
    given = {"dagster/partition": TICK.strftime("%Y-%m-%d"), **tags}
    return instance.create_run_for_job(
        build_definitions().get_job_def(JOB),
        status=dg.DagsterRunStatus[status],
        tags=given,
        remote_job_origin=ORIGIN.get_job_origin(JOB),
    )


@pytest.fixture
def on(instance: dg.DagsterInstance) -> dg.DagsterInstance:
    """A history in which the schedule has been on since yesterday, and runs are younger than the tick."""
    switch_on(instance, TICK - timedelta(days=1), InstigatorStatus.RUNNING)
    return instance


def test_a_day_without_a_run_is_run_once_under_the_ticks_own_key(on: dg.DagsterInstance) -> None:
    [request] = missed(on)

    assert request.job_name == JOB
    assert request.partition_key == TICK.strftime("%Y-%m-%d")
    assert request.run_config["resources"]["run"]["config"]["as_of"] == TICK.isoformat()
    assert [again.run_key for again in missed(on)] == [request.run_key], "Dagster launches a run key once"


@pytest.mark.parametrize("status", ["SUCCESS", "QUEUED", "STARTED"])
def test_a_day_that_is_done_or_under_way_is_not_run_again(on: dg.DagsterInstance, status: str) -> None:
    run_of_the_day(on, status)

    assert missed(on) == []


def test_a_run_that_was_lost_before_it_began_is_made_up_for(on: dg.DagsterInstance) -> None:
    run_of_the_day(on, "FAILURE")

    assert len(missed(on)) == 1


def test_a_backfill_of_another_day_does_not_stand_for_this_one(on: dg.DagsterInstance) -> None:
    run_of_the_day(on, "SUCCESS", **{"dagster/partition": "2026-01-02"})

    assert len(missed(on)) == 1


def test_a_schedule_that_is_off_or_was_switched_on_after_its_tick_misses_nothing(instance: dg.DagsterInstance) -> None:
    assert missed(instance) == []
    switch_on(instance, TICK + timedelta(hours=1), InstigatorStatus.RUNNING)

    assert missed(instance) == []


def test_dagsters_own_catching_up_comes_first(on: dg.DagsterInstance) -> None:
    assert missed(on, TICK + timedelta(minutes=14)) == []
    assert len(missed(on, TICK + timedelta(minutes=15))) == 1


@pytest.mark.parametrize(
    ("minutes_ago", "runs"),
    [
        pytest.param(None, 0, id="the_first_look_of_all"),
        pytest.param(65, 0, id="after_an_outage"),
        pytest.param(5, 1, id="the_look_after_it"),
    ],
)
def test_a_daemon_that_comes_back_makes_up_for_its_own_tick_first(
    on: dg.DagsterInstance, minutes_ago: int | None, runs: int
) -> None:
    """Both at once would run the day twice: the scheduler and the sensors are threads of one daemon."""
    sensor = missed_days_sensor([autopayment_daily_schedule], [build_definitions().get_job_def(JOB)])
    last = None if minutes_ago is None else (NOW - timedelta(minutes=minutes_ago)).timestamp()
    clock = dg.ResourceDefinition.hardcoded_resource(Clock(lambda: NOW))
    repository = build_definitions().get_repository_def()
    with dg.SensorEvaluationContext(
        None, last, instance=on, repository_def=repository, resources={"clock": clock}
    ) as look:
        asked = sensor.evaluate_tick(look)
    assert len(asked.run_requests or ()) == runs
