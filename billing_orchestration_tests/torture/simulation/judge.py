"""What every part of the judge sees: the tables, the journal of the outside world, and the rules' numbers.

Nothing in here or in the judge's parts (`oracle_*`) comes from `billing_orchestration.domain`, `.database` or
`.provider`: they must not share their mistakes. The `Journal` holds facts of the world outside the code under test:
which subscriptions were there before, what the service's own webhook granted, when a customer was refunded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta, timezone, tzinfo
from typing import Any

import psycopg
from psycopg.rows import namedtuple_row

from billing_orchestration_tests.torture.simulation.mishaps import AWAITED

UTC = timezone.utc
DAY = timedelta(days=1)
# After these the card is of no use any more, by the provider's documentation and not by the code under test.
HARD_DECLINES = frozenset((
    "permission_revoked", "card_expired", "payment_method_restricted", "invalid_card_number", "country_forbidden",
    "fraud_suspected", "identification_required", "unsupported_mobile_operator",
))  # fmt: skip


def naive(instant: datetime) -> datetime:
    """As the service's tables hold it."""
    return instant.astimezone(UTC).replace(tzinfo=None)


def last_day_of_month(day: date) -> int:
    """28 to 31."""
    return ((day.replace(day=28) + timedelta(days=4)).replace(day=1) - DAY).day


def end_of_next_period(zone: tzinfo, started_at: datetime, ended_at: datetime, duration: int, unit: str) -> datetime:
    """One period after `ended_at` (both naive UTC), the wall clock's time and the anchor day kept."""
    end = ended_at.replace(tzinfo=UTC).astimezone(zone)
    if unit == "days":
        day = end.date() + duration * DAY
    else:
        start = started_at.replace(tzinfo=UTC).astimezone(zone)
        anchor = end.day
        if start.day > end.day and end.day == last_day_of_month(end.date()):
            anchor = start.day
        month_number = end.month - 1 + duration * (12 if unit == "year" else 1)
        first = date(end.year + month_number // 12, month_number % 12 + 1, 1)
        day = first.replace(day=min(anchor, last_day_of_month(first)))
    wall = datetime(day.year, day.month, day.day, end.hour, end.minute, end.second, end.microsecond, tzinfo=zone)
    return naive(wall)


@dataclass
class Journal:
    """Facts of the world that neither the tables nor the ledger hold."""

    # Payments and subscriptions that were there before the first run: (started_at, ended_at), naive UTC.
    history: set[str] = field(default_factory=set)
    before: dict[int, tuple[datetime, datetime]] = field(default_factory=dict)
    # Payment rows of another shop (its id -> a word).
    elsewhere: dict[int, str] = field(default_factory=dict)
    # The service's own webhook: provider payment -> subscription it extended or created, and when (our clock).
    service_grants: dict[str, int] = field(default_factory=dict)
    service_granted_at: dict[str, datetime] = field(default_factory=dict)
    # What a subscription had been granted when somebody last moved its end or its plan: `before` is of that moment.
    counted: dict[int, set[str]] = field(default_factory=dict)
    # Purchases whose row the service's webhook wrote as SUCCEEDED, without subscription or grant, before it died.
    half_written: dict[str, datetime] = field(default_factory=dict)
    # Renewals whose row the service's webhook wrote as SUCCEEDED without granting anything: the grant is our work.
    service_rows: set[str] = field(default_factory=set)
    # Whose card a saved method is: method -> user.
    methods: dict[str, str] = field(default_factory=dict)
    # From here on nothing happens but what closes by its rule.
    calm: bool = False
    # Refunded in full: provider payment -> whether anybody had granted it by then.
    refunded: dict[str, bool] = field(default_factory=dict)
    # Successes that must not be granted but shown to a person, with the kind of problem.
    poisoned: dict[str, str] = field(default_factory=dict)
    # Stretches (aware UTC, the provider's clock) that no matching run covers until an operator backfills them.
    gaps: list[tuple[datetime, datetime]] = field(default_factory=list)
    # When the service, or a customer there, last changed a subscription (aware UTC, our clock); moved its end or plan.
    touched: dict[int, datetime] = field(default_factory=dict)
    moved: dict[int, datetime] = field(default_factory=dict)
    # When a plan or its price last changed (aware UTC, by the later of the right clock and ours).
    plan_changed: dict[int, datetime] = field(default_factory=dict)
    # What was paid for: attempt -> (duration, unit), as the plan was when it was claimed; the last one before a change.
    agreed: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    period_before: dict[int, tuple[int, str]] = field(default_factory=dict)
    # The moment of it (aware UTC) by every clock that a run may have read just before: the right one and ours.
    period_changed: dict[int, tuple[datetime, ...]] = field(default_factory=dict)
    # What the service has granted for a payment, by the plan as it was then.
    service_periods: dict[str, tuple[int, str]] = field(default_factory=dict)
    # The provider's payments whose records nobody can read any more.
    unreadable: set[str] = field(default_factory=set)
    # How far our clock is behind at this moment: what was noted before it went wrong seems to lie so far ahead.
    behind: timedelta = timedelta(0)
    # When the database was last set back, and our charges (provider's ids) of which it knows nothing since.
    restored_at: datetime | None = None
    lost: set[str] = field(default_factory=set)
    # Instants (aware UTC, our clock) of undisturbed, green runs, by job.
    undisturbed: dict[str, list[datetime]] = field(default_factory=lambda: defaultdict(list))

    def note_grant(self, payment_id: str, subscription_id: int, period: tuple[int, str], now: datetime) -> None:
        """The service's own webhook has granted a payment."""
        self.service_grants[payment_id] = subscription_id
        self.service_periods[payment_id] = period
        self.half_written.pop(payment_id, None)
        self.service_granted_at[payment_id] = now


@dataclass(frozen=True)
class Rules:
    """The numbers behind the rules, and how the two clocks differ: the provider's minus ours."""

    zone: tzinfo
    grace_days: int
    ttl_days: int
    provider_skew: timedelta
    list_lag: timedelta
    mishaps: frozenset[str] = frozenset()

    def holds(self, mishap: str) -> bool:
        """Whether the code under test can stand it already, or is asked to."""
        return mishap in self.mishaps or mishap not in AWAITED


class Judge:
    """One installation, seen by its judge."""

    def __init__(self, connection: psycopg.Connection[Any], journal: Journal, rules: Rules) -> None:
        self.connection = connection
        self._journal = journal
        self._rules = rules

    def rows(self, statement: str, *values: Any) -> list[Any]:
        """Whatever a statement of the oracle's own finds."""
        with self.connection.cursor(row_factory=namedtuple_row) as cursor:
            return cursor.execute(statement, values).fetchall()

    def hard_declines(self, payments: Iterable[Any]) -> dict[str, list[Any]]:
        """Our charges that the provider has declined for good, by method. Each forbids it for every later period.

        A customer's own purchase forbids nothing, and a database that was set back knows of no decline since.
        """
        found: dict[str, list[Any]] = defaultdict(list)
        for payment in payments:
            if (
                payment.status == "canceled"
                and (payment.cancellation or {}).get("reason") in HARD_DECLINES
                and "renewal_attempt_id" in payment.metadata
                and payment.id not in self._journal.lost
            ):
                found[payment.method_id].append(payment)
        return found

    def billing_day(self, instant: datetime) -> date:
        """The billing day of an aware instant."""
        return instant.astimezone(self._rules.zone).date()
