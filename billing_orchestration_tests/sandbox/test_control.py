"""The sandbox as a process of its own: its command, the strings to pull over HTTP, and its books in a file."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import urllib3

from billing_orchestration.sandbox.provider.account import SandboxProvider
from billing_orchestration.sandbox.provider.clock import SandboxClock
from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration_tests.sandbox.bare_client import BareClient, charge

SERVE = """
import sys, pathlib
from billing_orchestration.sandbox.provider.server import serve
serve(port=0, shop_id="42", secret_key="live_42", state_file=pathlib.Path(sys.argv[1]))
"""


def order(sandbox_url: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    if body is None and method == "POST":
        body = {}
    answer = urllib3.request(method, sandbox_url + path, json=body, retries=False, timeout=20)
    return answer.status, answer.json()


@contextmanager
def sandbox_process(state: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    with subprocess.Popen(
        [sys.executable, "-c", SERVE, str(state)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line.startswith("Sandbox provider: http://127.0.0.1:"), line
            assert line.endswith("/v3 (shop 42)\n")
            yield line.split()[2], process
        finally:
            process.kill()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_sandbox_that_is_started_again_knows_what_it_knew(tmp_path: Path, stop: signal.Signals) -> None:
    state = tmp_path / "books" / "sandbox.json"
    headers = {
        **urllib3.make_headers(basic_auth="42:live_42"),
        "Content-Type": "application/json",
        "Idempotence-Key": "key-1",
    }
    with sandbox_process(state) as (url, process):
        control = url.replace("/v3", "/sandbox")
        order(control, "POST", "/methods", {"id": "method-1", "script": ["canceled:card_expired", "succeeded"]})
        order(control, "POST", "/payments", {"id": "old", "created_at": "2026-01-01T00:00:00Z", "saved": True})
        first = urllib3.request("POST", url + "/payments", body=json.dumps(charge()), headers=headers).json()
        process.send_signal(stop)
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    with sandbox_process(state) as (url, process):
        control = url.replace("/v3", "/sandbox")
        again = urllib3.request("POST", url + "/payments", body=json.dumps(charge()), headers=headers).json()
        assert again == first
        headers["Idempotence-Key"] = "key-2"
        urllib3.request("POST", url + "/payments", body=json.dumps(charge()), headers=headers)
        _, ledger = order(control, "GET", "/ledger")
        assert [(entry["payment_id"] == "old", entry["idempotence_key"]) for entry in ledger] == [
            (True, None),
            (False, "key-2"),
        ]


def test_a_state_file_holds_everything(tmp_path: Path) -> None:
    clock = SandboxClock(datetime(2026, 3, 1, tzinfo=timezone.utc))
    before = SandboxProvider(clock=clock)
    before.add_method("m", ["pending:succeeded:60", {"kind": "pending", "then": "canceled", "at": clock()}])
    body = json.dumps(charge("m")).encode()
    pending = json.loads(before.create_payment(body, "key-1").body)["id"]
    held = before.hold("5.00")
    before.refund(before.add_payment(amount="3.00", without=["test"], override={"x": None}).id, "1.00")
    binding = before.create_method(b'{"type": "sbp", "confirmation": {"type": "qr"}}', "key-2")
    waiting = before.add_payment(amount="4.00").id
    before.refund(waiting, result="pending:succeeded:60")
    before.save(tmp_path / "state.json")
    after = SandboxProvider(clock=clock)
    after.load(tmp_path / "state.json")
    assert [p.document() for p in after.payments()] == [p.document() for p in before.payments()]
    assert [r.document() for r in after.refunds()] == [r.document() for r in before.refunds()]
    assert after.ledger() == before.ledger()
    assert after.methods() == before.methods()
    assert after.known_keys() == ["key-1", "key-2"]
    assert after.get_method(json.loads(binding.body)["id"]).body == binding.body
    assert after.list_payments([]) == before.list_payments([])
    clock.advance(timedelta(days=7))
    assert after.payment(pending).status == "succeeded"
    assert after.payment(held.id).status == "canceled"
    assert [refund.status for refund in after.refunds(waiting)] == ["succeeded"]
    assert after.ledger() == before.ledger()


def test_the_control_api_fills_drives_and_reads_the_sandbox(client: BareClient, sandbox: Sandbox) -> None:
    control = sandbox.control_url
    assert order(control, "GET", "/health")[1]["status"] == "ok"
    status, ids = order(control, "POST", "/payments", [{"status": "pending", "amount": "5.00"}, {"amount": "6.00"}])
    assert status == 200
    assert order(control, "POST", f"/payments/{ids[0]}/pay")[1]["status"] == "succeeded"
    assert (
        order(control, "POST", f"/payments/{ids[1]}/refund", {"amount": "1.00"})[1]["refunded_amount"]["value"]
        == "1.00"
    )
    order(control, "POST", f"/payments/{ids[1]}/refund", {"amount": "2.00", "result": "pending"})
    refunds = order(control, "GET", "/refunds")[1]
    assert [refund["status"] for refund in refunds] == ["succeeded", "pending"]
    assert order(control, "POST", f"/refunds/{refunds[1]['id']}/cancel")[1]["status"] == "canceled"
    order(control, "POST", "/methods", {"id": "m", "status": "pending"})
    assert order(control, "POST", "/methods/m/activate")[1]["status"] == "active"
    assert order(control, "POST", "/methods/m/deactivate")[1]["status"] == "inactive"
    held = order(control, "POST", "/purchases", {"amount": "7.00", "hold": True})[1]
    assert order(control, "POST", f"/payments/{held['id']}/capture")[1]["status"] == "succeeded"
    bought = order(control, "POST", "/purchases", {"amount": "8.00"})[1]
    assert order(control, "POST", f"/payments/{bought['id']}/cancel")[1]["status"] == "canceled"
    moved = [(entry["kind"], entry["amount"]) for entry in order(control, "GET", "/ledger")[1]]
    assert moved == [("charge", "6.00"), ("charge", "5.00"), ("refund", "1.00"), ("charge", "7.00")]
    assert len(order(control, "GET", "/payments")[1]) == 4
    assert order(control, "GET", f"/payments/{ids[0]}")[1]["id"] == ids[0]


def test_the_control_api_sets_rules_the_clock_and_switches(client: BareClient, sandbox: Sandbox) -> None:
    control = sandbox.control_url
    order(control, "POST", "/misbehaviours", [{"call": "list", "effect": "error_before", "times": None}])
    assert client.list().status == 500
    assert order(control, "GET", "/misbehaviours")[1][0]["fired"] == 1
    order(control, "DELETE", "/misbehaviours")
    assert client.list().status == 200
    assert order(control, "POST", "/clock", {"at": "2026-03-01T12:00:00Z"})[1] == {"now": "2026-03-01T12:00:00.000Z"}
    order(control, "POST", "/clock", {"advance_s": 60})
    assert client.post(charge(), "key-1").json()["created_at"] == "2026-03-01T12:01:00.000Z"
    assert order(control, "POST", "/switches", {"receipts": "demanded"})[1]["receipts"] == "demanded"
    assert client.post(charge(), "key-2").status == 400
    assert order(control, "GET", "/requests")[1]["keys"] == {"key-1": 1, "key-2": 1}
    assert order(control, "GET", "/requests")[1]["counts"] == {"list": 2, "create": 2}
    order(control, "POST", "/reset")
    assert (sandbox.provider.ledger(), sandbox.count()) == ([], 0)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/methods", {"id": "m", "script": ["perhaps"]}),
        ("/payments", {"amont": "1.00"}),
        ("/payments/none/pay", {}),
        ("/payments/none/explode", {}),
        ("/methods", {"id": "m", "status": "perhaps"}),
        ("/methods/none/activate", {}),
        ("/methods/none/explode", {}),
        ("/refunds/none/succeed", {}),
        ("/refunds/none/explode", {}),
        ("/switches", {"refunds": "forbidden"}),
        ("/misbehaviours", {"effect": "explode"}),
        ("/misbehaviours", {"colour": "red"}),
        ("/switches", {"replay": "maybe"}),
        ("/switches", {"receipts": "perhaps"}),
        ("/switches", {"colour": "red"}),
        ("/clock", {"at": "2026-03-01T12:00:00"}),
    ],
)
def test_an_order_that_means_nothing_is_refused_with_the_reason(sandbox: Sandbox, path: str, body: Any) -> None:
    status, answer = order(sandbox.control_url, "POST", path, body)
    assert status == 400
    assert answer["error"]


@pytest.mark.parametrize("host", ["evil.example", "evil.localhost", "127.0.0.1.evil.example", "localhost."])
def test_the_controls_answer_to_no_name_of_another_machine(sandbox: Sandbox, host: str) -> None:
    sandbox.provider.add_payment(id="secret")
    headers = {"Host": f"{host}:{sandbox.port}"}
    for path in ("/payments", "/ledger"):
        answer = urllib3.request("GET", sandbox.control_url + path, headers=headers, retries=False)
        assert (answer.status, b"secret" in answer.data) == (403, False)


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "text/plain; application/json", "application/x-www-form-urlencoded"]
)
def test_an_order_in_a_form_that_any_web_page_can_send_is_refused(sandbox: Sandbox, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = urllib3.request(
        "POST", sandbox.control_url + "/payments", body=b'{"amount": "5.00"}', headers=headers, retries=False
    )
    assert answer.status == 415
    assert sandbox.provider.payments() == []


def test_the_sandbox_says_in_one_line_that_its_port_is_taken(sandbox: Sandbox) -> None:
    command = f"from billing_orchestration.sandbox.provider.server import serve; serve(port={sandbox.port})"
    ended = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert ended.stderr.strip() == (
        f"The sandbox cannot listen on 127.0.0.1:{sandbox.port}: Address already in use. Choose another --port."
    )
