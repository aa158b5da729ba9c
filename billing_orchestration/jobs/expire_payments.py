"""expire_payments_job: PENDING payments that nobody paid for days become EXPIRED, after the provider was asked.

Daily at 04:00. What the provider lists as unpaid takes one request for a hundred, every other payment one of its own.
One that turns out to be paid is settled instead; one whose money is held uncaptured, or about which the provider does
not answer, stays PENDING. A success that arrives after expiry is still settled by the matching jobs.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain

import dagster as dg
from pydantic import Field

from billing_orchestration.database.audit import Problem, Stamp
from billing_orchestration.database.expiry import expire_payments, stream_stale_payments
from billing_orchestration.database.one_by_one import NotWritten, Witnesses, one_by_one
from billing_orchestration.database.settling import Settled
from billing_orchestration.domain.clocks import Clocks
from billing_orchestration.domain.decisions import Action, Code, Decision, Tally
from billing_orchestration.domain.expiry import (
    AskedPayment,
    ExpirePayment,
    KeepPending,
    PaymentExpiry,
    SettleLate,
    StalePayment,
    decide_payment_expiry,
    payments_over_before,
)
from billing_orchestration.domain.run_scope import RunScope, over_limit
from billing_orchestration.domain.settlement_decisions import CloseAsGranted, Leave, RecordRefund, Settle
from billing_orchestration.jobs.approval import bind
from billing_orchestration.jobs.clocks import describe_clocks, look_at_clocks, note_clocks
from billing_orchestration.jobs.inquiry import Inquiry
from billing_orchestration.jobs.partitions import BILLING_TIMEZONE, DAILY, day_key
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
from billing_orchestration.jobs.settling import (
    Failed,
    Refused,
    report_refused,
    report_settled,
    report_unusable,
    settle_all,
)
from billing_orchestration.jobs.spool import Spool
from billing_orchestration.resources import AFTER, BillingDatabase, Clock, HandOver, ProviderConnection, RunSettings
from billing_orchestration.threads import Threads

JOB = "expire_payments_job"
MAX_RUNTIME_S = 6 * 3600
# Rows held in memory at once, and rows of one transaction: few enough that the service's webhook never waits long for
# one of them.
PAGE = 5000
# A page that the database refuses, or is too busy for, is written in parts of this many rows; such a part row by row.
PART = 100
# At most this many transactions at once: PostgreSQL works on one statement with one core, and pages are disjoint.
SIDE_BY_SIDE = 2


class ExpirePaymentsConfig(dg.Config):
    """What only this job needs."""

    max_concurrency: int = Field(default=8, ge=1, le=64, description="Look up at most this many payments at once.")


@dataclass(frozen=True)
class StalePayments:
    """The database's slice, in pages."""

    scope: RunScope
    rows: Spool[StalePayment]


@dataclass(frozen=True)
class AskedPayments:
    """Both slices, in pages: each row with the provider's answer (None: it has no provider id)."""

    scope: RunScope
    rows: Spool[AskedPayment]
    clocks: Clocks


@dataclass(frozen=True)
class ExpiryPlan:
    """What the run will apply. Only the exceptions are held in memory. `held`: how many a wrong clock keeps PENDING."""

    scope: RunScope
    expiries: Spool[ExpirePayment]
    late: tuple[SettleLate, ...]
    kept: tuple[KeepPending, ...]
    clocks: Clocks
    held: int = 0
    refused: tuple[Decision, ...] = ()


@dg.op(description="Read the PENDING payments created more than PENDING_PAYMENT_TTL_DAYS before as_of.")
def fetch_stale_payments(
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
        created_before = payments_over_before(scope.as_of, settings.pending_payment_ttl_days)
        rows: Spool[StalePayment] = Spool()
        with billing_database.read() as connection:
            for page in stream_stale_payments(connection, created_before, PAGE):
                rows.add(page)
    context.add_output_metadata(
        {
            **describe_scope(scope),
            "created before": dg.MetadataValue.text(instant(created_before)),
            "stale PENDING payments": dg.MetadataValue.int(len(rows)),
        }
    )
    hand_over.leave(StalePayments(scope, rows))


@dg.op(
    description="Ask the provider: its lists of unpaid payments, then about each other one, a few at once.", ins=AFTER
)
def fetch_stale_at_provider(
    context: dg.OpExecutionContext,
    config: ExpirePaymentsConfig,
    billing_database: dg.ResourceParam[BillingDatabase],
    payment_provider: dg.ResourceParam[ProviderConnection],
    clock: dg.ResourceParam[Clock],
    threads: dg.ResourceParam[Threads],
    hand_over: dg.ResourceParam[HandOver],
) -> None:
    """The provider's slice, page by page: one answer per id. A wrong shop key fails the run after one request."""
    inquiry = Inquiry(payment_provider, config.max_concurrency, threads, context.log.warning)
    asked: Spool[AskedPayment] = Spool()
    with told_plainly():
        stale = hand_over.take(StalePayments)
        for page in stale.rows.pages():
            answers = inquiry.ask_about(page)
            asked.add(
                [
                    AskedPayment(row, answers[row.external_payment_id] if row.external_payment_id else None)
                    for row in page
                ]
            )
        clocks = look_at_clocks(billing_database, clock, payment_provider if inquiry.asked else None)
    stale.rows.close()
    context.add_output_metadata(
        {
            **describe_clocks(context, clocks),
            "asked": dg.MetadataValue.int(inquiry.asked),
            "of them, unpaid by the provider's lists": dg.MetadataValue.int(inquiry.listed),
            "not found there": dg.MetadataValue.int(inquiry.not_found),
            "no answer": dg.MetadataValue.int(inquiry.unanswered),
        }
    )
    hand_over.leave(AskedPayments(stale.scope, asked, clocks))


@dg.op(description="Decide each: settle what is paid, expire what is not, leave what is held or unknown.", ins=AFTER)
def diff_stale_payments(
    context: dg.OpExecutionContext,
    billing_database: dg.ResourceParam[BillingDatabase],
    clock: dg.ResourceParam[Clock],
    hand_over: dg.ResourceParam[HandOver],
) -> None:
    """One decision per row."""
    with told_plainly():
        asked = hand_over.take(AskedPayments)
        ttl_days = billing_database.settings.pending_payment_ttl_days
        now = asked.clocks.at_provider(clock.now())
    expiries: Spool[ExpirePayment] = Spool()
    late: list[SettleLate] = []
    kept: list[KeepPending] = []
    held = 0
    shown = Tally(ROWS_SHOWN)
    for page in asked.rows.pages():
        decisions = [decide_payment_expiry(row, answer, ttl_days, now) for row, answer in page]
        if not asked.clocks.may_be_trusted:
            held += sum(isinstance(decision, ExpirePayment) for decision in decisions)
            decisions = [decision for decision in decisions if not isinstance(decision, ExpirePayment)]
        shown.extend(_shown(decision) for decision in decisions)
        expiries.add([decision for decision in decisions if isinstance(decision, ExpirePayment)])
        late += [decision for decision in decisions if isinstance(decision, SettleLate)]
        kept += [decision for decision in decisions if isinstance(decision, KeepPending)]
    asked.rows.close()
    scope = asked.scope
    stop_before_applying(over_limit(len(expiries) + len(late), scope.max_changes), shown)
    context.add_output_metadata(describe_decisions(shown))
    plan = ExpiryPlan(scope, expiries, tuple(late), tuple(kept), asked.clocks, held)
    hand_over.leave(_bound(context, plan) if scope.dry_run or scope.approved_plan is not None else plan)


def _bound(context: dg.OpExecutionContext, plan: ExpiryPlan) -> ExpiryPlan:
    """What of the plan was approved. A preview and its approval name every change, so they hold them all in memory."""
    planned: list[SettleLate | ExpirePayment] = [*plan.late, *chain.from_iterable(plan.expiries.pages())]
    changes = {_line(change): change for change in planned}
    approved, refused = bind(
        context, plan.scope, list(changes.items()), {line: _shown(change) for line, change in changes.items()}
    )
    expiries: Spool[ExpirePayment] = Spool()
    expiring = [change for change in approved if isinstance(change, ExpirePayment)]
    for start in range(0, len(expiring), PAGE):
        expiries.add(expiring[start : start + PAGE])
    late = tuple(change for change in approved if isinstance(change, SettleLate))
    return ExpiryPlan(plan.scope, expiries, late, plan.kept, plan.clocks, plan.held, tuple(refused))


def _line(decision: SettleLate | ExpirePayment) -> str:
    """What an approval of this change is bound to."""
    row = decision.row
    if isinstance(decision, SettleLate):
        payment = decision.payment
        return f"settle {row.id} {payment.id} {payment.money} refunded {payment.refunded_amount}"
    return f"expire {row.id} {row.external_payment_id}"


def _shown(decision: PaymentExpiry) -> Decision:
    row = decision.row
    if isinstance(decision, SettleLate):
        return Decision(Action.SETTLE, row.subject, f"paid at the provider ({decision.payment.id})", row.money)
    if isinstance(decision, ExpirePayment):
        return Decision(Action.EXPIRE, row.subject, decision.reason, row.money, decision.code)
    action = Action.QUARANTINE if decision.quarantine else Action.LEAVE
    return Decision(action, row.subject, decision.reason, row.money, decision.code)


@dg.op(
    description="Settle the paid ones, set the others EXPIRED, each by its precondition, with the audit trail.",
    ins=AFTER,
    out=dg.Out(dg.Nothing),
)
def apply_payment_expiry(
    context: dg.OpExecutionContext,
    billing_database: dg.ResourceParam[BillingDatabase],
    payment_provider: dg.ResourceParam[ProviderConnection],
    clock: dg.ResourceParam[Clock],
    threads: dg.ResourceParam[Threads],
    hand_over: dg.ResourceParam[HandOver],
) -> Told:
    """Apply the plan; red at the end if something must be retried."""
    report = RunReport(decisions=Tally(ROWS_SHOWN))
    with told_plainly():
        plan = hand_over.take(ExpiryPlan)
        scope = plan.scope

        def stamp() -> Stamp:
            return Stamp(JOB, scope.run_id, clock.now())

        duplicates = _settle_late(report, plan, billing_database, payment_provider, stamp)
        settled = report.applied
        pages = chain(plan.expiries.pages(), [duplicates] if duplicates else [])
        expire_pages(report, pages, billing_database, stamp, threads, dry_run=scope.dry_run)
        plan.expiries.close()
        _report_kept(report, plan, billing_database, stamp())
        note_clocks(report, plan.clocks, f"Nothing expired: {plan.held} payments stay PENDING for the next run")
        if not scope.dry_run:
            yield plotted(
                context,
                JOB,
                {"expired": report.applied - settled, "settled late": settled, "kept pending": len(plan.kept)},
                day=str(billing_database.calendar.day_of(scope.as_of)),
                levels=frozenset({"kept pending"}),
            )
    conclude(
        context,
        scope,
        report,
        retry_hint="They stay PENDING and nothing was granted for them. Launch the job again, or wait for tomorrow's.",
        job=JOB,
    )
    yield dg.Output(None)


def _settle_late(
    report: RunReport,
    plan: ExpiryPlan,
    database: BillingDatabase,
    provider: ProviderConnection,
    make_stamp: Callable[[], Stamp],
) -> list[ExpirePayment]:
    """Settle what is paid at the provider; return the rows beside it that will never be paid.

    Of several rows with one provider id, one holds the payment. The others are duplicates and expire, but for one that
    names a subscription which the payment was not granted to: whoever wrote it meant another customer's, or period.
    """
    paid = {decision.payment.id: decision.payment for decision in plan.late}
    results = list(
        settle_all(
            database,
            list(paid.values()),
            make_stamp=make_stamp,
            is_live=bool(paid) and provider.client.is_live,
            dry_run=plan.scope.dry_run,
        )
    )
    report_settled(report, iter(results), database=database, stamp=make_stamp(), dry_run=plan.scope.dry_run)
    by_payment = {result.payment.id: result for result in results}
    duplicates = []
    for decision in plan.late:
        result, row = by_payment[decision.payment.id], decision.row
        holder = _holder_of(result)
        if holder is None or holder == row.id:
            continue
        if row.subscription_id in (None, *_granted_to(result)):
            reason = f"a duplicate: payment {holder} holds the provider's payment"
            duplicates.append(ExpirePayment(row, reason, Code.DUPLICATE))
        else:
            reason = f"names subscription {row.subscription_id}, but payment {holder} holds the provider's payment"
            report.skipped += 1
            report.decisions.append(Decision(Action.LEAVE, row.subject, reason, row.money, Code.DUPLICATE))
    return duplicates


def _holder_of(result: Settled | Failed) -> int | None:
    """The row that holds a paid payment now; None while none does."""
    if isinstance(result, Failed):
        return None
    if isinstance(result.decision, Leave):
        row = result.decision.row
        return row.id if row is not None and row.status in ("SUCCEEDED", "REFUNDED") else None
    if isinstance(result.decision, (Settle, RecordRefund, CloseAsGranted)):
        return result.payment_row_id or (result.decision.row.id if result.decision.row else None)
    return None


def _granted_to(result: Settled | Failed) -> tuple[int | None, ...]:
    """The subscriptions that the row which holds a payment is linked to, and was before."""
    if isinstance(result, Failed):
        return ()
    row = result.decision.row
    return result.subscription_id, row.subscription_id if row is not None else None


def _report_kept(report: RunReport, plan: ExpiryPlan, database: BillingDatabase, stamp: Stamp) -> None:
    """Report what stays PENDING: held money, no answer (retried), a record that nobody can read (quarantined)."""
    report.skipped += plan.held
    for decision in plan.kept:
        if decision.needs_retry:
            report.again.append(f"{decision.row.subject}: {decision.reason}")
        if decision.quarantine is None:
            report.skipped += 1
            report.decisions.append(_shown(decision))
    report.skipped += len(plan.refused)
    report.decisions.extend(plan.refused)
    unusable = [decision.quarantine for decision in plan.kept if decision.quarantine]
    report_unusable(report, unusable, database=database, stamp=stamp, dry_run=plan.scope.dry_run)


# A page as it was written: each part with the ids that expired, or why its one row did not.
_Written = list[tuple[Sequence[ExpirePayment], set[int] | NotWritten]]


def expire_pages(
    report: RunReport,
    pages: Iterable[Sequence[ExpirePayment]],
    database: BillingDatabase,
    make_stamp: Callable[[], Stamp],
    threads: Threads,
    *,
    dry_run: bool,
) -> None:
    """Expire pages of payments, each in a transaction of its own, some at once.

    What the database refuses goes to quarantine, row by row; what it is too busy for is retried by the next run.
    Unlike expire_subscriptions_job, whose chunks are a million rows that PostgreSQL finds and locks itself, this job
    knows each row and its reason, because it has asked about each.
    """
    refused: list[Refused] = []
    witnesses = Witnesses()

    def write(page: Sequence[ExpirePayment]) -> set[int]:
        if dry_run:
            return {expiry.row.id for expiry in page}
        with database.begin() as connection:
            return expire_payments(connection, make_stamp(), [(expiry.row, expiry.reason) for expiry in page])

    def write_page(page: Sequence[ExpirePayment]) -> _Written:
        return list(one_by_one(page, write, tries=1, part_size=PART, witnesses=witnesses))

    def finish(written: Future[_Written]) -> None:
        for part, result in written.result():
            if not isinstance(result, NotWritten):
                _report_expired(report, part, result)
                continue
            row = part[0].row
            refused.append(Refused(_problem(row, result.reason), result, row.money))

    # Each page locks its own rows, in the order of their ids: no two of them wait for each other. Leaving the pool
    # waits for what is under way.
    with threads.make_pool(SIDE_BY_SIDE, "expire") as pool:
        under_way: deque[Future[_Written]] = deque()
        for page in pages:
            under_way.append(pool.submit(write_page, page))
            if len(under_way) > SIDE_BY_SIDE:
                finish(under_way.popleft())
        while under_way:
            finish(under_way.popleft())
    report_refused(report, refused, database=database, stamp=make_stamp())


def _report_expired(report: RunReport, page: Sequence[ExpirePayment], expired: set[int]) -> None:
    report.applied += len(expired)
    report.skipped += len(page) - len(expired)
    done = page if len(expired) == len(page) else [expiry for expiry in page if expiry.row.id in expired]
    if isinstance(report.decisions, Tally):
        report.decisions.extend_alike(Action.EXPIRE, [expiry.row.money for expiry in done], lambda at: _shown(done[at]))
    else:
        report.decisions.extend(map(_shown, done))
    report.decisions.extend(
        Decision(
            Action.SKIP,
            expiry.row.subject,
            "changed meanwhile, no longer PENDING",
            expiry.row.money,
            Code.CHANGED_MEANWHILE,
        )
        for expiry in (page if len(done) < len(page) else ())
        if expiry.row.id not in expired
    )


def _problem(row: StalePayment, error: str) -> Problem:
    return Problem(
        row.subject,
        "not_writable",
        f"expiring it failed: {error}",
        external_payment_id=row.external_payment_id,
        payment_id=row.id,
    )


@dg.job(
    name=JOB,
    description="Expires PENDING payments that nobody paid, after asking the provider about each.",
    partitions_def=DAILY,
    executor_def=dg.in_process_executor,
    tags=singleton_tags(JOB, MAX_RUNTIME_S),
)
def expire_payments_job() -> None:
    """Database slice, provider slice, diff, apply."""
    apply_payment_expiry(diff_stale_payments(fetch_stale_at_provider(fetch_stale_payments())))


expire_payments_daily_schedule = tick_schedule(
    expire_payments_job,
    name="expire_payments_daily_schedule",
    cron="0 4 * * *",
    timezone=BILLING_TIMEZONE,
    partition_key=day_key,
    description="Daily at 04:00 in the billing time zone.",
)
