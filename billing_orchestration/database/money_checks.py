"""The money's invariants and numbers, each one read-only statement. Asked hourly, and from the UI at any time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal

import sqlalchemy as sa

from billing_orchestration.database.conventions import naive_utc, of_this_shop, sql_list
from billing_orchestration.domain.attempts import KEY_LIFETIME, State
from billing_orchestration.domain.problem_kinds import IGNORED, SECOND_SUCCESS

# How far back a check looks: long enough for a weekend and a holiday. Settlements are found by their time.
LOOKS_BACK = timedelta(days=7)
# Two renewals of one period may lie a grace and a few retries apart.
LOOKS_BACK_FOR_TWINS = timedelta(days=60)
# There is a tick every two minutes: a lag of an hour is no slow run.
MATCHING_MAY_LAG = timedelta(hours=1)
# Yesterday is reconciled in the morning: by noon, whatever time zone a day is counted in.
RECONCILING_MAY_LAG = timedelta(hours=36)
_MOST_NAMED = 10


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an invariant holds; if not, how much breaks it, and the first few."""

    passed: bool
    broken: tuple[str, ...] = ()
    count: int = 0


_NOT_GRANTED = sa.text(f"""
    SELECT 'settled payment ' || s.external_payment_id || ': its row ' || s.payment_id || ' is '
           || coalesce(p.status::text, 'gone') AS what
    FROM billing_orchestration.settlements s
    -- A restored table gives its numbers anew: a row of that number may be another payment's by now.
    LEFT JOIN payments p ON p.id = s.payment_id AND p.external_payment_id = s.external_payment_id
    WHERE s.settled_at > :since AND (p.status IS NULL OR p.status NOT IN ('SUCCEEDED', 'REFUNDED'))
    UNION ALL
    SELECT 'attempt ' || a.id || ' of subscription ' || a.subscription_id || ' is ' || a.state
           || ' without a settlement'
    FROM billing_orchestration.renewal_attempts a
    WHERE a.state IN {sql_list(State.SUCCEEDED, State.REFUNDED)} AND a.closed_at > :since AND NOT EXISTS (
        SELECT FROM billing_orchestration.settlements s WHERE s.external_payment_id = a.external_payment_id)
    UNION ALL
    SELECT 'settled renewal ' || s.external_payment_id || ': its attempt is ' || a.state
    FROM billing_orchestration.settlements s JOIN billing_orchestration.renewal_attempts a ON a.id = s.attempt_id
    WHERE s.settled_at > :since AND a.state NOT IN {sql_list(State.SUCCEEDED, State.REFUNDED)}
    UNION ALL
    -- Without a unique index on the provider's id, a webhook that takes no lock can grant a payment beside a run.
    SELECT 'settled payment ' || s.external_payment_id || ' of subscription ' || s.subscription_id
           || ' is granted a second time: row ' || p.id || ' of subscription ' || p.subscription_id
    FROM billing_orchestration.settlements s
    JOIN payments p ON p.external_payment_id = s.external_payment_id AND p.id <> s.payment_id
    WHERE s.settled_at > :since AND s.kind <> 'refunded' AND p.status = 'SUCCEEDED'
      AND p.subscription_id <> s.subscription_id AND {of_this_shop("p.payment_provider_id")}
    UNION ALL
    -- The webhook died half-way, and no matching run has seen the payment since. What a person set aside is no news.
    SELECT 'payment ' || p.id || coalesce(' (' || p.external_payment_id || ')', '') || ' is SUCCEEDED, '
           || 'and granted to nobody: it is linked to no subscription'
    FROM payments p
    WHERE p.status = 'SUCCEEDED' AND p.subscription_id IS NULL
      AND {of_this_shop("p.payment_provider_id")}
      AND greatest(p.created_at, p.updated_at) > :naive_since AND greatest(p.created_at, p.updated_at) < :naive_recent
      AND NOT EXISTS (
        SELECT FROM billing_orchestration.settlements s WHERE s.external_payment_id = p.external_payment_id)
      AND NOT EXISTS (
        SELECT FROM payments o WHERE o.external_payment_id = p.external_payment_id AND o.id <> p.id
          AND {of_this_shop("o.payment_provider_id")}
          AND (o.status = 'REFUNDED' OR (o.status = 'SUCCEEDED' AND o.subscription_id IS NOT NULL)))
      AND NOT EXISTS (
        SELECT FROM billing_orchestration.quarantine q
        WHERE q.external_payment_id = p.external_payment_id AND q.resolution = '{IGNORED}')
""")

_OLD_UNKNOWN = sa.text(f"""
    SELECT 'attempt ' || number || ' of subscription ' || subscription_id || ', first sent '
           || to_char(first_sent_at, 'YYYY-MM-DD HH24:MI') || ' UTC' AS what
    FROM billing_orchestration.renewal_attempts
    WHERE state IN {sql_list(State.PLANNED, State.UNKNOWN)} AND first_sent_at < :since ORDER BY first_sent_at
""")

_PAID_TWICE = sa.text(f"""
    SELECT 'subscription ' || subscription_id || ', period from ' || period_start || ': ' || count(*) || ' renewals'
    FROM billing_orchestration.settlements
    WHERE kind = 'renewed' AND period_start IS NOT NULL AND settled_at > :since
    GROUP BY subscription_id, period_start HAVING count(*) > 1
    UNION ALL
    SELECT 'quarantine entry ' || id || ': ' || reason FROM billing_orchestration.quarantine
    WHERE resolved_at IS NULL AND kind = '{SECOND_SUCCESS}'
""")

_NOT_RECONCILED = sa.text("""
    SELECT 'day ' || day || ': ' || unexplained || ' of ' || differences || ' differences are before nobody (run '
           || run_id || ')' AS what
    FROM billing_orchestration.reconciled_days WHERE ends_at > :since AND unexplained > 0
    UNION ALL
    SELECT 'nothing from ' || to_char(ended_at, 'YYYY-MM-DD HH24:MI') || ' to '
           || to_char(starts_at, 'YYYY-MM-DD HH24:MI') || ' UTC was reconciled'
    FROM (SELECT starts_at, ends_at, lag(ends_at) OVER (ORDER BY ends_at) AS ended_at
          FROM billing_orchestration.reconciled_days) AS days
    WHERE ends_at > :since AND ended_at < starts_at
    UNION ALL
    SELECT 'nothing since ' || to_char(max(ends_at), 'YYYY-MM-DD HH24:MI') || ' UTC was reconciled'
    FROM billing_orchestration.reconciled_days HAVING max(ends_at) < :late
""")

_NOT_COVERED = sa.text("""
    SELECT job || ' has covered nothing since ' || to_char(covered_until, 'YYYY-MM-DD HH24:MI') || ' UTC' AS what
    FROM billing_orchestration.watermarks WHERE covered_until < :since AND job LIKE 'matching%' ORDER BY job
""")


def _ask(connection: sa.Connection, statement: sa.TextClause, since: datetime, **bounds: datetime) -> Verdict:
    broken = [str(what) for what in connection.execute(statement, {"since": since, **bounds}).scalars()]
    return Verdict(not broken, tuple(broken[:_MOST_NAMED]), len(broken))


def paid_is_granted(connection: sa.Connection, now: datetime) -> Verdict:
    """Every success has one grant: settlements, payment rows and closed attempts belong together."""
    since = now - LOOKS_BACK
    bounds = {"naive_since": naive_utc(since), "naive_recent": naive_utc(now - MATCHING_MAY_LAG)}
    return _ask(connection, _NOT_GRANTED, since, **bounds)


def no_old_unknown(connection: sa.Connection, now: datetime) -> Verdict:
    """No charge has an unknown outcome for longer than its key may be sent again."""
    return _ask(connection, _OLD_UNKNOWN, now - KEY_LIFETIME)


def no_second_success(connection: sa.Connection, now: datetime) -> Verdict:
    """No period was paid twice."""
    return _ask(connection, _PAID_TWICE, now - LOOKS_BACK_FOR_TWINS)


def matching_keeps_up(connection: sa.Connection, now: datetime) -> Verdict:
    """Both matching jobs have covered the last hour."""
    return _ask(connection, _NOT_COVERED, now - MATCHING_MAY_LAG)


def day_reconciled(connection: sa.Connection, now: datetime) -> Verdict:
    """Yesterday and the six days before were reconciled, and each difference is before a person.

    It looks back to the first day that was ever reconciled, and no further.
    """
    return _ask(connection, _NOT_RECONCILED, now - LOOKS_BACK, late=now - RECONCILING_MAY_LAG)


_NUMBERS = sa.text(f"""
    SELECT 'quarantine: open' AS name, count(*)::numeric AS value
    FROM billing_orchestration.quarantine WHERE resolved_at IS NULL
    UNION ALL
    SELECT 'unknown outcomes', count(*) FROM billing_orchestration.renewal_attempts
    WHERE state IN {sql_list(State.UNKNOWN, State.PLANNED)}
      AND (state = '{State.UNKNOWN}' OR first_sent_at IS NOT NULL)
    UNION ALL
    SELECT 'pending renewals', count(*) FROM billing_orchestration.renewal_attempts
    WHERE state = '{State.PENDING}'
    UNION ALL
    SELECT 'oldest unfinished payment, hours',
           coalesce(round(extract(epoch FROM CAST(:naive_now AS timestamp) - min(created_at))::numeric / 3600, 1), 0)
    -- Real data has '-infinity', which is no age. And a bound is what finds the oldest by its index.
    FROM payments WHERE status = 'PENDING' AND created_at > '-infinity' AND {of_this_shop("payment_provider_id")}
    UNION ALL
    SELECT 'granted in 24 h: ' || kind, count(*) FROM billing_orchestration.settlements
    WHERE settled_at > :day GROUP BY kind
    UNION ALL
    SELECT 'granted in 24 h, ' || currency, sum(amount) FROM billing_orchestration.settlements
    WHERE settled_at > :day AND kind <> 'refunded' GROUP BY currency
    UNION ALL
    SELECT 'declines in 24 h: ' || decline_class, count(*) FROM billing_orchestration.renewal_attempts
    WHERE last_sent_at > :day AND state IN {sql_list(State.DECLINED, State.STOPPED)}
      AND decline_class IS NOT NULL
    GROUP BY decline_class
""")


def numbers(connection: sa.Connection, now: datetime) -> Mapping[str, int | float]:
    """What is plotted over time."""
    day = now - timedelta(days=1)
    rows = connection.execute(_NUMBERS, {"naive_now": naive_utc(now), "day": day})
    values = {row.name: row.value if isinstance(row.value, Decimal) else Decimal(row.value) for row in rows}
    return {name: int(value) if value == value.to_integral_value() else float(value) for name, value in values.items()}
