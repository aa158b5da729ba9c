"""PostgreSQL's own plans of the jobs' statements, on the very tables that are measured (point 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from bench.provider import payment_id
from billing_orchestration.database.audit import Stamp
from billing_orchestration.database.engine import create_engine
from billing_orchestration.database.expiry import (
    expire_locked,
    expire_payments,
    fetch_over,
    fetch_stale_payments,
    lock_over,
)
from billing_orchestration.database.matching import fetch_pending, fetch_rows, fetch_settled

UTC = timezone.utc
_WORK = ("SELECT", "WITH", "UPDATE", "INSERT", "(SELECT")


@contextmanager
def explained(url: str) -> Iterator[tuple[sa.Connection, list[str]]]:
    """A connection, and a text for each statement that it is given: the statement's plan. Nothing is committed."""
    engine = create_engine(url)
    plans: list[str] = []

    def before(_: Any, cursor: Any, statement: str, parameters: Any, *__: Any) -> None:
        if statement.strip().startswith(_WORK) and "set_config" not in statement:
            # On a cursor of its own: a streamed statement's can do nothing else.
            with cursor.connection.cursor() as asking:
                asking.execute(f"EXPLAIN (COSTS OFF) {statement}", parameters)
                plan = "\n".join("    " + row[0][:160] for row in asking.fetchall())
            plans.append(f"{' '.join(statement.split())[:300]}\n\n{plan}\n")

    try:
        with engine.connect() as connection:
            sa.event.listen(engine, "before_cursor_execute", before)
            yield connection, plans
            connection.rollback()
    finally:
        engine.dispose()


def of_matching(url: str, start: datetime, count: int) -> list[str]:
    """The plans of a matching run over the hour from `start`, in which `count` payments succeeded."""
    ids = [payment_id(number) for number in range(count)]

    def work(connection: sa.Connection) -> None:
        fetch_pending(connection, start, start + timedelta(hours=1), ids)
        fetch_rows(connection, ids)
        fetch_settled(connection, ids)

    return _of(url, work)


def of_expiry(url: str) -> list[str]:
    """The plans of both expiry jobs (see `expiry.fill`)."""
    stamp = Stamp("bench", "bench", datetime(2026, 3, 12, 12, tzinfo=UTC))
    over_before = datetime(2026, 3, 10, tzinfo=UTC)

    def work(connection: sa.Connection) -> None:
        fetch_over(connection, over_before, 100)
        locked = lock_over(connection, over_before, 10_000, None)
        assert locked is not None
        expire_locked(connection, stamp, locked, over_before=over_before, reason="over")
        rows = fetch_stale_payments(connection, datetime(2026, 3, 5, 12, tzinfo=UTC))
        expire_payments(connection, stamp, [(row, "nobody paid") for row in rows[:1000]])

    return _of(url, work)


def _of(url: str, work: Callable[[sa.Connection], None]) -> list[str]:
    with explained(url) as (connection, plans):
        work(connection)
    # One statement asked with other values is told once.
    return list({plan.partition("\n")[0]: plan for plan in plans}.values())


def keep(folder: Path, name: str, plans: list[str]) -> None:
    """Write them beside the numbers."""
    (folder / f"plans_{name}.txt").write_text("\n".join(plans), encoding="utf-8")
