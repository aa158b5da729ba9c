"""Renewal: what is due, what an attempt is, and what the provider's answer makes of it (SPEC 4 and 5).

An attempt is (subscription, period start = the old `ended_at`, number). Its id and its idempotence key are derived
from that identity, so two processes that plan the same attempt plan the same key, and so does a database restored
from a backup.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from decimal import Decimal

from billing_orchestration.domain import declines
from billing_orchestration.domain.billing_calendar import BillingCalendar, UnusablePeriod, parse_period
from billing_orchestration.domain.decisions import Code
from billing_orchestration.domain.money import CURRENCIES, Money
from billing_orchestration.domain.provider_payment import (
    ATTEMPT_KEY,
    CANCELED,
    PENDING,
    SUCCEEDED,
    WAITING_FOR_CAPTURE,
    ProviderPayment,
    UnusablePayment,
)

# Fixed for ever: another namespace would be another key for the same attempt, and so a second charge.
_ATTEMPT_NAMESPACE = uuid.UUID("6f1f6a52-6a0e-5a5e-9d0b-0c6f3a4f5b11")
_KEY_NAMESPACE = uuid.UUID("b4b3d0a4-2c59-5f0e-8a53-5f6b1a1f0c22")

# The provider forgets a key 24 h after the first request; after that the same request is a NEW charge. One hour of
# distance covers a send that is queued or slow and clocks that disagree.
KEY_LIFETIME = timedelta(hours=23)
# Two complete scans that far apart must both miss an attempt before it counts as never executed.
SCAN_DISTANCE = timedelta(hours=1)
# How far around the sends of an attempt its payment is searched: our clock and the provider's may differ.
SCAN_MARGIN = timedelta(minutes=30)


class State:
    """States of an attempt, as in SPEC 5's table. REFUNDED: it succeeded and all of it went back before we knew."""

    PLANNED = "PLANNED"
    UNKNOWN = "UNKNOWN"
    PENDING = "PENDING"
    SUCCEEDED = "SUCCEEDED"
    REVIEW = "REVIEW"
    REFUNDED = "REFUNDED"
    DECLINED = "DECLINED"
    STOPPED = "STOPPED"
    REJECTED = "REJECTED"
    VOID = "VOID"


OPEN = frozenset({State.PLANNED, State.UNKNOWN, State.PENDING})
# The money of the period was taken, or a person has the last word: never charged again.
TAKEN = frozenset({State.SUCCEEDED, State.REVIEW, State.REFUNDED})


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt as the database holds it. Instants are aware UTC; `first_sent_at` None: certainly never sent."""

    id: uuid.UUID
    subscription_id: int
    period_start: datetime
    number: int
    state: str
    idempotence_key: uuid.UUID
    body: str
    money: Money
    user_id: str
    plan_id: int
    payment_provider_id: int
    payment_method_id: str
    first_sent_at: datetime | None = None
    last_sent_at: datetime | None = None
    sends: int = 0
    external_payment_id: str | None = None
    decline_class: str | None = None
    decline_reason: str | None = None
    first_absent_at: datetime | None = None

    @property
    def may_have_been_sent(self) -> bool:
        """Whether the provider may know of it: anything that a crash could have left in flight counts."""
        return self.first_sent_at is not None

    @property
    def subject(self) -> str:
        """How a person reads it in a report."""
        return f"subscription {self.subscription_id}, attempt {self.number}"


@dataclass(frozen=True, slots=True)
class DueSubscription:
    """A subscription whose period is over or ends today, with everything that decides about it.

    `method_*` is the saved method with the currency and provider of the payment that saved it (None: none is known),
    `prices` the plan's prices in that currency, `attempts` those of the period that begins at `ended_at`.
    """

    id: int
    user_id: str | None
    plan_id: int | None
    started_at: datetime | None
    ended_at: datetime
    plan_duration: int | None
    plan_duration_unit: str | None
    method_id: str | None
    method_currency: str | None
    method_provider_id: int | None
    prices: tuple[Decimal, ...]
    attempts: tuple[Attempt, ...] = ()
    last_tried_at: datetime | None = None
    method_declined_at: datetime | None = None

    @property
    def subject(self) -> str:
        """How a person reads it in a report."""
        return f"subscription {self.id}"


@dataclass(frozen=True, slots=True)
class RenewalRules:
    """The numbers behind the decisions, from settings and the job's config."""

    calendar: BillingCalendar
    grace_days: int
    max_overdue_days: int


@dataclass(frozen=True, slots=True)
class Charge:
    """Charge a subscription for its next period: a new attempt that is not in the database yet."""

    attempt: Attempt
    reason: str


@dataclass(frozen=True, slots=True)
class Resend:
    """Send an open attempt (again) with its own key and body. `reason` says why that is safe."""

    attempt: Attempt
    reason: str


@dataclass(frozen=True, slots=True)
class Conclude:
    """The provider told what became of an open attempt: apply its answer as if it had come to the POST."""

    attempt: Attempt
    payment: ProviderPayment
    reason: str


@dataclass(frozen=True, slots=True)
class Void:
    """Close an attempt by which certainly no money moved, so that a new one may follow."""

    attempt: Attempt
    reason: str


@dataclass(frozen=True, slots=True)
class NoteAbsence:
    """The first complete scan did not find an old attempt: remember when, so that a second one can settle it."""

    attempt: Attempt
    reason: str


@dataclass(frozen=True, slots=True)
class NotCharged:
    """A due subscription or an open attempt that is left as it is. `needs_retry` makes the run red at its end."""

    subject: str
    code: str
    reason: str
    money: Money | None = None
    needs_retry: bool = False


RenewalDecision = Charge | Resend | Conclude | Void | NoteAbsence | NotCharged


@dataclass(frozen=True, slots=True)
class ProviderView:
    """What the provider said about the open attempts, as far as it was asked.

    `answers`: attempt id -> its payment, for those asked about by payment id or found by a scan.
    `scanned`: attempts whose surroundings were scanned completely. `silent`: attempt id -> why it could not be told.
    `extra`: further successes that name an attempt which has its answer: settling puts them into quarantine.
    """

    answers: Mapping[uuid.UUID, ProviderPayment] = field(default_factory=dict)
    scanned: frozenset[uuid.UUID] = frozenset()
    silent: Mapping[uuid.UUID, str] = field(default_factory=dict)
    extra: tuple[ProviderPayment, ...] = ()


def plan_attempt(
    due: DueSubscription, *, number: int, user_id: str, plan_id: int, method_id: str, money: Money, provider_id: int
) -> Attempt:
    """The attempt with its identity, its key and the exact body that will be sent, frozen together."""
    period_start = due.ended_at.astimezone(timezone.utc)
    identity = f"{due.id}|{period_start.isoformat()}|{number}"
    attempt_id = uuid.uuid5(_ATTEMPT_NAMESPACE, identity)
    body = {
        "amount": {"value": f"{money.amount:.2f}", "currency": money.currency},
        "capture": True,
        "payment_method_id": method_id,
        "description": f"Subscription {due.id}: renewal from {period_start.date().isoformat()}"[:128],
        "metadata": {
            ATTEMPT_KEY: str(attempt_id),
            "subscription_id": str(due.id),
            "period_start": period_start.isoformat(),
            "user_id": user_id,
            "plan_id": str(plan_id),
            "payment_provider_id": str(provider_id),
        },
    }
    return Attempt(
        id=attempt_id,
        subscription_id=due.id,
        period_start=period_start,
        number=number,
        state=State.PLANNED,
        idempotence_key=uuid.uuid5(_KEY_NAMESPACE, identity),
        body=json.dumps(body, ensure_ascii=False, separators=(",", ":")),
        money=money,
        user_id=user_id,
        plan_id=plan_id,
        payment_provider_id=provider_id,
        payment_method_id=method_id,
    )


def is_past_key_lifetime(attempt: Attempt, now: datetime) -> bool:
    """Whether the provider may have forgotten the key, so that sending again could be a second charge."""
    return attempt.first_sent_at is not None and now - attempt.first_sent_at >= KEY_LIFETIME


def attempts_to_search(open_attempts: Iterable[Attempt], now: datetime) -> list[Attempt]:
    """Attempts that may have been sent, whose key is too old to be sent again: only a scan can tell."""
    return [
        attempt
        for attempt in open_attempts
        if attempt.state in (State.PLANNED, State.UNKNOWN) and is_past_key_lifetime(attempt, now)
    ]


def scan_windows(attempts: Iterable[Attempt]) -> list[tuple[datetime, datetime, tuple[Attempt, ...]]]:
    """The stretches of time to scan for lost attempts, overlapping ones merged, each with the attempts it covers.

    A payment is created by whichever send arrived first, so a stretch reaches from the first send to the last.
    """
    spans = sorted(
        (
            (a.first_sent_at - SCAN_MARGIN, (a.last_sent_at or a.first_sent_at) + SCAN_MARGIN, a)
            for a in attempts
            if a.first_sent_at
        ),
        key=lambda span: (span[0], span[1], span[2].id),
    )
    windows: list[tuple[datetime, datetime, tuple[Attempt, ...]]] = []
    for start, end, attempt in spans:
        if windows and start <= windows[-1][1]:
            first, last, covered = windows[-1]
            windows[-1] = (first, max(last, end), (*covered, attempt))
        else:
            windows.append((start, end, (attempt,)))
    return windows


def decide_open_attempt(
    attempt: Attempt, view: ProviderView, due: DueSubscription | None, now: datetime
) -> RenewalDecision:
    """What to do with an attempt of an earlier run whose outcome is open. `due` is its subscription if still due."""
    answer = view.answers.get(attempt.id)
    if answer is not None and attempt.state == State.PENDING and judge_answer(answer).state == State.PENDING:
        return NotCharged(
            attempt.subject,
            Code.OPEN_AT_PROVIDER,
            f"an open attempt is still {answer.status} at the provider",
            attempt.money,
        )
    if answer is not None:
        return Conclude(attempt, answer, f"the provider says {answer.status}")
    if attempt.id in view.silent:
        return NotCharged(
            attempt.subject,
            Code.OUTCOME_UNKNOWN,
            f"outcome not known: {view.silent[attempt.id]}",
            attempt.money,
            needs_retry=True,
        )
    if attempt.state == State.PENDING:
        return NotCharged(
            attempt.subject, Code.OPEN_AT_PROVIDER, "an open attempt is pending at the provider", attempt.money
        )
    if not attempt.may_have_been_sent:
        if due is None or due.ended_at != attempt.period_start:
            return Void(attempt, "never sent, and the period is not due any more: no money moved")
        return Resend(attempt, "planned earlier and certainly never sent")
    if is_past_key_lifetime(attempt, now):
        if attempt.id not in view.scanned:
            return NotCharged(
                attempt.subject,
                Code.OUTCOME_UNKNOWN,
                "outcome not known, older than the key's 23 h, and not searched",
                attempt.money,
                needs_retry=True,
            )
        if attempt.first_absent_at is None:
            return NoteAbsence(
                attempt, "outcome not known: a first complete scan did not find it, a second one decides"
            )
        if now - attempt.first_absent_at < SCAN_DISTANCE:
            return NotCharged(
                attempt.subject,
                Code.OUTCOME_UNKNOWN,
                "outcome not known: the second scan must come an hour after the first",
                attempt.money,
            )
        return Void(attempt, "two complete scans an hour apart did not find it: it never reached the provider")
    if due is None or due.ended_at != attempt.period_start:
        # The subscription was renewed, canceled or paused since: sending again could charge for what nobody wants.
        return NotCharged(
            attempt.subject,
            Code.OUTCOME_UNKNOWN,
            "outcome not known, and the period is not due any more: not sent again, searched after 23 h",
            attempt.money,
        )
    return Resend(attempt, "outcome not known: the same key and body again, so it cannot charge twice")


def decide_renewal(
    due: DueSubscription,
    *,
    as_of: datetime,
    now: datetime,
    rules: RenewalRules,
    voided: frozenset[uuid.UUID] = frozenset(),
) -> Charge | NotCharged:
    """Whether a due subscription is charged by a new attempt; if not, the reason (SPEC 4).

    Takes it for granted that attempts in `voided` are being closed by this very run. Open attempts are decided by
    `decide_open_attempt`; a subscription that has one is not charged here.
    """

    def no(code: str, reason: str) -> NotCharged:
        return NotCharged(due.subject, code, reason)

    today = rules.calendar.day_of(now)
    ended_on = rules.calendar.day_of(due.ended_at)
    overdue_days = (rules.calendar.day_of(as_of) - ended_on).days
    attempts = [a for a in due.attempts if a.id not in voided]
    blocking = [a for a in attempts if a.state in OPEN or a.state in TAKEN]
    if blocking:
        return no(*_why_blocked(blocking[0]))
    stopped = [a for a in attempts if a.state == State.STOPPED]
    if stopped:
        return no(Code.HARD_DECLINE, f"stopped by a hard decline ({stopped[-1].decline_reason or 'no reason given'})")
    if overdue_days > rules.max_overdue_days:
        return no(
            Code.TOO_LONG_OVERDUE,
            f"overdue by {overdue_days} days, more than max_overdue_days ({rules.max_overdue_days})",
        )
    declined = [a for a in attempts if a.state == State.DECLINED]
    if due.last_tried_at is not None and rules.calendar.day_of(due.last_tried_at) == today:
        return no(Code.TRIED_TODAY, "already attempted today")
    if declined and overdue_days > rules.grace_days:
        word = declined[-1].decline_reason or "no reason given"
        return no(Code.GRACE_OVER, f"declined ({word}) and the grace of {rules.grace_days} days is over")
    if len([a for a in declined if a.decline_class == declines.FEW]) >= declines.MOST_TRIES_OF_UNCLEAR_DECLINES:
        return no(
            Code.UNCLEAR_DECLINES,
            f"declined {declines.MOST_TRIES_OF_UNCLEAR_DECLINES} times without a usable reason",
        )
    if not due.method_id:
        return no(Code.NO_METHOD, "no saved payment method")
    if due.method_declined_at is not None and rules.calendar.day_of(due.method_declined_at) == today:
        return no(Code.METHOD_DECLINED_TODAY, "this payment method was already declined today")
    if not due.user_id or due.plan_id is None:
        return no(Code.UNUSABLE_SUBSCRIPTION, "the subscription has no user or no plan")
    if due.method_provider_id is None or due.method_currency not in CURRENCIES:
        return no(Code.UNUSABLE_METHOD, "the payment that saved the method has no currency or provider")
    if not due.prices:
        return no(Code.NO_PRICE, f"no price in {due.method_currency}")
    if len(due.prices) > 1:
        return no(Code.SEVERAL_PRICES, f"several prices in {due.method_currency}")
    if not due.prices[0].is_finite() or due.prices[0] <= 0:
        return no(Code.UNUSABLE_PRICE, f"the price {due.prices[0]} {due.method_currency} is not positive")
    try:
        period = parse_period(due.plan_duration, due.plan_duration_unit)
        paid_until = rules.calendar.day_of(rules.calendar.next_end(due.started_at, due.ended_at, period))
    except UnusablePeriod as error:
        return no(Code.UNUSABLE_PERIOD, str(error))
    # As expire_subscriptions_job counts: it would end this morning what was paid for at three o'clock.
    if paid_until <= rules.calendar.day_of(as_of) - timedelta(days=rules.grace_days):
        return no(
            Code.PERIOD_OVER,
            f"overdue by {overdue_days} days: the period to pay for ended on {paid_until}, and its grace is over",
        )
    number = 1 + max((a.number for a in due.attempts), default=0)
    attempt = plan_attempt(
        due,
        number=number,
        user_id=due.user_id,
        plan_id=due.plan_id,
        method_id=due.method_id,
        money=Money(due.prices[0], due.method_currency),
        provider_id=due.method_provider_id,
    )
    return Charge(attempt, _why_due(overdue_days, number))


def _why_blocked(attempt: Attempt) -> tuple[str, str]:
    """The code and the reason."""
    if attempt.state == State.PENDING:
        return Code.OPEN_AT_PROVIDER, "an open attempt is pending at the provider"
    if attempt.state == State.REVIEW:
        return Code.IN_REVIEW, "the period's charge is in review (quarantine)"
    if attempt.state in TAKEN:
        return Code.ALREADY_CHARGED, f"the period was already charged (attempt {attempt.number} {attempt.state})"
    if attempt.may_have_been_sent:
        return Code.OUTCOME_UNKNOWN, "an open attempt whose outcome is not known yet"
    return Code.ALREADY_PLANNED, "an attempt is already planned"


def _why_due(overdue_days: int, number: int) -> str:
    when = "ends today" if overdue_days == 0 else f"ended {overdue_days} days ago" if overdue_days > 0 else "due"
    return when if number == 1 else f"{when}, try {number}"


def decide_renewals(
    due: Sequence[DueSubscription],
    open_attempts: Sequence[Attempt],
    view: ProviderView,
    *,
    as_of: datetime,
    now: datetime,
    rules: RenewalRules,
) -> list[RenewalDecision]:
    """Every decision of one autopayment run: first about the open attempts, then about each due subscription.

    A subscription whose end was moved while an attempt was open is not charged before that attempt has its answer: it
    may have been paid for the very days that are due now.
    """
    by_id = {subscription.id: subscription for subscription in due}
    decisions: list[RenewalDecision] = []
    voided: set[uuid.UUID] = set()
    spoken_for: set[int] = set()
    open_elsewhere: dict[int, Attempt] = {}
    for attempt in open_attempts:
        subscription = by_id.get(attempt.subscription_id)
        decision = decide_open_attempt(attempt, view, subscription, now)
        if isinstance(decision, Resend) and subscription is not None:
            decision = _still_wanted(decision, subscription, as_of=as_of, now=now, rules=rules)
        if isinstance(decision, Void):
            voided.add(attempt.id)
        elif subscription is not None and subscription.ended_at == attempt.period_start:
            spoken_for.add(attempt.subscription_id)
        else:
            open_elsewhere[attempt.subscription_id] = attempt
        decisions.append(decision)
    for subscription in due:
        earlier = open_elsewhere.get(subscription.id)
        if subscription.id in spoken_for:
            continue
        if earlier is not None:
            reason = f"an open attempt for its period from {earlier.period_start.date()}, which comes first"
            decisions.append(NotCharged(subscription.subject, Code.OUTCOME_UNKNOWN, reason))
        else:
            decisions.append(decide_renewal(subscription, as_of=as_of, now=now, rules=rules, voided=frozenset(voided)))
    return decisions


def _still_wanted(
    decision: Resend, due: DueSubscription, *, as_of: datetime, now: datetime, rules: RenewalRules
) -> Resend | Void:
    """A planned attempt that was never sent is only sent if a fresh one would ask the same of the same method."""
    attempt = decision.attempt
    if attempt.may_have_been_sent:
        return decision
    fresh = decide_renewal(due, as_of=as_of, now=now, rules=rules, voided=frozenset({attempt.id}))
    if isinstance(fresh, NotCharged):
        return Void(attempt, f"never sent, and not to be charged any more: {fresh.reason}")
    wanted = fresh.attempt
    if (wanted.money, wanted.payment_method_id, wanted.plan_id) != (
        attempt.money,
        attempt.payment_method_id,
        attempt.plan_id,
    ):
        return Void(attempt, "never sent, and the price, the plan or the payment method has changed since")
    return decision


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a provider's answer makes of an attempt: its next state and why. SUCCEEDED still has to be settled."""

    state: str
    reason: str
    decline_class: str | None = None


def judge_answer(payment: ProviderPayment) -> Outcome:
    """The outcome of an attempt from the provider's payment (SPEC 5's table).

    A success is only named here; settling it (amount, currency, refund, test shop) is the settling function's work.
    """
    if payment.status == SUCCEEDED:
        return Outcome(State.SUCCEEDED, "succeeded")
    if payment.status == PENDING:
        return Outcome(State.PENDING, "pending at the provider: asked about from now on, never sent again")
    if payment.status == WAITING_FOR_CAPTURE:
        return Outcome(
            State.PENDING, "the provider holds the money uncaptured: asked about from now on, never sent again"
        )
    if payment.status == CANCELED:
        decline_class = declines.classify(payment.cancellation_reason)
        by, word = payment.cancellation_party or "nobody named", payment.cancellation_reason or "no reason given"
        reason = f"declined by {by}: {word}"
        stopping = decline_class in declines.STOPPING
        return Outcome(State.STOPPED if stopping else State.DECLINED, f"{reason} ({decline_class})", decline_class)
    raise ValueError(f"unknown status {payment.status!r}")


def names_another_attempt(attempt: Attempt, payment: ProviderPayment) -> bool:
    """Whether an answer to this attempt's request speaks of something else: then the outcome is not known."""
    return payment.claims.names_an_attempt and payment.claims.renewal_attempt_id != attempt.id


def as_answer_to(attempt: Attempt, payment: ProviderPayment) -> ProviderPayment:
    """What answered an attempt's own request (by its key, or by the id it was given) is about that attempt.

    A provider that leaves the metadata out of an answer must not make a paid renewal look like a stranger's purchase.
    """
    if payment.claims.names_an_attempt:
        return payment
    own: dict[str, str] = json.loads(attempt.body)["metadata"]
    return replace(payment, metadata={**payment.metadata, **own})


def read_scan(
    attempts: Sequence[Attempt], payments: Sequence[ProviderPayment], unusable: Sequence[UnusablePayment]
) -> ProviderView:
    """What a complete scan says about the attempts it was made for.

    Found by the attempt's id in the metadata. An item proves nothing absent if it might be the attempt's: it cannot
    be read and names it somewhere, or its metadata cannot be read either; or it moved money by the same saved method
    and names no attempt, or not readably.
    """
    by_attempt: dict[uuid.UUID, list[ProviderPayment]] = {}
    for payment in payments:
        if (named := payment.claims.renewal_attempt_id) is not None:
            by_attempt.setdefault(named, []).append(payment)
    unreadable = [repr(item.evidence) for item in unusable if not _metadata_is_readable(item.evidence)]
    odd = [repr(item.evidence) for item in unusable]
    answers: dict[uuid.UUID, ProviderPayment] = {}
    silent: dict[uuid.UUID, str] = {}
    extra: list[ProviderPayment] = []
    for attempt in attempts:
        # Who may have the money speaks first; several payments of one key would be the provider's own fault.
        found = sorted(
            by_attempt.get(attempt.id, ()),
            key=lambda p: (p.status != SUCCEEDED, p.status == CANCELED, p.created_at, p.id),
        )
        if found:
            answers[attempt.id] = found[0]
            extra.extend(payment for payment in found[1:] if payment.status == SUCCEEDED)
        elif unreadable or any(str(attempt.id) in text for text in odd):
            silent[attempt.id] = "the provider's list holds a record that cannot be read and may be this charge"
        elif stranger := next((payment for payment in payments if _may_be_nameless(attempt, payment)), None):
            silent[attempt.id] = (
                f"payment {stranger.id} at the provider is of the same payment method and names no attempt: it may be"
                " this charge, a person has to look"
            )
    scanned = frozenset(attempt.id for attempt in attempts if attempt.id not in silent)
    return ProviderView(answers, scanned, silent, tuple(extra))


def _may_be_nameless(attempt: Attempt, payment: ProviderPayment) -> bool:
    return (
        payment.claims.renewal_attempt_id is None
        and payment.status != CANCELED
        and payment.method_id == attempt.payment_method_id
        and payment.id != attempt.payment_method_id  # the purchase that saved the method
    )


def _metadata_is_readable(evidence: object) -> bool:
    return isinstance(evidence, Mapping) and isinstance(evidence.get("metadata"), Mapping)


def merge_views(views: Iterable[ProviderView]) -> ProviderView:
    """Several partial views as one."""
    answers: dict[uuid.UUID, ProviderPayment] = {}
    silent: dict[uuid.UUID, str] = {}
    scanned: set[uuid.UUID] = set()
    extra: list[ProviderPayment] = []
    for view in views:
        answers.update(view.answers)
        silent.update(view.silent)
        scanned |= view.scanned
        extra.extend(view.extra)
    return ProviderView(answers, frozenset(scanned), silent, tuple(extra))
