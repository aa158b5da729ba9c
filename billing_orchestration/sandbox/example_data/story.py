"""The whole of the example data, case by case, in the order in which the day's jobs meet them."""

from __future__ import annotations

import random
from datetime import datetime, timezone

import sqlalchemy as sa

from billing_orchestration.sandbox.example_data import endings, payments, renewals
from billing_orchestration.sandbox.example_data.book import Book
from billing_orchestration.sandbox.example_data.records import Story
from billing_orchestration.sandbox.example_data.writing import write
from billing_orchestration.sandbox.provider.remote_control import SandboxControl

_CHAPTERS = (
    renewals.ordinary,
    renewals.declined,
    renewals.badly_answered,
    renewals.not_charged,
    renewals.tried_before,
    payments.paid_within_the_hour,
    payments.differing,
    payments.unknown_here,
    payments.odd,
    endings.long_pending,
    endings.over,
)


def fill(engine: sa.Engine, provider: SandboxControl, now: datetime, seed: int = 20) -> Story:
    """Write the example data into an empty database and into the sandbox. The same seed, the same data.

    The service's tables come first, with flaws that only a database without our indexes can have; then it is migrated,
    as an existing service's database is. `now` is aware; every date is relative to it, so that the jobs can run for the
    real present.
    """
    book = Book(now.astimezone(timezone.utc).replace(microsecond=0), random.Random(seed))
    for tell in _CHAPTERS:
        tell(book)
    return write(book, engine, provider)
