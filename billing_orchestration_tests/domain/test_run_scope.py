"""What a run stands for: `as_of`, partitions, and windows that never leave a hole whatever happens between two runs."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from billing_orchestration.domain.run_scope import (
    CATCH_UP_OVERLAP,
    LONGEST_CATCH_UP,
    MATCHING_WINDOW,
    RunRefused,
    Window,
    as_of_partition,
    check_max_changes,
    covering_window,
    guard_verdict,
    next_watermark,
    over_limit,
    parse_as_of,
)
from billing_orchestration_tests.domain.given import DAY, FIRST_MOMENT, HOUR, NOW, UTC, a_scope, at, calendar_of

MINUTE = timedelta(minutes=1)


# --- as_of


@pytest.mark.parametrize(
    ("text", "instant"),
    [
        ("2026-03-05T03:00:00Z", datetime(2026, 3, 5, 3, tzinfo=UTC)),
        ("2026-03-05T03:00:00z", datetime(2026, 3, 5, 3, tzinfo=UTC)),
        ("2026-03-05T03:00:00+00:00", datetime(2026, 3, 5, 3, tzinfo=UTC)),
        ("2026-03-05T06:00:00+03:00", datetime(2026, 3, 5, 3, tzinfo=UTC)),
        ("2026-03-04 22:00:00-05:00", datetime(2026, 3, 5, 3, tzinfo=UTC)),
        ("2026-03-05T03:00:00.123456+00:00", datetime(2026, 3, 5, 3, 0, 0, 123456, tzinfo=UTC)),
        ("2026-03-12T03:00:00Z", NOW),
    ],
)
def test_as_of_is_an_instant_with_an_offset(text: str, instant: datetime) -> None:
    as_of = parse_as_of(text, NOW)
    assert as_of == instant
    assert as_of.tzinfo is UTC


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("2026-03-05T03:00:00", "no time zone"),
        ("2026-03-05", "no time zone"),
        ("yesterday", "is not an instant"),
        ("", "is not an instant"),
        ("Z", "is not an instant"),
        ("2026-02-30T03:00:00Z", "is not an instant"),
        ("2026-03-05T25:00:00Z", "is not an instant"),
        ("2026-03-05T03:00:00+99:00", "is not an instant"),
        ("1772668800", "is not an instant"),
        ("2026-03-12T03:00:00.000001Z", "in the future"),
        ("2026-03-12T07:00:00+03:00", "in the future"),
        ("9999-12-31T23:59:59-23:00", "in the future"),
        # Far from anything that was ever billed, and at the edge of what can be computed with.
        ("0001-01-01T00:00:00+14:00", "before"),
        ("0001-01-01T00:00:00Z", "before"),
        ("1970-01-01T00:00:00Z", "before"),
    ],
)
def test_an_as_of_that_is_naive_unparsable_or_impossible_is_refused_with_the_way_out(text: str, word: str) -> None:
    with pytest.raises(RunRefused, match=word) as refusal:
        parse_as_of(text, NOW)
    assert repr(text) in str(refusal.value)
    assert str(refusal.value).endswith("Nothing was read or written")
    assert "\n" not in str(refusal.value)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_whatever_as_of_holds_it_is_an_instant_or_refused(text: str) -> None:
    try:
        as_of = parse_as_of(text, NOW)
    except RunRefused:
        return
    assert as_of <= NOW


@settings(max_examples=50, deadline=None)
@given(
    st.datetimes(FIRST_MOMENT, (NOW - DAY).replace(tzinfo=None)),
    st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes))),
)
def test_an_as_of_reads_back_as_it_was_written(moment: datetime, zone: timezone) -> None:
    instant = moment.replace(tzinfo=zone)
    assert parse_as_of(instant.isoformat(), NOW) == instant


@pytest.mark.parametrize("max_changes", [None, 0, 1, 10**9])
def test_max_changes_may_be_zero_or_left_out(max_changes: int | None) -> None:
    assert check_max_changes(max_changes) == max_changes


def test_a_negative_max_changes_is_refused() -> None:
    with pytest.raises(RunRefused, match="max_changes is -1"):
        check_max_changes(-1)


@pytest.mark.parametrize(
    ("changes", "active", "stops"),
    [
        (0, 0, False),
        (100, 100, False),  # all of them, but not more than a hundred
        (101, 101, True),
        (101, 505, False),  # exactly a fifth is not more than a fifth
        (101, 504, True),
        (102, 505, True),
        (200_000, 1_000_000, False),
        (200_001, 1_000_000, True),
    ],
)
def test_a_run_that_would_expire_more_than_a_fifth_and_more_than_a_hundred_stops(
    changes: int, active: int, stops: bool
) -> None:
    verdict = guard_verdict(changes, active, None)
    assert (verdict is not None) is stops
    if verdict is not None:
        # A stopped run says what it would have done and how to go on.
        assert f"would expire {changes} of {active} ACTIVE subscriptions" in verdict
        assert f"max_changes: {changes}" in verdict


@settings(max_examples=200, deadline=None)
@given(active=st.integers(0, 3_000_000), changes=st.integers(0, 3_000_000))
@example(active=5 * 35, changes=35)
def test_a_fifth_is_exact_whatever_the_number(active: int, changes: int) -> None:
    stops = guard_verdict(changes, active, None) is not None
    assert stops is (changes > 100 and Fraction(changes) > Fraction(active, 5))
    fifth = active // 5
    assert (guard_verdict(fifth, fifth * 5, None)) is None


@pytest.mark.parametrize(
    ("changes", "max_changes", "stops"),
    [(5, None, False), (0, 0, False), (1, 0, True), (5, 5, False), (6, 5, True)],
)
def test_a_run_stops_when_it_would_make_more_than_max_changes(
    changes: int, max_changes: int | None, stops: bool
) -> None:
    verdict = over_limit(changes, max_changes)
    assert (verdict is not None) is stops
    if verdict is not None:
        assert f"would make {changes} changes, max_changes is {max_changes}" in verdict
        assert f"max_changes: {changes}" in verdict


def test_an_explicit_max_changes_takes_the_guards_place_in_both_directions() -> None:
    assert guard_verdict(500, 500, max_changes=500) is None
    assert guard_verdict(500, 500, max_changes=499) is not None
    assert guard_verdict(2, 1_000_000, max_changes=1) is not None


# --- Partitions


def test_a_daily_partition_stands_for_the_last_instant_of_its_billing_day() -> None:
    for zone in ("UTC", "Europe/Moscow", "America/New_York", "Asia/Kolkata"):
        billing = calendar_of(zone)
        day = billing.day_of(at("2026-03-05T12:00", zone))
        as_of = as_of_partition(billing.start_of(day), billing.end_of(day), NOW, last_instant=True)
        assert as_of == billing.end_of(day) - timedelta(microseconds=1)
        assert billing.day_of(as_of) == day


def test_an_hourly_partition_stands_for_its_end_so_that_its_window_is_that_hour() -> None:
    start = NOW - 5 * HOUR
    as_of = as_of_partition(start, start + HOUR, NOW, last_instant=False)
    assert covering_window(a_scope(as_of, heals=False), None, NOW) == Window(start, start + HOUR)


def test_the_partition_that_is_under_way_stands_for_now() -> None:
    for last_instant in (True, False):
        assert as_of_partition(NOW - 3 * HOUR, NOW + 21 * HOUR, NOW, last_instant=last_instant) == NOW
    assert as_of_partition(NOW, NOW + HOUR, NOW, last_instant=False) == NOW


def test_a_partition_of_the_future_is_refused() -> None:
    with pytest.raises(RunRefused, match="in the future"):
        as_of_partition(NOW + timedelta(microseconds=1), NOW + DAY, NOW, last_instant=True)


# --- Windows and watermarks


def test_without_an_outage_a_run_covers_the_last_hour() -> None:
    assert covering_window(a_scope(), None, NOW) == Window(NOW - HOUR, NOW)
    assert covering_window(a_scope(), NOW - 2 * MINUTE, NOW) == Window(NOW - HOUR, NOW)
    assert covering_window(a_scope(), NOW - HOUR + CATCH_UP_OVERLAP, NOW) == Window(NOW - HOUR, NOW)
    # A tick that waited in the queue while a later one ran.
    assert covering_window(a_scope(), NOW + HOUR, NOW + HOUR) == Window(NOW - HOUR, NOW)
    # Two machines' clocks may differ a little.
    assert covering_window(a_scope(), NOW + 2 * MINUTE, NOW) == Window(NOW - HOUR, NOW)


def test_a_watermark_in_the_future_is_not_trusted_and_a_tick_reaches_back_seven_days() -> None:
    for ahead in (2 * MINUTE + timedelta(microseconds=1), 3 * HOUR, 30 * DAY):
        scope, watermark = a_scope(), NOW + ahead
        window = covering_window(scope, watermark, NOW)
        assert window == Window(NOW - LONGEST_CATCH_UP, NOW)
        assert next_watermark(scope, window, watermark, NOW) == NOW
        # A chosen hour proves nothing about the others.
        chosen = a_scope(heals=False)
        assert next_watermark(chosen, covering_window(chosen, watermark, NOW), watermark, NOW) is None


def test_after_an_outage_a_run_covers_everything_since_the_last_covered_instant_minus_an_overlap() -> None:
    for outage in (61 * MINUTE, 3 * HOUR, 6 * DAY):
        assert covering_window(a_scope(), NOW - outage, NOW) == Window(NOW - outage - CATCH_UP_OVERLAP, NOW)


def test_the_overlap_is_kept_when_the_last_covered_instant_is_just_an_hour_ago() -> None:
    # What that run left to the webhook, or what the provider's list did not show it yet, lies before its end.
    for outage in (46 * MINUTE, 59 * MINUTE, HOUR):
        assert covering_window(a_scope(), NOW - outage, NOW).start == NOW - outage - CATCH_UP_OVERLAP


def test_an_outage_of_more_than_seven_days_is_covered_for_seven_and_the_rest_is_told() -> None:
    window = covering_window(a_scope(), NOW - 30 * DAY, NOW)
    assert (window.start, window.end) == (NOW - LONGEST_CATCH_UP, NOW)
    assert window.gap == (NOW - 30 * DAY - CATCH_UP_OVERLAP, NOW - LONGEST_CATCH_UP)
    assert LONGEST_CATCH_UP == 7 * DAY
    # What is just within reach is no gap.
    assert covering_window(a_scope(), NOW - 7 * DAY + CATCH_UP_OVERLAP, NOW) == Window(NOW - 7 * DAY, NOW)


def test_a_run_for_a_chosen_instant_covers_its_hour_whatever_the_watermark_says() -> None:
    for watermark in (None, NOW - 30 * DAY, NOW - 2 * HOUR, NOW, NOW + DAY):
        assert covering_window(a_scope(heals=False), watermark, NOW) == Window(NOW - MATCHING_WINDOW, NOW)


def test_the_watermark_moves_to_the_end_of_what_a_healing_run_covered() -> None:
    for watermark in (None, NOW - 30 * DAY, NOW - 3 * HOUR, NOW - 2 * MINUTE):
        scope = a_scope()
        assert next_watermark(scope, covering_window(scope, watermark, NOW), watermark, NOW) == NOW


def test_the_watermark_stays_behind_what_was_left_and_goes_back_to_it() -> None:
    for watermark, left in ((None, HOUR), (NOW - 3 * HOUR, 2 * HOUR), (NOW - MINUTE, HOUR), (NOW, 30 * MINUTE)):
        scope = a_scope()
        window = covering_window(scope, watermark, NOW)
        assert next_watermark(scope, window, watermark, NOW, NOW - left) == NOW - left
    # What was left after the end of the window holds nothing.
    assert next_watermark(a_scope(), covering_window(a_scope(), None, NOW), None, NOW, NOW + MINUTE) == NOW


def test_a_run_that_has_read_less_than_the_watermark_asks_for_now_moves_nothing() -> None:
    scope = a_scope()
    window = covering_window(scope, NOW - 2 * MINUTE, NOW)
    # Meanwhile another run has left something, and the watermark went back behind this one's window.
    assert next_watermark(scope, window, NOW - 5 * HOUR, NOW) is None


def test_the_watermark_does_not_go_back_for_nothing() -> None:
    for heals in (True, False):
        scope = a_scope(heals=heals)
        for watermark in (NOW, NOW + MINUTE):
            assert next_watermark(scope, covering_window(scope, watermark, NOW), watermark, NOW) is None


def test_a_backfill_of_last_month_moves_no_watermark() -> None:
    scope = a_scope(NOW - 30 * DAY, heals=False)
    for watermark in (None, NOW - 2 * MINUTE, NOW - 60 * DAY):
        assert next_watermark(scope, covering_window(scope, watermark, NOW), watermark, NOW) is None


def test_a_chosen_hour_that_joins_the_covered_time_with_its_overlap_moves_the_watermark() -> None:
    scope = a_scope(heals=False)
    for covered in (NOW - 30 * MINUTE, NOW - HOUR + CATCH_UP_OVERLAP):
        assert next_watermark(scope, covering_window(scope, None, NOW), covered, NOW) == NOW
    # Joining end to end is not enough: the last minutes of what was covered are covered once more, or may be lost.
    assert next_watermark(scope, covering_window(scope, None, NOW), NOW - HOUR, NOW) is None


# A story of runs: minutes since the one before, whether it heals, whether it succeeds, and how far back a chosen
# instant lies; and how long before a run's end a payment may hide from it (a webhook's minute, the list's lag).
runs = st.lists(
    st.tuples(
        st.one_of(st.integers(1, 130), st.integers(1, 9 * 24 * 60)),
        st.booleans(),
        st.booleans(),
        st.sampled_from([0, 0, 30, 60, 61, 180, 5000]),
    ),
    min_size=2,
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(runs=runs, hidden=st.integers(0, 15))
@example(runs=[(1, True, True, 0), (60, True, True, 0)], hidden=1)
@example(runs=[(1, True, True, 0), (60, False, True, 0), (60, False, True, 0), (61, True, True, 0)], hidden=1)
def test_whatever_runs_outages_and_backfills_follow_each_other_no_instant_is_skipped_untold(
    runs: list[tuple[int, bool, bool, int]], hidden: int
) -> None:
    now = NOW
    watermark: datetime | None = None
    first: datetime | None = None
    seen: list[tuple[datetime, datetime]] = []
    for wait, heals, succeeds, back in runs:
        now += wait * MINUTE
        scope = a_scope(now if heals else now - back * MINUTE, heals=heals)
        window = covering_window(scope, watermark, now)
        if not succeeds:
            continue
        # What a run saw for certain: all but its last minutes.
        seen.append((window.start, max(window.start, window.end - hidden * MINUTE)))
        if window.gap is not None:
            seen.append(window.gap)
        moved = next_watermark(scope, window, watermark, now)
        if moved is not None:
            assert watermark is None or moved > watermark
            first = first or window.start
            watermark = moved
    if watermark is None or first is None:
        return
    # Every instant from the first covered one to the watermark was seen, or told to a person as a gap.
    reached = first
    for start, end in sorted(seen):
        if start <= reached:
            reached = max(reached, end)
    assert reached >= watermark - hidden * MINUTE
