"""`doctor`: what it finds, by code. Its lines hold no secret and no line break, and it changes nothing."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta, timezone
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from billing_orchestration.database.engine import create_engine
from billing_orchestration.database.migrating import migrate
from billing_orchestration.desk.doctor import Finding, Level, diagnose
from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration.ui_login import new_login
from billing_orchestration_tests.books import Books
from billing_orchestration_tests.fixtures.installation import ROOT
from billing_orchestration_tests.fixtures.pgbouncer import pooled
from billing_orchestration_tests.fixtures.postgres import Server, create_service_database

SECRETS = ("word-of-the-database", "test_sandbox")


def examine() -> list[Finding]:
    findings = list(diagnose())
    for finding in findings:
        assert "\n" not in str(finding)
        assert not any(secret in str(finding) for secret in SECRETS)
    return findings


def found(*levels: Level) -> dict[str, Finding]:
    return {finding.code: finding for finding in examine() if finding.level in levels}


def faults() -> list[str]:
    return list(found(Level.FAULT))


def warnings() -> list[str]:
    return list(found(Level.WARNING))


def test_a_healthy_installation_has_neither_fault_nor_warning(healthy: pytest.MonkeyPatch) -> None:
    assert found(Level.FAULT, Level.WARNING) == {}
    assert len(examine()) == 17


def test_doctor_changes_nothing(healthy: pytest.MonkeyPatch, database_url: str, sandbox: Sandbox) -> None:
    query = "SELECT sum(n_tup_ins + n_tup_upd + n_tup_del) FROM pg_stat_user_tables"
    with psycopg.connect(database_url) as connection:
        before = connection.execute(query).fetchone()
    examine()
    with psycopg.connect(database_url) as connection:
        assert connection.execute(query).fetchone() == before
    assert {request.method for request in sandbox.requests} == {"GET"}


# Settings


def test_one_wrong_setting_does_not_hide_what_else_is_wrong(healthy: pytest.MonkeyPatch, tmp_path: Path) -> None:
    healthy.delenv("YOOKASSA_SECRET_KEY")
    healthy.setenv("BILLING_TIMEZONE", "Moscow")
    healthy.setenv("BILLING_DATABASE_URL", "postgresql://u:word-of-the-database@/nowhere?host=/no/such/folder")
    healthy.setenv("DAGSTER_HOME", str(tmp_path / "missing"))
    assert [finding.code for finding in examine() if finding.level is Level.FAULT] == [
        "settings.wrong",
        "settings.wrong",
        "database.unusable",
        "home.no_folder",
    ]


def test_an_unreadable_env_file_is_a_fault(healthy: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"\xff\xfe")
    assert faults() == ["settings.wrong"]


@pytest.mark.parametrize(("mode", "found"), [(0o600, []), (0o640, []), (0o644, ["env_file.open"])])
def test_an_env_file_that_every_user_may_read_is_a_warning(
    healthy: pytest.MonkeyPatch, tmp_path: Path, mode: int, found: list[str]
) -> None:
    (tmp_path / ".env").touch()
    (tmp_path / ".env").chmod(mode)
    assert warnings() == found


@pytest.mark.parametrize(
    ("auth", "url", "warned"),
    [
        (new_login("vera")[1], "http://dagster.example", ["ui.clear"]),
        (new_login("vera")[1], "https://dagster.example", []),
        (new_login("vera")[1], "http://localhost:3000", []),
        ("header:X-Forwarded-User", "http://dagster.example", []),
    ],
    # A password is drawn anew in each process, and each must collect the same tests.
    ids=["plain http", "https", "this machine", "a login proxy"],
)
def test_passwords_of_the_ui_that_travel_in_clear_are_a_warning(
    healthy: pytest.MonkeyPatch, auth: str, url: str, warned: list[str]
) -> None:
    healthy.setenv("UI_AUTH", auth)
    healthy.setenv("DAGSTER_UI_URL", url)
    assert warnings() == warned


def test_a_first_day_to_come_is_a_warning(healthy: pytest.MonkeyPatch) -> None:
    healthy.setenv("BILLING_FIRST_DAY", "2999-01-01")
    assert warnings() == ["time_zone.first_day"]


def test_alert_urls_that_the_library_cannot_read_are_counted_and_never_shown(healthy: pytest.MonkeyPatch) -> None:
    healthy.setenv("ALERT_URLS", "json://127.0.0.1:9/x, nosuchservice://test_sandbox")
    assert found(Level.FAULT)["alerts.unreadable"].text.startswith("1 of ALERT_URLS")


# The billing database


def test_an_unreachable_database_is_one_fault(healthy: pytest.MonkeyPatch, database_url: str) -> None:
    url = sa.make_url(database_url).set(database="no_such_database").render_as_string(hide_password=False)
    healthy.setenv("BILLING_DATABASE_URL", url)
    assert faults() == ["database.unusable"]


@pytest.fixture
def another_database(healthy: pytest.MonkeyPatch, postgres_server: Server) -> Iterator[str]:
    """An empty database to which the installation points."""
    with postgres_server.database() as url:
        healthy.setenv("BILLING_DATABASE_URL", url)
        yield url


def test_an_empty_database_is_one_fault_that_names_both_ways_out(another_database: str) -> None:
    (fault,) = found(Level.FAULT).values()
    assert fault.code == "tables.none"
    assert "correct BILLING_DATABASE_URL" in fault.way_out
    assert "run: billing-orchestration migrate" in fault.way_out


def test_a_service_database_that_was_never_migrated_names_migrate(another_database: str) -> None:
    create_service_database(another_database)
    (fault,) = found(Level.FAULT).values()
    assert fault.code == "schema.wrong"
    assert "run: billing-orchestration migrate" in fault.text


def test_repeated_payment_ids_and_missing_indexes_are_warnings(another_database: str) -> None:
    create_service_database(another_database)
    engine = create_engine(another_database)
    migrate(engine, echo=str)
    engine.dispose()
    assert warnings() == ["indexes.duplicates"]
    with psycopg.connect(another_database, autocommit=True) as connection:
        connection.execute("DROP INDEX bo_payments_subscription_id")
        connection.execute(
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'bo_prices_plan_currency'::regclass"
        )
    warned = found(Level.WARNING)
    assert "'twice' (2 payments)" in warned["indexes.duplicates"].text
    assert "bo_payments_unique_after_1 keeps only rows with an id above 1 unique" in warned["indexes.duplicates"].text
    assert warned["indexes.unfinished"].text.startswith("bo_prices_plan_currency:")
    assert warned["indexes.missing"].text.startswith("bo_payments_subscription_id ")
    assert faults() == []
    with psycopg.connect(another_database, autocommit=True) as connection:
        connection.execute("DROP INDEX bo_payments_unique_after_1")
    assert "no index keeps new rows unique" in found(Level.WARNING)["indexes.duplicates"].text


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ("DROP TABLE prices", "no_table", "there is no table prices"),
        ("ALTER TABLE payments DROP COLUMN payment_method", "no_column", "no column payments.payment_method"),
        (
            "ALTER TABLE subscriptions ALTER COLUMN ended_at TYPE timestamptz",
            "type",
            "subscriptions.ended_at is timestamp with time zone, not timestamp without time zone",
        ),
        ("ALTER TABLE payments ALTER COLUMN amount TYPE double precision", "type", "amount is double precision, not"),
        (
            "ALTER TABLE payments ALTER COLUMN id DROP DEFAULT",
            "no_default",
            "payments.id is NOT NULL and has no default",
        ),
        ("ALTER TABLE subscriptions ADD COLUMN region text NOT NULL", "mandatory", "subscriptions.region is NOT NULL"),
        ("ALTER TYPE currencyenum RENAME VALUE 'EUR' TO 'CNY'", "labels", "the enum currencyenum lacks EUR"),
        ("ALTER TYPE paymentstatusenum RENAME TO other", "type", "payments.status is other, not paymentstatusenum"),
    ],
)
def test_another_shape_of_the_services_tables_is_named(
    healthy: pytest.MonkeyPatch, database_url: str, change: str, code: str, words: str
) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("DROP INDEX bo_subscriptions_active_ended_at")
        connection.execute(change.encode())
    named = found(Level.FAULT)
    assert words in named[f"tables.{code}"].text
    assert all(name.startswith("tables.") for name in named)


@pytest.fixture
def as_somebody(healthy: pytest.MonkeyPatch, database_url: str) -> Iterator[None]:
    """The installation's role owns nothing, and may do everything."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("CREATE ROLE somebody LOGIN")
        connection.execute("GRANT USAGE ON SCHEMA billing_orchestration TO somebody")
        connection.execute("GRANT ALL ON ALL TABLES IN SCHEMA public, billing_orchestration TO somebody")
        connection.execute("GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO somebody")
        url = sa.make_url(database_url).set(username="somebody").render_as_string(hide_password=False)
        healthy.setenv("BILLING_DATABASE_URL", url)
        yield
        connection.execute("DROP OWNED BY somebody")
        connection.execute("DROP ROLE somebody")


@pytest.mark.usefixtures("as_somebody")
@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ("ALTER TABLE payments ENABLE ROW LEVEL SECURITY", "tables.hidden_rows", "without a policy"),
        ("ALTER TABLE plans ENABLE ROW LEVEL SECURITY; CREATE POLICY ours ON plans USING (id > 5)",
         "tables.hidden_rows", "rows of plans from this role (by policy ours)"),
        ("CREATE SCHEMA old; CREATE TABLE old.payments (); CREATE TABLE old.subscriptions (); GRANT USAGE ON SCHEMA old"
         " TO somebody; ALTER ROLE somebody SET search_path = public, old", "tables.path", "public, old"),
        ("SELECT setval('subscriptions_id_seq', 2147483640)", "tables.ids", "subscriptions has 7 ids left"),
    ],
)  # fmt: skip
def test_what_makes_a_database_unfit_is_named_with_the_way_out(
    database_url: str, change: str, code: str, words: str
) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(change.encode())
    [fault] = found(Level.FAULT).values()
    assert fault.code == code
    assert words in fault.text
    assert fault.way_out


def test_ids_that_run_out_in_some_time_are_a_warning(healthy: pytest.MonkeyPatch, database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("SELECT setval('payments_id_seq', 2147383647)")
    assert found(Level.FAULT, Level.WARNING)["tables.ids"].text == "payments has 100,000 ids left"


@pytest.mark.usefixtures("as_somebody")
def test_rights_on_just_the_columns_that_are_written_are_enough(database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("REVOKE UPDATE ON subscriptions FROM somebody")
        connection.execute("GRANT UPDATE (status, ended_at, updated_at) ON subscriptions TO somebody")
    assert found(Level.FAULT) == {}


def test_a_pooler_that_lends_sessions_out_is_one_fault(healthy: pytest.MonkeyPatch, database_url: str) -> None:
    with pooled(database_url, "transaction") as url:
        healthy.setenv("BILLING_DATABASE_URL", url)
        [fault] = found(Level.FAULT).values()
    assert fault.code == "session.shared"
    assert "pool_mode = session" in fault.way_out


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
    (code,) = found(Level.FAULT, Level.WARNING)
    assert code in ("tables.type", "tables.labels")
    assert faults() == []


def test_columns_and_tables_of_the_services_own_do_not_matter(healthy: pytest.MonkeyPatch, database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("ALTER TABLE payments ADD COLUMN note text, ADD COLUMN n integer NOT NULL DEFAULT 0")
        connection.execute("CREATE TABLE refunds (id serial PRIMARY KEY)")
    assert found(Level.FAULT, Level.WARNING) == {}


def test_a_role_without_rights_is_told_what_to_grant(healthy: pytest.MonkeyPatch, database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("CREATE ROLE reader LOGIN")
        connection.execute("GRANT SELECT ON subscriptions, plans, prices, payment_providers TO reader")
        connection.execute("GRANT USAGE ON SCHEMA billing_orchestration TO reader")
        connection.execute("GRANT SELECT ON billing_orchestration.schema_version TO reader")
    try:
        reader = sa.make_url(database_url).set(username="reader").render_as_string(hide_password=False)
        healthy.setenv("BILLING_DATABASE_URL", reader)
        text = found(Level.FAULT)["privileges.missing"].text
        for privilege in (
            "SELECT on payments", "INSERT on payments", "UPDATE on payments", "INSERT on subscriptions",
            "USAGE on public.payments_id_seq", "INSERT on billing_orchestration.audit_trail",
        ):  # fmt: skip
            assert privilege in text
        assert "SELECT on plans" not in text
    finally:
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute("DROP OWNED BY reader")
            connection.execute("DROP ROLE reader")


def test_a_database_that_only_reads_is_a_fault(
    healthy: pytest.MonkeyPatch, postgres_server: Server, database_url: str
) -> None:
    name = sa.make_url(database_url).database
    with postgres_server.connect() as connection:
        connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    assert faults() == ["database.read_only"]


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
    assert [finding.level for finding in findings if finding.code in ("clock.ok", "clock.apart")] == [level]


# The provider


def test_wrong_credentials_are_tried_once(healthy: pytest.MonkeyPatch, sandbox: Sandbox) -> None:
    healthy.setenv("YOOKASSA_SECRET_KEY", "test_another")
    assert faults() == ["provider.credentials"]
    assert sandbox.count() == 1


def test_a_provider_that_is_not_there_is_unreachable(healthy: pytest.MonkeyPatch) -> None:
    with closing(socket.socket()) as deaf:
        deaf.bind(("127.0.0.1", 0))
        healthy.setenv("YOOKASSA_API_URL", f"http://127.0.0.1:{deaf.getsockname()[1]}/v3")
        assert faults() == ["provider.unreachable"]


@pytest.mark.parametrize("effect", ["html_before", "error_before", "truncated"])
def test_a_provider_that_answers_strangely_is_a_fault(
    healthy: pytest.MonkeyPatch, sandbox: Sandbox, effect: str
) -> None:
    sandbox.misbehave("list", effect)
    assert faults() == ["provider.answer"]


@pytest.mark.parametrize(
    ("key", "code"),
    [("live_sandbox", "shop.live_elsewhere"), ("test_other", "shop.ok"), ("sandbox", "shop.unknown")],
)
def test_the_kind_of_the_shop_is_told_by_its_key(
    healthy: pytest.MonkeyPatch, sandbox: Sandbox, key: str, code: str
) -> None:
    sandbox.reset(secret_key=key)
    healthy.setenv("YOOKASSA_SECRET_KEY", key)
    codes = [finding.code for finding in examine()]
    assert [name for name in codes if name.startswith(("provider.", "shop."))] == ["provider.ok", code]


@pytest.mark.parametrize(
    ("receipts", "forbidden", "level", "words"),
    [
        ("off", False, Level.OK, "asks for none"),
        ("demanded", False, Level.FAULT, "refuses a charge without one"),
        ("demanded", True, Level.OK, "unknown"),
    ],
)
def test_a_shop_that_needs_receipts_and_sends_none_is_a_fault(
    healthy: pytest.MonkeyPatch, sandbox: Sandbox, receipts: str, forbidden: bool, level: Level, words: str
) -> None:
    sandbox.provider.switches.receipts, sandbox.provider.switches.me_forbidden = receipts, forbidden
    [finding] = [finding for finding in examine() if finding.code.startswith("receipts.")]
    assert finding.level is level
    assert words in finding.text


def test_a_shop_that_needs_receipts_and_sends_them_is_well(healthy: pytest.MonkeyPatch, sandbox: Sandbox) -> None:
    sandbox.provider.switches.receipts = "demanded"
    healthy.setenv("RECEIPTS", "with_payment")
    healthy.setenv("RECEIPT_VAT_CODE", "11")
    healthy.setenv("RECEIPT_PAYMENT_MODE", "full_payment")
    assert found(Level.FAULT, Level.WARNING) == {}


def test_methods_that_are_charged_next_and_are_not_active_are_a_warning(
    healthy: pytest.MonkeyPatch, sandbox: Sandbox, engine: sa.Engine
) -> None:
    books = Books(engine)
    now = datetime.now(timezone.utc)
    active, inactive = (books.subscription(ended_at=now + timedelta(days=1)) for _ in range(2))
    books.execute(
        "CREATE VIEW billing_renewals AS SELECT id AS subscription_id, 'card-' || id AS payment_method_id,"
        " true AS may_charge, NULL::text AS email, NULL::text AS phone FROM subscriptions"
    )
    sandbox.provider.add_method(f"card-{active}")
    sandbox.provider.add_method(f"card-{inactive}")
    healthy.setenv("BILLING_RENEWAL_VIEW", "billing_renewals")
    assert found(Level.FAULT, Level.WARNING) == {}

    sandbox.provider.deactivate_method(f"card-{inactive}")

    [finding] = found(Level.WARNING).values()
    assert finding.code == "methods.inactive"
    assert f"1 of 2 payment methods that are charged next are not active: subscriptions {inactive} (inactive)" in str(
        finding
    )


# The run history


def test_an_unreachable_run_history_names_its_own_setting(healthy: pytest.MonkeyPatch, empty_database_url: str) -> None:
    url = sa.make_url(empty_database_url).set(database="no_such_database").render_as_string(hide_password=False)
    healthy.setenv("DAGSTER_POSTGRES_URL", url)
    (fault,) = found(Level.FAULT).values()
    assert fault.code == "history.unusable"
    assert "DAGSTER_POSTGRES_URL" in fault.text
    assert "BILLING_DATABASE_URL" not in fault.text


def test_a_run_history_in_the_services_database_is_a_warning(healthy: pytest.MonkeyPatch, database_url: str) -> None:
    healthy.setenv("DAGSTER_POSTGRES_URL", database_url)
    assert warnings() == ["history.shared"]


def test_no_run_history_is_a_warning_where_no_file_names_it(healthy: pytest.MonkeyPatch, tmp_path: Path) -> None:
    healthy.delenv("DAGSTER_POSTGRES_URL")
    assert warnings() == ["history.missing"]


def test_no_run_history_is_a_fault_where_the_deployments_dagster_yaml_is_used(
    healthy: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    healthy.delenv("DAGSTER_POSTGRES_URL")
    shutil.copy(ROOT / "deploy" / "dagster.yaml", tmp_path)
    assert faults() == ["history.missing"]
    # Dagster reads the working directory's without DAGSTER_HOME.
    healthy.delenv("DAGSTER_HOME")
    assert faults() == ["history.missing"]


@pytest.mark.parametrize(
    ("home", "code"), [("", "home.missing"), ("relative", "home.relative"), ("/no/such/folder", "home.no_folder")]
)
def test_a_dagster_home_that_cannot_be_used_is_named(healthy: pytest.MonkeyPatch, home: str, code: str) -> None:
    healthy.setenv("DAGSTER_HOME", home)
    assert list(found(Level.FAULT, Level.WARNING)) == [code]


def test_a_dagster_home_without_its_file_is_a_warning(healthy: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "dagster.yaml").unlink()
    assert warnings() == ["home.no_file"]
