"""Attempts whose rows are lost: a database restored from a backup, a standby that lost the last commits.

A charge carries its attempt's identity in its metadata, and the attempt's id is derived from that identity. A payment
that names an attempt which the database does not have therefore proves by itself which period it was made for.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

from billing_orchestration.domain.attempts import SCAN_MARGIN, Attempt, State, identify
from billing_orchestration.domain.provider_payment import (
    CANCELED,
    SUCCEEDED,
    Claims,
    ProviderPayment,
    UnusablePayment,
    claimed_subscription,
)
from billing_orchestration.domain.run_scope import CATCH_UP_OVERLAP, LONGEST_CATCH_UP
from billing_orchestration.domain.settlement_decisions import PlanRow, SubscriptionRow

# More than a period is ever tried: once a day within its grace.
_MOST_TRIES = 99
# At once: a part of the provider's list that fits into memory, whatever its shop sells.
_PART = timedelta(days=1)


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
        last_sent_at=payment.created_at,
        sends=1,
        is_recreated=True,
    )


# --- before the first charge of a run: does the provider know charges that our records do not?


@dataclass(frozen=True, slots=True)
class Stretches:
    """What may hold lost charges, to be read in this order: what is paid in between is in the second one.

    `unfinished`: charges that were created in it and may still be paid. `whole`: created or paid in it, in any status.
    """

    unfinished: tuple[datetime, datetime] | None
    whole: tuple[datetime, datetime]

    @property
    def since(self) -> datetime:
        """From when on something is searched for."""
        return (self.unfinished or self.whole)[0]


def stretches_to_search(
    now: datetime, *, whole_until: datetime | None, matched_until: datetime | None, earliest: datetime
) -> Stretches | None:
    """The stretches of the provider's list that may hold charges which our records have lost; None: there is none.

    Our records were whole at `whole_until`, when a run that charges looked last. Since then a matching run has settled
    everything that was paid up to `matched_until`, unless so much time had passed that it left a gap. It sees nothing
    that is not paid yet, so of this it proves nothing: the tick after a restore moves its watermark past a charge that
    is pending. Within minutes after `whole_until` every key is young, and a lost attempt would be sent with its own.
    No charge from before `earliest` is about a period that can still be due. An instant in the future proves nothing.
    """
    end = now + SCAN_MARGIN
    if whole_until is None or whole_until > now:
        return Stretches(None, (earliest - SCAN_MARGIN, end))
    if now - whole_until <= CATCH_UP_OVERLAP:
        return None
    paid_until = whole_until
    if matched_until is not None and whole_until >= now - LONGEST_CATCH_UP and matched_until <= now:
        paid_until = max(whole_until, matched_until)
    since, settled = (max(earliest, instant - CATCH_UP_OVERLAP) - SCAN_MARGIN for instant in (whole_until, paid_until))
    return Stretches((since, settled) if since < settled else None, (settled, end))


def parts_of(stretch: tuple[datetime, datetime]) -> Iterator[tuple[datetime, datetime]]:
    """The stretch in parts, the oldest first."""
    start, end = stretch
    while start < end:
        yield start, min(start + _PART, end)
        start += _PART


@dataclass(frozen=True, slots=True)
class LostCharges:
    """Charges of ours at the provider that our records do not show: paid, not settled; not finished, not known; those
    that cannot be read but for their metadata, and may be either. `is_whole`: nothing else may be one."""

    successes: tuple[ProviderPayment, ...] = ()
    unfinished: tuple[ProviderPayment, ...] = ()
    unreadable: tuple[UnreadableCharge, ...] = ()
    is_whole: bool = True

    @property
    def attempts(self) -> dict[uuid.UUID, str]:
        """The attempts that they name, each with why it is not made (again)."""
        held = {
            payment.claims.renewal_attempt_id: _why_held(payment.id, f"{payment.status} at the provider")
            for payment in (*self.successes, *self.unfinished)
            if payment.claims.renewal_attempt_id is not None
        }
        return held | {odd.attempt_id: _why_held(odd.item.payment_id, _ODD) for odd in self.unreadable}

    @property
    def subscriptions(self) -> dict[int, str]:
        """The subscriptions that they are for, each with why it is not charged."""
        held = {
            subscription_id: _why_held(payment.id, f"{payment.status} at the provider")
            for payment in (*self.successes, *self.unfinished)
            if (subscription_id := claimed_subscription(payment.metadata)) is not None
        }
        return held | {
            odd.subscription_id: _why_held(odd.item.payment_id, _ODD)
            for odd in self.unreadable
            if odd.subscription_id is not None
        }


class UnreadableCharge(NamedTuple):
    """A record at the provider that cannot be read as a payment, and whose metadata names an attempt."""

    item: UnusablePayment
    attempt_id: uuid.UUID
    subscription_id: int | None


_ODD = "its record cannot be read"


def _why_held(payment_id: str | None, state: str) -> str:
    return f"payment {payment_id} ({state}) is a charge for it that our records do not show"


def charge_of(item: UnusablePayment) -> tuple[UnreadableCharge | None, bool]:
    """The charge of ours that a record which cannot be read may be, by its metadata; and whether it can be told.

    One that says of itself that it is canceled has moved no money.
    """
    record = item.evidence if isinstance(item.evidence, Mapping) else {}
    metadata = record.get("metadata")
    if record.get("status") == CANCELED:
        return None, True
    if not isinstance(metadata, Mapping):
        return None, False
    claims = Claims.of(metadata)
    if claims.renewal_attempt_id is None:
        return None, not claims.names_an_attempt
    return UnreadableCharge(item, claims.renewal_attempt_id, claimed_subscription(metadata)), True


def find_lost(
    found: Iterable[ProviderPayment],
    known: Mapping[uuid.UUID, bool],
    settled: Collection[str],
    unreadable: Iterable[UnreadableCharge] = (),
    concluded: Collection[str] = (),
    *,
    is_whole: bool = True,
) -> LostCharges:
    """What is lost of the charges that were found. `settled`, `concluded`: payments; these are attempts' own answers.

    `known`: the attempts in our records, each with whether these know that it may have charged. Such a one is not
    lost: its own answer, its key or its search settles it, and a run may be hearing that answer at this moment.
    """
    successes, unfinished = [], []
    for payment in found:
        attempt_id = payment.claims.renewal_attempt_id
        if attempt_id is None or known.get(attempt_id, False) or payment.id in settled:
            continue
        if payment.status == SUCCEEDED:
            successes.append(payment)
        elif payment.status != CANCELED:
            unfinished.append(payment)
    odd = tuple(
        charge
        for charge in unreadable
        if not known.get(charge.attempt_id, False) and charge.item.payment_id not in concluded
    )
    return LostCharges(tuple(successes), tuple(unfinished), odd, is_whole)
