"""Databases as other people have set them up: the jobs work on them, or say in one line why they cannot."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import psycopg
import pytest
import sqlalchemy as sa

from billing_orchestration.database.conventions import SERVICE_TABLES
from billing_orchestration.database.engine import create_engine
from billing_orchestration.database.errors import ServiceTablesMissing
from billing_orchestration.database.migrating import migrate
from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration_tests.books import NOON
from billing_orchestration_tests.fixtures.installation import ROOT
from billing_orchestration_tests.fixtures.pgbouncer import pooled
from billing_orchestration_tests.fixtures.postgres import SERVICE_SCHEMA, Server
from billing_orchestration_tests.jobs.service import Run, Service

ALL_JOBS = (
    "matching_pending_payments_job", "matching_successful_payments_job", "autopayment_job", "expire_payments_job",
    "expire_subscriptions_job",
)  # fmt: skip


@contextmanager
def service_on(url: str, sandbox: Sandbox) -> Iterator[Service]:
    """A service on an empty database."""
    engine = create_engine(url, pool_size=20)
    try:
        migrate(engine, echo=lambda _: None)
        yield Service(engine, url, sandbox)
    finally:
        engine.dispose()


def something_for_every_job(service: Service, user: str) -> Callable[[], None]:
    """Rows of this user's that every job changes; call the result to see that all of them did."""
    begun, renewed = f"{user} began", f"{user} is due"
    pending = service.payment(service.paid_there("pending", user=begun, plan_id=service.monthly))
    service.paid_there("unknown here", user=user, plan_id=service.monthly)
    due = service.subscriber(user=renewed)
    stale = service.payment(created_at=NOON - timedelta(days=30))
    over = service.subscription(f"{user} is gone", ended_at=NOON - timedelta(days=40))

    def check() -> None:
        assert service.status("payments", pending) == "SUCCEEDED"
        assert [row.user_id for row in service.rows("subscriptions", "user_id = :user", user=user)] == [user]
        assert service.ended_at(due) > NOON
        assert service.status("payments", stale) == "EXPIRED"
        assert service.status("subscriptions", over) == "EXPIRED"
        service.check_books()

    return check


def run_all(service: Service) -> list[Run]:
    return [service.run(job) for job in ALL_JOBS]


DEFAULTS = {
    "client_encoding": "'LATIN1'",
    "DateStyle": "'German, DMY'",
    "TimeZone": "'Asia/Tokyo'",
    "row_security": "on",
    "synchronous_commit": "off",
    "idle_session_timeout": "'200ms'",
    "statement_timeout": "'2s'",
    "default_transaction_isolation": "'serializable'",
    "search_path": "''",
}


def test_what_a_database_sets_for_its_sessions_changes_nothing_for_ours(
    postgres_server: Server, service: Service, database_url: str
) -> None:
    check = something_for_every_job(service, "жук")
    name = sa.make_url(database_url).database
    with postgres_server.connect() as connection:
        for setting, value in DEFAULTS.items():
            connection.execute(f"ALTER DATABASE {name} SET {setting} = {value}".encode())
    service.engine.dispose()

    runs = run_all(service)

    assert [run.failure for run in runs] == [""] * len(ALL_JOBS)
    check()


@pytest.mark.parametrize(
    ("encoding", "user", "cannot"),
    [("LATIN1", "José", "жук"), ("WIN1251", "жук", "José"), ("SQL_ASCII", "жук", None), ("UTF8", "жук", None)],
)
def test_what_a_server_cannot_store_is_that_rows_fault(
    postgres_server: Server, sandbox: Sandbox, encoding: str, user: str, cannot: str | None
) -> None:
    with postgres_server.database(encoding=encoding) as url, service_on(url, sandbox) as service:
        if cannot is not None:
            service.paid_there("of nobody here", user=cannot, plan_id=service.monthly)
            service.paid_there(f"payment of {cannot}", user="anna", plan_id=service.monthly)
        check = something_for_every_job(service, user)

        first, again = run_all(service), run_all(service)

        assert [run.failure for run in (*first, *again)] == [""] * 2 * len(ALL_JOBS)
        check()
        problems = service.rows("quarantine")
        assert [problem.kind for problem in problems] == (["not_writable"] * 2 if cannot else [])
        assert all(run.report["newly quarantined"] == 0 for run in again)


def test_a_days_books_are_compared_whatever_ids_the_server_cannot_store(
    postgres_server: Server, sandbox: Sandbox
) -> None:
    with postgres_server.database(encoding="LATIN1") as url, service_on(url, sandbox) as service:
        for name in ("платёж", "payment"):
            service.paid_there(name, user=name, plan_id=service.monthly, created_at=NOON - timedelta(days=1))

        first, again = service.run("reconciliation_job"), service.run("reconciliation_job")

        assert "Waiting for a person: 1" in first.failure
        assert "Waiting for a person: 1" in again.failure
        assert service.settled("payment") == ["created"]
        assert [problem.kind for problem in service.rows("quarantine", "resolved_at IS NULL")] == ["not_writable"]
        assert again.report["newly quarantined"] == 0


def test_bytes_of_another_encoding_in_one_row_stop_no_other(postgres_server: Server, sandbox: Sandbox) -> None:
    with postgres_server.database(encoding="SQL_ASCII") as url, service_on(url, sandbox) as service:
        odd = service.subscriber(user="odd")
        check = something_for_every_job(service, "жук")
        service.execute(
            "UPDATE subscriptions SET user_id = convert_from('\\xe6f3ea', 'SQL_ASCII') WHERE id = :id", id=odd
        )

        runs = run_all(service)

        assert [run.failure for run in runs] == [""] * len(ALL_JOBS)
        check()
        assert service.charged()[odd] == 0


def test_ids_past_two_to_the_31_are_worked_on(postgres_server: Server, sandbox: Sandbox) -> None:
    with postgres_server.database() as url, psycopg.connect(url, autocommit=True) as connection:
        wide = re.sub(r"\bserial\b", "bigserial", SERVICE_SCHEMA.replace("_id integer", "_id bigint"))
        connection.execute(wide.encode())
        for table in SERVICE_TABLES:
            connection.execute(f"SELECT setval('{table}_id_seq', 3000000000)".encode())
        with service_on(url, sandbox) as service:
            check = something_for_every_job(service, "anna")

            runs = run_all(service)

            assert [run.failure for run in runs] == [""] * len(ALL_JOBS)
            check()
            assert min(row.id for row in service.rows("payments")) > 2**31
            assert all(row.payment_id > 2**31 for row in service.rows("settlements"))


# --- What cannot work is refused before money moves


def refusal(service: Service, *changes: str) -> str:
    """What every job says that would have changed something, in one line; nothing happens on either side."""
    something_for_every_job(service, "anna")
    for change in changes:
        service.execute(change)
    ledger, before = service.provider.ledger(), service.snapshot()

    runs = run_all(service)

    assert service.snapshot() == before
    assert service.provider.ledger() == ledger
    assert service.charges() == []
    [failure] = {run.failure for run in runs}
    assert "\n" not in failure
    return failure


@pytest.fixture
def become(service: Service, database_url: str) -> Iterator[Callable[[str], None]]:
    """Let the service's jobs run as another role."""

    def become(role: str) -> None:
        url = sa.make_url(database_url).set(username=role).render_as_string(hide_password=False)
        service.settings = service.settings.model_copy(update={"billing_database_url": url})

    yield become
    for role in service.scalars("SELECT rolname FROM pg_roles WHERE rolname IN ('somebody', 'billing_jobs')"):
        service.execute(f"DROP OWNED BY {role}")
        service.execute(f"DROP ROLE {role}")


ALL_RIGHTS = (
    "CREATE ROLE somebody LOGIN",
    "GRANT USAGE ON SCHEMA billing_orchestration TO somebody",
    "GRANT ALL ON ALL TABLES IN SCHEMA public, billing_orchestration TO somebody",
    "GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO somebody",
)


A_MANDATORY_COLUMN = (
    "ALTER TABLE payments ADD region text NOT NULL DEFAULT 'eu'",
    "ALTER TABLE payments ALTER region DROP DEFAULT",
)


def test_rows_that_a_policy_hides_are_refused_by_the_policys_name(
    service: Service, become: Callable[[str], None]
) -> None:
    become("somebody")

    failure = refusal(
        service,
        *ALL_RIGHTS,
        "ALTER TABLE payments ENABLE ROW LEVEL SECURITY",
        "CREATE POLICY of_a_tenant ON payments USING (external_payment_id LIKE 'a%')",
    )

    assert "row level security hides rows of payments from this role (by policy of_a_tenant)" in failure
    assert "BYPASSRLS" in failure


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (A_MANDATORY_COLUMN, "payments.region is NOT NULL and has no default"),
        (("SELECT setval('payments_id_seq', 2147483646)",), "payments has 1 ids left"),
        (("ALTER TABLE payments ALTER id TYPE bigint", "SELECT setval('payments_id_seq', 2147483000)"),
         "payments has 647 ids left"),
        (("ALTER TABLE subscriptions ALTER id DROP DEFAULT",), "subscriptions.id is NOT NULL and has no default"),
        (("CREATE RULE nothing AS ON UPDATE TO subscriptions WHERE NEW.id = 1 DO INSTEAD NOTHING",),
         "the rule nothing on subscriptions replaces what is written"),
        ((*ALL_RIGHTS, "REVOKE INSERT ON payments FROM somebody"), "lacks INSERT on payments"),
        ((*ALL_RIGHTS, "REVOKE UPDATE ON subscriptions FROM somebody",
          "GRANT UPDATE (status, updated_at) ON subscriptions TO somebody"), "UPDATE (ended_at) on subscriptions"),
        ((*ALL_RIGHTS, "REVOKE USAGE ON SEQUENCE payments_id_seq FROM somebody"), "USAGE on public.payments_id_seq"),
    ],
)  # fmt: skip
def test_what_could_not_be_written_after_a_charge_is_refused_before_it(
    service: Service, become: Callable[[str], None], changes: tuple[str, ...], words: str
) -> None:
    if changes[0] == ALL_RIGHTS[0]:
        become("somebody")

    assert words in refusal(service, *changes)


def test_a_mandatory_column_that_a_trigger_fills_stops_nobody(service: Service) -> None:
    check = something_for_every_job(service, "anna")
    for change in A_MANDATORY_COLUMN:
        service.execute(change)
    service.meddle("payments", "true", "NEW.region := 'ru'", event="INSERT")

    runs = run_all(service)

    assert [run.failure for run in runs] == [""] * len(ALL_JOBS)
    check()


def test_the_least_rights_of_the_runbook_are_enough_for_every_job(
    service: Service, become: Callable[[str], None]
) -> None:
    runbook = (ROOT / "docs" / "operations.md").read_text()
    [sql] = re.findall(r"```sql\n(CREATE ROLE billing_jobs.*?)```", runbook, re.DOTALL)
    service.execute(sql)
    check = something_for_every_job(service, "anna")
    become("billing_jobs")

    runs = run_all(service)

    assert [run.failure for run in runs] == [""] * len(ALL_JOBS)
    check()


# --- Another schema


def elsewhere(service: Service, url: str, schema: str, *, on_the_path: bool) -> None:
    """The service has its tables in a schema of its own, which its database may name."""
    service.execute(f"CREATE SCHEMA {schema}")
    for table in SERVICE_TABLES:
        service.execute(f"ALTER TABLE {table} SET SCHEMA {schema}")
    if on_the_path:
        service.execute(f"ALTER DATABASE {sa.make_url(url).database} SET search_path = {schema}, public")
    service.engine.dispose()


def test_tables_in_another_schema_of_the_search_path_are_worked_on(service: Service, database_url: str) -> None:
    elsewhere(service, database_url, "billing", on_the_path=True)
    check = something_for_every_job(service, "anna")

    runs = run_all(service)

    assert [run.failure for run in runs] == [""] * len(ALL_JOBS)
    check()
    # A schema named like the role comes first on PostgreSQL's own path.
    assert migrate(service.engine, echo=lambda _: None).done == ()
    assert service.scalars("SELECT count(*) FROM pg_class WHERE relname = 'payments'") == [1]


def test_tables_off_the_search_path_are_named_and_migrate_creates_no_second_set(
    service: Service, database_url: str
) -> None:
    elsewhere(service, database_url, "billing", on_the_path=False)

    failures = {service.run(job).failure for job in ALL_JOBS}
    with pytest.raises(ServiceTablesMissing) as refused:
        migrate(service.engine, echo=lambda _: None)

    for text in (*failures, str(refused.value)):
        assert "in the schema billing, off the search path" in text
        assert "options=-c%20search_path%3Dbilling" in text
    assert service.scalars("SELECT count(*) FROM pg_class WHERE relname = 'payments'") == [1]
    # As it says.
    service.settings = service.settings.model_copy(
        update={"billing_database_url": f"{database_url}&options=-c%20search_path%3Dbilling"}
    )
    assert service.run("expire_payments_job").ok


def test_two_sets_of_tables_on_the_search_path_are_refused_until_one_is_named(
    service: Service, database_url: str
) -> None:
    service.execute("CREATE SCHEMA old")
    for table in SERVICE_TABLES:
        service.execute(f"CREATE TABLE old.{table} (LIKE {table} INCLUDING ALL)")
    name = sa.make_url(database_url).database
    service.execute(f"ALTER DATABASE {name} SET search_path = old, public")

    failure = refusal(service)

    assert "in several schemas on the search path: old, public" in failure
    service.execute(f"ALTER DATABASE {name} SET search_path = public")
    assert service.run("expire_payments_job").ok


# --- A pooler


def through(service: Service, url: str) -> None:
    service.settings = service.settings.model_copy(update={"billing_database_url": url})


def test_a_pooler_that_keeps_sessions_is_worked_through(service: Service, database_url: str) -> None:
    check = something_for_every_job(service, "anna")
    with pooled(database_url, "session") as url:
        through(service, url)

        runs = run_all(service)

        assert [run.failure for run in runs] == [""] * len(ALL_JOBS)
        check()


@pytest.mark.parametrize("mode", ["transaction", "statement"])
def test_a_pooler_that_lends_sessions_out_is_refused_in_one_line(
    service: Service, database_url: str, mode: str
) -> None:
    with pooled(database_url, mode) as url:
        through(service, url)

        assert "pool_mode = session" in refusal(service)
