"""expire_payments_job: PENDING payments that nobody paid for days become EXPIRED, after the provider was asked.

Daily at 04:00. One that turns out to be paid is settled instead; one whose money is held uncaptured, or about which the
provider does not answer, stays PENDING. A success that arrives after expiry is still settled by the matching jobs.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field

from billing_orchestration.database.audit import Problem, Stamp
from billing_orchestration.database.one_by_one import NotWritten, one_by_one
from billing_orchestration.domain.decisions import Action, Code, Decision, Tally
from billing_orchestration.domain.expiry import (
    AskedPayment,
    ExpirePayment,
    KeepPending,
    NoAnswer,
    NotFoundThere,
    PaymentExpiry,
    ProviderAnswer,
    SettleLate,
    StalePayment,
    decide_payment_expiry,
    payments_over_before,
)
from billing_orchestration.domain.provider_payment import UnusablePayment
from billing_orchestration.domain.run_scope import RunScope, over_limit
from billing_orchestration.domain.settlement import CloseAsGranted, Leave, RecordRefund, Settle
from billing_orchestration.jobs.approval import bind
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
from billing_orchestration.jobs.settling import Failed, open_all, report_settled, report_unusable, settle_all
from billing_orchestration.jobs.spool import Spool
from billing_orchestration.provider.errors import Forbidden, PaymentNotFound, ProviderError, RequestRejected
from billing_orchestration.provider.pacing import Breaker, map_concurrently
from billing_orchestration.resources import BillingDatabase, Clock, ProviderConnection, RunSettings
from billing_orchestration.threads import Threads

if TYPE_CHECKING:
    from concurrent.futures import Future

    from billing_orchestration.database.settling import Settled

JOB = "expire_payments_job"
MAX_RUNTIME_S = 6 * 3600
# Rows that are held at a time, however many are stale; and those of one transaction: few enough that the service's
# webhook never waits long for one of them.
PAGE = 5000
# A page that the database refuses or is too busy for goes in parts of so many rows, and such a part row by row.
PART = 100
# So many transactions at a time: PostgreSQL works on one statement with one core, and pages are disjoint.
SIDE_BY_SIDE = 2
# So many payments in a row about which the provider does not answer: it fails for everyone, the rest waits.
BREAKER_SILENCES = 10


class ExpirePaymentsConfig(dg.Config):
    """What only this job needs."""

    max_concurrency: int = Field(default=8, ge=1, le=64, description="How many payments are asked about at a time.")


@dataclass(frozen=True)
class StalePayments:
    """The database's slice, in pages."""

    scope: RunScope
    rows: Spool[StalePayment]


@dataclass(frozen=True)
class AskedPayments:
    """Both slices, in pages: each row with what the provider said about it (None: it has no provider id)."""

    scope: RunScope
    rows: Spool[AskedPayment]


@dataclass(frozen=True)
class ExpiryPlan:
    """What the run will apply. Only what is not simply to expire is held."""

    scope: RunScope
    expiries: Spool[ExpirePayment]
    late: tuple[SettleLate, ...]
    kept: tuple[KeepPending, ...]
    refused: tuple[Decision, ...] = ()


@dg.op(description="Read the PENDING payments created more than PENDING_PAYMENT_TTL_DAYS before as_of.")
def fetch_stale_payments(
    context: dg.OpExecutionContext,
    run: RunSettings,
    billing_database: dg.ResourceParam[BillingDatabase],
    clock: dg.ResourceParam[Clock],
) -> StalePayments:
    """The database's slice."""
    with told_plainly():
        from billing_orchestration.database.expiry import stream_stale_payments

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
    return StalePayments(scope, rows)


@dg.op(description="Ask the provider about each of them, a few at a time.")
def fetch_stale_at_provider(
    context: dg.OpExecutionContext,
    config: ExpirePaymentsConfig,
    stale: StalePayments,
    payment_provider: dg.ResourceParam[ProviderConnection],
    threads: dg.ResourceParam[Threads],
) -> AskedPayments:
    """The provider's slice, page by page: one answer an id. A wrong shop key fails the run after one request."""
    inquiry = _Inquiry(context, payment_provider, config.max_concurrency, threads)
    asked: Spool[AskedPayment] = Spool()
    with told_plainly():
        for page in stale.rows.pages():
            answers = inquiry.ask([row.external_payment_id for row in page if row.external_payment_id])
            asked.add(
                [
                    AskedPayment(row, answers[row.external_payment_id] if row.external_payment_id else None)
                    for row in page
                ]
            )
    stale.rows.close()
    context.add_output_metadata(
        {
            "asked": dg.MetadataValue.int(inquiry.asked),
            "not found there": dg.MetadataValue.int(inquiry.not_found),
            "no answer": dg.MetadataValue.int(inquiry.unanswered),
        }
    )
    return AskedPayments(stale.scope, asked)


class _Inquiry:
    """Asks the provider about pages of ids, a few at a time, until it answers for nobody."""

    def __init__(
        self, context: dg.OpExecutionContext, provider: ProviderConnection, max_concurrency: int, threads: Threads
    ) -> None:
        self._context = context
        self._provider = provider
        self._max_concurrency = max_concurrency
        self._threads = threads
        self._breaker = Breaker(BREAKER_SILENCES)
        self.asked = self.not_found = self.unanswered = 0

    def ask(self, payment_ids: Iterable[str]) -> dict[str, ProviderAnswer]:
        """One answer for each id."""
        ids = list(dict.fromkeys(payment_ids))
        answers: dict[str, ProviderAnswer] = {}
        if ids and not self._breaker.is_open:
            self._ask(ids, answers)
        for payment_id in ids:
            answers.setdefault(payment_id, NoAnswer("not asked: the provider does not answer for anyone"))
        self.asked += len(ids)
        self.not_found += sum(isinstance(answer, NotFoundThere) for answer in answers.values())
        self.unanswered += sum(isinstance(answer, NoAnswer) for answer in answers.values())
        return answers

    def _ask(self, ids: Sequence[str], answers: dict[str, ProviderAnswer]) -> None:
        results = map_concurrently(
            self._provider.client.get_payment,
            ids,
            self._max_concurrency,
            threads=self._threads,
            first_alone=not self.asked,
        )
        for payment_id, result in results:
            if isinstance(result, PaymentNotFound):
                answers[payment_id] = NotFoundThere()
            elif isinstance(result, RequestRejected) and not isinstance(result, Forbidden):
                answers[payment_id] = UnusablePayment(payment_id, f"it refuses to look it up: {result}", payment_id)
            elif isinstance(result, ProviderError):
                answers[payment_id] = NoAnswer(str(result))
            elif isinstance(result, Exception):
                raise result
            else:
                answers[payment_id] = result
            if not isinstance(answers[payment_id], NoAnswer):
                self._breaker.heard()
                continue
            self._breaker.failed()
            if self._breaker.is_open:
                self._context.log.warning(
                    f"the provider did not answer {BREAKER_SILENCES} times in a row: the rest is left for tomorrow"
                )
                break


@dg.op(description="Decide each: settle what is paid, expire what is not, leave what is held or not known.")
def diff_stale_payments(
    context: dg.OpExecutionContext, asked: AskedPayments, billing_database: dg.ResourceParam[BillingDatabase]
) -> ExpiryPlan:
    """One decision a row."""
    ttl_days = billing_database.settings.pending_payment_ttl_days
    expiries: Spool[ExpirePayment] = Spool()
    late: list[SettleLate] = []
    kept: list[KeepPending] = []
    shown = Tally(ROWS_SHOWN)
    for page in asked.rows.pages():
        decisions = [decide_payment_expiry(row, answer, ttl_days) for row, answer in page]
        shown.extend(_shown(decision) for decision in decisions)
        expiries.add([decision for decision in decisions if isinstance(decision, ExpirePayment)])
        late += [decision for decision in decisions if isinstance(decision, SettleLate)]
        kept += [decision for decision in decisions if isinstance(decision, KeepPending)]
    asked.rows.close()
    scope = asked.scope
    stop_before_applying(over_limit(len(expiries) + len(late), scope.max_changes), shown)
    context.add_output_metadata(describe_decisions(shown))
    if not scope.dry_run and scope.approved_plan is None:
        return ExpiryPlan(scope, expiries, tuple(late), tuple(kept))
    # A preview and its approval name every change: these hold them all.
    planned: list[SettleLate | ExpirePayment] = [*late, *chain.from_iterable(expiries.pages())]
    changes = {_line(change): change for change in planned}
    approved, refused = bind(context, scope, list(changes.items()), {line: _shown(c) for line, c in changes.items()})
    allowed: Spool[ExpirePayment] = Spool()
    expiring = [change for change in approved if isinstance(change, ExpirePayment)]
    for start in range(0, len(expiring), PAGE):
        allowed.add(expiring[start : start + PAGE])
    return ExpiryPlan(
        scope,
        allowed,
        tuple(change for change in approved if isinstance(change, SettleLate)),
        tuple(kept),
        tuple(refused),
    )


def _line(decision: SettleLate | ExpirePayment) -> str:
    """Everything of a change that an approval is bound to."""
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
    out=dg.Out(dg.Nothing),
)
def apply_payment_expiry(
    context: dg.OpExecutionContext,
    plan: ExpiryPlan,
    billing_database: dg.ResourceParam[BillingDatabase],
    payment_provider: dg.ResourceParam[ProviderConnection],
    clock: dg.ResourceParam[Clock],
    threads: dg.ResourceParam[Threads],
) -> Told:
    """Apply the plan, row by row; red at the end if something needs another try."""
    with told_plainly():
        scope = plan.scope
        report = RunReport(decisions=Tally(ROWS_SHOWN))

        def stamp() -> Stamp:
            return Stamp(JOB, scope.run_id, clock.now())

        late, kept = plan.late, plan.kept
        is_live = bool(late) and payment_provider.client.is_live
        paid = {decision.payment.id: decision.payment for decision in late}
        results = list(
            settle_all(billing_database, list(paid.values()), make_stamp=stamp, is_live=is_live, dry_run=scope.dry_run)
        )
        report_settled(report, iter(results), database=billing_database, stamp=stamp(), dry_run=scope.dry_run)
        settled = report.applied
        holders = {result.payment.id: _holder_of(result) for result in results}
        # Several rows with one provider id: one of them holds the payment, the others will never be paid.
        duplicates = [
            ExpirePayment(decision.row, f"a duplicate: payment {holder} holds the provider's payment", Code.DUPLICATE)
            for decision in late
            if (holder := holders[decision.payment.id]) is not None and holder != decision.row.id
        ]
        pages = chain(plan.expiries.pages(), [duplicates] if duplicates else [])
        expire_all(report, pages, billing_database, stamp, threads, dry_run=scope.dry_run)
        plan.expiries.close()
        for decision in kept:
            if decision.needs_retry:
                report.again.append(f"{decision.row.subject}: {decision.reason}")
            if decision.quarantine is None:
                report.skipped += 1
                report.decisions.append(_shown(decision))
        report.skipped += len(plan.refused)
        report.decisions.extend(plan.refused)
        report_unusable(
            report,
            [decision.quarantine for decision in kept if decision.quarantine],
            database=billing_database,
            stamp=stamp(),
            dry_run=scope.dry_run,
        )
        if not scope.dry_run:
            yield plotted(
                context,
                ("billing", JOB),
                {
                    "expired": report.applied - settled,
                    "settled late": settled,
                    "kept pending": len(kept),
                },
                day=str(billing_database.calendar.day_of(scope.as_of)),
                levels=frozenset({"kept pending"}),
            )
    conclude(
        context,
        scope,
        report,
        retry_hint="They stay PENDING, nothing was granted for them; launch the job again, or wait for tomorrow's run.",
        job=JOB,
    )
    yield dg.Output(None)


def _holder_of(result: "Settled | Failed") -> int | None:
    """The row that holds a paid payment now; None while none does."""
    if isinstance(result, Failed):
        return None
    if isinstance(result.decision, Leave):
        row = result.decision.row
        return row.id if row is not None and row.status in ("SUCCEEDED", "REFUNDED") else None
    if isinstance(result.decision, (Settle, RecordRefund, CloseAsGranted)):
        return result.payment_row_id or (result.decision.row.id if result.decision.row else None)
    return None


def expire_all(
    report: RunReport,
    pages: Iterable[Sequence[ExpirePayment]],
    database: BillingDatabase,
    make_stamp: Callable[[], Stamp],
    threads: Threads,
    *,
    dry_run: bool,
) -> None:
    """Expire pages of payments, each in a transaction of its own, some at a time. What the database refuses goes to
    quarantine, row by row; what it is too busy for is named for another try."""
    from billing_orchestration.database.expiry import expire_payments

    refused: list[Problem] = []

    def write(page: Sequence[ExpirePayment]) -> set[int]:
        if dry_run:
            return {expiry.row.id for expiry in page}
        with database.begin() as connection:
            return expire_payments(connection, make_stamp(), [(expiry.row, expiry.reason) for expiry in page])

    def tell(page: Sequence[ExpirePayment], expired: set[int]) -> None:
        report.applied += len(expired)
        report.skipped += len(page) - len(expired)
        done = page if len(expired) == len(page) else [expiry for expiry in page if expiry.row.id in expired]
        if isinstance(report.decisions, Tally):
            report.decisions.extend_alike(
                Action.EXPIRE, [expiry.row.money for expiry in done], lambda at: _shown(done[at])
            )
        else:
            report.decisions.extend(map(_shown, done))
        if len(done) < len(page):
            report.decisions.extend(
                Decision(
                    Action.SKIP,
                    expiry.row.subject,
                    "changed meanwhile, not PENDING any more",
                    expiry.row.money,
                    Code.CHANGED_MEANWHILE,
                )
                for expiry in page
                if expiry.row.id not in expired
            )

    def write_page(page: Sequence[ExpirePayment]) -> "list[tuple[Sequence[ExpirePayment], set[int] | NotWritten]]":
        return list(one_by_one(page, write, tries=1, part_size=PART))

    def finish(written: "Future[list[tuple[Sequence[ExpirePayment], set[int] | NotWritten]]]") -> None:
        for part, result in written.result():
            if not isinstance(result, NotWritten):
                tell(part, result)
                continue
            row = part[0].row
            if result.for_good:
                refused.append(_refused(row, result.reason))
            else:
                report.again.append(f"{row.subject}: {result.reason}")
                report.decisions.append(Decision(Action.TRY_AGAIN, row.subject, result.reason, row.money))

    # Each page locks its own rows, in the order of their ids: two of them never wait for each other. Leaving the pool
    # waits for what is under way.
    with threads.make_pool(SIDE_BY_SIDE, "expire") as pool:
        under_way: deque[Future[list[tuple[Sequence[ExpirePayment], set[int] | NotWritten]]]] = deque()
        for page in pages:
            under_way.append(pool.submit(write_page, page))
            if len(under_way) > SIDE_BY_SIDE:
                finish(under_way.popleft())
        while under_way:
            finish(under_way.popleft())
    report.quarantined += len(refused)
    report.decisions.extend(
        Decision(Action.QUARANTINE, problem.subject, problem.reason, code=problem.kind) for problem in refused
    )
    report.opened += open_all(database, make_stamp(), refused)


def _refused(row: StalePayment, error: str) -> Problem:
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
