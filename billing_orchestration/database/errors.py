"""What went wrong with the database, in one line that names the way out. No text holds a password.

    BillingDatabaseError       also by itself: a statement failed in a way not distinguished here
    ├── DatabaseUnavailable    no connection, or it was lost: refused, wrong password, no such database, restarting
    │   └── DatabaseFull       its disk is full: it reads, and writes nothing
    ├── DatabaseBusy           a lock, a deadlock or a timeout: nothing was changed, a retry may succeed
    ├── RowRefused             a value, a constraint, a trigger: this row cannot be written as it is, others can
    │   └── NotAsMeant         a trigger made something else of it, without an error
    ├── AccessDenied           the role of BILLING_DATABASE_URL may not do this
    └── SchemaProblem          the database is reachable, but not what this version works on
        ├── SchemaMissing      `migrate` never ran here
        ├── SchemaOutdated     `migrate` of this version did not run yet
        ├── SchemaTooNew       a newer version migrated it: this one must not write to it
        ├── ServiceTablesMissing   the billing service's own tables are not (all) there
        └── Unfit              rows are hidden, a pooler lends the session out, or a grant could not be written

A lost connection leaves the outcome of a COMMIT unknown: whoever applies a change must be able to repeat it.
"""

from __future__ import annotations


class BillingDatabaseError(Exception):
    """Any failure of the billing database. Its text is one line for the person who reads the run.

    `sqlstate`: PostgreSQL's code, if it gave one. `is_doubtful`: the code is one of the database's (a missing
    privilege, a missing table, no memory), but a statement raised it and the session goes on. So a trigger may have
    raised it for one row, and only what becomes of the others tells. `by_function`: the words are those of a trigger or
    another function of the service's, which may name a customer.
    """

    sqlstate: str = ""
    is_doubtful: bool = False
    by_function: bool = False


class DatabaseUnavailable(BillingDatabaseError):
    """No connection to the database, or the connection was lost."""


class DatabaseFull(DatabaseUnavailable):
    """The disk of the server is full. Its transaction changed nothing, and no other row would fare better."""


class DatabaseBusy(BillingDatabaseError):
    """The statement met a lock, a deadlock or a timeout. Its transaction changed nothing; try again."""


class RowRefused(BillingDatabaseError):
    """The database refuses these values: a retry will not help, but it says nothing about other rows."""


class NotAsMeant(RowRefused):
    """A trigger or rule of the service's swallowed or altered a change. What was written must be rolled back."""

    def __init__(self, what: str) -> None:
        super().__init__(f"a trigger or rule of the service's made something else of {what} than was written")


class AccessDenied(BillingDatabaseError):
    """The role lacks a privilege. A person has to grant it."""


class SchemaProblem(BillingDatabaseError):
    """The database is not in the shape that this version works on."""


class ProvidersUnclear(SchemaProblem):
    """It is not known which rows of `payment_providers` are this shop's."""


class SchemaMissing(SchemaProblem):
    """The schema `billing_orchestration` is not there."""


class SchemaOutdated(SchemaProblem):
    """The schema is of an older version."""


class SchemaTooNew(SchemaProblem):
    """The schema is of a newer version than this code."""


class ServiceTablesMissing(SchemaProblem):
    """Tables of the billing service are missing: probably another database than meant."""


class Unfit(SchemaProblem):
    """These jobs cannot work on this database as it is."""
