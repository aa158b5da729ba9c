"""The provider's API under /v3 as it is when it behaves: credentials, routes, and errors in the provider's form."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Sequence

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


def shop_of(authorization: str, shops: Iterable[SandboxProvider]) -> SandboxProvider:
    """Whose credentials these are (HTTP basic authentication by shop id and secret key), or AuthenticationError."""
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "basic":
        raise AuthenticationError("Authorization by shopId and secret key is missing")
    try:
        shop_id, _, secret_key = base64.b64decode(token, validate=True).decode("utf-8").partition(":")
    except (binascii.Error, ValueError):
        raise AuthenticationError("Authorization header is not basic authentication") from None
    for shop in shops:
        if shop.is_authorised(shop_id, secret_key):
            return shop
    raise AuthenticationError(
        "Error in shopId or secret key. Check their validity. You can reissue the key in the Merchant Profile"
    )


class Shop(SimpleUser):
    """Who sends a request: a shop with its account."""

    def __init__(self, account: SandboxProvider) -> None:
        super().__init__(account.shop_id)
        self.account = account


class ShopCredentials(AuthenticationBackend):
    """Each of the shops by its own credentials."""

    def __init__(self, shops: Sequence[SandboxProvider]) -> None:
        self._shops = shops

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, Shop]:
        return AuthCredentials(), Shop(shop_of(conn.headers.get("authorization", ""), self._shops))


def _posted(path: str, create: Callable[..., Answer], name: str) -> Route:
    async def endpoint(request: Request) -> Response:
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise Refused(415, None, "Content-Type is not application/json", "Content-Type")
        key, looked_up = request.headers.get("idempotence-key"), request.scope.get(KEY_LOOKED_UP, False)
        return response(create(request.user.account, await request.body(), key, looked_up=looked_up))

    return Route(path, endpoint, methods=["POST"], name=name)


def _listed(path: str, page: Callable[[SandboxProvider, Sequence[tuple[str, str]]], Answer], name: str) -> Route:
    async def endpoint(request: Request) -> Response:
        return response(page(request.user.account, request.query_params.multi_items()))

    return Route(path, endpoint, methods=["GET"], name=name)


def _got(path: str, get: Callable[..., Answer], name: str) -> Route:
    async def endpoint(request: Request) -> Response:
        return response(get(request.user.account, *request.path_params.values()))

    return Route(path, endpoint, methods=["GET"], name=name)


def build_endpoints(shops: Sequence[SandboxProvider]) -> Starlette:
    """The application for these shops (there may be more later).

    A route's name is what misbehaviours and counts call the request.
    """
    app = Starlette(
        routes=[
            _posted("/payments", SandboxProvider.create_payment, "create"),
            _listed("/payments", SandboxProvider.list_payments, "list"),
            _got("/payments/{id}", SandboxProvider.get_payment, "get"),
            _posted("/refunds", SandboxProvider.create_refund, "create_refund"),
            _listed("/refunds", SandboxProvider.list_refunds, "list_refunds"),
            _got("/refunds/{id}", SandboxProvider.get_refund, "get_refund"),
            _posted("/payment_methods", SandboxProvider.create_method, "create_method"),
            _got("/payment_methods/{id}", SandboxProvider.get_method, "get_method"),
            _got("/me", SandboxProvider.account, "me"),
        ],
        middleware=[
            Middleware(AuthenticationMiddleware, backend=ShopCredentials(shops), on_error=_unauthorised),
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
