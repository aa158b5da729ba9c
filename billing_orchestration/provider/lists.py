"""The provider's lists, read to their ends: a slice is whole or an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any, TypeVar

from billing_orchestration.domain.provider_payment import PENDING, SUCCEEDED, WAITING_FOR_CAPTURE
from billing_orchestration.provider.errors import IncompleteSlice, ProviderError, WrongCredentials
from billing_orchestration.provider.pacing import map_concurrently
from billing_orchestration.provider.records import provider_instant
from billing_orchestration.provider.slices import Collector, Names, Pages, RefundCollector, RefundSlice, Slice
from billing_orchestration.provider.translation import Call
from billing_orchestration.threads import Threads

SomePages = TypeVar("SomePages", bound=Pages)
# Reads one page: its items, the next page's cursor, and how many requests that took.
ReadPage = Callable[[str, Mapping[str, str], Call], tuple[list[Any], Any, int]]

PAGE_SIZE = "100"
# A million payments. A provider whose cursors go on beyond that never ends its list.
MOST_PAGES = 10_000
# A list up to this long is read page by page; a longer one is started over in parts that are read concurrently. Four
# parts bring three quarters of the possible gain, and four requests at once are far below any shop's rate limit.
_SHORT_PAGES = 3
_WORTHWHILE_WINDOWS = 4
# The provider's instants are whole milliseconds.
_RESOLUTION = timedelta(milliseconds=1)


class Lists:
    """Reads lists of payments and of refunds. `foreign` cleans a text of the provider's for an error."""

    def __init__(self, read_page: ReadPage, foreign: Callable[[str], str], threads: Threads) -> None:
        self._read_page = read_page
        self._foreign = foreign
        self._threads = threads

    def payments(self, filters: Mapping[str, str]) -> Slice:
        """Every payment that matches the filters, following the cursors to the end.

        Raises IncompleteSlice when the end was not reached, with the reason as `__cause__`; WrongCredentials as it is.
        """
        return self._collect("payments", filters, Collector()).whole()

    def succeeded(self, start: datetime, end: datetime, parallel_windows: int | None) -> Slice:
        """The payments that succeeded and were created or captured in [start, end]. See PaymentProvider.fetch_slice."""
        return self._created_or_captured(SUCCEEDED, start, end, parallel_windows)

    def succeeded_on_one_page(self, start: datetime, end: datetime) -> Slice | None:
        """The same where each of both lists has a single page; None where one goes on."""
        slice_ = Collector(SUCCEEDED)
        return slice_.whole() if self._read_if_short(SUCCEEDED, start, end, slice_, 1) else None

    def in_status(self, status: str, start: datetime, end: datetime, most_pages: int) -> frozenset[str] | None:
        """The ids of payments that were created in [start, end] and are in a status; None where it takes more pages."""
        filters = _filters(status, "created_at", start, end)
        names = self._collect("payments", filters, Names(status), most_pages=most_pages)
        return None if names.is_cut else frozenset(names.ids)

    def payments_of_day(self, start: datetime, end: datetime, parallel_windows: int | None) -> Slice:
        """The payments in any status that were created or captured in [start, end), each once."""
        return self._created_or_captured(None, start, end - _RESOLUTION, parallel_windows)

    def unfinished(self, start: datetime, end: datetime) -> Slice:
        """The payments that were created in [start, end] and may still be paid, each once."""
        slice_ = Collector()
        # In this order: what is authorized in between is in the second list.
        for status in (PENDING, WAITING_FOR_CAPTURE):
            self._collect("payments", _filters(status, "created_at", start, end), slice_)
        return slice_.whole()

    def refunds_of_day(self, start: datetime, end: datetime) -> RefundSlice:
        """The refunds in any status that were created in [start, end), each once."""
        filters = window("created_at", start, end - _RESOLUTION)
        return self._collect("refunds", filters, RefundCollector()).whole()

    def _created_or_captured(
        self, status: str | None, start: datetime, end: datetime, parallel_windows: int | None
    ) -> Slice:
        slice_ = Collector(status)
        if parallel_windows is None:
            if self._read_if_short(status, start, end, slice_, _SHORT_PAGES):
                return slice_.whole()
            parallel_windows = _WORTHWHILE_WINDOWS
        bounds = _split(start, end, parallel_windows)
        lists = [
            _filters(status, instant, first, last)
            for instant in ("created_at", "captured_at")
            for first, last in bounds
        ]
        if parallel_windows == 1:
            for filters in lists:
                self._collect("payments", filters, slice_)
            return slice_.whole()
        parts: dict[int, Collector] = {}

        def read(number: int) -> Collector:
            return self._collect("payments", lists[number], Collector(status))

        for number, part in map_concurrently(read, range(len(lists)), parallel_windows, threads=self._threads):
            if isinstance(part, Exception):
                raise part
            parts[number] = part
        for number in range(len(lists)):
            slice_.merge(parts.pop(number))
        return slice_.whole()

    def _read_if_short(
        self, status: str | None, start: datetime, end: datetime, slice_: Collector, most_pages: int
    ) -> bool:
        """Read both lists as far as they are short. False: one of them is longer, and was left before its end."""
        for instant in ("created_at", "captured_at"):
            self._collect("payments", _filters(status, instant, start, end), slice_, most_pages=most_pages)
            if slice_.is_cut:
                return False
        return True

    def _collect(
        self, what: str, filters: Mapping[str, str], pages: SomePages, *, most_pages: int | None = None
    ) -> SomePages:
        cursor: str | None = None
        seen: set[str] = set()
        page = 0
        while True:
            page += 1
            query = {"limit": PAGE_SIZE, **filters}
            if cursor is not None:
                query["cursor"] = cursor
            try:
                items, following, requests = self._read_page(what, query, Call(f"page {page} of the list of {what}"))
            except WrongCredentials:
                raise
            except ProviderError as fault:
                raise IncompleteSlice(
                    f"the list of {what} broke off at page {page}: {fault} Nothing was decided from it."
                ) from fault
            pages.requests += requests
            pages.add_page(items)
            if following in (None, ""):
                return pages
            if page == most_pages:
                pages.is_cut = True
                return pages
            cursor = self._next_cursor(what, following, seen, page)

    def _next_cursor(self, what: str, following: Any, seen: set[str], page: int) -> str:
        """The next page's cursor. Raises IncompleteSlice for one that leads nowhere, or nowhere new."""
        if isinstance(following, str) and following not in seen and page < MOST_PAGES:
            seen.add(following)
            return following
        shown = self._foreign(repr(following))
        if page == MOST_PAGES:
            problem = f"goes on after {MOST_PAGES} pages"
        elif isinstance(following, str):
            problem = f"repeats the cursor {shown}"
        else:
            problem = f"names {shown} as its cursor"
        raise IncompleteSlice(
            f"the list of {what} {problem} (page {page}), so its end cannot be reached. Nothing was decided from it."
        )


def _split(start: datetime, end: datetime, parts: int) -> list[tuple[datetime, datetime]]:
    """The window in equal parts, latest first, as the provider lists. Each starts where its neighbour ends."""
    if parts < 1:
        raise ValueError(f"parallel_windows is {parts}; it must be at least 1")
    step = (end - start) / parts
    marks = [start + step * number for number in range(parts)] + [end]
    return [(marks[number], marks[number + 1]) for number in reversed(range(parts))]


def _filters(status: str | None, instant: str, start: datetime, end: datetime) -> dict[str, str]:
    return {**({} if status is None else {"status": status}), **window(instant, start, end)}


def window(name: str, start: datetime, end: datetime) -> dict[str, str]:
    """The filters for an instant in [start, end], widened to whole milliseconds."""
    if start > end:
        raise ValueError(f"the window starts at {start} and ends before that, at {end}")
    return {f"{name}.gte": provider_instant(start), f"{name}.lte": provider_instant(end, round_up=True)}
