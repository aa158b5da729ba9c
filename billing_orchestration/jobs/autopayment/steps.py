"""The steps of a renewal run: read, ask, decide, apply. For the whole of the due, and for one shard of it.

They take what a run works on and return what it found; what a run's page shows is attached where they are used.
"""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

import dagster as dg
from pydantic import Field

from billing_orchestration.database.asked_methods import remember
from billing_orchestration.database.attempts import close, open_attempts
from billing_orchestration.database.audit import Problem, Stamp
from billing_orchestration.database.one_by_one import NotWritten, one_by_one
from billing_orchestration.database.quarantine import close_reachable
from billing_orchestration.database.renewal_view import check_view
from billing_orchestration.database.renewals import DueSlice, fetch_due
from billing_orchestration.domain.answers import (
    SHOP_REFUSALS,
    Closing,
    ProviderView,
    as_answer_to,
    attempts_to_search,
    judge_payment,
    merge_views,
    names_another_attempt,
    read_scan,
    scan_windows,
)
from billing_orchestration.domain.attempts import Attempt, State
from billing_orchestration.domain.billing_calendar import BillingCalendar
from billing_orchestration.domain.clocks import Clocks
from billing_orchestration.domain.conclusions import conclude_in
from billing_orchestration.domain.decisions import Action, Code, Decision
from billing_orchestration.domain.methods import REMEMBERED, MethodAnswer
from billing_orchestration.domain.personal import mask_body
from billing_orchestration.domain.printable import printable
from billing_orchestration.domain.problem_kinds import METHOD_UNUSABLE, NO_CONTACT, REJECTED, TWO_ACTIVE
from billing_orchestration.domain.provider_payment import SUCCEEDED, ProviderPayment, UnusablePayment
from billing_orchestration.domain.renewals import (
    Charge,
    Conclude,
    Holds,
    NotCharged,
    NoteAbsence,
    RenewalDecision,
    RenewalRules,
    Resend,
    Void,
    decide_open_attempt,
    decide_renewals,
)
from billing_orchestration.domain.run_scope import RunScope
from billing_orchestration.domain.shards import Shard
from billing_orchestration.first_use import ask_about_methods
from billing_orchestration.jobs.autopayment.charging import Charging
from billing_orchestration.jobs.autopayment.doubtful_charges import settle_doubtful
from billing_orchestration.jobs.autopayment.lost_charges import Search, search, settle_lost
from billing_orchestration.jobs.autopayment.pace import ChargingLimits
from billing_orchestration.jobs.autopayment.pipeline import Pipeline
from billing_orchestration.jobs.autopayment.results import ChargeResult
from billing_orchestration.jobs.clocks import clocks_apart, look_at_clocks, note_clocks
from billing_orchestration.jobs.run_report import RunReport
from billing_orchestration.jobs.settling import open_all, report_settled, report_unusable, settle_all
from billing_orchestration.jobs.termination import interrupts_held_back
from billing_orchestration.provider.errors import ProviderError, WrongCredentials
from billing_orchestration.provider.pacing import map_concurrently
from billing_orchestration.resources import BillingDatabase, Clock, ProviderConnection, rules_of
from billing_orchestration.threads import Threads

JOB = "autopayment_job"
RETRY_HINT = (
    "Nobody is charged twice: an attempt whose outcome is unknown keeps its key. Launch the job again today, or wait"
    " for tomorrow's run; successes are also picked up by the matching jobs."
)


class DueConfig(dg.Config):
    """Which due subscriptions are charged."""

    max_overdue_days: int = Field(
        default=30,
        ge=0,
        description="A subscription that ended more than this many billing days ago is reported, not charged.",
    )


class ChargingConfig(dg.Config):
    """Limits on the requests to the provider."""

    max_concurrency: int = Field(
        default=64,
        ge=1,
        le=256,
        description="At most this many charges at once. A run begins with one, and grows while grants are committed and"
        " the provider does not throttle.",
    )
    max_requests_per_second: float | None = Field(
        default=None, gt=0, description="A cap on requests per second, if the provider gave you one. Left out: none."
    )
    max_sends: int = Field(
        default=3,
        ge=1,
        le=10,
        description="Send one attempt at most this often in a run (same key and body) while its outcome is unknown.",
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
    slice: DueSlice


@dataclass(frozen=True)
class AskedRenewals:
    """Both slices: what is due, and what the provider says about open attempts."""

    renewals: Renewals
    view: ProviderView
    unusable: tuple[UnusablePayment, ...]
    asked_about: int
    searched_for: int
    clocks: Clocks
    answers: tuple[MethodAnswer, ...] = ()
    search: Search = field(default_factory=Search)

    @property
    def holds(self) -> Holds:
        """What holds a charge: entries in quarantine, and charges that our records have lost."""
        known, lost = self.renewals.slice.holds, self.search.lost
        return Holds({**lost.attempts, **known.attempts}, {**lost.subscriptions, **known.subscriptions})


@dataclass(frozen=True)
class RenewalPlan:
    """What the run will apply."""

    scope: RunScope
    decisions: tuple[RenewalDecision, ...]
    extra: tuple[ProviderPayment, ...]
    unusable: tuple[UnusablePayment, ...]
    clocks: Clocks
    search: Search
    refused: tuple[Decision, ...] = ()
    answers: tuple[MethodAnswer, ...] = ()


def read_renewals(
    database: BillingDatabase, clock: Clock, scope: RunScope, max_overdue_days: int, shard: Shard | None = None
) -> Renewals:
    """The database's slice: what is due, with saved method, price and attempts, and all open attempts."""
    settings, calendar = database.settings, database.calendar
    with database.read() as connection:
        if settings.billing_renewal_view:
            check_view(connection, settings.billing_renewal_view)
        found = fetch_due(
            connection,
            **bounds_of_due(calendar, scope, clock, max_overdue_days),
            today=calendar.start_of(calendar.day_of(clock.now())),
            shard=shard,
            view=settings.billing_renewal_view,
        )
    return Renewals(scope, rules_of(settings, calendar, max_overdue_days), found)


def bounds_of_due(
    calendar: BillingCalendar, scope: RunScope, clock: Clock, max_overdue_days: int
) -> dict[str, datetime]:
    """Which ends are looked at: up to the day that the run stands for, and back from today on the wall."""
    return {
        "over_before": calendar.end_of(calendar.day_of(scope.as_of)),
        "oldest": calendar.start_of(calendar.day_of(clock.now()) - timedelta(days=max_overdue_days)),
    }


def ask_about_open(
    renewals: Renewals, database: BillingDatabase, provider: ProviderConnection, clock: Clock, threads: Threads
) -> AskedRenewals:
    """The provider's slice: what became of attempts whose outcome is open, and what time it is there. It reads only.

    The provider's clock is asked for before the first charge: one that is lost while the clocks are apart would be
    searched for at the wrong time, and made once more.
    """
    ours = (None, renewals.rules.shop_id)
    attempts = [attempt for attempt in renewals.slice.open_attempts if attempt.shop_id in ours]
    pending = [attempt for attempt in attempts if attempt.state == State.PENDING]
    lost = attempts_to_search(attempts, clock.now())
    views = []
    unusable: list[UnusablePayment] = []
    if pending:
        views.append(_ask_about(pending, provider, threads))
    if lost:
        view, odd = _search(lost, provider, clock.now())
        views.append(view)
        unusable.extend(odd)
    if attempts or renewals.slice.due:
        provider.client.make_sure_of_clock()
    clocks = look_at_clocks(database, clock, provider)
    view = merge_views(views)
    due, closed = conclude_in(renewals.slice.due, attempts, view)
    still_open = tuple(attempt for attempt in renewals.slice.open_attempts if attempt.id not in closed)
    found, answers = ask_about_methods(
        replace(renewals.slice, due=tuple(due), open_attempts=still_open),
        provider.client,
        database.read,
        now=clock.now(),
        rules=renewals.rules,
        threads=threads,
    )
    renewals = replace(renewals, slice=replace(renewals.slice, due=found.due))
    return AskedRenewals(renewals, view, tuple(unusable), len(pending), len(lost), clocks, answers)


def ask_for_lost(
    asked: AskedRenewals, database: BillingDatabase, provider: ProviderConnection, clock: Clock
) -> AskedRenewals:
    """The same with charges that our records have lost, where anybody could be charged."""
    found, days = asked.renewals.slice, asked.renewals.rules.max_overdue_days
    may_charge = bool(found.due or found.open_attempts)
    return replace(asked, search=search(database, provider, clock, days, may_charge=may_charge))


def conclude_pending(
    report: RunReport,
    database: BillingDatabase,
    provider: ProviderConnection,
    clock: Clock,
    threads: Threads,
    make_stamp: Callable[[], Stamp],
) -> None:
    """Ask what became of all pending attempts of this shop, and write it down, before anything else is decided.

    What the provider does not tell, and what could not be written, stays as it is: whoever decides about that attempt
    asks again.
    """
    shop_id = database.settings.yookassa_shop_id
    with database.read() as connection:
        pending = [
            attempt
            for attempt in open_attempts(connection)
            if attempt.state == State.PENDING and attempt.shop_id in (None, shop_id)
        ]
    if not pending:
        return
    view = _ask_about(pending, provider, threads)
    decisions = [decide_open_attempt(attempt, view, None, clock.now(), shop_id) for attempt in pending]
    told = [decision for decision in decisions if isinstance(decision, Conclude)]
    _conclude_open(told, (), report, database, provider, make_stamp())


def _ask_about(pending: Sequence[Attempt], provider: ProviderConnection, threads: Threads) -> ProviderView:
    answers, silent = {}, {}
    by_payment = {attempt.external_payment_id: attempt for attempt in pending if attempt.external_payment_id}
    for payment_id, result in map_concurrently(provider.client.get_payment, list(by_payment), 8, threads=threads):
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


def _search(
    lost: Sequence[Attempt], provider: ProviderConnection, now: datetime
) -> tuple[ProviderView, list[UnusablePayment]]:
    views: list[ProviderView] = []
    unusable: list[UnusablePayment] = []
    for start, end, attempts in scan_windows(lost, now):
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


def decide(asked: AskedRenewals, clock: Clock) -> list[RenewalDecision]:
    """One decision for each open attempt and each due subscription, and for examples of what is overdue by too much."""
    renewals = asked.renewals
    decisions = decide_renewals(
        renewals.slice.due,
        renewals.slice.open_attempts,
        asked.view,
        now=clock.now(),
        rules=renewals.rules,
        in_review=renewals.slice.in_review,
        holds=asked.holds,
    )
    decisions.extend(
        NotCharged(
            f"subscription {subscription_id}",
            Code.TOO_LONG_OVERDUE,
            f"ended {ended_at} UTC: overdue by more than max_overdue_days ({renewals.rules.max_overdue_days})",
        )
        for subscription_id, ended_at in renewals.slice.too_old_examples
    )
    return decisions if asked.clocks.may_be_trusted else [_held(decision) for decision in decisions]


def _held(decision: RenewalDecision) -> RenewalDecision:
    """With a wrong clock nothing is sent, missed or given up. What the provider says of an attempt holds anyway."""
    if isinstance(decision, (Conclude, NotCharged)):
        return decision
    held = shown(decision)
    reason = f"{held.action}, if the clocks were not apart"
    return NotCharged(held.subject, Code.CLOCKS_APART, reason, held.money, needs_retry=True)


def plan_of(
    asked: AskedRenewals, decisions: Sequence[RenewalDecision], refused: Sequence[Decision] = ()
) -> RenewalPlan:
    """What follows from both slices. `refused`: what an approval does not cover."""
    return RenewalPlan(
        asked.renewals.scope,
        tuple(decisions),
        asked.view.extra,
        asked.unusable,
        asked.clocks,
        asked.search,
        tuple(refused),
        asked.answers,
    )


def line_of(decision: Charge | Resend | Conclude | Void | NoteAbsence) -> str:
    """Everything of a change that an approval is bound to."""
    attempt = decision.attempt
    if isinstance(decision, Conclude):
        return f"conclude {attempt.id} {decision.payment.id} {decision.payment.status} {decision.payment.money}"
    return f"{type(decision).__name__} {attempt.id} {attempt.state} {attempt.idempotence_key} {attempt.body}"


def shown(decision: RenewalDecision) -> Decision:
    if isinstance(decision, NotCharged):
        return Decision(Action.LEAVE, decision.subject, decision.reason, decision.money, decision.code)
    verb = {
        Charge: Action.CHARGE,
        Resend: Action.SEND_AGAIN,
        Conclude: Action.CONCLUDE,
        Void: Action.VOID,
        NoteAbsence: Action.NOTE_ABSENCE,
    }
    attempt = decision.attempt
    subject = f"subscription {attempt.subscription_id}" if isinstance(decision, Charge) else attempt.subject
    return Decision(verb[type(decision)], subject, decision.reason, attempt.money)


def apply_plan(
    context: dg.OpExecutionContext,
    config: ChargingConfig,
    plan: RenewalPlan,
    report: RunReport,
    database: BillingDatabase,
    provider: ProviderConnection,
    clock: Clock,
    threads: Threads,
) -> None:
    """Conclude what the provider reported, then charge; a dry run only reports the plan."""
    scope = plan.scope

    def stamp() -> Stamp:
        return Stamp(JOB, scope.run_id, clock.now())

    if scope.dry_run:
        report.decisions = [shown(decision) for decision in plan.decisions]
        report.applied = sum(not isinstance(decision, NotCharged) for decision in plan.decisions)
    else:
        _conclude_open(plan.decisions, plan.extra, report, database, provider, stamp())
        settle_lost(plan.search, report, database, provider, clock, stamp)
        settle_doubtful(report, database, provider, stamp, threads)
        _remember(plan, database, stamp())
        _charge(context, config, plan, report, database, provider, clock, threads)
    for decision in plan.decisions:
        if isinstance(decision, NotCharged):
            report.skipped += 1
            if not scope.dry_run:
                report.decisions.append(shown(decision))
            if decision.needs_retry:
                report.again.append(f"{decision.subject}: {decision.reason}")
    if not scope.dry_run:
        problems = [problem for d in plan.decisions if isinstance(d, NotCharged) and (problem := _problem_of(d))]
        report.quarantined += len(problems)
        report.opened += open_all(database, stamp(), problems)
    note_clocks(report, plan.clocks, "Nothing was charged, no absence noted, no attempt given up")
    report.skipped += len(plan.refused)
    report.decisions.extend(plan.refused)
    report_unusable(report, plan.unusable, database=database, stamp=stamp(), dry_run=scope.dry_run)


def _remember(plan: RenewalPlan, database: BillingDatabase, stamp: Stamp) -> None:
    """What the provider said about methods, and that these subscriptions are charged at last. One odd id of the
    provider's stops nobody: it is asked about again."""

    def write(part: Sequence[MethodAnswer]) -> None:
        with database.begin() as connection:
            remember(connection, stamp, part)

    for _ in one_by_one([answer for answer in plan.answers if answer.word in REMEMBERED], write):
        pass
    to_charge = [d.attempt.subscription_id for d in plan.decisions if isinstance(d, Charge)]
    if to_charge or plan.answers:
        with database.begin() as connection:
            close_reachable(connection, stamp, to_charge)


def _conclude_open(
    decisions: Sequence[RenewalDecision],
    extra: Sequence[ProviderPayment],
    report: RunReport,
    database: BillingDatabase,
    provider: ProviderConnection,
    stamp: Stamp,
) -> None:
    """Apply what the provider said about open attempts, and close those by which no money moved.

    `extra`: other successes that a search has shown.
    """
    successes: list[ProviderPayment] = []
    closings: list[Closing] = []
    for decision in decisions:
        if isinstance(decision, Conclude):
            if decision.payment.status == SUCCEEDED:
                successes.append(decision.payment)
            else:
                closings.append(replace(judge_payment(decision.attempt, decision.payment), as_read=True))
        elif isinstance(decision, Void):
            closings.append(Closing(decision.attempt, State.VOID, decision.reason, as_read=True))
        elif isinstance(decision, NoteAbsence):
            attempt = decision.attempt
            closings.append(Closing(attempt, attempt.state, decision.reason, as_read=True, absent_since=stamp.at))

    def write(part: Sequence[Closing]) -> set[uuid.UUID]:
        with database.begin() as connection:
            return close(connection, stamp, part)

    for part, closed in one_by_one(closings, write):
        if isinstance(closed, NotWritten):
            report.again.append(f"{part[0].attempt.subject}: {part[0].attempt.unnamed(closed.reason)}")
            continue
        for closing in part:
            if closing.attempt.id in closed:
                report.applied += closing.state != closing.attempt.state
                word = "first absence" if closing.absent_since is not None else closing.word
                report.decisions.append(Decision(word, closing.attempt.subject, closing.reason, closing.attempt.money))
    results = settle_all(
        database, [*successes, *extra], make_stamp=lambda: stamp, is_live=provider.client.is_live, dry_run=False
    ) if successes or extra else iter(())  # fmt: skip
    report_settled(report, results, database=database, stamp=stamp, dry_run=False)


def _charge(
    context: dg.OpExecutionContext,
    config: ChargingConfig,
    plan: RenewalPlan,
    report: RunReport,
    database: BillingDatabase,
    provider: ProviderConnection,
    clock: Clock,
    threads: Threads,
) -> None:
    to_send = [decision for decision in plan.decisions if isinstance(decision, (Charge, Resend))]
    report.numbers = dict.fromkeys(
        ("charged", "pending", "declined", "stopped", "rejected", "in review", "unknown", "never sent"), 0
    )
    if not to_send:
        return
    database.check_writing()
    client = provider.client
    if config.max_requests_per_second is not None:
        client.rate.limit(config.max_requests_per_second)
    charging = Charging(
        database,
        client,
        lambda: Stamp(JOB, plan.scope.run_id, clock.now()),
        lambda line: context.log.info(printable(line)),
        clocks_apart=lambda: clocks_apart(database, clock, provider),
        database_now=clock.database_now,
    )
    limits = ChargingLimits(config.max_concurrency, config.max_sends, config.resend_wait_s)
    pipeline = Pipeline(charging, limits, threads)
    with interrupts_held_back(pipeline.terminate) as held:
        results = pipeline.run(to_send)
        report.stopped_by, report.stop_code = pipeline.pace.stop_reason, pipeline.pace.stop_code
        _report_charges(report, results, charging)
    report.terminated_by = held.signal


def _report_charges(report: RunReport, results: Sequence[ChargeResult], charging: Charging) -> None:
    """Add up what became of the charges, and put before a person what needs one."""
    for_a_person: list[Problem] = []
    for result in results:
        attempt = result.attempt
        word = "in review" if result.outcome == "review" else result.outcome
        subject = f"subscription {attempt.subscription_id}"
        report.decisions.append(Decision(word, subject, result.reason, attempt.money, result.code))
        report.numbers[word] = report.numbers.get(word, 0) + 1
        if result.outcome == "rejected" and result.decline_class not in SHOP_REFUSALS:
            for_a_person.append(_refused(attempt, result.reason))
        if result.problem is not None:
            for_a_person.append(result.problem)
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
            report.again.append(f"{subject} ({result.outcome}): {result.reason}")
    report.quarantined += len(for_a_person)
    report.opened += open_all(charging.database, charging.make_stamp(), for_a_person)


def _problem_of(decision: NotCharged) -> Problem | None:
    """What a person has to look at, if anything."""
    if decision.two_active is not None:
        return Problem(decision.subject, TWO_ACTIVE, decision.reason, subscription_id=decision.two_active)
    if decision.no_contact is not None:
        return Problem(decision.subject, NO_CONTACT, decision.reason, subscription_id=decision.no_contact)
    if decision.method_unusable is not None:
        return Problem(decision.subject, METHOD_UNUSABLE, decision.reason, subscription_id=decision.method_unusable)
    return None


def _refused(attempt: Attempt, reason: str) -> Problem:
    return Problem(
        f"subscription {attempt.subscription_id}",
        REJECTED,
        f"the provider refuses to charge {attempt.payment_method_id}, no money moved: {reason}",
        subscription_id=attempt.subscription_id,
        attempt_id=attempt.id,
        evidence={"body": mask_body(attempt.body)},
    )
