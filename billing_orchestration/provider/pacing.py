"""How fast the provider is asked: one rate for all threads, a bounded number of them, and when to stop asking.

A cap on requests per second if the operator sets one; after a 429 nobody sends until the provider's own `Retry-After`
is over, and then they start one after another instead of all at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar, cast

from billing_orchestration.provider.errors import WrongCredentials
from billing_orchestration.threads import Queue, Threads

Item = TypeVar("Item")
Result = TypeVar("Result")

# A 429 without Retry-After: the provider publishes no limits, so begin with a second and double it.
FIRST_PAUSE_S = 1.0
# A longer pause would not slow the run down but halt it. The run goes on, and its failures say why.
LONGEST_PAUSE_S = 60.0
# Turns that come this soon are given together: who asks for them is not woken more often than that.
_SOON_S = 0.005
# After a pause, 64 waiting threads would send at once and get the next 429. They start this far apart instead, and
# closer with every answer that is not a 429.
FIRST_SPACING_S = 0.05
WIDEST_SPACING_S = 1.0
NO_SPACING_S = 0.001


class RateLimit:
    """When the next request may go. One instance is shared by all threads; seconds are those of a monotonic clock."""

    def __init__(
        self,
        max_requests_per_second: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._interval_s = 0.0
        if max_requests_per_second is not None:
            self.limit(max_requests_per_second)
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._next_turn = float("-inf")
        self._paused_until = float("-inf")
        self._pause_s = FIRST_PAUSE_S
        self._spacing_s = 0.0

    def limit(self, max_requests_per_second: float) -> None:
        """Cap the requests from now on. Raises ValueError for a cap that lets nothing through."""
        if not max_requests_per_second > 0:
            raise ValueError(f"max_requests_per_second is {max_requests_per_second}; it must be above zero or unset")
        self._interval_s = 1.0 / max_requests_per_second

    def wait_turn(self) -> None:
        """Return when this thread may send one request; sleep until then."""
        now = self._clock()
        if not self._interval_s and not self._spacing_s and now >= self._paused_until:
            return
        while True:
            with self._lock:
                turn = max(now, self._next_turn, self._paused_until)
                self._next_turn = turn + max(self._interval_s, self._spacing_s)
            if turn <= now:
                return
            self._sleep(turn - now)
            now = turn
            if self._paused_until <= now:  # else a 429 came while this thread slept: it queues again
                return

    @property
    def is_paused(self) -> bool:
        """Whether nobody may send now, since a 429 came."""
        return self._clock() < self._paused_until

    def turns(self, most: int) -> int:
        """How many requests, up to `most`, may go now: for whoever has work to do between its turn and its request."""
        with self._lock:
            now = self._clock()
            if now < self._paused_until:
                return 0
            spacing_s = max(self._interval_s, self._spacing_s)
            if not spacing_s:
                return most
            soon = now + _SOON_S - max(now, self._next_turn)
            return 0 if soon < 0 else min(most, 1 + int(soon / spacing_s))

    def take(self, count: int) -> None:
        """Use turns up."""
        with self._lock:
            spacing_s = max(self._interval_s, self._spacing_s)
            self._next_turn = max(self._clock(), self._next_turn) + count * spacing_s

    def next_turn_s(self) -> float:
        """In how many seconds there are turns again."""
        with self._lock:
            return max(self._next_turn, self._paused_until) - self._clock()

    def slow_down(self, retry_after_s: float | None = None) -> float:
        """A 429 came: nobody sends for `retry_after_s`, or for a growing default. Returns the pause in seconds."""
        with self._lock:
            now = self._clock()
            # The answers to one burst are one slow-down, not sixty-four.
            is_first = now >= self._paused_until
            if retry_after_s is not None:
                pause = min(max(retry_after_s, 0.0), LONGEST_PAUSE_S)
            else:
                pause = self._pause_s if is_first else 0.0
            if is_first:
                self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)
                self._spacing_s = min(max(self._spacing_s * 2, FIRST_SPACING_S), WIDEST_SPACING_S)
            self._paused_until = max(self._paused_until, now + pause)
            self._next_turn = max(self._next_turn, self._paused_until)
            return self._paused_until - now

    def answered(self) -> None:
        """An answer that is not a 429 came: come back to full speed, step by step."""
        if not self._spacing_s:  # the usual case, without the lock
            return
        with self._lock:
            if self._clock() >= self._paused_until:
                self._pause_s = FIRST_PAUSE_S
                self._spacing_s *= 0.8
                if self._spacing_s < NO_SPACING_S:
                    self._spacing_s = 0.0


class Breaker:
    """Open after `limit` failures with nothing heard in between: the provider fails for everyone, and asking it stops.

    A subject (a card, a payment) that fails counts once, however often it fails. It does not count at all if others
    were heard while its request was under way: then the failure is its own.
    """

    def __init__(self, limit: int) -> None:
        self.heard_so_far = 0
        self._limit = limit
        self._row: dict[str, int] = {}
        self._failed_alone: set[str] = set()

    @property
    def failures(self) -> int:
        """The weight of the failures since something was heard."""
        return sum(self._row.values())

    @property
    def is_open(self) -> bool:
        """Whether to stop."""
        return self.failures >= self._limit

    def heard(self) -> None:
        """The provider has understood a request: it does not fail for everyone."""
        self.heard_so_far += 1
        if self._row:
            self._failed_alone.update(self._row)
            self._row.clear()

    def failed(self, subject: str, weight: int = 1, heard_before: int | None = None) -> None:
        """A request has failed. `heard_before`: what `heard_so_far` was when it was sent."""
        if heard_before is not None and heard_before < self.heard_so_far:
            self._failed_alone.add(subject)
        if subject not in self._failed_alone:
            self._row[subject] = max(weight, self._row.get(subject, 0))


def map_concurrently(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    max_concurrency: int,
    *,
    threads: Threads,
    first_alone: bool = True,
) -> Iterator[tuple[Item, Result | Exception]]:
    """Call the function for each item in up to `max_concurrency` threads; yield (item, result or exception).

    The first item goes alone, so that wrong credentials cost one request; then the number in flight doubles with each
    success. WrongCredentials from any call stops the handing out: what is in flight is awaited and yielded, then it is
    raised. A caller that stops iterating stops the handing out too, and leaving waits for what is in flight.
    """
    if max_concurrency < 1:
        raise ValueError(f"max_concurrency is {max_concurrency}; it must be at least 1")
    return _map(function, items, max_concurrency, threads, 1 if first_alone else max_concurrency)


def _map(
    function: Callable[[Item], Result], items: Iterable[Item], max_concurrency: int, threads: Threads, allowed: int
) -> Iterator[tuple[Item, Result | Exception]]:
    # A queue instead of concurrent.futures.wait: that looks at every future in flight for each one that ends.
    answers: Queue[tuple[Item, Result | None, BaseException | None]] = threads.make_queue()

    def call(item: Item) -> None:
        try:
            answers.put((item, function(item), None))
        except BaseException as fault:  # noqa: BLE001 - carried to the caller's thread, which decides
            answers.put((item, None, fault))

    waiting = iter(items)
    in_flight = 0
    exhausted = False
    refused: WrongCredentials | None = None
    with threads.make_pool(max_concurrency, "provider") as pool:

        def hand_out() -> None:
            nonlocal in_flight, exhausted
            while not exhausted and in_flight < allowed:
                try:
                    item = next(waiting)
                except StopIteration:
                    exhausted = True
                else:
                    pool.submit(call, item)
                    in_flight += 1

        hand_out()
        while in_flight:
            item, result, fault = answers.get()
            in_flight -= 1
            if isinstance(fault, WrongCredentials):
                refused = refused or fault
                exhausted = True
                continue
            if fault is not None and not isinstance(fault, Exception):
                raise fault
            allowed = min(allowed * 2 if fault is None else allowed + 1, max_concurrency)
            # Before yielding: the slot is not to stand empty while the caller looks at this answer.
            hand_out()
            yield item, cast("Result", result) if fault is None else fault
    if refused is not None:
        raise refused
