"""What an answer says about the money, and how a read or a list is repeated, given up or refused."""

from __future__ import annotations

import json
import logging
from base64 import b64encode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone

import pytest
from pydantic import SecretStr

from billing_orchestration.domain.provider_payment import UnusablePayment
from billing_orchestration.provider.client import PaymentProvider
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
    BODY,
    ID,
    KEY,
    PAID,
    SECRET_KEY,
    SHOP_ID,
    Reaction,
    Request,
    Shop,
    answer,
    error,
    free_port,
    half_of,
    hang_up,
    html,
    page,
    payment,
    reset,
    shop,
    silence,
    tell,
    wire_server,
)

START = datetime(2026, 3, 1, 9, 0, tzinfo=timezone.utc)
END = datetime(2026, 3, 1, 10, 0, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"saved": True, "status": "active", "card": {"last4": "4242"}}, "4242"),
        ({"saved": True, "card": {"last4": None}}, ""),
        ({"saved": False, "status": "active", "card": {"last4": "4242"}}, "unsaved"),
        ({"saved": False, "status": "pending"}, "pending"),
        ({"saved": True, "status": "suspended"}, "suspended"),
        ({"saved": True, "status": "<b>4242</b>"}, "inactive"),
        ({"saved": True, "status": "active", "id": "another"}, None),
    ],
    ids=["active", "no card", "unsaved", "pending", "a new state", "an odd state", "another method"],
)
def test_what_is_said_of_a_saved_method(said: dict[str, object], told: str | None) -> None:
    with shop(answer(200, {"id": "card", "type": "bank_card", **said})) as (provider, _, _):
        assert provider.cards(["card"]).get("card") == told


# --- Charges: what an answer, or none, says about the money ----------------------------------------------------------

UNKNOWN: list[tuple[str, Reaction]] = [
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
    ("permanent redirect", answer(308, "", "Location: http://127.0.0.1:1/elsewhere")),
    ("empty 200", answer(200, "")),
    ("204", b"HTTP/1.1 204 No Content\r\n\r\n"),
    ("a list", answer(200, [payment()])),
    ("an error with 200", answer(200, {"type": "error", "code": "invalid_request"})),
    ("half of the JSON", answer(200, b'{"id": "2d0e7f6a-0001", "status": "succ')),
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


@pytest.mark.parametrize(
    ("reaction", "is_answered"),
    [
        (error(500, "internal_server_error"), True),
        (error(429, "too_many_requests"), True),
        (html(429), True),
        (answer(202, {"type": "processing", "retry_after": 1}), True),
        (answer(200, payment(amount=None)), True),
        (html(502), False),
        (html(200), False),
        (answer(504, ""), False),
        (answer(200, ""), False),
        (answer(200, b'{"id": "2d0e7f6a-0001", "status": "succ'), False),
        (b"", False),
    ],
)
def test_only_the_providers_own_answer_says_that_it_has_finished_with_a_charge(
    reaction: Reaction, is_answered: bool
) -> None:
    """What a proxy says, or nobody, leaves it at work."""
    with shop(reaction, PAID) as (provider, _, _), pytest.raises(OutcomeUnknown) as raised:
        provider.create_payment(BODY, KEY)
    assert raised.value.answered is is_answered


def test_production_waits_for_a_charge_longer_than_the_provider_may_take() -> None:
    """As documented: connect 5 s, GET 15 s; a POST is answered within 30 s or is a 500, so 35 to 40 s."""
    settings = Settings(
        _env_file=None,  # type: ignore[call-arg]
        billing_database_url="postgresql://nobody@localhost/nothing",
        yookassa_shop_id=SHOP_ID,
        yookassa_secret_key=SecretStr(SECRET_KEY),
    )

    client = connect_provider(settings)

    in_force = client._payments._timeouts
    assert (client._wire.connect_s, in_force.read_s) == (5.0, 15.0)
    assert 35.0 <= in_force.charge_read_s <= 40.0
    # Longer than it may take to connect and to be answered: nothing is under way any more when it is sent again.
    assert client.charge_done_s == 45.0 >= client._wire.connect_s + in_force.charge_read_s


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


def test_202_is_still_processing_with_the_delay_in_milliseconds() -> None:
    processing = answer(202, {"type": "processing", "description": "wait", "retry_after": 1800})
    with shop(processing) as (provider, server, _), pytest.raises(StillProcessing) as raised:
        provider.create_payment(BODY, KEY)
    assert raised.value.retry_after_s == pytest.approx(1.8)
    assert len(server.requests) == 1


def test_after_a_429_nobody_sends_before_the_delay_is_over() -> None:
    with shop(error(429, "too_many_requests", "Retry-After: 7"), PAID) as (provider, server, waits):
        with pytest.raises(RateLimited) as raised:
            provider.create_payment(BODY, KEY)
        assert raised.value.retry_after_s == 7
        assert len(server.requests) == 1
        # No turns for charges, and a read waits for its own.
        assert (provider.rate.turns(9), provider.rate.is_paused) == (0, True)
        assert provider.rate.next_turn_s() == pytest.approx(7, abs=1)
        provider.get_payment(ID)
    assert waits == [pytest.approx(7, abs=1)]


def test_a_429_without_a_delay_waits_a_growing_default() -> None:
    with shop(html(429)) as (provider, server, waits), pytest.raises(RateLimited):
        provider.get_payment(ID)
    assert len(server.requests) == 4
    assert len(waits) == 3
    assert waits[0] == pytest.approx(1, abs=0.2)


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
def test_a_read_gets_over_a_fault_that_passes_and_gives_up_after_the_bound(reaction: Reaction) -> None:
    with shop(reaction, reaction, PAID, reaction, read_attempts=3) as (provider, server, waits):
        found = provider.get_payment(ID)
        assert not isinstance(found, UnusablePayment)
        assert found.id == ID
        assert (len(server.requests), len(waits)) == (3, 2)
        with pytest.raises(OutcomeUnknown):
            provider.get_payment(ID)
        assert len(server.requests) == 6


def test_the_waits_between_reads_double_unless_the_provider_asks_for_more() -> None:
    with shop(html(502), read_backoff_s=1.0) as (provider, _, waits), pytest.raises(OutcomeUnknown):
        provider.get_payment(ID)
    assert waits == [pytest.approx(expected, rel=0.26) for expected in (1, 2, 4)]
    with shop(answer(503, "", "Retry-After: 11"), PAID) as (provider, _, waits):
        provider.get_payment(ID)
    assert waits == [11]


def test_not_found_counts_only_from_the_provider_itself() -> None:
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
        told = Shop(server.url).provider.list_payments(
            {"status": "succeeded", "created_at.gte": "2026-03-01T00:00:00.000Z"}
        )
    assert [one.id for one in told.payments] == [f"payment-{number}" for number in range(1, 10)]
    assert (told.pages, told.requests, told.unusable) == (9, 9, ())
    assert all(
        "limit=100&status=succeeded&created_at.gte=2026-03-01T00%3A00%3A00.000Z" in r.target for r in server.requests
    )


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
