"""A failed run alerts: what happened, whose money it concerns, what to do, a link. Once per problem.

A problem is a job and its failure's code. It alerts once, and again after the job has succeeded in between; one that
comes and goes alerts twice and then once an hour. Which runs have alerted is written on the runs themselves (tags), so
it works when the billing database is what has failed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from enum import Enum

import dagster as dg

from billing_orchestration.alerting import Alert, Alerts
from billing_orchestration.jobs.run_failures import FailureCode, RunFailure, failure_of

# On a run that has alerted (the value is its failure's code), and on one whose alert could not be delivered.
ALERT_TAG = "billing/alert"
UNSENT_TAG = "billing/alert_unsent"
_SHOWN = 700
# A problem that comes and goes with every tick: after this many alerts within a day, at most one an hour.
_ALERTS_AT_ONCE = 2
_QUIET = timedelta(hours=1)
_MOST_UNSENT = 5


@dataclass(frozen=True)
class Consequence:
    """What a job's red run means for the money, and what to do."""

    money: str
    do: str


_MATCHING = Consequence(
    "customers may have paid without access yet. Nothing is lost: the next tick that succeeds covers all of it.",
    "if no tick has been green for ten minutes, fix what the first line names.",
)
CONSEQUENCES: Mapping[str, Consequence] = {
    "autopayment_job": Consequence(
        "some due subscriptions were not renewed, and the outcome of charges under way may be unknown. Nobody is"
        " charged twice: unfinished attempts keep their keys.",
        "fix what the first line names and launch the job again today; it goes on where it stopped.",
    ),
    "expire_payments_job": Consequence(
        "nothing was charged or granted wrongly; payments that could not be asked about stay PENDING.",
        "nothing today; if it is red again tomorrow, fix what the first line names.",
    ),
    "expire_subscriptions_job": Consequence(
        "no money moved; subscriptions that are over may still be ACTIVE.",
        "fix what the first line names and launch the job again.",
    ),
    "reconciliation_job": Consequence(
        "both sides' books of a day differ, or could not be compared. Nothing was taken back, and nothing is granted"
        " twice.",
        "decide about the entries of the quarantine, then launch the day again.",
    ),
    "matching_pending_payments_job": _MATCHING,
    "matching_successful_payments_job": _MATCHING,
}
_OTHER = Consequence("none: this job handles no money.", "fix what the first line names.")
# What to do about these is the same for every job.
_DO: Mapping[str, str] = {
    FailureCode.TOO_MANY_CHANGES: "nothing was applied: look at a dry run; if it is right, approve its plan.",
    FailureCode.PLAN_CHANGED: "nothing was applied: look at a new dry run, and approve its plan.",
}


class Alerted(Enum):
    """What became of the alert about a failed run, in words for the sensor's page."""

    SENT = "sent"
    NOBODY_LISTENS = "ALERT_URLS is not set: nobody is alerted"
    BEFORE = "alerted already, and the job has not succeeded since"
    NOT_DELIVERED = "the alert could not be delivered; it is sent again later"


def alert_of(run: dg.DagsterRun, failure: RunFailure, alerts: Alerts) -> Alert:
    """The alert of a failed run."""
    consequence = CONSEQUENCES.get(run.job_name, _OTHER)
    partition = run.tags.get("dagster/partition")
    words = failure.words
    return Alert(
        title=f"{run.job_name} failed" + (f" ({partition})" if partition else ""),
        happened=words if len(words) <= _SHOWN else f"{words[:_SHOWN]}…",
        money=consequence.money,
        do=f"{_DO.get(failure.code, consequence.do)} See {alerts.runbook(run.job_name)}",
        link=alerts.link(f"runs/{run.run_id}"),
    )


def alert_about(instance: dg.DagsterInstance, run: dg.DagsterRun, alerts: Alerts) -> Alerted:
    """Alert about a failed run, unless its problem has alerted already."""
    if not alerts.wanted:
        return Alerted.NOBODY_LISTENS
    failure = failure_of(instance, run.run_id)
    if _has_alerted(instance, run, failure.code):
        return Alerted.BEFORE
    if not alerts.send(alert_of(run, failure, alerts)):
        instance.add_run_tags(run.run_id, {UNSENT_TAG: "yes"})
        return Alerted.NOT_DELIVERED
    instance.add_run_tags(run.run_id, {ALERT_TAG: failure.code, UNSENT_TAG: "no"})
    return Alerted.SENT


def retry_undelivered(instance: dg.DagsterInstance, alerts: Alerts) -> int:
    """Send the undelivered alerts again; return how many were sent."""
    sent = 0
    for record in instance.get_run_records(dg.RunsFilter(tags={UNSENT_TAG: "yes"}), limit=_MOST_UNSENT):
        outcome = alert_about(instance, record.dagster_run, alerts)
        sent += outcome is Alerted.SENT
        if outcome is Alerted.BEFORE:
            instance.add_run_tags(record.dagster_run.run_id, {UNSENT_TAG: "no"})
    return sent


def _has_alerted(instance: dg.DagsterInstance, run: dg.DagsterRun, code: str) -> bool:
    alerted = instance.get_run_records(
        dg.RunsFilter(job_name=run.job_name, tags={ALERT_TAG: code}), limit=_ALERTS_AT_ONCE
    )
    if not alerted:
        return False
    [failed] = instance.get_run_records(dg.RunsFilter(run_ids=[run.run_id]))
    succeeded = instance.get_run_records(
        dg.RunsFilter(job_name=run.job_name, statuses=[dg.DagsterRunStatus.SUCCESS]), limit=1
    )
    last = _ended(alerted[0])
    if not succeeded or _ended(succeeded[0]) <= last:
        return True
    within_a_day = [record for record in alerted if _ended(failed) - _ended(record) < timedelta(days=1)]
    return len(within_a_day) >= _ALERTS_AT_ONCE and _ended(failed) - last < _QUIET


def _ended(record: dg.RunRecord) -> datetime:
    if record.end_time is not None:
        return datetime.fromtimestamp(record.end_time, timezone.utc)
    return record.update_timestamp.replace(tzinfo=timezone.utc)


def failed_run_sensor(jobs: Sequence[dg.JobDefinition]) -> dg.SensorDefinition:
    """The sensor that alerts about failed runs of these jobs."""

    @dg.run_failure_sensor(
        name="failed_run_alert_sensor",
        monitored_jobs=list(jobs),
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=30,
        description="Alerts about a failed run (ALERT_URLS), once per problem: again only after the job has succeeded.",
    )
    def sensor(context: dg.RunFailureSensorContext, alerts: dg.ResourceParam[Alerts]) -> dg.SkipReason | None:
        outcome = alert_about(context.instance, context.dagster_run, alerts)
        return None if outcome is Alerted.SENT else dg.SkipReason(outcome.value)

    return sensor
