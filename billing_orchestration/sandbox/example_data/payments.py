"""What the matching jobs meet: payments on which the provider and the service disagree."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

from billing_orchestration.sandbox.example_data.book import Book
from billing_orchestration.sandbox.example_data.dates import day_31_before, months, next_short_month_end
from billing_orchestration.sandbox.example_data.records import PENDING_JOB, SUCCESSFUL_JOB, Expectation, Item

CREATED = Expectation(row="SUCCEEDED", grant="created", quarantine="")
EXTENDED = replace(CREATED, grant="extended")
REFUNDED = Expectation(row="REFUNDED", grant="refunded")
LEFT_PENDING = Expectation(row="PENDING", grant="", quarantine="")
LEFT_SUCCEEDED = replace(LEFT_PENDING, row="SUCCEEDED")
LEFT_REFUNDED = replace(LEFT_PENDING, row="REFUNDED")


def _purchase(book: Book, status: str | None, minutes: float, **how: Any) -> Item:
    return book.purchase(status, ago=timedelta(minutes=minutes), **how)


def paid_within_the_hour(book: Book) -> None:
    """PENDING here, and what the provider says."""
    case, pending = partial(book.case, PENDING_JOB), partial(_purchase, book, "PENDING")
    case("paid, no subscription yet", "payment SUCCEEDED, subscription created", CREATED,
         [pending(5 + 6 * number) for number in range(8)])  # fmt: skip
    case("renewed by hand half an hour ago, on the day it is due", "extended, and not charged again",
         replace(EXTENDED, status="ACTIVE", attempt="", charges=0),
         book.paid_again(book.due(book.ago(hours=2)), minutes=30))  # fmt: skip
    short, after = next_short_month_end(book.now)
    case(f"month end: paid ahead, bought on a 31st, ends {short:%d %B}",
         f"until {after:%d %B}: back to the anchor day",
         replace(EXTENDED, status="ACTIVE", until=f"{after:%Y-%m-%d}"),
         book.paid_again(book.due(short, started_at=day_31_before(short, book.now)), minutes=12))  # fmt: skip
    case("created three days ago, captured 20 minutes ago", "settled: the capture counts, not the creation", CREATED,
         book.purchase("PENDING", ago=timedelta(days=3), captured_minutes=20))  # fmt: skip
    case("paid in cash: a method the service has no label for", "settled, method left empty", CREATED,
         pending(25, method_type="cash"))  # fmt: skip
    case("half refunded since", "settled: only a full refund takes the grant", CREATED,
         pending(40, refunded="149.50"))  # fmt: skip
    case("fully refunded since", "payment REFUNDED, nothing granted", replace(REFUNDED, quarantine=""),
         pending(41, refunded="299.00"))  # fmt: skip
    case("the customer has not paid yet", "left PENDING", LEFT_PENDING,
         [pending(3 + number, there="pending") for number in range(3)])  # fmt: skip
    case("canceled there", "left PENDING until its seven days are over", LEFT_PENDING, pending(50, there="canceled"))
    case("never reached the provider (no id)", "left PENDING", LEFT_PENDING, pending(9, there=None))


def differing(book: Book) -> None:
    """PENDING here, paid there, and not the same."""
    case, pending = partial(book.case, PENDING_JOB), partial(_purchase, book, "PENDING")
    amount_differs = replace(LEFT_PENDING, quarantine="amount_differs")
    case("299 here, 29.90 there", "quarantine: nothing granted", amount_differs, pending(15, paid="29.90"))
    case("299 rubles here, 299 dollars there", "quarantine: nothing granted", amount_differs,
         pending(16, currency="USD"))  # fmt: skip
    case("the metadata names another customer than the row", "quarantine: nothing granted",
         replace(LEFT_PENDING, quarantine="foreign_metadata"),
         pending(17, linked=book.running(9).subscription))  # fmt: skip
    twice = pending(35)
    case("two rows with one provider id", "settled once", CREATED, twice)
    book.copy_of(twice)


def unknown_here(book: Book) -> None:
    """Paid there; no row here, or one that says otherwise."""
    case, paid = partial(book.case, SUCCESSFUL_JOB), partial(_purchase, book)
    case("paid there, no row here (the service crashed)", "payment and subscription created", CREATED,
         [paid(None, 10 + number) for number in range(3)])  # fmt: skip
    until = f"{months(book.now + timedelta(days=5), 1):%Y-%m-%d}"
    case("the same, but the customer already has the subscription", f"extended: {until}",
         replace(EXTENDED, until=until), book.paid_again(book.running(5), minutes=33, status=None))  # fmt: skip
    case("no row here, refunded in full there", "recorded as REFUNDED, nothing granted", REFUNDED,
         paid(None, 22, refunded="299.00"))  # fmt: skip
    case("EXPIRED here, paid ten days later", "revived: SUCCEEDED, subscription created", CREATED,
         book.purchase("EXPIRED", ago=timedelta(days=10), captured_minutes=14))  # fmt: skip
    case("something else bought at the same shop: no row, none of our metadata", "foreign: left alone",
         Expectation(grant="", quarantine=""), paid(None, 26, metadata={}))  # fmt: skip
    case("CREATED here, paid there", "SUCCEEDED, subscription created", CREATED, paid("CREATED", 28))
    case("REFUNDED here, refunded there", "left alone", LEFT_REFUNDED, paid("REFUNDED", 45, refunded="299.00"))
    case("SUCCEEDED on both sides", "left alone", LEFT_SUCCEEDED,
         [paid("SUCCEEDED", 20 + number, subscribed=True) for number in range(5)])  # fmt: skip
    twice = paid("SUCCEEDED", 47, subscribed=True)
    case("a second row of it is still PENDING", "left alone: granted already", LEFT_SUCCEEDED, twice)
    book.copy_of(twice, status="PENDING")


def odd(book: Book) -> None:
    """Paid there, and only a person can say what it is for."""
    never_made = {"renewal_attempt_id": "7d0d5f0e-5f1c-5d5e-8e0e-000000000001"}
    unreadable = {"amount": {"value": "1e12", "currency": "RUB"}}
    for label, kind, status, how in (
        ("CANCELED here, paid there", "canceled_here", "CANCELED", {}),
        ("the metadata names no plan", "metadata", None, {"metadata": {"plan_id": ""}}),
        ("the metadata's plan is “gold”", "metadata", None, {"metadata": {"plan_id": "gold"}}),
        ("the metadata's plan does not exist", "metadata", None, {"metadata": {"plan_id": "4711"}}),
        ("the metadata's payment provider does not exist", "metadata", None,
         {"metadata": {"payment_provider_id": "99"}}),
        ("a test payment in the live shop", "test_payment", None, {"test": True}),
        ("names a renewal that we never made", "unknown_attempt", None, {"metadata": never_made}),
        ("an unreadable item in the provider's list", "unreadable", None, {"override": unreadable}),
    ):  # fmt: skip
        book.case(SUCCESSFUL_JOB, label, "quarantine: nothing granted", Expectation(grant="", quarantine=kind),
                  _purchase(book, status, 18, **how))  # fmt: skip
