"""The partition grids: billing days for the daily jobs, UTC hours for the matching jobs.

Both include the current period (`end_offset=1`): today's run marks today. Hours are UTC whatever the billing time zone:
when the clocks go back, two hours would share one key.
"""

from datetime import datetime, timedelta

import dagster as dg

from billing_orchestration.settings import partition_first_day, partition_timezone

BILLING_TIMEZONE = partition_timezone()
_FIRST_DAY = partition_first_day().isoformat()
HOUR_FORMAT = "%Y-%m-%d-%H:%M"

DAILY = dg.DailyPartitionsDefinition(start_date=_FIRST_DAY, timezone=BILLING_TIMEZONE, end_offset=1)
HOURLY = dg.HourlyPartitionsDefinition(start_date=f"{_FIRST_DAY}-00:00", timezone="UTC", end_offset=1)


def day_key(tick: datetime) -> str | None:
    """The partition that a daily tick stands for: its own billing day. None before the grid begins."""
    key = tick.strftime("%Y-%m-%d")
    return key if key >= _FIRST_DAY else None


def hour_key(tick: datetime) -> str | None:
    """The partition that a matching tick completes: the last whole hour before it. None before the grid begins.

    A run covers everything since the last covered instant, so any successful tick completes the previous hour. The
    current hour is not complete, and is not marked before it is.
    """
    key = (tick - timedelta(hours=1)).strftime(HOUR_FORMAT[:-2] + "00")
    return key if key[:10] >= _FIRST_DAY else None
