"""Faults on the wire, against raw sockets: what each says about the money, and how often anything was sent."""

from __future__ import annotations

import gzip
import json
import logging
import socket
import ssl
import threading
import time
import traceback
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from billing_orchestration.domain.provider_payment import UnusablePayment
from billing_orchestration.provider.client import PaymentProvider, Timeouts
from billing_orchestration.provider.errors import (
    Forbidden,
    IncompleteSlice,
    NeverSent,
    OutcomeUnknown,
    PaymentNotFound,
    ProviderError,
    RateLimited,
    RequestRejected,
    StillProcessing,
    WrongCredentials,
)
from billing_orchestration.resources import connect_provider
from billing_orchestration.settings import Settings
from billing_orchestration_tests.provider.wire_server import (
    SECRET_KEY,
    SHOP_ID,
    Reaction,
    Request,
    WireServer,
    answer,
    error,
    half_of,
    hang_up,
    html,
    page,
    payment,
    reset,
    silence,
    wire_server,
)

BODY = '{"amount": {"value": "499.00", "currency": "RUB"},  "capture":true, "description": "Продление"}'
KEY = "5f1c6a54-6f6f-5b0e-9f0c-0123456789ab"
START = datetime(2026, 3, 1, 9, 0, tzinfo=timezone.utc)
END = datetime(2026, 3, 1, 10, 0, tzinfo=timezone.utc)
ID = "2d0e7f6a-0001"
PAID = answer(200, payment())


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy and no certificates of the machine's."""
    names = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ssl_cert_dir", "curl_ca_bundle")
    for name in (*names, "ssl_cert_file", "requests_ca_bundle"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


class Shop:
    """A client with short timeouts whose waits are recorded instead of slept."""

    def __init__(self, url: str, **options: Any) -> None:
        self.waits: list[float] = []
        settings: dict[str, Any] = {
            "shop_id": SHOP_ID,
            "secret_key": SECRET_KEY,
            "timeouts": Timeouts(connect_s=2.0, charge_read_s=0.3, read_s=0.3),
            "sleep": self.waits.append,
        }
        self.provider = PaymentProvider(api_url=url, **{**settings, **options})


@contextmanager
def shop(*reactions: Reaction, **options: Any) -> Iterator[tuple[PaymentProvider, WireServer, list[float]]]:
    """A server that reacts in this order, the last one for ever, and a client of it."""

    def react(_request: Request, index: int) -> Reaction:
        return reactions[min(index, len(reactions)) - 1]

    with wire_server(react) as server:
        client = Shop(server.url, **options)
        try:
            yield client.provider, server, client.waits
        finally:
            client.provider.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def tell(fault: BaseException) -> str:
    """Everything that could be printed of an exception and of what caused it."""
    texts = ["".join(traceback.format_exception(type(fault), fault, fault.__traceback__))]
    seen: BaseException | None = fault
    while seen is not None:
        texts += [repr(seen), str(seen), repr(seen.args), repr(vars(seen))]
        seen = seen.__cause__ or seen.__context__
    return "\n".join(texts)


# --- Charges: what an answer, or none, says about the money ----------------------------------------------------------

UNKNOWN: list[tuple[str, Reaction]] = [
    ("reset", reset),
    ("hang up", hang_up),
    ("half of an answer", half_of(PAID)),
    ("HTML 200", html(200)),
    ("HTML 400", html(400)),
    ("HTML 403", html(403)),
    ("HTML 404", html(404)),
    ("HTML 500", html(500)),
    ("HTML 502", html(502)),
    ("JSON 500", error(500, "internal_server_error")),
    ("JSON 404", error(404, "not_found")),
    ("JSON 405", error(405, "method_not_allowed")),
    ("JSON 409", error(409, "conflict")),
    ("JSON 410", error(410, "gone")),
    ("JSON 415", error(415, "unsupported_media_type")),
    ("400 that is not the provider's", answer(400, {"message": "no"})),
    ("403 that is not the provider's", answer(403, {"code": 403, "message": "no"})),
    ("400 about the key", error(400, "invalid_request", description="Idempotence key duplicated")),
    ("redirect", answer(302, "", "Location: http://127.0.0.1:1/elsewhere")),
    ("permanent redirect", answer(308, "", "Location: http://127.0.0.1:1/elsewhere")),
    ("empty 200", answer(200, "")),
    ("204", b"HTTP/1.1 204 No Content\r\n\r\n"),
    ("a list", answer(200, [payment()])),
    ("an error with 200", answer(200, {"type": "error", "code": "invalid_request"})),
    ("half of the JSON", answer(200, b'{"id": "2d0e7f6a-0001", "status": "succ')),
    ("not HTTP", b"SSH-2.0-OpenSSH_9.9\r\n"),
    ("a payment without an amount", answer(200, payment(amount=None))),
    ("a float for an amount", answer(200, payment(amount={"value": 499.0, "currency": "RUB"}))),
]


@pytest.mark.parametrize("reaction", [reaction for _, reaction in UNKNOWN], ids=[name for name, _ in UNKNOWN])
def test_what_is_not_understood_of_a_charge_is_unknown_and_sent_once(reaction: Reaction) -> None:
    with shop(reaction, PAID) as (provider, server, waits):
        with pytest.raises(OutcomeUnknown, match="money may have moved") as raised:
            provider.create_payment(BODY, KEY)
        assert not isinstance(raised.value, (RateLimited, StillProcessing))
        assert not raised.value.timed_out
        assert len(server.requests) == 1
        assert waits == []


def test_silence_after_a_charge_is_unknown_and_marked_as_silence() -> None:
    with shop(silence) as (provider, server, _), pytest.raises(OutcomeUnknown) as raised:
        provider.create_payment(BODY, KEY)
    assert raised.value.timed_out
    assert raised.value.__cause__ is not None
    assert len(server.requests) == 1


def test_production_waits_for_a_charge_longer_than_the_provider_may_take() -> None:
    """As documented: connect 5 s, GET 15 s; a POST is answered within 30 s or is a 500, so 35 to 40 s."""
    settings = Settings(
        _env_file=None,  # type: ignore[call-arg]
        billing_database_url="postgresql://nobody@localhost/nothing",
        yookassa_shop_id=SHOP_ID,
        yookassa_secret_key=SecretStr(SECRET_KEY),
    )

    client = connect_provider(settings)

    in_force = client._payments.client._timeouts
    assert (client._wire._way.connect_s, in_force.read_s) == (5.0, 15.0)
    assert 35.0 <= in_force.charge_read_s <= 40.0


def test_an_answer_that_drips_is_given_up_after_the_read_timeout() -> None:
    stop = threading.Event()

    def drip(client: socket.socket) -> None:
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        while not stop.wait(0.02):
            client.sendall(b" ")

    try:
        with shop(drip) as (provider, _server, _), pytest.raises(OutcomeUnknown) as raised:
            provider.create_payment(BODY, KEY)
    finally:
        stop.set()
    assert raised.value.timed_out


def test_a_refused_connection_means_that_no_money_moved() -> None:
    client = Shop(f"http://127.0.0.1:{free_port()}/v3")
    with pytest.raises(NeverSent, match="no money moved; the same key may be sent later") as raised:
        client.provider.create_payment(BODY, KEY)
    assert "Connection refused" in str(raised.value)
    assert raised.value.__cause__ is not None


def test_a_host_that_does_not_exist_means_that_no_money_moved() -> None:
    client = Shop("http://no-such-host.invalid/v3")
    with pytest.raises(NeverSent, match="no-such-host"):
        client.provider.create_payment(BODY, KEY)


def test_a_server_without_tls_gets_nothing_of_an_https_charge() -> None:
    received: list[bytes] = []

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse_tls() -> None:
            connection, _ = listener.accept()
            with connection:
                received.append(connection.recv(4096))
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=refuse_tls)
        thread.start()
        client = Shop(f"https://127.0.0.1:{listener.getsockname()[1]}/v3")
        with pytest.raises(NeverSent, match="TLS"):
            client.provider.create_payment(BODY, KEY)
        thread.join()
    assert "Продление".encode() not in received[0]
    assert b"Authorization" not in received[0]


def test_silence_during_the_tls_handshake_means_that_no_money_moved() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = Shop(
            f"https://127.0.0.1:{listener.getsockname()[1]}/v3", timeouts=Timeouts(connect_s=0.2, charge_read_s=0.2)
        )
        with pytest.raises(NeverSent, match="no money moved"):
            client.provider.create_payment(BODY, KEY)


@pytest.mark.parametrize("reaction", [error(401, "invalid_credentials"), html(401), answer(401, "")])
def test_401_with_any_body_is_wrong_credentials(reaction: bytes) -> None:
    with shop(reaction) as (provider, server, waits):
        for ask in _every_way_to_ask(provider):
            with pytest.raises(WrongCredentials, match="YOOKASSA_SHOP_ID") as raised:
                ask()
            assert raised.value.status_code == 401
        assert len(server.requests) == 5
        assert waits == []


def _every_way_to_ask(provider: PaymentProvider) -> list[Callable[[], object]]:
    return [
        lambda: provider.create_payment(BODY, KEY),
        lambda: provider.get_payment(ID),
        lambda: provider.fetch_slice(START, END),
        lambda: provider.scan(START, END),
        provider.check,
    ]


def test_a_rejected_charge_moved_no_money_and_names_the_parameter() -> None:
    rejection = error(400, "invalid_request", parameter="payment_method_id", description="x" * 5000)
    with shop(rejection) as (provider, server, _), pytest.raises(RequestRejected, match="No money moved") as raised:
        provider.create_payment(BODY, KEY)
    assert "payment_method_id" in str(raised.value)
    assert (raised.value.status_code, raised.value.code) == (400, "invalid_request")
    assert len(str(raised.value)) < 700
    assert len(server.requests) == 1


def test_a_forbidden_charge_moved_no_money() -> None:
    with shop(error(403, "forbidden")) as (provider, _, _), pytest.raises(Forbidden, match="No money moved"):
        provider.create_payment(BODY, KEY)


def test_202_is_still_processing_with_the_providers_wish_in_milliseconds() -> None:
    processing = answer(202, {"type": "processing", "description": "wait", "retry_after": 1800})
    with shop(processing) as (provider, server, _), pytest.raises(StillProcessing) as raised:
        provider.create_payment(BODY, KEY)
    assert raised.value.retry_after_s == pytest.approx(1.8)
    assert len(server.requests) == 1


def test_after_a_429_nobody_sends_before_the_provider_wishes() -> None:
    with shop(error(429, "too_many_requests", "Retry-After: 7"), PAID) as (provider, server, waits):
        with pytest.raises(RateLimited) as raised:
            provider.create_payment(BODY, KEY)
        assert raised.value.retry_after_s == 7
        assert len(server.requests) == 1
        assert provider.create_payment(BODY, KEY).id == ID
    assert waits == [pytest.approx(7, abs=1)]


def test_a_429_without_a_wish_waits_a_growing_default() -> None:
    with shop(html(429)) as (provider, server, waits), pytest.raises(RateLimited):
        provider.get_payment(ID)
    assert len(server.requests) == 4
    assert len(waits) == 3
    assert waits[0] == pytest.approx(1, abs=0.2)


def test_an_absurd_wish_to_wait_is_capped() -> None:
    with shop(error(429, "too_many_requests", "Retry-After: 86400"), PAID) as (provider, _, waits):
        provider.get_payment(ID)
    assert waits == [pytest.approx(60, abs=1)]


def test_a_declined_charge_is_an_answer_with_the_raw_reason() -> None:
    declined = payment(
        status="canceled",
        captured_at=None,
        cancellation_details={"party": "bank_of_mars", "reason": "a_reason_nobody_knows"},
    )
    with shop(answer(200, declined)) as (provider, _, _):
        told = provider.create_payment(BODY, KEY)
    assert (told.status, told.cancellation_party, told.cancellation_reason) == (
        "canceled",
        "bank_of_mars",
        "a_reason_nobody_knows",
    )


def test_an_unusable_answer_to_a_charge_names_the_payment_to_look_up() -> None:
    odd = answer(200, payment("2d0e7f6a-odd", amount={"value": "NaN", "currency": "RUB"}))
    with shop(odd) as (provider, _, _), pytest.raises(OutcomeUnknown, match="payment 2d0e7f6a-odd"):
        provider.create_payment(BODY, KEY)


# --- What is sent ------------------------------------------------------------------------------------------------


def test_the_frozen_bytes_arrive_with_their_key_and_nothing_added() -> None:
    with shop(html(500), PAID) as (provider, server, _):
        with pytest.raises(OutcomeUnknown):
            provider.create_payment(BODY, KEY)
        provider.create_payment(BODY, KEY)
    assert [request.body for request in server.requests] == [BODY.encode(), BODY.encode()]
    for request in server.requests:
        assert (request.method, request.target) == ("POST", "/v3/payments")
        assert request.headers["idempotence-key"] == KEY
        assert request.headers["content-type"] == "application/json"
        assert request.headers["authorization"] == "Basic " + b64encode(f"{SHOP_ID}:{SECRET_KEY}".encode()).decode()
        assert "YooKassa.Python/" in request.headers["ym-user-agent"]


@pytest.mark.parametrize("key", ["", "k" * 65, "two words", "line\nbreak", "ключ"])
def test_a_key_that_the_provider_would_not_take_is_refused_before_anything_is_sent(key: str) -> None:
    with shop(PAID) as (provider, server, _):
        with pytest.raises(ValueError, match="nothing was sent"):
            provider.create_payment(BODY, key)
        assert server.connections == 0


def test_requests_share_one_connection() -> None:
    with shop(PAID) as (provider, server, _):
        for _ in range(5):
            provider.create_payment(BODY, KEY)
            provider.get_payment(ID)
    assert server.connections == 1


def test_a_connection_that_the_server_closed_meanwhile_is_not_a_second_send() -> None:
    closed = threading.Event()

    def answer_and_close(client: socket.socket) -> None:
        client.sendall(PAID)
        client.shutdown(socket.SHUT_RDWR)
        closed.set()

    with shop(answer_and_close) as (provider, server, _):
        for number in range(1, 4):
            closed.clear()
            assert provider.create_payment(BODY, KEY).id == ID
            assert closed.wait(5)
            assert len(server.requests) == number
        assert server.connections == 3


def test_a_reset_on_a_kept_connection_is_unknown_and_not_sent_again() -> None:
    with shop(PAID, reset, PAID) as (provider, server, _):
        provider.create_payment(BODY, KEY)
        with pytest.raises(OutcomeUnknown):
            provider.create_payment(BODY, KEY)
        assert len(server.requests) == 2


def test_the_id_is_quoted_and_cannot_reach_another_path() -> None:
    with shop(error(404, "not_found")) as (provider, server, _):
        for payment_id in ("../refunds", "a/b?c=d#e", "..", "нет"):
            with pytest.raises(PaymentNotFound):
                provider.get_payment(payment_id)
    assert [request.target for request in server.requests] == [
        "/v3/payments/..%2Frefunds",
        "/v3/payments/a%2Fb%3Fc%3Dd%23e",
        "/v3/payments/%2E%2E",
        "/v3/payments/%D0%BD%D0%B5%D1%82",
    ]


def test_an_empty_id_is_not_asked_for() -> None:
    with shop(PAID) as (provider, server, _):
        with pytest.raises(RequestRejected, match="nothing was asked"):
            provider.get_payment(" ")
        assert server.requests == []


# --- Reads are repeated within a bound ---------------------------------------------------------------------------

TRANSIENT: list[tuple[str, Reaction]] = [
    ("reset", reset),
    ("hang up", hang_up),
    ("silence", silence),
    ("half of an answer", half_of(PAID)),
    ("half of the JSON", answer(200, b'{"id": "2d0')),
    ("HTML 200", html(200)),
    ("HTML 502", html(502)),
    ("JSON 500", error(500, "internal_server_error")),
    ("202", answer(202, "")),
    ("429", error(429, "too_many_requests")),
    ("another payment", answer(200, payment("2d0e7f6a-other"))),
]


@pytest.mark.parametrize("reaction", [reaction for _, reaction in TRANSIENT], ids=[name for name, _ in TRANSIENT])
def test_a_read_gets_over_a_fault_that_passes(reaction: Reaction) -> None:
    with shop(reaction, reaction, PAID) as (provider, server, waits):
        told = provider.get_payment(ID)
        assert not isinstance(told, UnusablePayment)
        assert told.id == ID
        assert len(server.requests) == 3
        assert len(waits) == 2


@pytest.mark.parametrize("reaction", [reaction for _, reaction in TRANSIENT], ids=[name for name, _ in TRANSIENT])
def test_a_read_that_never_succeeds_is_unknown_after_the_bound(reaction: Reaction) -> None:
    with shop(reaction, read_attempts=3) as (provider, server, waits):
        with pytest.raises(OutcomeUnknown):
            provider.get_payment(ID)
        assert len(server.requests) == 3
        assert len(waits) == 2


def test_the_waits_between_reads_double() -> None:
    with shop(html(502), read_backoff_s=1.0) as (provider, _, waits), pytest.raises(OutcomeUnknown):
        provider.get_payment(ID)
    assert waits == [pytest.approx(expected, rel=0.26) for expected in (1, 2, 4)]


def test_a_busy_providers_wish_is_honoured_between_reads() -> None:
    busy = answer(503, "", "Retry-After: 11")
    with shop(busy, PAID) as (provider, _, waits):
        provider.get_payment(ID)
    assert waits == [11]


def test_a_read_that_finds_nobody_listening_never_left() -> None:
    client = Shop(f"http://127.0.0.1:{free_port()}/v3")
    with pytest.raises(NeverSent):
        client.provider.get_payment(ID)
    assert len(client.waits) == 3


def test_not_found_is_the_providers_own_word_only() -> None:
    with shop(error(404, "not_found")) as (provider, server, _):
        with pytest.raises(PaymentNotFound):
            provider.get_payment(ID)
        assert len(server.requests) == 1
    with shop(html(404)) as (provider, _, _), pytest.raises(OutcomeUnknown, match="HTML"):
        provider.get_payment(ID)


def test_a_refused_read_is_not_repeated() -> None:
    for reaction, kind in ((error(400, "invalid_request"), RequestRejected), (error(403, "forbidden"), Forbidden)):
        with shop(reaction) as (provider, server, _):
            with pytest.raises(kind):
                provider.get_payment(ID)
            assert len(server.requests) == 1


def test_an_odd_payment_asked_by_its_id_is_returned_with_its_reason() -> None:
    with shop(answer(200, payment(amount=None))) as (provider, _, _):
        told = provider.get_payment(ID)
    assert isinstance(told, UnusablePayment)
    assert told.payment_id == ID


# --- Lists -------------------------------------------------------------------------------------------------------


def _pages(broken: dict[int, Reaction], last: int = 9) -> Callable[[Request, int], Reaction]:
    """Pages 1 to `last` with one payment each; a broken page reacts otherwise."""

    def react(request: Request, _index: int) -> Reaction:
        number = int(request.target.partition("cursor=page-")[2].partition("&")[0] or 1)
        following = f"page-{number + 1}" if number < last else None
        return broken.get(number) or page(payment(f"payment-{number}"), cursor=following)

    return react


def test_a_list_is_followed_to_its_end_with_the_same_filters_on_every_page() -> None:
    with wire_server(_pages({})) as server:
        told = Shop(server.url).provider.list_payments({"status": "succeeded", "created_at.gte": "2026-03-01T00:00Z"})
    assert [one.id for one in told.payments] == [f"payment-{number}" for number in range(1, 10)]
    assert (told.pages, told.requests, told.unusable) == (9, 9, ())
    assert all("limit=100&status=succeeded&created_at.gte=2026-03-01T00%3A00Z" in r.target for r in server.requests)


@pytest.mark.parametrize(
    "reaction",
    [
        reset,
        silence,
        html(502),
        error(400, "invalid_request", parameter="cursor"),
        error(403, "forbidden"),
        error(404, "not_found"),
        html(200),
        answer(200, [payment()]),
        answer(200, {"type": "list"}),
        answer(200, {"type": "list", "items": None}),
        answer(200, {"type": "list", "items": {"0": payment()}}),
        answer(200, b'{"type": "list", "items": [' + b"[" * 100_000),
        page(payment(), cursor={"after": 1}),
        half_of(page(payment("payment-7"), cursor="page-8")),
    ],
)
def test_a_list_that_breaks_off_on_page_7_is_no_slice(reaction: Reaction) -> None:
    with wire_server(_pages({7: reaction})) as server:
        client = Shop(server.url)
        with pytest.raises(IncompleteSlice, match="page 7") as raised:
            client.provider.fetch_slice(START, END)
        assert "Nothing was decided" in str(raised.value)


def test_a_page_that_fails_once_is_asked_again_and_the_slice_is_whole() -> None:
    seen: list[str] = []

    def react(request: Request, index: int) -> Reaction:
        seen.append(request.target)
        if seen.count(request.target) == 1 and "page-7" in request.target:
            return half_of(page(payment("payment-7"), cursor="page-8"))
        return _pages({})(request, index)

    with wire_server(react) as server:
        told = Shop(server.url).provider.list_payments({})
    assert len(told.payments) == 9
    assert (told.pages, told.requests) == (9, 10)


def test_a_cursor_that_comes_back_is_no_end() -> None:
    for cursors in ({3: "page-2"}, {3: "page-3"}):
        loop = {number: page(payment(f"payment-{number}"), cursor=cursor) for number, cursor in cursors.items()}
        with wire_server(_pages(dict(loop))) as server, pytest.raises(IncompleteSlice, match="repeats the cursor"):
            Shop(server.url).provider.list_payments({})


def test_a_404_on_the_list_hints_at_the_url() -> None:
    with (
        shop(error(404, "not_found"), read_attempts=1) as (provider, _, _),
        pytest.raises(IncompleteSlice, match="YOOKASSA_API_URL"),
    ):
        provider.scan(START, END)


def test_a_list_that_cannot_be_reached_is_no_slice() -> None:
    client = Shop(f"http://127.0.0.1:{free_port()}/v3")
    with pytest.raises(IncompleteSlice) as raised:
        client.provider.fetch_slice(START, END)
    assert isinstance(raised.value.__cause__, NeverSent)


def test_one_odd_item_does_not_lose_its_page() -> None:
    odd = [None, 7, "text", [], {}, {"id": None}, payment("odd", amount={"value": "1e9", "currency": "RUB"})]
    with shop(page(payment("before"), *odd, payment("after"))) as (provider, _, _):
        told = provider.list_payments({})
    assert [one.id for one in told.payments] == ["before", "after"]
    assert {one.payment_id for one in told.unusable} == {None, "odd"}


def test_literals_that_are_not_json_spoil_their_item_only() -> None:
    nines = "9" * 5000
    items = [
        '{"id": "nan", "status": "succeeded", "amount": {"value": NaN, "currency": "RUB"}}',
        f'{{"id": "huge", "status": "succeeded", "amount": {{"value": {nines}, "currency": "RUB"}}}}',
        '{"id": "infinite", "status": "succeeded", "amount": {"value": 1e999, "currency": "RUB"}}',
    ]
    good = payment("good", metadata={"user_id": "nul\0and half a pair\ud83d", "share": float("inf")})
    with shop(answer(200, f'{{"items": [{",".join(items)}, {json.dumps(good)}]}}')) as (provider, _, _):
        told = provider.list_payments({})
    assert [one.payment_id for one in told.unusable] == ["nan", "huge", "infinite"]
    assert told.payments[0].metadata == {"user_id": "nul\ufffdand half a pair\ufffd", "share": "Infinity"}


def test_a_slice_holds_what_was_created_or_captured_in_the_window_once() -> None:
    both, early, late = payment("both"), payment("created-before"), payment("captured-after")

    def react(request: Request, _index: int) -> Reaction:
        return page(both, early) if "captured_at" in request.target else page(both, late)

    with wire_server(react) as server:
        told = Shop(server.url).provider.fetch_slice(
            datetime(2026, 3, 1, 9, 0, 0, 1999, tzinfo=timezone.utc), datetime(2026, 3, 1, 10, 0, 0, 1, timezone.utc)
        )
    assert [one.id for one in told.payments] == ["both", "captured-after", "created-before"]
    assert told.pages == 2
    for request, instant in zip(server.requests, ("created_at", "captured_at"), strict=True):
        # Widened to whole milliseconds, in the provider's own form.
        assert request.target == (
            f"/v3/payments?limit=100&status=succeeded&{instant}.gte=2026-03-01T09%3A00%3A00.001Z"
            f"&{instant}.lte=2026-03-01T10%3A00%3A00.001Z"
        )


def test_a_provider_that_ignores_the_filter_gets_no_pending_payment_settled() -> None:
    items = [
        payment("paid"),
        payment("pending", "pending"),
        payment("held", "waiting_for_capture"),
        payment("odd-canceled", "canceled", amount=None),
        payment("odd-paid", amount=None),
        payment("odd-unknown", "settled"),
    ]
    with shop(page(*items)) as (provider, _, _):
        told = provider.fetch_slice(START, END)
        everything = provider.scan(START, END)
    assert [one.id for one in told.payments] == ["paid"]
    assert [one.payment_id for one in told.unusable] == ["odd-paid", "odd-unknown"]
    assert [one.id for one in everything.payments] == ["paid", "pending", "held"]
    assert len(everything.unusable) == 3


def test_a_naive_or_reversed_window_is_refused_before_anything_is_sent() -> None:
    with shop(page()) as (provider, server, _):
        with pytest.raises(ValueError, match="offset"):
            provider.scan(datetime(2026, 3, 1), datetime(2026, 3, 2))  # noqa: DTZ001
        with pytest.raises(ValueError, match="ends before"):
            provider.fetch_slice(END, START)
        assert server.requests == []


def test_check_is_one_small_request_without_repetition() -> None:
    with shop(page()) as (provider, server, _):
        provider.check()
        assert [request.target for request in server.requests] == ["/v3/payments?limit=1"]
    with shop(html(200)) as (provider, server, waits):
        with pytest.raises(OutcomeUnknown, match="HTML"):
            provider.check()
        assert len(server.requests) == 1
        assert waits == []


# --- Credentials, accounts, threads ------------------------------------------------------------------------------


def _echo(request: Request, _index: int) -> Reaction:
    """A proxy's error page that repeats the request."""
    return answer(
        {"POST": 400, "GET": 403}[request.method],
        {"type": "error", "code": request.headers["authorization"], "description": f"{SECRET_KEY} is wrong"},
    )


def test_credentials_are_in_no_text_no_repr_and_no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    token = b64encode(f"{SHOP_ID}:{SECRET_KEY}".encode()).decode()
    texts: list[str] = []
    faults: list[ProviderError] = []
    reactions: list[Callable[[Request, int], Reaction]] = [_echo]
    reactions += [lambda _r, _i, reaction=reaction: reaction for _, reaction in [*UNKNOWN, *TRANSIENT]]  # type: ignore[misc]
    reactions += [lambda _r, _i: error(401, "invalid_credentials")]
    for react in reactions:
        with wire_server(react) as server:
            client = Shop(server.url, read_attempts=1)
            texts.append(repr(client.provider))
            for ask in _every_way_to_ask(client.provider):
                try:
                    ask()
                except ProviderError as fault:
                    faults.append(fault)
    texts += [tell(fault) for fault in faults]
    texts += [f"{record.getMessage()} {vars(record)}" for record in caplog.records]
    assert len(faults) > 100
    for text in texts:
        assert SECRET_KEY not in text
        assert token not in text


def test_the_repr_shows_the_url_and_the_shop_only() -> None:
    client = Shop("http://127.0.0.1:9/v3/")
    assert repr(client.provider) == f"PaymentProvider(api_url='http://127.0.0.1:9/v3', shop_id='{SHOP_ID}')"


def test_only_a_live_key_makes_a_live_shop() -> None:
    assert not Shop("http://127.0.0.1:9/v3").provider.is_live
    assert Shop("http://127.0.0.1:9/v3", secret_key="live_0123456789").provider.is_live


def test_two_shops_in_two_threads_do_not_mix() -> None:
    with shop(PAID) as (_, server, _):
        shops = {
            name: PaymentProvider(shop_id=name, secret_key=f"test_secret_of_{name}", api_url=server.url)
            for name in ("111", "222")
        }

        def charge(number: int) -> None:
            name = "111" if number % 2 else "222"
            shops[name].create_payment(BODY, f"{name}-{number}")

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(charge, range(100)))
        assert len(server.requests) == 100
        for request in server.requests:
            name = request.headers["idempotence-key"].partition("-")[0]
            token = b64encode(f"{name}:test_secret_of_{name}".encode()).decode()
            assert request.headers["authorization"] == f"Basic {token}"


def test_the_sdks_global_configuration_is_neither_read_nor_written() -> None:
    from yookassa import Configuration

    before = (Configuration.account_id, Configuration.secret_key, Configuration.api_url)
    with shop(PAID) as (provider, _, _):
        provider.create_payment(BODY, KEY)
    assert (Configuration.account_id, Configuration.secret_key, Configuration.api_url) == before


def test_netrc_does_not_override_the_credentials(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login stranger password hijacked\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(netrc))
    with shop(PAID) as (provider, server, _):
        provider.get_payment(ID)
        expected = b64encode(f"{SHOP_ID}:{SECRET_KEY}".encode()).decode()
        assert server.requests[0].headers["authorization"] == f"Basic {expected}"


def test_sixty_four_threads_share_the_pool_and_never_exceed_it() -> None:
    def react(_request: Request, _index: int) -> Reaction:
        time.sleep(0.005)
        return PAID

    with wire_server(react) as server:
        provider = Shop(server.url, max_connections=16, timeouts=Timeouts()).provider
        with ThreadPoolExecutor(64) as threads:
            ids = {one.id for one in threads.map(lambda n: provider.create_payment(BODY, f"key-{n}"), range(400))}
        assert ids == {ID}
        assert len(server.requests) == 400
        assert len({request.headers["idempotence-key"] for request in server.requests}) == 400
        assert server.connections <= 16
        assert server.most_busy > 4


# --- Proxies and certificates ------------------------------------------------------------------------------------


def test_a_proxy_from_the_environment_is_used_except_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    with wire_server(lambda _request, _index: PAID) as proxy:
        address = proxy.url.removesuffix("/v3").removeprefix("http://")
        monkeypatch.setenv("http_proxy", f"http://someone:hush-hush@{address}")
        monkeypatch.setenv("no_proxy", "direct.invalid")
        Shop("http://api.invalid/v3").provider.get_payment(ID)
        assert proxy.requests[0].target == f"http://api.invalid/v3/payments/{ID}"
        assert "proxy-authorization" in proxy.requests[0].headers
        with pytest.raises(NeverSent) as raised:
            Shop("http://direct.invalid/v3").provider.create_payment(BODY, KEY)
        assert "hush-hush" not in tell(raised.value)
        with shop(PAID) as (local, server, _):
            local.get_payment(ID)
            assert len(server.requests) == 1
        assert len(proxy.requests) == 1


def test_a_proxy_that_refuses_the_tunnel_means_that_no_money_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    with wire_server(lambda _request, _index: html(403)) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url.removesuffix("/v3"))
        with pytest.raises(NeverSent, match="403"):
            Shop("https://api.invalid/v3").provider.create_payment(BODY, KEY)
        assert [request.method for request in proxy.requests] == ["CONNECT"]
        assert "authorization" not in proxy.requests[0].headers


# A self-signed certificate of the name `localhost` with its key, made for these tests: it opens nothing.
LOCALHOST = Path(__file__).with_name("localhost.pem")


@contextmanager
def tls_server() -> Iterator[WireServer]:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(LOCALHOST)
    with wire_server(lambda _request, _index: PAID, tls) as server:
        yield server


def test_a_trusted_certificate_is_accepted_and_its_connection_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    with tls_server() as server:
        for variable in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
            monkeypatch.setenv(variable, str(LOCALHOST))
            provider = Shop(server.url, timeouts=Timeouts()).provider
            for _ in range(5):
                assert provider.create_payment(BODY, KEY).id == ID
            provider.close()
            monkeypatch.delenv(variable)
    assert len(server.requests) == 10
    assert server.connections == 2


def test_a_certificate_of_nobody_known_gets_nothing() -> None:
    with tls_server() as server:
        with pytest.raises(NeverSent, match="REQUESTS_CA_BUNDLE"):
            Shop(server.url).provider.create_payment(BODY, KEY)
        assert server.requests == []


def test_a_certificate_of_another_name_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(LOCALHOST))
    with tls_server() as server:
        with pytest.raises(NeverSent, match="TLS"):
            Shop(server.url.replace("localhost", "127.0.0.1")).provider.create_payment(BODY, KEY)
        assert server.requests == []


def test_a_compressed_page_is_read_and_half_of_one_is_not() -> None:
    document = gzip.compress(json.dumps({"items": [payment()]}).encode())
    whole = answer(200, document, "Content-Encoding: gzip")
    for damaged in (answer(200, document[:-9], "Content-Encoding: gzip"), answer(200, b"no", "Content-Encoding: gzip")):
        with shop(damaged, whole) as (provider, server, _):
            assert len(provider.list_payments({}).payments) == 1
            assert len(server.requests) == 2
            assert server.requests[0].headers["accept-encoding"] == "gzip"


def test_an_answer_in_chunks_is_read_and_half_of_one_is_unknown() -> None:
    content = json.dumps(payment()).encode()
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (content[:50], content[50:]))
    with shop(head + chunks + b"0\r\n\r\n") as (provider, server, _):
        assert [provider.create_payment(BODY, KEY).id for _ in range(3)] == [ID] * 3
        assert server.connections == 1
    with shop(half_of(head + chunks)) as (provider, _, _), pytest.raises(OutcomeUnknown):
        provider.create_payment(BODY, KEY)


def test_a_certificate_bundle_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/no/such/bundle.pem")
    with pytest.raises(ValueError, match=r"REQUESTS_CA_BUNDLE names /no/such/bundle\.pem"):
        Shop("https://api.invalid/v3")


@pytest.mark.parametrize(
    "url", ["", "api.yookassa.ru/v3", "ftp://host/v3", "https://user:word@host/v3", "https://h/?q"]
)
def test_a_url_that_cannot_work_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        Shop(url)
