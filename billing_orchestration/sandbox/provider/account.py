"""The payment provider on a laptop: a shop's account there, without HTTP (that is `server`).

It keeps what the real one keeps: payments, refunds, saved payment methods, and for 24 hours the answer to each
idempotence key. It also keeps an append-only ledger of every movement of money, which no client can change. Tests and
the demo ask the ledger who was charged, not the billing database.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from billing_orchestration.sandbox.provider import binding, charging, refunding
from billing_orchestration.sandbox.provider.answers import Answer, Refused, forbidden
from billing_orchestration.sandbox.provider.cabinet import SECRET_KEY, SHOP_ID, Cabinet
from billing_orchestration.sandbox.provider.charge_requests import charge_request
from billing_orchestration.sandbox.provider.clock import from_milliseconds
from billing_orchestration.sandbox.provider.list_requests import PAYMENTS, REFUNDS, list_request
from billing_orchestration.sandbox.provider.methods import SavedMethod
from billing_orchestration.sandbox.provider.pages import page_answer
from billing_orchestration.sandbox.provider.payments import Payment
from billing_orchestration.sandbox.provider.records import LedgerEntry, Outcome, plain_json
from billing_orchestration.sandbox.provider.refunds import Refund, refund_request

__all__ = ["SECRET_KEY", "SHOP_ID", "SandboxProvider"]


class SandboxProvider(Cabinet):
    """A shop's account at the provider: its API, its books, and (as a `Cabinet`) its customers and staff."""

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

            def charged(parsed: Any, key: str) -> Payment:
                request, fields = charge_request(parsed, self.switches), {**self._shop, "idempotence_key": key}
                return charging.charge(self._books, request, now, self.switches, fields)

            return self._books.keys.answer(body, key, now, self.switches, charged, looked_up=looked_up)

    def holds_key(self, key: str) -> bool:
        """Whether a request with this key would get the answer of an earlier one."""
        with self._lock:
            return self._books.keys.record(key, self.clock()) is not None

    def get_payment(self, payment_id: str) -> Answer:
        """GET /payments/{id}."""
        with self._lock:
            self._catch_up()
            payment = self._books.state.payments.get(payment_id)
            return _no_such("payment_id", "Payment") if payment is None else Answer(200, payment.json())

    def list_payments(self, query: Sequence[tuple[str, str]]) -> Answer:
        """GET /payments: one page, by created_at descending, with `next_cursor` unless it is the last."""
        with self._lock:
            now = self._catch_up()
            try:
                request = list_request(query, PAYMENTS, self.switches)
            except Refused as refused:
                return refused.answer()
            page, more = self._books.list.page(request, now, self.switches)
            return page_answer(page, more, request)

    def create_refund(self, body: bytes, key: str | None, *, looked_up: bool = False) -> Answer:
        """POST /refunds. Gives money back (a ledger entry) when the switch `refunds` says `succeeded`.

        A key protects it as it does a charge.
        """
        with self._lock:
            now = self._catch_up()

            def refunded(parsed: Any, key: str) -> Refund:
                return refunding.refund(self._books, refund_request(parsed, self.switches), now, self.switches, key)

            return self._books.keys.answer(body, key, now, self.switches, refunded, looked_up=looked_up)

    def get_refund(self, refund_id: str) -> Answer:
        """GET /refunds/{id}."""
        with self._lock:
            self._catch_up()
            refund = self._books.state.refunds.get(refund_id)
            return _no_such("refund_id", "Refund") if refund is None else Answer(200, refund.json())

    def list_refunds(self, query: Sequence[tuple[str, str]]) -> Answer:
        """GET /refunds: one page, by created_at descending, with `next_cursor` unless it is the last."""
        with self._lock:
            now = self._catch_up()
            try:
                request = list_request(query, REFUNDS, self.switches)
            except Refused as refused:
                return refused.answer()
            return page_answer(*self._books.refund_page(request, now), request)

    def create_method(self, body: bytes, key: str | None, *, looked_up: bool = False) -> Answer:
        """POST /payment_methods: a binding without a payment, pending until its owner confirms it."""
        with self._lock:
            now = self._catch_up()

            def bound(parsed: Any, _key: str) -> SavedMethod:
                return binding.bind(self._books, parsed, now, self.shop_id, self.switches)

            return self._books.keys.answer(body, key, now, self.switches, bound, looked_up=looked_up)

    def get_method(self, method_id: str) -> Answer:
        """GET /payment_methods/{id}."""
        with self._lock:
            self._catch_up()
            method = self._books.state.methods.get(method_id)
            return _no_such("payment_method_id", "Payment method") if method is None else Answer(200, method.json())

    def account(self) -> Answer:
        """GET /me: the shop whose credentials these are."""
        if self.switches.me_forbidden:
            return forbidden("You don't have permission to read the store's settings").answer()
        provider, fiscalises = self.switches.fiscalization_provider, self.switches.receipts != "off"
        document = {
            "account_id": self.shop_id,
            "status": "enabled",
            "test": self.is_test_shop,
            "fiscalization_enabled": fiscalises,
            "payment_methods": ["yoo_money", "bank_card"],
        }
        if provider is not None:
            document["fiscalization"] = {"enabled": fiscalises, "provider": provider}
        return Answer(200, plain_json(document))

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

    def refunds(self, payment_id: str | None = None) -> list[Refund]:
        """All refunds, or those of a payment, oldest first."""
        with self._lock:
            self._catch_up()
            return [refund for _, _, refund in self._books.refunds if payment_id in (None, refund.payment_id)]

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
        """What will happen to payments by itself: when, to which one, and its outcome. In no order."""
        with self._lock:
            state = self._books.state
            return [
                (from_milliseconds(due), item_id, event)
                for due, _, item_id, event in state.agenda
                if item_id in state.payments and isinstance(event, Outcome)
            ]


def _no_such(parameter: str, what: str) -> Answer:
    return Refused(
        404, "not_found", f"Incorrect {parameter}. {what} doesn't exist or access denied", parameter
    ).answer()
