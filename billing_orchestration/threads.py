"""The threads of a run, and what they wait for each other with.

A run's own threads, and whatever one of them waits for another with, are made here and nowhere else (a lock that is
held for some arithmetic may be made where it is used). A simulation puts `Threads` of its own in their place and so
decides, from a seed, which thread goes on at each step.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Executor

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
    """Those of the operating system."""

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
        from concurrent.futures import ThreadPoolExecutor

        return ThreadPoolExecutor(size, thread_name_prefix=name)

    def monotonic(self) -> float:
        """Seconds of a clock that only goes forward."""
        return time.monotonic()


# The last one counts. No ContextVar: a run's threads shall find the same as the one that has started them.
_makers = [Threads()]


def threads() -> Threads:
    """What makes this process's threads."""
    return _makers[-1]


@contextmanager
def threads_made_by(other: Threads) -> Iterator[None]:
    """Let another make them, for a while."""
    _makers.append(other)
    try:
        yield
    finally:
        _makers.pop()
