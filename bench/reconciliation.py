"""Reconciliation: a stretch of days on both sides, against reading the same pages and rows bare.

Ours is what `billing-orchestration reconcile` does, imports not counted: read both lists of payments and the refunds of
each day, the rows of the day and of the same payments, join them, put each line into its class, add up. Theirs reads
the same pages, one after the other over one keep-alive connection, and the same rows, and keeps a day of them.
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from urllib.parse import urlencode, urlsplit

import psycopg

from bench.measuring import Round, Row, interleaved, memory_mib, ratio, run_module, values
from bench.provider import History, payment_id, provider
from bench.stage import Database, analyze

START = datetime(2026, 3, 1, tzinfo=timezone.utc)
DAY_S = 86_400
LATENCY_S = 0.02
A_DAY = timedelta(days=1)


def history(days: int, count: int) -> History:
    """`count` payments a day, spread evenly."""
    return History(days * count, START.isoformat(), DAY_S / count)


def fill(url: str, days: int, count: int, older: int = 0) -> None:
    """The rows of the same payments, all SUCCEEDED and linked; before them, `older` rows of earlier days."""
    at = START.replace(tzinfo=None)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO payment_providers (name, is_active, created_at, updated_at) VALUES ('p', true, now(), now())"
        )
        connection.execute(
            "INSERT INTO subscriptions (user_id, status, created_at, updated_at) VALUES ('u', 'ACTIVE', now(), now())"
        )
        connection.execute(
            "INSERT INTO payments (subscription_id, payment_provider_id, payment_method, status, currency, amount,"
            " external_payment_id, created_at, updated_at)"
            " SELECT 1, 1, 'BANK_CARD', 'SUCCEEDED', 'RUB', 299.00, 'old-' || n, at, at FROM ("
            "  SELECT n, %s::timestamp - interval '2 days' - n * interval '1 s' AS at"
            "  FROM generate_series(1, %s) n) AS numbered",
            (at, older),
        )
        with connection.cursor().copy(
            "COPY payments (subscription_id, payment_provider_id, payment_method, status, currency, amount,"
            " external_payment_id, created_at, updated_at) FROM STDIN"
        ) as rows:
            for number in range(days * count):
                instant = at + timedelta(seconds=number * DAY_S / count)
                rows.write_row((1, 1, "BANK_CARD", "SUCCEEDED", "RUB", "299.00", payment_id(number), instant, instant))
    analyze(url)


def ours(url: str, api_url: str, days: int) -> int:
    """The command's own work, in this process; how many lines agree."""
    from billing_orchestration.database.engine import create_engine
    from billing_orchestration.desk.reconciling import Wanted, reconcile_period
    from billing_orchestration.desk.resolving import Desk
    from billing_orchestration.domain.billing_calendar import BillingCalendar
    from billing_orchestration.resources import connect_provider
    from billing_orchestration.settings import Settings

    settings = Settings(
        _env_file=None,  # type: ignore[call-arg]
        billing_database_url=url,
        yookassa_shop_id="100500",
        yookassa_secret_key="live_bench",
        yookassa_api_url=api_url,
    )
    now = START + days * A_DAY
    engine = create_engine(settings.billing_database_url)
    desk = Desk(engine, lambda: connect_provider(settings), BillingCalendar(timezone.utc), settings, lambda: now)
    told, agrees = reconcile_period(desk, Wanted(START.date(), (now - A_DAY).date()))
    engine.dispose()
    assert agrees, told
    return int(told[0].partition(": ")[2].split(" ")[0])


def bare(url: str, api_url: str, days: int) -> int:
    """What a script would read; how many rows fit a payment."""
    parts = urlsplit(api_url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=15)
    agreed = 0
    with psycopg.connect(url) as database:
        for number in range(days):
            start = START + number * A_DAY
            end = start + A_DAY - timedelta(milliseconds=1)
            there: dict[str, str] = {}
            for what, name in (("payments", "created_at"), ("payments", "captured_at"), ("refunds", "created_at")):
                filters = {"limit": "100", f"{name}.gte": _text(start), f"{name}.lte": _text(end)}
                cursor = None
                while True:
                    query = urlencode({**filters, **({"cursor": cursor} if cursor else {})})
                    connection.request("GET", f"{parts.path}/{what}?{query}")
                    page = json.loads(connection.getresponse().read())
                    for item in page["items"]:
                        there[item["id"]] = item["amount"]["value"]
                    cursor = page.get("next_cursor")
                    if not cursor:
                        break
            rows: dict[int, tuple[str, str]] = {}
            columns = "SELECT id, external_payment_id, amount::text FROM payments"
            bounds = (start.replace(tzinfo=None), (start + A_DAY).replace(tzinfo=None)) * 2
            for statement, bound in (
                (
                    f"{columns} WHERE created_at >= %s AND created_at < %s OR updated_at >= %s AND updated_at < %s",
                    bounds,
                ),
                (f"{columns} WHERE external_payment_id = ANY(%s)", (list(there),)),
            ):
                for id_, name, amount in database.execute(statement, bound):
                    rows[id_] = name, amount
            agreed += sum(there.get(name) == amount for name, amount in rows.values())
    return agreed


def _text(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%S.") + f"{at.microsecond // 1000:03d}Z"


def measure(server: Database, rounds: int, days: int, count: int) -> tuple[list[Round], list[Row]]:
    """The rounds and the table's lines."""
    url = server.create("reconciliation", "billing")
    fill(url, days, count)
    with provider(LATENCY_S, history(days, count)) as api_url:

        def side(who: str) -> Mapping[str, float]:
            told = run_module("bench.reconciliation", who, url, api_url, days).told
            assert told["lines"] == days * count, told
            return told

        done = interleaved(rounds, {"ours": lambda: side("ours"), "bare": lambda: side("bare")})
    server.drop("reconciliation")
    what = f"reconciling {days} days of {count:,} payments on both sides"
    return done, [
        Row(f"{what}: wall", "the same pages and rows", "≤ 1.5", ratio(done, "wall_s", "ours", "bare")),
        Row("the same: CPU of the process", "the same pages and rows", "", ratio(done, "cpu_s", "ours", "bare")),
        Row("the same: memory", "", "≤ 1024 MiB", values(done, "memory_mib", "ours"), " MiB"),
    ]


def main(arguments: Sequence[str]) -> None:
    """WHO URL API_URL DAYS, who being ours or bare; imports are not counted."""
    import billing_orchestration.desk.reconciling
    import billing_orchestration.provider.client  # noqa: F401

    who, url, api_url, days = arguments
    cpu_s, began = time.process_time(), time.monotonic()
    lines = (bare if who == "bare" else ours)(url, api_url, int(days))
    told = {"wall_s": time.monotonic() - began, "cpu_s": time.process_time() - cpu_s, "memory_mib": memory_mib()}
    print(json.dumps({**told, "lines": lines}))


if __name__ == "__main__":
    main(sys.argv[1:])
