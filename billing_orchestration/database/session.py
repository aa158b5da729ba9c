"""What every session of ours depends on, and therefore pins: somebody else's database, role or pooler may differ.

It is set by a statement and not by the connection's `options`, which poolers such as PgBouncer refuse.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import psycopg
import sqlalchemy as sa
from psycopg.adapt import Buffer, Loader

from billing_orchestration.database.conventions import SCHEMA

# Rows are locked for milliseconds, by the service as by these jobs. Longer means somebody's transaction hangs: the
# row fails for now, and the other rows are not kept waiting.
LOCK_TIMEOUT_S = 10
# The longest honest statement expires a month of subscriptions at once, in seconds. Longer is a missing index or a
# plan gone wrong, and it would burden the live service.
STATEMENT_TIMEOUT_S = 300
# A run that is stopped inside a transaction (suspended, swapped out) must not hold the service's rows for ever.
IDLE_IN_TRANSACTION_TIMEOUT_S = 120

# `options` in the URL win over these.
PREFERRED = {
    # What is read after a lock must be newer than the lock: a database or role that defaults to another level would
    # decide from a snapshot taken before it.
    "default_transaction_isolation": "read committed",
    "lock_timeout": f"{LOCK_TIMEOUT_S}s",
    "statement_timeout": f"{STATEMENT_TIMEOUT_S}s",
    "idle_in_transaction_session_timeout": f"{IDLE_IN_TRANSACTION_TIMEOUT_S}s",
}
# These are not up for choice. What PostgreSQL shows for each begins with its value.
PINNED = {
    "client_encoding": "UTF8",
    "DateStyle": "ISO",
    # The service's naive timestamps hold UTC.
    "TimeZone": "UTC",
    # A policy that hides rows from us is an error, not an empty answer.
    "row_security": "off",
    # What is committed before a charge is sent must outlive a crash of the server.
    "synchronous_commit": "on",
    # A renewal run keeps its locks in a session that is idle between two charges.
    "idle_session_timeout": "0",
}
# Which schemas on the session's own path hold the service's tables, in the order of the path.
HOLDERS = """
    SELECT path.name, path.place, (
        SELECT count(*) = 2 FROM pg_class t JOIN pg_namespace s ON s.oid = t.relnamespace
        WHERE s.nspname = path.name AND t.relname IN ('subscriptions', 'payments')) AS holds
    FROM unnest(current_schemas(false)) WITH ORDINALITY AS path (name, place)
"""
# What this server does not know (idle_session_timeout before 14) is left out; what is stronger stays. The
# schema of the service's tables comes first and ours last: a role may be named like either.
_SET = f"""
    SELECT set_config(name, value, false) FROM unnest(%s::text[], %s::text[]) AS wanted (name, value)
    WHERE NOT (name = 'idle_session_timeout' AND current_setting(name, true) IS NULL)
      AND NOT (name = 'synchronous_commit' AND current_setting(name) = 'remote_apply')
    UNION ALL
    SELECT set_config('search_path', coalesce(string_agg(
        quote_ident(name), ', ' ORDER BY NOT holds, name = '{SCHEMA}', place), 'public'), false)
    FROM ({HOLDERS}) AS holders
"""


def prepare(connection: psycopg.Connection[Any], preferred: Mapping[str, str], url_options: str) -> None:
    """Pin a new session's settings, and let its path begin with the schema of the service's tables."""
    named = {name.lower() for name in re.findall(r"(?:-c\s*|--)([\w.]+)\s*=", url_options)}
    settings = {name: value for name, value in preferred.items() if name not in named} | PINNED
    connection.autocommit = True
    connection.execute(_SET, [list(settings), list(settings.values())])
    if connection.info.parameter_status("server_encoding") == "SQL_ASCII":
        # Such a server stores any bytes, and refuses to send those that are no UTF-8: one row would break the reading
        # of all. So it sends bytes.
        connection.execute("SET client_encoding TO SQL_ASCII")
        for name in ("text", "varchar", "bpchar", "name"):
            connection.adapters.register_loader(name, _AnyBytes)
    connection.autocommit = False


class _AnyBytes(Loader):
    """Text from a server that checks no encoding: what is no UTF-8 reads as U+FFFD, so it equals nothing stored."""

    def load(self, data: Buffer) -> str:
        return bytes(data).decode("utf-8", "replace")


_SHOW = sa.text("""
    SELECT name, current_setting(name, true) FROM unnest(CAST(:names AS text[])) AS name
    WHERE NOT (name = 'synchronous_commit' AND current_setting(name) = 'remote_apply')
      AND NOT (name = 'client_encoding' AND current_setting('server_encoding') = 'SQL_ASCII')
""")


def not_pinned(connection: sa.Connection) -> list[str]:
    """Which settings are not what was set when the session began: a pooler, or another server behind it."""
    return [
        f"{name} is {value}, not {PINNED[name]}"
        for name, value in connection.execute(_SHOW, {"names": list(PINNED)}).tuples()
        if value is not None and not value.startswith(PINNED[name])
    ]


def is_shared(connection: sa.Connection) -> bool:
    """Whether a pooler lends this connection's server process to others between two transactions of ours.

    What is set or locked in such a session is another one's by the next statement. The connection's transaction ends.
    """
    own = _server_process(connection)
    driver: Any = connection.connection.dbapi_connection
    if driver.info.backend_pid == own:
        return False
    # A pooler is in between, for it told the client a process number of its own. Does it keep this session for us?
    connection.rollback()
    with connection.engine.connect() as other:
        if _server_process(other) == own:
            return True
        return _server_process(connection) != own


def _server_process(connection: sa.Connection) -> int:
    return int(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())
