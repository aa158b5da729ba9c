"""Writes the example data to both sides."""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Iterable, Sequence
from datetime import timedelta
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

from billing_orchestration.database.migrating import migrate
from billing_orchestration.database.tables import (
    payment_providers,
    payments,
    plans,
    prices,
    renewal_attempts,
    service,
    subscriptions,
)
from billing_orchestration.sandbox.example_data.book import Book, metadata_of
from billing_orchestration.sandbox.example_data.records import Attempt, PaymentRow, Story, Subscription
from billing_orchestration.sandbox.provider.cabinet import SHOP_ID
from billing_orchestration.sandbox.provider.clock import iso
from billing_orchestration.sandbox.provider.remote_control import SandboxControl

_OPENED_AGO = timedelta(days=900)


def write(book: Book, engine: sa.Engine, provider: SandboxControl) -> Story:
    """Write the service's tables, migrate, then write earlier attempts and the provider's side."""
    with engine.begin() as connection:
        service.create_all(connection)
        _write_catalogue(connection, book)
        _write(connection, subscriptions, book.subscriptions, map(_subscription, book.subscriptions))
        _write(connection, payments, book.rows, map(_payment, book.rows))
        _write_view(connection, book.subscriptions)
    migrated: list[str] = []
    migrate(engine, echo=migrated.append)
    charged = []
    with engine.begin() as connection:
        for attempt in book.attempts:
            row = _attempt(attempt, book.random)
            connection.execute(sa.insert(renewal_attempts).values(row))
            if attempt.charged_at is not None:
                charged.append(_charged(attempt, row))
    provider.add_payments([*book.there, *charged])
    provider.add_methods(book.methods)
    provider.set_switches(receipts="demanded")
    provider.misbehave(book.misbehaviours)
    return Story(
        tuple(book.cases),
        tuple(book.subscriptions),
        len(book.rows),
        len(book.there) + len(charged),
        tuple(migrated),
    )


def _write_view(connection: sa.Connection, written: Iterable[Subscription]) -> None:
    """The service's own tables behind the view that BILLING_RENEWAL_VIEW names (docs/operations.md)."""
    connection.execute(
        sa.text(
            "CREATE TABLE consents (subscription_id int PRIMARY KEY, payment_method_id text, may_charge boolean,"
            " email text)"
        )
    )
    connection.execute(
        sa.text("INSERT INTO consents VALUES (:subscription_id, :payment_method_id, :may_charge, :email)"),
        [
            {
                "subscription_id": subscription.id,
                "payment_method_id": subscription.method_id,
                "may_charge": subscription.may_charge,
                "email": subscription.email,
            }
            for subscription in written
        ],
    )
    connection.execute(
        sa.text(
            "CREATE VIEW billing_renewals AS SELECT subscription_id, payment_method_id, may_charge, email,"
            " NULL::text AS phone FROM consents"
        )
    )


def _write_catalogue(connection: sa.Connection, book: Book) -> None:
    stamps = {"created_at": book.now - _OPENED_AGO, "updated_at": book.now - _OPENED_AGO}
    connection.execute(
        sa.insert(plans),
        [
            {
                "name": plan.name,
                "is_active": True,
                "is_recurring": plan.recurring,
                "duration": plan.count,
                "duration_unit": plan.unit,
                **stamps,
            }
            for plan in book.plans
        ],
    )
    connection.execute(
        sa.insert(prices),
        [
            {"plan_id": plan.id, "currency": currency, "amount": Decimal(amount)}
            for plan in book.plans
            for currency, amount in plan.prices
        ],
    )
    connection.execute(sa.insert(payment_providers), [{"name": "yookassa", "is_active": True, **stamps}])


def _write(
    connection: sa.Connection,
    table: sa.Table,
    records: Sequence[Subscription | PaymentRow],
    rows: Iterable[dict[str, Any]],
) -> None:
    """Write the rows, and note the ids they got."""
    written = connection.execute(
        sa.insert(table).returning(table.c.id, sort_by_parameter_order=True), list(rows)
    ).scalars()
    for record, identity in zip(records, written, strict=True):
        record.id = identity


def _subscription(subscription: Subscription) -> dict[str, Any]:
    return {
        "user_id": subscription.user_id,
        "status": subscription.status,
        "started_at": subscription.started_at,
        "ended_at": subscription.ended_at,
        "plan_id": subscription.plan.id,
        "created_at": subscription.started_at,
        "updated_at": subscription.started_at,
    }


def _payment(row: PaymentRow) -> dict[str, Any]:
    return {
        "subscription_id": row.subscription.id if row.subscription else None,
        "payment_provider_id": 1,
        "payment_method": row.method,
        "status": row.status,
        "currency": row.currency,
        "amount": Decimal(row.amount),
        "external_payment_id": row.external_id,
        "created_at": row.created_at,
        "updated_at": row.created_at,
    }


def _attempt(attempt: Attempt, generator: random.Random) -> dict[str, Any]:
    """The row of an earlier attempt. Its id and key are only the same everywhere, not those that the job derives."""
    subscription = attempt.subscription
    plan, currency = subscription.plan, subscription.currency
    attempt_id, key = (uuid.UUID(int=generator.getrandbits(128), version=4) for _ in range(2))
    metadata = {
        "renewal_attempt_id": str(attempt_id),
        "subscription_id": str(subscription.id),
        "period_start": subscription.ended_at.isoformat(),
        **metadata_of(subscription.user_id, plan),
    }
    body = {
        "amount": {"value": plan.price(currency), "currency": currency},
        "capture": True,
        "payment_method_id": subscription.method_id,
        "metadata": metadata,
    }
    is_closed = attempt.reason is not None
    return {
        "id": attempt_id,
        "subscription_id": subscription.id,
        "period_start": subscription.ended_at,
        "number": attempt.number,
        "state": attempt.state,
        "idempotence_key": key,
        "body": json.dumps(body),
        "amount": Decimal(plan.price(currency)),
        "currency": currency,
        "user_id": subscription.user_id,
        "plan_id": plan.id,
        "payment_provider_id": 1,
        "payment_method_id": subscription.method_id,
        "shop_id": SHOP_ID,
        "period_count": plan.count,
        "period_unit": plan.unit,
        "planned_at": attempt.sent_at,
        "first_sent_at": attempt.sent_at,
        "last_sent_at": attempt.sent_at,
        "first_absent_at": attempt.absent_since,
        "sends": 1,
        "external_payment_id": None if attempt.state == "UNKNOWN" else attempt.external_id,
        "decline_party": "payment_network" if is_closed else None,
        "decline_reason": attempt.reason,
        "decline_class": attempt.decline_class,
        "closed_at": attempt.sent_at if is_closed else None,
        "run_id": "an earlier run",
    }


def _charged(attempt: Attempt, row: dict[str, Any]) -> dict[str, Any]:
    """The provider's payment for an attempt."""
    body = json.loads(row["body"])
    return {
        "id": attempt.external_id,
        "amount": body["amount"]["value"],
        "currency": row["currency"],
        "created_at": iso(attempt.sent_at),
        "captured_at": iso(attempt.charged_at or attempt.sent_at),
        "metadata": body["metadata"],
        "method_id": row["payment_method_id"],
        "saved": True,
    }
