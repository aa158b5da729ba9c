"""Renewal attempts in the database: reading them, opening, claiming and closing them.

Every change of state repeats its precondition in WHERE; what comes back from a statement is what was really changed.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any

import sqlalchemy as sa

from billing_orchestration.database.audit import Change, Stamp, in_words_of, record_changes, to_json
from billing_orchestration.database.conventions import naive_utc, of_this_shop, sql_list
from billing_orchestration.database.second_look import WHY_NOT, in_review, is_in_hand, why_not
from billing_orchestration.database.tables import renewal_attempts
from billing_orchestration.domain.answers import SHOP, Closing
from billing_orchestration.domain.attempts import OPEN, Attempt, State
from billing_orchestration.domain.clocks import TOLERATED
from billing_orchestration.domain.money import Money
from billing_orchestration.domain.shards import Shard

ATTEMPT_COLUMNS = (
    renewal_attempts.c.id,
    renewal_attempts.c.subscription_id,
    renewal_attempts.c.period_start,
    renewal_attempts.c.number,
    renewal_attempts.c.state,
    renewal_attempts.c.idempotence_key,
    renewal_attempts.c.body,
    renewal_attempts.c.amount,
    renewal_attempts.c.currency,
    renewal_attempts.c.user_id,
    renewal_attempts.c.plan_id,
    renewal_attempts.c.payment_provider_id,
    renewal_attempts.c.payment_method_id,
    renewal_attempts.c.first_sent_at,
    renewal_attempts.c.last_sent_at,
    renewal_attempts.c.sends,
    renewal_attempts.c.external_payment_id,
    renewal_attempts.c.decline_class,
    renewal_attempts.c.decline_reason,
    renewal_attempts.c.first_absent_at,
    renewal_attempts.c.shop_id,
    renewal_attempts.c.period_count,
    renewal_attempts.c.period_unit,
)


def attempt_of(row: Any) -> Attempt:
    """A row of `renewal_attempts` as the domain knows it."""
    return Attempt(
        id=row.id,
        subscription_id=row.subscription_id,
        period_start=row.period_start,
        number=row.number,
        state=row.state,
        idempotence_key=row.idempotence_key,
        body=row.body,
        money=Money(row.amount, row.currency),
        user_id=row.user_id,
        plan_id=row.plan_id,
        payment_provider_id=row.payment_provider_id,
        payment_method_id=row.payment_method_id,
        first_sent_at=row.first_sent_at,
        last_sent_at=row.last_sent_at,
        sends=row.sends,
        external_payment_id=row.external_payment_id,
        decline_class=row.decline_class,
        decline_reason=row.decline_reason,
        first_absent_at=row.first_absent_at,
        shop_id=row.shop_id,
        period_count=row.period_count,
        period_unit=row.period_unit,
    )


def attempt_of_raw(row: Sequence[Any]) -> Attempt:
    """The same from a row as the driver gives it: the values of ATTEMPT_COLUMNS, the period's start naive."""
    id_, subscription_id, period_start, number, state, key, body, amount, currency, *rest = row
    return Attempt(
        id_,
        subscription_id,
        period_start.replace(tzinfo=timezone.utc),
        number,
        state,
        key,
        body,
        Money(amount, currency),
        *rest,
    )


def select_attempts(*where: sa.ColumnElement[bool] | sa.TextClause) -> sa.Select[Any]:
    """A SELECT of whole attempts, in a stable order."""
    table = renewal_attempts
    return (
        sa.select(*ATTEMPT_COLUMNS)
        .where(*where)
        .order_by(table.c.subscription_id, table.c.period_start, table.c.number)
    )


# Literals, not parameters, so that every plan can use the index on open attempts.
_IS_OPEN = renewal_attempts.c.state.in_([sa.literal_column(f"'{state}'") for state in OPEN])


def of_shard(shard: Shard | None) -> list[sa.ColumnElement[bool]]:
    """The condition that an attempt is of this shard's subscriptions; none without a shard."""
    return [] if shard is None else [renewal_attempts.c.subscription_id % shard.count == shard.number - 1]


_IS_OURS = sa.text(of_this_shop("renewal_attempts.payment_provider_id"))


def open_attempts(connection: sa.Connection, shard: Shard | None = None) -> list[Attempt]:
    """Every attempt of this shop (and shard) whose outcome is open, of whatever age and whatever its subscription."""
    rows = connection.execute(select_attempts(_IS_OPEN, _IS_OURS, *of_shard(shard)))
    return [attempt_of(row) for row in rows]


_IS_OF_OTHERS = sa.text(
    f"({in_review('renewal_attempts')} OR (renewal_attempts.state IN {sql_list(*OPEN)} AND NOT {_IS_OURS.text}))"
)


def attempts_of_others(connection: sa.Connection, shard: Shard | None = None) -> list[Attempt]:
    """Every attempt (of the shard) that this run does not decide about, whatever its period: one that a person does,
    and an open one of another shop, which this provider is not asked about."""
    rows = connection.execute(select_attempts(_IS_OF_OTHERS, *of_shard(shard)))
    return [attempt_of(row) for row in rows]


def count_open_attempts(connection: sa.Connection) -> int:
    """How many there are."""
    return int(connection.execute(sa.select(sa.func.count()).where(_IS_OPEN, _IS_OURS)).scalar_one())


@dataclass(frozen=True, slots=True)
class Claimed:
    """`sent_before`: attempts that may be sent now, each with whether it may have been sent before.
    `held`: attempts that the second look forbids, each with why.
    `at_work_s`: attempts that the provider may still be at work on, each with the seconds until it has finished."""

    sent_before: Mapping[uuid.UUID, bool]
    held: Mapping[uuid.UUID, str]
    at_work_s: Mapping[uuid.UUID, float] = field(default_factory=dict)


# A statement of its own before each claim: the claim then sees what was committed while the rows were waited for.
# By id, as settling and expiry lock them: so two transactions wait for each other instead of deadlocking.
_LOCK_SUBSCRIPTIONS = sa.text("SELECT FROM subscriptions s WHERE s.id = ANY(:ids) ORDER BY s.id FOR SHARE")

# What is frozen when an attempt is planned, as it travels into a statement.
_FIELDS = """id uuid, subscription_id bigint, period_start timestamp, number int, idempotence_key uuid, body text,
    amount numeric(8,2), currency text, user_id text, plan_id bigint, payment_provider_id bigint,
    payment_method_id text, shop_id text, period_count int, period_unit text"""
_NAMES = ", ".join(column.split()[0] for column in _FIELDS.replace("8,2", "").split(","))

_OPEN_AND_CLAIM = f"""
    WITH wanted AS (
        SELECT x.* FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS x ({_FIELDS})
    ), looked AS (
        SELECT w.*, {WHY_NOT} AS why FROM wanted w LEFT JOIN subscriptions s ON s.id = w.subscription_id
    ), opened AS (
        INSERT INTO billing_orchestration.renewal_attempts
            ({_NAMES}, state, planned_at, first_sent_at, last_sent_at, sends, unanswered, run_id)
        SELECT {_NAMES}, '{State.PLANNED}', :at, :at, :at, 1, true, :run_id
        -- By period: two runs may meet with different numbers of it, and the second waits for the first.
        FROM looked WHERE why IS NULL ORDER BY subscription_id, period_start, number
        ON CONFLICT DO NOTHING
        RETURNING id
    )
    SELECT l.id, o.id IS NOT NULL AS is_claimed, false AS sent_before,
           coalesce(l.why, 'the period has an attempt already') AS why
    FROM looked l LEFT JOIN opened o ON o.id = l.id
"""


@lru_cache
def _statement(text: str, view: str | None) -> sa.TextClause:
    """A statement that claims, and looks at the service's view as well."""
    return sa.text(text.replace(WHY_NOT, why_not(view)))


def open_and_claim(
    connection: sa.Connection, stamp: Stamp, attempts: Sequence[Attempt], view: str | None = None
) -> Claimed:
    """Write new attempts ahead of their first send, with `first_sent_at`, after a second look at each.

    The subscription is looked at again here, under lock (`second_look`). A period that has a live attempt already gets
    no other: a partial unique index says so, not Python.
    Commit before the first send. Killed after the commit: the next run finds PLANNED with `first_sent_at` set, takes
    it as "may have been sent" and uses the same key and body.
    """
    if not attempts:
        return Claimed({}, {})
    rows = [_row_of(attempt) for attempt in attempts]
    connection.execute(_LOCK_SUBSCRIPTIONS, {"ids": [attempt.subscription_id for attempt in attempts]})
    looked = connection.execute(
        _statement(_OPEN_AND_CLAIM, view), {"rows": to_json(rows), "at": stamp.at, "run_id": stamp.run_id}
    )
    return _claimed(looked)


_INSERT_LOST = sa.text(f"""
    INSERT INTO billing_orchestration.renewal_attempts
        ({_NAMES}, state, planned_at, first_sent_at, last_sent_at, sends, last_error, run_id)
    SELECT {_NAMES}, '{State.VOID}', x.sent_at, x.sent_at, x.sent_at, 1,
           'its record was lost: rebuilt from its payment', :run_id
    FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS x ({_FIELDS}, sent_at timestamptz)
    ON CONFLICT DO NOTHING
""")


def insert_lost(connection: sa.Connection, stamp: Stamp, attempts: Sequence[Attempt]) -> int:
    """Write attempts that were rebuilt from their payments, VOID until those are settled; return how many."""
    rows = [{**_row_of(attempt), "sent_at": attempt.first_sent_at} for attempt in attempts]
    return int(connection.execute(_INSERT_LOST, {"rows": to_json(rows), "run_id": stamp.run_id}).rowcount)


_LOCK = sa.text("""
    SELECT a.id, a.subscription_id, a.last_sent_at, a.unanswered AND a.last_sent_at > :done_before AS is_at_work
    FROM billing_orchestration.renewal_attempts a WHERE a.id = ANY(:ids)
    ORDER BY a.subscription_id, a.period_start, a.number FOR UPDATE
""")
_CLAIM = f"""
    WITH looked AS (
        SELECT w.id, w.first_sent_at IS NOT NULL AS sent_before, {WHY_NOT} AS why
        FROM billing_orchestration.renewal_attempts w LEFT JOIN subscriptions s ON s.id = w.subscription_id
        WHERE w.id = ANY(:ids) AND w.shop_id = :shop_id AND w.state IN {sql_list(State.PLANNED, State.UNKNOWN)}
          AND (w.first_sent_at IS NULL OR w.first_sent_at > :oldest_key)
          -- A wrong clock has sent it, or it was searched for: nobody knows how old its key is.
          AND coalesce(greatest(w.first_sent_at, w.last_sent_at) <= :latest, true) AND w.first_absent_at IS NULL
    ), claimed AS (
        UPDATE billing_orchestration.renewal_attempts a
        SET first_sent_at = coalesce(a.first_sent_at, :at), last_sent_at = :at, sends = a.sends + 1, unanswered = true
        FROM looked l WHERE a.id = l.id AND l.why IS NULL
        RETURNING a.id
    )
    SELECT l.id, c.id IS NOT NULL AS is_claimed, l.sent_before, l.why FROM looked l LEFT JOIN claimed c ON c.id = l.id
"""


def claim(
    connection: sa.Connection,
    stamp: Stamp,
    attempt_ids: Sequence[uuid.UUID],
    oldest_key: datetime,
    done_before: datetime,
    shop_id: str,
    view: str | None = None,
) -> Claimed:
    """Claim open attempts for another send, after a second look at each.

    The attempt and its subscription are looked at under lock, as in `open_and_claim`. Whether an attempt may have been
    sent is read from the row as it is now: another run may have sent it meanwhile, and an answer that says "not this
    time" must not be taken for "never". An attempt whose first send was at `oldest_key` or before is never sent again,
    nor one that claims to come from the future: the provider may have forgotten its key. Nor is one of another shop
    than `shop_id`, or of one that nobody wrote down: there its key is a new one. One whose last send was not
    answered and is younger than `done_before` is not sent yet, whoever sent it: two requests with one key at the same
    time may be two charges. Commit before sending.
    """
    if not attempt_ids:
        return Claimed({}, {})
    locked = connection.execute(_LOCK, {"ids": list(attempt_ids), "done_before": done_before}).all()
    longest_s = (stamp.at - done_before).total_seconds()
    at_work_s = {
        row.id: min((row.last_sent_at - done_before).total_seconds(), longest_s) for row in locked if row.is_at_work
    }
    free = [row for row in locked if not row.is_at_work]
    # The subscriptions are locked after the attempts and by id, as settling does.
    connection.execute(_LOCK_SUBSCRIPTIONS, {"ids": list({row.subscription_id for row in free})})
    bound = {
        "ids": [row.id for row in free],
        "at": stamp.at,
        "oldest_key": oldest_key,
        "shop_id": shop_id,
        "latest": stamp.at + TOLERATED,
    }
    return _claimed(connection.execute(_statement(_CLAIM, view), bound), at_work_s)


def _row_of(attempt: Attempt) -> dict[str, Any]:
    return {
        "id": attempt.id,
        "subscription_id": attempt.subscription_id,
        "period_start": naive_utc(attempt.period_start),
        "number": attempt.number,
        "idempotence_key": attempt.idempotence_key,
        "body": attempt.body,
        "amount": attempt.money.amount,
        "currency": attempt.money.currency,
        "user_id": attempt.user_id,
        "plan_id": attempt.plan_id,
        "payment_provider_id": attempt.payment_provider_id,
        "payment_method_id": attempt.payment_method_id,
        "shop_id": attempt.shop_id,
        "period_count": attempt.period_count,
        "period_unit": attempt.period_unit,
    }


def _claimed(looked: sa.CursorResult[Any], at_work_s: Mapping[uuid.UUID, float] | None = None) -> Claimed:
    rows = looked.all()
    return Claimed(
        {row.id: row.sent_before for row in rows if row.is_claimed},
        {row.id: row.why for row in rows if not row.is_claimed},
        at_work_s or {},
    )


_CLOSE = sa.text(f"""
    WITH x AS (
        SELECT * FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS x (
            id uuid, state text, reason text, external_payment_id text, decline_party text, decline_reason text,
            decline_class text, never_sent boolean, absent_since timestamptz, as_read boolean, read_state text,
            read_sends int, unanswered boolean)
    ), before AS (
        SELECT a.id, a.state FROM billing_orchestration.renewal_attempts a JOIN x ON x.id = a.id
        WHERE a.state IN {sql_list(*OPEN)}
          -- A send counts up, so the same state with the same number of sends is the attempt as it was read.
          AND (NOT x.as_read OR (a.state = x.read_state AND a.sends = x.read_sends))
        ORDER BY a.subscription_id, a.period_start, a.number FOR UPDATE OF a
    )
    UPDATE billing_orchestration.renewal_attempts a
    SET state = x.state, last_error = x.reason,
        external_payment_id = coalesce(x.external_payment_id, a.external_payment_id),
        decline_party = x.decline_party, decline_reason = x.decline_reason, decline_class = x.decline_class,
        first_sent_at = CASE WHEN x.never_sent THEN NULL ELSE a.first_sent_at END,
        last_sent_at = CASE WHEN x.never_sent THEN NULL ELSE a.last_sent_at END,
        unanswered = coalesce(x.unanswered, a.unanswered),
        first_absent_at = coalesce(x.absent_since, a.first_absent_at),
        closed_at = CASE WHEN x.state IN {sql_list(*OPEN)} THEN NULL ELSE CAST(:at AS timestamptz) END
    FROM x JOIN before b ON b.id = x.id
    WHERE a.id = x.id
    RETURNING a.id, b.state AS old_state, a.state AS new_state
""")


def close(connection: sa.Connection, stamp: Stamp, closings: Sequence[Closing]) -> set[uuid.UUID]:
    """Record what became of attempts that are still open, with the audit trail; return those that changed.

    An attempt that somebody closed meanwhile (a matching job that saw its success) is not touched, nor is one with
    `as_read` that another run has claimed since: it may be on its way to the provider at this moment. A change of the
    last error's text alone is written without an audit entry.
    """
    if not closings:
        return set()
    by_id = {closing.attempt.id: closing for closing in closings}
    rows = [
        {
            "id": closing.attempt.id,
            "state": closing.state,
            "reason": closing.reason,
            "external_payment_id": closing.external_payment_id,
            "decline_party": closing.decline_party,
            "decline_reason": closing.decline_reason,
            "decline_class": closing.decline_class,
            "never_sent": closing.never_sent,
            "absent_since": closing.absent_since,
            "as_read": closing.as_read,
            "read_state": closing.attempt.state,
            "read_sends": closing.attempt.sends,
            "unanswered": closing.unanswered,
        }
        for closing in by_id.values()
    ]
    changed = connection.execute(_CLOSE, {"rows": to_json(in_words_of(connection, rows)), "at": stamp.at}).all()
    record_changes(
        connection,
        stamp,
        [
            Change(
                entity="attempt",
                entity_id=str(row.id),
                action=row.new_state.lower(),
                reason=by_id[row.id].reason,
                old={"state": row.old_state},
                new={"state": row.new_state, "subscription_id": by_id[row.id].attempt.subscription_id},
                external_payment_id=by_id[row.id].external_payment_id,
            )
            for row in changed
            if row.old_state != row.new_state or by_id[row.id].absent_since is not None
        ],
    )
    return {row.id for row in changed}


_EXCUSE = sa.text(f"""
    UPDATE billing_orchestration.renewal_attempts a SET decline_class = '{SHOP}'
    WHERE a.id = ANY(:ids) AND a.state = '{State.REJECTED}' AND a.decline_class <> '{SHOP}'
    RETURNING a.id, a.subscription_id
""")


def excuse(connection: sa.Connection, stamp: Stamp, attempt_ids: Sequence[uuid.UUID], reason: str) -> None:
    """Note of attempts that were REJECTED that the shop was refused, not these charges: they are no try of the day."""
    excused = connection.execute(_EXCUSE, {"ids": list(attempt_ids)}).all()
    record_changes(
        connection,
        stamp,
        [
            Change("attempt", str(row.id), "excused", reason, new={"subscription_id": row.subscription_id})
            for row in excused
        ],
    )


# The lock's namespace: a class id of its own keeps it apart from other users of advisory locks in this database.
_LOCK_CLASS = 0x42_4F_01


def try_lock(lock_connection: sa.Connection, attempt_ids: Iterable[uuid.UUID]) -> set[uuid.UUID]:
    """Take the session-level lock of each attempt; return those that were free.

    Two processes must not send one key at the same time: what the provider does then is not documented. The lock
    spans the POST, during which no transaction is open, so it belongs to a session (its own, autocommit) and ends
    with it: a killed run leaves no lock behind.
    """
    rows = lock_connection.execute(
        sa.text("""
            SELECT id, pg_try_advisory_lock(:class, hashtext(CAST(id AS text))) AS free
            FROM unnest(CAST(:ids AS uuid[])) AS id
        """),
        {"class": _LOCK_CLASS, "ids": list(attempt_ids)},
    )
    return {row.id for row in rows if row.free}


def unlock(lock_connection: sa.Connection, attempt_ids: Iterable[uuid.UUID]) -> None:
    """Release the locks of these attempts."""
    lock_connection.execute(
        sa.text("""
            SELECT count(pg_advisory_unlock(:class, hashtext(CAST(id AS text))))
            FROM unnest(CAST(:ids AS uuid[])) AS id
        """),
        {"class": _LOCK_CLASS, "ids": list(attempt_ids)},
    )


def by_ids(connection: sa.Connection, attempt_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, Attempt]:
    """The attempts with these ids as they are now."""
    rows = connection.execute(select_attempts(renewal_attempts.c.id.in_(list(attempt_ids))))
    return {row.id: attempt_of(row) for row in rows}


_IN_HAND = sa.text(f"""
    SELECT a.id, {is_in_hand("a")} AS is_in_hand
    FROM billing_orchestration.renewal_attempts a WHERE a.id = ANY(:ids)
""")


def answers_of_attempts(connection: sa.Connection, payment_ids: Sequence[str | None]) -> set[str]:
    """Those of these provider payments that an attempt of ours was answered with, whatever became of it."""
    statement = sa.select(renewal_attempts.c.external_payment_id).where(
        renewal_attempts.c.external_payment_id.in_([id_ for id_ in payment_ids if id_ is not None])
    )
    return set(connection.execute(statement).scalars())


def in_hand(connection: sa.Connection, attempt_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, bool]:
    """Those of these attempts that the database has, each with whether it knows that the attempt may have charged."""
    return {row.id: row.is_in_hand for row in connection.execute(_IN_HAND, {"ids": list(attempt_ids)})}
