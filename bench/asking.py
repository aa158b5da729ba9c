"""What is asked again and again of years of rows: the money checks, the numbers over time, and `doctor`.

Three years of a service, spread evenly: every payment is granted, every second one by a settlement with its attempt; of
each thousand, one waited in quarantine. What is measured is the database work of one look, imports not counted.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta, timezone

import psycopg
import sqlalchemy as sa

from bench.stage import analyze

NOW = datetime(2026, 3, 12, 12, 0, tzinfo=timezone.utc)
_YEARS = timedelta(days=3 * 365)

_FILL = (
    "INSERT INTO payment_providers (name, is_active, created_at, updated_at) VALUES ('p', true, now(), now())",
    """
    INSERT INTO subscriptions (user_id, status, started_at, ended_at, created_at, updated_at)
    SELECT 'user-' || n, 'ACTIVE', at, at + interval '3 years', at, at
    FROM generate_series(1, greatest(1, %(size)s / 10)) n, (SELECT CAST(%(start)s AS timestamp) AS at) AS spread
    """,
    """
    INSERT INTO payments (subscription_id, payment_provider_id, payment_method, status, currency, amount,
                          external_payment_id, created_at, updated_at)
    SELECT 1 + n %% greatest(1, %(size)s / 10), 1, 'BANK_CARD', 'SUCCEEDED', 'RUB', 299, 'paid-' || n, at, at
    FROM generate_series(1, %(size)s) n, LATERAL (
        SELECT CAST(%(start)s AS timestamp) + n * (CAST(%(years)s AS interval) / %(size)s) AS at) AS spread
    """,
    """
    INSERT INTO billing_orchestration.renewal_attempts (
        id, subscription_id, period_start, number, state, idempotence_key, body, amount, currency, user_id, plan_id,
        payment_provider_id, payment_method_id, planned_at, first_sent_at, last_sent_at, sends, external_payment_id,
        closed_at, run_id)
    SELECT gen_random_uuid(), subscription_id, created_at, 1, 'SUCCEEDED', gen_random_uuid(), '{}', 299, 'RUB', 'user',
           1, 1, 'card', at, at, at, 1, external_payment_id, at, 'bench'
    FROM payments, LATERAL (SELECT created_at AT TIME ZONE 'UTC' AS at) AS began WHERE id %% 2 = 0 ORDER BY id
    """,
    """
    INSERT INTO billing_orchestration.settlements (
        external_payment_id, kind, payment_id, subscription_id, attempt_id, amount, currency, period_start, settled_at,
        run_id)
    SELECT a.external_payment_id, 'renewed', p.id, p.subscription_id, a.id, 299, 'RUB', a.period_start, a.closed_at,
           'bench'
    FROM billing_orchestration.renewal_attempts a JOIN payments p USING (external_payment_id) ORDER BY p.id
    """,
    """
    INSERT INTO billing_orchestration.quarantine
        (problem_key, kind, reason, external_payment_id, evidence, job, run_id, opened_at, resolved_at, resolution)
    SELECT 'payment ' || external_payment_id || ':amount', 'amount', 'reason', external_payment_id, '{}', 'job',
           'bench', created_at AT TIME ZONE 'UTC', created_at AT TIME ZONE 'UTC', 'settled'
    FROM payments WHERE id %% 1000 = 0 ORDER BY id
    """,
)


def fill(url: str, size: int) -> None:
    """`size` payments, half as many settlements and attempts, a thousandth of it in quarantine."""
    bound = {"size": size, "start": (NOW - _YEARS).replace(tzinfo=None), "years": _YEARS}
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in _FILL:
            connection.execute(statement, bound)
    analyze(url)


def money_checks(connection: sa.Connection) -> None:
    """All of them; each must hold, since nothing is wrong there."""
    from billing_orchestration.jobs.money_checks import CHECKS

    for check in CHECKS:
        verdict = check.ask(connection, NOW)
        assert verdict.passed, (check.name, verdict)


def numbers(connection: sa.Connection) -> None:
    """What is plotted over time."""
    from billing_orchestration.database import money_checks

    assert money_checks.numbers(connection, NOW)


def doctor(connection: sa.Connection) -> None:
    """What it asks of the database."""
    from billing_orchestration.desk.doctor import DATABASE_CHECKS

    for look in DATABASE_CHECKS:
        list(look(connection, lambda: NOW))


ASKED: Mapping[str, Callable[[sa.Connection], None]] = {
    "money_checks": money_checks,
    "numbers": numbers,
    "doctor": doctor,
}


def main(arguments: Sequence[str]) -> None:
    """WHAT URL: ask once, and print the seconds."""
    import billing_orchestration.desk.doctor
    import billing_orchestration.jobs.money_checks  # noqa: F401
    from billing_orchestration.database.engine import create_engine, read

    what, url = arguments
    engine = create_engine(url)
    with read(engine) as connection:
        connection.execute(sa.text("SELECT 1"))
        began = time.monotonic()
        ASKED[what](connection)
        wall_s = time.monotonic() - began
    engine.dispose()
    print(json.dumps({"wall_s": wall_s}))


if __name__ == "__main__":
    main(sys.argv[1:])
