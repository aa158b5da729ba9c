"""The statements of the two expiry jobs: set-based, in short transactions, each repeating its precondition."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from typing import Any

import sqlalchemy as sa

from billing_orchestration.database.audit import LONGEST_NAME, Stamp, in_words_of, storable, storable_name, to_json
from billing_orchestration.database.conventions import naive_utc, of_this_shop, sql_list
from billing_orchestration.database.engine import translated
from billing_orchestration.database.errors import BillingDatabaseError, NotAsMeant
from billing_orchestration.database.one_by_one import is_about_every_row
from billing_orchestration.database.second_look import holds_a_charge, in_review
from billing_orchestration.domain.attempts import State
from billing_orchestration.domain.expiry import StalePayment
from billing_orchestration.domain.money import Money
from billing_orchestration.domain.problem_kinds import HOLDING, NO_CONTACT

# Held back from expiry: the outcome of a charge is not known, or a person is deciding about it, or our records have
# lost it, or it could not be made because its receipt would reach nobody. There are few:
# PostgreSQL reads them once a statement, into a hash, and looks each of ten thousand rows up in it.
_HELD_BACK = f"""s.id IN (
    SELECT a.subscription_id FROM billing_orchestration.renewal_attempts a
    WHERE a.state IN {sql_list(State.UNKNOWN, State.PENDING)}
       OR (a.state = '{State.PLANNED}' AND a.first_sent_at IS NOT NULL)
       OR {in_review("a")}
    UNION ALL
    SELECT q.subscription_id FROM billing_orchestration.quarantine q
    WHERE q.kind = '{NO_CONTACT}' AND q.resolved_at IS NULL AND q.subscription_id IS NOT NULL
    UNION ALL
    SELECT q.subscription_id FROM billing_orchestration.quarantine q
    WHERE q.kind IN {sql_list(*HOLDING)} AND q.subscription_id IS NOT NULL AND {holds_a_charge("q")})"""


_WHY_HELD = (
    "a charge whose outcome is not known or pending, one that a person decides about, or one whose receipt would reach"
    " nobody"
)

# Where PostgreSQL expects the hash not to fit, each row walks through the whole list instead. With its default of 4 MB
# that happens from some hundred thousand open attempts on. This is enough for millions; memory is taken as needed.
_GIVE_ROOM_TO_HELD_BACK = sa.text("SELECT set_config('work_mem', '64MB', true)")


@dataclass(frozen=True, slots=True)
class SubscriptionSample:
    """One subscription of the report. `why_held` is None for one that would expire."""

    id: int
    ended_at: str
    why_held: str | None


@dataclass(frozen=True, slots=True)
class OverSlice:
    """How many ACTIVE subscriptions there are, how many are over, how many of those are held back; and examples."""

    active: int
    over: int
    held: int
    without_end: int
    samples: tuple[SubscriptionSample, ...]


# Two counts, each by its own index: one over all ACTIVE rows, one over those that are over.
_COUNT_ACTIVE = sa.text("""
    SELECT count(*) AS active, count(*) FILTER (WHERE ended_at IS NULL) AS without_end
    FROM subscriptions WHERE status = 'ACTIVE'
""")
_COUNT_OVER = sa.text("SELECT count(*) FROM subscriptions WHERE status = 'ACTIVE' AND ended_at < :over_before")
_COUNT_HELD_BACK = sa.text(f"""
    SELECT count(*) FROM subscriptions s WHERE s.status = 'ACTIVE' AND s.ended_at < :over_before AND {_HELD_BACK}
""")
# Ends as text: a real database may hold dates that Python has no datetime for.
_SAMPLE_OVER = sa.text(f"""
    (SELECT s.id, s.ended_at::text AS ended_at, false AS held
     FROM subscriptions s
     WHERE s.status = 'ACTIVE' AND s.ended_at < :over_before AND NOT {_HELD_BACK}
     ORDER BY s.ended_at, s.id LIMIT :size)
    UNION ALL
    (SELECT s.id, s.ended_at::text, true
     FROM subscriptions s
     WHERE s.status = 'ACTIVE' AND s.ended_at < :over_before AND {_HELD_BACK}
     ORDER BY s.ended_at, s.id LIMIT :size)
""").columns(id=sa.BigInteger, ended_at=sa.String, held=sa.Boolean)


def fetch_over(connection: sa.Connection, over_before: datetime, sample_size: int) -> OverSlice:
    """Count what is over without fetching it, and show the first few of each kind."""
    bound = {"over_before": naive_utc(over_before)}
    connection.execute(_GIVE_ROOM_TO_HELD_BACK)
    active = connection.execute(_COUNT_ACTIVE).one()
    over = connection.execute(_COUNT_OVER, bound).scalar_one()
    held = connection.execute(_COUNT_HELD_BACK, bound).scalar_one()
    samples = tuple(
        SubscriptionSample(row.id, row.ended_at, _WHY_HELD if row.held else None)
        for row in connection.execute(_SAMPLE_OVER, {**bound, "size": sample_size})
    )
    return OverSlice(active.active, over, held, active.without_end, samples)


# A sum of hashes: computed in one pass, whatever the order and however many rows.
_DIGEST_OVER = sa.text(f"""
    SELECT coalesce(sum(hashtextextended(s.id::text || ' ' || s.ended_at::text, 0)::numeric), 0)
    FROM subscriptions s
    WHERE s.status = 'ACTIVE' AND s.ended_at < :over_before AND NOT {_HELD_BACK}
""")


def digest_over(connection: sa.Connection, over_before: datetime) -> str:
    """A short text that differs for any other set of subscriptions that would expire, or other ends of theirs."""
    connection.execute(_GIVE_ROOM_TO_HELD_BACK)
    return str(connection.execute(_DIGEST_OVER, {"over_before": naive_utc(over_before)}).scalar_one())


# The oldest first. Locked rows are skipped: where nobody waits, nothing can deadlock.
_LOCK_FREE = sa.text(f"""
    SELECT s.id FROM subscriptions s
    WHERE s.status = 'ACTIVE' AND s.ended_at < :over_before AND s.id <> ALL(:passed_over) AND NOT {_HELD_BACK}
    ORDER BY s.ended_at, s.id LIMIT :size FOR NO KEY UPDATE OF s SKIP LOCKED
""")
# Chosen in the same order, but locked by id, as settling and charging lock them.
_LOCK_ALL = sa.text(f"""
    SELECT s.id FROM subscriptions s
    WHERE s.status = 'ACTIVE' AND s.ended_at < :over_before AND s.id IN (
        SELECT s.id FROM subscriptions s
        WHERE s.status = 'ACTIVE' AND s.ended_at < :over_before AND s.id <> ALL(:passed_over) AND NOT {_HELD_BACK}
        ORDER BY s.ended_at, s.id LIMIT :size)
    ORDER BY s.id FOR NO KEY UPDATE OF s
""")
# A statement of its own, so that it sees the attempts committed while the locks were waited for. A condition in the
# locking statement would not: PostgreSQL rechecks only the locked row, and not even that if the row was only locked,
# as charging does. What a trigger of the service's left otherwise than it was meant is counted apart.
_EXPIRE_LOCKED = """
    WITH expired AS (
        UPDATE subscriptions s SET status = 'EXPIRED', updated_at = :naive_at
        WHERE {locked} AND s.status = 'ACTIVE' AND s.ended_at < :over_before AND NOT {held}
        RETURNING s.id, s.ended_at, s.status IS NOT DISTINCT FROM 'EXPIRED' AS is_expired
    ), trail AS (
        INSERT INTO billing_orchestration.audit_trail (at, job, run_id, entity, entity_id, action, old, new, reason)
        SELECT :at, :job, :run_id, 'subscription', id::text, 'expired',
               CAST('{{"status": "ACTIVE"}}' AS jsonb), CAST('{{"status": "EXPIRED"}}' AS jsonb),
               'ended ' || ended_at::text || :reason
        FROM expired
    )
    SELECT count(*) AS changed, coalesce(array_agg(id) FILTER (WHERE NOT is_expired), '{{}}') AS otherwise FROM expired
"""
_EXPIRE_BY_ID = sa.text(_EXPIRE_LOCKED.format(locked="s.id = ANY(:ids)", held=_HELD_BACK))
# The places become an array only at run time. A planner that saw ten thousand of them would expect them scattered over
# the disk, and would read everything that is over once more instead.
_EXPIRE_IN_PLACE = sa.text(
    _EXPIRE_LOCKED.format(locked="s.ctid = ANY(CAST(CAST(:places AS text) AS tid[]))", held=_HELD_BACK)
)
# Of rows that this transaction has locked and not changed: those that it should have changed.
_STILL_OVER = sa.text(f"""
    SELECT s.id FROM subscriptions s
    WHERE s.id = ANY(:ids) AND s.status = 'ACTIVE' AND s.ended_at < :over_before AND NOT {_HELD_BACK}
""")
# A deferred trigger or constraint speaks up now, while it is known about which rows.
_CHECK_DEFERRED = sa.text("SET CONSTRAINTS ALL IMMEDIATE")


class NotExpired(Exception):
    """A trigger or constraint of the service's refuses to expire one of these; `refusal` says why.

    `locked`: how many were to expire with them. `each`: every one of these is refused; otherwise it is not known which.
    Nothing of the chunk was changed. The transaction can only be rolled back.
    """

    def __init__(self, ids: Sequence[int], refusal: BillingDatabaseError, *, locked: int, each: bool) -> None:
        super().__init__(f"{len(ids)} subscriptions could not be expired")
        self.ids = tuple(ids)
        self.refusal = refusal
        self.locked = locked
        self.each = each


@dataclass(frozen=True, slots=True)
class Chunk:
    """How many subscriptions a transaction has locked, and how many of them it has expired."""

    locked: int
    expired: int


def expire_subscriptions(
    connection: sa.Connection,
    stamp: Stamp,
    *,
    over_before: datetime,
    reason: str,
    size: int,
    wait_for_locks: bool,
    passed_over: Sequence[int] = (),
) -> Chunk:
    """Expire at most `size` subscriptions that are over and not held back, oldest first, with the audit trail.

    The precondition is read under lock: a subscription that was renewed meanwhile is no longer over, and one that is
    being charged is held back. So a whole chunk may be left as it is while there are others: commit, and go on with
    the next chunk, which no longer finds it. Without `wait_for_locks`, rows that others have locked are skipped; those
    of `passed_over` always are. Raises NotExpired when the database refuses one of the chunk.
    """
    bound = {"over_before": naive_utc(over_before)}
    connection.execute(_GIVE_ROOM_TO_HELD_BACK)
    ids = list(
        connection.execute(
            _LOCK_ALL if wait_for_locks else _LOCK_FREE, {**bound, "size": size, "passed_over": list(passed_over)}
        ).scalars()
    )
    if not ids:
        return Chunk(0, 0)
    try:
        with translated():
            result = connection.execute(_EXPIRE_BY_ID, {**bound, **_audited(stamp, reason), "ids": ids}).one()
            connection.execute(_CHECK_DEFERRED)
            refused = list(result.otherwise)
            if result.changed < len(ids):
                refused += connection.execute(_STILL_OVER, {**bound, "ids": ids}).scalars()
    except BillingDatabaseError as error:
        if is_about_every_row(error):
            raise
        raise NotExpired(ids, error, locked=len(ids), each=len(ids) == 1) from error
    if refused:
        raise NotExpired(sorted(set(refused)), NotAsMeant("it"), locked=len(ids), each=True)
    return Chunk(len(ids), result.changed)


def _audited(stamp: Stamp, reason: str) -> dict[str, Any]:
    """Who expires something, when and why, for the audit trail."""
    return {
        "at": stamp.at,
        "naive_at": naive_utc(stamp.at),
        "job": stamp.job,
        "run_id": stamp.run_id,
        "reason": f", {reason}",
    }


_LOWEST_ID = -(2**63)


@dataclass(frozen=True, slots=True)
class Locked:
    """Subscriptions that this transaction has locked: how many, where they are stored, the last one's end and id."""

    count: int
    places: str
    last: tuple[str, int]


# Rows are named by their place (ctid): a locked row stays there, and no index is needed to find it again. The table
# cannot be partitioned: `migrate` could not add its indexes to it. The end is text: a real database may hold dates that
# Python has no datetime for.
_LOCK_AFTER = sa.text(f"""
    WITH free AS (
        SELECT s.ctid AS place, s.ended_at, s.id FROM subscriptions s
        WHERE s.status = 'ACTIVE' AND s.ended_at < :over_before
          AND (s.ended_at, s.id) > (CAST(:last_end AS timestamp), CAST(:last_id AS bigint)) AND NOT {_HELD_BACK}
        ORDER BY s.ended_at, s.id LIMIT :size FOR NO KEY UPDATE OF s SKIP LOCKED
    ), last AS (SELECT ended_at, id FROM free ORDER BY ended_at DESC, id DESC LIMIT 1)
    SELECT count(*) AS found, CAST(array_agg(place) AS text) AS places,
           (SELECT ended_at::text FROM last) AS last_end, (SELECT id FROM last) AS last_id
    FROM free
""")


def lock_over(
    connection: sa.Connection, over_before: datetime, size: int, after: tuple[str, int] | None
) -> Locked | None:
    """Lock at most `size` that are over and not held back, oldest first; None where there are no more.

    `after`: the `last` one of the previous call, None to begin with the oldest. A chunk that began with the oldest
    again would walk through everything that earlier chunks left behind. Rows that others have locked are skipped.
    """
    connection.execute(_GIVE_ROOM_TO_HELD_BACK)
    last_end, last_id = after or ("-infinity", _LOWEST_ID)
    found = connection.execute(
        _LOCK_AFTER,
        {"over_before": naive_utc(over_before), "size": size, "last_end": last_end, "last_id": last_id},
    ).one()
    return Locked(found.found, found.places, (found.last_end, found.last_id)) if found.found else None


def expire_locked(
    connection: sa.Connection, stamp: Stamp, locked: Locked, *, over_before: datetime, reason: str
) -> int:
    """Expire what this transaction has locked, except what is held back by now; return how many expired.

    Nothing that is held back expires. Charging locks the subscription (FOR SHARE) and writes its attempt in one
    transaction. If that was committed before the row was locked here, this later statement sees the attempt. If it is
    under way, the row was skipped. If it waits for this transaction, it finds EXPIRED. Raises NotAsMeant when a trigger
    makes something else of a row: roll the chunk back.
    """
    bound = {"over_before": naive_utc(over_before), **_audited(stamp, reason), "places": locked.places}
    result = connection.execute(_EXPIRE_IN_PLACE, bound).one()
    if result.otherwise:
        raise NotAsMeant("a subscription")
    return int(result.changed)


_STALE_PAYMENTS = sa.text(f"""
    SELECT id, external_payment_id, amount::text AS amount, currency::text AS currency, subscription_id,
           CASE WHEN created_at > '2000-01-01' THEN created_at AT TIME ZONE 'UTC' END AS at
    FROM payments WHERE status = 'PENDING' AND created_at < :created_before AND {of_this_shop("payment_provider_id")}
    ORDER BY created_at, id
""")


def stream_stale_payments(
    connection: sa.Connection, created_before: datetime, size: int
) -> Iterator[list[StalePayment]]:
    """Every PENDING payment of this shop created before that instant, oldest first, in pages of `size` rows.

    Pages are read on demand: only one is in memory.
    """
    rows = connection.execute(
        _STALE_PAYMENTS,
        {"created_before": naive_utc(created_before)},
        execution_options={"stream_results": True, "yield_per": size},
    )
    for page in rows.tuples().partitions(size):
        yield [
            StalePayment(id_, external_id, None if currency is None else _money(amount, currency), subscription_id, at)
            for id_, external_id, amount, currency, subscription_id, at in page
        ]


@lru_cache(maxsize=4096)
def _money(amount: str, currency: str) -> Money:
    # A service has a handful of prices, a slice has thousands of payments.
    return Money(Decimal(amount), currency)


def fetch_stale_payments(connection: sa.Connection, created_before: datetime) -> list[StalePayment]:
    """The same as one list."""
    return [row for page in stream_stale_payments(connection, created_before, 1000) for row in page]


# One statement with its audit trail. Each row travels once, column by column; a reason that many share travels once.
# The UPDATE itself locks the rows, in the order of their ids (`_ROW_BY_ROW` sees to the plan): locking them first would
# be one more write to each. A row that changes while it is waited for is checked again as it is then.
_EXPIRE_PAYMENTS = sa.text(f"""
    WITH expired AS (
        UPDATE payments p SET status = 'EXPIRED', updated_at = :naive_at
        FROM ROWS FROM (unnest(CAST(:ids AS bigint[])), jsonb_array_elements_text(CAST(:external_ids AS jsonb)),
                        jsonb_array_elements_text(CAST(:names AS jsonb)), unnest(CAST(:numbers AS int[])))
             AS x (id, external_id, name, reason)
        WHERE p.id = x.id AND p.external_payment_id IS NOT DISTINCT FROM x.external_id
          AND {of_this_shop("p.payment_provider_id")} AND p.status = 'PENDING'
        RETURNING p.id, coalesce(x.name, x.external_id) AS name, x.reason,
                  p.status IS NOT DISTINCT FROM 'EXPIRED' AS is_expired
    ), trail AS (
        INSERT INTO billing_orchestration.audit_trail
            (at, job, run_id, entity, entity_id, action, old, new, reason, external_payment_id)
        SELECT :at, :job, :run_id, 'payment', id::text, 'expired', CAST('{{"status": "PENDING"}}' AS jsonb),
               CAST('{{"status": "EXPIRED"}}' AS jsonb), (CAST(:reasons AS text[]))[reason], name
        FROM expired
    )
    SELECT CASE WHEN count(*) < :count THEN coalesce(array_agg(id), '{{}}') END, coalesce(bool_and(is_expired), true)
    FROM expired
""")
# A trigger that swallows the UPDATE leaves the row PENDING, and says nothing.
_STILL_PENDING = sa.text(f"""
    SELECT EXISTS (
        SELECT FROM payments p
        JOIN ROWS FROM (unnest(CAST(:ids AS bigint[])), jsonb_array_elements_text(CAST(:external_ids AS jsonb)))
             AS x (id, external_id) ON p.id = x.id
        WHERE p.external_payment_id IS NOT DISTINCT FROM x.external_id AND p.status = 'PENDING'
          AND {of_this_shop("p.payment_provider_id")})
""")


# For this transaction only: look each id up in the primary key, in the order of the ids, as everybody else locks
# payments. With thousands of ids PostgreSQL would read a table that is not large from end to end, in its own order.
_ROW_BY_ROW = sa.text(
    "SELECT set_config(name, 'off', true) FROM unnest(ARRAY['enable_seqscan', 'enable_hashjoin', 'enable_mergejoin',"
    " 'enable_bitmapscan']) AS name"
)


def expire_payments(connection: sa.Connection, stamp: Stamp, reasons: Sequence[tuple[StalePayment, str]]) -> set[int]:
    """PENDING -> EXPIRED for these rows, each with its reason; return the ids of those that still were PENDING.

    A row whose provider id has changed since it was read is skipped: the answer was about another payment. Raises
    NotAsMeant when a trigger of the service's makes something else of one of them.
    """
    if not reasons:
        return set()
    connection.execute(_ROW_BY_ROW)
    reasons = sorted(reasons, key=lambda item: item[0].id)
    ids = [row.id for row, _ in reasons]
    names = [_name(row) for row, _ in reasons]
    external_ids = [row.external_payment_id for row, _ in reasons]
    numbers: dict[str, int] = {}
    reason_numbers = [numbers.setdefault(reason, len(numbers) + 1) for _, reason in reasons]
    # Written out here, they cost a fifth of what the driver needs for a list.
    asked = {"ids": _int_array(ids), "external_ids": to_json(external_ids)}
    expired, as_meant = connection.execute(
        _EXPIRE_PAYMENTS,
        {
            **asked,
            "names": to_json(names) if any(names) else "[]",
            "numbers": _int_array(reason_numbers),
            "reasons": in_words_of(connection, [storable(reason) for reason in numbers]),
            "count": len(ids),
            "at": stamp.at,
            "naive_at": naive_utc(stamp.at),
            "job": stamp.job,
            "run_id": stamp.run_id,
        },
    ).one()
    if as_meant and expired is None:
        return set(ids)
    if not as_meant or connection.execute(_STILL_PENDING, asked).scalar_one():
        raise NotAsMeant("a payment")
    return set(expired)


def _int_array(numbers: Sequence[int]) -> str:
    return "{" + ",".join(map(str, numbers)) + "}"


def _name(row: StalePayment) -> str | None:
    """Its provider payment's name in the audit trail, where the id is too long for an index; else None."""
    id_ = row.external_payment_id
    return None if id_ is None or len(id_) <= LONGEST_NAME else storable_name(id_)
