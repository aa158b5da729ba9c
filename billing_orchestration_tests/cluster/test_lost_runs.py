"""A run that dies with its code server is failed by the real daemon, and the next one completes its work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path

import dagster as dg
import pytest
import sqlalchemy as sa
import yaml

from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration_tests.browser.deployment import PATIENCE_S, ROOT, Deployment, deployed, wait_for
from billing_orchestration_tests.jobs.service import Service

JOB = "autopayment_job"


def impatient(home: Path) -> None:
    """deploy/dagster.yaml with shorter waits, and nothing else changed."""
    config = yaml.safe_load((home / "dagster.yaml").read_text())
    config["run_launcher"]["config"]["silent_seconds"] = 5
    config["run_monitoring"]["poll_interval_seconds"] = 2
    (home / "dagster.yaml").write_text(yaml.safe_dump(config))


def launch(deployment: Deployment) -> None:
    """Launch the job as an operator does who has no browser."""
    command = [str(Path(sys.executable).parent / "dagster"), "job", "launch", "-w", str(ROOT / "workspace.grpc.yaml")]
    subprocess.run([*command, "-j", JOB], env=deployment.env, cwd=deployment.folder, check=True, capture_output=True)


def has_ended(deployment: Deployment, status: dg.DagsterRunStatus, runs: int) -> bool:
    found = [record.dagster_run.status for record in deployment.runs(JOB)]
    return len(found) == runs and found[0] is status


@pytest.fixture
def service(engine: sa.Engine, database_url: str, sandbox: Sandbox) -> Service:
    """A service in the real present, with three customers whose day has come."""
    sandbox.clock.run()
    service = Service(engine, database_url, sandbox, now=datetime.now(timezone.utc).replace(microsecond=0))
    for _ in range(3):
        service.subscriber(ended_at=service.now - timedelta(hours=1))
    return service


@contextmanager
def deployment_of(service: Service, history_url: str, folder: Path) -> Iterator[Deployment]:
    """Its code server and daemon, running."""
    settings = {
        "BILLING_DATABASE_URL": service.settings.billing_database_url,
        "YOOKASSA_SHOP_ID": service.sandbox.shop_id,
        "YOOKASSA_SECRET_KEY": service.sandbox.secret_key,
        "YOOKASSA_API_URL": service.sandbox.url,
        "YOOKASSA_CHARGE_DONE_S": "1",
        "DAGSTER_POSTGRES_URL": history_url,
    }
    with deployed(folder, settings) as deployment:
        impatient(folder / "home")
        deployment.start_code_server()
        deployment.start_daemon()
        yield deployment


def signal_code_server(deployment: Deployment, number: int) -> None:
    """To all of its processes, as Docker kills a container and systemd stops a unit; wait for its end."""
    code = deployment.processes.pop("code")
    os.killpg(code.pid, number)
    code.wait(PATIENCE_S)


def test_a_run_that_died_with_its_code_server_is_failed_and_the_next_completes_its_work(
    service: Service, empty_database_url: str, tmp_path: Path
) -> None:
    with deployment_of(service, empty_database_url, tmp_path) as deployment:
        # Charged at the provider, the answer never comes.
        hanging = service.sandbox.misbehave("create", "silence_after", times=None)
        launch(deployment)
        wait_for(lambda: hanging.fired, "a charge under way")
        signal_code_server(deployment, signal.SIGKILL)
        service.sandbox.behave()
        deployment.start_code_server()

        wait_for(lambda: has_ended(deployment, dg.DagsterRunStatus.FAILURE, 1), "the lost run fails")
        [lost] = deployment.runs(JOB)
        told = [entry.message for entry in deployment.instance.all_logs(lost.dagster_run.run_id)]
        assert any("the process of this run is gone" in message for message in told), told[-3:]
        launch(deployment)
        wait_for(lambda: has_ended(deployment, dg.DagsterRunStatus.SUCCESS, 2), "the next run completes")
    assert [charge for charge in service.charged().values() if charge != 1] == []
    assert len(service.charged()) == 3
    service.check_books()


def test_a_code_server_that_is_stopped_tells_its_run_which_waits_for_the_charge_under_way(
    service: Service, empty_database_url: str, tmp_path: Path
) -> None:
    with deployment_of(service, empty_database_url, tmp_path) as deployment:
        slow = service.sandbox.misbehave("create", "none", delay_s=10, times=None)
        launch(deployment)
        wait_for(lambda: slow.fired, "a charge under way")
        signal_code_server(deployment, signal.SIGTERM)

        [stopped] = deployment.runs(JOB)
        assert stopped.dagster_run.status is dg.DagsterRunStatus.FAILURE  # nobody has asked for its end
        states = [attempt.state for attempt in service.rows("renewal_attempts")]
        assert "UNKNOWN" not in states, states
        assert states.count("SUCCEEDED") == len(service.charged()) < 3
        service.sandbox.behave()
        deployment.start_code_server()
        launch(deployment)
        wait_for(lambda: has_ended(deployment, dg.DagsterRunStatus.SUCCESS, 2), "the next run completes")
    assert len(service.charged()) == 3
    service.check_books()
