"""run_history_job: deletes old runs and their events from the run history; keeps longer those that changed something.

It ends what is kept of customers, too: evidence of resolved entries and the audit trail, after EVIDENCE_DAYS.
Attempts and settlements are never touched: they hold the promise.

Daily at 06:00, and harmless to repeat. The matching jobs alone make 1,440 runs a day, and Dagster keeps every run until
somebody deletes it. The job writes to Dagster's own database only, through Dagster's API. From the billing database it
reads the audit trail, which shows what a run changed even if the run was killed; from our own schema it deletes what is
old. If it is killed in between, the next run continues. Our clock says what is old, so nothing goes while it and
PostgreSQL's are apart.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import dagster as dg
from pydantic import Field

from billing_orchestration.database.audit import runs_that_changed
from billing_orchestration.database.retention import count_old, delete_old_audit, empty_old_evidence
from billing_orchestration.domain.clocks import Clocks
from billing_orchestration.domain.run_retention import CHANGED, GOES, MARKS_ITS_PARTITION, PastRun, retention
from billing_orchestration.domain.run_scope import RunScope, over_limit
from billing_orchestration.jobs.clocks import describe_clocks, look_at_clocks, stop_if_clocks_are_apart
from billing_orchestration.jobs.partitions import BILLING_TIMEZONE
from billing_orchestration.jobs.run_report import (
    CHANGED_TAG,
    describe_scope,
    in_one_sentence,
    stop_before_applying,
    told_plainly,
)
from billing_orchestration.jobs.schedules import SINGLETON_TAG, singleton_tags, tick_schedule
from billing_orchestration.resources import AFTER, PARTITION_TAG, BillingDatabase, Clock, HandOver, RunSettings

JOB = "run_history_job"
MAX_RUNTIME_S = 2 * 3600
# Records per query. Each holds a run's whole config and tags.
_BATCH = 500
_PROGRESS_EVERY = 1000
# A transaction of this many short rows takes well below a second.
_ROWS_AT_ONCE = 5000
# Events are stamped by the worker, runs by the database.
_CLOCKS_DIFFER_BY = timedelta(days=1)
_FINISHED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]


class RunHistoryConfig(dg.Config):
    """What only this job needs."""

    max_runs: int = Field(
        default=20_000,
        ge=1,
        description="Delete at most this many runs; the next day's run continues. Each takes some 30 ms.",
    )


@dataclass(frozen=True)
class OldRuns:
    """The runs to delete, newest first."""

    scope: RunScope
    going: tuple[PastRun, ...]
    clocks: Clocks


@dg.op(description="Read the finished runs older than RUN_HISTORY_DAYS, and decide which to delete.")
def find_old_runs(
    context: dg.OpExecutionContext,
    run: RunSettings,
    billing_database: dg.ResourceParam[BillingDatabase],
    clock: dg.ResourceParam[Clock],
    hand_over: dg.ResourceParam[HandOver],
) -> None:
    """The slice and the decisions."""
    with told_plainly():
        settings = billing_database.settings
        scope = run.scope(context, clock, whole_days=False)
        keep_days, keep_changed_days = settings.run_history_days, settings.run_history_changed_days
        found = _past_runs(context.instance, scope.as_of - timedelta(days=keep_days))
        verdicts = list(retention(found, scope.as_of, keep_days, keep_changed_days))
        # Only these: a run that stays anyway would be looked up every night for a year.
        doubtful = [
            past
            for past, verdict in verdicts
            if verdict == GOES and scope.as_of - past.created_at < timedelta(days=keep_changed_days)
        ]
        changed = _changed_something(doubtful, billing_database)
        verdicts = [(past, CHANGED if past.run_id in changed else verdict) for past, verdict in verdicts]
        clocks = look_at_clocks(billing_database, clock)
    going = tuple(past for past, verdict in verdicts if verdict == GOES)
    stop_before_applying(over_limit(len(going), scope.max_changes), [])
    reasons = Counter(verdict for _, verdict in verdicts)
    counts = {
        "older runs": len(verdicts),
        "to delete": len(going),
        "kept: changed something": reasons[CHANGED],
        "kept: last of its day or hour": reasons[MARKS_ITS_PARTITION],
        **{f"to delete: {job}": count for job, count in sorted(Counter(past.job for past in going).items())},
    }
    context.add_output_metadata(
        {
            **describe_scope(scope),
            **describe_clocks(context, clocks),
            "kept": dg.MetadataValue.text(
                f"everything for {keep_days} days; what changed something, and the last run of each day and hour, for"
                f" {keep_changed_days} days"
            ),
            **{name: dg.MetadataValue.int(count) for name, count in counts.items() if count},
        }
    )
    hand_over.leave(OldRuns(scope, going, clocks))


def _past_runs(instance: dg.DagsterInstance, before: datetime) -> Iterator[PastRun]:
    """This project's finished runs created before an instant, newest first.

    A run killed after its last commit lacks the tag that it changed something; `_changed_something` finds it.
    """
    cursor = None
    while records := instance.get_run_records(
        dg.RunsFilter(statuses=_FINISHED, created_before=before), limit=_BATCH, cursor=cursor
    ):
        cursor = records[-1].dagster_run.run_id
        for record in records:
            dagster_run = record.dagster_run
            # Another code location may share the run history: its runs are not ours.
            if SINGLETON_TAG in dagster_run.tags:
                yield PastRun(
                    run_id=dagster_run.run_id,
                    job=dagster_run.job_name,
                    created_at=record.create_timestamp.astimezone(timezone.utc),
                    ended_at=_ended(record),
                    partition=dagster_run.tags.get(PARTITION_TAG),
                    changed=CHANGED_TAG in dagster_run.tags,
                )


def _ended(record: dg.RunRecord) -> datetime:
    if record.end_time is not None:
        return datetime.fromtimestamp(record.end_time, timezone.utc)
    return record.update_timestamp.astimezone(timezone.utc)


def _changed_something(runs: Sequence[PastRun], database: BillingDatabase) -> set[str]:
    """The ids of those runs (given newest first) that the audit trail knows."""
    changed: set[str] = set()
    for start in range(0, len(runs), _BATCH):
        batch = runs[start : start + _BATCH]
        with database.read() as connection:
            changed |= runs_that_changed(
                connection,
                [past.run_id for past in batch],
                min(past.created_at for past in batch) - _CLOCKS_DIFFER_BY,
                max(past.ended_at for past in batch) + _CLOCKS_DIFFER_BY,
            )
    return changed


@dg.op(description="Delete these runs with their events, oldest first.", ins=AFTER)
def delete_old_runs(
    context: dg.OpExecutionContext, config: RunHistoryConfig, hand_over: dg.ResourceParam[HandOver]
) -> None:
    """Delete one run after another, oldest first. If killed in between, the next run continues."""
    with told_plainly():
        old = hand_over.take(OldRuns)
    stop_if_clocks_are_apart(old.clocks)
    going = old.going[::-1][: config.max_runs]
    deleted = 0
    if not old.scope.dry_run:
        for past in going:
            context.instance.delete_run(past.run_id)
            deleted += 1
            if deleted % _PROGRESS_EVERY == 0:
                context.log.info(f"deleted {deleted} of {len(going)}")
    dry_run, left = old.scope.dry_run, len(old.going) - len(going)
    told = [f"runs {'to delete' if dry_run else 'deleted'} {len(going)}"] if going else []
    told += [f"left for the next run {left}"] if left else []
    context.add_output_metadata({"result": dg.MetadataValue.text(in_one_sentence(told, dry_run=dry_run))})


@dg.op(description="End what is kept of customers after EVIDENCE_DAYS.", ins=AFTER)
def remove_old_evidence(
    context: dg.OpExecutionContext,
    run: RunSettings,
    billing_database: dg.ResourceParam[BillingDatabase],
    clock: dg.ResourceParam[Clock],
) -> None:
    """Empty old evidence, delete old entries of the audit trail, in small transactions. Harmless to repeat."""
    with told_plainly():
        scope = run.scope(context, clock, whole_days=False)
        days = billing_database.settings.evidence_days
        # Whatever as_of says, nothing younger goes.
        before = min(scope.as_of, clock.now()) - timedelta(days=days)
        with billing_database.read() as connection:
            evidence, audit, may_delete = count_old(connection, before)
        if not scope.dry_run:
            _in_parts(billing_database, empty_old_evidence, before)
            if may_delete:
                _in_parts(billing_database, delete_old_audit, before)
    emptied, deleted = ("to empty", "to delete") if scope.dry_run else ("emptied", "deleted")
    told = [f"evidence {emptied} {evidence}"] if evidence else []
    told += [f"audit trail {deleted} {audit}"] if audit and may_delete else []
    stays = audit and not may_delete
    context.add_output_metadata(
        {
            "result": dg.MetadataValue.text(in_one_sentence(told, dry_run=scope.dry_run)),
            **({"stays": dg.MetadataValue.text(_MAY_NOT_DELETE.format(audit))} if stays else {}),
            "kept": dg.MetadataValue.text(f"evidence and audit trail for {days} days; attempts and settlements always"),
            "as_of": describe_scope(scope)["as_of"],
        }
    )


_MAY_NOT_DELETE = (
    "{} entries of the audit trail are older, and this role may not delete them: GRANT DELETE ON"
    " billing_orchestration.audit_trail, or delete them by hand (the documents say how: Personal data)"
)


def _in_parts(database: BillingDatabase, remove: Callable[[Any, datetime, int], int], before: datetime) -> None:
    while True:
        with database.begin() as connection:
            if remove(connection, before, _ROWS_AT_ONCE) < _ROWS_AT_ONCE:
                return


@dg.job(
    name=JOB,
    description="Deletes old runs from the run history; those that changed something are kept longer.",
    executor_def=dg.in_process_executor,
    tags=singleton_tags(JOB, MAX_RUNTIME_S),
)
def run_history_job() -> None:
    """Find, decide, delete; then the same of old evidence."""
    remove_old_evidence(delete_old_runs(find_old_runs()))


run_history_daily_schedule = tick_schedule(
    run_history_job,
    name="run_history_daily_schedule",
    cron="0 6 * * *",
    timezone=BILLING_TIMEZONE,
    partition_key=lambda _: None,
    description="Daily at 06:00 in the billing time zone, after the billing jobs.",
)
