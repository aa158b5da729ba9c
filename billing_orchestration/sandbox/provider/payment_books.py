"""A shop's payments and refunds, what is going to happen to them, and the ledger of every movement of money.

Not thread-safe: the account that owns the books holds the lock.
"""

from __future__ import annotations

import heapq
import random
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from billing_orchestration.sandbox.provider.clock import aware_utc, from_milliseconds, milliseconds
from billing_orchestration.sandbox.provider.idempotence import Keys
from billing_orchestration.sandbox.provider.list_requests import ListRequest
from billing_orchestration.sandbox.provider.methods import SavedMethod
from billing_orchestration.sandbox.provider.pages import HISTORY, Entry, by_creation, enter, entry_of, take
from billing_orchestration.sandbox.provider.payment_list import PaymentList
from billing_orchestration.sandbox.provider.payments import (
    CONFIRM_WITHIN_DEFAULT_S,
    CONFIRM_WITHIN_S,
    HOLD_DAYS,
    Payment,
)
from billing_orchestration.sandbox.provider.records import (
    REFUND_STATUSES,
    LedgerEntry,
    Outcome,
    Registration,
    new_payment_id,
)
from billing_orchestration.sandbox.provider.refunds import Refund
from billing_orchestration.sandbox.provider.state import ProviderState


class PaymentBooks:
    """Everything that changes a payment. Only `apply`, `settle_refund` and the history write to the ledger."""

    def __init__(self, state: ProviderState, generator: random.Random) -> None:
        self.state = state
        self.keys = Keys(state.keys, self._shown)
        self.list = PaymentList(state.payments.values())
        self.refunds = by_creation(state.refunds.values())
        self._random = generator
        self._refunds_of: dict[str, list[Refund]] = {}
        for refund in state.refunds.values():
            self._refunds_of.setdefault(refund.payment_id, []).append(refund)

    def existing(self, payment_id: str) -> Payment:
        """The payment; KeyError when there is none."""
        try:
            return self.state.payments[payment_id]
        except KeyError:
            raise KeyError(f"the sandbox has no payment {payment_id}") from None

    def existing_refund(self, refund_id: str) -> Refund:
        """The refund; KeyError when there is none."""
        try:
            return self.state.refunds[refund_id]
        except KeyError:
            raise KeyError(f"the sandbox has no refund {refund_id}") from None

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
            self.schedule(payment.id, (at + timedelta(seconds=seconds), result))
        return payment

    def schedule(self, item_id: str, later: tuple[datetime, Outcome | Registration] | None) -> None:
        """Let a payment, a refund or a binding come to this at that instant, unless it has ended before."""
        if later is not None:
            self.state.sequence += 1
            heapq.heappush(self.state.agenda, (milliseconds(later[0]), self.state.sequence, item_id, later[1]))

    def catch_up(self, now: datetime) -> None:
        """Let happen what is due by now."""
        agenda = self.state.agenda
        while agenda and agenda[0][0] <= milliseconds(now):
            due, _, item_id, event = heapq.heappop(agenda)
            if isinstance(event, Registration):
                self.register(self.existing(item_id), event.status, from_milliseconds(due))
            else:
                self._happen(item_id, event, from_milliseconds(due))

    def _happen(self, item_id: str, result: Outcome, at: datetime) -> None:
        payment, refund = self.state.payments.get(item_id), self.state.refunds.get(item_id)
        expected = {"pending", "waiting_for_capture"} if result.reason == "expired_on_capture" else {"pending"}
        if payment is not None and payment.status in expected:
            self.apply(payment, result, at)
        elif refund is not None and refund.status == "pending":
            self.settle_refund(refund, result, at)
        elif item_id in self.state.methods and self.state.methods[item_id].status == "pending":
            self.state.methods[item_id].status = "inactive"

    def come_to(self, payment: Payment, result: Outcome, at: datetime) -> None:
        """Bring a payment to its outcome now, or, while that is pending, later."""
        if result.kind == "pending":
            self.schedule(payment.id, result.later(at))
        else:
            self.apply(payment, result, at)

    def apply(self, payment: Payment, result: Outcome, at: datetime) -> None:
        """Bring a payment to its outcome: the only place where a charge enters the ledger after its creation."""
        at, payment.after_receipt = aware_utc(at), None
        if result.kind == "canceled":
            payment.status = "canceled"
            if payment.registration == "pending":
                payment.registration = "canceled"
            payment.cancellation = {"party": result.party, "reason": result.reason}
        elif payment.capture:
            payment.status = "succeeded"
            payment.captured_at = at
            self.list.captured(payment)
            self.record(payment, "charge", payment.amount, at)
            self._save_method_of(payment)
            if payment.registration == "pending":
                self.send_receipt(payment, at)
        else:
            payment.status = "waiting_for_capture"
            payment.expires_at = at + timedelta(days=HOLD_DAYS)
            run_out = Outcome("canceled", reason="expired_on_capture", party="yoo_money")
            self.schedule(payment.id, (payment.expires_at, run_out))
            self._save_method_of(payment)
        payment.touch(at)

    def send_receipt(self, payment: Payment, at: datetime) -> None:
        """Hand the receipt to the register, which answers later or never."""
        status, seconds = payment.registers
        if status != "pending":
            self.schedule(payment.id, (at + timedelta(seconds=seconds), Registration(status)))

    def register(self, payment: Payment, status: str, at: datetime) -> None:
        """The register's answer. A payment that waited for it goes on, or is canceled."""
        if payment.registration != "pending":
            return
        payment.registration = status
        payment.touch(payment.changed_at)
        if payment.after_receipt is not None and status == "succeeded":
            self.come_to(payment, payment.after_receipt, at)
        elif payment.after_receipt is not None:
            self.apply(payment, Outcome("canceled", party="yoo_money"), at)

    def refundable(self, payment: Payment) -> Decimal:
        """What can still be given back: neither refunded nor on its way."""
        if payment.status != "succeeded":
            return Decimal("0.00")
        on_its_way = [refund.amount for refund in self._refunds_of.get(payment.id, ()) if refund.status == "pending"]
        return payment.amount - payment.refunded - sum(on_its_way, Decimal("0.00"))

    def add_refund(self, payment: Payment, amount: Decimal, at: datetime, result: Outcome, **fields: Any) -> Refund:
        """A new refund, brought to its outcome now or later."""
        if result.kind not in REFUND_STATUSES:
            raise ValueError(f"a refund cannot be {result.kind}")
        at = aware_utc(at)
        self.state.sequence += 1
        earlier = self._refunds_of.setdefault(payment.id, [])
        # From a generator of its own: a refund leaves the ids of the payments of a seed as they are.
        refund_id = new_payment_id(at, random.Random(f"{payment.id} {len(earlier)}"))
        refund = Refund(
            refund_id, payment.id, self.state.sequence, amount, payment.currency, "pending", created_at=at, **fields
        )
        self.state.refunds[refund.id] = refund
        earlier.append(refund)
        enter(self.refunds, entry_of(refund))
        if result.kind == "pending":
            self.schedule(refund.id, result.later(at))
        else:
            self.settle_refund(refund, result, at)
        return refund

    def settle_refund(self, refund: Refund, result: Outcome, at: datetime) -> None:
        """Bring a refund to its outcome. The list of payments shows it without lag, since the status stays."""
        refund.status = result.kind
        if result.kind == "canceled":
            party = "refund_network" if result.party == "payment_network" else result.party
            refund.cancellation = {"party": party, "reason": result.reason}
            return
        payment = self.existing(refund.payment_id)
        payment.refunded += refund.amount
        payment.touch(payment.changed_at)
        self.record(payment, "refund", refund.amount, aware_utc(at), refund=refund)

    def refund_page(self, request: ListRequest, now: datetime) -> tuple[list[Entry[Refund]], bool]:
        """The page's refunds, latest first, and whether more follow."""
        status, payment_id = request.exact.get("status"), request.exact.get("payment_id")
        index = self.refunds if payment_id is None else by_creation(self._refunds_of.get(payment_id, ()))
        oldest = max(request.created_from, milliseconds(now - HISTORY))
        return take(index, oldest, request.created_to, request, lambda refund: status in (None, refund.status))

    def record(
        self, payment: Payment, kind: str, amount: Decimal, at: datetime, *, refund: Refund | None = None
    ) -> None:
        """Enter a movement of money in the ledger."""
        self.state.ledger.append(
            LedgerEntry(
                payment_id=payment.id,
                kind=kind,
                amount=amount,
                currency=payment.currency,
                at=at,
                idempotence_key=(refund or payment).idempotence_key,
                payment_method_id=payment.method_id,
                metadata=dict(payment.metadata),
                refund_id=refund.id if refund else None,
            )
        )

    def _shown(self, item_id: str) -> bytes:
        state = self.state
        item = state.payments.get(item_id) or state.refunds.get(item_id) or state.methods[item_id]
        return item.json()

    def _save_method_of(self, payment: Payment) -> None:
        if payment.save_method and not payment.method_saved:
            payment.method_saved = True
            if payment.id not in self.state.methods:
                self.state.methods[payment.id] = SavedMethod(
                    payment.id,
                    payment.account_id,
                    type=payment.method_type or "bank_card",
                    card_last4=payment.card_last4,
                )
