"""Is this database what this version works on? Runs ask it in one query, `doctor` at length."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import exc

from billing_orchestration.database.engine import translate
from billing_orchestration.database.errors import SchemaMissing, SchemaOutdated, SchemaTooNew, ServiceTablesMissing
from billing_orchestration.database.tables import SCHEMA, service

# Every revision of database/migrations/versions, oldest first: a run knows the newest without loading Alembic.
REVISIONS = ("0001",)
HEAD_REVISION = REVISIONS[-1]
# Not Alembic's default name: the service has an alembic_version of its own (in public, with its own revision).
VERSION_TABLE = "schema_version"

SERVICE_TABLES = tuple(service.tables)

_MIGRATE = "run: billing-orchestration migrate"
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
            " correct BILLING_DATABASE_URL, or let the service create them"
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
