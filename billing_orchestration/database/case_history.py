"""Everything that the database knows about one customer's case, found by the ids that belong together. Read-only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from billing_orchestration.database.conventions import of_this_shop

# More than one customer has in years, and than a person on the phone can read.
_MOST_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Case:
    """Rows as they are; `audit` and `problems` in the order they were written.

    A payment and an attempt say whether they are this shop's (`is_ours`). `provider_ids`: what this shop's provider can
    be asked about.
    """

    subscriptions: Sequence[Any] = ()
    payments: Sequence[Any] = ()
    attempts: Sequence[Any] = ()
    settlements: Sequence[Any] = ()
    problems: Sequence[Any] = ()
    audit: Sequence[Any] = ()
    provider_ids: Sequence[str] = field(default_factory=list)


_IS_PROVIDER_ID = sa.text("""
    SELECT 1 FROM payments WHERE external_payment_id = :id
    UNION ALL SELECT 1 FROM billing_orchestration.settlements WHERE external_payment_id = :id
    UNION ALL SELECT 1 FROM billing_orchestration.renewal_attempts WHERE external_payment_id = :id
    UNION ALL SELECT 1 FROM billing_orchestration.quarantine WHERE external_payment_id = :id
    LIMIT 1
""")
_IS_ROW_ID = sa.text("SELECT 1 FROM payments WHERE id = :id")
# Ends as text: a real database holds dates that Python has no datetime for.
_SUBSCRIPTIONS = """
    SELECT s.id, s.user_id, s.status::text AS status, s.started_at::text AS started_at, s.ended_at::text AS ended_at,
           s.plan_id, p.name AS plan, p.is_recurring, s.created_at
    FROM subscriptions s LEFT JOIN plans p ON p.id = s.plan_id WHERE s.id = ANY(:ids) ORDER BY s.id
"""
_IS_OURS = f"{of_this_shop('payment_provider_id')} AS is_ours"
_PAYMENTS = f"""
    SELECT *, {_IS_OURS} FROM payments
    WHERE external_payment_id = :external OR id = :row OR subscription_id = :subscription ORDER BY created_at, id
"""
_ATTEMPTS = f"""
    SELECT *, {_IS_OURS} FROM billing_orchestration.renewal_attempts
    WHERE external_payment_id = ANY(:externals) OR id = ANY(:ids) OR subscription_id = :subscription ORDER BY planned_at
"""
_SETTLEMENTS = """
    SELECT * FROM billing_orchestration.settlements
    WHERE external_payment_id = ANY(:externals) OR subscription_id = :subscription ORDER BY settled_at
"""
_PROBLEMS = """
    SELECT * FROM billing_orchestration.quarantine
    WHERE external_payment_id = ANY(:externals) OR payment_id = ANY(:payments)
       OR subscription_id = :subscription OR attempt_id = ANY(:attempts) ORDER BY id
"""
# Two look-ups instead of one OR, which no index would serve. An entry that both of them find comes once.
_AUDIT = """
    SELECT * FROM billing_orchestration.audit_trail WHERE external_payment_id = ANY(:externals)
    UNION SELECT a.* FROM billing_orchestration.audit_trail a
        JOIN unnest(CAST(:entities AS text[]), CAST(:ids AS text[])) AS wanted (entity, entity_id)
          ON a.entity = wanted.entity AND a.entity_id = wanted.entity_id
    ORDER BY id
"""


def find_payment(connection: sa.Connection, name: str) -> str | int | None:
    """What a payment's name means: the provider's id (text), or a row's id (int) if nothing has that provider id."""
    if connection.execute(_IS_PROVIDER_ID, {"id": name}).first() is not None:
        return name
    may_be_row = name.isascii() and name.isdigit() and len(name) <= 9
    if may_be_row and connection.execute(_IS_ROW_ID, {"id": int(name)}).first() is not None:
        return int(name)
    return None


def case_of_payment(connection: sa.Connection, external_id: str | None, row_id: int | None) -> Case:
    """The case of one payment: its rows, the attempt and the subscription that it belongs to."""
    payments = _rows(connection, _PAYMENTS, external=external_id, row=row_id, subscription=None)
    externals = _external_ids(payments, [] if external_id is None else [external_id])
    settlements = _rows(connection, _SETTLEMENTS, externals=externals, subscription=None)
    problems = _problems(connection, externals, payments)
    attempt_ids = {row.attempt_id for row in (*settlements, *problems) if row.attempt_id is not None}
    attempts = _rows(connection, _ATTEMPTS, externals=externals, ids=sorted(attempt_ids), subscription=None)
    subscription_ids = {row.subscription_id for row in (*payments, *settlements, *attempts, *problems)} - {None}
    return Case(
        subscriptions=_rows(connection, _SUBSCRIPTIONS, ids=sorted(subscription_ids)),
        payments=payments,
        attempts=attempts,
        settlements=settlements,
        problems=problems,
        audit=_audit(
            connection,
            externals,
            {"payment": _ids(payments), "attempt": _ids(attempts), "quarantine": _ids(problems)},
        ),
        provider_ids=_of_this_shop(externals, (*payments, *attempts)),
    )


def case_of_subscription(connection: sa.Connection, subscription_id: int) -> Case:
    """The case of one subscription: everything that was ever paid, tried, granted or questioned for it."""
    subscriptions = _rows(connection, _SUBSCRIPTIONS, ids=[subscription_id])
    payments = _rows(connection, _PAYMENTS, external=None, row=None, subscription=subscription_id)
    attempts = _rows(connection, _ATTEMPTS, externals=[], ids=[], subscription=subscription_id)
    settlements = _rows(connection, _SETTLEMENTS, externals=[], subscription=subscription_id)
    externals = _external_ids([*payments, *attempts, *settlements])
    problems = _problems(connection, externals, payments, attempts, subscription_id)
    externals = _external_ids(problems, externals)
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
                "subscription": [subscription_id],  # also one that the service has deleted
                "payment": _ids(payments),
                "attempt": _ids(attempts),
                "quarantine": _ids(problems),
            },
        ),
        provider_ids=_of_this_shop(externals, (*payments, *attempts)),
    )


def _rows(connection: sa.Connection, statement: str, **values: Any) -> list[Any]:
    return list(connection.execute(sa.text(f"{statement} LIMIT {_MOST_ROWS}"), values))


def _ids(rows: Sequence[Any]) -> list[Any]:
    return [row.id for row in rows]


def _external_ids(rows: Sequence[Any], known: Sequence[str] = ()) -> list[str]:
    return sorted({*known, *(row.external_payment_id for row in rows if row.external_payment_id)})


def _of_this_shop(externals: Sequence[str], rows: Sequence[Any]) -> list[str]:
    """Without the ids that only rows of another shop carry."""
    ours = {row.external_payment_id for row in rows if row.is_ours is not False}
    elsewhere = {row.external_payment_id for row in rows if row.is_ours is False}
    return [id_ for id_ in externals if id_ in ours or id_ not in elsewhere]


def _problems(
    connection: sa.Connection,
    externals: Sequence[str],
    payments: Sequence[Any],
    attempts: Sequence[Any] = (),
    subscription_id: int | None = None,
) -> list[Any]:
    return _rows(
        connection,
        _PROBLEMS,
        externals=list(externals),
        payments=_ids(payments),
        attempts=_ids(attempts),
        subscription=subscription_id,
    )


def _audit(connection: sa.Connection, externals: Sequence[str], entities: Mapping[str, Sequence[Any]]) -> list[Any]:
    """The entries about these provider payments, and about each entity's ids."""
    pairs = [(entity, str(id_)) for entity, ids in entities.items() for id_ in ids]
    return _rows(
        connection,
        _AUDIT,
        externals=list(externals),
        entities=[entity for entity, _ in pairs],
        ids=[entity_id for _, entity_id in pairs],
    )
