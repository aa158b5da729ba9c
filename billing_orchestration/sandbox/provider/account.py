"""The payment provider on a laptop: a shop's account there, without HTTP (that is `server`).

It keeps what the real one keeps: payments, saved payment methods, and the answer to each idempotence key for 24 hours.
It also keeps an append-only ledger of every movement of money, which no client can change. Tests and the demo ask the
ledger who was charged, not the billing database.

Thread-safe: one lock, which every public method takes. Time is the clock it is given. Whatever is due by now (a pending
payment that settles, a hold that runs out) has happened before any question is answered.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from billing_orchestration.sandbox.provider import charging, history
from billing_orchestration.sandbox.provider.answers import Answer, Refused
from billing_orchestration.sandbox.provider.clock import SandboxClock, aware_utc, from_milliseconds
from billing_orchestration.sandbox.provider.list_requests import Cursor, list_request
from billing_orchestration.sandbox.provider.payment_books import PaymentBooks
from billing_orchestration.sandbox.provider.payment_list import place
from billing_orchestration.sandbox.provider.records import (
    LedgerEntry,
    Outcome,
    OutcomeLike,
    Payment,
    SavedMethod,
    money,
)
from billing_orchestration.sandbox.provider.state import ProviderState, read_state, write_state
from billing_orchestration.sandbox.provider.switches import Switches

SHOP_ID = "100500"
SECRET_KEY = "test_sandbox"  # noqa: S105 - the sandbox has no secrets


class SandboxProvider:
    """A shop's account at the provider. `clock` returns aware UTC; `seed` makes payment ids repeatable."""

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
        """Forget every payment, method, key and ledger entry. Credentials, clock and switches stay."""
        with self._lock:
            self._random = random.Random(self._seed)
            self._books = PaymentBooks(ProviderState(), self._random)

    def save(self, path: Path) -> None:
        """Write payments, methods, keys and ledger to a file."""
        with self._lock:
            write_state(self._books.state, path)

    def load(self, path: Path) -> None:
        """Take over what `save` wrote, in place of what is known."""
        with self._lock:
            self._books = PaymentBooks(read_state(path), self._random)

    @property
    def is_test_shop(self) -> bool:
        """As at the real provider, a secret key `test_…` belongs to a shop whose payments are all tests."""
        return self.secret_key.startswith("test_")

    # ------------------------------------------------------------------ the API: what a client of the provider sees

    def is_authorised(self, shop_id: str, secret_key: str) -> bool:
        """Whether these are the shop's credentials."""
        return (shop_id, secret_key) == (self.shop_id, self.secret_key)

    def create_payment(self, body: bytes, key: str | None, *, looked_up: bool = False) -> Answer:
        """POST /payments. Moves money (a ledger entry) when the method's script says `succeeded` and capture is asked.

        The same key with the same body within 24 hours gets the first answer again and moves nothing; with another
        body it is refused; after 24 hours it is a new charge, exactly as dangerous as at the real provider.
        `looked_up`: the key was unknown when the request came in; it is not looked up again.
        """
        with self._lock:
            now = self._catch_up()
            return charging.create_payment(self._books, body, key, now, self.switches, self._shop, looked_up=looked_up)

    def holds_key(self, key: str) -> bool:
        """Whether a request with this key would get the answer of an earlier one."""
        with self._lock:
            return charging.key_record(self._books, key, self.clock()) is not None

    def get_payment(self, payment_id: str) -> Answer:
        """GET /payments/{id}."""
        with self._lock:
            self._catch_up()
            payment = self._books.state.payments.get(payment_id)
            if payment is None:
                return Refused(
                    404, "not_found", "Incorrect payment_id. Payment doesn't exist or access denied", "payment_id"
                ).answer()
            return Answer(200, payment.json())

    def list_payments(self, query: Sequence[tuple[str, str]]) -> Answer:
        """GET /payments: one page, by created_at descending, with `next_cursor` unless it is the last."""
        with self._lock:
            now = self._catch_up()
            try:
                request = list_request(query, self.switches)
            except Refused as refused:
                return refused.answer()
            page, more = self._books.list.page(request, now, self.switches)
            parts = [b'{"type":"list","items":[', b",".join(payment.json() for _, _, payment in page), b"]"]
            if more:
                cursor = Cursor(*place(page[-1]), request.page + 1, request.filters).encode()
                parts.append(b',"next_cursor":"' + cursor.encode() + b'"')
            parts.append(b"}")
            return Answer(200, b"".join(parts))

    def account(self) -> Answer:
        """GET /me: the shop whose credentials these are."""
        document = {
            "account_id": self.shop_id,
            "status": "enabled",
            "test": self.is_test_shop,
            "fiscalization_enabled": self.switches.requires_receipt,
            "payment_methods": ["yoo_money", "bank_card"],
        }
        return Answer(200, json.dumps(document).encode())

    # ------------------------------------------------------- the shop's customers and its cabinet: not through the API

    def add_method(
        self,
        method_id: str | None = None,
        script: OutcomeLike | Iterable[OutcomeLike] = "succeeded",
        *,
        method_type: str = "bank_card",
        saved: bool = True,
        card_last4: str = "4444",
    ) -> SavedMethod:
        """Add a saved payment method, or replace it. `script`: one outcome or several (see `outcome`)."""
        with self._lock:
            method_id = method_id or self._books.new_id(self.clock())
            return history.add_method(
                self._books, method_id, script, type=method_type, saved=saved, card_last4=card_last4
            )

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
        self, payment_id: str, amount: Decimal | str | int | None = None, *, at: datetime | str | None = None
    ) -> Payment:
        """Refund an amount, or all that is left. The payment stays `succeeded`."""
        with self._lock:
            now = self._catch_up()
            payment = self._books.existing(payment_id)
            left = payment.amount - payment.refunded
            back = left if amount is None else money(amount)
            if payment.status != "succeeded" or not 0 < back <= left:
                raise ValueError(f"{back} {payment.currency} cannot be refunded of {payment_id} ({payment.status})")
            self._books.refund(payment, back, now if at is None else aware_utc(at))
            return payment

    def add_payment(self, **fields: Any) -> Payment:
        """Add one payment to the history; see `add_payments`."""
        return self.add_payments([fields])[0]

    def add_payments(self, many: Iterable[Mapping[str, Any]]) -> list[Payment]:
        """Add payments to the history, whatever their age and state.

        Fields, all optional: id, amount ("990.00"), currency, status ("succeeded"), created_at (now), captured_at
        (created_at, if succeeded), description, metadata, method_type, method_id (the payment's own id), saved,
        script (of the saved method; `saved` registers it), card_last4, refunded_amount, test, cancellation
        ({party, reason}); for odd items: override (fields of the shown JSON replaced), without (fields left out), raw
        (the whole item, verbatim). Successes and refunds enter the ledger. A pending or held payment stays so until
        it is paid, captured or canceled: history does not expire by itself.
        """
        with self._lock:
            now = self._catch_up()
            return [history.add_payment(self._books, now, self._shop, fields) for fields in many]

    # -------------------------------------------------------------------------------------------- the books

    def methods(self) -> list[SavedMethod]:
        """All saved methods."""
        with self._lock:
            return list(self._books.state.methods.values())

    def payment(self, payment_id: str) -> Payment:
        """One payment as it is now; KeyError when there is none."""
        with self._lock:
            self._catch_up()
            return self._books.existing(payment_id)

    def payments(self) -> list[Payment]:
        """All payments, oldest first."""
        with self._lock:
            self._catch_up()
            return [payment for _, _, payment in self._books.list.by_created]

    def ledger(self) -> list[LedgerEntry]:
        """Every movement of money so far, in the order it happened here."""
        with self._lock:
            self._catch_up()
            return list(self._books.state.ledger)

    def charges(self, *, payment_method_id: str | None = None, **metadata: str) -> list[LedgerEntry]:
        """Money taken by calls to the API (never customers' own purchases), narrowed by method and by metadata."""
        return [
            entry
            for entry in self.ledger()
            if entry.kind == "charge"
            and entry.idempotence_key is not None
            and (payment_method_id is None or entry.payment_method_id == payment_method_id)
            and all(entry.metadata.get(name) == value for name, value in metadata.items())
        ]

    def known_keys(self) -> list[str]:
        """Idempotence keys that were ever accepted."""
        with self._lock:
            return list(self._books.state.keys)

    def agenda(self) -> list[tuple[datetime, str, Outcome]]:
        """What will happen by itself: when, to which payment, and its outcome. In no order."""
        with self._lock:
            return [
                (from_milliseconds(due), payment_id, result) for due, _, payment_id, result in self._books.state.agenda
            ]

    # ------------------------------------------------------------------------------------------------- inside

    @property
    def _shop(self) -> dict[str, Any]:
        """What each of the shop's payments says of the shop."""
        return {"account_id": self.shop_id, "test": self.is_test_shop}

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
