"""What a run stands for and how far it may go: `as_of`, the window it covers, dry_run, max_changes, the guard."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

from billing_orchestration.domain.clocks import is_in_future

# The window of a matching run, and how far one that follows an outage reaches back.
MATCHING_WINDOW = timedelta(hours=1)
LONGEST_CATCH_UP = timedelta(days=7)
# How much of what was covered is covered again: a run leaves the youngest payments to the service's webhook, the lag of
# the provider's list is not documented, and the two clocks may differ.
CATCH_UP_OVERLAP = timedelta(minutes=15)
# A run covers its hour whole at least this often; in between, a tick that finds nothing starts none. It is a few ticks
# less than a watermark may lag (the money check matching_keeps_up), and every hour of the grid gets its run.
COVERED_EVERY = timedelta(minutes=50)
# The guard on the blast radius: a run that would expire more than a fifth of all ACTIVE subscriptions, and more than a
# hundred, is more likely a mistake (a wrong clock, a broken import, renewals that did not run) than a fact.
GUARD_SHARE = 0.20
GUARD_COUNT = 100
# Long before the provider existed, and far from the limits of date arithmetic.
_EARLIEST_AS_OF = datetime(2000, 1, 1, tzinfo=timezone.utc)


class RunRefused(ValueError):
    """The run's config or partition makes no sense. Nothing was read or written."""


@dataclass(frozen=True, slots=True)
class RunScope:
    """The resolved run config. `source` tells where `as_of` came from: config, partition or now.

    `heals`: the run stands for "now" (a tick, or a launch without as_of and partition). Only such a run catches up
    after an outage.
    """

    as_of: datetime
    source: str
    heals: bool
    dry_run: bool
    max_changes: int | None
    run_id: str
    approved_plan: str | None = None


@dataclass(frozen=True, slots=True)
class Window:
    """The time that a matching run covers, both ends included. `gap`: what an outage left uncovered."""

    start: datetime
    end: datetime
    gap: tuple[datetime, datetime] | None = None


def parse_as_of(text: str, now: datetime, *, is_tick: bool = False) -> datetime:
    """Read an explicit `as_of`. Raises RunRefused for one that is unparsable, naive, in the future, or absurdly old.

    A tick comes from another machine, whose clock may be a little ahead of this one's: then it stands for now.
    """
    example = f"use ISO 8601 with an offset, such as {now.astimezone(timezone.utc):%Y-%m-%dT%H:%M:%SZ}"
    try:
        as_of = datetime.fromisoformat(text[:-1] + "+00:00" if text[-1:] in ("Z", "z") else text)
    except ValueError:
        raise RunRefused(f"as_of {text!r} is not an instant; {example}. Nothing was read or written") from None
    if as_of.tzinfo is None or as_of.utcoffset() is None:
        raise RunRefused(f"as_of {text!r} has no time zone; {example}. Nothing was read or written")
    if is_tick and not is_in_future(as_of, now):
        as_of = min(as_of, now)
    if as_of > now:
        raise RunRefused(
            f"as_of {text!r} lies in the future: now is {now.isoformat()} by this machine's clock. Nothing was read or"
            " written"
        )
    if as_of < _EARLIEST_AS_OF:
        raise RunRefused(f"as_of {text!r} lies before {_EARLIEST_AS_OF:%Y}; {example}. Nothing was read or written")
    return as_of.astimezone(timezone.utc)


def as_of_partition(start: datetime, end: datetime, now: datetime, *, last_instant: bool) -> datetime:
    """The instant that a partition stands for: its end, or now in the partition of the present.

    With `last_instant` it is the last instant before the end: the partition of 5 March stands for the billing day of
    5 March, as the scheduled run of that day does, and its end is already 6 March. Raises RunRefused for the future.
    """
    if start > now:
        raise RunRefused(f"the partition begins at {start.isoformat()}, in the future. Nothing was read or written")
    as_of = end - timedelta(microseconds=1) if last_instant else end
    return min(as_of, now).astimezone(timezone.utc)


def check_max_changes(max_changes: int | None) -> int | None:
    """Refuse a negative max_changes (RunRefused)."""
    if max_changes is not None and max_changes < 0:
        raise RunRefused(f"max_changes is {max_changes}; it must be 0 or more. Nothing was read or written")
    return max_changes


def guard_verdict(changes: int, active: int, max_changes: int | None) -> str | None:
    """Why expire_subscriptions_job must stop before it changes anything; None if it may go on.

    An explicit max_changes takes the guard's place.
    """
    if max_changes is not None:
        return over_limit(changes, max_changes)
    if changes > GUARD_COUNT and changes > GUARD_SHARE * active:
        return (
            f"it would expire {changes} of {active} ACTIVE subscriptions, more than {GUARD_SHARE:.0%} of them and more"
            f" than {GUARD_COUNT}. If that is right, launch it again with max_changes: {changes}"
        )
    return None


def over_limit(changes: int, max_changes: int | None) -> str | None:
    """Why max_changes stops a run; None if it may go on."""
    if max_changes is None or changes <= max_changes:
        return None
    return (
        f"it would make {changes} changes, max_changes is {max_changes}. If they are right, launch it again with"
        f" max_changes: {changes}"
    )


def covering_window(scope: RunScope, watermark: datetime | None, now: datetime) -> Window:
    """The window of a matching run: an hour, or back to the last covered instant when that is longer ago.

    "Back to" always includes the overlap: without it, a payment that the last run left to the webhook would be lost
    when the next run comes just an hour later. A watermark in the future was moved by a wrong clock, over hours that
    nobody may have read: the run reaches back as far as a run does.
    """
    start = scope.as_of - MATCHING_WINDOW
    if not scope.heals or watermark is None:
        return Window(start, scope.as_of)
    wanted = min(start, watermark - CATCH_UP_OVERLAP)
    earliest = scope.as_of - LONGEST_CATCH_UP
    if is_in_future(watermark, now):
        return Window(earliest, scope.as_of)
    if wanted < earliest:
        return Window(earliest, scope.as_of, gap=(wanted, earliest))
    return Window(wanted, scope.as_of)


def why_cover(watermark: datetime | None, tick: datetime, now: datetime) -> str | None:
    """Why a tick's run has to cover its hour, whatever a look would find; None: a look may answer for it."""
    if is_in_future(tick, now):
        return f"the tick of {tick.isoformat()} lies in the future of this machine's clock"
    if watermark is None or is_in_future(watermark, now):
        return "no run has covered an hour yet" if watermark is None else "the last covered instant lies in the future"
    if tick - watermark >= COVERED_EVERY:
        return f"no run has covered an hour since {watermark:%H:%M}"
    return None


def next_watermark(
    scope: RunScope, window: Window, watermark: datetime | None, now: datetime, left_since: datetime | None = None
) -> datetime | None:
    """Where the watermark moves once the whole window was applied; None: it stays.

    It moves only over time that was covered without a gap, the overlap included. A backfill of last month moves
    nothing, nor does one that merely adjoins the covered time. One in the future is put right by a run that has read
    back from now.

    `left_since`: when the oldest success was paid that the run has left for a later one. The watermark never lies
    behind it, and goes back to it where it must: else nobody would look again.
    """
    end = window.end if left_since is None else min(window.end, left_since)
    if watermark is None:
        return end if scope.heals else None
    if is_in_future(watermark, now):
        return end if scope.heals else None
    if scope.heals and left_since is not None and left_since < watermark:
        return end
    # Another run may have moved the watermark back since this one has read its window.
    reaches_back_to = window.start if window.gap is None else window.gap[0]
    joins = reaches_back_to <= watermark - CATCH_UP_OVERLAP
    return end if joins and end > watermark else None
