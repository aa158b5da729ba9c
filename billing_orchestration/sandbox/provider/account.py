"""The payment provider on a laptop: its rules and its books, without HTTP (that is `server`).

It keeps what the real one keeps: payments, saved payment methods, the answers given under each idempotence key for
24 hours. And it keeps a ledger of every movement of money, append-only, which no client can talk it out of: tests and
the demo ask the ledger who was charged, not the billing database.

Thread-safe: one lock, every public method takes it. Time is the clock it is given; whatever was to happen by now
(a pending payment that settles, a hold that runs out) has happened before any question is answered.
"""

from __future__ import annotations

import heapq
import json
import random
import threading
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from billing_orchestration.sandbox.provider.records import (
    CONFIRM_WITHIN_DEFAULT_S,
    CONFIRM_WITHIN_S,
    HOLD_DAYS,
    METHOD_TYPES,
    Answer,
    LedgerEntry,
    Outcome,
    OutcomeLike,
    Payment,
    SandboxClock,
    SavedMethod,
    Switches,
    aware_utc,
    from_milliseconds,
    milliseconds,
    money,
    new_payment_id,
    outcome,
)
from billing_orchestration.sandbox.provider.requests import (
    ChargeRequest,
    Cursor,
    ListRequest,
    Refused,
    charge_request,
    idempotence_key,
    invalid,
    list_request,
    parse_body,
)
from billing_orchestration.sandbox.provider.state import IdempotenceRecord, ProviderState, read_state, write_state

SHOP_ID = "100500"
SECRET_KEY = "test_sandbox"  # noqa: S105 - the sandbox has no secrets
KEY_LIFETIME = timedelta(hours=24)
# The list reaches back three years.
HISTORY = timedelta(days=3 * 365)
# (position in milliseconds, sequence, payment): sequences are unique, so payments themselves are never compared.
_Index = list[tuple[int, int, Payment]]


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
        self._clear()

    def _clear(self) -> None:
        self._random = random.Random(self._seed) if self._seed is not None else random.Random()
        self._know(ProviderState())

    def _know(self, state: ProviderState) -> None:
        """Take a state over and build the two sorted indexes that lists are read from."""
        self._state = state
        created = ((milliseconds(p.created_at), p.sequence, p) for p in state.payments.values())
        captured = (
            (milliseconds(p.captured_at), p.sequence, p) for p in state.payments.values() if p.captured_at is not None
        )
        self._by_created: _Index = sorted(created, key=_place)
        self._by_captured: _Index = sorted(captured, key=_place)
        self._captured_version = 0
        self._candidates: tuple[tuple[int, int, int], _Index] | None = None

    def reset(self) -> None:
        """Forget every payment, method, key and ledger entry. Credentials, clock and switches stay."""
        with self._lock:
            self._clear()

    def save(self, path: Path) -> None:
        """Write payments, methods, keys and ledger to a file."""
        with self._lock:
            write_state(self._state, path)

    def load(self, path: Path) -> None:
        """Take over what `save` wrote, in place of what is known."""
        with self._lock:
            self._know(read_state(path))

    @property
    def is_test_shop(self) -> bool:
        """As at the real provider, a secret key `test_…` belongs to a shop whose payments are all tests."""
        return self.secret_key.startswith("test_")

    # ------------------------------------------------------------------ the API: what a client of the provider sees

    def check_credentials(self, shop_id: str, secret_key: str) -> Answer | None:
        """None when they are right, else the 401."""
        if (shop_id, secret_key) == (self.shop_id, self.secret_key):
            return None
        return Refused(
            401,
            "invalid_credentials",
            "Error in shopId or secret key. Check their validity. You can reissue the key in the Merchant Profile",
        ).answer()

    def create_payment(self, body: bytes, key: str | None) -> Answer:
        """POST /payments. Moves money (a ledger entry) when the method's script says `succeeded` and capture is asked.

        The same key with the same body within 24 hours gets the first answer again and moves nothing; with another
        body it is refused; after 24 hours it is a new charge, exactly as dangerous as at the real provider.
        """
        with self._lock:
            now = self._catch_up()
            try:
                key = idempotence_key(key)
                parsed = parse_body(body)
            except Refused as refused:
                return refused.answer()
            canonical = json.dumps(parsed, sort_keys=True)
            record = self._state.keys.get(key)
            if record is not None and now - record.first_at < KEY_LIFETIME:
                if record.body != canonical:
                    return invalid("Idempotence key duplicated", "Idempotence-Key").answer()
                if self.switches.replay == "current" and record.payment_id is not None:
                    return Answer(200, self._state.payments[record.payment_id].json())
                return record.answer
            payment_id = None
            try:
                payment = self._charge(charge_request(parsed, self.switches), key, now)
                payment_id, answer = payment.id, Answer(200, payment.json())
            except Refused as refused:
                answer = refused.answer()
            if payment_id is not None or self.switches.remember_errors:
                self._state.keys[key] = IdempotenceRecord(canonical, now, answer, payment_id)
            return answer

    def get_payment(self, payment_id: str) -> Answer:
        """GET /payments/{id}."""
        with self._lock:
            self._catch_up()
            payment = self._state.payments.get(payment_id)
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
            page, more = self._page(request, now)
            parts = [b'{"type":"list","items":[', b",".join(payment.json() for _, _, payment in page), b"]"]
            if more:
                position, sequence, _ = page[-1]
                cursor = Cursor(position, sequence, request.page + 1, request.filters).encode()
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

    def _charge(self, request: ChargeRequest, key: str, now: datetime) -> Payment:
        if request.payment_method_id is None:
            payment = self._new_payment(
                now,
                amount=request.amount,
                currency=request.currency,
                status="pending",
                description=request.description,
                metadata=request.metadata,
                method_type=request.method_type,
                capture=request.capture,
                save_method=request.save_method,
                idempotence_key=key,
            )
            payment.confirmation_url = f"https://confirmation.invalid/checkout?orderId={payment.id}"
            self._expire_unconfirmed(payment, now)
            return payment
        method = self._state.methods.get(request.payment_method_id)
        if method is None:
            raise invalid("Payment method doesn't exist or access denied", "payment_method_id")
        if not method.saved:
            raise invalid("Payment method is not saved", "payment_method_id")
        result = method.next_outcome()
        if result.kind == "forbidden":
            raise Refused(403, "forbidden", "You can't make recurring payments. Contact your manager")
        if result.kind == "bad_request":
            raise invalid("Payment method is not available for this payment", "payment_method_id")
        payment = self._new_payment(
            now,
            amount=request.amount,
            currency=request.currency,
            status="pending",
            description=request.description,
            metadata=request.metadata,
            method_type=method.type,
            method_id=method.id,
            method_saved=True,
            card_last4=method.card_last4,
            capture=request.capture,
            idempotence_key=key,
        )
        if result.kind == "pending":
            if result.then is not None:
                due = result.at or now + timedelta(seconds=result.after_s or 0)
                self._schedule(payment, due, replace(result, kind=result.then, then=None, after_s=None, at=None))
        else:
            self._apply(payment, result, now)
        return payment

    def _page(self, request: ListRequest, now: datetime) -> tuple[_Index, bool]:
        """The page's entries and whether there are more. Positions are created_at (or captured_at, by switch)."""
        oldest = max(request.created_from, milliseconds(now - HISTORY))
        lag = timedelta(seconds=self.switches.list_lag_s)
        by_captured_order = request.by_captured and self.switches.captured_order == "captured_at"
        if by_captured_order:
            index, low, high = self._by_captured, request.captured_from, request.captured_to
        elif request.by_captured:
            index, low, high = self._captured_within(request), oldest, request.created_to
        else:
            index, low, high = self._by_created, oldest, request.created_to
        first = bisect_left(index, low, key=_position)
        if request.cursor is None:
            end = bisect_right(index, high, key=_position)
        else:
            end = bisect_left(index, (request.cursor.position, request.cursor.sequence), key=_place)
        page: _Index = []
        for at in range(end - 1, first - 1, -1):
            entry = index[at]
            payment = entry[2]
            if request.status is not None and payment.status != request.status:
                continue
            if request.method_type is not None and payment.method_type != request.method_type:
                continue
            if by_captured_order and not oldest <= milliseconds(payment.created_at) <= request.created_to:
                continue
            if lag and now - payment.changed_at < lag:
                continue
            if len(page) == request.limit:
                return page, True
            page.append(entry)
        return page, False

    def _captured_within(self, request: ListRequest) -> _Index:
        """Payments captured within the bounds, ascending by creation; kept for the next page of the same scan."""
        asked = (request.captured_from, request.captured_to, self._captured_version)
        if self._candidates is None or self._candidates[0] != asked:
            first = bisect_left(self._by_captured, request.captured_from, key=_position)
            end = bisect_right(self._by_captured, request.captured_to, key=_position)
            found = [(milliseconds(p.created_at), sequence, p) for _, sequence, p in self._by_captured[first:end]]
            found.sort(key=_place)
            self._candidates = (asked, found)
        return self._candidates[1]

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
        """Put a saved payment method in, or replace it. `script`: one outcome or several (see `outcome`)."""
        given = [script] if isinstance(script, (str, Outcome, Mapping)) else list(script)
        if not given:
            raise ValueError("a script needs at least one outcome")
        if method_type not in METHOD_TYPES:
            raise ValueError(f"unknown payment method type {method_type!r}")
        with self._lock:
            method = SavedMethod(
                id=method_id or new_payment_id(self.clock(), self._random),
                type=method_type,
                saved=saved,
                script=[outcome(item) for item in given],
                card_last4=card_last4,
            )
            self._state.methods[method.id] = method
            return method

    def methods(self) -> list[SavedMethod]:
        """All saved methods."""
        with self._lock:
            return list(self._state.methods.values())

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
            at = aware_utc(created_at) if created_at is not None else now
            payment = self._new_payment(
                at,
                amount=money(amount),
                currency=currency,
                status="pending",
                description=description,
                metadata=dict(metadata or {}),
                method_type=method_type,
                capture=capture,
                save_method=save_method,
            )
            payment.confirmation_url = f"https://confirmation.invalid/checkout?orderId={payment.id}"
            self._expire_unconfirmed(payment, at)
            return payment

    def pay(self, payment_id: str, *, at: datetime | str | None = None) -> Payment:
        """The customer confirms a pending payment. The money moves, unless it is only held (`capture` was false)."""
        return self._move(payment_id, "pending", Outcome("succeeded"), at)

    def cancel(
        self,
        payment_id: str,
        reason: str = "canceled_by_merchant",
        *,
        party: str = "merchant",
        at: datetime | str | None = None,
    ) -> Payment:
        """Cancel a pending or a held payment."""
        return self._move(payment_id, None, Outcome("canceled", reason=reason, party=party), at)

    def capture(self, payment_id: str, *, at: datetime | str | None = None) -> Payment:
        """Take the money that a payment holds."""
        with self._lock:
            payment = self._existing(payment_id)
            payment.capture = True
            return self._move(payment_id, "waiting_for_capture", Outcome("succeeded"), at)

    def hold(self, amount: Decimal | str | int, **purchase: Any) -> Payment:
        """A purchase whose money is held and not taken yet (`waiting_for_capture`, for seven days)."""
        with self._lock:
            payment = self.purchase(amount, capture=False, **purchase)
            return self.pay(payment.id, at=payment.created_at)

    def refund(
        self, payment_id: str, amount: Decimal | str | int | None = None, *, at: datetime | str | None = None
    ) -> Payment:
        """Give money back, all that is left unless an amount is given. The payment stays `succeeded`."""
        with self._lock:
            now = self._catch_up()
            payment = self._existing(payment_id)
            left = payment.amount - payment.refunded
            back = left if amount is None else money(amount)
            if payment.status != "succeeded" or not 0 < back <= left:
                raise ValueError(f"{back} {payment.currency} cannot be refunded of {payment_id} ({payment.status})")
            payment.refunded += back
            # A refund is no change of status: the list shows it without lag.
            payment.touch(payment.changed_at)
            self._enter(payment, "refund", back, aware_utc(at) if at is not None else now)
            return payment

    def add_payment(self, **fields: Any) -> Payment:
        """Put one payment into the history; see `add_payments`."""
        return self.add_payments([fields])[0]

    def add_payments(self, many: Iterable[Mapping[str, Any]]) -> list[Payment]:
        """Put payments into the history as they are to be found, whatever their age and state.

        Fields, all optional: id, amount ("990.00"), currency, status ("succeeded"), created_at (now), captured_at
        (created_at, if succeeded), description, metadata, method_type, method_id (the payment's own id), saved,
        script (of the saved method; `saved` registers it), card_last4, refunded_amount, test, cancellation
        ({party, reason}), and for odd items: override (fields of the shown JSON replaced), without (fields left
        out), raw (the whole item, verbatim). What succeeded and what was refunded is entered in the ledger. A pending
        or held payment stays so until it is paid, captured or canceled: history does not run out by itself.
        """
        with self._lock:
            now = self._catch_up()
            added: list[Payment] = []
            try:
                for fields in many:
                    added.append(self._add(dict(fields), now))  # noqa: PERF401 - what was added before an error stays
            finally:
                self._by_created.sort(key=_place)
                self._by_captured.sort(key=_place)
                self._captured_version += 1
            return added

    def _add(self, fields: dict[str, Any], now: datetime) -> Payment:
        status = fields.pop("status", "succeeded")
        created_at = aware_utc(fields.pop("created_at", None) or now)
        captured_at = fields.pop("captured_at", None)
        if captured_at is None and status == "succeeded":
            captured_at = created_at
        saved = bool(fields.pop("saved", False))
        script = fields.pop("script", None)
        amount = money(fields.pop("amount", "990.00"))
        refunded = money(fields.pop("refunded_amount", "0.00"))
        payment = self._build(
            created_at,
            payment_id=fields.pop("id", None),
            amount=amount,
            currency=fields.pop("currency", "RUB"),
            status=status,
            description=fields.pop("description", None),
            metadata=dict(fields.pop("metadata", None) or {}),
            method_type=fields.pop("method_type", "bank_card"),
            method_id=fields.pop("method_id", None),
            method_saved=saved,
            card_last4=fields.pop("card_last4", "4444"),
            cancellation=fields.pop("cancellation", None),
            override=dict(fields.pop("override", None) or {}),
            without=tuple(fields.pop("without", ())),
            raw=fields.pop("raw", None),
            test=bool(fields.pop("test", self.is_test_shop)),
        )
        if fields:
            del self._state.payments[payment.id]
            raise ValueError(f"a payment has no field {', '.join(sorted(fields))}")
        payment.refunded = refunded
        self._by_created.append((milliseconds(created_at), payment.sequence, payment))
        if captured_at is not None:
            payment.captured_at = payment.changed_at = aware_utc(captured_at)
            self._by_captured.append((milliseconds(payment.captured_at), payment.sequence, payment))
        if status == "succeeded":
            self._enter(payment, "charge", amount, payment.changed_at)
            if refunded:
                self._enter(payment, "refund", refunded, payment.changed_at)
        elif status == "canceled" and payment.cancellation is None:
            payment.cancellation = {"party": "yoo_money", "reason": "expired_on_confirmation"}
        if saved and (script is not None or payment.method_id not in self._state.methods):
            self.add_method(
                payment.method_id,
                "succeeded" if script is None else script,
                method_type=payment.method_type or "bank_card",
                card_last4=payment.card_last4,
            )
        return payment

    # -------------------------------------------------------------------------------------------- the books

    def payment(self, payment_id: str) -> Payment:
        """One payment as it is now; KeyError when there is none."""
        with self._lock:
            self._catch_up()
            return self._existing(payment_id)

    def payments(self) -> list[Payment]:
        """All payments, oldest first."""
        with self._lock:
            self._catch_up()
            return [payment for _, _, payment in self._by_created]

    def ledger(self) -> list[LedgerEntry]:
        """Every movement of money so far, in the order it happened here."""
        with self._lock:
            self._catch_up()
            return list(self._state.ledger)

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
            return list(self._state.keys)

    # ------------------------------------------------------------------------------------------------- inside

    def _existing(self, payment_id: str) -> Payment:
        try:
            return self._state.payments[payment_id]
        except KeyError:
            raise KeyError(f"the sandbox has no payment {payment_id}") from None

    def _build(self, at: datetime, *, payment_id: str | None = None, **fields: Any) -> Payment:
        at = aware_utc(at)
        self._state.sequence += 1
        payment_id = payment_id or new_payment_id(at, self._random)
        if payment_id in self._state.payments:
            raise ValueError(f"the sandbox has a payment {payment_id} already")
        fields.setdefault("test", self.is_test_shop)
        payment = Payment(
            id=payment_id,
            account_id=self.shop_id,
            sequence=self._state.sequence,
            created_at=at,
            changed_at=at,
            **fields,
        )
        if payment.method_id is None:
            payment.method_id = payment.id
        self._state.payments[payment.id] = payment
        return payment

    def _new_payment(self, at: datetime, **fields: Any) -> Payment:
        payment = self._build(at, **fields)
        insort(self._by_created, (milliseconds(payment.created_at), payment.sequence, payment), key=_place)
        return payment

    def _catch_up(self, until: datetime | None = None) -> datetime:
        """Let happen what is due by now (or by an earlier instant); returns that instant."""
        now = until or self.clock()
        while self._state.agenda and self._state.agenda[0][0] <= milliseconds(now):
            due, _, payment_id, result = heapq.heappop(self._state.agenda)
            payment = self._state.payments.get(payment_id)
            expected = {"pending", "waiting_for_capture"} if result.reason == "expired_on_capture" else {"pending"}
            if payment is not None and payment.status in expected:
                self._apply(payment, result, from_milliseconds(due))
        return now

    def _schedule(self, payment: Payment, due: datetime, result: Outcome) -> None:
        self._state.sequence += 1
        heapq.heappush(self._state.agenda, (milliseconds(due), self._state.sequence, payment.id, result))

    def _expire_unconfirmed(self, payment: Payment, at: datetime) -> None:
        seconds = CONFIRM_WITHIN_S.get(payment.method_type or "", CONFIRM_WITHIN_DEFAULT_S)
        if seconds is not None:
            result = Outcome("canceled", reason="expired_on_confirmation", party="yoo_money")
            self._schedule(payment, at + timedelta(seconds=seconds), result)

    def _move(self, payment_id: str, expected: str | None, result: Outcome, at: datetime | str | None) -> Payment:
        with self._lock:
            now = self._catch_up(None if at is None else aware_utc(at))
            payment = self._existing(payment_id)
            allowed = {"pending", "waiting_for_capture"} if expected is None else {expected}
            if payment.status not in allowed:
                raise ValueError(f"payment {payment_id} is {payment.status}, not {' or '.join(sorted(allowed))}")
            self._apply(payment, result, now)
            return payment

    def _apply(self, payment: Payment, result: Outcome, at: datetime) -> None:
        """Bring a payment to its outcome: the only place where a charge enters the ledger after its creation."""
        at = aware_utc(at)
        if result.kind == "canceled":
            payment.status = "canceled"
            payment.cancellation = {"party": result.party, "reason": result.reason}
        elif payment.capture:
            payment.status = "succeeded"
            payment.captured_at = at
            insort(self._by_captured, (milliseconds(at), payment.sequence, payment), key=_place)
            self._captured_version += 1
            self._enter(payment, "charge", payment.amount, at)
            self._save_method_of(payment)
        else:
            payment.status = "waiting_for_capture"
            payment.expires_at = at + timedelta(days=HOLD_DAYS)
            run_out = Outcome("canceled", reason="expired_on_capture", party="yoo_money")
            self._schedule(payment, payment.expires_at, run_out)
            self._save_method_of(payment)
        payment.touch(at)

    def _save_method_of(self, payment: Payment) -> None:
        if payment.save_method and not payment.method_saved:
            payment.method_saved = True
            if payment.id not in self._state.methods:
                self.add_method(payment.id, method_type=payment.method_type or "bank_card")

    def _enter(self, payment: Payment, kind: str, amount: Decimal, at: datetime) -> None:
        self._state.ledger.append(
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


def _position(entry: tuple[int, int, Payment]) -> int:
    return entry[0]


def _place(entry: tuple[int, int, Payment]) -> tuple[int, int]:
    return entry[:2]
