"""Amounts: read exactly or refused, never rounded."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing_orchestration.domain.money import LARGEST_AMOUNT, Money, parse_amount


@pytest.mark.parametrize(
    ("value", "amount"),
    [
        ("123.45", "123.45"),
        ("0.01", "0.01"),
        ("0", "0.00"),
        ("0.00", "0.00"),
        ("299", "299.00"),
        ("299.0", "299.00"),
        ("299.000", "299.00"),
        (" 299.00 ", "299.00"),
        ("999999.99", "999999.99"),
        ("-5.00", "-5.00"),
        (299, "299.00"),
        (Decimal("299.00"), "299.00"),
    ],
)
def test_an_amount_is_read_exactly(value: object, amount: str) -> None:
    assert str(parse_amount(value)) == amount


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 1.5, [], {}, b"1.00"),
        *("", " ", "free", "1,00", "1 000.00", "12.3.4", "--1", "0x10", "1.00 RUB"),
        *("NaN", "sNaN", "Infinity", "-inf", Decimal("NaN"), Decimal("sNaN"), Decimal("Infinity")),
        *("0.001", "299.995", "1000000", "-1000000", "1e9", "9" * 400),
        # Notations that Python's Decimal knows and no provider writes.
        *("1e2", "1E+2", "1_000.00", "٢٩٩", "２９９.００"),
    ],
)
def test_what_is_not_a_plain_decimal_of_two_places_is_refused_with_the_reason(value: object) -> None:
    with pytest.raises(ValueError, match="amount"):
        parse_amount(value)


@settings(max_examples=200, deadline=None)
@given(st.decimals(-LARGEST_AMOUNT, LARGEST_AMOUNT, places=2))
def test_every_amount_the_database_can_hold_reads_back(amount: Decimal) -> None:
    assert parse_amount(f"{amount:f}") == amount


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20) | st.from_regex(r"-?[0-9.eE_+]{1,12}", fullmatch=True))
def test_whatever_is_read_fits_the_database_or_is_refused(text: str) -> None:
    try:
        amount = parse_amount(text)
    except ValueError:
        return
    assert abs(amount) <= LARGEST_AMOUNT
    assert amount.as_tuple().exponent == -2
    assert Decimal(text.strip()) == amount


def test_the_same_number_in_another_currency_is_other_money() -> None:
    assert Money(Decimal(5), "RUB") != Money(Decimal(5), "USD")
    assert Money(Decimal("5.00"), "RUB") == Money(Decimal(5), "RUB")
    assert str(Money(Decimal(5), "RUB")) == "5.00 RUB"
