"""The console script, as a process: its exit codes, and its one line for an expected failure."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing

import psycopg
import pytest

from billing_orchestration.cli import main
from billing_orchestration.provider.client import PaymentProvider
from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration_tests.fixtures.installation import ROOT, command

# doctor (what it finds: desk/test_doctor.py)


def test_doctor_fails_where_there_is_a_fault_and_names_each(environment: pytest.MonkeyPatch) -> None:
    process = command("doctor")
    assert process.returncode == 1
    for name in ("BILLING_DATABASE_URL", "YOOKASSA_SHOP_ID", "YOOKASSA_SECRET_KEY"):
        assert f"{name} is not set" in process.stdout


def test_doctor_succeeds_on_a_healthy_installation_without_a_secret(
    healthy: pytest.MonkeyPatch, sandbox: Sandbox
) -> None:
    process = command("doctor")
    assert (process.returncode, process.stderr) == (0, "")
    header, *findings, verdict = process.stdout.splitlines()
    assert header.split() == ["level", "check", "finding"]
    # A long finding goes on in the line below.
    assert all(line.startswith(("ok ", " ")) for line in findings)
    assert verdict == "fit: the jobs can work here"
    assert sandbox.secret_key not in process.stdout


def test_doctor_says_below_each_fault_how_to_fix_it(healthy: pytest.MonkeyPatch, database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("ALTER TABLE payments ADD COLUMN region text NOT NULL")
    process = command("doctor")
    lines = process.stdout.splitlines()
    fault = next(number for number, line in enumerate(lines) if line.startswith("FAULT"))
    assert "payments.region is NOT NULL" in lines[fault]
    fix = next(line for line in lines[fault + 1 :] if "fix:" in line)
    assert fix.split()[:3] == ["fix:", "ALTER", "TABLE"]
    assert (process.returncode, lines[-1]) == (1, "unfit: jobs fail until each FAULT is fixed")


# migrate


def test_migrate_needs_no_shop_and_says_what_it_did(environment: pytest.MonkeyPatch, empty_database_url: str) -> None:
    environment.setenv("BILLING_DATABASE_URL", empty_database_url)
    first = command("migrate")
    assert (first.returncode, first.stderr) == (0, "")
    assert "created the schema billing_orchestration" in first.stdout
    again = command("migrate")
    assert (again.returncode, again.stdout) == (0, "nothing to do\n")
    back = command("migrate", "--downgrade")
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
    process = command("migrate")
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
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    os.close(write_end)
    assert (process.returncode, process.stderr) == (0, b"")
    assert command("migrate").stdout == "nothing to do\n"


# sandbox, and the command line itself


@pytest.fixture
def sandbox_process(environment: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "billing_orchestration.cli", "sandbox", "--port", "0", "--secret-key", "test_mine"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        yield process
        process.kill()


def test_the_sandbox_serves_until_it_is_stopped(sandbox_process: subprocess.Popen[str]) -> None:
    assert sandbox_process.stdout is not None
    line = sandbox_process.stdout.readline()
    url = next(word for word in line.split() if word.startswith("http://127.0.0.1:"))
    with closing(PaymentProvider(shop_id="100500", secret_key="test_mine", api_url=url)) as provider:
        provider.check()
    sandbox_process.send_signal(signal.SIGINT)
    assert sandbox_process.wait(30) in (0, 130)


def test_a_taken_port_is_one_line(environment: pytest.MonkeyPatch, sandbox: Sandbox) -> None:
    process = command("sandbox", "--port", str(sandbox.port))
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
    process = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
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

    assert "payment paid: test_payment: a test" in command("quarantine", "list").stdout
    assert "--accept: grants it anyway" in command("quarantine", "show", "1").stdout
    resolved = command("quarantine", "resolve", "1", "--accept", "--reason", "our own card", "--by", "vera")
    assert (resolved.returncode, resolved.stderr) == (0, "")
    assert "payment paid (299.00 RUB) is granted: subscription 1" in resolved.stdout
    again = command("quarantine", "resolve", "1", "--ignore", "--reason", "twice")
    assert again.returncode == 1
    assert "entry 1 is resolved already: accepted" in again.stderr
    assert "accepted: vera: our own card" in command("explain", "payment", "paid").stdout
    assert "Nothing waits for a person." in command("explain", "subscription", "1").stdout


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
    assert command(*arguments).returncode == 2


def test_a_desk_without_settings_is_one_line(environment: pytest.MonkeyPatch) -> None:
    process = command("quarantine", "list")
    assert process.returncode == 1
    assert "BILLING_DATABASE_URL is not set" in process.stderr
    assert len(process.stderr.splitlines()) == 1


def test_upcoming_shows_what_is_due_on_a_terminal(healthy: pytest.MonkeyPatch) -> None:
    healthy.setenv("BILLING_LANGUAGE", "en")
    lines = command("upcoming", "--days", "1", "--format", "csv").stdout.splitlines()
    assert lines[0] == "subscription,user,on,charged,amount,currency,card,code,reason"
    assert "is not a number of days" in command("upcoming", "--days", "x").stderr
