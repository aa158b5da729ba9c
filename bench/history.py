"""What a run leaves in the run history: rows, bytes and files, of a job of Dagster's defaults and of a matching tick.

Each side has a home and a PostgreSQL database of its own; one process executes all its runs. A run that the daemon
launches writes four rows more, on either side. Bytes are those of the tables with their indexes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import psycopg

from bench.measuring import ROOT, Row
from bench.provider import provider
from bench.stage import Database

RUNS = 60
_TABLES = ("event_logs", "runs", "run_tags", "asset_keys", "job_snapshots", "snapshots")
_DEFAULTS = "storage: {postgres: {postgres_url: {env: DAGSTER_POSTGRES_URL}}}\ntelemetry: {enabled: false}\n"
SIDES = {
    "defaults": ("bench.default_job", "default_job"),
    "matching tick": ("billing_orchestration.definitions", "matching_successful_payments_job"),
}


def measure(server: Database) -> tuple[dict[str, dict[str, float]], list[Row]]:
    """Numbers per run of each side, and the table's lines."""
    sides = {name: _side(server, name, *where) for name, where in SIDES.items()}
    before, ours = sides["defaults"], sides["matching tick"]
    rows = [
        Row(
            f"a matching tick that finds nothing: {what} per run",
            f"a job of Dagster's defaults: {before[what]:,.0f}",
            "",
            (ours[what],),
            unit,
        )
        for what, unit in (("event rows", ""), ("bytes", " B"), ("files", ""))
    ]
    return sides, rows


def _side(server: Database, name: str, module: str, job: str) -> dict[str, float]:
    home = Path(tempfile.mkdtemp(prefix="billing-bench-home-"))
    if name == "defaults":
        (home / "dagster.yaml").write_text(_DEFAULTS, encoding="utf-8")
    else:
        shutil.copy(ROOT / "deploy" / "dagster.yaml", home)
    url = server.create("dagster")
    try:
        with provider(0.0) as api_url, psycopg.connect(url, autocommit=True) as connection:
            env = {
                **os.environ,
                "DAGSTER_HOME": str(home),
                "DAGSTER_POSTGRES_URL": url,
                "BILLING_DATABASE_URL": server.url("billing"),
                "YOOKASSA_SHOP_ID": "100500",
                "YOOKASSA_SECRET_KEY": "live_bench",
                "YOOKASSA_API_URL": api_url,
            }
            _execute(env, module, job, 1)  # creates the tables
            rows, size, files = _count(connection, home)
            _execute(env, module, job, RUNS)
            rows_now, size_now, files_now = _count(connection, home)
    finally:
        server.drop("dagster")
        shutil.rmtree(home, ignore_errors=True)
    return {
        "event rows": (rows_now - rows) / RUNS,
        "bytes": (size_now - size) / RUNS,
        "files": (files_now - files) / RUNS,
    }


def _execute(env: dict[str, str], module: str, job: str, runs: int) -> None:
    subprocess.run(
        [sys.executable, "-m", "bench.history", module, job, str(runs)], env=env, cwd=ROOT, check=True, stderr=-3
    )


def _count(connection: psycopg.Connection[Any], home: Path) -> tuple[int, int, int]:
    [(rows,)] = connection.execute("SELECT count(*) FROM event_logs").fetchall()
    [(size,)] = connection.execute(
        "SELECT sum(pg_total_relation_size(to_regclass(name))) FROM unnest(%s::text[]) AS name", (list(_TABLES),)
    ).fetchall()
    files = sum(path.is_file() for path in home.rglob("*") if "schedules" not in path.parts)
    return int(rows), int(size), files


def _runs(module: str, job: str, runs: int) -> None:
    import dagster as dg

    def job_of() -> Any:
        return import_module(module).defs.get_repository_def().get_job(job)

    with dg.DagsterInstance.get() as instance:
        for _ in range(runs):
            if module == "bench.default_job":
                pointer = dg.reconstructable(import_module(module).default_job)
                result = dg.execute_job(pointer, instance)
            else:
                result = job_of().execute_in_process(instance=instance)
            if not result.success:
                sys.exit(f"a run of {job} failed")


if __name__ == "__main__":
    _runs(sys.argv[1], sys.argv[2], int(sys.argv[3]))
