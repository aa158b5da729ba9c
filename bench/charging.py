"""Charging (point 4): `Charging.run` over N due subscriptions against a slow provider.

Beside it, in turn: what a user would otherwise write, a pool of `max_concurrency` threads, each with a keep-alive
`http.client` connection and a database connection: one INSERT ahead of the send, one POST of the same bytes, then the
payment's INSERT and the subscription's UPDATE in one transaction. That has no audit trail, no settlement record, no
re-check, no locks: it is the least that a charge can cost.
"""

from __future__ import annotations

import http.client
import json
import queue
import statistics
import threading
import time
from base64 import b64encode
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from urllib.parse import urlsplit

import psycopg

from bench.measuring import Round, Row, interleaved, ratio, run_module, values
from bench.provider import provider
from bench.stage import Database

UTC = timezone.utc
NOW = datetime.now(UTC).replace(microsecond=0)
_AUTHORIZATION = "Basic " + b64encode(b"100500:live_bench").decode()


def fill(url: str, count: int) -> None:
    """`count` subscriptions that end today, each paid once with a card that the provider has saved."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "TRUNCATE subscriptions, payments, plans, prices, payment_providers RESTART IDENTITY CASCADE"
        )
        connection.execute(
            "TRUNCATE billing_orchestration.renewal_attempts, billing_orchestration.settlements,"
            " billing_orchestration.audit_trail, billing_orchestration.saved_methods CASCADE"
        )
        connection.execute(
            "INSERT INTO payment_providers (name, is_active, created_at, updated_at) VALUES ('p', true, now(), now())"
        )
        connection.execute(
            "INSERT INTO plans (name, is_active, is_recurring, duration, duration_unit, created_at, updated_at)"
            " VALUES ('monthly', true, true, 1, 'month', now(), now())"
        )
        connection.execute("INSERT INTO prices (plan_id, currency, amount) VALUES (1, 'RUB', 299.00)")
        connection.execute(
            "INSERT INTO subscriptions (user_id, status, started_at, ended_at, plan_id, created_at, updated_at)"
            " SELECT 'user-' || n, 'ACTIVE', %(now)s - interval '90 days', %(now)s - n * interval '1 ms', 1, %(now)s,"
            " %(now)s FROM generate_series(1, %(count)s) n",
            {"now": NOW.replace(tzinfo=None), "count": count},
        )
        connection.execute(
            "INSERT INTO payments (subscription_id, payment_provider_id, payment_method, status, currency, amount,"
            " external_payment_id, created_at, updated_at)"
            " SELECT n, 1, 'BANK_CARD', 'SUCCEEDED', 'RUB', 299.00, 'method-' || n, %(then)s, %(then)s"
            " FROM generate_series(1, %(count)s) n",
            {"then": (NOW - timedelta(days=30)).replace(tzinfo=None), "count": count},
        )
        connection.execute("VACUUM ANALYZE")
        connection.execute("CHECKPOINT")


def plan(url: str) -> list[Any]:
    """The decisions, as the job makes them."""
    from billing_orchestration.database.engine import create_engine
    from billing_orchestration.database.renewals import fetch_due
    from billing_orchestration.domain.answers import ProviderView
    from billing_orchestration.domain.billing_calendar import BillingCalendar
    from billing_orchestration.domain.renewals import RenewalRules, decide_renewals

    calendar = BillingCalendar(UTC)
    engine = create_engine(url)
    with engine.connect() as connection:
        found = fetch_due(
            connection,
            over_before=NOW + timedelta(days=1),
            oldest=NOW - timedelta(days=30),
            today=NOW - timedelta(hours=12),
        )
    engine.dispose()
    rules = RenewalRules(calendar, 3, 30, "1")
    return decide_renewals(found.due, found.open_attempts, ProviderView(), now=NOW, rules=rules)


def ours(url: str, api_url: str, concurrency: int) -> dict[str, float]:
    """One run of the protocol."""
    import billing_orchestration.provider.sdk  # noqa: F401 - imports are not counted, here as elsewhere
    from billing_orchestration.database.audit import Stamp
    from billing_orchestration.jobs.autopayment.charging import Charging
    from billing_orchestration.jobs.autopayment.pace import ChargingLimits
    from billing_orchestration.jobs.autopayment.pipeline import Pipeline
    from billing_orchestration.provider.client import PaymentProvider
    from billing_orchestration.resources import BillingDatabase
    from billing_orchestration.settings import Settings
    from billing_orchestration.threads import OF_THE_SYSTEM

    settings = Settings(
        _env_file=None,  # type: ignore[call-arg]
        billing_database_url=url,
        yookassa_shop_id="100500",
        yookassa_secret_key="live_bench",
        yookassa_api_url=api_url,
    )
    decisions = plan(url)
    database = BillingDatabase(lambda: settings)
    _ = database.engine
    client = PaymentProvider(
        shop_id="100500",
        secret_key="live_bench",
        api_url=api_url,
        max_connections=max(64, concurrency),
    )

    class Watched:
        is_live = True
        charge_done_s = client.charge_done_s
        rate = client.rate

        def create_payment(self, body: str, key: str, before_send: Any = None) -> Any:
            payment = client.create_payment(body, key, before_send)
            answered[payment.id] = time.monotonic()
            return payment

    class Timed(Charging):
        def conclude(self, connection: Any, answers: Any) -> Any:
            for answer, result in super().conclude(connection, answers):
                # Right after the commit of its transaction.
                committed[answer.id] = time.monotonic()
                yield answer, result

    answered: dict[str, float] = {}
    committed: dict[str, float] = {}
    charging = Timed(
        database=database,
        provider=Watched(),
        make_stamp=lambda: Stamp("autopayment_job", "bench", datetime.now(UTC)),
        log=lambda _: None,
    )
    pipeline = Pipeline(charging, ChargingLimits(concurrency, 3, 2.0), OF_THE_SYSTEM)
    cpu, began = time.process_time(), time.monotonic()
    results = pipeline.run(decisions)
    wall_s, cpu_s = time.monotonic() - began, time.process_time() - cpu
    charged = sum(result.outcome == "charged" for result in results)
    assert charged == len(decisions), [result for result in results if result.outcome != "charged"][:3]
    database.close()
    client.close()
    return _numbers(wall_s, cpu_s, answered, committed)


def _numbers(wall_s: float, cpu_s: float, answered: dict[str, float], committed: dict[str, float]) -> dict[str, float]:
    lags = sorted(committed[id_] - at for id_, at in answered.items())
    # The steady state: between the first and the last tenth of the commits. What remains is the start (one alone, then
    # doubling) and the end (the last one of all), which do not grow with the number of charges.
    ends = sorted(committed.values())
    tenth = len(ends) // 10
    steady = (len(ends) - 2 * tenth - 1) / (ends[-tenth - 1] - ends[tenth]) if tenth else 0.0
    return {
        "charges": len(lags),
        "wall_s": wall_s,
        "per_s": len(lags) / wall_s,
        "steady_per_s": steady,
        "cpu_ms": cpu_s / len(lags) * 1000,
        "lag_p50_ms": statistics.median(lags) * 1000,
        "lag_p95_ms": lags[int(len(lags) * 0.95)] * 1000,
    }


_PLANNED = """
    INSERT INTO billing_orchestration.renewal_attempts
        (id, subscription_id, period_start, number, state, idempotence_key, body, amount, currency, user_id, plan_id,
         payment_provider_id, payment_method_id, planned_at, first_sent_at, last_sent_at, sends, run_id)
    VALUES (%s, %s, %s, 1, 'PLANNED', %s, %s, %s, 'RUB', %s, 1, 1, %s, %s, %s, %s, 1, 'bench')
"""
_PAID = """
    INSERT INTO payments (subscription_id, payment_provider_id, payment_method, status, currency, amount,
                          external_payment_id, created_at, updated_at)
    VALUES (%s, 1, 'BANK_CARD', 'SUCCEEDED', 'RUB', %s, %s, %s, %s)
"""
_EXTENDED = """
    UPDATE subscriptions SET ended_at = ended_at + interval '1 month', updated_at = %s WHERE id = %s AND ended_at = %s
"""


def bare(url: str, api_url: str, concurrency: int) -> dict[str, float]:
    """The least a charge can cost: the same bytes, and three statements."""
    decisions = plan(url)
    work: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for decision in decisions:
        work.put(decision.attempt)
    answered: dict[str, float] = {}
    committed: dict[str, float] = {}

    def worker() -> None:
        parts = urlsplit(api_url)
        sender = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=40)
        with psycopg.connect(url) as connection, suppress(queue.Empty):
            while True:
                _charge_barely(connection, sender, f"{parts.path}/payments", work.get_nowait(), answered, committed)
        sender.close()

    threads = [threading.Thread(target=worker) for _ in range(concurrency)]
    cpu, began = time.process_time(), time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return _numbers(time.monotonic() - began, time.process_time() - cpu, answered, committed)


def _charge_barely(
    connection: psycopg.Connection[Any],
    sender: http.client.HTTPConnection,
    path: str,
    attempt: Any,
    answered: dict[str, float],
    committed: dict[str, float],
) -> None:
    """One charge. `answered` and `committed` take the instants by the payment's id."""
    now, start = datetime.now(UTC), attempt.period_start.replace(tzinfo=None)
    connection.execute(
        _PLANNED,
        (attempt.id, attempt.subscription_id, start, attempt.idempotence_key, attempt.body, attempt.money.amount,
         attempt.user_id, attempt.payment_method_id, now, now, now),
    )  # fmt: skip
    connection.commit()
    headers = {
        "Authorization": _AUTHORIZATION,
        "Idempotence-Key": str(attempt.idempotence_key),
        "Content-Type": "application/json",
    }
    sender.request("POST", path, attempt.body.encode(), headers)
    payment = json.loads(sender.getresponse().read())
    answered[payment["id"]] = time.monotonic()
    now = datetime.now(UTC).replace(tzinfo=None)
    amount = Decimal(payment["amount"]["value"])
    connection.execute(_PAID, (attempt.subscription_id, amount, payment["id"], now, now))
    connection.execute(_EXTENDED, (now, attempt.subscription_id, start))
    connection.commit()
    committed[payment["id"]] = time.monotonic()


def measure(server: Database, rounds: int, count: int, concurrency: int) -> tuple[dict[str, list[Round]], list[Row]]:
    """The rounds and the table's lines, at 300 and at 100 ms."""
    rounds_of: dict[str, list[Round]] = {}
    rows: list[Row] = []
    for latency_s in (0.3, 0.1):
        with provider(latency_s) as api_url:

            def side(who: str, api_url: str = api_url) -> Mapping[str, float]:
                fill(server.url("billing"), count)
                return run_module("bench.charging", who, server.url("billing"), api_url, concurrency).told

            done = interleaved(rounds, {"ours": lambda: side("ours"), "bare": lambda: side("bare")})
        name = f"{latency_s * 1000:.0f} ms"
        rounds_of[name] = done
        ideal = concurrency / latency_s
        what = f"charging {count:,}, {name}, {concurrency} in flight"
        limit = f"max_concurrency / latency = {ideal:.0f}/s"
        for side_name, told in (("ours", what), ("bare", f"bare client, {name}")):
            goal = "≥ 0.9" if side_name == "ours" else ""
            steady = tuple(value / ideal for value in values(done, "steady_per_s", side_name))
            whole = tuple(value / ideal for value in values(done, "per_s", side_name))
            rows.append(Row(f"{told}: throughput, steady", limit, goal, steady))
            rows.append(Row(f"{told}: throughput with start and end", limit, "", whole))
        rows.append(
            Row(f"{what}: CPU a charge", "bare POST and 3 statements", "≤ 1.3", ratio(done, "cpu_ms", "ours", "bare"))
        )
        rows.append(Row(f"{what}: answer to commit, p95", "", "< 50 ms", values(done, "lag_p95_ms", "ours"), " ms"))
        rows.append(
            Row(f"bare client, {name}: answer to commit, p95", "", "", values(done, "lag_p95_ms", "bare"), " ms")
        )
    return rounds_of, rows


def main(arguments: Sequence[str]) -> None:
    """One measurement in a process of its own: WHO URL API_URL CONCURRENCY; prints its numbers as JSON."""
    who, url, api_url, concurrency = arguments
    print(json.dumps({"ours": ours, "bare": bare}[who](url, api_url, int(concurrency))))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
