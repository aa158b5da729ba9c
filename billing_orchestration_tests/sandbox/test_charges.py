"""POST /payments in the sandbox: what is accepted, what a key protects, and what enters the ledger."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest

from billing_orchestration.sandbox.provider.clock import SandboxClock
from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration_tests.sandbox.bare_client import BareClient, charge
from billing_orchestration_tests.waiting import wait_until

NOON = datetime(2026, 3, 1, 12, 0, 0, tzinfo=timezone.utc)


def test_a_charge_takes_the_money_once_and_tells_the_whole_payment(
    client: BareClient, sandbox: Sandbox, sandbox_clock: SandboxClock
) -> None:
    sandbox_clock.set(NOON)
    answer = client.post(charge(), "key-1")
    assert answer.status == 200
    payment = answer.json()
    assert len(payment.pop("id")) == 36
    assert payment.pop("payment_method")["id"] == "method-1"
    assert payment == {
        "status": "succeeded",
        "amount": {"value": "990.00", "currency": "RUB"},
        "income_amount": {"value": "955.35", "currency": "RUB"},
        "refunded_amount": {"value": "0.00", "currency": "RUB"},
        "description": "Renewal",
        "recipient": {"account_id": sandbox.shop_id, "gateway_id": "1" + sandbox.shop_id},
        "created_at": "2026-03-01T12:00:00.000Z",
        "captured_at": "2026-03-01T12:00:00.000Z",
        "test": True,
        "paid": True,
        "refundable": True,
        "metadata": {"subscription_id": "7"},
    }
    (entry,) = sandbox.provider.ledger()
    assert (entry.kind, entry.amount, entry.currency, entry.at) == ("charge", Decimal("990.00"), "RUB", NOON)
    assert (entry.idempotence_key, entry.payment_method_id) == ("key-1", "method-1")
    assert entry.metadata == {"subscription_id": "7"}


def test_a_new_payment_keeps_the_saved_methods_id_and_has_an_id_of_its_own(client: BareClient) -> None:
    payment = client.post(charge()).json()
    assert payment["payment_method"]["id"] == "method-1"
    assert payment["payment_method"]["saved"] is True
    assert payment["id"] != "method-1"
    assert client.get(payment["id"]).json() == payment


def test_a_payment_tells_the_gateway_that_it_was_for(client: BareClient, sandbox: Sandbox) -> None:
    payment = client.post(charge(recipient={"gateway_id": "456"})).json()
    assert payment["recipient"] == {"account_id": sandbox.shop_id, "gateway_id": "456"}


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("change", "parameter"),
    [
        ({"amount": ...}, "amount"),
        ({"amount": "990.00"}, "amount"),
        ({"amount": {"value": 990, "currency": "RUB"}}, "amount.value"),
        ({"amount": {"value": "990", "currency": "RUB"}}, "amount.value"),
        ({"amount": {"value": "990.0", "currency": "RUB"}}, "amount.value"),
        ({"amount": {"value": "990.000", "currency": "RUB"}}, "amount.value"),
        ({"amount": {"value": "0.00", "currency": "RUB"}}, "amount.value"),
        ({"amount": {"value": "-1.00", "currency": "RUB"}}, "amount.value"),
        ({"amount": {"value": "9e2", "currency": "RUB"}}, "amount.value"),
        ({"amount": {"value": "٩٩.٠٠", "currency": "RUB"}}, "amount.value"),
        ({"amount": {"value": "990.00"}}, "amount.currency"),
        ({"amount": {"value": "990.00", "currency": "rub"}}, "amount.currency"),
        ({"amount": {"value": "990.00", "currency": "RUB", "vat": 1}}, "amount.vat"),
        ({"capture": "true"}, "capture"),
        ({"capture": None}, "capture"),
        ({"description": "x" * 129}, "description"),
        ({"description": None}, "description"),
        ({"payment_method_id": "nobody"}, "payment_method_id"),
        ({"payment_method_id": "None"}, "payment_method_id"),
        ({"payment_method_id": ""}, "payment_method_id"),
        ({"payment_method_id": None}, "payment_method_id"),
        ({"payment_method_id": 7}, "payment_method_id"),
        ({"payment_method_id": ...}, "payment_method_id"),
        ({"payment_method_id": "not-saved"}, "payment_method_id"),
        ({"metadata": [1]}, "metadata"),
        ({"metadata": {f"key{n}": "" for n in range(17)}}, "metadata"),
        ({"metadata": {"k" * 33: "v"}}, "metadata"),
        ({"metadata": {"user_id": 7}}, "metadata.user_id"),
        ({"metadata": {"user_id": None}}, "metadata.user_id"),
        ({"metadata": {"user_id": "x" * 513}}, "metadata.user_id"),
        ({"recipient": {}}, "recipient.gateway_id"),
        ({"recipient": {"gateway_id": 7}}, "recipient.gateway_id"),
        ({"save_payment_method": "yes"}, "save_payment_method"),
        ({"ammount": {"value": "990.00", "currency": "RUB"}}, "ammount"),
        ({"status": "succeeded"}, "status"),
    ],
)
def test_a_body_that_the_api_does_not_know_is_refused_and_charges_nothing(
    client: BareClient, sandbox: Sandbox, change: dict[str, Any], parameter: str
) -> None:
    sandbox.provider.add_method("not-saved", saved=False)
    answer = client.post(charge(**change))
    error = answer.json()
    assert (answer.status, error["type"], error["code"]) == (400, "error", "invalid_request")
    assert error["parameter"] == parameter
    assert error["id"]
    assert error["description"]
    assert sandbox.provider.ledger() == []
    assert sandbox.provider.payments() == []


def test_the_limits_themselves_are_accepted(client: BareClient) -> None:
    metadata = {f"{n:032d}": "x" * 512 for n in range(16)}
    answer = client.post(charge(description="x" * 128, metadata=metadata), "k" * 64)
    assert answer.status == 200
    assert answer.json()["metadata"] == metadata


GOOD = json.dumps(charge()).encode()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        GOOD[:-1],
        b"[" + GOOD + b"]",
        b'"text"',
        GOOD.replace(b"Renewal", b"\xff"),
        GOOD.replace(b"true", b"NaN"),
        GOOD.replace(b"{", b'{"capture": true, ', 1),
        GOOD.replace(b"Renewal", b"\\ud800"),
    ],
)
def test_a_body_that_is_not_a_json_object_is_refused(client: BareClient, sandbox: Sandbox, body: bytes) -> None:
    answer = client.post(body)
    assert (answer.status, answer.json()["code"]) == (400, "invalid_request")
    assert sandbox.provider.ledger() == []
    assert client.post(GOOD, "another").status == 200


@pytest.mark.parametrize("key", [None, "", "k" * 65])
def test_a_charge_needs_a_key_of_1_to_64_characters(client: BareClient, sandbox: Sandbox, key: str | None) -> None:
    answer = client.post(charge(), key)
    assert (answer.status, answer.json()["parameter"]) == (400, "Idempotence-Key")
    assert sandbox.provider.ledger() == []


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded"])
def test_a_charge_that_is_not_sent_as_json_is_refused(client: BareClient, sandbox: Sandbox, content_type: str) -> None:
    headers = {"Content-Type": content_type, "Idempotence-Key": "k"}
    answer = client.send("POST", "/payments", headers=headers, body=json.dumps(charge()))
    assert (answer.status, answer.json()["type"]) == (415, "error")
    assert sandbox.provider.ledger() == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("PUT", "/payments", 405),
        ("DELETE", "/payments/x", 405),
        ("GET", "/payments/x", 404),
        ("GET", "/payment", 404),
        ("GET", "/payments/x/y", 404),
    ],
)
def test_a_wrong_method_or_path_is_named_by_its_status(client: BareClient, method: str, path: str, status: int) -> None:
    answer = client.send(method, path)
    assert (answer.status, answer.json()["type"]) == (status, "error")


def test_an_unknown_payment_is_not_found_in_the_providers_own_words(client: BareClient) -> None:
    answer = client.get("22e12f66-000f-5000-8000-18db351245c7")
    error = answer.json()
    assert (answer.status, error["type"], error["code"], error["parameter"]) == (
        404,
        "error",
        "not_found",
        "payment_id",
    )


@pytest.mark.parametrize("header", ["", "Bearer token", "Basic !!!", "Basic MTAwNTAwOndyb25n", "Basic MTp0ZXN0"])
@pytest.mark.parametrize(("method", "path"), [("POST", "/payments"), ("GET", "/payments"), ("GET", "/payments/x")])
def test_wrong_credentials_get_401_and_nothing_else(
    client: BareClient, sandbox: Sandbox, header: str, method: str, path: str
) -> None:
    headers = {"Authorization": header, "Content-Type": "application/json", "Idempotence-Key": "k"}
    body = json.dumps(charge()) if method == "POST" else None
    answer = client.http.request(method, sandbox.url + path, headers=headers, body=body)
    assert (answer.status, answer.json()["code"]) == (401, "invalid_credentials")
    assert sandbox.provider.ledger() == []


def test_a_live_key_makes_payments_that_are_no_tests(client: BareClient, sandbox: Sandbox) -> None:
    sandbox.reset(secret_key="live_key")
    sandbox.provider.add_method("method-1")
    assert client.post(charge()).json()["test"] is False


# ------------------------------------------------------------------------------------------------ idempotence


def test_the_same_key_and_body_get_the_first_answer_and_charge_once(client: BareClient, sandbox: Sandbox) -> None:
    first = client.post(charge(), "key-1")
    again = client.post(dict(reversed(charge().items())), "key-1")
    assert again.status == 200
    assert again.json() == first.json()
    assert len(sandbox.provider.ledger()) == 1


def test_the_same_body_under_another_key_is_another_charge(client: BareClient, sandbox: Sandbox) -> None:
    ids = {client.post(charge(), key).json()["id"] for key in ("key-1", "key-2")}
    assert len(ids) == 2
    assert [entry.idempotence_key for entry in sandbox.provider.ledger()] == ["key-1", "key-2"]


def test_the_same_key_with_another_body_is_refused(client: BareClient, sandbox: Sandbox) -> None:
    client.post(charge(), "key-1")
    answer = client.post(charge(metadata={"subscription_id": "8"}), "key-1")
    error = answer.json()
    assert (answer.status, error["description"], error["parameter"]) == (
        400,
        "Idempotence key duplicated",
        "Idempotence-Key",
    )
    assert len(sandbox.provider.ledger()) == 1


@pytest.mark.parametrize(
    ("after", "charges"), [(timedelta(hours=24) - timedelta(milliseconds=1), 1), (timedelta(hours=24), 2)]
)
def test_a_key_protects_for_24_hours_from_its_first_request(
    client: BareClient, sandbox: Sandbox, sandbox_clock: SandboxClock, after: timedelta, charges: int
) -> None:
    sandbox_clock.set(NOON)
    client.post(charge(), "key-1")
    sandbox_clock.set(NOON + timedelta(hours=23))
    client.post(charge(), "key-1")
    sandbox_clock.set(NOON + after)
    assert client.post(charge(), "key-1").status == 200
    assert len(sandbox.provider.charges(subscription_id="7")) == charges


def test_a_declined_charge_stays_declined_under_its_key(client: BareClient, sandbox: Sandbox) -> None:
    sandbox.provider.add_method("method-1", ["canceled:insufficient_funds", "succeeded"])
    first = client.post(charge(), "key-1").json()
    assert client.post(charge(), "key-1").json() == first
    assert sandbox.provider.ledger() == []
    assert client.post(charge(), "key-2").json()["status"] == "succeeded"


@pytest.mark.parametrize(("remember", "second"), [(True, 400), (False, 200)])
def test_whether_a_refusal_uses_its_key_up_is_a_switch(
    client: BareClient, sandbox: Sandbox, remember: bool, second: int
) -> None:
    sandbox.provider.switches.remember_errors = remember
    assert client.post(charge(description="x" * 129), "key-1").status == 400
    assert client.post(charge(), "key-1").status == second


@pytest.mark.parametrize(("replay", "status"), [("original", "pending"), ("current", "succeeded")])
def test_whether_a_repeated_key_shows_the_payment_then_or_now_is_a_switch(
    client: BareClient, sandbox: Sandbox, replay: str, status: str
) -> None:
    sandbox.provider.switches.replay = replay
    sandbox.provider.add_method("method-1", "pending")
    payment = client.post(charge(), "key-1").json()
    sandbox.provider.pay(payment["id"])
    assert client.post(charge(), "key-1").json()["status"] == status


@pytest.mark.parametrize(("switch", "second"), [("conflict", 409), ("processing", 202)])
def test_a_second_request_while_the_first_is_worked_on_can_be_sent_away(
    client: BareClient, sandbox: Sandbox, switch: str, second: int
) -> None:
    sandbox.provider.switches.concurrent_same_key = switch
    sandbox.provider.switches.processing_s = 3600
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(client.post, charge(), "key-1")
        wait_until(lambda: sandbox.count("create") == 1)
        assert client.post(charge(), "key-1").status == second
        sandbox.behave()
        assert first.result().status == 200
    assert len(sandbox.provider.ledger()) == 1


def test_a_second_request_while_the_first_is_worked_on_waits_for_its_answer(
    client: BareClient, sandbox: Sandbox
) -> None:
    sandbox.provider.switches.processing_s = 3600
    with ThreadPoolExecutor(2) as threads:
        answers = [threads.submit(client.post, charge(), "key-1") for _ in range(2)]
        wait_until(lambda: sandbox.count("create") == 2)
        sandbox.behave()
        first, second = (answer.result() for answer in answers)
    assert (first.status, second.status) == (200, 200)
    assert first.json() == second.json()
    assert len(sandbox.provider.ledger()) == 1


def test_a_provider_that_does_not_serialise_a_key_charges_twice_while_both_requests_are_in_flight(
    client: BareClient, sandbox: Sandbox
) -> None:
    sandbox.provider.switches.serialise_keys = False
    sandbox.provider.switches.processing_s = 3600
    with ThreadPoolExecutor(2) as threads:
        answers = [threads.submit(client.post, charge(), "key-1") for _ in range(2)]
        wait_until(lambda: sandbox.count("create") == 2)
        sandbox.behave()
        first, second = (answer.result().json() for answer in answers)
    assert first["id"] != second["id"]
    assert [entry.idempotence_key for entry in sandbox.provider.ledger()] == ["key-1", "key-1"]
    sandbox.provider.switches.processing_s = 0
    assert client.post(charge(), "key-1").json() in (first, second)
    assert len(sandbox.provider.ledger()) == 2


def test_twenty_threads_with_one_key_charge_once(client: BareClient, sandbox: Sandbox) -> None:
    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(lambda _: client.post(charge(), "key-1").json()["id"], range(40)))
    assert len(set(answers)) == 1
    assert len(sandbox.provider.ledger()) == 1


# ------------------------------------------------------------------------------------------------ scripts


def test_a_script_is_used_one_outcome_a_charge_and_its_last_one_repeats(client: BareClient, sandbox: Sandbox) -> None:
    sandbox.provider.add_method("method-1", ["canceled:insufficient_funds", "pending", "succeeded"])
    seen = [client.post(charge(), f"key-{n}").json()["status"] for n in range(5)]
    assert seen == ["canceled", "pending", "succeeded", "succeeded", "succeeded"]
    assert len(sandbox.provider.ledger()) == 3


def test_a_decline_is_http_200_with_party_and_reason_and_moves_nothing(client: BareClient, sandbox: Sandbox) -> None:
    sandbox.provider.add_method("method-1", "canceled:card_expired")
    answer = client.post(charge())
    payment = answer.json()
    assert (answer.status, payment["status"], payment["paid"]) == (200, "canceled", False)
    assert payment["cancellation_details"] == {"party": "payment_network", "reason": "card_expired"}
    assert "captured_at" not in payment
    assert sandbox.provider.ledger() == []


@pytest.mark.parametrize(
    ("outcome", "status", "code"), [("forbidden", 403, "forbidden"), ("bad_request", 400, "invalid_request")]
)
def test_a_method_can_answer_with_an_error(
    client: BareClient, sandbox: Sandbox, outcome: str, status: int, code: str
) -> None:
    sandbox.provider.add_method("method-1", [outcome, "succeeded"])
    answer = client.post(charge(), "key-1")
    assert (answer.status, answer.json()["code"]) == (status, code)
    assert client.post(charge(), "key-1").status == status
    assert sandbox.provider.payments() == []


@pytest.mark.parametrize(
    ("script", "status", "entries"),
    [("pending:succeeded:60", "succeeded", 1), ("pending:canceled:general_decline:60", "canceled", 0)],
)
def test_a_pending_charge_settles_itself_when_its_time_has_come(
    client: BareClient, sandbox: Sandbox, sandbox_clock: SandboxClock, script: str, status: str, entries: int
) -> None:
    sandbox_clock.set(NOON)
    sandbox.provider.add_method("method-1", script)
    payment = client.post(charge(), "key-1").json()
    assert payment["status"] == "pending"
    sandbox_clock.advance(59)
    assert client.get(payment["id"]).json()["status"] == "pending"
    assert sandbox.provider.ledger() == []
    sandbox_clock.advance(600)
    later = client.get(payment["id"]).json()
    assert later["status"] == status
    ledger = sandbox.provider.ledger()
    assert [entry.idempotence_key for entry in ledger] == ["key-1"] * entries
    if entries:
        assert later["captured_at"] == "2026-03-01T12:01:00.000Z"
        assert ledger[0].at == NOON + timedelta(seconds=60)


def test_a_pending_charge_can_settle_at_an_instant(
    client: BareClient, sandbox: Sandbox, sandbox_clock: SandboxClock
) -> None:
    sandbox_clock.set(NOON)
    at = NOON + timedelta(days=8)
    sandbox.provider.add_method("method-1", {"kind": "pending", "then": "succeeded", "at": at})
    payment = client.post(charge()).json()
    sandbox_clock.set(at)
    assert client.get(payment["id"]).json()["captured_at"] == "2026-03-09T12:00:00.000Z"


@pytest.mark.parametrize(
    "script",
    [
        "maybe",
        "canceled:a:b",
        "pending:refunded:5",
        [],
        {"kind": "succeeded", "then": "canceled"},
        {"kind": "pending", "then": "canceled"},
    ],
)
def test_a_script_that_means_nothing_is_refused(sandbox: Sandbox, script: Any) -> None:
    with pytest.raises(ValueError, match=r"outcome|script|become|later"):
        sandbox.provider.add_method("method-1", script)


# ------------------------------------------------------------------------------------------------ holds and customers


def test_without_capture_the_money_is_only_held_and_given_back_after_seven_days(
    client: BareClient, sandbox: Sandbox, sandbox_clock: SandboxClock
) -> None:
    sandbox_clock.set(NOON)
    payment = client.post(charge(capture=...)).json()
    assert (payment["status"], payment["paid"]) == ("waiting_for_capture", True)
    assert payment["expires_at"] == "2026-03-08T12:00:00.000Z"
    sandbox_clock.advance(timedelta(days=7))
    later = client.get(payment["id"]).json()
    assert (later["status"], later["cancellation_details"]["reason"]) == ("canceled", "expired_on_capture")
    assert sandbox.provider.ledger() == []


def test_a_hold_that_is_captured_enters_the_ledger_then(sandbox: Sandbox, sandbox_clock: SandboxClock) -> None:
    sandbox_clock.set(NOON)
    held = sandbox.provider.hold("500.00", metadata={"user_id": "u"})
    assert sandbox.provider.ledger() == []
    sandbox_clock.advance(timedelta(hours=1))
    sandbox.provider.capture(held.id)
    (entry,) = sandbox.provider.ledger()
    assert (entry.amount, entry.at, entry.idempotence_key) == (Decimal("500.00"), NOON + timedelta(hours=1), None)


def test_a_purchase_that_saves_its_method_can_be_charged_by_its_own_id(client: BareClient, sandbox: Sandbox) -> None:
    bought = sandbox.provider.purchase("990.00", save_method=True)
    assert client.post(charge(bought.id), "1").status == 400
    sandbox.provider.pay(bought.id)
    assert (
        client.get(bought.id).json()["payment_method"] | {"id": bought.id, "saved": True}
        == client.get(bought.id).json()["payment_method"]
    )
    renewal = client.post(charge(bought.id), "2").json()
    assert (renewal["status"], renewal["payment_method"]["id"]) == ("succeeded", bought.id)
    assert client.post(charge(renewal["id"]), "3").status == 400
    assert len(sandbox.provider.charges()) == 1
    assert len(sandbox.provider.ledger()) == 2


def test_a_card_purchase_runs_out_after_an_hour_and_cash_never_does(
    client: BareClient, sandbox: Sandbox, sandbox_clock: SandboxClock
) -> None:
    sandbox_clock.set(NOON)
    card = sandbox.provider.purchase("10.00")
    cash = sandbox.provider.purchase("10.00", method_type="cash")
    sandbox_clock.advance(timedelta(minutes=59))
    assert client.get(card.id).json()["status"] == "pending"
    sandbox_clock.advance(timedelta(days=8))
    gone = client.get(card.id).json()
    assert gone["cancellation_details"] == {"party": "yoo_money", "reason": "expired_on_confirmation"}
    sandbox.provider.pay(cash.id)
    assert client.get(cash.id).json()["captured_at"] == "2026-03-09T12:59:00.000Z"
    with pytest.raises(ValueError, match="is canceled"):
        sandbox.provider.pay(card.id)


def test_a_purchase_of_two_hours_ago_can_have_been_paid_in_its_59th_minute(
    sandbox: Sandbox, sandbox_clock: SandboxClock
) -> None:
    sandbox_clock.set(NOON)
    bought = sandbox.provider.purchase("10.00", created_at=NOON - timedelta(hours=2))
    paid = sandbox.provider.pay(bought.id, at=NOON - timedelta(minutes=61))
    assert paid.captured_at == NOON - timedelta(minutes=61)
    assert sandbox.provider.payment(bought.id).status == "succeeded"


def test_a_refund_leaves_the_payment_succeeded_and_enters_the_ledger(client: BareClient, sandbox: Sandbox) -> None:
    payment_id = client.post(charge()).json()["id"]
    sandbox.provider.refund(payment_id, "90.00")
    part = client.get(payment_id).json()
    assert (part["status"], part["refunded_amount"]["value"], part["refundable"]) == ("succeeded", "90.00", True)
    sandbox.provider.refund(payment_id)
    whole = client.get(payment_id).json()
    assert (whole["status"], whole["refunded_amount"]["value"], whole["refundable"]) == ("succeeded", "990.00", False)
    moved = [(entry.kind, entry.amount) for entry in sandbox.provider.ledger()]
    assert moved == [("charge", Decimal("990.00")), ("refund", Decimal("90.00")), ("refund", Decimal("900.00"))]
    with pytest.raises(ValueError, match="cannot be refunded"):
        sandbox.provider.refund(payment_id, "0.01")


def test_what_is_final_cannot_be_canceled_or_paid_again(client: BareClient, sandbox: Sandbox) -> None:
    payment_id = client.post(charge()).json()["id"]
    with pytest.raises(ValueError, match="is succeeded"):
        sandbox.provider.cancel(payment_id)
    with pytest.raises(ValueError, match="is succeeded"):
        sandbox.provider.pay(payment_id)
    assert len(sandbox.provider.ledger()) == 1


def test_the_official_sdk_reads_the_sandboxs_payments(client: BareClient, sandbox: Sandbox) -> None:
    from yookassa.domain.response import PaymentListResponse, PaymentResponse

    sandbox.provider.add_method("method-1", ["succeeded", "canceled:card_expired"])
    paid = PaymentResponse(client.post(charge(), "1").json())
    assert (paid.status, paid.payment_method.id, paid.payment_method.saved) == ("succeeded", "method-1", True)
    declined = PaymentResponse(client.post(charge(), "2").json())
    assert declined.cancellation_details.reason == "card_expired"
    assert [item.id for item in PaymentListResponse(client.list().json()).items] == [declined.id, paid.id]
