"""Pulling the sandbox provider's strings from another process, over its control API under /sandbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import urllib3

_TIMEOUT_S = 30.0


class SandboxControl:
    """A running sandbox. `url` ends in /sandbox. A refused order raises RuntimeError with its words."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._pool = urllib3.PoolManager(retries=False, timeout=_TIMEOUT_S)

    def add_methods(self, methods: Sequence[Mapping[str, Any]]) -> None:
        """Put saved payment methods in, each with the script of its outcomes."""
        self._call("POST", "/methods", list(methods))

    def add_payments(self, payments: Sequence[Mapping[str, Any]]) -> None:
        """Put payments into the provider's history."""
        self._call("POST", "/payments", list(payments))

    def set_switches(self, **switches: Any) -> None:
        """Choose how the shop behaves (see `switches`)."""
        self._call("POST", "/switches", switches)

    def misbehave(self, rules: Sequence[Mapping[str, Any]]) -> None:
        """Make it misbehave (see `misbehaviour`)."""
        self._call("POST", "/misbehaviours", list(rules))

    def behave(self) -> None:
        """Drop all misbehaviours."""
        self._call("DELETE", "/misbehaviours")

    def payments(self) -> list[dict[str, Any]]:
        """Every payment as its API shows it."""
        shown: list[dict[str, Any]] = self._call("GET", "/payments")
        return shown

    def ledger(self) -> list[dict[str, Any]]:
        """Every movement of money, oldest first."""
        entries: list[dict[str, Any]] = self._call("GET", "/ledger")
        return entries

    def sends_by_key(self) -> dict[str, int]:
        """How often each idempotence key arrived."""
        keys: dict[str, int] = self._call("GET", "/requests")["keys"]
        return keys

    def close(self) -> None:
        """Close the connections."""
        self._pool.clear()

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        answer = self._pool.request(method, self._url + path, json=body)
        document = answer.json()
        if answer.status >= 400:
            raise RuntimeError(f"the sandbox refused {method} {path}: {document.get('error')}")
        return document
