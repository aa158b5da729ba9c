"""What stands in front of the endpoints: it notes each request, delays it, misbehaves on request, and executes it."""

from __future__ import annotations

import asyncio
import json
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qsl

from starlette.authentication import AuthenticationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Message, Receive, Scope, Send

from billing_orchestration.sandbox.provider.account import SandboxProvider
from billing_orchestration.sandbox.provider.answers import Refused, internal_error, processing
from billing_orchestration.sandbox.provider.clock import http_date
from billing_orchestration.sandbox.provider.endpoints import KEY_LOOKED_UP, build_endpoints, response, shop_of
from billing_orchestration.sandbox.provider.list_requests import decode_cursor
from billing_orchestration.sandbox.provider.misbehaviour import Call, Misbehaviours
from billing_orchestration.sandbox.provider.state import read_document, write_document
from billing_orchestration.sandbox.provider.switches import Switches
from billing_orchestration.sandbox.provider.waits import Waits
from billing_orchestration.sandbox.provider.wire_faults import Exchange

REQUESTS_KEPT = 100_000


@dataclass(slots=True)
class ReceivedRequest:
    """One request to the API as it arrived. `status` is what was answered; None: nothing was (yet).

    `shop_id`: whose credentials it has; None: nobody's. Header names are lower case; the Authorization header is kept
    as received: it is the sandbox's own secret.
    """

    call: str
    method: str
    path: str
    query: list[tuple[str, str]]
    headers: Mapping[str, str]
    body: bytes
    at: datetime
    shop_id: str | None = None
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

    # Told of every request and its true answer before that meets the wire. Who judges the sandbox listens here.
    watchers: ClassVar[list[Callable[[Scope, Call, Response], None]]] = []

    def __init__(self, provider: SandboxProvider) -> None:
        # The first shop is always there; the credentials of a request say whose it is.
        self.provider = provider
        self.shops = [provider]
        self.endpoints = build_endpoints(self.shops)
        self.misbehaviours = Misbehaviours()
        self.requests: deque[ReceivedRequest] = deque(maxlen=REQUESTS_KEPT)
        self.counts: Counter[str] = Counter()
        self.in_flight = 0
        self.peak_in_flight = 0
        self.connections_opened = 0
        # The server's connections by the client's address.
        self.transports: dict[Any, asyncio.Transport] = {}
        self._waits = Waits()
        self._epoch = 0
        self._keys_at_work: dict[tuple[SandboxProvider, str], asyncio.Event] = {}

    def shop(self, shop_id: str) -> SandboxProvider:
        """A shop by its id; KeyError when there is none."""
        for shop in self.shops:
            if shop.shop_id == shop_id:
                return shop
        raise KeyError(f"the sandbox has no shop {shop_id}")

    def add_shop(self, shop_id: str, secret_key: str) -> SandboxProvider:
        """Open another shop, with books and switches of its own, and the clock of the first."""
        if shop_id in {shop.shop_id for shop in self.shops}:
            raise ValueError(f"the sandbox has a shop {shop_id} already")
        shop = SandboxProvider(shop_id=shop_id, secret_key=secret_key, clock=self.provider.clock)
        self.shops.append(shop)
        return shop

    def save(self, path: Path) -> None:
        """Write all shops to a file."""
        write_document({"shops": [shop.document() for shop in self.shops]}, path)

    def load(self, path: Path) -> None:
        """Take over what `save` wrote. The first shop keeps its credentials."""
        first, *others = read_document(path)["shops"]
        self.provider.restore(first)
        for other in others:
            self.add_shop(other["shop_id"], other["secret_key"]).restore(other)

    def reset(self) -> None:
        """Forget everything: what was seen, the books, the switches, and every shop but the first."""
        self.forget()
        del self.shops[1:]
        self.provider.reset()
        self.provider.switches = Switches()

    def forget(self) -> None:
        """Forget what was seen and every rule; connections that are kept waiting are cut, delayed charges dropped."""
        self._epoch += 1
        self.misbehaviours.clear()
        self.requests.clear()
        self.counts.clear()
        # What is still on its way belongs to what is forgotten: it is not counted among what comes now.
        self.in_flight = self.peak_in_flight = 0
        self._waits.end()

    def behave(self) -> None:
        """Drop all rules and end every wait: silent connections are cut, delayed calls go on at once."""
        self.misbehaviours.clear()
        self._waits.end()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await Request(scope, receive).body()
        request, call = self._arrival(scope, body)
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        epoch, left = self._epoch, False

        def leave() -> None:
            nonlocal left
            if not left and epoch == self._epoch:
                self.in_flight -= 1
            left = True

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                request.status = message["status"]
                if call.shop.switches.date_header:
                    date = http_date(call.shop.clock()).encode()
                    message = {**message, "headers": [*message["headers"], (b"date", date)]}
            # Out of flight before the client can know it: its next request may be here before this one has ended.
            elif not message.get("more_body"):
                leave()
            await send(message)

        exchange = Exchange(scope, receive, answer, self.transports.get(scope["client"]), self._waits)
        try:
            await self._respond(exchange, request, call)
        finally:
            leave()

    def _arrival(self, scope: Scope, body: bytes) -> tuple[ReceivedRequest, Call]:
        name, payment_id = "other", None
        for route in self.endpoints.routes:
            match, found = route.matches(scope)
            if match is Match.FULL:
                name, payment_id = getattr(route, "name", name), found["path_params"].get("id")
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        path = scope["path"].removeprefix(scope["root_path"])
        try:
            shop = shop_of(headers.get("authorization", ""), self.shops)
            shop_id = shop.shop_id
        except AuthenticationError:
            shop, shop_id = self.provider, None
        request = ReceivedRequest(name, scope["method"], path, query, headers, body, shop.clock(), shop_id)
        self.requests.append(request)
        self.counts[name] += 1
        page = _page(query) if name.startswith("list") else None
        return request, Call(name, shop, page, payment_id, request.idempotence_key, body)

    async def _respond(self, exchange: Exchange, request: ReceivedRequest, call: Call) -> None:
        rule = self.misbehaviours.pick(call)
        if rule is None:
            await exchange.answer(await self._execute(exchange.scope, call))
            return
        request.effect = rule.effect
        if not rule.executes:
            await self._waits.delay(rule.delay_s)
            await exchange.strike(rule)
            return
        answer = await self._execute(exchange.scope, call, rule.delay_s)
        if rule.effect == "duplicate":
            answer = await self._execute(exchange.scope, call)
        await exchange.strike(rule, answer)

    async def _execute(self, scope: Scope, call: Call, delay_s: float = 0.0) -> Response:
        """Let the provider do it. A delay is spent before; a test that ends meanwhile takes the call with it."""
        epoch, switches = self._epoch, call.shop.switches
        key = None
        if call.name.startswith("create") and call.idempotence_key is not None:
            key = call.shop, call.idempotence_key
        if key is not None and not switches.serialise_keys:
            scope = {**scope, KEY_LOOKED_UP: not call.shop.holds_key(key[1])}
        elif key in self._keys_at_work:
            if switches.concurrent_same_key == "conflict":
                return response(
                    Refused(409, "conflict", "A request with this idempotence key is being processed").answer()
                )
            if switches.concurrent_same_key == "processing":
                return response(processing())
            await self._keys_at_work[key].wait()
            return await self._call_endpoint(scope, call)
        delay_s += switches.processing_s if call.name == "create" else 0.0
        if not delay_s:
            return await self._call_endpoint(scope, call)
        done = asyncio.Event()
        if key is not None:
            self._keys_at_work[key] = done
        try:
            await self._waits.delay(delay_s)
            if epoch != self._epoch:
                return response(internal_error())
            return await self._call_endpoint(scope, call)
        finally:
            done.set()
            if key is not None and self._keys_at_work.get(key) is done:
                del self._keys_at_work[key]

    async def _call_endpoint(self, scope: Scope, call: Call) -> Response:
        """Its whole answer, before a byte of it is sent."""
        answer = Response()
        answer.body = b""

        async def receive() -> Message:
            return {"type": "http.request", "body": call.body, "more_body": False}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer.status_code, answer.raw_headers = message["status"], list(message["headers"])
            else:
                answer.body += message.get("body", b"")

        await self.endpoints(dict(scope), receive, send)
        for watch in self.watchers:
            watch(scope, call, answer)
        return answer


def _page(query: list[tuple[str, str]]) -> int | None:
    """Which page of a scan is asked for; None for a cursor that the list never gave."""
    cursor = dict(query).get("cursor")
    try:
        return 1 if cursor is None else decode_cursor(cursor).page
    except Refused:
        return None
