"""What differs between shops of the sandbox's provider: their credentials, books, switches, rights and fees."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from billing_orchestration.sandbox.provider.account import SandboxProvider
from billing_orchestration.sandbox.provider.api import ProviderApi
from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration_tests.sandbox.bare_client import BareClient, charge
from billing_orchestration_tests.sandbox.test_control import order
from billing_orchestration_tests.waiting import wait_until

REDIRECT = {"type": "redirect", "return_url": "https://service.invalid/"}


@pytest.fixture
def second(sandbox: Sandbox) -> BareClient:
    """The client of a second shop under the same address."""
    shop = sandbox.add_shop("100501", "live_second")
    shop.add_method("method-1")
    return BareClient(sandbox, shop)


# ------------------------------------------------------------------------------------------------ several shops


def test_the_credentials_say_whose_books_a_request_is_for(
    client: BareClient, second: BareClient, sandbox: Sandbox
) -> None:
    mine, theirs = client.post(charge(), "same key").json(), second.post(charge(), "same key").json()
    assert (mine["recipient"]["account_id"], theirs["recipient"]["account_id"]) == (sandbox.shop_id, "100501")
    assert (mine["test"], theirs["test"]) == (True, False)
    for one, own, foreign in ((client, mine, theirs), (second, theirs, mine)):
        assert [item["id"] for item in one.list().json()["items"]] == [own["id"]]
        assert one.get(foreign["id"]).status == 404
        assert one.post({"payment_id": foreign["id"], "amount": foreign["amount"]}, "r", "/refunds").status == 400
    assert [len(shop.ledger()) for shop in sandbox.api.shops] == [1, 1]
    assert [request.shop_id for request in sandbox.requests[:2]] == [sandbox.shop_id, "100501"]


def test_a_method_of_another_shop_cannot_be_charged(second: BareClient, sandbox: Sandbox) -> None:
    sandbox.provider.add_method("only mine")
    assert second.post(charge("only mine")).json()["parameter"] == "payment_method_id"


def test_the_key_of_one_shop_with_the_id_of_another_is_wrong(second: BareClient, sandbox: Sandbox) -> None:
    mixed = BareClient(sandbox, SandboxProvider(shop_id="100501", secret_key=sandbox.secret_key))
    assert mixed.list().status == 401


def test_each_shop_has_switches_and_misbehaviours_of_its_own(
    client: BareClient, second: BareClient, sandbox: Sandbox
) -> None:
    second.shop.switches.receipts = "demanded"
    assert (client.post(charge(), "1").status, second.post(charge(), "1").status) == (200, 400)
    assert second.send("GET", "/me").json()["fiscalization_enabled"] is True
    assert client.send("GET", "/me").json()["fiscalization_enabled"] is False
    sandbox.misbehave("list", "error_before", shop_id="100501", times=None)
    assert (client.list().status, second.list().status) == (200, 500)


def test_a_key_that_is_worked_on_for_one_shop_does_not_hold_the_other_up(
    client: BareClient, second: BareClient, sandbox: Sandbox
) -> None:
    sandbox.provider.switches.processing_s = 3600
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(client.post, charge(), "same key")
        wait_until(lambda: sandbox.count("create") == 1)
        assert second.post(charge(), "same key").status == 200
        sandbox.behave()
        assert waiting.result().status == 200


def test_an_order_names_the_shop_that_it_is_for(client: BareClient, sandbox: Sandbox) -> None:
    control = sandbox.control_url
    assert order(control, "POST", "/shops", {"shop_id": "7", "secret_key": "live_7"})[1] == [
        {"shop_id": sandbox.shop_id, "test": True},
        {"shop_id": "7", "test": False},
    ]
    order(control, "POST", "/payments?shop=7", {"amount": "5.00"})
    assert len(order(control, "GET", "/ledger?shop=7")[1]) == 1
    assert order(control, "GET", "/ledger")[1] == []
    assert order(control, "GET", "/ledger?shop=8")[0] == 400
    assert order(control, "POST", "/shops", {"shop_id": "7", "secret_key": "other"})[0] == 400
    order(control, "POST", "/reset", {})
    assert len(order(control, "GET", "/shops")[1]) == 1


def test_a_state_file_holds_every_shop_and_its_switches(
    client: BareClient, second: BareClient, sandbox: Sandbox, tmp_path: Path
) -> None:
    second.shop.switches.receipts = "demanded"
    client.post(charge())
    sandbox.api.save(tmp_path / "state.json")
    after = ProviderApi(SandboxProvider())
    after.load(tmp_path / "state.json")
    assert [shop.document() for shop in after.shops] == [shop.document() for shop in sandbox.api.shops]


# ------------------------------------------------------------------------------------------------ rights and fees


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/payments", charge()),
        ("/payments", charge(payment_method_id=..., confirmation=REDIRECT, save_payment_method=True)),
        ("/payment_methods", {"type": "bank_card", "confirmation": REDIRECT}),
    ],
)
def test_a_shop_without_recurring_payments_neither_charges_nor_saves_a_method(
    client: BareClient, sandbox: Sandbox, path: str, body: Any
) -> None:
    sandbox.provider.switches.recurring = False
    answer = client.post(body, "1", path)
    assert (answer.status, answer.json()["code"]) == (403, "forbidden")
    assert answer.json()["description"] == (
        "This store can't make recurring payments. Contact the YooMoney manager to learn more"
    )
    assert sandbox.provider.payments() == []
    once = charge(payment_method_id=..., confirmation=REDIRECT)
    assert client.post(once, "2").json()["status"] == "pending"


@pytest.mark.parametrize(("fee", "income"), [(3.5, "955.35"), (2.8, "962.28"), (0, "990.00"), (None, None)])
def test_a_success_tells_what_the_shop_gets_if_the_provider_shows_it(
    client: BareClient, sandbox: Sandbox, fee: float | None, income: str | None
) -> None:
    sandbox.provider.switches.fee_percent = fee
    sandbox.provider.add_method("declined", "canceled:card_expired")
    paid = client.post(charge(), "1").json()
    assert paid.get("income_amount", {}).get("value") == income
    assert "income_amount" not in client.post(charge("declined"), "2").json()
    sandbox.provider.switches.fee_percent = 50
    assert client.get(paid["id"]).json() == paid


def test_one_off_payments_by_any_method_of_today_may_carry_no_metadata(client: BareClient, sandbox: Sandbox) -> None:
    bought = sandbox.provider.purchase("15.00", method_type="alfa_pay")
    sandbox.provider.pay(bought.id)
    (shown,) = client.list(payment_method="alfa_pay").json()["items"]
    assert (shown["metadata"], shown["payment_method"]["type"]) == ({}, "alfa_pay")
