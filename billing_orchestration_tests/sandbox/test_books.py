"""The demo's judge: each promise that is broken in the books must be found, and by the ledger, not by our word."""

from __future__ import annotations

from datetime import datetime, timezone
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

from billing_orchestration.sandbox.books import Books, verdict
from billing_orchestration.sandbox.example_data.records import Plan, Subscription

START, END = datetime(2026, 3, 1), datetime(2026, 4, 1)  # noqa: DTZ001 - as the service's columns hold them
NEXT = datetime(2026, 5, 1)  # noqa: DTZ001


def entry(payment_id: str, kind: str = "charge", amount: str = "299.00", **metadata: str) -> dict[str, Any]:
    told = {"user_id": "user", **metadata}
    return {"payment_id": payment_id, "kind": kind, "amount": amount, "currency": "RUB", "metadata": told}


def row(payment_id: str, status: str = "SUCCEEDED", amount: str = "299.00") -> SimpleNamespace:
    return SimpleNamespace(status=status, amount=Decimal(amount), currency="RUB", external_payment_id=payment_id)


def grant(payment_id: str, subscription_id: int = 1, start: datetime = START, end: datetime = END) -> SimpleNamespace:
    return SimpleNamespace(
        external_payment_id=payment_id,
        kind="renewed",
        subscription_id=subscription_id,
        period_start=start,
        period_end=end,
    )


def faults(
    *,
    ledger: list[dict[str, Any]],
    payments: list[SimpleNamespace],
    settlements: list[SimpleNamespace] | None = None,
    quarantine: list[str] | None = None,
    ended_at: datetime = START,
) -> list[str]:
    """Everything the verdict objects to, for a service with one subscription that ended on 1 March."""
    before = Subscription(
        "user", Plan("Monthly", 1, "month", []), "ACTIVE", START, START.replace(tzinfo=timezone.utc), id=1
    )
    books = Books(
        ledger,
        payments,
        {1: SimpleNamespace(id=1, status="ACTIVE", ended_at=ended_at)},
        settlements or [],
        [],
        [SimpleNamespace(external_payment_id=payment_id) for payment_id in quarantine or []],
    )
    return [fault for check in verdict(books, [before]) for fault in check.faults]


def test_a_success_with_one_grant_is_in_order() -> None:
    assert not faults(ledger=[entry("a")], payments=[row("a")], settlements=[grant("a")], ended_at=END)


def test_a_success_without_a_row_and_without_metadata_is_another_sellers() -> None:
    foreign = {**entry("a"), "metadata": {}}
    assert not faults(ledger=[foreign], payments=[])
    assert faults(ledger=[foreign], payments=[row("a", "PENDING")]) == ["paid and not granted: payment a"]


def test_a_success_without_a_row_is_found() -> None:
    assert faults(ledger=[entry("a")], payments=[]) == ["paid and not granted: payment a"]


def test_a_success_that_is_still_pending_here_is_found() -> None:
    assert faults(ledger=[entry("a")], payments=[row("a", "PENDING")]) == ["paid and not granted: payment a"]


def test_a_success_in_quarantine_is_in_order() -> None:
    assert not faults(ledger=[entry("a")], payments=[row("a", "PENDING")], quarantine=["a"])


def test_a_full_refund_needs_no_grant_and_a_partial_one_does() -> None:
    refunded = [entry("a"), entry("a", "refund")]
    assert not faults(ledger=refunded, payments=[row("a", "REFUNDED")])
    half = [entry("a"), entry("a", "refund", "149.50")]
    assert faults(ledger=half, payments=[row("a", "REFUNDED")]) == ["paid and not granted: payment a"]


def test_a_row_without_a_success_is_found() -> None:
    assert faults(ledger=[], payments=[row("a")]) == ["payment a is paid here only"]


def test_a_settlement_without_a_success_is_found() -> None:
    told = faults(ledger=[], payments=[], settlements=[grant("a")], ended_at=END)
    assert told == ["settlement of a: the provider took no money"]


def test_two_rows_for_one_success_are_found() -> None:
    assert faults(ledger=[entry("a")], payments=[row("a"), row("a")]) == ["granted twice: payment a"]


def test_another_amount_than_the_providers_is_found() -> None:
    told = faults(ledger=[entry("a", amount="29.90")], payments=[row("a")])
    assert told == ["granted for another amount: payment a"]


def test_two_charges_of_one_period_are_found() -> None:
    period = {"subscription_id": "1", "period_start": START.isoformat()}
    told = faults(ledger=[entry("a", **period), entry("b", **period)], payments=[row("a"), row("b")])
    assert told == [f"subscription 1, period from {START.isoformat()}: charged 2 times"]


def test_time_that_nobody_paid_for_is_found() -> None:
    assert faults(ledger=[], payments=[], ended_at=END) == [f"subscription 1 ends {END}, paid until {START}"]


def test_time_that_was_paid_for_and_not_given_is_found() -> None:
    told = faults(ledger=[entry("a")], payments=[row("a")], settlements=[grant("a")], ended_at=START)
    assert told == [f"subscription 1 ends {START}, paid until {END}"]


def test_a_period_that_does_not_follow_its_predecessor_is_found() -> None:
    told = faults(
        ledger=[entry("a")], payments=[row("a")], settlements=[grant("a", start=END, end=NEXT)], ended_at=NEXT
    )
    assert told == [f"subscription 1: a period begins at {END}, not at {START}"]
