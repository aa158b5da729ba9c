"""What the stories of these tests begin with: builders give the dull fields, a test names only what matters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

from billing_orchestration.domain.attempts import Attempt, State
from billing_orchestration.domain.billing_calendar import BillingCalendar
from billing_orchestration.domain.money import Money
from billing_orchestration.domain.provider_payment import ATTEMPT_KEY, CANCELED, SUCCEEDED, ProviderPayment
from billing_orchestration.domain.renewals import DueSubscription, RenewalRules, plan_attempt
from billing_orchestration.domain.run_scope import RunScope
from billing_orchestration.domain.settlement_decisions import Facts, PaymentRow, PlanRow, SubscriptionRow

UTC = timezone.utc
# A Thursday in the middle of a month, at the time of the daily run.
NOW = datetime(2026, 3, 12, 3, 0, tzinfo=UTC)
PRICE = Money(Decimal("299.00"), "RUB")
IN_UTC = BillingCalendar(UTC)
SHOP = "100500"
RULES = RenewalRules(IN_UTC, grace_days=3, max_overdue_days=30, shop_id=SHOP)

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
# The years in which properties look for a counterexample: without an offset, as hypothesis wants its bounds.
FIRST_MOMENT = datetime(2015, 1, 1)  # noqa: DTZ001
LAST_MOMENT = datetime(2035, 12, 31)  # noqa: DTZ001


def at(text: str, zone: str = "UTC") -> datetime:
    """An instant by the clock on the wall of a zone."""
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone))


def calendar_of(zone: str) -> BillingCalendar:
    """Billing days of that zone."""
    return BillingCalendar(ZoneInfo(zone))


def a_due_subscription(**changes: Any) -> DueSubscription:
    """Subscription 12 of Ada on plan 3 (monthly, 299 RUB), which ends today and has a saved card."""
    due = DueSubscription(
        id=12,
        user_id="ada",
        plan_id=3,
        started_at=datetime(2026, 1, 12, 9, 0, tzinfo=UTC),
        ended_at=datetime(2026, 3, 12, 9, 0, tzinfo=UTC),
        plan_duration=1,
        plan_duration_unit="month",
        method_id="card-of-ada",
        method_currency="RUB",
        method_provider_id=1,
        prices=(PRICE.amount,),
    )
    return dataclasses.replace(due, **changes)


def an_attempt(due: DueSubscription | None = None, *, number: int = 1, money: Money = PRICE, **changes: Any) -> Attempt:
    """The attempt to renew a due subscription; without `state` it is PLANNED and was never sent."""
    due = due or a_due_subscription()
    attempt = plan_attempt(
        due,
        number=number,
        user_id=due.user_id or "nobody",
        plan_id=due.plan_id or 0,
        method_id=due.method_id or "none",
        money=money,
        provider_id=due.method_provider_id or 0,
        rules=RULES,
    )
    return dataclasses.replace(attempt, **changes)


def a_sent_attempt(due: DueSubscription | None = None, *, ago: timedelta = HOUR, **changes: Any) -> Attempt:
    """An attempt that was sent that long ago and whose outcome nobody knows."""
    known: dict[str, Any] = {"state": State.UNKNOWN, "first_sent_at": NOW - ago, "last_sent_at": NOW - ago}
    return an_attempt(due, **(known | changes))


def a_payment(**changes: Any) -> ProviderPayment:
    """Ada has just bought a month of plan 3 at the provider."""
    payment = ProviderPayment(
        id="pay-1",
        status=SUCCEEDED,
        money=PRICE,
        created_at=NOW - timedelta(minutes=10),
        captured_at=NOW - timedelta(minutes=9),
        method_type="bank_card",
        metadata={"user_id": "ada", "plan_id": "3", "payment_provider_id": "1"},
    )
    return dataclasses.replace(payment, **changes)


def the_payment_of(attempt: Attempt, **changes: Any) -> ProviderPayment:
    """The provider's payment that this attempt's request has made."""
    metadata = {
        ATTEMPT_KEY: str(attempt.id),
        "subscription_id": str(attempt.subscription_id),
        "period_start": attempt.period_start.isoformat(),
        "user_id": attempt.user_id,
        "plan_id": str(attempt.plan_id),
        "payment_provider_id": str(attempt.payment_provider_id),
    }
    return a_payment(**({"id": "renewal-1", "money": attempt.money, "metadata": metadata} | changes))


def a_decline(attempt: Attempt, reason: str | None, **changes: Any) -> ProviderPayment:
    """The provider says no to an attempt."""
    return the_payment_of(
        attempt,
        status=CANCELED,
        captured_at=None,
        cancellation_party="payment_network",
        cancellation_reason=reason,
        **changes,
    )


def a_row(status: str | None = "PENDING", **changes: Any) -> PaymentRow:
    """The service's row of Ada's payment."""
    row = PaymentRow(
        id=7,
        subscription_id=None,
        payment_provider_id=1,
        status=status,
        money=PRICE,
        external_payment_id="pay-1",
    )
    return dataclasses.replace(row, **changes)


def a_subscription(**changes: Any) -> SubscriptionRow:
    """Ada's subscription 12 on plan 3, which ends this morning."""
    subscription = SubscriptionRow(
        id=12,
        user_id="ada",
        plan_id=3,
        status="ACTIVE",
        started_at=datetime(2026, 1, 12, 9, 0, tzinfo=UTC),
        ended_at=datetime(2026, 3, 12, 9, 0, tzinfo=UTC),
    )
    return dataclasses.replace(subscription, **changes)


def facts(rows: Iterable[PaymentRow] = (), subscriptions: Iterable[SubscriptionRow] = (), **changes: Any) -> Facts:
    """What the books hold about one payment: only plan 3 (monthly) and payment provider 1, unless more is given."""
    known = Facts(
        settled_as=None,
        set_aside=False,
        rows=list(rows),
        attempt=None,
        rivals=(),
        subscriptions={subscription.id: subscription for subscription in subscriptions},
        plans={3: PlanRow(3, 1, "month", frozenset({PRICE}))},
        provider_ids=frozenset({1}),
    )
    return dataclasses.replace(known, **changes)


def a_scope(as_of: datetime = NOW, *, heals: bool = True, **changes: Any) -> RunScope:
    """A run that stands for `as_of`; one that heals is a tick or a launch without anything given."""
    scope = RunScope(
        as_of=as_of, source="now" if heals else "config", heals=heals, dry_run=False, max_changes=None, run_id="run"
    )
    return dataclasses.replace(scope, **changes)
