"""Waiting for a condition instead of for time."""

from __future__ import annotations

import time
from collections.abc import Callable

import sqlalchemy as sa

# Only a test that would fail anyway waits this long.
_PATIENCE_S = 30.0


def wait_until(condition: Callable[[], object], patience_s: float = _PATIENCE_S) -> None:
    """Return as soon as the condition holds."""
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition never held")
        time.sleep(0.005)


def wait_for_a_blocked_session(engine: sa.Engine, count: int = 1) -> None:
    """Return as soon as so many sessions of this database wait for a lock that another one holds."""

    def blocked() -> bool:
        with engine.connect() as connection:
            found = connection.execute(
                sa.text("""
                    SELECT count(*) FROM pg_stat_activity
                    WHERE datname = current_database() AND wait_event_type = 'Lock'
                """)
            ).scalar_one()
        return bool(found >= count)

    wait_until(blocked)
