"""expire_subscriptions_job: ACTIVE subscriptions that ended more than the grace ago become EXPIRED.

Daily at 05:00, after the day's renewals had their chance. One whose charge has an unknown or pending outcome is held
back: the customer may have paid. A run that would end too many stops before it changes anything.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

import dagster as dg

from billing_orchestration.database.audit import Stamp
from billing_orchestration.domain.decisions import Decision
from billing_orchestration.domain.expiry import guard_verdict, subscriptions_over_before
from billing_orchestration.domain.run_scope import RunScope
from billing_orchestration.jobs.partitions import BILLING_TIMEZONE, DAILY, day_key
from billing_orchestration.jobs.run_report import (
    ROWS_SHOWN,
    RunReport,
    conclude,
    describe_decisions,
    describe_scope,
    instant,
    plot,
    stop_before_applying,
    told_plainly,
)
from billing_orchestration.jobs.schedules import singleton_tags, tick_schedule
from billing_orchestration.resources import BillingDatabase, Clock, RunSettings

if TYPE_CHECKING:
    from billing_orchestration.database.expiry import OverSlice

JOB = "expire_subscriptions_job"
MAX_RUNTIME_S = 3600
# Rows of one transaction: few enough that the service never waits long for a locked row.
CHUNK = 10_000


@dataclass(frozen=True)
class SubscriptionsOver:
    """The database's slice: counts and examples, never the million rows themselves."""

    scope: RunScope
    over_before: datetime
    slice: "OverSlice"


@dg.op(description="Count the ACTIVE subscriptions that are over, and those of them that are held back, with examples.")
def fetch_subscriptions_over(
    context: dg.OpExecutionContext,
    run: RunSettings,
    billing_database: dg.ResourceParam[BillingDatabase],
    clock: dg.ResourceParam[Clock],
) -> SubscriptionsOver:
    """The database's slice."""
    with told_plainly():
        from billing_orchestration.database.engine import translated
        from billing_orchestration.database.expiry import fetch_over

        settings = billing_database.settings
        scope = run.scope(context, clock, whole_days=True)
        over_before = subscriptions_over_before(
            scope.as_of, billing_database.calendar, settings.subscription_grace_days
        )
        with translated(), billing_database.engine.connect() as connection:
            found = fetch_over(connection, over_before, ROWS_SHOWN)
    context.add_output_metadata(
        {
            **describe_scope(scope),
            "ended before": dg.MetadataValue.text(instant(over_before)),
            "ACTIVE": dg.MetadataValue.int(found.active),
            "over": dg.MetadataValue.int(found.over),
            "held back": dg.MetadataValue.int(found.held),
            "ACTIVE without an end": dg.MetadataValue.int(found.without_end),
        }
    )
    return SubscriptionsOver(scope, over_before, found)


@dg.op(description="Decide: what is over and not held back expires, unless that is suspiciously much (the guard).")
def diff_subscriptions_over(context: dg.OpExecutionContext, over: SubscriptionsOver) -> SubscriptionsOver:
    """The decisions, and the guard on the blast radius."""
    decisions = _decisions(over)
    stop_before_applying(
        guard_verdict(over.slice.over - over.slice.held, over.slice.active, over.scope.max_changes), decisions
    )
    context.add_output_metadata(describe_decisions(decisions))
    return over


@dg.op(
    description="Set them EXPIRED in chunks, each row re-read under lock with its precondition, with the audit trail."
)
def apply_subscription_expiry(
    context: dg.OpExecutionContext,
    over: SubscriptionsOver,
    billing_database: dg.ResourceParam[BillingDatabase],
    clock: dg.ResourceParam[Clock],
) -> None:
    """ACTIVE -> EXPIRED, oldest first."""
    report = RunReport(decisions=_decisions(over))
    wanted = over.slice.over - over.slice.held
    with told_plainly():
        if over.scope.dry_run:
            report.applied = wanted
        elif wanted:
            report.applied = _expire(context, over, wanted, billing_database, clock, report)
    report.skipped = over.slice.held
    if not over.scope.dry_run:
        plot(
            context,
            ("billing", JOB),
            {"expired": report.applied, "held back": over.slice.held, "active": over.slice.active - report.applied},
            day=str(billing_database.calendar.day_of(over.scope.as_of)),
        )
    conclude(
        context,
        over.scope,
        report,
        retry_hint="No money is involved. They stay ACTIVE; launch the job again, or wait for tomorrow's run.",
        job=JOB,
    )


def _decisions(over: SubscriptionsOver) -> list[Decision]:
    return [
        Decision("leave", f"subscription {sample.id}", f"held back: {sample.why_held}")
        if sample.why_held
        else Decision("expire", f"subscription {sample.id}", f"user {sample.user_id}, ended {sample.ended_at} UTC")
        for sample in over.slice.samples
    ]


def _expire(
    context: dg.OpExecutionContext,
    over: SubscriptionsOver,
    wanted: int,
    database: BillingDatabase,
    clock: Clock,
    report: RunReport,
) -> int:
    """Chunk after chunk, first past locked rows, then waiting for them; never more than were shown and guarded."""
    from billing_orchestration.database.engine import translated
    from billing_orchestration.database.errors import DatabaseBusy
    from billing_orchestration.database.expiry import expire_subscriptions, fetch_over

    reason = f"the grace of {database.settings.subscription_grace_days} days is over"
    done = 0
    for wait_for_locks in (False, True):
        while done < wanted:
            stamp = Stamp(JOB, over.scope.run_id, clock.now())
            try:
                with translated(), database.engine.begin() as connection:
                    expired = expire_subscriptions(
                        connection,
                        stamp,
                        over_before=over.over_before,
                        reason=reason,
                        size=min(CHUNK, wanted - done),
                        wait_for_locks=wait_for_locks,
                    )
            except DatabaseBusy as error:
                report.again.append(f"{wanted - done} subscriptions: {error}")
                return done
            if not expired:
                break
            done += expired
            context.log.info(f"expired {done} of {wanted}")
    if done < wanted:
        with translated(), database.engine.connect() as connection:
            left = fetch_over(connection, over.over_before, 0)
        context.log.info(
            f"{wanted - done} were renewed, ended or held back meanwhile; {left.over - left.held} are left"
        )
    return done


@dg.job(
    name=JOB,
    description="Expires ACTIVE subscriptions whose grace is over.",
    partitions_def=DAILY,
    executor_def=dg.in_process_executor,
    tags=singleton_tags(JOB, MAX_RUNTIME_S),
)
def expire_subscriptions_job() -> None:
    """Database slice, diff with the guard, apply."""
    apply_subscription_expiry(diff_subscriptions_over(fetch_subscriptions_over()))


expire_subscriptions_daily_schedule = tick_schedule(
    expire_subscriptions_job,
    name="expire_subscriptions_daily_schedule",
    cron="0 5 * * *",
    timezone=BILLING_TIMEZONE,
    partition_key=day_key,
    description="Daily at 05:00 in the billing time zone, after renewals (03:00) and payments (04:00).",
)
