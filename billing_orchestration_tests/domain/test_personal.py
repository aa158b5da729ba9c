"""What is kept and shown of a customer: contacts by their ends, cards by their last four digits."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from billing_orchestration.domain.attempts import identify
from billing_orchestration.domain.personal import (
    mask_fields,
    mask_personal,
    names_in_body,
    without_identities,
    without_names,
)
from billing_orchestration_tests.domain.given import NOW


def test_a_contact_is_shown_by_its_ends_only() -> None:
    shown = mask_personal('400: "ada.lovelace@example.ru", phone +79001234567 of payment 2d7f1c5a-000f-5000-8000-1b2c')
    assert shown == '400: "a…@e….ru", phone 7…67 of payment 2d7f1c5a-000f-5000-8000-1b2c'


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("4111111111111111", "…1111"),
        ("card 4111 1111 1111 1111, paid", "card …1111, paid"),
        ("5555-5555-5555-4444", "…4444"),
        ("3714 496353 98431", "…8431"),
        ("6304000000000000000", "…0000"),
        ("(4111111111111111)", "(…1111)"),
        ("card *4444 of 2026-03-12 10:00", "card *4444 of 2026-03-12 10:00"),
        ("order 1234567890", "order 1234567890"),
        ("2026-03-12T10:00:00.123456+00:00", "2026-03-12T10:00:00.123456+00:00"),
        ("12345678-1234-5678-9012-123456789012", "12345678-1234-5678-9012-123456789012"),
    ],
)
def test_of_a_card_no_more_than_the_last_four_digits_are_shown(text: str, shown: str) -> None:
    assert mask_personal(text) == shown


def test_no_id_of_ours_is_taken_for_a_card() -> None:
    for number in range(2000):
        for id_ in identify(number, NOW, 1):
            assert mask_personal(f"attempt {id_}, {id_}") == f"attempt {id_}, {id_}"
    assert mask_personal(str(uuid.UUID(int=2**80))) == str(uuid.UUID(int=2**80))


@pytest.mark.parametrize(
    ("document", "kept"),
    [
        ({"card": {"first6": "411111", "last4": "1111"}}, {"card": {"first6": "…", "last4": "1111"}}),
        ({"PAN": 4111111111111111, "n": [4111111111111111]}, {"PAN": "…", "n": ["…1111"]}),
        ({"n": 4.111111111111111e15, "x": float("inf")}, {"n": "…1111", "x": "inf"}),
        ({"4111111111111111": 1}, {"…1111": 1}),
        ({"metadata": {"user_id": "ada@example.ru", "to": "ada@example.ru"}},
         {"metadata": {"user_id": "ada@example.ru", "to": "a…@e….ru"}}),
        ({"amount": "299.00", "paid": True, "of": None}, {"amount": "299.00", "paid": True, "of": None}),
    ],
    ids=["parts", "numbers", "floats", "keys", "user", "others"],
)  # fmt: skip
def test_evidence_is_masked_in_every_field_but_the_users_id(document: Any, kept: Any) -> None:
    assert mask_fields(document) == kept


def test_a_name_is_left_out_where_it_is_a_word_of_its_own() -> None:
    assert (
        without_names("user 5 of subscription 15, (5)", {"5"}) == "user (a customer) of subscription 15, ((a customer))"
    )
    assert without_names("ada@example.ru", {"ada", "ada@example.ru"}) == "(a customer)"


@pytest.mark.parametrize("body", ["", "[]", "null", '{"receipt": []}', "{"])
def test_a_body_that_is_none_names_nobody(body: str) -> None:
    assert names_in_body(body) == frozenset()


def test_where_it_is_not_known_whom_words_are_about_ids_and_contacts_are_left_out() -> None:
    said = "the database refused a statement: user anna (ada@example.ru) of 7f3a-11 is blocked, say C_17"
    assert without_identities(said) == "the database refused a statement: user … … of … is blocked, say …"
