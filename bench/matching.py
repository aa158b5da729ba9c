"""Matching (point 3): matching_pending_payments_job over a long slice, against a bare client and one statement.

Ours is the whole job in Dagster, in one process with the run history in memory, imports not counted: read every page of
both lists, look the payments up, decide, settle the ones to be repaired with their audit trail. Theirs reads the same
pages, one after the other, over one keep-alive connection, and writes one UPDATE that makes the rows SUCCEEDED and one
INSERT of their subscriptions: no checks, no records.
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import psycopg

from bench import plans
from bench.measuring import Round, Row, interleaved, memory_mib, ratio, run_module, values
from bench.provider import History, payment_id, provider
from bench.stage import Database, analyze

START = datetime(2026, 3, 1, tzinfo=timezone.utc)
LATENCY_S = 0.02
# Each job with the op that tells how many it has repaired.
JOBS = {
    "pending": ("matching_pending_payments_job", "apply_pending_matches"),
    "successful": ("matching_successful_payments_job", "apply_successful_matches"),
}


def history(count: int) -> History:
    """`count` payments spread evenly over an hour."""
    return History(count, START.isoformat(), 3600 / count)


def fill(url: str, count: int, repair: int, table: int) -> None:
    """A payments table of `table` rows; `count` of them are in the slice: `repair` are PENDING, the others granted."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO payment_providers (name, is_active, created_at, updated_at) VALUES ('p', true, now(), now())"
        )
        connection.execute(
            "INSERT INTO plans (name, is_active, is_recurring, duration, duration_unit, created_at, updated_at)"
            " VALUES ('monthly', true, true, 1, 'month', now(), now())"
        )
        connection.execute(
            "INSERT INTO subscriptions (user_id, status, started_at, ended_at, plan_id, created_at, updated_at)"
            " SELECT 'user-' || n, 'ACTIVE', %(at)s, %(at)s + interval '1 month', 1, %(at)s, %(at)s"
            " FROM generate_series(0, %(count)s - 1) n",
            {"at": START.replace(tzinfo=None), "count": count},
        )
        connection.execute(
            "INSERT INTO payments (payment_provider_id, payment_method, status, currency, amount, external_payment_id,"
            " created_at, updated_at)"
            " SELECT 1, 'BANK_CARD', 'SUCCEEDED', 'RUB', 299.00, 'old-' || n, %s - n * interval '1 s', %s"
            " FROM generate_series(1, %s) n",
            (START.replace(tzinfo=None) - timedelta(days=1), START.replace(tzinfo=None), table - count),
        )
        every = max(1, count // repair)
        with connection.cursor().copy(
            "COPY payments (subscription_id, payment_provider_id, payment_method, status, currency, amount,"
            " external_payment_id, created_at, updated_at) FROM STDIN"
        ) as rows:
            for number in range(count):
                at = (START + timedelta(hours=number / count)).replace(tzinfo=None)
                is_to_repair = number % every == 0 and number // every < repair
                status, granted = ("PENDING", None) if is_to_repair else ("SUCCEEDED", number + 1)
                rows.write_row((granted, 1, "BANK_CARD", status, "RUB", "299.00", payment_id(number), at, at))
    analyze(url)


def ours(url: str, api_url: str, which: str = "pending") -> int:
    """The whole job, in this process; how many payments it has repaired."""
    import dagster as dg

    from billing_orchestration.definitions import build_definitions
    from billing_orchestration.jobs.run_report import read_result
    from billing_orchestration.settings import Settings

    settings = Settings(
        _env_file=None,  # type: ignore[call-arg]
        billing_database_url=url,
        yookassa_shop_id="100500",
        yookassa_secret_key="live_bench",
        yookassa_api_url=api_url,
    )
    as_of = START + timedelta(hours=1)
    job, last_op = JOBS[which]
    definitions = build_definitions(load=lambda: settings, now=lambda: as_of, database_now=lambda _: as_of)
    with dg.DagsterInstance.ephemeral() as instance:
        result = definitions.get_job_def(job).execute_in_process(
            instance=instance, run_config={"resources": {"run": {"config": {"as_of": as_of.isoformat()}}}}
        )
        for event in result.all_events:
            if event.event_type_value == "STEP_OUTPUT" and event.step_key == last_op:
                return read_result(str(event.step_output_data.metadata["result"].value))["applied"]
    return 0


def bare(url: str, api_url: str) -> int:
    """What a script would do."""
    parts = urlsplit(api_url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=15)
    end = START + timedelta(hours=1)
    paid: dict[str, tuple[str, str]] = {}
    for name in ("created_at", "captured_at"):
        filters = {"limit": "100", "status": "succeeded", f"{name}.gte": _text(START), f"{name}.lte": _text(end)}
        cursor = None
        while True:
            query = urlencode({**filters, **({"cursor": cursor} if cursor else {})})
            connection.request("GET", f"{parts.path}/payments?{query}")
            page = json.loads(connection.getresponse().read())
            for item in page["items"]:
                paid[item["id"]] = (item["metadata"]["user_id"], item["metadata"]["plan_id"])
            cursor = page.get("next_cursor")
            if not cursor:
                break
    ids = list(paid)
    with psycopg.connect(url) as database:
        return database.execute(
            """
            WITH there AS (
                SELECT * FROM unnest(%s::text[], %s::text[], %s::int[]) AS t (id, user_id, plan_id)
            ), done AS (
                UPDATE payments p SET status = 'SUCCEEDED', updated_at = now() FROM there
                WHERE p.external_payment_id = there.id AND p.status = 'PENDING' RETURNING there.user_id, there.plan_id
            )
            INSERT INTO subscriptions (user_id, status, started_at, ended_at, plan_id, created_at, updated_at)
            SELECT user_id, 'ACTIVE', now(), now() + interval '1 month', plan_id, now(), now() FROM done
            """,
            (ids, [paid[id_][0] for id_ in ids], [int(paid[id_][1]) for id_ in ids]),
        ).rowcount


def _text(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%S.000Z")


def measure(
    server: Database, folder: Path, rounds: int, count: int, repair: int, table: int
) -> tuple[list[Round], list[Row]]:
    """The rounds and the table's lines."""
    fill(server.create("matching", "billing"), count, repair, table)
    plans.keep(folder, "matching", plans.of_matching(server.url("matching"), START, count))
    with provider(LATENCY_S, history(count)) as api_url:

        def side(who: str) -> Mapping[str, float]:
            told = run_module("bench.matching", who, server.create("work", "matching"), api_url).told
            assert told["rows"] == repair, told
            return told

        done = interleaved(rounds, {"ours": lambda: side("pending"), "bare": lambda: side("bare")})
    server.drop("work")
    server.drop("matching")
    what = f"matching {count:,} provider payments, {repair:,} to repair, {table:,} rows"
    rows = [
        Row(f"{what}: wall", "the same pages, one statement", "≤ 1.5", ratio(done, "wall_s", "ours", "bare")),
        Row("the same: CPU of the process", "the same pages, one statement", "", ratio(done, "cpu_s", "ours", "bare")),
        Row("the same: memory", "", "≤ 400 MiB", values(done, "memory_mib", "ours"), " MiB"),
    ]
    return done, rows


def main(arguments: Sequence[str]) -> None:
    """WHO URL API_URL, who being bare, or one of the two jobs; imports are not counted."""
    import billing_orchestration.database.settling
    import billing_orchestration.definitions
    import billing_orchestration.provider.client  # noqa: F401

    who, url, api_url = arguments
    cpu_s, began = time.process_time(), time.monotonic()
    rows = bare(url, api_url) if who == "bare" else ours(url, api_url, who)
    told = {"wall_s": time.monotonic() - began, "cpu_s": time.process_time() - cpu_s, "memory_mib": memory_mib()}
    print(json.dumps({**told, "rows": rows}))


if __name__ == "__main__":
    main(sys.argv[1:])
