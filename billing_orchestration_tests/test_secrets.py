"""No secret gets out: one put into every setting and every part of every address, then every command and every job.

Searched are stdout, stderr and log records, the whole run history, and the alerts. Settings, commands and jobs are
listed from the code, so that a new one is covered.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
import sqlalchemy as sa
from dagster_postgres.utils import DagsterPostgresException, retry_pg_connection_fn
from pydantic_settings import BaseSettings

from billing_orchestration import settings as settings_module
from billing_orchestration.alerting import Alerts
from billing_orchestration.cli import _parser, main
from billing_orchestration.definitions import SCHEDULES, build_definitions
from billing_orchestration.jobs.money_checks import tick
from billing_orchestration.jobs.run_alerts import alert_about
from billing_orchestration.resources import BillingDatabase, utc_now
from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration.settings import load_settings, load_what_is_right
from billing_orchestration_tests.fixtures.installation import command
from billing_orchestration_tests.fixtures.receiver import Receiver
from billing_orchestration_tests.jobs.service import Service
from billing_orchestration_tests.run_history import found_in, texts

CANARY = "Zeisig7f3a"
JOBS = [str(schedule.job_name) for schedule in SCHEDULES]
COMMANDS: dict[str, list[list[str]]] = {
    "migrate": [["migrate"]],
    "doctor": [["doctor"]],
    "plan": [["plan", job] for job in ("autopayment_job", "reconciliation_job")],
    "upcoming": [["upcoming"]],
    "stop": [["stop"]],
    "start": [["start"], ["start", "--without-doctor"]],
    "webserver": [["webserver"]],
    "quarantine": [["quarantine", "list"], ["quarantine", "show", "1"]],
    "customer": [["customer", "export", "anna", "--output", "anna.json"], ["customer", "erase", "anna"]],
    "reconcile": [["reconcile", "--from", "2026-03-01"]],
    "explain": [["explain", "payment", "1"], ["explain", "subscription", "1"]],
    # Two that serve or run for long, on settings of their own.
    "sandbox": [],
    "demo": [],
}


def variables() -> list[str]:
    """Every variable that settings.py reads."""
    classes = [
        kind
        for _, kind in inspect.getmembers(settings_module, inspect.isclass)
        if issubclass(kind, BaseSettings) and kind is not BaseSettings
    ]
    return sorted(
        {str(field.validation_alias or name).upper() for kind in classes for name, field in kind.model_fields.items()}
    )


class Installation:
    """A working directory and an environment, whose every output is kept."""

    def __init__(self, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
        self.told: list[tuple[str, str]] = []
        self.codes: dict[str, int] = {}
        self._capfd, self._caplog = capfd, caplog
        self.instance = dg.DagsterInstance.ephemeral()

    def command(self, *arguments: str) -> None:
        """One command in this process."""
        self.codes[" ".join(arguments)] = main(arguments)
        self._hear(" ".join(arguments))

    def job(self, job: str) -> bool:
        """One job; a failed run alerts."""
        self._caplog.clear()
        result = build_definitions().get_job_def(job).execute_in_process(instance=self.instance, raise_on_error=False)
        if not result.success:
            alert_about(self.instance, result.dagster_run, Alerts(load_settings))
        self._hear(job)
        return bool(result.success)

    def everything(self, *, without: tuple[str, ...] = ()) -> list[str]:
        """Every command and every job; where the canary was heard."""
        for name, calls in COMMANDS.items():
            for call in calls if name not in without else ():
                self.command(*call)
        for job in JOBS:
            self.job(job)
        tick(self.instance, None, BillingDatabase(load_settings), Alerts(load_settings), utc_now())
        self._hear("the sensor")
        return self.heard()

    def heard(self) -> list[str]:
        """Where the canary was heard, so far."""
        return found_in([*self.told, *texts(self.instance)], [CANARY])

    def _hear(self, where: str) -> None:
        out, err = self._capfd.readouterr()
        self.told += [(f"{where}: stdout", out), (f"{where}: stderr", err), (f"{where}: log", self._caplog.text)]


@pytest.fixture
def installation(
    environment: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> Iterator[Installation]:
    """An installation without any setting."""
    for variable in variables():
        environment.delenv(variable, raising=False)
    here = Installation(capfd, caplog)
    yield here
    here.instance.dispose()


def test_every_command_is_run_here() -> None:
    [commands] = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    assert set(commands.choices) == set(COMMANDS)


@pytest.mark.parametrize("form", ["{}", "{} ", "live_{}ABCDEFGHIJKL", "http://u:{}@h/", "postgresql://{}"], ids=str)
def test_no_fault_of_a_setting_repeats_what_it_holds(environment: pytest.MonkeyPatch, form: str) -> None:
    for variable in variables():
        environment.setenv(variable, form.format(CANARY))
    _, faults = load_what_is_right()
    assert len(faults) > 10
    assert CANARY not in str(faults)


def test_a_secret_in_the_wrong_setting_gets_nowhere(
    environment: pytest.MonkeyPatch, installation: Installation
) -> None:
    for variable in variables():
        environment.setenv(variable, f"live_{CANARY}ABCDEFGHIJKL")

    assert installation.everything() == []

    assert all(installation.codes.values()), installation.codes
    for name in ("doctor", "migrate"):
        whole = command(name)
        assert CANARY not in whole.stdout + whole.stderr
    assert len(installation.told) > 3 * len(JOBS)


def test_the_secrets_of_a_sound_installation_get_nowhere(
    healthy: pytest.MonkeyPatch, installation: Installation, sandbox: Sandbox, receiver: Receiver, database_url: str
) -> None:
    sandbox.provider.secret_key = f"test_{CANARY}"
    with_password = database_url.replace("//postgres:@", f"//postgres:{CANARY}%40%23@")
    assert with_password != database_url
    for variable, value in {
        "BILLING_DATABASE_URL": with_password,
        "YOOKASSA_SHOP_ID": sandbox.shop_id,
        "YOOKASSA_SECRET_KEY": f"test_{CANARY}",
        "YOOKASSA_API_URL": sandbox.url,
        "ALERT_URLS": receiver.url.replace("token-of-the-receiver", CANARY),
        "REPORT_URLS": receiver.url.replace("token-of-the-receiver", CANARY),
        "HEARTBEAT_URL": receiver.heartbeat_url + CANARY,
        "UI_AUTH": f"header:X-{CANARY}",
        "RECEIPT_FALLBACK_EMAIL": f"{CANARY}@example.ru",
    }.items():
        healthy.setenv(variable, value)

    found = installation.everything(without=("webserver", "stop", "start"))
    sandbox.provider.secret_key = "changed"
    assert not installation.job("matching_pending_payments_job")

    assert [*found, *installation.heard()] == []
    assert installation.codes["doctor"] == 0, installation.told
    assert {code for call, code in installation.codes.items() if call.startswith("customer")} == {0}
    assert receiver.titles
    assert CANARY not in str(receiver.messages)


DATABASES = {
    "user": "postgresql://{}:pw@127.0.0.1:9/billing",
    "user with @": "postgresql://{}@x:pw@127.0.0.1:9/billing",
    "password": "postgresql://u:{}@127.0.0.1:9/billing",
    "password with @": "postgresql://u:a@{}@127.0.0.1:9/billing",
    "password with #": "postgresql://u:a#{}@127.0.0.1:9/billing",
    "password with /": "postgresql://u:1/{}@127.0.0.1:9/billing",
    "password with ?": "postgresql://u:1?{}@127.0.0.1:9/billing",
    "password with %": "postgresql://u:%{}@127.0.0.1:9/billing",
    "password with [": "postgresql://u:[{}@127.0.0.1:9/billing",
    "forgotten @": "postgresql://u:{}127.0.0.1:9/billing",
    "forgotten user": "postgresql://{}/billing",
    "host": "postgresql://u:pw@{}.invalid:9/billing",
    "port": "postgresql://u:pw@127.0.0.1:{}/billing",
    "dbname": "postgresql://postgres@/{}?host=SOCKET",
    "role": "postgresql://{}@/postgres?host=SOCKET",
    "query parameter": "postgresql://u:pw@127.0.0.1:9/billing?{}=1",
    "value of a parameter": "postgresql://u:pw@127.0.0.1:9/billing?sslmode={}",
    "socket": "postgresql://u:pw@/billing?host=/tmp/{}",
    "another scheme": "mysql://u:{}@127.0.0.1/billing",
}


@pytest.mark.parametrize("variable", ["BILLING_DATABASE_URL", "DAGSTER_POSTGRES_URL"])
def test_no_part_of_a_databases_address_gets_out(
    healthy: pytest.MonkeyPatch, installation: Installation, database_url: str, tmp_path: Path, variable: str
) -> None:
    healthy.setenv("BILLING_DATABASE_URL", database_url)
    healthy.setenv("YOOKASSA_API_URL", "http://127.0.0.1:9/v3")
    (tmp_path / "dagster.yaml").write_text(
        "telemetry: {enabled: false}\nstorage: {postgres: {postgres_url: {env: DAGSTER_POSTGRES_URL}}}\n"
    )
    socket = database_url.partition("host=")[2]
    for address in DATABASES.values():
        healthy.setenv(variable, address.format(CANARY).replace("SOCKET", socket))
        if variable == "BILLING_DATABASE_URL":
            installation.command("migrate")
            assert not installation.job("expire_subscriptions_job"), address
        else:
            installation.command("stop")
        assert installation.codes.popitem()[1], address
        installation.command("doctor")

    assert installation.heard() == []


PROVIDERS = {
    "host": ("https://{}.invalid/v3", ""),
    "user": ("https://{}@127.0.0.1:9/v3", ""),
    "port": ("https://127.0.0.1:{}/v3", ""),
    "path": ("http://127.0.0.1:9/{}", ""),
    "query": ("https://127.0.0.1:9/v3?{}", ""),
    "proxy's user": ("https://api.invalid/v3", "http://{}:pw@127.0.0.1:9"),
    "proxy's password": ("https://api.invalid/v3", "http://u:{}@127.0.0.1:9"),
    "proxy's password with #": ("https://api.invalid/v3", "http://u:a#{}@127.0.0.1:9"),
    "proxy's password with /": ("https://api.invalid/v3", "http://u:1/{}@127.0.0.1:9"),
    "proxy's password with @": ("https://api.invalid/v3", "http://u:a@{}@127.0.0.1:9"),
    "proxy's host": ("https://api.invalid/v3", "http://{}.invalid:9"),
    "proxy's port": ("https://api.invalid/v3", "http://127.0.0.1:{}"),
    "proxy's scheme": ("https://api.invalid/v3", "{}://127.0.0.1:9"),
}


def test_no_part_of_the_providers_address_or_a_proxys_gets_out(
    healthy: pytest.MonkeyPatch, installation: Installation, database_url: str
) -> None:
    healthy.setenv("BILLING_DATABASE_URL", database_url)
    healthy.setenv("NO_PROXY", "")
    for name, (address, proxy) in PROVIDERS.items():
        healthy.setenv("YOOKASSA_API_URL", address.format(CANARY))
        healthy.setenv("HTTPS_PROXY", proxy.format(CANARY))
        installation.command("doctor")
        assert installation.codes.popitem()[1], address
        if name in ("host", "path", "proxy's host", "proxy's port"):
            assert not installation.job("expire_payments_job"), address

    assert installation.heard() == []


def test_dagster_logs_no_word_of_the_driver_about_the_run_history(caplog: pytest.LogCaptureFixture) -> None:
    build_definitions()

    def connect() -> None:
        raise sa.exc.OperationalError("", None, Exception(f'could not translate host name "{CANARY}"'))

    with pytest.raises(DagsterPostgresException):
        retry_pg_connection_fn(connect, retry_limit=1, retry_wait=0)

    assert CANARY not in caplog.text
    assert "Retrying failed connection to the run history" in caplog.text


@pytest.mark.parametrize("prefix", ["live_", "test_"])
def test_what_looks_like_a_key_is_masked_whoever_says_it(service: Service, receiver: Receiver, prefix: str) -> None:
    key = f"{prefix}{CANARY}ABCDEFGHIJKLMN"
    service.settings = service.settings.model_copy(update={"alert_urls": None})
    service.subscription(ended_at=service.now.replace(month=1))
    service.meddle("subscriptions", "true", f"RAISE EXCEPTION 'the key is {key}'")
    service.subscriber(script=f"canceled:{key}")
    service.paid_there("odd", override={"amount": key, "description": key})
    service.paid_there("claims", metadata={"user_id": key, "plan_id": key})
    for job in JOBS:
        service.run(job)

    history = list(texts(service.instance))
    assert found_in(history, [CANARY]) == []
    assert found_in(history, [f"{prefix}***"])


def test_what_looks_like_a_key_is_masked_in_the_log_of_a_charge_and_in_the_report_of_a_shard(service: Service) -> None:
    key = f"live_{CANARY}ABCDEFGHIJKLMN"
    words = f"RAISE EXCEPTION 'the key is {key}'"
    service.meddle("billing_orchestration.renewal_attempts", "NEW.state = 'DECLINED'", words)
    service.subscriber(script="canceled:insufficient_funds")
    run = service.run("autopayment_job", shards=1)

    history = list(texts(service.instance))
    assert not run.ok
    assert found_in(history, [CANARY]) == []
    assert found_in([("log", line) for line in run.log], ["could not be written"])
