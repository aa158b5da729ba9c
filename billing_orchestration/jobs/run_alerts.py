"""A failed run alerts: what happened, what was not done with the money, what to do, a link. Once per problem.

A problem is a job and what its failure says first. It alerts once, and again after the job has succeeded in between;
one that comes and goes alerts twice and then once an hour. Which runs have alerted is written on the runs themselves
(tags), so it works when the billing database is what has failed.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

import dagster as dg

from billing_orchestration.alerting import RUNBOOK, Alert, Alerts

# On a run that has told of its problem (the value names the problem), and on one whose alert nobody took.
ALERT_TAG = "billing/alert"
UNSENT_TAG = "billing/alert_unsent"
_SHOWN = 700
# A problem that comes and goes with every tick: after so many alerts within a day, no more than one an hour.
_ALERTS_AT_ONCE = 2
_QUIET = timedelta(hours=1)
_MOST_UNSENT = 5


@dataclass(frozen=True)
class Consequence:
    """What a job's red run means for the money, and what to do."""

    money: str
    do: str


CONSEQUENCES: Mapping[str, Consequence] = {
    "autopayment_job": Consequence(
        "some due subscriptions were not renewed, and the outcome of charges under way may be unknown. Nobody is"
        " charged twice: unfinished attempts keep their keys.",
        "mend what the first line names and launch the job again today; it goes on where it stopped.",
    ),
    "expire_payments_job": Consequence(
        "nothing was charged or granted wrongly; payments that could not be asked about stay PENDING.",
        "nothing today; if it is red again tomorrow, mend what the first line names.",
    ),
    "expire_subscriptions_job": Consequence(
        "no money moved; subscriptions that are over may still be ACTIVE.",
        "if it says it was stopped before applying, look at a dry run and approve its plan; else launch it again.",
    ),
    "matching_pending_payments_job": Consequence(
        "customers may have paid and not got it yet. Nothing is lost: the next tick that succeeds covers all of it.",
        "if no tick has been green for ten minutes, mend what the first line names.",
    ),
    "matching_successful_payments_job": Consequence(
        "customers may have paid and not got it yet. Nothing is lost: the next tick that succeeds covers all of it.",
        "if no tick has been green for ten minutes, mend what the first line names.",
    ),
}
_OTHER = Consequence("no money is handled by this job.", "mend what the first line names.")


def first_words(instance: dg.DagsterInstance, run: dg.DagsterRun) -> str:
    """What a failed run says first: its failed op's own words, else what Dagster says of the run."""
    for entry in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE):
        event = entry.dagster_event
        if event is None:
            continue
        data = event.step_failure_data
        if data.user_failure_data is not None and data.user_failure_data.description:
            return str(data.user_failure_data.description).strip()
        if data.error is not None:
            cause = data.error.cause or data.error
            return str(cause.message).strip().splitlines()[0]
    for entry in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.RUN_FAILURE):
        if entry.dagster_event is not None and entry.dagster_event.message:
            return entry.dagster_event.message.strip().splitlines()[0]
    return "the run failed without a word: its process may have been killed"


def problem_of(job: str, words: str) -> str:
    """The identity of a problem: the job and the first sentence, without what differs from run to run."""
    sentence = re.split(r"(?<=[a-z)\"'])[.;:]\s", words, maxsplit=1)[0]
    plain = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27,}|\d+", "#", sentence.lower())
    return hashlib.sha256(f"{job}\n{plain}".encode()).hexdigest()[:16]


def alert_of(run: dg.DagsterRun, words: str, alerts: Alerts) -> Alert:
    """The alert of a failed run."""
    consequence = CONSEQUENCES.get(run.job_name, _OTHER)
    partition = run.tags.get("dagster/partition")
    shown = words if len(words) <= _SHOWN else f"{words[:_SHOWN]}…"
    return Alert(
        title=f"{run.job_name} failed" + (f" ({partition})" if partition else ""),
        happened=shown,
        money=consequence.money,
        do=f"{consequence.do} See {RUNBOOK}#{run.job_name}",
        link=alerts.link(f"runs/{run.run_id}"),
    )


def tell(instance: dg.DagsterInstance, run: dg.DagsterRun, alerts: Alerts) -> str | None:
    """Alert about a failed run, unless its problem was told of already. Give back why it did not, None if it did."""
    if not alerts.wanted:
        return "ALERT_URLS is not set: nobody is told"
    words = first_words(instance, run)
    problem = problem_of(run.job_name, words)
    if _is_told(instance, run, problem):
        return "told of already, and the job has not succeeded since"
    if not alerts.send(alert_of(run, words, alerts)):
        instance.add_run_tags(run.run_id, {UNSENT_TAG: "yes"})
        return "nobody took the alert; it is tried again"
    instance.add_run_tags(run.run_id, {ALERT_TAG: problem, UNSENT_TAG: "no"})
    return None


def tell_what_was_not_sent(instance: dg.DagsterInstance, alerts: Alerts) -> int:
    """Try the alerts again that nobody took. Give back how many were sent."""
    sent = 0
    for record in instance.get_run_records(dg.RunsFilter(tags={UNSENT_TAG: "yes"}), limit=_MOST_UNSENT):
        why_not = tell(instance, record.dagster_run, alerts)
        sent += why_not is None
        if why_not is not None and why_not.startswith("told of"):
            instance.add_run_tags(record.dagster_run.run_id, {UNSENT_TAG: "no"})
    return sent


def _is_told(instance: dg.DagsterInstance, run: dg.DagsterRun, problem: str) -> bool:
    told = instance.get_run_records(
        dg.RunsFilter(job_name=run.job_name, tags={ALERT_TAG: problem}), limit=_ALERTS_AT_ONCE
    )
    if not told:
        return False
    [failed] = instance.get_run_records(dg.RunsFilter(run_ids=[run.run_id]))
    succeeded = instance.get_run_records(
        dg.RunsFilter(job_name=run.job_name, statuses=[dg.DagsterRunStatus.SUCCESS]), limit=1
    )
    last = _ended(told[0])
    if not succeeded or _ended(succeeded[0]) <= last:
        return True
    within_a_day = [record for record in told if _ended(failed) - _ended(record) < timedelta(days=1)]
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
        why_not = tell(context.instance, context.dagster_run, alerts)
        return None if why_not is None else dg.SkipReason(why_not)

    return sensor
