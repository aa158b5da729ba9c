"""The demo's judge: each promise that is broken in the books must be found, and money that no list shows."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest

from billing_orchestration.both_sides import BothSides, ProviderSide
from billing_orchestration.domain.money import Money
from billing_orchestration.domain.provider_payment import ProviderPayment, ProviderRefund, UnusablePayment
from billing_orchestration.domain.reconciled import Day
from billing_orchestration.domain.reconciliation import sum_up
from billing_orchestration.sandbox.books import Books, reconciled, verdict
from billing_orchestration.sandbox.example_data.records import Plan, Subscription
from billing_orchestration_tests.domain.given import a_payment

START, END = datetime(2026, 3, 1), datetime(2026, 4, 1)  # noqa: DTZ001 - as the service's columns hold them
NEXT = datetime(2026, 5, 1)  # noqa: DTZ001


def entry(payment_id: str, kind: str = "charge", amount: str = "299.00", **metadata: str) -> dict[str, Any]:
    told = {"user_id": "user", **metadata}
    return {"payment_id": payment_id, "kind": kind, "amount": amount, "currency": "RUB", "metadata": told}


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
    settlements: list[SimpleNamespace] | None = None,
    ended_at: datetime = START,
) -> list[str]:
    """What the verdict says of time and charges, for a service with one subscription that ended on 1 March."""
    before = Subscription(
        "user", Plan("Monthly", 1, "month", []), "ACTIVE", START, START.replace(tzinfo=timezone.utc), id=1
    )
    books = Books(
        ledger,
        [],
        {1: SimpleNamespace(id=1, status="ACTIVE", ended_at=ended_at)},
        settlements or [],
        [],
        [],
    )
    return [fault for check in verdict(books, [before]) for fault in check.faults]


def test_a_success_with_one_grant_is_in_order() -> None:
    assert not faults(ledger=[entry("a")], settlements=[grant("a")], ended_at=END)


def test_a_settlement_without_a_success_is_found() -> None:
    told = faults(ledger=[], settlements=[grant("a")], ended_at=END)
    assert told == ["settlement of a: the provider took no money"]


def test_two_charges_of_one_period_are_found() -> None:
    period = {"subscription_id": "1", "period_start": START.isoformat()}
    told = faults(ledger=[entry("a", **period), entry("b", **period)])
    assert told == [f"subscription 1, period from {START.isoformat()}: charged 2 times"]


def test_time_that_nobody_paid_for_is_found() -> None:
    assert faults(ledger=[], ended_at=END) == [f"subscription 1 ends {END}, paid until {START}"]


def test_time_that_was_paid_for_and_not_given_is_found() -> None:
    told = faults(ledger=[entry("a")], settlements=[grant("a")], ended_at=START)
    assert told == [f"subscription 1 ends {START}, paid until {END}"]


def test_a_period_that_does_not_follow_its_predecessor_is_found() -> None:
    told = faults(ledger=[entry("a")], settlements=[grant("a", start=END, end=NEXT)], ended_at=NEXT)
    assert told == [f"subscription 1: a period begins at {END}, not at {START}"]


# --- the comparison -----------------------------------------------------------------------------------------------

NOON = datetime(2026, 3, 11, 12, 0, tzinfo=timezone.utc)
DAY = Day(NOON.date(), NOON - timedelta(days=100), NOON + timedelta(days=1), NOON - timedelta(days=100))


def objections(
    *payments: ProviderPayment,
    rows: Sequence[tuple[str | None, str]] = (),
    refunds: Sequence[ProviderRefund] = (),
    unusable: Sequence[UnusablePayment] = (),
    quarantine: Sequence[str] = (),
    ledger: list[dict[str, Any]] | None = None,
) -> list[str]:
    """What the comparison objects to. Each of `rows`: a payment's id and a status; `ledger`: of these payments."""
    there = ProviderSide({payment.id: payment for payment in payments}, tuple(refunds), tuple(unusable), 1)
    at = NOON.replace(tzinfo=None)
    here = tuple((n, id_, status, 29900, "RUB", True, at) for n, (id_, status) in enumerate(rows, 1))
    if ledger is None:
        ledger = [entry(payment.id) for payment in payments if payment.status == "succeeded"]
        ledger += [entry(one.payment_id, "refund", str(one.money.amount)) for one in refunds]
    waiting = [SimpleNamespace(external_payment_id=payment_id) for payment_id in quarantine]
    lines = BothSides(DAY, there, here, frozenset()).compare()
    checks = reconciled(lines, sum_up(lines), Books(ledger, [], {}, [], [], waiting))
    return [fault for check in checks for fault in check.faults]


def paid(**changes: Any) -> ProviderPayment:
    return a_payment(id="a", created_at=NOON, captured_at=NOON, **changes)


def given_back(amount: str) -> ProviderRefund:
    return ProviderRefund("back", "a", "succeeded", Money(Decimal(amount), "RUB"), NOON)


PAID_IN_PART_BACK = paid(refunded_amount=Decimal("149.50"))
PAID_BACK = paid(refunded_amount=Decimal("299.00"))


def test_a_payment_that_both_sides_know_is_in_order() -> None:
    assert not objections(paid(), rows=[("a", "SUCCEEDED")])
    assert not objections(paid(metadata={}))  # another seller's
    assert not objections(PAID_BACK, rows=[("a", "REFUNDED")], refunds=[given_back("299.00")])


@pytest.mark.parametrize("payment_rows", [[], [("a", "PENDING")]], ids=["no row", "still pending"])
def test_a_success_without_a_grant_is_found_unless_a_person_has_it(payment_rows: list[tuple[str, str]]) -> None:
    [told] = objections(paid(), rows=payment_rows)
    assert told.startswith("payment a: paid there, missing or unfinished here: ")
    assert not objections(paid(), rows=payment_rows, quarantine=["a"])


def test_what_was_granted_and_given_back_later_waits_for_the_next_days_reconciliation() -> None:
    assert not objections(PAID_IN_PART_BACK, rows=[("a", "SUCCEEDED")], refunds=[given_back("149.50")])
    told = objections(PAID_IN_PART_BACK, rows=[("a", "REFUNDED")], refunds=[given_back("149.50")])
    assert [line.split(": ")[:2] for line in told] == [
        ["payment a", "refunded here, not there"],
        ["refund back", "refunded here, not there"],
    ]
    assert len(objections(PAID_BACK, refunds=[given_back("299.00")])) == 2


@pytest.mark.parametrize(("payments", "rows", "words"), [
    ([], [("a", "SUCCEEDED")], "payment a: paid here, not paid there: granted unpaid"),
    ([], [(None, "SUCCEEDED")], "payment 1: paid here, not paid there: granted unpaid"),
    ([paid()], [("a", "SUCCEEDED"), ("a", "SUCCEEDED")], "payment a: several paid rows here for one payment"),
    ([paid(money=Money(Decimal("299.00"), "USD"))], [("a", "SUCCEEDED")], "payment a: the amount or the currency"),
], ids=["unknown there", "without an id", "twice", "another currency"])  # fmt: skip
def test_each_difference_is_found(
    payments: list[ProviderPayment], rows: list[tuple[str | None, str]], words: str
) -> None:
    ledger = [{**entry(payment.id), "currency": payment.money.currency} for payment in payments]
    [told] = objections(*payments, rows=rows, ledger=ledger)
    assert told.startswith(words)


def test_money_that_the_ledger_knows_and_no_list_shows_is_found() -> None:
    assert objections(paid(), rows=[("a", "SUCCEEDED")], ledger=[entry("a"), entry("hidden")]) == [
        "paid at the provider 598.00 RUB, and in all classes together 299.00 RUB"
    ]
    # What cannot be read is in front of a person, and adds up to nothing.
    odd = UnusablePayment("odd", "odd", {})
    assert not objections(unusable=[odd], quarantine=["odd"], ledger=[entry("odd")])
    assert len(objections(unusable=[odd], ledger=[entry("odd")])) == 1
