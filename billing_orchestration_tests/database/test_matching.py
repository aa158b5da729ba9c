"""The slices of the matching jobs, and how far each job has covered time (its watermark)."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from functools import partial

import sqlalchemy as sa

from billing_orchestration.database.matching import (
    advance_watermark,
    fetch_pending,
    fetch_rows,
    fetch_settled,
    read_watermark,
)
from billing_orchestration_tests.books import NOON, Books
from billing_orchestration_tests.waiting import at_once

AN_HOUR = timedelta(hours=1)


def test_a_watermark_never_goes_back(books: Books) -> None:
    def advance(to: datetime, run_id: str) -> None:
        with books.engine.begin() as connection:
            advance_watermark(connection, books.stamp(run_id), to)

    def read() -> datetime | None:
        with books.engine.connect() as connection:
            return read_watermark(connection, "job")

    assert read() is None
    advance(NOON, "first")
    advance(NOON - AN_HOUR, "a backfill")
    assert read() == NOON
    advance((NOON + AN_HOUR).astimezone(timezone(timedelta(hours=9))), "later, elsewhere")
    assert read() == NOON + AN_HOUR
    with books.engine.connect() as connection:
        assert read_watermark(connection, "another job") is None
        run_id = connection.execute(sa.text("SELECT run_id FROM billing_orchestration.watermarks")).scalar_one()
    assert run_id == "later, elsewhere"


def test_of_watermarks_moved_at_once_the_latest_stays(books: Books) -> None:
    def advance(hours: int) -> None:
        with books.engine.begin() as connection:
            advance_watermark(connection, books.stamp(), NOON + hours * AN_HOUR)

    at_once([partial(advance, hours) for hours in (-6, -1, -8, -3, -7, -2)])
    with books.engine.connect() as connection:
        assert read_watermark(connection, "job") == NOON - AN_HOUR


def test_a_watermark_never_goes_back_but_from_the_future(books: Books) -> None:
    told = []
    for minutes in (-60, -90, 2, -30, 3, -30):
        with books.engine.begin() as connection:
            advance_watermark(connection, books.stamp(), NOON + timedelta(minutes=minutes))
            told.append(read_watermark(connection, "job"))
    assert told == [NOON + timedelta(minutes=minutes) for minutes in (-60, -60, 2, 2, 3, -30)]


def test_the_window_of_pending_rows_has_both_ends_in_it_to_the_microsecond(books: Books) -> None:
    tick = timedelta(microseconds=1)
    for created_at in (NOON - AN_HOUR - tick, NOON - AN_HOUR, NOON, NOON + tick):
        books.payment(created_at=created_at)
    books.payment("p", created_at=NOON, status="CREATED")
    with books.engine.connect() as connection:
        found = fetch_pending(connection, NOON - AN_HOUR, NOON, [])
        elsewhere = timezone(timedelta(hours=-7))
        same = fetch_pending(connection, (NOON - AN_HOUR).astimezone(elsewhere), NOON.astimezone(elsewhere), [])
    assert (found.in_window, found.without_provider_id) == (2, 2)
    assert len(found.nameless) == 2
    assert found == same


def test_a_pending_row_of_any_age_counts_when_its_payment_is_paid_there(flawed_books: Books) -> None:
    books = flawed_books
    wanted = [
        books.payment("old", created_at=NOON - 10_000 * AN_HOUR),
        books.payment("twice"),
        books.payment("twice"),
        books.payment("flawed", currency=None, method=None),
    ]
    for status in ("CREATED", "SUCCEEDED", "EXPIRED", None):
        books.payment("other", status=status)
    with books.engine.connect() as connection:
        found = fetch_pending(connection, NOON - AN_HOUR, NOON, ["old", "twice", "flawed", "other", "unknown"])
    assert [row.id for row in found.paid_there] == wanted
    assert found.paid_there[-1].money is None


def test_rows_are_found_by_id_whatever_their_status_and_age(flawed_books: Books) -> None:
    books = flawed_books
    ids = [
        books.payment("p", status=status, created_at=NOON - 9_000 * AN_HOUR)
        for status in ("CREATED", "PENDING", "SUCCEEDED", "EXPIRED", "CANCELED", "REFUNDED", None)
    ]
    books.payment(None)
    books.settle(books.paid("q"))
    with books.engine.connect() as connection:
        assert [row.id for row in fetch_rows(connection, ["p", "unknown"])] == ids
        assert fetch_rows(connection, []) == []
        assert fetch_settled(connection, ["p", "q", "unknown"]) == {"q"}
        assert fetch_settled(connection, []) == set()
