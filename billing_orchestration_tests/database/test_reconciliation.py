"""Reconciliation's statements: our side of a day, whatever the service's table holds, and what a day came to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from datetime import date, datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from billing_orchestration.database.audit import Problem, open_problems
from billing_orchestration.database.conventions import session_of_shop
from billing_orchestration.database.engine import create_engine
from billing_orchestration.database.reconciliation import (
    close_agreed,
    fetch_rows_of,
    fetch_rows_of_day,
    lock_rows,
    open_of_books,
    record_day,
    settled_row,
    states_of,
)
from billing_orchestration.domain.billing_calendar import BillingCalendar
from billing_orchestration.domain.reconciled import Day
from billing_orchestration.domain.reconciliation import here_frame
from billing_orchestration_tests.books import NOON, Books

UTC = timezone.utc
MOMENT = timedelta(microseconds=1)
A_DAY = timedelta(days=1)


def day_of(text: str = "2026-03-12", zone: str = "UTC") -> Day:
    return Day.of(date.fromisoformat(text), BillingCalendar(ZoneInfo(zone)))


def of_day(books: Books, day: Day | None = None) -> list[Any]:
    """The rows of a day, oldest first, as the comparison reads them."""
    with books.engine.connect() as connection:
        rows = fetch_rows_of_day(connection, day or day_of())
    here_frame(rows)
    return sorted(rows)


def of_ids(books: Books, *payment_ids: str, rows: tuple[int, ...] = ()) -> list[Any]:
    with books.engine.connect() as connection:
        return sorted(fetch_rows_of(connection, payment_ids, rows))


def ids(rows: list[Any]) -> list[int]:
    return [row[0] for row in rows]


@pytest.mark.parametrize(("zone", "day", "hours"), [
    ("UTC", "2026-03-12", 24),
    ("Europe/Moscow", "2026-03-12", 24),
    ("Asia/Kamchatka", "2026-03-12", 24),
    ("Europe/Berlin", "2026-03-29", 23),
    ("Europe/Berlin", "2026-10-25", 25),
    # Its clocks go forward at midnight: the day has no 00:00.
    ("America/Santiago", "2026-09-06", 23),
])  # fmt: skip
def test_a_day_begins_and_ends_by_the_clocks_of_its_zone(books: Books, zone: str, day: str, hours: int) -> None:
    wanted = day_of(day, zone)
    assert wanted.end - wanted.start == timedelta(hours=hours)
    books.payment("before", created_at=wanted.start - MOMENT)
    first = books.payment("first", created_at=wanted.start)
    last = books.payment("last", created_at=wanted.end - MOMENT)
    books.payment("after", created_at=wanted.end)
    assert ids(of_day(books, wanted)) == [first, last]


def test_the_border_of_a_moscow_day_is_at_21_00_utc(books: Books) -> None:
    row = books.payment("late", created_at=datetime(2026, 3, 11, 21, 0, tzinfo=UTC))
    assert ids(of_day(books, day_of("2026-03-12", "Europe/Moscow"))) == [row]
    assert ids(of_day(books, day_of("2026-03-11"))) == [row]


def touch(books: Books, row: int, at: str | None, column: str = "updated_at") -> int:
    books.execute(f"UPDATE payments SET {column} = CAST(:at AS timestamp) WHERE id = :id", at=at, id=row)
    return row


def test_a_row_is_of_the_day_on_which_it_was_created_or_last_changed(books: Books) -> None:
    both = books.payment("both", created_at=NOON)
    created = touch(books, books.payment("created", created_at=NOON), "2026-03-20 00:00")
    changed = touch(books, books.payment("changed", created_at=NOON - 9 * A_DAY), "2026-03-12 23:59:59.999999")
    touch(books, books.payment("around it", created_at=NOON - A_DAY), "2026-03-13 00:00")
    assert ids(of_day(books)) == [both, created, changed]


@pytest.mark.parametrize("status", ["CREATED", "PENDING", "SUCCEEDED", "EXPIRED", "CANCELED", "REFUNDED", None])
def test_rows_are_read_whatever_their_status(books: Books, status: str | None) -> None:
    row = books.payment("pay", status=status, created_at=NOON, amount="1299.05", currency="EUR")
    at = NOON.replace(tzinfo=None)
    assert of_day(books) == of_ids(books, "pay") == [(row, "pay", status, 129905, "EUR", False, at)]


def test_a_payment_is_looked_up_with_all_rows_that_name_it_however_old(flawed_books: Books) -> None:
    books = flawed_books
    rows = [books.payment("twice", created_at=NOON - n * 400 * A_DAY) for n in (0, 1)]
    other = books.payment("other", created_at=NOON)
    books.payment(None, created_at=NOON)
    assert ids(of_ids(books, "twice", "unknown")) == rows
    assert ids(of_ids(books, "unknown", rows=(other, 4711))) == [other]
    # More than one statement's worth.
    assert ids(of_ids(books, *(f"unknown {n}" for n in range(5000)), "other")) == [other]
    assert of_ids(books) == []


# --- what real tables hold ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("created_at", "updated_at", "at"), [
    (None, "2026-03-12 12:00", "2026-03-12 12:00"),
    ("infinity", "2026-03-12 12:00", "2026-03-12 12:00"),
    ("2826-03-12", "2026-03-12 12:00", "2026-03-12 12:00"),
    ("-infinity", "2026-03-12 12:00", "2000-01-01"),
    ("0044-03-15 BC", "2026-03-12 12:00", "2000-01-01"),
    ("2026-03-12 12:00", None, "2026-03-12 12:00"),
    ("2026-03-12 12:00", "infinity", "2026-03-12 12:00"),
])  # fmt: skip
def test_a_date_that_is_none_leaves_the_row_in_its_day(
    books: Books, created_at: str | None, updated_at: str | None, at: str
) -> None:
    """A row is at the latest of the day on which it was last changed, so some day's comparison is about it."""
    for column in ("created_at", "updated_at"):
        books.execute(f"ALTER TABLE payments ALTER {column} DROP NOT NULL")
    row = books.payment("pay", created_at=NOON)
    touch(books, row, created_at, "created_at")
    touch(books, row, updated_at)
    [found] = of_day(books)
    assert (found[0], found[6]) == (row, datetime.fromisoformat(at))
    assert of_ids(books, "pay") == [found]


def test_a_row_without_any_date_can_be_looked_up(books: Books) -> None:
    row = books.payment("pay", created_at=NOON)
    for column in ("created_at", "updated_at"):
        books.execute(f"ALTER TABLE payments ALTER {column} DROP NOT NULL")
        touch(books, row, None, column)
    assert of_day(books) == []
    [found] = of_ids(books, "pay")
    assert found[6] == datetime(2000, 1, 1)  # noqa: DTZ001 - as the column holds it


@pytest.mark.parametrize("amount", ["NaN", "Infinity", "-Infinity", "1e40", None])
def test_an_amount_that_is_none_is_no_money(books: Books, amount: str | None) -> None:
    books.execute(
        "ALTER TABLE payments DROP CONSTRAINT payments_amount_check, ALTER amount TYPE numeric,"
        " ALTER amount DROP NOT NULL"
    )
    row = books.payment("pay", created_at=NOON)
    books.execute("UPDATE payments SET amount = CAST(:amount AS numeric) WHERE id = :id", amount=amount, id=row)
    [found] = of_day(books)
    assert found[3] == 0


@pytest.mark.parametrize("blank", ["", " "])
def test_rows_with_a_blank_id_are_rows_without_one(flawed_books: Books, blank: str) -> None:
    """As one payment they would be one line, and all but the first would be swallowed."""
    for _ in range(2):
        flawed_books.payment(blank, status="SUCCEEDED", created_at=NOON)
    rows = of_day(flawed_books)
    assert [row[1] for row in rows] == [None, None]
    assert here_frame(rows)["payment_id"].nunique() == 2


# --- several shops ------------------------------------------------------------------------------------------------


@contextmanager
def shop(books: Books, *provider_ids: int) -> Iterator[Books]:
    """The same books, in sessions of one shop's."""
    url = books.engine.url.render_as_string(hide_password=False)
    engine = create_engine(url, session=session_of_shop(",".join(map(str, provider_ids))))
    try:
        view = copy(books)
        view.engine = engine
        yield view
    finally:
        engine.dispose()


def test_rows_of_a_day_are_this_shops(flawed_books: Books) -> None:
    books = flawed_books
    at = NOON.replace(tzinfo=None)
    second, third = (
        books.insert("payment_providers", name=name, is_active=True, created_at=at, updated_at=at)
        for name in ("second", "third")
    )
    mine = books.payment("mine", created_at=NOON)
    too = books.payment("mine too", created_at=NOON, provider_id=second)
    theirs = books.payment("theirs", created_at=NOON, provider_id=third)
    books.payment("mine", created_at=NOON, provider_id=third)
    with shop(books, books.provider_id, second) as view:
        assert ids(of_day(view)) == [mine, too]
        # By the provider's id another shop's row counts where this shop has none.
        assert ids(of_ids(view, "mine", "mine too", "theirs")) == [mine, too, theirs]
    with shop(books, third) as view:
        assert len(of_day(view)) == 2
    assert len(of_day(books)) == 4


def test_only_this_shops_rows_take_the_providers_truth(flawed_books: Books) -> None:
    books = flawed_books
    at = NOON.replace(tzinfo=None)
    other = books.insert("payment_providers", name="other", is_active=True, created_at=at, updated_at=at)
    mine = [books.payment("pay", created_at=NOON) for _ in range(2)]
    theirs = books.payment("pay", created_at=NOON, provider_id=other)
    with shop(books, books.provider_id) as view, view.engine.begin() as connection:
        assert [row.id for row in lock_rows(connection, "pay", None)] == mine
        assert [row.id for row in lock_rows(connection, None, mine[1])] == [mine[1]]
        assert lock_rows(connection, None, theirs) == []


# --- entries, and what a day came to ------------------------------------------------------------------------------


def test_entries_about_books_are_closed_once_and_told_in_the_audit_trail(books: Books) -> None:
    of_books = Problem("payment a", "amount_differs", "differs", external_payment_id="a", evidence={"books": {}})
    others = [
        Problem("payment b", "metadata", "odd", external_payment_id="b"),
        Problem("payment c", "not_paid_there", "unpaid", evidence={"books": {}}),
    ]
    with books.engine.begin() as connection:
        open_problems(connection, books.stamp(), [of_books, *others])
        waiting = open_of_books(connection)
        assert [key for _, key in waiting] == [of_books.key, others[1].key]
        assert states_of(connection, [of_books.key, "payment x:metadata"]) == {of_books.key: True}
        entry = waiting[0][0]
        assert close_agreed(connection, books.stamp(), [entry]) == 1
        assert close_agreed(connection, books.stamp(), [entry]) == 0
        assert close_agreed(connection, books.stamp(), []) == 0
    [closed] = books.rows("audit_trail", "action = 'resolved'")
    assert (closed.entity, closed.entity_id, closed.external_payment_id) == ("quarantine", str(entry), "a")
    with books.engine.connect() as connection:
        # Closed because the books agree: the same difference, found again, is one that nobody knows of.
        assert states_of(connection, [of_books.key, others[0].key]) == {others[0].key: True}


@pytest.mark.parametrize(("word", "state"), [("ignored", False), ("accepted", False), ("settled", None)])
def test_a_persons_last_word_is_remembered(books: Books, word: str, state: bool | None) -> None:
    problem = Problem("payment a", "amount_differs", "differs", evidence={"books": {}})
    with books.engine.begin() as connection:
        open_problems(connection, books.stamp(), [problem])
    books.execute(
        "UPDATE billing_orchestration.quarantine SET resolved_at = now(), resolution = :word, resolved_by = 'vera',"
        " resolution_reason = 'seen'",
        word=word,
    )
    with books.engine.begin() as connection:
        assert states_of(connection, [problem.key]).get(problem.key) is state
        assert open_of_books(connection) == []


def test_the_last_run_says_how_a_day_stands(books: Books) -> None:
    for run, (lines, differences, unexplained) in {"first": (3, 2, 1), "second": (4, 0, 0)}.items():
        with books.engine.begin() as connection:
            record_day(
                connection,
                books.stamp(run),
                day_of(zone="Europe/Moscow"),
                lines=lines,
                differences=differences,
                unexplained=unexplained,
            )
    [day] = books.rows("reconciled_days")
    assert (day.run_id, day.lines, day.differences, day.unexplained) == ("second", 4, 0, 0)
    assert (day.day, day.ends_at - day.starts_at) == (date(2026, 3, 12), A_DAY)
    assert day.starts_at == datetime(2026, 3, 11, 21, 0, tzinfo=UTC)


def test_a_settlement_names_its_row(books: Books) -> None:
    payment = books.paid("bought")
    books.settle(payment)
    [row] = books.rows("payments")
    with books.engine.connect() as connection:
        assert settled_row(connection, "bought") == row.id
        assert settled_row(connection, "unknown") is None
