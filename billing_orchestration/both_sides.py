"""Both sides' books of a day, read and compared: for reconciliation_job and for the command. It writes nothing.

The provider comes first and the database after it, so that what a webhook writes in between does not look like a
payment that is missing here. No transaction is open while the provider is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from billing_orchestration.database.matching import fetch_settled
from billing_orchestration.database.reconciliation import fetch_rows_of, fetch_rows_of_day
from billing_orchestration.domain.provider_payment import ProviderPayment, ProviderRefund, UnusablePayment
from billing_orchestration.domain.reconciled import Day
from billing_orchestration.provider.client import PaymentProvider

if TYPE_CHECKING:
    import pandas as pd

# Rows that claim money: if no list of the day holds their payment, it is asked for by its id.
_PAID = ("SUCCEEDED", "REFUNDED")
Read = Callable[[], AbstractContextManager[sa.Connection]]


@dataclass(frozen=True)
class ProviderSide:
    """The provider's books of a day, whole. `payments` also holds older ones that refunds and rows name."""

    payments: dict[str, ProviderPayment]
    refunds: tuple[ProviderRefund, ...]
    unusable: tuple[UnusablePayment, ...]
    pages: int

    @property
    def named(self) -> set[str]:
        """The ids of all payments that these books speak of."""
        odd = {item.payment_id for item in self.unusable if item.payment_id is not None}
        return {*self.payments, *odd, *(refund.payment_id for refund in self.refunds)}


@dataclass(frozen=True)
class BothSides:
    """Both sides of a day. `rows`: of the service's payments, in the order of `domain.reconciliation.HERE`."""

    day: Day
    provider: ProviderSide
    rows: tuple[tuple[Any, ...], ...]
    settled: frozenset[str]
    leaves_foreign: bool = True

    def compare(self) -> pd.DataFrame:
        """The lines of the day, each with its class."""
        from billing_orchestration.domain.reconciliation import here_frame, reconcile, there_frame

        there = self.provider
        frame = there_frame(there.payments.values(), there.refunds, there.unusable, self.day)
        if not self.leaves_foreign:
            frame["ours"] = True
        return reconcile(frame, here_frame(self.rows), self.settled, self.day)

    def unclosed(self, sums: pd.DataFrame) -> list[str]:
        """Where the sums of the lines are not those of the provider's books."""
        from billing_orchestration.domain.reconciliation import provider_totals, unclosed

        return unclosed(sums, provider_totals(self.provider.payments.values(), self.provider.refunds, self.day))

    def again(self, read: Read, lines: pd.DataFrame) -> BothSides:
        """The provider's side of these lines alone, with our side as it is now."""
        ids = {name for name in lines["payment_id"] if not name.startswith("\x00")}
        refunds = set(lines.loc[lines["line"] == "refund", "id"])
        there = replace(
            self.provider,
            payments={id_: self.provider.payments[id_] for id_ in ids if id_ in self.provider.payments},
            refunds=tuple(refund for refund in self.provider.refunds if refund.id in refunds),
        )
        with read() as connection:
            rows = fetch_rows_of(connection, sorted(ids), [int(row) for row in lines["row"] if row])
            settled = frozenset(fetch_settled(connection, sorted(ids)))
            return replace(self, provider=there, rows=tuple(rows), settled=settled)


def read_provider(client: PaymentProvider, day: Day, parallel_windows: int | None = None) -> ProviderSide:
    """The provider's lists of a day. Whole, or IncompleteSlice."""
    payments = client.fetch_day(day.start, day.end, parallel_windows=parallel_windows)
    refunds = client.fetch_refunds(day.start, day.end)
    return ProviderSide(
        {payment.id: payment for payment in payments.payments},
        refunds.refunds,
        (*payments.unusable, *refunds.unusable),
        payments.pages + refunds.pages,
    )


def read_books(
    read: Read,
    client: PaymentProvider,
    day: Day,
    provider: ProviderSide,
    max_concurrency: int,
    *,
    leaves_foreign: bool,
) -> BothSides:
    """Our side of a day; and, asked for one by one, the payments that refunds and paid rows name and no list holds.

    With `leaves_foreign` a payment of another seller of the shop is in a class of its own, else it is like any other.
    """
    with read() as connection:
        rows = {row[0]: row for row in fetch_rows_of_day(connection, day)}
        rows |= {row[0]: row for row in fetch_rows_of(connection, sorted(provider.named))}
    listed = {*provider.payments, *(item.payment_id for item in provider.unusable)}
    asked = {row[1] for row in rows.values() if row[1] is not None and row[2] in _PAID}
    asked |= {refund.payment_id for refund in provider.refunds}
    found = client.look_up(sorted(asked - listed), max_concurrency)
    whole = replace(
        provider,
        payments=provider.payments
        | {id_: payment for id_, payment in found.items() if isinstance(payment, ProviderPayment)},
        unusable=(*provider.unusable, *(item for item in found.values() if isinstance(item, UnusablePayment))),
    )
    ids = sorted({*whole.named, *found})
    with read() as connection:
        rows |= {row[0]: row for row in fetch_rows_of(connection, sorted(found))}
        settled = frozenset(fetch_settled(connection, ids))
        return BothSides(day, whole, tuple(rows.values()), settled, leaves_foreign)
