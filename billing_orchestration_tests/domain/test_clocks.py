"""The three clocks: how far they are apart, whom that condemns, and when it is said or forbids."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing_orchestration.domain.clocks import DATE_RESOLUTION, Clocks, Readings, is_in_future, offset_of
from billing_orchestration_tests.domain.given import HOUR, NOW

MINUTE = timedelta(minutes=1)
SECOND = timedelta(seconds=1)
NONE = timedelta(0)


# --- one reading


@pytest.mark.parametrize(
    ("told", "duration", "offset"),
    [
        (NOW, NONE, NONE),
        # Rounded down to a second: it may have been any moment of that second.
        (NOW - SECOND / 2, NONE, NONE),
        (NOW - SECOND, NONE, NONE),
        (NOW - 2 * SECOND, NONE, -SECOND),
        (NOW + 2 * SECOND, NONE, 2 * SECOND),
        # Told at some moment of a request that took 40 s.
        (NOW, 40 * SECOND, NONE),
        (NOW - 40 * SECOND, 40 * SECOND, NONE),
        (NOW + SECOND, 40 * SECOND, SECOND),
        (NOW - 42 * SECOND, 40 * SECOND, -SECOND),
        (NOW + 3 * HOUR, 40 * SECOND, 3 * HOUR),
    ],
)
def test_a_reading_is_held_against_a_clock_only_as_far_as_duration_and_rounding_leave_no_doubt(
    told: datetime, duration: timedelta, offset: timedelta
) -> None:
    assert offset_of(told, NOW, duration, DATE_RESOLUTION) == offset


@settings(max_examples=200, deadline=None)
@given(ahead=st.timedeltas(-3 * HOUR, 3 * HOUR), duration=st.timedeltas(NONE, MINUTE), share=st.floats(0, 1))
def test_a_clock_is_never_said_to_be_further_off_than_it_is(
    ahead: timedelta, duration: timedelta, share: float
) -> None:
    there = NOW - duration * share + ahead
    offset = offset_of(there.replace(microsecond=0), NOW, duration, DATE_RESOLUTION)
    assert abs(offset) <= abs(ahead) + timedelta(microseconds=2)
    assert abs(offset) >= abs(ahead) - duration - DATE_RESOLUTION - timedelta(microseconds=2)
    assert offset == NONE or (offset > NONE) is (ahead > NONE)


# --- several readings


def readings(*offsets: timedelta) -> Readings:
    noted = Readings()
    for offset in offsets:
        noted.note(offset)
    return noted


def test_of_several_answers_the_least_suspicious_counts() -> None:
    assert readings().offset is None
    assert readings(3 * HOUR).offset == 3 * HOUR
    assert readings(3 * HOUR, -MINUTE, 2 * MINUTE).offset == -MINUTE
    # Only the last three: a clock may be set while a run is under way.
    assert readings(NONE, HOUR, 2 * HOUR, 3 * HOUR).offset == HOUR


@pytest.mark.parametrize(
    ("offsets", "suspicious", "settled"),
    [
        ((), False, False),
        ((NONE,), False, True),
        ((5 * MINUTE,), False, True),
        ((6 * MINUTE,), True, False),
        ((NONE, NONE, 6 * MINUTE), True, False),
        ((NONE, 6 * MINUTE, -6 * MINUTE), True, False),
        ((6 * MINUTE, 6 * MINUTE, NONE), False, True),
        ((HOUR, HOUR, HOUR), True, True),
        ((NONE, HOUR, HOUR, HOUR), True, True),
    ],
)
def test_one_odd_answer_condemns_no_clock_and_three_do(
    offsets: tuple[timedelta, ...], suspicious: bool, settled: bool
) -> None:
    noted = readings(*offsets)
    assert (noted.is_suspicious, noted.is_settled) == (suspicious, settled)


# --- the verdict


@pytest.mark.parametrize(
    ("database", "provider", "agree", "trusted"),
    [
        (NONE, NONE, True, True),
        (2 * MINUTE, NONE, True, True),
        (2 * MINUTE + SECOND, NONE, False, True),
        (NONE, -2 * MINUTE - SECOND, False, True),
        (5 * MINUTE, None, False, True),
        (5 * MINUTE + SECOND, None, False, False),
        (None, -5 * MINUTE - SECOND, False, False),
        # Each is near ours, and they are apart from each other.
        (-3 * MINUTE, 3 * MINUTE, False, False),
        (None, None, True, True),
    ],
)
def test_two_minutes_are_said_and_five_forbid(
    database: timedelta | None, provider: timedelta | None, agree: bool, trusted: bool
) -> None:
    clocks = Clocks(database, provider)
    assert (clocks.agree, clocks.may_be_trusted) == (agree, trusted)


@pytest.mark.parametrize(
    ("clocks", "words"),
    [
        (
            Clocks(-3 * HOUR, -3 * HOUR),
            "this machine's clock is 3 h ahead of PostgreSQL's clock and the provider's clock: set it by NTP",
        ),
        (
            Clocks(90 * MINUTE, 90 * MINUTE + SECOND),
            "this machine's clock is 1 h 30 min behind PostgreSQL's clock and the provider's clock: set it by NTP",
        ),
        (
            Clocks(NONE, -(6 * MINUTE + 12 * SECOND)),
            "the provider's clock is 6 min 12 s behind this machine's clock and PostgreSQL's clock: set it by NTP",
        ),
        (
            Clocks(49 * HOUR, SECOND),
            "PostgreSQL's clock is 2 days 59 min ahead of this machine's clock and the provider's clock: set it by NTP",
        ),
        (
            Clocks(-HOUR, HOUR),
            "the provider's clock is 2 h ahead of PostgreSQL's clock, and which of them is wrong cannot be told: set"
            " them by NTP",
        ),
        (
            Clocks(-HOUR, None),
            "this machine's clock is 1 h ahead of PostgreSQL's clock, and which of them is wrong cannot be told; the"
            " provider's is not known: set them by NTP",
        ),
        (Clocks(NONE, SECOND), "this machine's clock, PostgreSQL's clock and the provider's clock agree"),
        (
            Clocks(NONE, None),
            "this machine's clock and PostgreSQL's clock agree; the provider's is not known",
        ),
    ],
)
def test_the_words_name_the_clock_that_differs_from_two_which_agree(clocks: Clocks, words: str) -> None:
    assert str(clocks) == words


@settings(max_examples=200, deadline=None)
@given(
    machine=st.timedeltas(-3 * HOUR, 3 * HOUR),
    wrong=st.sampled_from(["this machine's", "PostgreSQL's", "the provider's"]),
)
def test_whichever_clock_is_wrong_it_is_the_one_that_is_named(machine: timedelta, wrong: str) -> None:
    if wrong == "this machine's":
        clocks = Clocks(-machine, -machine)
    else:
        clocks = Clocks(machine if wrong == "PostgreSQL's" else NONE, machine if wrong == "the provider's" else NONE)
    assert clocks.apart == abs(machine)
    if not clocks.agree:
        word = "ahead of" if machine > NONE else "behind"
        assert str(clocks).startswith(f"{wrong} clock is ")
        assert word in str(clocks)


# --- instants


def test_an_instant_is_in_the_future_where_it_is_further_ahead_than_clocks_may_differ() -> None:
    assert not is_in_future(NOW, NOW)
    assert not is_in_future(NOW + 2 * MINUTE, NOW)
    assert is_in_future(NOW + 2 * MINUTE + SECOND, NOW)
