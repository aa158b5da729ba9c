"""What will happen, and the dice that decide it: one seed, one story."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from datetime import datetime, timedelta

from billing_orchestration_tests.torture.simulation.judge import UTC
from billing_orchestration_tests.torture.simulation.world import World

TICK = timedelta(minutes=2)


class Dice(random.Random):
    """A story's only source of chance."""

    def chance(self, share: float) -> bool:
        """Whether something happens that happens so often."""
        return self.random() < share

    def minutes(self, low: float, high: float) -> timedelta:
        """Some time within these bounds."""
        return timedelta(seconds=round(self.uniform(low * 60, high * 60)))


class Agenda:
    """Events in the order of their time. Going through it moves the world's clock."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.on_tick: Callable[[datetime], None] = lambda _mark: None
        self._events: list[tuple[datetime, int, str, Callable[[], None]]] = []
        self._order = itertools.count()
        self._ticks: set[datetime] = set()
        # When the event under way began; since when ticks came late, because an event took longer than they are apart.
        self._began = world.now
        self.behind_since: datetime | None = None

    def at(self, when: datetime, what: str, do: Callable[[], None]) -> None:
        """Something that will happen."""
        heapq.heappush(self._events, (when, next(self._order), what, do))

    def after(self, delay: timedelta, what: str, do: Callable[[], None]) -> None:
        """The same, from now."""
        self.at(self._world.now + delay, what, do)

    def tick_at(self, when: datetime) -> None:
        """Both matching jobs at the next two-minute mark."""
        seconds = int(when.timestamp())
        mark = datetime.fromtimestamp(seconds - seconds % 120 + 120, UTC)
        if mark not in self._ticks:
            self._ticks.add(mark)
            self.at(mark, "tick", lambda: self._tick_of(mark))

    def _tick_of(self, mark: datetime) -> None:
        self._ticks.discard(mark)
        self.on_tick(mark)

    def due(self, end: datetime) -> tuple[str, Callable[[], None]] | None:
        """The next event until then, at its time; None when there is no more."""
        if not self._events or self._events[0][0] > end:
            return None
        when, _, what, do = heapq.heappop(self._events)
        if self.behind_since is None and self._world.now - self._began > TICK:
            self.behind_since = self._began
        self._began = self._world.now = max(self._world.now, when)
        return what, do

    def planned(self) -> list[tuple[datetime, str]]:
        """What is still to come, in no order."""
        return [(when, what) for when, _, what, _ in self._events]
