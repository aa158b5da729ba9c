"""Reconciliation's statements: our side of a day, what became of the day, and rows that take the provider's truth."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from billing_orchestration.database.audit import Change, Stamp, in_words_of, known_here, record_changes
from billing_orchestration.database.conventions import naive_utc, of_this_shop, of_this_shop_first, sql_list
from billing_orchestration.database.matching import parts_of
from billing_orchestration.database.payment_rows import select_rows
from billing_orchestration.database.settling import finish_payments
from billing_orchestration.domain.adoption import RowChange
from billing_orchestration.domain.problem_kinds import LAST_WORDS
from billing_orchestration.domain.reconciled import Day
from billing_orchestration.domain.settlement_decisions import PaymentRow

# A row in the order of `domain.reconciliation.HERE`, whatever the service's table holds. A blank id is none: as one
# payment, all rows with it would be one line. What is no amount (NaN, infinite, NULL) is no money. A row was created no
# later than it was changed, so that one from the far future belongs to a day that is compared.
_COLUMNS = """
    SELECT id, CASE WHEN btrim(external_payment_id) <> '' THEN external_payment_id END, status::text,
           CASE WHEN amount BETWEEN -1e12 AND 1e12 THEN (amount * 100)::bigint ELSE 0 END,
           currency::text, subscription_id IS NOT NULL,
           CASE WHEN LEAST(created_at, updated_at) BETWEEN '2000-01-01' AND '2099-12-31'
                THEN LEAST(created_at, updated_at) ELSE '2000-01-01' END
    FROM payments
"""
_OF_DAY = f"""
    {_COLUMNS}
    WHERE ((created_at >= %(start)s AND created_at < %(end)s) OR (updated_at >= %(start)s AND updated_at < %(end)s))
      AND {of_this_shop("payment_provider_id")}
"""
_BY_PAYMENT = f"{_COLUMNS} WHERE external_payment_id = ANY(%(ids)s) AND {of_this_shop_first('payments')}"
# The rows that the two above have found, once more.
_BY_ROW = f"{_COLUMNS} WHERE id = ANY(%(ids)s)"
Row = tuple[Any, ...]


def fetch_rows_of_day(connection: sa.Connection, day: Day) -> list[Row]:
    """The payment rows that were created or changed on a day, whatever their status."""
    bound = {"start": naive_utc(day.start), "end": naive_utc(day.end)}
    return [tuple(row) for row in connection.exec_driver_sql(_OF_DAY, bound)]


def fetch_rows_of(connection: sa.Connection, payment_ids: Sequence[str], row_ids: Sequence[int] = ()) -> list[Row]:
    """The payment rows with these ids of the provider's, whatever their age; and those with these ids of their own."""
    known = known_here(connection, payment_ids)
    parts: list[tuple[str, Any]] = [(_BY_PAYMENT, {"ids": part}) for part in parts_of(known)]
    parts += [(_BY_ROW, {"ids": part}) for part in parts_of(row_ids)]
    return [tuple(row) for statement, bound in parts for row in connection.exec_driver_sql(statement, bound)]


# --- entries of the quarantine ------------------------------------------------------------------------------------

_STATES = sa.text(f"""
    SELECT problem_key, bool_or(resolved_at IS NULL) AS waits
    FROM billing_orchestration.quarantine
    WHERE problem_key = ANY(:keys) AND (resolved_at IS NULL OR resolution IN {sql_list(*LAST_WORDS)})
    GROUP BY problem_key
""")
_OPEN_OF_BOOKS = sa.text("""
    SELECT id, problem_key, external_payment_id FROM billing_orchestration.quarantine
    WHERE resolved_at IS NULL AND jsonb_exists(evidence, 'books')
""")
_CLOSE = sa.text("""
    UPDATE billing_orchestration.quarantine
    SET resolved_at = :at, resolution = 'settled', resolved_by = :job, resolution_reason = :reason
    WHERE id = ANY(:ids) AND resolved_at IS NULL
    RETURNING id, external_payment_id
""")


def states_of(connection: sa.Connection, keys: Collection[str]) -> dict[str, bool]:
    """Of these problems, those that a person knows of: True while one has to decide, False after the last word."""
    stored = dict(zip(in_words_of(connection, sorted(keys)), sorted(keys), strict=True))
    rows = [row for part in parts_of(list(stored)) for row in connection.execute(_STATES, {"keys": part})]
    return {stored[row.problem_key]: bool(row.waits) for row in rows}


def open_of_books(connection: sa.Connection) -> list[tuple[int, str]]:
    """The open entries about differing books: id and problem."""
    return [(row.id, row.problem_key) for row in connection.execute(_OPEN_OF_BOOKS)]


def close_agreed(connection: sa.Connection, stamp: Stamp, entry_ids: Sequence[int]) -> int:
    """Close entries about books that agree by now; return how many."""
    reason = f"both sides agree by now (run {stamp.run_id})"
    bound = {"at": stamp.at, "job": stamp.job, "reason": reason, "ids": list(entry_ids)}
    closed = connection.execute(_CLOSE, bound).all() if entry_ids else []
    changes = [
        Change("quarantine", str(row.id), "resolved", reason, external_payment_id=row.external_payment_id)
        for row in closed
    ]
    record_changes(connection, stamp, changes)
    return len(closed)


# --- what became of a day -----------------------------------------------------------------------------------------

_RECORD_DAY = sa.text("""
    INSERT INTO billing_orchestration.reconciled_days AS d
        (day, starts_at, ends_at, lines, differences, unexplained, run_id, reconciled_at)
    VALUES (:day, :starts_at, :ends_at, :lines, :differences, :unexplained, :run_id, :at)
    ON CONFLICT (day) DO UPDATE
    SET starts_at = excluded.starts_at, ends_at = excluded.ends_at, lines = excluded.lines,
        differences = excluded.differences, unexplained = excluded.unexplained, run_id = excluded.run_id,
        reconciled_at = excluded.reconciled_at
""")


def record_day(
    connection: sa.Connection, stamp: Stamp, day: Day, *, lines: int, differences: int, unexplained: int
) -> None:
    """Note what a day came to. `differences` are left after repairs; `unexplained` of them are before nobody."""
    connection.execute(
        _RECORD_DAY,
        {
            "day": day.day,
            "starts_at": day.start,
            "ends_at": day.end,
            "lines": lines,
            "differences": differences,
            "unexplained": unexplained,
            "run_id": stamp.run_id,
            "at": stamp.at,
        },
    )


# --- the provider's truth -----------------------------------------------------------------------------------------


def lock_rows(connection: sa.Connection, payment_id: str | None, row_id: int | None) -> list[PaymentRow]:
    """This shop's rows of a payment of the provider's, else the one row, under lock. The caller holds its user's."""
    ours = of_this_shop("payment_provider_id")
    if payment_id is not None:
        where = f"external_payment_id = :id AND {ours} ORDER BY id FOR NO KEY UPDATE"
        return select_rows(connection, where, {"id": payment_id})
    return select_rows(connection, f"id = :id AND {ours} FOR NO KEY UPDATE", {"id": row_id})


def settled_row(connection: sa.Connection, payment_id: str) -> int | None:
    """The row that our settlement of a payment names."""
    statement = "SELECT payment_id FROM billing_orchestration.settlements WHERE external_payment_id = :id"
    found: int | None = connection.execute(sa.text(statement), {"id": payment_id}).scalar_one_or_none()
    return found


def adopt(
    connection: sa.Connection, stamp: Stamp, changes: Sequence[RowChange], reason: str, payment_id: str | None
) -> None:
    """Let rows take the provider's truth, with the audit trail.

    What moves: nothing at the provider, and no grant; the status or amount of payment rows that the caller has locked.
    One transaction, the caller's. Raises NotAsMeant (or a database error) with nothing written.
    """
    finish_payments(connection, stamp, [_finished(change) for change in changes])
    record_changes(
        connection,
        stamp,
        [
            Change("payment", str(change.row.id), "corrected", reason, old, new, payment_id)
            for change in changes
            for old, new in [_before_and_after(change)]
        ],
    )


def _finished(change: RowChange) -> Mapping[str, Any]:
    money = change.money
    return {
        "id": change.row.id,
        "status": change.status,
        "old_status": change.row.status,
        "subscription_id": change.row.subscription_id,
        "payment_method": None,
        "amount": None if money is None else money.amount,
        "currency": None if money is None else money.currency,
    }


def _before_and_after(change: RowChange) -> tuple[dict[str, Any], dict[str, Any]]:
    old: dict[str, Any] = {"status": change.row.status}
    new: dict[str, Any] = {"status": change.status}
    if change.money is not None:
        old["amount"], new["amount"] = str(change.row.money), str(change.money)
    return old, new
