"""expire_payments_job: PENDING payments that nobody paid for days become EXPIRED, after the provider was asked.

Daily at 04:00. One that turns out to be paid is settled instead; one whose money is held uncaptured, or about which the
provider does not answer, stays PENDING. A success that arrives after expiry is still settled by the matching jobs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field

from billing_orchestration.database.audit import Problem, Stamp
from billing_orchestration.domain.decisions import Decision
from billing_orchestration.domain.expiry import (
    ExpirePayment,
    KeepPending,
    NoAnswer,
    NotFoundThere,
    PaymentExpiry,
    ProviderAnswer,
    SettleLate,
    changes_of,
    decide_payment_expiry,
    over_limit,
    payments_over_before,
)
from billing_orchestration.domain.provider_payment import UnusablePayment
from billing_orchestration.domain.run_scope import RunScope
from billing_orchestration.domain.settlement import CloseAsGranted, Leave, PaymentRow, RecordRefund, Settle
from billing_orchestration.jobs.approval import bind
from billing_orchestration.jobs.partitions import BILLING_TIMEZONE, DAILY, day_key
from billing_orchestration.jobs.run_report import (
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
from billing_orchestration.resources import BillingDatabase, Clock, ProviderConnection, RunSettings

if TYPE_CHECKING:
    from billing_orchestration.database.settling import Settled

JOB = "expire_payments_job"
MAX_RUNTIME_S = 6 * 3600
CHUNK = 500
# So many payments in a row about which the provider does not answer: it fails for everyone, the rest waits.
BREAKER_SILENCES = 10


class ExpirePaymentsConfig(dg.Config):
    """What only this job needs."""

    max_concurrency: int = Field(default=8, ge=1, le=64, description="How many payments are asked about at a time.")


@dataclass(frozen=True)
class StalePayments:
    """The database's slice."""

    scope: RunScope
    rows: tuple[PaymentRow, ...]


@dataclass(frozen=True)
class AskedPayments:
    """Both slices: the rows, and what the provider said about each provider id."""

    stale: StalePayments
    answers: dict[str, ProviderAnswer]


@dataclass(frozen=True)
class ExpiryPlan:
    """What the run will apply."""

    scope: RunScope
    decisions: tuple[PaymentExpiry, ...]
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
        from billing_orchestration.database.engine import translated
        from billing_orchestration.database.expiry import fetch_stale_payments as fetch

        settings = billing_database.settings
        scope = run.scope(context, clock, whole_days=True)
        created_before = payments_over_before(scope.as_of, settings.pending_payment_ttl_days)
        with translated(), billing_database.engine.connect() as connection:
            rows = tuple(fetch(connection, created_before))
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
) -> AskedPayments:
    """The provider's slice: one answer an id. A wrong shop key fails the run after one request."""
    ids = list(dict.fromkeys(row.external_payment_id for row in stale.rows if row.external_payment_id))
    answers: dict[str, ProviderAnswer] = {}
    with told_plainly():
        if ids:
            answers = _ask(context, ids, payment_provider, config.max_concurrency)
    silent = sum(isinstance(answer, NoAnswer) for answer in answers.values())
    context.add_output_metadata(
        {
            "asked": dg.MetadataValue.int(len(ids)),
            "not found there": dg.MetadataValue.int(sum(isinstance(a, NotFoundThere) for a in answers.values())),
            "no answer": dg.MetadataValue.int(silent),
        }
    )
    return AskedPayments(stale, answers)


def _ask(
    context: dg.OpExecutionContext, ids: Sequence[str], provider: ProviderConnection, max_concurrency: int
) -> dict[str, ProviderAnswer]:
    from billing_orchestration.provider.errors import Forbidden, PaymentNotFound, ProviderError, RequestRejected
    from billing_orchestration.provider.pacing import map_concurrently

    answers: dict[str, ProviderAnswer] = {}
    silences = 0
    for payment_id, result in map_concurrently(provider.client.get_payment, ids, max_concurrency):
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
        silences = silences + 1 if isinstance(answers[payment_id], NoAnswer) else 0
        if silences >= BREAKER_SILENCES:
            context.log.warning(f"the provider did not answer {silences} times in a row: the rest is left for tomorrow")
            break
    for payment_id in ids:
        answers.setdefault(payment_id, NoAnswer("not asked: the provider does not answer for anyone"))
    return answers


@dg.op(description="Decide each: settle what is paid, expire what is not, leave what is held or not known.")
def diff_stale_payments(
    context: dg.OpExecutionContext, asked: AskedPayments, billing_database: dg.ResourceParam[BillingDatabase]
) -> ExpiryPlan:
    """One decision a row."""
    ttl_days = billing_database.settings.pending_payment_ttl_days
    decisions = tuple(
        decide_payment_expiry(
            row, asked.answers[row.external_payment_id] if row.external_payment_id else None, ttl_days
        )
        for row in asked.stale.rows
    )
    shown = [_shown(decision) for decision in decisions]
    stop_before_applying(over_limit(changes_of(decisions), asked.stale.scope.max_changes), shown)
    context.add_output_metadata(describe_decisions(shown))
    changes = {_line(decision): decision for decision in decisions if not isinstance(decision, KeepPending)}
    approved, refused = bind(
        context, asked.stale.scope, list(changes.items()), {line: _shown(change) for line, change in changes.items()}
    )
    kept = [decision for decision in decisions if isinstance(decision, KeepPending)]
    return ExpiryPlan(asked.stale.scope, (*approved, *kept), tuple(refused))


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
        return Decision("settle", row.subject, f"paid at the provider ({decision.payment.id})", row.money)
    if isinstance(decision, ExpirePayment):
        return Decision("expire", row.subject, decision.reason, row.money)
    return Decision("quarantine" if decision.quarantine else "leave", row.subject, decision.reason, row.money)


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
) -> Told:
    """Apply the plan, row by row; red at the end if something needs another try."""
    with told_plainly():
        scope = plan.scope
        report = RunReport()

        def stamp() -> Stamp:
            return Stamp(JOB, scope.run_id, clock.now())

        expiries = [decision for decision in plan.decisions if isinstance(decision, ExpirePayment)]
        late = [decision for decision in plan.decisions if isinstance(decision, SettleLate)]
        kept = [decision for decision in plan.decisions if isinstance(decision, KeepPending)]
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
            ExpirePayment(decision.row, f"a duplicate: payment {holder} holds the provider's payment")
            for decision in late
            if (holder := holders[decision.payment.id]) is not None and holder != decision.row.id
        ]
        _expire(report, [*expiries, *duplicates], billing_database, stamp(), dry_run=scope.dry_run)
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
                ("billing", JOB),
                {
                    "expired": report.applied - settled,
                    "settled late": settled,
                    "kept pending": len(kept),
                },
                day=str(billing_database.calendar.day_of(scope.as_of)),
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


def _expire(
    report: RunReport, expiries: Sequence[ExpirePayment], database: BillingDatabase, stamp: Stamp, *, dry_run: bool
) -> None:
    from billing_orchestration.database.engine import translated
    from billing_orchestration.database.errors import DatabaseBusy, RowRefused
    from billing_orchestration.database.expiry import expire_payments

    def apply(group: Sequence[ExpirePayment]) -> None:
        expired = {expiry.row.id for expiry in group}
        if not dry_run:
            with translated(), database.engine.begin() as connection:
                expired = expire_payments(connection, stamp, [(expiry.row, expiry.reason) for expiry in group])
        for expiry in group:
            if expiry.row.id in expired:
                report.applied += 1
                report.decisions.append(_shown(expiry))
            else:
                report.skipped += 1
                report.decisions.append(
                    Decision("skip", expiry.row.subject, "changed meanwhile, not PENDING any more", expiry.row.money)
                )

    refused: list[Problem] = []
    for start in range(0, len(expiries), CHUNK):
        chunk = expiries[start : start + CHUNK]
        try:
            apply(chunk)
        except (DatabaseBusy, RowRefused):
            for expiry in chunk:
                try:
                    apply([expiry])
                except DatabaseBusy as error:
                    report.again.append(f"{expiry.row.subject}: {error}")
                    report.decisions.append(Decision("try again", expiry.row.subject, str(error), expiry.row.money))
                except RowRefused as error:
                    refused.append(_refused(expiry.row, str(error)))
    report.quarantined += len(refused)
    report.decisions.extend(Decision("quarantine", problem.subject, problem.reason) for problem in refused)
    report.opened += open_all(database, stamp, refused)


def _refused(row: PaymentRow, error: str) -> Problem:
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
