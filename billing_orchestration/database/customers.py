"""What our schema knows of one customer: found, copied out, erased. And whom a problem is about.

Rows are found by the service's id of its user, and by the ids of the user's subscriptions and payments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from billing_orchestration.database.audit import Change, Problem, Stamp, known_here, record_changes, to_json
from billing_orchestration.database.conventions import sql_list
from billing_orchestration.domain.attempts import OPEN, State
from billing_orchestration.domain.personal import names_in_body, without_names

# --- whom a problem is about ---

# Three look-ups by indexes instead of one OR.
_USERS = sa.text("""
    SELECT user_id FROM subscriptions WHERE id = ANY(:subscriptions)
    UNION SELECT s.user_id FROM payments p JOIN subscriptions s ON s.id = p.subscription_id WHERE p.id = ANY(:payments)
    UNION SELECT s.user_id FROM payments p JOIN subscriptions s ON s.id = p.subscription_id
        WHERE p.external_payment_id = ANY(:externals)
""")


def users_of(connection: sa.Connection, problems: Sequence[Problem]) -> frozenset[str]:
    """The service's ids of the users whom these problems are about."""
    externals = [problem.external_payment_id for problem in problems if problem.external_payment_id is not None]
    bound = {
        "subscriptions": [problem.subscription_id for problem in problems if problem.subscription_id is not None],
        "payments": [problem.payment_id for problem in problems if problem.payment_id is not None],
        "externals": known_here(connection, externals),
    }
    items = (problem.evidence.get("item") for problem in problems)
    metadata = (item.get("metadata") for item in items if isinstance(item, Mapping))
    claimed = {part.get("user_id") for part in metadata if isinstance(part, Mapping)}
    users = {*connection.execute(_USERS, bound).scalars(), *claimed}
    return frozenset(user for user in users if isinstance(user, str) and user.strip())


# --- one customer's rows ---

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Customer:
    """Everything about one user in our schema, as rows of our tables; of the service's tables the ids and statuses."""

    user_id: str
    subscriptions: Mapping[int, str | None]
    payments: Sequence[int]
    renewal_attempts: Sequence[Row]
    settlements: Sequence[Row]
    saved_methods: Sequence[Row]
    asked_methods: Sequence[Row]
    quarantine: Sequence[Row]
    audit_trail: Sequence[Row]

    @property
    def ours(self) -> dict[str, Sequence[Row]]:
        """The rows by table."""
        return {
            "renewal_attempts": self.renewal_attempts,
            "settlements": self.settlements,
            "saved_methods": self.saved_methods,
            "asked_methods": self.asked_methods,
            "quarantine": self.quarantine,
            "audit_trail": self.audit_trail,
        }

    @property
    def names(self) -> frozenset[str]:
        """The user's id, and the contacts that receipts went to."""
        bodies = (names_in_body(attempt["body"]) for attempt in self.renewal_attempts)
        return frozenset({self.user_id}).union(*bodies)

    @property
    def open_attempts(self) -> list[Row]:
        """The charges whose outcome is not known, or that wait for a person."""
        return [row for row in self.renewal_attempts if row["state"] in (*OPEN, State.REVIEW)]


_SUBSCRIPTIONS = sa.text("""
    SELECT id, status::text FROM subscriptions WHERE user_id = :user
    UNION SELECT o.subscription_id, NULL::text
    FROM (
        SELECT subscription_id FROM billing_orchestration.renewal_attempts WHERE user_id = :user
        UNION SELECT subscription_id FROM billing_orchestration.settlements WHERE user_id = :user
    ) o
    WHERE o.subscription_id IS NOT NULL AND NOT EXISTS (SELECT FROM subscriptions s WHERE s.id = o.subscription_id)
""")
_PAYMENTS = sa.text("SELECT id, external_payment_id FROM payments WHERE subscription_id = ANY(:subscriptions)")
_ATTEMPTS = "FROM billing_orchestration.renewal_attempts t WHERE user_id = :user ORDER BY planned_at, id"
_SETTLEMENTS = "FROM billing_orchestration.settlements t WHERE user_id = :user ORDER BY settled_at"
_SAVED = "FROM billing_orchestration.saved_methods t WHERE subscription_id = ANY(:subscriptions) ORDER BY 1"
_ASKED = "FROM billing_orchestration.asked_methods t WHERE name = ANY(:externals) ORDER BY 1"
_QUARANTINE = """
    FROM billing_orchestration.quarantine t
    WHERE subscription_id = ANY(:subscriptions) OR external_payment_id = ANY(:externals)
       OR payment_id = ANY(:payments) OR attempt_id = ANY(CAST(:attempts AS uuid[]))
       OR evidence #>> '{item,metadata,user_id}' = :user ORDER BY id
"""
_AUDIT = """
    FROM (
        SELECT * FROM billing_orchestration.audit_trail WHERE external_payment_id = ANY(:externals)
        UNION SELECT a.* FROM billing_orchestration.audit_trail a
            JOIN unnest(CAST(:entities AS text[]), CAST(:ids AS text[])) AS wanted (entity, entity_id)
              ON a.entity = wanted.entity AND a.entity_id = wanted.entity_id
    ) t ORDER BY id
"""


def find_customer(connection: sa.Connection, user_id: str) -> Customer:
    """All rows of ours about a user."""
    found: dict[int, str | None] = dict(connection.execute(_SUBSCRIPTIONS, {"user": user_id}).tuples().all())
    bound: dict[str, Any] = {"user": user_id, "subscriptions": sorted(found)}
    payments = connection.execute(_PAYMENTS, bound).all()
    attempts = _rows(connection, _ATTEMPTS, bound)
    settlements = _rows(connection, _SETTLEMENTS, bound)
    externals = {row.external_payment_id for row in payments}
    externals |= {row["external_payment_id"] for row in (*attempts, *settlements)}
    bound |= {
        "externals": sorted(externals - {None}),
        "payments": sorted({row.id for row in payments} | {row["payment_id"] for row in settlements}),
        "attempts": [row["id"] for row in attempts],
    }
    quarantine = _rows(connection, _QUARANTINE, bound)
    entities = [
        *(("subscription", str(id_)) for id_ in found),
        *(("payment", str(id_)) for id_ in bound["payments"]),
        *(("attempt", row["id"]) for row in attempts),
        *(("quarantine", str(row["id"])) for row in quarantine),
    ]
    claimed = {row["external_payment_id"] for row in quarantine} - {None}
    bound |= {
        "externals": sorted({*bound["externals"], *claimed}),
        "entities": [entity for entity, _ in entities],
        "ids": [id_ for _, id_ in entities],
    }
    return Customer(
        user_id=user_id,
        subscriptions=found,
        payments=[row.id for row in payments],
        renewal_attempts=attempts,
        settlements=settlements,
        saved_methods=_rows(connection, _SAVED, bound),
        asked_methods=_rows(connection, _ASKED, bound),
        quarantine=quarantine,
        audit_trail=_rows(connection, _AUDIT, bound),
    )


def _rows(connection: sa.Connection, source: str, bound: Mapping[str, Any]) -> list[Row]:
    # As JSON: a real database holds instants that Python has no datetime for. Amounts stay as they are written.
    texts = connection.execute(sa.text(f"SELECT to_jsonb(t)::text {source}"), bound).scalars()
    return [json.loads(text, parse_float=str) for text in texts]


# --- erasing one ---


@dataclass
class Erasure:
    """What is erased of a customer, and what stays, each with how many and why. `pseudonym` stands for the id."""

    pseudonym: str
    erased: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


# A subscription in one of these states is not charged again by a saved method.
_OVER = (None, "EXPIRED", "CANCELED", "DELETED")


def plan_erasure(customer: Customer, pseudonym: str) -> Erasure:
    """What erasing does. Nothing that holds the promise goes: who paid what once, and what was tried."""
    erasure = Erasure(pseudonym)
    attempts, settlements = len(customer.renewal_attempts), len(customer.settlements)
    going, closed = _methods_going(customer), [row for row in customer.quarantine if row["resolved_at"]]
    staying = len(customer.saved_methods) - len(going)
    waiting = [str(row["id"]) for row in customer.quarantine if not row["resolved_at"]]
    for count, what in (
        (attempts, "renewal attempts: the user's id, and the receipt's contact in the body"),
        (settlements, "settlements: the user's id"),
        (len(going), "saved methods of subscriptions that are over"),
        (len(customer.asked_methods), "answers of the provider about how a method was saved"),
        (len(closed), "resolved quarantine entries: their evidence"),
        (len(customer.audit_trail), "entries of the audit trail: the user's id and contacts"),
    ):
        if count:
            erasure.erased.append(f"{count} {what}")
    for count, what in (
        (attempts, "renewal attempts, without whose they are: they keep a period from being charged twice"),
        (settlements, "settlements, without whose they are: they keep a payment from being granted twice"),
        (len(customer.audit_trail), "entries of the audit trail, the same way: they prove what was changed and why"),
        (staying, "saved methods: their subscriptions may still renew by them. End them in the service, then repeat"),
        (len(waiting), f"open quarantine entries ({', '.join(waiting)}): resolve them, then repeat"),
    ):
        if count:
            erasure.kept.append(f"{count} {what}")
    return erasure


def _methods_going(customer: Customer) -> list[int]:
    ids = (row["subscription_id"] for row in customer.saved_methods)
    return [id_ for id_ in ids if customer.subscriptions.get(id_) in _OVER]


_ERASE_ATTEMPTS = f"""
    UPDATE billing_orchestration.renewal_attempts a
    SET user_id = %(pseudonym)s, body = x.body, last_error = x.last_error
    FROM jsonb_to_recordset(CAST(%(rows)s AS jsonb)) AS x (id uuid, body text, last_error text)
    WHERE a.id = x.id AND a.user_id = %(user)s AND a.state NOT IN {sql_list(*OPEN, State.REVIEW)}
"""
_ERASE_SETTLEMENTS = """
    UPDATE billing_orchestration.settlements SET user_id = %(pseudonym)s WHERE user_id = %(user)s
"""
_ERASE_METHODS = "DELETE FROM billing_orchestration.saved_methods WHERE subscription_id = ANY(%(going)s)"
# They are asked for again where the customer is charged after all.
_ERASE_ASKED = "DELETE FROM billing_orchestration.asked_methods WHERE name = ANY(%(asked)s)"
_ERASE_QUARANTINE = """
    UPDATE billing_orchestration.quarantine q
    SET evidence = x.evidence, reason = x.reason, resolution_reason = x.resolution_reason
    FROM jsonb_to_recordset(CAST(%(rows)s AS jsonb)) AS x (
        id bigint, evidence jsonb, reason text, resolution_reason text)
    WHERE q.id = x.id AND q.resolved_at IS NOT NULL
"""
_ERASE_AUDIT = """
    UPDATE billing_orchestration.audit_trail a SET old = x.old, new = x.new, reason = x.reason
    FROM jsonb_to_recordset(CAST(%(rows)s AS jsonb)) AS x (entity_id text, id bigint, old jsonb, new jsonb, reason text)
    WHERE a.entity_id = x.entity_id AND a.id = x.id
"""


def erase(connection: sa.Connection, stamp: Stamp, customer: Customer, pseudonym: str, reason: str) -> bool:
    """Erase a customer without open attempts, in the caller's transaction, with the audit trail.

    False: a row changed since it was read; nothing must be committed.
    """
    names = customer.names

    def forget(value: Any) -> Any:
        if isinstance(value, str):
            return pseudonym if value == customer.user_id else without_names(value, names)
        if isinstance(value, dict):
            return {key: forget(part) for key, part in value.items()}
        return [forget(part) for part in value] if isinstance(value, list) else value

    attempts = [
        {"id": row["id"], "body": _without_customer(row["body"], pseudonym), "last_error": forget(row["last_error"])}
        for row in customer.renewal_attempts
    ]
    entries = [
        {
            "id": row["id"],
            "evidence": {"books": None} if "books" in row["evidence"] else {},
            "reason": forget(row["reason"]),
            "resolution_reason": forget(row["resolution_reason"]),
        }
        for row in customer.quarantine
        if row["resolved_at"]
    ]
    audit = [
        {name: row[name] if name in ("entity_id", "id") else forget(row[name]) for name in _AUDIT_COLUMNS}
        for row in customer.audit_trail
    ]
    bound = {"pseudonym": pseudonym, "user": customer.user_id, "going": _methods_going(customer)}
    bound["asked"] = [row["name"] for row in customer.asked_methods]
    as_read = True
    for statement, rows in (
        (_ERASE_ATTEMPTS, attempts),
        (_ERASE_SETTLEMENTS, customer.settlements),
        (_ERASE_METHODS, bound["going"]),
        (_ERASE_ASKED, customer.asked_methods),
        (_ERASE_QUARANTINE, entries),
        (_ERASE_AUDIT, audit),
    ):
        if rows:
            done = connection.exec_driver_sql(statement, {**bound, "rows": to_json(rows)}).rowcount
            as_read = as_read and done == len(rows)
    counts = {table: len(rows) for table, rows in customer.ours.items()}
    record_changes(connection, stamp, [Change("customer", pseudonym, "erased", reason, new=counts)])
    return as_read


_AUDIT_COLUMNS = ("entity_id", "id", "old", "new", "reason")


def _without_customer(body: str, pseudonym: str) -> str:
    """The body of a closed attempt, which is never sent again, without whom it names."""
    try:
        document = json.loads(body)
    except ValueError:
        return "{}"
    if isinstance(document.get("metadata"), dict) and "user_id" in document["metadata"]:
        document["metadata"]["user_id"] = pseudonym
    if isinstance(document.get("receipt"), dict):
        document["receipt"].pop("customer", None)
    return json.dumps(document, separators=(",", ":"))
