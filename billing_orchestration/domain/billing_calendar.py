"""Days and billing periods, both counted in the billing time zone.

Two rules live here. A billing *day* begins and ends at midnight of the billing time zone. A billing *period* keeps
its anchor day: 31 January, 28 February, 31 March. The time of day is that of the billing time zone's clock on the wall.
"""

from __future__ import annotations

import calendar
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone, tzinfo

UTC = timezone.utc
# The three units that the service writes into plans.duration_unit, with the singular and plural of each.
_MONTHS_IN_UNIT = {"month": 1, "months": 1, "year": 12, "years": 12}
_DAY_UNITS = frozenset({"day", "days"})


class UnusablePeriod(ValueError):
    """A plan whose duration cannot be turned into a period, or a result outside the calendar."""


@dataclass(frozen=True, slots=True)
class Period:
    """How long a plan lasts: `count` units of `unit` ("days", "month", "year")."""

    count: int
    unit: str


def parse_period(duration: int | None, unit: str | None) -> Period:
    """The plan's period. Raises UnusablePeriod, with the reason, for nulls, unknown units and counts below one."""
    if duration is None or unit is None:
        raise UnusablePeriod("the plan has no duration or no duration unit")
    if duration < 1:
        raise UnusablePeriod(f"the plan's duration {duration} is not positive")
    if unit not in _MONTHS_IN_UNIT and unit not in _DAY_UNITS:
        raise UnusablePeriod(f"the plan's duration unit {unit!r} is not days, month or year")
    return Period(duration, unit)


@dataclass(frozen=True, slots=True)
class BillingCalendar:
    """Billing days and periods in one time zone. All instants in and out are aware; those out are UTC."""

    zone: tzinfo

    def day_of(self, instant: datetime) -> date:
        """The billing day that an instant belongs to."""
        return _aware(instant).astimezone(self.zone).date()

    def start_of(self, day: date) -> datetime:
        """The first instant of a billing day."""
        return datetime.combine(day, time.min, self.zone).astimezone(UTC)

    def end_of(self, day: date) -> datetime:
        """The first instant after a billing day."""
        return self.start_of(day + timedelta(days=1))

    def add_period(self, start: datetime, period: Period, anchor_day: int | None = None) -> datetime:
        """`start` moved by one period. `anchor_day` (1..31) is the day of month to return to, else `start`'s own.

        Raises UnusablePeriod when the result lies outside the calendar.
        """
        _aware(start)
        try:
            local = start.astimezone(self.zone)
            if period.unit in _DAY_UNITS:
                day = local.date() + timedelta(days=period.count)
            else:
                months = local.year * 12 + local.month - 1 + period.count * _MONTHS_IN_UNIT[period.unit]
                day = _clamped(months // 12, months % 12 + 1, anchor_day or local.day)
            # Through UTC, so that a wall-clock time that does not exist on that day (spring) lands on a real instant,
            # after the gap (fold=0), even if `start` was the second of two equal wall-clock times (autumn).
            return datetime.combine(day, local.time().replace(fold=0), self.zone).astimezone(UTC)
        except (OverflowError, ValueError) as error:
            raise UnusablePeriod(
                f"a period of {period.count} {period.unit} after {start} is outside the calendar"
            ) from error

    def next_end(self, started_at: datetime | None, ended_at: datetime, period: Period) -> datetime:
        """The end of the period that begins at `ended_at`, for a subscription that began at `started_at`.

        The anchor is `started_at`'s day of month when `ended_at` is its clamped anniversary, else `ended_at`'s own: 31
        January -> 28 February -> 31 March, but a subscription that support moved to the 12th stays there. Raises
        UnusablePeriod when any of it lies outside the calendar.
        """
        return self.add_period(ended_at, period, self._anchor_day(started_at, ended_at))

    def _anchor_day(self, started_at: datetime | None, ended_at: datetime) -> int:
        _aware(ended_at)
        try:
            end = ended_at.astimezone(self.zone).date()
            if started_at is None:
                return end.day
            # By date, not by instant: the service computes ended_at and started_at from two looks at its clock.
            start_day = _aware(started_at).astimezone(self.zone).day
        except OverflowError as error:  # a row that says "for ever", at the calendar's very edge
            raise UnusablePeriod(f"{started_at} to {ended_at} is outside the calendar") from error
        clamped = end.day == calendar.monthrange(end.year, end.month)[1] and start_day > end.day
        return start_day if clamped else end.day


def _clamped(year: int, month: int, day: int) -> date:
    if not 1 <= year <= 9998:  # 9999 would overflow on the way to UTC
        raise OverflowError(year)
    return date(year, month, min(day, calendar.monthrange(year, month)[1]))


def _aware(instant: datetime) -> datetime:
    if instant.tzinfo is None:
        raise ValueError("a naive instant has no billing day")
    return instant
