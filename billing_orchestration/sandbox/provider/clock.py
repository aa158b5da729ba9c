"""The sandbox's time, and the forms in which the provider shows it."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

MILLISECOND = timedelta(milliseconds=1)
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def milliseconds(instant: datetime) -> int:
    """Whole milliseconds since 1970, rounded down: the resolution of every timestamp the provider shows."""
    return (instant - EPOCH) // MILLISECOND


def from_milliseconds(value: int) -> datetime:
    """The instant of `milliseconds`."""
    return EPOCH + value * MILLISECOND


def iso(instant: datetime) -> str:
    """`2026-01-31T09:00:00.000Z`, the provider's form."""
    return instant.astimezone(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def http_date(instant: datetime) -> str:
    """`Sat, 31 Jan 2026 09:00:00 GMT`, the form of the Date header: whole seconds, rounded down."""
    return format_datetime(instant.astimezone(timezone.utc), usegmt=True)


def aware_utc(instant: datetime | str) -> datetime:
    """The instant in UTC, cut to milliseconds; a naive one is a ValueError."""
    if isinstance(instant, str):
        instant = datetime.fromisoformat(instant.replace("Z", "+00:00"))
    if instant.tzinfo is None:
        raise ValueError(f"{instant.isoformat()} has no time zone")
    return from_milliseconds(milliseconds(instant))


class SandboxClock:
    """The sandbox's time: real time plus an offset, or an instant that stands still until it is moved."""

    def __init__(self, at: datetime | None = None) -> None:
        self._fixed = None if at is None else aware_utc(at)
        self._offset = timedelta(0)

    def __call__(self) -> datetime:
        return self._fixed if self._fixed is not None else datetime.now(timezone.utc) + self._offset

    def set(self, at: datetime | str) -> None:
        """Stand still at this instant."""
        self._fixed = aware_utc(at)

    def advance(self, delta: timedelta | float) -> None:
        """Move by a timedelta or by seconds; a clock that runs goes on running."""
        step = delta if isinstance(delta, timedelta) else timedelta(seconds=delta)
        if self._fixed is not None:
            self._fixed += step
        else:
            self._offset += step

    def run(self, offset: timedelta = timedelta(0)) -> None:
        """Follow real time, plus an offset."""
        self._fixed, self._offset = None, offset
