"""Attempts whose rows are lost: a database restored from a backup, a standby that lost the last commits.

A charge carries its attempt's identity in its metadata, and the attempt's id is derived from that identity. A payment
that names an attempt which the database does not have therefore proves by itself which period it was made for.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from datetime import datetime
from typing import NamedTuple

from billing_orchestration.domain.attempts import Attempt, State, identify
from billing_orchestration.domain.provider_payment import ProviderPayment
from billing_orchestration.domain.settlement_decisions import PlanRow, SubscriptionRow

# More than a period is ever tried: once a day within its grace.
_MOST_TRIES = 99


class Identity(NamedTuple):
    """What an attempt's id is derived from."""

    subscription_id: int
    period_start: datetime
    number: int


def identity_of(payment: ProviderPayment) -> Identity | None:
    """The identity of the attempt that a payment names, if the attempt's id is the one derived from it."""
    named, period = payment.claims.renewal_attempt_id, payment.claimed_period
    if named is None or period is None:
        return None
    numbers = range(1, _MOST_TRIES + 1)
    return next((Identity(*period, number) for number in numbers if identify(*period, number)[0] == named), None)


def recreate(
    payment: ProviderPayment,
    identity: Identity,
    subscription: SubscriptionRow | None,
    plan: PlanRow | None,
    provider_ids: Collection[int],
    *,
    is_written: bool,
) -> Attempt | str:
    """The lost attempt, rebuilt from its payment; or why that does not fit the subscription as it is.

    `is_written`: the service has the payment's row as settled, so the end may have moved by its grant. The attempt is
    VOID until the payment is settled: another one may have taken its period.
    """
    claims = payment.claims
    provider_id, method_id = claims.payment_provider_id, payment.method_id
    if subscription is None:
        return f"subscription {identity.subscription_id} does not exist"
    if (claims.user_id, claims.plan_id) != (subscription.user_id, subscription.plan_id) or plan is None:
        return f"subscription {subscription.id} belongs to another user or plan"
    if not is_written and subscription.ended_at != identity.period_start:
        return f"the end of subscription {subscription.id} is not {identity.period_start:%Y-%m-%d %H:%M} UTC"
    if payment.money not in plan.prices:
        return f"{payment.money} is no price of plan {plan.id}"
    if provider_id not in provider_ids or provider_id is None:
        return "its payment provider is not known"
    attempt_id, idempotence_key = identify(*identity)
    sent = {
        "amount": {"value": f"{payment.money.amount:.2f}", "currency": payment.money.currency},
        "payment_method_id": method_id,
        "metadata": dict(payment.metadata),
    }
    return Attempt(
        id=attempt_id,
        subscription_id=subscription.id,
        period_start=identity.period_start,
        number=identity.number,
        state=State.VOID,
        idempotence_key=idempotence_key,
        body=json.dumps(sent, separators=(",", ":")),
        money=payment.money,
        user_id=subscription.user_id,
        plan_id=plan.id,
        payment_provider_id=provider_id,
        payment_method_id=method_id or "",
        first_sent_at=payment.created_at,
        sends=1,
        is_recreated=True,
    )
