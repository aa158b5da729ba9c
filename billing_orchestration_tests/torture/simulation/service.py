"""The other hand: the billing service itself, which sells, refunds and handles webhooks beside the jobs.

It writes rows as the real service does, and shares no code with the jobs. Its webhook handler is a decent one: it locks
the payment row, looks at its status, and grants in the same transaction. When a row is locked by somebody else it gives
up at once, and the provider delivers the webhook again later.
"""

from __future__ import annotations

from datetime import datetime, tzinfo
from decimal import Decimal
from typing import Any

import psycopg
from psycopg.rows import namedtuple_row

from billing_orchestration_tests.torture.simulation.judge import Journal, end_of_next_period, naive


class Busy(Exception):
    """A row was locked: nothing was written, the caller tries again later."""


class BillingService:
    """The service's own code, on its own connection. Instants are aware; its clock is the caller's concern."""

    def __init__(self, connection: psycopg.Connection[Any], zone: tzinfo, journal: Journal, provider_row: int) -> None:
        self.connection = connection
        self._zone = zone
        self._journal = journal
        self.provider_row = provider_row
        # Another shop's, in the same tables.
        self.other_row = 0

    def execute(self, statement: str, *values: Any) -> list[Any]:
        """One transaction of one statement; Busy when it would have to wait."""
        try:
            with self.connection.transaction(), self.connection.cursor(row_factory=namedtuple_row) as cursor:
                cursor.execute(statement, values)
                return cursor.fetchall() if cursor.description else []
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected) as error:
            raise Busy from error

    def insert(self, table: str, **values: Any) -> int:
        """One row; its id."""
        names, marks = ", ".join(values), ", ".join("%s" for _ in values)
        rows = self.execute(f"INSERT INTO {table} ({names}) VALUES ({marks}) RETURNING id", *values.values())
        return int(rows[0].id)

    def payment(
        self,
        now: datetime,
        amount: Decimal,
        currency: str,
        *,
        external_id: str | None,
        status: str = "PENDING",
        subscription_id: int | None = None,
        method: str | None = "BANK_CARD",
        provider_row: int | None = None,
    ) -> int:
        """A payments row, as the service writes it when a customer begins to pay."""
        return self.insert(
            "payments",
            subscription_id=subscription_id,
            payment_provider_id=provider_row or self.provider_row,
            payment_method=method,
            status=status,
            currency=currency,
            amount=amount,
            external_payment_id=external_id,
            created_at=naive(now),
            updated_at=naive(now),
        )

    def on_success(self, payment: Any, now: datetime, *, writes_unknown: bool, settles_renewals: str) -> str:
        """The webhook `payment.succeeded`. Returns what it did; raises Busy when the provider has to come again.

        `writes_unknown`: whether it creates a row for a payment that it does not know. `settles_renewals`: what it
        does with a renewal that the jobs charged: "leave", "grant", or "row" (the row only, without the extension).
        """
        metadata = payment.metadata
        is_renewal = "renewal_attempt_id" in metadata
        try:
            with self.connection.transaction(), self.connection.cursor(row_factory=namedtuple_row) as cursor:
                rows = cursor.execute(
                    "SELECT id, status::text AS status, amount, currency::text AS currency, subscription_id"
                    " FROM payments WHERE external_payment_id = %s ORDER BY id FOR UPDATE",
                    (payment.id,),
                ).fetchall()
                if any(row.status in ("SUCCEEDED", "REFUNDED", "CANCELED") for row in rows):
                    return "known"
                if not rows and not (settles_renewals != "leave" if is_renewal else writes_unknown):
                    return "left alone"
                if payment.refunded >= payment.amount:
                    return "refunded"
                if rows and (rows[0].amount, rows[0].currency) != (payment.amount, payment.currency):
                    return "another amount"
                if not rows and not is_renewal and not self._is_price(cursor, payment):
                    return "another amount"
                if not metadata.get("user_id") or not str(metadata.get("plan_id", "")).isdigit():
                    return "strange metadata"
                known = cursor.execute(
                    "SELECT id FROM plans WHERE id = %s AND duration IS NOT NULL", (int(metadata["plan_id"]),)
                ).fetchall()
                if not known:
                    return "strange metadata"
                subscription_id, period = int(metadata.get("subscription_id", 0)), None
                if not is_renewal or settles_renewals != "row":
                    granted = self._grant(cursor, metadata, is_renewal, now)
                    if granted is None:
                        return "left alone"
                    subscription_id, period = granted
                if rows:
                    cursor.execute(
                        "UPDATE payments SET status = 'SUCCEEDED', subscription_id = %s, updated_at = %s WHERE id = %s",
                        (subscription_id, naive(now), rows[0].id),
                    )
                else:
                    cursor.execute(
                        "INSERT INTO payments (subscription_id, payment_provider_id, payment_method, status, currency,"
                        " amount, external_payment_id, created_at, updated_at)"
                        " VALUES (%s, %s, 'BANK_CARD', 'SUCCEEDED', %s, %s, %s, %s, %s)",
                        (subscription_id, self.provider_row, payment.currency, payment.amount, payment.id,
                         naive(now), naive(now)),
                    )  # fmt: skip
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected) as error:
            raise Busy from error
        except psycopg.errors.UniqueViolation:
            return "somebody else wrote it"
        if period is None:
            self._journal.service_rows.add(payment.id)
            return "row"
        self._journal.note_grant(payment.id, subscription_id, period, now)
        return "granted"

    @staticmethod
    def _is_price(cursor: Any, payment: Any) -> bool:
        plan_id = str(payment.metadata.get("plan_id", ""))
        prices = cursor.execute(
            "SELECT 1 FROM prices WHERE plan_id::text = %s AND amount = %s AND currency::text = %s",
            (plan_id, payment.amount, payment.currency),
        )
        return bool(prices.fetchall())

    # --- the same handler, written carelessly

    def read_pending(self, payment: Any) -> int | None:
        """The PENDING row of a purchase, read without a lock."""
        rows = self.execute(
            "SELECT id FROM payments WHERE external_payment_id = %s AND status = 'PENDING' ORDER BY id", payment.id
        )
        return int(rows[0].id) if rows else None

    def write_by_id(self, payment: Any, row_id: int, now: datetime) -> None:
        """Grant a purchase and write its row, whatever has become of either since they were read."""
        try:
            with self.connection.transaction(), self.connection.cursor(row_factory=namedtuple_row) as cursor:
                granted = self._grant(cursor, payment.metadata, False, now)
                assert granted is not None
                number, period = granted
                cursor.execute(
                    "UPDATE payments SET status = 'SUCCEEDED', subscription_id = %s, updated_at = %s WHERE id = %s",
                    (number, naive(now), row_id),
                )
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected) as error:
            raise Busy from error
        self._journal.note_grant(payment.id, number, period, now)

    def write_half(self, payment: Any, now: datetime) -> bool:
        """The payment's row in a transaction of its own; then the handler dies. False: there is no such row."""
        rows = self.execute(
            "UPDATE payments SET status = 'SUCCEEDED', updated_at = %s WHERE external_payment_id = %s"
            " AND status = 'PENDING' AND subscription_id IS NULL RETURNING id",
            naive(now), payment.id,
        )  # fmt: skip
        if rows:
            self._journal.half_written[payment.id] = now
        return bool(rows)

    def _grant(self, cursor: Any, metadata: Any, is_renewal: bool, now: datetime) -> tuple[int, tuple[int, str]] | None:
        """The subscription, and the period that it was given; None: there is none to renew."""
        plan_id = int(metadata["plan_id"])
        plan = cursor.execute("SELECT duration, duration_unit FROM plans WHERE id = %s", (plan_id,)).fetchone()
        if is_renewal:
            wanted, values = "id = %s", (int(metadata["subscription_id"]),)
        else:
            wanted, values = "user_id = %s AND plan_id = %s AND status = 'ACTIVE'", (metadata["user_id"], plan_id)
        found = cursor.execute(
            f"SELECT id, started_at, ended_at FROM subscriptions WHERE {wanted}"
            " ORDER BY ended_at DESC, id DESC FOR UPDATE",
            values,
        ).fetchall()
        if found:
            row = found[0]
            end = end_of_next_period(self._zone, row.started_at, row.ended_at, plan.duration, plan.duration_unit)
            cursor.execute(
                "UPDATE subscriptions SET ended_at = %s, updated_at = %s,"
                " status = CASE WHEN status = 'EXPIRED' THEN 'ACTIVE' ELSE status END WHERE id = %s",
                (end, naive(now), row.id),
            )
            return int(row.id), (plan.duration, plan.duration_unit)
        if is_renewal:
            return None
        start = naive(now)
        end = end_of_next_period(self._zone, start, start, plan.duration, plan.duration_unit)
        cursor.execute(
            "INSERT INTO subscriptions (user_id, status, started_at, ended_at, plan_id, created_at, updated_at)"
            " VALUES (%s, 'ACTIVE', %s, %s, %s, %s, %s) RETURNING id",
            (metadata["user_id"], start, end, plan_id, start, start),
        )
        return int(cursor.fetchone().id), (plan.duration, plan.duration_unit)
