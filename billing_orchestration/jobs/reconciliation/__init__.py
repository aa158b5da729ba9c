"""reconciliation_job: both sides' books of a day, line by line, as an accountant would.

Daily at 06:30, for the day before; any day of three years by backfill. What settling may repair is repaired, so a
purchase that the matching jobs missed is granted here at the latest. The rest is put before a person, once. No grant is
ever taken back. A day on which differences are left is red, until a person has decided about each and the day is
launched again.

pandas is imported by the ops that compare: a matching tick has no time for it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field

from billing_orchestration.both_sides import BothSides, ProviderSide, read_books, read_provider
from billing_orchestration.database.audit import Stamp
from billing_orchestration.database.reconciliation import record_day
from billing_orchestration.domain.billing_calendar import BillingCalendar
from billing_orchestration.domain.clocks import Clocks
from billing_orchestration.domain.decisions import Action, Decision, Tally
from billing_orchestration.domain.provider_payment import PENDING, SUCCEEDED, ProviderPayment
from billing_orchestration.domain.reconciled import REFUNDED_THERE, REPAIRABLE, Day, reconciled_day
from billing_orchestration.domain.run_scope import RunScope, over_limit
from billing_orchestration.jobs.approval import bind
from billing_orchestration.jobs.clocks import describe_clocks, look_at_clocks, note_clocks
from billing_orchestration.jobs.matching_slice import PaidSliceConfig
from billing_orchestration.jobs.partitions import BILLING_TIMEZONE, RECONCILED, day_before_key
from billing_orchestration.jobs.reconciliation.ends import Ends, left_after, put_before_a_person
from billing_orchestration.jobs.reconciliation.report import as_found, differing, numbers_of_day, table_of_classes
from billing_orchestration.jobs.run_failures import FailureCode, failed
from billing_orchestration.jobs.run_report import (
    ROWS_SHOWN,
    RunReport,
    Told,
    conclude,
    describe_decisions,
    describe_scope,
    stop_before_applying,
    told_plainly,
)
from billing_orchestration.jobs.schedules import singleton_tags, tick_schedule
from billing_orchestration.jobs.settling import report_settled, report_unusable, report_without_receipt, settle_all
from billing_orchestration.resources import (
    AFTER,
    BillingDatabase,
    Clock,
    HandOver,
    ProviderConnection,
    RunSettings,
    mark_covered,
)

if TYPE_CHECKING:
    import pandas as pd

JOB = "reconciliation_job"
ASSET = "reconciliation"
MAX_RUNTIME_S = 6 * 3600


class BooksConfig(dg.Config):
    """How payments are asked for that no list of the day holds."""

    max_concurrency: int = Field(default=8, ge=1, le=64, description="Look up at most this many payments at once.")


@dataclass(frozen=True)
class FetchedDay:
    """The provider's slice."""

    scope: RunScope
    day: Day
    provider: ProviderSide
    clocks: Clocks


@dataclass(frozen=True)
class FetchedBooks:
    """Both slices."""

    scope: RunScope
    both: BothSides
    clocks: Clocks


@dataclass(frozen=True)
class ReconciliationPlan:
    """What the run will apply. `lines`: all lines of the day, each in its class; `sums`: by class and currency."""

    scope: RunScope
    both: BothSides
    clocks: Clocks
    lines: "pd.DataFrame"
    sums: "pd.DataFrame"
    to_settle: tuple[ProviderPayment, ...]
    refused: tuple[Decision, ...]


@dg.op(description="Read the provider's payments and refunds of the day, in every status, to the last page.")
def fetch_provider_day(
    context: dg.OpExecutionContext,
    config: PaidSliceConfig,
    run: RunSettings,
    billing_database: dg.ResourceParam[BillingDatabase],
    payment_provider: dg.ResourceParam[ProviderConnection],
    clock: dg.ResourceParam[Clock],
    hand_over: dg.ResourceParam[HandOver],
) -> None:
    """The provider's slice, read before the database."""
    with told_plainly():
        zone = billing_database.settings.reconciliation_zone
        calendar = BillingCalendar(zone)
        scope = run.scope(context, clock, whole_days=True)
        day = Day.of(reconciled_day(scope, calendar), calendar)
        with billing_database.read():
            pass  # a database that nobody can work on is told before the provider is asked for a whole day
        if not scope.dry_run:
            mark_covered(context, str(day.day))
        if config.max_requests_per_second is not None:
            payment_provider.client.rate.limit(config.max_requests_per_second)
        provider = read_provider(payment_provider.client, day, config.parallel_windows)
        clocks = look_at_clocks(billing_database, clock, payment_provider)
    context.add_output_metadata(
        {
            "day": dg.MetadataValue.text(f"{day.day} ({zone})"),
            **describe_scope(scope),
            **describe_clocks(context, clocks),
            "payments there": dg.MetadataValue.int(len(provider.payments)),
            "refunds there": dg.MetadataValue.int(len(provider.refunds)),
            "refunds on their way": dg.MetadataValue.int(sum(refund.status == PENDING for refund in provider.refunds)),
            "unusable items": dg.MetadataValue.int(len(provider.unusable)),
            "pages": dg.MetadataValue.int(provider.pages),
        }
    )
    hand_over.leave(FetchedDay(scope, day, provider, clocks))


@dg.op(
    description="Read the rows of these payments and of the day; ask about paid ones that no list of the day holds.",
    ins=AFTER,
)
def fetch_books_of_day(
    context: dg.OpExecutionContext,
    config: BooksConfig,
    billing_database: dg.ResourceParam[BillingDatabase],
    payment_provider: dg.ResourceParam[ProviderConnection],
    hand_over: dg.ResourceParam[HandOver],
) -> None:
    """The database's slice."""
    with told_plainly():
        fetched = hand_over.take(FetchedDay)
        listed = fetched.provider
        both = read_books(
            billing_database.read,
            payment_provider.client,
            fetched.day,
            listed,
            config.max_concurrency,
            leaves_foreign=billing_database.settings.foreign_payments == "ignore",
        )
    context.add_output_metadata(
        {
            "payment rows": dg.MetadataValue.int(len(both.rows)),
            "settled by these jobs": dg.MetadataValue.int(len(both.settled)),
            "looked up there": dg.MetadataValue.int(len(both.provider.payments) - len(listed.payments)),
        }
    )
    hand_over.leave(FetchedBooks(fetched.scope, both, fetched.clocks))


@dg.op(description="Put each line into its class, check that the sums close, and decide what is done.", ins=AFTER)
def diff_day(context: dg.OpExecutionContext, hand_over: dg.ResourceParam[HandOver]) -> None:
    """The diff of two complete slices. Red before anything is applied if its sums do not close."""
    from billing_orchestration.domain.reconciliation import sum_up

    with told_plainly():
        fetched = hand_over.take(FetchedBooks)
    scope, both = fetched.scope, fetched.both
    lines = both.compare()
    sums = sum_up(lines)
    found = as_found(lines)
    tables = {**table_of_classes(sums), **describe_decisions(found)}
    if faults := both.unclosed(sums):
        raise failed(
            FailureCode.SUMS_DO_NOT_CLOSE,
            f"the comparison of {both.day.day} does not add up, and nothing was applied: {'; '.join(faults)}. It is a"
            " fault of this program, not of the books: report it with this run's tables",
            tables,
        )
    to_settle = _to_settle(both, lines)
    stop_before_applying(over_limit(len(to_settle), scope.max_changes), found)
    context.add_output_metadata(tables)
    changes = {_line(payment, lines): payment for payment in to_settle}
    shown = {
        line: Decision(Action.SETTLE, f"payment {payment.id}", "succeeded at the provider", payment.money)
        for line, payment in changes.items()
    }
    approved, refused = bind(context, scope, list(changes.items()), shown)
    hand_over.leave(ReconciliationPlan(scope, both, fetched.clocks, lines, sums, tuple(approved), tuple(refused)))


def _to_settle(both: BothSides, lines: "pd.DataFrame") -> list[ProviderPayment]:
    """What settling may repair, oldest success first. A full refund of what is not recorded at all is settled too."""
    unrecorded = (lines["class"] == REFUNDED_THERE) & lines["in_full"] & (lines["succeeded"] + lines["refunded"] == 0)
    ids = set(lines.loc[lines["class"].isin(REPAIRABLE) | unrecorded, "payment_id"])
    payments = [both.provider.payments[id_] for id_ in ids]
    return sorted(
        (payment for payment in payments if payment.status == SUCCEEDED),
        key=lambda payment: (payment.succeeded_at, payment.id),
    )


def _line(payment: ProviderPayment, lines: "pd.DataFrame") -> str:
    """What an approval of this change is bound to."""
    found = lines.loc[lines["payment_id"] == payment.id, ["row", "here"]].drop_duplicates().to_numpy().tolist()
    return f"settle {payment.id} {payment.money} refunded {payment.refunded_amount} rows {found}"


@dg.op(
    description="Settle what may be settled, put the rest before a person, and say what the day came to.",
    ins=AFTER,
    out=dg.Out(dg.Nothing),
)
def apply_reconciliation(
    context: dg.OpExecutionContext,
    billing_database: dg.ResourceParam[BillingDatabase],
    payment_provider: dg.ResourceParam[ProviderConnection],
    clock: dg.ResourceParam[Clock],
    hand_over: dg.ResourceParam[HandOver],
) -> Told:
    """Apply the plan. Red at the end if something must be retried, or if differences are left."""
    report = RunReport(decisions=Tally(ROWS_SHOWN))
    with told_plainly():
        plan = hand_over.take(ReconciliationPlan)
        scope = plan.scope
        ends = _apply(report, plan, billing_database, payment_provider, clock)
        if not scope.dry_run and plan.clocks.may_be_trusted:
            yield _materialized(plan, report, ends)
    conclude(
        context,
        scope,
        report,
        retry_hint="Nothing was granted for them. Launch the day again; nothing is granted twice.",
        job=ASSET,
        more={**table_of_classes(plan.sums), **numbers_of_day(plan.sums, len(differing(plan.lines)), ends.left)},
        red=ends.red(plan.both.day.day, dry_run=scope.dry_run),
    )
    yield dg.Output(None)


def _apply(
    report: RunReport,
    plan: ReconciliationPlan,
    database: BillingDatabase,
    provider: ProviderConnection,
    clock: Clock,
) -> Ends:
    """Settle, compare again, open entries for what is left, note what the day came to.

    By a wrong clock the day may not be over: what is found counts, the day does not.
    """
    scope, both = plan.scope, plan.both
    dry_run = scope.dry_run

    def stamp() -> Stamp:
        return Stamp(JOB, scope.run_id, clock.now())

    is_live = bool(plan.to_settle) and provider.client.is_live
    settled = settle_all(database, plan.to_settle, make_stamp=stamp, is_live=is_live, dry_run=dry_run)
    results = {result.payment.id: result for result in settled}
    report_settled(report, iter(results.values()), database=database, stamp=stamp(), dry_run=dry_run)
    report_unusable(report, both.provider.unusable, database=database, stamp=stamp(), dry_run=dry_run)
    # A registration may be canceled long after the matching jobs have looked.
    report_without_receipt(report, both.provider.payments.values(), database=database, stamp=stamp(), dry_run=dry_run)
    report.skipped += len(plan.refused)
    report.decisions.extend(plan.refused)
    left = left_after(both, plan.lines, results, database, dry_run=dry_run)
    ends = put_before_a_person(report, both, plan.lines, left, results, database, stamp(), dry_run=dry_run)
    note_clocks(report, plan.clocks, "What was found is settled; the day does not count as reconciled. Launch it again")
    if not dry_run and plan.clocks.may_be_trusted:
        with database.begin() as connection:
            record_day(
                connection,
                stamp(),
                both.day,
                lines=len(plan.lines),
                differences=ends.left,
                unexplained=len(ends.nobodys),
            )
    return ends


def _materialized(plan: ReconciliationPlan, report: RunReport, ends: Ends) -> dg.AssetMaterialization:
    """The day, for the asset: its tables and the numbers that are plotted. The last run of a day says how it stands."""
    return dg.AssetMaterialization(
        ["billing", ASSET],
        partition=str(plan.both.day.day),
        metadata={
            **numbers_of_day(plan.sums, len(differing(plan.lines)), ends.left),
            **table_of_classes(plan.sums),
            **describe_decisions(report.decisions),
        },
    )


@dg.job(
    name=JOB,
    description="Compares both sides' books of a day, line by line; repairs what settling may, shows the rest.",
    partitions_def=RECONCILED,
    executor_def=dg.in_process_executor,
    tags=singleton_tags(JOB, MAX_RUNTIME_S),
)
def reconciliation_job() -> None:
    """Provider slice, database slice, diff, apply."""
    apply_reconciliation(diff_day(fetch_books_of_day(fetch_provider_day())))


reconciliation_daily_schedule = tick_schedule(
    reconciliation_job,
    name="reconciliation_daily_schedule",
    cron="30 6 * * *",
    timezone=BILLING_TIMEZONE,
    partition_key=day_before_key,
    description="Daily at 06:30 in the billing time zone, for the day before.",
)
