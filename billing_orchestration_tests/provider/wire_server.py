"""A tiny HTTP server over raw sockets, for what a decent server never does, and a client of it."""

from __future__ import annotations

import json
import socket
import ssl
import struct
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from billing_orchestration.provider.client import PaymentProvider, Timeouts

SHOP_ID = "100500"
SECRET_KEY = "test_a-secret-nobody-may-see"
BODY = '{"amount": {"value": "499.00", "currency": "RUB"},  "capture":true, "description": "Продление"}'
KEY = "5f1c6a54-6f6f-5b0e-9f0c-0123456789ab"
ID = "2d0e7f6a-0001"


@dataclass(frozen=True)
class Request:
    """One request as it arrived; header names in lower case."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes
    connection: int


# Told of every request as it arrives: who judges the client listens here.
WATCHERS: list[Callable[[Request], None]] = []

# What the server does with a request: bytes to send back, or a function that misuses the socket itself.
Reaction = bytes | Callable[[socket.socket], None]


@dataclass
class WireServer:
    """Answers request after request with `react`, and keeps what arrived."""

    react: Callable[[Request, int], Reaction]
    url: str = ""
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    busy: int = 0
    most_busy: int = 0

    def serve(self, client: socket.socket, number: int) -> None:
        """Serve one connection until either side is done with it."""
        with client, client.makefile("rb") as incoming:
            while (request := _read_request(incoming, number)) is not None:
                for watch in WATCHERS:
                    watch(request)
                with self.lock:
                    self.requests.append(request)
                    index = len(self.requests)
                    self.busy += 1
                    self.most_busy = max(self.most_busy, self.busy)
                try:
                    reaction = self.react(request, index)
                finally:
                    with self.lock:
                        self.busy -= 1
                if isinstance(reaction, bytes):
                    client.sendall(reaction)
                else:
                    reaction(client)
                    return


def _read_request(incoming: Any, connection: int) -> Request | None:
    try:
        first = incoming.readline().decode("latin-1").split()
        if len(first) != 3:
            return None
        headers: dict[str, str] = {}
        while (line := incoming.readline().decode("latin-1").strip()) != "":
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        body = incoming.read(int(headers.get("content-length", "0")))
    except OSError:
        return None
    return Request(first[0], first[1], headers, body, connection)


@contextmanager
def wire_server(react: Callable[[Request, int], Reaction], tls: ssl.SSLContext | None = None) -> Iterator[WireServer]:
    """Run it on a free port of this machine."""
    server = WireServer(react)
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    address = f"{'127.0.0.1' if tls is None else 'localhost'}:{listener.getsockname()[1]}"
    server.url = f"{'http' if tls is None else 'https'}://{address}/v3"
    clients: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            clients.append(client)
            server.connections += 1
            threading.Thread(target=_quietly, args=(server, client, server.connections, tls), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for client in clients:
            try:
                client.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        thread.join()


def _quietly(server: WireServer, client: socket.socket, number: int, tls: ssl.SSLContext | None) -> None:
    try:
        server.serve(client if tls is None else tls.wrap_socket(client, server_side=True), number)
    except OSError:
        return


def answer(
    status: int, body: bytes | str | dict[str, Any] | list[Any], *headers: str, kind: str = "application/json"
) -> bytes:
    """A whole HTTP answer."""
    content = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
    lines = [f"HTTP/1.1 {status} Reason", f"Content-Type: {kind}", f"Content-Length: {len(content)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + content


def html(status: int) -> bytes:
    """A proxy's error page."""
    return answer(status, "<!DOCTYPE html><html><body>Sorry</body></html>", kind="text/html")


def error(status: int, code: str, *headers: str, **more: Any) -> bytes:
    """The provider's own error JSON."""
    return answer(status, {"type": "error", "id": "ab5a11cd", "code": code, "description": "Words.", **more}, *headers)


def page(*items: Any, cursor: object = None) -> bytes:
    """A page of the list."""
    document: dict[str, Any] = {"type": "list", "items": list(items)}
    if cursor is not None:
        document["next_cursor"] = cursor
    return answer(200, document)


def reset(client: socket.socket) -> None:
    """RST instead of an answer."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def hang_up(client: socket.socket) -> None:
    """FIN instead of an answer."""
    client.shutdown(socket.SHUT_RDWR)


def silence(client: socket.socket) -> None:
    """Nothing, until the other side gives up."""
    client.recv(1)


def cut(start: bytes, end: Callable[[socket.socket], None] = hang_up) -> Callable[[socket.socket], None]:
    """The start of an answer, and no more."""

    def send_start(client: socket.socket) -> None:
        client.sendall(start)
        end(client)

    return send_start


def half_of(whole: bytes) -> Callable[[socket.socket], None]:
    """An answer that is cut off in its body."""
    return cut(whole[:-20])


def drip(start: bytes, drop: bytes) -> Callable[[socket.socket], None]:
    """The start of an answer, then drop after drop until the other side gives up."""

    def send_drops(client: socket.socket) -> None:
        client.sendall(start)
        client.settimeout(0.02)
        while True:
            client.sendall(drop)
            try:
                client.recv(1)
                return
            except TimeoutError:
                continue

    return send_drops


def flood(drop: bytes) -> Callable[[socket.socket], None]:
    """The same again and again, as fast as the other side reads it, until that gives up."""

    def send_all(client: socket.socket) -> None:
        while True:
            client.sendall(drop)

    return send_all


def payment(payment_id: str = ID, status: str = "succeeded", **other: Any) -> dict[str, Any]:
    """A payment as the provider writes it; `other` replaces fields."""
    return {
        "id": payment_id,
        "status": status,
        "paid": status == "succeeded",
        "amount": {"value": "499.00", "currency": "RUB"},
        "income_amount": {"value": "482.53", "currency": "RUB"},
        "created_at": "2026-03-01T09:59:30.125Z",
        "captured_at": "2026-03-01T10:00:00.500Z",
        "description": "Renewal",
        "metadata": {"user_id": "u-1", "plan_id": "7", "payment_provider_id": "1"},
        "payment_method": {
            "type": "bank_card",
            "id": "2a0b4c6d-saved",
            "saved": True,
            "title": "Bank card *4444",
            "card": {"first6": "555555", "last4": "4444", "expiry_month": "07", "expiry_year": "2028"},
        },
        "recipient": {"account_id": SHOP_ID, "gateway_id": "1"},
        "refundable": True,
        "refunded_amount": {"value": "0.00", "currency": "RUB"},
        "test": False,
        **other,
    }


PAID = answer(200, payment())


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
