"""What the two expiry jobs meet: payments that nobody finished, and subscriptions that are over."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import Any

from billing_orchestration.sandbox.example_data.book import Book
from billing_orchestration.sandbox.example_data.records import PAYMENTS_JOB, SUBSCRIPTIONS_JOB, Expectation, Item

SETTLED = Expectation(row="SUCCEEDED", grant="created")
EXPIRED_ROW = Expectation(row="EXPIRED", grant="")
LEFT_PENDING = Expectation(row="PENDING", grant="")
EXPIRED = Expectation(status="EXPIRED", charges=0, grant="")
LEFT_ACTIVE = Expectation(status="ACTIVE", charges=0, grant="")


def long_pending(book: Book) -> None:
    """PENDING for more than seven days, and the provider's word on each."""

    def case(label: str, *rest: Any) -> None:
        book.case(PAYMENTS_JOB, f"PENDING for nine days: {label}", *rest)

    stale = partial(book.purchase, "PENDING", ago=timedelta(days=9))
    case("paid there on the first day", "asked about: settled, subscription created", SETTLED, [stale(), stale()])
    case("still pending there (cash)", "EXPIRED; a later success would revive it", EXPIRED_ROW,
         stale(there="pending", method_type="cash"))  # fmt: skip
    case("canceled there", "EXPIRED", EXPIRED_ROW, [stale(there="canceled") for _ in range(6)])
    case("not known there", "EXPIRED", EXPIRED_ROW, stale(there="not found"))
    case("it never got an id", "EXPIRED", EXPIRED_ROW, [stale(there=None) for _ in range(2)])
    case("the money is held (waiting_for_capture)", "left PENDING, reported", LEFT_PENDING,
         stale(there="waiting_for_capture"))  # fmt: skip
    unanswered = stale(there="canceled")
    book.misbehaviours.append(
        {"call": "get", "payment_id": unanswered.external_id, "effect": "error_before", "times": None}
    )
    case("the provider does not answer about it", "left PENDING, the run is red; the next one expires it", EXPIRED_ROW,
         unanswered)  # fmt: skip
    twice = stale()
    case("two rows with one provider id, paid", "settled once", SETTLED, twice)
    case("the second of these two rows", "EXPIRED as a duplicate", EXPIRED_ROW, book.copy_of(twice))
    book.case(PAYMENTS_JOB, "PENDING for six days and 23 hours", "left PENDING: not seven days yet", LEFT_PENDING,
              book.purchase("PENDING", ago=timedelta(days=6, hours=23), there="canceled"))  # fmt: skip


def over(book: Book) -> None:
    """Three days past the end, and not renewed."""
    case = partial(book.case, SUBSCRIPTIONS_JOB)
    case("stale for months, the saved card still works", "too old to charge (30 days): EXPIRED", EXPIRED,
         [book.due(book.ago(days=33 + 6 * number)) for number in range(24)])  # fmt: skip
    case("does not renew, ended three days ago", "EXPIRED: the grace is over", EXPIRED,
         [book.due(book.on_day(3), book.one_off) for _ in range(4)])  # fmt: skip
    case("does not renew, ended yesterday", "within the grace: left ACTIVE", LEFT_ACTIVE,
         [book.due(book.on_day(1), book.one_off) for _ in range(4)])  # fmt: skip
    case("no saved method, ended ten days ago", "could not be charged: EXPIRED", EXPIRED,
         [book.due(book.on_day(10), bought=False) for _ in range(3)])  # fmt: skip

    def declined_daily() -> Item:
        item = book.due(book.on_day(5))
        for day in (4, 3, 2):
            book.attempt(item, "DECLINED", book.on_day(day), reason="insufficient_funds", decline_class="soft")
        return item

    case("declined (soft) on every day of the grace", "no longer charged: EXPIRED", EXPIRED,
         [declined_daily() for _ in range(2)])  # fmt: skip
