"""autopayment_job: renews due subscriptions with the saved payment method. The only job that moves money.

Daily at 03:00. It first asks what became of earlier attempts whose outcome is open, then charges what is due, each
attempt by the protocol of `charging`. Harmless to repeat: a period is charged at most once, and one card is tried at
most once a day.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field

from billing_orchestration.database.audit import Problem, Stamp
from billing_orchestration.domain.decisions import Decision
from billing_orchestration.domain.expiry import over_limit
from billing_orchestration.domain.provider_payment import SUCCEEDED, ProviderPayment, UnusablePayment
from billing_orchestration.domain.renewals import (
    Attempt,
    Charge,
    Conclude,
    NotCharged,
    NoteAbsence,
    ProviderView,
    RenewalDecision,
    RenewalRules,
    Resend,
    State,
    Void,
    as_answer_to,
    attempts_to_search,
    decide_renewals,
    judge_answer,
    merge_views,
    names_another_attempt,
    read_scan,
    scan_windows,
)
from billing_orchestration.domain.run_scope import RunScope
from billing_orchestration.jobs.approval import bind
from billing_orchestration.jobs.partitions import BILLING_TIMEZONE, DAILY, day_key
from billing_orchestration.jobs.run_report import (
    RunReport,
    conclude,
    describe_decisions,
    describe_scope,
    plot,
    stop_before_applying,
    told_plainly,
)
from billing_orchestration.jobs.schedules import singleton_tags, tick_schedule
from billing_orchestration.jobs.settling import open_all, report_settled, report_unusable, settle_all
from billing_orchestration.resources import BillingDatabase, Clock, ProviderConnection, RunSettings

if TYPE_CHECKING:
    from billing_orchestration.database.renewals import DueSlice

JOB = "autopayment_job"
# A long list at a slow provider takes hours; beyond this it hangs, and tomorrow's run must not wait for it.
MAX_RUNTIME_S = 12 * 3600


class DueConfig(dg.Config):
    """Which due subscriptions are charged."""

    max_overdue_days: int = Field(
        default=30,
        ge=0,
        description="A subscription that ended more than this many billing days before as_of is reported, not charged.",
    )


class ChargingConfig(dg.Config):
    """How hard the provider is driven."""

    max_concurrency: int = Field(default=16, ge=1, le=256, description="How many charges are under way at a time.")
    max_requests_per_second: float | None = Field(
        default=None, gt=0, description="A cap on requests per second, if the provider gave you one. Left out: none."
    )
    max_sends: int = Field(
        default=3,
        ge=1,
        le=10,
        description="How often one attempt is sent in one run at most (same key and body) while it is unknown.",
    )
    resend_wait_s: float = Field(
        default=2.0,
        ge=0,
        description="Seconds before the first re-send of an attempt; each further wait is three times longer.",
    )


@dataclass(frozen=True)
class Renewals:
    """The database's slice."""

    scope: RunScope
    rules: RenewalRules
    slice: "DueSlice"


@dataclass(frozen=True)
class AskedRenewals:
    """Both slices: what is due, and what the provider says about open attempts."""

    renewals: Renewals
    view: ProviderView
    unusable: tuple[UnusablePayment, ...]


@dataclass(frozen=True)
class RenewalPlan:
    """What the run will apply."""

    scope: RunScope
    decisions: tuple[RenewalDecision, ...]
    extra: tuple[ProviderPayment, ...]
    unusable: tuple[UnusablePayment, ...]
    refused: tuple[Decision, ...] = ()


@dg.op(description="Read the subscriptions that are due, with saved method, price and attempts, and all open attempts.")
def fetch_due_subscriptions(
    context: dg.OpExecutionContext,
    config: DueConfig,
    run: RunSettings,
    billing_database: dg.ResourceParam[BillingDatabase],
    clock: dg.ResourceParam[Clock],
) -> Renewals:
    """The database's slice."""
    with told_plainly():
        from billing_orchestration.database.engine import translated
        from billing_orchestration.database.renewals import fetch_due

        settings, calendar = billing_database.settings, billing_database.calendar
        scope = run.scope(context, clock, whole_days=True)
        due_day = calendar.day_of(scope.as_of)
        with translated(), billing_database.engine.connect() as connection:
            found = fetch_due(
                connection,
                over_before=calendar.end_of(due_day),
                oldest=calendar.start_of(due_day - timedelta(days=config.max_overdue_days)),
                today=calendar.start_of(calendar.day_of(clock.now())),
            )
    context.add_output_metadata(
        {
            **describe_scope(scope),
            "due": dg.MetadataValue.int(len(found.due)),
            "open attempts": dg.MetadataValue.int(len(found.open_attempts)),
            f"not charged: overdue by more than {config.max_overdue_days} days": dg.MetadataValue.int(found.too_old),
            "not charged: the plan is not recurring": dg.MetadataValue.int(found.not_recurring),
            "ACTIVE without an end": dg.MetadataValue.int(found.without_end),
        }
    )
    rules = RenewalRules(calendar, settings.subscription_grace_days, config.max_overdue_days)
    return Renewals(scope, rules, found)


@dg.op(
    description="Ask the provider about attempts that are pending, and search its list for those too old to send again."
)
def fetch_open_renewals(
    context: dg.OpExecutionContext,
    renewals: Renewals,
    payment_provider: dg.ResourceParam[ProviderConnection],
    clock: dg.ResourceParam[Clock],
) -> AskedRenewals:
    """The provider's slice. It reads only; a wrong shop key fails the run after one request."""
    with told_plainly():
        attempts = renewals.slice.open_attempts
        pending = [attempt for attempt in attempts if attempt.state == State.PENDING]
        lost = attempts_to_search(attempts, clock.now())
        views = []
        unusable: list[UnusablePayment] = []
        if pending:
            views.append(_ask_about(pending, payment_provider))
        if lost:
            view, odd = _search(lost, payment_provider)
            views.append(view)
            unusable.extend(odd)
    view = merge_views(views)
    context.add_output_metadata(
        {
            "asked about": dg.MetadataValue.int(len(pending)),
            "searched for": dg.MetadataValue.int(len(lost)),
            "answered": dg.MetadataValue.int(len(view.answers)),
            "not told": dg.MetadataValue.int(len(view.silent)),
        }
    )
    return AskedRenewals(renewals, view, tuple(unusable))


def _ask_about(pending: Sequence[Attempt], provider: ProviderConnection) -> ProviderView:
    from billing_orchestration.provider.errors import ProviderError
    from billing_orchestration.provider.pacing import map_concurrently

    answers, silent = {}, {}
    by_payment = {attempt.external_payment_id: attempt for attempt in pending if attempt.external_payment_id}
    for payment_id, result in map_concurrently(provider.client.get_payment, list(by_payment), 8):
        attempt = by_payment[payment_id]
        if isinstance(result, ProviderError):
            silent[attempt.id] = str(result)
        elif isinstance(result, Exception):
            raise result
        elif isinstance(result, UnusablePayment):
            silent[attempt.id] = f"the provider's record of {payment_id} cannot be used: {result.reason}"
        elif names_another_attempt(attempt, result):
            silent[attempt.id] = f"payment {payment_id} names another attempt in its metadata"
        else:
            answers[attempt.id] = as_answer_to(attempt, result)
    return ProviderView(answers, frozenset(), silent)


def _search(lost: Sequence[Attempt], provider: ProviderConnection) -> tuple[ProviderView, list[UnusablePayment]]:
    from billing_orchestration.provider.errors import ProviderError, WrongCredentials

    views: list[ProviderView] = []
    unusable: list[UnusablePayment] = []
    for start, end, attempts in scan_windows(lost):
        try:
            scan = provider.client.scan(start, end)
        except WrongCredentials:
            raise
        except ProviderError as error:
            views.append(ProviderView(silent={attempt.id: str(error) for attempt in attempts}))
        else:
            views.append(read_scan(attempts, scan.payments, scan.unusable))
            unusable.extend(scan.unusable)
    return merge_views(views), unusable


@dg.op(description="Decide each: charge, send again, conclude, or leave with the reason.")
def diff_renewals(context: dg.OpExecutionContext, asked: AskedRenewals, clock: dg.ResourceParam[Clock]) -> RenewalPlan:
    """One decision for each open attempt and each due subscription."""
    renewals = asked.renewals
    decisions = decide_renewals(
        renewals.slice.due,
        renewals.slice.open_attempts,
        asked.view,
        as_of=renewals.scope.as_of,
        now=clock.now(),
        rules=renewals.rules,
    )
    decisions.extend(
        NotCharged(
            f"subscription {subscription_id}",
            f"ended {ended_at} UTC: overdue by more than max_overdue_days ({renewals.rules.max_overdue_days})",
        )
        for subscription_id, ended_at in renewals.slice.too_old_examples
    )
    shown = [_shown(decision) for decision in decisions]
    changes = {_line(decision): decision for decision in decisions if not isinstance(decision, NotCharged)}
    stop_before_applying(over_limit(len(changes), renewals.scope.max_changes), shown)
    context.add_output_metadata(describe_decisions(shown))
    approved, refused = bind(
        context, renewals.scope, list(changes.items()), {line: _shown(decision) for line, decision in changes.items()}
    )
    left = [decision for decision in decisions if isinstance(decision, NotCharged)]
    return RenewalPlan(renewals.scope, (*approved, *left), asked.view.extra, asked.unusable, refused=tuple(refused))


def _line(decision: Charge | Resend | Conclude | Void | NoteAbsence) -> str:
    """Everything of a change that an approval is bound to."""
    attempt = decision.attempt
    if isinstance(decision, Conclude):
        return f"conclude {attempt.id} {decision.payment.id} {decision.payment.status} {decision.payment.money}"
    return f"{type(decision).__name__} {attempt.id} {attempt.state} {attempt.idempotence_key} {attempt.body}"


def _shown(decision: RenewalDecision) -> Decision:
    if isinstance(decision, NotCharged):
        return Decision("leave", decision.subject, decision.reason, decision.money)
    verb = {Charge: "charge", Resend: "send again", Conclude: "conclude", Void: "void", NoteAbsence: "note absence"}
    attempt = decision.attempt
    subject = f"subscription {attempt.subscription_id}" if isinstance(decision, Charge) else attempt.subject
    return Decision(verb[type(decision)], subject, decision.reason, attempt.money)


@dg.op(description="Conclude what the provider told, then charge: write ahead, send, settle, attempt by attempt.")
def charge_renewals(
    context: dg.OpExecutionContext,
    config: ChargingConfig,
    plan: RenewalPlan,
    billing_database: dg.ResourceParam[BillingDatabase],
    payment_provider: dg.ResourceParam[ProviderConnection],
    clock: dg.ResourceParam[Clock],
) -> None:
    """Apply the plan; red at the end if something needs another try. A dry run shows the plan and sends nothing."""
    scope = plan.scope
    report = RunReport()

    def stamp() -> Stamp:
        return Stamp(JOB, scope.run_id, clock.now())

    with told_plainly():
        if scope.dry_run:
            report.decisions = [_shown(decision) for decision in plan.decisions]
            report.applied = sum(not isinstance(decision, NotCharged) for decision in plan.decisions)
        else:
            _conclude_open(plan, report, billing_database, payment_provider, stamp())
            _charge(context, config, plan, report, billing_database, payment_provider, clock)
        for decision in plan.decisions:
            if isinstance(decision, NotCharged):
                report.skipped += 1
                if not scope.dry_run:
                    report.decisions.append(_shown(decision))
                if decision.needs_retry:
                    report.again.append(f"{decision.subject}: {decision.reason}")
        report.skipped += len(plan.refused)
        report.decisions.extend(plan.refused)
        report_unusable(report, plan.unusable, database=billing_database, stamp=stamp(), dry_run=scope.dry_run)
        if not scope.dry_run:
            plot(context, ("billing", JOB), report.numbers, day=str(billing_database.calendar.day_of(scope.as_of)))
    conclude(
        context,
        scope,
        report,
        retry_hint=(
            "Nobody is charged twice: an attempt whose outcome is unknown keeps its key. Launch the job again today, or"
            " wait for tomorrow's run; successes are also picked up by the matching jobs."
        ),
        job=JOB,
    )


def _conclude_open(
    plan: RenewalPlan, report: RunReport, database: BillingDatabase, provider: ProviderConnection, stamp: Stamp
) -> None:
    """Apply what the provider told about open attempts, and close those by which no money moved."""
    from billing_orchestration.database.attempts import Closing, close
    from billing_orchestration.database.engine import translated
    from billing_orchestration.database.errors import BillingDatabaseError, DatabaseUnavailable

    told = [decision for decision in plan.decisions if isinstance(decision, Conclude)]
    successes = [decision.payment for decision in told if decision.payment.status == SUCCEEDED]
    closings: list[tuple[Closing, str]] = []
    for decision in told:
        if decision.payment.status != SUCCEEDED:
            outcome = judge_answer(decision.payment)
            closings.append(
                (
                    Closing(
                        decision.attempt,
                        outcome.state,
                        outcome.reason,
                        external_payment_id=decision.payment.id,
                        decline_party=decision.payment.cancellation_party,
                        decline_reason=decision.payment.cancellation_reason,
                        decline_class=outcome.decline_class,
                        as_read=True,
                    ),
                    outcome.state.lower(),
                )
            )
    for other in plan.decisions:
        if isinstance(other, Void):
            closings.append((Closing(other.attempt, State.VOID, other.reason, as_read=True), "void"))
        elif isinstance(other, NoteAbsence):
            closing = Closing(other.attempt, other.attempt.state, other.reason, as_read=True, absent_since=stamp.at)
            closings.append((closing, "first absence"))
    closed: set[uuid.UUID] = set()
    try:
        with translated(), database.engine.begin() as connection:
            closed = close(connection, stamp, [closing for closing, _ in closings])
    except DatabaseUnavailable:
        raise
    except BillingDatabaseError:
        # One row that somebody keeps locked does not hold up the others.
        for closing, _ in closings:
            try:
                with translated(), database.engine.begin() as connection:
                    closed |= close(connection, stamp, [closing])
            except DatabaseUnavailable:
                raise
            except BillingDatabaseError as error:
                report.again.append(f"{closing.attempt.subject}: {error}")
    for closing, word in closings:
        if closing.attempt.id in closed:
            changed = closing.state != closing.attempt.state
            report.applied += changed
            report.decisions.append(Decision(word, closing.attempt.subject, closing.reason, closing.attempt.money))
    results = settle_all(
        database, [*successes, *plan.extra], make_stamp=lambda: stamp, is_live=provider.client.is_live, dry_run=False
    ) if successes or plan.extra else iter(())  # fmt: skip
    report_settled(report, results, database=database, stamp=stamp, dry_run=False)


def _charge(
    context: dg.OpExecutionContext,
    config: ChargingConfig,
    plan: RenewalPlan,
    report: RunReport,
    database: BillingDatabase,
    provider: ProviderConnection,
    clock: Clock,
) -> None:
    from billing_orchestration.jobs.autopayment.charging import SHOP_REFUSALS, Charging, ChargingLimits

    to_send = [decision for decision in plan.decisions if isinstance(decision, (Charge, Resend))]
    report.numbers = dict.fromkeys(
        ("charged", "pending", "declined", "stopped", "rejected", "in review", "unknown", "never sent"), 0
    )
    if not to_send:
        return
    client = provider.client
    if config.max_requests_per_second is not None:
        client.limit_rate(config.max_requests_per_second)
    charging = Charging(
        database=database,
        provider=client,
        limits=ChargingLimits(config.max_concurrency, config.max_sends, config.resend_wait_s),
        make_stamp=lambda: Stamp(JOB, plan.scope.run_id, clock.now()),
        log=context.log.info,
    )
    refused: list[Problem] = []
    for result in charging.run(to_send):
        attempt = result.attempt
        word = "in review" if result.outcome == "review" else result.outcome
        report.decisions.append(Decision(word, f"subscription {attempt.subscription_id}", result.reason, attempt.money))
        report.numbers[word] = report.numbers.get(word, 0) + 1
        if result.outcome == "rejected" and result.decline_class not in SHOP_REFUSALS:
            refused.append(_refused(attempt, result.reason))
        if result.outcome in ("declined", "stopped"):
            name = f"declines: {result.decline_class}"
            report.numbers[name] = report.numbers.get(name, 0) + 1
        if result.outcome == "charged":
            name = f"charged, {attempt.money.currency}"
            report.numbers[name] = report.numbers.get(name, 0) + float(attempt.money.amount)
        report.applied += result.outcome not in ("skipped", "unknown", "never sent")
        report.skipped += result.outcome == "skipped"
        report.quarantined += result.outcome == "review"
        report.opened += result.newly_quarantined
        if result.needs_retry:
            report.again.append(f"subscription {attempt.subscription_id} ({result.outcome}): {result.reason}")
    report.stopped_by = charging.stop_reason
    report.quarantined += len(refused)
    report.opened += open_all(database, charging.make_stamp(), refused)


def _refused(attempt: Attempt, reason: str) -> Problem:
    return Problem(
        f"subscription {attempt.subscription_id}",
        "rejected",
        f"the provider refuses to charge {attempt.payment_method_id}, no money moved: {reason}",
        subscription_id=attempt.subscription_id,
        attempt_id=attempt.id,
        evidence={"body": attempt.body},
    )


@dg.job(
    name=JOB,
    description="Renews due subscriptions by charging the saved payment method. The only job that moves money.",
    partitions_def=DAILY,
    executor_def=dg.in_process_executor,
    tags=singleton_tags(JOB, MAX_RUNTIME_S),
)
def autopayment_job() -> None:
    """Database slice, provider slice, diff, charge."""
    charge_renewals(diff_renewals(fetch_open_renewals(fetch_due_subscriptions())))


autopayment_daily_schedule = tick_schedule(
    autopayment_job,
    name="autopayment_daily_schedule",
    cron="0 3 * * *",
    timezone=BILLING_TIMEZONE,
    partition_key=day_key,
    description="Daily at 03:00 in the billing time zone.",
)
