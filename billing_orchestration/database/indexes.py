"""The indexes that the jobs need on the service's tables: all that is ever added to them. `migrate` builds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa

# Ours by name, so that nobody's index is ever dropped but ours.
PREFIX = "bo_"


@dataclass(frozen=True, slots=True)
class IndexState:
    """An index that exists on one of the service's tables. `definition` is PostgreSQL's own wording."""

    name: str
    table: str
    definition: str
    unique: bool
    valid: bool

    @property
    def ours(self) -> bool:
        """Whether `migrate` added it."""
        return self.name.startswith(PREFIX)


@dataclass(frozen=True, slots=True)
class ServiceIndex:
    """An index that should exist. `definitions` are the wordings that serve, the first of them our own."""

    name: str
    table: str
    definitions: tuple[str, ...]
    unique: bool = False

    @property
    def statement(self) -> str:
        """The statement that builds it without blocking the service."""
        unique = "UNIQUE " if self.unique else ""
        return f"CREATE {unique}INDEX CONCURRENTLY {self.name} ON {self.table} USING {self.definitions[0]}"

    def served_by(self, states: Mapping[str, IndexState]) -> IndexState | None:
        """Find the valid index that does its work: its own, else another one of the same definition."""
        own = states.get(self.name)
        others = (state for state in states.values() if state.name != self.name)
        serving = [
            state
            for state in others
            if state.valid
            and state.table == self.table
            and state.definition in self.definitions
            and (state.unique or not self.unique)
        ]
        # Another one first: then ours is superfluous.
        return serving[0] if serving else own if own is not None and own.valid else None


_ACTIVE = "WHERE (status = 'ACTIVE'::subscriptionstatusenum)"
_PENDING = "WHERE (status = 'PENDING'::paymentstatusenum)"
_GRANTED_TO_NOBODY = "WHERE ((status = 'SUCCEEDED'::paymentstatusenum) AND (subscription_id IS NULL))"
_PAYMENT_ID = "btree (external_payment_id)"
_PAYMENT_ID_NOT_NULL = "btree (external_payment_id) WHERE (external_payment_id IS NOT NULL)"

UNIQUE_PAYMENT_ID = ServiceIndex(
    "bo_payments_external_payment_id_unique", "payments", (_PAYMENT_ID_NOT_NULL, _PAYMENT_ID), unique=True
)
SERVICE_INDEXES = (
    ServiceIndex("bo_subscriptions_active_ended_at", "subscriptions", (f"btree (ended_at) {_ACTIVE}",)),
    ServiceIndex("bo_subscriptions_active_user_plan", "subscriptions", (f"btree (user_id, plan_id) {_ACTIVE}",)),
    ServiceIndex("bo_payments_pending_created_at", "payments", (f"btree (created_at) {_PENDING}",)),
    ServiceIndex(
        "bo_payments_granted_to_nobody",
        "payments",
        (f"btree (GREATEST(created_at, updated_at)) {_GRANTED_TO_NOBODY}",),
    ),
    ServiceIndex("bo_payments_subscription_id", "payments", ("btree (subscription_id)",)),
    ServiceIndex("bo_prices_plan_currency", "prices", ("btree (plan_id, currency)",)),
    # The unique one first: where it is, the plain one is not needed.
    UNIQUE_PAYMENT_ID,
    ServiceIndex("bo_payments_external_payment_id", "payments", (_PAYMENT_ID, _PAYMENT_ID_NOT_NULL)),
)
# Where the data forbids the unique one: unique from a row on. The name ends with the last id that it leaves out.
_UNIQUE_AFTER = f"{PREFIX}payments_unique_after_"


def unique_after(row_id: int) -> ServiceIndex:
    """The unique index for payments whose row id is above `row_id`.

    Two providers may use the same ids, and a service may write '' where there is none yet.
    """
    condition = f"WHERE ((id > {row_id}) AND ((external_payment_id)::text <> ''::text))"
    definition = f"btree (external_payment_id, payment_provider_id) {condition}"
    return ServiceIndex(f"{_UNIQUE_AFTER}{row_id}", "payments", (definition,), unique=True)


def partly_unique(states: Mapping[str, IndexState]) -> dict[str, int]:
    """The indexes of `unique_after` that exist, invalid ones too, each with the last id that it leaves out."""
    numbers = {name: name.removeprefix(_UNIQUE_AFTER) for name in states if name.startswith(_UNIQUE_AFTER)}
    return {name: int(number) for name, number in numbers.items() if number.isdecimal()}


_STATES = sa.text(
    """
    SELECT name.relname, t.relname, substring(pg_get_indexdef(i.indexrelid) FROM ' USING (.*)$'),
           i.indisunique, i.indisvalid AND i.indisready
    FROM pg_index i JOIN pg_class name ON name.oid = i.indexrelid JOIN pg_class t ON t.oid = i.indrelid
    WHERE i.indrelid IN (SELECT to_regclass(quote_ident(n)) FROM unnest(CAST(:tables AS text[])) AS n)
    """
)
# The window leaves the newest row of each id out: from there on no id of one provider comes twice.
_DUPLICATES = sa.text(
    """
    SELECT external_payment_id, count(*), count(*) OVER (), (
        SELECT coalesce(max(d.id), 0) FROM (
            SELECT id, row_number() OVER (
                PARTITION BY external_payment_id, payment_provider_id ORDER BY id DESC) AS nth
            FROM payments WHERE external_payment_id <> '') d
        WHERE d.nth = 2)
    FROM payments WHERE external_payment_id IS NOT NULL
    GROUP BY external_payment_id HAVING count(*) > 1 ORDER BY count(*) DESC, external_payment_id LIMIT :examples
    """
)


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Provider's payment ids that several payments share. `unique_after`: of payments with a greater row id, no two of
    one provider share one; 0 if only rows of different providers do, or ''."""

    text: str
    unique_after: int


def index_states(connection: sa.Connection) -> dict[str, IndexState]:
    """Read every index on the tables that we add indexes to, by name, invalid ones too."""
    tables = sorted({index.table for index in SERVICE_INDEXES})
    return {row[0]: IndexState(*row) for row in connection.execute(_STATES, {"tables": tables})}


def find_duplicates(connection: sa.Connection, examples: int = 3) -> Duplicates | None:
    """Say how many of the provider's payment ids several payments share, with examples; None where none."""
    rows = connection.execute(_DUPLICATES, {"examples": examples}).all()
    if not rows:
        return None
    shown = ", ".join(f"{row[0][:60]!r} ({row[1]} payments)" for row in rows)
    text = f"{rows[0][2]} external_payment_id {'is' if rows[0][2] == 1 else 'are'} not unique, for example {shown}"
    return Duplicates(text, unique_after=rows[0][3])
