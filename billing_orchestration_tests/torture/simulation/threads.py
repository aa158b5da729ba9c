"""Threads that go on one at a time, in an order drawn from a seed: one seed, one story.

They are real threads, but only one of them holds the turn. It gives the turn away where it has to wait (a queue, an
event, a lock, the end of another thread) and at the points where the simulation asks it to (`give_way`): before each
transaction, after each commit, around each request. Never within a transaction: who got the turn might wait for its
locks in PostgreSQL, for ever. Nobody waits for real seconds: when nothing else can go on, simulated time passes.
"""

from __future__ import annotations

import queue
import random
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager
from typing import Any

from billing_orchestration.threads import Event, Queue, Thread, Threads

# How often a wait is over before it has to be, although somebody else could go on: on a real machine it happens.
_EARLY = 0.1
_SOON_S = 0.05


class Stuck(Exception):
    """Every thread waits for another: a deadlock of the code under test."""


class _Task:
    """A thread: what it waits for, and since when it has its turn."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ended = False
        self.is_ready: Callable[[], bool] | None = None
        self.deadline: float | None = None
        self.timed_out = False
        self.turn = threading.Semaphore(0)

    def can_go_on(self) -> bool:
        return not self.ended and (self.is_ready is None or self.is_ready())


class OrderedThreads(Threads):
    """The threads of one run, from the one that makes this. `pass_time` lets simulated seconds pass.

    `now_s` reads the simulated clock, in seconds.
    """

    def __init__(
        self, generator: random.Random, now_s: Callable[[], float], pass_time: Callable[[float], None]
    ) -> None:
        self._generator = generator
        self._now_s = now_s
        self._pass_time = pass_time
        self._current = _Task("main")
        self._tasks = [self._current]
        self._stuck: Stuck | None = None

    # --- whose turn it is

    def give_way(self) -> None:
        """Perhaps let another thread go on first."""
        self._hand_over(self._current)

    def wait(self, is_ready: Callable[[], bool], timeout: float | None = None) -> bool:
        """Let others go on until it is. False when `timeout` simulated seconds went by first."""
        task = self._current
        task.is_ready, task.timed_out = is_ready, False
        task.deadline = None if timeout is None else self._now_s() + max(0.0, timeout)
        self._hand_over(task)
        task.is_ready = task.deadline = None
        return not task.timed_out

    def _hand_over(self, task: _Task) -> None:
        following = self._pick()
        if following is not task:
            self._current = following
            following.turn.release()
            task.turn.acquire()
        if self._stuck is not None:
            raise self._stuck

    def _pick(self) -> _Task:
        """Who goes on: anyone who can, and now and then the one whose wait would be over next."""
        able = [task for task in self._tasks if task.can_go_on()]
        timed = [task for task in self._tasks if task.deadline is not None and task not in able]
        first = min(timed, key=lambda task: task.deadline or 0.0, default=None)
        if first is not None and first.deadline is not None:
            left_s = first.deadline - self._now_s()
            if not able or (left_s <= _SOON_S and self._generator.random() < _EARLY):
                if left_s > 0:
                    self._pass_time(left_s)
                first.timed_out = True
                return first
        if able:
            return self._generator.choice(able) if len(able) > 1 else able[0]
        names = ", ".join(task.name for task in self._tasks if not task.ended)
        self._stuck = Stuck(f"every thread of the run waits for another: {names}")
        return self._tasks[0]

    def _end(self, task: _Task) -> None:
        task.ended = True
        self._tasks.remove(task)
        self._current = self._pick()
        self._current.turn.release()

    def left_behind(self) -> list[str]:
        """Threads that have not ended, by name, now that the run has."""
        return [task.name for task in self._tasks[1:]]

    # --- what the code under test asks for

    def start(self, target: Callable[..., None], *given: Any, name: str) -> Thread:
        """A thread that waits for its first turn."""
        task = _Task(name)
        self._tasks.append(task)

        def body() -> None:
            task.turn.acquire()
            try:
                target(*given)
            finally:
                self._end(task)

        threading.Thread(target=body, name=name, daemon=True).start()
        return _Started(self, task)

    def make_queue(self) -> Queue[Any]:
        """A queue of these threads."""
        return _Queue(self)

    def make_event(self) -> Event:
        """An event of these threads."""
        return _Event(self)

    def make_lock(self) -> AbstractContextManager[Any]:
        """A lock of these threads."""
        return _Lock(self)

    def make_pool(self, size: int, name: str) -> Executor:
        """A pool of these threads."""
        return _Pool(self, size, name)

    def monotonic(self) -> float:
        """Simulated seconds."""
        return self._now_s()


class _Started:
    def __init__(self, threads: OrderedThreads, task: _Task) -> None:
        self._threads, self._task = threads, task

    def join(self) -> None:
        self._threads.wait(lambda: self._task.ended)


class _Queue:
    def __init__(self, threads: OrderedThreads) -> None:
        self._threads = threads
        self._items: deque[Any] = deque()

    def put(self, item: Any) -> None:
        self._items.append(item)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        if block and not self._items:
            self._threads.wait(lambda: bool(self._items), timeout)
        if not self._items:
            raise queue.Empty
        return self._items.popleft()

    def get_nowait(self) -> Any:
        return self.get(block=False)


class _Event:
    def __init__(self, threads: OrderedThreads) -> None:
        self._threads = threads
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, timeout: float | None = None) -> bool:
        if not self._is_set:
            self._threads.wait(lambda: self._is_set, timeout)
        return self._is_set


class _Lock:
    def __init__(self, threads: OrderedThreads) -> None:
        self._threads = threads
        self._held = False

    def __enter__(self) -> None:
        # Two may be told in turn that it is free; the second finds it taken again.
        while self._held:
            self._threads.wait(lambda: not self._held)
        self._held = True

    def __exit__(self, *_: object) -> None:
        self._held = False


class _Pool(Executor):
    """As ThreadPoolExecutor: threads are started as they are needed, leaving waits for what was handed over."""

    def __init__(self, threads: OrderedThreads, size: int, name: str) -> None:
        self._threads, self._size, self._name = threads, size, name
        self._orders = _Queue(threads)
        self._started: list[Thread] = []

    def submit(self, function: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = _Future(self._threads)
        self._orders.put((future, lambda: function(*given, **named)))
        if len(self._started) < self._size:
            self._started.append(self._threads.start(self._work, name=f"{self._name} {len(self._started)}"))
        return future

    def _work(self) -> None:
        while (order := self._orders.get()) is not None:
            future, call = order
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - raised again by whoever asks for the result
                future.set_exception(error)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        for _ in self._started:
            self._orders.put(None)
        for thread in self._started:
            thread.join()


class _Future(Future[Any]):
    def __init__(self, threads: OrderedThreads) -> None:
        super().__init__()
        self._threads = threads

    def result(self, timeout: float | None = None) -> Any:
        if not self.done():
            self._threads.wait(self.done, timeout)
        return super().result(0)
