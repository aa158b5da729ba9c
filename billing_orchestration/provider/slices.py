"""A slice of the provider's payments or refunds: every item of every page, once."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from billing_orchestration.domain.provider_payment import (
    PENDING,
    ProviderPayment,
    ProviderRefund,
    UnusablePayment,
)
from billing_orchestration.provider.records import evidence, parse_payment, parse_refund, raw_status


@dataclass(frozen=True, slots=True)
class Slice:
    """A whole slice, never a part of one. `pages` counts the pages, `requests` also the repeated reads of them."""

    payments: tuple[ProviderPayment, ...]
    unusable: tuple[UnusablePayment, ...]
    pages: int
    requests: int


@dataclass(frozen=True, slots=True)
class RefundSlice:
    """The same of refunds."""

    refunds: tuple[ProviderRefund, ...]
    unusable: tuple[UnusablePayment, ...]
    pages: int
    requests: int


class Pages:
    """What every list is read into: its pages, counted, and the items that cannot be used."""

    def __init__(self) -> None:
        self._unusable: dict[str, UnusablePayment] = {}
        self.pages = 0
        self.requests = 0
        # Whether a list was left before its end, to be read in parts instead.
        self.is_cut = False

    def add_page(self, items: Iterable[Any]) -> None:
        """Take a page's items, one by one."""
        self.pages += 1
        for item in items:
            self._take(item)

    def _take(self, item: Any) -> None:
        raise NotImplementedError

    def _set_aside(self, unusable: UnusablePayment) -> None:
        # By id, or by content where there is none: both lists of a slice may hold the same item.
        key = unusable.payment_id or "\n" + json.dumps(unusable.evidence, sort_keys=True)
        self._unusable.setdefault(key, unusable)


class Collector(Pages):
    """Gathers payments into a slice. With `status`, items in another documented status are dropped."""

    def __init__(self, status: str | None = None) -> None:
        super().__init__()
        self._status = status
        self._payments: dict[str, ProviderPayment] = {}

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

    def _take(self, item: Any) -> None:
        record = parse_payment(item)
        if isinstance(record, ProviderPayment):
            if self._status is None or record.status == self._status:
                self._add(record)
        elif self._status is None or raw_status(item) in (None, self._status):
            self._set_aside(record)

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


class Names(Pages):
    """Gathers the ids of payments in one status, and of no others."""

    def __init__(self, status: str) -> None:
        super().__init__()
        self._status = status
        self._shown: set[str] = set()
        self._otherwise: set[str | None] = set()

    @property
    def ids(self) -> set[str]:
        """What was shown in the status, and not otherwise as well: a page may show what has changed since another."""
        return self._shown - self._otherwise

    def _take(self, item: Any) -> None:
        record = parse_payment(item)
        if isinstance(record, UnusablePayment):
            self._otherwise.add(record.payment_id)
        else:
            (self._shown if record.status == self._status else self._otherwise).add(record.id)


class RefundCollector(Pages):
    """Gathers refunds into a slice."""

    def __init__(self) -> None:
        super().__init__()
        self._refunds: dict[str, ProviderRefund] = {}

    def whole(self) -> RefundSlice:
        """The slice, once every page is in."""
        return RefundSlice(tuple(self._refunds.values()), tuple(self._unusable.values()), self.pages, self.requests)

    def _take(self, item: Any) -> None:
        record = parse_refund(item)
        if isinstance(record, UnusablePayment):
            # By content: several of one payment are several refunds.
            self._unusable.setdefault(json.dumps(record.evidence, sort_keys=True), record)
        # Pages shift while they are read, and may show one twice. Only a pending one can have changed meanwhile.
        elif record.id not in self._refunds or record.status != PENDING:
            self._refunds[record.id] = record


def _identity(payment: ProviderPayment) -> tuple[object, ...]:
    return payment.money, payment.is_test, dict(payment.metadata)


def _progress(payment: ProviderPayment) -> tuple[object, ...]:
    # Captures and refunds only ever grow, so the larger version is the later one. Refunds first: granting what was
    # refunded in full is the one mistake that nothing would show again.
    return payment.refunded_amount, payment.captured_at is not None, payment.method_saved
