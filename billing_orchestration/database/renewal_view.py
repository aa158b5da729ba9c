"""The service's own view on its renewals (`BILLING_RENEWAL_VIEW`): the method, the consent to charge it, the contact.

The jobs only read it. Its name was checked with the settings, so it may stand in a statement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache

import sqlalchemy as sa

from billing_orchestration.database.conventions import naive_utc, of_this_shop
from billing_orchestration.database.engine import translated
from billing_orchestration.database.errors import RowRefused, SchemaProblem
from billing_orchestration.domain.attempts import State
from billing_orchestration.domain.declines import HARD
from billing_orchestration.domain.methods import METHOD
from billing_orchestration.domain.renewals import SaidByService

# Name by kind of type, as PostgreSQL has them.
_COLUMNS = {"subscription_id": "N", "payment_method_id": "S", "may_charge": "B", "email": "S", "phone": "S"}
_WORDS = {"N": "a number", "S": "a text", "B": "a boolean"}

_FOUND = sa.text("""
    SELECT a.attname AS name, t.typcategory::text AS kind
    FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
    WHERE a.attrelid = to_regclass(:view) AND a.attnum > 0 AND NOT a.attisdropped
""")
_READABLE = sa.text("SELECT has_table_privilege(to_regclass(:view), 'SELECT')")


def check_view(connection: sa.Connection, view: str) -> None:
    """Raises SchemaProblem if the view is not there, lacks a column, or may not be read."""
    found = {row.name: row.kind for row in connection.execute(_FOUND, {"view": view})}
    if not found:
        raise SchemaProblem(
            f"BILLING_RENEWAL_VIEW: there is no view {view}. Nobody was charged. Create it (the runbook,"
            ' "Where card, contact and consent come from"), or leave the setting empty.'
        )
    wrong = [f"{name} ({_WORDS[kind]})" for name, kind in _COLUMNS.items() if found.get(name) != kind]
    if wrong:
        raise SchemaProblem(
            f"BILLING_RENEWAL_VIEW: the view {view} lacks {', '.join(wrong)}. Nobody was charged. Ask the service's"
            ' team to add what is missing (the runbook, "Where card, contact and consent come from").'
        )
    if not connection.execute(_READABLE, {"view": view}).scalar_one():
        raise SchemaProblem(
            f"BILLING_RENEWAL_VIEW: the role of BILLING_DATABASE_URL may not read the view {view}. Nobody was charged."
            f" Run: GRANT SELECT ON {view} TO that role."
        )


def methods_due(
    connection: sa.Connection, view: str, since: datetime, until: datetime, limit: int
) -> Mapping[int, str]:
    """The methods that the view names for subscriptions which end between these instants: the first few."""
    rows = connection.execute(
        sa.text(f"""
            -- One by one until there are enough: a join would read the view for all that end in these days.
            SELECT s.id, said.method_id
            FROM subscriptions s CROSS JOIN LATERAL (
                SELECT min(v.payment_method_id::text) AS method_id FROM {view} v
                WHERE v.subscription_id = s.id AND v.may_charge) said
            WHERE s.status = 'ACTIVE' AND s.ended_at >= :since AND s.ended_at < :until AND said.method_id IS NOT NULL
            ORDER BY s.ended_at, s.id LIMIT :size
        """),
        {"since": naive_utc(since), "until": naive_utc(until), "size": limit},
    )
    return {row.id: row.method_id for row in rows}


def stopped_at(method: str) -> str:
    """SQL: when a hard decline stopped a payment method of this shop, whosever charge it was; NULL if none did."""
    return f"""(
        SELECT max(h.last_sent_at) FROM billing_orchestration.renewal_attempts h
        WHERE h.payment_method_id = {method} AND h.state = '{State.STOPPED}' AND h.decline_class = '{HARD}'
          AND {of_this_shop("h.payment_provider_id")})"""


@lru_cache
def _said(view: str) -> sa.TextClause:
    return sa.text(f"""
        SELECT said.*, {stopped_at("said.method_id")} AS stopped_at, (
            SELECT min(m.answer) FROM billing_orchestration.asked_methods m
            WHERE m.about = '{METHOD}' AND m.name = said.method_id AND {of_this_shop("m.payment_provider_id")}
            ) AS answer
        FROM (
        SELECT v.subscription_id, count(*) AS rows, min(v.payment_method_id::text) AS method_id,
               bool_and(coalesce(v.may_charge, false)) AS may_charge, min(v.email::text) AS email,
               min(v.phone::text) AS phone
        FROM {view} v WHERE v.subscription_id = ANY(:ids) GROUP BY v.subscription_id) said
    """)


def read_view(connection: sa.Connection, view: str, subscription_ids: Sequence[int]) -> Mapping[int, SaidByService]:
    """What the service says about these subscriptions. One that it does not name is not among them.

    The view is the service's: a row that it fails for (a division, a cast) says so, and the others are read.
    """
    try:
        with translated(), connection.begin_nested():
            rows = connection.execute(_said(view), {"ids": list(subscription_ids)}).all()
    except RowRefused as refused:
        if len(subscription_ids) == 1:
            return {subscription_ids[0]: SaidByService(unreadable=str(refused))}
        half = len(subscription_ids) // 2
        parts = subscription_ids[:half], subscription_ids[half:]
        return {id_: said for part in parts for id_, said in read_view(connection, view, part).items()}
    return {
        row.subscription_id: SaidByService(
            row.rows, row.method_id, row.may_charge, row.email, row.phone, row.stopped_at, row.answer
        )
        for row in rows
    }
