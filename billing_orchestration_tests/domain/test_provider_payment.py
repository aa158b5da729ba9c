"""What a payment's metadata claims: read once, with what is malformed told apart from what is missing."""

from __future__ import annotations

import dataclasses
import uuid
from typing import Any

import pytest
from yookassa.domain.common.payment_method_type import PaymentMethodType

from billing_orchestration.domain.provider_payment import ATTEMPT_KEY, METHOD_LABELS, METHODS_WITHOUT_LABEL, Claims
from billing_orchestration.sandbox.provider.methods import METHOD_TYPES
from billing_orchestration_tests.domain.given import a_payment, an_attempt, the_payment_of

MALFORMED: dict[str, list[Any]] = {
    "user_id": ["", "  ", 42, ["ada"], {"id": "ada"}, True, "a\ufffdda"],
    "plan_id": ["", "three", "0", "-3", "3.0", " 3", "٣", "9" * 20, "9223372036854775808", 0, True, 3.0, [3]],
    "payment_provider_id": ["", "one", "0", "9223372036854775808", False],
    ATTEMPT_KEY: ["", "not-a-uuid", 5, ["x"], True],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in MALFORMED.items() for value in values])
def test_a_malformed_value_is_no_claim_and_is_told_apart_from_a_missing_one(key: str, value: Any) -> None:
    claims = a_payment(metadata={key: value}).claims
    assert claims == Claims(malformed=frozenset({key}))
    assert claims.describe_gaps(key) == [f"{key} (malformed)"]
    for nothing in ({}, {key: None}):
        assert Claims.of(nothing).describe_gaps(key) == [f"{key} (missing)"]


def test_ids_may_be_texts_or_numbers() -> None:
    assert Claims.of({"plan_id": "2147483647", "payment_provider_id": 1}) == Claims(
        plan_id=2_147_483_647, payment_provider_id=1
    )


def test_an_attempt_is_named_by_its_id() -> None:
    attempt = an_attempt()
    assert the_payment_of(attempt).claims.renewal_attempt_id == attempt.id
    assert isinstance(attempt.id, uuid.UUID)


def test_a_payment_with_other_metadata_claims_what_that_says() -> None:
    healed = dataclasses.replace(a_payment(metadata={}), metadata={"user_id": "ada"})
    assert (healed.claims.user_id, healed.lock_name) == ("ada", "ada")
    assert a_payment(id="pay-9", metadata={"user_id": " "}).lock_name == "payment pay-9"


def test_every_method_type_of_the_sdk_and_of_the_specification_is_known() -> None:
    sdk = {value for name, value in vars(PaymentMethodType).items() if name.isupper()} - {PaymentMethodType.UNKNOWN}
    assert "alfa_pay" in sdk
    assert sdk | METHOD_TYPES == {*METHOD_LABELS, *METHODS_WITHOUT_LABEL}


def test_only_a_type_outside_the_list_is_new() -> None:
    assert not any(a_payment(method_type=known).method_is_new for known in (None, *METHOD_LABELS, "alfa_pay", "cash"))
    assert a_payment(method_type="telepathy").method_is_new
