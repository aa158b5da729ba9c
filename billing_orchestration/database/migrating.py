"""`migrate`: bring a database to the shape that this version works on, without disturbing the service that lives there.

What it promises to an operator:

- It may be run again at any time, and twice at once: the second one waits for the first.
- Our tables appear as a whole or not at all. Killed in the middle, the next run completes it.
- On the service's tables it only adds indexes, concurrently, so that the service goes on reading and writing. An
  index that a killed run left behind invalid is rebuilt. What cannot be added now is reported, and retried by each run.
- It never rewrites a row of the service's, nor touches its `public.alembic_version`.
- It creates the service's tables only where none of the five exists.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy import exc

from billing_orchestration.database.conventions import SCHEMA, SERVICE_TABLES
from billing_orchestration.database.engine import translate, translated
from billing_orchestration.database.errors import (
    BillingDatabaseError,
    DatabaseBusy,
    DatabaseUnavailable,
    ServiceTablesMissing,
)
from billing_orchestration.database.fitness import check_reading
from billing_orchestration.database.health import (
    HEAD_REVISION,
    REVISIONS,
    VERSION_TABLE,
    check_revisions,
    differences,
    tables_elsewhere,
)
from billing_orchestration.database.indexes import (
    SERVICE_INDEXES,
    Duplicates,
    IndexState,
    ServiceIndex,
    find_duplicates,
    index_states,
    partly_unique,
    unique_after,
)
from billing_orchestration.database.tables import service
from billing_orchestration.domain.attempts import OPEN, State

Echo = Callable[[str], object]

# Any number that nobody else uses: the advisory lock under which only one migrate runs.
_LOCK_KEY = 0x62_6F_6D_69_67  # "bomig"
# Another migrate may be building an index on a large table.
WAIT_FOR_ANOTHER_MIGRATE_S = 3600
# Building concurrently waits for every transaction that is older than itself. It keeps nobody waiting meanwhile, but
# behind a backup or a forgotten transaction it would wait for hours: rather report it, and try again next time.
INDEX_LOCK_TIMEOUT_S = 30
INDEX_TRIES = 3


@dataclass(frozen=True, slots=True)
class MigrationReport:
    """What a run did and what it could not do, each a line for an operator. Both empty: there was nothing to do."""

    done: tuple[str, ...]
    not_done: tuple[str, ...]


@dataclass(slots=True)
class _Log:
    echo: Echo
    done: list[str] = field(default_factory=list)
    not_done: list[str] = field(default_factory=list)

    def did(self, line: str) -> None:
        self.done.append(line)
        self.echo(line)

    def could_not(self, line: str) -> None:
        self.not_done.append(line)
        self.echo(f"not done: {line}")

    def report(self) -> MigrationReport:
        return MigrationReport(tuple(self.done), tuple(self.not_done))


def migrate(
    engine: sa.Engine,
    echo: Echo = print,
    *,
    index_lock_timeout_s: float = INDEX_LOCK_TIMEOUT_S,
    index_tries: int = INDEX_TRIES,
    wait_s: float = WAIT_FOR_ANOTHER_MIGRATE_S,
) -> MigrationReport:
    """Create what is missing: the service's tables (where there are none), our schema, the indexes.

    The tables appear in one transaction; each index is built on its own, after it. Raises a BillingDatabaseError, in
    particular ServiceTablesMissing where some of the service's tables exist but not all, and SchemaTooNew; then
    nothing was changed. An index that could not be added is no error: it is in `not_done`.
    """
    log = _Log(echo)
    with translated(), _only_one(engine, echo, wait_s) as session:
        with engine.connect() as connection:
            check_reading(connection)
        with engine.begin() as connection:
            _create_service_tables(connection, log)
            for difference in differences(connection):
                if difference.harmful:
                    log.could_not(f"the service's tables are not as expected: {difference.text}; see doctor")
            _upgrade_schema(connection, log)
        _add_indexes(session, log, index_lock_timeout_s, index_tries)
    return log.report()


def downgrade(
    engine: sa.Engine,
    echo: Echo = print,
    *,
    index_lock_timeout_s: float = INDEX_LOCK_TIMEOUT_S,
    wait_s: float = WAIT_FOR_ANOTHER_MIGRATE_S,
) -> MigrationReport:
    """Remove all of ours, the schema with its records and our indexes; the service's tables stay as they are.

    Refuses while a renewal attempt is open or under review: without its record nobody would know that a charge was,
    or may have been, made, and the next run could charge again.
    """
    log = _Log(echo)
    with translated(), _only_one(engine, echo, wait_s) as session:
        with engine.begin() as connection:
            _drop_schema(connection, log)
        _set_timeouts(session, index_lock_timeout_s)
        for name, index in index_states(session).items():
            if index.ours:
                try:
                    session.exec_driver_sql(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
                    log.did(f"dropped index {name}")
                except exc.DBAPIError as error:
                    log.could_not(f"index {name} is still there: {translate(error)}")
    return log.report()


@contextmanager
def _only_one(engine: sa.Engine, echo: Echo, wait_s: float) -> Iterator[sa.Connection]:
    """Lend a session in autocommit that holds the lock of `migrate`. The lock ends with the session, however it ends.

    Indexes are built on this very session: when a run is killed, its server process goes on building to the end, and
    the lock is held until then. The lock is polled for: a session that waits inside a statement is a transaction
    that the other one's concurrent build would wait for, for ever.
    """
    session = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    try:
        session.detach()  # closed at the end, not pooled: its lock and its timeouts go with it
        deadline = time.monotonic() + wait_s
        told = False
        while not session.scalar(sa.select(sa.func.pg_try_advisory_lock(_LOCK_KEY))):
            if not told:
                echo("another migrate works on this database; waiting for it")
                told = True
            if time.monotonic() > deadline:
                raise DatabaseBusy(f"another migrate has worked on this database for {wait_s:.0f} s; try again later")
            time.sleep(0.2)
        yield session
    finally:
        session.close()


def _create_service_tables(connection: sa.Connection, log: _Log) -> None:
    missing = connection.scalars(
        sa.text("SELECT name FROM unnest(CAST(:names AS text[])) AS name WHERE to_regclass(quote_ident(name)) IS NULL"),
        {"names": list(SERVICE_TABLES)},
    ).all()
    if not missing:
        return
    if elsewhere := tables_elsewhere(connection):
        raise ServiceTablesMissing(f"no service's tables are on the search path, but {elsewhere}; nothing was changed")
    present = sorted(set(SERVICE_TABLES) - set(missing))
    if present:
        raise ServiceTablesMissing(
            f"this database has the service's tables {', '.join(present)}, but not {', '.join(sorted(missing))}:"
            " either BILLING_DATABASE_URL names another database than meant, or the service's own migration did not"
            " finish; nothing was changed"
        )
    service.create_all(connection)
    log.did(f"created the service's tables, as there were none: {', '.join(sorted(SERVICE_TABLES))}")


def _upgrade_schema(connection: sa.Connection, log: _Log) -> None:
    before = _revisions(connection)
    if before is None:
        # CREATE SCHEMA IF NOT EXISTS would ask for the privilege even where the schema is there already.
        if not connection.scalar(sa.text("SELECT to_regnamespace(:name) IS NOT NULL"), {"name": SCHEMA}):
            connection.exec_driver_sql(f"CREATE SCHEMA {SCHEMA}")
            log.did(f"created the schema {SCHEMA}")
    else:
        _refuse_newer(before)
    if before != [HEAD_REVISION]:
        command.upgrade(_alembic(connection), "head")
        log.did(f"brought the schema {SCHEMA} from {', '.join(before or ['nothing'])} to revision {HEAD_REVISION}")


def _drop_schema(connection: sa.Connection, log: _Log) -> None:
    before = _revisions(connection)
    if before is None:
        return
    _refuse_newer(before)
    if before:
        # No run may plan an attempt between this count and the drop.
        connection.exec_driver_sql(f"LOCK TABLE {SCHEMA}.renewal_attempts IN ACCESS EXCLUSIVE MODE")
        open_attempts = connection.scalar(
            sa.text(f"SELECT count(*) FROM {SCHEMA}.renewal_attempts WHERE state = ANY(:states)"),
            {"states": [*OPEN, State.REVIEW]},
        )
        if open_attempts:
            raise BillingDatabaseError(
                f"{open_attempts} renewal attempts are open or under review: without their records customers could be"
                " charged twice; let autopayment_job close them and resolve the quarantine; nothing was changed"
            )
        command.downgrade(_alembic(connection), "base")
    connection.exec_driver_sql(f"DROP TABLE {SCHEMA}.{VERSION_TABLE}")
    # Without CASCADE: what somebody else put into the schema stops it.
    connection.exec_driver_sql(f"DROP SCHEMA {SCHEMA}")
    log.did(f"dropped the schema {SCHEMA} with all its records")


def _revisions(connection: sa.Connection) -> list[str] | None:
    """Read the revisions of our schema; None where it has no version table."""
    if not connection.scalar(sa.text("SELECT to_regclass(:name) IS NOT NULL"), {"name": f"{SCHEMA}.{VERSION_TABLE}"}):
        return None
    return list(connection.scalars(sa.text(f"SELECT version_num FROM {SCHEMA}.{VERSION_TABLE}")))


def _refuse_newer(revisions: list[str]) -> None:
    if any(revision not in REVISIONS for revision in revisions):
        check_revisions(revisions)


def _alembic(connection: sa.Connection) -> Config:
    """Configure Alembic without an ini file: its scripts lie beside this module, installed or not."""
    config = Config()
    scripts = Path(__file__).with_name("migrations")
    config.set_main_option("script_location", str(scripts).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _set_timeouts(session: sa.Connection, lock_timeout_s: float) -> None:
    session.exec_driver_sql("SET statement_timeout = 0")  # a large table takes as long as it takes
    session.exec_driver_sql(f"SET lock_timeout = {max(1, int(lock_timeout_s * 1000))}")


def _add_indexes(session: sa.Connection, log: _Log, lock_timeout_s: float, tries: int) -> None:
    """Add what is missing of our indexes, and replace what is invalid. Each on its own: one failure stops no other."""
    _set_timeouts(session, lock_timeout_s)
    for index in SERVICE_INDEXES:
        for attempt in range(1, tries + 1):
            try:
                _ensure_index(session, index, log)
                break
            except exc.DBAPIError as error:
                problem = translate(error)
                if isinstance(problem, DatabaseUnavailable):
                    raise
                with suppress(exc.DBAPIError):
                    _drop_invalid(session, index)
                # An id that came twice during the build is found as such by the next try.
                is_worth_another = isinstance(problem, DatabaseBusy) or isinstance(error, exc.IntegrityError)
                if not is_worth_another or attempt == tries:
                    log.could_not(f"index {index.name} on {index.table}: {problem}")
                    break


def _ensure_index(session: sa.Connection, index: ServiceIndex, log: _Log) -> None:
    # First of all: an invalid unique index goes on refusing the service's rows, any invalid one slows its writes.
    for name in _drop_invalid(session, index):
        log.did(f"dropped index {name}, which an earlier run had left unfinished")
    states = index_states(session)
    serving = index.served_by(states)
    if serving is None:
        duplicates = find_duplicates(session) if index.unique else None
        if duplicates:
            _ensure_unique_for_new_rows(session, duplicates, states, log)
            return
        _build(session, index, log)
    elif serving.name != index.name and index.name in states:
        _drop_superfluous(session, index.name, serving.name, log)
    if index.unique:
        for name in partly_unique(states):
            _drop_superfluous(session, name, serving.name if serving else index.name, log)


def _ensure_unique_for_new_rows(
    session: sa.Connection, duplicates: Duplicates, states: Mapping[str, IndexState], log: _Log
) -> None:
    """Where old payments share ids: keep the rows after them unique for each provider, from as early on as possible."""
    wanted = unique_after(duplicates.unique_after)
    existing = partly_unique(states)
    serving = next((name for name, after in existing.items() if after <= duplicates.unique_after), None)
    if serving is None:
        _build(session, wanted, log)
        serving = wanted.name
    for name in existing:
        if name != serving:
            _drop_superfluous(session, name, serving, log)
    if duplicates.unique_after:
        log.could_not(
            f"a unique index on all payments: {duplicates.text}. Index {serving} keeps newer rows (id above"
            f" {duplicates.unique_after}) unique; for older ones a webhook that writes its own row beside a run can"
            " grant one payment twice (the money check paid_is_granted reports it). Fix these rows together with the"
            " service's team, then run migrate again"
        )


def _build(session: sa.Connection, index: ServiceIndex, log: _Log) -> None:
    session.exec_driver_sql(index.statement)
    log.did(f"added {'unique ' if index.unique else ''}index {index.name} on {index.table}")


def _drop_superfluous(session: sa.Connection, name: str, serving: str, log: _Log) -> None:
    session.exec_driver_sql(f"DROP INDEX CONCURRENTLY {name}")
    log.did(f"dropped index {name}: {serving} does its work")


def _drop_invalid(session: sa.Connection, index: ServiceIndex) -> list[str]:
    states = index_states(session)
    names = [index.name, *(partly_unique(states) if index.unique else ())]
    invalid = [name for name in names if name in states and not states[name].valid]
    for name in invalid:
        session.exec_driver_sql(f"DROP INDEX CONCURRENTLY {name}")
    return invalid
