"""The books of a small billing service, for tests of the SQL: a builder that gives the dull fields.

`Books` writes rows as the service does (naive UTC, upper-case labels), makes provider payments, settles them, and
reads every table back. Time stands still unless a test moves it.
"""

from __future__ import annotations

import itertools
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from typing import Any, TypeVar

import sqlalchemy as sa

from billing_orchestration.database.attempts import by_ids
from billing_orchestration.database.audit import Stamp
from billing_orchestration.database.settling import Settled, settle_batch
from billing_orchestration.database.tables import renewal_attempts
from billing_orchestration.domain.billing_calendar import BillingCalendar
from billing_orchestration.domain.money import Money
from billing_orchestration.domain.provider_payment import SUCCEEDED, ProviderPayment
from billing_orchestration.domain.renewals import ATTEMPT_KEY, Attempt, DueSubscription, State, plan_attempt

UTC = timezone.utc
# A Thursday in the middle of a month, with microseconds, as a real clock has them.
NOON = datetime(2026, 3, 12, 12, 0, 0, 123456, tzinfo=UTC)
UNIQUE_INDEX = "bo_payments_external_payment_id_unique"
PLAIN_INDEX = "bo_payments_external_payment_id"
OURS = ("renewal_attempts", "settlements", "saved_methods", "quarantine", "audit_trail")
T = TypeVar("T")


class Books:
    """Both schemas of one database. `plan` 1 is monthly and costs 299.00 RUB."""

    def __init__(self, engine: sa.Engine, now: datetime = NOON, zone: tzinfo = UTC) -> None:
        self.engine = engine
        self.now = now
        self.calendar = BillingCalendar(zone)
        self._numbers = itertools.count(1)
        self.provider_id = self.insert("payment_providers", name="YooKassa", is_active=True, **self._touched())
        self.monthly = self.plan()

    # --- the service's rows

    def insert(self, table: str, **values: Any) -> int:
        """One row; its id."""
        names, marks = ", ".join(values), ", ".join(f":{name}" for name in values)
        with self.engine.begin() as connection:
            return int(
                connection.execute(
                    sa.text(f"INSERT INTO {table} ({names}) VALUES ({marks}) RETURNING id"), values
                ).scalar_one()
            )

    def plan(
        self,
        price: str | None = "299.00",
        *,
        currency: str = "RUB",
        duration: int | None = 1,
        unit: str | None = "month",
        recurring: bool | None = True,
    ) -> int:
        """A plan with one price (None: without)."""
        plan_id = self.insert(
            "plans", name="plan", is_recurring=recurring, duration=duration, duration_unit=unit, **self._touched()
        )
        if price is not None:
            self.price(plan_id, price, currency)
        return plan_id

    def price(self, plan_id: int, amount: str, currency: str | None = "RUB") -> int:
        """One more price of a plan."""
        return self.insert("prices", plan_id=plan_id, amount=Decimal(amount), currency=currency)

    def subscription(
        self,
        user: str | None = None,
        *,
        ended_at: datetime | str | None = NOON,
        started_at: datetime | str | None = NOON - timedelta(days=59),
        status: str | None = "ACTIVE",
        plan_id: int | None = 0,
    ) -> int:
        """A subscription (of the monthly plan, ended now). Instants may be text that only PostgreSQL can read."""
        return self.insert(
            "subscriptions",
            user_id=user or f"user-{next(self._numbers)}",
            status=status,
            started_at=naive(started_at),
            ended_at=naive(ended_at),
            plan_id=self.monthly if plan_id == 0 else plan_id,
            **self._touched(),
        )

    def payment(
        self,
        external_id: str | None = None,
        *,
        subscription_id: int | None = None,
        status: str | None = "PENDING",
        amount: str = "299.00",
        currency: str | None = "RUB",
        method: str | None = None,
        created_at: datetime | None = None,
    ) -> int:
        """A payment row (PENDING, an hour old)."""
        return self.insert(
            "payments",
            subscription_id=subscription_id,
            payment_provider_id=self.provider_id,
            payment_method=method,
            status=status,
            currency=currency,
            amount=Decimal(amount),
            external_payment_id=external_id,
            created_at=naive(created_at or self.now - timedelta(hours=1)),
            updated_at=naive(created_at or self.now - timedelta(hours=1)),
        )

    def attempt(
        self,
        subscription_id: int,
        *,
        state: str = State.UNKNOWN,
        number: int = 1,
        first_sent_at: datetime | None = NOON - timedelta(hours=1),
        **fields: Any,
    ) -> Attempt:
        """A renewal attempt of the subscription's present period, in any state."""
        planned = self.planned(subscription_id, number=number)
        values = {
            "period_start": planned.period_start,
            "first_sent_at": first_sent_at,
            "last_sent_at": first_sent_at,
            "sends": int(first_sent_at is not None),
            "planned_at": self.now - timedelta(hours=1),
            "run_id": "an earlier run",
            **fields,
        }
        with self.engine.begin() as connection:
            connection.execute(
                sa.insert(renewal_attempts).values(
                    id=planned.id,
                    subscription_id=subscription_id,
                    number=number,
                    state=state,
                    idempotence_key=planned.idempotence_key,
                    body=planned.body,
                    amount=planned.money.amount,
                    currency=planned.money.currency,
                    user_id=planned.user_id,
                    plan_id=planned.plan_id,
                    payment_provider_id=planned.payment_provider_id,
                    payment_method_id=planned.payment_method_id,
                    **values,
                )
            )
        return self.read_attempt(planned.id)

    def planned(
        self, subscription_id: int, *, number: int = 1, method: str = "card", amount: str = "299.00"
    ) -> Attempt:
        """An attempt as the domain plans it, not in the database yet."""
        row = self.row("subscriptions", subscription_id)
        due = DueSubscription(
            row.id, row.user_id, row.plan_id, None, row.ended_at.replace(tzinfo=UTC), 1, "month", method, "RUB", 1, ()
        )
        return plan_attempt(
            due,
            number=number,
            user_id=row.user_id,
            plan_id=row.plan_id,
            method_id=method,
            money=Money(Decimal(amount), "RUB"),
            provider_id=self.provider_id,
        )

    # --- the provider's payments

    def paid(
        self,
        payment_id: str | None = None,
        *,
        user: str | None = "anna",
        plan_id: int | str | None = 0,
        amount: str = "299.00",
        currency: str = "RUB",
        refunded: str = "0.00",
        metadata: dict[str, Any] | None = None,
        **fields: Any,
    ) -> ProviderPayment:
        """A success at the provider, with the metadata that the service writes."""
        told = {"user_id": user, "plan_id": self.monthly if plan_id == 0 else plan_id, **(metadata or {})}
        told.setdefault("payment_provider_id", self.provider_id)
        values: dict[str, Any] = {
            "created_at": self.now - timedelta(minutes=20),
            "captured_at": self.now - timedelta(minutes=19),
            "method_type": "bank_card",
            "method_id": f"method of {payment_id}",
            **fields,
        }
        return ProviderPayment(
            id=payment_id or f"paid-{next(self._numbers)}",
            status=SUCCEEDED,
            money=Money(Decimal(amount), currency),
            refunded_amount=Decimal(refunded),
            metadata={
                key: str(value) if isinstance(value, int) else value for key, value in told.items() if value is not None
            },
            **values,
        )

    def renewal(self, attempt: Attempt, payment_id: str = "renewal", **fields: Any) -> ProviderPayment:
        """The provider's success of one of our attempts."""
        metadata = {ATTEMPT_KEY: str(attempt.id), "subscription_id": str(attempt.subscription_id)}
        return self.paid(payment_id, user=attempt.user_id, plan_id=attempt.plan_id, metadata=metadata, **fields)

    # --- settling

    def stamp(self, run_id: str = "run", job: str = "job") -> Stamp:
        """Who changes something, now."""
        return Stamp(job, run_id, self.now)

    def settle(self, *payments: ProviderPayment, is_live: bool = False, stamp: Stamp | None = None) -> list[Settled]:
        """Settle in one committed transaction."""
        with self.engine.begin() as connection:
            return settle_batch(
                connection, payments, stamp=stamp or self.stamp(), calendar=self.calendar, is_live=is_live
            )

    # --- reading

    def row(self, table: str, row_id: Any) -> Any:
        """One row."""
        with self.engine.connect() as connection:
            return connection.execute(sa.text(f"SELECT * FROM {table} WHERE id = :id"), {"id": row_id}).one()

    def rows(self, table: str, where: str = "true", **values: Any) -> list[Any]:
        """Rows of one of the service's tables, or of ours, oldest first."""
        name = f"billing_orchestration.{table}" if table in OURS else table
        with self.engine.connect() as connection:
            return list(connection.execute(sa.text(f"SELECT * FROM {name} WHERE {where} ORDER BY 1"), values))

    def read_attempt(self, attempt_id: uuid.UUID) -> Attempt:
        """An attempt as it is now."""
        with self.engine.connect() as connection:
            return by_ids(connection, [attempt_id])[attempt_id]

    def ended_at(self, subscription_id: int) -> datetime:
        """Until when a subscription is paid, aware."""
        with self.engine.connect() as connection:
            ended_at: datetime = connection.execute(
                sa.text("SELECT ended_at FROM subscriptions WHERE id = :id"), {"id": subscription_id}
            ).scalar_one()
        return ended_at.replace(tzinfo=UTC)

    def snapshot(self) -> dict[str, list[Any]]:
        """Everything that must not change when nothing is to be done."""
        return {table: self.rows(table) for table in ("subscriptions", "payments", *OURS)}

    def execute(self, statement: str, **values: Any) -> None:
        """A statement of the service, or of an operator, committed."""
        with self.engine.begin() as connection:
            connection.execute(sa.text(statement), values)

    def _touched(self) -> dict[str, Any]:
        return {"created_at": naive(self.now - timedelta(days=60)), "updated_at": naive(self.now - timedelta(days=60))}


def naive(instant: datetime | str | None) -> Any:
    """As the service stores it; text is passed on."""
    return instant.astimezone(UTC).replace(tzinfo=None) if isinstance(instant, datetime) else instant


def again(payment: ProviderPayment, **changes: Any) -> ProviderPayment:
    """The same payment with other facts."""
    return replace(payment, **changes)


def wait_until(condition: Callable[[], object], what: str, patience_s: float = 60.0) -> None:
    """Wait for a condition; the patience only bounds a broken test."""
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited in vain: {what}")
        time.sleep(0.005)


def waiting_sessions(engine: sa.Engine) -> int:
    """How many sessions of this database wait for somebody's lock."""
    with engine.connect() as connection:
        return int(
            connection.execute(
                sa.text("""
                    SELECT count(*) FROM pg_stat_activity
                    WHERE datname = current_database() AND wait_event_type = 'Lock'
                """)
            ).scalar_one()
        )


def start_blocked(pool: ThreadPoolExecutor, engine: sa.Engine, work: Callable[[], T], waiting: int = 1) -> Future[T]:
    """Start work in a thread and come back when it waits for a lock (the `waiting`th session to do so)."""
    future = pool.submit(work)
    wait_until(lambda: future.done() or waiting_sessions(engine) >= waiting, "the work waits for a lock")
    assert not future.done(), f"it did not wait for the lock: {future.exception() or future.result()}"
    return future


def at_once(works: Sequence[Callable[[], T]]) -> list[T]:
    """Start all of them at the same moment, each in a thread; their results in order."""
    start = threading.Barrier(len(works), timeout=60)

    def run(work: Callable[[], T]) -> T:
        start.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(run, works))


def drop_unique_index(engine: sa.Engine) -> None:
    """Leave the database as `migrate` does when the data has repeated payment ids: with a plain index."""
    with engine.begin() as connection:
        connection.execute(sa.text(f"DROP INDEX {UNIQUE_INDEX}"))
        connection.execute(sa.text(f"CREATE INDEX {PLAIN_INDEX} ON payments (external_payment_id)"))
