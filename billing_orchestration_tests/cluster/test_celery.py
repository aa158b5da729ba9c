"""autopayment_job on two real Celery workers over a real Redis, from deploy/celery as a team deploys it.

Not part of `make test`: it needs Redis and the extras (`make cluster`).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path

import dagster as dg
import pytest
import sqlalchemy as sa

from billing_orchestration.jobs.money_checks import CHECKS
from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration_tests.jobs.service import Service
from billing_orchestration_tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
# As docs/deployment.md has it, from the project's folder.
HERE = "deploy/celery"
PATIENCE_S = 300.0
SHARDS = 4
# A dead worker's shard is taken over after so long.
TAKEN_OVER_S = 20


@dataclass
class Cluster:
    """Redis and workers of this test alone, with the deployment's settings."""

    folder: Path
    env: Mapping[str, str]
    stack: ExitStack
    workers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own, which ends with the test."""
        output = self.stack.enter_context((self.folder / f"{name}.log").open("ab"))
        process = subprocess.Popen(
            command,
            env=dict(self.env),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        self.stack.callback(kill, process)
        return process

    def add_worker(self, name: str) -> None:
        """Start a worker as deploy/celery says, and wait until it takes tasks."""
        command = ["-m", "celery", "-A", "dagster_celery.app", "worker", "-Q", "dagster"]
        self.workers[name] = self.start(name, [sys.executable, *command, "-c", "1", "-n", name, "-l", "info"])
        wait_until(lambda: f"{name} ready" in self.log_of(name), f"{name} is ready", PATIENCE_S, 0.25)

    def launch(self, job: str, name: str) -> subprocess.Popen[bytes]:
        """Start a run of the deployment's own code location."""
        command = ["-m", "dagster", "job", "execute", "-f", f"{HERE}/definitions.py", "-d", HERE, "-j", job]
        return self.start(name, [sys.executable, *command])

    def log_of(self, name: str) -> str:
        """What a process has written."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def workers_of(self, shard: str) -> list[str]:
        """Which workers have begun a shard, in order."""
        begun = [event.engine_event_data.metadata for event in self.events("ENGINE_EVENT") if event.step_key == shard]
        return [str(metadata["Celery worker"].value) for metadata in begun if "Celery worker" in metadata]

    def events(self, kind: str) -> list[dg.DagsterEvent]:
        """What the runs have recorded of one kind."""
        with dg.DagsterInstance.from_config(str(self.folder)) as instance:
            entries = [entry for run in instance.get_runs() for entry in instance.all_logs(run.run_id)]
        events = [entry.dagster_event for entry in entries if entry.dagster_event is not None]
        return [event for event in events if event.event_type_value == kind]


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process with all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def service(engine: sa.Engine, database_url: str, sandbox: Sandbox) -> Service:
    """A service in the real present: workers have the real clock."""
    sandbox.clock.run()
    return Service(engine, database_url, sandbox, now=datetime.now(timezone.utc).replace(microsecond=0))


@contextmanager
def running(service: Service, folder: Path, history_url: str) -> Iterator[Cluster]:
    port = free_port()
    (folder / "dagster.yaml").write_text((ROOT / "deploy" / "dagster.yaml").read_text())
    env = {name: value for name, value in os.environ.items() if not name.startswith(("DAGSTER_", "CELERY_"))}
    env |= {
        "BILLING_DATABASE_URL": service.settings.billing_database_url,
        "YOOKASSA_SHOP_ID": service.sandbox.shop_id,
        "YOOKASSA_SECRET_KEY": service.sandbox.secret_key,
        "YOOKASSA_API_URL": service.sandbox.url,
        "RENEWAL_SHARDS": str(SHARDS),
        "RENEWAL_SHARDS_AT_ONCE": "2",
        "CELERY_BROKER_URL": f"redis://127.0.0.1:{port}/0",
        "CELERY_VISIBILITY_TIMEOUT_S": str(TAKEN_OVER_S),
        "DAGSTER_HOME": str(folder),
        "DAGSTER_POSTGRES_URL": history_url,
        "PYTHONPATH": HERE,
    }
    with ExitStack() as stack:
        cluster = Cluster(folder, env, stack)
        redis = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(folder)]
        cluster.start("redis", redis)
        wait_until(lambda: "Ready to accept connections" in cluster.log_of("redis"), "Redis", PATIENCE_S, 0.05)
        for name in ("first@here", "second@here"):
            cluster.add_worker(name)
        yield cluster


def test_two_workers_charge_everybody_once_though_one_is_killed_in_its_charges(
    service: Service, empty_database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", empty_database_url)
    subscriptions = [service.subscriber(ended_at=service.now - timedelta(hours=1)) for _ in range(12)]
    with running(service, tmp_path, empty_database_url) as cluster:
        # Charged at the provider, and the answers never come: both workers have a charge under way.
        hanging = service.sandbox.misbehave("create", "silence_after", times=None)
        run = cluster.launch("autopayment_job", "run")
        wait_until(lambda: hanging.fired >= 2 or run.poll() is not None, "two charges under way", PATIENCE_S, 0.1)
        assert run.poll() is None, cluster.log_of("run")[-3000:]

        kill(cluster.workers["first@here"])
        service.sandbox.behave()
        run.wait(PATIENCE_S)

        assert run.returncode == 0, cluster.log_of("run")[-3000:]
        begun = {shard: cluster.workers_of(shard) for shard in shards()}
        # The dead worker's shard was taken over; the others were shared.
        assert ["first@here", "second@here"] in begun.values(), begun
    assert service.charged() == dict.fromkeys(subscriptions, 1)
    assert [attempt.state for id_ in subscriptions for attempt in service.attempts(id_)] == ["SUCCEEDED"] * 12
    service.check_books()


def shards() -> list[str]:
    return [f"renew_shard[shard_{number}_of_{SHARDS}]" for number in range(1, SHARDS + 1)]


def test_all_money_checks_are_executed_in_a_deployment_on_celery(
    service: Service, empty_database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", empty_database_url)
    with running(service, tmp_path, empty_database_url) as cluster:
        run = cluster.launch("__ASSET_JOB", "checks")
        run.wait(PATIENCE_S)

        assert run.returncode == 0, cluster.log_of("checks")[-3000:]
        assert len(cluster.events("ASSET_CHECK_EVALUATION")) == len(CHECKS)
