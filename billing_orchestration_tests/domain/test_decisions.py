"""The numbers of a run's report."""

from __future__ import annotations

from decimal import Decimal

from billing_orchestration.domain.decisions import Decision, count_by_action, sum_by_currency
from billing_orchestration.domain.money import Money

DECISIONS = [
    Decision("charge", "subscription 1", "ends today", Money(Decimal("299.00"), "RUB")),
    Decision("charge", "subscription 2", "ends today", Money(Decimal("0.10"), "RUB")),
    Decision("charge", "subscription 3", "ends today", Money(Decimal("5.00"), "USD")),
    Decision("leave", "subscription 4", "already attempted today", Money(Decimal("1.00"), "EUR")),
    Decision("leave", "subscription 5", "no saved payment method"),
]


def test_decisions_are_counted_by_action() -> None:
    assert count_by_action(DECISIONS) == {"charge": 3, "leave": 2}


def test_money_is_added_up_by_currency_and_never_across_currencies() -> None:
    assert sum_by_currency(DECISIONS) == {"RUB": Decimal("299.10"), "USD": Decimal("5.00"), "EUR": Decimal("1.00")}


def test_sums_can_be_limited_to_the_actions_that_move_money() -> None:
    assert sum_by_currency(DECISIONS, frozenset({"charge"})) == {"RUB": Decimal("299.10"), "USD": Decimal("5.00")}
    assert sum_by_currency(DECISIONS, frozenset()) == {}
