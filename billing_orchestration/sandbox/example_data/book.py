"""Collects what each case needs on both sides, before anything is written."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterable, Mapping
from datetime import datetime, time, timedelta, timezone
from typing import Any

from billing_orchestration.sandbox.example_data.dates import months, periods
from billing_orchestration.sandbox.example_data.records import (
    Attempt,
    Case,
    Expectation,
    Item,
    PaymentRow,
    Plan,
    Subscription,
)
from billing_orchestration.sandbox.provider.clock import iso
from billing_orchestration.sandbox.provider.records import new_payment_id


class Book:
    """Cases, and the rows and provider payments they consist of. Every date is relative to `now`."""

    def __init__(self, now: datetime, generator: random.Random) -> None:
        self.now = now
        self.random = generator
        self.monthly = Plan("Monthly", 1, "month", [("RUB", "299.00"), ("USD", "4.99")])
        self.quarterly = Plan("Quarterly", 3, "month", [("RUB", "799.00")])
        self.yearly = Plan("Yearly", 1, "year", [("RUB", "2990.00")])
        self.ten_days = Plan("Ten days", 10, "days", [("RUB", "99.00")])
        self.one_off = Plan("Season pass", 90, "days", [("RUB", "1490.00")], recurring=False)
        self.priceless = Plan("Legacy", 1, "month", [])
        self.ambiguous = Plan("Twice priced", 1, "month", [("RUB", "199.00"), ("RUB", "249.00")])
        self.plans = [
            self.monthly, self.quarterly, self.yearly, self.ten_days, self.one_off, self.priceless, self.ambiguous,
        ]  # fmt: skip
        for number, plan in enumerate(self.plans, start=1):
            plan.id = number
        self.cases: list[Case] = []
        self.subscriptions: list[Subscription] = []
        self.rows: list[PaymentRow] = []
        self.attempts: list[Attempt] = []
        # The provider's side, as its controls take it.
        self.there: list[dict[str, Any]] = []
        self.methods: list[dict[str, Any]] = []
        self.misbehaviours: list[dict[str, Any]] = []

    def case(self, job: str, label: str, expected: str, want: Expectation, items: Item | Iterable[Item]) -> None:
        """A case of this job, with its instances."""
        self.cases.append(Case(job, label, expected, want, (items,) if isinstance(items, Item) else tuple(items)))

    def ago(self, **span: float) -> datetime:
        """An instant before now."""
        return self.now - timedelta(**span)

    def on_day(self, days_ago: int) -> datetime:
        """Noon, some whole days ago: safely within that day."""
        return datetime.combine(self.now.date() - timedelta(days=days_ago), time(12), timezone.utc)

    def due(
        self,
        ended_at: datetime,
        plan: Plan | None = None,
        *,
        started_at: datetime | None = None,
        status: str = "ACTIVE",
        currency: str = "RUB",
        script: str = "succeeded",
        saved: bool = True,
        bought: bool = True,
        may_charge: bool = True,
        email: str | None = "customer@example.com",
    ) -> Item:
        """A subscription (monthly) with the purchase that began it. `script`: what the card saved by it will do."""
        plan = plan or self.monthly
        started_at = started_at or periods(ended_at, plan, -1)
        subscription = Subscription(
            self._user(), plan, status, started_at, ended_at, currency=currency, may_charge=may_charge, email=email
        )
        self.subscriptions.append(subscription)
        if bought:
            amount, external_id = plan.price(currency), self._id(started_at)
            subscription.method_id = external_id
            self.rows.append(
                PaymentRow("SUCCEEDED", amount, started_at, external_id, currency, subscription=subscription)
            )
            self._paid_there(external_id, started_at, subscription.user_id, plan, amount=amount, currency=currency,
                             saved=True, script=[script])  # fmt: skip
            if not saved:
                self.methods.append({"id": external_id, "saved": False})
        return Item(subscription)

    def running(self, days: int) -> Item:
        """A monthly subscription that goes on for some days."""
        ended_at = self.now + timedelta(days=days)
        return self.due(ended_at, started_at=months(ended_at, -1))

    def purchase(
        self,
        status: str | None,
        *,
        there: str | None = "succeeded",
        captured_minutes: float | None = None,
        paid: str | None = None,
        refunded: str | None = None,
        method_type: str = "bank_card",
        metadata: Mapping[str, str] | None = None,
        linked: Subscription | None = None,
        subscribed: bool = False,
        ago: timedelta,
        **payment: Any,
    ) -> Item:
        """A first purchase: its row here (`status`, None for no row) and the payment there (None: none was made).

        `metadata` is laid over what the service writes; empty, there is none. `payment`: more fields of the payment.
        """
        at, plan, user_id = self.now - ago, self.monthly, self._user()
        external_id = None if there is None else self._id(at)
        if subscribed:
            linked = Subscription(user_id, plan, "ACTIVE", at, months(at, 1))
            self.subscriptions.append(linked)
        row = None
        if status is not None:
            method = "BANK_CARD" if method_type == "bank_card" else None
            row = PaymentRow(status, plan.price(), at, external_id, method=method, subscription=linked)
            self.rows.append(row)
        if external_id is not None and there != "not found":
            if captured_minutes is not None:
                payment["captured_at"] = iso(self.ago(minutes=captured_minutes))
            if refunded:
                payment["refunded_amount"] = refunded
            if metadata is not None:
                payment["metadata"] = {**metadata_of(user_id, plan), **metadata} if metadata else {}
            self._paid_there(external_id, at, user_id, plan, amount=paid or plan.price(), status=there,
                             method_type=method_type, **payment)  # fmt: skip
        return Item(linked if subscribed else None, row, external_id)

    def paid_again(self, item: Item, *, minutes: float, status: str | None = "PENDING") -> Item:
        """The subscriber has paid another period by hand. `status` of the row; None for no row."""
        subscription, at = _subscription(item), self.ago(minutes=minutes)
        plan, external_id, row = subscription.plan, self._id(at), None
        if status is not None:
            row = PaymentRow(status, plan.price(), at, external_id, subscription=subscription)
            self.rows.append(row)
        self._paid_there(external_id, at, subscription.user_id, plan, amount=plan.price())
        return Item(subscription, row, external_id)

    def copy_of(self, item: Item, status: str | None = None) -> Item:
        """A second row with the same provider id, as a double click leaves it."""
        row = item.row
        assert row is not None  # noqa: S101 - the caller made it so
        copy = PaymentRow(
            status or row.status, row.amount, row.created_at, row.external_id, subscription=row.subscription
        )
        self.rows.append(copy)
        return Item(None, copy, item.external_id)

    def attempt(
        self,
        item: Item,
        state: str,
        sent_at: datetime,
        *,
        reason: str | None = None,
        decline_class: str | None = None,
        charged_at: datetime | None = None,
        absent_since: datetime | None = None,
    ) -> Item:
        """The same, with an attempt of an earlier run. `charged_at`: the provider has charged it, and nobody knows."""
        subscription = _subscription(item)
        number = sum(attempt.subscription is subscription for attempt in self.attempts) + 1
        external_id = self._id(sent_at) if reason or charged_at else None
        self.attempts.append(
            Attempt(subscription, number, state, sent_at, external_id, reason, decline_class, charged_at, absent_since)
        )
        return item

    def fails(self, item: Item, effect: str, times: int | None = 1) -> Item:
        """The same; the provider answers its charge this way, this many times (None: always)."""
        method_id = _subscription(item).method_id
        self.misbehaviours.append({"call": "create", "effect": effect, "times": times, "payment_method_id": method_id})
        return item

    def _paid_there(self, payment_id: str, at: datetime, user_id: str, plan: Plan, **fields: Any) -> None:
        self.there.append({"id": payment_id, "created_at": iso(at), "metadata": metadata_of(user_id, plan), **fields})

    def _user(self) -> str:
        return str(uuid.UUID(int=self.random.getrandbits(128), version=4))

    def _id(self, at: datetime) -> str:
        return new_payment_id(at, self.random)


def metadata_of(user_id: str, plan: Plan) -> dict[str, str]:
    """As the service writes it."""
    return {"user_id": user_id, "plan_id": str(plan.id), "payment_provider_id": "1"}


def _subscription(item: Item) -> Subscription:
    assert item.subscription is not None  # noqa: S101 - the caller made it so
    return item.subscription
