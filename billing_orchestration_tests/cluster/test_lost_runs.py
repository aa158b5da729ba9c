"""A run that dies with its code server is failed by the real daemon, and the next one completes its work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import dagster as dg
import sqlalchemy as sa
import yaml

from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration_tests.browser.deployment import ROOT, Deployment, deployed, wait_for
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


def test_a_run_that_died_with_its_code_server_is_failed_and_the_next_completes_its_work(
    engine: sa.Engine, database_url: str, empty_database_url: str, sandbox: Sandbox, tmp_path: Path
) -> None:
    sandbox.clock.run()
    service = Service(engine, database_url, sandbox, now=datetime.now(timezone.utc).replace(microsecond=0))
    subscriptions = [service.subscriber(ended_at=service.now - timedelta(hours=1)) for _ in range(3)]
    settings = {
        "BILLING_DATABASE_URL": database_url,
        "YOOKASSA_SHOP_ID": sandbox.shop_id,
        "YOOKASSA_SECRET_KEY": sandbox.secret_key,
        "YOOKASSA_API_URL": sandbox.url,
        "YOOKASSA_CHARGE_DONE_S": "1",
        "DAGSTER_POSTGRES_URL": empty_database_url,
    }
    with deployed(tmp_path, settings) as deployment:
        impatient(tmp_path / "home")
        deployment.start_code_server()
        deployment.start_daemon()
        # Charged at the provider, the answer never comes.
        hanging = sandbox.misbehave("create", "silence_after", times=None)
        launch(deployment)
        wait_for(lambda: hanging.fired, "a charge under way")

        code = deployment.processes.pop("code")
        os.killpg(code.pid, signal.SIGKILL)
        code.wait()
        sandbox.behave()
        deployment.start_code_server()

        wait_for(lambda: has_ended(deployment, dg.DagsterRunStatus.FAILURE, 1), "the lost run fails")
        [lost] = deployment.runs(JOB)
        told = [entry.message for entry in deployment.instance.all_logs(lost.dagster_run.run_id)]
        assert any("the process of this run is gone" in message for message in told), told[-3:]
        launch(deployment)
        wait_for(lambda: has_ended(deployment, dg.DagsterRunStatus.SUCCESS, 2), "the next run completes")
    assert service.charged() == dict.fromkeys(subscriptions, 1)
    service.check_books()
