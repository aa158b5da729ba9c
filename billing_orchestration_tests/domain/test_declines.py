"""What a decline means for the next try, reason by reason."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing_orchestration.domain import declines
from billing_orchestration.domain.declines import ACT, FEW, HARD, OURS, SOFT, STOPPING, classify

STOP_USING_THE_METHOD = (
    "permission_revoked", "card_expired", "payment_method_restricted", "invalid_card_number", "country_forbidden",
    "fraud_suspected", "identification_required", "unsupported_mobile_operator",
)  # fmt: skip
RETRY_ON_A_LATER_DAY = (
    "insufficient_funds", "issuer_unavailable", "payment_method_limit_exceeded", "internal_timeout",
    "rejected_by_timeout",
)  # fmt: skip
FEW_RETRIES = ("general_decline", "call_issuer")
THE_USER_MUST_ACT = (
    "3d_secure_failed", "invalid_csc", "expired_on_confirmation", "loan_declined", "loan_declined_by_payer",
    "loan_application_expired",
)  # fmt: skip
OUR_SIDE = ("canceled_by_merchant", "expired_on_capture", "deal_expired")
BY_CLASS = {
    HARD: STOP_USING_THE_METHOD,
    SOFT: RETRY_ON_A_LATER_DAY,
    FEW: FEW_RETRIES,
    ACT: THE_USER_MUST_ACT,
    OURS: OUR_SIDE,
}


@pytest.mark.parametrize(("reason", "expected"), [(word, name) for name, words in BY_CLASS.items() for word in words])
def test_every_documented_reason_has_its_class(reason: str, expected: str) -> None:
    assert classify(reason) == expected


def test_no_reason_has_a_class_that_is_not_documented() -> None:
    assert set(declines.CLASSES) == {word for words in BY_CLASS.values() for word in words}


@settings(max_examples=50, deadline=None)
@given(st.none() | st.text(max_size=30).filter(lambda text: text not in declines.CLASSES))
def test_a_reason_nobody_knows_is_retried_a_few_times_and_never_taken_for_hard(reason: str | None) -> None:
    assert classify(reason) == FEW


def test_only_soft_and_unclear_declines_are_tried_again() -> None:
    assert set(BY_CLASS) - STOPPING == {SOFT, FEW}
