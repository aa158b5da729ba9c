"""A pytest plugin: every request and every answer of a test is judged by the provider's published OpenAPI file.

Switched on by `make conformance OPENAPI=PATH`. Two rules: an answer of the sandbox is as the file says, and a request
that the file objects to is refused. A request of our own client that goes to a stand-in is as the file says, too.
What misbehaviours make of an answer is not judged: they are there to break it. Nor are payments that a test put in as
odd ones (`override`, `without`, `raw`).
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import Response
from starlette.types import Scope

from billing_orchestration.sandbox.provider.api import ProviderApi
from billing_orchestration.sandbox.provider.misbehaviour import Call
from billing_orchestration_tests.conformance.deviations import DEVIATIONS
from billing_orchestration_tests.conformance.specification import ID_LENGTH, Exchange, Specification
from billing_orchestration_tests.provider import wire_server

OPENAPI = "SANDBOX_OPENAPI"
# What must have been judged in the end, or the hooks have come loose.
EXPECTED = (
    "POST /payments", "GET /payments", "GET /payments/{payment_id}", "POST /payment_methods",
    "GET /payment_methods/{payment_method_id}", "POST /refunds", "GET /refunds", "GET /refunds/{refund_id}",
    "GET /me",
)  # fmt: skip


class Judge:
    """Hears every exchange, and judges those of a test when it is over: the sandbox stays as quick as it is."""

    def __init__(self, specification: Specification) -> None:
        self.specification = specification
        self.judged: Counter[str] = Counter()
        self.excused: Counter[str] = Counter()
        self._heard: list[tuple[Exchange, list[Any]]] = []
        self._seen: set[bytes] = set()
        self._lock = threading.Lock()

    def answered(self, scope: Scope, call: Call, response: Response) -> None:
        """A request to the sandbox and its true answer."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        query = scope["query_string"].decode("latin-1")
        target = scope["raw_path"].decode("latin-1").partition("?")[0] + (f"?{query}" if query else "")
        exchange = Exchange(scope["method"], target, headers, call.body, response.status_code, bytes(response.body))
        odd = [
            payment.document()
            for payment in call.shop.payments()
            if payment.override or payment.without or payment.raw is not None
        ]
        with self._lock:
            self._heard.append((exchange, odd))

    def sent(self, request: wire_server.Request) -> None:
        """A request of the client to a stand-in for the provider; what it asks of a proxy is not the provider's."""
        if request.method != "CONNECT":
            with self._lock:
                self._heard.append((Exchange(request.method, request.target, request.headers, request.body), []))

    def faults(self) -> list[str]:
        """What the file objects to in what was heard since the last call, each kind once."""
        with self._lock:
            heard, self._heard = self._heard, []
        found: dict[str, None] = {}
        for exchange, odd in heard:
            operation = self.specification.operation(exchange) or ""
            self.judged[operation] += 1
            for fault in self._judge(exchange, odd, operation):
                reason = next((one for one in DEVIATIONS if one.covers(fault, exchange, operation)), None)
                if reason is None:
                    found[f"{exchange.method} {exchange.target} -> {exchange.status}: {fault}"] = None
                else:
                    self.excused[reason.name] += 1
        return list(found)

    def _judge(self, exchange: Exchange, odd: list[Any], operation: str) -> list[str]:
        if not operation:
            return ["the file knows no such operation"] if exchange.accepted or not exchange.status else []
        if not exchange.status:
            return self.specification.faults_of_request(exchange)
        faults = self.specification.faults_of_answer(self._fresh(exchange, odd))
        if exchange.accepted:
            faults += [f"accepted although {fault}" for fault in self.specification.faults_of_request(exchange)]
        if exchange.accepted and exchange.method == "POST" and len(exchange.answered["id"]) != ID_LENGTH:
            faults.append(f"a new id has not {ID_LENGTH} characters")
        return faults

    def _fresh(self, exchange: Exchange, odd: list[Any]) -> Exchange:
        """The exchange without payments that are odd by request, and in lists without what was judged before."""
        document = exchange.answered
        if document in odd:
            return replace(exchange, status=404, answer=b"{}")
        if not isinstance(document, dict) or document.get("type") != "list":
            return exchange
        fresh = [item for item in document["items"] if item not in odd and self._is_new(item)]
        return replace(exchange, answer=json.dumps({**document, "items": fresh}).encode())

    def _is_new(self, item: Any) -> bool:
        text = json.dumps(item, sort_keys=True).encode()
        new = text not in self._seen
        self._seen.add(text)
        return new


def pytest_configure(config: pytest.Config) -> None:
    judge = Judge(Specification.read(Path(os.environ[OPENAPI])))
    ProviderApi.watchers.append(judge.answered)
    wire_server.WATCHERS.append(judge.sent)
    config.pluginmanager.register(Report(judge), "conformance-report")


class Report:
    """Fails the test whose exchanges the file objects to, and tells in the end what was judged."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        result = yield
        faults = self._judge.faults()
        if faults:
            pytest.fail("the published file objects:\n" + "\n".join(faults[:20]), pytrace=False)
        return result

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._missing and session.exitstatus == 0 and not session.config.option.keyword:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section("judged by the published file")
        for name, count in sorted(self._judge.judged.items()):
            terminalreporter.line(f"{count:7} {name or 'unknown to the file'}")
        for name, count in sorted(self._judge.excused.items()):
            terminalreporter.line(f"{count:7} deviations: {name}")
        if self._missing:
            terminalreporter.line(f"never judged: {', '.join(self._missing)}")

    @property
    def _missing(self) -> list[str]:
        return [name for name in EXPECTED if not self._judge.judged[name]]
