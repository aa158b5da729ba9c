"""What bad input gets, seen from a whole run: one line that names it and the way out, and nothing written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from billing_orchestration.database.engine import create_engine
from billing_orchestration.database.migrating import migrate
from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration.settings import Settings, load_settings
from billing_orchestration_tests.books import NOON
from billing_orchestration_tests.fixtures.postgres import Server, create_service_database, start_server
from billing_orchestration_tests.jobs.service import Run, Service
from billing_orchestration_tests.waiting import wait_until

PENDING_JOB = "matching_pending_payments_job"
SUCCESSFUL_JOB = "matching_successful_payments_job"
ALL_JOBS = (
    "autopayment_job", "expire_payments_job", "expire_subscriptions_job", PENDING_JOB, SUCCESSFUL_JOB,
    "reconciliation_job",
)  # fmt: skip


def is_one_line(run: Run) -> bool:
    """Whether the run failed with a sentence instead of a trace."""
    return not run.ok and bool(run.failure) and "\n" not in run.failure and "Traceback" not in run.failure


# --- Settings


@pytest.mark.parametrize("job", ALL_JOBS)
def test_all_wrong_settings_are_named_at_once_by_every_job_before_anything_is_read(
    service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, job: str
) -> None:
    monkeypatch.chdir(tmp_path)  # no .env of the developer's
    monkeypatch.setenv("BILLING_DATABASE_URL", "mysql://root:hunter2@localhost/billing")
    monkeypatch.delenv("YOOKASSA_SHOP_ID", raising=False)
    monkeypatch.setenv("YOOKASSA_SECRET_KEY", "test_hunter2 copied badly")
    monkeypatch.setenv("BILLING_TIMEZONE", "Mars/Olympus")
    before = service.snapshot()

    run = service.run(job, load=load_settings)

    assert is_one_line(run), run.failure
    for variable in ("BILLING_DATABASE_URL", "YOOKASSA_SHOP_ID", "YOOKASSA_SECRET_KEY", "BILLING_TIMEZONE"):
        assert variable in run.failure
    assert "Nothing was read or written" in run.failure
    assert "hunter2" not in repr(run)
    assert service.sandbox.count() == 0
    assert service.snapshot() == before


# --- The database


def at(service: Service, url: str) -> Callable[[], Settings]:
    """The service's settings with another database."""
    settings = service.settings.model_copy(update={"billing_database_url": url})
    return lambda: settings


def test_a_database_that_cannot_be_reached_or_entered_is_named_with_the_way_out_and_without_the_password(
    service: Service, role_with_password: str
) -> None:
    socket = service.settings.billing_database_url.partition("?")[2]
    wrong = {
        f"postgresql+psycopg://{role_with_password}:hunter2@/postgres?{socket}": "password",
        f"postgresql+psycopg://postgres:@/no_such_database?{socket}": "create that database",
        "postgresql+psycopg://postgres:hunter2@127.0.0.1:1/billing": "start it",
        "postgresql+psycopg://postgres:hunter2@no-such-host.invalid/billing": "host",
    }
    for there, word in wrong.items():
        run = service.run(PENDING_JOB, load=at(service, there))
        assert is_one_line(run), run.failure
        assert "BILLING_DATABASE_URL" in run.failure
        assert word in run.failure
        assert "hunter2" not in repr(run)
    assert service.sandbox.count() == 0


def contents(url: str) -> list[Any]:
    """Every table of a database with its number of rows."""
    with psycopg.connect(url) as connection:
        tables = connection.execute("""
            SELECT schemaname, relname FROM pg_stat_user_tables ORDER BY 1, 2
        """).fetchall()
        counts = [connection.execute(f'SELECT count(*) FROM "{schema}"."{name}"').fetchone() for schema, name in tables]
        return list(zip(tables, counts, strict=True))


@pytest.mark.parametrize("job", ALL_JOBS)
def test_a_database_without_our_schema_is_told_how_to_get_it_and_nothing_is_written(
    service: Service, empty_database_url: str, job: str
) -> None:
    create_service_database(empty_database_url)
    before = contents(empty_database_url)

    run = service.run(job, load=at(service, empty_database_url))

    assert is_one_line(run), run.failure
    assert "no schema billing_orchestration; run: billing-orchestration migrate" in run.failure
    assert service.sandbox.count() == 0
    assert contents(empty_database_url) == before


def test_a_schema_of_another_version_is_named_with_the_way_out(service: Service) -> None:
    service.execute("UPDATE billing_orchestration.schema_version SET version_num = '9999'")
    newer = service.run(PENDING_JOB)
    service.execute("DELETE FROM billing_orchestration.schema_version")
    none = service.run(PENDING_JOB)

    assert is_one_line(newer)
    assert "9999" in newer.failure
    assert "install the version" in newer.failure
    assert is_one_line(none)
    assert "billing-orchestration migrate" in none.failure
    assert service.sandbox.count() == 0


def test_a_database_without_the_services_tables_is_told_apart_from_ours(
    service: Service, empty_database_url: str
) -> None:
    engine = create_engine(empty_database_url)
    migrate(engine, echo=lambda _: None)
    engine.dispose()
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        connection.execute("ALTER TABLE payments RENAME TO payments_of_before")

    run = service.run(PENDING_JOB, load=at(service, empty_database_url))

    assert is_one_line(run), run.failure
    assert "tables are missing in this database: payments" in run.failure
    assert "BILLING_DATABASE_URL" in run.failure


@pytest.fixture
def reader(service: Service, postgres_server: Server) -> Iterator[str]:
    """The URL of a role that may read everything and write nothing of the service's."""
    service.execute("CREATE ROLE reader LOGIN")
    service.execute("GRANT USAGE ON SCHEMA billing_orchestration TO reader")
    service.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
    service.execute("GRANT ALL ON ALL TABLES IN SCHEMA billing_orchestration TO reader")
    try:
        yield service.settings.billing_database_url.replace("postgres@", "reader@", 1)
    finally:
        service.execute("DROP OWNED BY reader")
        service.execute("DROP ROLE reader")


@pytest.mark.parametrize("job", [PENDING_JOB, SUCCESSFUL_JOB, "expire_payments_job", "expire_subscriptions_job"])
def test_a_role_that_may_not_write_fails_the_run_with_what_to_grant_and_fills_no_quarantine(
    service: Service, reader: str, job: str
) -> None:
    plan = service.plan()
    for number in range(3):
        name = service.paid_there(user=f"user-{number}", plan_id=plan)
        service.payment(name, created_at=NOON - timedelta(days=8))
        service.subscription(plan_id=plan, ended_at=NOON - timedelta(days=30))
    before = service.snapshot()

    run = service.run(job, load=at(service, reader))

    assert is_one_line(run), run.failure
    assert "the role of BILLING_DATABASE_URL lacks" in run.failure
    assert "grant them" in run.failure
    assert service.snapshot() == before
    assert service.watermark(job) is None


def test_a_database_that_is_read_only_fails_the_run_in_one_line(service: Service, database_url: str) -> None:
    plan = service.plan()
    name = service.paid_there(plan_id=plan)
    service.payment(name)
    before = service.snapshot()
    url = f"{database_url}&options=-c%20default_transaction_read_only%3Don"

    run = service.run(PENDING_JOB, load=at(service, url))

    assert is_one_line(run), run.failure
    assert "read-only transaction" in run.failure
    assert service.snapshot() == before


# --- PostgreSQL restarts


@pytest.fixture(scope="module")
def own_server() -> Iterator[Server]:
    """A server that these tests may stop and start."""
    with start_server() as server:
        yield server


@pytest.fixture
def elsewhere(own_server: Server, sandbox: Sandbox) -> Iterator[Service]:
    """A service on that server."""
    with own_server.database() as url:
        engine = create_engine(url)
        migrate(engine, echo=lambda _: None)
        yield Service(engine, url, sandbox)
        engine.dispose()


def purchases(service: Service, count: int) -> list[str]:
    """Payments that both matching jobs would settle."""
    plan = service.plan()
    names = [service.paid_there(user=f"user-{number}", plan_id=plan) for number in range(count)]
    for name in names:
        service.payment(name, created_at=service.now - timedelta(minutes=20))
    return names


def while_the_provider_is_read(service: Service, then: Callable[[], None]) -> Run:
    """Run a matching job, and do something after it has connected to the database and before it reads it again."""
    service.timeouts = type(service.timeouts)(connect_s=5.0, charge_read_s=30.0, read_s=30.0)
    service.sandbox.misbehave("list", "none", delay_s=60.0, times=None)
    wait = service.begin(PENDING_JOB)
    wait_until(lambda: service.sandbox.count("list") >= 1)
    then()
    service.sandbox.behave()
    return wait()


def test_a_restart_of_postgresql_between_two_statements_is_not_even_noticed(
    elsewhere: Service, own_server: Server
) -> None:
    names = purchases(elsewhere, 3)

    def restart() -> None:
        own_server.stop()
        own_server.start()

    run = while_the_provider_is_read(elsewhere, restart)

    elsewhere.engine.dispose()
    assert run.ok, run.failure
    assert [elsewhere.settled(name) for name in names] == [["created"]] * 3


def test_a_run_that_loses_postgresql_fails_in_one_line_and_the_next_one_completes_it(
    elsewhere: Service, own_server: Server
) -> None:
    names = purchases(elsewhere, 3)

    try:
        run = while_the_provider_is_read(elsewhere, own_server.stop)
    finally:
        own_server.start()

    elsewhere.engine.dispose()
    assert is_one_line(run), run.failure
    assert "BILLING_DATABASE_URL" in run.failure
    assert elsewhere.watermark(PENDING_JOB) is None
    assert elsewhere.run(PENDING_JOB).ok
    assert [elsewhere.settled(name) for name in names] == [["created"]] * 3


def cut_at_an_update_of(service: Service, table: str) -> None:
    """From now on, whoever changes a row of this table loses the connection in that very statement."""
    service.execute("""
        CREATE FUNCTION cut() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN new; END $$
    """)
    service.execute(f"CREATE TRIGGER cut BEFORE UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION cut()")


@pytest.mark.parametrize("job", [PENDING_JOB, SUCCESSFUL_JOB])
def test_a_connection_that_is_cut_in_the_middle_of_applying_changes_nothing_twice(service: Service, job: str) -> None:
    names = purchases(service, 3)
    # The cut comes in the middle of the transaction: after the subscriptions, before the payments.
    cut_at_an_update_of(service, "payments")
    before = service.snapshot()

    run = service.run(job)

    assert is_one_line(run), run.failure
    assert "the next run completes this one" in run.failure
    assert service.snapshot() == before
    assert service.watermark(job) is None
    service.execute("DROP TRIGGER cut ON payments")
    assert service.run(job).ok
    assert [service.settled(name) for name in names] == [["created"]] * 3
    service.check_books()


@pytest.mark.parametrize("job", [PENDING_JOB, SUCCESSFUL_JOB])
def test_a_connection_that_is_cut_while_a_subscription_is_extended_leaves_its_payment_unsettled(
    service: Service, job: str
) -> None:
    [name] = purchases(service, 1)
    subscription = service.subscription(
        "user-0", plan_id=service.rows("plans")[0].id, ended_at=service.now + timedelta(days=4)
    )
    cut_at_an_update_of(service, "subscriptions")
    before = service.snapshot()

    run = service.run(job)

    assert is_one_line(run), run.failure
    assert service.snapshot() == before
    service.execute("DROP TRIGGER cut ON subscriptions")
    assert service.run(job).ok
    assert service.settled(name) == ["extended"]
    assert service.ended_at(subscription) == (service.now + timedelta(days=4)).replace(month=4)
    service.check_books()


# --- The provider


@pytest.mark.parametrize("job", [PENDING_JOB, SUCCESSFUL_JOB])
def test_a_wrong_shop_id_or_key_fails_the_run_with_that_sentence_after_one_request(service: Service, job: str) -> None:
    purchases(service, 3)
    service.provider.shop_id = "999999"
    before = service.snapshot()

    run = service.run(job)

    assert is_one_line(run), run.failure
    assert "YOOKASSA_SHOP_ID" in run.failure
    assert "YOOKASSA_SECRET_KEY" in run.failure
    assert "broke off" not in run.failure
    assert service.sandbox.count() == 1
    assert service.snapshot() == before


# One of each kind; the client's own tests have them all.
WRONG_ANSWERS: dict[str, dict[str, Any]] = {
    "HTML": {"effect": "html_before", "status": 200},
    "truncated JSON": {"effect": "truncated"},
    "a reset": {"effect": "reset_before"},
    "a 403": {"effect": "forbidden"},
    "a page without items": {"effect": "body_before", "status": 200, "body": '{"type": "list"}'},
    "a cursor that leads back": {"effect": "change", "set": {"next_cursor": "again"}},
}


@pytest.mark.parametrize("wrong", WRONG_ANSWERS.values(), ids=WRONG_ANSWERS)
def test_a_provider_that_answers_wrongly_is_asked_within_a_bound_and_nothing_is_decided_from_it(
    service: Service, wrong: dict[str, Any]
) -> None:
    purchases(service, 2)
    service.provider.switches.refuse_unknown_fields = False
    service.sandbox.misbehave("list", times=None, **wrong)
    before = service.snapshot()

    run = service.run(PENDING_JOB)

    assert is_one_line(run), run.failure
    assert "Nothing was decided from it." in run.failure
    # Three tries of the first list; the second is not even asked for.
    assert 1 <= service.sandbox.count() <= 3
    assert service.snapshot() == before
    service.sandbox.behave()
    assert service.run(PENDING_JOB).report["applied"] == 2


def test_a_provider_that_is_silent_is_waited_for_within_a_bound(service: Service) -> None:
    purchases(service, 2)
    service.timeouts = type(service.timeouts)(connect_s=1.0, charge_read_s=0.1, read_s=0.1)
    service.sandbox.misbehave("list", "silence_before", times=None)
    before = service.snapshot()

    run = service.run(PENDING_JOB)

    assert is_one_line(run), run.failure
    assert "no answer within the time allowed" in run.failure
    assert service.snapshot() == before


def test_a_provider_that_cannot_be_reached_is_named_by_its_setting(service: Service) -> None:
    nowhere = service.settings.model_copy(update={"yookassa_api_url": "http://127.0.0.1:1/v3"})
    before = service.snapshot()

    run = service.run(SUCCESSFUL_JOB, load=lambda: nowhere)

    assert is_one_line(run), run.failure
    assert "YOOKASSA_API_URL" in run.failure
    assert service.snapshot() == before


# --- Flawed rows


@pytest.mark.parametrize("job", ALL_JOBS)
def test_a_database_with_every_flaw_of_real_data_stops_no_job(
    service: Service, empty_database_url: str, job: str
) -> None:
    create_service_database(empty_database_url)
    engine = create_engine(empty_database_url)
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        connection.execute("""
            INSERT INTO subscriptions (user_id, status, started_at, ended_at, plan_id, created_at, updated_at) VALUES
                ('fourth', 'ACTIVE', 'infinity', '-infinity', 2, 'infinity', '-infinity'),
                ('', 'ACTIVE', NULL, '2026-03-01', NULL, '2026-03-01', '2026-03-01'),
                ('sixth', 'ACTIVE', '0044-03-15 BC', '2026-03-12 09:00', 1, 'epoch', 'epoch');
            INSERT INTO payments (subscription_id, payment_provider_id, status, currency, amount, external_payment_id,
                                  created_at, updated_at) VALUES
                (6, 1, 'SUCCEEDED', NULL, 299, '', '-infinity', 'infinity'),
                (6, 1, 'PENDING', 'RUB', 'NaN', 'once', 'infinity', 'epoch'),
                (NULL, 1, 'PENDING', NULL, 0.01, repeat('x', 3000), '-infinity', 'epoch');
        """)
    migrate(engine, echo=lambda _: None)
    flawed = Service(engine, empty_database_url, service.sandbox)
    plan = flawed.plan("299.00")
    for name in ("once", "twice", "paid"):
        flawed.paid_there(name, user="anna", plan_id=plan)

    # Its payments are of two providers, and one of them is this shop.
    ours = {"yookassa_provider_ids": str(flawed.provider_id)}
    flawed.settings = flawed.settings.model_copy(update=ours)
    run = flawed.run(job)
    again = flawed.run(job)
    engine.dispose()

    assert run.ok, run.failure
    assert again.ok, again.failure
    assert again.report["applied"] == 0
    if job == SUCCESSFUL_JOB:
        assert run.report["applied"] == 1
