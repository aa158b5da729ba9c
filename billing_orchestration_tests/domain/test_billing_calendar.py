"""Billing days and billing periods: the anchor day comes back, the time of day stays, whatever the zone's clocks do."""

from __future__ import annotations

import calendar
from datetime import date, datetime, time, timedelta, timezone

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from billing_orchestration.domain.billing_calendar import BillingCalendar, Period, UnusablePeriod, parse_period
from billing_orchestration_tests.domain.given import FIRST_MOMENT, IN_UTC, LAST_MOMENT, UTC, at, calendar_of

ZONES = ("UTC", "Europe/Moscow", "America/New_York", "Asia/Kolkata", "Europe/London", "Australia/Lord_Howe")
MONTH, YEAR = Period(1, "month"), Period(1, "year")

zones = st.sampled_from(ZONES)
instants = st.datetimes(FIRST_MOMENT, LAST_MOMENT, timezones=st.just(UTC))
periods = st.builds(Period, st.integers(1, 36), st.sampled_from(["days", "month", "year"]))


def chain(start: str, period: Period, count: int, zone: str = "UTC", first_end: str | None = None) -> list[str]:
    """The days on which a subscription that began at `start` ends, one renewal after the other."""
    billing = calendar_of(zone)
    started_at = at(start, zone)
    end = at(first_end, zone) if first_end else billing.add_period(started_at, period)
    days = []
    for _ in range(count):
        days.append(str(billing.day_of(end)))
        end = billing.next_end(started_at, end, period)
    return days


# --- The anchor day


@pytest.mark.parametrize(
    ("start", "period", "ends"),
    [
        ("2026-01-31T10:00", MONTH, ["2026-02-28", "2026-03-31", "2026-04-30", "2026-05-31"]),
        ("2028-01-31T10:00", MONTH, ["2028-02-29", "2028-03-31", "2028-04-30", "2028-05-31"]),
        ("2026-01-30T10:00", MONTH, ["2026-02-28", "2026-03-30", "2026-04-30", "2026-05-30"]),
        ("2026-01-29T10:00", MONTH, ["2026-02-28", "2026-03-29", "2026-04-29"]),
        ("2026-01-28T10:00", MONTH, ["2026-02-28", "2026-03-28", "2026-04-28"]),
        ("2026-08-31T10:00", MONTH, ["2026-09-30", "2026-10-31", "2026-11-30", "2026-12-31", "2027-01-31"]),
        ("2026-10-31T10:00", Period(3, "month"), ["2027-01-31", "2027-04-30", "2027-07-31"]),
        ("2025-11-30T10:00", Period(3, "month"), ["2026-02-28", "2026-05-30", "2026-08-30"]),
        ("2024-02-29T10:00", YEAR, ["2025-02-28", "2026-02-28", "2027-02-28", "2028-02-29", "2029-02-28"]),
        ("2026-03-12T10:00", YEAR, ["2027-03-12", "2028-03-12"]),
        ("2024-02-29T10:00", MONTH, ["2024-03-29", "2024-04-29"]),
        ("2026-01-31T10:00", Period(30, "days"), ["2026-03-02", "2026-04-01", "2026-05-01"]),
        ("2026-01-31T10:00", Period(1, "days"), ["2026-02-01", "2026-02-02"]),
        ("2026-12-15T10:00", MONTH, ["2027-01-15", "2027-02-15"]),
    ],
)  # fmt: skip
def test_a_chain_of_renewals_returns_to_the_anchor_day(start: str, period: Period, ends: list[str]) -> None:
    assert chain(start, period, len(ends)) == ends


@pytest.mark.parametrize("zone", ZONES)
def test_the_anchor_day_is_kept_in_every_time_zone(zone: str) -> None:
    # Late in the evening: in UTC this is another day than on the wall in most of these zones.
    assert chain("2026-01-31T23:30", MONTH, 4, zone) == ["2026-02-28", "2026-03-31", "2026-04-30", "2026-05-31"]
    assert chain("2026-01-31T00:30", MONTH, 4, zone) == ["2026-02-28", "2026-03-31", "2026-04-30", "2026-05-31"]


@pytest.mark.parametrize(
    ("start", "moved_to", "ends"),
    [
        # Not the anniversary of the start: the end's own day is the anchor from then on.
        ("2026-01-31T10:00", "2026-03-12T10:00", ["2026-03-12", "2026-04-12", "2026-05-12"]),
        ("2026-01-31T10:00", "2026-03-30T10:00", ["2026-03-30", "2026-04-30"]),
        ("2026-01-15T10:00", "2026-02-28T10:00", ["2026-02-28", "2026-03-28", "2026-04-28"]),
        ("2026-01-28T10:00", "2026-01-31T10:00", ["2026-01-31", "2026-02-28"]),
        # A leap year's 28 February is no clamped anniversary: there was a 29th.
        ("2024-01-31T10:00", "2024-02-28T10:00", ["2024-02-28", "2024-03-28"]),
    ],
)
def test_an_end_that_support_has_moved_is_its_own_anchor(start: str, moved_to: str, ends: list[str]) -> None:
    assert chain(start, MONTH, len(ends), first_end=moved_to) == ends


def test_without_a_start_the_anchor_is_the_ends_own_day() -> None:
    assert IN_UTC.next_end(None, at("2026-02-28T10:00"), MONTH) == at("2026-03-28T10:00")


def test_the_anniversary_is_judged_by_date_not_by_time_of_day() -> None:
    # The service looks at its clock twice: the end lies some milliseconds, or a repaired hour, beside the start's time.
    end = IN_UTC.next_end(at("2026-01-31T10:00:00.001"), at("2026-02-28T11:30:00"), MONTH)
    assert end == at("2026-03-31T11:30:00")


@settings(max_examples=60, deadline=None)
@given(zone=zones, start=instants, months=st.integers(1, 14), renewals=st.integers(1, 30))
@example(zone="America/New_York", start=datetime(2026, 1, 31, 7, 30, tzinfo=UTC), months=1, renewals=14)
def test_every_end_of_a_chain_is_the_anchor_day_or_the_months_last(
    zone: str, start: datetime, months: int, renewals: int
) -> None:
    billing = calendar_of(zone)
    period = Period(months, "month")
    anchor = billing.day_of(start)
    end = billing.add_period(start, period)
    for renewal in range(1, renewals + 1):
        day = billing.day_of(end)
        distance = (day.year - anchor.year) * 12 + day.month - anchor.month
        assert distance == months * renewal
        assert day.day == min(anchor.day, calendar.monthrange(day.year, day.month)[1])
        end = billing.next_end(start, end, period)


@settings(max_examples=60, deadline=None)
@given(zone=zones, start=instants, years=st.integers(1, 5))
def test_a_year_is_twelve_months(zone: str, start: datetime, years: int) -> None:
    billing = calendar_of(zone)
    assert billing.add_period(start, Period(years, "year")) == billing.add_period(start, Period(12 * years, "month"))


# --- Time of day, and clocks that change


@settings(max_examples=200, deadline=None)
@given(zone=zones, start=instants, period=periods)
@example(zone="Europe/London", start=datetime(2023, 10, 29, 1, 30, tzinfo=UTC), period=Period(29, "month"))
def test_the_time_of_day_on_the_wall_is_kept_where_that_time_exists(zone: str, start: datetime, period: Period) -> None:
    billing = calendar_of(zone)
    before = start.astimezone(billing.zone)
    after = billing.add_period(start, period).astimezone(billing.zone)
    wished = datetime.combine(after.date(), before.time())
    exists = wished.replace(tzinfo=billing.zone).astimezone(UTC).astimezone(billing.zone).replace(tzinfo=None) == wished
    assert not exists or after.replace(tzinfo=None) == wished
    assert exists or timedelta(0) < after.replace(tzinfo=None) - wished <= timedelta(hours=1)


@pytest.mark.parametrize(
    ("zone", "start", "period", "end"),
    [
        # Spring forward: 02:30 does not exist on 8 March 2026 in New York; it is 03:30 there.
        ("America/New_York", "2026-02-08T02:30-05:00", MONTH, "2026-03-08T07:30+00:00"),
        ("America/New_York", "2026-03-07T02:30-05:00", Period(1, "days"), "2026-03-08T07:30+00:00"),
        # Autumn: 01:30 comes twice on 1 November 2026; the first of the two.
        ("America/New_York", "2026-10-01T01:30-04:00", MONTH, "2026-11-01T05:30+00:00"),
        # From the second 01:30 a month on it is 01:30 again, once.
        ("America/New_York", "2026-11-01T01:30-05:00", MONTH, "2026-12-01T06:30+00:00"),
        # Across a change the day has 23 or 25 hours, the wall shows the same.
        ("America/New_York", "2026-03-07T12:00-05:00", Period(2, "days"), "2026-03-09T12:00-04:00"),
        ("Asia/Kolkata", "2026-01-31T00:10+05:30", MONTH, "2026-02-28T00:10+05:30"),
        ("Europe/Moscow", "2026-01-31T01:00+03:00", MONTH, "2026-02-28T01:00+03:00"),
        # The second 01:30 of an autumn's day, plus months, onto a spring day without 01:30: not an hour less for it.
        ("Europe/London", "2023-10-29T01:30+00:00", Period(29, "month"), "2026-03-29T02:30+01:00"),
    ],
)  # fmt: skip
def test_an_end_is_a_real_instant_when_clocks_change(zone: str, start: str, period: Period, end: str) -> None:
    found = calendar_of(zone).add_period(datetime.fromisoformat(start), period)
    assert found == datetime.fromisoformat(end)


@settings(max_examples=200, deadline=None)
@given(zone=zones, start=instants, period=periods, anchor=st.none() | st.integers(1, 31))
def test_a_period_ends_after_it_begins_and_not_more_than_an_hour_early(
    zone: str, start: datetime, period: Period, anchor: int | None
) -> None:
    end = calendar_of(zone).add_period(start, period, anchor)
    assert end.tzinfo is UTC
    assert end > start
    if period.unit == "days":
        assert abs(end - start - timedelta(days=period.count)) <= timedelta(hours=1)


@settings(max_examples=100, deadline=None)
@given(zone=zones, started=instants, end=instants, period=periods)
def test_a_renewal_never_shortens_a_subscription(zone: str, started: datetime, end: datetime, period: Period) -> None:
    assert calendar_of(zone).next_end(started, end, period) > end


@settings(max_examples=100, deadline=None)
@given(zone=zones, start=instants, count=st.integers(1, 35), unit=st.sampled_from(["days", "month", "year"]))
def test_a_longer_period_ends_later(zone: str, start: datetime, count: int, unit: str) -> None:
    billing = calendar_of(zone)
    assert billing.add_period(start, Period(count, unit)) < billing.add_period(start, Period(count + 1, unit))


@settings(max_examples=100, deadline=None)
@given(start=instants, later=st.timedeltas(timedelta(0), timedelta(days=70)), period=periods)
def test_who_begins_later_does_not_end_earlier(start: datetime, later: timedelta, period: Period) -> None:
    # By whole days at one time of day; within a month's clamped days only the time of day tells them apart.
    later = timedelta(days=later.days)
    assert IN_UTC.add_period(start, period) <= IN_UTC.add_period(start + later, period)


# --- Billing days


@settings(max_examples=100, deadline=None)
@given(zone=st.sampled_from((*ZONES, "America/Havana", "Africa/Cairo", "America/Sao_Paulo")), instant=instants)
def test_a_billing_day_is_from_midnight_to_midnight_without_a_hole(zone: str, instant: datetime) -> None:
    billing = calendar_of(zone)
    day = billing.day_of(instant)
    assert billing.start_of(day) <= instant < billing.end_of(day)
    assert billing.day_of(billing.start_of(day)) == day
    assert billing.day_of(billing.start_of(day) - timedelta(microseconds=1)) < day
    assert billing.end_of(day) == billing.start_of(day + timedelta(days=1))


@pytest.mark.parametrize(
    ("zone", "instant", "day"),
    [
        ("UTC", "2026-03-12T23:59:59.999999+00:00", date(2026, 3, 12)),
        ("Europe/Moscow", "2026-03-12T21:00:00+00:00", date(2026, 3, 13)),
        ("Europe/Moscow", "2026-03-12T20:59:59+00:00", date(2026, 3, 12)),
        ("Asia/Kolkata", "2026-03-12T18:30:00+00:00", date(2026, 3, 13)),
        ("America/New_York", "2026-03-12T03:59:59+00:00", date(2026, 3, 11)),
    ],
)
def test_a_billing_day_belongs_to_the_billing_time_zone(zone: str, instant: str, day: date) -> None:
    assert calendar_of(zone).day_of(datetime.fromisoformat(instant)) == day


def test_the_day_on_which_clocks_change_has_23_or_25_hours() -> None:
    billing = calendar_of("America/New_York")
    spring, autumn = date(2026, 3, 8), date(2026, 11, 1)
    assert billing.end_of(spring) - billing.start_of(spring) == timedelta(hours=23)
    assert billing.end_of(autumn) - billing.start_of(autumn) == timedelta(hours=25)


def test_the_offset_that_an_instant_is_written_with_does_not_matter() -> None:
    instant = datetime(2026, 1, 31, 23, 30, tzinfo=UTC)
    elsewhere = instant.astimezone(timezone(timedelta(hours=9)))
    assert IN_UTC.day_of(elsewhere) == IN_UTC.day_of(instant)
    assert IN_UTC.next_end(elsewhere, elsewhere, MONTH) == IN_UTC.next_end(instant, instant, MONTH)


def test_a_naive_instant_has_no_billing_day() -> None:
    naive = datetime.combine(date(2026, 3, 12), time(12))
    with pytest.raises(ValueError, match="naive"):
        IN_UTC.day_of(naive)
    with pytest.raises(ValueError, match="naive"):
        IN_UTC.add_period(naive, MONTH)
    for started_at, ended_at in ((naive, at("2026-03-12T10:00")), (None, naive)):
        with pytest.raises(ValueError, match="naive"):
            IN_UTC.next_end(started_at, ended_at, MONTH)


# --- What cannot be a period


@pytest.mark.parametrize("unit", ["day", "days", "month", "months", "year", "years"])
def test_the_units_are_those_the_service_writes_singular_or_plural(unit: str) -> None:
    assert parse_period(2, unit) == Period(2, unit)
    assert IN_UTC.add_period(at("2026-03-12T10:00"), Period(1, unit)) == IN_UTC.add_period(
        at("2026-03-12T10:00"), Period(1, unit.rstrip("s") if unit != "day" else "days")
    )


@pytest.mark.parametrize(
    ("duration", "unit", "reason"),
    [
        (None, "month", "no duration"),
        (1, None, "no duration"),
        (0, "month", "not positive"),
        (-1, "days", "not positive"),
        (1, "fortnight", "'fortnight'"),
        (1, "", "''"),
        (1, "MONTH ", "is not days, month or year"),
    ],
)
def test_a_plan_without_a_usable_duration_names_what_is_wrong(
    duration: int | None, unit: str | None, reason: str
) -> None:
    with pytest.raises(UnusablePeriod, match=reason):
        parse_period(duration, unit)


@pytest.mark.parametrize(
    ("started_at", "ended_at", "period"),
    [
        (None, datetime(2026, 3, 12, tzinfo=UTC), Period(10**9, "month")),
        (None, datetime(2026, 3, 12, tzinfo=UTC), Period(10**9, "year")),
        (None, datetime(2026, 3, 12, tzinfo=UTC), Period(10**9, "days")),
        (None, datetime(2026, 3, 12, tzinfo=UTC), Period(10**18, "days")),
        # "For ever", as a service may write it, is still a row like any other.
        (None, datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC), MONTH),
        (datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC), datetime(2026, 3, 12, tzinfo=UTC), MONTH),
        (datetime(1, 1, 1, tzinfo=UTC), datetime(2026, 3, 12, tzinfo=UTC), MONTH),
        (None, datetime(1, 1, 1, tzinfo=UTC), MONTH),
    ],
)
@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Europe/Moscow"])
def test_what_lies_outside_the_calendar_is_an_unusable_period_and_nothing_else(
    zone: str, started_at: datetime | None, ended_at: datetime, period: Period
) -> None:
    # One row with an absurd date must not stop the others: this error is the one that rules turn into a reason.
    try:
        end = calendar_of(zone).next_end(started_at, ended_at, period)
    except UnusablePeriod:
        return
    assert end > ended_at


def test_an_end_beyond_the_calendar_is_named_as_such() -> None:
    with pytest.raises(UnusablePeriod, match="outside the calendar"):
        IN_UTC.add_period(at("2026-03-12T10:00"), Period(10**9, "month"))
    with pytest.raises(UnusablePeriod, match="outside the calendar"):
        IN_UTC.next_end(None, datetime(9999, 12, 1, tzinfo=UTC), MONTH)


def test_a_zone_skips_a_day_once_in_a_lifetime_and_the_period_still_ends_after_it_began() -> None:
    # Samoa went from 29 to 31 December 2011.
    billing = BillingCalendar(calendar_of("Pacific/Apia").zone)
    start = at("2011-12-29T10:00", "Pacific/Apia")
    assert billing.add_period(start, Period(1, "days")) > start
