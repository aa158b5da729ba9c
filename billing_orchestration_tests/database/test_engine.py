"""Connections, what their failures say, and the one query with which a run checks the schema."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone

import psycopg
import pytest
import sqlalchemy as sa

from billing_orchestration.database.engine import create_engine, keep_to_indexes, translate, translated
from billing_orchestration.database.errors import (
    AccessDenied,
    BillingDatabaseError,
    DatabaseBusy,
    DatabaseFull,
    DatabaseUnavailable,
    RowRefused,
    SchemaMissing,
    SchemaOutdated,
    SchemaTooNew,
    ServiceTablesMissing,
)
from billing_orchestration.database.health import HEAD_REVISION, check_revisions, check_schema
from billing_orchestration.database.tables import payment_providers
from billing_orchestration_tests.fixtures.postgres import (
    PASSWORD,
    WITH_PASSWORD,
    Server,
    create_service_database,
    start_server,
)


def failure(url: str) -> BillingDatabaseError:
    """Connect, and hand back how it failed; every failure is one line without the password."""
    engine = create_engine(url)
    try:
        with pytest.raises(BillingDatabaseError) as caught, translated(), engine.connect() as connection:
            check_schema(connection)
    finally:
        engine.dispose()
    text = str(caught.value)
    assert "\n" not in text
    assert "secret" not in text
    return caught.value


def test_a_session_speaks_utc_and_gives_up_on_locks_and_statements(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        shown = {
            name: connection.scalar(sa.text(f"SHOW {name}"))
            for name in (
                "timezone",
                "search_path",
                "lock_timeout",
                "statement_timeout",
                "idle_in_transaction_session_timeout",
                "application_name",
            )
        }
    assert shown == {
        "timezone": "UTC",
        "search_path": "public",
        "lock_timeout": "10s",
        "statement_timeout": "5min",
        "idle_in_transaction_session_timeout": "2min",
        "application_name": "tests",
    }


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg", "postgresql+psycopg2"])
def test_every_accepted_scheme_ends_at_psycopg_3(database_url: str, scheme: str) -> None:
    engine = create_engine(database_url.replace("postgresql", scheme, 1))
    with engine.connect() as connection:
        assert isinstance(connection.connection.driver_connection, psycopg.Connection)
    engine.dispose()


def test_a_session_that_keeps_to_indexes_does_not_keep_the_plan_of_an_empty_table(engine: sa.Engine) -> None:
    """A run's first batches meet tables of nothing; their plans are kept, and the last ones meet a million rows."""

    def plan(connection: sa.Connection) -> str:
        connection.exec_driver_sql("CREATE TEMPORARY TABLE small (id int PRIMARY KEY)")
        connection.exec_driver_sql("INSERT INTO small VALUES (1)")
        connection.exec_driver_sql("ANALYZE small")
        connection.exec_driver_sql("SET LOCAL plan_cache_mode = force_generic_plan")
        connection.exec_driver_sql("PREPARE one (int[]) AS SELECT FROM small WHERE id = ANY($1)")
        told = "".join(connection.exec_driver_sql("EXPLAIN EXECUTE one ('{1}')").scalars())
        connection.exec_driver_sql("DEALLOCATE one")
        return told

    with engine.connect() as ordinary:
        assert "Seq Scan" in plan(ordinary)
    with engine.connect() as session:
        session.detach()
        keep_to_indexes(session)
        session.rollback()
        assert "Seq Scan" not in plan(session)
    with engine.connect() as of_the_pool:
        assert of_the_pool.scalar(sa.text("SHOW enable_seqscan")) == "on"


def test_options_in_the_url_win_but_never_over_the_time_zone(database_url: str) -> None:
    engine = create_engine(f"{database_url}&options=-c%20lock_timeout%3D7s%20-c%20timezone%3DAsia/Tokyo")
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SHOW lock_timeout")) == "7s"
        assert connection.scalar(sa.text("SHOW timezone")) == "UTC"
        assert connection.scalar(sa.text("SHOW statement_timeout")) == "5min"
    engine.dispose()


def test_an_instant_comes_back_as_it_was_whatever_the_servers_zone(postgres_server: Server, database_url: str) -> None:
    name = sa.make_url(database_url).database
    with postgres_server.connect() as connection:
        connection.execute(f"ALTER DATABASE {name} SET timezone = 'Asia/Tokyo'")
    instant = datetime(2026, 3, 1, 21, 30, tzinfo=timezone.utc)
    engine = create_engine(database_url)
    with engine.begin() as connection_:
        row = {"name": "yookassa", "created_at": instant, "updated_at": instant}
        connection_.execute(payment_providers.insert().values(row))
        assert connection_.scalar(sa.select(payment_providers.c.created_at)) == instant
        assert connection_.scalar(sa.text("SELECT created_at::text FROM payment_providers")) == "2026-03-01 21:30:00"
    engine.dispose()


def test_a_refused_connection_names_the_setting_and_the_way_out() -> None:
    with socket.socket() as bound_but_deaf:
        bound_but_deaf.bind(("127.0.0.1", 0))
        port = bound_but_deaf.getsockname()[1]
        error = failure(f"postgresql://billing:secret@127.0.0.1:{port}/billing")
    assert isinstance(error, DatabaseUnavailable)
    assert "BILLING_DATABASE_URL" in str(error)
    assert "refused" in str(error)
    assert "is PostgreSQL running there?" in str(error)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda url: url.set(username=WITH_PASSWORD, password="wrong-secret"), "the user or the password in it"),
        (lambda url: url.set(username=WITH_PASSWORD), "the server wants one"),
        (lambda url: url.set(username="nobody_here"), "create that role, or correct the user"),
        (lambda url: url.set(database="no_such_database"), "create that database, or correct its name"),
        (lambda url: url.set(query={"host": "/no/such/folder"}), "no server listens on that socket"),
        (lambda url: url.set(host="no-such-host.invalid", query={}), "correct the host"),
        (lambda url: url.update_query_dict({"schema": "public"}), "remove that option after the `?`"),
        (lambda url: url.update_query_dict({"pool_timeout": "5"}), "remove that option after the `?`"),
    ],
)  # fmt: skip
def test_a_wrong_address_names_the_setting_and_the_way_out(
    database_url: str, role_with_password: str, change: Callable[[sa.URL], sa.URL], words: str
) -> None:
    error = failure(change(sa.make_url(database_url)).render_as_string(hide_password=False))
    assert isinstance(error, DatabaseUnavailable)
    assert str(error).startswith("cannot connect to the database of BILLING_DATABASE_URL: ")
    assert words in str(error)


def test_the_right_password_connects(database_url: str, role_with_password: str) -> None:
    engine = create_engine(
        sa.make_url(database_url).set(username=WITH_PASSWORD, password=PASSWORD).render_as_string(hide_password=False)
    )
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT current_user")) == WITH_PASSWORD
    engine.dispose()


def test_a_lock_that_is_held_too_long_is_busy_and_not_broken(database_url: str) -> None:
    holder = create_engine(database_url)
    waiter = create_engine(database_url, session={"lock_timeout": "50ms"})
    with holder.begin() as held, waiter.connect() as connection:
        held.execute(sa.text("LOCK TABLE payments"))
        with pytest.raises(DatabaseBusy, match="changed nothing"), translated():
            connection.execute(sa.text("SELECT 1 FROM payments"))
    holder.dispose()
    waiter.dispose()


def test_a_session_that_a_timeout_of_the_servers_ended_names_it(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        connection.execute(sa.text("SET idle_in_transaction_session_timeout = '1ms'"))
        time.sleep(0.2)
        with pytest.raises(DatabaseUnavailable, match="longer than idle_in_transaction_session_timeout"), translated():
            connection.execute(sa.text("SELECT 1"))
    with engine.connect() as connection:
        connection.execute(sa.text("SET idle_session_timeout = '1ms'"))
        connection.commit()
        time.sleep(0.2)
        with pytest.raises(DatabaseUnavailable, match="SET idle_session_timeout = 0"), translated():
            connection.execute(sa.text("SELECT 1"))
    # PostgreSQL 17 has one more.
    error = psycopg.errors.lookup("25P04")("terminating connection due to transaction timeout")
    assert isinstance(translate(error), DatabaseUnavailable)
    assert "SET transaction_timeout" in str(translate(error))


def test_a_role_with_too_many_connections_is_told_so(postgres_server: Server, database_url: str) -> None:
    with postgres_server.connect() as connection:
        connection.execute("CREATE ROLE narrow LOGIN CONNECTION LIMIT 1")
        url = sa.make_url(database_url).set(username="narrow").render_as_string(hide_password=False)
        try:
            with psycopg.connect(url):
                error = failure(url)
        finally:
            connection.execute("DROP ROLE narrow")
    assert isinstance(error, DatabaseUnavailable)
    assert "raise the role's limit" in str(error)


def test_rows_that_a_policy_hides_are_an_error_that_says_so(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        connection.execute(sa.text("ALTER TABLE payments ENABLE ROW LEVEL SECURITY"))
        connection.execute(sa.text("CREATE ROLE tenant"))
        connection.execute(sa.text("GRANT SELECT ON payments TO tenant"))
        connection.execute(sa.text("SET ROLE tenant"))
        with pytest.raises(AccessDenied, match="BYPASSRLS"), translated():
            connection.execute(sa.text("SELECT count(*) FROM payments"))


def test_an_endless_statement_is_cut(database_url: str) -> None:
    engine = create_engine(database_url, session={"statement_timeout": "50ms"})
    with engine.connect() as connection, pytest.raises(DatabaseBusy, match="statement_timeout%3D15min"), translated():
        connection.execute(sa.text("SELECT pg_sleep(60)"))
    engine.dispose()


def test_a_deadlock_is_busy(engine: sa.Engine) -> None:
    both_hold = threading.Barrier(2, timeout=30)
    errors: list[BillingDatabaseError] = []

    def lock(first: int, second: int) -> None:
        try:
            with translated(), engine.begin() as connection:
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": first})
                both_hold.wait()
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": second})
        except BillingDatabaseError as error:
            errors.append(error)

    threads = [threading.Thread(target=lock, args=keys) for keys in ((1, 2), (2, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [type(error) for error in errors] == [DatabaseBusy]


def test_a_full_disk_says_so_and_what_to_do(engine: sa.Engine) -> None:
    full = "DO $$ BEGIN RAISE disk_full USING MESSAGE = 'could not extend file: No space left on device'; END $$"

    with pytest.raises(DatabaseFull, match="disk of the PostgreSQL server is full") as raised, translated():  # noqa: SIM117
        with engine.begin() as connection:
            connection.execute(sa.text(full))

    assert "No space left on device" in str(raised.value)
    assert "Free disk space" in str(raised.value)
    assert "the next run" in str(raised.value)
    # Nothing can be written, whichever row it is: nobody goes on to the next one.
    assert isinstance(raised.value, DatabaseUnavailable)


def test_a_connection_cut_by_the_server_is_unavailable_and_the_next_one_works(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        pid = connection.scalar(sa.text("SELECT pg_backend_pid()"))
        with engine.connect() as other:
            other.execute(sa.text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
        with pytest.raises(DatabaseUnavailable, match="the connection to the database was lost"), translated():
            connection.execute(sa.text("SELECT 1"))
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT 1")) == 1


def test_a_pooled_connection_survives_a_restart_of_the_server() -> None:
    with start_server() as server:
        engine = create_engine(server.url())
        with engine.connect() as connection:
            connection.execute(sa.text("SELECT 1"))
        server.stop()
        with pytest.raises(DatabaseUnavailable), translated(), engine.connect():
            pass
        server.start()
        with engine.connect() as connection:
            assert connection.scalar(sa.text("SELECT 1")) == 1
        engine.dispose()


def test_a_missing_privilege_is_told_apart(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        connection.execute(sa.text("CREATE ROLE without_rights"))
        connection.execute(sa.text("SET ROLE without_rights"))
        with pytest.raises(AccessDenied, match="permission denied for table payments"), translated():
            connection.execute(sa.text("SELECT 1 FROM payments"))


def test_an_error_shows_neither_the_values_of_a_row_nor_the_statement(engine: sa.Engine) -> None:
    insert = sa.text("INSERT INTO payment_providers (id, name, created_at, updated_at) VALUES (1, :name, now(), now())")
    with engine.begin() as connection:
        connection.execute(insert, {"name": "first"})
    with engine.connect() as connection:
        with pytest.raises(BillingDatabaseError) as caught, translated():
            connection.execute(insert, {"name": "4111 1111 1111 1111"})
        assert str(caught.value) == (
            'the database refused a statement: duplicate key value violates unique constraint "payment_providers_pkey"'
        )
        assert "4111" not in str(caught.value.__cause__)


def test_a_value_that_cannot_be_sent_is_not_taken_for_a_lost_connection(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        with pytest.raises(BillingDatabaseError, match="NUL") as caught, translated():
            connection.execute(sa.text("SELECT CAST(:text AS text)"), {"text": "a\x00b"})
        assert type(caught.value) is RowRefused


def test_a_full_pool_says_so(database_url: str) -> None:
    engine = create_engine(database_url, pool_size=1)
    engine.pool._timeout = 0.05  # type: ignore[attr-defined]
    with engine.connect(), pytest.raises(DatabaseBusy, match="no connection of the pool"), translated():
        engine.connect()
    engine.dispose()


def test_an_error_of_our_own_stays_as_it_is() -> None:
    error = SchemaMissing("as it is")
    assert translate(error) is error


def test_a_migrated_database_passes(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        check_schema(connection)


def test_the_schema_is_checked_in_one_query(engine: sa.Engine) -> None:
    statements: list[str] = []
    with engine.connect() as connection:
        sa.event.listen(engine, "before_cursor_execute", lambda *event: statements.append(event[2]))
        check_schema(connection)
    assert len(statements) == 1


def test_a_database_without_our_schema_names_migrate(empty_database_url: str) -> None:
    error = failure(empty_database_url)
    assert isinstance(error, SchemaMissing)
    assert "run: billing-orchestration migrate" in str(error)
    create_service_database(empty_database_url)
    assert isinstance(failure(empty_database_url), SchemaMissing)


def test_a_schema_without_the_services_tables_says_which_are_missing(engine: sa.Engine, database_url: str) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE payments, prices"))
    error = failure(database_url)
    assert isinstance(error, ServiceTablesMissing)
    assert "payments, prices" in str(error)


def test_a_newer_schema_is_not_worked_on(engine: sa.Engine, database_url: str) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE billing_orchestration.schema_version SET version_num = '9999'"))
    error = failure(database_url)
    assert isinstance(error, SchemaTooNew)
    assert "9999" in str(error)


def test_an_older_schema_names_migrate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("billing_orchestration.database.health.REVISIONS", ("0000", HEAD_REVISION))
    with pytest.raises(SchemaOutdated, match=rf"at revision 0000, .* needs {HEAD_REVISION}; run: billing-orch"):
        check_revisions(["0000"])


def test_an_interrupted_first_migration_counts_as_none(engine: sa.Engine, database_url: str) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM billing_orchestration.schema_version"))
    assert isinstance(failure(database_url), SchemaMissing)
