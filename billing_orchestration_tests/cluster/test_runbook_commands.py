"""Every command of the runbook and of the deployment's document, word for word, against a real deployment.

Those for `docker compose exec` and `kubectl exec` are run without that prefix: what is behind it is what the container
runs. Commands that set up a server (docker, kubectl, systemctl, useradd) are not run here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from billing_orchestration.database.engine import create_engine
from billing_orchestration.desk.switching import ORDER
from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration_tests.browser.deployment import ROOT, Deployment, deployed, wait_for
from billing_orchestration_tests.fixtures.postgres import Server
from billing_orchestration_tests.jobs.service import Service

_PREFIXES = re.compile(
    r"^(docker compose exec code|docker run --rm billing-orchestration|kubectl exec deploy/\S+-billing --) "
)
_COMMAND = re.compile(r"(billing-orchestration|dagster job execute) ")
# Named in a sentence, without what makes them whole; or the opposite of what a runbook is for.
NOT_WHOLE = {
    "billing-orchestration webserver",
    "billing-orchestration quarantine show",
    "billing-orchestration explain payment ID",
    "billing-orchestration migrate --downgrade",
}
# They compare books, and exit with 1 where something differs or a day is not over.
COMPARING = "billing-orchestration reconcile"


def commands() -> list[str]:
    """In the order of the documents: first what stands in blocks, then what stands in sentences."""
    found: list[str] = []
    sentences: list[str] = []
    for name in ("operations", "deployment"):
        text = (ROOT / "docs" / f"{name}.md").read_text()
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
            found += [re.sub(r"\s+# .*", "", line.strip()) for line in block.splitlines()]
        sentences += re.findall(r"`(billing-orchestration [^`…]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    every = [*found, *(sentence for sentence in sentences if sentence not in NOT_WHOLE)]
    return [line for line in dict.fromkeys(every) if _COMMAND.match(_PREFIXES.sub("", line))]


@pytest.fixture(scope="module")
def deployment(
    postgres_server: Server,
    migrated_template: str,
    sandbox_server: Sandbox,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Deployment]:
    """A deployment in which everything is there that the documents name: entries 1 to 3, subscription 12."""
    sandbox_server.reset()
    sandbox_server.clock.run()
    folder = tmp_path_factory.mktemp("deployment")
    with postgres_server.database(migrated_template) as billing_url, postgres_server.database() as history_url:
        engine = create_engine(billing_url, application_name="tests")
        _customers(Service(engine, billing_url, sandbox_server, now=datetime.now(timezone.utc).replace(microsecond=0)))
        settings = {
            "BILLING_DATABASE_URL": billing_url,
            "YOOKASSA_SHOP_ID": sandbox_server.shop_id,
            "YOOKASSA_SECRET_KEY": sandbox_server.secret_key,
            "YOOKASSA_API_URL": sandbox_server.url,
            "DAGSTER_POSTGRES_URL": history_url,
        }
        for name in ("workspace.yaml", "workspace.grpc.yaml"):
            shutil.copy(ROOT / name, folder)
        shutil.copytree(ROOT / "run_configs", folder / "run_configs")
        (folder / "registry.csv").write_text("Идентификатор платежа,Сумма платежа,Валюта платежа\n")
        try:
            with deployed(folder, settings) as running:
                running.start_code_server()
                running.start_webserver()
                running.start_daemon()
                wait_for(lambda: len(running.instance.get_daemon_heartbeats()) > 3, "a daemon that is heard")
                yield running
        finally:
            engine.dispose()


def _customers(service: Service) -> None:
    sandbox = service.sandbox
    sandbox.clock.run()
    plan = service.plan()
    while max((row.id for row in service.rows("subscriptions")), default=0) < 12:
        service.subscription(plan_id=plan, ended_at=service.now + timedelta(days=20))
    for number, name in enumerate(("ID_AT_THE_PROVIDER", "second", "third")):
        service.paid_there(name, user=f"user-{number}", plan_id=plan, amount="100.00")
    service.clock = lambda: datetime.now(timezone.utc)
    assert service.run("matching_successful_payments_job").ok
    assert sorted(row.id for row in service.rows("quarantine")) == [1, 2, 3]


@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_documents_does_what_it_says(deployment: Deployment, line: str) -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", _PREFIXES.sub("", line)],
        env={**deployment.env, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        cwd=deployment.folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )

    told = done.stdout + done.stderr
    assert "Traceback" not in told, told[-3000:]
    assert done.returncode == 0 or (line.startswith(COMPARING) and done.returncode == 1), told[-3000:]


def test_stop_and_start_reached_the_deployments_own_schedules(deployment: Deployment) -> None:
    deployment.command("stop")
    assert [state for state in deployment.instance.all_instigator_state() if _is_on(state)] == []

    deployment.command("start", "--without-doctor")

    assert len([state for state in deployment.instance.all_instigator_state() if _is_on(state)]) == len(ORDER)


def _is_on(state: object) -> bool:
    return bool(getattr(state, "is_running", False)) and "schedule" in str(getattr(state, "instigator_name", ""))
