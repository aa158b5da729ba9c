"""What a decline means for the next try. The reasons are the provider's words, the classes are ours."""

from __future__ import annotations

from collections.abc import Mapping

HARD = "hard"  # this method will not work again: stop charging it for the period
ACT = "user must act"  # no unattended retry can succeed: stop for the period
OURS = "our side"  # somebody on our side ended it: stop, a person decides
SOFT = "soft"  # another day may do: tried again within the grace
FEW = "few retries"  # nobody knows why: tried again, but not often

CLASSES: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "permission_revoked",
            "card_expired",
            "payment_method_restricted",
            "invalid_card_number",
            "country_forbidden",
            "fraud_suspected",
            "identification_required",
            "unsupported_mobile_operator",
        ),
        HARD,
    ),
    **dict.fromkeys(
        (
            "insufficient_funds",
            "issuer_unavailable",
            "payment_method_limit_exceeded",
            "internal_timeout",
            "rejected_by_timeout",
        ),
        SOFT,
    ),
    **dict.fromkeys(("general_decline", "call_issuer"), FEW),
    **dict.fromkeys(
        (
            "3d_secure_failed",
            "invalid_csc",
            "expired_on_confirmation",
            "loan_declined",
            "loan_declined_by_payer",
            "loan_application_expired",
        ),
        ACT,
    ),
    **dict.fromkeys(("canceled_by_merchant", "expired_on_capture", "deal_expired"), OURS),
}
# Classes after which the period is not charged again.
STOPPING = frozenset({HARD, ACT, OURS})
# "Few": the first try and two more in one period.
MOST_TRIES_OF_UNCLEAR_DECLINES = 3


def classify(reason: str | None) -> str:
    """The class of a cancellation reason. An unknown reason is retried a few times, never taken for hard."""
    return CLASSES.get(reason or "", FEW)
