"""The sandbox's controls under /sandbox, for a driver in another process.

They ask for no credentials, so they answer this machine only, by a name of this machine, and take orders as
`application/json`: a page in somebody's browser can send neither of the two from another site.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from billing_orchestration.sandbox.provider.api import ProviderApi
from billing_orchestration.sandbox.provider.clock import SandboxClock, iso
from billing_orchestration.sandbox.provider.misbehaviour import Misbehaviour

_THIS_MACHINE = frozenset({"127.0.0.1", "::1", "localhost"})
# What the cabinet and the customers can do to a thing, by its kind, and which method of the account does it.
_OPERATIONS: Mapping[str, Mapping[str, str]] = {
    "methods": {"activate": "activate_method", "deactivate": "deactivate_method"},
    "payments": {name: name for name in ("pay", "cancel", "capture", "refund", "register_receipt", "cancel_receipt")},
    "refunds": {"succeed": "succeed_refund", "cancel": "cancel_refund"},
}


def build_control(api: ProviderApi) -> Starlette:
    """The application. An order that cannot be carried out gets 400 and the reason.

    An order is for the first shop, or for the one that the query names: `?shop=100501`.
    """
    app = Starlette(
        routes=[
            _get("/health", _Control.health),
            _get("/methods", _Control.methods),
            _post("/methods", _Control.add_methods),
            _get("/payments", _Control.payments),
            _post("/payments", _Control.add_payments),
            _get("/payments/{payment_id}", _Control.payment),
            _get("/refunds", _Control.refunds),
            _post("/{kind}/{item_id}/{operation}", _Control.operate),
            _post("/purchases", _Control.purchase),
            _get("/ledger", _Control.ledger),
            _get("/misbehaviours", _Control.misbehaviours),
            _post("/misbehaviours", _Control.misbehave),
            _route("DELETE", "/misbehaviours", _Control.behave),
            _get("/clock", _Control.clock),
            _post("/clock", _Control.set_clock),
            _get("/switches", _Control.switches),
            _post("/switches", _Control.set_switches),
            _get("/requests", _Control.requests),
            _route("DELETE", "/requests", _Control.forget_requests),
            _get("/shops", _Control.shops),
            _post("/shops", _Control.add_shop),
            _post("/reset", _Control.reset),
        ],
        exception_handlers=dict.fromkeys((ValueError, TypeError, KeyError), _refuse),
    )
    app.state.api = api
    return app


def _route(method: str, path: str, action: Callable[..., Any]) -> Route:
    """`action` takes the control, what the path names and, after it, the body of a POST."""

    async def endpoint(request: Request) -> Response:
        if request.client is None or request.client.host not in _THIS_MACHINE:
            return JSONResponse({"error": "the sandbox is driven from its own machine only"}, status_code=403)
        if request.url.hostname not in _THIS_MACHINE:
            return JSONResponse({"error": "the sandbox is driven as 127.0.0.1 or localhost only"}, status_code=403)
        if method == "POST" and request.headers.get("content-type") != "application/json":
            return JSONResponse({"error": "an order is sent as application/json"}, status_code=415)
        given = list(request.path_params.values())
        if method == "POST":
            given.append(json.loads(await request.body() or b"{}"))
        return JSONResponse(action(_Control(request.app.state.api, request.query_params.get("shop")), *given))

    return Route(path, endpoint, methods=[method])


def _get(path: str, action: Callable[..., Any]) -> Route:
    return _route("GET", path, action)


def _post(path: str, action: Callable[..., Any]) -> Route:
    return _route("POST", path, action)


async def _refuse(_request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error.args[0] if error.args else error)}, status_code=400)


class _Control:
    """What each route does. Bodies are decoded JSON, and so is what is returned."""

    def __init__(self, api: ProviderApi, shop_id: str | None) -> None:
        self.api = api
        self.provider = api.provider if shop_id is None else api.shop(shop_id)

    def health(self) -> Any:
        return {"status": "ok", "shop_id": self.provider.shop_id, **self.clock()}

    def methods(self) -> Any:
        return [
            {
                "id": method.id,
                "type": method.type,
                "saved": method.saved,
                "status": method.status,
                "next": method.script[0].kind,
            }
            for method in self.provider.methods()
        ]

    def add_methods(self, body: Any) -> Any:
        for item in _many(body):
            given = dict(item)
            self.provider.add_method(given.pop("id", None), given.pop("script", "succeeded"), **given)
        return self.methods()

    def payments(self) -> Any:
        return [payment.document() for payment in self.provider.payments()]

    def add_payments(self, body: Any) -> Any:
        return [payment.id for payment in self.provider.add_payments(_many(body))]

    def payment(self, payment_id: str) -> Any:
        return self.provider.payment(payment_id).document()

    def operate(self, kind: str, item_id: str, operation: str, body: Any) -> Any:
        name = _OPERATIONS.get(kind, {}).get(operation)
        if name is None:
            raise ValueError(f"unknown operation {operation!r} on {kind}")
        return getattr(self.provider, name)(item_id, **body).document()

    def refunds(self) -> Any:
        return [refund.document() for refund in self.provider.refunds()]

    def purchase(self, body: Any) -> Any:
        given = dict(body)
        start = self.provider.hold if given.pop("hold", False) else self.provider.purchase
        return start(given.pop("amount"), **given).document()

    def ledger(self) -> Any:
        return [entry.document() for entry in self.provider.ledger()]

    def misbehaviours(self) -> Any:
        return [rule.document() for rule in self.api.misbehaviours.rules()]

    def misbehave(self, body: Any) -> Any:
        for item in _many(body):
            self.api.misbehaviours.add(Misbehaviour(**item))
        return self.misbehaviours()

    def behave(self) -> Any:
        self.api.behave()
        return self.misbehaviours()

    def clock(self) -> Any:
        return {"now": iso(self.provider.clock())}

    def set_clock(self, body: Any) -> Any:
        clock = self.provider.clock
        if not isinstance(clock, SandboxClock):
            raise ValueError("this sandbox's clock cannot be moved")
        if body.get("at") is not None:
            clock.set(body["at"])
        if "offset_s" in body:
            clock.run(timedelta(seconds=body["offset_s"]))
        if "advance_s" in body:
            clock.advance(body["advance_s"])
        return self.clock()

    def switches(self) -> Any:
        return asdict(self.provider.switches)

    def set_switches(self, body: Any) -> Any:
        self.provider.switches = replace(self.provider.switches, **body)
        return self.switches()

    def requests(self) -> Any:
        keys = Counter(item.idempotence_key for item in self.api.requests if item.idempotence_key is not None)
        return {
            "counts": dict(self.api.counts),
            "keys": dict(keys),
            "peak_in_flight": self.api.peak_in_flight,
            "connections_opened": self.api.connections_opened,
        }

    def forget_requests(self) -> Any:
        self.api.requests.clear()
        self.api.counts.clear()
        return self.requests()

    def shops(self) -> Any:
        return [{"shop_id": shop.shop_id, "test": shop.is_test_shop} for shop in self.api.shops]

    def add_shop(self, body: Any) -> Any:
        self.api.add_shop(**body)
        return self.shops()

    def reset(self, _body: Any) -> Any:
        self.api.reset()
        return {"status": "ok"}


def _many(body: Any) -> list[Mapping[str, Any]]:
    return body if isinstance(body, list) else [body]
