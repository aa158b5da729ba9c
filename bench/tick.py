"""A tick that finds nothing (point 1): a matching job's process against that of an empty job, in one deployment.

Both are `dagster job execute` with the run history in PostgreSQL, the in-process executor and values handed over in
memory; wall and CPU seconds are those of the whole process, from its start to its end. The empty job stands alone in
its module, and a second time in ours (`empty_job_here`): there it has loaded all that our definitions load, and gains
what they gain by taking imports away from the garbage collector.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from bench.measuring import ROOT, Round, Row, interleaved, ratio, run, values
from bench.provider import provider
from bench.stage import Database

JOBS = ("matching_pending_payments_job", "matching_successful_payments_job")


def measure(server: Database, rounds: int) -> tuple[list[Round], list[Row]]:
    """The rounds and the table's lines."""
    home = Path(tempfile.mkdtemp(prefix="billing-bench-home-"))
    shutil.copy(ROOT / "deploy" / "dagster.yaml", home)
    history = server.create("dagster")
    try:
        with provider(0.02) as api_url:
            env = {
                **os.environ,
                "PYTHONDONTWRITEBYTECODE": "",
                "DAGSTER_HOME": str(home),
                "DAGSTER_POSTGRES_URL": history,
                "BILLING_DATABASE_URL": server.url("billing"),
                "YOOKASSA_SHOP_ID": "100500",
                "YOOKASSA_SECRET_KEY": "live_bench",
                "YOOKASSA_API_URL": api_url,
            }

            def execute(module: str, job: str) -> Mapping[str, float]:
                spent = run([sys.executable, "-m", "dagster", "job", "execute", "-m", module, "-j", job], env=env)
                return {"wall_s": spent.wall_s, "cpu_s": spent.cpu_s, "memory_mib": spent.memory_mib}

            sides = {
                "empty": lambda: execute("bench.empty_job", "empty_job"),
                "here": lambda: execute("bench.empty_job_here", "empty_job"),
                **{job: (lambda job=job: execute("billing_orchestration.definitions", job)) for job in JOBS},
            }
            for side in sides.values():
                side()  # the first ones write .pyc files and create the run history's tables
            done = interleaved(rounds, sides)
    finally:
        server.drop("dagster")
        shutil.rmtree(home, ignore_errors=True)
    rows = []
    for job in JOBS:
        rows.append(
            Row(f"{job}, nothing to do: CPU", "an empty job of 4 ops", "≤ 1.15", ratio(done, "cpu_s", job, "empty"))
        )
        rows.append(
            Row(f"{job}, nothing to do: wall", "an empty job of 4 ops", "", ratio(done, "wall_s", job, "empty"))
        )
        rows.append(
            Row(f"{job}, nothing to do: CPU", "an empty one in our definitions", "", ratio(done, "cpu_s", job, "here"))
        )
    rows.append(Row("an empty job of 4 ops: CPU seconds", "", "", values(done, "cpu_s", "empty"), " s"))
    return done, rows
