"""Together in one transaction, and if that fails, each alone: on a real table with a constraint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import sqlalchemy as sa

from billing_orchestration.database.engine import begin, create_engine
from billing_orchestration.database.errors import (
    AccessDenied,
    BillingDatabaseError,
    DatabaseFull,
    DatabaseUnavailable,
    SchemaProblem,
)
from billing_orchestration.database.one_by_one import FEW, NotWritten, Witnesses, one_by_one


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

    def refuse(self, condition: str, sqlstate: str) -> None:
        """A trigger raises this code for the rows that meet a condition."""
        with self.engine.begin() as connection:
            connection.exec_driver_sql(f"""
                CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
                $$ BEGIN IF {condition} THEN RAISE 'not this one' USING ERRCODE = '{sqlstate}'; END IF;
                RETURN NEW; END $$
            """)
            connection.exec_driver_sql(
                "CREATE TRIGGER refuse BEFORE INSERT ON notes FOR EACH ROW EXECUTE FUNCTION refuse()"
            )

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


# One code of each class that a trigger can raise (PostgreSQL's appendix A), and two that are somebody's own.
CODES = """
    01000 02000 03000 08006 09000 0A000 0B000 0F000 0L000 0P000 0Z000 20000 21000 22012 23514 24000 25006 26000 27000
    28000 2B000 2D000 2F005 34000 38000 39000 3B000 3D000 3F000 40002 42501 42883 42P01 44000 53100 53200 53300 54001
    55000 57000 57P01 58030 72000 F0000 HV000 P0001 XX000 XX001 ZZ999 45000
"""


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("code", CODES.split())
def test_whatever_a_trigger_raises_for_one_row_is_that_rows_fault(notes: Notes, code: str, first: bool) -> None:
    notes.refuse("NEW.number = 7", code)
    numbers = [7, 1, 2, 3] if first else [1, 2, 3, 7]

    results = {part[0]: result for part, result in one_by_one(numbers, notes.write, tries=1)}

    assert notes.written() == [1, 2, 3]
    refused = results.pop(7)
    assert isinstance(refused, NotWritten)
    assert refused.for_good
    assert "not this one" in refused.reason
    assert results == {1: 1, 2: 1, 3: 1}


@pytest.mark.parametrize(
    "code", ["08006", "25006", "28000", "3D000", "3F000", "42501", "42P01", "53200", "57000", "58030"]
)
def test_a_code_of_the_databases_that_the_first_few_meet_alike_stops_the_run(notes: Notes, code: str) -> None:
    notes.refuse("true", code)

    with pytest.raises(BillingDatabaseError, match="not this one") as raised:
        list(one_by_one(range(1, 100), notes.write, tries=1))

    assert raised.value.sqlstate == code
    assert len(notes.asked) == 1 + FEW


def test_what_the_last_few_meet_alike_stops_the_run_although_others_went_through(notes: Notes) -> None:
    notes.refuse("NEW.number >= 5", "53100")

    with pytest.raises(DatabaseFull, match="Free disk space"):
        list(one_by_one(range(1, 100), notes.write, tries=1))

    assert notes.written() == [1, 2, 3, 4]


def test_a_doubt_that_no_other_row_settles_is_left_to_the_next_run_until_a_few_of_a_run_meet_it(notes: Notes) -> None:
    notes.refuse("NEW.number >= 5", "42P01")
    witnesses = Witnesses()

    for number in (5, 6):
        [(_, refused)] = one_by_one([number], notes.write, tries=1, witnesses=witnesses)
        assert isinstance(refused, NotWritten)
        assert not refused.for_good
    with pytest.raises(SchemaProblem, match="not this one"):
        list(one_by_one([7], notes.write, tries=1, witnesses=witnesses))


def test_a_value_that_stays_in_use_is_that_rows_fault(notes: Notes) -> None:
    notes.write([2])

    (_, refused), (_, one) = one_by_one([2, 1], notes.write)

    assert isinstance(refused, NotWritten)
    assert refused.for_good
    assert one == 1


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
