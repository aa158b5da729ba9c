"""The statements of the two expiry jobs: set-based, in short transactions, each repeating its precondition."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from typing import Any

import sqlalchemy as sa

from billing_orchestration.database.audit import LONGEST_NAME, Stamp, storable, storable_name, to_json
from billing_orchestration.database.conventions import naive_utc
from billing_orchestration.database.engine import translate
from billing_orchestration.database.errors import RowRefused
from billing_orchestration.domain.expiry import StalePayment
from billing_orchestration.domain.money import Money

# States of an attempt that hold a subscription back from expiry: what became of the customer's money is not known, or
# a person is deciding about it (one that a person has decided to ignore grants nothing: it holds nothing back). They
# are few: PostgreSQL reads them once a statement, into a hash, and looks each of ten thousand rows up in that.
_HELD = """s.id IN (
    SELECT a.subscription_id FROM billing_orchestration.renewal_attempts a
    WHERE a.state IN ('UNKNOWN', 'PENDING') OR (a.state = 'PLANNED' AND a.first_sent_at IS NOT NULL)
       OR (a.state = 'REVIEW' AND NOT EXISTS (
           SELECT FROM billing_orchestration.quarantine q
           WHERE q.attempt_id = a.id AND q.external_payment_id = a.external_payment_id
             AND q.resolution = 'ignored')))"""


# Where PostgreSQL expects a hash not to fit, it walks through the whole list for each row instead. With its default of
# 4 MB that begins at some hundred thousand open attempts; this is enough for millions, and is allocated as needed.
_ROOM_FOR_THE_HELD = sa.text("SELECT set_config('work_mem', '64MB', true)")


@dataclass(frozen=True, slots=True)
class SubscriptionSample:
    """One subscription of the report. `why_held` is None for one that would expire."""

    id: int
    user_id: str | None
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


def fetch_over(connection: sa.Connection, over_before: datetime, sample_size: int) -> OverSlice:
    """Count what is over, without fetching it, and show the first few of each kind."""
    bound = {"over_before": naive_utc(over_before)}
    connection.execute(_ROOM_FOR_THE_HELD)
    # Two counts, each by its own index: one over all ACTIVE rows, one over those that are over.
    active = connection.execute(
        sa.text("""
            SELECT count(*) AS active, count(*) FILTER (WHERE ended_at IS NULL) AS without_end
            FROM subscriptions WHERE status = 'ACTIVE'
        """)
    ).one()
    over = connection.execute(
        sa.text("SELECT count(*) FROM subscriptions WHERE status = 'ACTIVE' AND ended_at < :over_before"), bound
    ).scalar_one()
    held = connection.execute(
        sa.text(f"""
            SELECT count(*) FROM subscriptions s
            WHERE s.status = 'ACTIVE' AND s.ended_at < :over_before AND {_HELD}
        """),
        bound,
    ).scalar_one()
    # As text: a real database may hold dates that Python has no datetime for.
    rows = connection.execute(
        sa.text(f"""
            (SELECT s.id, s.user_id, s.ended_at::text AS ended_at, false AS held
             FROM subscriptions s
             WHERE s.status = 'ACTIVE' AND s.ended_at < :over_before AND NOT {_HELD}
             ORDER BY s.ended_at, s.id LIMIT :size)
            UNION ALL
            (SELECT s.id, s.user_id, s.ended_at::text, true
             FROM subscriptions s
             WHERE s.status = 'ACTIVE' AND s.ended_at < :over_before AND {_HELD}
             ORDER BY s.ended_at, s.id LIMIT :size)
        """).columns(id=sa.Integer, user_id=sa.String, ended_at=sa.String, held=sa.Boolean),
        {**bound, "size": sample_size},
    )
    samples = tuple(
        SubscriptionSample(
            row.id, row.user_id, row.ended_at, "a charge whose outcome is not known or pending" if row.held else None
        )
        for row in rows
    )
    return OverSlice(active.active, over, held, active.without_end, samples)


def digest_over(connection: sa.Connection, over_before: datetime) -> str:
    """A short text that differs for any other set of subscriptions that would expire, or other ends of theirs.

    A sum of hashes: computed in one pass, whatever the order and however many rows.
    """
    connection.execute(_ROOM_FOR_THE_HELD)
    return str(
        connection.execute(
            sa.text(f"""
                SELECT coalesce(sum(hashtextextended(s.id::text || ' ' || s.ended_at::text, 0)::numeric), 0)
                FROM subscriptions s
                WHERE s.status = 'ACTIVE' AND s.ended_at < :over_before AND NOT {_HELD}
            """),
            {"over_before": naive_utc(over_before)},
        ).scalar_one()
    )


# The oldest first. Those that somebody has locked are passed over, without a wait nothing can deadlock.
_LOCK_FREE = sa.text(f"""
    SELECT s.id FROM subscriptions s
    WHERE s.status = 'ACTIVE' AND s.ended_at < :over_before AND s.id <> ALL(:passed_over) AND NOT {_HELD}
    ORDER BY s.ended_at, s.id LIMIT :size FOR NO KEY UPDATE OF s SKIP LOCKED
""")
# Chosen in the same order, locked (waited for) by id: as settling and charging lock them.
_LOCK_ALL = sa.text(f"""
    SELECT s.id FROM subscriptions s
    WHERE s.status = 'ACTIVE' AND s.ended_at < :over_before AND s.id IN (
        SELECT s.id FROM subscriptions s
        WHERE s.status = 'ACTIVE' AND s.ended_at < :over_before AND s.id <> ALL(:passed_over) AND NOT {_HELD}
        ORDER BY s.ended_at, s.id LIMIT :size)
    ORDER BY s.id FOR NO KEY UPDATE OF s
""")
# A statement of its own: it sees the attempts that were committed while the locks were waited for. No recheck inside
# the locking statement would: PostgreSQL rechecks the locked row alone, and not even that if it was only locked, as
# charging does.
_EXPIRE_LOCKED = """
    WITH expired AS (
        UPDATE subscriptions s SET status = 'EXPIRED', updated_at = :naive_at
        WHERE {locked} AND s.status = 'ACTIVE' AND s.ended_at < :over_before AND NOT {held}
        RETURNING s.id, s.ended_at
    )
    INSERT INTO billing_orchestration.audit_trail (at, job, run_id, entity, entity_id, action, old, new, reason)
    SELECT :at, :job, :run_id, 'subscription', id::text, 'expired',
           CAST('{{"status": "ACTIVE"}}' AS jsonb), CAST('{{"status": "EXPIRED"}}' AS jsonb),
           'ended ' || ended_at::text || :reason
    FROM expired
"""
_EXPIRE_BY_ID = sa.text(_EXPIRE_LOCKED.format(locked="s.id = ANY(:ids)", held=_HELD))
# The places are an array only when it runs: a planner that saw ten thousand of them would take them for scattered over
# the disk, and rather read everything that is over once more.
_EXPIRE_IN_PLACE = sa.text(
    _EXPIRE_LOCKED.format(locked="s.ctid = ANY(CAST(CAST(:places AS text) AS tid[]))", held=_HELD)
)


class NotExpired(Exception):
    """The database refuses to expire one of these (a trigger or a constraint of the service's); `__cause__` says why.

    The transaction can only be rolled back: nothing of the chunk was changed.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        super().__init__(f"{len(ids)} subscriptions could not be expired")
        self.ids = tuple(ids)


def expire_subscriptions(
    connection: sa.Connection,
    stamp: Stamp,
    *,
    over_before: datetime,
    reason: str,
    size: int,
    wait_for_locks: bool,
    passed_over: Sequence[int] = (),
) -> int:
    """Expire at most `size` subscriptions that are over and not held back, oldest first, with the audit trail.

    The precondition is read under lock: one that was renewed meanwhile is no longer over, one that is being charged is
    held. Without `wait_for_locks`, rows that somebody else has locked are passed over, as are those of `passed_over`.
    Returns how many expired. Raises NotExpired when the database refuses to change one of the chunk.
    """
    bound = {"over_before": naive_utc(over_before)}
    chosen = {**bound, "size": size, "passed_over": list(passed_over)}
    connection.execute(_ROOM_FOR_THE_HELD)
    while True:
        # A chunk that turns out to be held is let go of before the next one is locked: so the order of locks holds.
        chunk = connection.begin_nested()
        ids = list(connection.execute(_LOCK_ALL if wait_for_locks else _LOCK_FREE, chosen).scalars())
        try:
            result = connection.execute(
                _EXPIRE_BY_ID,
                {**bound, **_told(stamp, reason), "ids": ids},
            )
        except sa.exc.DBAPIError as error:
            reason_in_words = translate(error)
            if isinstance(reason_in_words, RowRefused):
                raise NotExpired(ids) from reason_in_words
            raise
        # All of a chunk may be held or renewed by now while others are left: the next look does not see it as over.
        if result.rowcount or not ids:
            chunk.commit()
            return int(result.rowcount)
        chunk.rollback()


def _told(stamp: Stamp, reason: str) -> dict[str, Any]:
    return {
        "at": stamp.at,
        "naive_at": naive_utc(stamp.at),
        "job": stamp.job,
        "run_id": stamp.run_id,
        "reason": f", {reason}",
    }


_LOWEST_ID = -(2**31)


@dataclass(frozen=True, slots=True)
class Locked:
    """The subscriptions that this transaction has locked: where they are stored, and the end and id of the last one."""

    count: int
    places: str
    last: tuple[str, int]


# A row's place is its key here: it is locked, so it stays there, and no index is asked for it once more. (They are of
# one table: `migrate` could add no index to a partitioned one.) The end is text: a real database may hold dates that
# Python has no datetime for.
_LOCK_AFTER = sa.text(f"""
    WITH free AS (
        SELECT s.ctid AS place, s.ended_at, s.id FROM subscriptions s
        WHERE s.status = 'ACTIVE' AND s.ended_at < :over_before
          AND (s.ended_at, s.id) > (CAST(:last_end AS timestamp), :last_id) AND NOT {_HELD}
        ORDER BY s.ended_at, s.id LIMIT :size FOR NO KEY UPDATE OF s SKIP LOCKED
    ), last AS (SELECT ended_at, id FROM free ORDER BY ended_at DESC, id DESC LIMIT 1)
    SELECT count(*) AS found, CAST(array_agg(place) AS text) AS places,
           (SELECT ended_at::text FROM last) AS last_end, (SELECT id FROM last) AS last_id
    FROM free
""")


def lock_over(
    connection: sa.Connection, over_before: datetime, size: int, after: tuple[str, int] | None
) -> Locked | None:
    """Lock at most `size` that are over and not held back, the oldest first: those after the `last` one of the call
    before, or from the oldest; None where there are no more. Those that somebody has locked are passed over.

    Starting at the oldest for each chunk would scan all that the chunks before it have left behind.
    """
    connection.execute(_ROOM_FOR_THE_HELD)
    last_end, last_id = after or ("-infinity", _LOWEST_ID)
    found = connection.execute(
        _LOCK_AFTER,
        {"over_before": naive_utc(over_before), "size": size, "last_end": last_end, "last_id": last_id},
    ).one()
    return Locked(found.found, found.places, (found.last_end, found.last_id)) if found.found else None


def expire_locked(
    connection: sa.Connection, stamp: Stamp, locked: Locked, *, over_before: datetime, reason: str
) -> int:
    """Expire what this transaction has locked, except what is held by now; return how many expired.

    Nothing held is expired: charging locks the subscription (FOR SHARE) and writes its attempt in one transaction.
    Either that was committed before the row was locked here, then this statement, which is younger, sees the attempt;
    or it is under way, then the row was passed over; or it waits for this transaction, then it finds EXPIRED.
    """
    result = connection.execute(
        _EXPIRE_IN_PLACE,
        {"over_before": naive_utc(over_before), **_told(stamp, reason), "places": locked.places},
    )
    return int(result.rowcount)


_STALE_PAYMENTS = sa.text("""
    SELECT id, external_payment_id, amount::text AS amount, currency::text AS currency
    FROM payments WHERE status = 'PENDING' AND created_at < :created_before ORDER BY created_at, id
""")


def stream_stale_payments(
    connection: sa.Connection, created_before: datetime, size: int
) -> Iterator[list[StalePayment]]:
    """Every PENDING payment created before that instant, oldest first, in pages of at most this many rows.

    Pages are read on demand: only one is in memory.
    """
    rows = connection.execute(
        _STALE_PAYMENTS,
        {"created_before": naive_utc(created_before)},
        execution_options={"stream_results": True, "yield_per": size},
    )
    for page in rows.tuples().partitions(size):
        yield [
            StalePayment(id_, external_id, None if currency is None else _money(amount, currency))
            for id_, external_id, amount, currency in page
        ]


@lru_cache(maxsize=4096)
def _money(amount: str, currency: str) -> Money:
    # A service has a handful of prices, a slice has thousands of payments.
    return Money(Decimal(amount), currency)


def fetch_stale_payments(connection: sa.Connection, created_before: datetime) -> list[StalePayment]:
    """The same as one list."""
    return [row for page in stream_stale_payments(connection, created_before, 1000) for row in page]


# One statement with its audit trail. Each row travels once, column by column; a reason that many share, once. Rows are
# locked by the UPDATE itself, in the order of the ids (`expire_payments` sees to the plan): a lock ahead of it would be
# one more write to each. One that somebody changes while it is waited for is looked at again as it is then.
_EXPIRE_PAYMENTS = sa.text("""
    WITH expired AS (
        UPDATE payments p SET status = 'EXPIRED', updated_at = :naive_at
        FROM ROWS FROM (unnest(CAST(:ids AS int[])), jsonb_array_elements_text(CAST(:external_ids AS jsonb)),
                        jsonb_array_elements_text(CAST(:names AS jsonb)), unnest(CAST(:numbers AS int[])))
             AS x (id, external_id, name, reason)
        WHERE p.id = x.id AND p.external_payment_id IS NOT DISTINCT FROM x.external_id AND p.status = 'PENDING'
        RETURNING p.id, coalesce(x.name, x.external_id) AS name, x.reason
    ), trail AS (
        INSERT INTO billing_orchestration.audit_trail
            (at, job, run_id, entity, entity_id, action, old, new, reason, external_payment_id)
        SELECT :at, :job, :run_id, 'payment', id::text, 'expired', CAST('{"status": "PENDING"}' AS jsonb),
               CAST('{"status": "EXPIRED"}' AS jsonb), (CAST(:reasons AS text[]))[reason], name
        FROM expired
    )
    SELECT CASE WHEN count(*) < :count THEN coalesce(array_agg(id), '{}') END FROM expired
""")


# For this transaction only: a look into the primary key for each id, in their order, as everybody else locks payments.
# Thousands of ids would make PostgreSQL read all of a table that is not large, and in the order of the table.
_ROW_BY_ROW = sa.text(
    "SELECT set_config(name, 'off', true) FROM unnest(ARRAY['enable_seqscan', 'enable_hashjoin', 'enable_mergejoin',"
    " 'enable_bitmapscan']) AS name"
)


def expire_payments(connection: sa.Connection, stamp: Stamp, reasons: Sequence[tuple[StalePayment, str]]) -> set[int]:
    """PENDING -> EXPIRED for these rows, each with its reason; return the ids of those that were still PENDING.

    A row whose provider id has changed since it was read is skipped: the provider was asked about another payment.
    """
    if not reasons:
        return set()
    connection.execute(_ROW_BY_ROW)
    reasons = sorted(reasons, key=lambda item: item[0].id)
    ids = [row.id for row, _ in reasons]
    # Cut what no index entry can hold.
    names = [_name(row) for row, _ in reasons]
    external_ids = [row.external_payment_id for row, _ in reasons]
    numbers: dict[str, int] = {}
    reason_numbers = [numbers.setdefault(reason, len(numbers) + 1) for _, reason in reasons]
    told = connection.execute(
        _EXPIRE_PAYMENTS,
        {
            # Building the text here costs a fifth of what the driver takes for a list.
            "ids": _int_array(ids),
            "external_ids": to_json(external_ids),
            "names": to_json(names) if any(names) else "[]",
            "numbers": _int_array(reason_numbers),
            "reasons": [storable(reason) for reason in numbers],
            "count": len(ids),
            "at": stamp.at,
            "naive_at": naive_utc(stamp.at),
            "job": stamp.job,
            "run_id": stamp.run_id,
        },
    ).scalar_one()
    return set(ids if told is None else told)


def _int_array(numbers: Sequence[int]) -> str:
    return "{" + ",".join(map(str, numbers)) + "}"


def _name(row: StalePayment) -> str | None:
    """The name of its provider payment in the audit trail where it is not the id itself."""
    id_ = row.external_payment_id
    return None if id_ is None or len(id_) <= LONGEST_NAME else storable_name(id_)
