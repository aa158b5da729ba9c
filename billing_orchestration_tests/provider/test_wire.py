"""One request over real sockets: sent at most once, and what each end of a connection says about the money."""

from __future__ import annotations

import gzip
import json
import select
import socket
import ssl
import threading
import time
import tracemalloc
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from billing_orchestration.provider import wire
from billing_orchestration.provider.client import Timeouts
from billing_orchestration.provider.errors import IncompleteSlice, NeverSent, OutcomeUnknown
from billing_orchestration.provider.wire import LARGEST_ANSWER
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
    WireServer,
    answer,
    cut,
    drip,
    error,
    flood,
    free_port,
    half_of,
    hang_up,
    html,
    payment,
    reset,
    shop,
    silence,
    tell,
    wire_server,
)

# --- However a connection ends, the request was sent once, and may have been executed ----------------------------

HEAD = b"HTTP/1.1 200 OK\r\n"
CONTENT = json.dumps(payment()).encode()
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
CHUNKS = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (CONTENT[:50], CONTENT[50:]))
INFORMATION = b"HTTP/1.1 100 Continue\r\n\r\n"
PACKED = gzip.compress(CONTENT, mtime=0)


def unpacked(packed: bytes) -> bytes:
    return answer(200, packed, "Content-Encoding: gzip")


def chunked(*chunks: bytes) -> bytes:
    return CHUNKED + b"".join(chunks)


ENDS: dict[str, Reaction] = {
    "closed before an answer": hang_up,
    "reset before an answer": reset,
    "closed in the status line": cut(HEAD[:9]),
    "closed in the headers": cut(HEAD + b"Content-Le"),
    "closed after the headers": cut(PAID[: -len(CONTENT)]),
    "closed in the body": half_of(PAID),
    "reset in the body": cut(PAID[:-20], reset),
    "closed in the body, of HTTP/1.0": cut(b"HTTP/1.0 200 OK\r\n\r\n" + CONTENT[:-20]),
    "closed in a chunk": cut(chunked(CHUNKS[:-20])),
    "closed before the last chunk": cut(chunked(CHUNKS)),
    "a chunk of no size": cut(chunked(b"zz\r\n", CONTENT)),
    "two lengths": cut(HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde"),
    "half of what was packed": unpacked(PACKED[:-40]),
    "nothing that was packed": unpacked(b"no"),
    "408": answer(408, ""),
    "425, to be sent again": answer(425, "", "Retry-After: 0"),
    "503, to be sent again": answer(503, "", "Retry-After: 0"),
    "a redirect": answer(307, "", "Location: /v3/payments"),
    "no answer after 100": cut(INFORMATION),
    "a final answer after 103": cut(b"HTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n" + PAID),
    "not HTTP": cut(b"SSH-2.0-OpenSSH_9.9\r\n"),
    "an endless header": cut(HEAD + b"A: " + b"a" * 70_000),
    "endless headers": cut(HEAD + b"A: b\r\n" * 500),
    "too large, as announced": answer(200, CONTENT + b" " * LARGEST_ANSWER),
    "too large, in chunks": cut(chunked(CHUNKS, *[b"100000\r\n" + b" " * 2**20 + b"\r\n"] * 16, b"0\r\n\r\n")),
    "too large, of no length": cut(HEAD + b"\r\n" + CONTENT + b" " * LARGEST_ANSWER),
    "too large, unpacked": unpacked(gzip.compress(CONTENT + b" " * (4 * LARGEST_ANSWER))),
}
SILENT_ENDS: dict[str, Reaction] = {
    "silence": silence,
    "silence in the body": cut(PAID[:-20], silence),
    "a dripping header": drip(HEAD + b"A: ", b"a"),
    "a dripping body": drip(HEAD + b"Content-Length: 1000000\r\n\r\n", b" "),
    "no end of 100s": flood(INFORMATION * 100),
}


@pytest.mark.parametrize("name", [*ENDS, *SILENT_ENDS])
def test_however_a_connection_ends_the_request_was_sent_once_and_its_outcome_is_unknown(name: str) -> None:
    end = {**ENDS, **SILENT_ENDS}[name]
    # One connection for all of it: a place in the pool that is not given back would block the next request for ever.
    times = Timeouts(connect_s=2.0, charge_read_s=0.3, read_s=0.3) if name in SILENT_ENDS else Timeouts()
    with shop(end, PAID, end, max_connections=1, read_attempts=1, timeouts=times) as (provider, server, _):
        with pytest.raises(OutcomeUnknown, match="money may have moved") as raised:
            provider.create_payment(BODY, KEY)
        assert raised.value.timed_out is (name in SILENT_ENDS)
        assert len(server.requests) == 1

        assert provider.create_payment(BODY, KEY).id == ID, "nothing that was left over is taken for the next answer"
        assert len(server.requests) == 2

        with pytest.raises(IncompleteSlice):
            provider.list_payments({})
        assert len(server.requests) == 3


def test_the_final_answer_after_a_103_is_not_taken_for_the_answer_to_the_next_charge() -> None:
    def react(request: Request, index: int) -> Reaction:
        if request.connection > 1:
            return PAID
        return b"HTTP/1.1 103 Early Hints\r\n\r\n" if index == 1 else error(400, "invalid_request")

    with wire_server(react) as server:
        provider = Shop(server.url).provider
        with pytest.raises(OutcomeUnknown, match="103"):
            provider.create_payment(BODY, KEY)
        assert provider.create_payment(BODY, KEY).id == ID


def test_an_answer_is_unpacked_up_to_its_largest_size_only() -> None:
    bomb = unpacked(gzip.compress(b" " * (16 * LARGEST_ANSWER), compresslevel=1))
    with shop(bomb, timeouts=Timeouts()) as (provider, _, _):
        tracemalloc.start()
        try:
            with pytest.raises(OutcomeUnknown, match="larger than"):
                provider.create_payment(BODY, KEY)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 5 * LARGEST_ANSWER


@pytest.mark.parametrize("tls", [False, True])
def test_a_server_that_closes_without_reading_is_not_asked_again(tls: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(LOCALHOST))
    connections = 0
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def close_unread() -> None:
            nonlocal connections
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                connections += 1
                with _server_tls().wrap_socket(connection, server_side=True) if tls else connection as client:
                    select.select([client], [], [], 5)
                    reset(client)

        thread = threading.Thread(target=close_unread)
        thread.start()
        url = f"{'https' if tls else 'http'}://localhost:{listener.getsockname()[1]}/v3"
        with pytest.raises(OutcomeUnknown):
            Shop(url, timeouts=Timeouts()).provider.create_payment(BODY, KEY)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert connections == 1


WHOLE: dict[str, Reaction] = {
    "plain": PAID,
    "kept alive, by its own word": answer(200, CONTENT, "Connection: keep-Alive"),
    "to be closed": answer(200, CONTENT, "Connection: close"),
    "of HTTP/1.0": cut(b"HTTP/1.0 200 OK\r\n\r\n" + CONTENT),
    "of no length": cut(HEAD + b"\r\n" + CONTENT),
    "in chunks": chunked(CHUNKS, b"0\r\n\r\n"),
    "in chunks that also name a length": HEAD + b"Content-Length: 3\r\n" + chunked(CHUNKS, b"0\r\n\r\n")[len(HEAD) :],
    "packed": unpacked(PACKED),
    "after 100": INFORMATION + PAID,
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_answer_is_read_whatever_its_form(name: str) -> None:
    with shop(WHOLE[name], max_connections=1) as (provider, server, _):
        assert [provider.create_payment(BODY, KEY).id for _ in range(3)] == [ID] * 3
        assert len(server.requests) == 3


def test_an_answer_in_pieces_is_read_wherever_it_is_cut() -> None:
    def in_pieces(client: socket.socket) -> None:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(len(PAID)):
            client.sendall(PAID[at : at + 1])

    with shop(in_pieces, timeouts=Timeouts()) as (provider, _, _):
        assert provider.create_payment(BODY, KEY).id == ID


# --- What fails before there is a connection never left ----------------------------------------------------------


def test_a_refused_connection_means_that_no_money_moved() -> None:
    client = Shop(f"http://127.0.0.1:{free_port()}/v3")
    with pytest.raises(NeverSent, match="no money moved; the same key may be sent later") as raised:
        client.provider.create_payment(BODY, KEY)
    assert "Connection refused" in str(raised.value)
    assert raised.value.__cause__ is not None


def test_a_host_that_does_not_exist_means_that_no_money_moved() -> None:
    client = Shop("http://no-such-host.invalid/v3")
    with pytest.raises(NeverSent, match="check YOOKASSA_API_URL, the network and HTTPS_PROXY"):
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


def test_a_closed_client_sends_nothing() -> None:
    with shop(PAID) as (provider, server, _):
        provider.close()
        with pytest.raises(NeverSent, match="closed"):
            provider.create_payment(BODY, KEY)
        assert server.connections == 0


# --- The pool ----------------------------------------------------------------------------------------------------


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


def test_a_408_on_an_idle_connection_is_no_answer_to_the_next_charge() -> None:
    left = threading.Event()

    def answer_and_time_out(client: socket.socket) -> None:
        client.sendall(PAID)
        client.sendall(answer(408, "", "Connection: close"))
        client.shutdown(socket.SHUT_RDWR)
        left.set()

    with shop(answer_and_time_out, PAID) as (provider, server, _):
        assert provider.create_payment(BODY, KEY).id == ID
        assert left.wait(5)
        assert provider.create_payment(BODY, KEY).id == ID
        assert (len(server.requests), server.connections) == (2, 2)


def test_a_connection_that_was_idle_for_long_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_LONGEST_IDLE_S", 0.0)
    with shop(PAID) as (provider, server, _):
        assert [provider.create_payment(BODY, KEY).id for _ in range(3)] == [ID] * 3
        assert server.connections == 3


def test_a_reset_on_a_kept_connection_is_unknown_and_not_sent_again() -> None:
    with shop(PAID, reset, PAID) as (provider, server, _):
        provider.create_payment(BODY, KEY)
        with pytest.raises(OutcomeUnknown):
            provider.create_payment(BODY, KEY)
        assert len(server.requests) == 2


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


# --- What the environment may say, and what not ------------------------------------------------------------------


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


def _server_tls() -> ssl.SSLContext:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(LOCALHOST)
    return tls


@contextmanager
def tls_server() -> Iterator[WireServer]:
    with wire_server(lambda _request, _index: PAID, _server_tls()) as server:
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


def test_a_server_that_speaks_no_tls_of_today_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(LOCALHOST))
    old = _server_tls()
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with wire_server(lambda _request, _index: PAID, old) as server:
        with pytest.raises(NeverSent, match="no money moved"):
            Shop(server.url).provider.create_payment(BODY, KEY)
        assert server.requests == []
    assert wire._tls_context().minimum_version is ssl.TLSVersion.TLSv1_2


def test_a_redirect_takes_the_credentials_nowhere() -> None:
    with wire_server(lambda _request, _index: PAID) as elsewhere:
        for status in (301, 302, 303, 307, 308):
            moved = answer(status, "", f"Location: {elsewhere.url}/payments")
            with shop(moved, moved, moved, read_attempts=1) as (provider, _, _):
                with pytest.raises(OutcomeUnknown, match="redirects are not followed"):
                    provider.create_payment(BODY, KEY)
                with pytest.raises(OutcomeUnknown):
                    provider.get_payment(ID)
                with pytest.raises(IncompleteSlice):
                    provider.list_payments({})
        assert elsewhere.connections == 0


def test_a_certificate_bundle_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/no/such/bundle.pem")
    with pytest.raises(NeverSent, match="REQUESTS_CA_BUNDLE names nothing that can be read as certificates"):
        Shop("https://api.invalid/v3")


@pytest.mark.parametrize(
    "url", ["", "api.yookassa.ru/v3", "ftp://host/v3", "https://user:word@host/v3", "https://h/?q"]
)
def test_a_url_that_cannot_work_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        Shop(url)
