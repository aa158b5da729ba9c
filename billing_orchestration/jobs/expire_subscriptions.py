"""expire_subscriptions_job: ACTIVE subscriptions that ended more than the grace ago become EXPIRED.

Daily at 05:00, after the day's renewals had their chance. One whose charge has an unknown or pending outcome is held
back: the customer may have paid. A run that would end too many stops before it changes anything.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

import dagster as dg

from billing_orchestration.database.audit import Problem, Stamp
from billing_orchestration.domain.decisions import Action, Code, Decision
from billing_orchestration.domain.expiry import subscriptions_over_before
from billing_orchestration.domain.run_scope import RunScope, guard_verdict
from billing_orchestration.jobs.approval import bind
from billing_orchestration.jobs.partitions import BILLING_TIMEZONE, DAILY, day_key
from billing_orchestration.jobs.run_failures import FailureCode, failed
from billing_orchestration.jobs.run_report import (
    ROWS_SHOWN,
    RunReport,
    Told,
    conclude,
    describe_decisions,
    describe_scope,
    instant,
    plotted,
    stop_before_applying,
    told_plainly,
)
from billing_orchestration.jobs.schedules import singleton_tags, tick_schedule
from billing_orchestration.jobs.settling import open_all
from billing_orchestration.resources import BillingDatabase, Clock, RunSettings
from billing_orchestration.threads import Threads

if TYPE_CHECKING:
    from billing_orchestration.database.expiry import OverSlice

JOB = "expire_subscriptions_job"
MAX_RUNTIME_S = 3600
# Rows of one transaction: few enough that the service never waits long for a locked row.
CHUNK = 10_000
# So many chunks at a time: PostgreSQL works on one statement with one core, and chunks are disjoint.
SIDE_BY_SIDE = 2
# How a chunk is cut down to find the row in it that the database refuses, and grows again after it.
SHRINK = 10
# So many refused and not one expired: that is no odd row, that is a database which refuses everything.
MOST_REFUSED = 20


@dataclass(frozen=True)
class SubscriptionsOver:
    """The database's slice: counts and examples, never the million rows themselves."""

    scope: RunScope
    over_before: datetime
    slice: "OverSlice"
    digest: str | None = None


@dg.op(description="Count the ACTIVE subscriptions that are over, and those of them that are held back, with examples.")
def fetch_subscriptions_over(
    context: dg.OpExecutionContext,
    run: RunSettings,
    billing_database: dg.ResourceParam[BillingDatabase],
    clock: dg.ResourceParam[Clock],
) -> SubscriptionsOver:
    """The database's slice."""
    with told_plainly():
        from billing_orchestration.database.expiry import digest_over, fetch_over

        settings = billing_database.settings
        scope = run.scope(context, clock, whole_days=True)
        over_before = subscriptions_over_before(
            scope.as_of, billing_database.calendar, settings.subscription_grace_days
        )
        with billing_database.read() as connection:
            found = fetch_over(connection, over_before, ROWS_SHOWN)
            # Reading every row costs; only a preview and its approval name them all.
            digest = digest_over(connection, over_before) if scope.dry_run or scope.approved_plan else None
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
    return SubscriptionsOver(scope, over_before, found, digest)


@dg.op(description="Decide: what is over and not held back expires, unless that is suspiciously much (the guard).")
def diff_subscriptions_over(context: dg.OpExecutionContext, over: SubscriptionsOver) -> SubscriptionsOver:
    """The decisions, and the guard on the blast radius."""
    decisions = _decisions(over)
    stop_before_applying(
        guard_verdict(over.slice.over - over.slice.held, over.slice.active, over.scope.max_changes), decisions
    )
    context.add_output_metadata(describe_decisions(decisions))
    # A million rows are one change here: an approval holds for exactly this set, or for nothing.
    line = f"expire {over.slice.over - over.slice.held} subscriptions {over.digest}"
    shown = Decision(
        Action.EXPIRE, f"{over.slice.over - over.slice.held} subscriptions", f"ended before {over.over_before}"
    )
    _, refused = bind(context, over.scope, [(line, over)], {line: shown})
    if refused:
        raise failed(
            FailureCode.PLAN_CHANGED,
            f"stopped before anything was applied: the subscriptions that are over are no longer those of the approved"
            f" plan {over.scope.approved_plan}. Launch a new dry run and approve its plan",
        )
    return over


@dg.op(
    description="Set them EXPIRED in chunks, each row re-read under lock with its precondition, with the audit trail.",
    out=dg.Out(dg.Nothing),
)
def apply_subscription_expiry(
    context: dg.OpExecutionContext,
    over: SubscriptionsOver,
    billing_database: dg.ResourceParam[BillingDatabase],
    clock: dg.ResourceParam[Clock],
    threads: dg.ResourceParam[Threads],
) -> Told:
    """ACTIVE -> EXPIRED, oldest first."""
    report = RunReport(decisions=_decisions(over))
    wanted = over.slice.over - over.slice.held
    with told_plainly():
        if over.scope.dry_run:
            report.applied = wanted
        elif wanted:
            report.applied = expire_all(over, wanted, billing_database, clock, threads, report, context.log.info)
    changed_meanwhile = 0 if report.again else wanted - report.applied - report.quarantined
    report.skipped = over.slice.held + changed_meanwhile
    report.numbers = {"held back": over.slice.held, "changed meanwhile": changed_meanwhile}
    if changed_meanwhile:
        context.log.info(f"{changed_meanwhile} were renewed, ended or held back meanwhile: skipped")
    if not over.scope.dry_run:
        yield plotted(
            context,
            ("billing", JOB),
            {"expired": report.applied, "held back": over.slice.held, "active": over.slice.active - report.applied},
            day=str(billing_database.calendar.day_of(over.scope.as_of)),
            levels=frozenset({"held back", "active"}),
        )
    conclude(
        context,
        over.scope,
        report,
        retry_hint="No money is involved. They stay ACTIVE; launch the job again, or wait for tomorrow's run.",
        job=JOB,
    )
    yield dg.Output(None)


def _decisions(over: SubscriptionsOver) -> list[Decision]:
    return [
        Decision(Action.LEAVE, f"subscription {sample.id}", f"held back: {sample.why_held}", code=Code.HELD_BACK)
        if sample.why_held
        else Decision(Action.EXPIRE, f"subscription {sample.id}", f"user {sample.user_id}, ended {sample.ended_at} UTC")
        for sample in over.slice.samples
    ]


def expire_all(
    over: SubscriptionsOver,
    wanted: int,
    database: BillingDatabase,
    clock: Clock,
    threads: Threads,
    report: RunReport,
    log: Callable[[str], None],
) -> int:
    """Chunks side by side, then what they left: chunk after chunk, first past locked rows, then waiting for them.

    Never more than were shown and guarded. A chunk that the database refuses is cut down until the one row in it is
    found, which then goes to quarantine.
    """
    from billing_orchestration.database.errors import DatabaseBusy
    from billing_orchestration.database.expiry import NotExpired, expire_subscriptions

    reason = f"the grace of {database.settings.subscription_grace_days} days is over"
    refused: dict[int, Problem] = {}

    def expire(size: int, *, wait_for_locks: bool) -> int:
        with database.begin() as connection:
            return expire_subscriptions(
                connection,
                Stamp(JOB, over.scope.run_id, clock.now()),
                over_before=over.over_before,
                reason=reason,
                size=size,
                wait_for_locks=wait_for_locks,
                passed_over=list(refused),
            )

    done = 0
    if wanted >= SIDE_BY_SIDE * CHUNK:
        done = _expire_side_by_side(over, wanted, database, clock, threads, reason, log)
    size = CHUNK
    for wait_for_locks in (False, True):
        while done + len(refused) < wanted:
            try:
                expired = expire(min(size, wanted - done - len(refused)), wait_for_locks=wait_for_locks)
            except DatabaseBusy as error:
                report.again.append(f"{wanted - done - len(refused)} subscriptions: {error}")
                break
            except NotExpired as error:
                if len(error.ids) > 1:
                    size = max(1, len(error.ids) // SHRINK)
                    continue
                refused |= {id_: _refused(id_, str(error.__cause__)) for id_ in error.ids}
                if len(refused) >= MOST_REFUSED and not done and error.__cause__ is not None:
                    raise error.__cause__ from None
                continue
            if not expired:
                break
            done += expired
            size = min(CHUNK, size * SHRINK)
            log(f"expired {done} of {wanted}")
    report.quarantined = len(refused)
    report.decisions.extend(
        Decision(Action.QUARANTINE, problem.subject, problem.reason, code=problem.kind) for problem in refused.values()
    )
    report.opened = open_all(database, Stamp(JOB, over.scope.run_id, clock.now()), list(refused.values()))
    return done


def _expire_side_by_side(
    over: SubscriptionsOver,
    wanted: int,
    database: BillingDatabase,
    clock: Clock,
    threads: Threads,
    reason: str,
    log: Callable[[str], None],
) -> int:
    """Expire chunks, some at a time, each from where the one before it ends; give back how many expired.

    What it leaves (what is locked, or a chunk that the database refuses) is the caller's, who goes about it one chunk
    at a time. They are locked in turn, and what is locked counts as done: together they never expire more than
    `wanted`.
    """
    from billing_orchestration.database.errors import DatabaseBusy, RowRefused
    from billing_orchestration.database.expiry import expire_locked, lock_over

    turn = threads.make_lock()
    done = claimed = 0
    after: tuple[str, int] | None = None

    def expire_next() -> bool:
        """One chunk, in a transaction of its own. False: there are no more."""
        nonlocal done, claimed, after
        with database.begin() as connection:
            with turn:
                size = min(CHUNK, wanted - claimed)
                locked = lock_over(connection, over.over_before, size, after) if size else None
                if locked is None:
                    return False
                claimed, after = claimed + locked.count, locked.last
            stamp = Stamp(JOB, over.scope.run_id, clock.now())
            expired = expire_locked(connection, stamp, locked, over_before=over.over_before, reason=reason)
        with turn:
            done += expired
            log(f"expired {done} of {wanted}")
        return True

    def work() -> None:
        is_more = True
        while is_more:
            try:
                is_more = expire_next()
            except RowRefused:
                continue
            except DatabaseBusy:
                return

    # Leaving the pool waits for what is under way: nothing is committed behind the caller's back.
    with threads.make_pool(SIDE_BY_SIDE, "expire") as pool:
        working = [pool.submit(work) for _ in range(SIDE_BY_SIDE)]
    for worker in working:
        worker.result()
    return done


def _refused(subscription_id: int, error: str) -> Problem:
    return Problem(
        f"subscription {subscription_id}",
        "not_writable",
        f"expiring it failed: {error}",
        subscription_id=subscription_id,
    )


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
