"""The provider's API under /v3 as it is when it behaves: credentials, routes, and errors in the provider's form."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence

from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, AuthenticationBackend, AuthenticationError, SimpleUser
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Route

from billing_orchestration.sandbox.provider.account import SandboxProvider
from billing_orchestration.sandbox.provider.answers import Answer, Refused

# Set in a request's scope: its idempotence key was unknown when it came in.
KEY_LOOKED_UP = "sandbox.key_looked_up"


def response(answer: Answer) -> Response:
    """The answer as Starlette sends it."""
    return Response(answer.body, answer.status, dict(answer.headers), answer.content_type)


class ShopCredentials(AuthenticationBackend):
    """HTTP basic authentication by shop id and secret key."""

    def __init__(self, provider: SandboxProvider) -> None:
        self._provider = provider

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser]:
        scheme, _, token = conn.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "basic":
            raise AuthenticationError("Authorization by shopId and secret key is missing")
        try:
            shop_id, _, secret_key = base64.b64decode(token, validate=True).decode("utf-8").partition(":")
        except (binascii.Error, ValueError):
            raise AuthenticationError("Authorization header is not basic authentication") from None
        if not self._provider.is_authorised(shop_id, secret_key):
            raise AuthenticationError(
                "Error in shopId or secret key. Check their validity. You can reissue the key in the Merchant Profile"
            )
        return AuthCredentials(), SimpleUser(shop_id)


def _posted(path: str, create: Callable[..., Answer], name: str) -> Route:
    async def endpoint(request: Request) -> Response:
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise Refused(415, None, "Content-Type is not application/json", "Content-Type")
        key, looked_up = request.headers.get("idempotence-key"), request.scope.get(KEY_LOOKED_UP, False)
        return response(create(await request.body(), key, looked_up=looked_up))

    return Route(path, endpoint, methods=["POST"], name=name)


def _listed(path: str, page: Callable[[Sequence[tuple[str, str]]], Answer], name: str) -> Route:
    async def endpoint(request: Request) -> Response:
        return response(page(request.query_params.multi_items()))

    return Route(path, endpoint, methods=["GET"], name=name)


def _got(path: str, get: Callable[..., Answer], name: str) -> Route:
    async def endpoint(request: Request) -> Response:
        return response(get(*request.path_params.values()))

    return Route(path, endpoint, methods=["GET"], name=name)


def build_endpoints(provider: SandboxProvider) -> Starlette:
    """The application. A route's name is what misbehaviours and counts call the request."""

    app = Starlette(
        routes=[
            _posted("/payments", provider.create_payment, "create"),
            _listed("/payments", provider.list_payments, "list"),
            _got("/payments/{id}", provider.get_payment, "get"),
            _posted("/refunds", provider.create_refund, "create_refund"),
            _listed("/refunds", provider.list_refunds, "list_refunds"),
            _got("/refunds/{id}", provider.get_refund, "get_refund"),
            _posted("/payment_methods", provider.create_method, "create_method"),
            _got("/payment_methods/{id}", provider.get_method, "get_method"),
            _got("/me", provider.account, "me"),
        ],
        middleware=[
            Middleware(AuthenticationMiddleware, backend=ShopCredentials(provider), on_error=_unauthorised),
        ],
        exception_handlers={Refused: _refused, HTTPException: _no_such_call},
    )
    app.router.redirect_slashes = False
    return app


def _unauthorised(_connection: HTTPConnection, error: AuthenticationError) -> Response:
    return response(Refused(401, "invalid_credentials", str(error), "Authorization").answer())


async def _refused(_request: Request, refused: Exception) -> Response:
    assert isinstance(refused, Refused)  # noqa: S101 - Starlette's type is wider
    return response(refused.answer())


async def _no_such_call(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code == 405:
        return response(Refused(405, None, f"Method {request.method} is not supported").answer())
    return response(Refused(404, "not_found", "Resource not found").answer())
