"""A provider payment's method and refund, in the service's words."""

from __future__ import annotations

from decimal import Decimal

import pytest

from billing_orchestration.domain.provider_payment import METHOD_LABELS, METHODS_WITHOUT_LABEL
from billing_orchestration_tests.domain.given import a_payment


@pytest.mark.parametrize(
    ("method", "label"),
    [
        ("bank_card", "BANK_CARD"),
        ("yoo_money", "YOO_MONEY"),
        ("sberbank", "SBERBANK"),
        ("tinkoff_bank", "TINKOFF_BANK"),
        ("sbp", "SBP"),
        ("cash", None),
        ("sber_loan", None),
        (None, None),
    ],
)
def test_a_method_has_the_services_label_or_none(method: str | None, label: str | None) -> None:
    assert a_payment(method_type=method).method_label == label


def test_a_method_counts_as_saved_only_if_the_provider_says_so() -> None:
    assert a_payment().method_saved is False


def test_a_method_either_has_a_label_or_is_known_to_have_none() -> None:
    assert not set(METHOD_LABELS) & METHODS_WITHOUT_LABEL


@pytest.mark.parametrize(
    ("refunded", "in_full"), [("0.00", False), ("298.99", False), ("299.00", True), ("299.01", True)]
)
def test_a_payment_is_refunded_in_full_when_its_whole_amount_went_back(refunded: str, in_full: bool) -> None:
    assert a_payment(refunded_amount=Decimal(refunded)).refunded_in_full is in_full
