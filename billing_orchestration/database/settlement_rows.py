"""What each settlement decision becomes in the tables, as rows that `settling` writes. It holds no statement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from billing_orchestration.database.audit import Change, Problem, evidence_of
from billing_orchestration.database.conventions import naive_utc
from billing_orchestration.domain.attempts import Attempt, State
from billing_orchestration.domain.provider_payment import ProviderPayment
from billing_orchestration.domain.settlement_decisions import (
    CloseAsGranted,
    PaymentRow,
    Quarantine,
    RecordRefund,
    Settle,
    SettlementDecision,
    SubscriptionRow,
)

Row = dict[str, Any]


def subscription_of(decision: SettlementDecision, created: Mapping[str, int]) -> int | None:
    """The subscription that a decision is about. `created`: the new ones' ids by the provider's payment id."""
    if isinstance(decision, Settle):
        return decision.subscription.id if decision.subscription else created[decision.payment.id]
    if isinstance(decision, (RecordRefund, CloseAsGranted, Quarantine)):
        return decision.subscription_id
    return decision.row.subscription_id if decision.row else None


def new_subscription(grant: Settle, at: datetime) -> Row:
    """The subscription that a purchase creates."""
    return {
        "user_id": grant.user_id,
        "status": "ACTIVE",
        "started_at": grant.period_start,
        "ended_at": grant.period_end,
        "plan_id": grant.plan_id,
        "created_at": at,
        "updated_at": at,
    }


@dataclass(slots=True)
class Rows:
    """Everything that a batch changes, each list for one statement or one part of it.

    `extensions`: subscriptions. `finished` and `payments`: the service's payment rows, old and new. `voids`: attempts
    that give way; `closings`: attempts that end, `recreated` those of them that the database had lost. `settlements`,
    `methods`, `changes`: our own records.
    """

    at: datetime
    extensions: list[Row] = field(default_factory=list)
    finished: list[Row] = field(default_factory=list)
    payments: list[Row] = field(default_factory=list)
    voids: list[Row] = field(default_factory=list)
    closings: list[Row] = field(default_factory=list)
    recreated: list[Attempt] = field(default_factory=list)
    settlements: list[Row] = field(default_factory=list)
    methods: list[Row] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)

    def add(self, decision: SettlementDecision, subscription_id: int | None) -> None:
        """Add what a decision changes. `subscription_id`: the subscription that it is about."""
        if isinstance(decision, Settle):
            self._grant(decision, subscription_id)
        if isinstance(decision, (Settle, RecordRefund)) and not decision.row_is_final:
            if decision.row is None:
                self._create_payment(decision, subscription_id)
            else:
                self._finish_payment(decision, decision.row, subscription_id)
        self._close_attempts(decision)
        if isinstance(decision, (Settle, RecordRefund, CloseAsGranted)):
            self._settle(decision, subscription_id)

    def _grant(self, grant: Settle, subscription_id: int | None) -> None:
        if grant.subscription is not None:
            self._extend(grant, grant.subscription)
        else:
            new = new_subscription(grant, self.at)
            del new["created_at"], new["updated_at"]
            self._note("subscription", subscription_id, "created", grant, new=new)
        # Only a purchase saves a method; a renewal carries the id of one that was saved before.
        payment = grant.payment
        if grant.attempt is None and payment.method_saved and payment.method_id and subscription_id is not None:
            self.methods.append(
                {
                    "subscription_id": subscription_id,
                    "payment_method_id": payment.method_id,
                    "currency": payment.money.currency,
                    "payment_provider_id": grant.payment_provider_id,
                    "external_payment_id": payment.id,
                    "saved_at": payment.succeeded_at,
                }
            )

    def _extend(self, grant: Settle, subscription: SubscriptionRow) -> None:
        self.extensions.append(
            {
                "id": subscription.id,
                "ended_at": naive_utc(grant.period_end),
                "old_ended_at": None if subscription.ended_at is None else naive_utc(subscription.ended_at),
                "old_status": subscription.status,
                "reactivate": grant.reactivate,
            }
        )
        status = "ACTIVE" if grant.reactivate else subscription.status
        old = {"ended_at": subscription.ended_at, "status": subscription.status}
        self._note(
            "subscription",
            subscription.id,
            grant.kind,
            grant,
            old=old,
            new={"ended_at": grant.period_end, "status": status},
        )

    def _finish_payment(self, decision: Settle | RecordRefund, row: PaymentRow, subscription_id: int | None) -> None:
        payment, status = decision.payment, _payment_status(decision)
        corrected: Row = {}
        replaced: Row = {}
        if isinstance(decision, Settle) and decision.correct_money:
            corrected = {"amount": payment.money.amount, "currency": payment.money.currency}
            if row.money is not None:
                replaced = {"amount": row.money.amount, "currency": row.money.currency}
        new = {
            "status": status,
            "subscription_id": subscription_id,
            "payment_method": payment.method_label,
            **corrected,
        }
        self.finished.append({**new, "id": row.id, "old_status": row.status})
        old = {"status": row.status, "subscription_id": row.subscription_id, **replaced}
        self._note("payment", row.id, status.lower(), decision, old=old, new=new)

    def _create_payment(self, decision: Settle | RecordRefund, subscription_id: int | None) -> None:
        payment, status = decision.payment, _payment_status(decision)
        new = {
            "status": status,
            "amount": payment.money.amount,
            "currency": payment.money.currency,
            "subscription_id": subscription_id,
        }
        self.payments.append(
            {
                **new,
                "number": len(self.payments),
                "payment_provider_id": decision.payment_provider_id,
                "payment_method": payment.method_label,
                "external_payment_id": payment.id,
                # The provider's own instant, for a renewal too.
                "created_at": naive_utc(payment.created_at),
                "updated_at": naive_utc(self.at),
            }
        )
        self._note("payment", None, "created", decision, new=new)

    def _close_attempts(self, decision: SettlementDecision) -> None:
        """The attempt that is settled, refunded or in review; and before it the one that must give way."""
        if isinstance(decision, (Settle, CloseAsGranted)):
            attempt, state = decision.attempt, State.SUCCEEDED
        elif isinstance(decision, RecordRefund):
            attempt, state = decision.attempt, State.REFUNDED
        elif isinstance(decision, Quarantine):
            attempt, state = decision.review, State.REVIEW
            if decision.lost is not None:
                self._keep_lost(decision.lost, decision)
        else:
            return
        if decision.void_first is not None:
            reason = "never sent: a late success came for its period"
            self.voids.append(self._closing(decision.void_first, State.VOID, None, reason))
        if attempt is not None and attempt.is_recreated:
            self.recreated.append(attempt)
        if attempt is not None and attempt.state != state:
            self.closings.append(self._closing(attempt, state, decision.payment.id, decision.reason))

    def _keep_lost(self, attempt: Attempt, decision: Quarantine) -> None:
        """An attempt whose payment is before a person, as it was rebuilt."""
        new = {"state": attempt.state, "subscription_id": attempt.subscription_id}
        reason = "its record was lost: rebuilt from its payment, which is before a person"
        self.recreated.append(attempt)
        self.changes.append(
            Change("attempt", str(attempt.id), attempt.state.lower(), reason, None, new, decision.payment.id)
        )

    def _closing(self, attempt: Attempt, state: str, payment_id: str | None, reason: str) -> Row:
        new = {"state": state, "subscription_id": attempt.subscription_id}
        old = None if attempt.is_recreated else {"state": attempt.state}
        self.changes.append(Change("attempt", str(attempt.id), state.lower(), reason, old, new, payment_id))
        return {
            "id": attempt.id,
            "state": state,
            "old_state": attempt.state,
            "external_payment_id": payment_id,
            "reason": reason,
        }

    def _settle(self, decision: Settle | RecordRefund | CloseAsGranted, subscription_id: int | None) -> None:
        """The record by which the payment is never settled again."""
        payment = decision.payment
        grant = decision if isinstance(decision, Settle) else None
        start, end = _period_of(decision)
        self.settlements.append(
            {
                "external_payment_id": payment.id,
                "kind": grant.kind if grant else "refunded" if isinstance(decision, RecordRefund) else "renewed",
                "payment_id": decision.row.id if decision.row else None,  # None: the row that is created with it
                "subscription_id": subscription_id,
                "attempt_id": decision.attempt.id if decision.attempt else None,
                "user_id": grant.user_id if grant else payment.claims.user_id,
                "plan_id": grant.plan_id if grant else payment.claims.plan_id,
                "amount": payment.money.amount,
                "currency": payment.money.currency,
                "period_start": None if start is None else naive_utc(start),
                "period_end": None if end is None else naive_utc(end),
            }
        )

    def _note(
        self,
        entity: str,
        entity_id: int | None,
        action: str,
        decision: Settle | RecordRefund,
        *,
        new: Row,
        old: Row | None = None,
    ) -> None:
        name = None if entity_id is None else str(entity_id)
        self.changes.append(Change(entity, name, action, decision.reason, old, new, decision.payment.id))


def _period_of(decision: Settle | RecordRefund | CloseAsGranted) -> tuple[datetime | None, datetime | None]:
    """The period that a payment has paid, whoever granted it. No other may begin before its end."""
    if isinstance(decision, CloseAsGranted):
        return decision.attempt.period_start, decision.period_end
    return (decision.period_start, decision.period_end) if isinstance(decision, Settle) else (None, None)


def _payment_status(decision: Settle | RecordRefund) -> str:
    return "SUCCEEDED" if isinstance(decision, Settle) else "REFUNDED"


def problem_of(decision: SettlementDecision) -> Problem | None:
    """What a person has to look at: everything in quarantine, and grants that come with a notice."""
    payment = decision.payment
    if isinstance(decision, Quarantine):
        return Problem(
            subject=f"payment {payment.id}",
            kind=decision.kind,
            reason=decision.reason,
            external_payment_id=payment.id,
            payment_id=decision.row.id if decision.row else None,
            subscription_id=decision.subscription_id,
            attempt_id=decision.review.id if decision.review else payment.claims.renewal_attempt_id,
            evidence=evidence_of(_providers_side(payment)),
        )
    if isinstance(decision, Settle) and decision.notice and decision.subscription:
        return Problem(
            subject=f"payment {payment.id}",
            kind=decision.notice_kind,
            reason=decision.notice,
            external_payment_id=payment.id,
            subscription_id=decision.subscription.id,
            attempt_id=decision.attempt.id if decision.attempt else None,
            evidence=evidence_of(_providers_side(payment)),
        )
    return None


def _providers_side(payment: ProviderPayment) -> dict[str, Any]:
    """The provider's side of a payment, as evidence."""
    return {
        "id": payment.id,
        "status": payment.status,
        "amount": str(payment.money),
        "refunded_amount": payment.refunded_amount,
        "created_at": payment.created_at,
        "captured_at": payment.captured_at,
        "test": payment.is_test,
        "payment_method": payment.method_type,
        "metadata": payment.metadata,
    }
