"""The demo's dates hold on every day of the year, so that it never fails on a month's last day."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from billing_orchestration.domain.billing_calendar import BillingCalendar, Period
from billing_orchestration.sandbox.example_data.dates import day_31_before, month_ends, months, next_short_month_end

CALENDAR = BillingCalendar(timezone.utc)
EVERY_DAY = [
    datetime(2027, 1, 1, hour, minute, tzinfo=timezone.utc) + timedelta(days=day)
    for day in range(366 + 365)
    for hour, minute in ((0, 1), (23, 57))
]


def test_the_month_end_example_is_due_and_never_too_old_to_charge() -> None:
    for now in EVERY_DAY:
        last, _ = month_ends(now)
        assert 0 <= (now.date() - last.date()).days <= 30, now


@pytest.mark.parametrize("ends", [month_ends, next_short_month_end])
def test_the_month_end_examples_return_to_the_31st_as_the_rule_says(ends: object) -> None:
    for now in EVERY_DAY:
        last, after = ends(now)  # type: ignore[operator]
        started = day_31_before(last, now)
        assert started.day == 31
        assert started < now
        assert CALENDAR.next_end(started, last, Period(1, "month")) == after, now


def test_periods_bought_backwards_from_their_end_lead_forwards_to_the_same_day() -> None:
    for now in EVERY_DAY:
        for count in (1, 3, 12):
            started = months(now, -count)
            assert CALENDAR.next_end(started, now, Period(count, "month")) == months(now, count), now
