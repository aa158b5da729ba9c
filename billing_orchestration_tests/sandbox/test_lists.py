"""GET /payments in the sandbox: filters, order, cursors, history, lag."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from billing_orchestration.sandbox.provider.clock import SandboxClock, iso
from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration_tests.sandbox.bare_client import BareClient, charge

NOON = datetime(2026, 3, 1, 12, 0, 0, tzinfo=timezone.utc)


def minutes(count: float) -> timedelta:
    return timedelta(minutes=count)


@pytest.fixture
def at_noon(sandbox: Sandbox, sandbox_clock: SandboxClock) -> Sandbox:
    sandbox_clock.set(NOON)
    return sandbox


def ids(answer: Any) -> list[str]:
    return [item["id"] for item in answer.json()["items"]]


def test_a_list_shows_the_youngest_ten_first(client: BareClient, at_noon: Sandbox) -> None:
    at_noon.provider.add_payments({"id": f"p{n}", "created_at": NOON - minutes(n)} for n in (5, 2, 11, 9, 1))
    at_noon.provider.add_payments({"id": f"p{n}", "created_at": NOON - minutes(n)} for n in (8, 3, 4, 10, 7, 6))
    page = client.list().json()
    assert [item["id"] for item in page["items"]] == [f"p{n}" for n in range(1, 11)]
    assert page["type"] == "list"
    assert [item["id"] for item in client.list(cursor=page["next_cursor"]).json()["items"]] == ["p11"]


def test_the_end_is_where_next_cursor_is_absent(client: BareClient, at_noon: Sandbox) -> None:
    assert client.list().json() == {"type": "list", "items": []}
    at_noon.provider.add_payments({"created_at": NOON - minutes(n)} for n in range(4))
    assert "next_cursor" not in client.list(limit="4").json()
    assert [len(page) for page in client.scan(limit="2")] == [2, 2]
    assert [len(page) for page in client.scan(limit="3")] == [3, 1]


@pytest.mark.parametrize("filters", [{}, {"captured_at.gte": "2026-01-01T00:00:00Z"}])
def test_payments_that_arrive_between_pages_shift_nothing(
    client: BareClient, at_noon: Sandbox, filters: dict[str, str]
) -> None:
    at_noon.provider.add_payments({"id": f"old-{n}", "created_at": NOON - minutes(10)} for n in range(6))
    filters = {name.replace(".", "__"): value for name, value in filters.items()}
    first = client.list(limit="3", **filters).json()
    at_noon.provider.add_payment(id="new", created_at=NOON)
    at_noon.provider.add_payment(id="backdated", created_at=NOON - minutes(20))
    second = client.list(limit="3", cursor=first["next_cursor"], **filters).json()
    third = client.list(limit="3", cursor=second["next_cursor"], **filters).json()
    seen = [item["id"] for page in (first, second, third) for item in page["items"]]
    assert seen == [f"old-{n}" for n in (5, 4, 3, 2, 1, 0)] + ["backdated"]


@pytest.mark.parametrize(
    ("bound", "shown"),
    [("gte", {"at", "after"}), ("gt", {"after"}), ("lte", {"before", "at"}), ("lt", {"before"})],
)
@pytest.mark.parametrize("name", ["created_at", "captured_at"])
def test_each_bound_is_exact_to_the_millisecond(
    client: BareClient, at_noon: Sandbox, name: str, bound: str, shown: set[str]
) -> None:
    instant = NOON - minutes(30)
    step = timedelta(milliseconds=1)
    for payment_id, at in (("before", instant - step), ("at", instant), ("after", instant + step)):
        created = at if name == "created_at" else NOON - minutes(45)
        at_noon.provider.add_payment(id=payment_id, created_at=created, captured_at=at)
    answer = client.send("GET", "/payments", fields={f"{name}.{bound}": iso(instant)})
    assert set(ids(answer)) == shown


def test_a_card_paid_in_its_59th_minute_is_found_by_when_it_was_captured(client: BareClient, at_noon: Sandbox) -> None:
    at_noon.provider.add_payment(id="late", created_at=NOON - minutes(70), captured_at=NOON - minutes(11))
    at_noon.provider.add_payment(id="young", created_at=NOON - minutes(5), captured_at=NOON - minutes(5))
    since = iso(NOON - minutes(60))
    assert ids(client.list(created_at__gte=since)) == ["young"]
    assert ids(client.list(captured_at__gte=since)) == ["young", "late"]
    assert ids(client.list(captured_at__gte=since, created_at__lt=since)) == ["late"]


@pytest.mark.parametrize(("order", "expected"), [("created_at", ["b", "a"]), ("captured_at", ["a", "b"])])
def test_the_order_of_a_list_by_capture_is_a_switch(
    client: BareClient, at_noon: Sandbox, order: str, expected: list[str]
) -> None:
    at_noon.provider.switches.captured_order = order
    at_noon.provider.add_payment(id="a", created_at=NOON - minutes(50), captured_at=NOON - minutes(1))
    at_noon.provider.add_payment(id="b", created_at=NOON - minutes(40), captured_at=NOON - minutes(30))
    since = iso(NOON - minutes(60))
    pages = client.scan(captured_at__gte=since, limit="1")
    assert [item["id"] for page in pages for item in page] == expected


def test_status_and_method_narrow_a_list(client: BareClient, at_noon: Sandbox) -> None:
    at_noon.provider.add_payment(id="paid", status="succeeded", method_type="sbp")
    at_noon.provider.add_payment(id="open", status="pending", method_type="cash")
    at_noon.provider.add_payment(id="held", status="waiting_for_capture")
    at_noon.provider.add_payment(id="gone", status="canceled")
    assert ids(client.list(status="succeeded")) == ["paid"]
    assert ids(client.list(status="pending")) == ["open"]
    assert ids(client.list(status="waiting_for_capture")) == ["held"]
    assert ids(client.list(status="canceled")) == ["gone"]
    assert ids(client.list(payment_method="bank_card")) == ["gone", "held"]
    assert ids(client.list(payment_method="sbp", status="pending")) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("limit", "0"),
        ("limit", "101"),
        ("limit", "-1"),
        ("limit", "ten"),
        ("limit", ""),
        ("status", "SUCCEEDED"),
        ("status", "paid"),
        ("payment_method", "BANK_CARD"),
        ("created_at.gte", "2026-03-01"),
        ("created_at.gte", "2026-03-01T12:00:00"),
        ("created_at.gte", "2026-03-01 12:00:00Z"),
        ("created_at.gte", "2026-03-01T12:00:00.000000Z"),
        ("created_at.gte", "2026-13-01T12:00:00Z"),
        ("created_at.gte", "0001-01-01T00:00:00+14:00"),
        ("captured_at.lt", "now"),
        ("cursor", "made-up"),
        ("cursor", ""),
        ("created_at", "2026-03-01T12:00:00Z"),
        ("created_at.ge", "2026-03-01T12:00:00Z"),
        ("metadata", "x"),
    ],
)
def test_a_query_that_the_api_does_not_know_is_refused(
    client: BareClient, sandbox: Sandbox, name: str, value: str
) -> None:
    answer = client.send("GET", "/payments", fields={name: value})
    error = answer.json()
    assert (answer.status, error["code"], error["parameter"]) == (400, "invalid_request", name)


def test_a_parameter_given_twice_is_refused(client: BareClient) -> None:
    answer = client.send("GET", "/payments?status=pending&status=succeeded")
    assert (answer.status, answer.json()["parameter"]) == (400, "status")


def test_a_plus_that_was_not_encoded_is_no_time_zone(client: BareClient, at_noon: Sandbox) -> None:
    at_noon.provider.add_payment(created_at=NOON)
    raw = client.send("GET", "/payments?created_at.gte=2026-03-01T00:00:00.000+00:00")
    assert (raw.status, raw.json()["parameter"]) == (400, "created_at.gte")
    encoded = client.list(created_at__gte="2026-03-01T03:00:00.000+03:00")
    assert len(ids(encoded)) == 1


def test_a_cursor_belongs_to_its_filters(client: BareClient, at_noon: Sandbox) -> None:
    at_noon.provider.add_payments({"created_at": NOON} for _ in range(5))
    cursor = client.list(status="succeeded", limit="2").json()["next_cursor"]
    for filters in ({}, {"status": "pending"}):
        answer = client.list(cursor=cursor, **filters)
        assert (answer.status, answer.json()["parameter"]) == (400, "cursor")
    assert len(ids(client.list(cursor=cursor, status="succeeded", limit="3"))) == 3


def test_the_history_reaches_back_three_years(client: BareClient, at_noon: Sandbox) -> None:
    at_noon.provider.add_payment(id="kept", created_at=NOON - timedelta(days=1094))
    at_noon.provider.add_payment(id="over", created_at=NOON - timedelta(days=1096))
    assert ids(client.list()) == ["kept"]
    assert ids(client.list(captured_at__gte="2020-01-01T00:00:00Z")) == ["kept"]


def test_with_lag_a_payment_enters_the_list_later_and_is_there_by_its_id_at_once(
    client: BareClient, at_noon: Sandbox, sandbox_clock: SandboxClock
) -> None:
    at_noon.provider.switches.list_lag_s = 30
    payment = client.post(charge()).json()
    sandbox_clock.advance(29)
    assert ids(client.list()) == []
    assert client.get(payment["id"]).status == 200
    sandbox_clock.advance(1)
    assert ids(client.list()) == [payment["id"]]


def test_with_lag_a_late_capture_is_listed_late_too(
    client: BareClient, at_noon: Sandbox, sandbox_clock: SandboxClock
) -> None:
    at_noon.provider.switches.list_lag_s = 30
    bought = at_noon.provider.purchase("10.00", created_at=NOON - minutes(50))
    at_noon.provider.pay(bought.id)
    assert ids(client.list(status="succeeded")) == []
    sandbox_clock.advance(30)
    assert ids(client.list(status="succeeded")) == [bought.id]


def test_odd_items_are_shown_as_they_were_put_in(client: BareClient, at_noon: Sandbox) -> None:
    at_noon.provider.add_payment(created_at=NOON - minutes(1), override={"amount": None, "status": "strange"})
    at_noon.provider.add_payment(created_at=NOON - minutes(2), without=["payment_method", "metadata"])
    at_noon.provider.add_payment(created_at=NOON - minutes(3), raw={"nothing": ["of", "the", "kind"]})
    nulled, bare, raw = client.list(status="succeeded").json()["items"]
    assert (nulled["amount"], nulled["status"]) == (None, "strange")
    assert not {"payment_method", "metadata"} & bare.keys()
    assert raw == {"nothing": ["of", "the", "kind"]}


def test_history_is_in_the_ledger_but_is_no_charge_by_the_api(client: BareClient, sandbox: Sandbox) -> None:
    sandbox.provider.add_payment(amount="100.00", refunded_amount="40.00", saved=True, id="first")
    sandbox.provider.add_payment(amount="100.00", status="canceled")
    assert [(e.kind, str(e.amount)) for e in sandbox.provider.ledger()] == [("charge", "100.00"), ("refund", "40.00")]
    assert sandbox.provider.charges() == []
    assert client.post(charge("first")).status == 200


@pytest.mark.parametrize("fields", [{"id": "twice"}, {"amont": "1.00"}, {"created_at": "2026-03-01T12:00:00"}])
def test_history_that_makes_no_sense_is_refused(sandbox: Sandbox, fields: dict[str, Any]) -> None:
    sandbox.provider.add_payment(id="twice")
    with pytest.raises(ValueError, match=r"already|no field|time zone"):
        sandbox.provider.add_payment(**fields)
    assert [payment.id for payment in sandbox.provider.payments()] == ["twice"]


def test_every_payment_of_a_large_history_is_listed_once(client: BareClient, at_noon: Sandbox) -> None:
    # Many payments share a millisecond: the cursor must not depend on instants alone.
    at_noon.provider.add_payments(
        {"created_at": NOON - timedelta(milliseconds=(n * 7919) % 997), "status": "canceled" if n % 3 else "succeeded"}
        for n in range(30_000)
    )
    for filters in ({"status": "succeeded"}, {"captured_at__gt": iso(NOON - minutes(60))}):
        items = [item for page in client.scan(limit="100", **filters) for item in page]
        assert len({item["id"] for item in items}) == len(items) == 10_000
        instants = [item["created_at"] for item in items]
        assert instants == sorted(instants, reverse=True)
