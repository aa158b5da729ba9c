"""An attempt to charge one period: its identity, its states, and how long its key may be used.

An attempt is (subscription, period start = the old `ended_at`, number). Its id and its idempotence key are derived from
that identity. Two processes that plan the same attempt therefore send the same key, and so does a database that was
restored from a backup.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from billing_orchestration.domain.clocks import is_in_future
from billing_orchestration.domain.money import Money
from billing_orchestration.domain.personal import names_in_body, without_names

# Never change these: another namespace gives the same attempt another key, and so a second charge.
_ATTEMPT_NAMESPACE = uuid.UUID("6f1f6a52-6a0e-5a5e-9d0b-0c6f3a4f5b11")
_KEY_NAMESPACE = uuid.UUID("b4b3d0a4-2c59-5f0e-8a53-5f6b1a1f0c22")

# The provider forgets a key 24 h after the first request; from then on the same request is a NEW charge. The hour in
# between covers slow or queued sends and clocks that disagree.
KEY_LIFETIME_HOURS = 23
KEY_LIFETIME = timedelta(hours=KEY_LIFETIME_HOURS)
# Two complete scans this far apart must both miss an attempt before it counts as never executed.
SCAN_DISTANCE = timedelta(hours=1)
# How far around an attempt's sends its payment is searched: our clock and the provider's may differ.
SCAN_MARGIN = timedelta(minutes=30)
# How far back it is searched where a wrong clock has written when it was sent.
SCAN_REACH = timedelta(days=7)


class State:
    """The states of an attempt. REFUNDED: paid, and refunded in full before we knew."""

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


# The outcome is not known yet.
OPEN = (State.PLANNED, State.UNKNOWN, State.PENDING)
# The period's money was taken, or a person has the last word: never charged again.
TAKEN = (State.SUCCEEDED, State.REVIEW, State.REFUNDED)
# At most one such attempt per period; the database holds it by a unique index.
LIVE = (*OPEN, *TAKEN)
ALL_STATES = (*LIVE, State.DECLINED, State.STOPPED, State.REJECTED, State.VOID)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt as the database holds it. Instants are aware UTC; `first_sent_at` None: certainly never sent.

    `shop_id`: the shop whose charge it is; None: planned by a version that did not write it down. `period_count` and
    `period_unit`: the period that is paid for, frozen with the price; None: not known, the plan's then.
    `is_recreated`: the database has lost it, and it was rebuilt from its payment (`lost_attempts`).
    """

    id: uuid.UUID
    subscription_id: int
    period_start: datetime
    number: int
    state: str
    idempotence_key: uuid.UUID
    # It may hold the customer's contact.
    body: str = field(repr=False)
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
    shop_id: str | None = None
    period_count: int | None = None
    period_unit: str | None = None
    is_recreated: bool = False

    @property
    def may_have_been_sent(self) -> bool:
        """Whether the provider may know of it. Anything that a crash could have left in flight counts."""
        return self.first_sent_at is not None

    @property
    def subject(self) -> str:
        """Its name in a report."""
        return f"subscription {self.subscription_id}, attempt {self.number}"

    def unnamed(self, text: str) -> str:
        """A foreign text about it, without its customer's id and contact."""
        return without_names(text, {self.user_id} | names_in_body(self.body))


def identify(subscription_id: int, period_start: datetime, number: int) -> tuple[uuid.UUID, uuid.UUID]:
    """The id and the idempotence key of an attempt. `period_start` is in UTC."""
    identity = f"{subscription_id}|{period_start.isoformat()}|{number}"
    return uuid.uuid5(_ATTEMPT_NAMESPACE, identity), uuid.uuid5(_KEY_NAMESPACE, identity)


def is_past_key_lifetime(attempt: Attempt, now: datetime) -> bool:
    """Whether the provider may have forgotten the key, so that another send could be a second charge."""
    if attempt.first_sent_at is None:
        return False
    return now - attempt.first_sent_at >= KEY_LIFETIME or was_sent_by_wrong_clock(attempt, now)


def was_sent_by_wrong_clock(attempt: Attempt, now: datetime) -> bool:
    """Whether nobody knows when it was sent: it claims the future, or a moment after it was first searched for."""
    latest = min(now, attempt.first_absent_at or now)
    sent = (attempt.first_sent_at, attempt.last_sent_at)
    return any(is_in_future(instant, latest) for instant in sent if instant is not None)
