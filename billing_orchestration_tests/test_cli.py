"""The console script, as a process: its exit codes, its one line for an expected failure, and what `doctor` sees."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta, timezone
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from billing_orchestration.cli import main
from billing_orchestration.desk.doctor import Finding, Level, diagnose
from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration_tests.fixtures.postgres import Server, create_service_database

SECRETS = ("word-of-the-database", "test_sandbox")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An empty working directory without any setting."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(
            ("BILLING_", "YOOKASSA_", "DAGSTER_", "PENDING_PAYMENT_", "SUBSCRIPTION_GRACE_", "RUN_HISTORY_")
        ):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def healthy(
    environment: pytest.MonkeyPatch, database_url: str, empty_database_url: str, sandbox: Sandbox, tmp_path: Path
) -> pytest.MonkeyPatch:
    """An environment in which nothing is wrong."""
    (tmp_path / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    for name, value in {
        "BILLING_DATABASE_URL": database_url,
        "YOOKASSA_SHOP_ID": sandbox.shop_id,
        "YOOKASSA_SECRET_KEY": sandbox.secret_key,
        "YOOKASSA_API_URL": sandbox.url,
        "DAGSTER_POSTGRES_URL": empty_database_url,
        "DAGSTER_HOME": str(tmp_path),
    }.items():
        environment.setenv(name, value)
    return environment


def examine() -> list[Finding]:
    findings = list(diagnose())
    for finding in findings:
        assert "\n" not in str(finding)
        assert not any(secret in str(finding) for secret in SECRETS)
    return findings


def faults() -> list[str]:
    return [f"{finding.subject}: {finding.text}" for finding in examine() if finding.level is Level.FAULT]


def warnings() -> list[str]:
    return [f"{finding.subject}: {finding.text}" for finding in examine() if finding.level is Level.WARNING]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the console script as a process, in the working directory and environment of the test."""
    process = subprocess.run(
        [sys.executable, "-m", "billing_orchestration.cli", *arguments],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert "Traceback" not in process.stderr
    return process


# doctor


def test_a_healthy_installation_has_neither_fault_nor_warning(healthy: pytest.MonkeyPatch) -> None:
    assert [str(finding) for finding in examine() if finding.level is not Level.OK] == []
    process = run("doctor")
    assert process.returncode == 0
    assert len(process.stdout.splitlines()) == len(examine())
    assert not any(secret in process.stdout + process.stderr for secret in SECRETS)


def test_without_any_setting_doctor_names_all_of_them_and_fails(environment: pytest.MonkeyPatch) -> None:
    process = run("doctor")
    assert process.returncode == 1
    for name in ("BILLING_DATABASE_URL", "YOOKASSA_SHOP_ID", "YOOKASSA_SECRET_KEY"):
        assert f"{name} is not set" in process.stdout


def test_one_wrong_setting_does_not_hide_what_else_is_wrong(healthy: pytest.MonkeyPatch, tmp_path: Path) -> None:
    healthy.delenv("YOOKASSA_SECRET_KEY")
    healthy.setenv("BILLING_TIMEZONE", "Moscow")
    healthy.setenv("BILLING_DATABASE_URL", "postgresql://u:word-of-the-database@/nowhere?host=/no/such/folder")
    healthy.setenv("DAGSTER_HOME", str(tmp_path / "missing"))
    assert [fault.split(":")[0] for fault in faults()] == ["settings", "settings", "database", "history"]


def test_alert_urls_that_the_library_cannot_read_are_a_fault_without_the_url(healthy: pytest.MonkeyPatch) -> None:
    healthy.setenv("ALERT_URLS", "json://127.0.0.1:9/x, nosuchservice://test_sandbox")
    (fault,) = faults()
    assert fault.startswith("alerts: 1 of ALERT_URLS cannot be read")


def test_an_unreadable_env_file_is_a_fault_and_no_traceback(healthy: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"\xff\xfe")
    assert [fault.split()[:2] for fault in faults()] == [["settings:", ".env"]]


def test_an_unreachable_database_is_one_fault(healthy: pytest.MonkeyPatch, database_url: str) -> None:
    url = sa.make_url(database_url).set(database="no_such_database").render_as_string(hide_password=False)
    healthy.setenv("BILLING_DATABASE_URL", url)
    (fault,) = faults()
    assert "create that database, or correct its name" in fault


def test_an_empty_database_is_one_fault_that_names_both_ways_out(
    healthy: pytest.MonkeyPatch, postgres_server: Server
) -> None:
    with postgres_server.database() as url:
        healthy.setenv("BILLING_DATABASE_URL", url)
        (fault,) = faults()
    assert "correct BILLING_DATABASE_URL" in fault
    assert "run: billing-orchestration migrate" in fault


def test_a_service_database_that_was_never_migrated_names_migrate(
    healthy: pytest.MonkeyPatch, postgres_server: Server
) -> None:
    with postgres_server.database() as url:
        create_service_database(url)
        healthy.setenv("BILLING_DATABASE_URL", url)
        (fault,) = faults()
        assert fault.startswith("schema: this database has no schema billing_orchestration; run: billing-orch")


def test_repeated_payment_ids_and_missing_indexes_are_warnings(
    healthy: pytest.MonkeyPatch, postgres_server: Server
) -> None:
    with postgres_server.database() as url:
        create_service_database(url)
        healthy.setenv("BILLING_DATABASE_URL", url)
        assert run("migrate").returncode == 0
        (warning,) = warnings()
        assert "'twice' (2 payments)" in warning
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("DROP INDEX bo_payments_subscription_id")
            connection.execute(
                "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'bo_prices_plan_currency'::regclass"
            )
        assert [warning.split(":")[1].split()[0] for warning in warnings()[1:]] == [
            "bo_prices_plan_currency",
            "bo_payments_subscription_id",
        ]
        assert faults() == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("DROP TABLE prices", "there is no table prices"),
        ("ALTER TABLE payments DROP COLUMN payment_method", "there is no column payments.payment_method"),
        (
            "ALTER TABLE subscriptions ALTER COLUMN ended_at TYPE timestamptz",
            "subscriptions.ended_at is timestamp with time zone, not timestamp without time zone",
        ),
        ("ALTER TABLE payments ALTER COLUMN amount TYPE double precision", "payments.amount is double precision, not"),
        ("ALTER TABLE payments ALTER COLUMN id DROP DEFAULT", "payments.id has no default"),
        ("ALTER TABLE subscriptions ADD COLUMN region text NOT NULL", "subscriptions.region is mandatory"),
        ("ALTER TYPE currencyenum RENAME VALUE 'EUR' TO 'CNY'", "the enum currencyenum lacks EUR"),
        ("ALTER TYPE paymentstatusenum RENAME TO other", "payments.status is other, not paymentstatusenum"),
    ],
)
def test_another_shape_of_the_services_tables_is_named(
    healthy: pytest.MonkeyPatch, database_url: str, change: str, words: str
) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("DROP INDEX bo_subscriptions_active_ended_at")
        connection.execute(change.encode())
    assert words in faults()[0]
    assert all(fault.startswith("tables: ") for fault in faults())


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE subscriptions ALTER COLUMN user_id TYPE varchar(64)",
        "ALTER TABLE plans ALTER COLUMN name TYPE text",
        "ALTER TABLE prices ALTER COLUMN id TYPE bigint",
        "ALTER TYPE paymentmethodsenum ADD VALUE 'BARTER'",
    ],
)
def test_a_harmless_difference_is_a_warning(healthy: pytest.MonkeyPatch, database_url: str, change: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(change.encode())
    (warning,) = warnings()
    assert "the jobs work with it" in warning
    assert faults() == []


def test_columns_and_tables_of_the_services_own_do_not_matter(healthy: pytest.MonkeyPatch, database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("ALTER TABLE payments ADD COLUMN note text, ADD COLUMN n integer NOT NULL DEFAULT 0")
        connection.execute("CREATE TABLE refunds (id serial PRIMARY KEY)")
    assert faults() == warnings() == []


def test_a_role_without_rights_is_told_what_to_grant(
    healthy: pytest.MonkeyPatch, postgres_server: Server, database_url: str
) -> None:
    url = sa.make_url(database_url)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("CREATE ROLE reader LOGIN")
        connection.execute("GRANT SELECT ON subscriptions, plans, prices, payment_providers TO reader")
        connection.execute("GRANT USAGE ON SCHEMA billing_orchestration TO reader")
        connection.execute("GRANT SELECT ON billing_orchestration.schema_version TO reader")
    try:
        healthy.setenv("BILLING_DATABASE_URL", url.set(username="reader").render_as_string(hide_password=False))
        text = " ".join(faults())
        assert "SELECT on payments, INSERT on payments, UPDATE on payments, INSERT on subscriptions" in text
        assert "USAGE on public.payments_id_seq" in text
        assert "INSERT on billing_orchestration.audit_trail" in text
        assert "SELECT on plans" not in text
    finally:
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute("DROP OWNED BY reader")
            connection.execute("DROP ROLE reader")


def test_a_database_that_only_reads_is_a_fault(
    healthy: pytest.MonkeyPatch, postgres_server: Server, database_url: str
) -> None:
    with postgres_server.connect() as connection:
        connection.execute(
            f"ALTER DATABASE {sa.make_url(database_url).database} SET default_transaction_read_only = on"
        )
    (fault,) = faults()
    assert "name the primary server" in fault


@pytest.mark.parametrize(
    ("skew", "level"),
    [
        (timedelta(0), Level.OK),
        (timedelta(seconds=10), Level.WARNING),
        (timedelta(seconds=-10), Level.WARNING),
        (timedelta(minutes=2), Level.FAULT),
        (timedelta(minutes=-2), Level.FAULT),
    ],
)
def test_clocks_that_disagree_are_noticed(healthy: pytest.MonkeyPatch, skew: timedelta, level: Level) -> None:
    findings = diagnose(lambda: datetime.now(timezone.utc) + skew)
    assert [finding.level for finding in findings if finding.subject == "clock"] == [level]


def test_wrong_credentials_name_both_settings_and_are_tried_once(healthy: pytest.MonkeyPatch, sandbox: Sandbox) -> None:
    healthy.setenv("YOOKASSA_SECRET_KEY", "test_another")
    assert faults() == ["provider: it refuses the credentials: correct YOOKASSA_SHOP_ID and YOOKASSA_SECRET_KEY"]
    assert sandbox.count() == 1


def test_a_provider_that_is_not_there_names_its_url(healthy: pytest.MonkeyPatch) -> None:
    with closing(socket.socket()) as deaf:
        deaf.bind(("127.0.0.1", 0))
        healthy.setenv("YOOKASSA_API_URL", f"http://127.0.0.1:{deaf.getsockname()[1]}/v3")
        (fault,) = faults()
    assert fault.startswith("provider: it cannot be reached: ")
    assert "correct YOOKASSA_API_URL" in fault


@pytest.mark.parametrize("effect", ["html_before", "error_before", "truncated"])
def test_a_provider_that_answers_strangely_is_a_fault_in_one_line(
    healthy: pytest.MonkeyPatch, sandbox: Sandbox, effect: str
) -> None:
    sandbox.misbehave("list", effect)
    (fault,) = faults()
    assert fault.startswith("provider: it does not answer as it should: ")


@pytest.mark.parametrize(
    ("key", "level", "words"),
    [
        ("live_sandbox", Level.WARNING, "a live key is sent elsewhere than to the production URL"),
        ("test_other", Level.OK, "a test shop"),
        ("sandbox", Level.WARNING, "neither live_ nor test_"),
    ],
)
def test_the_kind_of_the_shop_is_told_by_its_key(
    healthy: pytest.MonkeyPatch, sandbox: Sandbox, key: str, level: Level, words: str
) -> None:
    sandbox.reset(secret_key=key)
    healthy.setenv("YOOKASSA_SECRET_KEY", key)
    findings = [finding for finding in examine() if finding.subject == "provider"]
    assert [finding.level for finding in findings] == [Level.OK, level]
    assert words in findings[1].text


def test_an_unreachable_run_history_names_its_own_setting(healthy: pytest.MonkeyPatch, empty_database_url: str) -> None:
    url = sa.make_url(empty_database_url).set(database="no_such_database").render_as_string(hide_password=False)
    healthy.setenv("DAGSTER_POSTGRES_URL", url)
    (fault,) = faults()
    assert "cannot connect to the database of DAGSTER_POSTGRES_URL" in fault
    assert "BILLING_DATABASE_URL" not in fault


def test_a_run_history_in_the_services_database_is_a_warning(healthy: pytest.MonkeyPatch, database_url: str) -> None:
    healthy.setenv("DAGSTER_POSTGRES_URL", database_url)
    (warning,) = warnings()
    assert "give it one of its own" in warning


def test_no_run_history_is_a_warning(healthy: pytest.MonkeyPatch, tmp_path: Path) -> None:
    healthy.delenv("DAGSTER_POSTGRES_URL")
    (tmp_path / "dagster.yaml").unlink()
    assert [warning.split()[1] for warning in warnings()] == ["DAGSTER_POSTGRES_URL", "there"]
    healthy.setenv("DAGSTER_HOME", "relative/folder")
    assert ["relative path" in fault for fault in faults()] == [True]


@pytest.mark.parametrize("home_is_told", [True, False])
def test_no_run_history_is_a_fault_where_our_dagster_yaml_would_be_used(
    healthy: pytest.MonkeyPatch, tmp_path: Path, home_is_told: bool
) -> None:
    healthy.delenv("DAGSTER_POSTGRES_URL")
    shutil.copy(Path(__file__).parents[1] / "dagster.yaml", tmp_path)
    healthy.chdir(tmp_path)
    if not home_is_told:
        healthy.delenv("DAGSTER_HOME")
    (fault,) = faults()
    assert "DAGSTER_POSTGRES_URL is not set, and no job runs without it" in fault


def test_doctor_changes_nothing(healthy: pytest.MonkeyPatch, database_url: str, sandbox: Sandbox) -> None:
    with psycopg.connect(database_url) as connection:
        query = "SELECT sum(n_tup_ins + n_tup_upd + n_tup_del) FROM pg_stat_user_tables"
        before = connection.execute(query).fetchone()
    examine()
    with psycopg.connect(database_url) as connection:
        assert connection.execute(query).fetchone() == before
    assert {request.method for request in sandbox.requests} == {"GET"}


# migrate


def test_migrate_needs_no_shop_and_says_what_it_did(environment: pytest.MonkeyPatch, empty_database_url: str) -> None:
    environment.setenv("BILLING_DATABASE_URL", empty_database_url)
    first = run("migrate")
    assert (first.returncode, first.stderr) == (0, "")
    assert "created the schema billing_orchestration" in first.stdout
    again = run("migrate")
    assert (again.returncode, again.stdout) == (0, "nothing to do\n")
    back = run("migrate", "--downgrade")
    assert back.returncode == 0
    assert "dropped the schema billing_orchestration with all its records" in back.stdout


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "BILLING_DATABASE_URL is not set"),
        ("mysql://u:word-of-the-database@h/db", "BILLING_DATABASE_URL must begin with postgresql://"),
        ("postgresql://u:word-of-the-database@/db?host=/no/such/folder", "no server listens on that socket"),
    ],
)
def test_an_expected_failure_is_one_line_on_stderr_without_a_secret(
    environment: pytest.MonkeyPatch, url: str, words: str
) -> None:
    environment.setenv("BILLING_DATABASE_URL", url)
    process = run("migrate")
    assert process.returncode == 1
    assert process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert line.startswith("billing-orchestration: ")
    assert words in line
    assert "word-of-the-database" not in line


def test_migrate_goes_on_when_nobody_reads_what_it_says(
    environment: pytest.MonkeyPatch, empty_database_url: str
) -> None:
    environment.setenv("BILLING_DATABASE_URL", empty_database_url)
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = subprocess.run(
        [sys.executable, "-m", "billing_orchestration.cli", "migrate"],
        check=False,
        stdout=write_end,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    os.close(write_end)
    assert (process.returncode, process.stderr) == (0, b"")
    assert run("migrate").stdout == "nothing to do\n"


# sandbox, and the command line itself


@pytest.fixture
def sandbox_process(environment: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "billing_orchestration.cli", "sandbox", "--port", "0", "--secret-key", "test_mine"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    ) as process:
        yield process
        process.kill()


def test_the_sandbox_serves_until_it_is_stopped(sandbox_process: subprocess.Popen[str]) -> None:
    from billing_orchestration.provider.client import PaymentProvider

    assert sandbox_process.stdout is not None
    line = sandbox_process.stdout.readline()
    url = next(word for word in line.split() if word.startswith("http://127.0.0.1:"))
    with closing(PaymentProvider(shop_id="100500", secret_key="test_mine", api_url=url)) as provider:
        provider.check()
    sandbox_process.send_signal(signal.SIGINT)
    assert sandbox_process.wait(30) in (0, 130)


def test_a_taken_port_is_one_line(environment: pytest.MonkeyPatch, sandbox: Sandbox) -> None:
    process = run("sandbox", "--port", str(sandbox.port))
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert "cannot listen" in line
    assert "--port" in line


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["sandbox", "--port", "99999"], ["migrate", "--up"]])
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: billing-orchestration" in capsys.readouterr().err


def test_the_command_line_loads_only_what_a_command_needs() -> None:
    code = (
        "import sys; from billing_orchestration.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('sqlalchemy', 'dagster', 'pydantic', 'requests', 'uvicorn') if name in sys.modules])"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert process.stdout.splitlines()[-1] == "[]"


# quarantine, explain


def test_an_entry_is_listed_shown_and_resolved_from_the_terminal(
    healthy: pytest.MonkeyPatch, database_url: str, sandbox: Sandbox
) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("INSERT INTO plans (id, name, duration, duration_unit, created_at, updated_at)"
                           " VALUES (1, 'Monthly', 1, 'month', now(), now())")  # fmt: skip
        connection.execute("INSERT INTO payment_providers (id, name, created_at, updated_at)"
                           " VALUES (1, 'YooKassa', now(), now())")  # fmt: skip
        connection.execute("""
            INSERT INTO billing_orchestration.quarantine
                (problem_key, kind, reason, external_payment_id, evidence, job, run_id, opened_at)
            VALUES ('payment paid:test_payment', 'test_payment', 'a test', 'paid', '{}', 'm', 'r', now())
        """)
    metadata = {"user_id": "anna", "plan_id": "1", "payment_provider_id": "1"}
    sandbox.provider.add_payment(id="paid", amount="299.00", metadata=metadata)

    assert "payment paid: test_payment: a test" in run("quarantine", "list").stdout
    assert "--accept: grants it anyway" in run("quarantine", "show", "1").stdout
    resolved = run("quarantine", "resolve", "1", "--accept", "--reason", "our own card", "--by", "vera")
    assert (resolved.returncode, resolved.stderr) == (0, "")
    assert "payment paid (299.00 RUB) is granted: subscription 1" in resolved.stdout
    again = run("quarantine", "resolve", "1", "--ignore", "--reason", "twice")
    assert again.returncode == 1
    assert "entry 1 is resolved already: accepted" in again.stderr
    assert "accepted: vera: our own card" in run("explain", "payment", "paid").stdout
    assert "Nothing waits for a person." in run("explain", "subscription", "1").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("quarantine",),
        ("quarantine", "resolve", "1", "--accept"),
        ("quarantine", "resolve", "1", "--reason", "x"),
        ("quarantine", "resolve", "1", "--accept", "--ignore", "--reason", "x"),
        ("quarantine", "resolve", "one", "--accept", "--reason", "x"),
        ("quarantine", "resolve", "1", "--attach", "0", "--reason", "x"),
        ("explain", "invoice", "1"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_read(
    environment: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    assert run(*arguments).returncode == 2


def test_a_desk_without_settings_is_one_line(environment: pytest.MonkeyPatch) -> None:
    process = run("quarantine", "list")
    assert process.returncode == 1
    assert "BILLING_DATABASE_URL is not set" in process.stderr
    assert len(process.stderr.splitlines()) == 1
