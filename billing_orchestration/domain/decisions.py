"""A decision as data: what is to be done with one thing, why, and how much money it is about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from billing_orchestration.domain.money import Money

_ZERO = Decimal(0)


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


class Tally:
    """Decisions counted and added up as they come: the first few are held, however many there are."""

    def __init__(self, held: int, decisions: Iterable[Decision] = ()) -> None:
        self._held = held
        self._sums: dict[tuple[str, str], Decimal] = {}
        self.first: list[Decision] = []
        self.counts: dict[str, int] = {}
        self.extend(decisions)

    def __len__(self) -> int:
        return sum(self.counts.values())

    def append(self, decision: Decision) -> None:
        """Take one."""
        action, money = decision.action, decision.money
        self.counts[action] = self.counts.get(action, 0) + 1
        if money is not None and money.amount.is_finite():
            key = action, money.currency
            self._sums[key] = self._sums.get(key, _ZERO) + money.amount
        if len(self.first) < self._held:
            self.first.append(decision)

    def extend(self, decisions: Iterable[Decision]) -> None:
        """Take several."""
        for decision in decisions:
            self.append(decision)

    def extend_alike(self, action: str, moneys: Sequence[Money | None], decision: Callable[[int], Decision]) -> None:
        """Take several of one action, of which most are only counted: `decision` makes those that are held."""
        self.counts[action] = self.counts.get(action, 0) + len(moneys)
        sums = self._sums
        for money in moneys:
            if money is not None and money.amount.is_finite():
                key = action, money.currency
                sums[key] = sums.get(key, _ZERO) + money.amount
        room = max(0, self._held - len(self.first))
        self.first.extend(decision(index) for index in range(min(room, len(moneys))))

    def sums(self) -> list[tuple[str, str, Decimal]]:
        """Action, currency and the sum of its money, sorted.

        An amount that is no number (PostgreSQL's numeric holds NaN) is left out: nobody could be shown its sum.
        """
        return [(action, currency, total) for (action, currency), total in sorted(self._sums.items())]
