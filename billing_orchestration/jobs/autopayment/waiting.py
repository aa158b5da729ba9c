"""Which attempt is sent next. A payment method is charged once at a time, and not again after it was declined.

In their order, which puts what failed before first. While it is in doubt whether the latest failures are everybody's,
from the other end: those who are least like them.
"""

import heapq
from collections import deque
from collections.abc import Sequence

from billing_orchestration.jobs.autopayment.charging import Work


class Waiting:
    """The attempts that are not under way. `ready` may be sent as soon as there is room."""

    def __init__(self, works: Sequence[Work]) -> None:
        self.ready = deque(works)
        self._later: list[tuple[float, int, Work]] = []
        self._method_held_by: dict[str, Work] = {}
        self._behind: dict[str, deque[Work]] = {}
        self._declined: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self.ready or self._later)

    def has_some(self, now: float) -> bool:
        """Whether an attempt may be sent now."""
        return bool(self.ready) or (bool(self._later) and self._later[0][0] <= now)

    @property
    def next_at(self) -> float | None:
        """When the next attempt is to be sent again."""
        return self._later[0][0] if self._later else None

    def send_again(self, work: Work, at: float) -> None:
        """Keep an attempt until its next send. It keeps its payment method."""
        heapq.heappush(self._later, (at, work.order, work))

    def take(self, room: int, now: float, *, in_doubt: bool = False) -> tuple[list[Work], list[Work]]:
        """Up to `room` attempts to send now; and those that are skipped because their method was declined."""
        group: list[Work] = []
        skipped: list[Work] = []
        if not in_doubt or not self.ready:
            while len(group) < room and self._later and self._later[0][0] <= now:
                group.append(heapq.heappop(self._later)[2])
        while len(group) < room and self.ready:
            work = self.ready.pop() if in_doubt else self.ready.popleft()
            method = work.attempt.payment_method_id
            if method in self._declined and not work.sent_before:
                # One that may have been sent may have moved money: the provider has to be asked about it.
                skipped.append(work)
            elif self._method_held_by.setdefault(method, work) is work:
                group.append(work)
            else:
                self._behind.setdefault(method, deque()).append(work)
        return group, skipped

    def release(self, work: Work, *, declined: bool) -> None:
        """Let those that wait for the same method have their turn, and remember what the card said."""
        method = work.attempt.payment_method_id
        if self._method_held_by.get(method) is not work:
            return
        del self._method_held_by[method]
        if declined:
            self._declined.add(method)
        self.ready.extend(self._behind.pop(method, ()))

    def give_up(self) -> tuple[list[Work], list[Work]]:
        """Empty it: those that waited for another send, and those that were not begun."""
        again = [work for _, _, work in self._later]
        not_begun = [*self.ready, *(work for waiting in self._behind.values() for work in waiting)]
        self.ready.clear()
        self._later.clear()
        self._behind.clear()
        return again, not_begun
