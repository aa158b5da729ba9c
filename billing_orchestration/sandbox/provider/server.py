"""The sandbox provider over HTTP: the provider's API under /v3, and its controls under /sandbox.

`serve` is the command; `running_sandbox` is the same server in a thread, for tests and the demo.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount

from billing_orchestration.sandbox.provider.account import SECRET_KEY, SHOP_ID, SandboxProvider
from billing_orchestration.sandbox.provider.api import ProviderApi, ReceivedRequest
from billing_orchestration.sandbox.provider.clock import SandboxClock
from billing_orchestration.sandbox.provider.control import build_control
from billing_orchestration.sandbox.provider.misbehaviour import Misbehaviour

DEFAULT_PORT = 8071
# As nginx in front of the real API: long enough that a pooled connection is not closed under a client's feet.
KEEP_ALIVE_S = 75
START_TIMEOUT_S = 30.0


def _protocol_that_shows_its_transport(api: ProviderApi) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol, which also lets the API find the transport of a client address."""
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
        Starlette(routes=[Mount("/v3", app=api), Mount("/sandbox", app=build_control(api))]),
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
    api = ProviderApi(provider)
    if state_file is not None and state_file.exists():
        api.load(state_file)
    listening = _listen(host, port)
    host, port = listening.getsockname()[:2]
    print(f"Sandbox provider: http://{host}:{port}/v3 (shop {provider.shop_id})", flush=True)
    # uvicorn ends its work on SIGTERM and then raises the signal again: end as from Ctrl-C, so that the state is kept.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        _server(api).run(sockets=[listening])
    if state_file is not None:
        api.save(state_file)


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
        """How many requests arrived: of one call (see CALLS; other) or of all."""
        return self.api.counts[call] if call is not None else sum(self.api.counts.values())

    def misbehave(self, call: str, effect: str, **how: Any) -> Misbehaviour:
        """Add a rule; see Misbehaviour. Its `fired` says how often it acted."""
        return self.api.misbehaviours.add(Misbehaviour(call, effect, **how))

    def behave(self) -> None:
        """Drop all rules and end every wait: silent connections are cut, delayed calls go on at once."""
        self.api.behave()

    def add_shop(self, shop_id: str, secret_key: str) -> SandboxProvider:
        """Open another shop under the same address; its credentials choose it."""
        return self.api.add_shop(shop_id, secret_key)

    def reset(self, *, shop_id: str = SHOP_ID, secret_key: str = SECRET_KEY) -> None:
        """Reset: one shop, no payments, no rules, no requests, default switches and credentials, real time."""
        self.api.reset()
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
