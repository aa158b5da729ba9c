"""What the two matching jobs share: the window they cover, the provider's slice, the watermark."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

import dagster as dg
from pydantic import Field

from billing_orchestration.alerting import beat
from billing_orchestration.database.audit import Problem, Stamp
from billing_orchestration.database.matching import move_watermark, read_watermark
from billing_orchestration.domain.clocks import Clocks
from billing_orchestration.domain.decisions import Action, Decision
from billing_orchestration.domain.matching import MatchingDiff
from billing_orchestration.domain.provider_payment import WEBHOOK_GRACE, ProviderPayment, UnusablePayment
from billing_orchestration.domain.run_scope import (
    CATCH_UP_OVERLAP,
    MATCHING_WINDOW,
    RunScope,
    Window,
    covering_window,
    next_watermark,
    over_limit,
)
from billing_orchestration.domain.settlement_decisions import PaymentRow
from billing_orchestration.jobs.approval import bind
from billing_orchestration.jobs.clocks import describe_clocks, look_at_clocks, note_clocks
from billing_orchestration.jobs.run_report import (
    RunReport,
    Told,
    conclude,
    describe_decisions,
    describe_scope,
    instant,
    plotted,
    stop_before_applying,
)
from billing_orchestration.jobs.settling import (
    open_all,
    report_settled,
    report_unusable,
    report_without_receipt,
    settle_all,
)
from billing_orchestration.provider.client import Slice
from billing_orchestration.resources import BillingDatabase, Clock, ProviderConnection, RunSettings

WEBHOOK_GRACE_S = int(WEBHOOK_GRACE.total_seconds())


class PaidSliceConfig(dg.Config):
    """How the provider's list is read."""

    parallel_windows: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description=(
            "Read the provider's list in this many parts at once. Left out: up to three pages one by one, a longer list"
            " in four parts."
        ),
    )
    max_requests_per_second: float | None = Field(
        default=None,
        gt=0,
        description="Limit of requests per second, all parts together, if the provider gave you one. Left out: none.",
    )


class MatchingDiffConfig(dg.Config):
    """What is left to the service's webhook."""

    webhook_grace_s: int = Field(
        default=0,
        ge=0,
        # What is left now must lie in what the next run covers again, also when that run comes after an outage.
        le=int(CATCH_UP_OVERLAP.total_seconds()),
        description=(
            "Leave payments that succeeded less than this many seconds ago to the service's webhook, whatever row they"
            f" have. Scheduled ticks use {WEBHOOK_GRACE_S}; a manual launch repairs at once (0)."
        ),
    )

    @property
    def webhook_grace(self) -> timedelta:
        """The same as a duration."""
        return timedelta(seconds=self.webhook_grace_s)


@dataclass(frozen=True)
class PaidSlice:
    """The provider's succeeded payments of a run's window, complete to the last page."""

    scope: RunScope
    window: Window
    slice: Slice
    clocks: Clocks


@dataclass(frozen=True)
class MatchingPlan:
    """What a matching run will apply."""

    scope: RunScope
    window: Window
    diff: MatchingDiff
    unusable: tuple[UnusablePayment, ...]
    clocks: Clocks
    is_whole: bool = True
    paid: tuple[ProviderPayment, ...] = ()


def fetch_paid(
    context: dg.OpExecutionContext,
    job: str,
    run: RunSettings,
    database: BillingDatabase,
    provider: ProviderConnection,
    clock: Clock,
    config: PaidSliceConfig,
) -> PaidSlice:
    """Read the provider's slice: succeeded, created or captured in the window. Whole, or the run fails here."""
    # All settings are checked before the scope, and both before anything is read.
    settings_checked = database.settings
    scope = run.scope(context, clock, whole_days=False)
    with database.read() as connection:
        watermark = read_watermark(connection, job)
    window = covering_window(scope, watermark, clock.now())
    if config.max_requests_per_second is not None:
        provider.client.rate.limit(config.max_requests_per_second)
    paid = provider.client.fetch_slice(window.start, window.end, parallel_windows=config.parallel_windows)
    clocks = look_at_clocks(database, clock, provider)
    context.add_output_metadata(
        {
            **describe_scope(scope),
            **describe_clocks(context, clocks),
            "window": dg.MetadataValue.text(f"{instant(window.start)} to {instant(window.end)}"),
            "succeeded payments": dg.MetadataValue.int(len(paid.payments)),
            "unusable items": dg.MetadataValue.int(len(paid.unusable)),
            "pages": dg.MetadataValue.int(paid.pages),
            "billing time zone": dg.MetadataValue.text(str(settings_checked.billing_timezone)),
        }
    )
    if window.end - window.start > MATCHING_WINDOW:
        context.log.info(f"catching up from {instant(window.start)}")
    return PaidSlice(scope, window, paid, clocks)


def plan_matching(
    context: dg.OpExecutionContext, paid: PaidSlice, diff: MatchingDiff, rows: Mapping[str, Sequence[PaymentRow]]
) -> MatchingPlan:
    """Attach the diff to the run. Stop before applying if it is larger than allowed, or not what was approved."""
    decisions = [
        *(
            Decision(Action.SETTLE, f"payment {payment.id}", _why(rows.get(payment.id, ())), payment.money)
            for payment in diff.to_settle
        ),
        *diff.reported,
    ]
    stop_before_applying(over_limit(len(diff.to_settle), paid.scope.max_changes), decisions)
    context.add_output_metadata(
        {"both sides agree": dg.MetadataValue.int(diff.agreed), **describe_decisions(decisions)}
    )
    lines = {_line(payment, rows.get(payment.id, ())): payment for payment in diff.to_settle}
    approved, refused = bind(context, paid.scope, list(lines.items()), dict(zip(lines, decisions, strict=False)))
    if refused:
        diff = replace(diff, to_settle=tuple(approved), reported=(*diff.reported, *refused))
    return MatchingPlan(
        paid.scope, paid.window, diff, paid.slice.unusable, paid.clocks, not refused, paid.slice.payments
    )


def _why(rows: Sequence[PaymentRow]) -> str:
    here = " and ".join(f"payment {row.id} is {row.status or 'without a status'}" for row in rows) or "no row"
    return f"succeeded at the provider; here: {here}"


def _line(payment: ProviderPayment, rows: Sequence[PaymentRow]) -> str:
    """What an approval of this change is bound to."""
    found = sorted((row.id, row.status, row.subscription_id) for row in rows)
    return f"settle {payment.id} {payment.money} refunded {payment.refunded_amount} rows {found}"


def apply_matching(
    context: dg.OpExecutionContext,
    job: str,
    plan: MatchingPlan,
    database: BillingDatabase,
    provider: ProviderConnection,
    clock: Clock,
) -> Told:
    """Settle what differs, quarantine what is odd, and move the watermark once the whole window was applied.

    A wrong clock reads a wrong window. What is found in it is settled all the same; it does not count as covered.
    """
    scope, window = plan.scope, plan.window

    def stamp() -> Stamp:
        return Stamp(job, scope.run_id, clock.now())

    report = RunReport()
    results = settle_all(
        database, plan.diff.to_settle, make_stamp=stamp, is_live=provider.client.is_live, dry_run=scope.dry_run
    )
    report_settled(report, results, database=database, stamp=stamp(), dry_run=scope.dry_run)
    report_unusable(report, plan.unusable, database=database, stamp=stamp(), dry_run=scope.dry_run)
    report.decisions.extend(plan.diff.reported)
    retry_hint = "The next tick tries again"
    if not scope.heals:
        retry_hint = "No tick covers this time again, so launch this run again"
        report.again.extend(f"payment {payment.id}: the service's webhook is at work on it" for payment in report.left)
    report_without_receipt(report, plan.paid, database=database, stamp=stamp(), dry_run=scope.dry_run)
    is_covered = plan.is_whole and plan.clocks.may_be_trusted
    note_clocks(
        report,
        plan.clocks,
        "What was found is settled, and no time counts as covered: the first tick with right clocks covers all of it",
    )
    if window.gap is not None and plan.clocks.may_be_trusted:
        _report_gap(context, job, window.gap, report, database, stamp(), dry_run=scope.dry_run)
    if not scope.dry_run:
        # What an approval refused is not covered; the next tick looks at it again.
        if not report.again and is_covered:
            _advance(job, plan, report, database, stamp())
            heartbeat = database.settings.heartbeat_url
            if heartbeat is not None and scope.heals and not beat(heartbeat.get_secret_value()):
                context.log.warning("HEARTBEAT_URL did not take the heartbeat of this tick; nothing else is wrong")
        if report.applied or report.opened or report.again:
            numbers = {
                "corrections": report.applied,
                "quarantined": report.opened,
                "to retry": len(report.again),
            }
            yield plotted(context, job, numbers)
    hint = f"Nothing was granted for them. {retry_hint}; nothing is granted twice."
    conclude(context, scope, report, retry_hint=hint, job=job)
    yield dg.Output(None)


def _advance(job: str, plan: MatchingPlan, report: RunReport, database: BillingDatabase, stamp: Stamp) -> None:
    """Note what was covered; what was left to the webhook was not, however long ago it was paid."""
    left_since = min((payment.succeeded_at for payment in (*plan.diff.left, *report.left)), default=None)
    with database.begin() as connection:
        seen = read_watermark(connection, job, lock=True)
        covered_until = next_watermark(plan.scope, plan.window, seen, stamp.at, left_since)
        if covered_until is not None:
            move_watermark(connection, stamp, seen, covered_until)


def _report_gap(
    context: dg.OpExecutionContext,
    job: str,
    gap: tuple[datetime, datetime],
    report: RunReport,
    database: BillingDatabase,
    stamp: Stamp,
    *,
    dry_run: bool,
) -> None:
    start, end = gap
    reason = (
        f"not covered: {instant(start)} to {instant(end)}, further back than a run reaches."
        f" Backfill these hours of {job}"
    )
    context.log.warning(reason)
    report.quarantined += 1
    report.decisions.append(Decision(Action.QUARANTINE, job, reason, code="gap"))
    if not dry_run:
        hours = {"from": start.isoformat(), "until": end.isoformat()}
        problem = Problem(f"job {job}, from {instant(start)}", "gap", reason, evidence=hours)
        report.opened += open_all(database, stamp, [problem])
