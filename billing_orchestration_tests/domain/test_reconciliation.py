"""Both sides' books of a day: each line in exactly one class, and sums that close to the kopeck."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing_orchestration.domain.money import Money
from billing_orchestration.domain.provider_payment import ProviderPayment, ProviderRefund, UnusablePayment
from billing_orchestration.domain.reconciled import CLASSES, KIND_OF_CLASS, QUIET, REPAIRABLE, Day, reconciled_day
from billing_orchestration.domain.reconciliation import (
    SUMS,
    here_frame,
    provider_totals,
    reason_of,
    reconcile,
    sum_up,
    there_frame,
    to_kopecks,
    unclosed,
)
from billing_orchestration.domain.run_scope import RunRefused
from billing_orchestration_tests.domain.given import (
    IN_UTC,
    PRICE,
    a_payment,
    a_scope,
    an_attempt,
    calendar_of,
    the_payment_of,
)

UTC = timezone.utc
DAY = Day.of(date(2026, 3, 11), IN_UTC)
NOON = datetime(2026, 3, 11, 12, 0, tzinfo=UTC)
HOUR, A_DAY = timedelta(hours=1), timedelta(days=1)
METADATA = {"user_id": "ada", "plan_id": "3", "payment_provider_id": "1"}


def paid(id_: str = "pay-1", **changes: Any) -> ProviderPayment:
    """A payment of the day, at noon."""
    changes.setdefault("created_at", changes.get("captured_at") or NOON)
    changes.setdefault("captured_at", NOON if changes.get("status", "succeeded") == "succeeded" else None)
    return a_payment(id=id_, **changes)


def refund(payment_id: str = "pay-1", amount: str = "299.00", **changes: Any) -> ProviderRefund:
    given_back = ProviderRefund(f"refund of {payment_id}", payment_id, "succeeded", Money(Decimal(amount), "RUB"), NOON)
    return dataclasses.replace(given_back, **changes)


def row(status: str | None = "SUCCEEDED", payment_id: str | None = "pay-1", /, **changes: Any) -> tuple[Any, ...]:
    """A row of ours, linked to a subscription."""
    values = {"row": 7, "kopecks": 29900, "currency": "RUB", "linked": True, "at": NOON, **changes}
    return (values["row"], payment_id, status, values["kopecks"], values["currency"], values["linked"], values["at"])


def diff(
    payments: Sequence[ProviderPayment] = (),
    rows: Sequence[tuple[Any, ...]] = (),
    refunds: Sequence[ProviderRefund] = (),
    *,
    settled: Sequence[str] = (),
    unusable: Sequence[UnusablePayment] = (),
    day: Day = DAY,
) -> pd.DataFrame:
    """The lines. Whatever the books are, their sums must close."""
    lines = reconcile(there_frame(payments, refunds, unusable, day), here_frame(rows), settled, day)
    assert unclosed(sum_up(lines), provider_totals(payments, refunds, day)) == []
    return lines


def classes(*args: Any, **kwargs: Any) -> list[str]:
    """The class of each line, payments first."""
    return list(diff(*args, **kwargs).sort_values(["line", "id"])["class"])


NOT_OURS: dict[str, Any] = {"metadata": {}}
RENEWAL = the_payment_of(an_attempt(), id="pay-1", created_at=NOON, captured_at=NOON)


@pytest.mark.parametrize(("payments", "rows", "expected"), [
    # Paid there.
    ([paid()], [row("SUCCEEDED")], "agrees"),
    ([paid()], [], "paid_there"),
    ([paid()], [row("PENDING", linked=False)], "paid_there"),
    ([paid()], [row("EXPIRED", linked=False)], "paid_there"),
    ([paid()], [row("CANCELED", linked=False)], "paid_there"),
    ([paid()], [row(None, linked=False)], "paid_there"),
    ([paid()], [row("SUCCEEDED", linked=False)], "granted_to_nobody"),
    ([paid()], [row("SUCCEEDED", kopecks=29901)], "amount_differs"),
    ([paid()], [row("SUCCEEDED", currency="USD")], "amount_differs"),
    ([paid()], [row("SUCCEEDED", currency=None)], "amount_differs"),
    ([paid()], [row("SUCCEEDED"), row("SUCCEEDED", row=8)], "doubled_here"),
    ([paid()], [row("SUCCEEDED"), row("REFUNDED", row=8)], "doubled_here"),
    # A leftover that expires by itself is no money.
    ([paid()], [row("PENDING", row=6, linked=False), row("SUCCEEDED"), row("EXPIRED", row=8)], "agrees"),
    ([RENEWAL], [row("SUCCEEDED")], "paid_there"),
    ([paid(**NOT_OURS)], [], "foreign"),
    ([paid(**NOT_OURS)], [row("SUCCEEDED")], "agrees"),
    ([paid(metadata={"plan_id": "?"})], [], "paid_there"),
    # Given back. The refund is a line of its own; the payment was paid all the same.
    ([paid(refunded_amount=PRICE.amount)], [row("REFUNDED")], "agrees"),
    ([paid(refunded_amount=PRICE.amount)], [row("SUCCEEDED")], "agrees"),
    ([paid(refunded_amount=PRICE.amount)], [], "paid_there"),
    ([paid(refunded_amount=Decimal("1.00"))], [row("REFUNDED")], "refunded_here"),
    ([paid()], [row("REFUNDED")], "refunded_here"),
    # Not paid there.
    ([paid(status="canceled")], [row("SUCCEEDED")], "not_paid_there"),
    ([paid(status="pending")], [row("SUCCEEDED")], "not_paid_there"),
    ([paid(status="waiting_for_capture")], [row("SUCCEEDED")], "not_paid_there"),
    ([paid(status="canceled")], [row("SUCCEEDED"), row("SUCCEEDED", row=8)], "not_paid_there"),
    ([], [row("SUCCEEDED")], "not_paid_there"),
    ([], [row("SUCCEEDED", None)], "not_paid_there"),
    ([paid(status="canceled")], [row("REFUNDED")], "refunded_here"),
    ([paid(status="canceled")], [row("PENDING")], "canceled_there"),
    ([paid(status="canceled")], [row("EXPIRED")], "agrees"),
    ([paid(status="canceled")], [], "agrees"),
    ([paid(status="pending")], [row("PENDING")], "agrees"),
    ([paid(status="pending")], [], "agrees"),
    ([], [row("PENDING")], "agrees"),
    ([], [row("CANCELED", None)], "agrees"),
])  # fmt: skip
def test_a_payment_is_in_the_class_that_an_accountant_would_put_it_in(
    payments: list[ProviderPayment], rows: list[tuple[Any, ...]], expected: str
) -> None:
    assert classes(payments, rows) == [expected]


def test_what_we_have_settled_is_granted_whatever_the_row_is_linked_to() -> None:
    assert classes([paid()], [row("SUCCEEDED", linked=False)], settled=["pay-1"]) == ["agrees"]
    assert classes([RENEWAL], [row("SUCCEEDED")], settled=["pay-1"]) == ["agrees"]
    # Its row is gone, and nobody knows why.
    assert classes([paid()], [], settled=["pay-1"]) == ["paid_there"]
    assert classes([paid(**NOT_OURS)], [], settled=["pay-1"]) == ["paid_there"]


@pytest.mark.parametrize(("payment", "rows", "refunds", "expected"), [
    (paid(refunded_amount=PRICE.amount), [row("REFUNDED")], [refund()], ["agrees", "agrees"]),
    (paid(refunded_amount=PRICE.amount), [row("SUCCEEDED")], [refund()], ["agrees", "refunded_there"]),
    (paid(refunded_amount=PRICE.amount), [], [refund()], ["paid_there", "refunded_there"]),
    (paid(refunded_amount=Decimal(90)), [row("SUCCEEDED")], [refund(amount="90.00")], ["agrees", "refunded_there"]),
    (paid(refunded_amount=Decimal(90)), [row("REFUNDED")], [refund(amount="90.00")],
     ["refunded_here", "refunded_here"]),
    (paid(), [row("SUCCEEDED")], [refund(status="pending")], ["agrees", "agrees"]),
    (paid(), [row("SUCCEEDED")], [refund(status="canceled")], ["agrees", "agrees"]),
    (paid(refunded_amount=PRICE.amount, **NOT_OURS), [], [refund()], ["foreign", "foreign"]),
])  # fmt: skip
def test_a_refund_is_a_line_of_its_own(
    payment: ProviderPayment, rows: list[tuple[Any, ...]], refunds: list[ProviderRefund], expected: list[str]
) -> None:
    assert classes([payment], rows, refunds) == expected


def test_the_parts_of_a_refund_agree_once_the_row_says_refunded() -> None:
    payment = paid(refunded_amount=PRICE.amount)
    parts = [refund(amount="100.00", id="one"), refund(amount="199.00", id="two")]
    assert classes([payment], [row("REFUNDED")], parts) == ["agrees"] * 3
    assert classes([payment], [row("SUCCEEDED")], parts) == ["agrees", "refunded_there", "refunded_there"]


def test_each_part_of_a_refund_tells_its_own_amount() -> None:
    """The first of two, found when the second has completed it: neither is all of the payment."""
    row_here = row("SUCCEEDED")
    for refunded, word in ((PRICE.amount, "in full"), (Decimal("100.00"), "in part")):
        parts = [refund(amount="100.00", id="one"), refund(amount="199.00", id="two")]
        lines = diff([paid(refunded_amount=refunded)], [row_here], parts[: 2 if word == "in full" else 1])
        told = [reason_of(line) for line in lines.itertuples() if line.line == "refund"]
        assert told[0] == (
            f"payment pay-1 was given back {word}, 100.00 RUB of it by this refund; here: payment 7 is SUCCEEDED,"
            " 299.00 RUB"
        )


def test_a_refund_of_an_older_payment_is_a_line_of_the_day_and_the_payment_is_not() -> None:
    older = paid(captured_at=NOON - 9 * A_DAY, refunded_amount=PRICE.amount)
    lines = diff([older], [row("SUCCEEDED", at=NOON - 9 * A_DAY)], [refund()])
    assert list(lines["line"]) == ["refund"]
    assert list(lines["class"]) == ["refunded_there"]
    assert lines[list(SUMS)].to_dict("records") == [
        {"paid_there": 0, "fee": 0, "refunded_there": 29900, "paid_here": 0, "refunded_here": 0}
    ]
    # Whose payment the provider does not know.
    assert classes([], [row("SUCCEEDED", at=NOON - 9 * A_DAY)], [refund()]) == ["unreadable"]


def test_a_payment_of_another_day_is_a_line_only_where_it_differs_and_only_once() -> None:
    before, after = NOON - 9 * A_DAY, NOON + A_DAY
    touched_today = row("SUCCEEDED", at=before)
    assert classes([paid(captured_at=before)], [touched_today]) == []
    assert classes([paid(created_at=before, status="canceled")], [touched_today]) == ["not_paid_there"]
    late = diff([paid(captured_at=before, money=Money(Decimal("99.00"), "RUB"))], [touched_today])
    assert list(late["class"]) == ["amount_differs"]
    assert late[list(SUMS)].to_numpy().sum() == 0  # added up on its own day
    # Its own day is compared as well, or will be.
    month = Day.of(DAY.day, IN_UTC, since=before.date())
    assert classes([paid(created_at=before, status="canceled")], [touched_today], day=month) == []
    assert classes([paid(created_at=NOON, captured_at=after)], []) == []


def test_a_day_ends_where_the_next_one_begins() -> None:
    moment = timedelta(milliseconds=1)
    for at, lines in ((DAY.start, 1), (DAY.start - moment, 0), (DAY.end - moment, 1), (DAY.end, 0)):
        day = Day.of(DAY.day, IN_UTC, since=DAY.day - A_DAY)
        assert len(diff([paid(created_at=at, captured_at=at)], [], day=day)) == lines


def test_a_record_that_nobody_can_read_is_a_line_and_says_nothing_about_our_row() -> None:
    odd, nameless = UnusablePayment("pay-1", "odd", {}), UnusablePayment(None, "odd", {})
    lines = diff(
        [paid("pay-2")], [row("SUCCEEDED"), row("SUCCEEDED", "pay-2", row=8)], unusable=[odd, nameless, nameless]
    )
    assert sorted(lines["class"]) == ["agrees", "unreadable", "unreadable", "unreadable"]
    assert sorted(lines["id"]) == ["", "", "pay-1", "pay-2"]


def test_sums_are_by_class_and_currency_and_know_the_fee() -> None:
    euros = Money(Decimal("10.05"), "EUR")
    lines = diff(
        [
            paid("a", income_amount=Decimal("290.03")),
            paid("b", income_amount=Decimal("290.03"), refunded_amount=Decimal("0.01")),
            paid("c", money=euros),
            paid("d", status="canceled"),
        ],
        [
            row("SUCCEEDED", "a"),
            row("SUCCEEDED", "b", row=8),
            row("SUCCEEDED", "c", row=9, kopecks=1004, currency="EUR"),
        ],
        [refund("b", "0.01")],
    )
    assert sum_up(lines).to_dict("records") == [
        {"class": "agrees", "currency": "RUB", "lines": 3, "paid_there": 59800, "fee": 1794, "refunded_there": 0,
         "paid_here": 59800, "refunded_here": 0},
        {"class": "amount_differs", "currency": "EUR", "lines": 1, "paid_there": 1005, "fee": 0, "refunded_there": 0,
         "paid_here": 1004, "refunded_here": 0},
        {"class": "refunded_there", "currency": "RUB", "lines": 1, "paid_there": 0, "fee": 0, "refunded_there": 1,
         "paid_here": 0, "refunded_here": 0},
    ]  # fmt: skip


def test_a_line_that_a_class_swallows_is_told_with_what_is_missing() -> None:
    payments = [paid("a"), paid("b")]
    lines = reconcile(there_frame(payments, [], [], DAY), here_frame([row("SUCCEEDED", "a")]), [], DAY)
    swallowed = lines[lines["class"] != "paid_there"]
    assert unclosed(sum_up(swallowed), provider_totals(payments, [], DAY)) == [
        "paid at the provider 598.00 RUB, and in all classes together 299.00 RUB"
    ]
    twice = provider_totals([], [refund("a", "5.00"), refund("a", "5.00")], DAY)
    assert unclosed(sum_up(lines[:0]), twice) == [
        "refunded at the provider 10.00 RUB, and in all classes together 0.00 RUB"
    ]


def test_every_class_has_words_and_an_end() -> None:
    assert {*QUIET, *REPAIRABLE, *KIND_OF_CLASS, "unreadable"} == set(CLASSES)


# --- any books ----------------------------------------------------------------------------------------------------

IDS = [f"pay-{n}" for n in range(6)]
INSTANTS = st.sampled_from([NOON, DAY.start, DAY.end - timedelta(milliseconds=1), NOON - A_DAY, NOON + A_DAY])
MONEY = st.builds(
    Money, st.decimals(min_value="0.01", max_value="999999.99", places=2), st.sampled_from(["RUB", "USD", "EUR"])
)
ROW_STATUSES = st.sampled_from(["CREATED", "PENDING", "SUCCEEDED", "EXPIRED", "CANCELED", "REFUNDED", None])


@st.composite
def provider_payments(draw: st.DrawFn, id_: str) -> ProviderPayment:
    status, money, at = (
        draw(st.sampled_from(["pending", "waiting_for_capture", "succeeded", "succeeded", "canceled"])),
        draw(MONEY),
        draw(INSTANTS),
    )
    return paid(
        id_,
        status=status,
        money=money,
        created_at=at,
        captured_at=draw(INSTANTS) if status == "succeeded" else None,
        refunded_amount=draw(st.sampled_from([Decimal(0), money.amount, Decimal("0.01")])),
        income_amount=draw(st.sampled_from([None, money.amount, Decimal(0)])),
        metadata=draw(st.sampled_from([METADATA, {}, {"plan_id": "x"}, RENEWAL.metadata])),
    )


@st.composite
def books(draw: st.DrawFn) -> dict[str, Any]:
    there = [draw(provider_payments(id_)) for id_ in draw(st.lists(st.sampled_from(IDS), unique=True))]
    names = st.one_of(st.none(), st.sampled_from(IDS))
    cells = draw(st.lists(st.tuples(ROW_STATUSES, names, MONEY, st.booleans(), INSTANTS), max_size=12))
    results = st.sampled_from(["pending", "succeeded", "canceled"])
    refunds = draw(st.lists(st.tuples(st.sampled_from(IDS), MONEY, results, INSTANTS), max_size=6))
    odd = draw(st.lists(st.one_of(st.none(), st.sampled_from(IDS)), max_size=3, unique=True))
    return {
        "payments": there,
        "rows": [
            row(
                status,
                name,
                row=number,
                kopecks=to_kopecks(money.amount),
                currency=money.currency,
                linked=linked,
                at=at,
            )
            for number, (status, name, money, linked, at) in enumerate(cells, 1)
        ],
        "refunds": [
            ProviderRefund(f"refund-{number}", name, status, money, at)
            for number, (name, money, status, at) in enumerate(refunds)
        ],
        "settled": draw(st.lists(st.sampled_from(IDS), unique=True)),
        "unusable": [UnusablePayment(name, "odd", {}) for name in odd],
    }


@settings(max_examples=60, deadline=None)
@given(books())
def test_of_any_books_every_line_is_in_one_class_and_the_sums_close(given_books: dict[str, Any]) -> None:
    lines = diff(**given_books)
    assert set(lines["class"]) <= set(CLASSES)
    # Each line once: by its id, or by its row where it has none.
    names = [(line.line, line.id or f"row {line.row}") for line in lines.itertuples() if line.there != "unreadable"]
    assert len(names) == len(set(names))
    wanted = {
        ("payment", payment.id)
        for payment in given_books["payments"]
        if DAY.start <= (payment.captured_at or payment.created_at) < DAY.end
    }
    wanted |= {("refund", one.id) for one in given_books["refunds"] if DAY.start <= one.created_at < DAY.end}
    assert wanted <= set(names)
    # Provider = agrees + each difference, added up here without the code under test.
    for currency in ("RUB", "USD", "EUR"):
        of = lines[lines["currency"] == currency]
        assert of["paid_there"].sum() == sum(
            int(payment.money.amount * 100)
            for payment in given_books["payments"]
            if payment.status == "succeeded"
            and payment.money.currency == currency
            and ("payment", payment.id) in wanted
        )
        assert of["refunded_there"].sum() == sum(
            int(one.money.amount * 100)
            for one in given_books["refunds"]
            if one.status == "succeeded" and one.money.currency == currency and ("refund", one.id) in wanted
        )
    assert sum_up(lines)["lines"].sum() == len(lines)


# --- the day of a run ---------------------------------------------------------------------------------------------


def test_a_tick_reconciles_the_day_before_and_a_partition_its_own_day() -> None:
    tick = a_scope(datetime(2026, 3, 12, 6, 30, tzinfo=UTC))
    assert reconciled_day(tick, IN_UTC) == date(2026, 3, 11)
    partition = a_scope(datetime(2026, 3, 11, 23, 59, 59, 999_999, tzinfo=UTC), source="partition")
    assert reconciled_day(partition, IN_UTC) == date(2026, 3, 11)
    at_midnight = a_scope(datetime(2026, 3, 12, tzinfo=UTC))
    assert reconciled_day(at_midnight, IN_UTC) == date(2026, 3, 11)


def test_the_day_is_that_of_the_reconciliations_time_zone() -> None:
    # 06:30 in Kamchatka is half past nine in the evening of the day before in Moscow.
    tick = a_scope(datetime(2026, 3, 11, 18, 30, tzinfo=UTC))
    assert reconciled_day(tick, calendar_of("Asia/Kamchatka")) == date(2026, 3, 11)
    assert reconciled_day(tick, calendar_of("Europe/Moscow")) == date(2026, 3, 10)


def test_a_day_that_is_not_over_is_refused() -> None:
    today = a_scope(datetime(2026, 3, 12, 6, 30, tzinfo=UTC), source="partition")
    with pytest.raises(RunRefused, match="the day 2026-03-12 is not over yet"):
        reconciled_day(today, IN_UTC)
