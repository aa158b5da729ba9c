"""A client with no manners of its own: no retries, no checks. What the sandbox promises is seen through it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import urllib3

from billing_orchestration.sandbox.provider.account import SandboxProvider
from billing_orchestration.sandbox.provider.server import Sandbox


class BareClient:
    """urllib3 and a shop's credentials: the sandbox's first shop's, unless another is given."""

    def __init__(self, sandbox: Sandbox, shop: SandboxProvider | None = None, *, timeout_s: float = 30.0) -> None:
        self.sandbox = sandbox
        self.shop = shop or sandbox.provider
        self.http = urllib3.PoolManager(retries=False, timeout=timeout_s, maxsize=8)

    def send(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, **how: Any
    ) -> urllib3.BaseHTTPResponse:
        credentials = urllib3.make_headers(basic_auth=f"{self.shop.shop_id}:{self.shop.secret_key}")
        return self.http.request(method, self.sandbox.url + path, headers={**credentials, **(headers or {})}, **how)

    def post(self, body: Any, key: str | None = "key-1", path: str = "/payments") -> urllib3.BaseHTTPResponse:
        headers = {"Content-Type": "application/json"}
        if key is not None:
            headers["Idempotence-Key"] = key
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.send("POST", path, headers=headers, body=raw)

    def get(self, item_id: str, path: str = "/payments") -> urllib3.BaseHTTPResponse:
        return self.send("GET", f"{path}/{item_id}")

    def list(self, path: str = "/payments", **filters: str) -> urllib3.BaseHTTPResponse:
        fields = {name.replace("__", "."): value for name, value in filters.items()}
        return self.send("GET", path, fields=fields)

    def scan(self, path: str = "/payments", **filters: str) -> list[list[Any]]:
        """All pages of a list."""
        pages = []
        cursor: dict[str, str] = {}
        while True:
            page = self.list(path, **filters, **cursor).json()
            pages.append(page["items"])
            if "next_cursor" not in page:
                return pages
            cursor = {"cursor": page["next_cursor"]}


def charge(method_id: str = "method-1", **changes: Any) -> dict[str, Any]:
    """The body of a renewal; a change to ... leaves the field out."""
    body = {
        "amount": {"value": "990.00", "currency": "RUB"},
        "capture": True,
        "payment_method_id": method_id,
        "description": "Renewal",
        "metadata": {"subscription_id": "7"},
        **changes,
    }
    return {name: value for name, value in body.items() if value is not ...}
