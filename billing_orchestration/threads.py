"""The threads of a run, and what they wait for each other with.

A run's own threads, and whatever one of them waits for another with, are made by the `Threads` it is handed: the
resource `threads`, beside the clock. (A lock that is held for some arithmetic may be made where it is used.) A
simulation hands in `Threads` of its own and decides from a seed which thread goes on at each step.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

Value = TypeVar("Value")


class Queue(Protocol[Value]):
    """A queue without a limit."""

    def put(self, item: Value) -> None:
        """Add to the end; never waits."""

    def get(self, block: bool = True, timeout: float | None = None) -> Value:
        """Take from the front. Raises queue.Empty when `timeout` seconds brought nothing."""

    def get_nowait(self) -> Value:
        """Take from the front, or raise queue.Empty."""


class Event(Protocol):
    """Something that happens once."""

    def set(self) -> None:
        """It has happened."""

    def is_set(self) -> bool:
        """Whether it has."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has, or for `timeout` seconds; whether it has."""


class Thread(Protocol):
    """One that was started."""

    def join(self) -> None:
        """Wait until it has ended."""


class Threads:
    """Makes the operating system's threads."""

    def start(self, target: Callable[..., None], *given: Any, name: str) -> Thread:
        """A thread that calls `target(*given)`."""
        thread = threading.Thread(target=target, args=given, name=name)
        thread.start()
        return thread

    def make_queue(self) -> Queue[Any]:
        """For any number of threads on both sides."""
        return queue.SimpleQueue()

    def make_event(self) -> Event:
        """Not set."""
        return threading.Event()

    def make_lock(self) -> AbstractContextManager[Any]:
        """To be held in a `with`, also while waiting for the database."""
        return threading.Lock()

    def make_pool(self, size: int, name: str) -> Executor:
        """Up to `size` threads; leaving its `with` waits for what was handed to them."""
        return ThreadPoolExecutor(size, thread_name_prefix=name)

    def monotonic(self) -> float:
        """Seconds of a clock that only goes forward."""
        return time.monotonic()


OF_THE_SYSTEM = Threads()
