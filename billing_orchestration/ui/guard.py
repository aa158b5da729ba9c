"""The guard in front of the Dagster UI: who may speak to it, from which page, and in which form.

Dagster's webserver executes mutations from anybody who reaches it: sent by GET, from any page in an operator's browser,
under any name. So each request passes these checks, in this order, and the first that fails answers it:

1. **Name.** `Host` is a name of this machine or one of the UI's (DNS rebinding).
2. **Page.** A request that a page sends comes from the UI's own (`Origin`, `Sec-Fetch-Site`). A link to the UI may be
   followed from anywhere.
3. **Login**, where one is asked for.
4. **Form.** GraphQL is sent by POST as `application/json`, which no foreign page can do unasked. Nothing else is sent
   at all: Dagster's REST endpoints that report events are closed.

A websocket passes the first three. Programs send no `Origin` and are asked for the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Set
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from billing_orchestration.loopback import is_loopback
from billing_orchestration.ui_login import LoginProxy, Passwords

_LOG = logging.getLogger(__name__)
# Beside what Dagster sets. A second Content-Security-Policy only narrows the first.
_HEADERS = {
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_POLICY = "frame-ancestors 'none'"
_UNAUTHORIZED = 401
_READS = frozenset({"GET", "HEAD"})
# What a health check inside the container or on the host asks; it shows versions only.
_PROBE = "/server_info"


class Guard:
    """The ASGI application in front of another. `names`: `Host` values of the UI beside those of this machine."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        names: Set[str] = frozenset(),
        login: Passwords | LoginProxy | None = None,
        prefix: str = "",
    ) -> None:
        self._app = app
        self._names = names
        self._login = login
        self._graphql, self._probe = f"{prefix}/graphql", f"{prefix}{_PROBE}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, or answer it with the reason why not."""
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.append("Content-Security-Policy", _POLICY)
            await send(message)

        request = HTTPConnection(scope)
        refusal = self._refusal(request)
        # A browser that has not asked its person for the password yet is nothing to note.
        if refusal is not None and (refusal.status_code != _UNAUTHORIZED or "authorization" in request.headers):
            _LOG.warning("refused %.200r from %s: %s", scope["path"], _peer(request), bytes(refusal.body).decode())
        await (refusal or self._app)(scope, receive, send_with_headers)

    def _refusal(self, request: HTTPConnection) -> PlainTextResponse | None:
        if not self._is_ours(request.headers.getlist("host")):
            return PlainTextResponse("The UI is not served under this name: add it to UI_HOSTS.", 403)
        if not self._comes_from_ours(request):
            return PlainTextResponse("A page of another site may not use the UI.", 403)
        login = None if self._is_probe(request) else self._login
        if login is not None and not login.admits(_peer(request), request.headers):
            return _ask_to_log_in(login)
        return self._wrong_form(request)

    def _is_ours(self, hosts: list[str]) -> bool:
        return len(hosts) == 1 and (hosts[0].lower() in self._names or is_loopback(_name(hosts[0])))

    def _comes_from_ours(self, request: HTTPConnection) -> bool:
        headers = request.headers
        for origin in headers.getlist("origin"):
            if _netloc(origin) not in {headers["host"].lower(), *self._names}:
                return False
        if headers.get("sec-fetch-site", "none") in {"none", "same-origin"}:
            return True
        followed = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == ("navigate", "document")
        return followed and request.scope.get("method") in _READS

    def _is_probe(self, request: HTTPConnection) -> bool:
        both_ends = (_peer(request), _name(request.headers["host"]))
        return request.scope["path"] == self._probe and all(map(is_loopback, both_ends))

    def _wrong_form(self, request: HTTPConnection) -> PlainTextResponse | None:
        if request.scope["type"] == "websocket":
            return None
        method, is_graphql = request.scope["method"], request.scope["path"] == self._graphql
        if method == "POST" and is_graphql:
            types = [value.partition(";")[0].strip().lower() for value in request.headers.getlist("content-type")]
            if types != ["application/json"]:
                return PlainTextResponse("GraphQL is sent as application/json.", 415)
        elif method not in _READS:
            return PlainTextResponse("The UI takes nothing but GraphQL.", 405, {"Allow": "GET, HEAD"})
        elif is_graphql and (request.scope["query_string"] or "text/html" not in request.headers.get("accept", "")):
            return PlainTextResponse("GraphQL is sent by POST, never by GET.", 405, {"Allow": "POST"})
        return None


def _ask_to_log_in(login: Passwords | LoginProxy) -> PlainTextResponse:
    if login.challenge is None:
        return PlainTextResponse(login.refusal, 403)
    return PlainTextResponse(login.refusal, _UNAUTHORIZED, {"WWW-Authenticate": login.challenge})


def _peer(request: HTTPConnection) -> str:
    return request.client.host if request.client else ""


def _netloc(origin: str) -> str:
    """Host and port of an `Origin`; empty for `null`, and for what cannot be read."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
