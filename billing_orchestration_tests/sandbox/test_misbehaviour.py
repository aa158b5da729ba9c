"""How the sandbox misbehaves: each kind seen on the wire, and on the right side of the charge."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from typing import Any

import pytest
import urllib3
from urllib3.exceptions import ProtocolError, ReadTimeoutError

from billing_orchestration.sandbox.provider.clock import SandboxClock
from billing_orchestration.sandbox.provider.server import Sandbox, running_sandbox
from billing_orchestration_tests.sandbox.bare_client import BareClient, charge
from billing_orchestration_tests.waiting import wait_until

BEFORE_AND_AFTER = pytest.mark.parametrize(("side", "entries"), [("before", 0), ("after", 1)])

WAIT_S = 20.0


def error_below(raised: pytest.ExceptionInfo[ProtocolError]) -> str:
    return type(raised.value.args[1]).__name__


@BEFORE_AND_AFTER
def test_a_cut_closes_the_connection_without_a_byte(
    client: BareClient, sandbox: Sandbox, side: str, entries: int
) -> None:
    rule = sandbox.misbehave("create", f"cut_{side}")
    with pytest.raises(ProtocolError) as raised:
        client.post(charge())
    assert error_below(raised) == "RemoteDisconnected"
    assert (len(sandbox.provider.ledger()), rule.fired) == (entries, 1)
    assert client.post(charge()).status == 200
    assert len(sandbox.provider.ledger()) == 1


@BEFORE_AND_AFTER
def test_a_reset_is_a_tcp_reset(client: BareClient, sandbox: Sandbox, side: str, entries: int) -> None:
    sandbox.misbehave("create", f"reset_{side}")
    with pytest.raises(ProtocolError) as raised:
        client.post(charge())
    assert error_below(raised) == "ConnectionResetError"
    assert len(sandbox.provider.ledger()) == entries


@pytest.mark.parametrize(
    ("kind", "how", "status", "shown"),
    [
        ("error", {}, 500, b'"code": "internal_server_error"'),
        ("processing", {}, 202, b'"type":"processing"'),
        *(("html", {"status": status}, status, b"<html>") for status in (200, 429, 500, 502)),
        ("body", {"status": 200, "body": ""}, 200, b""),
    ],
)
@BEFORE_AND_AFTER
def test_another_answer_says_nothing_about_the_charge(
    client: BareClient, sandbox: Sandbox, side: str, entries: int, kind: str, how: dict[str, Any], status: int,
    shown: bytes,
) -> None:  # fmt: skip
    sandbox.misbehave("create", f"{kind}_{side}", **how)
    answer = client.post(charge())
    assert answer.status == status
    assert shown in answer.data
    assert answer.headers["content-type"].startswith("text/html" if kind == "html" else "application/json")
    assert len(sandbox.provider.ledger()) == entries


@BEFORE_AND_AFTER
def test_silence_lasts_until_the_client_gives_up(client: BareClient, sandbox: Sandbox, side: str, entries: int) -> None:
    sandbox.misbehave("create", f"silence_{side}")
    impatient = BareClient(sandbox, timeout_s=0.3)
    with pytest.raises(ReadTimeoutError):
        impatient.post(charge())
    assert len(sandbox.provider.ledger()) == entries
    wait_until(lambda: sandbox.api.in_flight == 0)


@BEFORE_AND_AFTER
def test_silence_can_end_by_itself_without_an_answer(
    client: BareClient, sandbox: Sandbox, side: str, entries: int
) -> None:
    sandbox.misbehave("create", f"silence_{side}", seconds=0.05)
    with pytest.raises(ProtocolError):
        client.post(charge())
    assert len(sandbox.provider.ledger()) == entries


def test_whoever_is_kept_waiting_is_let_go_when_the_sandbox_behaves_again(client: BareClient, sandbox: Sandbox) -> None:
    sandbox.misbehave("create", "silence_before")
    failures: list[Exception] = []

    def wait() -> None:
        try:
            client.post(charge())
        except ProtocolError as error:
            failures.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    wait_until(lambda: sandbox.api.in_flight == 1)
    sandbox.behave()
    waiting.join(WAIT_S)
    assert len(failures) == 1


def test_a_delayed_charge_is_executed_after_its_client_has_gone(client: BareClient, sandbox: Sandbox) -> None:
    sandbox.misbehave("create", "none", delay_s=3600)
    with pytest.raises(ReadTimeoutError):
        BareClient(sandbox, timeout_s=0.1).post(charge())
    wait_until(lambda: sandbox.count("create") == 1)
    assert sandbox.provider.ledger() == []
    sandbox.behave()
    wait_until(lambda: len(sandbox.provider.ledger()) == 1)


def test_a_delayed_charge_does_not_reach_the_books_of_the_next_test(client: BareClient, sandbox: Sandbox) -> None:
    sandbox.misbehave("create", "none", delay_s=3600)
    with pytest.raises(ReadTimeoutError):
        BareClient(sandbox, timeout_s=0.1).post(charge())
    wait_until(lambda: sandbox.count("create") == 1)
    sandbox.reset()
    sandbox.provider.add_method("method-1")
    wait_until(lambda: sandbox.api.in_flight == 0)
    assert sandbox.provider.ledger() == []


@pytest.mark.parametrize("retry_after_s", [None, 3])
def test_a_429_may_say_when_to_come_back(client: BareClient, sandbox: Sandbox, retry_after_s: int | None) -> None:
    sandbox.misbehave("any", "too_many_requests", retry_after_s=retry_after_s)
    answer = client.list()
    assert (answer.status, answer.json()["code"]) == (429, "too_many_requests")
    assert answer.headers.get("retry-after") == (None if retry_after_s is None else "3")
    assert answer.json().get("retry_after") == (None if retry_after_s is None else 3000)


@pytest.mark.parametrize(("effect", "status"), [("forbidden", 403), ("invalid_credentials", 401)])
def test_rights_can_be_lost_in_the_middle(client: BareClient, sandbox: Sandbox, effect: str, status: int) -> None:
    sandbox.misbehave("create", effect, skip=1)
    assert [client.post(charge(), f"k{n}").status for n in range(3)] == [200, status, 200]
    assert len(sandbox.provider.ledger()) == 2


def test_a_truncated_answer_promises_more_than_it_holds(client: BareClient, sandbox: Sandbox) -> None:
    sandbox.misbehave("create", "truncated")
    with pytest.raises(ProtocolError) as raised:
        client.post(charge())
    below = raised.value.args[1]
    assert isinstance(below, http.client.IncompleteRead)
    assert below.expected
    assert below.expected > 0
    assert len(sandbox.provider.ledger()) == 1


def test_a_dripping_answer_arrives_whole_although_each_wait_is_short(client: BareClient, sandbox: Sandbox) -> None:
    sandbox.misbehave("create", "drip", seconds=0.5)
    answer = BareClient(sandbox, timeout_s=5).post(charge())
    assert answer.json() == client.post(charge()).json()


def test_an_answer_can_be_changed_by_path_and_in_python(client: BareClient, sandbox: Sandbox) -> None:
    sandbox.misbehave("create", "change", set={"amount.value": "1.00", "status": "strange"}, remove=["payment_method"])
    payment = client.post(charge(), "1").json()
    assert (payment["amount"]["value"], payment["status"]) == ("1.00", "strange")
    assert "payment_method" not in payment
    assert client.get(payment["id"]).json()["amount"]["value"] == "990.00"
    client.post(charge(), "2")

    def swap(page: Any) -> Any:
        page["items"].reverse()
        return page

    sandbox.misbehave("list", "change", set={"items.*.metadata": None, "items.0.id": "other"}, remove=["items.1.test"])
    sandbox.misbehave("list", "change", transform=swap)
    first, second = client.list().json()["items"]
    assert (first["id"], first["metadata"], second["metadata"]) == ("other", None, None)
    assert "test" not in second
    assert client.list().json()["items"] == client.list().json()["items"][::-1]


def test_a_duplicate_delivery_charges_once(client: BareClient, sandbox: Sandbox) -> None:
    sandbox.misbehave("create", "duplicate")
    answer = client.post(charge())
    assert answer.status == 200
    assert len(sandbox.provider.ledger()) == 1


@pytest.mark.parametrize("effect", ["none", "html_before", "error_after", "too_many_requests", "invalid_credentials"])
def test_every_answer_carries_the_sandboxs_own_time(
    client: BareClient, sandbox: Sandbox, sandbox_clock: SandboxClock, effect: str
) -> None:
    sandbox_clock.set("2026-01-31T09:00:00.999Z")
    sandbox.misbehave("any", effect)
    assert client.post(charge()).headers["date"] == "Sat, 31 Jan 2026 09:00:00 GMT"
    assert client.http.request("GET", sandbox.url + "/nowhere").headers["date"] == "Sat, 31 Jan 2026 09:00:00 GMT"
    sandbox.provider.switches.date_header = False
    assert "date" not in client.list().headers


# ------------------------------------------------------------------------------------------------ which occurrence


@pytest.mark.parametrize(
    ("how", "fires"),
    [
        ({}, [0]),
        ({"times": 3}, [0, 1, 2]),
        ({"times": None}, [0, 1, 2, 3, 4, 5]),
        ({"skip": 2}, [2]),
        ({"skip": 1, "times": 2}, [1, 2]),
        ({"every": 2, "times": None}, [1, 3, 5]),
        ({"every": 3, "skip": 1, "times": None}, [3]),
    ],
)
def test_a_rule_says_which_occurrences(
    client: BareClient, sandbox: Sandbox, how: dict[str, Any], fires: list[int]
) -> None:
    sandbox.misbehave("list", "error_before", **how)
    assert [n for n in range(6) if client.list().status == 500] == fires


def test_a_rule_can_break_a_scan_off_at_its_nth_page(client: BareClient, sandbox: Sandbox) -> None:
    sandbox.provider.add_payments({} for _ in range(10))
    sandbox.misbehave("list", "error_before", page=3, times=None)
    cursor: dict[str, str] = {}
    for status in (200, 200, 500):
        answer = client.list(limit="2", **cursor)
        assert answer.status == status
        cursor = {"cursor": answer.json().get("next_cursor", "")}


def test_a_rule_can_be_meant_for_one_call_method_key_payment_or_subscription(
    client: BareClient, sandbox: Sandbox
) -> None:
    sandbox.provider.add_method("method-2")
    for how in (
        {"payment_method_id": "method-2"},
        {"idempotence_key": "special"},
        {"metadata": {"subscription_id": "8"}},
    ):
        sandbox.misbehave("create", "error_before", **how)
    assert client.list().status == 200
    assert client.post(charge(), "1").status == 200
    assert client.post(charge("method-2"), "2").status == 500
    assert client.post(charge(), "special").status == 500
    assert client.post(charge(metadata={"subscription_id": "8"}), "3").status == 500
    payment_id = client.post(charge(), "4").json()["id"]
    sandbox.misbehave("get", "error_before", payment_id=payment_id)
    assert client.get("another").status == 404
    assert client.get(payment_id).status == 500


def test_rules_act_in_their_order_one_for_each_call(client: BareClient, sandbox: Sandbox) -> None:
    sandbox.misbehave("create", "error_after")
    sandbox.misbehave("create", "processing_after")
    assert [client.post(charge()).status for _ in range(3)] == [500, 202, 200]
    assert len(sandbox.provider.ledger()) == 1


@pytest.mark.parametrize("rule", [{"call": "put"}, {"effect": "explode"}, {"every": 0}, {"times": 0}, {"skip": -1}])
def test_a_rule_that_means_nothing_is_refused(sandbox: Sandbox, rule: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"none of|at least"):
        sandbox.misbehave(**{"call": "any", "effect": "none", **rule})


# ------------------------------------------------------------------------------------------------ what was seen


def test_the_sandbox_tells_what_arrived_and_what_it_answered(client: BareClient, sandbox: Sandbox) -> None:
    client.post(charge(), "key-1")
    client.list(status="succeeded")
    sandbox.misbehave("get", "cut_before")
    with pytest.raises(ProtocolError):
        client.get("x")
    create, listed, got = sandbox.requests
    assert (create.call, create.idempotence_key, create.json(), create.status) == ("create", "key-1", charge(), 200)
    assert (listed.call, listed.query, listed.status) == ("list", [("status", "succeeded")], 200)
    assert (got.call, got.path, got.status, got.effect) == ("get", "/payments/x", None, "cut_before")
    assert [sandbox.count(name) for name in ("create", "list", "get", None)] == [1, 1, 1, 3]


def test_the_sandbox_tells_how_many_requests_ran_at_once(client: BareClient, sandbox: Sandbox) -> None:
    sandbox.misbehave("list", "none", delay_s=3600, times=None)
    threads = [threading.Thread(target=client.list) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: sandbox.api.in_flight == 4)
    sandbox.behave()
    for thread in threads:
        thread.join(WAIT_S)
    client.list()
    assert sandbox.peak_in_flight == 4


def test_a_connection_is_kept_for_the_next_request(client: BareClient, sandbox: Sandbox) -> None:
    client.list()
    opened = sandbox.api.connections_opened
    for _ in range(3):
        client.list()
    assert sandbox.api.connections_opened == opened


def test_a_sandbox_that_is_stopped_refuses_connections_even_while_it_keeps_someone_waiting() -> None:
    with running_sandbox() as own:
        own.misbehave("any", "silence_before", times=None)
        waiting = socket.create_connection((own.host, own.port))
        waiting.sendall(b"GET /v3/payments HTTP/1.1\r\nHost: sandbox\r\n\r\n")
        wait_until(lambda: own.api.in_flight == 1)
    with waiting:
        waiting.settimeout(WAIT_S)
        with contextlib.suppress(ConnectionResetError):
            assert waiting.recv(1) == b""
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((own.host, own.port), timeout=WAIT_S)


def test_two_sandboxes_in_one_process_keep_their_books_apart() -> None:
    with running_sandbox() as one, running_sandbox(shop_id="2", secret_key="live_2") as two:
        for each in (one, two):
            each.provider.add_method("method-1")
        assert BareClient(two).post(charge()).status == 200
        assert (len(one.provider.ledger()), len(two.provider.ledger())) == (0, 1)
        wrong = urllib3.make_headers(basic_auth="100500:test_sandbox")
        assert urllib3.request("GET", two.url + "/payments", headers=wrong, retries=False).status == 401
