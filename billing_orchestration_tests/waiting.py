"""Waiting for a condition instead of for time: for a lock that somebody holds, for threads that meet."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import sqlalchemy as sa

T = TypeVar("T")
# Only a test that fails anyway waits this long.
_PATIENCE_S = 60.0


def wait_until(
    condition: Callable[[], T | None],
    what: str = "the condition",
    patience_s: float = _PATIENCE_S,
    every_s: float = 0.005,
) -> T:
    """Return what the condition finds, as soon as it holds."""
    deadline = time.monotonic() + patience_s
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited in vain: {what}")
        time.sleep(every_s)
    return found


def blocked_sessions(engine: sa.Engine) -> int:
    """How many sessions of this database wait for somebody's lock."""
    with engine.connect() as connection:
        return int(
            connection.execute(
                sa.text("""
                    SELECT count(*) FROM pg_stat_activity
                    WHERE datname = current_database() AND wait_event_type = 'Lock'
                """)
            ).scalar_one()
        )


def wait_for_a_blocked_session(engine: sa.Engine, count: int = 1) -> None:
    """Return as soon as this many sessions wait for somebody's lock."""
    wait_until(lambda: blocked_sessions(engine) >= count, "a session waits for a lock")


def start_blocked(pool: ThreadPoolExecutor, engine: sa.Engine, work: Callable[[], T], waiting: int = 1) -> Future[T]:
    """Start work in a thread and return when it waits for a lock (the `waiting`th session to do so)."""
    future = pool.submit(work)
    wait_until(lambda: future.done() or blocked_sessions(engine) >= waiting, "the work waits for a lock")
    assert not future.done(), f"it did not wait for the lock: {future.exception() or future.result()}"
    return future


def at_once(works: Sequence[Callable[[], T]]) -> list[T]:
    """Start all of them at the same moment, each in a thread; their results in order."""
    start = threading.Barrier(len(works), timeout=_PATIENCE_S)

    def run(work: Callable[[], T]) -> T:
        start.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(run, works))
