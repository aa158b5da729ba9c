"""Matching: which succeeded provider payments the service's books lack, as a diff of two slices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from billing_orchestration.domain.decisions import Action, Code, Decision
from billing_orchestration.domain.provider_payment import ProviderPayment
from billing_orchestration.domain.settlement import choose_row
from billing_orchestration.domain.settlement_decisions import PaymentRow

_FINAL = ("SUCCEEDED", "REFUNDED")


@dataclass(frozen=True, slots=True)
class MatchingDiff:
    """What differs. `to_settle` goes through settling, oldest success first; `reported` is left as it is, with reasons.

    `agreed`: how many payments both sides hold alike.
    """

    to_settle: tuple[ProviderPayment, ...]
    reported: tuple[Decision, ...]
    agreed: int


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
) -> MatchingDiff:
    """PENDING here and succeeded there: every payment of the slice that has a PENDING row, whatever that row's age.

    `nameless`: PENDING rows without a provider id, which nothing can be matched by.
    """
    differing = [payment for payment in paid if payment.id in pending]
    reported = [
        Decision(
            Action.LEAVE,
            row.subject,
            "PENDING with no provider id: it cannot be matched",
            row.money,
            Code.NO_PROVIDER_ID,
        )
        for row in nameless
    ]
    for payment in differing:
        reported += _duplicates(payment, pending[payment.id])
    return MatchingDiff(_by_success(differing), tuple(reported), len(paid) - len(differing))


def diff_successful(
    paid: Sequence[ProviderPayment],
    rows: Mapping[str, Sequence[PaymentRow]],
    settled: frozenset[str],
    *,
    now: datetime,
    webhook_grace: timedelta,
) -> MatchingDiff:
    """Succeeded there and not so here. `rows` holds the payment rows of these ids, whatever their status or age.

    A payment without any row that succeeded less than `webhook_grace` ago is left to the service's webhook.
    """
    differing: list[ProviderPayment] = []
    reported: list[Decision] = []
    agreed = 0
    for payment in paid:
        found = rows.get(payment.id, ())
        reported += _duplicates(payment, found)
        final = next((row for row in found if row.status in _FINAL), None)
        # The service's webhook may have written the row of a renewal of ours: the attempt still has to be closed.
        names_open_attempt = payment.id not in settled and payment.claims.renewal_attempt_id is not None
        if payment.id in settled or (final is not None and not names_open_attempt):
            agreed += 1
            if final is not None and final.status == "SUCCEEDED" and final.subscription_id is None:
                reported.append(
                    Decision(
                        Action.REPORT,
                        final.subject,
                        "SUCCEEDED on both sides, but linked to no subscription",
                        payment.money,
                        Code.NO_SUBSCRIPTION,
                    )
                )
        elif not found and _age(payment, now) < webhook_grace:
            reported.append(
                Decision(
                    Action.LEAVE,
                    f"payment {payment.id}",
                    "just paid, no row yet: left to the service's webhook",
                    payment.money,
                    Code.LEFT_TO_WEBHOOK,
                )
            )
        else:
            differing.append(payment)
    return MatchingDiff(_by_success(differing), tuple(reported), agreed)


def _age(payment: ProviderPayment, now: datetime) -> timedelta:
    """How long ago it succeeded; a provider whose clock is ahead says "now", never "in the future"."""
    return max(now - (payment.captured_at or payment.created_at), timedelta(0))


def _duplicates(payment: ProviderPayment, rows: Sequence[PaymentRow]) -> Iterator[Decision]:
    """Rows that carry the provider id of another row: a payment is settled once, into one of them."""
    if len(rows) > 1:
        final = next((row for row in rows if row.status in _FINAL), None)
        holder = final or choose_row(rows, payment.money) or rows[0]
        for row in rows:
            if row is not holder:
                reason = f"a duplicate: {holder.subject} has the same provider id {payment.id}, only one is settled"
                yield Decision(Action.LEAVE, row.subject, reason, row.money, Code.DUPLICATE)


def _by_success(payments: Iterable[ProviderPayment]) -> tuple[ProviderPayment, ...]:
    """In the order in which they succeeded, so that periods follow each other as they were paid."""
    return tuple(sorted(payments, key=lambda payment: (payment.captured_at or payment.created_at, payment.id)))
