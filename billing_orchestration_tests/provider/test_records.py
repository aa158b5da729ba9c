"""One payment's JSON to a record: what is used, what is set aside, and that nothing foreign raises."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing_orchestration.domain.money import Money
from billing_orchestration.domain.provider_payment import ProviderPayment, UnusablePayment
from billing_orchestration.provider.records import evidence, parse_payment, provider_instant, read_json
from billing_orchestration.provider.slices import Collector
from billing_orchestration_tests.provider.wire_server import payment


def usable(item: object) -> ProviderPayment:
    told = parse_payment(item)
    assert isinstance(told, ProviderPayment), told
    return told


def test_a_payment_is_read_with_every_field_that_a_rule_needs() -> None:
    assert usable(payment(refunded_amount={"value": "99.00", "currency": "RUB"}, test=True)) == ProviderPayment(
        id="2d0e7f6a-0001",
        status="succeeded",
        money=Money(Decimal("499.00"), "RUB"),
        created_at=datetime(2026, 3, 1, 9, 59, 30, 125_000, tzinfo=timezone.utc),
        captured_at=datetime(2026, 3, 1, 10, 0, 0, 500_000, tzinfo=timezone.utc),
        refunded_amount=Decimal("99.00"),
        is_test=True,
        method_type="bank_card",
        method_id="2a0b4c6d-saved",
        method_saved=True,
        metadata={"user_id": "u-1", "plan_id": "7", "payment_provider_id": "1"},
        income_amount=Decimal("482.53"),
    )


def test_nulls_in_fields_that_no_rule_needs_do_not_matter() -> None:
    bare = {
        "id": "bare",
        "status": "pending",
        "amount": {"value": "1.00", "currency": "EUR"},
        "created_at": "2026-03-01T00:00:00.000Z",
    }
    nulls = dict.fromkeys(
        ("recipient", "income_amount", "captured_at", "refunded_amount", "metadata", "payment_method", "paid")
    )
    expected = ProviderPayment(
        "bare", "pending", Money(Decimal("1.00"), "EUR"), datetime(2026, 3, 1, tzinfo=timezone.utc)
    )
    assert usable(bare) == expected
    assert usable({**bare, **nulls, "cancellation_details": None}) == expected
    assert usable({**bare, "payment_method": {"type": None, "id": None, "saved": None, "card": None}}) == expected
    assert usable(payment(payment_method=None)).method_type is None


def test_the_fee_is_known_from_the_income_and_an_odd_income_loses_no_payment() -> None:
    def income(value: Any) -> Decimal | None:
        return usable(payment(income_amount=value)).income_amount

    assert income({"value": "481.54", "currency": "RUB"}) == Decimal("481.54")
    for odd in (None, "481.54", {"value": "x", "currency": "RUB"}, {"value": "1.00", "currency": "USD"},
                {"value": "499.01", "currency": "RUB"}, {"value": "-1.00", "currency": "RUB"}):  # fmt: skip
        assert income(odd) is None


@pytest.mark.parametrize("metadata", [None, "text", [], 7])
def test_metadata_that_is_no_object_is_empty(metadata: object) -> None:
    assert usable(payment(metadata=metadata)).metadata == {}


ODD: list[tuple[str, Any, str]] = [
    ("null", None, "missing, not an object"),
    ("a list", [], "a list, not an object"),
    ("a number", 12, "not an object"),
    ("no id", payment(id=None), "not a payment id"),
    ("an empty id", payment(id=""), "not a payment id"),
    ("a number for an id", payment(id=5), "not a payment id"),
    ("an endless id", payment(id="i" * 256), "not a payment id"),
    ("an id with a NUL", payment(id="a\0b"), "not a payment id"),
    ("no status", payment(status=None, paid=None), "status"),
    ("an unknown status", payment(status="settled"), "'settled' is unknown"),
    ("a list for a status", payment(status=["succeeded"]), "status"),
    ("no amount", payment(amount=None), "amount is missing"),
    ("a text for an amount", payment(amount="499.00"), "amount is a text"),
    ("a null value", payment(amount={"value": None, "currency": "RUB"}), "amount"),
    ("a null currency", payment(amount={"value": "1.00", "currency": None}), "currency"),
    ("an unknown currency", payment(amount={"value": "1.00", "currency": "DOGE"}), "'DOGE'"),
    ("a lower-case currency", payment(amount={"value": "1.00", "currency": "rub"}), "'rub'"),
    ("a list for a currency", payment(amount={"value": "1.00", "currency": []}), "currency"),
    ("zero", payment(amount={"value": "0.00", "currency": "RUB"}), "not above zero"),
    ("below zero", payment(amount={"value": "-5.00", "currency": "RUB"}), "not above zero"),
    ("too much", payment(amount={"value": "1000000.00", "currency": "RUB"}), "numeric(8,2)"),
    ("far too much", payment(amount={"value": "1e300", "currency": "RUB"}), "1e300"),
    ("fractions of a kopeck", payment(amount={"value": "1.005", "currency": "RUB"}), "two decimal places"),
    ("a float", payment(amount={"value": 499.0, "currency": "RUB"}), "not a decimal string"),
    ("not a number", payment(amount={"value": "NaN", "currency": "RUB"}), "NaN"),
    ("words", payment(amount={"value": "a lot", "currency": "RUB"}), "not a number"),
    ("true", payment(amount={"value": True, "currency": "RUB"}), "not a decimal string"),
    ("no creation", payment(created_at=None), "created_at is missing"),
    ("a naive creation", payment(created_at="2026-03-01T10:00:00.000"), "created_at"),
    ("a day only", payment(created_at="2026-03-01"), "created_at"),
    ("a number for an instant", payment(created_at=1772359200), "created_at"),
    ("the 30th of February", payment(created_at="2026-02-30T10:00:00.000Z"), "created_at"),
    ("the year 1", payment(created_at="0001-01-01T00:00:00.000Z"), "year 1"),
    ("before the year 1", payment(created_at="0001-01-01T00:00:00+05:00"), "created_at"),
    ("the year 9999", payment(created_at="9999-12-31T23:59:59.999Z"), "year 9999"),
    ("a bad capture", payment(captured_at="soon"), "captured_at"),
    ("a refund in other money", payment(refunded_amount={"value": "1.00", "currency": "USD"}), "USD, amount in RUB"),
    ("a refund below zero", payment(refunded_amount={"value": "-1.00", "currency": "RUB"}), "below zero"),
    ("a refund of nothing readable", payment(refunded_amount={"value": None, "currency": "RUB"}), "refunded_amount"),
    ("a refund that is a number", payment(refunded_amount=0), "refunded_amount"),
    ("succeeded and not paid", payment(paid=False), "contradiction"),
    ("succeeded and paid in words", payment(paid="no"), "contradiction"),
    ("a list for a method type", payment(payment_method={"type": [], "id": "m"}), "type (a list) is unknown"),
    ("a text for a method", payment(payment_method="bank_card"), "payment_method is a text"),
    ("test unknown", payment(test=None), "neither true nor false"),
    ("test in words", payment(test="false"), "neither true nor false"),
]


@pytest.mark.parametrize(("item", "reason"), [case[1:] for case in ODD], ids=[case[0] for case in ODD])
def test_an_odd_payment_is_set_aside_with_its_reason(item: Any, reason: str) -> None:
    told = parse_payment(item)
    assert isinstance(told, UnusablePayment), told
    assert reason in told.reason
    if isinstance(item, dict) and item["id"] == "2d0e7f6a-0001":
        assert told.payment_id == "2d0e7f6a-0001"
    else:
        assert told.payment_id is None


@pytest.mark.parametrize("status", ["succeeded", "pending", "canceled", "waiting_for_capture"])
def test_a_method_that_the_provider_has_added_is_used(status: str) -> None:
    told = usable(payment(status=status, payment_method={"type": "telepathy", "id": "m", "saved": False}))
    assert (told.method_type, told.method_id, told.method_label) == ("telepathy", "m", None)


def test_an_endless_method_type_is_cut() -> None:
    assert len(usable(payment(payment_method={"type": "t" * 5000, "id": "m"})).method_type or "") <= 61


def test_a_method_that_the_service_has_no_label_for_is_used() -> None:
    assert usable(payment(payment_method={"type": "cash", "id": "m", "saved": False})).method_label is None


def test_the_words_of_a_cancellation_are_kept_as_they_came() -> None:
    told = usable(payment(status="canceled", cancellation_details={"party": "new_party", "reason": "new_reason"}))
    assert (told.cancellation_party, told.cancellation_reason) == ("new_party", "new_reason")
    for odd in ({"party": None, "reason": 7}, [], "text"):
        told = usable(payment(status="canceled", cancellation_details=odd))
        assert (told.cancellation_party, told.cancellation_reason) == (None, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-03-01T10:00:00.123Z", datetime(2026, 3, 1, 10, 0, 0, 123_000, tzinfo=timezone.utc)),
        ("2026-03-01T10:00:00Z", datetime(2026, 3, 1, 10, 0, tzinfo=timezone.utc)),
        ("2026-03-01T10:00:00.5Z", datetime(2026, 3, 1, 10, 0, 0, 500_000, tzinfo=timezone.utc)),
        ("2026-03-01T10:00:00.1234567Z", datetime(2026, 3, 1, 10, 0, 0, 123_456, tzinfo=timezone.utc)),
        ("2026-03-01T13:00:00.123+03:00", datetime(2026, 3, 1, 10, 0, 0, 123_000, tzinfo=timezone.utc)),
        ("2026-03-01t05:30:00-0430", datetime(2026, 3, 1, 10, 0, tzinfo=timezone.utc)),
    ],
)
def test_every_form_of_an_instant_with_an_offset_is_read_as_utc(text: str, expected: datetime) -> None:
    created_at = usable(payment(created_at=text)).created_at
    assert created_at == expected
    assert created_at.utcoffset() == timedelta(0)


def test_an_instant_is_asked_for_in_utc_with_milliseconds() -> None:
    moment = datetime(2026, 3, 1, 1, 0, 0, 999_001, tzinfo=timezone(timedelta(hours=3)))
    assert provider_instant(moment) == "2026-02-28T22:00:00.999Z"
    assert provider_instant(moment, round_up=True) == "2026-02-28T22:00:01.000Z"
    assert provider_instant(moment.replace(microsecond=0), round_up=True) == "2026-02-28T22:00:00.000Z"
    with pytest.raises(ValueError, match="offset"):
        provider_instant(datetime(2026, 3, 1))  # noqa: DTZ001


# --- Whatever it is, nothing raises and the database can store it ------------------------------------------------

_leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats()
    | st.text(st.characters())  # lone surrogates and NUL included
    | st.sampled_from(["succeeded", "RUB", "bank_card", "2026-03-01T10:00:00.123Z", "1.00", "NaN", "-0", "1_0"])
)
_values = st.recursive(
    _leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def _storable_by_postgresql(value: Any) -> bool:
    text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    text.encode("utf-8")  # lone surrogates raise
    return "\\u0000" not in json.dumps(value).replace("\\\\", "")


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(payment())), _values, max_size=4), _values)
def test_no_value_in_any_field_raises_or_leaves_what_cannot_be_stored(fields: dict[str, Any], anything: Any) -> None:
    for item in (anything, {**payment(), **fields}, fields):
        told = parse_payment(item)
        if isinstance(told, UnusablePayment):
            assert told.reason
            assert _storable_by_postgresql(told.evidence)
            assert _storable_by_postgresql(told.payment_id)
        else:
            assert told.money.amount > 0
            assert told.created_at.utcoffset() == timedelta(0)


@settings(max_examples=200, deadline=None)
@given(_values)
def test_what_is_read_from_an_answer_can_be_stored(anything: Any) -> None:
    told = read_json(json.dumps({"items": anything}).encode())
    assert _storable_by_postgresql(evidence(told))
    item = read_json(json.dumps(payment(metadata={"user_id": anything, "share": anything})).encode())
    assert _storable_by_postgresql(usable(item).metadata)


def test_an_answer_that_is_not_json_is_a_value_error() -> None:
    for body in (b"", b"<html>", b'{"a": ', b"[" * 100_000, b"\xff\xfe", b"{} {}"):
        with pytest.raises(ValueError):  # noqa: PT011 - its text is the parser's
            read_json(body)


def test_evidence_is_cut_to_what_a_person_reads() -> None:
    deep: Any = "bottom"
    for _ in range(900):
        deep = [deep]
    huge = payment(description="x" * 10_000, metadata={f"k{n}": "v" for n in range(5000)}, deep=deep, number=10**5000)
    assert len(json.dumps(evidence(huge))) < 5000


# --- Duplicates within one slice ---------------------------------------------------------------------------------


def collected(*items: Any) -> Any:
    collector = Collector()
    for item in items:
        collector.add_page([item])
    return collector.whole()


def test_of_two_tellings_the_more_refunded_counts_whichever_came_first() -> None:
    before, after = payment(), payment(refunded_amount={"value": "499.00", "currency": "RUB"})
    for told in (collected(before, after), collected(after, before)):
        assert len(told.payments) == 1
        assert told.payments[0].refunded_in_full


def test_of_two_equal_tellings_one_counts() -> None:
    told = collected(payment(), payment(), payment(recipient=None))
    assert (len(told.payments), told.pages) == (1, 3)


def test_two_different_stories_about_one_payment_are_for_a_person() -> None:
    other = payment(amount={"value": "1.00", "currency": "RUB"})
    told = collected(payment(), other, payment("neighbour"))
    assert [one.id for one in told.payments] == ["neighbour"]
    assert [one.payment_id for one in told.unusable] == ["2d0e7f6a-0001"]
    assert _storable_by_postgresql(told.unusable[0].evidence)


def test_an_odd_telling_beside_a_good_one_leaves_the_payment_to_a_person() -> None:
    told = collected(payment(), payment(refunded_amount={"value": "?", "currency": "RUB"}))
    assert told.payments == ()
    assert len(told.unusable) == 1


def test_one_odd_item_in_both_lists_is_reported_once() -> None:
    told = collected({"id": None}, {"id": None}, {"id": ""}, payment(amount=None), payment(amount=None))
    assert len(told.unusable) == 3
