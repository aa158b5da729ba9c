"""The slices of the two matching jobs, and how far each job has covered time (its watermark)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

import sqlalchemy as sa

from billing_orchestration.database.audit import Stamp, known_here
from billing_orchestration.database.conventions import naive_utc, of_this_shop, of_this_shop_first
from billing_orchestration.database.payment_rows import select_rows
from billing_orchestration.domain.settlement_decisions import PaymentRow

Id = TypeVar("Id", str, int)
# For a hundred thousand ids at once PostgreSQL would read a payments table of five million rows from end to end.
_IDS_AT_A_TIME = 2000


@dataclass(frozen=True, slots=True)
class PendingSlice:
    """PENDING rows: how many were created in the window, and those (of any age) that the provider says are paid.

    `nameless`: the first rows of the window without a provider id, of which there are `without_provider_id`.
    """

    in_window: int
    without_provider_id: int
    nameless: tuple[PaymentRow, ...]
    paid_there: tuple[PaymentRow, ...]


_OURS = of_this_shop("payment_provider_id")
_COUNT_PENDING = sa.text(f"""
    SELECT count(*) AS rows, count(*) FILTER (WHERE external_payment_id IS NULL) AS without_id
    FROM payments WHERE status = 'PENDING' AND created_at >= :start AND created_at <= :end AND {_OURS}
""")
_PENDING_WITHOUT_ID = f"""
    status = 'PENDING' AND created_at >= :start AND created_at <= :end AND external_payment_id IS NULL AND {_OURS}
    ORDER BY id LIMIT :size
"""
_PENDING_WITH_ID = f"external_payment_id = ANY(:ids) AND status = 'PENDING' AND {_OURS} ORDER BY id"
_WITH_ID = f"external_payment_id = ANY(:ids) AND {of_this_shop_first('payments')} ORDER BY id"
_SETTLED = sa.text("""
    SELECT external_payment_id FROM billing_orchestration.settlements WHERE external_payment_id = ANY(:ids)
""")


def fetch_pending(
    connection: sa.Connection, start: datetime, end: datetime, paid_ids: Sequence[str], sample_size: int = 100
) -> PendingSlice:
    """PENDING rows created in [start, end], counted; and every PENDING row whose provider payment is in `paid_ids`."""
    window = {"start": naive_utc(start), "end": naive_utc(end)}
    counts = connection.execute(_COUNT_PENDING, window).one()
    nameless = (
        select_rows(connection, _PENDING_WITHOUT_ID, {**window, "size": sample_size}) if counts.without_id else []
    )
    paid_there = _rows_by_ids(connection, _PENDING_WITH_ID, paid_ids)
    return PendingSlice(counts.rows, counts.without_id, tuple(nameless), tuple(paid_there))


def fetch_rows(connection: sa.Connection, provider_ids: Sequence[str]) -> list[PaymentRow]:
    """The payment rows with these provider ids, whatever their status or age."""
    return _rows_by_ids(connection, _WITH_ID, provider_ids)


def _rows_by_ids(connection: sa.Connection, where: str, ids: Sequence[str]) -> list[PaymentRow]:
    parts = parts_of(known_here(connection, ids))
    return [row for part in parts for row in select_rows(connection, where, {"ids": part})]


def fetch_settled(connection: sa.Connection, provider_ids: Sequence[str]) -> set[str]:
    """Which of these provider payments are in our settlements."""
    parts = parts_of(known_here(connection, provider_ids))
    return {id_ for part in parts for id_ in connection.execute(_SETTLED, {"ids": part}).scalars()}


def parts_of(ids: Sequence[Id]) -> Iterator[list[Id]]:
    """Many ids in parts, each few enough that an index is used."""
    for start in range(0, len(ids), _IDS_AT_A_TIME):
        yield list(ids[start : start + _IDS_AT_A_TIME])


_WATERMARK = "SELECT covered_until FROM billing_orchestration.watermarks WHERE job = :job"
_MOVE_WATERMARK = sa.text("""
    INSERT INTO billing_orchestration.watermarks AS w (job, covered_until, run_id, updated_at)
    VALUES (:job, :covered_until, :run_id, :at)
    ON CONFLICT (job) DO UPDATE
    SET covered_until = excluded.covered_until, run_id = excluded.run_id, updated_at = excluded.updated_at
    WHERE w.covered_until = :seen
""")


def read_watermark(connection: sa.Connection, job: str, *, lock: bool = False) -> datetime | None:
    """Until when a job has covered time without a gap; None before its first run. `lock`: nobody else moves it then."""
    query = sa.text(f"{_WATERMARK} FOR UPDATE" if lock else _WATERMARK)
    found: datetime | None = connection.execute(query, {"job": job}).scalar_one_or_none()
    return found


def move_watermark(connection: sa.Connection, stamp: Stamp, seen: datetime | None, covered_until: datetime) -> None:
    """Note that a job has covered time up to an instant. Nothing happens when it is not where it was `seen`."""
    connection.execute(
        _MOVE_WATERMARK,
        {
            "job": stamp.job,
            "covered_until": covered_until,
            "run_id": stamp.run_id,
            "at": stamp.at,
            "seen": seen,
        },
    )
