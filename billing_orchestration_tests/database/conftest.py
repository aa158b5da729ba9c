"""The books that tests of the SQL work on."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from billing_orchestration_tests.books import Books


@pytest.fixture
def books(engine: sa.Engine) -> Books:
    """A migrated database with a provider; payment ids are unique (an index says so)."""
    return Books(engine)


@pytest.fixture
def flawed_books(engine: sa.Engine) -> Books:
    """The same where the service's data has repeated payment ids, so that the unique index could not be built."""
    books = Books(engine)
    books.tolerate_duplicates()
    return books
