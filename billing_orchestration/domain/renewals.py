"""Renewal: which subscriptions and open attempts a run charges, and why it leaves the others."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

from billing_orchestration.domain import declines
from billing_orchestration.domain.answers import ProviderView, judge_payment
from billing_orchestration.domain.attempts import (
    KEY_LIFETIME_HOURS,
    LIVE,
    SCAN_DISTANCE,
    TAKEN,
    Attempt,
    State,
    identify,
    is_past_key_lifetime,
)
from billing_orchestration.domain.billing_calendar import BillingCalendar, UnusablePeriod, parse_period
from billing_orchestration.domain.clocks import is_in_future
from billing_orchestration.domain.conclusions import conclude_in
from billing_orchestration.domain.decisions import Code
from billing_orchestration.domain.methods import SILENT, OlderMethod, Question, why_not_charged
from billing_orchestration.domain.money import CURRENCIES, Money
from billing_orchestration.domain.personal import without_names
from billing_orchestration.domain.provider_payment import ATTEMPT_KEY, ProviderPayment
from billing_orchestration.domain.receipts import ReceiptRules, contact_of, fill, receipt_of


@dataclass(frozen=True, slots=True)
class SaidByService:
    """What the service's own view says about a subscription: in how many rows, and the one row's contents.

    `unreadable`: why the database could not tell.
    """

    rows: int = 0
    method_id: str | None = None
    may_charge: bool = False
    email: str | None = field(default=None, repr=False)
    phone: str | None = field(default=None, repr=False)
    method_stopped_at: datetime | None = None
    method_word: str | None = None
    unreadable: str = ""


@dataclass(frozen=True, slots=True)
class DueSubscription:
    """A subscription whose period is over or ends today, with everything that decides about it.

    `method_*` is the saved method with the currency and provider of the payment that saved it (None: none is known),
    `prices` the plan's prices in that currency, `attempts` those of the period that begins at `ended_at`.
    `settled_until` is the end of the last period that was settled for it, `outlasted_by` another ACTIVE subscription of
    the same user and plan that ends later. `method_stopped_at`: a charge of the method, of whatever subscription, ended
    in a hard decline. `method_is_elsewhere`: it was saved at a payment provider that is not this shop. With `said`, the
    service itself says by which method and whether it may be charged, and where its receipts go. `question`: what the
    provider must be asked before the method is charged for the first time; `method_word` is what it answered. `kept`
    is charged instead if it answers no.
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
    settled_until: datetime | None = None
    outlasted_by: int | None = None
    plan_name: str | None = None
    method_stopped_at: datetime | None = None
    method_is_elsewhere: bool = False
    said: SaidByService | None = None
    question: Question | None = None
    method_word: str | None = None
    method_detail: str = ""
    older: tuple[OlderMethod, ...] = ()

    @property
    def subject(self) -> str:
        """Its name in a report."""
        return f"subscription {self.id}"


# What the payer reads of a charge, where the shop says nothing else.
PLAIN_DESCRIPTION = "Subscription {subscription_id}: renewal from {period_start}"


@dataclass(frozen=True, slots=True)
class RenewalRules:
    """What is behind the decisions, from settings and the job's config. Without `receipt`, charges carry none."""

    calendar: BillingCalendar
    grace_days: int
    max_overdue_days: int
    shop_id: str
    receipt: ReceiptRules | None = None
    description: str = PLAIN_DESCRIPTION
    gateway_id: str | None = None


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
    """The provider said what became of an open attempt: apply it like an answer to the POST."""

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
    """A due subscription or an open attempt that is left as it is. `needs_retry` makes the run red at its end.

    `two_active`: the subscription that a person has to look at, because another one of its user outlasts it.
    `no_contact`: the one whose receipt would reach nobody. `method_unusable`: the one whose customer must give another
    method.
    """

    subject: str
    code: str
    reason: str
    money: Money | None = None
    needs_retry: bool = False
    two_active: int | None = None
    no_contact: int | None = None
    method_unusable: int | None = None


RenewalDecision = Charge | Resend | Conclude | Void | NoteAbsence | NotCharged


def plan_attempt(
    due: DueSubscription,
    *,
    number: int,
    user_id: str,
    plan_id: int,
    method_id: str,
    money: Money,
    provider_id: int,
    rules: RenewalRules,
) -> Attempt:
    """The attempt with its identity, its key and the exact body that will be sent, frozen together.

    Where a receipt is due and nobody can be reached, the body has none: `decide_renewal` charges no such attempt.
    """
    period_start = due.ended_at.astimezone(timezone.utc)
    attempt_id, idempotence_key = identify(due.id, period_start, number)
    names = {
        "subscription_id": str(due.id),
        "plan": due.plan_name or f"Subscription {due.id}",
        "period_start": period_start.date().isoformat(),
    }
    body: dict[str, Any] = {
        "amount": {"value": f"{money.amount:.2f}", "currency": money.currency},
        "capture": True,
        "payment_method_id": method_id,
        "description": fill(rules.description, **names),
        "metadata": {
            ATTEMPT_KEY: str(attempt_id),
            "subscription_id": str(due.id),
            "period_start": period_start.isoformat(),
            "user_id": user_id,
            "plan_id": str(plan_id),
            "payment_provider_id": str(provider_id),
        },
    }
    if rules.gateway_id:
        body["recipient"] = {"gateway_id": rules.gateway_id}
    contact = rules.receipt and _contact_of(due, rules.receipt)
    if rules.receipt and contact:
        body["receipt"] = receipt_of(rules.receipt, contact, money, **names)
    return Attempt(
        id=attempt_id,
        subscription_id=due.id,
        period_start=period_start,
        number=number,
        state=State.PLANNED,
        idempotence_key=idempotence_key,
        # ASCII: a server of any encoding can store exactly what is sent.
        body=json.dumps(body, separators=(",", ":")),
        money=money,
        user_id=user_id,
        plan_id=plan_id,
        payment_provider_id=provider_id,
        payment_method_id=method_id,
        shop_id=rules.shop_id,
        period_count=due.plan_duration,
        period_unit=due.plan_duration_unit,
    )


def decide_open_attempt(
    attempt: Attempt, view: ProviderView, due: DueSubscription | None, now: datetime, shop_id: str
) -> RenewalDecision:
    """What to do with an attempt of an earlier run whose outcome is open. `due` is its subscription if still due.

    Only the shop that an attempt names may send it, or give it up because its list does not show it.
    """
    if attempt.may_have_been_sent and attempt.shop_id not in (None, shop_id):
        return _left_to(f"shop {attempt.shop_id}", attempt, "it was sent by that shop, and only its list can tell")
    answer = view.answers.get(attempt.id)
    if answer is not None and attempt.state == State.PENDING and judge_payment(attempt, answer).state == State.PENDING:
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
            return Void(attempt, "never sent, and the period is no longer due: no money moved")
        return Resend(attempt, "planned earlier and certainly never sent")
    if is_past_key_lifetime(attempt, now):
        return _decide_past_key_lifetime(attempt, view, now)
    if due is None or due.ended_at != attempt.period_start:
        # The subscription was renewed, canceled or paused since: sending again could charge for what nobody wants.
        return NotCharged(
            attempt.subject,
            Code.OUTCOME_UNKNOWN,
            "outcome not known, and the period is no longer due: not sent again, searched after"
            f" {KEY_LIFETIME_HOURS} h",
            attempt.money,
        )
    if attempt.shop_id is None:
        return NotCharged(
            attempt.subject,
            Code.OUTCOME_UNKNOWN,
            "outcome not known, and it was sent by a version that did not write its shop down: not sent again, searched"
            f" after {KEY_LIFETIME_HOURS} h",
            attempt.money,
        )
    return Resend(attempt, "outcome not known: the same key and body again, so it cannot charge twice")


def _decide_past_key_lifetime(attempt: Attempt, view: ProviderView, now: datetime) -> RenewalDecision:
    """Its key no longer protects it, so it is never sent again. Absent from two scans an hour apart, it is void."""
    if attempt.id not in view.scanned:
        return NotCharged(
            attempt.subject,
            Code.OUTCOME_UNKNOWN,
            f"outcome not known, older than the key's {KEY_LIFETIME_HOURS} h, and not searched",
            attempt.money,
            needs_retry=True,
        )
    if attempt.first_absent_at is None or is_in_future(attempt.first_absent_at, now):
        return NoteAbsence(attempt, "outcome not known: a first complete scan did not find it, a second one decides")
    if now - attempt.first_absent_at < SCAN_DISTANCE:
        return NotCharged(
            attempt.subject,
            Code.OUTCOME_UNKNOWN,
            "outcome not known: the second scan must come an hour after the first",
            attempt.money,
        )
    if attempt.shop_id is None:
        return _left_to("a person", attempt, "two scans did not find it, and nobody wrote down which shop has sent it")
    return Void(attempt, "two complete scans an hour apart did not find it: it never reached the provider")


def _left_to(whom: str, attempt: Attempt, reason: str) -> NotCharged:
    """Its money may have moved, and this shop's list cannot tell."""
    words = f"outcome not known, left to {whom}: {reason} (the runbook: attempts of another shop)"
    return NotCharged(attempt.subject, Code.OTHER_SHOP, words, attempt.money, needs_retry=True)


@dataclass(frozen=True, slots=True)
class Holds:
    """What else holds a charge, by the attempt that it is about and by the subscription, each with the reason.

    It is an open quarantine entry that names the attempt, or a charge at the provider that our records do not know.
    """

    attempts: Mapping[uuid.UUID, str] = field(default_factory=dict)
    subscriptions: Mapping[int, str] = field(default_factory=dict)

    def find(self, attempt: Attempt) -> str | None:
        """Why this attempt is not made, if it is held."""
        return self.attempts.get(attempt.id) or self.subscriptions.get(attempt.subscription_id)


def decide_renewal(
    due: DueSubscription,
    *,
    now: datetime,
    rules: RenewalRules,
    voided: frozenset[uuid.UUID] = frozenset(),
    holds: Holds = Holds(),
) -> Charge | NotCharged:
    """Whether a new attempt charges a due subscription; if not, the reason. All of it by the clock on the wall.

    This very run closes the attempts in `voided`, so they count as closed. An open attempt is decided by
    `decide_open_attempt`; a subscription that has one is not charged here. The statement that claims looks at the same
    once more (`second_look`).
    """
    today = rules.calendar.day_of(now)
    overdue_days = (today - rules.calendar.day_of(due.ended_at)).days
    attempts = [a for a in due.attempts if a.id not in voided]
    barred = _why_barred(due, attempts, rules) or _why_tried_enough(due, attempts, today, overdue_days, rules)
    if barred is not None:
        return barred
    number = 1 + max((a.number for a in due.attempts), default=0)
    attempt = _new_attempt(due, number, today, rules)
    if isinstance(attempt, NotCharged):
        return attempt
    if (why := holds.find(attempt)) is not None:
        return NotCharged(due.subject, Code.HELD_BY_ENTRY, why, attempt.money)
    try:
        period = parse_period(due.plan_duration, due.plan_duration_unit)
        paid_until = rules.calendar.day_of(rules.calendar.next_end(due.started_at, due.ended_at, period))
    except UnusablePeriod as error:
        return NotCharged(due.subject, Code.UNUSABLE_PERIOD, str(error))
    # As expire_subscriptions_job counts: at five o'clock it would end what was paid for at three.
    if paid_until <= today - timedelta(days=rules.grace_days):
        return NotCharged(
            due.subject,
            Code.PERIOD_OVER,
            f"overdue by {overdue_days} days: the period to pay for ended on {paid_until}, and its grace is over",
        )
    if rules.receipt is not None and not _contact_of(due, rules.receipt):
        reason = "no email and no phone that its receipt can be sent to"
        return NotCharged(due.subject, Code.NO_CONTACT, reason, attempt.money, no_contact=due.id)
    return Charge(attempt, _why_due(overdue_days, number))


def _why_barred(due: DueSubscription, attempts: Sequence[Attempt], rules: RenewalRules) -> NotCharged | None:
    """The period may be paid already, or be paid under another name."""
    blocking = [a for a in attempts if a.state in LIVE]
    if blocking:
        return NotCharged(due.subject, *_why_blocked(blocking[0]))
    if due.settled_until is not None and due.ended_at < due.settled_until:
        until = rules.calendar.day_of(due.settled_until)
        reason = f"its end lies within a period that was paid and settled, until {until}: it was moved back"
        return NotCharged(due.subject, Code.PERIOD_SETTLED, reason)
    if due.outlasted_by is not None:
        reason = f"subscription {due.outlasted_by} of the same user and plan is ACTIVE too and ends later"
        return NotCharged(due.subject, Code.TWO_ACTIVE, reason, two_active=due.id)
    return None


def _why_tried_enough(
    due: DueSubscription, attempts: Sequence[Attempt], today: date, overdue_days: int, rules: RenewalRules
) -> NotCharged | None:
    """What was tried before, or how long it is overdue, may forbid another attempt now."""

    def no(code: str, reason: str) -> NotCharged:
        return NotCharged(due.subject, code, reason)

    stopped = [a for a in attempts if a.state == State.STOPPED]
    if stopped:
        return no(Code.HARD_DECLINE, f"stopped by a hard decline ({stopped[-1].decline_reason or 'no reason given'})")
    if overdue_days > rules.max_overdue_days:
        reason = f"overdue by {overdue_days} days, more than max_overdue_days ({rules.max_overdue_days})"
        return no(Code.TOO_LONG_OVERDUE, reason)
    if due.last_tried_at is not None and rules.calendar.day_of(due.last_tried_at) == today:
        return no(Code.TRIED_TODAY, "already attempted today")
    declined = [a for a in attempts if a.state == State.DECLINED]
    if declined and overdue_days > rules.grace_days:
        word = declined[-1].decline_reason or "no reason given"
        return no(Code.GRACE_OVER, f"declined ({word}) and the grace of {rules.grace_days} days is over")
    if len([a for a in declined if a.decline_class == declines.FEW]) >= declines.MOST_TRIES_OF_UNCLEAR_DECLINES:
        reason = f"declined {declines.MOST_TRIES_OF_UNCLEAR_DECLINES} times without a usable reason"
        return no(Code.UNCLEAR_DECLINES, reason)
    return None


def _new_attempt(due: DueSubscription, number: int, today: date, rules: RenewalRules) -> Attempt | NotCharged:
    """The attempt that charges it, or what is missing for one."""

    def no(code: str, reason: str) -> NotCharged:
        return NotCharged(due.subject, code, reason)

    if (forbidden := _why_the_service_forbids(due)) is not None:
        return forbidden
    if not due.method_id:
        return no(Code.NO_METHOD, "no saved payment method")
    if due.method_is_elsewhere:
        reason = f"the payment method is payment provider {due.method_provider_id}'s, not this shop's"
        return no(Code.METHOD_ELSEWHERE, reason)
    if (told := why_not_charged(due.method_word, due.method_detail)) is not None:
        silent = due.method_word == SILENT
        return NotCharged(due.subject, *told, needs_retry=silent, method_unusable=None if silent else due.id)
    if due.method_declined_at is not None and rules.calendar.day_of(due.method_declined_at) == today:
        return no(Code.METHOD_DECLINED_TODAY, "this payment method was already declined today")
    if due.method_stopped_at is not None:
        on = rules.calendar.day_of(due.method_stopped_at)
        return no(Code.METHOD_STOPPED, f"this payment method was stopped by a hard decline on {on}: it takes another")
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
    return plan_attempt(
        due,
        number=number,
        user_id=due.user_id,
        plan_id=due.plan_id,
        method_id=due.method_id,
        money=Money(due.prices[0], due.method_currency),
        provider_id=due.method_provider_id,
        rules=rules,
    )


def _contact_of(due: DueSubscription, rules: ReceiptRules) -> dict[str, str] | None:
    said = due.said or SaidByService()
    return contact_of(said.email, said.phone, rules.fallback_email)


def _why_the_service_forbids(due: DueSubscription) -> NotCharged | None:
    """Its own view, where there is one, has the last word; what it says nothing about is not charged."""
    said = due.said
    if said is None or (said.rows == 1 and said.may_charge and said.method_id):
        return None
    if said.unreadable:
        why = without_names(said.unreadable, {due.user_id} if due.user_id else ())
        reason = f"the service's view cannot be read for it, so nobody knows whether it may be charged: {why}"
        return NotCharged(due.subject, Code.VIEW_UNREADABLE, reason, needs_retry=True)
    if said.rows and not said.may_charge:
        return NotCharged(due.subject, Code.NO_CONSENT, "the service says that it may not be charged (may_charge)")
    if said.rows > 1:
        reason = f"the service's view has {said.rows} rows for it, which may contradict each other"
        return NotCharged(due.subject, Code.SEVERAL_VIEW_ROWS, reason)
    missing = "no payment method" if said.rows else "no row"
    return NotCharged(due.subject, Code.NO_METHOD, f"the service's view has {missing} for it")


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
    now: datetime,
    rules: RenewalRules,
    in_review: Sequence[Attempt] = (),
    holds: Holds = Holds(),
) -> list[RenewalDecision]:
    """Every decision of one autopayment run: first about the open attempts, then about each due subscription.

    A due subscription is judged as it will be once the answers are written down (`conclusions`): a period that a
    decline has freed is charged again in the same run, where another try may be made.
    A subscription whose end was moved while an attempt was open or in review is not charged before that attempt has
    its answer: it may have been paid for the very days that are due now.
    """
    due, closed = conclude_in(due, open_attempts, view)
    by_id = {subscription.id: subscription for subscription in due}
    decisions: list[RenewalDecision] = []
    voided: set[uuid.UUID] = set()
    spoken_for: set[int] = set()
    comes_first = {attempt.subscription_id: attempt for attempt in in_review if not _is_present(attempt, by_id)}
    for attempt in open_attempts:
        subscription = by_id.get(attempt.subscription_id)
        decision = decide_open_attempt(attempt, view, subscription, now, rules.shop_id)
        if isinstance(decision, Resend) and subscription is not None:
            decision = _still_wanted(decision, subscription, comes_first, now=now, rules=rules, holds=holds)
        if isinstance(decision, Void):
            voided.add(attempt.id)
        elif attempt.id in closed:
            pass  # no money moved, and none will: its period may be due
        elif _is_present(attempt, by_id):
            spoken_for.add(attempt.subscription_id)
        else:
            comes_first[attempt.subscription_id] = attempt
        decisions.append(decision)
    for subscription in due:
        if subscription.id in spoken_for:
            continue
        if subscription.id in comes_first:
            decisions.append(_waits_for(comes_first[subscription.id], subscription))
        else:
            decisions.append(decide_renewal(subscription, now=now, rules=rules, voided=frozenset(voided), holds=holds))
    return decisions


def _is_present(attempt: Attempt, due: Mapping[int, DueSubscription]) -> bool:
    """Whether it is an attempt of the period that is due now."""
    subscription = due.get(attempt.subscription_id)
    return subscription is not None and subscription.ended_at == attempt.period_start


def _waits_for(earlier: Attempt, due: DueSubscription) -> NotCharged:
    start = earlier.period_start.date()
    if earlier.state == State.REVIEW:
        reason = f"its charge for the period from {start} is in review (quarantine), which comes first"
        return NotCharged(due.subject, Code.IN_REVIEW, reason)
    reason = f"an open attempt for its period from {start}, which comes first"
    return NotCharged(due.subject, Code.OUTCOME_UNKNOWN, reason)


def _still_wanted(
    decision: Resend,
    due: DueSubscription,
    comes_first: Mapping[int, Attempt],
    *,
    now: datetime,
    rules: RenewalRules,
    holds: Holds,
) -> Resend | Void | NotCharged:
    """A planned attempt that was never sent is only sent if a fresh one would ask the same of the same method."""
    attempt = decision.attempt
    if attempt.may_have_been_sent:
        return decision
    if (earlier := comes_first.get(due.id)) is not None:
        return Void(attempt, f"never sent, and no longer to be charged: {_waits_for(earlier, due).reason}")
    fresh = decide_renewal(due, now=now, rules=rules, voided=frozenset({attempt.id}), holds=holds)
    if isinstance(fresh, NotCharged) and fresh.needs_retry:
        return fresh  # nobody knows yet: it stays planned
    if isinstance(fresh, NotCharged):
        return Void(attempt, f"never sent, and no longer to be charged: {fresh.reason}")
    wanted = fresh.attempt
    if _what_is_paid(wanted) != _what_is_paid(attempt):
        return Void(attempt, "never sent, and the price, the plan, the payment method or the shop has changed since")
    if _from_settings(wanted.body) != _from_settings(attempt.body):
        return Void(attempt, "never sent, and its receipt's settings or contact, or the gateway, have changed since")
    return decision


def _what_is_paid(attempt: Attempt) -> tuple[Any, ...]:
    period = attempt.period_count, attempt.period_unit
    return attempt.money, attempt.payment_method_id, attempt.plan_id, period, attempt.shop_id


def _from_settings(body: str) -> tuple[Any, Any]:
    document = json.loads(body)
    return document.get("receipt"), document.get("recipient")
