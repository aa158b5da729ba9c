"""The partition grids: billing days for the daily jobs, UTC hours for the matching jobs, days to be reconciled.

The first two include the current period (`end_offset=1`): today's run marks today. Hours are UTC whatever the billing
time zone: when the clocks go back, two hours would share one key. The last one ends with yesterday and reaches back as
far as the provider's lists do, whatever BILLING_FIRST_DAY says: comparing an old day grants nothing twice.
"""

from datetime import datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import dagster as dg

from billing_orchestration.settings import partition_first_day, partition_timezone, reconciliation_partition_timezone

BILLING_TIMEZONE = partition_timezone()
_FIRST_DAY = partition_first_day().isoformat()
HOUR_FORMAT = "%Y-%m-%d-%H:%M"

DAILY = dg.DailyPartitionsDefinition(start_date=_FIRST_DAY, timezone=BILLING_TIMEZONE, end_offset=1)
HOURLY = dg.HourlyPartitionsDefinition(start_date=f"{_FIRST_DAY}-00:00", timezone="UTC", end_offset=1)


# The provider keeps its lists for three years.
KEPT = timedelta(days=3 * 365)


def reconciled_days(now: datetime) -> dg.DailyPartitionsDefinition:
    """The grid of days that a code location loaded at this instant can reconcile."""
    return dg.DailyPartitionsDefinition(
        start_date=(now - KEPT).strftime("%Y-%m-%d"), timezone=reconciliation_partition_timezone()
    )


RECONCILED = reconciled_days(datetime.now(timezone.utc))


def day_before_key(tick: datetime) -> str:
    """The partition that a reconciling tick stands for: the last day that was over, in that grid's time zone."""
    return (tick.astimezone(ZoneInfo(RECONCILED.timezone)) - timedelta(days=1)).strftime("%Y-%m-%d")


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
