"""The numbers of a run's report."""

from __future__ import annotations

from decimal import Decimal

from billing_orchestration.domain.decisions import Decision, Tally
from billing_orchestration.domain.money import Money

DECISIONS = [
    Decision("charge", "subscription 1", "ends today", Money(Decimal("299.00"), "RUB")),
    Decision("charge", "subscription 2", "ends today", Money(Decimal("0.10"), "RUB")),
    Decision("charge", "subscription 3", "ends today", Money(Decimal("5.00"), "USD")),
    Decision("leave", "subscription 4", "already attempted today", Money(Decimal("1.00"), "EUR")),
    Decision("leave", "subscription 5", "no saved payment method"),
]


def test_decisions_are_counted_by_action() -> None:
    tally = Tally(100, DECISIONS)
    assert tally.counts == {"charge": 3, "leave": 2}
    assert len(tally) == 5


def test_money_is_added_up_by_action_and_currency_and_never_across_currencies() -> None:
    assert Tally(100, DECISIONS).sums() == [
        ("charge", "RUB", Decimal("299.10")),
        ("charge", "USD", Decimal("5.00")),
        ("leave", "EUR", Decimal("1.00")),
    ]


def test_an_amount_that_is_no_number_is_counted_and_not_added() -> None:
    tally = Tally(100, [*DECISIONS, Decision("charge", "subscription 6", "ends", Money(Decimal("NaN"), "RUB"))])
    assert tally.counts["charge"] == 4
    assert ("charge", "RUB", Decimal("299.10")) in tally.sums()


def test_only_the_first_few_are_held() -> None:
    tally = Tally(2)
    for decision in DECISIONS:
        tally.append(decision)
    assert tally.first == DECISIONS[:2]
    assert len(tally) == 5
    assert not Tally(2)


def test_many_that_are_alike_are_counted_as_if_they_came_one_by_one() -> None:
    moneys = [Money(Decimal("1.50"), "RUB"), None, Money(Decimal("NaN"), "RUB"), Money(Decimal(2), "USD")]

    def decision(number: int) -> Decision:
        return Decision("expire", f"payment {number}", "over", moneys[number])

    for held in (0, 3, 9):
        one_by_one, together = Tally(held, [decision(0)]), Tally(held, [decision(0)])
        one_by_one.extend(decision(number) for number in range(4))
        together.extend_alike("expire", moneys, decision)
        assert (together.first, together.counts, together.sums()) == (
            one_by_one.first,
            one_by_one.counts,
            one_by_one.sums(),
        )
