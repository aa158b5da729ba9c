"""expire_subscriptions_job: ACTIVE subscriptions that ended more than the grace ago become EXPIRED.

Daily at 05:00, after the day's renewals had their chance. One whose charge has an unknown or pending outcome is held
back: the customer may have paid. A run that would end too many stops before it changes anything.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

import dagster as dg

from billing_orchestration.database.audit import Problem, Stamp
from billing_orchestration.database.errors import BillingDatabaseError, DatabaseBusy
from billing_orchestration.database.expiry import (
    Chunk,
    NotExpired,
    OverSlice,
    digest_over,
    expire_locked,
    expire_subscriptions,
    fetch_over,
    lock_over,
)
from billing_orchestration.database.one_by_one import NotWritten, Witnesses, is_about_every_row
from billing_orchestration.domain.clocks import Clocks
from billing_orchestration.domain.decisions import Action, Code, Decision
from billing_orchestration.domain.expiry import subscriptions_over_before
from billing_orchestration.domain.run_scope import RunScope, guard_verdict
from billing_orchestration.jobs.approval import bind
from billing_orchestration.jobs.clocks import describe_clocks, look_at_clocks, stop_if_clocks_are_apart
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
from billing_orchestration.jobs.settling import Refused, report_refused
from billing_orchestration.resources import AFTER, BillingDatabase, Clock, HandOver, RunSettings
from billing_orchestration.threads import Threads

JOB = "expire_subscriptions_job"
MAX_RUNTIME_S = 3600
# Rows of one transaction: few enough that the service never waits long for a locked row.
CHUNK = 10_000
# At most this many chunks at once: PostgreSQL works on one statement with one core, and chunks are disjoint.
SIDE_BY_SIDE = 2
# A chunk in which the database refuses a row shrinks by this factor until that row is found, then grows again.
SHRINK = 10
# After this many refusals without a single expiry the database refuses everything, not an odd row.
MOST_REFUSED = 20


@dataclass(frozen=True)
class SubscriptionsOver:
    """The database's slice: counts and examples, never the million rows themselves."""

    scope: RunScope
    over_before: datetime
    slice: OverSlice
    clocks: Clocks
    digest: str | None = None

    @property
    def wanted(self) -> int:
        """How many are to expire."""
        return self.slice.over - self.slice.held


@dg.op(description="Count the ACTIVE subscriptions that are over, and those of them that are held back, with examples.")
def fetch_subscriptions_over(
    context: dg.OpExecutionContext,
    run: RunSettings,
    billing_database: dg.ResourceParam[BillingDatabase],
    clock: dg.ResourceParam[Clock],
    hand_over: dg.ResourceParam[HandOver],
) -> None:
    """The database's slice."""
    with told_plainly():
        settings = billing_database.settings
        scope = run.scope(context, clock, whole_days=True)
        over_before = subscriptions_over_before(
            scope.as_of, billing_database.calendar, settings.subscription_grace_days
        )
        with billing_database.read() as connection:
            found = fetch_over(connection, over_before, ROWS_SHOWN)
            # Reading every row costs; only a preview and its approval name them all.
            digest = digest_over(connection, over_before) if scope.dry_run or scope.approved_plan else None
        clocks = look_at_clocks(billing_database, clock)
    context.add_output_metadata(
        {
            **describe_scope(scope),
            **describe_clocks(context, clocks),
            "ended before": dg.MetadataValue.text(instant(over_before)),
            "ACTIVE": dg.MetadataValue.int(found.active),
            "over": dg.MetadataValue.int(found.over),
            "held back": dg.MetadataValue.int(found.held),
            "ACTIVE without an end": dg.MetadataValue.int(found.without_end),
        }
    )
    hand_over.leave(SubscriptionsOver(scope, over_before, found, clocks, digest))


@dg.op(
    description="Decide: expire what is over and not held back, unless that is suspiciously many (the guard).",
    ins=AFTER,
)
def diff_subscriptions_over(context: dg.OpExecutionContext, hand_over: dg.ResourceParam[HandOver]) -> None:
    """The decisions, and the guard on the blast radius."""
    with told_plainly():
        over = hand_over.take(SubscriptionsOver)
    decisions = _decisions(over)
    stop_if_clocks_are_apart(over.clocks)
    stop_before_applying(guard_verdict(over.wanted, over.slice.active, over.scope.max_changes), decisions)
    context.add_output_metadata(describe_decisions(decisions))
    # A million rows are one change here: an approval holds for exactly this set, or for nothing.
    line = f"expire {over.wanted} subscriptions {over.digest}"
    shown = Decision(Action.EXPIRE, f"{over.wanted} subscriptions", f"ended before {over.over_before}")
    _, refused = bind(context, over.scope, [(line, over)], {line: shown})
    if refused:
        raise failed(
            FailureCode.PLAN_CHANGED,
            f"stopped before anything was applied: the subscriptions that are over are no longer those of the approved"
            f" plan {over.scope.approved_plan}. Launch a new dry run and approve its plan",
        )


@dg.op(
    description="Set them EXPIRED in chunks, each row re-read under lock with its precondition, with the audit trail.",
    ins=AFTER,
    out=dg.Out(dg.Nothing),
)
def apply_subscription_expiry(
    context: dg.OpExecutionContext,
    billing_database: dg.ResourceParam[BillingDatabase],
    clock: dg.ResourceParam[Clock],
    threads: dg.ResourceParam[Threads],
    hand_over: dg.ResourceParam[HandOver],
) -> Told:
    """ACTIVE -> EXPIRED, oldest first."""
    with told_plainly():
        over = hand_over.take(SubscriptionsOver)
        report = RunReport(decisions=_decisions(over))
        if over.scope.dry_run:
            report.applied = over.wanted
        elif over.wanted:
            expire_chunks(over, billing_database, clock, threads, report, context.log.info)
    changed_meanwhile = 0 if report.again else over.wanted - report.applied - report.quarantined
    report.skipped = over.slice.held + changed_meanwhile
    report.numbers = {"held back": over.slice.held, "changed meanwhile": changed_meanwhile}
    if changed_meanwhile:
        context.log.info(f"{changed_meanwhile} were renewed, ended or held back meanwhile: skipped")
    if not over.scope.dry_run:
        yield plotted(
            context,
            JOB,
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
        else Decision(Action.EXPIRE, f"subscription {sample.id}", f"ended {sample.ended_at} UTC")
        for sample in over.slice.samples
    ]


def expire_chunks(
    over: SubscriptionsOver,
    database: BillingDatabase,
    clock: Clock,
    threads: Threads,
    report: RunReport,
    log: Callable[[str], None],
) -> None:
    """Expire what was shown and guarded, never more, in chunks that PostgreSQL finds and locks itself.

    First some chunks at once, then what they left: chunk after chunk, past locked rows at first, waiting for them at
    last. A row that the database refuses goes to quarantine.
    Unlike expire_payments_job, which knows each row because it has asked about it, nothing of a row reaches Python
    here: a million of them expire in constant memory.
    """
    expiring = _Expiring(over, database, clock, threads, report, log)
    if over.wanted >= SIDE_BY_SIDE * CHUNK:
        expiring.side_by_side()
    for wait_for_locks in (False, True):
        expiring.one_after_another(wait_for_locks=wait_for_locks)
    expiring.report_refused()


@dataclass
class _Expiring:
    """The expiry of one run: `report.applied` counts what has expired so far."""

    over: SubscriptionsOver
    database: BillingDatabase
    clock: Clock
    threads: Threads
    report: RunReport
    log: Callable[[str], None]
    refused: dict[int, BillingDatabaseError] = field(default_factory=dict)
    witnesses: Witnesses = field(default_factory=Witnesses)

    def stamp(self) -> Stamp:
        return Stamp(JOB, self.over.scope.run_id, self.clock.now())

    @property
    def _reason(self) -> str:
        return f"the grace of {self.database.settings.subscription_grace_days} days is over"

    def _expired(self, count: int) -> None:
        if not count:
            return
        self.witnesses.written()
        self.report.applied += count
        self.log(f"expired {self.report.applied} of {self.over.wanted}")

    def one_after_another(self, *, wait_for_locks: bool) -> None:
        """Expire chunk after chunk, until there are no more or the database is too busy.

        A chunk that the database refuses shrinks until the row that it refuses is found.
        """
        size = CHUNK
        while left := max(0, self.over.wanted - self.report.applied - len(self.refused)):
            try:
                chunk = self._expire_oldest(min(size, left), wait_for_locks=wait_for_locks)
            except DatabaseBusy as error:
                self.report.again.append(f"{left} subscriptions: {error}")
                return
            except NotExpired as error:
                if error.each:
                    self._pass_over(error)
                else:
                    size = max(1, len(error.ids) // SHRINK)
                continue
            if not chunk.locked:
                return
            self._expired(chunk.expired)
            size = min(CHUNK, size * SHRINK)

    def _pass_over(self, error: NotExpired) -> None:
        """Leave these out from now on. Raises the refusal if it seems to be about all others too."""
        self.refused |= dict.fromkeys(error.ids, error.refusal)
        if error.refusal.is_doubtful:
            self.witnesses.refused(error.refusal)
        elif len(self.refused) >= MOST_REFUSED and len(error.ids) == error.locked and not self.report.applied:
            raise error.refusal

    def _expire_oldest(self, size: int, *, wait_for_locks: bool) -> Chunk:
        with self.database.begin() as connection:
            return expire_subscriptions(
                connection,
                self.stamp(),
                over_before=self.over.over_before,
                reason=self._reason,
                size=size,
                wait_for_locks=wait_for_locks,
                passed_over=list(self.refused),
            )

    def report_refused(self) -> None:
        """Put into quarantine what the database refuses, or leave it to the next run."""
        refused = []
        for id_, error in self.refused.items():
            is_in_doubt = error.is_doubtful and not self.report.applied
            refusal = NotWritten(
                str(error),
                for_good=not is_in_doubt and not isinstance(error, DatabaseBusy),
                doubt=error if is_in_doubt else None,
            )
            refused.append(Refused(_problem(id_, refusal.reason), refusal))
        report_refused(self.report, refused, database=self.database, stamp=self.stamp())

    def side_by_side(self) -> None:
        """Expire some chunks at once, each from where the one before it ends.

        It leaves what is locked, and chunks that the database refuses. Chunks are locked in turn, and what is locked
        counts as done: together they never expire more than is wanted.
        """
        turn = self.threads.make_lock()
        claimed = 0
        after: tuple[str, int] | None = None

        def expire_next() -> bool:
            """One chunk, in a transaction of its own. False: there are no more."""
            nonlocal claimed, after
            with self.database.begin() as connection:
                with turn:
                    size = min(CHUNK, self.over.wanted - claimed)
                    locked = lock_over(connection, self.over.over_before, size, after) if size else None
                    if locked is None:
                        return False
                    claimed, after = claimed + locked.count, locked.last
                expired = expire_locked(
                    connection, self.stamp(), locked, over_before=self.over.over_before, reason=self._reason
                )
            with turn:
                self._expired(expired)
            return True

        def work() -> None:
            is_more = True
            while is_more:
                try:
                    is_more = expire_next()
                except DatabaseBusy:
                    return
                except BillingDatabaseError as error:
                    if is_about_every_row(error):
                        raise

        # Leaving the pool waits for what is under way: nothing is committed behind the caller's back.
        with self.threads.make_pool(SIDE_BY_SIDE, "expire") as pool:
            working = [pool.submit(work) for _ in range(SIDE_BY_SIDE)]
        for worker in working:
            worker.result()


def _problem(subscription_id: int, error: str) -> Problem:
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
