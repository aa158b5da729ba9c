"""Beyond one process (point 6): whole runs of autopayment_job, in one piece, in shards, and in two processes.

All are `dagster job execute` with the run history in PostgreSQL and the same limits for the run as a whole
(`max_concurrency`); what differs is how the deployment divides them. CPU seconds are those of all processes of the
run, memory is that of its largest one, both as last seen in /proc (its processes are not all children of the first).
The rate is that of the charges, from the first to the last that was settled, so that the start of processes does not
count against it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psycopg

from bench.charging import fill
from bench.measuring import ROOT, Round, Row, interleaved, ratio, values
from bench.provider import provider
from bench.stage import Database

LATENCY_S = 0.1
# Where one process is the limit, and no longer the provider: 256 in flight at 20 ms would be 12,800 charges a second.
SHORT_LATENCY_S, MOST_IN_FLIGHT = 0.02, 256
SHARDS = 2

# How the deployment of each is set up; the limits are of the op that charges.
DEPLOYMENTS: Mapping[str, Mapping[str, str]] = {
    "in one piece": {},
    "in shards, one process": {"RENEWAL_SHARDS": str(SHARDS)},
    "in shards, two processes": {"RENEWAL_SHARDS": str(SHARDS), "RENEWAL_SHARDS_AT_ONCE": "2"},
}


def measure(server: Database, rounds: int, count: int, concurrency: int) -> tuple[list[Round], list[Row]]:
    """The rounds and the table's lines: first where the provider is the limit, then where one process is."""
    done = _rounds(server, rounds, count, concurrency, LATENCY_S, list(DEPLOYMENTS))
    whole, *_, two = DEPLOYMENTS
    bound = _rounds(server, rounds, count, MOST_IN_FLIGHT, SHORT_LATENCY_S, [whole, two])
    faster = ratio(bound, "per_s", two, whole)
    what = f"{count:,} renewals, {MOST_IN_FLIGHT} in flight at 20 ms, two processes: charges a second"
    return [*done, *bound], [*_rows(done, count, concurrency), Row(what, "one process", "≥ 1.5", faster)]


def _rounds(
    server: Database, rounds: int, count: int, concurrency: int, latency_s: float, names: Sequence[str]
) -> list[Round]:
    home = Path(tempfile.mkdtemp(prefix="billing-bench-home-"))
    shutil.copy(ROOT / "deploy" / "dagster.yaml", home)
    history = server.create("dagster")
    url = server.url("billing")
    try:
        with provider(latency_s) as api_url:
            env = {
                **os.environ,
                "PYTHONDONTWRITEBYTECODE": "",
                "DAGSTER_HOME": str(home),
                "DAGSTER_POSTGRES_URL": history,
                "BILLING_DATABASE_URL": url,
                "YOOKASSA_SHOP_ID": "100500",
                "YOOKASSA_SECRET_KEY": "live_bench",
                "YOOKASSA_API_URL": api_url,
            }

            def execute(name: str) -> Mapping[str, float]:
                fill(url, count)
                op = "renew_shard" if DEPLOYMENTS[name] else "charge_renewals"
                config = home / "run.yaml"
                config.write_text(f"ops: {{{op}: {{config: {{max_concurrency: {concurrency}}}}}}}")
                command = [sys.executable, "-m", "dagster", "job", "execute", "-m", "billing_orchestration.definitions"]
                spent = _watched([*command, "-j", "autopayment_job", "-c", str(config)], {**env, **DEPLOYMENTS[name]})
                return {**spent, "per_s": _rate(url, count)}

            return interleaved(rounds, {name: (lambda name=name: execute(name)) for name in names})
    finally:
        server.drop("dagster")
        shutil.rmtree(home, ignore_errors=True)


def _rows(done: list[Round], count: int, concurrency: int) -> list[Row]:
    ideal = concurrency / LATENCY_S
    rows = []
    for name in DEPLOYMENTS:
        what = f"{count:,} renewals {name}"
        rate = tuple(value / ideal for value in values(done, "per_s", name))
        rows.append(Row(f"{what}: throughput", f"max_concurrency / latency = {ideal:.0f}/s", "", rate))
        rows.append(Row(f"{what}: memory of the largest process", "", "", values(done, "memory_mib", name), " MiB"))
        if name != "in one piece":
            against = f"{count:,} in one piece"
            rows.append(Row(f"{what}: wall, the whole run", against, "", ratio(done, "wall_s", name, "in one piece")))
            rows.append(Row(f"{what}: CPU, the whole run", against, "", ratio(done, "cpu_s", name, "in one piece")))
    return rows


def _watched(command: Sequence[str], env: Mapping[str, str]) -> dict[str, float]:
    """Run a command to its end in a session of its own; look at every process of that session while it runs."""
    began = time.monotonic()
    cpu_s: dict[int, float] = {}
    memory_mib: dict[int, float] = {}
    with tempfile.TemporaryFile("w+") as words:
        process = subprocess.Popen(
            command,
            env=dict(env),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        while process.poll() is None:
            for pid in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
                try:
                    if os.getsid(pid) == process.pid:
                        cpu_s[pid], peak = _used(pid)
                        memory_mib[pid] = max(peak, memory_mib.get(pid, 0.0))
                except (ProcessLookupError, FileNotFoundError):
                    continue  # it ended in between: what was seen last counts
            time.sleep(0.1)
        if process.returncode != 0:
            words.seek(0)
            raise RuntimeError(f"{' '.join(command)[:200]} ended with {process.returncode}:\n{words.read()[-3000:]}")
    return {
        "wall_s": time.monotonic() - began,
        "cpu_s": sum(cpu_s.values()),
        "memory_mib": max(memory_mib.values()),
        "processes": len(cpu_s),
    }


def _used(pid: int) -> tuple[float, float]:
    """CPU seconds, and the most memory in MiB, of a process. Raises FileNotFoundError when it is gone."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    peak_kib = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), 0)
    return ticks / os.sysconf("SC_CLK_TCK"), peak_kib / 1024


def _rate(url: str, count: int) -> float:
    """Charges a second between the first and the last one that was settled. Raises unless each was, once."""
    with psycopg.connect(url) as connection:
        row = connection.execute(
            "SELECT count(*), extract(epoch FROM max(settled_at) - min(settled_at))"
            " FROM billing_orchestration.settlements WHERE kind = 'renewed'"
        ).fetchone()
    assert row is not None
    assert row[0] == count, f"{row[0]} of {count} were charged"
    return float((count - 1) / row[1])
