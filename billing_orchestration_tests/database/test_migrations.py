"""`migrate` on every database it may meet: empty, another team's with flaws, half done, too new; and back again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from billing_orchestration.database import migrating
from billing_orchestration.database.engine import create_engine
from billing_orchestration.database.errors import (
    AccessDenied,
    BillingDatabaseError,
    DatabaseBusy,
    SchemaOutdated,
    SchemaTooNew,
    ServiceTablesMissing,
)
from billing_orchestration.database.health import HEAD_REVISION, REVISIONS, check_schema, differences
from billing_orchestration.database.indexes import SERVICE_INDEXES, index_states
from billing_orchestration.database.migrating import MigrationReport, downgrade, migrate
from billing_orchestration.database.tables import ours
from billing_orchestration_tests.fixtures.postgres import Server, create_service_database
from billing_orchestration_tests.waiting import wait_until

UNIQUE = "bo_payments_external_payment_id_unique"
PLAIN = "bo_payments_external_payment_id"
# The flawed service's payments 1 and 2 share an id: from 2 on none comes twice.
FOR_NEW_ROWS = "bo_payments_unique_after_1"
OTHERS = {index.name for index in SERVICE_INDEXES} - {UNIQUE, PLAIN}
# What `migrate` says on an empty database: service's tables, schema, revision, and an index each.
LINES_ON_AN_EMPTY_DATABASE = 3 + len(OTHERS) + 1


@pytest.fixture
def new_engine(empty_database_url: str) -> Iterator[sa.Engine]:
    """An engine on an empty database."""
    engine = create_engine(empty_database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def service_engine(empty_database_url: str, new_engine: sa.Engine) -> sa.Engine:
    """An engine on an existing service's database, with flaws."""
    create_service_database(empty_database_url)
    return new_engine


def quietly(engine: sa.Engine, **options: Any) -> MigrationReport:
    return migrate(engine, echo=lambda _: None, **options)


def describe(url: str, schema: str) -> list[Any]:
    """List a schema's tables, columns, types, defaults, comments, constraints, indexes and enum labels."""
    return catalog(
        url,
        f"""
        SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity,
               pg_get_expr(d.adbin, d.adrelid), col_description(c.oid, a.attnum), pg_get_userbyid(c.relowner)
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
        WHERE c.relnamespace = '{schema}'::regnamespace AND c.relkind IN ('r', 'v', 'S')
          AND c.relname <> 'schema_version'
        ORDER BY 1, 2
        """,
    ) + catalog(
        url,
        f"""
        SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint
        WHERE connamespace = '{schema}'::regnamespace AND conname !~ '^schema_version'
        UNION ALL SELECT indexname, indexdef FROM pg_indexes
        WHERE schemaname = '{schema}' AND indexname !~ '^schema_version'
        UNION ALL SELECT t.typname, e.enumlabel FROM pg_type t JOIN pg_enum e ON e.enumtypid = t.oid
        WHERE t.typnamespace = '{schema}'::regnamespace
        ORDER BY 1, 2
        """,
    )


def catalog(url: str, query: str) -> list[Any]:
    with psycopg.connect(url, options="-c search_path=public") as connection:
        return connection.execute(query.encode()).fetchall()


def contents(url: str) -> dict[str, list[Any]]:
    """Read every row of every table in public, with the transaction that wrote it: a rewritten row would differ."""
    names = [row[0] for row in catalog(url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")]
    return {name: catalog(url, f"SELECT xmin, ctid, * FROM {name} ORDER BY ctid") for name in names}


def valid_indexes(engine: sa.Engine) -> set[str]:
    with engine.connect() as connection:
        return {name for name, state in index_states(connection).items() if state.ours and state.valid}


def invalid_indexes(engine: sa.Engine) -> set[str]:
    with engine.connect() as connection:
        return {name for name, state in index_states(connection).items() if state.ours and not state.valid}


def builds_running(url: str) -> list[int]:
    """The server processes that build an index and wait for somebody's transaction."""
    query = (
        "SELECT pid FROM pg_stat_activity WHERE query LIKE 'CREATE%INDEX CONCURRENTLY%' AND wait_event_type = 'Lock'"
        " AND datname = current_database() AND pid <> pg_backend_pid()"
    )
    return [row[0] for row in catalog(url, query)]


# An empty database


def test_an_empty_database_gets_the_services_tables_and_ours(new_engine: sa.Engine, empty_database_url: str) -> None:
    lines: list[str] = []
    report = migrate(new_engine, echo=lines.append)
    assert list(report.done) == lines
    assert len(lines) == LINES_ON_AN_EMPTY_DATABASE
    assert report.not_done == ()
    with new_engine.connect() as connection:
        check_schema(connection)
        assert differences(connection) == []
    assert valid_indexes(new_engine) == OTHERS | {UNIQUE}


def test_the_services_tables_are_created_as_the_service_itself_would(
    database_url: str, empty_database_url: str
) -> None:
    create_service_database(empty_database_url, with_flaws=False)
    theirs = {row[:4] for row in describe(empty_database_url, "public") if row[0] in TABLES_AND_SEQUENCES}
    created = {row[:4] for row in describe(database_url, "public") if row[0] in TABLES_AND_SEQUENCES}
    assert created == theirs


TABLES_AND_SEQUENCES = {
    name + suffix
    for name in ("plans", "prices", "payment_providers", "subscriptions", "payments")
    for suffix in ("", "_id_seq")
}


def test_the_migrated_schema_is_the_one_that_the_code_knows(database_url: str, empty_database_url: str) -> None:
    engine = create_engine(empty_database_url)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE SCHEMA billing_orchestration"))
        ours.create_all(connection)
    engine.dispose()
    expected = describe(empty_database_url, "billing_orchestration")
    assert len(expected) > 100
    assert describe(database_url, "billing_orchestration") == expected


def test_alembic_finds_nothing_to_add_to_our_schema(engine: sa.Engine) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    def only_ours(name: str | None, kind: str, parents: Any) -> bool:
        return name == "billing_orchestration" if kind == "schema" else name != "schema_version"

    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"include_schemas": True, "include_name": only_ours, "compare_server_default": True}
        )
        assert compare_metadata(context, ours) == []


def test_the_revisions_that_a_run_knows_are_those_of_the_scripts() -> None:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(migrating.__file__).with_name("migrations")))
    scripts = ScriptDirectory.from_config(config)
    assert [script.revision for script in scripts.walk_revisions()][::-1] == list(REVISIONS)
    assert scripts.get_current_head() == HEAD_REVISION


# An existing service's database


def test_an_existing_database_with_flaws_keeps_every_row_and_its_own_revision(
    service_engine: sa.Engine, empty_database_url: str
) -> None:
    rows = contents(empty_database_url)
    columns = [row for row in describe(empty_database_url, "public") if not str(row[0]).startswith("bo_")]
    report = quietly(service_engine)
    assert contents(empty_database_url) == rows
    assert rows["alembic_version"][0][2] == "7c1f0a9d2b3e"
    assert [row for row in describe(empty_database_url, "public") if not str(row[0]).startswith("bo_")] == columns
    assert not any("service's tables" in line for line in report.done)
    with service_engine.connect() as connection:
        check_schema(connection)


def test_repeated_payment_ids_are_reported_and_newer_rows_are_kept_unique(service_engine: sa.Engine) -> None:
    report = quietly(service_engine)
    assert len(report.not_done) == 1
    assert "1 external_payment_id is not unique, for example 'twice' (2 payments)" in report.not_done[0]
    assert f"Index {FOR_NEW_ROWS} keeps newer rows (id above 1) unique" in report.not_done[0]
    assert valid_indexes(service_engine) == OTHERS | {PLAIN, FOR_NEW_ROWS}
    assert invalid_indexes(service_engine) == set()


def test_only_a_few_of_many_repeated_ids_are_shown(service_engine: sa.Engine) -> None:
    with service_engine.begin() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO payments (payment_provider_id, amount, external_payment_id, created_at, updated_at)"
                " SELECT 1, 1, 'id-' || n / 3, now(), now() FROM generate_series(0, 899) AS n"
            )
        )
    line = quietly(service_engine).not_done[0]
    assert "301 external_payment_id are not unique" in line
    assert line.count("(3 payments)") == 3


def test_a_second_and_third_time_changes_nothing(service_engine: sa.Engine, empty_database_url: str) -> None:
    first = quietly(service_engine)
    state = describe(empty_database_url, "public"), describe(empty_database_url, "billing_orchestration")
    for _ in range(2):
        again = quietly(service_engine)
        assert again.done == ()
        assert again.not_done == first.not_done
        assert (describe(empty_database_url, "public"), describe(empty_database_url, "billing_orchestration")) == state


def test_the_unique_index_is_added_once_the_data_is_mended(service_engine: sa.Engine) -> None:
    quietly(service_engine)
    with service_engine.begin() as connection:
        connection.execute(sa.text("UPDATE payments SET external_payment_id = 'other' WHERE id = 2"))
    report = quietly(service_engine)
    assert report.not_done == ()
    assert report.done == (
        f"added unique index {UNIQUE} on payments",
        f"dropped index {FOR_NEW_ROWS}: {UNIQUE} does its work",
        f"dropped index {PLAIN}: {UNIQUE} does its work",
    )
    assert valid_indexes(service_engine) == OTHERS | {UNIQUE}
    with pytest.raises(sa.exc.IntegrityError), service_engine.begin() as connection:
        connection.execute(sa.text("UPDATE payments SET external_payment_id = 'other' WHERE id = 1"))


def add_payment(engine: sa.Engine, external_payment_id: str | None, provider: int = 1) -> int:
    with engine.begin() as connection:
        return connection.execute(
            sa.text(
                "INSERT INTO payments (payment_provider_id, amount, external_payment_id, created_at, updated_at)"
                " VALUES (:provider, 1, :id, now(), now()) RETURNING id"
            ),
            {"provider": provider, "id": external_payment_id},
        ).scalar_one()


def add_provider(engine: sa.Engine) -> int:
    with engine.begin() as connection:
        return connection.execute(
            sa.text(
                "INSERT INTO payment_providers (name, created_at, updated_at) VALUES ('other', now(), now())"
                " RETURNING id"
            )
        ).scalar_one()


def test_beside_old_repeated_ids_no_webhook_can_double_a_new_payment(service_engine: sa.Engine) -> None:
    quietly(service_engine)
    add_payment(service_engine, "new")
    for doubled in ("new", "twice"):  # of the old ones the newest row counts, too
        with pytest.raises(sa.exc.IntegrityError, match=FOR_NEW_ROWS):
            add_payment(service_engine, doubled)
    with service_engine.begin() as connection:
        # A webhook that does not mind who was first goes on as it does beside the whole index.
        doubled = connection.execute(
            sa.text(
                "INSERT INTO payments (payment_provider_id, amount, external_payment_id, created_at, updated_at)"
                " VALUES (1, 1, 'new', now(), now()) ON CONFLICT DO NOTHING RETURNING id"
            )
        ).all()
        # The old rows can still be changed.
        connection.execute(sa.text("UPDATE payments SET updated_at = now() WHERE external_payment_id = 'twice'"))
    assert doubled == []
    for none_yet in (None, ""):
        for _ in range(2):
            add_payment(service_engine, none_yet)
    add_payment(service_engine, "new", add_provider(service_engine))


def test_ids_that_only_two_providers_share_are_no_flaw(service_engine: sa.Engine) -> None:
    with service_engine.begin() as connection:
        connection.execute(sa.text("UPDATE payments SET external_payment_id = 'other' WHERE id = 2"))
    another = add_provider(service_engine)
    add_payment(service_engine, "shared")
    add_payment(service_engine, "shared", another)
    report = quietly(service_engine)
    assert report.not_done == ()
    assert valid_indexes(service_engine) == OTHERS | {PLAIN, "bo_payments_unique_after_0"}
    with pytest.raises(sa.exc.IntegrityError, match="bo_payments_unique_after_0"):
        add_payment(service_engine, "other")
    assert quietly(service_engine).done == ()


def test_the_index_on_newer_rows_reaches_further_back_once_some_of_the_data_is_mended(
    service_engine: sa.Engine,
) -> None:
    latest = [add_payment(service_engine, "thrice") for _ in range(3)][1]
    quietly(service_engine)
    assert f"bo_payments_unique_after_{latest}" in valid_indexes(service_engine)
    with service_engine.begin() as connection:
        connection.execute(
            sa.text("UPDATE payments SET external_payment_id = NULL WHERE external_payment_id = 'thrice'")
        )
    assert quietly(service_engine).done == (
        f"added unique index {FOR_NEW_ROWS} on payments",
        f"dropped index bo_payments_unique_after_{latest}: {FOR_NEW_ROWS} does its work",
    )


def test_an_index_on_newer_rows_that_was_left_unfinished_is_built_anew(service_engine: sa.Engine) -> None:
    quietly(service_engine)
    with service_engine.begin() as connection:
        connection.execute(
            sa.text(f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{FOR_NEW_ROWS}'::regclass")
        )
    assert quietly(service_engine).done == (
        f"dropped index {FOR_NEW_ROWS}, which an earlier run had left unfinished",
        f"added unique index {FOR_NEW_ROWS} on payments",
    )


def test_any_number_of_payments_may_have_no_payment_id(engine: sa.Engine, database_url: str) -> None:
    with engine.begin() as connection:
        connection.execute(
            sa.text("INSERT INTO payment_providers (name, created_at, updated_at) VALUES ('p', now(), now())")
        )
        for _ in range(2):
            connection.execute(
                sa.text(
                    "INSERT INTO payments (payment_provider_id, amount, created_at, updated_at)"
                    " VALUES (1, 1, now(), now())"
                )
            )


@pytest.mark.parametrize("unique", ["", "UNIQUE "])
def test_an_index_that_the_service_has_already_is_not_built_twice(
    empty_database_url: str, new_engine: sa.Engine, unique: str
) -> None:
    create_service_database(empty_database_url, with_flaws=False)
    with new_engine.begin() as connection:
        connection.execute(sa.text(f"CREATE {unique}INDEX theirs ON payments (external_payment_id)"))
        connection.execute(sa.text("CREATE INDEX theirs_too ON payments (subscription_id)"))
    quietly(new_engine)
    expected = OTHERS - {"bo_payments_subscription_id"}
    # A plain index of theirs does not make the id unique: then ours is needed all the same.
    assert valid_indexes(new_engine) == (expected if unique else expected | {UNIQUE})


def test_an_invalid_index_of_the_services_is_not_relied_on(empty_database_url: str, new_engine: sa.Engine) -> None:
    create_service_database(empty_database_url, with_flaws=False)
    with new_engine.begin() as connection:
        connection.execute(sa.text("CREATE UNIQUE INDEX theirs ON payments (external_payment_id)"))
        connection.execute(sa.text("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'theirs'::regclass"))
    quietly(new_engine)
    assert valid_indexes(new_engine) == OTHERS | {UNIQUE}
    assert catalog(empty_database_url, "SELECT to_regclass('theirs') IS NOT NULL") == [(True,)]


def test_some_of_the_services_tables_without_the_others_stop_it(
    service_engine: sa.Engine, empty_database_url: str
) -> None:
    with service_engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE refunds, payments, prices"))
    before = describe(empty_database_url, "public")
    with pytest.raises(ServiceTablesMissing) as caught:
        quietly(service_engine)
    assert "payment_providers, plans, subscriptions, but not payments, prices" in str(caught.value)
    assert "nothing was changed" in str(caught.value)
    assert describe(empty_database_url, "public") == before
    assert catalog(empty_database_url, "SELECT to_regnamespace('billing_orchestration')") == [(None,)]


def test_a_schema_of_the_roles_own_name_is_not_taken_for_public(postgres_server: Server) -> None:
    """PostgreSQL looks for a table in a schema named like the role first; this role is named like our schema."""
    with postgres_server.database() as url:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE ROLE billing_orchestration LOGIN SUPERUSER")
            connection.execute("CREATE SCHEMA billing_orchestration AUTHORIZATION billing_orchestration")
        try:
            engine = create_engine(
                sa.make_url(url).set(username="billing_orchestration").render_as_string(hide_password=False)
            )
            quietly(engine)
            assert quietly(engine).done == ()
            with engine.connect() as connection_:
                check_schema(connection_)
            engine.dispose()
            schemas = catalog(url, "SELECT schemaname FROM pg_tables WHERE tablename = 'subscriptions'")
            assert schemas == [("public",)]
        finally:
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute("DROP OWNED BY billing_orchestration CASCADE")
                connection.execute("DROP ROLE billing_orchestration")


def test_a_role_that_does_not_own_the_tables_gets_our_schema_and_a_report(
    postgres_server: Server, empty_database_url: str
) -> None:
    create_service_database(empty_database_url)
    url = sa.make_url(empty_database_url)
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        connection.execute("CREATE ROLE service_owner")
        connection.execute("CREATE ROLE guest LOGIN")
        for table in ("subscriptions", "payments", "plans", "prices", "payment_providers"):
            connection.execute(f"ALTER TABLE {table} OWNER TO service_owner")
            connection.execute(f"GRANT SELECT, INSERT, UPDATE ON {table} TO guest")
    engine = create_engine(url.set(username="guest").render_as_string(hide_password=False))
    try:
        with pytest.raises(AccessDenied, match="permission denied for database"):
            quietly(engine)
        with psycopg.connect(empty_database_url, autocommit=True) as connection:
            connection.execute(f"GRANT CREATE ON DATABASE {url.database} TO guest")
        report = quietly(engine)
        assert len(report.not_done) == len(OTHERS) + 2
        assert any("must be owner of table subscriptions" in line for line in report.not_done)
        with engine.connect() as connection_:
            check_schema(connection_)
    finally:
        engine.dispose()
        with psycopg.connect(empty_database_url, autocommit=True) as connection:
            connection.execute("REASSIGN OWNED BY guest, service_owner TO postgres")
            connection.execute("DROP OWNED BY guest, service_owner")
            connection.execute("DROP ROLE guest, service_owner")


def test_a_schema_of_a_newer_version_is_left_alone(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE billing_orchestration.schema_version SET version_num = '9999'"))
    with pytest.raises(SchemaTooNew, match="install the version that migrated it"):
        quietly(engine)
    with pytest.raises(SchemaTooNew):
        downgrade(engine, echo=lambda _: None)


@pytest.mark.parametrize(
    ("query", "index"),
    [
        (
            "SELECT 1 FROM subscriptions WHERE status = 'ACTIVE' AND ended_at < now()",
            "bo_subscriptions_active_ended_at",
        ),
        (
            "SELECT 1 FROM subscriptions WHERE status = 'ACTIVE' AND user_id = 'x' AND plan_id = 1",
            "bo_subscriptions_active_user_plan",
        ),
        ("SELECT 1 FROM payments WHERE status = 'PENDING' AND created_at < now()", "bo_payments_pending_created_at"),
        ("SELECT 1 FROM payments WHERE subscription_id = 1", "bo_payments_subscription_id"),
        ("SELECT 1 FROM prices WHERE plan_id = 1 AND currency = 'RUB'", "bo_prices_plan_currency"),
        ("SELECT 1 FROM payments WHERE external_payment_id = 'x'", UNIQUE),
        ("SELECT 1 FROM payments WHERE external_payment_id = ANY(ARRAY['x', 'y'])", UNIQUE),
        (
            "SELECT 1 FROM unnest(ARRAY['x', 'y']) AS i JOIN payments ON payments.external_payment_id = i",
            UNIQUE,
        ),
    ],
)
def test_what_the_jobs_look_for_is_found_by_an_index(engine: sa.Engine, query: str, index: str) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text("SET LOCAL enable_seqscan = off"))
        plan = "\n".join(connection.scalars(sa.text(f"EXPLAIN {query}")))
    assert index in plan


def test_a_lookup_with_a_bound_array_uses_the_index_also_in_a_generic_plan(database_url: str) -> None:
    with psycopg.connect(
        database_url, options="-c enable_seqscan=off -c plan_cache_mode=force_generic_plan"
    ) as connection:
        connection.execute("PREPARE q (text[]) AS SELECT 1 FROM payments WHERE external_payment_id = ANY($1)")
        plan = "\n".join(row[0] for row in connection.execute("EXPLAIN EXECUTE q (ARRAY['x', 'y'])").fetchall())
    assert UNIQUE in plan


# Interrupted, at once, and in a busy database

KILL_AFTER_LINE = """
import os, signal, sys
from billing_orchestration.database.engine import create_engine
from billing_orchestration.database.migrating import migrate

lines = []
def echo(line):
    lines.append(line)
    if len(lines) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

migrate(create_engine(sys.argv[1]), echo=echo)
"""


@pytest.mark.parametrize("line", range(1, LINES_ON_AN_EMPTY_DATABASE + 1))
def test_killed_after_any_step_the_next_run_completes_it(
    new_engine: sa.Engine, empty_database_url: str, database_url: str, line: int
) -> None:
    process = subprocess.run(
        [sys.executable, "-c", KILL_AFTER_LINE, empty_database_url, str(line)],
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert process.returncode == -signal.SIGKILL
    quietly(new_engine)
    for schema in ("public", "billing_orchestration"):
        assert describe(empty_database_url, schema) == describe(database_url, schema)
    assert invalid_indexes(new_engine) == set()


def test_a_build_killed_halfway_is_built_anew_and_keeps_nobody_waiting(
    empty_database_url: str, new_engine: sa.Engine
) -> None:
    create_service_database(empty_database_url, with_flaws=False)
    with (
        psycopg.connect(empty_database_url) as old_transaction,
        subprocess.Popen(
            [sys.executable, "-m", "billing_orchestration.cli", "migrate"],
            env={**os.environ, "BILLING_DATABASE_URL": empty_database_url},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.DEVNULL,
        ) as process,
    ):
        try:
            old_transaction.execute("LOCK TABLE subscriptions, payments IN ROW EXCLUSIVE MODE")
            wait_until(lambda: builds_running(empty_database_url), "the build waits for the older transaction")
            # Meanwhile the service writes, without waiting.
            with psycopg.connect(empty_database_url, options="-c lock_timeout=1s") as service:
                service.execute(
                    "INSERT INTO subscriptions (user_id, created_at, updated_at) VALUES ('u', now(), now())"
                )
        finally:
            process.kill()
        for pid in builds_running(empty_database_url):  # the server's own process would go on to the end
            old_transaction.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
    left = invalid_indexes(new_engine)
    assert len(left) == 1
    report = quietly(new_engine)
    assert f"dropped index {left.pop()}, which an earlier run had left unfinished" in report.done
    assert valid_indexes(new_engine) == OTHERS | {UNIQUE}
    assert invalid_indexes(new_engine) == set()


def test_behind_an_endless_transaction_an_index_is_reported_and_added_by_the_next_run(
    empty_database_url: str, new_engine: sa.Engine
) -> None:
    create_service_database(empty_database_url, with_flaws=False)
    with psycopg.connect(empty_database_url) as endless:
        endless.execute("LOCK TABLE prices IN ROW EXCLUSIVE MODE")
        report = quietly(new_engine, index_lock_timeout_s=0.1, index_tries=2)
        line = next(line for line in report.not_done if "bo_prices_plan_currency" in line)
        assert "lock timeout" in line
        with new_engine.connect() as connection:
            check_schema(connection)
    report = quietly(new_engine)
    assert report.not_done == ()
    assert valid_indexes(new_engine) == OTHERS | {UNIQUE}
    assert invalid_indexes(new_engine) == set()


def test_ids_that_repeat_during_the_build_are_left_to_the_index_on_newer_rows(
    engine: sa.Engine, database_url: str
) -> None:
    insert = (
        "INSERT INTO payments (payment_provider_id, amount, external_payment_id, created_at, updated_at)"
        " VALUES (1, 1, 'twice', now(), now())"
    )
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(sa.text(f"DROP INDEX {UNIQUE}"))
        connection.execute(
            sa.text("INSERT INTO payment_providers (name, created_at, updated_at) VALUES ('p', now(), now())")
        )
    with ThreadPoolExecutor() as pool, psycopg.connect(database_url) as service:
        service.execute(insert.encode())
        service.execute(insert.encode())
        migration = pool.submit(quietly, engine)
        wait_until(lambda: builds_running(database_url), "the build waits for the service's transaction")
        service.commit()
        report = migration.result()
    assert len(report.not_done) == 1
    assert "1 external_payment_id is not unique, for example 'twice' (2 payments)" in report.not_done[0]
    assert report.done == (
        f"added unique index {FOR_NEW_ROWS} on payments",
        f"added index {PLAIN} on payments",
    )
    assert invalid_indexes(engine) == set()


def test_two_at_once_are_safe_and_the_second_waits(empty_database_url: str) -> None:
    create_service_database(empty_database_url)
    engines = [create_engine(empty_database_url) for _ in range(3)]
    start = threading.Barrier(len(engines), timeout=30)

    def run(engine: sa.Engine) -> MigrationReport:
        start.wait()
        return quietly(engine)

    with ThreadPoolExecutor(len(engines)) as pool:
        reports = list(pool.map(run, engines))
    done = [report.done for report in reports if report.done]
    assert len(done) == 1
    assert valid_indexes(engines[0]) == OTHERS | {PLAIN, FOR_NEW_ROWS}
    for engine in engines:
        engine.dispose()


def test_waiting_for_another_run_ends(engine: sa.Engine, database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as other:
        other.execute(f"SELECT pg_advisory_lock({migrating._LOCK_KEY})".encode())
        lines: list[str] = []
        with pytest.raises(DatabaseBusy, match="another migrate"):
            migrate(engine, echo=lines.append, wait_s=0.1)
    assert lines == ["another migrate works on this database; waiting for it"]
    assert quietly(engine).done == ()


def test_one_connection_of_the_pool_is_left_as_it_was(database_url: str) -> None:
    engine = create_engine(database_url, pool_size=2)
    quietly(engine)
    with engine.connect() as first, engine.connect() as second:
        for connection in (first, second):
            assert connection.scalar(sa.text("SHOW lock_timeout")) == "10s"
            assert connection.scalar(sa.text("SHOW statement_timeout")) == "5min"
    engine.dispose()


# From an older revision


def test_an_upgrade_from_the_first_revision_keeps_the_records_and_is_repeatable(
    service_engine: sa.Engine, empty_database_url: str
) -> None:
    from alembic import command

    quietly(service_engine)
    newest = describe(empty_database_url, "billing_orchestration")
    with service_engine.begin() as connection:
        command.downgrade(migrating._alembic(connection), "0001")
        connection.execute(sa.text("INSERT INTO billing_orchestration.audit_trail" + AUDIT))
    entries = catalog(empty_database_url, "SELECT * FROM billing_orchestration.audit_trail")
    with service_engine.connect() as connection, pytest.raises(SchemaOutdated, match="at revision 0001"):
        check_schema(connection)
    report = quietly(service_engine)
    assert report.done == (f"brought the schema billing_orchestration from 0001 to revision {HEAD_REVISION}",)
    assert describe(empty_database_url, "billing_orchestration") == newest
    assert catalog(empty_database_url, "SELECT * FROM billing_orchestration.audit_trail") == entries
    assert quietly(service_engine).done == ()


AUDIT = """
    (at, job, run_id, entity, entity_id, action, reason, external_payment_id)
    VALUES (now(), 'j', 'r', 'payment', '1', 'expired', 'over', 'p'),
           (now(), 'j', 'r', 'subscription', '1', 'expired', 'over', NULL)
"""


# And back


def test_a_downgrade_removes_all_of_ours_and_nothing_else_and_an_upgrade_works_again(
    service_engine: sa.Engine, empty_database_url: str
) -> None:
    rows, shape = contents(empty_database_url), describe(empty_database_url, "public")
    quietly(service_engine)
    report = downgrade(service_engine, echo=lambda _: None)
    assert report.not_done == ()
    assert contents(empty_database_url) == rows
    assert describe(empty_database_url, "public") == shape
    assert catalog(empty_database_url, "SELECT to_regnamespace('billing_orchestration')") == [(None,)]
    assert downgrade(service_engine, echo=lambda _: None) == MigrationReport((), ())
    quietly(service_engine)
    with service_engine.connect() as connection:
        check_schema(connection)


ATTEMPT = """
    INSERT INTO billing_orchestration.renewal_attempts (
        id, subscription_id, period_start, number, state, idempotence_key, body, amount, currency,
        user_id, plan_id, payment_provider_id, payment_method_id, planned_at, run_id
    ) VALUES (
        gen_random_uuid(), 1, '2026-01-01', 1, :state, gen_random_uuid(), '{}', 1, 'RUB', 'u', 1, 1, 'm', now(), 'r'
    )
"""


@pytest.mark.parametrize("state", ["PLANNED", "UNKNOWN", "PENDING", "REVIEW"])
def test_a_downgrade_refuses_to_forget_an_attempt_that_may_have_charged(engine: sa.Engine, state: str) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text(ATTEMPT), {"state": state})
    with pytest.raises(BillingDatabaseError, match="customers could be charged twice"):
        downgrade(engine, echo=lambda _: None)
    with engine.connect() as connection:
        check_schema(connection)
        assert connection.scalar(sa.text("SELECT count(*) FROM billing_orchestration.renewal_attempts")) == 1


def test_a_downgrade_may_forget_closed_attempts(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text(ATTEMPT), {"state": "SUCCEEDED"})
    assert downgrade(engine, echo=lambda _: None).done


def test_a_downgrade_keeps_what_somebody_else_put_into_our_schema(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE billing_orchestration.of_somebody_else (id integer)"))
    with pytest.raises(BillingDatabaseError, match="cannot drop schema"):
        downgrade(engine, echo=lambda _: None)
    with engine.connect() as connection:
        check_schema(connection)


def test_tables_of_another_shape_are_told_and_our_schema_is_added_all_the_same(empty_database_url: str) -> None:
    create_service_database(empty_database_url)
    with psycopg.connect(empty_database_url) as connection:
        connection.execute("ALTER TABLE payments DROP COLUMN payment_method")
    lines: list[str] = []
    engine = create_engine(empty_database_url)

    report = migrate(engine, echo=lines.append)

    engine.dispose()
    [told] = [line for line in report.not_done if "not as expected" in line]
    assert "payment_method" in told
    assert f"not done: {told}" in lines
