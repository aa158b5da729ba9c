"""/payment_methods and /me in the sandbox: methods bound without a payment, and what a shop may know of itself."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
import urllib3

from billing_orchestration.sandbox.provider.clock import SandboxClock
from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration_tests.sandbox.bare_client import BareClient, charge

NOON = datetime(2026, 3, 1, 12, 0, 0, tzinfo=timezone.utc)
REDIRECT = {"type": "redirect", "return_url": "https://service.invalid/cards"}


def bind(client: BareClient, key: str = "bind-1", **changes: Any) -> urllib3.BaseHTTPResponse:
    body = {"type": "bank_card", "confirmation": REDIRECT, **changes}
    return client.post({name: value for name, value in body.items() if value is not ...}, key, "/payment_methods")


def test_a_card_bound_without_a_payment_is_chargeable_once_its_owner_has_confirmed(
    client: BareClient, sandbox: Sandbox
) -> None:
    answer = bind(client, metadata={"user_id": "u"})
    assert answer.status == 200
    pending = answer.json()
    assert pending["confirmation"].pop("confirmation_url").startswith("https://")
    assert (
        pending
        | {
            "type": "bank_card",
            "saved": False,
            "status": "pending",
            "holder": {"account_id": sandbox.shop_id, "gateway_id": "1" + sandbox.shop_id},
            "confirmation": REDIRECT,
            "metadata": {"user_id": "u"},
        }
        == pending
    )
    refused = client.post(charge(pending["id"]), "1")
    assert (refused.status, refused.json()["parameter"]) == (400, "payment_method_id")
    sandbox.provider.activate_method(pending["id"])
    active = client.get(pending["id"], "/payment_methods").json()
    assert (active["saved"], active["status"], "confirmation" in active) == (True, "active", False)
    payment = client.post(charge(pending["id"]), "2").json()
    assert payment["status"] == "succeeded"
    assert payment["payment_method"]["id"] == pending["id"] != payment["id"]
    assert client.get(pending["id"]).status == 404


def test_a_key_protects_a_binding(client: BareClient, sandbox: Sandbox) -> None:
    first = bind(client).json()
    assert bind(client).json() == first
    assert bind(client, "bind-2").json()["id"] != first["id"]
    sandbox.provider.switches.replay = "current"
    sandbox.provider.activate_method(first["id"])
    assert bind(client).json()["status"] == "active"


def test_a_binding_that_nobody_confirms_becomes_inactive(
    client: BareClient, sandbox: Sandbox, sandbox_clock: SandboxClock
) -> None:
    sandbox_clock.set(NOON)
    method_id = bind(client).json()["id"]
    sandbox_clock.advance(timedelta(minutes=61))
    gone = client.get(method_id, "/payment_methods").json()
    assert (gone["saved"], gone["status"]) == (False, "inactive")
    with pytest.raises(ValueError, match="is inactive"):
        sandbox.provider.activate_method(method_id)


@pytest.mark.parametrize("status", ["pending", "inactive"])
def test_a_method_that_is_not_active_is_refused_by_its_id_and_moves_nothing(
    client: BareClient, sandbox: Sandbox, status: str
) -> None:
    sandbox.provider.add_method("method-1", status=status)
    answer = client.post(charge())
    error = answer.json()
    assert (answer.status, error["code"], error["parameter"]) == (400, "invalid_request", "payment_method_id")
    assert sandbox.provider.payments() == []


def test_an_active_method_can_become_inactive(client: BareClient, sandbox: Sandbox) -> None:
    paid = client.post(charge(), "1").json()
    sandbox.provider.deactivate_method("method-1")
    assert client.get("method-1", "/payment_methods").json()["status"] == "inactive"
    assert client.post(charge(), "2").status == 400
    assert client.get(paid["id"]).json() == paid


def test_an_sbp_account_is_bound_by_qr_code_and_tells_its_bank(client: BareClient, sandbox: Sandbox) -> None:
    pending = bind(client, type="sbp", confirmation={"type": "qr"}).json()
    assert pending["confirmation"]["type"] == "qr"
    assert pending["confirmation"]["confirmation_data"]
    sandbox.provider.activate_method(pending["id"])
    assert client.get(pending["id"], "/payment_methods").json()["payer_bank_details"]["bank_id"]


@pytest.mark.parametrize(
    ("change", "parameter"),
    [
        ({"type": ...}, "type"),
        ({"type": "yoo_money"}, "type"),
        ({"card": {"number": "5555555555554444"}}, "card"),
        ({"confirmation": ...}, "confirmation.type"),
        ({"confirmation": {"type": "qr"}}, "confirmation.type"),
        ({"confirmation": {"type": "redirect"}}, "confirmation.return_url"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"save": True}, "save"),
    ],
)
def test_a_binding_that_the_api_does_not_know_is_refused(
    client: BareClient, sandbox: Sandbox, change: dict[str, Any], parameter: str
) -> None:
    before = sandbox.provider.methods()
    answer = bind(client, **change)
    assert (answer.status, answer.json()["parameter"]) == (400, parameter)
    assert sandbox.provider.methods() == before


def test_a_payment_tells_whether_it_saved_its_method(client: BareClient, sandbox: Sandbox) -> None:
    saving, plain = sandbox.provider.purchase("9.00", save_method=True), sandbox.provider.purchase("9.00")

    def told() -> list[tuple[bool, str]]:
        shown = [client.get(payment.id).json()["payment_method"] for payment in (saving, plain)]
        return [(method["saved"], method["status"]) for method in shown]

    assert told() == [(False, "pending"), (False, "inactive")]
    for payment in (saving, plain):
        sandbox.provider.pay(payment.id)
    assert told() == [(True, "active"), (False, "inactive")]
    assert client.get(saving.id, "/payment_methods").json()["saved"] is True
    missing = client.get(plain.id, "/payment_methods")
    assert (missing.status, missing.json()["parameter"]) == (404, "payment_method_id")


# ------------------------------------------------------------------------------------------------ GET /me


def test_a_shop_reads_whether_it_fiscalises(client: BareClient, sandbox: Sandbox) -> None:
    def told() -> tuple[Any, Any]:
        me = client.send("GET", "/me").json()
        return me.get("fiscalization"), me["fiscalization_enabled"]

    assert told() == ({"enabled": False, "provider": "atol"}, False)
    sandbox.provider.switches.receipts = "demanded"
    assert told() == ({"enabled": True, "provider": "atol"}, True)
    sandbox.reset()
    sandbox.provider.switches.fiscalization_provider = None
    assert told() == (None, False)


def test_a_shop_tells_its_id_and_whether_it_is_a_test(client: BareClient, sandbox: Sandbox) -> None:
    me = client.send("GET", "/me").json()
    assert (me["account_id"], me["status"], me["test"]) == (sandbox.shop_id, "enabled", True)


def test_a_shop_may_not_be_allowed_to_read_itself(client: BareClient, sandbox: Sandbox) -> None:
    sandbox.provider.switches.me_forbidden = True
    answer = client.send("GET", "/me")
    assert (answer.status, answer.json()["code"]) == (403, "forbidden")
    assert client.list().status == 200
