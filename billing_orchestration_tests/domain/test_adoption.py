"""What our rows become when a person accepts the provider's truth."""

from __future__ import annotations

from decimal import Decimal

import pytest

from billing_orchestration.domain.adoption import RowChange, provider_truth
from billing_orchestration.domain.money import Money
from billing_orchestration_tests.domain.given import PRICE, a_payment, a_row

LINKED = a_row("SUCCEEDED", subscription_id=12)


@pytest.mark.parametrize(("status", "becomes"), [
    ("canceled", "CANCELED"), ("pending", "PENDING"), ("waiting_for_capture", "PENDING"), (None, "EXPIRED"),
])  # fmt: skip
def test_a_row_that_was_never_paid_says_what_the_provider_says(status: str | None, becomes: str) -> None:
    payment = a_payment(status=status) if status else None
    refunded = a_row("REFUNDED", id=8)
    assert provider_truth([LINKED, refunded], payment) == [RowChange(LINKED, becomes), RowChange(refunded, becomes)]


def test_a_full_refund_is_refunded_and_a_part_stays_paid() -> None:
    assert provider_truth([LINKED], a_payment(refunded_amount=PRICE.amount)) == [RowChange(LINKED, "REFUNDED")]
    assert provider_truth([LINKED], a_payment(refunded_amount=Decimal(1))) == []
    refunded = a_row("REFUNDED")
    assert provider_truth([refunded], a_payment(refunded_amount=Decimal(1))) == [RowChange(refunded, "SUCCEEDED")]


def test_the_amount_and_currency_are_the_providers() -> None:
    money = Money(Decimal("10.00"), "EUR")
    assert provider_truth([LINKED], a_payment(money=money)) == [RowChange(LINKED, "SUCCEEDED", money)]


def test_of_several_paid_rows_the_granted_one_keeps_the_payment() -> None:
    lone, linked, other = a_row("SUCCEEDED", id=1), a_row("SUCCEEDED", id=2, subscription_id=12), a_row("PENDING", id=3)
    assert provider_truth([lone, linked, other], a_payment()) == [RowChange(lone, "EXPIRED")]
    assert provider_truth([lone, linked, other], a_payment(), settled_row=1) == [RowChange(linked, "EXPIRED")]


def test_rows_that_claim_no_money_are_left_to_the_jobs() -> None:
    rows = [a_row(status) for status in ("PENDING", "CREATED", "EXPIRED", "CANCELED", None)]
    for payment in (a_payment(), a_payment(status="canceled"), None):
        assert provider_truth(rows, payment) == []
