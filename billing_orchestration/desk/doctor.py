"""`doctor`: one line a check, what is wrong and how to mend it. It changes nothing anywhere.

A check that cannot be made because of an earlier fault is left out. Secrets are never shown: neither the database's
password nor the shop's secret key. Expected faults never end in a traceback.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from billing_orchestration.settings import PRODUCTION_API_URL, Settings, load_what_is_right

if TYPE_CHECKING:
    import sqlalchemy as sa

# Half a minute decides which payments a matching run sees, and `created_at` is compared with the provider's clock.
TOLERABLE_SKEW = timedelta(seconds=2)
HARMFUL_SKEW = timedelta(seconds=30)
# What this is tested on; older ones get no corrections from PostgreSQL any more.
OLDEST_TESTED_SERVER = 140000
# Generated identities with indexes built concurrently work from here on.
OLDEST_POSSIBLE_SERVER = 120000


class Level(Enum):
    """How a check ended. The value is what the line begins with."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "FAULT"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, how it is, and the way out where it is not well."""

    level: Level
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.level.value:<8} {self.subject:<10} {self.text}"


def diagnose(
    now: Callable[[], datetime] = lambda: datetime.now(timezone.utc), environment: Mapping[str, str] = os.environ
) -> Iterator[Finding]:
    """Check settings, database, schema, indexes, provider and run history, and yield each finding as it is known."""
    settings, faults = load_what_is_right()
    for fault in faults.values():
        yield Finding(Level.FAULT, "settings", fault)
    if not faults:
        yield Finding(Level.OK, "settings", "all there and well formed")
    if "BILLING_TIMEZONE" not in faults:
        yield from _time_zone(settings, now())
    unreadable = ".env" in faults
    if "ALERT_URLS" not in faults and not unreadable:
        yield from _alerts(settings)
    if "BILLING_DATABASE_URL" not in faults and not unreadable:
        yield from _database(settings, now)
    if not faults.keys() & {"YOOKASSA_SHOP_ID", "YOOKASSA_SECRET_KEY", "YOOKASSA_API_URL"} and not unreadable:
        yield from _provider(settings)
    if "DAGSTER_POSTGRES_URL" not in faults and not unreadable:
        yield from _run_history(settings, environment)
    yield from _dagster_home(environment)


def _time_zone(settings: Settings, now: datetime) -> Iterator[Finding]:
    local = now.astimezone(settings.billing_timezone)
    yield Finding(Level.OK, "time zone", f"{settings.billing_timezone.key}: there it is {local:%Y-%m-%d %H:%M} now")
    if settings.first_partition_day > local.date():
        yield Finding(
            Level.WARNING,
            "time zone",
            f"BILLING_FIRST_DAY {settings.first_partition_day} is still to come: no partition exists until then",
        )


def _database(settings: Settings, now: Callable[[], datetime]) -> Iterator[Finding]:
    from billing_orchestration.database.engine import create_engine, read
    from billing_orchestration.database.errors import BillingDatabaseError

    engine = create_engine(settings.billing_database_url, application_name="billing-orchestration doctor")
    try:
        for check in (_server, _service_tables, _schema, _privileges, _indexes):
            with read(engine) as connection:
                findings = list(check(connection, now))
            yield from findings
            if check in (_server, _service_tables) and any(finding.level is Level.FAULT for finding in findings):
                # Without a usable server, or with another database than meant, the rest is noise.
                return
    except BillingDatabaseError as error:
        yield Finding(Level.FAULT, "database", str(error))
    finally:
        engine.dispose()


def _server(connection: sa.Connection, now: Callable[[], datetime]) -> Iterator[Finding]:
    from billing_orchestration.database.health import server_facts

    before = now()
    facts = server_facts(connection)
    after = now()
    version = f"PostgreSQL {facts.version}, database {facts.database}, as {facts.role}"
    if facts.version_number < OLDEST_POSSIBLE_SERVER:
        yield Finding(Level.FAULT, "database", f"{version}: too old, these jobs need PostgreSQL 14 or newer")
    elif facts.version_number < OLDEST_TESTED_SERVER:
        yield Finding(Level.WARNING, "database", f"{version}: older than what this is tested on (14 and newer)")
    else:
        yield Finding(Level.OK, "database", f"reached: {version}")
    if facts.read_only:
        yield Finding(
            Level.FAULT,
            "database",
            "it only reads (a standby, or default_transaction_read_only): name the primary server",
        )
    # The server's clock stands somewhere between the two looks at ours.
    skew = max(before - facts.clock, facts.clock - after, timedelta(0))
    text = f"the server's clock and this machine's are {skew.total_seconds():.1f} s apart"
    if skew > HARMFUL_SKEW:
        yield Finding(Level.FAULT, "clock", f"{text}: set both by NTP, a run's window depends on them")
    elif skew > TOLERABLE_SKEW:
        yield Finding(Level.WARNING, "clock", f"{text}: set both by NTP")
    else:
        yield Finding(Level.OK, "clock", "the server's clock and this machine's agree")


def _service_tables(connection: sa.Connection, now: Callable[[], datetime]) -> Iterator[Finding]:  # noqa: ARG001
    from billing_orchestration.database.conventions import SERVICE_TABLES
    from billing_orchestration.database.health import differences

    found = differences(connection)
    missing = [name for name in SERVICE_TABLES if any(d.text == f"there is no table {name}" for d in found)]
    if len(missing) == len(SERVICE_TABLES):
        yield Finding(
            Level.FAULT,
            "tables",
            "the service's tables are not in this database: correct BILLING_DATABASE_URL, or for a new one run:"
            " billing-orchestration migrate",
        )
        return
    for difference in found:
        if difference.harmful:
            yield Finding(Level.FAULT, "tables", f"{difference.text}: ask the service's team, or correct the URL")
        else:
            yield Finding(Level.WARNING, "tables", f"{difference.text}; the jobs work with it")
    if not found:
        yield Finding(Level.OK, "tables", "the service's tables, columns, types and enum labels are as expected")


def _schema(connection: sa.Connection, now: Callable[[], datetime]) -> Iterator[Finding]:  # noqa: ARG001
    from billing_orchestration.database.errors import SchemaProblem
    from billing_orchestration.database.health import HEAD_REVISION, check_schema
    from billing_orchestration.database.tables import SCHEMA

    try:
        check_schema(connection)
    except SchemaProblem as error:
        yield Finding(Level.FAULT, "schema", str(error))
    else:
        yield Finding(Level.OK, "schema", f"{SCHEMA} is at revision {HEAD_REVISION}, as this version needs")


def _privileges(connection: sa.Connection, now: Callable[[], datetime]) -> Iterator[Finding]:  # noqa: ARG001
    from billing_orchestration.database.health import missing_privileges

    missing = missing_privileges(connection)
    if missing:
        yield Finding(
            Level.FAULT, "privileges", f"the role of BILLING_DATABASE_URL lacks: {', '.join(missing)}; grant them"
        )
    else:
        yield Finding(Level.OK, "privileges", "the role may read and write what the jobs need")


def _indexes(connection: sa.Connection, now: Callable[[], datetime]) -> Iterator[Finding]:  # noqa: ARG001
    from billing_orchestration.database.indexes import SERVICE_INDEXES, describe_duplicates, index_states

    states = index_states(connection)
    duplicates = describe_duplicates(connection)
    if duplicates:
        yield Finding(
            Level.WARNING,
            "indexes",
            f"{duplicates}: the jobs put such payments aside where they matter; mend the rows with the service's team,"
            " then migrate adds the unique index",
        )
    missing = [
        index.name for index in SERVICE_INDEXES if index.served_by(states) is None and not (index.unique and duplicates)
    ]
    invalid = [name for name in missing if name in states]
    if invalid:
        yield Finding(
            Level.WARNING,
            "indexes",
            f"{', '.join(invalid)}: left unfinished (or being built); run: billing-orchestration migrate",
        )
    absent = [name for name in missing if name not in states]
    if absent:
        yield Finding(
            Level.WARNING,
            "indexes",
            f"{', '.join(absent)} missing, the jobs are slower; run: billing-orchestration migrate",
        )
    if not missing:
        yield Finding(Level.OK, "indexes", "there and valid")


def _alerts(settings: Settings) -> Iterator[Finding]:
    from billing_orchestration.alerting import read_urls

    if settings.alert_urls is None:
        yield Finding(Level.OK, "alerts", "ALERT_URLS is not set: nobody is told of failed runs")
        return
    receivers, faults = read_urls(settings.alert_urls.get_secret_value())
    if faults:
        yield Finding(
            Level.FAULT, "alerts", f"{faults} of ALERT_URLS cannot be read: correct them after apprise's documentation"
        )
    else:
        yield Finding(Level.OK, "alerts", f"{len(receivers)} receivers are told of failed runs and money checks")


def _provider(settings: Settings) -> Iterator[Finding]:
    from billing_orchestration.provider.client import PaymentProvider
    from billing_orchestration.provider.errors import Forbidden, NeverSent, ProviderError, WrongCredentials

    key = settings.yookassa_secret_key.get_secret_value()
    production = settings.yookassa_api_url == PRODUCTION_API_URL
    try:
        with closing(
            PaymentProvider(shop_id=settings.yookassa_shop_id, secret_key=key, api_url=settings.yookassa_api_url)
        ) as provider:
            provider.check()
    except WrongCredentials:
        yield Finding(
            Level.FAULT, "provider", "it refuses the credentials: correct YOOKASSA_SHOP_ID and YOOKASSA_SECRET_KEY"
        )
    except Forbidden as error:
        yield Finding(
            Level.FAULT, "provider", f"this shop may not use the API ({_stop_less(error)}): ask the provider's manager"
        )
    except NeverSent as error:
        yield Finding(
            Level.FAULT,
            "provider",
            f"it cannot be reached: {_stop_less(error)}; correct YOOKASSA_API_URL, or look at the network",
        )
    except ProviderError as error:
        yield Finding(
            Level.FAULT,
            "provider",
            f"it does not answer as it should: {_stop_less(error)}; correct YOOKASSA_API_URL, or try later",
        )
    else:
        yield Finding(Level.OK, "provider", f"reached, and it accepts the credentials: {settings.yookassa_api_url}")
    if settings.is_live_shop and not production:
        yield Finding(
            Level.WARNING,
            "provider",
            "a live key is sent elsewhere than to the production URL: is YOOKASSA_API_URL meant?",
        )
    elif settings.is_live_shop:
        yield Finding(Level.OK, "provider", "a live shop: autopayment_job takes real money")
    elif key.startswith("test_"):
        yield Finding(Level.OK, "provider", "a test shop: no real money moves")
    else:
        yield Finding(
            Level.WARNING,
            "provider",
            "the key begins with neither live_ nor test_: it is taken for a test shop's, so test payments are granted",
        )


def _stop_less(error: Exception) -> str:
    return str(error).rstrip(". ")


def _needs_run_history(dagster_yaml: Path) -> bool:
    """Whether the dagster.yaml that Dagster would read here (it looks into the working folder too) names ours."""
    try:
        text = dagster_yaml.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "RunHistoryStorage" in text or "DAGSTER_POSTGRES_URL" in text


def _run_history(settings: Settings, environment: Mapping[str, str]) -> Iterator[Finding]:
    import sqlalchemy as sa

    from billing_orchestration.database.engine import translate

    if settings.dagster_postgres_url is None:
        home = Path(environment.get("DAGSTER_HOME", "").strip() or ".")
        if _needs_run_history(home / "dagster.yaml"):
            yield Finding(
                Level.FAULT,
                "history",
                f"DAGSTER_POSTGRES_URL is not set, and no job runs without it: {home / 'dagster.yaml'} keeps the run"
                " history there. Put the address of a database of its own into the environment or .env",
            )
        else:
            yield Finding(
                Level.WARNING,
                "history",
                "DAGSTER_POSTGRES_URL is not set: this project's dagster.yaml needs it for the run history",
            )
        return
    engine = sa.create_engine(
        settings.dagster_postgres_url, connect_args={"connect_timeout": 10}, poolclass=sa.NullPool, hide_parameters=True
    )
    try:
        with engine.connect() as connection:
            there = connection.scalar(sa.text("SELECT to_regclass('runs') IS NOT NULL"))
            shared = connection.scalar(sa.text("SELECT to_regclass('public.subscriptions') IS NOT NULL"))
    except sa.exc.SQLAlchemyError as error:
        text = str(translate(error)).replace("BILLING_DATABASE_URL", "DAGSTER_POSTGRES_URL")
        yield Finding(Level.FAULT, "history", text)
        return
    finally:
        engine.dispose()
    if shared:
        yield Finding(
            Level.WARNING,
            "history",
            "DAGSTER_POSTGRES_URL names the billing service's database: give it one of its own",
        )
    state = "has its tables" if there else "is empty; Dagster creates its tables when it starts"
    yield Finding(Level.OK, "history", f"the database of DAGSTER_POSTGRES_URL is reached and {state}")


def _dagster_home(environment: Mapping[str, str]) -> Iterator[Finding]:
    home = environment.get("DAGSTER_HOME", "").strip()
    if not home:
        yield Finding(
            Level.WARNING,
            "history",
            "DAGSTER_HOME is not set: runs started from here keep no history; set it to the folder of dagster.yaml",
        )
    elif not Path(home).is_absolute():
        yield Finding(
            Level.FAULT, "history", "DAGSTER_HOME is a relative path, which Dagster refuses: make it absolute"
        )
    elif not Path(home).is_dir():
        yield Finding(
            Level.FAULT, "history", f"DAGSTER_HOME names no folder: {home}; create it, with dagster.yaml in it"
        )
    elif not (Path(home) / "dagster.yaml").is_file():
        yield Finding(
            Level.WARNING,
            "history",
            f"there is no dagster.yaml in {home}: the run history goes into files there, not into PostgreSQL",
        )
    else:
        yield Finding(Level.OK, "history", f"DAGSTER_HOME is {home}")
