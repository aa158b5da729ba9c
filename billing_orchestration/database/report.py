"""What the daily report counts, one statement a section. Each groups in the database, reads by an index, and shows no
customer.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from billing_orchestration.database.conventions import naive_utc, of_this_shop, sql_list
from billing_orchestration.domain.attempts import State

# How far back the report looks, and how far ahead.
LOOKS_BACK = timedelta(days=30)
LOOKS_AHEAD = timedelta(days=7)
_SLOWEST = 5

_DUE = sa.text("""
    SELECT CAST(s.ended_at AT TIME ZONE 'UTC' AT TIME ZONE :zone AS date) AS day, count(*) AS renewals
    FROM subscriptions s JOIN plans p ON p.id = s.plan_id
    WHERE s.status = 'ACTIVE' AND p.is_recurring AND s.ended_at >= :now AND s.ended_at < :until
    GROUP BY 1 ORDER BY 1
""")

_CHARGES = sa.text(f"""
    SELECT CAST(a.last_sent_at AT TIME ZONE :zone AS date) AS day,
           count(*) FILTER (WHERE a.state IN {sql_list(State.SUCCEEDED, State.REFUNDED)}) AS charged,
           count(*) FILTER (WHERE a.state IN {sql_list(State.DECLINED, State.STOPPED)}) AS declined,
           count(*) FILTER (WHERE a.state = '{State.REJECTED}') AS rejected,
           count(*) FILTER (WHERE a.state IN {sql_list(State.PLANNED, State.UNKNOWN, State.PENDING)}) AS open
    FROM billing_orchestration.renewal_attempts a
    WHERE a.last_sent_at > :since AND a.last_sent_at <= :now
    GROUP BY 1 ORDER BY 1
""")

# A period counts once, by the class of its first decline; it is recovered when a later attempt took the money.
_DUNNING = sa.text(f"""
    WITH declined AS (
        SELECT DISTINCT ON (a.subscription_id, a.period_start)
               a.subscription_id, a.period_start, a.number, a.decline_class, a.last_sent_at
        FROM billing_orchestration.renewal_attempts a
        WHERE a.last_sent_at > :since AND a.last_sent_at <= :now
          AND a.state IN {sql_list(State.DECLINED, State.STOPPED)} AND a.decline_class IS NOT NULL
        ORDER BY a.subscription_id, a.period_start, a.number
    ), outcomes AS (
        SELECT d.decline_class, min(b.last_sent_at) - d.last_sent_at AS after
        FROM declined d LEFT JOIN billing_orchestration.renewal_attempts b
          ON b.subscription_id = d.subscription_id AND b.period_start = d.period_start AND b.number > d.number
         AND b.state IN {sql_list(State.SUCCEEDED, State.REFUNDED)}
        GROUP BY d.subscription_id, d.period_start, d.decline_class, d.last_sent_at
    )
    SELECT decline_class AS class, count(*) AS declined, count(after) AS recovered,
           count(*) FILTER (WHERE after < interval '36 hours') AS after_1,
           count(*) FILTER (WHERE after < interval '60 hours') AS after_2,
           count(*) FILTER (WHERE after < interval '84 hours') AS after_3
    FROM outcomes GROUP BY 1 ORDER BY 1
""")

_REVENUE = sa.text("""
    SELECT CAST(settled_at AT TIME ZONE :zone AS date) AS day, currency,
           count(*) FILTER (WHERE kind <> 'refunded') AS payments,
           coalesce(sum(amount) FILTER (WHERE kind <> 'refunded'), 0) AS paid,
           coalesce(sum(amount) FILTER (WHERE kind = 'refunded'), 0) AS refunded
    FROM billing_orchestration.settlements
    WHERE settled_at > :since AND settled_at <= :now
    GROUP BY 1, 2 ORDER BY 1, 2
""")

_QUARANTINE = sa.text("""
    SELECT kind, count(*) FILTER (WHERE age < interval '1 day') AS day,
           count(*) FILTER (WHERE age >= interval '1 day' AND age < interval '7 days') AS week,
           count(*) FILTER (WHERE age >= interval '7 days') AS older
    FROM (SELECT kind, CAST(:at AS timestamptz) - opened_at AS age
          FROM billing_orchestration.quarantine WHERE resolved_at IS NULL) AS waiting
    GROUP BY kind ORDER BY kind
""")

# When the provider captured a payment is kept nowhere; its row has when the payment was made.
_SLOWEST_REPAIRS = sa.text(f"""
    SELECT s.payment_id AS payment, s.kind, s.settled_at - p.created_at AT TIME ZONE 'UTC' AS took
    FROM billing_orchestration.settlements s JOIN payments p ON p.id = s.payment_id
    WHERE s.settled_at > :since AND s.settled_at <= :now AND s.kind IN ('created', 'extended')
      AND {of_this_shop("p.payment_provider_id")}
    ORDER BY 3 DESC LIMIT {_SLOWEST}
""")

_UNKNOWN = sa.text(f"""
    SELECT currency, count(*) AS charges, sum(amount) AS amount, min(first_sent_at) AS oldest
    FROM billing_orchestration.renewal_attempts
    WHERE state IN {sql_list(State.PLANNED, State.UNKNOWN)} AND first_sent_at IS NOT NULL
    GROUP BY currency ORDER BY currency
""")


def _rows(connection: sa.Connection, statement: sa.TextClause, **bound: Any) -> Sequence[Any]:
    return connection.execute(statement, bound).all()


def renewals_due(connection: sa.Connection, now: datetime, zone: str) -> Sequence[Any]:
    """(day, renewals) of the next week, by billing day."""
    return _rows(connection, _DUE, zone=zone, now=naive_utc(now), until=naive_utc(now + LOOKS_AHEAD))


def charges_by_day(connection: sa.Connection, now: datetime, zone: str) -> Sequence[Any]:
    """(day, charged, declined, rejected, open) by the billing day of the last send."""
    return _rows(connection, _CHARGES, zone=zone, now=now, since=now - LOOKS_BACK)


def dunning(connection: sa.Connection, now: datetime) -> Sequence[Any]:
    """(class, declined, recovered, after_1, after_2, after_3): periods, and how many were paid so many days later."""
    return _rows(connection, _DUNNING, now=now, since=now - LOOKS_BACK)


def revenue_by_day(connection: sa.Connection, now: datetime, zone: str) -> Sequence[Any]:
    """(day, currency, payments, paid, refunded) of what these jobs settled, by billing day."""
    return _rows(connection, _REVENUE, zone=zone, now=now, since=now - LOOKS_BACK)


def quarantine_by_age(connection: sa.Connection, now: datetime) -> Sequence[Any]:
    """(kind, day, week, older): open entries that wait for less than a day, than a week, and longer."""
    return _rows(connection, _QUARANTINE, at=now)


def slowest_repairs(connection: sa.Connection, now: datetime) -> Sequence[Any]:
    """(payment row, kind, took): the grants by these jobs that came latest after the payment was made."""
    return _rows(connection, _SLOWEST_REPAIRS, now=now, since=now - LOOKS_BACK)


def unknown_outcomes(connection: sa.Connection) -> Sequence[Any]:
    """(currency, charges, amount, oldest) of charges whose outcome is not known."""
    return _rows(connection, _UNKNOWN)
