"""The start of a run: its process imports the definitions of all jobs, so they load nothing that only one needs."""

from __future__ import annotations

import json
import subprocess
import sys

# What any Dagster process has loaded by then, whatever its jobs are; then what our definitions add to it.
ADDED = """
import json, sys
import dagster._cli, dagster_postgres
def packages():
    return {name.partition(".")[0] for name in sys.modules}
before = packages()
import billing_orchestration.definitions
print(json.dumps(sorted(packages() - before - sys.stdlib_module_names)))
"""
# The driver, the client's HTTP with its certificates, and the settings.
EXPECTED = {"billing_orchestration", "psycopg", "psycopg_binary", "urllib3", "certifi", "pydantic_settings"}


def test_a_run_loads_no_library_that_only_some_runs_need() -> None:
    """Pandas, apprise, matplotlib, openpyxl, the SDK with requests, the clusters' clients: at their first use."""
    run = subprocess.run([sys.executable, "-c", ADDED], check=True, capture_output=True, text=True)

    assert set(json.loads(run.stdout)) - EXPECTED == set()
