"""A shop's account at the provider beside its API: customers pay, the staff acts, the past is put in.

Thread-safe: one lock, which every public method takes. Time is the clock it is given. Whatever is due by now (a pending
payment that settles, a hold that runs out) has happened before any question is answered.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from billing_orchestration.sandbox.provider import history
from billing_orchestration.sandbox.provider.clock import SandboxClock, aware_utc
from billing_orchestration.sandbox.provider.methods import SavedMethod
from billing_orchestration.sandbox.provider.payment_books import PaymentBooks
from billing_orchestration.sandbox.provider.payments import Payment
from billing_orchestration.sandbox.provider.records import Outcome, OutcomeLike, money, outcome
from billing_orchestration.sandbox.provider.refunds import Refund
from billing_orchestration.sandbox.provider.state import (
    ProviderState,
    read_document,
    state_document,
    state_of,
    write_document,
)
from billing_orchestration.sandbox.provider.switches import Switches

SHOP_ID = "100500"
SECRET_KEY = "test_sandbox"  # noqa: S105 - the sandbox has no secrets


class Cabinet:
    """A shop's account beside its API. `clock` returns aware UTC; `seed` makes payment ids repeatable."""

    def __init__(
        self,
        *,
        shop_id: str = SHOP_ID,
        secret_key: str = SECRET_KEY,
        clock: Callable[[], datetime] | None = None,
        switches: Switches | None = None,
        seed: int | None = None,
    ) -> None:
        self.shop_id = shop_id
        self.secret_key = secret_key
        self.clock: Callable[[], datetime] = clock or SandboxClock()
        self.switches = switches or Switches()
        self._seed = seed
        self._lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        """Forget every payment, refund, method, key and ledger entry. Credentials, clock and switches stay."""
        with self._lock:
            self._random = random.Random(self._seed)
            self._books = PaymentBooks(ProviderState(), self._random)

    def document(self) -> dict[str, Any]:
        """Credentials, switches, payments, refunds, methods, keys and ledger as JSON."""
        with self._lock:
            about = {"shop_id": self.shop_id, "secret_key": self.secret_key, "switches": asdict(self.switches)}
            return about | state_document(self._books.state)

    def restore(self, document: Mapping[str, Any]) -> None:
        """Take over a document of `document`, in place of what is known. The credentials stay."""
        with self._lock:
            self.switches = Switches(**document["switches"])
            self._books = PaymentBooks(state_of(document), self._random)

    def save(self, path: Path) -> None:
        """Write `document` to a file."""
        write_document(self.document(), path)

    def load(self, path: Path) -> None:
        """Take over what `save` wrote."""
        self.restore(read_document(path))

    @property
    def is_test_shop(self) -> bool:
        """As at the real provider, a secret key `test_…` belongs to a shop whose payments are all tests."""
        return self.secret_key.startswith("test_")

    def add_method(
        self,
        method_id: str | None = None,
        script: OutcomeLike | Iterable[OutcomeLike] = "succeeded",
        *,
        method_type: str = "bank_card",
        saved: bool = True,
        status: str | None = None,
        card_last4: str = "4444",
    ) -> SavedMethod:
        """Add a payment method, or replace it. `script`: one outcome or several (see `outcome`).

        `status`: active if `saved`, else inactive, unless it is given.
        """
        with self._lock:
            method_id = method_id or self._books.new_id(self.clock())
            return history.add_method(
                self._books,
                method_id,
                script,
                account_id=self.shop_id,
                type=method_type,
                status=status or ("active" if saved else "inactive"),
                card_last4=card_last4,
            )

    def activate_method(self, method_id: str) -> SavedMethod:
        """Its owner confirms that a pending method may be saved."""
        return self._change_method(method_id, {"pending"}, "active")

    def deactivate_method(self, method_id: str) -> SavedMethod:
        """Its owner does not confirm it, or it can no longer be charged."""
        return self._change_method(method_id, {"pending", "active"}, "inactive")

    def purchase(
        self,
        amount: Decimal | str | int,
        *,
        currency: str = "RUB",
        metadata: Mapping[str, Any] | None = None,
        description: str | None = None,
        method_type: str = "bank_card",
        save_method: bool = False,
        capture: bool = True,
        created_at: datetime | str | None = None,
    ) -> Payment:
        """A customer begins to pay: a pending payment, which runs out unless it is paid (a card's in one hour)."""
        with self._lock:
            now = self._catch_up()
            return self._books.add_unconfirmed(
                now if created_at is None else aware_utc(created_at),
                amount=money(amount),
                currency=currency,
                description=description,
                metadata=dict(metadata or {}),
                method_type=method_type,
                capture=capture,
                save_method=save_method,
                **self._shop,
            )

    def pay(self, payment_id: str, *, at: datetime | str | None = None) -> Payment:
        """The customer confirms a pending payment. The money moves, unless it is only held (`capture` was false)."""
        return self._move(payment_id, {"pending"}, Outcome("succeeded"), at)

    def cancel(
        self,
        payment_id: str,
        reason: str = "canceled_by_merchant",
        *,
        party: str = "merchant",
        at: datetime | str | None = None,
    ) -> Payment:
        """Cancel a pending or a held payment."""
        result = Outcome("canceled", reason=reason, party=party)
        return self._move(payment_id, {"pending", "waiting_for_capture"}, result, at)

    def capture(self, payment_id: str, *, at: datetime | str | None = None) -> Payment:
        """Take the money that a payment holds."""
        with self._lock:
            self._books.existing(payment_id).capture = True
            return self._move(payment_id, {"waiting_for_capture"}, Outcome("succeeded"), at)

    def hold(self, amount: Decimal | str | int, **purchase: Any) -> Payment:
        """A purchase whose money is held and not taken yet (`waiting_for_capture`, for seven days)."""
        with self._lock:
            payment = self.purchase(amount, capture=False, **purchase)
            return self.pay(payment.id, at=payment.created_at)

    def refund(
        self,
        payment_id: str,
        amount: Decimal | str | int | None = None,
        *,
        at: datetime | str | None = None,
        result: OutcomeLike = "succeeded",
    ) -> Payment:
        """Refund an amount, or all that is left. The payment stays `succeeded`. `result`: see `outcome`."""
        with self._lock:
            now = self._catch_up()
            payment = self._books.existing(payment_id)
            left = self._books.refundable(payment)
            back = left if amount is None else money(amount)
            if not 0 < back <= left:
                raise ValueError(f"{back} {payment.currency} cannot be refunded of {payment_id} ({payment.status})")
            self._books.add_refund(payment, back, now if at is None else aware_utc(at), outcome(result))
            return payment

    def succeed_refund(self, refund_id: str, *, at: datetime | str | None = None) -> Refund:
        """Give back the money of a pending refund."""
        return self._settle_refund(refund_id, Outcome("succeeded"), at)

    def cancel_refund(
        self, refund_id: str, reason: str = "general_decline", *, at: datetime | str | None = None
    ) -> Refund:
        """Let a pending refund fail: the shop keeps the money."""
        return self._settle_refund(refund_id, Outcome("canceled", reason=reason), at)

    def register_receipt(self, payment_id: str, *, at: datetime | str | None = None) -> Payment:
        """The receipt of a payment is registered."""
        return self._register(payment_id, "succeeded", at)

    def cancel_receipt(self, payment_id: str, *, at: datetime | str | None = None) -> Payment:
        """The receipt of a payment cannot be registered."""
        return self._register(payment_id, "canceled", at)

    def add_payment(self, **fields: Any) -> Payment:
        """Add one payment to the history; see `add_payments`."""
        return self.add_payments([fields])[0]

    def add_payments(self, many: Iterable[Mapping[str, Any]]) -> list[Payment]:
        """Add payments to the history, whatever their age and state.

        Fields, all optional: id, amount ("990.00"), currency, status ("succeeded"), created_at (now), captured_at
        (created_at, if succeeded), description, metadata, method_type, method_id (the payment's own id), saved,
        script (of the saved method; `saved` registers it), card_last4, gateway_id, registration (of its receipt),
        refunded_amount, refunded_at, test, cancellation ({party, reason}); for odd items: override (fields of the
        shown JSON replaced), without (fields left out), raw (the whole item, verbatim). Successes and refunds enter
        the ledger. A pending or held payment stays so until it is paid, captured or canceled: history does not expire
        by itself.
        """
        with self._lock:
            now = self._catch_up()
            return [history.add_payment(self._books, now, self._shop, fields) for fields in many]

    # ------------------------------------------------------------------------------------------------- inside

    @property
    def _shop(self) -> dict[str, Any]:
        """What each of the shop's payments says of the shop."""
        return {"account_id": self.shop_id, "test": self.is_test_shop, "fee_percent": self.switches.fee_percent}

    def _catch_up(self, until: datetime | None = None) -> datetime:
        """Let happen what is due by now (or by an earlier instant); returns that instant."""
        now = until or self.clock()
        self._books.catch_up(now)
        return now

    def _move(self, payment_id: str, expected: set[str], result: Outcome, at: datetime | str | None) -> Payment:
        with self._lock:
            now = self._catch_up(None if at is None else aware_utc(at))
            payment = self._books.existing(payment_id)
            if payment.status not in expected:
                raise ValueError(f"payment {payment_id} is {payment.status}, not {' or '.join(sorted(expected))}")
            self._books.apply(payment, result, now)
            return payment

    def _register(self, payment_id: str, status: str, at: datetime | str | None) -> Payment:
        with self._lock:
            now = self._catch_up(None if at is None else aware_utc(at))
            payment = self._books.existing(payment_id)
            if payment.registration != "pending":
                raise ValueError(f"the receipt of {payment_id} is {payment.registration}, not pending")
            self._books.register(payment, status, now)
            return payment

    def _change_method(self, method_id: str, expected: set[str], status: str) -> SavedMethod:
        with self._lock:
            self._catch_up()
            method = self._books.state.methods.get(method_id)
            if method is None:
                raise KeyError(f"the sandbox has no payment method {method_id}")
            if method.status not in expected:
                raise ValueError(f"payment method {method_id} is {method.status}")
            method.status = status
            return method

    def _settle_refund(self, refund_id: str, result: Outcome, at: datetime | str | None) -> Refund:
        with self._lock:
            now = self._catch_up(None if at is None else aware_utc(at))
            refund = self._books.existing_refund(refund_id)
            if refund.status != "pending":
                raise ValueError(f"refund {refund_id} is {refund.status}, not pending")
            self._books.settle_refund(refund, result, now)
            return refund
