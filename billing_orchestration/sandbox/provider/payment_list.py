"""The order of GET /payments, and one page of it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from datetime import datetime, timedelta

from billing_orchestration.sandbox.provider.clock import milliseconds
from billing_orchestration.sandbox.provider.list_requests import ListRequest
from billing_orchestration.sandbox.provider.pages import HISTORY, Entry, by_creation, enter, entry_of, position, take
from billing_orchestration.sandbox.provider.payments import Payment
from billing_orchestration.sandbox.provider.switches import Switches


class PaymentList:
    """All payments by creation, and the captured ones by capture."""

    def __init__(self, payments: Iterable[Payment] = ()) -> None:
        self.by_created: list[Entry[Payment]] = []
        self.by_captured: list[Entry[Payment]] = []
        # The last scan by capture, for its next page: bounds, number of captures then, and payments found.
        self._scan: tuple[tuple[int, int, int], list[Entry[Payment]]] | None = None
        for payment in payments:
            self.created(payment)
            self.captured(payment)

    def created(self, payment: Payment) -> None:
        """Index a new payment."""
        enter(self.by_created, entry_of(payment))

    def captured(self, payment: Payment) -> None:
        """Index a payment by its capture, if it has been captured."""
        if payment.captured_at is not None:
            enter(self.by_captured, (milliseconds(payment.captured_at), payment.sequence, payment))

    def page(self, request: ListRequest, now: datetime, switches: Switches) -> tuple[list[Entry[Payment]], bool]:
        """The page's entries, latest first, and whether more follow."""
        oldest = max(request.created_from, milliseconds(now - HISTORY))
        lag = timedelta(seconds=switches.list_lag_s)
        in_order_of_capture = request.by_captured and switches.captured_order == "captured_at"
        status, method_type = request.exact.get("status"), request.exact.get("payment_method")

        def wanted(payment: Payment) -> bool:
            if status not in (None, payment.status) or method_type not in (None, payment.method_type):
                return False
            if in_order_of_capture and not oldest <= milliseconds(payment.created_at) <= request.created_to:
                return False
            return not lag or now - payment.changed_at >= lag

        if in_order_of_capture:
            return take(self.by_captured, request.captured_from, request.captured_to, request, wanted)
        index = self._captured_within(request) if request.by_captured else self.by_created
        return take(index, oldest, request.created_to, request, wanted)

    def _captured_within(self, request: ListRequest) -> list[Entry[Payment]]:
        """Payments captured within the bounds, in the order of their creation."""
        asked = (request.captured_from, request.captured_to, len(self.by_captured))
        if self._scan is None or self._scan[0] != asked:
            first = bisect_left(self.by_captured, request.captured_from, key=position)
            end = bisect_right(self.by_captured, request.captured_to, key=position)
            self._scan = asked, by_creation(payment for _, _, payment in self.by_captured[first:end])
        return self._scan[1]
