"""A daily job's missed day is made up for on the same day.

Dagster itself runs the latest missed tick when its daemon comes back. This sensor covers the rest: a tick that was
skipped because an older run was unfinished, a run that was lost (its process was killed, or never began), and a run
that was refused before it read anything. Such a day is run once more, not again and again.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import dagster as dg
from dagster._core.definitions.run_request import InstigatorType
from dagster._core.scheduler.instigation import InstigatorStatus, ScheduleInstigatorData

from billing_orchestration.domain.run_scope import RunRefused
from billing_orchestration.jobs.run_failures import FailureCode, failure_of
from billing_orchestration.jobs.schedules import RUN_KEY_TAG, UNFINISHED
from billing_orchestration.resources import PARTITION_TAG, Clock
from billing_orchestration.settings import SettingsError

# By then the daemon has started what it makes up for itself, and a run that was launched has begun.
_SETTLED_AFTER = timedelta(minutes=15)
_INTERVAL_S = 300
# A daemon that comes back looks at everything at once. It makes up for its own missed ticks before the next look.
_DOWN_AFTER = timedelta(seconds=2 * _INTERVAL_S)
# Before the work of the day: nothing was read or written, or nobody knows how far it came.
_LOST_OR_REFUSED = frozenset({RunRefused.__name__, SettingsError.__name__, FailureCode.NO_WORDS})


def missed_days(
    instance: dg.DagsterInstance, schedules: Sequence[dg.ScheduleDefinition], now: datetime
) -> Iterator[dg.RunRequest]:
    """A run for each daily schedule whose latest tick left its day undone."""
    started = _started(instance)
    for schedule in schedules:
        tick = _latest_tick(schedule, now)
        since = started.get(schedule.name)
        if since is None or since > tick or now - tick < _SETTLED_AFTER:
            continue
        with dg.build_schedule_context(instance=instance, scheduled_execution_time=tick) as context:
            wanted = schedule(context)
        if isinstance(wanted, dg.RunRequest) and _is_undone(instance, schedule.job_name, wanted, tick):
            yield dg.RunRequest(
                run_key=f"{schedule.name} {wanted.run_key}",
                job_name=schedule.job_name,
                partition_key=wanted.partition_key,
                run_config=wanted.run_config,
                tags={**wanted.tags, RUN_KEY_TAG: str(wanted.run_key)},
            )


def _latest_tick(schedule: dg.ScheduleDefinition, now: datetime) -> datetime:
    """The latest tick at or before `now` of a schedule "MINUTE HOUR * * *"."""
    minute, hour = (int(word) for word in str(schedule.cron_schedule).split()[:2])
    local = now.astimezone(ZoneInfo(schedule.execution_timezone or "UTC"))
    tick = local.replace(hour=hour, minute=minute, second=0, microsecond=0)
    return tick if tick <= local else tick - timedelta(days=1)


def _started(instance: dg.DagsterInstance) -> dict[str, datetime]:
    """Since when each schedule has been on; schedules that are off are left out."""
    found = {}
    for state in instance.all_instigator_state(instigator_type=InstigatorType.SCHEDULE):
        data = state.instigator_data
        if state.status is not InstigatorStatus.STOPPED and isinstance(data, ScheduleInstigatorData):
            found[state.instigator_name] = datetime.fromtimestamp(data.start_timestamp or 0, timezone.utc)
    return found


def _is_undone(instance: dg.DagsterInstance, job: str, wanted: dg.RunRequest, tick: datetime) -> bool:
    """Whether no run since the tick has done its day's work, or is at it."""
    for record in instance.get_run_records(dg.RunsFilter(job_name=job, created_after=tick - timedelta(seconds=1))):
        run = record.dagster_run
        if run.tags.get(PARTITION_TAG, wanted.partition_key) != wanted.partition_key:
            continue
        if run.status in (*UNFINISHED, dg.DagsterRunStatus.SUCCESS):
            return False
        if run.status is dg.DagsterRunStatus.CANCELED and record.start_time is not None:
            return False  # a person stopped it
        if record.start_time is not None and failure_of(instance, run.run_id).code not in _LOST_OR_REFUSED:
            return False  # it has worked, and says itself what is left
    return True


def _daemon_was_down(last_look: float | None, now: datetime) -> bool:
    """Whether this is the first look for a while. `last_look`: seconds since 1970; None where there was none."""
    return last_look is None or now - datetime.fromtimestamp(last_look, timezone.utc) > _DOWN_AFTER


def missed_days_sensor(
    schedules: Sequence[dg.ScheduleDefinition], jobs: Sequence[dg.JobDefinition]
) -> dg.SensorDefinition:
    """The sensor that makes up for missed days of these daily schedules, by the deployment's `jobs`."""
    daily = {schedule.job_name for schedule in schedules}

    @dg.sensor(
        name="missed_days_sensor",
        jobs=[job for job in jobs if job.name in daily],
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=_INTERVAL_S,
        description="Runs a daily job once more on the same day when its run was skipped, lost or refused.",
    )
    def sensor(
        context: dg.SensorEvaluationContext, clock: dg.ResourceParam[Clock]
    ) -> list[dg.RunRequest] | dg.SkipReason:
        if _daemon_was_down(context.last_tick_completion_time, clock.now()):
            return dg.SkipReason("the daemon has come back: it makes up for the last missed tick first")
        requests = list(missed_days(context.instance, schedules, clock.now()))
        return requests or dg.SkipReason("no daily job has missed its day")

    return sensor
