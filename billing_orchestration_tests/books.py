"""The books of a small billing service: a builder that gives the dull fields, so that a test names what matters.

`Books` writes rows as the service does (naive UTC, upper-case labels) and reads every table back. Time stands still
unless a test moves it. `jobs.service.Service` adds the provider's side and runs whole jobs.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from functools import cached_property
from typing import Any

import sqlalchemy as sa

from billing_orchestration.database.attempts import by_ids
from billing_orchestration.database.audit import Stamp
from billing_orchestration.database.settling import Settled, settle_batch
from billing_orchestration.database.tables import renewal_attempts
from billing_orchestration.domain.attempts import Attempt, State
from billing_orchestration.domain.billing_calendar import BillingCalendar
from billing_orchestration.domain.money import Money
from billing_orchestration.domain.provider_payment import ATTEMPT_KEY, ProviderPayment
from billing_orchestration_tests.domain.given import a_due_subscription, a_payment, an_attempt

UTC = timezone.utc
# A Thursday in the middle of a month: neither a month's end nor a change of clocks is near.
NOON = datetime(2026, 3, 12, 12, 0, tzinfo=UTC)
UNIQUE_INDEX = "bo_payments_external_payment_id_unique"
# Our tables that a run which has nothing to do must leave alone: all but the watermarks.
OURS = ("renewal_attempts", "settlements", "saved_methods", "quarantine", "audit_trail")
_OUR_SCHEMA = frozenset((*OURS, "watermarks", "reconciled_days", "asked_methods"))
_NOT_GIVEN: Any = object()


class Books:
    """Both schemas of one database. Unless a test says otherwise, a customer has the monthly plan for 299.00 RUB."""

    def __init__(self, engine: sa.Engine, now: datetime = NOON, zone: tzinfo = UTC) -> None:
        self.engine = engine
        self.now = now
        self.calendar = BillingCalendar(zone)
        self._numbers = itertools.count(1)
        self.provider_id = self.insert("payment_providers", name="YooKassa", is_active=True, **self._touched())

    # --- the service's rows

    def insert(self, table: str, **values: Any) -> int:
        """One row; its id."""
        names, marks = ", ".join(values), ", ".join(f":{name}" for name in values)
        statement = f"INSERT INTO {table} ({names}) VALUES ({marks}) RETURNING id"
        with self.engine.begin() as connection:
            return int(connection.execute(sa.text(statement), values).scalar_one())

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
            "plans",
            name=f"plan {next(self._numbers)}",
            is_active=True,
            is_recurring=recurring,
            duration=duration,
            duration_unit=unit,
            **self._touched(),
        )
        if price is not None:
            self.price(plan_id, price, currency)
        return plan_id

    @cached_property
    def monthly(self) -> int:
        """The plan of whoever is given no other."""
        return self.plan()

    def price(self, plan_id: int, amount: str, currency: str | None = "RUB") -> int:
        """One more price of a plan."""
        return self.insert("prices", plan_id=plan_id, amount=Decimal(amount), currency=currency)

    def subscription(
        self,
        user: str | None = None,
        *,
        ended_at: datetime | str | None = _NOT_GIVEN,
        started_at: datetime | str | None = _NOT_GIVEN,
        status: str | None = "ACTIVE",
        plan_id: int | None = _NOT_GIVEN,
    ) -> int:
        """A subscription of two months that ends now. Instants may be text that only PostgreSQL can read."""
        if ended_at is _NOT_GIVEN:
            ended_at = self.now
        if started_at is _NOT_GIVEN:
            started_at = (ended_at if isinstance(ended_at, datetime) else self.now) - timedelta(days=59)
        return self.insert(
            "subscriptions",
            user_id=user or f"user-{next(self._numbers)}",
            status=status,
            started_at=naive(started_at),
            ended_at=naive(ended_at),
            plan_id=self.monthly if plan_id is _NOT_GIVEN else plan_id,
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
        method: str | None = "BANK_CARD",
        created_at: datetime | None = None,
        provider_id: int | None = None,
    ) -> int:
        """A payment row, an hour old."""
        created_at = created_at or self.now - timedelta(hours=1)
        return self.insert(
            "payments",
            subscription_id=subscription_id,
            payment_provider_id=provider_id or self.provider_id,
            payment_method=method,
            status=status,
            currency=currency,
            amount=Decimal(amount),
            external_payment_id=external_id,
            created_at=naive(created_at),
            updated_at=naive(created_at),
        )

    def tolerate_duplicates(self) -> None:
        """Hold several payments with one provider id, as `migrate` leaves such data: without the unique index."""
        self.execute(f"DROP INDEX {UNIQUE_INDEX}")
        self.execute("CREATE INDEX bo_payments_external_payment_id ON payments (external_payment_id)")

    def refuse_changes_of(self, table: str, *ids: int) -> None:
        """A trigger of the service's will not have these rows changed."""
        self.meddle(table, f"NEW.id IN ({', '.join(map(str, ids))})", "RAISE EXCEPTION 'not this one'")

    def meddle(self, table: str, condition: str, deed: str, *, event: str = "UPDATE", at_commit: bool = False) -> None:
        """A trigger of the service's does this to the rows that meet a condition (PL/pgSQL)."""
        when, kind = (f"BEFORE {event}", "TRIGGER")
        if at_commit:
            when, kind = (f"AFTER {event}", "CONSTRAINT TRIGGER")
        self.execute(f"""
            CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN IF {condition} THEN {deed}; END IF; RETURN NEW; END $$
        """)
        self.execute(f"""
            CREATE {kind} meddle {when} ON {table} {"DEFERRABLE INITIALLY DEFERRED" if at_commit else ""}
            FOR EACH ROW EXECUTE FUNCTION meddle()
        """)

    def _touched(self) -> dict[str, Any]:
        long_ago = naive(self.now - timedelta(days=60))
        return {"created_at": long_ago, "updated_at": long_ago}

    # --- renewals, and the provider's payments

    def planned(
        self, subscription_id: int, *, number: int = 1, method: str = "card", amount: str = "299.00"
    ) -> Attempt:
        """An attempt as the domain plans it, not in the database yet."""
        row = self.row("subscriptions", subscription_id)
        due = a_due_subscription(
            id=row.id,
            user_id=row.user_id,
            plan_id=row.plan_id,
            ended_at=row.ended_at.replace(tzinfo=UTC),
            method_id=method,
            method_provider_id=self.provider_id,
        )
        return an_attempt(due, number=number, money=Money(Decimal(amount), "RUB"))

    def attempt(
        self,
        subscription_id: int,
        *,
        state: str = State.UNKNOWN,
        number: int = 1,
        method: str = "card",
        amount: str = "299.00",
        first_sent_at: datetime | None = _NOT_GIVEN,
        **fields: Any,
    ) -> Attempt:
        """A renewal attempt of the subscription's present period, in any state, sent an hour ago."""
        if first_sent_at is _NOT_GIVEN:
            first_sent_at = self.now - timedelta(hours=1)
        planned = self.planned(subscription_id, number=number, method=method, amount=amount)
        values = {
            "id": planned.id,
            "subscription_id": subscription_id,
            "period_start": planned.period_start,
            "number": number,
            "state": state,
            "idempotence_key": planned.idempotence_key,
            "body": planned.body,
            "amount": planned.money.amount,
            "currency": planned.money.currency,
            "user_id": planned.user_id,
            "plan_id": planned.plan_id,
            "payment_provider_id": planned.payment_provider_id,
            "payment_method_id": planned.payment_method_id,
            "shop_id": planned.shop_id,
            "period_count": planned.period_count,
            "period_unit": planned.period_unit,
            "first_sent_at": first_sent_at,
            "last_sent_at": first_sent_at,
            "sends": int(first_sent_at is not None),
            "planned_at": self.now - timedelta(hours=1),
            "run_id": "an earlier run",
        }
        with self.engine.begin() as connection:
            connection.execute(sa.insert(renewal_attempts).values({**values, **fields}))
        return self.read_attempt(planned.id)

    def paid(
        self,
        payment_id: str | None = None,
        *,
        user: str | None = "anna",
        plan_id: int | str | None = _NOT_GIVEN,
        amount: str = "299.00",
        currency: str = "RUB",
        refunded: str = "0.00",
        metadata: dict[str, Any] | None = None,
        **fields: Any,
    ) -> ProviderPayment:
        """A success at the provider, with the metadata that the service writes."""
        told = {
            "user_id": user,
            "plan_id": self.monthly if plan_id is _NOT_GIVEN else plan_id,
            "payment_provider_id": self.provider_id,
            **(metadata or {}),
        }
        values: dict[str, Any] = {
            "id": payment_id or f"paid-{next(self._numbers)}",
            "money": Money(Decimal(amount), currency),
            "refunded_amount": Decimal(refunded),
            "metadata": {
                key: str(value) if isinstance(value, int) else value for key, value in told.items() if value is not None
            },
            "created_at": self.now - timedelta(minutes=20),
            "captured_at": self.now - timedelta(minutes=19),
            "method_id": f"method of {payment_id}",
        }
        return a_payment(**{**values, **fields})

    def renewal(self, attempt: Attempt, payment_id: str = "renewal", **fields: Any) -> ProviderPayment:
        """The provider's success of one of our attempts."""
        metadata = {
            ATTEMPT_KEY: str(attempt.id),
            "subscription_id": str(attempt.subscription_id),
            "period_start": attempt.period_start.isoformat(),
            **fields.pop("metadata", {}),
        }
        return self.paid(payment_id, user=attempt.user_id, plan_id=attempt.plan_id, metadata=metadata, **fields)

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
        name = f"billing_orchestration.{table}" if table in _OUR_SCHEMA else table
        with self.engine.connect() as connection:
            return list(connection.execute(sa.text(f"SELECT * FROM {name} WHERE {where} ORDER BY 1"), values))

    def status(self, table: str, row_id: int) -> str | None:
        """The status of a subscription or a payment row, whatever else the row holds."""
        [status] = self.scalars(f"SELECT status::text FROM {table} WHERE id = :id", id=row_id)
        return status  # type: ignore[no-any-return]

    def statuses(self, table: str, *row_ids: int) -> list[str | None]:
        """The statuses of several rows, in the order asked."""
        return [self.status(table, row_id) for row_id in row_ids]

    def scalars(self, statement: str, **values: Any) -> list[Any]:
        """The first column of a query: for rows that hold what Python cannot read."""
        with self.engine.connect() as connection:
            return list(connection.execute(sa.text(statement), values).scalars())

    def read_attempt(self, attempt_id: uuid.UUID) -> Attempt:
        """An attempt as it is now."""
        with self.engine.connect() as connection:
            return by_ids(connection, [attempt_id])[attempt_id]

    def ended_at(self, subscription_id: int) -> datetime:
        """Until when a subscription is paid, aware."""
        [ended_at] = self.scalars("SELECT ended_at FROM subscriptions WHERE id = :id", id=subscription_id)
        return ended_at.replace(tzinfo=UTC)  # type: ignore[no-any-return]

    def snapshot(self) -> dict[str, list[Any]]:
        """Everything that must not change when nothing is to be done."""
        return {table: self.rows(table) for table in ("subscriptions", "payments", *OURS)}

    def execute(self, statement: str, **values: Any) -> None:
        """A statement of the service, or of an operator, committed."""
        with self.engine.begin() as connection:
            connection.execute(sa.text(statement), values)

    @contextmanager
    def locking(self, table: str, row_id: int) -> Iterator[None]:
        """Somebody's transaction, which hangs, holds a row."""
        with self.engine.connect() as connection:
            connection.execute(sa.text(f"SELECT FROM {table} WHERE id = :id FOR UPDATE"), {"id": row_id})
            yield
            connection.rollback()


def naive(instant: datetime | str | None) -> Any:
    """As the service stores it; text is passed on."""
    return instant.astimezone(UTC).replace(tzinfo=None) if isinstance(instant, datetime) else instant


def stored(*when: int) -> datetime:
    """An instant as the service's columns hold it: naive UTC."""
    return datetime(*when)  # type: ignore[arg-type]  # noqa: DTZ001
