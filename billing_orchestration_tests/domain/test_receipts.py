"""Receipts: one item worth the whole charge, sent to whoever can be reached; and contacts that nobody sees."""

from __future__ import annotations

import dataclasses
import json
from decimal import Decimal
from typing import Any

import pytest

from billing_orchestration.domain.answers import ProviderView
from billing_orchestration.domain.attempts import Attempt
from billing_orchestration.domain.money import Money
from billing_orchestration.domain.personal import mask_body
from billing_orchestration.domain.receipts import ReceiptRules, contact_of, fill, receipt_of
from billing_orchestration.domain.renewals import (
    Charge,
    DueSubscription,
    NotCharged,
    SaidByService,
    Void,
    decide_renewal,
    decide_renewals,
)
from billing_orchestration_tests.domain.given import NOW, RULES, a_due_subscription

RECEIPT = ReceiptRules(vat_code=11, payment_mode="full_payment")
WITH_RECEIPT = dataclasses.replace(RULES, receipt=RECEIPT)
ADA = SaidByService(1, "card-of-ada", may_charge=True, email="ada@example.ru")


def due_for(**said: Any) -> DueSubscription:
    return a_due_subscription(plan_name="Pro", said=dataclasses.replace(ADA, **said))


def attempt(rules: Any = WITH_RECEIPT, **said: Any) -> Attempt:
    decision = decide_renewal(due_for(**said), now=NOW, rules=rules)
    assert isinstance(decision, Charge), decision
    return decision.attempt


def test_a_receipt_has_one_item_worth_the_whole_charge() -> None:
    assert json.loads(attempt().body)["receipt"] == {
        "customer": {"email": "ada@example.ru"},
        "items": [
            {
                "description": "Pro",
                "quantity": 1,
                "amount": {"value": "299.00", "currency": "RUB"},
                "vat_code": 11,
                "payment_mode": "full_payment",
                "payment_subject": "service",
                "measure": "piece",
            }
        ],
    }


def test_a_shop_with_several_tax_systems_names_its_own() -> None:
    rules = dataclasses.replace(RECEIPT, tax_system_code=2)
    receipt = receipt_of(rules, {"email": "a@b.ru"}, Money(Decimal("1.50"), "RUB"), plan="Pro")
    assert receipt["tax_system_code"] == 2


def test_without_receipts_a_charge_has_none_and_needs_no_contact() -> None:
    assert "receipt" not in json.loads(attempt(RULES, email=None).body)


def test_a_long_name_is_cut_at_128_and_an_empty_one_has_a_stand_in() -> None:
    assert fill("{plan}", plan="Ж" * 200) == "Ж" * 128
    item = receipt_of(RECEIPT, {"phone": "7"}, Money(Decimal(1), "RUB"), plan=" ")["items"][0]
    assert item["description"] == "-"


@pytest.mark.parametrize(
    ("email", "phone", "fallback", "contact"),
    [
        ("ada@example.ru", "+7 900 000-00-67", "shop@example.ru", {"email": "ada@example.ru"}),
        (" ada@example.ru ", None, None, {"email": "ada@example.ru"}),
        ("nobody", "+7 (900) 000-00-67", None, {"phone": "79000000067"}),
        (None, "79000000067", "shop@example.ru", {"phone": "79000000067"}),
        (None, "12", "shop@example.ru", {"email": "shop@example.ru"}),
        ("", "", "shop@example.ru", {"email": "shop@example.ru"}),
        ("a b@c.ru", "1" * 16, None, None),
        ("ada@example.ru;", "тел.: 8 (900) 000\u201300\u201367 (дом)", None, {"phone": "89000000067"}),
        ("ada@example.ru\x01", "79000000067 доб. 12", "shop@example.ru", {"email": "shop@example.ru"}),
        ("mailto:ada@example.ru", "79000000067;123", None, None),
        ("'ada'@example.ru", "79000000067, 79", None, None),
        ("ada@example.ru.", None, None, None),
        ("ада@пример.рф", None, None, {"email": "ада@пример.рф"}),
        (None, None, None, None),
    ],
)
def test_a_receipt_goes_to_the_email_else_the_phone_else_the_shop(
    email: str | None, phone: str | None, fallback: str | None, contact: dict[str, str] | None
) -> None:
    assert contact_of(email, phone, fallback) == contact


def test_without_a_contact_nobody_is_charged() -> None:
    decision = decide_renewal(due_for(email="nobody"), now=NOW, rules=WITH_RECEIPT)
    assert isinstance(decision, NotCharged)
    assert (decision.code, decision.no_contact) == ("no_contact", 12)


@pytest.mark.parametrize(
    ("rules", "due"),
    [
        (WITH_RECEIPT, {"email": "other@example.ru"}),
        (dataclasses.replace(RULES, receipt=dataclasses.replace(RECEIPT, vat_code=12)), {}),
        (RULES, {}),
        (dataclasses.replace(WITH_RECEIPT, gateway_id="7"), {}),
    ],
    ids=["contact", "code", "off", "gateway"],
)
def test_one_never_sent_is_made_anew_when_its_receipt_has_changed(rules: Any, due: dict[str, str]) -> None:
    planned = attempt()
    due_now = dataclasses.replace(due_for(**due), attempts=(planned,))
    void, charge = decide_renewals([due_now], [planned], ProviderView(), now=NOW, rules=rules)
    assert isinstance(void, Void)
    assert isinstance(charge, Charge)
    assert charge.attempt.number == 2
    assert charge.attempt.idempotence_key != planned.idempotence_key


def test_one_that_may_have_been_sent_keeps_its_receipt() -> None:
    sent = dataclasses.replace(attempt(), first_sent_at=NOW, last_sent_at=NOW)
    due_now = dataclasses.replace(due_for(email="other@example.ru"), attempts=(sent,))
    [decision] = decide_renewals([due_now], [sent], ProviderView(), now=NOW, rules=WITH_RECEIPT)
    assert type(decision).__name__ == "Resend"
    assert "ada@example.ru" in decision.attempt.body  # type: ignore[union-attr]


def test_a_body_is_shown_with_its_customer_masked() -> None:
    by_phone = attempt(email=None, phone="79001234567")
    assert json.loads(mask_body(by_phone.body))["receipt"]["customer"] == {"phone": "7…67"}
    assert json.loads(mask_body(attempt().body))["receipt"]["customer"] == {"email": "a…@e….ru"}
    without = attempt(RULES)
    assert mask_body(without.body) == without.body
