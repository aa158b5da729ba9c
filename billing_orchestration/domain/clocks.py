"""Three clocks: this machine's, PostgreSQL's and the provider's. How far they are apart, and what that forbids.

A wrong clock charges twice and loses purchases: it takes an old key for a fresh one, searches the provider's list where
a lost charge is not, and counts hours as covered that nobody has read. So beyond five minutes nothing is charged, no
absence is noted, nothing expires and no watermark moves. What is paid is settled all the same.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from datetime import datetime, timedelta

# Clocks that are kept by NTP differ by milliseconds. One that is two minutes off is kept by nobody: a run says so.
TOLERATED = timedelta(minutes=2)
# Well within what the rules allow for (an hour on a key's life, half an hour around a search, a quarter on a window).
HARMFUL = timedelta(minutes=5)
# The Date header of HTTP has whole seconds, rounded down.
DATE_RESOLUTION = timedelta(seconds=1)
# One odd answer (a proxy's, a single front end's) condemns no clock.
ANSWERS_COMPARED = 3
_NONE = timedelta(0)


def is_in_future(instant: datetime, now: datetime) -> bool:
    """Whether an instant that was noted earlier lies in the future, so that a wrong clock has written it."""
    return instant - now > TOLERATED


def offset_of(told: datetime, received: datetime, duration: timedelta, resolution: timedelta = _NONE) -> timedelta:
    """How far another clock is ahead of ours, by its least suspicious reading.

    It told the time at some moment of a request that took `duration` (by a clock that nobody sets) until `received`,
    rounded down to `resolution`. The middle of the request is compared; what duration and rounding leave open counts in
    its favour.
    """
    offset = told + resolution / 2 - (received - duration / 2)
    doubt = (resolution + duration) / 2
    if abs(offset) <= doubt:
        return _NONE
    return offset - doubt if offset > _NONE else offset + doubt


class Readings:
    """How far another clock is ahead of ours, by each of its last few answers. Any thread may note one."""

    def __init__(self) -> None:
        self._latest: deque[timedelta] = deque(maxlen=ANSWERS_COMPARED)

    def note(self, offset: timedelta) -> None:
        """One more answer."""
        self._latest.append(offset)

    @property
    def offset(self) -> timedelta | None:
        """The least suspicious of them; None: there was none."""
        return min(tuple(self._latest), key=abs, default=None)

    @property
    def is_suspicious(self) -> bool:
        """Whether the last one would condemn the clock."""
        latest = tuple(self._latest)[-1:]
        return bool(latest) and abs(latest[0]) > HARMFUL

    @property
    def is_settled(self) -> bool:
        """Whether another answer would not change the verdict: the last one was in order, or none of them was."""
        latest = tuple(self._latest)
        condemned = len(latest) == ANSWERS_COMPARED and all(abs(offset) > HARMFUL for offset in latest)
        return bool(latest) and (not self.is_suspicious or condemned)


@dataclass(frozen=True, slots=True)
class Clocks:
    """How far PostgreSQL's clock and the provider's are ahead of this machine's; None: not known."""

    database: timedelta | None = None
    provider: timedelta | None = None

    @property
    def apart(self) -> timedelta:
        """The greatest difference between any two of them."""
        known = self._known().values()
        return max(known) - min(known)

    @property
    def agree(self) -> bool:
        """Whether there is nothing to say."""
        return self.apart <= TOLERATED

    @property
    def may_be_trusted(self) -> bool:
        """Whether what depends on the time may be done."""
        return self.apart <= HARMFUL

    def at_provider(self, now: datetime) -> datetime:
        """The provider's time, as far as it is known: what its instants are compared with."""
        return now + (self.provider or _NONE)

    def __str__(self) -> str:
        """What differs, which one is to blame where two of them agree, and what to do about it."""
        unknown = "" if self.provider is not None else "; the provider's is not known"
        if self.agree:
            return f"{_listed(list(self._known()))} agree{unknown}"
        known = sorted(self._known().items(), key=lambda item: item[1])
        (low, lowest), (high, highest) = known[0], known[-1]
        to_do = "set it by NTP"
        if len(known) == 3 and (odd := _odd_one(known)) is not None:
            others = _listed([name for name, _ in known if name != odd])
            distance = known[1][1] - lowest if odd == low else highest - known[1][1]
            differs = f"{odd} is {_span(distance)} {'behind' if odd == low else 'ahead of'} {others}"
        else:
            differs = f"{high} is {_span(highest - lowest)} ahead of {low}, and which of them is wrong cannot be told"
            to_do = "set them by NTP"
        return f"{differs}{unknown}: {to_do}"

    def _known(self) -> dict[str, timedelta]:
        clocks = {
            "this machine's clock": _NONE,
            "PostgreSQL's clock": self.database,
            "the provider's clock": self.provider,
        }
        return {name: offset for name, offset in clocks.items() if offset is not None}


def _odd_one(known: list[tuple[str, timedelta]]) -> str | None:
    """The one of three that differs from two which agree; None where no two agree, or each does with its neighbour."""
    below, above = known[1][1] - known[0][1], known[2][1] - known[1][1]
    if min(below, above) > TOLERATED or below == above:
        return None
    return known[0][0] if below > above else known[2][0]


def _listed(names: list[str]) -> str:
    return " and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}"


def _span(duration: timedelta) -> str:
    """`3 h 5 min`, `6 min 12 s`: the two largest units."""
    seconds = round(duration.total_seconds())
    parts = [
        f"{count} {unit}"
        for count, unit in (
            (seconds // 86400, "days"),
            (seconds % 86400 // 3600, "h"),
            (seconds % 3600 // 60, "min"),
            (seconds % 60, "s"),
        )
        if count
    ]
    return " ".join(parts[:2]) or "0 s"
