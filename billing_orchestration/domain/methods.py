"""Before a payment method is charged for the first time: what the provider is asked about it, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass

from billing_orchestration.domain.decisions import Code
from billing_orchestration.domain.provider_payment import ProviderPayment

# What a question is about: the payment that the method is guessed from, or a method that the service's view names.
PAYMENT, METHOD = "payment", "method"

# The answers. SILENT and INACTIVE may be others tomorrow, so they are not remembered.
SAVED = "saved"
NOT_SAVED = "not_saved"
REFUNDED = "refunded"
# The provider has no payment with that id: the service may have kept a method's id there. It is charged, and the
# provider refuses what is no method.
NOT_KNOWN = "not_known"
INACTIVE = "inactive"
SILENT = "silent"
REMEMBERED = (SAVED, NOT_SAVED, REFUNDED, NOT_KNOWN)


@dataclass(frozen=True, slots=True)
class Question:
    """Asked once. `name`: the provider's id of a payment or of a method, as `about` says."""

    about: str
    name: str
    provider_id: int


@dataclass(frozen=True, slots=True)
class OlderMethod:
    """A method that counts if a newer payment saved none. `question`: not asked yet. `is_kept`: our records hold it."""

    id: str
    question: Question | None
    word: str | None
    is_kept: bool = False


@dataclass(frozen=True, slots=True)
class MethodAnswer:
    """What the provider said. `method_id`: what is charged, where it was saved."""

    question: Question
    word: str
    method_id: str | None = None
    detail: str = ""


def answer_of(question: Question, payment: ProviderPayment) -> MethodAnswer:
    """What a payment says about its method.

    Source: YOOKASSA.md, "Saved methods": only a method with `saved` may be charged again, by its own id.
    """
    if payment.refunded_in_full:
        return MethodAnswer(question, REFUNDED)
    if payment.method_saved and payment.method_id:
        return MethodAnswer(question, SAVED, payment.method_id)
    return MethodAnswer(question, NOT_SAVED)


def why_not_charged(word: str | None, detail: str) -> tuple[str, str] | None:
    """The code and the reason why a method with this answer is not charged; None where it may be."""
    if word == NOT_SAVED:
        return Code.METHOD_NOT_SAVED, "its payment did not save the payment method, so it may not be charged again"
    if word == REFUNDED:
        return Code.METHOD_NOT_SAVED, "the payment that saved its payment method was refunded in full"
    if word == INACTIVE:
        return Code.METHOD_INACTIVE, f"its payment method is {detail or INACTIVE} at the provider"
    if word == SILENT:
        return Code.METHOD_UNKNOWN, f"it is not known whether its payment method was saved: {detail}"
    return None
