"""The order of GET /payments, and one page of it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable
from datetime import datetime, timedelta

from billing_orchestration.sandbox.provider.clock import milliseconds
from billing_orchestration.sandbox.provider.list_requests import ListRequest
from billing_orchestration.sandbox.provider.records import Payment
from billing_orchestration.sandbox.provider.switches import Switches

# The list reaches back three years.
HISTORY = timedelta(days=3 * 365)
# (position in milliseconds, sequence, payment): sequences are unique, so payments themselves are never compared.
Entry = tuple[int, int, Payment]


def position(entry: Entry) -> int:
    """The instant that the list is ordered by."""
    return entry[0]


def place(entry: Entry) -> tuple[int, int]:
    """Unique, so a cursor names it."""
    return entry[:2]


class PaymentList:
    """All payments by creation, and the captured ones by capture."""

    def __init__(self, payments: Iterable[Payment] = ()) -> None:
        self.by_created: list[Entry] = []
        self.by_captured: list[Entry] = []
        # The last scan by capture, for its next page: bounds, number of captures then, and payments found.
        self._scan: tuple[tuple[int, int, int], list[Entry]] | None = None
        for payment in payments:
            self.created(payment)
            self.captured(payment)

    def created(self, payment: Payment) -> None:
        """Index a new payment."""
        insort(self.by_created, (milliseconds(payment.created_at), payment.sequence, payment), key=place)

    def captured(self, payment: Payment) -> None:
        """Index a payment by its capture, if it has been captured."""
        if payment.captured_at is not None:
            insort(self.by_captured, (milliseconds(payment.captured_at), payment.sequence, payment), key=place)

    def page(self, request: ListRequest, now: datetime, switches: Switches) -> tuple[list[Entry], bool]:
        """The page's entries, latest first, and whether more follow."""
        oldest = max(request.created_from, milliseconds(now - HISTORY))
        lag = timedelta(seconds=switches.list_lag_s)
        in_order_of_capture = request.by_captured and switches.captured_order == "captured_at"
        if in_order_of_capture:
            index, low, high = self.by_captured, request.captured_from, request.captured_to
        elif request.by_captured:
            index, low, high = self._captured_within(request), oldest, request.created_to
        else:
            index, low, high = self.by_created, oldest, request.created_to
        first = bisect_left(index, low, key=position)
        if request.cursor is None:
            end = bisect_right(index, high, key=position)
        else:
            end = bisect_left(index, (request.cursor.position, request.cursor.sequence), key=place)
        page: list[Entry] = []
        for at in range(end - 1, first - 1, -1):
            payment = index[at][2]
            if request.status not in (None, payment.status) or request.method_type not in (None, payment.method_type):
                continue
            if in_order_of_capture and not oldest <= milliseconds(payment.created_at) <= request.created_to:
                continue
            if lag and now - payment.changed_at < lag:
                continue
            if len(page) == request.limit:
                return page, True
            page.append(index[at])
        return page, False

    def _captured_within(self, request: ListRequest) -> list[Entry]:
        """Payments captured within the bounds, in the order of their creation."""
        asked = (request.captured_from, request.captured_to, len(self.by_captured))
        if self._scan is None or self._scan[0] != asked:
            first = bisect_left(self.by_captured, request.captured_from, key=position)
            end = bisect_right(self.by_captured, request.captured_to, key=position)
            found = [(milliseconds(p.created_at), sequence, p) for _, sequence, p in self.by_captured[first:end]]
            self._scan = asked, sorted(found, key=place)
        return self._scan[1]
