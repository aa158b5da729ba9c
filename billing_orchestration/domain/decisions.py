"""A decision as data: what is to be done with one thing, why, and how much money it is about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from billing_orchestration.domain.money import Money

_ZERO = Decimal(0)


class Action:
    """What a run does with one thing. autopayment_job adds the outcome of each charge (`ChargeResult.outcome`)."""

    CHARGE = "charge"
    SEND_AGAIN = "send again"
    CONCLUDE = "conclude"
    VOID = "void"
    NOTE_ABSENCE = "note absence"
    SETTLE = "settle"
    CREATE = "create subscription"
    EXTEND = "extend subscription"
    RENEW = "renew subscription"
    RECORD_REFUND = "record refund"
    CLOSE_ATTEMPT = "close attempt"
    EXPIRE = "expire"
    QUARANTINE = "quarantine"
    TRY_AGAIN = "try again"
    REFUSE = "refuse"
    LEAVE = "leave"
    SKIP = "skip"
    REPORT = "report"


# Actions that change nothing and ask nothing of anybody.
PASSIVE = frozenset({Action.LEAVE, Action.SKIP, Action.REPORT})


class Code:
    """Why a thing is left, expired or reported, for programs. Two decisions with one action and one code are alike.

    Two more vocabularies serve as codes: a quarantined thing has its problem's kind (`problem_kinds`), a declined
    charge the provider's own word for it (`declines`).
    """

    # Renewals that are not charged, and open attempts that are left as they are.
    OPEN_AT_PROVIDER = "open_at_provider"
    OUTCOME_UNKNOWN = "outcome_unknown"
    OTHER_SHOP = "other_shop"
    IN_REVIEW = "in_review"
    ALREADY_CHARGED = "already_charged"
    ALREADY_PLANNED = "already_planned"
    PERIOD_SETTLED = "period_settled"
    TWO_ACTIVE = "two_active"
    HELD_BY_ENTRY = "held_by_entry"
    HARD_DECLINE = "hard_decline"
    TOO_LONG_OVERDUE = "too_long_overdue"
    TRIED_TODAY = "tried_today"
    GRACE_OVER = "grace_over"
    UNCLEAR_DECLINES = "unclear_declines"
    NO_METHOD = "no_method"
    NO_CONTACT = "no_contact"
    NO_CONSENT = "no_consent"
    SEVERAL_VIEW_ROWS = "several_view_rows"
    VIEW_UNREADABLE = "view_unreadable"
    METHOD_STOPPED = "method_stopped"
    METHOD_NOT_SAVED = "method_not_saved"
    METHOD_INACTIVE = "method_inactive"
    METHOD_UNKNOWN = "method_unknown"
    METHOD_ELSEWHERE = "method_elsewhere"
    CHARGED_ELSEWHERE = "charged_elsewhere"
    METHOD_DECLINED_TODAY = "method_declined_today"
    UNUSABLE_SUBSCRIPTION = "unusable_subscription"
    UNUSABLE_METHOD = "unusable_method"
    NO_PRICE = "no_price"
    SEVERAL_PRICES = "several_prices"
    UNUSABLE_PRICE = "unusable_price"
    UNUSABLE_PERIOD = "unusable_period"
    PERIOD_OVER = "period_over"
    # Payments that both sides know.
    NO_PROVIDER_ID = "no_provider_id"
    DUPLICATE = "duplicate"
    LEFT_TO_WEBHOOK = "left_to_webhook"
    FOREIGN = "foreign"
    SETTLED_BEFORE = "settled_before"
    SET_ASIDE = "set_aside"
    BOTH_AGREE = "both_agree"
    # Expiry.
    NEVER_AT_PROVIDER = "never_at_provider"
    UNKNOWN_AT_PROVIDER = "unknown_at_provider"
    PENDING_AT_PROVIDER = "pending_at_provider"
    CANCELED_AT_PROVIDER = "canceled_at_provider"
    MONEY_HELD = "money_held"
    NO_ANSWER = "no_answer"
    HELD_BACK = "held_back"
    # Any job.
    CLOCKS_APART = "clocks_apart"
    CHANGED_MEANWHILE = "changed_meanwhile"
    NOT_APPROVED = "not_approved"


@dataclass(frozen=True, slots=True)
class Decision:
    """One row of a run's report.

    `action` and `code` are for programs (`Action`, `Code`; no code: the action says it all), `subject` names the thing
    ("subscription 12", "payment 7"), `reason` is a sentence for a person and nothing else.
    """

    action: str
    subject: str
    reason: str
    money: Money | None = None
    code: str = ""


class Tally:
    """Decisions, counted and summed as they come. Only the first few are held, however many there are."""

    def __init__(self, held: int, decisions: Iterable[Decision] = ()) -> None:
        self._held = held
        self._sums: dict[tuple[str, str], Decimal] = {}
        self.first: list[Decision] = []
        self.counts: dict[str, int] = {}
        self.extend(decisions)

    def __len__(self) -> int:
        return sum(self.counts.values())

    def append(self, decision: Decision) -> None:
        """Add one."""
        action, money = decision.action, decision.money
        self.counts[action] = self.counts.get(action, 0) + 1
        if money is not None and money.amount.is_finite():
            key = action, money.currency
            self._sums[key] = self._sums.get(key, _ZERO) + money.amount
        if len(self.first) < self._held:
            self.first.append(decision)

    def extend(self, decisions: Iterable[Decision]) -> None:
        """Add several."""
        for decision in decisions:
            self.append(decision)

    def extend_alike(self, action: str, moneys: Sequence[Money | None], decision: Callable[[int], Decision]) -> None:
        """Add several of one action. Most are only counted; `decision` makes those that are held."""
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

        An amount that is not a number (PostgreSQL's numeric can be NaN) is left out: a sum with it says nothing.
        """
        return [(action, currency, total) for (action, currency), total in sorted(self._sums.items())]
