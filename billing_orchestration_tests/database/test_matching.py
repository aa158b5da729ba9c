"""The slices of the matching jobs, and how far each job has covered time (its watermark)."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import sqlalchemy as sa

from billing_orchestration.database.matching import (
    fetch_pending,
    fetch_rows,
    fetch_settled,
    move_watermark,
    read_watermark,
)
from billing_orchestration_tests.books import NOON, Books
from billing_orchestration_tests.waiting import at_once

AN_HOUR = timedelta(hours=1)


def test_a_watermark_moves_only_from_where_it_was_seen(books: Books) -> None:
    def move(seen: datetime | None, to: datetime, run_id: str) -> None:
        with books.engine.begin() as connection:
            move_watermark(connection, books.stamp(run_id), seen, to)

    def read() -> datetime | None:
        with books.engine.connect() as connection:
            return read_watermark(connection, "job")

    assert read() is None
    move(None, NOON, "first")
    move(None, NOON + AN_HOUR, "another first")
    move(NOON - AN_HOUR, NOON + AN_HOUR, "one that has seen an older one")
    assert read() == NOON
    move(NOON, NOON - AN_HOUR, "one that has left something")
    assert read() == NOON - AN_HOUR
    elsewhere = timezone(timedelta(hours=9))
    move((NOON - AN_HOUR).astimezone(elsewhere), (NOON + AN_HOUR).astimezone(elsewhere), "later, elsewhere")
    assert read() == NOON + AN_HOUR
    with books.engine.connect() as connection:
        assert read_watermark(connection, "another job") is None
        run_id = connection.execute(sa.text("SELECT run_id FROM billing_orchestration.watermarks")).scalar_one()
    assert run_id == "later, elsewhere"


def test_two_runs_move_one_watermark_one_after_the_other(books: Books) -> None:
    with books.engine.begin() as connection:
        move_watermark(connection, books.stamp(), None, NOON)

    def move_on() -> None:
        with books.engine.begin() as connection:
            seen = read_watermark(connection, "job", lock=True)
            assert seen is not None
            move_watermark(connection, books.stamp(), seen, seen + AN_HOUR)

    at_once([move_on] * 6)
    with books.engine.connect() as connection:
        assert read_watermark(connection, "job") == NOON + 6 * AN_HOUR


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
