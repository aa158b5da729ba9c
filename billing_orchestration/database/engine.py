"""Connections to the billing database, and what its failures mean in words.

Every session pins what it depends on (`session`), gives up on a lock, a statement or a silent server after a bounded
time, and carries a name that an operator finds in `pg_stat_activity`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import sqlalchemy as sa
from sqlalchemy import exc

from billing_orchestration.database.errors import (
    AccessDenied,
    BillingDatabaseError,
    DatabaseBusy,
    DatabaseFull,
    DatabaseUnavailable,
    RowRefused,
    SchemaProblem,
)
from billing_orchestration.database.session import PINNED, PREFERRED, prepare
from billing_orchestration.domain.personal import mask_personal

# A server that does not even accept within this time is down, or a firewall drops the packets.
CONNECT_TIMEOUT_S = 10


def create_engine(
    url: str,
    *,
    pool_size: int = 5,
    application_name: str = "billing-orchestration",
    session: dict[str, str] | None = None,
) -> sa.Engine:
    """Make an engine (psycopg 3) for a `postgresql://` URL. It connects when first used.

    `pool_size` is also the most connections it opens: size it to the threads that share it. Session settings of
    `session` (`lock_timeout`, …) win over this module's, and `options` in the URL over both.
    """
    address = sa.make_url(url)
    if address.drivername != "postgresql+psycopg":
        address = address.set(drivername="postgresql+psycopg")
    of_url = address.query.get("options", "")
    engine = sa.create_engine(
        address,
        pool_size=pool_size,
        max_overflow=0,
        # After a restart of PostgreSQL the pool's old connections are replaced instead of failing a row each.
        pool_pre_ping=True,
        # The values of a failed statement are people's data and payment bodies: not for a log.
        hide_parameters=True,
        # Saves asking the server about a type that no table here has.
        use_native_hstore=False,
        connect_args={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "application_name": application_name,
            "client_encoding": PINNED["client_encoding"],
            # A server that vanished (power, network) is noticed within a minute, not after two hours.
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
        },
    )

    def prepare_session(connection: psycopg.Connection[Any], _record: Any) -> None:
        prepare(connection, {**PREFERRED, **(session or {})}, of_url if isinstance(of_url, str) else " ".join(of_url))

    sa.event.listen(engine, "connect", prepare_session)
    return engine


def keep_to_indexes(connection: sa.Connection) -> None:
    """For a session that sends the same few statements by keys all day: every plan of it uses the indexes.

    A prepared statement's plan is kept. One that was made while a table was nearly empty would read all of it for each
    batch, long after it has grown. It stays with the session: use it on a connection that does not return to a pool.
    """
    connection.exec_driver_sql("SET enable_seqscan = off")
    connection.commit()


@contextmanager
def begin(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A connection with one transaction: committed at the end, rolled back by an error. Raises BillingDatabaseError."""
    with translated(), engine.begin() as connection:
        yield connection


@contextmanager
def read(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A connection whose transaction is rolled back at the end, whatever happens. Raises BillingDatabaseError."""
    with translated(), engine.connect() as connection:
        yield connection


@contextmanager
def translated() -> Iterator[None]:
    """Raise what SQLAlchemy and psycopg raise in here as a BillingDatabaseError, with the cause kept."""
    try:
        yield
    except (exc.SQLAlchemyError, psycopg.Error) as error:
        raise translate(error) from error


def translate(error: BaseException) -> BillingDatabaseError:
    """Say in one line what a database error means and what to do. Our own errors are returned unchanged."""
    if isinstance(error, BillingDatabaseError):
        return error
    original = error.orig if isinstance(error, exc.DBAPIError) and error.orig is not None else error
    state = getattr(original, "sqlstate", None) or ""
    if isinstance(error, exc.TimeoutError):
        return DatabaseBusy("no connection of the pool became free in time: fewer threads, or a larger pool_size")
    translated = _by_state(state, original) if state else _without_state(error, original)
    translated.sqlstate = state
    translated.by_function = getattr(getattr(original, "diag", None), "source_function", None) == "exec_stmt_raise"
    return translated


def _without_state(error: BaseException, original: BaseException) -> BillingDatabaseError:
    """What the client library says, without a word of the server's."""
    reason = _one_line(original)
    if re.search(_LOST, reason):
        return _lost(reason, "")
    if (
        isinstance(error, exc.OperationalError)
        or isinstance(original, psycopg.OperationalError)
        or re.search(_BAD_OPTION, reason)
    ):
        return _no_connection(reason)
    if isinstance(original, (psycopg.DataError, psycopg.IntegrityError)):
        return RowRefused(f"the database refused a statement: {reason}")
    return BillingDatabaseError(f"the database refused a statement: {reason}")


def _by_state(state: str, original: BaseException) -> BillingDatabaseError:
    reason = _one_line(original)
    diagnosis = getattr(original, "diag", None)
    severity = getattr(diagnosis, "severity_nonlocalized", None) or getattr(diagnosis, "severity", None)
    if severity in {"FATAL", "PANIC"} or (severity is None and state in _ENDED_BY):
        # The session is over. A trigger cannot say this.
        is_about_access = state.startswith(("28", "3D")) or state == "53300"
        return _no_connection(reason) if is_about_access else _lost(reason, state)
    if state in _BUSY:
        way_out = _TOO_LONG if state == "57014" and "statement timeout" in reason else ""
        return DatabaseBusy(f"the database was busy and changed nothing: {reason}{way_out}; the next run tries again")
    if state[:2] not in _OF_THE_DATABASE:
        return RowRefused(f"the database refused a statement: {reason}")
    doubtful = _of_the_database(state, reason)
    doubtful.is_doubtful = True
    return doubtful


def _of_the_database(state: str, reason: str) -> BillingDatabaseError:
    if state == "53100":
        return DatabaseFull(
            f"the disk of the PostgreSQL server is full: {reason}; nothing of that statement was written."
            " Free disk space there; the next run completes this one"
        )
    if state == "42501" and "row-level security policy" in reason:
        return AccessDenied(
            f"policies hide rows from the role of BILLING_DATABASE_URL: {reason}; ALTER ROLE … BYPASSRLS (doctor names"
            " the tables and policies)"
        )
    if state == "42501":
        return AccessDenied(
            f"the role of BILLING_DATABASE_URL may not do this: {reason}; grant it, or use the tables' owner"
        )
    if state in {"42P01", "42703", "3F000", "42704"}:
        return SchemaProblem(
            f"the database is not in the expected shape: {reason}; `billing-orchestration doctor` names what differs"
        )
    return BillingDatabaseError(f"the database refused a statement: {reason}")


# A lock, a deadlock, a serialization failure, a canceled statement: a retry may succeed.
_BUSY = frozenset({"55P03", "40P01", "40001", "57014"})
# Classes of SQLSTATE about the connection, the server, rights and shape. Whatever else a statement raises is about the
# values at hand: data, integrity, a trigger's own code.
_OF_THE_DATABASE = frozenset(
    {
        "08",  # connection
        "0A",  # not supported: also a prepared plan that a table has outgrown
        "25",  # transaction state: read only
        "26",  # a prepared statement is gone
        "28",  # authorization
        "34",  # a cursor is gone
        "3D",  # database
        "3F",  # schema
        "42",  # privileges, and names of tables and columns
        "53",  # resources
        "57",  # intervention of an operator
        "58",  # the operating system
        "F0",  # configuration file
        "XX",  # internal
    }
)


def _lost(reason: str, state: str) -> DatabaseUnavailable:
    cause = _ENDED_BY.get(state, "")
    if "pooling mode" in reason:
        cause = "; the pooler in between must keep sessions: pool_mode = session"
    return DatabaseUnavailable(
        f"the connection to the database was lost: {reason}{cause}; the next run completes this one"
    )


# What ends a session of ours by its SQLSTATE, where there is something to be done about it.
_ENDED_BY = {
    "25P03": "; the run stood still for longer than idle_in_transaction_session_timeout",
    "25P04": "; that is the role's transaction_timeout: ALTER ROLE … SET transaction_timeout = '10min'",
    "57P05": "; that is idle_session_timeout: ALTER ROLE … SET idle_session_timeout = 0",
}
_TOO_LONG = (
    " (statement_timeout; `billing-orchestration doctor` names a missing index, and"
    " ?options=-c%20statement_timeout%3D15min in BILLING_DATABASE_URL gives it more time)"
)


# What psycopg says, without a code, when a connection that worked breaks.
_LOST = (
    "connection is lost|server closed the connection|connection is closed|connection already closed"
    "|connection not open|Connection reset by peer|Broken pipe|terminating connection"
)
_BAD_OPTION = "invalid connection option|invalid URI query"
# How PostgreSQL and libpq word it, what it means, and the way out. Their own words quote parts of the address, and in
# one that was written wrongly any part may be a password. Other languages than English fall through to the last one.
_NOT_CONNECTED = (
    (_BAD_OPTION, "it holds an option that PostgreSQL does not know", "remove that option after the `?`"),
    ("too many connections for role", "its role has all its connections in use",
     "raise the role's limit: ALTER ROLE … CONNECTION LIMIT 20"),
    ("too many connections for database", "its database has all its connections in use",
     "raise the database's limit: ALTER DATABASE … CONNECTION LIMIT 100"),
    ("password authentication failed", "password authentication failed", "the user or the password in it is wrong"),
    ("no password supplied", "no password supplied", "it holds no password, and the server wants one"),
    ("pg_hba.conf", "the server does not let this user in from here", "see its pg_hba.conf"),
    ("database .* does not exist", "the server has no such database", "create that database, or correct its name"),
    ("role .* does not exist", "the server has no such role", "create that role, or correct the user in it"),
    ("refused", "connection refused", "is PostgreSQL running there? correct the host and the port, or start it"),
    ("No such file or directory", "no server listens on that socket", "correct `host=`, or start it"),
    ("resolve|translate host name|Name or service", "nothing has that host's name", "correct the host"),
    ("timeout|timed out", "the host does not answer", "correct the host, or look at the network in between"),
    ("too many clients|remaining connection slots", "the server has no connection left", "raise max_connections"),
    ("starting up|shutting down|recovery", "the server is starting or stopping", "try again"),
    ("SSL|certificate", "no TLS connection that both sides accept", "correct `sslmode=` and the certificates"),
    ("", "the server, or what is in between, ended it", "correct it, or start the server; psql says more"),
)  # fmt: skip


def _no_connection(reason: str) -> DatabaseUnavailable:
    what, way_out = next((what, out) for words, what, out in _NOT_CONNECTED if re.search(words, reason))
    return DatabaseUnavailable(f"cannot connect to the database of BILLING_DATABASE_URL: {what}; {way_out}")


def _one_line(error: BaseException) -> str:
    """Shorten an error to what it says first: PostgreSQL adds DETAIL (which quotes values) and more lines."""
    lines: list[str] = []
    for line in str(error).splitlines():
        if re.match(r"\s*(DETAIL|CONTEXT|HINT|LINE \d+|STATEMENT|QUERY)\b", line):
            break
        lines.append(line.strip())
    # A trigger's own words may name whom they are about.
    text = mask_personal(" ".join(part for part in lines if part)) or type(error).__name__
    return text if len(text) <= 400 else text[:399] + "…"
