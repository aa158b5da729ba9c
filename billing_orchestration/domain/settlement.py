"""Settling: what a success at the provider means for the service's books (SPEC 4, "Settling a provider payment").

`decide_settlement` is the one rule, used by all five jobs. It sees the facts that were read under lock and returns
what to write; it writes nothing itself. One provider payment yields at most one grant, ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from billing_orchestration.domain.attempts import Attempt, State
from billing_orchestration.domain.billing_calendar import BillingCalendar, UnusablePeriod, parse_period
from billing_orchestration.domain.decisions import Code
from billing_orchestration.domain.money import Money
from billing_orchestration.domain.problem_kinds import ProblemKind
from billing_orchestration.domain.provider_payment import SUCCEEDED, ProviderPayment

# Row statuses from which a success is settled (SPEC 4): a late success revives an expired payment.
SETTLEABLE_ROWS = ("PENDING", "CREATED", "EXPIRED")
# States of an attempt that say "no money moved", which a success at the provider contradicts.
_CLOSED_UNPAID = frozenset({State.DECLINED, State.STOPPED, State.REJECTED, State.VOID})


@dataclass(frozen=True, slots=True)
class PaymentRow:
    """A row of the service's `payments`. `money` is None when its currency is null."""

    id: int
    subscription_id: int | None
    payment_provider_id: int | None
    status: str | None
    money: Money | None
    external_payment_id: str | None

    @property
    def subject(self) -> str:
        """How a person reads it in a report."""
        return f"payment {self.id}"


@dataclass(frozen=True, slots=True)
class SubscriptionRow:
    """A row of the service's `subscriptions`."""

    id: int
    user_id: str
    plan_id: int | None
    status: str | None
    started_at: datetime | None
    ended_at: datetime | None


@dataclass(frozen=True, slots=True)
class PlanRow:
    """A row of the service's `plans`, as far as settling needs it."""

    id: int
    duration: int | None
    duration_unit: str | None


@dataclass(frozen=True, slots=True)
class Facts:
    """What was read under lock for one provider payment.

    `settled_as`: the kind under which it is in our settlements; `set_aside`: a person resolved it as ignored.
    `rows`: the payments rows with its id. `attempt` and `rivals`: the attempt it names, and the other attempts of that
    period. `subscriptions`: those of the attempt, of the rows, and the ACTIVE ones of the metadata's user and plan.
    `paid_meanwhile`: another payment was granted to the attempt's subscription since the attempt was sent.
    """

    settled_as: str | None
    set_aside: bool
    rows: Sequence[PaymentRow]
    attempt: Attempt | None
    rivals: Sequence[Attempt]
    subscriptions: Mapping[int, SubscriptionRow]
    plans: Mapping[int, PlanRow]
    provider_ids: frozenset[int]
    paid_meanwhile: bool = False


@dataclass(frozen=True, slots=True)
class Ruling:
    """A person's word on one payment of the quarantine.

    Without `attach_to`: accept it as it is. That it differs in amount, is a test, is CANCELED here or is a period's
    second success is then no objection any more; what makes a grant impossible still is one. With `attach_to`: one
    period of that subscription's plan for that subscription, whatever the metadata says.
    """

    attach_to: int | None = None


@dataclass(frozen=True, slots=True)
class Settle:
    """Grant it. One transaction: the payment row, the subscription, the attempt (if any), the settlement.

    `row`: the row to turn SUCCEEDED, None to create one, and with `row_is_final` the row stays as the service wrote it.
    `subscription`: the one to extend to `period_end`, None to create one from `period_start`; `reactivate` sets it
    ACTIVE. `void_first`: a planned, never sent attempt of the same period that must give way. `correct_money`: a person
    accepted the provider's amount, so the row takes it. `notice`: granted by the rules, and a person has to look at it.
    """

    payment: ProviderPayment
    kind: str  # renewed | extended | created
    row: PaymentRow | None
    row_is_final: bool
    subscription: SubscriptionRow | None
    reactivate: bool
    user_id: str
    plan_id: int
    payment_provider_id: int
    period_start: datetime
    period_end: datetime
    attempt: Attempt | None
    void_first: Attempt | None
    reason: str
    notice: str | None = None
    notice_kind: ProblemKind = "unwanted_renewal"
    correct_money: bool = False


@dataclass(frozen=True, slots=True)
class RecordRefund:
    """Write it down as REFUNDED and grant nothing: all of the money went back.

    `attempt`: the one to close by it, None for a payment whose period is another one's. `void_first` as in Settle.
    """

    payment: ProviderPayment
    row: PaymentRow | None
    row_is_final: bool
    subscription_id: int | None
    payment_provider_id: int
    attempt: Attempt | None
    reason: str
    void_first: Attempt | None = None


@dataclass(frozen=True, slots=True)
class CloseAsGranted:
    """The service's own webhook handler has granted a renewal of ours already: only the attempt is closed."""

    payment: ProviderPayment
    row: PaymentRow
    attempt: Attempt
    subscription_id: int
    reason: str
    void_first: Attempt | None = None


@dataclass(frozen=True, slots=True)
class Leave:
    """Nothing to do: both sides agree, or a person decided."""

    payment: ProviderPayment
    code: str
    reason: str
    row: PaymentRow | None = None


@dataclass(frozen=True, slots=True)
class Quarantine:
    """A person has to look. `review` is the attempt whose money is in question (it becomes REVIEW).

    `void_first` as in Settle: with a review, too, the period must have one live attempt only.
    """

    payment: ProviderPayment
    kind: ProblemKind
    reason: str
    row: PaymentRow | None = None
    subscription_id: int | None = None
    review: Attempt | None = None
    void_first: Attempt | None = None


SettlementDecision = Settle | RecordRefund | CloseAsGranted | Leave | Quarantine


def choose_row(rows: Sequence[PaymentRow], money: Money) -> PaymentRow | None:
    """The row to settle among those that carry one provider id: it agrees on the money, then PENDING before EXPIRED."""
    candidates = [row for row in rows if row.status in SETTLEABLE_ROWS]
    order = {status: rank for rank, status in enumerate(SETTLEABLE_ROWS)}
    return min(candidates, key=lambda row: (row.money != money, order[row.status or ""], row.id), default=None)


def decide_settlement(
    payment: ProviderPayment,
    facts: Facts,
    *,
    now: datetime,
    calendar: BillingCalendar,
    is_live: bool,
    ruling: Ruling | None = None,
) -> SettlementDecision:
    """What a provider payment means for the books. Steps and order are those of SPEC 4.

    `now` is the moment of settling; `ruling` is what a person said about it. Only a payment that succeeded may come
    here (ValueError otherwise).
    """
    if payment.status != SUCCEEDED:
        raise ValueError(f"payment {payment.id} is {payment.status}, only a success is settled")
    attempt = facts.attempt
    if facts.settled_as is not None:
        return Leave(payment, Code.SETTLED_BEFORE, f"settled before ({facts.settled_as})", _holder(facts.rows))
    if facts.set_aside:
        return Leave(payment, Code.SET_ASIDE, "ignored by a person's decision (quarantine)", _holder(facts.rows))
    is_attached = ruling is not None and ruling.attach_to is not None
    if payment.claims.renewal_attempt_id is not None and attempt is None and not is_attached:
        return Quarantine(
            payment,
            "unknown_attempt",
            "it names a renewal attempt that this database does not know: another installation's charge, or a database"
            " restored from before it",
        )
    row = choose_row(facts.rows, payment.money)
    if row is None and ruling is not None:
        row = next((row for row in facts.rows if row.status not in ("SUCCEEDED", "REFUNDED")), None)
    if attempt is None:
        settled_row = _settled_row(facts)
        if settled_row is not None:
            return Leave(
                payment,
                Code.BOTH_AGREE,
                f"{settled_row.subject} is {settled_row.status}: both sides agree",
                settled_row,
            )
        if row is None and facts.rows:
            return _no_row_to_settle(payment, facts)
    elif attempt.state in (State.SUCCEEDED, State.REFUNDED) and attempt.external_payment_id in (None, payment.id):
        return Leave(payment, Code.BOTH_AGREE, f"attempt {attempt.number} is {attempt.state}", _settled_row(facts))
    if payment.refunded_in_full:
        return _decide_refund(payment, row, facts)
    if ruling is not None and ruling.attach_to is not None:
        return _decide_attachment(payment, row, ruling.attach_to, facts, now=now, calendar=calendar)
    if payment.is_test and is_live and ruling is None:
        decision = Quarantine(payment, "test_payment", "a test payment in a live shop", row)
        return decision if attempt is None else _review(decision, attempt, facts)
    if attempt is not None:
        return _decide_renewal(payment, row, attempt, facts, now=now, calendar=calendar, ruling=ruling)
    if row is not None and row.money != payment.money and ruling is None:
        return Quarantine(
            payment, "amount_differs", f"{row.money or 'no currency'} here, {payment.money} at the provider", row
        )
    return _decide_purchase(payment, row, facts, now=now, calendar=calendar)


def _holder(rows: Sequence[PaymentRow]) -> PaymentRow | None:
    """The row that holds a payment which was settled: real data may have older ones with the same provider id."""
    final = (row for row in rows if row.status in ("SUCCEEDED", "REFUNDED"))
    return next(final, rows[0] if rows else None)


def _decide_purchase(
    payment: ProviderPayment, row: PaymentRow | None, facts: Facts, *, now: datetime, calendar: BillingCalendar
) -> SettlementDecision:
    claims = payment.claims
    user_id, plan_id, provider_id = claims.user_id, claims.plan_id, claims.payment_provider_id
    if user_id is None or plan_id is None or provider_id is None:
        gaps = ", ".join(claims.describe_gaps("user_id", "plan_id", "payment_provider_id"))
        return Quarantine(payment, "metadata", f"metadata without a usable {gaps}", row)
    if plan_id not in facts.plans:
        return Quarantine(payment, "metadata", f"metadata names plan {plan_id}, which does not exist", row)
    if provider_id not in facts.provider_ids:
        return Quarantine(
            payment, "metadata", f"metadata names payment provider {provider_id}, which does not exist", row
        )
    linked = facts.subscriptions.get(row.subscription_id) if row and row.subscription_id is not None else None
    if linked is not None and linked.user_id != user_id:
        return Quarantine(
            payment, "foreign_metadata", f"metadata names user {user_id}, the row belongs to user {linked.user_id}", row
        )
    plan = facts.plans[plan_id]
    subscription = _active_subscription(facts, user_id, plan_id, linked)
    try:
        period = parse_period(plan.duration, plan.duration_unit)
        if subscription is not None:
            if subscription.ended_at is None:
                return Quarantine(
                    payment, "no_end", "the user's active subscription has no end to extend from", row, subscription.id
                )
            start = subscription.ended_at
            end = calendar.next_end(subscription.started_at, start, period)
        else:
            start = now
            end = calendar.add_period(now, period)
    except UnusablePeriod as error:
        return Quarantine(payment, "period", str(error), row)
    return Settle(
        payment=payment,
        kind="extended" if subscription else "created",
        row=row,
        row_is_final=False,
        subscription=subscription,
        reactivate=False,
        user_id=user_id,
        plan_id=plan_id,
        payment_provider_id=provider_id,
        period_start=start,
        period_end=end,
        attempt=None,
        void_first=None,
        reason=_told(row, "its subscription is extended by a period" if subscription else "a subscription is created"),
        notice=_spent_before_it_was_paid(payment, subscription, end),
        notice_kind="spent_period",
        # Without a ruling they are equal, or it did not come here.
        correct_money=row is not None and row.money != payment.money,
    )


def _spent_before_it_was_paid(
    payment: ProviderPayment, subscription: SubscriptionRow | None, end: datetime
) -> str | None:
    """A customer who pays for a subscription that is long stale buys, by the rule, a period that is over already."""
    if subscription is None or end > (payment.captured_at or payment.created_at):
        return None
    return (
        f"paid, and by the rule subscription {subscription.id} was extended from its old end: to {end:%Y-%m-%d}, which"
        " was over when the customer paid. They have nothing to use: move its end in the service, or refund"
    )


def _decide_attachment(
    payment: ProviderPayment,
    row: PaymentRow | None,
    subscription_id: int,
    facts: Facts,
    *,
    now: datetime,
    calendar: BillingCalendar,
) -> SettlementDecision:
    """A person names the subscription that the payment is for: it gets one period of its own plan."""
    subscription = facts.subscriptions.get(subscription_id)
    attempt = facts.attempt
    if attempt is not None and _other_success(payment, attempt, facts) is not None:
        attempt = None  # the period is another payment's, and so is its attempt
    provider_id = row.payment_provider_id if row else payment.claims.payment_provider_id
    if provider_id not in facts.provider_ids and attempt is not None:
        provider_id = attempt.payment_provider_id
    if provider_id not in facts.provider_ids and len(facts.provider_ids) == 1:
        provider_id = min(facts.provider_ids)
    if subscription is None or subscription.plan_id is None:
        missing = "does not exist" if subscription is None else "has no plan"
        return Quarantine(payment, "subscription_gone", f"subscription {subscription_id} {missing}", row)
    if provider_id is None or provider_id not in facts.provider_ids:
        return Quarantine(payment, "metadata", "nothing names its payment provider, and there are several", row)
    named = payment.claims.user_id
    others = f" (the metadata names user {named})" if named not in (None, subscription.user_id) else ""
    return _grant_period(
        payment,
        row,
        subscription,
        subscription.plan_id,
        provider_id,
        facts,
        now=now,
        calendar=calendar,
        attempt=attempt,
        reason=f"a person attached it to subscription {subscription.id} of user {subscription.user_id}{others}",
    )


def _grant_period(
    payment: ProviderPayment,
    row: PaymentRow | None,
    subscription: SubscriptionRow,
    plan_id: int,
    payment_provider_id: int,
    facts: Facts,
    *,
    now: datetime,
    calendar: BillingCalendar,
    attempt: Attempt | None,
    reason: str,
) -> SettlementDecision:
    """One period by a person's word: from the subscription's end, or from now if it would be over by then."""
    if subscription.status not in ("ACTIVE", "EXPIRED"):
        return Quarantine(
            payment,
            "subscription_gone",
            f"subscription {subscription.id} is {subscription.status}: a period would be of no use to the customer",
            row,
            subscription.id,
        )
    if subscription.ended_at is None:
        return Quarantine(
            payment, "no_end", f"subscription {subscription.id} has no end to extend from", row, subscription.id
        )
    plan = facts.plans.get(plan_id)
    start = subscription.ended_at
    try:
        if plan is None:
            raise UnusablePeriod(f"plan {plan_id} does not exist any more")
        period = parse_period(plan.duration, plan.duration_unit)
        end = calendar.next_end(subscription.started_at, start, period)
        # What the customer could not use any more is no grant.
        if (subscription.status == "EXPIRED" and start < now) or end <= now:
            start, end = now, calendar.add_period(now, period)
    except UnusablePeriod as error:
        return Quarantine(payment, "period", str(error), row, subscription.id)
    return Settle(
        payment=payment,
        kind="extended",
        row=row,
        row_is_final=False,
        subscription=subscription,
        reactivate=subscription.status == "EXPIRED",
        user_id=subscription.user_id,
        plan_id=plan_id,
        payment_provider_id=payment_provider_id,
        period_start=start,
        period_end=end,
        attempt=attempt,
        void_first=None if attempt is None else _live_rival(attempt, facts),
        reason=reason,
        correct_money=row is not None and row.money != payment.money,
    )


def _told(row: PaymentRow | None, grant: str) -> str:
    found = f"{row.status} here, paid at the provider" if row else "paid at the provider, unknown here"
    return f"{found}: {grant}"


def _active_subscription(
    facts: Facts, user_id: str, plan_id: int, linked: SubscriptionRow | None
) -> SubscriptionRow | None:
    """The user's ACTIVE subscription on the plan: the row's own if it is one, else the one that lasts longest."""

    def fits(subscription: SubscriptionRow) -> bool:
        return (subscription.user_id, subscription.plan_id, subscription.status) == (user_id, plan_id, "ACTIVE")

    if linked is not None and fits(linked):
        return linked
    candidates = [subscription for subscription in facts.subscriptions.values() if fits(subscription)]
    dated = [subscription for subscription in candidates if subscription.ended_at is not None]
    if dated:
        return max(dated, key=lambda subscription: (subscription.ended_at, subscription.id))
    return max(candidates, key=lambda subscription: subscription.id, default=None)


def _settled_row(facts: Facts) -> PaymentRow | None:
    return next((row for row in facts.rows if row.status in ("SUCCEEDED", "REFUNDED")), None)


def _no_row_to_settle(payment: ProviderPayment, facts: Facts) -> Quarantine:
    canceled = next((row for row in facts.rows if row.status == "CANCELED"), None)
    if canceled is not None:
        return Quarantine(payment, "canceled_here", "canceled here, paid at the provider", canceled)
    return Quarantine(payment, "status_unknown", "its row has no status that can be settled", facts.rows[0])


def _other_success(payment: ProviderPayment, attempt: Attempt, facts: Facts) -> str | None:
    """Why the period of this renewal belongs to another payment, paid or still possible; None when it does not."""
    if attempt.external_payment_id not in (None, payment.id) and attempt.state not in _CLOSED_UNPAID:
        return (
            f"attempt {attempt.number} of subscription {attempt.subscription_id} has the payment"
            f" {attempt.external_payment_id} already"
        )
    rival = _live_rival(attempt, facts)
    if rival is None or (rival.state == State.PLANNED and not rival.may_have_been_sent):
        return None  # by one that was never sent no money can move: it gives way (void_first)
    return (
        f"a late success of attempt {attempt.number} ({attempt.state}), while attempt {rival.number} of the"
        f" same period is {rival.state}"
    )


def _live_rival(attempt: Attempt, facts: Facts) -> Attempt | None:
    """The live attempt of the same period that stands in the way of one which was closed as unpaid."""
    if attempt.state not in _CLOSED_UNPAID:
        return None
    return next((rival for rival in facts.rivals if rival.state not in _CLOSED_UNPAID), None)


def _review(decision: Quarantine, attempt: Attempt, facts: Facts) -> Quarantine:
    """The same, with the attempt in review, unless its period is another payment's: that one is not touched."""
    if _other_success(decision.payment, attempt, facts) is not None:
        return replace(decision, subscription_id=attempt.subscription_id)
    rival = _live_rival(attempt, facts)
    return replace(decision, subscription_id=attempt.subscription_id, review=attempt, void_first=rival)


def _decide_refund(payment: ProviderPayment, row: PaymentRow | None, facts: Facts) -> SettlementDecision:
    """All of the money went back: written down, nothing granted."""
    attempt = facts.attempt
    if attempt is None:
        provider_id = row.payment_provider_id if row else payment.claims.payment_provider_id
        if provider_id is None or (row is None and provider_id not in facts.provider_ids):
            return Quarantine(
                payment,
                "metadata",
                "refunded in full, and its payment provider is missing or unknown in the metadata",
                row,
            )
        reason = "refunded in full: nothing is granted"
        return RecordRefund(payment, row, False, row.subscription_id if row else None, provider_id, None, reason)
    final = _settled_row(facts)
    other = _other_success(payment, attempt, facts)
    return RecordRefund(
        payment,
        final or row,
        final is not None,
        attempt.subscription_id if attempt.subscription_id in facts.subscriptions else None,
        attempt.payment_provider_id,
        None if other else attempt,
        f"refunded in full, nothing is granted: {other}"
        if other
        else "a renewal that was refunded in full: nothing is granted, and the period is not charged again",
        None if other else _live_rival(attempt, facts),
    )


def _decide_renewal(
    payment: ProviderPayment,
    row: PaymentRow | None,
    attempt: Attempt,
    facts: Facts,
    *,
    now: datetime,
    calendar: BillingCalendar,
    ruling: Ruling | None,
) -> SettlementDecision:
    """A success that carries one of our attempts closes that attempt: its subscription is extended, never created."""

    def review(kind: ProblemKind, reason: str, about: PaymentRow | None = row) -> Quarantine:
        return _review(Quarantine(payment, kind, reason, about), attempt, facts)

    final = _settled_row(facts)
    subscription = facts.subscriptions.get(attempt.subscription_id)
    other = _other_success(payment, attempt, facts)
    if other is not None and ruling is not None and final is None and subscription is not None:
        return _grant_period(
            payment,
            row,
            subscription,
            attempt.plan_id,
            attempt.payment_provider_id,
            facts,
            now=now,
            calendar=calendar,
            attempt=None,  # it is closed, and its period is the other payment's
            reason=f"a person accepted it as one more period: {other}",
        )
    if other is not None:
        reason = f"{other}: the customer may have paid twice, refund one"
        return Quarantine(payment, "second_success", reason, row, attempt.subscription_id)
    void_first = _live_rival(attempt, facts)
    if row is None and final is None and facts.rows:  # with a ruling, such a row is the one to settle
        odd = _no_row_to_settle(payment, facts)
        return review(odd.kind, odd.reason, odd.row)
    if payment.money != attempt.money and ruling is None:
        return review("amount_differs", f"{attempt.money} was asked, {payment.money} was charged")
    if subscription is None or subscription.ended_at is None:
        missing = "does not exist any more" if subscription is None else "has no end to extend from"
        return review("subscription_gone", f"a renewal was paid, and subscription {attempt.subscription_id} {missing}")
    if final is not None and final.status == "REFUNDED":
        return RecordRefund(
            payment,
            final,
            True,
            attempt.subscription_id,
            attempt.payment_provider_id,
            attempt,
            "the service holds it as REFUNDED",
            void_first,
        )
    moved = final is not None and subscription.ended_at > attempt.period_start
    if moved and facts.paid_meanwhile and ruling is None:
        # Who moved the end is not written anywhere: a guess would lose a paid period, or grant one twice.
        return review(
            "unclear_grant",
            "the service holds this renewal as paid, and another payment was granted to the subscription meanwhile:"
            " nobody can tell whether the renewal was, too",
            final,
        )
    if final is not None and moved and not facts.paid_meanwhile:
        reason = f"the service has settled it already ({final.subject})"
        return CloseAsGranted(payment, final, attempt, subscription.id, reason, void_first)
    plan = facts.plans.get(attempt.plan_id)
    try:
        if plan is None:
            raise UnusablePeriod(f"plan {attempt.plan_id} does not exist any more")
        end = calendar.next_end(
            subscription.started_at, subscription.ended_at, parse_period(plan.duration, plan.duration_unit)
        )
    except UnusablePeriod as error:
        return review("period", str(error))
    ended = subscription.status not in ("ACTIVE", "EXPIRED")
    return Settle(
        payment=payment,
        kind="renewed",
        row=final or row,
        row_is_final=final is not None,
        subscription=subscription,
        reactivate=subscription.status == "EXPIRED",
        user_id=subscription.user_id,
        plan_id=attempt.plan_id,
        payment_provider_id=attempt.payment_provider_id,
        period_start=subscription.ended_at,
        period_end=end,
        attempt=attempt,
        void_first=void_first,
        reason="renewal paid: the subscription is extended by a period from its old end",
        correct_money=ruling is not None and row is not None and row.money != payment.money,
        # The customer said no while the charge was under way: the grant matches the money, a person may refund both.
        notice=f"the renewal was paid while the subscription was {subscription.status}: refund or reactivate"
        if ended
        else None,
    )
