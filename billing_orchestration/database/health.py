"""Is this database what this version works on? Runs ask it in one query, `doctor` at length."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.dialects import postgresql as pg

from billing_orchestration.database.conventions import PROVIDER_IDS, SCHEMA, SERVICE_TABLES, of_this_shop
from billing_orchestration.database.engine import translate
from billing_orchestration.database.errors import (
    ProvidersUnclear,
    SchemaMissing,
    SchemaOutdated,
    SchemaTooNew,
    ServiceTablesMissing,
)
from billing_orchestration.database.tables import service

# Every revision of database/migrations/versions, oldest first: a run knows the newest without loading Alembic.
REVISIONS = ("0001", "0002", "0003", "0004", "0005", "0006", "0007", "0008", "0009", "0010", "0011")
HEAD_REVISION = REVISIONS[-1]
# Not Alembic's default name: the service has an alembic_version of its own (in public, with its own revision).
VERSION_TABLE = "schema_version"

_MIGRATE = "run: billing-orchestration migrate"
_ELSEWHERE = sa.text("""
    SELECT s.nspname FROM pg_class t JOIN pg_namespace s ON s.oid = t.relnamespace
    WHERE t.relname IN ('subscriptions', 'payments') AND t.relkind IN ('r', 'p') AND s.nspname !~ '^pg_'
      AND NOT pg_table_is_visible(t.oid)
    GROUP BY s.nspname HAVING count(*) = 2 ORDER BY 1
""")
_STATE = sa.text(
    f"SELECT ARRAY(SELECT version_num FROM {SCHEMA}.{VERSION_TABLE}),"
    " ARRAY(SELECT name FROM unnest(CAST(:names AS text[])) AS name WHERE to_regclass(quote_ident(name)) IS NULL)"
)


def check_schema(connection: sa.Connection) -> None:
    """Return when the database has our schema in this version's shape and the service's tables; else raise.

    Raises SchemaMissing, SchemaOutdated, SchemaTooNew or ServiceTablesMissing (all are SchemaProblem), and what
    `translate` makes of a failed connection. After a raise the caller's transaction can only be rolled back.
    """
    try:
        row = connection.execute(_STATE, {"names": list(SERVICE_TABLES)}).one()
    except exc.DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) in {"42P01", "3F000"}:
            raise SchemaMissing(
                f"this database has no schema {SCHEMA}; {_MIGRATE} (or correct BILLING_DATABASE_URL)"
            ) from None
        raise translate(error) from error
    revisions, missing = list(row[0]), list(row[1])
    check_revisions(revisions)
    if missing:
        raise ServiceTablesMissing(
            f"the billing service's tables are missing in this database: {', '.join(sorted(missing))};"
            f" {tables_elsewhere(connection) or 'correct BILLING_DATABASE_URL, or let the service create them'}"
        )


# NULL where the setting is not there.
_PROVIDERS = sa.text(f"""
    SELECT CAST(string_to_array(nullif(current_setting('{PROVIDER_IDS}', true), ''), ',') AS bigint[]),
           ARRAY(SELECT id FROM payment_providers ORDER BY id),
           ARRAY(SELECT id || coalesce(' (' || name || ')', '') FROM payment_providers
                 WHERE {of_this_shop("id")} ORDER BY id)
""")


def check_providers(connection: sa.Connection) -> list[str]:
    """The rows of payment_providers that are this shop's, in words. Raises ProvidersUnclear, one line."""
    chosen, there, names = connection.execute(_PROVIDERS).one()
    listed = ", ".join(str(id_) for id_ in there) or "none"
    if chosen is None and len(there) > 1:
        raise ProvidersUnclear(
            f"payment_providers has several rows ({listed}): put those that are this shop into YOOKASSA_PROVIDER_IDS"
        )
    if missing := sorted(set(chosen or ()) - set(there)):
        raise ProvidersUnclear(
            f"YOOKASSA_PROVIDER_IDS names {', '.join(str(id_) for id_ in missing)}, and payment_providers has {listed}"
        )
    return list(names)


def tables_elsewhere(connection: sa.Connection) -> str | None:
    """Where the service's tables are if not on the search path, and what to do; None where they are nowhere."""
    schemas = list(connection.execute(_ELSEWHERE).scalars())
    if not schemas:
        return None
    return f"there are such tables in the schema {' and in '.join(schemas)}, off the search path: " + name_the_schema(
        schemas[0]
    )


def name_the_schema(name: str) -> str:
    """How an operator says which schema is meant."""
    return (
        f"name the schema, by ALTER ROLE … SET search_path = {name}, or by ?options=-c%20search_path%3D{name} in"
        " BILLING_DATABASE_URL"
    )


def check_revisions(revisions: list[str]) -> None:
    """Return when these are exactly this version's newest revision; else raise the SchemaProblem that they mean."""
    unknown = [revision for revision in revisions if revision not in REVISIONS]
    if unknown:
        raise SchemaTooNew(
            f"the schema {SCHEMA} is at revision {', '.join(unknown)}, newer than this version's {HEAD_REVISION}:"
            " install the version that migrated it"
        )
    if not revisions:
        raise SchemaMissing(f"the schema {SCHEMA} is there but empty; {_MIGRATE}")
    if revisions != [HEAD_REVISION]:
        raise SchemaOutdated(
            f"the schema {SCHEMA} is at revision {', '.join(revisions)}, this version needs {HEAD_REVISION}; {_MIGRATE}"
        )


def server_clock(connection: sa.Connection) -> datetime:
    """What time it is by the server's clock, at this moment and not at the transaction's beginning."""
    told: datetime = connection.execute(sa.text("SELECT clock_timestamp()")).scalar_one()
    return told.astimezone(timezone.utc)


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What `doctor` wants to know of the server. `clock` is the server's, aware UTC."""

    version: str
    version_number: int
    clock: datetime
    role: str
    database: str
    read_only: bool


def server_facts(connection: sa.Connection) -> ServerFacts:
    """Ask the server about itself."""
    row = connection.execute(
        sa.text(
            "SELECT current_setting('server_version'), CAST(current_setting('server_version_num') AS integer),"
            " clock_timestamp(), current_user, current_database(),"
            " pg_is_in_recovery() OR CAST(current_setting('default_transaction_read_only') AS boolean)"
        )
    ).one()
    return ServerFacts(row[0], row[1], row[2].astimezone(timezone.utc), row[3], row[4], row[5])


NO_TABLE, NO_ENUM, NO_COLUMN = "no_table", "no_enum", "no_column"
LABELS, TYPE = "labels", "type"


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference between the service's tables and those expected, as a code and in words. A harmless one stops no
    job.
    """

    code: str
    text: str
    harmful: bool = True


_COLUMNS = sa.text(
    """
    SELECT t.name, a.attname, format_type(a.atttypid, a.atttypmod)
    FROM unnest(CAST(:tables AS text[])) AS t (name)
    JOIN pg_attribute a ON a.attrelid = to_regclass(quote_ident(t.name)) AND a.attnum > 0 AND NOT a.attisdropped
    ORDER BY a.attrelid, a.attnum
    """
)
_LABELS = sa.text(
    """
    SELECT t.typname, array_agg(CAST(e.enumlabel AS text) ORDER BY e.enumsortorder)
    FROM pg_type t JOIN pg_enum e ON e.enumtypid = t.oid
    WHERE pg_type_is_visible(t.oid) AND t.typname = ANY(CAST(:names AS text[])) GROUP BY t.typname
    """
)


def differences(connection: sa.Connection) -> list[Difference]:
    """Compare the service's tables, columns, types and enum labels with those expected, and name what differs."""
    found: dict[str, dict[str, str]] = {}
    for table, column, kind in connection.execute(_COLUMNS, {"tables": list(SERVICE_TABLES)}):
        found.setdefault(table, {})[column] = kind
    result: list[Difference] = []
    for name in SERVICE_TABLES:
        if name not in found:
            result.append(Difference(NO_TABLE, f"there is no table {name}"))
        else:
            result += _column_differences(service.tables[name], found[name])
    enums = {column.type.name: column.type.enums for column in _enum_columns()}
    labels = {row[0]: row[1] for row in connection.execute(_LABELS, {"names": sorted(enums)})}
    for name, expected in sorted(enums.items()):
        if name not in labels:
            result.append(Difference(NO_ENUM, f"there is no enum type {name}"))
            continue
        missing = [label for label in expected if label not in labels[name]]
        unknown = [label for label in labels[name] if label not in expected]
        if missing:
            result.append(Difference(LABELS, f"the enum {name} lacks {', '.join(missing)}"))
        if unknown:
            result.append(Difference(LABELS, f"the enum {name} also has {', '.join(unknown)}", harmful=False))
    return result


def _enum_columns() -> Iterator[Any]:
    for table in service.tables.values():
        for column in table.columns:
            if isinstance(column.type, pg.ENUM):
                yield column


def _column_differences(table: sa.Table, found: dict[str, str]) -> Iterator[Difference]:
    for column in table.columns:
        name = f"{table.name}.{column.name}"
        if column.name not in found:
            yield Difference(NO_COLUMN, f"there is no column {name}")
            continue
        kind, expected = found[column.name], _expected_type(column)
        if kind != expected:
            harmful = not any(re.match(p, kind) for p in _ALSO_FINE[expected])
            yield Difference(TYPE, f"{name} is {kind}, not {expected}", harmful)


def _expected_type(column: sa.Column[Any]) -> str:
    if isinstance(column.type, pg.ENUM):
        return str(column.type.name)
    compiled = column.type.compile(dialect=pg.dialect()).lower()  # type: ignore[no-untyped-call]
    return {"varchar": "character varying", "numeric(8, 2)": "numeric(8,2)"}.get(compiled, compiled)


# Types that serve as well as the expected one.
_ALSO_FINE: defaultdict[str, tuple[str, ...]] = defaultdict(
    tuple,
    {
        "character varying": (r"character varying\(\d+\)$", "text$"),
        "integer": ("bigint$",),
        "timestamp without time zone": (r"timestamp\(\d\) without time zone$",),
    },
)
