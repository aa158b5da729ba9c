"""Everything that the database knows of one customer's case, by the ids that belong together. It reads only."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

# Of one customer, over years: more than a person on the phone reads, and a bound on a wrong id.
_MOST_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Case:
    """Rows as they are; `audit` and `problems` in the order they were written."""

    subscriptions: Sequence[Any] = ()
    payments: Sequence[Any] = ()
    attempts: Sequence[Any] = ()
    settlements: Sequence[Any] = ()
    problems: Sequence[Any] = ()
    audit: Sequence[Any] = ()
    provider_ids: Sequence[str] = field(default_factory=list)


def find_payment(connection: sa.Connection, name: str) -> str | int | None:
    """What a payment's name means: the provider's id (text), or a row's id (int) if nothing has that provider id."""
    known = connection.execute(
        sa.text("""
            SELECT 1 FROM payments WHERE external_payment_id = :id
            UNION ALL SELECT 1 FROM billing_orchestration.settlements WHERE external_payment_id = :id
            UNION ALL SELECT 1 FROM billing_orchestration.renewal_attempts WHERE external_payment_id = :id
            UNION ALL SELECT 1 FROM billing_orchestration.quarantine WHERE external_payment_id = :id
            LIMIT 1
        """),
        {"id": name},
    ).first()
    if known is not None or not (name.isascii() and name.isdigit() and len(name) <= 9):
        return name if known is not None else None
    row = connection.execute(sa.text("SELECT id FROM payments WHERE id = :id"), {"id": int(name)}).first()
    return None if row is None else int(row.id)


def case_of_payment(connection: sa.Connection, external_id: str | None, row_id: int | None) -> Case:
    """The case of one payment: its rows, the attempt and the subscription that it belongs to."""
    payments = _rows(
        connection,
        "SELECT * FROM payments WHERE external_payment_id = :external OR id = :row ORDER BY id",
        external=external_id,
        row=row_id,
    )
    named = {str(p.external_payment_id) for p in payments if p.external_payment_id}
    externals = sorted(named if external_id is None else named | {external_id})
    settlements = _rows(
        connection,
        "SELECT * FROM billing_orchestration.settlements WHERE external_payment_id = ANY(:ids) ORDER BY settled_at",
        ids=externals,
    )
    problems = _problems(connection, externals, [p.id for p in payments], [], [])
    attempt_ids = {row.attempt_id for row in (*settlements, *problems) if row.attempt_id is not None}
    attempts = _rows(
        connection,
        """SELECT * FROM billing_orchestration.renewal_attempts
           WHERE external_payment_id = ANY(:externals) OR id = ANY(:ids) ORDER BY planned_at""",
        externals=externals,
        ids=sorted(attempt_ids),
    )
    subscription_ids = {
        row.subscription_id
        for row in (*payments, *settlements, *attempts, *problems)
        if row.subscription_id is not None
    }
    return Case(
        subscriptions=_subscriptions(connection, sorted(subscription_ids)),
        payments=payments,
        attempts=attempts,
        settlements=settlements,
        problems=problems,
        audit=_audit(
            connection,
            externals,
            {
                "payment": [str(p.id) for p in payments],
                "attempt": [str(a.id) for a in attempts],
                "quarantine": [str(q.id) for q in problems],
            },
        ),
        provider_ids=externals,
    )


def case_of_subscription(connection: sa.Connection, subscription_id: int) -> Case:
    """The case of one subscription: everything that was ever paid, tried, granted or questioned for it."""
    subscriptions = _subscriptions(connection, [subscription_id])
    by_id = {"id": subscription_id}
    payments = _rows(connection, "SELECT * FROM payments WHERE subscription_id = :id ORDER BY created_at, id", **by_id)
    attempts = _rows(
        connection,
        "SELECT * FROM billing_orchestration.renewal_attempts WHERE subscription_id = :id ORDER BY planned_at",
        **by_id,
    )
    settlements = _rows(
        connection,
        "SELECT * FROM billing_orchestration.settlements WHERE subscription_id = :id ORDER BY settled_at",
        **by_id,
    )
    externals = sorted(
        {row.external_payment_id for row in (*payments, *attempts, *settlements) if row.external_payment_id is not None}
    )
    problems = _problems(connection, externals, [p.id for p in payments], [subscription_id], [a.id for a in attempts])
    externals = sorted({*externals, *(q.external_payment_id for q in problems if q.external_payment_id is not None)})
    return Case(
        subscriptions=subscriptions,
        payments=payments,
        attempts=attempts,
        settlements=settlements,
        problems=problems,
        audit=_audit(
            connection,
            externals,
            {
                "subscription": [str(subscription_id)],
                "payment": [str(p.id) for p in payments],
                "attempt": [str(a.id) for a in attempts],
                "quarantine": [str(q.id) for q in problems],
            },
        ),
        provider_ids=externals,
    )


def _rows(connection: sa.Connection, statement: str, **values: Any) -> list[Any]:
    return list(connection.execute(sa.text(f"{statement} LIMIT {_MOST_ROWS}"), values))


def _subscriptions(connection: sa.Connection, ids: Sequence[int]) -> list[Any]:
    # Ends as text: a real database holds dates that Python has no datetime for.
    return _rows(
        connection,
        """SELECT s.id, s.user_id, s.status::text AS status, s.started_at::text AS started_at,
                  s.ended_at::text AS ended_at, s.plan_id, p.name AS plan, p.is_recurring, s.created_at
           FROM subscriptions s LEFT JOIN plans p ON p.id = s.plan_id WHERE s.id = ANY(:ids) ORDER BY s.id""",
        ids=list(ids),
    )


def _problems(
    connection: sa.Connection,
    externals: Sequence[str],
    payment_ids: Sequence[int],
    subscription_ids: Sequence[int],
    attempt_ids: Sequence[uuid.UUID],
) -> list[Any]:
    return _rows(
        connection,
        """SELECT * FROM billing_orchestration.quarantine
           WHERE external_payment_id = ANY(:externals) OR payment_id = ANY(:payments)
              OR subscription_id = ANY(:subscriptions) OR attempt_id = ANY(:attempts) ORDER BY id""",
        externals=list(externals),
        payments=list(payment_ids),
        subscriptions=list(subscription_ids),
        attempts=list(attempt_ids),
    )


def _audit(connection: sa.Connection, externals: Sequence[str], entities: dict[str, list[str]]) -> list[Any]:
    pairs = [(entity, entity_id) for entity, ids in entities.items() for entity_id in ids]
    return _rows(
        connection,
        # Two look-ups instead of one OR, which no index would serve; an entry that both of them find comes once.
        """SELECT * FROM billing_orchestration.audit_trail WHERE external_payment_id = ANY(:externals)
           UNION SELECT a.* FROM billing_orchestration.audit_trail a
               JOIN unnest(CAST(:entities AS text[]), CAST(:ids AS text[])) AS wanted (entity, entity_id)
                 ON a.entity = wanted.entity AND a.entity_id = wanted.entity_id
           ORDER BY id""",
        externals=list(externals),
        entities=[entity for entity, _ in pairs],
        ids=[entity_id for _, entity_id in pairs],
    )
