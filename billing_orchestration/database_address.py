"""The one rule for addresses of PostgreSQL databases: what PostgreSQL's own client library takes.

`postgresql://` (also with a driver, `+psycopg` or `+psycopg2`) and `postgres://`, a Unix socket as
`?host=/folder`, several hosts as `h1,h2:5433` or `?host=h1,h2&port=5432,5433`. A fault never quotes any part of an
address: a password may stand wherever the slip is.
"""

from __future__ import annotations

import ipaddress
import logging
import re
from typing import Any

import sqlalchemy as sa
from psycopg import ProgrammingError, pq
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy.dialects.postgresql.psycopg2 import PGDialect_psycopg2
from sqlalchemy.exc import ArgumentError

FORM = "postgresql://USER:PASSWORD@HOST:5432/DATABASE"
FORM_WITH_HOSTS = "postgresql://USER:PASSWORD@/DATABASE?host=HOST,HOST&port=5432,5433"
_SCHEME = re.compile(r"(?:postgres|postgresql(?:\+psycopg2?)?)://")
_ESCAPES = "in a user or password write @ as %40, / as %2F, : as %3A, % as %25"


def read_address(text: str) -> sa.URL:
    """Parse an address as libpq does, into a URL for SQLAlchemy's psycopg. Raises ValueError without quoting it."""
    scheme = _SCHEME.match(text)
    if scheme is None:
        raise ValueError(f"must begin with postgresql:// or postgres://, as in {FORM}")
    try:
        parts = conninfo_to_dict(f"postgresql://{text[scheme.end() :]}")
    except ProgrammingError:
        raise ValueError(_why_unreadable(text)) from None
    hosts, ports = str(parts.pop("host", "")), str(parts.pop("port", ""))
    if not ports.strip(","):
        ports = ""
    database = str(parts.pop("dbname", ""))
    if any(not _is_host(host) for host in hosts.split(",")):
        raise ValueError(f"holds an invalid host; it must look like {FORM}: {_ESCAPES}")
    if any(not _is_port(port) for port in ports.split(",")):
        raise ValueError(f"holds an invalid port; it must look like {FORM}: {_ESCAPES}")
    if ports.count(",") not in (0, hosts.count(",")):
        raise ValueError(f"must hold one port, or as many as hosts, as in {FORM_WITH_HOSTS}")
    if not database:
        raise ValueError(f"names no database; it must look like {FORM}")
    if "@" in database:
        raise ValueError(f"names a database with an @; it must look like {FORM}: {_ESCAPES}")
    # SQLAlchemy takes one port, and no socket, where libpq has the host.
    plain = "/" not in hosts and "," not in ports
    elsewhere = {} if plain else {name: value for name, value in (("host", hosts), ("port", ports)) if value}
    user, password = parts.pop("user", None), parts.pop("password", None)
    return sa.URL.create(
        "postgresql+psycopg",
        username=None if user is None else str(user),
        password=None if password is None else str(password),
        host=hosts or None if plain else None,
        port=int(ports) if plain and ports else None,
        database=database,
        query={name: str(value) for name, value in parts.items()} | elsewhere,
    )


class _WithoutTheDriversWords(logging.Filter):
    """Dagster logs each failed connection to its run history in the driver's words, which quote the address."""

    def filter(self, record: logging.LogRecord) -> bool:
        if str(record.msg).startswith("Retrying failed database connection"):
            record.msg, record.args = "Retrying failed connection to the run history (DAGSTER_POSTGRES_URL)", ()
        return True


def keep_addresses_out_of_logs() -> None:
    """From now on this process logs no part of the run history's address. Harmless to repeat."""
    root = logging.getLogger()
    if not any(isinstance(known, _WithoutTheDriversWords) for known in root.filters):
        root.addFilter(_WithoutTheDriversWords())


def read_run_history_address(text: str) -> sa.URL:
    """Parse the run history's address. Raises ValueError, also for what Dagster reads otherwise than libpq.

    Dagster hands the text to SQLAlchemy as it stands, and works on psycopg 2 only (docs/decisions/0001).
    """
    ours = read_address(text)
    try:
        url = sa.make_url(text)
    except (ArgumentError, ValueError):  # ports of several hosts
        raise ValueError(f"is written in a form that Dagster cannot read; write it as {FORM_WITH_HOSTS}") from None
    if url.drivername.endswith("+psycopg"):
        raise ValueError("names psycopg 3, on which Dagster cannot write; begin it with postgresql://")
    dialect: Any = PGDialect_psycopg2
    arguments = dialect().create_connect_args
    if arguments(url) != arguments(ours):
        raise ValueError(
            "means something else to Dagster than to PostgreSQL: write several hosts as ?host=HOST,HOST&port=5432,5433,"
            " a socket as ?host=/FOLDER, and ssl=true as sslmode=require"
        )
    return ours


def _why_unreadable(text: str) -> str:
    known = {option.keyword.decode() for option in pq.Conninfo.get_defaults()} | {"ssl"}
    options = text.partition("?")[2]
    if options and any(option.partition("=")[0] not in known for option in options.split("&")):
        return "holds an option after the ? that PostgreSQL's client library does not know; remove it"
    return f"cannot be read; it must look like {FORM}: {_ESCAPES}"


def _is_host(text: str) -> bool:
    if text.startswith("/"):
        return True
    if ":" in text:
        try:
            return bool(ipaddress.IPv6Address(text))
        except ValueError:
            return False
    return not re.search(r"[@\[\]/\s]", text)


def _is_port(text: str) -> bool:
    return not text or (text.isascii() and text.isdigit() and 1 <= int(text[:6]) <= 65535)
