"""Every step of a run by which something can change outside of it, found while it happens; and a death at one of them.

A step is a statement that writes or locks, a COMMIT after such a statement, or a request over the wire. They are seen
where they leave the process (SQLAlchemy's cursor events, the dialect's commit, the provider's wire), so a step that
somebody adds tomorrow is counted the day it is written. Nothing here knows a job.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

from billing_orchestration.provider.wire import Wire

BEFORE, AFTER = "before", "after"

_WRITES = re.compile(
    r"\b(INSERT\s+INTO|UPDATE|DELETE\s+FROM|MERGE\s+INTO|COPY|CALL|TRUNCATE|CREATE|ALTER|DROP)\s+(?:ONLY\s+)?([\w.]+)",
    re.I,
)
_LOCKS = re.compile(r"\b(pg_\w*advisory\w*lock\w*|FOR\s+(?:NO\s+KEY\s+)?UPDATE|FOR\s+(?:KEY\s+)?SHARE)\b", re.I)
_FROM = re.compile(r"\bFROM\s+([a-z_][\w.]*)", re.I)


def name_of(statement: str) -> str | None:
    """What a statement changes or locks, in a few words; None when it only reads."""
    locked = _LOCKS.search(statement)
    written = [
        f"{found[1].split()[0].upper()} {found[2].removeprefix('billing_orchestration.')}"
        for found in _WRITES.finditer(statement)
        if found[2].upper() not in ("SET", "OF", "SKIP", "NOWAIT")  # FOR UPDATE OF a, DO UPDATE SET
    ]
    # The last of a chain of CTEs is the one that the statement is about.
    if written:
        return written[-1]
    if locked is None:
        return None
    words = " ".join(locked[1].split())
    table = _FROM.search(statement)
    name = table[1].removeprefix("billing_orchestration.") if table else "?"
    return words if "advisory" in words else f"SELECT {name} {words.upper()}"


@dataclass(frozen=True, order=True)
class Step:
    """The `nth` step of its name in one run. So named it is the same step in every run, whatever happens beside it."""

    name: str
    nth: int


@dataclass(frozen=True)
class Death:
    """Where a run is killed."""

    step: Step
    when: str


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Steps:
    """Counts the steps of this process, tells each, and at one of them does `strike`: kills the process (SIGKILL)."""

    def __init__(
        self, tell: Callable[[Step], None], death: Death | None = None, strike: Callable[[], None] | None = None
    ) -> None:
        self._tell = tell
        self._death = death
        self._strike = strike or _die
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._dirty: set[int] = set()
        self._open: dict[int, Step] = {}

    def begin(self, name: str) -> Step:
        """A step is about to happen."""
        with self._lock:
            self._counts[name] += 1
            step = Step(name, self._counts[name])
            self._tell(step)
        self._perhaps_die(step, BEFORE)
        return step

    def end(self, step: Step) -> None:
        """It has happened."""
        self._perhaps_die(step, AFTER)

    def _perhaps_die(self, step: Step, when: str) -> None:
        if self._death == Death(step, when):
            self._strike()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """One step, from before to after; also one that fails, for an answer that is lost is an answer."""
        begun = self.begin(name)
        try:
            yield
        finally:
            self.end(begun)

    def watch(self) -> None:
        """From now on and for the rest of this process. Not to be undone: it is for a process that will be killed."""
        dirty = self._dirty

        def before(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
            name = name_of(statement) if connection.dialect.name == "postgresql" else None
            if name is not None:
                self._open[id(cursor)] = self.begin(name)
                dirty.add(id(cursor.connection))

        def after(_connection: Any, cursor: Any, *_: Any) -> None:
            begun = self._open.pop(id(cursor), None)
            if begun is not None:
                self.end(begun)

        sa.event.listen(sa.Engine, "before_cursor_execute", before)
        sa.event.listen(sa.Engine, "after_cursor_execute", after)
        commit = PGDialect_psycopg.do_commit
        send = Wire.send

        def watched_commit(dialect: Any, dbapi_connection: Any) -> None:
            # Not `driver_connection`: of a connection that was detached from its pool that is None.
            driver = getattr(dbapi_connection, "dbapi_connection", None) or dbapi_connection
            if id(driver) not in dirty:
                commit(dialect, dbapi_connection)  # type: ignore[no-untyped-call]
                return
            dirty.discard(id(driver))
            with self.step("COMMIT"):
                commit(dialect, dbapi_connection)  # type: ignore[no-untyped-call]

        def watched_send(wire: Wire, method: str, target: str, **how: Any) -> Any:
            path = re.sub(r"(?<=/payments/).+", "{id}", target.partition("?")[0])
            called = re.sub(r".*(?=/(payments|refunds)\b)", "", path)
            with self.step(f"{method} {called}"):
                return send(wire, method, target, **how)

        PGDialect_psycopg.do_commit = watched_commit  # type: ignore[method-assign]
        Wire.send = watched_send  # type: ignore[method-assign,assignment]
