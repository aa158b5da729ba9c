"""`doctor`: what is wrong with this installation, and how to fix it. It changes nothing anywhere.

Each check below yields findings: a code, a level, a sentence, and the way out. A check whose settings are wrong is left
out. No finding shows a secret, and an expected fault never ends in a traceback.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from enum import Enum
from pathlib import Path
from urllib.parse import urlsplit

import sqlalchemy as sa

from billing_orchestration.alerting import read_urls
from billing_orchestration.database import fitness, health
from billing_orchestration.database.conventions import SCHEMA, SERVICE_TABLES, session_of_shop
from billing_orchestration.database.engine import create_engine, read
from billing_orchestration.database.errors import BillingDatabaseError, SchemaProblem
from billing_orchestration.database.indexes import (
    SERVICE_INDEXES,
    UNIQUE_PAYMENT_ID,
    find_duplicates,
    index_states,
    partly_unique,
)
from billing_orchestration.database.renewal_view import check_view, methods_due
from billing_orchestration.desk.tables import hanging
from billing_orchestration.loopback import is_loopback
from billing_orchestration.provider.client import PaymentProvider
from billing_orchestration.provider.errors import Forbidden, NeverSent, ProviderError, WrongCredentials
from billing_orchestration.settings import PRODUCTION_API_URL, Settings, load_what_is_right
from billing_orchestration.ui_login import LoginProxy

# `created_at` is compared with the provider's clock: half a minute decides which payments a matching run sees.
TOLERABLE_SKEW = timedelta(seconds=2)
HARMFUL_SKEW = timedelta(seconds=30)
# Whose methods are asked about, and how many of them at most: each is a request.
METHODS_DUE_WITHIN = timedelta(days=3)
METHODS_ASKED_ABOUT = 50
# Below this many ids left, the service's team is told in time.
FEW_IDS = 1_000_000
# PostgreSQL no longer maintains older ones.
OLDEST_TESTED_SERVER = 140000
# Identity columns together with concurrent indexes need this one.
OLDEST_POSSIBLE_SERVER = 120000

_APPLICATION = "billing-orchestration doctor"
_MIGRATE = "run: billing-orchestration migrate"


class Level(Enum):
    """How bad a finding is. Its value begins the line."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "FAULT"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `code` is `subject.problem`, and `subject.ok` where nothing is wrong."""

    code: str
    level: Level
    text: str
    way_out: str = ""

    def __str__(self) -> str:
        return f"{self.level.value:<8} {self.code:<24} {self.text}"

    @property
    def lines(self) -> list[str]:
        """The finding as rows of the table, with the way out below it."""
        way_out = hanging(f"{'':<8} {'  fix:':<24} ", self.way_out) if self.way_out else []
        return [*hanging(f"{self.level.value:<8} {self.code:<24} ", self.text), *way_out]

    @property
    def fields(self) -> dict[str, str]:
        """The finding for programs."""
        fix = {"fix": self.way_out} if self.way_out else {}
        return {"check": self.code, "level": self.level.value.lower(), "text": self.text, **fix}


HEADER = f"{'level':<8} {'check':<24} finding"


@dataclass(frozen=True, slots=True)
class Installation:
    """What the checks look at. A setting in `faults` must not be used."""

    settings: Settings
    faults: Mapping[str, str]
    now: Callable[[], datetime]
    environment: Mapping[str, str]


def diagnose(
    now: Callable[[], datetime] = lambda: datetime.now(timezone.utc), environment: Mapping[str, str] = os.environ
) -> Iterator[Finding]:
    """Make every check whose settings are right, and yield each finding as it is known."""
    settings, faults = load_what_is_right()
    here = Installation(settings, faults, now, environment)
    for check, needed in CHECKS:
        if not faults.keys() & set(needed):
            yield from check(here)


def ok(subject: str, text: str) -> Finding:
    """Nothing is wrong."""
    return Finding(f"{subject}.ok", Level.OK, text)


def warning(code: str, text: str, way_out: str = "") -> Finding:
    """The jobs work; somebody should look at it."""
    return Finding(code, Level.WARNING, text, way_out)


def fault(code: str, text: str, way_out: str = "") -> Finding:
    """Jobs fail until it is fixed."""
    return Finding(code, Level.FAULT, text, way_out)


def _settings(here: Installation) -> Iterator[Finding]:
    for text in here.faults.values():
        yield fault("settings.wrong", text)
    if not here.faults:
        yield ok("settings", "complete and well formed")


def _env_file(here: Installation) -> Iterator[Finding]:  # noqa: ARG001
    with suppress(OSError):
        if Path(".env").stat().st_mode & stat.S_IRWXO:
            yield warning(
                "env_file.open", ".env holds secrets, and every user of this machine may read it", "chmod 600 .env"
            )


def _time_zone(here: Installation) -> Iterator[Finding]:
    zone, first_day = here.settings.billing_timezone, here.settings.first_partition_day
    local = here.now().astimezone(zone)
    yield ok("time_zone", f"{zone.key}, where it is {local:%Y-%m-%d %H:%M} now")
    if first_day > local.date():
        yield warning("time_zone.first_day", f"BILLING_FIRST_DAY is {first_day}", "no partition exists until then")


def _alerts(here: Installation) -> Iterator[Finding]:
    urls = here.settings.alert_urls
    if urls is None:
        yield ok("alerts", "ALERT_URLS is not set: nobody is alerted")
        return
    receivers, unreadable = read_urls(urls.get_secret_value())
    if unreadable:
        yield fault("alerts.unreadable", f"{unreadable} of ALERT_URLS cannot be read", "see apprise's documentation")
    else:
        yield ok("alerts", f"failed runs and money checks alert {len(receivers)} receivers")


def _ui(here: Installation) -> Iterator[Finding]:
    login, address = here.settings.ui_login, urlsplit(here.settings.dagster_ui_url)
    if login is None:
        yield ok("ui", "UI_AUTH is not set: the UI asks for no login, and listens on its own machine only")
    elif isinstance(login, LoginProxy):
        yield ok("ui", "the UI is for those whom the login proxy names")
    elif address.scheme == "http" and not is_loopback(address.hostname or ""):
        yield warning(
            "ui.clear", "DAGSTER_UI_URL is plain http, so passwords of the UI travel in clear", "put TLS in front of it"
        )
    else:
        yield ok("ui", f"the UI asks for the password of one of {len(login.hashes)} users")


# The billing database: each check has a transaction of its own.


def _billing_database(here: Installation) -> Iterator[Finding]:
    of_session = session_of_shop(here.settings.yookassa_provider_ids)
    engine = create_engine(here.settings.billing_database_url, application_name=_APPLICATION, session=of_session)
    try:
        for check in DATABASE_CHECKS:
            with read(engine) as connection:
                findings = list(check(connection, here.now))
            yield from findings
            if check in BARRIERS and any(finding.level is Level.FAULT for finding in findings):
                return
        if view := here.settings.billing_renewal_view:
            with read(engine) as connection:
                yield from _renewal_view(connection, view)
    except BillingDatabaseError as error:
        yield fault("database.unusable", str(error))
    finally:
        engine.dispose()


def _server(connection: sa.Connection, now: Callable[[], datetime]) -> Iterator[Finding]:
    before = now()
    facts = health.server_facts(connection)
    after = now()
    version = f"PostgreSQL {facts.version}, database {facts.database}, as {facts.role}"
    if facts.version_number < OLDEST_POSSIBLE_SERVER:
        yield fault("database.too_old", version, "these jobs need PostgreSQL 14 or newer")
    elif facts.version_number < OLDEST_TESTED_SERVER:
        yield warning("database.untested", version, "older than what these jobs are tested on (14 and newer)")
    else:
        yield ok("database", f"reached: {version}")
    if facts.read_only:
        yield fault(
            "database.read_only",
            "it accepts no writes (a standby, or default_transaction_read_only)",
            "name the primary server",
        )
    # The server's clock was read between the two looks at ours.
    skew = max(before - facts.clock, facts.clock - after, timedelta(0))
    apart = f"the server's clock and this machine's are {skew.total_seconds():.1f} s apart"
    if skew > HARMFUL_SKEW:
        yield fault("clock.apart", apart, "set both by NTP; a run's window depends on them")
    elif skew > TOLERABLE_SKEW:
        yield warning("clock.apart", apart, "set both by NTP")
    else:
        yield ok("clock", "the server's clock and this machine's agree")


def _session(connection: sa.Connection, now: Callable[[], datetime]) -> Iterator[Finding]:  # noqa: ARG001
    obstacles = fitness.reading_obstacles(connection)
    for obstacle in obstacles:
        yield fault(obstacle.code, obstacle.text, obstacle.way_out)
    if not obstacles:
        yield ok("session", "it keeps its settings and locks, and sees every row")


def _service_tables(connection: sa.Connection, now: Callable[[], datetime]) -> Iterator[Finding]:  # noqa: ARG001
    found = health.differences(connection)
    if sum(difference.code == health.NO_TABLE for difference in found) == len(SERVICE_TABLES):
        yield fault(
            "tables.none",
            "the service's tables are not in this database, or not on the search path",
            health.tables_elsewhere(connection) or f"correct BILLING_DATABASE_URL, or for a new database {_MIGRATE}",
        )
        return
    for difference in found:
        code = f"tables.{difference.code}"
        if difference.harmful:
            yield fault(code, difference.text, "ask the service's team, or correct BILLING_DATABASE_URL")
        else:
            yield warning(code, f"{difference.text}; the jobs work with it")
    if not found:
        yield ok("tables", "the service's tables, columns, types and enum labels are as expected")


def _schema(connection: sa.Connection, now: Callable[[], datetime]) -> Iterator[Finding]:  # noqa: ARG001
    try:
        health.check_schema(connection)
    except SchemaProblem as error:
        yield fault("schema.wrong", str(error))
    else:
        yield ok("schema", f"{SCHEMA} is at revision {health.HEAD_REVISION}, as this version needs")


def _providers(connection: sa.Connection, now: Callable[[], datetime]) -> Iterator[Finding]:  # noqa: ARG001
    try:
        names = health.check_providers(connection)
    except SchemaProblem as error:
        yield fault("providers.unclear", str(error))
    else:
        yield ok("providers", f"this shop is {', '.join(names) or 'in no row'} of payment_providers")


def _writing(connection: sa.Connection, now: Callable[[], datetime]) -> Iterator[Finding]:  # noqa: ARG001
    obstacles = fitness.writing_obstacles(connection)
    for obstacle in obstacles:
        yield fault(obstacle.code, obstacle.text, obstacle.way_out)
    for table, left in fitness.ids_left(connection).items():
        if fitness.FEWEST_IDS <= left < FEW_IDS:
            yield warning(fitness.IDS, f"{table} has {left:,} ids left", f"make {table}.id a bigint in time")
    if not obstacles:
        yield ok("writing", "the role may write what the jobs write, and the tables take new rows")


def _indexes(connection: sa.Connection, now: Callable[[], datetime]) -> Iterator[Finding]:  # noqa: ARG001
    states = index_states(connection)
    # Where the unique index is, there are none; to look for them would read all payments.
    duplicates = None if UNIQUE_PAYMENT_ID.served_by(states) else find_duplicates(connection)
    partly = partly_unique(states)
    valid = {name: after for name, after in partly.items() if states[name].valid}
    if duplicates and valid and duplicates.unique_after:
        name, after = next(iter(valid.items()))
        yield warning(
            "indexes.duplicates",
            f"{duplicates.text}; {name} keeps only rows with an id above {after} unique; the jobs quarantine payments"
            " of older ones where they matter",
            "fix the rows with the service's team, then migrate adds the unique index on all rows",
        )
    elif duplicates and not valid:
        yield warning(
            "indexes.duplicates",
            f"{duplicates.text}; no index keeps new rows unique; the jobs quarantine such payments where they matter",
            f"{_MIGRATE}; it adds a unique index for new rows",
        )
    missing = [
        index.name for index in SERVICE_INDEXES if index.served_by(states) is None and not (index.unique and duplicates)
    ]
    missing += [name for name in partly if name not in valid]
    if invalid := [name for name in missing if name in states]:
        yield warning("indexes.unfinished", f"{', '.join(invalid)}: unfinished, or being built", _MIGRATE)
    if absent := [name for name in missing if name not in states]:
        yield warning("indexes.missing", f"{', '.join(absent)} missing, so the jobs are slower", _MIGRATE)
    if not missing:
        yield ok("indexes", "present and valid")


def _renewal_view(connection: sa.Connection, view: str) -> Iterator[Finding]:
    try:
        check_view(connection, view)
    except SchemaProblem as error:
        yield fault("view.wrong", str(error))
    else:
        yield ok("view", f"methods, consents and contacts are read from {view}")


# In this order. After a fault of a barrier (no usable server, another database than meant) the rest is noise.
DATABASE_CHECKS = (_server, _session, _service_tables, _schema, _providers, _writing, _indexes)
BARRIERS = (_server, _session, _service_tables)


# The provider


def _provider(here: Installation) -> Iterator[Finding]:
    settings = here.settings
    try:
        with closing(_provider_of(settings)) as provider:
            provider.check()
            receipts = list(_receipts(here, provider))
    except WrongCredentials:
        yield fault(
            "provider.credentials",
            "it refuses the credentials",
            "correct YOOKASSA_SHOP_ID and YOOKASSA_SECRET_KEY",
        )
    except Forbidden as error:
        yield fault(
            "provider.forbidden", f"this shop may not use the API ({_stop_less(error)})", "ask the provider's manager"
        )
    except NeverSent as error:
        yield fault(
            "provider.unreachable",
            f"it cannot be reached ({_stop_less(error)})",
            "correct YOOKASSA_API_URL, or look at the network",
        )
    except ProviderError as error:
        yield fault(
            "provider.answer",
            f"it does not answer as it should ({_stop_less(error)})",
            "correct YOOKASSA_API_URL, or try later",
        )
    else:
        yield ok("provider", f"reached, and it accepts the credentials: {settings.yookassa_api_url}")
        yield from receipts


def _methods(here: Installation) -> Iterator[Finding]:
    """The methods that the service's view names for the next days, as the provider knows them: some, not all."""
    settings, view = here.settings, here.settings.billing_renewal_view
    if view is None:
        return
    engine = create_engine(settings.billing_database_url, application_name=_APPLICATION)
    try:
        with read(engine) as connection:
            check_view(connection, view)
            now = here.now()
            due = methods_due(connection, view, now, now + METHODS_DUE_WITHIN, METHODS_ASKED_ABOUT)
        with closing(_provider_of(settings)) as provider:
            told = provider.cards(due.values())
    except (BillingDatabaseError, ProviderError):
        return  # told by the checks of the database and of the provider
    finally:
        engine.dispose()
    odd = [f"{id_} ({told[method]})" for id_, method in due.items() if told.get(method, "").isalpha()]
    if odd:
        yield warning(
            "methods.inactive",
            f"{len(odd)} of {len(due)} payment methods that are charged next are not active: subscriptions"
            f" {', '.join(odd[:5])}{' …' if len(odd) > 5 else ''}",
            "their customers must give another method; the run does not charge them",
        )
    else:
        yield ok("methods", f"{len(due)} payment methods that are charged next were asked about: none is inactive")


def _provider_of(settings: Settings) -> PaymentProvider:
    return PaymentProvider(
        shop_id=settings.yookassa_shop_id,
        secret_key=settings.yookassa_secret_key.get_secret_value(),
        api_url=settings.yookassa_api_url,
    )


def _receipts(here: Installation, provider: PaymentProvider) -> Iterator[Finding]:
    if "RECEIPTS" in here.faults:
        return
    try:
        fiscalizes = provider.has_fiscalization()
    except ProviderError:
        fiscalizes = None  # such as: these credentials may not ask
    told = f"RECEIPTS is {here.settings.receipts}"
    if fiscalizes is None:
        yield ok("receipts", f"{told}; it is unknown whether the provider registers this shop's receipts")
    elif fiscalizes and here.settings.receipts == "off":
        yield fault(
            "receipts.off",
            "the provider registers this shop's receipts and refuses a charge without one, and RECEIPTS is off",
            "set RECEIPTS=with_payment, and what the accountant says for RECEIPT_VAT_CODE and RECEIPT_PAYMENT_MODE",
        )
    else:
        yield ok("receipts", f"{told}, and the provider {'registers them' if fiscalizes else 'asks for none'}")


def _shop(here: Installation) -> Iterator[Finding]:
    settings = here.settings
    if settings.is_live_shop and settings.yookassa_api_url != PRODUCTION_API_URL:
        yield warning(
            "shop.live_elsewhere",
            "YOOKASSA_API_URL is not the production URL, and gets a live key",
            "is that intended?",
        )
    elif settings.is_live_shop:
        yield ok("shop", "a live shop: autopayment_job takes real money")
    elif settings.yookassa_secret_key.get_secret_value().startswith("test_"):
        yield ok("shop", "a test shop: no real money moves")
    else:
        yield warning(
            "shop.unknown",
            "the secret key begins with neither live_ nor test_",
            "it counts as a test shop's, so test payments are granted",
        )


def _stop_less(error: Exception) -> str:
    return str(error).rstrip(". ")


# Dagster


def _dagster_home(here: Installation) -> Iterator[Finding]:
    home = here.environment.get("DAGSTER_HOME", "").strip()
    way_out = "set it to a folder with a copy of deploy/dagster.yaml"
    if not home:
        yield warning("home.missing", "DAGSTER_HOME is not set, so runs started from here keep no history", way_out)
    elif not Path(home).is_absolute():
        yield fault("home.relative", "DAGSTER_HOME is a relative path, which Dagster refuses", "make it absolute")
    elif not Path(home).is_dir():
        yield fault("home.no_folder", "DAGSTER_HOME names no folder", way_out)
    elif not (Path(home) / "dagster.yaml").is_file():
        yield warning("home.no_file", "DAGSTER_HOME has no dagster.yaml, so the run history goes to files", way_out)
    else:
        yield ok("home", f"DAGSTER_HOME is {home}")


def _run_history(here: Installation) -> Iterator[Finding]:
    address = here.settings.dagster_postgres_url
    if address is None:
        yield _no_run_history(here.environment)
        return
    engine = create_engine(address, application_name=_APPLICATION)
    try:
        with read(engine) as connection:
            there = connection.scalar(sa.text("SELECT to_regclass('runs') IS NOT NULL"))
            shared = connection.scalar(sa.text("SELECT to_regclass('subscriptions') IS NOT NULL"))
    except BillingDatabaseError as error:
        yield fault("history.unusable", str(error).replace("BILLING_DATABASE_URL", "DAGSTER_POSTGRES_URL"))
        return
    finally:
        engine.dispose()
    if shared:
        yield warning(
            "history.shared", "DAGSTER_POSTGRES_URL names the billing service's database", "give it one of its own"
        )
    state = "has its tables" if there else "is empty; Dagster creates its tables when it starts"
    yield ok("history", f"the database of DAGSTER_POSTGRES_URL is reached and {state}")


def _no_run_history(environment: Mapping[str, str]) -> Finding:
    way_out = "put the address of a database of its own into the environment or .env"
    # Dagster reads the working directory's where DAGSTER_HOME is not set.
    file = Path(environment.get("DAGSTER_HOME", "").strip() or ".") / "dagster.yaml"
    if file.is_file() and b"DAGSTER_POSTGRES_URL" in file.read_bytes():
        return fault(
            "history.missing", "DAGSTER_POSTGRES_URL is not set, and dagster.yaml needs it: no job runs", way_out
        )
    return warning("history.missing", "DAGSTER_POSTGRES_URL is not set; deploy/dagster.yaml needs it", way_out)


# Every check, and the settings without which it cannot be made.
CHECKS: tuple[tuple[Callable[[Installation], Iterator[Finding]], tuple[str, ...]], ...] = (
    (_settings, ()),
    (_env_file, ()),
    (_time_zone, (".env", "BILLING_TIMEZONE", "BILLING_FIRST_DAY")),
    (_alerts, (".env", "ALERT_URLS")),
    (_ui, (".env", "UI_AUTH", "DAGSTER_UI_URL")),
    (_billing_database, (".env", "BILLING_DATABASE_URL")),
    (_provider, (".env", "YOOKASSA_SHOP_ID", "YOOKASSA_SECRET_KEY", "YOOKASSA_API_URL")),
    (
        _methods,
        (
            ".env",
            "BILLING_DATABASE_URL",
            "BILLING_RENEWAL_VIEW",
            "YOOKASSA_SHOP_ID",
            "YOOKASSA_SECRET_KEY",
            "YOOKASSA_API_URL",
        ),
    ),
    (_shop, (".env", "YOOKASSA_SECRET_KEY", "YOOKASSA_API_URL")),
    (_dagster_home, ()),
    (_run_history, (".env", "DAGSTER_POSTGRES_URL")),
)
