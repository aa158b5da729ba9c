"""Killed anywhere, run again, and the books agree: a short matrix always, all of it with `make torture`."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration_tests.books import NOON
from billing_orchestration_tests.fixtures.postgres import Server
from billing_orchestration_tests.jobs.service import Service
from billing_orchestration_tests.torture.extent import NIGHT, ROUNDS, THOROUGH
from billing_orchestration_tests.torture.kill_matrix import Stage, play
from billing_orchestration_tests.torture.kill_oracle import Expected, complaints
from billing_orchestration_tests.torture.kill_points import AFTER, BEFORE, Death, Step, name_of
from billing_orchestration_tests.torture.kill_runner import Runner
from billing_orchestration_tests.torture.kill_scenarios import ALL, SHORT, Scenario

# In `make torture` every job, and as many random rounds as it says (0: these).
SEEDS = range(ROUNDS or 12) if THOROUGH else (1,)
PROCESSES = 8 if THOROUGH else 4


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    """The process that forks; its imports take three seconds."""
    with Runner() as running:
        yield running


@pytest.mark.parametrize("scenario", ALL if THOROUGH else [SHORT], ids=lambda scenario: scenario.name)
def test_a_run_that_is_killed_at_any_step_is_completed_by_the_next_ones(
    postgres_server: Server,
    migrated_template: str,
    sandbox: Sandbox,
    runner: Runner,
    scenario: Scenario,
    capsys: pytest.CaptureFixture[str],
) -> None:
    matrix = play(postgres_server, migrated_template, sandbox, runner, scenario, thorough=THOROUGH, shares=3)

    with capsys.disabled():
        if THOROUGH or matrix.lost:
            print(f"\n{matrix.table()}")
    assert not matrix.lost
    # Charged side by side, a run has as many transactions as answers happen to come together: a fourth commit of one
    # run may be none of the next. Each kind of step is died at all the same, before and after, where all are tried.
    assert not matrix.missed or (THOROUGH and not NIGHT)
    assert len(matrix.unreached) * 4 <= len(matrix.cells), matrix.unreached
    if scenario is SHORT:
        # The instruments see what leaves the process; a blind matrix would be green as well.
        assert matrix.names >= {
            "pg_try_advisory_lock", "INSERT renewal_attempts", "POST /payments", "SELECT payments FOR NO KEY UPDATE",
            # The one statement that writes a settlement: payment row, settlement, audit trail, attempt, extension.
            "UPDATE subscriptions", "COMMIT", "pg_advisory_unlock",
        }  # fmt: skip
        # Each settlement is followed by the COMMIT of its own transaction, and dies at that, too.
        times = Counter(step.name for step in matrix.steps)
        assert times["COMMIT"] >= times["UPDATE subscriptions"] + times["UPDATE renewal_attempts"], times


@pytest.mark.parametrize("seed", SEEDS)
def test_processes_that_charge_at_once_and_die_at_random_charge_each_period_once(
    postgres_server: Server, migrated_template: str, sandbox: Sandbox, runner: Runner, seed: int
) -> None:
    """Seed 0: none of them dies. A failure names its seed in the test's name."""
    chance = random.Random(seed)
    scenario = ALL[2] if seed % 5 == 4 else ALL[1]
    stage = Stage(postgres_server, migrated_template, sandbox, runner, scenario)
    try:
        stage.warm_up()
        lived, _ = stage.live()
        deaths = [
            Death(chance.choice(lived.steps), chance.choice((BEFORE, AFTER)))
            for _ in range(chance.randint(1, PROCESSES - 1) if seed else 0)
        ]
        _, wrong = stage.race(PROCESSES, deaths)
    finally:
        stage.close()

    assert not wrong, deaths


def deaths_of_the_command() -> list[Death]:
    if not THOROUGH:
        return [Death(Step("POST /payments", 1), AFTER)]
    names = ("INSERT renewal_attempts", "POST /payments", "UPDATE subscriptions", "COMMIT")
    return [Death(Step(name, 1), when) for name in names for when in (BEFORE, AFTER)]


@pytest.mark.parametrize("death", deaths_of_the_command(), ids=lambda d: f"{d.when} {d.step.name} {d.step.nth}")
def test_the_command_of_an_operator_that_is_killed_is_completed_by_the_next_one(
    engine: sa.Engine, database_url: str, sandbox: Sandbox, tmp_path: Path, death: Death
) -> None:
    now = datetime.now(timezone.utc).replace(microsecond=0)
    service = Service(engine, database_url, sandbox, now=now)
    end = now - timedelta(hours=1)
    subscription = service.subscriber(service.plan(duration=30, unit="days"), ended_at=end)
    sandbox.clock.run()
    command = [sys.executable, "-m", "billing_orchestration_tests.torture.kill_cli", "job", "execute"]
    command += ["-m", "billing_orchestration.definitions", "-j", "autopayment_job"]
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DAGSTER_", "YOOKASSA_"))}
    environment |= {
        "BILLING_DATABASE_URL": database_url,
        "YOOKASSA_SHOP_ID": sandbox.shop_id,
        "YOOKASSA_SECRET_KEY": sandbox.secret_key,
        "YOOKASSA_API_URL": sandbox.url,
        # The sandbox is done sooner than a real provider may be.
        "YOOKASSA_CHARGE_DONE_S": "5",
        "PYTHONPATH": str(root),
    }

    def execute(**more: str) -> int:
        return subprocess.run(
            command, env={**environment, **more}, cwd=tmp_path, capture_output=True, timeout=120, check=False
        ).returncode

    killed = execute(TORTURE_DEATH=json.dumps([death.step.name, death.step.nth, death.when]))
    again = execute()

    assert (killed, again) == (-signal.SIGKILL, 0)
    expected = Expected(
        ends={subscription: ("ACTIVE", end + timedelta(days=30))}, attempts={subscription: ["SUCCEEDED"]}
    )
    assert complaints(database_url, sandbox.provider.ledger(), expected) == []


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("SELECT id FROM payments WHERE id = 1", None),
        ("WITH x AS (SELECT 1) SELECT updated_at FROM x", None),
        ("INSERT INTO billing_orchestration.settlements (a) SELECT 1", "INSERT settlements"),
        (
            "WITH o AS (SELECT 1 FROM s FOR SHARE OF s) INSERT INTO x SELECT 1 ON CONFLICT DO UPDATE SET a = 1",
            "INSERT x",
        ),
        ("WITH o AS (SELECT 1), e AS (UPDATE s SET a = 1 RETURNING 1) INSERT INTO t SELECT 1 FROM e", "INSERT t"),
        ("UPDATE payments p SET status = 'X' FROM y", "UPDATE payments"),
        ("SELECT a FROM payments WHERE x ORDER BY id FOR NO KEY UPDATE", "SELECT payments FOR NO KEY UPDATE"),
        ("SELECT id, pg_try_advisory_lock(1, 2) FROM unnest(x) AS id", "pg_try_advisory_lock"),
        ("DELETE FROM billing_orchestration.watermarks", "DELETE watermarks"),
        ("MERGE INTO billing_orchestration.watermarks w USING x ON true", "MERGE watermarks"),
        ("COPY billing_orchestration.audit_trail (at) FROM STDIN", "COPY audit_trail"),
    ],
)
def test_a_statement_that_writes_or_locks_is_a_step(statement: str, name: str | None) -> None:
    assert name_of(statement) == name


CORRUPTIONS = {
    "a grant without a success": "INSERT INTO billing_orchestration.settlements SELECT 'made-up', kind, payment_id,"
    " subscription_id, attempt_id, user_id, plan_id, amount, currency, period_start, period_end, settled_at, run_id"
    " FROM billing_orchestration.settlements LIMIT 1",
    "a lost grant": "DELETE FROM billing_orchestration.settlements",
    "an extension too many": "UPDATE subscriptions SET ended_at = ended_at + interval '1 month'",
    "a missing row": "DELETE FROM payments WHERE external_payment_id NOT LIKE 'method-%'",
    "a row too many": "INSERT INTO payments SELECT id + 1000, subscription_id, payment_provider_id, payment_method,"
    " status, currency, amount, external_payment_id, created_at, updated_at FROM payments"
    " WHERE external_payment_id NOT LIKE 'method-%'",
    "another amount": "UPDATE billing_orchestration.settlements SET amount = 1",
    "a change without its trail": "DELETE FROM billing_orchestration.audit_trail",
    "an open attempt": "UPDATE billing_orchestration.renewal_attempts SET state = 'UNKNOWN'",
    "a subscription out of nothing": "INSERT INTO subscriptions (user_id, status, started_at, ended_at, created_at,"
    " updated_at) SELECT 'x', status, started_at, ended_at, created_at, updated_at FROM subscriptions",
}


@pytest.mark.parametrize("corruption", [*CORRUPTIONS.values(), None], ids=[*CORRUPTIONS, "a second charge"])
def test_the_judge_notices(engine: sa.Engine, database_url: str, sandbox: Sandbox, corruption: str | None) -> None:
    service = Service(engine, database_url, sandbox)
    subscription = service.subscriber()
    service.tolerate_duplicates()
    service.run("autopayment_job")
    expected = Expected(ends={subscription: ("ACTIVE", NOON.replace(month=4))}, attempts={subscription: ["SUCCEEDED"]})
    assert complaints(database_url, service.provider.ledger(), expected) == []

    if corruption is None:
        [charge] = service.charges()
        service.provider.add_payment(id="again", amount=Decimal(299), metadata=dict(charge.metadata))
    else:
        with psycopg.connect(database_url) as connection:
            connection.execute(corruption)

    assert complaints(database_url, service.provider.ledger(), expected) != []
