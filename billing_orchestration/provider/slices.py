"""A slice of the provider's payments: every item of every page, once."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from billing_orchestration.domain.provider_payment import ProviderPayment, UnusablePayment
from billing_orchestration.provider.records import evidence, parse_payment, raw_status


@dataclass(frozen=True, slots=True)
class Slice:
    """A whole slice, never a part of one. `pages` counts the pages, `requests` also the repeated reads of them."""

    payments: tuple[ProviderPayment, ...]
    unusable: tuple[UnusablePayment, ...]
    pages: int
    requests: int


class Collector:
    """Gathers items into a slice. With `status`, items in another documented status are dropped."""

    def __init__(self, status: str | None = None) -> None:
        self._status = status
        self._payments: dict[str, ProviderPayment] = {}
        self._unusable: dict[str, UnusablePayment] = {}
        self.pages = 0
        self.requests = 0
        # Whether a list was left before its end, to be read in parts instead.
        self.is_cut = False

    def add_page(self, items: Iterable[Any]) -> None:
        """Take a page's items, one by one."""
        self.pages += 1
        wanted = self._status
        for item in items:
            record = parse_payment(item)
            if isinstance(record, ProviderPayment):
                if wanted is None or record.status == wanted:
                    self._add(record)
            elif wanted is None or raw_status(item) in (None, wanted):
                self._set_aside(record)

    def merge(self, other: Collector) -> None:
        """Take what another collector gathered, with its counts."""
        self.pages += other.pages
        self.requests += other.requests
        for payment in other._payments.values():
            self._add(payment)
        for unusable in other._unusable.values():
            self._set_aside(unusable)

    def whole(self) -> Slice:
        """The slice, once every page is in."""
        payments = tuple(payment for key, payment in self._payments.items() if key not in self._unusable)
        return Slice(payments, tuple(self._unusable.values()), self.pages, self.requests)

    def _add(self, payment: ProviderPayment) -> None:
        known = self._payments.setdefault(payment.id, payment)
        if known is payment or known == payment:
            return
        if _identity(known) != _identity(payment):
            # A payment's identity never changes at the provider. Two versions of one id: a person decides.
            versions = [repr(_identity(known)), repr(_identity(payment))]
            reason = "the provider lists it twice in one slice, with a different amount, test mark or metadata"
            self._set_aside(UnusablePayment(payment.id, reason, evidence(versions)))
        elif _progress(payment) > _progress(known):
            self._payments[payment.id] = payment

    def _set_aside(self, unusable: UnusablePayment) -> None:
        # By id, or by content where there is none: both lists of a slice may hold the same item.
        key = unusable.payment_id or "\n" + json.dumps(unusable.evidence, sort_keys=True)
        self._unusable.setdefault(key, unusable)


def _identity(payment: ProviderPayment) -> tuple[object, ...]:
    return payment.money, payment.is_test, dict(payment.metadata)


def _progress(payment: ProviderPayment) -> tuple[object, ...]:
    # Captures and refunds only ever grow, so the larger version is the later one. Refunds first: granting what was
    # refunded in full is the one mistake that nothing would show again.
    return payment.refunded_amount, payment.captured_at is not None, payment.method_saved
