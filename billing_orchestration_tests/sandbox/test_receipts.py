"""Receipts (54-FZ) in the sandbox: which are refused, and what their registration does to a payment."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from billing_orchestration.sandbox.provider.clock import SandboxClock
from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration_tests.sandbox.bare_client import BareClient, charge

NOON = datetime(2026, 3, 1, 12, 0, 0, tzinfo=timezone.utc)


def item(**changes: Any) -> dict[str, Any]:
    fields = {
        "description": "Plan",
        "quantity": 1,
        "amount": {"value": "990.00", "currency": "RUB"},
        "vat_code": 1,
        "payment_subject": "service",
        "payment_mode": "full_payment",
        "measure": "piece",
        **changes,
    }
    return {name: value for name, value in fields.items() if value is not ...}


def receipt(*items: Any, **changes: Any) -> dict[str, Any]:
    fields = {"customer": {"email": "user@example.invalid"}, "items": list(items) or [item()], **changes}
    return {name: value for name, value in fields.items() if value is not ...}


def worth(value: str) -> dict[str, str]:
    return {"value": value, "currency": "RUB"}


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("given", "parameter"),
    [
        ({}, "receipt"),
        ([], "receipt"),
        (receipt(customer=...), "receipt.customer"),
        (receipt(customer={}), "receipt.customer"),
        (receipt(customer={"full_name": "Ivanov"}), "receipt.customer"),
        (receipt(customer={"email": "nobody"}), "receipt.customer.email"),
        (receipt(customer={"email": ""}), "receipt.customer.email"),
        (receipt(customer={"email": "a b@c.invalid"}), "receipt.customer.email"),
        (receipt(customer={"phone": "+79000000000"}), "receipt.customer.phone"),
        (receipt(customer={"phone": "7 900 000-00-00"}), "receipt.customer.phone"),
        (receipt(customer={"phone": "7900000000012345"}), "receipt.customer.phone"),
        (receipt(customer={"phone": 79000000000}), "receipt.customer.phone"),
        (receipt(customer={"email": "a@b.invalid", "inn": "123"}), "receipt.customer.inn"),
        (receipt(customer={"email": "a@b.invalid", "name": "x"}), "receipt.customer.name"),
        (receipt(email="a@b.invalid"), "receipt.email"),
        (receipt(tax_system_code=0), "receipt.tax_system_code"),
        (receipt(tax_system_code=7), "receipt.tax_system_code"),
        (receipt(tax_system_code="1"), "receipt.tax_system_code"),
        (receipt(timezone=12), "receipt.timezone"),
        (receipt(internet="yes"), "receipt.internet"),
        (receipt(items=...), "receipt.items"),
        (receipt(items=[]), "receipt.items"),
        (receipt("Plan"), "receipt.items"),
        (receipt(*[item(amount=worth("9.90"))] * 101), "receipt.items"),
        (receipt(item(description=...)), "receipt.items.description"),
        (receipt(item(description="")), "receipt.items.description"),
        (receipt(item(description="x" * 129)), "receipt.items.description"),
        (receipt(item(quantity=...)), "receipt.items.quantity"),
        (receipt(item(quantity=0)), "receipt.items.quantity"),
        (receipt(item(quantity=-1)), "receipt.items.quantity"),
        (receipt(item(quantity="1")), "receipt.items.quantity"),
        (receipt(item(quantity=True)), "receipt.items.quantity"),
        (receipt(item(quantity=0.0001)), "receipt.items.quantity"),
        (receipt(item(amount=...)), "receipt.items.amount"),
        (receipt(item(amount=worth("990"))), "receipt.items.amount.value"),
        (receipt(item(amount={"value": "990.00", "currency": "USD"})), "receipt.items.amount.currency"),
        (receipt(item(amount=worth("989.99"))), "receipt.items.amount"),
        (receipt(item(quantity=2)), "receipt.items.amount"),
        (receipt(item(), item()), "receipt.items.amount"),
        (receipt(item(vat_code=...)), "receipt.items.vat_code"),
        (receipt(item(vat_code=0)), "receipt.items.vat_code"),
        (receipt(item(vat_code=13)), "receipt.items.vat_code"),
        (receipt(item(vat_code=True)), "receipt.items.vat_code"),
        (receipt(item(payment_subject=...)), "receipt.items.payment_subject"),
        (receipt(item(payment_subject="Service")), "receipt.items.payment_subject"),
        (receipt(item(payment_mode=...)), "receipt.items.payment_mode"),
        (receipt(item(payment_mode="full")), "receipt.items.payment_mode"),
        (receipt(item(measure=...)), "receipt.items.measure"),
        (receipt(item(measure="pieces")), "receipt.items.measure"),
        (receipt(item(price="1.00")), "receipt.items.price"),
    ],
)
@pytest.mark.parametrize("switch", ["off", "demanded"])
def test_a_receipt_that_the_tax_service_would_not_take_is_refused_and_charges_nothing(
    client: BareClient, sandbox: Sandbox, switch: str, given: Any, parameter: str
) -> None:
    sandbox.provider.switches.receipts = switch
    answer = client.post(charge(receipt=given))
    error = answer.json()
    assert (answer.status, error["code"], error["parameter"]) == (400, "invalid_request", parameter)
    assert sandbox.provider.payments() == []


@pytest.mark.parametrize(
    "given",
    [
        receipt(customer={"phone": "79000000000"}),
        receipt(item(vat_code=12, description="x" * 128), tax_system_code=6, timezone=11, internet=True),
        receipt(item(quantity=3, amount=worth("300.00")), item(amount=worth("90.00"))),
        receipt(item(quantity=0.333, amount=worth("2972.97"))),
        receipt(customer={"email": "a@b.invalid", "phone": "79000000000", "inn": "6321341814", "full_name": "Ivanov"}),
    ],
)
def test_a_receipt_that_adds_up_is_taken(client: BareClient, sandbox: Sandbox, given: Any) -> None:
    sandbox.provider.switches.receipts = "demanded"
    payment_id = client.post(charge(receipt=given)).json()["id"]
    assert sandbox.provider.payment(payment_id).receipt == given


@pytest.mark.parametrize("switch", ["demanded", "receipt_first"])
def test_a_shop_that_fiscalises_refuses_a_payment_without_a_receipt(
    client: BareClient, sandbox: Sandbox, switch: str
) -> None:
    sandbox.provider.switches.receipts = switch
    answer = client.post(charge())
    error = answer.json()
    assert (answer.status, error["parameter"], error["description"]) == (
        400,
        "receipt",
        "Receipt is missing or illegal",
    )
    assert sandbox.provider.payments() == []


def test_receipts_of_the_providers_own_go_to_an_email_address_only(client: BareClient, sandbox: Sandbox) -> None:
    sandbox.provider.switches.receipts = "demanded"
    sandbox.provider.switches.fiscalization_provider = "yoo_receipt"
    answer = client.post(charge(receipt=receipt(customer={"phone": "79000000000"})))
    assert (answer.status, answer.json()["parameter"]) == (400, "receipt.customer")
    assert client.post(charge(receipt=receipt()), "2").status == 200


def test_a_refunds_receipt_is_checked_against_the_refund(client: BareClient, sandbox: Sandbox) -> None:
    sandbox.provider.add_payment(id="paid")
    body = {"payment_id": "paid", "amount": worth("90.00"), "receipt": receipt()}
    refused = client.post(body, "1", "/refunds")
    assert (refused.status, refused.json()["parameter"]) == (400, "receipt.items.amount")
    body["receipt"] = receipt(item(amount=worth("90.00")))
    assert client.post(body, "2", "/refunds").status == 200


# ------------------------------------------------------------------------------------------------ registration


def registration(client: BareClient, payment_id: str) -> tuple[str, str]:
    shown = client.get(payment_id).json()
    return shown["status"], shown["receipt_registration"]


def test_a_shop_that_does_not_fiscalise_registers_nothing(client: BareClient) -> None:
    assert "receipt_registration" not in client.post(charge(receipt=receipt())).json()


@pytest.mark.parametrize("end", ["succeeded", "canceled"])
def test_a_receipt_is_registered_or_not_after_the_payment_and_moves_no_money(
    client: BareClient, sandbox: Sandbox, sandbox_clock: SandboxClock, end: str
) -> None:
    sandbox_clock.set(NOON)
    switches = sandbox.provider.switches
    switches.receipts, switches.registration, switches.registration_s = "demanded", end, 60
    payment = client.post(charge(receipt=receipt())).json()
    assert (payment["status"], payment["receipt_registration"]) == ("succeeded", "pending")
    sandbox_clock.advance(60)
    assert registration(client, payment["id"]) == ("succeeded", end)
    assert [entry.kind for entry in sandbox.provider.ledger()] == ["charge"]
    assert client.post(charge(receipt=receipt())).json() == payment


def test_a_payment_that_is_declined_has_no_receipt_to_register(client: BareClient, sandbox: Sandbox) -> None:
    sandbox.provider.switches.receipts = "demanded"
    sandbox.provider.add_method("method-1", "canceled:card_expired")
    assert registration(client, client.post(charge(receipt=receipt())).json()["id"]) == ("canceled", "canceled")


def test_the_cabinet_cancels_or_registers_a_receipt(client: BareClient, sandbox: Sandbox) -> None:
    sandbox.provider.switches.receipts, sandbox.provider.switches.registration = "demanded", "pending"
    one, other = (client.post(charge(receipt=receipt()), key).json()["id"] for key in ("1", "2"))
    assert registration(client, one) == ("succeeded", "pending")
    sandbox.provider.cancel_receipt(one)
    sandbox.provider.register_receipt(other)
    assert [registration(client, payment_id)[1] for payment_id in (one, other)] == ["canceled", "succeeded"]
    with pytest.raises(ValueError, match="is canceled, not pending"):
        sandbox.provider.register_receipt(one)


@pytest.mark.parametrize(
    ("script", "registers", "end", "entries"),
    [
        ("succeeded", "succeeded", ("succeeded", "succeeded"), 1),
        ("canceled:card_expired", "succeeded", ("canceled", "succeeded"), 0),
        ("pending:succeeded:1", "succeeded", ("succeeded", "succeeded"), 1),
        ("succeeded", "canceled", ("canceled", "canceled"), 0),
    ],
)
def test_receipt_first_keeps_a_charge_pending_until_its_receipt_is_registered(
    client: BareClient, sandbox: Sandbox, sandbox_clock: SandboxClock, script: str, registers: str,
    end: tuple[str, str], entries: int,
) -> None:  # fmt: skip
    sandbox_clock.set(NOON)
    switches = sandbox.provider.switches
    switches.receipts, switches.registration, switches.registration_s = "receipt_first", registers, 60
    sandbox.provider.add_method("method-1", script)
    payment = client.post(charge(receipt=receipt())).json()
    assert (payment["status"], payment["receipt_registration"]) == ("pending", "pending")
    sandbox_clock.advance(59)
    assert registration(client, payment["id"]) == ("pending", "pending")
    assert sandbox.provider.ledger() == []
    sandbox_clock.advance(2)
    assert registration(client, payment["id"]) == end
    assert [entry.idempotence_key for entry in sandbox.provider.ledger()] == ["key-1"] * entries


def test_receipt_first_can_wait_for_ever(client: BareClient, sandbox: Sandbox, sandbox_clock: SandboxClock) -> None:
    sandbox_clock.set(NOON)
    sandbox.provider.switches.receipts, sandbox.provider.switches.registration = "receipt_first", "pending"
    waiting, canceled = (client.post(charge(receipt=receipt()), key).json()["id"] for key in ("1", "2"))
    sandbox_clock.advance(timedelta(days=30))
    assert registration(client, waiting) == ("pending", "pending")
    sandbox.provider.cancel_receipt(canceled)
    shown = client.get(canceled).json()
    assert shown["cancellation_details"] == {"party": "yoo_money", "reason": "general_decline"}
    sandbox.provider.register_receipt(waiting)
    assert registration(client, waiting) == ("succeeded", "succeeded")
    assert len(sandbox.provider.ledger()) == 1


def test_a_payment_canceled_before_its_receipt_is_registered_stays_canceled(
    client: BareClient, sandbox: Sandbox, sandbox_clock: SandboxClock
) -> None:
    sandbox_clock.set(NOON)
    sandbox.provider.switches.receipts, sandbox.provider.switches.registration_s = "receipt_first", 60
    payment_id = client.post(charge(receipt=receipt())).json()["id"]
    sandbox.provider.cancel(payment_id)
    sandbox_clock.advance(61)
    assert registration(client, payment_id) == ("canceled", "canceled")
    assert sandbox.provider.ledger() == []


def test_a_payment_that_waits_for_its_receipt_goes_on_after_a_restart(
    client: BareClient, sandbox: Sandbox, sandbox_clock: SandboxClock, tmp_path: Path
) -> None:
    sandbox_clock.set(NOON)
    sandbox.provider.switches.receipts, sandbox.provider.switches.registration_s = "receipt_first", 60
    payment_id = client.post(charge(receipt=receipt())).json()["id"]
    sandbox.provider.save(tmp_path / "state.json")
    sandbox.provider.reset()
    sandbox.provider.load(tmp_path / "state.json")
    assert registration(client, payment_id) == ("pending", "pending")
    sandbox_clock.advance(60)
    assert registration(client, payment_id) == ("succeeded", "succeeded")


def test_history_can_hold_a_paid_payment_whose_receipt_was_not_registered(client: BareClient, sandbox: Sandbox) -> None:
    sandbox.provider.add_payment(id="paid", registration="canceled")
    assert registration(client, "paid") == ("succeeded", "canceled")
