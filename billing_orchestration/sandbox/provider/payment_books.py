"""A shop's payments, what is going to happen to them, and the ledger of every movement of money.

Not thread-safe: the account that owns the books holds the lock.
"""

from __future__ import annotations

import heapq
import random
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from billing_orchestration.sandbox.provider.clock import aware_utc, from_milliseconds, milliseconds
from billing_orchestration.sandbox.provider.payment_list import PaymentList
from billing_orchestration.sandbox.provider.records import (
    CONFIRM_WITHIN_DEFAULT_S,
    CONFIRM_WITHIN_S,
    HOLD_DAYS,
    LedgerEntry,
    Outcome,
    Payment,
    SavedMethod,
    new_payment_id,
)
from billing_orchestration.sandbox.provider.state import ProviderState


class PaymentBooks:
    """Everything that changes a payment. Only `apply`, `refund` and the history write to the ledger."""

    def __init__(self, state: ProviderState, generator: random.Random) -> None:
        self.state = state
        self.list = PaymentList(state.payments.values())
        self._random = generator

    def existing(self, payment_id: str) -> Payment:
        """The payment; KeyError when there is none."""
        try:
            return self.state.payments[payment_id]
        except KeyError:
            raise KeyError(f"the sandbox has no payment {payment_id}") from None

    def new_id(self, at: datetime) -> str:
        """For a payment or a saved method."""
        return new_payment_id(at, self._random)

    def add(self, at: datetime, *, payment_id: str | None = None, **fields: Any) -> Payment:
        """A new payment, created at this instant."""
        at = aware_utc(at)
        self.state.sequence += 1
        payment_id = payment_id or self.new_id(at)
        if payment_id in self.state.payments:
            raise ValueError(f"the sandbox has a payment {payment_id} already")
        fields["method_id"] = fields.get("method_id") or payment_id
        payment = Payment(id=payment_id, sequence=self.state.sequence, created_at=at, changed_at=at, **fields)
        self.state.payments[payment.id] = payment
        self.list.created(payment)
        return payment

    def add_unconfirmed(self, at: datetime, **fields: Any) -> Payment:
        """A new payment that its customer has to confirm, in time unless it is cash."""
        payment = self.add(at, status="pending", **fields)
        payment.confirmation_url = f"https://confirmation.invalid/checkout?orderId={payment.id}"
        seconds = CONFIRM_WITHIN_S.get(payment.method_type or "", CONFIRM_WITHIN_DEFAULT_S)
        if seconds is not None:
            result = Outcome("canceled", reason="expired_on_confirmation", party="yoo_money")
            self.schedule(payment, at + timedelta(seconds=seconds), result)
        return payment

    def schedule(self, payment: Payment, due: datetime, result: Outcome) -> None:
        """Let the payment come to this outcome later, unless something else happens to it before."""
        self.state.sequence += 1
        heapq.heappush(self.state.agenda, (milliseconds(due), self.state.sequence, payment.id, result))

    def catch_up(self, now: datetime) -> None:
        """Let happen what is due by now."""
        agenda = self.state.agenda
        while agenda and agenda[0][0] <= milliseconds(now):
            due, _, payment_id, result = heapq.heappop(agenda)
            payment = self.state.payments.get(payment_id)
            expected = {"pending", "waiting_for_capture"} if result.reason == "expired_on_capture" else {"pending"}
            if payment is not None and payment.status in expected:
                self.apply(payment, result, from_milliseconds(due))

    def apply(self, payment: Payment, result: Outcome, at: datetime) -> None:
        """Bring a payment to its outcome: the only place where a charge enters the ledger after its creation."""
        at = aware_utc(at)
        if result.kind == "canceled":
            payment.status = "canceled"
            payment.cancellation = {"party": result.party, "reason": result.reason}
        elif payment.capture:
            payment.status = "succeeded"
            payment.captured_at = at
            self.list.captured(payment)
            self.record(payment, "charge", payment.amount, at)
            self._save_method_of(payment)
        else:
            payment.status = "waiting_for_capture"
            payment.expires_at = at + timedelta(days=HOLD_DAYS)
            run_out = Outcome("canceled", reason="expired_on_capture", party="yoo_money")
            self.schedule(payment, payment.expires_at, run_out)
            self._save_method_of(payment)
        payment.touch(at)

    def refund(self, payment: Payment, amount: Decimal, at: datetime) -> None:
        """Refund an amount. The list shows it without lag, since the status stays."""
        payment.refunded += amount
        payment.touch(payment.changed_at)
        self.record(payment, "refund", amount, aware_utc(at))

    def record(self, payment: Payment, kind: str, amount: Decimal, at: datetime) -> None:
        """Enter a movement of money in the ledger."""
        self.state.ledger.append(
            LedgerEntry(
                payment_id=payment.id,
                kind=kind,
                amount=amount,
                currency=payment.currency,
                at=at,
                idempotence_key=payment.idempotence_key if kind == "charge" else None,
                payment_method_id=payment.method_id,
                metadata=dict(payment.metadata),
            )
        )

    def _save_method_of(self, payment: Payment) -> None:
        if payment.save_method and not payment.method_saved:
            payment.method_saved = True
            if payment.id not in self.state.methods:
                self.state.methods[payment.id] = SavedMethod(payment.id, type=payment.method_type or "bank_card")
