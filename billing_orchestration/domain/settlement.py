"""Settling: what a success at the provider means for the service's books.

`decide_settlement` is the one rule, used by all five jobs. It sees the facts that were read under lock and returns
what to write; it writes nothing itself. One provider payment yields at most one grant, ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from billing_orchestration.domain.attempts import LIVE, Attempt, State
from billing_orchestration.domain.billing_calendar import BillingCalendar, Period, UnusablePeriod, parse_period
from billing_orchestration.domain.decisions import Code
from billing_orchestration.domain.lost_attempts import identity_of
from billing_orchestration.domain.money import Money
from billing_orchestration.domain.problem_kinds import UNKNOWN_ATTEMPT, ProblemKind
from billing_orchestration.domain.provider_payment import (
    SUCCEEDED,
    WEBHOOK_GRACE,
    ProviderPayment,
    claimed_subscription,
)
from billing_orchestration.domain.settlement_decisions import (
    CloseAsGranted,
    Facts,
    Leave,
    PaymentRow,
    PlanRow,
    Quarantine,
    RecordRefund,
    Ruling,
    Settle,
    SettlementDecision,
    SubscriptionRow,
)

# Row statuses from which a success is settled: a late success revives an expired payment.
SETTLEABLE_ROWS = ("PENDING", "CREATED", "EXPIRED")
# How far from where a paid period ends the service's own grant may have moved the end: clocks, and a rounded day. For
# short periods a quarter of them, so that a bonus day is never taken for a paid week.
GRANT_TOLERANCE = timedelta(days=1)
# Row statuses that say the payment is settled.
FINAL_ROWS = ("SUCCEEDED", "REFUNDED")


def choose_row(rows: Sequence[PaymentRow], money: Money) -> PaymentRow | None:
    """The row to settle among those that carry one provider id.

    The customer's own, which names a subscription, comes first: the others expire as its duplicates. Then one that
    agrees on the money, then what is half settled, then PENDING before EXPIRED.
    """
    candidates = [row for row in rows if row.status in SETTLEABLE_ROWS or row.is_half_settled]
    order = {status: rank for rank, status in enumerate(("SUCCEEDED", *SETTLEABLE_ROWS))}
    return min(
        candidates,
        key=lambda row: (row.subscription_id is None, row.money != money, order[row.status or ""], row.id),
        default=None,
    )


def holder_of(rows: Sequence[PaymentRow]) -> PaymentRow | None:
    """The row by which the service holds a purchase as settled; one that was granted to nobody is none."""
    return next((row for row in rows if row.status in FINAL_ROWS and not row.is_half_settled), None)


@dataclass(frozen=True, slots=True)
class _Case:
    """One payment with everything that decides about it. `row`: the row to settle, None where there is none."""

    payment: ProviderPayment
    facts: Facts
    row: PaymentRow | None
    now: datetime
    calendar: BillingCalendar
    ruling: Ruling | None

    @property
    def final_row(self) -> PaymentRow | None:
        """The row that the service holds as settled. A renewal's need not be linked: its attempt is."""
        rows = self.facts.rows
        if self.facts.attempt is None:
            return holder_of(rows)
        return next((row for row in rows if row.status in FINAL_ROWS), None)

    @property
    def has_other_money(self) -> bool:
        """Whether the row to settle is of another amount or currency than the payment."""
        return self.row is not None and self.row.money != self.payment.money

    def quarantine(self, kind: ProblemKind, reason: str, subscription_id: int | None = None) -> Quarantine:
        """Leave it to a person."""
        return Quarantine(self.payment, kind, reason, self.row, subscription_id)

    def leave(self, code: str, reason: str, row: PaymentRow | None) -> Leave:
        """Change nothing."""
        return Leave(self.payment, code, reason, row)


def decide_settlement(
    payment: ProviderPayment,
    facts: Facts,
    *,
    now: datetime,
    calendar: BillingCalendar,
    is_live: bool,
    ruling: Ruling | None = None,
) -> SettlementDecision:
    """What a provider payment means for the books: refund, test payment, renewal, amount, metadata, extend or create,
    in this order.

    `now` is the moment of settling; `ruling` is what a person said about it. Only a payment that succeeded may come
    here (ValueError otherwise).
    """
    if payment.status != SUCCEEDED:
        raise ValueError(f"payment {payment.id} is {payment.status}, only a success is settled")
    decision = _decide(_Case(payment, facts, _row_to_settle(payment, facts, ruling), now, calendar, ruling), is_live)
    if payment.method_is_new and isinstance(decision, (Settle, RecordRefund)):
        notice = f"the payment method type {payment.method_type!r} is new: payment_method stays NULL"
        return replace(decision, reason=f"{decision.reason}. Notice: {notice}")
    return decision


def _decide(case: _Case, is_live: bool) -> SettlementDecision:
    payment, facts, ruling, attempt = case.payment, case.facts, case.ruling, case.facts.attempt
    if facts.settled_as is not None:
        return case.leave(Code.SETTLED_BEFORE, f"settled before ({facts.settled_as})", _holder(facts.rows))
    if facts.set_aside:
        return case.leave(Code.SET_ASIDE, "ignored by a person's decision (quarantine)", _holder(facts.rows))
    if attempt is None and payment.claims.renewal_attempt_id is not None and not _is_attached(ruling):
        return _decide_unknown_attempt(case)
    if (agreed := _agreed(case)) is not None:
        return agreed
    if (at_work := _webhook_at_work(case)) is not None:
        return at_work
    if attempt is None and case.row is None and facts.rows:
        return _no_row_to_settle(case)
    if case.row is not None and case.row.payment_provider_id not in facts.provider_ids and ruling is None:
        reason = f"its row belongs to payment provider {case.row.payment_provider_id}, which is not this shop's"
        decision = case.quarantine("metadata", reason)
        return decision if attempt is None else _review(decision, attempt, facts)
    if payment.refunded_in_full:
        return _decide_refund(case)
    if ruling is not None and ruling.attach_to is not None:
        return _decide_attachment(case, ruling.attach_to)
    if payment.is_test and is_live and ruling is None:
        decision = case.quarantine("test_payment", "a test payment in a live shop")
        return decision if attempt is None else _review(decision, attempt, facts)
    if attempt is not None:
        return _decide_renewal(case, attempt)
    if case.row is not None and case.has_other_money and ruling is None:
        return case.quarantine(
            "amount_differs", f"{case.row.money or 'no currency'} here, {payment.money} at the provider"
        )
    return _decide_purchase(case)


def _decide_unknown_attempt(case: _Case) -> Quarantine:
    """No row of ours, and none could be rebuilt. Its subscription is held if the id is derived as ours are, or if that
    cannot be told, for its period cannot be read."""
    identity, payment = identity_of(case.payment), case.payment
    is_ours = identity is not None or payment.claimed_period is None
    reason = (
        "it names a renewal attempt that this database does not know: another installation's charge, or a database"
        " restored from before it"
    )
    if case.facts.misfit is not None:
        reason += f". It could not be settled by itself: {case.facts.misfit}"
    held = claimed_subscription(payment.metadata) if is_ours else None
    return Quarantine(payment, UNKNOWN_ATTEMPT, reason, subscription_id=held)


def _is_attached(ruling: Ruling | None) -> bool:
    return ruling is not None and ruling.attach_to is not None


def _row_to_settle(payment: ProviderPayment, facts: Facts, ruling: Ruling | None) -> PaymentRow | None:
    """The row that fits; by a person's word also one with a status that is not settled otherwise."""
    rows = facts.rows if facts.attempt is None else [row for row in facts.rows if not row.is_half_settled]
    row = choose_row(rows, payment.money)
    if row is None and ruling is not None:
        return next((row for row in facts.rows if row.status not in FINAL_ROWS), None)
    return row


def _holder(rows: Sequence[PaymentRow]) -> PaymentRow | None:
    """The row that holds a payment which was settled: real data may have older ones with the same provider id."""
    final = (row for row in rows if row.status in FINAL_ROWS)
    return holder_of(rows) or next(final, rows[0] if rows else None)


def _agreed(case: _Case) -> Leave | None:
    """Both sides agree already: nothing is left to settle."""
    attempt, final = case.facts.attempt, case.final_row
    if attempt is None:
        if final is None:
            return None
        return case.leave(Code.BOTH_AGREE, f"{final.subject} is {final.status}: both sides agree", final)
    if attempt.state in (State.SUCCEEDED, State.REFUNDED) and attempt.external_payment_id in (None, case.payment.id):
        return case.leave(Code.BOTH_AGREE, f"attempt {attempt.number} is {attempt.state}", final)
    return None


def _webhook_at_work(case: _Case) -> Leave | None:
    """A purchase that the service has half settled a moment ago: its grant may be on its way."""
    if case.facts.attempt is not None:
        return None
    for row in case.facts.rows:
        if row.is_half_settled and row.touched_at is not None and abs(case.now - row.touched_at) < WEBHOOK_GRACE:
            reason = (
                f"{row.subject} became SUCCEEDED a moment ago: left to the service's webhook, the next tick looks again"
            )
            return case.leave(Code.LEFT_TO_WEBHOOK, reason, row)
    return None


def _no_row_to_settle(case: _Case) -> Quarantine:
    canceled = next((row for row in case.facts.rows if row.status == "CANCELED"), None)
    if canceled is not None:
        return Quarantine(case.payment, "canceled_here", "canceled here, paid at the provider", canceled)
    reason = "its row has no status that can be settled"
    return Quarantine(case.payment, "status_unknown", reason, case.facts.rows[0])


# --- a purchase: the metadata names whom and what it is for ---


def _decide_purchase(case: _Case) -> SettlementDecision:
    facts, row, claims = case.facts, case.row, case.payment.claims
    user_id, plan_id, provider_id = claims.user_id, claims.plan_id, claims.payment_provider_id
    if user_id is None or plan_id is None or provider_id is None:
        gaps = ", ".join(claims.describe_gaps("user_id", "plan_id", "payment_provider_id"))
        return case.quarantine("metadata", f"metadata without a usable {gaps}")
    if plan_id not in facts.plans:
        return case.quarantine("metadata", f"metadata names plan {plan_id}, which does not exist")
    if provider_id not in facts.provider_ids:
        return case.quarantine("metadata", f"metadata names payment provider {provider_id}, which is not this shop's")
    linked = facts.subscriptions.get(row.subscription_id) if row and row.subscription_id is not None else None
    if linked is not None and linked.user_id != user_id:
        reason = f"metadata names another user than the row's subscription {linked.id}"
        return case.quarantine("foreign_metadata", reason)
    if (doubt := _doubt_about(case, facts.plans[plan_id])) is not None:
        return doubt
    subscription = _active_subscription(facts, user_id, plan_id, linked)
    try:
        period = _period_of(facts.plans[plan_id], plan_id)
        if subscription is None:
            start, end = case.now, case.calendar.add_period(case.now, period)
        elif subscription.ended_at is None:
            reason = "the user's active subscription has no end to extend from"
            return case.quarantine("no_end", reason, subscription.id)
        else:
            start = subscription.ended_at
            end = case.calendar.next_end(subscription.started_at, start, period)
    except UnusablePeriod as error:
        return case.quarantine("period", str(error))
    if row is None:
        found = "paid at the provider, unknown here"
    else:
        found = f"{row.status} here{', granted to nobody' if row.is_half_settled else ''}, paid at the provider"
    grant = "its subscription is extended by a period" if subscription else "a subscription is created"
    return Settle(
        payment=case.payment,
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
        reason=f"{found}: {grant}",
        notice=_spent_before_it_was_paid(case.payment, subscription, end),
        notice_kind="spent_period",
        correct_money=case.has_other_money,  # only by a person's word
    )


def _doubt_about(case: _Case, plan: PlanRow) -> Quarantine | None:
    """What only a person can decide: a price that the plan never had, or a grant that may be there already."""
    if case.ruling is not None:
        return None
    if case.row is None and case.payment.money not in plan.prices:
        prices = ", ".join(sorted(str(price) for price in plan.prices)) or "none"
        return case.quarantine(
            "amount_differs",
            f"{case.payment.money} at the provider, no row here; plan {plan.id} has the prices: {prices}",
        )
    if case.facts.changed_meanwhile and any(row.is_half_settled for row in case.facts.rows):
        reason = (
            "the service holds it as SUCCEEDED without a subscription, and the user's subscription on the plan was"
            " changed since it was paid: it is unknown whether that was its grant"
        )
        return case.quarantine("unclear_grant", reason)
    return None


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


def _period_of(plan: PlanRow | None, plan_id: int) -> Period:
    """The plan's period. Raises UnusablePeriod, also for a plan that is gone."""
    if plan is None:
        raise UnusablePeriod(f"plan {plan_id} no longer exists")
    return parse_period(plan.duration, plan.duration_unit)


def _period_paid(case: _Case, attempt: Attempt) -> Period:
    """The period that was frozen with the price; the plan's, where it was not. Raises UnusablePeriod."""
    if attempt.period_count is None:
        return _period_of(case.facts.plans.get(attempt.plan_id), attempt.plan_id)
    return parse_period(attempt.period_count, attempt.period_unit)


def _spent_before_it_was_paid(
    payment: ProviderPayment, subscription: SubscriptionRow | None, end: datetime
) -> str | None:
    """By the rule, a customer who pays for a long stale subscription buys a period that is already over."""
    if subscription is None or end > payment.succeeded_at:
        return None
    return (
        f"paid, and by the rule subscription {subscription.id} was extended from its old end: to {end:%Y-%m-%d}, which"
        " was over when the customer paid. They got nothing: move its end in the service, or refund"
    )


# --- a refund ---


def _decide_refund(case: _Case) -> SettlementDecision:
    """All of the money went back: recorded, nothing granted."""
    payment, row, facts, attempt = case.payment, case.row, case.facts, case.facts.attempt
    if attempt is None:
        provider_id = row.payment_provider_id if row else payment.claims.payment_provider_id
        if provider_id is None or (row is None and provider_id not in facts.provider_ids):
            reason = "refunded in full, and its payment provider is missing or unknown in the metadata"
            return case.quarantine("metadata", reason)
        reason = "refunded in full: nothing is granted"
        return RecordRefund(payment, row, False, row.subscription_id if row else None, provider_id, None, reason)
    final = case.final_row
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


# --- a person's word ---


def _decide_attachment(case: _Case, subscription_id: int) -> SettlementDecision:
    """A person names the subscription that the payment is for: it gets one period of its own plan."""
    facts, claims, attempt = case.facts, case.payment.claims, case.facts.attempt
    subscription = facts.subscriptions.get(subscription_id)
    if attempt is not None and _other_success(case.payment, attempt, facts) is not None:
        attempt = None  # the period is another payment's, and so is its attempt
    provider_id = case.row.payment_provider_id if case.row else claims.payment_provider_id
    if provider_id not in facts.provider_ids and attempt is not None:
        provider_id = attempt.payment_provider_id
    if provider_id not in facts.provider_ids and len(facts.provider_ids) == 1:
        provider_id = min(facts.provider_ids)
    if subscription is None or subscription.plan_id is None:
        missing = "does not exist" if subscription is None else "has no plan"
        return case.quarantine("subscription_gone", f"subscription {subscription_id} {missing}")
    if provider_id is None or provider_id not in facts.provider_ids:
        return case.quarantine("metadata", "nothing names its payment provider, and there are several")
    is_other_user = claims.user_id not in (None, subscription.user_id)
    others = ", whose user is not the one that the metadata names" if is_other_user else ""
    reason = f"a person attached it to subscription {subscription.id}{others}"
    return _grant_period(case, subscription, subscription.plan_id, provider_id, attempt, reason)


def _grant_period(
    case: _Case,
    subscription: SubscriptionRow,
    plan_id: int,
    payment_provider_id: int,
    attempt: Attempt | None,
    reason: str,
    paid_for: Attempt | None = None,
) -> SettlementDecision:
    """One period by a person's word: from the subscription's end, or from now if it would be over by then.

    `paid_for`: the attempt whose frozen period it is; without one it is the plan's.
    """
    if subscription.status not in ("ACTIVE", "EXPIRED"):
        problem = (
            f"subscription {subscription.id} is {subscription.status}: a period would be of no use to the customer"
        )
        return case.quarantine("subscription_gone", problem, subscription.id)
    if subscription.ended_at is None:
        problem = f"subscription {subscription.id} has no end to extend from"
        return case.quarantine("no_end", problem, subscription.id)
    start = subscription.ended_at
    try:
        period = _period_paid(case, paid_for) if paid_for else _period_of(case.facts.plans.get(plan_id), plan_id)
        end = case.calendar.next_end(subscription.started_at, start, period)
        # A period that has already passed grants nothing.
        if (subscription.status == "EXPIRED" and start < case.now) or end <= case.now:
            start, end = case.now, case.calendar.add_period(case.now, period)
    except UnusablePeriod as error:
        return case.quarantine("period", str(error), subscription.id)
    return Settle(
        payment=case.payment,
        kind="extended",
        row=case.row,
        row_is_final=False,
        subscription=subscription,
        reactivate=subscription.status == "EXPIRED",
        user_id=subscription.user_id,
        plan_id=plan_id,
        payment_provider_id=payment_provider_id,
        period_start=start,
        period_end=end,
        attempt=attempt,
        void_first=None if attempt is None else _live_rival(attempt, case.facts),
        reason=reason,
        correct_money=case.has_other_money,
    )


# --- a renewal: the metadata names one of our attempts ---


def _decide_renewal(case: _Case, attempt: Attempt) -> SettlementDecision:
    """A success that carries one of our attempts closes that attempt: its subscription is extended, never created."""
    payment, facts, final = case.payment, case.facts, case.final_row
    other = _other_success(payment, attempt, facts)
    if other is not None:
        return _decide_second_success(case, attempt, other)
    if case.row is None and final is None and facts.rows:
        return _review(_no_row_to_settle(case), attempt, facts)
    if payment.money != attempt.money and case.ruling is None:
        reason = f"{attempt.money} was asked, {payment.money} was charged"
        return _review(case.quarantine("amount_differs", reason), attempt, facts)
    subscription = facts.subscriptions.get(attempt.subscription_id)
    if subscription is None or subscription.ended_at is None:
        missing = "no longer exists" if subscription is None else "has no end to extend from"
        reason = f"a renewal was paid, and subscription {attempt.subscription_id} {missing}"
        return _review(case.quarantine("subscription_gone", reason), attempt, facts)
    if final is not None:
        written = _decide_renewal_written_by_service(case, attempt, final, subscription, subscription.ended_at)
        if written is not None:
            return written
    if subscription.ended_at < attempt.period_start and case.ruling is None:
        # Granted from there, the paid period would be charged for once more before it is over.
        reason = (
            f"the period from {attempt.period_start:%Y-%m-%d} was paid, and the subscription's end has moved back to"
            f" {subscription.ended_at:%Y-%m-%d} meanwhile: it is unknown from when it is to be granted"
        )
        return _review(case.quarantine("unclear_grant", reason), attempt, facts)
    return _renew(case, attempt, subscription, subscription.ended_at)


def _decide_second_success(case: _Case, attempt: Attempt, other: str) -> SettlementDecision:
    """The period is another payment's. `other` says why."""
    subscription = case.facts.subscriptions.get(attempt.subscription_id)
    if case.ruling is not None and case.final_row is None and subscription is not None:
        # The attempt is closed, and its period is the other payment's.
        reason = f"a person accepted it as one more period: {other}"
        provider_id = attempt.payment_provider_id
        return _grant_period(case, subscription, attempt.plan_id, provider_id, None, reason, paid_for=attempt)
    reason = f"{other}: the customer may have paid twice. Refund one only if both are paid"
    decision = case.quarantine("second_success", reason, attempt.subscription_id)
    return replace(decision, lost=attempt if attempt.is_recreated else None)


def _decide_renewal_written_by_service(
    case: _Case, attempt: Attempt, final: PaymentRow, subscription: SubscriptionRow, ended_at: datetime
) -> SettlementDecision | None:
    """The service's webhook has written the row of a renewal. None: it did not grant it, so that is still to be done.

    It has granted it if the end has moved by about the period that was paid, and nothing else has moved it.
    """
    facts, void_first = case.facts, _live_rival(attempt, case.facts)
    if final.status == "REFUNDED":
        return RecordRefund(
            case.payment,
            final,
            True,
            attempt.subscription_id,
            attempt.payment_provider_id,
            attempt,
            "the service holds it as REFUNDED",
            void_first,
        )
    if ended_at == attempt.period_start:
        return None
    granted_until = _granted_until(case, attempt, subscription, ended_at)
    if granted_until is not None and not facts.paid_meanwhile:
        reason = f"the service has settled it already ({final.subject})"
        return CloseAsGranted(case.payment, final, attempt, attempt.subscription_id, granted_until, reason, void_first)
    if case.ruling is not None:
        return None
    # Nothing records who moved the end: a guess would lose a paid period, or grant one twice.
    meanwhile = (
        "another payment was granted to the subscription meanwhile"
        if facts.paid_meanwhile
        else f"the subscription's end has moved to {ended_at:%Y-%m-%d}, which is not by about the period that was paid"
    )
    reason = f"the service holds this renewal as paid, and {meanwhile}: it is unknown whether the renewal was granted"
    return _review(Quarantine(case.payment, "unclear_grant", reason, final), attempt, facts)


def _granted_until(case: _Case, attempt: Attempt, subscription: SubscriptionRow, ended_at: datetime) -> datetime | None:
    """The end of the period that the service has granted, if the subscription's end is about there.

    The service may keep the anchor day as we do, or count from the old end.
    """
    calendar, start = case.calendar, attempt.period_start
    try:
        period = _period_paid(case, attempt)
        ends = (calendar.next_end(subscription.started_at, start, period), calendar.add_period(start, period))
    except UnusablePeriod:
        return None
    for end in ends:
        if abs(ended_at - end) <= min(GRANT_TOLERANCE, (end - start) / 4):
            return min(end, ended_at)
    return None


def _renew(case: _Case, attempt: Attempt, subscription: SubscriptionRow, old_end: datetime) -> SettlementDecision:
    """Extend the subscription by a period from its old end, whatever became of the subscription meanwhile."""
    final = case.final_row
    try:
        period = _period_paid(case, attempt)
        end = case.calendar.next_end(subscription.started_at, old_end, period)
    except UnusablePeriod as error:
        return _review(case.quarantine("period", str(error)), attempt, case.facts)
    # The customer canceled or paused while the charge was under way: the grant matches the money, a person may refund
    # both.
    notice = f"the renewal was paid while the subscription was {subscription.status}: refund or reactivate"
    return Settle(
        payment=case.payment,
        kind="renewed",
        row=final or case.row,
        row_is_final=final is not None,
        subscription=subscription,
        reactivate=subscription.status == "EXPIRED",
        user_id=subscription.user_id,
        plan_id=attempt.plan_id,
        payment_provider_id=attempt.payment_provider_id,
        period_start=old_end,
        period_end=end,
        attempt=attempt,
        void_first=_live_rival(attempt, case.facts),
        reason="renewal paid: the subscription is extended by a period from its old end",
        correct_money=case.ruling is not None and case.has_other_money,
        notice=None if subscription.status in ("ACTIVE", "EXPIRED") else notice,
    )


def _other_success(payment: ProviderPayment, attempt: Attempt, facts: Facts) -> str | None:
    """Why the period of this renewal belongs to another payment, paid or still possible; None when it does not."""
    if attempt.external_payment_id not in (None, payment.id) and attempt.state in LIVE:
        return (
            f"attempt {attempt.number} of subscription {attempt.subscription_id} has the payment"
            f" {attempt.external_payment_id} already"
        )
    rival = _live_rival(attempt, facts)
    if rival is None or (rival.state == State.PLANNED and not rival.may_have_been_sent):
        return None  # one that was never sent moves no money: it gives way (void_first)
    return (
        f"a late success of attempt {attempt.number} ({attempt.state}), while attempt {rival.number} of the"
        f" same period is {rival.state}"
    )


def _live_rival(attempt: Attempt, facts: Facts) -> Attempt | None:
    """The live attempt of the same period that stands in the way of one which was closed as unpaid."""
    if attempt.state in LIVE:
        return None
    return next((rival for rival in facts.rivals if rival.state in LIVE), None)


def _review(decision: Quarantine, attempt: Attempt, facts: Facts) -> Quarantine:
    """The same, with the attempt in review, unless its period is another payment's: that one is not touched."""
    if _other_success(decision.payment, attempt, facts) is not None:
        return replace(decision, subscription_id=attempt.subscription_id)
    rival = _live_rival(attempt, facts)
    return replace(decision, subscription_id=attempt.subscription_id, review=attempt, void_first=rival)
