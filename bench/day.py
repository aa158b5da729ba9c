"""A quiet day of the two matching jobs: ticks that look first against ticks that each start a run.

All 1,440 ticks of a simulated day go through the schedules' own functions in one process, as in a code server; a run
that they start is played in simulated time, uncounted, so that the watermark moves. What a run costs is measured apart,
as a process of its own (`dagster job execute`), and counted as often as one was started. Every payment of the day is
settled on both sides. What the daemon does for each tick is the same in either way, and left out.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import psycopg

from bench.measuring import ROOT, Round, Row, ratio, run, values
from bench.provider import History, payment_id, provider
from bench.stage import Database, analyze

DAY = datetime(2026, 3, 11, tzinfo=timezone.utc)
TICKS = 720
PAYMENTS_A_DAY = 288
JOBS = ("matching_pending_payments_job", "matching_successful_payments_job")


def fill(url: str, history: History) -> None:
    """Every payment of the provider's is SUCCEEDED here, with its subscription."""
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
            {"at": DAY.replace(tzinfo=None), "count": history.count},
        )
        at = datetime.fromisoformat(history.start).replace(tzinfo=None)
        rows = [
            (number + 1, payment_id(number), at + timedelta(seconds=history.step_s * number))
            for number in range(history.count)
        ]
        with connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO payments (subscription_id, payment_provider_id, payment_method, status, currency, amount,"
                " external_payment_id, created_at, updated_at)"
                " VALUES (%s, 1, 'BANK_CARD', 'SUCCEEDED', 'RUB', 299.00, %s, %s, now())",
                rows,
            )
    analyze(url)


def measure(server: Database, rounds: int) -> tuple[list[Round], list[Row]]:
    """The rounds and the table's lines."""
    home = Path(tempfile.mkdtemp(prefix="billing-bench-home-"))
    shutil.copy(ROOT / "deploy" / "dagster.yaml", home)
    # From the hour before the day on.
    start = DAY - timedelta(hours=1)
    history = History(PAYMENTS_A_DAY * 25 // 24, start.isoformat(), 86400 / PAYMENTS_A_DAY)
    fill(server.create("day", "billing"), history)
    done: list[Round] = []
    try:
        with provider(0.02, history) as api_url:
            env = {
                **os.environ,
                "PYTHONDONTWRITEBYTECODE": "",
                "DAGSTER_HOME": str(home),
                "DAGSTER_POSTGRES_URL": server.create("dagster"),
                "BILLING_DATABASE_URL": server.url("day"),
                "YOOKASSA_SHOP_ID": "100500",
                "YOOKASSA_SECRET_KEY": "live_bench",
                "YOOKASSA_API_URL": api_url,
            }
            run([sys.executable, "-m", __name__, "2"], env=env)  # compiles, and creates the history's tables
            for number in range(rounds):
                with psycopg.connect(server.url("day"), autocommit=True) as connection:
                    connection.execute("DELETE FROM billing_orchestration.watermarks")
                looks = run([sys.executable, "-m", __name__, str(TICKS)], env=env).told
                command = [sys.executable, "-m", "dagster", "job", "execute", "-m", "billing_orchestration.definitions"]
                run_s = sum(run([*command, "-j", job], env=env).cpu_s for job in JOBS) / len(JOBS)
                done.append(_compared(looks, run_s))
                print(f"  round {number + 1} of {rounds}: {json.dumps(done[-1])}", flush=True)
    finally:
        server.drop("dagster")
        server.drop("day")
        shutil.rmtree(home, ignore_errors=True)
    quiet = f"a quiet day, {PAYMENTS_A_DAY} payments, all settled"
    return done, [
        Row(f"{quiet}: CPU of looks and runs", "MATCHING_LOOK_FIRST=off", "≤ 0.067", ratio(done, "cpu_s", "on", "off")),
        Row(f"{quiet}: runs, and so run history", "MATCHING_LOOK_FIRST=off", "≤ 0.1", ratio(done, "runs", "on", "off")),
        Row("CPU of such a day's looks and runs", "", "", values(done, "cpu_s", "on"), " s"),
        Row("CPU of a look", "", "", values(done, "look_ms", "on"), " ms"),
        Row("CPU of a run, from its process's start to its end", "", "", values(done, "run_s", "off"), " s"),
    ]


def _compared(looks: dict[str, float], run_s: float) -> Round:
    ticks = TICKS * len(JOBS)
    return {
        "on": {
            "cpu_s": looks["cpu_s"] + looks["runs"] * run_s,
            "runs": looks["runs"],
            "look_ms": looks["cpu_s"] / ticks * 1000,
        },
        "off": {"cpu_s": ticks * run_s, "runs": ticks, "run_s": run_s},
    }


def main(arguments: Sequence[str]) -> None:
    """TICKS: evaluate so many ticks of both schedules, print their CPU and how many runs they started."""
    import dagster as dg

    from billing_orchestration.definitions import build_definitions

    now = DAY
    definitions = build_definitions(now=lambda: now, database_now=lambda _: now)
    wanted = {
        job: definitions.resolve_schedule_def(f"{job.removesuffix('_job')}_every_2_minutes_schedule") for job in JOBS
    }
    resources: dict[str, Any] = dict(definitions.resources or {})
    spent, runs = 0.0, 0
    with dg.DagsterInstance.get() as instance, dg.DagsterInstance.ephemeral() as uncounted:
        for _ in range(int(arguments[0])):
            now += timedelta(minutes=2)
            for job, schedule in wanted.items():
                began = time.process_time()
                with dg.build_schedule_context(
                    instance=instance,
                    scheduled_execution_time=now,
                    resources={name: resources[name] for name in schedule.required_resource_keys},
                ) as context:
                    found = schedule(context)
                spent += time.process_time() - began
                if isinstance(found, dg.RunRequest):
                    runs += 1
                    definitions.get_job_def(job).execute_in_process(
                        instance=uncounted,
                        run_config={**found.run_config, "loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
                        tags={"dagster/schedule_name": schedule.name},
                    )
    print(json.dumps({"cpu_s": spent, "runs": runs}))


if __name__ == "__main__":
    main(sys.argv[1:])
