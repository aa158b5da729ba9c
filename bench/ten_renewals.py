"""An ordinary run (point 3): ten renewals, against an empty Dagster job in the same deployment.

Both are `dagster job execute`, from the start of the process to its end, with the run history in PostgreSQL and the
in-process executor. The provider answers after 20 ms. What the renewals add is what is left after Dagster's own start.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import psycopg

from bench import charging
from bench.measuring import ROOT, Round, Row, interleaved, ratio, run, values
from bench.provider import provider
from bench.stage import Database

RENEWALS = 10
_CHARGED = "SELECT count(*) FROM billing_orchestration.settlements WHERE kind = 'renewed'"


def measure(server: Database, rounds: int) -> tuple[list[Round], list[Row]]:
    """The rounds and the table's lines."""
    home = Path(tempfile.mkdtemp(prefix="billing-bench-home-"))
    shutil.copy(ROOT / "deploy" / "dagster.yaml", home)
    url = server.create("renewals", "billing")
    try:
        with provider(0.02) as api_url:
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

            def execute(module: str, job: str) -> Mapping[str, float]:
                spent = run([sys.executable, "-m", "dagster", "job", "execute", "-m", module, "-j", job], env=env)
                return {"wall_s": spent.wall_s, "cpu_s": spent.cpu_s}

            def renew() -> Mapping[str, float]:
                charging.fill(url, RENEWALS)
                spent = execute("billing_orchestration.definitions", "autopayment_job")
                with psycopg.connect(url) as connection:
                    charged = connection.execute(_CHARGED).fetchone()
                if charged != (RENEWALS,):
                    raise RuntimeError(f"{charged} of {RENEWALS} subscriptions were renewed")
                return spent

            sides = {"empty": lambda: execute("bench.empty_job", "empty_job"), "ours": renew}
            for side in sides.values():
                side()  # the first ones write .pyc files and create the run history's tables
            done = interleaved(rounds, sides)
    finally:
        server.drop("dagster")
        server.drop("renewals")
        shutil.rmtree(home, ignore_errors=True)
    what = "ten renewals, from the process's start to its end"
    return done, [
        Row(f"{what}: wall", "an empty job of 4 ops", "≤ 1.1", ratio(done, "wall_s", "ours", "empty")),
        Row(f"{what}: CPU", "an empty job of 4 ops", "", ratio(done, "cpu_s", "ours", "empty")),
        Row("an empty job of 4 ops: wall seconds", "", "", values(done, "wall_s", "empty"), " s"),
    ]
