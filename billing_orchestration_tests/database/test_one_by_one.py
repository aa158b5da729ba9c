"""Together in one transaction, and if that fails, each alone: on a real table with a constraint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import sqlalchemy as sa

from billing_orchestration.database.engine import begin, create_engine
from billing_orchestration.database.errors import AccessDenied, DatabaseUnavailable, SchemaProblem
from billing_orchestration.database.one_by_one import NotWritten, one_by_one


class Notes:
    """A table of numbers that refuses negative ones and repeated ones. It counts the transactions."""

    def __init__(self, url: str) -> None:
        self.engine = create_engine(url, session={"lock_timeout": "50ms"})
        self.asked: list[list[int]] = []
        with self.engine.begin() as connection:
            connection.execute(sa.text("CREATE TABLE notes (number int PRIMARY KEY CHECK (number >= 0))"))

    def write(self, numbers: Sequence[int]) -> int:
        self.asked.append(list(numbers))
        with begin(self.engine) as connection:
            for number in numbers:
                connection.execute(sa.text("INSERT INTO notes VALUES (:number)"), {"number": number})
        return len(numbers)

    def written(self) -> list[int]:
        with self.engine.connect() as connection:
            return list(connection.scalars(sa.text("SELECT number FROM notes ORDER BY number")))


@pytest.fixture
def notes(database_url: str) -> Iterator[Notes]:
    notes = Notes(database_url)
    yield notes
    notes.engine.dispose()


def test_what_is_in_order_is_written_in_one_transaction(notes: Notes) -> None:
    assert list(one_by_one([1, 2, 3], notes.write)) == [([1, 2, 3], 3)]
    assert notes.asked == [[1, 2, 3]]
    assert list(one_by_one([], notes.write)) == []


def test_a_row_that_the_database_refuses_never_stops_the_others(notes: Notes) -> None:
    (one, first), (refused, reason), (three, last) = one_by_one([1, -2, 3], notes.write)

    assert (one, first, refused, three, last) == ([1], 1, [-2], [3], 1)
    assert isinstance(reason, NotWritten)
    assert reason.for_good
    assert "notes_number_check" in reason.reason
    assert notes.written() == [1, 3]


def test_parts_are_tried_before_single_rows(notes: Notes) -> None:
    results = {tuple(part): result for part, result in one_by_one([1, 2, 3, -4, 5], notes.write, part_size=2)}

    assert results[1, 2] == 2
    assert isinstance(results[-4,], NotWritten)
    assert notes.asked == [[1, 2, 3, -4, 5], [1, 2], [3, -4], [3], [-4], [5]]
    assert notes.written() == [1, 2, 3, 5]


def test_a_busy_row_is_tried_again_and_then_named_for_another_run(notes: Notes) -> None:
    with notes.engine.begin() as other:
        other.execute(sa.text("INSERT INTO notes VALUES (2)"))  # not committed: whoever writes it as well has to wait
        (_, one), (_, two) = one_by_one([1, 2], notes.write, tries=2)

    assert one == 1
    assert isinstance(two, NotWritten)
    assert not two.for_good
    assert "busy" in two.reason
    assert notes.asked == [[1, 2], [1], [2], [2]]


def test_a_row_that_a_concurrent_writer_has_just_written_is_decided_anew(notes: Notes) -> None:
    notes.write([2])

    def write(numbers: Sequence[int]) -> int:
        return notes.write([number for number in numbers if len(notes.asked) < 4 or number not in notes.written()])

    assert list(one_by_one([1, 2], write)) == [([1], 1), ([2], 0)]


def test_a_value_that_no_row_can_hold_is_that_rows_fault(notes: Notes) -> None:
    def write(numbers: Sequence[int]) -> int:
        return notes.write([10 // number for number in numbers]) if 0 not in numbers else int("zero")

    (_, failed), (_, done) = one_by_one([0, 5], write)

    assert failed == NotWritten("ValueError: invalid literal for int() with base 10: 'zero'", for_good=True)
    assert done == 1


@pytest.mark.parametrize("error", [DatabaseUnavailable("gone"), AccessDenied("not allowed"), SchemaProblem("no table")])
def test_what_is_about_every_row_is_raised_at_once(error: Exception) -> None:
    asked: list[list[int]] = []

    def write(numbers: Sequence[int]) -> int:
        asked.append(list(numbers))
        raise error

    with pytest.raises(type(error)):
        list(one_by_one([1, 2], write))
    with pytest.raises(type(error)):
        list(one_by_one([3], write))
    assert asked == [[1, 2], [3]]


def test_a_fault_of_our_own_is_not_hidden(notes: Notes) -> None:
    def write(numbers: Sequence[int]) -> int:
        raise KeyError("a fault in the code")

    with pytest.raises(KeyError):
        list(one_by_one([1, 2], write))
