"""The sandbox provider over HTTP: the provider's API under /v3, and under /sandbox the strings to pull.

`serve` is the command; `running_sandbox` is the same server in a thread, for tests and the demo. What the sandbox does
to a connection (an answer cut off, a TCP reset, silence) it does on the wire, not in a client's library.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import logging
import signal
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from billing_orchestration.sandbox.provider.account import SECRET_KEY, SHOP_ID, SandboxProvider
from billing_orchestration.sandbox.provider.misbehaviour import HTML, Call, Misbehaviour, Misbehaviours
from billing_orchestration.sandbox.provider.records import Answer, SandboxClock, Switches, iso
from billing_orchestration.sandbox.provider.requests import Refused, decode_cursor

DEFAULT_PORT = 8071
REQUESTS_KEPT = 100_000
# As nginx in front of the real API: long enough that a pooled connection is not closed under a client's feet.
KEEP_ALIVE_S = 75
START_TIMEOUT_S = 30.0

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(slots=True)
class ReceivedRequest:
    """One request to the API as it arrived. `status` is what was answered; None: nothing was (yet).

    Header names are lower case; the Authorization header is kept as received: it is the sandbox's own secret.
    """

    call: str
    method: str
    path: str
    query: list[tuple[str, str]]
    headers: dict[str, str]
    body: bytes
    at: datetime
    status: int | None = None
    effect: str | None = None

    @property
    def idempotence_key(self) -> str | None:
        return self.headers.get("idempotence-key")

    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.body)


class ProviderApi:
    """The ASGI application under /v3, and what it saw: requests, their number by call, how many ran at once."""

    def __init__(self, provider: SandboxProvider) -> None:
        self.provider = provider
        self.misbehaviours = Misbehaviours()
        self.requests: deque[ReceivedRequest] = deque(maxlen=REQUESTS_KEPT)
        self.counts: Counter[str] = Counter()
        self.in_flight = 0
        self.peak_in_flight = 0
        self.connections_opened = 0
        self.transports: dict[Any, asyncio.Transport] = {}
        self._stalled: set[asyncio.Transport] = set()
        self._delayed: set[asyncio.Future[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._epoch = 0
        self._working: dict[str, asyncio.Event] = {}

    def forget(self) -> None:
        """Forget what was seen and every rule; connections that are kept waiting are cut, delayed charges dropped."""
        self._epoch += 1
        self.misbehaviours.clear()
        self.requests.clear()
        self.counts.clear()
        # What is still on its way belongs to what is forgotten: it is not counted among what comes now.
        self.in_flight = self.peak_in_flight = 0
        self.release()

    def release(self) -> None:
        """End every wait: connections kept waiting by a silence are cut, delayed calls go on at once."""
        if self._loop is not None and (self._stalled or self._delayed):
            self._loop.call_soon_threadsafe(self._end_waits)

    def _end_waits(self) -> None:
        for transport in list(self._stalled):
            transport.abort()
        for delayed in list(self._delayed):
            _resolve(delayed)

    async def _delay(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        delayed: asyncio.Future[None] = loop.create_future()
        timer = loop.call_later(seconds, _resolve, delayed)
        self._delayed.add(delayed)
        try:
            await delayed
        finally:
            timer.cancel()
            self._delayed.discard(delayed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._loop = asyncio.get_running_loop()
        body = await _body(receive)
        request, call = self._arrival(scope, body)
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        epoch, left = self._epoch, False

        def leave() -> None:
            nonlocal left
            if not left and epoch == self._epoch:
                self.in_flight -= 1
            left = True

        async def answer(message: MutableMapping[str, Any]) -> None:
            # Out of flight before the client can know it: its next request may be here before this one has ended.
            if message["type"] == "http.response.body" and not message.get("more_body"):
                leave()
            await send(message)

        try:
            await self._respond(_Exchange(scope, receive, answer, request, self), call)
        finally:
            leave()

    def _arrival(self, scope: Scope, body: bytes) -> tuple[ReceivedRequest, Call]:
        method, path = scope["method"], scope["path"]
        path = path[path.index("/v3") + 3 :]
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        name, page, payment_id = "other", None, None
        if path == "/payments":
            name = "create" if method == "POST" else "list"
            if name == "list":
                page = _page(query)
        elif path.startswith("/payments/") and path.count("/") == 2:
            name, payment_id = "get", path.removeprefix("/payments/")
        request = ReceivedRequest(name, method, path, query, headers, body, self.provider.clock())
        self.requests.append(request)
        self.counts[name] += 1
        return request, Call(name, page, payment_id, headers.get("idempotence-key"), body)

    async def _respond(self, exchange: _Exchange, call: Call) -> None:
        rule = self.misbehaviours.pick(call)
        if rule is None:
            answer = await self._execute(exchange.request, call, 0.0)
            await exchange.answer(answer)
            return
        exchange.request.effect = rule.effect
        match rule.effect.rpartition("_"):
            case [effect, _, "before"]:
                if rule.delay_s:
                    await self._delay(rule.delay_s)
                await exchange.strike(effect, rule)
                return
            case [effect, _, "after"]:
                await self._execute(exchange.request, call, rule.delay_s)
                await exchange.strike(effect, rule)
                return
        if rule.effect in {"too_many_requests", "forbidden", "invalid_credentials"}:
            if rule.delay_s:
                await self._delay(rule.delay_s)
            await exchange.strike(rule.effect, rule)
            return
        answer = await self._execute(exchange.request, call, rule.delay_s)
        if rule.effect == "duplicate":
            answer = await self._execute(exchange.request, call, 0.0)
        if rule.effect == "truncated":
            await exchange.truncated(answer)
        elif rule.effect == "drip":
            await exchange.drip(answer, rule.seconds or 1.0)
        elif rule.effect == "change":
            document = rule.changed(json.loads(answer.body))
            await exchange.answer(replace(answer, body=json.dumps(document, ensure_ascii=False).encode()))
        else:
            await exchange.answer(answer)

    async def _execute(self, request: ReceivedRequest, call: Call, delay_s: float) -> Answer:
        """Let the provider do it. A delay is spent before; a test that ends meanwhile takes the call with it."""
        epoch = self._epoch
        switches = self.provider.switches
        delay_s += switches.processing_s if call.name == "create" else 0.0
        if not delay_s and call.idempotence_key not in self._working:
            return self._process(request, call)
        key = call.idempotence_key if call.name == "create" else None
        if key is not None and (working := self._working.get(key)) is not None:
            if switches.concurrent_same_key == "conflict":
                return Refused(409, "conflict", "A request with this idempotence key is being processed").answer()
            if switches.concurrent_same_key == "processing":
                return _processing()
            await working.wait()
            return self._process(request, call)
        done = asyncio.Event()
        if key is not None:
            self._working[key] = done
        try:
            await self._delay(delay_s)
            if epoch != self._epoch:
                return _internal_error()
            return self._process(request, call)
        finally:
            done.set()
            if key is not None:
                self._working.pop(key, None)

    def _process(self, request: ReceivedRequest, call: Call) -> Answer:
        refusal = self._unauthorised(request.headers.get("authorization"))
        if refusal is not None:
            return refusal
        if call.name == "other":
            if request.path == "/me" and request.method == "GET":
                return self.provider.account()
            return Refused(404, "not_found", "Resource not found").answer()
        if request.method not in ({"GET", "POST"} if request.path == "/payments" else {"GET"}):
            return Refused(405, None, f"Method {request.method} is not supported").answer()
        if call.name == "create":
            content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if content_type != "application/json":
                return Refused(415, None, "Content-Type is not application/json", "Content-Type").answer()
            return self.provider.create_payment(request.body, call.idempotence_key)
        if call.name == "list":
            return self.provider.list_payments(request.query)
        return self.provider.get_payment(call.payment_id or "")

    def _unauthorised(self, header: str | None) -> Answer | None:
        scheme, _, token = (header or "").partition(" ")
        if scheme.lower() != "basic":
            return Refused(
                401, "invalid_credentials", "Authorization by shopId and secret key is missing", "Authorization"
            ).answer()
        try:
            shop_id, _, secret_key = base64.b64decode(token, validate=True).decode("utf-8").partition(":")
        except (binascii.Error, ValueError):
            return Refused(
                401, "invalid_credentials", "Authorization header is not basic authentication", "Authorization"
            ).answer()
        return self.provider.check_credentials(shop_id, secret_key)


class _Exchange:
    """One request and its connection: every way in which an answer leaves, or does not."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, request: ReceivedRequest, api: ProviderApi) -> None:
        self.scope, self.receive, self.send, self.request, self.api = scope, receive, send, request, api

    @property
    def transport(self) -> asyncio.Transport | None:
        """None when the client is gone already."""
        return self.api.transports.get(self.scope["client"])

    async def answer(self, answer: Answer) -> None:
        self.request.status = answer.status
        await self._start(answer)
        await self.send({"type": "http.response.body", "body": answer.body})

    async def _start(self, answer: Answer) -> None:
        headers = [
            (b"content-type", answer.content_type.encode("latin-1")),
            (b"content-length", str(len(answer.body)).encode()),
        ]
        headers += [(name.encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers]
        await self.send({"type": "http.response.start", "status": answer.status, "headers": headers})

    async def strike(self, effect: str, rule: Misbehaviour) -> None:
        transport = self.transport
        if transport is None:
            return
        if effect == "cut":
            transport.close()
            await self._gone()
        elif effect == "reset":
            _reset(transport)
            await self._gone()
        elif effect == "silence":
            await self._silence(transport, rule.seconds)
        elif effect == "error":
            await self.answer(_internal_error())
        elif effect == "processing":
            await self.answer(_processing())
        elif effect == "too_many_requests":
            await self.answer(_too_many_requests(rule.retry_after_s))
        elif effect == "forbidden":
            await self.answer(Refused(403, "forbidden", "You can't make recurring payments").answer())
        elif effect == "invalid_credentials":
            await self.answer(Refused(401, "invalid_credentials", "Error in shopId or secret key").answer())
        elif effect == "html":
            page = rule.body if rule.body is not None else HTML.format(status=rule.status)
            await self.answer(Answer(rule.status, page.encode(), content_type="text/html; charset=utf-8"))
        else:
            await self.answer(Answer(rule.status, (rule.body or "").encode(), content_type=rule.content_type))

    async def _silence(self, transport: asyncio.Transport, seconds: float | None) -> None:
        self.api._stalled.add(transport)
        try:
            # The client hung up, or the sandbox was told to let go: either ends the wait.
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._gone(), seconds)
        finally:
            self.api._stalled.discard(transport)
        transport.abort()
        await self._gone()

    async def truncated(self, answer: Answer) -> None:
        transport = self.transport
        if transport is None:
            return
        self.request.status = answer.status
        head = (
            f"HTTP/1.1 {answer.status} OK\r\ncontent-type: {answer.content_type}\r\n"
            f"content-length: {len(answer.body)}\r\n\r\n"
        )
        transport.write(head.encode() + answer.body[: len(answer.body) // 2])
        transport.close()
        await self._gone()

    async def drip(self, answer: Answer, seconds: float) -> None:
        self.request.status = answer.status
        await self._start(answer)
        pause = seconds / max(1, len(answer.body))
        for at in range(len(answer.body)):
            await asyncio.sleep(pause)
            await self.send({"type": "http.response.body", "body": answer.body[at : at + 1], "more_body": True})
        await self.send({"type": "http.response.body", "body": b""})

    async def _gone(self) -> None:
        """Wait until the connection is gone, so that the server does not add an answer of its own."""
        while (await self.receive())["type"] != "http.disconnect":
            pass


def _resolve(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


def _reset(transport: asyncio.Transport) -> None:
    # Linger on, for no time: closing sends RST instead of FIN.
    connection = transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


async def _body(receive: Receive) -> bytes:
    message = await receive()
    if not message.get("more_body"):
        return bytes(message.get("body", b""))
    parts = [message.get("body", b"")]
    while message.get("more_body"):
        message = await receive()
        parts.append(message.get("body", b""))
    return b"".join(parts)


def _page(query: list[tuple[str, str]]) -> int | None:
    for name, value in query:
        if name == "cursor":
            try:
                return decode_cursor(value).page
            except Refused:
                return None
    return 1


def _internal_error() -> Answer:
    return Refused(500, "internal_server_error", "Technical error. Repeat the request with the same key").answer()


def _processing() -> Answer:
    return Answer(
        202, b'{"type":"processing","description":"Request accepted, but not processed yet","retry_after":1800}'
    )


def _too_many_requests(retry_after_s: int | None) -> Answer:
    document: dict[str, Any] = {
        "type": "error",
        "id": "ab5a11cd-13cc-4e33-af8b-75a74e18dd09",
        "code": "too_many_requests",
        "description": "Too many requests",
    }
    headers: list[tuple[str, str]] = []
    if retry_after_s is not None:
        document["retry_after"] = retry_after_s * 1000
        headers.append(("retry-after", str(retry_after_s)))
    return Answer(429, json.dumps(document).encode(), headers)


@dataclass(frozen=True, slots=True)
class _Order:
    """What a driver asked for."""

    method: str
    path: Mapping[str, str]
    body: Any


class ControlRoutes:
    """The Starlette routes under /sandbox, for a driver in another process. Loopback only, no credentials."""

    def __init__(self, api: ProviderApi) -> None:
        self.api = api
        self.provider = api.provider

    def routes(self) -> list[Route]:
        return [
            Route("/health", self._wrap(self.health), methods=["GET"]),
            Route("/methods", self._wrap(self.methods), methods=["GET", "POST"]),
            Route("/payments", self._wrap(self.payments), methods=["GET", "POST"]),
            Route("/payments/{payment_id}", self._wrap(self.payment), methods=["GET"]),
            Route("/payments/{payment_id}/{operation}", self._wrap(self.operate), methods=["POST"]),
            Route("/purchases", self._wrap(self.purchase), methods=["POST"]),
            Route("/ledger", self._wrap(self.ledger), methods=["GET"]),
            Route("/misbehaviours", self._wrap(self.misbehaviours), methods=["GET", "POST", "DELETE"]),
            Route("/clock", self._wrap(self.clock), methods=["GET", "POST"]),
            Route("/switches", self._wrap(self.switches), methods=["GET", "POST"]),
            Route("/requests", self._wrap(self.requests), methods=["GET", "DELETE"]),
            Route("/reset", self._wrap(self.reset), methods=["POST"]),
        ]

    @staticmethod
    def _wrap(action: Callable[[_Order], Any]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            if request.client is None or request.client.host not in {"127.0.0.1", "::1"}:
                return JSONResponse({"error": "the sandbox is driven from its own machine only"}, status_code=403)
            try:
                body = await request.body()
                return JSONResponse(
                    action(_Order(request.method, request.path_params, json.loads(body) if body else {}))
                )
            except (ValueError, TypeError, KeyError) as error:
                return JSONResponse({"error": str(error.args[0] if error.args else error)}, status_code=400)

        return endpoint

    def health(self, _order: _Order) -> Any:
        return {"status": "ok", "shop_id": self.provider.shop_id, "now": iso(self.provider.clock())}

    def methods(self, order: _Order) -> Any:
        if order.method == "POST":
            for item in _many(order.body):
                given = dict(item)
                self.provider.add_method(given.pop("id", None), given.pop("script", "succeeded"), **given)
        return [
            {"id": method.id, "type": method.type, "saved": method.saved, "next": method.script[0].kind}
            for method in self.provider.methods()
        ]

    def payments(self, order: _Order) -> Any:
        if order.method == "POST":
            return [payment.id for payment in self.provider.add_payments(_many(order.body))]
        return [payment.document() for payment in self.provider.payments()]

    def payment(self, order: _Order) -> Any:
        return self.provider.payment(order.path["payment_id"]).document()

    def operate(self, order: _Order) -> Any:
        operation = order.path["operation"]
        if operation not in {"pay", "cancel", "capture", "refund"}:
            raise ValueError(f"unknown operation {operation!r}")
        return getattr(self.provider, operation)(order.path["payment_id"], **order.body).document()

    def purchase(self, order: _Order) -> Any:
        given = dict(order.body)
        start = self.provider.hold if given.pop("hold", False) else self.provider.purchase
        return start(given.pop("amount"), **given).document()

    def ledger(self, _order: _Order) -> Any:
        return [entry.document() for entry in self.provider.ledger()]

    def misbehaviours(self, order: _Order) -> Any:
        if order.method == "POST":
            for item in _many(order.body):
                self.api.misbehaviours.add(Misbehaviour(**item))
        elif order.method == "DELETE":
            self.api.misbehaviours.clear()
            self.api.release()
        return [rule.document() for rule in self.api.misbehaviours.rules()]

    def clock(self, order: _Order) -> Any:
        clock = self.provider.clock
        if order.body:
            if not isinstance(clock, SandboxClock):
                raise ValueError("this sandbox's clock cannot be moved")
            if order.body.get("at") is not None:
                clock.set(order.body["at"])
            if "offset_s" in order.body:
                clock.run(timedelta(seconds=order.body["offset_s"]))
            if "advance_s" in order.body:
                clock.advance(order.body["advance_s"])
        return {"now": iso(clock())}

    def switches(self, order: _Order) -> Any:
        if order.body:
            self.provider.switches = replace(self.provider.switches, **order.body)
        return {item.name: getattr(self.provider.switches, item.name) for item in fields(Switches)}

    def requests(self, order: _Order) -> Any:
        if order.method == "DELETE":
            self.api.requests.clear()
            self.api.counts.clear()
        keys = Counter(item.idempotence_key for item in self.api.requests if item.idempotence_key is not None)
        return {
            "counts": dict(self.api.counts),
            "keys": dict(keys),
            "peak_in_flight": self.api.peak_in_flight,
            "connections_opened": self.api.connections_opened,
        }

    def reset(self, _order: _Order) -> Any:
        self.api.forget()
        self.provider.reset()
        return {"status": "ok"}


def _many(body: Any) -> list[Mapping[str, Any]]:
    return body if isinstance(body, list) else [body]


def build_app(api: ProviderApi) -> Starlette:
    """The whole application."""
    return Starlette(routes=[Mount("/v3", app=api), Mount("/sandbox", routes=ControlRoutes(api).routes())])


def _protocol_that_shows_its_transport(api: ProviderApi) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol, which also tells the API which transport belongs to which client address."""
    base: Any
    try:
        from uvicorn.protocols.http import httptools_impl

        base = httptools_impl.HttpToolsProtocol
    except ImportError:
        from uvicorn.protocols.http import h11_impl

        base = h11_impl.H11Protocol

    class ShowsItsTransport(base):  # type: ignore[misc]
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            api.transports[self.client] = transport
            api.connections_opened += 1

        def connection_lost(self, exc: Exception | None) -> None:
            # The system may have given the client's port to a new connection already.
            if api.transports.get(self.client) is self.transport:
                del api.transports[self.client]
            super().connection_lost(exc)

    return ShowsItsTransport


def _server(api: ProviderApi) -> uvicorn.Server:
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    config = uvicorn.Config(
        build_app(api),
        http=_protocol_that_shows_its_transport(api),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=1,
        backlog=1024,
    )
    return uvicorn.Server(config)


def _listen(host: str, port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise SystemExit(
            f"The sandbox cannot listen on {host}:{port}: {error.strerror}. Choose another --port."
        ) from None
    listening.listen(1024)
    return listening


def serve(
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    shop_id: str = SHOP_ID,
    secret_key: str = SECRET_KEY,
    *,
    provider: SandboxProvider | None = None,
    state_file: Path | None = None,
) -> None:
    """Run the sandbox until it is interrupted; prints one line with its URL once it listens. Port 0: any free one.

    `state_file`: read at the start if it is there, written at the end (Ctrl-C or SIGTERM).
    """
    provider = provider or SandboxProvider(shop_id=shop_id, secret_key=secret_key)
    if state_file is not None and state_file.exists():
        provider.load(state_file)
    listening = _listen(host, port)
    host, port = listening.getsockname()[:2]
    print(f"Sandbox provider: http://{host}:{port}/v3 (shop {provider.shop_id})", flush=True)
    # uvicorn ends its work on SIGTERM and then raises the signal again: end as from Ctrl-C, so that the state is kept.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        _server(ProviderApi(provider)).run(sockets=[listening])
    if state_file is not None:
        provider.save(state_file)


@dataclass(slots=True)
class Sandbox:
    """A running sandbox. `url` ends in /v3: it is what YOOKASSA_API_URL takes."""

    provider: SandboxProvider
    api: ProviderApi
    host: str
    port: int
    clock: SandboxClock = field(default_factory=SandboxClock)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}/v3"

    @property
    def control_url(self) -> str:
        return f"http://{self.host}:{self.port}/sandbox"

    @property
    def shop_id(self) -> str:
        return self.provider.shop_id

    @property
    def secret_key(self) -> str:
        return self.provider.secret_key

    @property
    def requests(self) -> list[ReceivedRequest]:
        """What arrived at the API, in order."""
        return list(self.api.requests)

    @property
    def peak_in_flight(self) -> int:
        """How many requests were worked on at once, at most."""
        return self.api.peak_in_flight

    def count(self, call: str | None = None) -> int:
        """How many requests arrived: of one call (create, list, get, other) or of all."""
        return self.api.counts[call] if call is not None else sum(self.api.counts.values())

    def misbehave(self, call: str, effect: str, **how: Any) -> Misbehaviour:
        """Add a rule; see Misbehaviour. It tells by `fired` how often it acted."""
        return self.api.misbehaviours.add(Misbehaviour(call, effect, **how))

    def behave(self) -> None:
        """Drop all rules and end every wait: silent connections are cut, delayed calls go on at once."""
        self.api.misbehaviours.clear()
        self.api.release()

    def reset(self, *, shop_id: str = SHOP_ID, secret_key: str = SECRET_KEY) -> None:
        """As new: no payments, no rules, no requests, default switches and credentials, the clock on real time."""
        self.api.forget()
        self.provider.reset()
        self.provider.switches = Switches()
        self.provider.shop_id, self.provider.secret_key = shop_id, secret_key
        self.clock.run()


@contextlib.contextmanager
def running_sandbox(
    provider: SandboxProvider | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    shop_id: str = SHOP_ID,
    secret_key: str = SECRET_KEY,
) -> Iterator[Sandbox]:
    """The sandbox in a thread of this process, on a free port; stopped at the end."""
    clock = SandboxClock()
    if provider is None:
        provider = SandboxProvider(shop_id=shop_id, secret_key=secret_key, clock=clock)
    elif isinstance(provider.clock, SandboxClock):
        clock = provider.clock
    api = ProviderApi(provider)
    server = _server(api)
    listening = _listen(host, port)
    host, port = listening.getsockname()[:2]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="sandbox", daemon=True)
    thread.start()
    deadline = time.monotonic() + START_TIMEOUT_S
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise RuntimeError("the sandbox did not start")
        time.sleep(0.005)
    try:
        yield Sandbox(provider, api, host, port, clock)
    finally:
        api.forget()
        server.should_exit = True
        thread.join(START_TIMEOUT_S)
        listening.close()
