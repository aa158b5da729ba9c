"""The dates of the example data, by arithmetic of its own: this data judges the jobs."""

from __future__ import annotations

import calendar
from datetime import datetime, timedelta

from billing_orchestration.sandbox.example_data.records import Plan

_MONTHS = {"month": 1, "year": 12}


def months(instant: datetime, count: int, anchor_day: int | None = None) -> datetime:
    """The instant some months later (or earlier), on the anchor day or on the last day of a month that lacks it."""
    number = instant.year * 12 + instant.month - 1 + count
    year, month = number // 12, number % 12 + 1
    return instant.replace(
        year=year, month=month, day=min(anchor_day or instant.day, calendar.monthrange(year, month)[1])
    )


def periods(instant: datetime, plan: Plan, count: int) -> datetime:
    """The instant some periods of the plan later (or earlier)."""
    number = count * (plan.count or 1)
    if plan.unit == "days":
        return instant + timedelta(days=number)
    return months(instant, number * _MONTHS[plan.unit or ""])


def month_ends(now: datetime) -> tuple[datetime, datetime]:
    """The latest last day of a month (today, if it is one), and the end of the month after it."""
    last = now
    if last.day != calendar.monthrange(last.year, last.month)[1]:
        last = last.replace(day=1) - timedelta(days=1)
    return last, months(last, 1, 31)


def next_short_month_end(now: datetime) -> tuple[datetime, datetime]:
    """The next last day of a month with fewer than 31 days, and the end of the month after it."""
    end = months(now + timedelta(days=1), 0, 31)
    while end.day == 31:
        end = months(end, 1, 31)
    return end, months(end, 1, 31)


def day_31_before(end: datetime, now: datetime) -> datetime:
    """The latest 31st that is over and from which whole months lead to this end."""
    count = -1
    while (start := months(end, count, 31)).day != 31 or start >= now:
        count -= 1
    return start
