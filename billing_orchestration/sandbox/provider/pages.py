"""A list in the order of creation, and one page of it as the API sends it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Protocol, TypeVar

from billing_orchestration.sandbox.provider.answers import Answer
from billing_orchestration.sandbox.provider.clock import milliseconds
from billing_orchestration.sandbox.provider.list_requests import Cursor, ListRequest

# A list reaches back three years.
HISTORY = timedelta(days=3 * 365)


class Listed(Protocol):
    """What a list shows: a payment, a refund. `sequence` is unique."""

    @property
    def created_at(self) -> datetime: ...
    @property
    def sequence(self) -> int: ...
    def json(self) -> bytes: ...


T = TypeVar("T", bound=Listed)
# (position in milliseconds, sequence, item): sequences are unique, so items themselves are never compared.
Entry = tuple[int, int, T]


def position(entry: tuple[int, int, Listed]) -> int:
    """The instant that the list is ordered by."""
    return entry[0]


def place(entry: tuple[int, int, Listed]) -> tuple[int, int]:
    """Unique, so a cursor names it."""
    return entry[:2]


def entry_of(item: T) -> Entry[T]:
    """Its place by creation."""
    return milliseconds(item.created_at), item.sequence, item


def by_creation(items: Iterable[T]) -> list[Entry[T]]:
    """All of them, oldest first."""
    return sorted((entry_of(item) for item in items), key=place)


def enter(index: list[Entry[T]], entry: Entry[T]) -> None:
    """Keep an index in order."""
    insort(index, entry, key=place)


def take(
    index: Sequence[Entry[T]], low: int, high: int, request: ListRequest, wanted: Callable[[T], bool]
) -> tuple[list[Entry[T]], bool]:
    """One page of the entries within the bounds, latest first, and whether more follow."""
    first = bisect_left(index, low, key=position)
    if request.cursor is None:
        end = bisect_right(index, high, key=position)
    else:
        end = bisect_left(index, (request.cursor.position, request.cursor.sequence), key=place)
    page: list[Entry[T]] = []
    for at in range(end - 1, first - 1, -1):
        if not wanted(index[at][2]):
            continue
        if len(page) == request.limit:
            return page, True
        page.append(index[at])
    return page, False


def page_answer(page: Sequence[Entry[T]], more: bool, request: ListRequest) -> Answer:
    """The page, with `next_cursor` unless it is the last."""
    parts = [b'{"type":"list","items":[', b",".join(item.json() for _, _, item in page), b"]"]
    if more:
        cursor = Cursor(*place(page[-1]), request.page + 1, request.filters).encode()
        parts.append(b',"next_cursor":"' + cursor.encode() + b'"')
    parts.append(b"}")
    return Answer(200, b"".join(parts))
