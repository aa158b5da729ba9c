"""What settling can decide, and the facts that it decides from. Data only; the rules are in `settlement`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from billing_orchestration.domain.attempts import Attempt
from billing_orchestration.domain.money import Money
from billing_orchestration.domain.problem_kinds import ProblemKind
from billing_orchestration.domain.provider_payment import ProviderPayment


@dataclass(frozen=True, slots=True)
class PaymentRow:
    """A row of the service's `payments`. `money` is None when its currency is null.

    `touched_at`: when the service wrote it last, as far as that is known and asked.
    """

    id: int
    subscription_id: int | None
    payment_provider_id: int | None
    status: str | None
    money: Money | None
    external_payment_id: str | None
    touched_at: datetime | None = None

    @property
    def subject(self) -> str:
        """How a person reads it in a report."""
        return f"payment {self.id}"

    @property
    def is_half_settled(self) -> bool:
        """SUCCEEDED, and linked to no subscription: whoever wrote it may have died before the grant."""
        return self.status == "SUCCEEDED" and self.subscription_id is None


@dataclass(frozen=True, slots=True)
class SubscriptionRow:
    """A row of the service's `subscriptions`."""

    id: int
    user_id: str
    plan_id: int | None
    status: str | None
    started_at: datetime | None
    ended_at: datetime | None


@dataclass(frozen=True, slots=True)
class PlanRow:
    """A row of the service's `plans`, as far as settling needs it, with what it costs in each currency."""

    id: int
    duration: int | None
    duration_unit: str | None
    prices: frozenset[Money] = frozenset()


@dataclass(frozen=True, slots=True)
class Facts:
    """What was read under lock for one provider payment.

    `settled_as`: the kind under which it is in our settlements; `set_aside`: a person resolved it as ignored.
    `rows`: the payments rows with its id. `attempt` and `rivals`: the attempt it names, and the other attempts of that
    period. `subscriptions`: those of the attempt, of the rows, and the ACTIVE ones of the metadata's user and plan.
    `paid_meanwhile`: another payment was granted to the attempt's subscription since the attempt was sent.
    `misfit`: why the lost attempt that it names could not be rebuilt, although its id is one of ours.
    `changed_meanwhile`: a subscription of the metadata's user and plan was changed since it was paid (asked where a row
    is half settled).
    """

    settled_as: str | None
    set_aside: bool
    rows: Sequence[PaymentRow]
    attempt: Attempt | None
    rivals: Sequence[Attempt]
    subscriptions: Mapping[int, SubscriptionRow]
    plans: Mapping[int, PlanRow]
    provider_ids: frozenset[int]
    paid_meanwhile: bool = False
    changed_meanwhile: bool = False
    misfit: str | None = None


@dataclass(frozen=True, slots=True)
class Ruling:
    """A person's decision on one quarantined payment.

    Without `attach_to`: accept it as it is. A different amount, a test, CANCELED here or a period's second success no
    longer blocks it; what makes a grant impossible still does. With `attach_to`: one period of that subscription's plan
    for that subscription, whatever the metadata says.
    """

    attach_to: int | None = None


@dataclass(frozen=True, slots=True)
class Settle:
    """Grant it. One transaction: the payment row, the subscription, the attempt (if any), the settlement.

    `row`: the row to turn SUCCEEDED, None to create one, and with `row_is_final` the row stays as the service wrote it.
    `subscription`: the one to extend to `period_end`, None to create one from `period_start`; `reactivate` sets it
    ACTIVE. `void_first`: a planned, never sent attempt of the same period that must give way. `correct_money`: a person
    accepted the provider's amount, so the row takes it. `notice`: granted by the rules, and a person has to look at it.
    """

    payment: ProviderPayment
    kind: Literal["renewed", "extended", "created"]
    row: PaymentRow | None
    row_is_final: bool
    subscription: SubscriptionRow | None
    reactivate: bool
    user_id: str
    plan_id: int
    payment_provider_id: int
    period_start: datetime
    period_end: datetime
    attempt: Attempt | None
    void_first: Attempt | None
    reason: str
    notice: str | None = None
    notice_kind: ProblemKind = "unwanted_renewal"
    correct_money: bool = False


@dataclass(frozen=True, slots=True)
class RecordRefund:
    """Record it as REFUNDED and grant nothing: all of the money went back.

    `attempt`: the one to close by it, None for a payment whose period is another one's. `void_first` as in Settle.
    """

    payment: ProviderPayment
    row: PaymentRow | None
    row_is_final: bool
    subscription_id: int | None
    payment_provider_id: int
    attempt: Attempt | None
    reason: str
    void_first: Attempt | None = None


@dataclass(frozen=True, slots=True)
class CloseAsGranted:
    """The service's own webhook handler has granted a renewal of ours already: only the attempt is closed.

    `period_end`: the end of the period that it granted.
    """

    payment: ProviderPayment
    row: PaymentRow
    attempt: Attempt
    subscription_id: int
    period_end: datetime
    reason: str
    void_first: Attempt | None = None


@dataclass(frozen=True, slots=True)
class Leave:
    """Nothing to do: both sides agree, or a person decided."""

    payment: ProviderPayment
    code: str
    reason: str
    row: PaymentRow | None = None


@dataclass(frozen=True, slots=True)
class Quarantine:
    """A person has to look. `review` is the attempt whose money is in question (it becomes REVIEW).

    `void_first` as in Settle: with a review, too, the period must have one live attempt only. `lost`: an attempt that
    the database has lost and that is written down VOID, so that it is known which period the payment was made for.
    """

    payment: ProviderPayment
    kind: ProblemKind
    reason: str
    row: PaymentRow | None = None
    subscription_id: int | None = None
    review: Attempt | None = None
    void_first: Attempt | None = None
    lost: Attempt | None = None


SettlementDecision = Settle | RecordRefund | CloseAsGranted | Leave | Quarantine
