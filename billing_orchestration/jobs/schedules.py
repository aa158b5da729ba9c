"""Schedules: a tick stands for its own instant, marks the partition it covers, and never overlaps the tick before."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import dagster as dg

from billing_orchestration.resources import SCHEDULE_TAG

UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
# Dagster's mark of the tick that a run belongs to.
RUN_KEY_TAG = "dagster/run_key"
# Ahead of backfills in the queue: the present comes first.
_PRIORITY = "10"
# At most one run of a job at once (dagster.yaml): a courtesy. The database's constraints keep the promise.
SINGLETON_TAG = "billing/singleton"


def singleton_tags(job_name: str, max_runtime_s: int) -> dict[str, str]:
    """The tags of a job: at most one run of it at once, and an end to a run that hangs."""
    return {SINGLETON_TAG: job_name, "dagster/max_runtime": str(max_runtime_s)}


@dataclass(frozen=True)
class Tick:
    """What the ticks of one schedule request, and when they are skipped."""

    job_name: str
    schedule_name: str
    partition_key: Callable[[datetime], str | None]
    op_config: Mapping[str, Any] = field(default_factory=dict)

    def unfinished(self, context: dg.ScheduleEvaluationContext) -> Sequence[dg.DagsterRun]:
        """The runs of this schedule that have not ended."""
        tags = {SCHEDULE_TAG: self.schedule_name}
        wanted = dg.RunsFilter(job_name=self.job_name, statuses=UNFINISHED, tags=tags)
        # Not the records: for them a new instance, as each tick's is, first asks what columns the table has.
        return context.instance.get_runs(wanted)

    def is_own(self, run: dg.DagsterRun, tick: datetime) -> bool:
        """Whether a run is this tick's own.

        A daemon that was killed between creating the tick's run and launching it evaluates the tick again, and launches
        the run that it finds by its key.
        """
        return run.tags.get(RUN_KEY_TAG) == tick.isoformat()

    def skipped(self, runs: Sequence[dg.DagsterRun], tick: datetime) -> dg.SkipReason | None:
        """Why the tick is skipped while these runs have not ended."""
        for run in runs:
            if not self.is_own(run, tick):
                return dg.SkipReason(
                    f"run {run.run_id[:8]} of an earlier tick is still {run.status.value};"
                    " the next tick covers this one"
                )
        return None

    def request(self, tick: datetime) -> dg.RunRequest:
        """The run of a tick."""
        run_config: dict[str, Any] = {"resources": {"run": {"config": {"as_of": tick.isoformat()}}}}
        if self.op_config:
            run_config["ops"] = {op: {"config": config} for op, config in self.op_config.items()}
        return dg.RunRequest(
            # A tick that is evaluated twice (two daemons, a changed cron) is one run.
            run_key=tick.isoformat(),
            partition_key=self.partition_key(tick),
            run_config=run_config,
            tags={"dagster/priority": _PRIORITY},
        )


def tick_schedule(
    job: dg.JobDefinition,
    *,
    name: str,
    cron: str,
    timezone: str,
    partition_key: Callable[[datetime], str | None],
    description: str,
) -> dg.ScheduleDefinition:
    """A schedule of a job. A tick is skipped, with a reason, while the run of an earlier tick is unfinished.

    Only runs of this schedule count, or a long backfill would silence it. For missed days see `missed_days`; for the
    matching jobs, whose ticks look first, `matching_schedule`.
    """
    ticks = Tick(job.name, name, partition_key)

    @dg.schedule(
        job_name=job.name,  # by name: autopayment_job is built for the deployment
        name=name,
        cron_schedule=cron,
        execution_timezone=timezone,
        # Nothing is written before somebody has looked: `billing-orchestration start` switches schedules on.
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description=description,
    )
    def schedule(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        tick = context.scheduled_execution_time
        return ticks.skipped(ticks.unfinished(context), tick) or ticks.request(tick)

    return schedule
