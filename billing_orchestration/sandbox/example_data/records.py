"""What the example data consists of: rows as the service writes them, and cases with what is expected of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

PENDING_JOB = "matching_pending_payments_job"
SUCCESSFUL_JOB = "matching_successful_payments_job"
PAYMENTS_JOB = "expire_payments_job"
AUTOPAYMENT_JOB = "autopayment_job"
SUBSCRIPTIONS_JOB = "expire_subscriptions_job"


@dataclass(slots=True, eq=False)
class Plan:
    """A row of `plans`, with its prices by currency (a list, since real data has two for one)."""

    name: str
    count: int | None
    unit: str | None
    prices: Sequence[tuple[str, str]]
    recurring: bool = True
    id: int = 0

    def price(self, currency: str = "RUB") -> str:
        """The first price in the currency; the price once asked where none is left."""
        return next((amount for name, amount in self.prices if name == currency), "299.00")


@dataclass(slots=True, eq=False)
class Subscription:
    """A row of `subscriptions`; `id` is known once it is written. `method_id`: the saved method, if there is one.

    `may_charge` and `email` are what the service's view says of it.
    """

    user_id: str
    plan: Plan
    status: str
    started_at: datetime
    ended_at: datetime
    method_id: str | None = None
    currency: str = "RUB"
    id: int = 0
    may_charge: bool = True
    email: str | None = "customer@example.com"


@dataclass(slots=True, eq=False)
class PaymentRow:
    """A row of `payments`; `id` is known once it is written."""

    status: str
    amount: str
    created_at: datetime
    external_id: str | None
    currency: str = "RUB"
    method: str | None = "BANK_CARD"
    subscription: Subscription | None = None
    id: int = 0


@dataclass(slots=True, eq=False)
class Attempt:
    """A row of `renewal_attempts` that an earlier run left.

    `charged_at`: when the provider took the money, if it did, which the row does not know. `absent_since`: when a first
    search of the provider's list did not find it.
    """

    subscription: Subscription
    number: int
    state: str
    sent_at: datetime
    external_id: str | None
    reason: str | None
    decline_class: str | None
    charged_at: datetime | None
    absent_since: datetime | None


@dataclass(frozen=True, slots=True)
class Expectation:
    """What must be found after the runs. None: not looked at.

    `status` and `until` (the first ten characters of `ended_at`) of the subscription; `attempt` is the state of its
    newest renewal attempt; `charges` counts the provider's ledger entries for the period; `row` is the payment row's
    status; `grant` is renewed, extended, created, refunded or "" for none; `quarantine` its kind or "".
    """

    status: str | None = None
    until: str | None = None
    attempt: str | None = None
    charges: int | None = None
    row: str | None = None
    grant: str | None = None
    quarantine: str | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """One instance of a case. `external_id`: the provider's payment that the case is about."""

    subscription: Subscription | None = None
    row: PaymentRow | None = None
    external_id: str | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """A situation of real life, what is expected of it, and its instances."""

    job: str
    label: str
    expected: str
    want: Expectation
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Story:
    """What was written: every case, every subscription as it was before the first run, the numbers of payments on both
    sides, and what `migrate` said."""

    cases: tuple[Case, ...]
    subscriptions: tuple[Subscription, ...]
    payments: int
    provider_payments: int
    migrated: tuple[str, ...]
