"""The slices of the two matching jobs, and how far each job has covered time (its watermark)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from billing_orchestration.database.audit import Stamp
from billing_orchestration.database.conventions import naive_utc
from billing_orchestration.database.payment_rows import select_rows
from billing_orchestration.domain.settlement import PaymentRow

# Asked for a hundred thousand ids at once, PostgreSQL reads a payments table of five million rows from end to end.
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


def fetch_pending(
    connection: sa.Connection, start: datetime, end: datetime, paid_ids: Sequence[str], sample_size: int = 100
) -> PendingSlice:
    """PENDING rows created in [start, end], counted; and every PENDING row whose provider payment is in `paid_ids`."""
    window = {"start": naive_utc(start), "end": naive_utc(end)}
    counts = connection.execute(
        sa.text("""
            SELECT count(*) AS rows, count(*) FILTER (WHERE external_payment_id IS NULL) AS without_id
            FROM payments WHERE status = 'PENDING' AND created_at >= :start AND created_at <= :end
        """),
        window,
    ).one()
    nameless = (
        select_rows(
            connection,
            """status = 'PENDING' AND created_at >= :start AND created_at <= :end AND external_payment_id IS NULL
               ORDER BY id LIMIT :size""",
            {**window, "size": sample_size},
        )
        if counts.without_id
        else []
    )
    rows = [
        row
        for ids in _parts(paid_ids)
        for row in select_rows(
            connection, "external_payment_id = ANY(:ids) AND status = 'PENDING' ORDER BY id", {"ids": ids}
        )
    ]
    return PendingSlice(counts.rows, counts.without_id, tuple(nameless), tuple(rows))


def fetch_rows(connection: sa.Connection, provider_ids: Sequence[str]) -> list[PaymentRow]:
    """The payment rows with these provider ids, whatever their status or age."""
    return [
        row
        for ids in _parts(provider_ids)
        for row in select_rows(connection, "external_payment_id = ANY(:ids) ORDER BY id", {"ids": ids})
    ]


def fetch_settled(connection: sa.Connection, provider_ids: Sequence[str]) -> set[str]:
    """Which of these provider payments are in our settlements."""
    return {
        settled
        for ids in _parts(provider_ids)
        for settled in connection.execute(
            sa.text("""
                SELECT external_payment_id FROM billing_orchestration.settlements
                WHERE external_payment_id = ANY(:ids)
            """),
            {"ids": ids},
        ).scalars()
    }


def _parts(ids: Sequence[str]) -> Iterator[list[str]]:
    for start in range(0, len(ids), _IDS_AT_A_TIME):
        yield list(ids[start : start + _IDS_AT_A_TIME])


def read_watermark(connection: sa.Connection, job: str) -> datetime | None:
    """Until when a job has covered time without a gap; None before its first run."""
    found: datetime | None = connection.execute(
        sa.text("SELECT covered_until FROM billing_orchestration.watermarks WHERE job = :job"), {"job": job}
    ).scalar_one_or_none()
    return found


def advance_watermark(connection: sa.Connection, stamp: Stamp, covered_until: datetime) -> None:
    """Note that a job has covered time up to an instant. It never goes back."""
    connection.execute(
        sa.text("""
            INSERT INTO billing_orchestration.watermarks AS w (job, covered_until, run_id, updated_at)
            VALUES (:job, :covered_until, :run_id, :at)
            ON CONFLICT (job) DO UPDATE
            SET covered_until = excluded.covered_until, run_id = excluded.run_id, updated_at = excluded.updated_at
            WHERE w.covered_until < excluded.covered_until
        """),
        {"job": stamp.job, "covered_until": covered_until, "run_id": stamp.run_id, "at": stamp.at},
    )
