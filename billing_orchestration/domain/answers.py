"""What the provider's answer, its refusal, its silence or its list makes of an attempt.

What is not recognised leaves the outcome unknown; it never counts as a failure. A success is only named here: settling
it (amount, currency, refund, test shop) is `settlement`'s work.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from billing_orchestration.domain import declines
from billing_orchestration.domain.attempts import (
    SCAN_MARGIN,
    SCAN_REACH,
    Attempt,
    State,
    is_past_key_lifetime,
    was_sent_by_wrong_clock,
)
from billing_orchestration.domain.provider_payment import (
    CANCELED,
    PENDING,
    SUCCEEDED,
    WAITING_FOR_CAPTURE,
    ProviderPayment,
    UnusablePayment,
)

# `decline_class` of an attempt that was refused because of the shop: its key, its rights, or charges as it makes them.
# Somebody fixes that and the charge is tried again the same day. A refusal of the charge itself (400) is for a person.
SHOP = "shop"
SHOP_REFUSALS = ("401", "403", SHOP)
# The fields of a receipt that are the same in every charge.
_OF_SETTINGS = ("vat_code", "payment_mode", "payment_subject", "measure", "tax_system_code")


@dataclass(frozen=True, slots=True)
class Closing:
    """What became of an attempt: its next state and why. Successes are settled instead.

    `never_sent` withdraws the claim of a first send that certainly did not leave this machine. `as_read`: apply it only
    while the attempt is still as it was read; for whoever decides without holding the attempt's lock. `resend`: this
    run may send the same key and body again. `unanswered`: the provider may still be at work on the last send (None:
    as before).
    """

    attempt: Attempt
    state: str
    reason: str
    external_payment_id: str | None = None
    decline_party: str | None = None
    decline_reason: str | None = None
    decline_class: str | None = None
    never_sent: bool = False
    as_read: bool = False
    absent_since: datetime | None = None
    resend: bool = False
    unanswered: bool | None = None

    def given_up(self) -> Closing:
        """The same when this run will not send it again: the claim of a send that certainly never left is withdrawn."""
        return replace(self, never_sent=self.state == State.PLANNED, resend=False)

    @property
    def word(self) -> str:
        """The state in a report's word."""
        return "never sent" if self.state == State.PLANNED else self.state.lower()

    @property
    def needs_retry(self) -> bool:
        """Whether another run has to try again, so that this one ends red."""
        return self.state in (State.PLANNED, State.UNKNOWN) or self.decline_class in SHOP_REFUSALS


# --- answers to a request of the attempt's own


def judge_payment(attempt: Attempt, payment: ProviderPayment) -> Closing:
    """What the provider's payment makes of its attempt, by the payment's status. SUCCEEDED still has to be settled."""
    state, reason, decline_class = _state_of(payment)
    return Closing(
        attempt,
        state,
        reason,
        external_payment_id=payment.id,
        decline_party=payment.cancellation_party,
        decline_reason=payment.cancellation_reason,
        decline_class=decline_class,
        unanswered=False,
    )


def _state_of(payment: ProviderPayment) -> tuple[str, str, str | None]:
    if payment.status == SUCCEEDED:
        return State.SUCCEEDED, "succeeded", None
    if payment.status == PENDING:
        return State.PENDING, "pending at the provider: asked about from now on, never sent again", None
    if payment.status == WAITING_FOR_CAPTURE:
        reason = "the provider holds the money uncaptured: asked about from now on, never sent again"
        return State.PENDING, reason, None
    if payment.status == CANCELED:
        decline_class = declines.classify(payment.cancellation_reason)
        by, word = payment.cancellation_party or "nobody named", payment.cancellation_reason or "no reason given"
        state = State.STOPPED if decline_class in declines.STOPPING else State.DECLINED
        return state, f"declined by {by}: {word} ({decline_class})", decline_class
    raise ValueError(f"unknown status {payment.status!r}")


def is_about_the_shop(attempt: Attempt, status_code: int, parameter: str) -> bool:
    """Whether one refusal tells that the shop is refused: its key is wrong, no charge is taken without a receipt, or
    what the settings put into every receipt is wrong. A contact, a name or an amount is one customer's or plan's.
    """
    is_about_receipt = re.match(r"receipt\b", parameter) is not None
    is_missing = is_about_receipt and "receipt" not in json.loads(attempt.body)
    is_of_settings = is_about_receipt and parameter.endswith(_OF_SETTINGS)
    return status_code == 401 or (status_code == 400 and (is_missing or is_of_settings))


def judge_refusal(
    attempt: Attempt, reason: str, *, status_code: int, code: str, sent_before: bool, parameter: str = ""
) -> Closing:
    """The provider refused this request (400, 401, 403): no money moved by it. It is not sent again in this run.

    `sent_before`: an earlier request with this key may have been executed. The refusal says nothing about that one.
    """
    if sent_before:
        reason = f"an earlier send may have been executed, and this one was refused: {reason}"
        return Closing(attempt, State.UNKNOWN, reason, unanswered=False)
    return Closing(
        attempt,
        State.REJECTED,
        reason,
        decline_reason=code or None,
        decline_class=SHOP if status_code == 400 and is_about_the_shop(attempt, 400, parameter) else str(status_code),
        unanswered=False,
    )


def judge_unsent(attempt: Attempt, reason: str, *, sent_before: bool) -> Closing:
    """This request certainly did not leave. It may be sent again: nothing can come of the same key but one charge."""
    return Closing(attempt, State.UNKNOWN if sent_before else State.PLANNED, reason, resend=True, unanswered=False)


def judge_silence(attempt: Attempt, reason: str, *, is_recognised: bool, answered: bool = False) -> Closing:
    """No usable answer: the request may have been executed.

    The same key asks for the same charge, so it may be sent again; not after an error that nobody knows. `answered`: by
    the provider itself, so that nothing of this send is under way any more.
    """
    return Closing(attempt, State.UNKNOWN, reason, resend=is_recognised, unanswered=not answered)


def names_another_attempt(attempt: Attempt, payment: ProviderPayment) -> bool:
    """Whether an answer to this attempt's request is about something else. Then the outcome is not known."""
    return payment.claims.names_an_attempt and payment.claims.renewal_attempt_id != attempt.id


def as_answer_to(attempt: Attempt, payment: ProviderPayment) -> ProviderPayment:
    """The payment that answered a request of the attempt's own (by its key or its payment id), named as that attempt's.

    A provider that leaves the metadata out of an answer must not make a paid renewal look like a stranger's purchase.
    """
    if payment.claims.names_an_attempt:
        return payment
    own: dict[str, str] = json.loads(attempt.body)["metadata"]
    return replace(payment, metadata={**payment.metadata, **own})


# --- the search for an attempt whose key is too old


@dataclass(frozen=True, slots=True)
class ProviderView:
    """What the provider said about the open attempts, as far as it was asked.

    `answers`: attempt id -> its payment, for attempts asked about by payment id or found by a scan.
    `scanned`: attempts whose surroundings were scanned completely. `silent`: attempt id -> why it is not known.
    `extra`: further successes that name an attempt which has its answer; settling puts them into quarantine.
    """

    answers: Mapping[uuid.UUID, ProviderPayment] = field(default_factory=dict)
    scanned: frozenset[uuid.UUID] = frozenset()
    silent: Mapping[uuid.UUID, str] = field(default_factory=dict)
    extra: tuple[ProviderPayment, ...] = ()


def attempts_to_search(open_attempts: Iterable[Attempt], now: datetime) -> list[Attempt]:
    """Attempts that may have been sent and whose key is too old to be sent again: only a scan can tell."""
    return [
        attempt
        for attempt in open_attempts
        if attempt.state in (State.PLANNED, State.UNKNOWN) and is_past_key_lifetime(attempt, now)
    ]


def scan_windows(attempts: Iterable[Attempt], now: datetime) -> list[tuple[datetime, datetime, tuple[Attempt, ...]]]:
    """The windows to scan for lost attempts, each with the attempts it covers. Overlapping windows are merged.

    Whichever send arrived first created the payment, so a window reaches from the first send to the last. Where a wrong
    clock has written these, it reaches back a week.
    """
    spans = sorted(
        (
            (now - SCAN_REACH, now + SCAN_MARGIN, a)
            if was_sent_by_wrong_clock(a, now)
            else (a.first_sent_at - SCAN_MARGIN, (a.last_sent_at or a.first_sent_at) + SCAN_MARGIN, a)
            for a in attempts
            if a.first_sent_at
        ),
        key=lambda span: (span[0], span[1], span[2].id),
    )
    windows: list[tuple[datetime, datetime, tuple[Attempt, ...]]] = []
    for start, end, attempt in spans:
        if windows and start <= windows[-1][1]:
            first, last, covered = windows[-1]
            windows[-1] = (first, max(last, end), (*covered, attempt))
        else:
            windows.append((start, end, (attempt,)))
    return windows


def read_scan(
    attempts: Sequence[Attempt], payments: Sequence[ProviderPayment], unusable: Sequence[UnusablePayment]
) -> ProviderView:
    """What a complete scan says about the attempts it was made for.

    A payment is found by the attempt's id in its metadata. A payment that might be the attempt's proves nothing absent:
    one that cannot be read and names the attempt somewhere, one whose metadata cannot be read either, or one that moved
    money by the same saved method and names no attempt, or not readably.
    """
    by_attempt: dict[uuid.UUID, list[ProviderPayment]] = {}
    for payment in payments:
        if (named := payment.claims.renewal_attempt_id) is not None:
            by_attempt.setdefault(named, []).append(payment)
    unreadable = [repr(item.evidence) for item in unusable if not _metadata_is_readable(item.evidence)]
    odd = [repr(item.evidence) for item in unusable]
    answers: dict[uuid.UUID, ProviderPayment] = {}
    silent: dict[uuid.UUID, str] = {}
    extra: list[ProviderPayment] = []
    for attempt in attempts:
        # Whichever may have the money comes first. Several payments of one key would be the provider's own fault.
        found = sorted(
            by_attempt.get(attempt.id, ()),
            key=lambda p: (p.status != SUCCEEDED, p.status == CANCELED, p.created_at, p.id),
        )
        if found:
            answers[attempt.id] = found[0]
            extra.extend(payment for payment in found[1:] if payment.status == SUCCEEDED)
        elif unreadable or any(str(attempt.id) in text for text in odd):
            silent[attempt.id] = "the provider's list holds a record that cannot be read and may be this charge"
        elif stranger := next((payment for payment in payments if _may_be_nameless(attempt, payment)), None):
            silent[attempt.id] = (
                f"payment {stranger.id} at the provider is of the same payment method and names no attempt: it may be"
                " this charge, a person has to look"
            )
    scanned = frozenset(attempt.id for attempt in attempts if attempt.id not in silent)
    return ProviderView(answers, scanned, silent, tuple(extra))


def _may_be_nameless(attempt: Attempt, payment: ProviderPayment) -> bool:
    return (
        payment.claims.renewal_attempt_id is None
        and payment.status != CANCELED
        and payment.method_id == attempt.payment_method_id
        and payment.id != attempt.payment_method_id  # the purchase that saved the method
    )


def _metadata_is_readable(evidence: object) -> bool:
    return isinstance(evidence, Mapping) and isinstance(evidence.get("metadata"), Mapping)


def merge_views(views: Iterable[ProviderView]) -> ProviderView:
    """Several partial views as one."""
    answers: dict[uuid.UUID, ProviderPayment] = {}
    silent: dict[uuid.UUID, str] = {}
    scanned: set[uuid.UUID] = set()
    extra: list[ProviderPayment] = []
    for view in views:
        answers.update(view.answers)
        silent.update(view.silent)
        scanned |= view.scanned
        extra.extend(view.extra)
    return ProviderView(answers, frozenset(scanned), silent, tuple(extra))
