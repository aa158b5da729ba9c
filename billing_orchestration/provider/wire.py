"""One request over the wire, exactly once: pooled, bounded in time, with TLS verified; no redirects, retries or netrc.

A connection is made by `http.client`, and one write and one reader are all that happens on it: there is no layer that
could send a second time, follow a redirect, read `~/.netrc` or log a header. It takes a fifth of the CPU of a
`requests.Session` and half of urllib3's pool, about what a bare `http.client` request takes. Whatever fails before a
connection exists raises NotConnected; everything later may have been executed.
"""

from __future__ import annotations

import http.client
import io
import os
import re
import select
import socket
import ssl
import sys
import threading
import time
import zlib
from base64 import b64encode
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Protocol
from urllib.parse import SplitResult, quote, unquote, urlsplit

# Where an operator names the certificates to trust, in the order in which `requests` and OpenSSL look.
_CERTIFICATE_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")
# Servers close an idle connection after 60 to 75 s. A request written into that very moment would be lost, and a
# charge's outcome unknown for nothing: an older connection is not used again.
_LONGEST_IDLE_S = 45.0


class NotConnected(Exception):
    """There was no connection, so not a byte of the request left this machine. `__cause__` says why."""


class Headers(Protocol):
    """The headers of an answer."""

    def get(self, name: str, /) -> str | None:
        """One of them, by its name without case."""
        ...


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: HTTP status, headers, the whole body."""

    status: int
    headers: Headers
    body: bytes


class Wire:
    """The pooled connections to one API, for any number of threads: at most `max_connections` requests at a time."""

    def __init__(self, api_url: str, *, max_connections: int, connect_s: float) -> None:
        """Raises ValueError, with the reason, for a URL, a proxy or a certificate bundle that cannot work."""
        if max_connections < 1:
            raise ValueError(f"max_connections is {max_connections}; it must be at least 1")
        self._way = _Way.to(api_url, connect_s)
        self._slots = threading.BoundedSemaphore(max_connections)
        # Last in, first out: the connections at the bottom grow old and are dropped.
        self._idle: deque[tuple[http.client.HTTPConnection, float]] = deque()
        self._closed = False

    def send(
        self, method: str, target: str, *, headers: Mapping[str, str], body: bytes | None, read_s: float
    ) -> Answer:
        """Send once and read the whole answer, both within `read_s`.

        Raises NotConnected, or whatever went wrong later. Waits while all connections are in use.
        """
        request = self._way.request(method, target, headers, body)
        with self._slots:
            connection = self._connection()
            try:
                answer, reusable = _exchange(connection.sock, method, request, read_s)
            except BaseException:
                connection.close()
                raise
            if reusable and not self._closed:
                self._idle.append((connection, time.monotonic()))
            else:
                connection.close()
            return answer

    def close(self) -> None:
        """Close the idle connections; one that is in use is closed when its answer is read."""
        self._closed = True
        while self._idle:
            self._idle.pop()[0].close()

    def _connection(self) -> http.client.HTTPConnection:
        while True:
            try:
                connection, since = self._idle.pop()
            except IndexError:
                return self._way.connect()
            # Something to read before anything was asked is the server's goodbye.
            if time.monotonic() - since < _LONGEST_IDLE_S and not _has_something_to_read(connection.sock):
                return connection
            connection.close()


def _exchange(sock: socket.socket, method: str, request: bytes, read_s: float) -> tuple[Answer, bool]:
    """Write the request, read the answer. Also whether the connection can be used again."""
    deadline = time.monotonic() + read_s
    if sock.gettimeout() != read_s:
        sock.settimeout(read_s)
    sock.sendall(request)
    left_s = deadline - time.monotonic()
    if left_s < read_s - _SWIFT_S:
        sock.settimeout(max(left_s, 0.001))
    first = sock.recv(_ONE_READ)
    answer = _plain_answer(first)
    if answer is not None:
        return answer, True
    response = http.client.HTTPResponse(_BoundedSocket(sock, deadline, first), method=method)  # type: ignore[arg-type]
    with response:
        response.begin()
        reusable = not response.will_close
        body = response.read()  # raises IncompleteRead for less than was announced
    return Answer(response.status, response.headers, _decoded(body, response.headers.get("Content-Encoding"))), reusable


def _plain_answer(first: bytes) -> Answer | None:
    """The answer to a charge as it nearly always comes: 200, one packet, its length announced, as it is, kept alive.

    None for every other one, which http.client reads; that takes five times the CPU, most of it for headers that
    nobody looks at.
    """
    end = first.find(b"\r\n\r\n")
    if end < 0 or not first.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 200\r")):
        return None
    head = first[: end + 2].lower()
    length = _LENGTH.findall(head)
    if (
        len(length) != 1
        or int(length[0]) != len(first) - end - 4
        or head.count(b"\n") != head.count(b"\r\n")
        or _NOT_PLAIN.search(head)
    ):
        return None
    return Answer(200, _LateHeaders(first[: end + 4]), first[end + 4 :])


_LENGTH = re.compile(rb"\ncontent-length:[ \t]*(\d{1,9})[ \t]*\r")
# What makes an answer another one than its bytes, or its connection not one to use again; a second or odd length.
_NOT_PLAIN = re.compile(
    rb"\n(?:[ \t]|transfer-encoding|content-encoding|upgrade|connection(?!:[ \t]*keep-alive[ \t]*\r)"
    rb"|content-length(?!:[ \t]*\d{1,9}[ \t]*\r))"
)
# Sixteen times a payment.
_ONE_READ = 65_536
# A request that was written within this time has used up nothing of the time for the answer.
_SWIFT_S = 0.05


class _LateHeaders:
    """Headers that are parsed when somebody asks for one; of a success nobody does."""

    def __init__(self, head: bytes) -> None:
        self._head = head

    def get(self, name: str, /) -> str | None:
        lines = io.BytesIO(self._head)
        lines.readline()
        return http.client.parse_headers(lines).get(name)


def _decoded(body: bytes, encoding: str | None) -> bytes:
    if encoding is None or encoding.lower() in {"", "identity"} or not body:
        return body
    if encoding.lower() != "gzip":
        raise http.client.HTTPException(f"the body is encoded as {encoding[:40]}, which was not asked for")
    unpacker = zlib.decompressobj(wbits=31)
    try:
        plain = unpacker.decompress(body)
    except zlib.error as fault:
        raise http.client.HTTPException(f"the body is no gzip: {fault}") from fault
    if not unpacker.eof:
        raise http.client.HTTPException("the gzip body is cut off")
    return plain


class _Bounded(io.RawIOBase):
    """A socket to read from until a deadline: a server that drips one byte a second does not hold a thread for ever."""

    def __init__(self, sock: socket.socket, deadline: float, first: bytes) -> None:
        self._sock = sock
        self._raw = sock.makefile("rb", buffering=0)
        self._deadline = deadline
        self._first = memoryview(first)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._first:
            count = min(len(buffer), len(self._first))
            buffer[:count] = self._first[:count]
            self._first = self._first[count:]
            return count
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the whole answer did not arrive in time")
        self._sock.settimeout(left_s)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _BoundedSocket:
    """What http.client's response needs of a socket. `first`: what has been read from it already."""

    def __init__(self, sock: socket.socket, deadline: float, first: bytes) -> None:
        self._sock = sock
        self._deadline = deadline
        self._first = first

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Bounded(self._sock, self._deadline, self._first))


# --- The way to the API: addresses, proxies, certificates --------------------------------------------------------


@dataclass(frozen=True, repr=False)  # it may hold a proxy's password
class _Way:
    """How to connect, and how a request is worded on that connection."""

    host: str
    port: int
    host_header: str
    base: str
    tls: ssl.SSLContext | None
    connect_s: float
    proxy: tuple[str, int] | None
    proxy_headers: Mapping[str, str]

    @classmethod
    def to(cls, api_url: str, connect_s: float) -> _Way:
        """Read the URL and, once, the environment. Raises ValueError."""
        parts = _api_url_parts(api_url)
        host = parts.hostname or ""
        if not host.isascii():
            host = host.encode("idna").decode("ascii")  # UnicodeError is a ValueError
        is_https = parts.scheme == "https"
        port = parts.port or (443 if is_https else 80)
        host_header = (f"[{host}]" if ":" in host else host) + (f":{parts.port}" if parts.port else "")
        path = quote(parts.path.rstrip("/"), safe="/%:@!$&'()*+,;=~")
        proxy, proxy_headers = _proxy_for(api_url, host)
        return cls(
            host=host,
            port=port,
            host_header=host_header,
            # A forwarding proxy wants the whole URL; through a tunnel, or directly, it is the path.
            base=path if proxy is None or is_https else f"http://{host_header}{path}",
            # One context for all connections: it verifies, and loads the certificates once.
            tls=_tls_context() if is_https else None,
            connect_s=connect_s,
            proxy=proxy,
            proxy_headers=proxy_headers,
        )

    def connect(self) -> http.client.HTTPConnection:
        """A new connection, TLS handshake and a proxy's tunnel included. Raises NotConnected."""
        host, port = self.proxy or (self.host, self.port)
        connection: http.client.HTTPConnection
        if self.tls is None:
            connection = http.client.HTTPConnection(host, port, timeout=self.connect_s)
        else:
            connection = http.client.HTTPSConnection(host, port, timeout=self.connect_s, context=self.tls)
            if self.proxy is not None:
                connection.set_tunnel(self.host, self.port, dict(self.proxy_headers))
        try:
            connection.connect()
        except Exception as fault:
            connection.close()
            raise NotConnected(f"no connection to {host}") from fault
        return connection

    def request(self, method: str, target: str, headers: Mapping[str, str], body: bytes | None) -> bytes:
        """The whole request in one piece: one write, one packet."""
        lines = [f"{method} {self.base}{target} HTTP/1.1", f"Host: {self.host_header}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if self.proxy is not None and self.tls is None:
            lines += [f"{name}: {value}" for name, value in self.proxy_headers.items()]
        if body is not None:
            lines.append(f"Content-Length: {len(body)}")
        head = "\r\n".join(lines)
        if not head.isascii() or head.count("\n") != len(lines) - 1:
            raise NotConnected("a header of the request is not plain text")
        return head.encode("ascii") + b"\r\n\r\n" + (body or b"")


def _api_url_parts(api_url: str) -> SplitResult:
    parts = urlsplit(api_url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("the provider's URL must look like https://api.yookassa.ru/v3")
    if parts.username is not None or parts.password is not None:
        raise ValueError("the provider's URL must hold no user and password")
    if parts.query or parts.fragment:
        raise ValueError("the provider's URL must end with its path, without ? and #")
    return parts


def _proxy_for(api_url: str, host: str) -> tuple[tuple[str, int] | None, Mapping[str, str]]:
    """The proxy that HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY name for this URL; never one for this machine."""
    proxy: str | None = None
    if not _is_loopback(host) and _names_proxies():
        # Imported where a proxy is named: it takes longer than a whole read does.
        from requests.utils import get_environ_proxies, select_proxy

        proxy = select_proxy(api_url, get_environ_proxies(api_url, None))
    if not proxy:
        return None, {}
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"the environment names a proxy for {host} that is not of the form http://HOST:PORT")
    headers = {}
    if parts.username is not None:
        account = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Proxy-Authorization"] = "Basic " + b64encode(account.encode()).decode("ascii")
    return (parts.hostname, parts.port or 80), headers


def _names_proxies() -> bool:
    """Whether any proxy may be set: in the environment, or (macOS, Windows) in the system's settings."""
    return sys.platform in ("darwin", "win32") or any(name.lower().endswith("_proxy") for name in os.environ)


def _has_something_to_read(sock: socket.socket) -> bool:
    if not hasattr(select, "poll"):  # Windows
        return bool(select.select([sock], [], [], 0)[0])
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


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
        import certifi

        variable, path = "certifi", certifi.where()
    try:
        if os.path.isdir(path):
            return ssl.create_default_context(capath=path)
        return ssl.create_default_context(cafile=path)
    except OSError as fault:  # ssl.SSLError is one
        raise ValueError(f"{variable} names {path}, which cannot be read as certificates: {fault}") from fault
