"""The way between the jobs and the sandbox provider in a simulation: in process or over HTTP, and faulty on request.

It stands where the client's own `Wire` stands, so all of the client above it is the real one: bodies, keys, headers,
what an answer or a broken connection means. Which call meets which fault is drawn from the seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Set
from datetime import datetime
from email.utils import format_datetime
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from urllib3 import HTTPHeaderDict

from billing_orchestration.provider.client import PaymentProvider, Timeouts
from billing_orchestration.provider.wire import Answer, NotConnected, Wire
from billing_orchestration.sandbox.provider.account import SandboxProvider
from billing_orchestration.threads import Threads
from billing_orchestration_tests.torture.simulation.in_flight import InFlight

# (name, weight): what may happen to one call. "before": nothing was executed; "after": it was, and nobody learns it.
CHARGE_FAULTS = (
    ("not connected", 3), ("cut before", 3), ("cut after", 6), ("silence before", 2), ("silence after", 4),
    ("error before", 2), ("error after", 4), ("html before", 1), ("html after", 2), ("truncated", 3),
    ("too many requests", 3), ("processing before", 1), ("processing after", 2), ("duplicate", 2),
    ("wrong credentials", 1), ("forbidden", 1),
)  # fmt: skip
# Only where charges under way are played: the client has gone, the provider works on.
UNDER_WAY_FAULTS = (("cut, and still worked on", 8), ("silence, and still worked on", 4))
READ_FAULTS = (
    ("not connected", 3), ("cut before", 3), ("silence before", 2), ("error before", 3), ("html before", 2),
    ("truncated", 3), ("too many requests", 2),
)  # fmt: skip
_OWN_ERROR = (
    b'{"type":"error","id":"ab5a11cd-13cc-4e33-af8b-75a74e18dd09","code":"%s","description":"told by the sandbox"}'
)
_HTML = b"<html><head><title>502</title></head><body><h1>502</h1><p>nginx</p></body></html>"


# Of the machine's own seconds: only a sandbox that hangs takes longer, however busy the machine is.
_PATIENCE_S = 300.0


class PatientWire(Wire):
    """The real wire to a sandbox that is served over HTTP. What times out in a story is drawn, never the machine's."""

    def __init__(self, api_url: str) -> None:
        super().__init__(api_url, max_connections=8, connect_s=_PATIENCE_S)

    def send(
        self, method: str, target: str, *, headers: Mapping[str, str], body: bytes | None, read_s: float
    ) -> Answer:
        return super().send(method, target, headers=headers, body=body, read_s=_PATIENCE_S)


class SimulatedWire:
    """Sends one request, as `provider.wire.Wire` does. `inner` is the real wire when the sandbox is served over HTTP.

    `before` and `after` are called around every request that the client makes: the simulation's hooks. `unreadable`
    names the payments whose records are garbled whenever they are read.
    """

    def __init__(
        self,
        provider: SandboxProvider,
        *,
        in_flight: InFlight,
        fault: Callable[[str, bytes | None], str | None],
        before: Callable[[str, bytes | None, str | None, str | None], None],
        after: Callable[[str, str | None, Answer], None],
        pass_time: Callable[[float], None],
        provider_now: Callable[[], datetime],
        page_size: int,
        unreadable: Set[str] = frozenset(),
        inner: Any = None,
    ) -> None:
        self._provider = provider
        self._in_flight = in_flight
        self._provider_now = provider_now
        self._fault = fault
        self._before = before
        self._after = after
        self._pass_time = pass_time
        self._page_size = page_size
        self._unreadable = unreadable
        self._inner = inner

    def close(self) -> None:
        if self._inner is not None:
            self._inner.close()

    def send(
        self, method: str, target: str, *, headers: Mapping[str, str], body: bytes | None, read_s: float
    ) -> Answer:
        key = headers.get("Idempotence-Key")
        fault = self._fault(method, body)
        self._before(method, body, key, fault)
        self._in_flight.finish()

        def execute() -> Answer:
            if method == "POST" and (wait_s := self._in_flight.seconds_until_free(key)):
                self._pass_time(wait_s)
                self._in_flight.finish()
            if self._inner is not None:
                answer: Answer = self._inner.send(
                    method, self._smaller(target), headers=headers, body=body, read_s=read_s
                )
                return answer
            return self._execute(method, target, body, key)

        if fault is not None and fault.endswith("still worked on"):
            self._in_flight.begin(body or b"", key)
            fault = fault.replace(", and still worked on", " before")
        answer = self._under(fault, execute, read_s)
        if method == "GET" and self._unreadable:
            answer = _garbled(answer, self._unreadable)
        self._after(method, key, answer)
        return answer

    def _under(self, fault: str | None, execute: Callable[[], Answer], read_s: float) -> Answer:
        if fault is None:
            return execute()
        if fault == "not connected":
            raise NotConnected("no connection to the sandbox") from ConnectionRefusedError(111, "Connection refused")
        if fault.endswith(" after"):
            execute()
        what = fault.rpartition(" ")[0] if fault.endswith((" before", " after")) else fault
        if what == "cut":
            self._pass_time(1.0)
            raise ConnectionResetError(104, "Connection reset by peer")
        if what == "silence":
            self._pass_time(read_s)
            raise TimeoutError("the read timeout is over")
        if what == "error":
            return self._answer(500, _OWN_ERROR % b"internal_server_error")
        if what == "html":
            return self._answer(502, _HTML)
        if what == "too many requests":
            return self._answer(429, _OWN_ERROR % b"too_many_requests")
        if what == "processing":
            return self._answer(202, b'{"type":"processing","description":"Request accepted, but not processed yet"}')
        if what == "wrong credentials":
            return self._answer(401, _OWN_ERROR % b"invalid_credentials")
        if what == "forbidden":
            return self._answer(403, _OWN_ERROR % b"forbidden")
        if what == "duplicate":
            execute()
            return execute()
        if what == "truncated":
            answer = execute()
            return Answer(answer.status, answer.headers, answer.body[: len(answer.body) // 2])
        raise AssertionError(fault)

    def _smaller(self, target: str) -> str:
        return target.replace("limit=100", f"limit={self._page_size}", 1)

    def _execute(self, method: str, target: str, body: bytes | None, key: str | None) -> Answer:
        parts = urlsplit(self._smaller(target))
        if method == "POST":
            told = self._provider.create_payment(body or b"", key)
        elif parts.path.endswith("/payments"):
            told = self._provider.list_payments(parse_qsl(parts.query, keep_blank_values=True))
        else:
            told = self._provider.get_payment(parts.path.rpartition("/")[2])
        return self._answer(told.status, told.body)

    def _answer(self, status: int, body: bytes) -> Answer:
        return Answer(status, HTTPHeaderDict(Date=format_datetime(self._provider_now(), usegmt=True)), body)


def _garbled(answer: Answer, unreadable: Set[str]) -> Answer:
    """The answer with the amount of these payments as no client can read it."""
    try:
        document = json.loads(answer.body)
    except ValueError:
        return answer
    for record in document.get("items", [document]):
        if record.get("id") in unreadable:
            record["amount"] = {"value": "two hundred", "currency": "RUB"}
    return Answer(answer.status, answer.headers, json.dumps(document).encode())


def pick_fault(faults: tuple[tuple[str, int], ...], generator: random.Random) -> str:
    """One of the faults, by weight."""
    return generator.choices([name for name, _ in faults], [weight for _, weight in faults])[0]


class SimulatedProvider(PaymentProvider):
    """The real client on a simulated wire; its waits pass simulated time."""

    def __init__(
        self,
        settings: Any,
        make_wire: Callable[[], SimulatedWire],
        threads: Threads,
        now: Callable[[], datetime],
        sleep: Callable[[float], None],
        generator: random.Random,
    ) -> None:
        super().__init__(
            shop_id=settings.yookassa_shop_id,
            secret_key=settings.yookassa_secret_key.get_secret_value(),
            api_url=settings.yookassa_api_url,
            timeouts=Timeouts(connect_s=2.0, charge_read_s=40.0, read_s=15.0),
            threads=threads,
            now=now,
            sleep=sleep,
            uniform=generator.uniform,
        )
        self._wire.close()
        wire = make_wire()
        self._wire = wire  # type: ignore[assignment]
        self._payments._wire = wire


def status_of(answer: Answer) -> tuple[str, str | None]:
    """A payment's status and method id in an answer; ("", None) when it is no payment."""
    try:
        document = json.loads(answer.body)
    except ValueError:
        return "", None
    if answer.status != 200 or not isinstance(document, dict) or "status" not in document:
        return "", None
    method = document.get("payment_method")
    return document["status"], method.get("id") if isinstance(method, dict) else None
