"""The audit trail and the quarantine: what was changed, by which run, from what to what, and why.

Everything here is written in the caller's transaction, so a change and its record are committed together or not at all.
Rows travel as one JSON parameter (`jsonb_to_recordset`): one statement for one row or for ten thousand.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

from billing_orchestration.database.conventions import sql_list
from billing_orchestration.domain.personal import mask_fields
from billing_orchestration.domain.problem_kinds import IGNORED, LAST_WORDS, UNREADABLE, ProblemKind

# Evidence is for a person. A hostile or broken answer must not fill the table.
_LONGEST_TEXT = 2000
# A provider's record is six levels deep. Python's own recursion ends at some hundred, and would take the page with it.
_DEEPEST = 40
# An index entry holds 2,700 bytes; a name of this many characters always fits.
LONGEST_NAME = 500


@dataclass(frozen=True, slots=True)
class Stamp:
    """Who changes something, and when: the job, the Dagster run id and the instant (aware UTC)."""

    job: str
    run_id: str
    at: datetime


@dataclass(frozen=True, slots=True)
class Change:
    """One entry of the audit trail. `entity` is subscription, payment, attempt, quarantine or customer.

    `entity_id` None: the payment row that settling creates in the same statement, found by its `external_payment_id`.
    """

    entity: str
    entity_id: str | None
    action: str
    reason: str
    old: Mapping[str, Any] | None = None
    new: Mapping[str, Any] | None = None
    external_payment_id: str | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that needs a person. `subject` and `kind` together name the problem: it is opened once."""

    subject: str
    kind: ProblemKind
    reason: str
    external_payment_id: str | None = None
    payment_id: int | None = None
    subscription_id: int | None = None
    attempt_id: uuid.UUID | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The identity of the problem, as the database holds it."""
        return storable_name(f"{self.subject}:{self.kind}")


def to_json(value: Any) -> str:
    """JSON text for a statement's parameter: decimals and ids as strings, instants in ISO 8601, no NUL characters."""
    try:
        # Ordinary values go straight to the encoder, which is written in C: a fifth of the cost of walking through
        # them.
        text = _encode(value)
        if "\\u0000" not in text:
            text.encode()
            return text
    except (ValueError, TypeError, RecursionError):  # NaN, odd keys, a lone surrogate, nested without end
        pass
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)


def _encode_one(value: Any) -> Any:
    if isinstance(value, (Decimal, uuid.UUID)):
        return str(value)
    if isinstance(value, datetime):
        return value.isoformat()
    return _plain(value)


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=_encode_one).encode


def storable(text: str) -> str:
    """The text without what PostgreSQL cannot store: NUL, lone surrogates."""
    plain: str = _plain(text)
    return plain


def storable_name(text: str) -> str:
    """The same for text in an index: what is too long for it ends in a digest."""
    plain: str = _plain(text)
    if len(plain) <= LONGEST_NAME:
        return plain
    return f"{plain[: LONGEST_NAME - 72]}… sha256 {hashlib.sha256(plain.encode()).hexdigest()}"


def in_words_of(connection: sa.Connection, value: Any) -> Any:
    """Texts for a person as this server can store them: what its encoding lacks is written as an escape.

    Never for what names somebody: an id that the server cannot store is nobody's here.
    """
    driver: Any = connection.connection.dbapi_connection
    encoding = driver.info.parameter_status("server_encoding") or "UTF8"
    if encoding in ("UTF8", "SQL_ASCII"):
        return value
    try:
        codec = codecs.lookup(encoding.lower().replace("win", "cp").replace("koi8", "koi8_")).name
    except LookupError:
        codec = "ascii"
    return _escaped(_plain(value), codec)


def _escaped(value: Any, codec: str) -> Any:
    if isinstance(value, str):
        return value.encode(codec, "backslashreplace").decode(codec)
    if isinstance(value, dict):
        return {_escaped(key, codec): _escaped(item, codec) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item, codec) for item in value]
    return value


def _plain(value: Any, depth: int = 0) -> Any:
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        # PostgreSQL's text holds no NUL, and a lone surrogate is no UTF-8.
        return value.replace("\x00", "").encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, (Mapping, list, tuple, set, frozenset)) and depth >= _DEEPEST:
        return "… (deeper levels are left out)"
    if isinstance(value, Mapping):
        return {str(_plain(str(key))): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item, depth + 1) for item in value]
    return str(_plain(str(value)))


def evidence_of(value: Any) -> dict[str, Any]:
    """A raw item as evidence, cut to what a person can read; of a card, no more than its last four digits."""
    plain = mask_fields(_plain(value))
    text = json.dumps(plain, ensure_ascii=False)
    return {"item": plain} if len(text) <= _LONGEST_TEXT else {"item": text[:_LONGEST_TEXT], "cut": True}


_INSERT_AUDIT = """
    INSERT INTO billing_orchestration.audit_trail
        (at, job, run_id, entity, entity_id, action, old, new, reason, external_payment_id)
    SELECT %(at)s, %(job)s, %(run_id)s, x.entity, x.entity_id, x.action, x.old, x.new, x.reason, x.external_payment_id
    FROM jsonb_to_recordset(CAST(%(rows)s AS jsonb)) AS x (
        entity text, entity_id text, action text, old jsonb, new jsonb, reason text, external_payment_id text)
"""


def known_here(connection: sa.Connection, ids: Sequence[str]) -> list[str]:
    """An id that this server cannot store is in none of its rows, and would have the whole statement refused."""
    stored = in_words_of(connection, [storable(id_) for id_ in ids])
    return [id_ for id_, name in zip(ids, stored, strict=True) if id_ == name]


def change_rows(connection: sa.Connection, changes: Sequence[Change]) -> list[dict[str, Any]]:
    """Changes as rows of the JSON parameter that audit entries are written from."""
    rows: list[dict[str, Any]] = [
        {
            "number": number,
            "entity": change.entity,
            "entity_id": None if change.entity_id is None else storable_name(change.entity_id),
            "action": change.action,
            "old": change.old,
            "new": change.new,
            "reason": change.reason,
            "external_payment_id": None
            if change.external_payment_id is None
            else storable_name(change.external_payment_id),
        }
        for number, change in enumerate(changes)
    ]
    return in_words_of(connection, rows)  # type: ignore[no-any-return]


def record_changes(connection: sa.Connection, stamp: Stamp, changes: Sequence[Change]) -> None:
    """Write the audit entries of what the caller's transaction changes."""
    if not changes:
        return
    rows = to_json(change_rows(connection, changes))
    connection.exec_driver_sql(_INSERT_AUDIT, {"at": stamp.at, "job": stamp.job, "run_id": stamp.run_id, "rows": rows})


_OPEN_PROBLEMS = sa.text(f"""
    INSERT INTO billing_orchestration.quarantine AS q
        (problem_key, kind, reason, external_payment_id, payment_id, subscription_id, attempt_id, evidence,
         job, run_id, opened_at)
    SELECT x.problem_key, x.kind, x.reason, x.external_payment_id, x.payment_id, x.subscription_id, x.attempt_id,
           x.evidence, :job, :run_id, :at
    FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS x (
        problem_key text, kind text, reason text, external_payment_id text, payment_id bigint, subscription_id bigint,
        attempt_id uuid, evidence jsonb)
    WHERE NOT EXISTS (
        SELECT FROM billing_orchestration.quarantine d
        WHERE d.problem_key = x.problem_key AND d.resolution IN {sql_list(*LAST_WORDS)})
    -- Whose charge an unreadable record may be is known, perhaps, only now.
    ON CONFLICT (problem_key) WHERE resolved_at IS NULL DO UPDATE
    SET attempt_id = excluded.attempt_id, subscription_id = coalesce(q.subscription_id, excluded.subscription_id)
    WHERE q.kind = '{UNREADABLE}' AND q.attempt_id IS NULL AND excluded.attempt_id IS NOT NULL
    RETURNING q.id, q.problem_key, q.xmax = 0 AS is_new
""")


def open_problems(connection: sa.Connection, stamp: Stamp, problems: Sequence[Problem]) -> set[str]:
    """Open quarantine entries for these problems; return the keys of the new ones.

    A problem that is open already, or that a person has resolved for good, is not opened again: it alerts once. An open
    one about an unreadable record learns which attempt that names, if it did not know.
    """
    unique = {problem.key: problem for problem in problems}
    if not unique:
        return set()
    stored = dict(zip(in_words_of(connection, list(unique)), unique.values(), strict=True))
    rows = [
        {
            "problem_key": key,
            "kind": problem.kind,
            "reason": problem.reason,
            "external_payment_id": None
            if problem.external_payment_id is None
            else storable_name(problem.external_payment_id),
            "payment_id": problem.payment_id,
            "subscription_id": problem.subscription_id,
            "attempt_id": problem.attempt_id,
            "evidence": problem.evidence,
        }
        for key, problem in sorted(stored.items())
    ]
    bound = {"at": stamp.at, "job": stamp.job, "run_id": stamp.run_id, "rows": to_json(in_words_of(connection, rows))}
    opened = [row for row in connection.execute(_OPEN_PROBLEMS, bound) if row.is_new]
    record_changes(
        connection,
        stamp,
        [
            Change(
                entity="quarantine",
                entity_id=str(row.id),
                action="opened",
                reason=stored[row.problem_key].reason,
                new={"problem_key": row.problem_key},
                external_payment_id=stored[row.problem_key].external_payment_id,
            )
            for row in opened
        ],
    )
    return {stored[row.problem_key].key for row in opened}


_KNOWN_PROBLEMS = sa.text(f"""
    SELECT problem_key FROM billing_orchestration.quarantine
    WHERE problem_key = ANY(:keys) AND (resolved_at IS NULL OR resolution IN {sql_list(*LAST_WORDS)})
""")


def known_problems(connection: sa.Connection, keys: Sequence[str]) -> set[str]:
    """Which of these problems are open, or resolved for good."""
    stored = dict(zip(in_words_of(connection, list(keys)), keys, strict=True))
    return {stored[key] for key in connection.execute(_KNOWN_PROBLEMS, {"keys": list(stored)}).scalars()}


_BEFORE_A_PERSON = sa.text(f"""
    SELECT external_payment_id FROM billing_orchestration.quarantine
    WHERE external_payment_id = ANY(:ids) AND problem_key = 'payment ' || external_payment_id || ':' || kind
      AND NOT jsonb_exists_any(evidence, ARRAY['books', 'unfinished'])
      AND (kind <> '{UNREADABLE}' OR resolution = '{IGNORED}')
      AND (resolved_at IS NULL OR resolution = '{IGNORED}')
""")


def before_a_person(connection: sa.Connection, payment_ids: Sequence[str]) -> set[str]:
    """Which of these provider payments settling has put before a person, who has not decided, or leaves it so for good.

    What is about a row of the service's, about books that differ, or about a payment that was not paid yet or could not
    be read is no word on the grant, and does not count.
    """
    stored = dict(zip(in_words_of(connection, [storable_name(id_) for id_ in payment_ids]), payment_ids, strict=True))
    return {stored[name] for name in connection.execute(_BEFORE_A_PERSON, {"ids": list(stored)}).scalars()}


# Plain text for the driver, alone or inside another statement.
CLOSE_SETTLED = """
    UPDATE billing_orchestration.quarantine
    SET resolved_at = %(at)s, resolution = 'settled', resolved_by = %(job)s,
        resolution_reason = 'what stood in the way is gone: settled by run ' || %(run_id)s
    WHERE resolved_at IS NULL
      AND ((external_payment_id = ANY(%(ids)s) AND kind = ANY(%(kinds)s)) OR problem_key = ANY(%(problem_keys)s))
    RETURNING id, external_payment_id
"""


def record_healed(connection: sa.Connection, stamp: Stamp, healed: Sequence[tuple[int, str | None]]) -> None:
    """Record which problems (their id, and their payment's id if any) were closed because a payment was settled."""
    record_changes(
        connection,
        stamp,
        [
            Change("quarantine", str(id_), "resolved", "settled after all", external_payment_id=payment_id)
            for id_, payment_id in healed
        ],
    )


_RUNS_THAT_CHANGED = sa.text("""
    SELECT DISTINCT run_id FROM billing_orchestration.audit_trail
    WHERE at >= :since AND at <= :until AND run_id = ANY(:ids)
""")


def runs_that_changed(connection: sa.Connection, run_ids: Sequence[str], since: datetime, until: datetime) -> set[str]:
    """Which of these runs are in the audit trail. It is written with each change, so a killed run counts as well.

    `since` and `until` (aware UTC) enclose the runs: only what was written between them is read.
    """
    bound = {"ids": list(run_ids), "since": since, "until": until}
    return set(connection.execute(_RUNS_THAT_CHANGED, bound).scalars())
