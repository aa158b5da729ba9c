"""One request over the wire, exactly once: pooled, bounded in time, with TLS verified; no redirects, retries or netrc.

urllib3's pool is driven directly instead of a `requests.Session`: it is safe to share between threads, costs a third
of the CPU per call, never looks at `~/.netrc`, and tells apart what matters for money: whether a connection existed
when it failed. Whatever fails before there is one raises NotConnected; everything else may have been executed.
"""

from __future__ import annotations

import http.client
import io
import os
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import certifi
import urllib3
from requests.utils import get_auth_from_url, get_environ_proxies, select_proxy
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

# Where an operator names the certificates to trust, in the order in which `requests` and OpenSSL look.
_CERTIFICATE_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")
# total=False: an exception is raised as it is, nothing is ever sent a second time, a redirect is an answer.
_ONCE = urllib3.Retry(total=False, redirect=False)


class NotConnected(Exception):
    """There was no connection, so not a byte of the request left this machine. `__cause__` says why."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: HTTP status, headers (their names in lower case), the whole body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Wire:
    """The pooled connections to one API, for any number of threads: at most `max_connections` requests at a time."""

    def __init__(self, api_url: str, *, max_connections: int, connect_s: float) -> None:
        """Raises ValueError, with the reason, for a URL, a proxy or a certificate bundle that cannot work."""
        parts = _api_url_parts(api_url)
        self._connect_s = connect_s
        proxy = _proxy_for(api_url, parts.hostname or "")
        # One TLS context for all connections: it verifies, and loads the certificates once instead of per connection.
        tls = _tls_context() if parts.scheme == "https" or (proxy or "").startswith("https:") else None
        options: dict[str, Any] = {"maxsize": max_connections, "block": True, "ssl_context": tls}
        if proxy is None:
            self._manager = urllib3.PoolManager(1, **options)
        else:
            user, password = get_auth_from_url(proxy)
            authorization = urllib3.make_headers(proxy_basic_auth=f"{user}:{password}") if user else None
            self._manager = urllib3.ProxyManager(
                proxy, 1, proxy_headers=authorization, proxy_ssl_context=tls, **options
            )
        self._manager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}
        self._pool = self._manager.connection_from_url(api_url)
        # A forwarding proxy wants the whole URL; through a tunnel, or directly, it is the path.
        forwarded = proxy is not None and parts.scheme == "http"
        self._base = api_url.rstrip("/") if forwarded else parts.path.rstrip("/")

    def send(self, method: str, target: str, *, headers: dict[str, str], body: bytes | None, read_s: float) -> Answer:
        """Send once and read the whole answer within `read_s`. Raises NotConnected, or whatever went wrong later."""
        response = self._pool.urlopen(
            method,
            self._base + target,
            body=body,
            headers=headers,
            retries=_ONCE,
            redirect=False,
            assert_same_host=False,
            timeout=urllib3.Timeout(connect=self._connect_s, read=read_s),
        )
        return Answer(response.status, response.headers, response.data)

    def close(self) -> None:
        """Close the idle connections; one that is in use is closed when its answer is read."""
        self._pool.close()
        self._manager.clear()


# --- Connections -------------------------------------------------------------------------------------------------


class _Bounded(io.RawIOBase):
    """A socket to read from until a deadline: a server that drips one byte a second does not hold a thread for ever."""

    def __init__(self, sock: socket.socket) -> None:
        timeout_s = sock.gettimeout()
        self._sock = sock
        self._raw = sock.makefile("rb", buffering=0)
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._deadline is not None:
            left_s = self._deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError("the whole answer did not arrive in time")
            self._sock.settimeout(left_s)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _BoundedSocket:
    """What http.client's response needs of a socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Bounded(self._sock))


class _BoundedResponse(http.client.HTTPResponse):
    """A response whose status line, headers and body together arrive within the read timeout."""

    def __init__(self, sock: Any, *args: Any, **options: Any) -> None:
        super().__init__(_BoundedSocket(sock), *args, **options)  # type: ignore[arg-type]


class _HttpConnection(HTTPConnection):
    response_class = _BoundedResponse

    def connect(self) -> None:
        try:
            super().connect()
        except Exception as fault:
            raise NotConnected(f"no connection to {self.host}") from fault


class _HttpsConnection(HTTPSConnection):
    response_class = _BoundedResponse

    def connect(self) -> None:
        try:
            super().connect()  # the TLS handshake and a proxy's tunnel included
        except Exception as fault:
            raise NotConnected(f"no connection to {self.host}") from fault


class _HttpPool(HTTPConnectionPool):
    ConnectionCls = _HttpConnection


class _HttpsPool(HTTPSConnectionPool):
    ConnectionCls = _HttpsConnection


# --- The environment ---------------------------------------------------------------------------------------------


def _api_url_parts(api_url: str) -> Any:
    parts = urlsplit(api_url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("the provider's URL must look like https://api.yookassa.ru/v3")
    if parts.username is not None or parts.password is not None:
        raise ValueError("the provider's URL must hold no user and password")
    if parts.query or parts.fragment:
        raise ValueError("the provider's URL must end with its path, without ? and #")
    return parts


def _proxy_for(api_url: str, host: str) -> str | None:
    """The proxy that HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY name for this URL; never one for this machine."""
    if _is_loopback(host):
        return None
    proxy: str | None = select_proxy(api_url, get_environ_proxies(api_url, no_proxy=None))
    if not proxy:
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    scheme = urlsplit(proxy).scheme
    if scheme not in {"http", "https"}:
        raise ValueError(
            f"the environment names a {scheme} proxy for {host}; only http and https proxies are supported"
        )
    return proxy


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _tls_context() -> ssl.SSLContext:
    for variable in _CERTIFICATE_VARIABLES:
        path = os.environ.get(variable)
        if path:
            break
    else:
        variable, path = "certifi", certifi.where()
    try:
        if os.path.isdir(path):
            return ssl.create_default_context(capath=path)
        return ssl.create_default_context(cafile=path)
    except OSError as fault:  # ssl.SSLError is one
        raise ValueError(f"{variable} names {path}, which cannot be read as certificates: {fault}") from fault
