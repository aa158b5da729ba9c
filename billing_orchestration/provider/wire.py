"""One request over the wire, sent at most once: urllib3, pooled, with TLS verified; no retries, redirects or netrc.

What this adds to urllib3: NotConnected for whatever fails before a connection exists, so that everything else may have
been executed; one deadline for a whole answer, headers included; a largest size; and the certificates and proxies that
the environment names.
"""

from __future__ import annotations

import http.client
import io
import os
import socket
import ssl
import time
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote
from urllib.request import getproxies, proxy_bypass

import certifi
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager, ProxyManager, Timeout
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ClosedPoolError, LocationParseError, ReadTimeoutError
from urllib3.response import HTTPResponse
from urllib3.util import Url, parse_url

from billing_orchestration.loopback import is_loopback

# Where an operator names the certificates to trust, in the order in which `requests` and OpenSSL look.
_CERTIFICATE_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")
# Servers close an idle connection after 60 to 75 s. A request written into that very moment would be lost, and a
# charge's outcome unknown for nothing: an older connection is not used again.
_LONGEST_IDLE_S = 45.0
# The body, unpacked. A page of 100 payments takes 0.2 MB. http.client takes at most 100 headers of 64 KB.
LARGEST_ANSWER = 16 * 2**20


class NoWay(ValueError):
    """The environment names a proxy or a certificate bundle that cannot work. The text does not repeat it."""


class NotConnected(Exception):
    """There was no connection, so not a byte of the request left this machine. `__cause__` says why."""


class UnusableAnswer(Exception):
    """The answer is too large, or not the last one to the request. The request may have been executed."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: HTTP status, headers (their names without case), the whole body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Wire:
    """The pooled connections to one API, for any number of threads: at most `max_connections` requests at a time."""

    def __init__(self, api_url: str, *, max_connections: int, connect_s: float) -> None:
        """Raises ValueError for a URL that cannot work, NoWay for a proxy or a certificate bundle."""
        if max_connections < 1:
            raise ValueError(f"max_connections is {max_connections}; it must be at least 1")
        url = _parse_api_url(api_url)
        proxy = _proxy_for(url)
        self.connect_s = connect_s
        self._base = (url.path or "").rstrip("/")
        if proxy and url.scheme == "http":  # a forwarding proxy wants the whole URL; through a tunnel it is the path
            self._base = f"http://{url.netloc}{self._base}"
        options: dict[str, Any] = {
            "maxsize": max_connections,
            "block": True,
            # Without it urllib3 lets a proxied request's body wait for the acknowledgement of its headers.
            "socket_options": HTTPConnection.default_socket_options,
            # One context for all connections: it verifies, and loads the certificates once.
            "ssl_context": _tls_context() if url.scheme == "https" else None,
        }
        self._manager = ProxyManager(*proxy, **options) if proxy else PoolManager(**options)
        self._manager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}
        self._pool = self._manager.connection_from_host(url.host, url.port, url.scheme)

    def send(
        self, method: str, target: str, *, headers: Mapping[str, str], body: bytes | None, read_s: float
    ) -> Answer:
        """Send once; read the whole answer within `read_s`. Waits while all connections are in use.

        Raises NotConnected when nothing was sent, TimeoutError when the answer did not arrive in time, or whatever
        else went wrong after the request may have left.
        """
        try:
            response = self._pool.urlopen(
                method,
                self._base + target,
                body=body,
                headers=dict(headers),
                retries=False,
                redirect=False,
                assert_same_host=False,
                timeout=Timeout(connect=self.connect_s, read=read_s),
                preload_content=False,
            )
            return _read_answer(response)
        except ReadTimeoutError as fault:
            raise TimeoutError("the whole answer did not arrive in time") from fault
        except ClosedPoolError as fault:
            raise NotConnected("the client is closed") from fault

    def close(self) -> None:
        """Close the idle connections; one that is in use is closed when its answer is read. Nothing is sent later."""
        self._pool.close()


def _read_answer(response: Any) -> Answer:
    try:
        if response.status < 200:
            # The final answer is still to come, and must not be taken for the answer to a later request.
            raise UnusableAnswer(f"HTTP {response.status} is no final answer")
        body = response.read(LARGEST_ANSWER + 1)
    finally:
        # An answer that was read to its end has returned its connection to the pool; any other one is cut here.
        response.close()
        response.release_conn()
    if len(body) > LARGEST_ANSWER:
        raise UnusableAnswer(f"the answer is larger than {LARGEST_ANSWER:,} bytes")
    return Answer(response.status, response.headers, body)


class _BoundedReader(io.RawIOBase):
    """What arrives on a socket before a deadline: a server that drips or floods cannot hold a thread."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket) -> None:
        self._raw = raw
        self._sock = sock
        # urllib3 sets the time for the answer as the socket's timeout just before it reads.
        self._deadline = time.monotonic() + (sock.gettimeout() or 0.0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the whole answer did not arrive in time")
        self._sock.settimeout(left_s)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _BoundedResponse(http.client.HTTPResponse):
    """An answer whose headers and body are read before one deadline."""

    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp = io.BufferedReader(_BoundedReader(self.fp.detach(), sock))


class _Connection(HTTPConnection):
    """A connection that tells "not connected" from everything later, and is not used again when it was idle long."""

    response_class = _BoundedResponse
    _used_at = 0.0

    def connect(self) -> None:
        """Connect, with the TLS handshake and a proxy's tunnel."""
        try:
            super().connect()
        except Exception as fault:
            raise NotConnected(f"no connection to {self.host}") from fault
        self._used_at = time.monotonic()

    def getresponse(self) -> HTTPResponse:  # type: ignore[override] # as urllib3's own
        """Read the answer's headers."""
        response = super().getresponse()
        self._used_at = time.monotonic()
        return response

    @property
    def is_connected(self) -> bool:
        """Whether it can be used again: not too old, and the server has said nothing (its goodbye) unasked."""
        return time.monotonic() - self._used_at < _LONGEST_IDLE_S and super().is_connected


class _TlsConnection(_Connection, HTTPSConnection):
    """The same over TLS."""


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


# --- The way to the API: addresses, proxies, certificates --------------------------------------------------------


def _parse_api_url(api_url: str) -> Url:
    try:
        url = parse_url(api_url)
    except LocationParseError:
        url = Url()
    if url.scheme not in {"http", "https"} or not url.host:
        raise ValueError("the provider's URL must look like https://api.yookassa.ru/v3")
    if url.auth is not None:
        raise ValueError("the provider's URL must hold no user and password")
    if url.query is not None or url.fragment is not None:
        raise ValueError("the provider's URL must end with its path, without ? and #")
    return url


def _proxy_for(url: Url) -> tuple[str, int, None, Mapping[str, str]] | None:
    """The proxy that HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY name for this URL; never one for this machine."""
    if is_loopback((url.host or "").strip("[]")) or proxy_bypass(url.netloc or ""):
        return None
    named = getproxies()
    address = named.get(url.scheme or "") or named.get("all")
    if not address:
        return None
    try:
        proxy = parse_url(address if "://" in address else f"http://{address}")
    except LocationParseError:
        proxy = Url()
    if proxy.scheme != "http" or not proxy.host:
        raise NoWay("the environment names a proxy (HTTPS_PROXY) that is not of the form http://HOST:PORT")
    headers = {}
    if proxy.auth is not None:
        account = unquote(proxy.auth) + ("" if ":" in proxy.auth else ":")
        headers["Proxy-Authorization"] = "Basic " + b64encode(account.encode()).decode("ascii")
    return f"http://{proxy.netloc}", 1, None, headers


def _tls_context() -> ssl.SSLContext:
    for variable in _CERTIFICATE_VARIABLES:
        path = os.environ.get(variable)
        if path:
            break
    else:
        variable, path = "certifi", certifi.where()
    try:
        is_folder = os.path.isdir(path)
        context = ssl.create_default_context(cafile=None if is_folder else path, capath=path if is_folder else None)
    except OSError as fault:  # ssl.SSLError is one
        raise NoWay(f"{variable} names nothing that can be read as certificates ({type(fault).__name__})") from fault
    # Whatever the system's own configuration of OpenSSL allows.
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
