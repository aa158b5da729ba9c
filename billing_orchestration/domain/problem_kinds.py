"""The kinds of quarantine entries and their resolutions: what each means for the money."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Kind:
    """`attach` is empty where there is nothing to attach."""

    means: str
    accept: str
    attach: str
    ignore: str


_ATTACH = "it pays one period of that subscription's plan"
_NOTHING = "nothing is granted, now or later: refund it at the provider"
_STAYS = "the row stays as it is"
_AGAIN = "settles it if the obstacle is gone, else says what still blocks it"

# What a problem is opened as; settling decides for most of them (`settlement.Quarantine`).
ProblemKind = Literal[
    "amount_differs",
    "test_payment",
    "canceled_here",
    "status_unknown",
    "metadata",
    "foreign_metadata",
    "no_end",
    "period",
    "unknown_attempt",
    "subscription_gone",
    "unclear_grant",
    "second_success",
    "two_active",
    "unwanted_renewal",
    "spent_period",
    "not_paid_there",
    "refunded_there",
    "refunded_here",
    "doubled_here",
    "unreadable",
    "not_writable",
    "rejected",
    "gap",
    "no_contact",
    "receipt",
    "method_unusable",
]
NOT_WRITABLE: ProblemKind = "not_writable"
UNKNOWN_ATTEMPT: ProblemKind = "unknown_attempt"
TWO_ACTIVE: ProblemKind = "two_active"
# Of a subscription, not of a payment: gone by the next success for that subscription.
REJECTED: ProblemKind = "rejected"
UNREADABLE: ProblemKind = "unreadable"
# A payment of a period that another attempt has, paid or still possible.
SECOND_SUCCESS: ProblemKind = "second_success"
# Opened for a renewal that is paid or may be, perhaps one whose attempt we do not have: its subscription is neither
# charged nor ended meanwhile.
HOLDING: tuple[ProblemKind, ...] = (UNKNOWN_ATTEMPT, NOT_WRITABLE, UNREADABLE, SECOND_SUCCESS)
NO_CONTACT: ProblemKind = "no_contact"
RECEIPT: ProblemKind = "receipt"
METHOD_UNUSABLE: ProblemKind = "method_unusable"
# Opened for a payment that is granted: no resolution grants it once more.
GRANTED_ALREADY: tuple[ProblemKind, ...] = ("unwanted_renewal", "spent_period", "receipt")
# Opened by reconciliation alone: the books differ, and the row may take the provider's truth. Nothing is granted by it.
OF_THE_BOOKS: tuple[ProblemKind, ...] = ("not_paid_there", "refunded_there", "refunded_here", "doubled_here")
# The others are proved to be gone by a later, successful settling of the payment.
FOR_A_PERSON: tuple[ProblemKind, ...] = (
    *GRANTED_ALREADY,
    *OF_THE_BOOKS,
    TWO_ACTIVE,
    REJECTED,
    "gap",
    "no_contact",
    "method_unusable",
)

# What a person makes of a problem. After MENDED it may open a new entry; the others are the last word.
ACCEPTED, ATTACHED, IGNORED, MENDED = "accepted", "attached", "ignored", "mended"
LAST_WORDS = (ACCEPTED, ATTACHED, IGNORED)

KINDS: Mapping[ProblemKind, Kind] = {
    "amount_differs": Kind(
        "paid, but in another amount or currency than asked, or than its paid row says",
        "grants the period, if that is still to be done, and books the provider's amount",
        _ATTACH,
        f"{_NOTHING}. Of a paid row: it stays as it is",
    ),
    "test_payment": Kind(
        "a test payment in a live shop: no real money", "grants it anyway", _ATTACH, "nothing is granted"
    ),
    "canceled_here": Kind(
        "paid at the provider, CANCELED in our books", "the row becomes SUCCEEDED and is granted", _ATTACH, _NOTHING
    ),
    "status_unknown": Kind(
        "paid, and its row has an unknown status",
        "the row becomes SUCCEEDED and is granted",
        _ATTACH,
        _NOTHING,
    ),
    "metadata": Kind("paid, and its metadata lacks a usable user, plan or payment provider", _AGAIN, _ATTACH, _NOTHING),
    "foreign_metadata": Kind("paid, and metadata and row name different users", _AGAIN, _ATTACH, _NOTHING),
    "no_end": Kind("paid, and the customer's active subscription has no end to extend", _AGAIN, _ATTACH, _NOTHING),
    "period": Kind("paid, and the plan has no usable period", _AGAIN, _ATTACH, _NOTHING),
    "unknown_attempt": Kind(
        "paid, and it names a renewal attempt that this database does not have: another installation's charge, or a"
        " database restored from before it",
        _AGAIN,
        _ATTACH,
        "nothing is granted: it belongs to the other installation, or was refunded",
    ),
    "subscription_gone": Kind(
        "a renewal was paid, and its subscription is gone or has no end", _AGAIN, _ATTACH, _NOTHING
    ),
    "unclear_grant": Kind(
        "paid, and the service wrote its row as SUCCEEDED, but it is unknown whether it granted it: another payment was"
        " granted to the subscription meanwhile, its end moved by something else than a period, or the row is linked to"
        " no subscription and one was changed since. Or a renewal was paid, and the end was moved back meanwhile",
        "the service had not granted it: one more period is granted now",
        _ATTACH,
        "the service had granted it: nothing more is granted",
    ),
    "second_success": Kind(
        "a period may be paid twice: refund one payment only if both are paid. While the other's outcome is open, the"
        " subscription is neither charged nor ended; if it turns out unpaid, this one is settled by itself",
        "the customer keeps it as one more period, granted now",
        _ATTACH,
        "it was refunded by hand at the provider; nothing is granted",
    ),
    "two_active": Kind(
        "a user has several ACTIVE subscriptions on one plan: only the one that ends last is renewed, this one is not",
        "it was fixed in the service; alerts again if not",
        "",
        "it never alerts again; this subscription is still not renewed beside the other",
    ),
    "unwanted_renewal": Kind(
        "renewed and granted, but the customer had canceled or paused",
        "the grant stands; nothing is changed",
        "",
        "it was refunded by hand; the grant stands, change the subscription in the service if it should not",
    ),
    "spent_period": Kind(
        "a customer paid for a subscription that had ended long ago: by the rule it was extended from its old end, to a"
        " day already past when they paid",
        "the grant stands; nothing is changed",
        "",
        "the grant stands; its end was moved in the service, or the payment was refunded by hand",
    ),
    "not_paid_there": Kind(
        "paid by our books, and the provider took no money for it: granted unpaid",
        "the row becomes CANCELED, EXPIRED or PENDING, as the provider says; end the grant in the service",
        "",
        _STAYS,
    ),
    "refunded_there": Kind(
        "the provider gave the money back, in full or in part, and our books say paid",
        "given back in full: the row becomes REFUNDED. In part: it stays, and that is known. The grant stands",
        "",
        _STAYS,
    ),
    "refunded_here": Kind(
        "REFUNDED in our books, and the provider gave back nothing or only a part: the customer may wait for it",
        "the row takes the provider's status; nothing is granted",
        "",
        "the row stays as it is: it is being refunded, or was by other means",
    ),
    "doubled_here": Kind(
        "one payment stands in several paid rows: it may be granted twice",
        "one row keeps it, the others become EXPIRED; end the second grant in the service",
        "",
        _STAYS,
    ),
    "unreadable": Kind(
        "a provider record that this version cannot read; it may be money",
        _AGAIN,
        _ATTACH,
        "it is left for ever, even if it becomes readable",
    ),
    "not_writable": Kind(
        "the database refuses to write it, and would again: a constraint or trigger of the service's, or a bad value",
        "of a payment: tries again now. Of a row: it was fixed; alerts again if not",
        "of a payment: " + _ATTACH,
        "of a payment: nothing is granted. Of a row: it never alerts again",
    ),
    "rejected": Kind(
        "the provider refuses this charge as it is (no money moved): the saved method or the shop's rights",
        "it was fixed; alerts again if not",
        "",
        "it never alerts again; the customer is not renewed",
    ),
    "gap": Kind(
        "hours that no matching run covered: payments in them may be paid and not granted",
        "the hours were backfilled",
        "",
        "they are left as they are",
    ),
    "no_contact": Kind(
        "a renewal is due and its receipt would reach nobody: not charged, and held back from expiry until this is"
        " resolved. It closes by itself when a run finds a contact",
        "it was fixed; alerts again if not",
        "",
        "it never alerts again; the subscription expires like any other that is not paid",
    ),
    "receipt": Kind(
        "a renewal was paid and granted, and its fiscal receipt was not registered",
        "the receipt was made at the provider or in the register; the grant stands",
        "",
        "it is left without a receipt; the grant stands",
    ),
    "method_unusable": Kind(
        "a renewal is due and its payment method was never saved, or is not active at the provider: not charged. It"
        " closes by itself when a run charges another method, or when the subscription ends",
        "the customer was asked for another method; alerts again if it is still the same",
        "",
        "it never alerts again; the subscription expires like any other that is not paid",
    ),
}


def kind_of(name: str) -> Kind:
    """The kind by its name. Older versions wrote detail after its first word ("gap from 2026-03-01")."""
    word = name.split(" ", 1)[0]
    return next((kind for known, kind in KINDS.items() if known == word), None) or Kind(
        "not described", "closes it", "", "closes it"
    )
