"""A decision as data: what is to be done with one thing, why, and how much money it is about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal

from billing_orchestration.domain.money import Money


@dataclass(frozen=True, slots=True)
class Decision:
    """One row of a run's report.

    `action` is a short verb phrase in the job's words ("charge", "expire", "leave"), `subject` names the thing
    ("subscription 12", "payment 7"), `reason` is a sentence for a person.
    """

    action: str
    subject: str
    reason: str
    money: Money | None = None


def count_by_action(decisions: Iterable[Decision]) -> dict[str, int]:
    """How many decisions there are of each action."""
    return dict(Counter(decision.action for decision in decisions))


def sum_by_currency(decisions: Iterable[Decision], actions: frozenset[str] | None = None) -> dict[str, Decimal]:
    """The money of the decisions (of the given actions), added up by currency.

    An amount that is no number (PostgreSQL's numeric holds NaN) is left out: nobody could be shown its sum.
    """
    sums: dict[str, Decimal] = {}
    for decision in decisions:
        if decision.money is None or not decision.money.amount.is_finite():
            continue
        if actions is None or decision.action in actions:
            sums[decision.money.currency] = sums.get(decision.money.currency, Decimal(0)) + decision.money.amount
    return sums
