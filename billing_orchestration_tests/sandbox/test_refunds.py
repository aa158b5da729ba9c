"""/refunds in the sandbox: who may be refunded how much, what the list shows, and what enters the ledger."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
import urllib3

from billing_orchestration.sandbox.provider.clock import SandboxClock, iso
from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration_tests.sandbox.bare_client import BareClient, charge

NOON = datetime(2026, 3, 1, 12, 0, 0, tzinfo=timezone.utc)


def refund(payment_id: str, value: str = "90.00", /, **changes: Any) -> dict[str, Any]:
    body = {"payment_id": payment_id, "amount": {"value": value, "currency": "RUB"}, **changes}
    return {name: value for name, value in body.items() if value is not ...}


def send(client: BareClient, body: Any, key: str = "refund-1") -> urllib3.BaseHTTPResponse:
    return client.post(body, key, "/refunds")


def refunds_of(client: BareClient, **filters: str) -> list[str]:
    return [item["id"] for item in client.list("/refunds", **filters).json()["items"]]


def test_a_refund_in_part_and_the_rest_update_the_payment_and_enter_the_ledger(
    client: BareClient, sandbox: Sandbox, sandbox_clock: SandboxClock
) -> None:
    sandbox_clock.set(NOON)
    payment_id = client.post(charge()).json()["id"]
    answer = send(client, refund(payment_id, description="Kept for a day", metadata={"ticket": "5"}))
    assert answer.status == 200
    part = answer.json()
    assert len(part["id"]) == 36
    assert part == {
        "id": part["id"],
        "payment_id": payment_id,
        "status": "succeeded",
        "created_at": "2026-03-01T12:00:00.000Z",
        "amount": {"value": "90.00", "currency": "RUB"},
        "description": "Kept for a day",
        "metadata": {"ticket": "5"},
    }
    assert client.get(part["id"], "/refunds").json() == part
    assert client.get(payment_id).json()["refunded_amount"]["value"] == "90.00"
    rest = send(client, refund(payment_id, "900.00"), "refund-2").json()
    payment = client.get(payment_id).json()
    assert (payment["status"], payment["refunded_amount"]["value"], payment["refundable"]) == (
        "succeeded",
        "990.00",
        False,
    )
    _, first, second = sandbox.provider.ledger()
    assert (first.kind, first.amount, first.refund_id, first.idempotence_key) == (
        "refund",
        Decimal("90.00"),
        part["id"],
        "refund-1",
    )
    assert (second.amount, second.refund_id, second.payment_id) == (Decimal("900.00"), rest["id"], payment_id)


def test_a_key_protects_a_refund_as_it_does_a_charge(client: BareClient, sandbox: Sandbox) -> None:
    payment_id = client.post(charge()).json()["id"]
    first = send(client, refund(payment_id)).json()
    assert send(client, refund(payment_id)).json() == first
    assert send(client, refund(payment_id, "91.00")).json()["description"] == "Idempotence key duplicated"
    assert [entry.kind for entry in sandbox.provider.ledger()] == ["charge", "refund"]


@pytest.mark.parametrize(
    ("change", "parameter"),
    [
        ({"payment_id": ...}, "payment_id"),
        ({"payment_id": ""}, "payment_id"),
        ({"payment_id": "unknown"}, "payment_id"),
        ({"payment_id": "open"}, "payment_id"),
        ({"payment_id": "old"}, "payment_id"),
        ({"amount": ...}, "amount"),
        ({"amount": {"value": "990.01", "currency": "RUB"}}, "amount"),
        ({"amount": {"value": "0.00", "currency": "RUB"}}, "amount.value"),
        ({"amount": {"value": "90.00", "currency": "USD"}}, "amount.currency"),
        ({"description": "x" * 251}, "description"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"sum": "90.00"}, "sum"),
    ],
)
def test_a_refund_that_cannot_be_is_refused_and_moves_nothing(
    client: BareClient, sandbox: Sandbox, change: dict[str, Any], parameter: str
) -> None:
    sandbox.provider.add_payment(id="paid")
    sandbox.provider.add_payment(id="open", status="pending")
    sandbox.provider.add_payment(id="old", created_at=sandbox.clock() - timedelta(days=3 * 365 + 1))
    answer = send(client, refund("paid", **change))
    assert (answer.status, answer.json()["code"], answer.json()["parameter"]) == (400, "invalid_request", parameter)
    assert sandbox.provider.refunds() == []
    assert {entry.kind for entry in sandbox.provider.ledger()} == {"charge"}


def test_a_pending_refund_is_no_money_yet_but_nobody_else_can_have_it(client: BareClient, sandbox: Sandbox) -> None:
    sandbox.provider.switches.refunds = "pending"
    sandbox.provider.add_payment(id="paid", amount="100.00")
    pending = send(client, refund("paid", "60.00")).json()
    assert pending["status"] == "pending"
    assert client.get("paid").json()["refunded_amount"]["value"] == "0.00"
    assert send(client, refund("paid", "60.00"), "refund-2").json()["parameter"] == "amount"
    sandbox.provider.succeed_refund(pending["id"])
    assert client.get("paid").json()["refunded_amount"]["value"] == "60.00"
    assert [entry.kind for entry in sandbox.provider.ledger()] == ["charge", "refund"]
    with pytest.raises(ValueError, match="is succeeded"):
        sandbox.provider.cancel_refund(pending["id"])


def test_a_pending_refund_can_settle_itself(client: BareClient, sandbox: Sandbox, sandbox_clock: SandboxClock) -> None:
    sandbox_clock.set(NOON)
    sandbox.provider.switches.refunds = "pending:succeeded:60"
    sandbox.provider.add_payment(id="paid")
    pending = send(client, refund("paid")).json()
    sandbox_clock.advance(61)
    assert client.get(pending["id"], "/refunds").json()["status"] == "succeeded"
    assert sandbox.provider.ledger()[-1].at == NOON + timedelta(seconds=60)


def test_a_canceled_refund_leaves_the_money_with_the_shop(client: BareClient, sandbox: Sandbox) -> None:
    sandbox.provider.switches.refunds = "canceled:insufficient_funds"
    sandbox.provider.add_payment(id="paid")
    canceled = send(client, refund("paid")).json()
    assert canceled["status"] == "canceled"
    assert canceled["cancellation_details"] == {"party": "refund_network", "reason": "insufficient_funds"}
    payment = client.get("paid").json()
    assert (payment["refunded_amount"]["value"], payment["refundable"]) == ("0.00", True)
    assert [entry.kind for entry in sandbox.provider.ledger()] == ["charge"]


def test_the_list_shows_the_youngest_first_and_is_narrowed_by_each_filter(
    client: BareClient, sandbox: Sandbox, sandbox_clock: SandboxClock
) -> None:
    sandbox_clock.set(NOON)
    for name in ("a", "b"):
        sandbox.provider.add_payment(id=name, created_at=NOON - timedelta(days=1))
    for minutes, name in ((3, "a"), (1, "b"), (2, "a")):
        sandbox.provider.refund(name, "1.00", at=NOON - timedelta(minutes=minutes))
    sandbox.provider.refund("b", "1.00", at=NOON, result="pending")
    shown = client.list("/refunds").json()["items"]
    assert [(item["payment_id"], item["created_at"][14:16]) for item in shown] == [
        ("b", "00"),
        ("b", "59"),
        ("a", "58"),
        ("a", "57"),
    ]
    assert refunds_of(client, payment_id="a") == [shown[2]["id"], shown[3]["id"]]
    assert refunds_of(client, status="pending") == [shown[0]["id"]]
    since = iso(NOON - timedelta(minutes=2))
    assert refunds_of(client, created_at__gte=since) == [item["id"] for item in shown[:3]]
    assert refunds_of(client, created_at__lt=since) == [shown[3]["id"]]
    assert [len(page) for page in client.scan("/refunds", limit="3")] == [3, 1]
    assert [len(page) for page in client.scan("/refunds", payment_id="a", limit="1")] == [1, 1]


@pytest.mark.parametrize(
    ("name", "value"),
    [("captured_at.gte", "2026-03-01T12:00:00Z"), ("payment_method", "cash"), ("status", "refunded"), ("limit", "0")],
)
def test_a_query_that_the_list_does_not_know_is_refused(client: BareClient, name: str, value: str) -> None:
    answer = client.send("GET", "/refunds", fields={name: value})
    assert (answer.status, answer.json()["parameter"]) == (400, name)


def test_a_cursor_of_one_list_does_not_lead_on_in_the_other_ones_filters(client: BareClient, sandbox: Sandbox) -> None:
    sandbox.provider.add_payments({"refunded_amount": "1.00"} for _ in range(3))
    cursor = client.list("/refunds", status="succeeded", limit="1").json()["next_cursor"]
    assert client.list("/refunds", status="pending", cursor=cursor).json()["parameter"] == "cursor"


def test_a_refund_that_was_put_in_as_history_is_in_the_list(client: BareClient, sandbox: Sandbox) -> None:
    sandbox.provider.add_payment(
        id="paid", created_at=NOON, refunded_amount="5.00", refunded_at=NOON + timedelta(days=2)
    )
    (item,) = client.list("/refunds", payment_id="paid").json()["items"]
    assert (item["amount"]["value"], item["created_at"]) == ("5.00", "2026-03-03T12:00:00.000Z")


def test_a_refund_that_is_not_there_is_404(client: BareClient) -> None:
    answer = client.get("nobody", "/refunds")
    assert (answer.status, answer.json()["parameter"]) == (404, "refund_id")


def test_the_official_sdk_reads_the_sandboxs_refunds(client: BareClient, sandbox: Sandbox) -> None:
    from yookassa.domain.response import RefundListResponse, RefundResponse

    sandbox.provider.add_payment(id="paid")
    told = RefundResponse(send(client, refund("paid", description="Why")).json())
    assert (told.status, told.payment_id, told.amount.value) == ("succeeded", "paid", Decimal("90.00"))
    assert [item.id for item in RefundListResponse(client.list("/refunds").json()).items] == [told.id]
