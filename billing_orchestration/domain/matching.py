"""Matching: which succeeded provider payments the service's books lack, as a diff of two slices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from billing_orchestration.domain.decisions import Action, Code, Decision
from billing_orchestration.domain.provider_payment import ProviderPayment
from billing_orchestration.domain.settlement import choose_row, holder_of
from billing_orchestration.domain.settlement_decisions import PaymentRow


@dataclass(frozen=True, slots=True)
class MatchingDiff:
    """What differs. `to_settle` goes through settling, oldest success first; `reported` is left as it is, with reasons.

    `left`: what is the webhook's for its minute, to be looked at again. `agreed`: how many payments both sides hold
    alike. `foreign`: how many are another seller's, reported one by one.
    """

    to_settle: tuple[ProviderPayment, ...]
    reported: tuple[Decision, ...]
    agreed: int
    foreign: int = 0
    left: tuple[ProviderPayment, ...] = ()


def by_provider_id(rows: Iterable[PaymentRow]) -> dict[str, list[PaymentRow]]:
    """Payment rows by the provider's id they carry; real data has several rows for one id."""
    found: dict[str, list[PaymentRow]] = {}
    for row in rows:
        if row.external_payment_id is not None:
            found.setdefault(row.external_payment_id, []).append(row)
    return found


def diff_pending(
    paid: Sequence[ProviderPayment],
    pending: Mapping[str, Sequence[PaymentRow]],
    nameless: Sequence[PaymentRow] = (),
    *,
    now: datetime,
    webhook_grace: timedelta,
) -> MatchingDiff:
    """PENDING here and succeeded there: every payment of the slice that has a PENDING row, whatever that row's age.

    One that succeeded less than `webhook_grace` ago is left to the service's webhook. `nameless`: PENDING rows without
    a provider id, which nothing can be matched by.
    """
    differing: list[ProviderPayment] = []
    left: list[ProviderPayment] = []
    for payment in paid:
        if payment.id in pending:
            if payment.succeeded_within(webhook_grace, now):
                left.append(payment)
            else:
                differing.append(payment)
    reported = [
        *map(_left, left),
        *(
            Decision(
                Action.LEAVE,
                row.subject,
                "PENDING with no provider id: it cannot be matched",
                row.money,
                Code.NO_PROVIDER_ID,
            )
            for row in nameless
        ),
    ]
    for payment in differing:
        reported += _duplicates(payment, pending[payment.id])
    agreed = len(paid) - len(differing) - len(left)
    return MatchingDiff(_by_success(differing), tuple(reported), agreed, left=tuple(left))


def diff_successful(
    paid: Sequence[ProviderPayment],
    rows: Mapping[str, Sequence[PaymentRow]],
    settled: frozenset[str],
    *,
    now: datetime,
    webhook_grace: timedelta,
    leaves_foreign: bool = True,
) -> MatchingDiff:
    """Succeeded there and not so here. `rows` holds the payment rows of these ids, whatever their status or age.

    A payment that succeeded less than `webhook_grace` ago is left to the service's webhook, with a row or without:
    the webhook may have read that row already, and be about to grant. With `leaves_foreign` a payment without a row
    and without any of our metadata keys is another seller's: it is left alone.
    """
    differing: list[ProviderPayment] = []
    reported: list[Decision] = []
    left: list[ProviderPayment] = []
    agreed = foreign = 0
    for payment in paid:
        found = rows.get(payment.id, ())
        reported += _duplicates(payment, found)
        final = holder_of(found)
        # The service's webhook may have written the row of a renewal of ours: the attempt still has to be closed.
        names_open_attempt = payment.id not in settled and payment.claims.renewal_attempt_id is not None
        if payment.id in settled or (final is not None and not names_open_attempt):
            agreed += 1
        elif leaves_foreign and not found and not payment.is_ours:
            foreign += 1
            reported.append(_foreign(payment))
        elif payment.succeeded_within(webhook_grace, now):
            left.append(payment)
            reported.append(_left(payment))
        else:
            differing.append(payment)
    return MatchingDiff(_by_success(differing), tuple(reported), agreed, foreign, tuple(left))


def _foreign(payment: ProviderPayment) -> Decision:
    reason = "foreign: no row here, and none of the service's metadata. It is left alone (FOREIGN_PAYMENTS)"
    return Decision(Action.LEAVE, f"payment {payment.id}", reason, payment.money, Code.FOREIGN)


def _left(payment: ProviderPayment) -> Decision:
    reason = "just paid: left to the service's webhook, the next tick looks again"
    return Decision(Action.LEAVE, f"payment {payment.id}", reason, payment.money, Code.LEFT_TO_WEBHOOK)


def _duplicates(payment: ProviderPayment, rows: Sequence[PaymentRow]) -> Iterator[Decision]:
    """Rows that carry the provider id of another row: a payment is settled once, into one of them."""
    if len(rows) > 1:
        holder = holder_of(rows) or choose_row(rows, payment.money) or rows[0]
        for row in rows:
            if row is not holder:
                reason = f"a duplicate: {holder.subject} has the same provider id {payment.id}, only one is settled"
                yield Decision(Action.LEAVE, row.subject, reason, row.money, Code.DUPLICATE)


def _by_success(payments: Iterable[ProviderPayment]) -> tuple[ProviderPayment, ...]:
    """In the order in which they succeeded, so that periods follow each other as they were paid."""
    return tuple(sorted(payments, key=lambda payment: (payment.succeeded_at, payment.id)))
