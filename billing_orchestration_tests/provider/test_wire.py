"""The plain answer that is read without http.client: it must be the one that http.client would have read."""

from __future__ import annotations

import gzip
import http.client
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from billing_orchestration.provider.wire import _decoded, _exchange

PAYMENT = b'{"id": "p", "status": "succeeded"}'
LENGTH = b"Content-Length: %d" % len(PAYMENT)

ANSWERS = {
    "plain": (b"HTTP/1.1 200 OK", [LENGTH], PAYMENT),
    "kept alive, by its own word": (
        b"HTTP/1.1 200 OK", [b"Connection: keep-Alive", LENGTH, b"Retry-After: 7"], PAYMENT),
    "without a phrase": (b"HTTP/1.1 200", [LENGTH], PAYMENT),
    "to be closed": (b"HTTP/1.1 200 OK", [LENGTH, b"Connection: close"], PAYMENT),
    "of HTTP/1.0": (b"HTTP/1.0 200 OK", [LENGTH], PAYMENT),
    "in chunks that also name a length": (
        b"HTTP/1.1 200 OK",
        [LENGTH, b"Transfer-Encoding: chunked"],
        b"%x\r\n%s\r\n0\r\n\r\n" % (len(PAYMENT), PAYMENT),
    ),
    "chunks whose size is the length": (
        b"HTTP/1.1 200 OK", [b"content-length:8", b"TRANSFER-ENCODING: chunked"], b"3\r\nabc\r\n"),
    "compressed": (
        b"HTTP/1.1 200 OK",
        [b"Content-Length: %d" % len(gzip.compress(PAYMENT, mtime=0)), b"Content-Encoding: gzip"],
        gzip.compress(PAYMENT, mtime=0),
    ),
    "without a length": (b"HTTP/1.1 200 OK", [b"Server: s"], PAYMENT),
    "of no length": (b"HTTP/1.1 200 OK", [b"Content-Length: 0"], b""),
    "two lengths": (b"HTTP/1.1 200 OK", [LENGTH, b"Content-Length: 3"], PAYMENT),
    "an odd length beside it": (b"HTTP/1.1 200 OK", [b"Content-Length: 3x", LENGTH], PAYMENT),
    "a length folded over two lines": (b"HTTP/1.1 200 OK", [b"Server: s\r\n " + LENGTH], PAYMENT),
    "a length that goes on in the next line": (b"HTTP/1.1 200 OK", [LENGTH + b"\r\n 0"], PAYMENT + b"more"),
    "a length that goes on with nothing": (b"HTTP/1.1 200 OK", [LENGTH + b"\r\n 0"], PAYMENT),
    "a length below zero": (b"HTTP/1.1 200 OK", [b"Content-Length: -1"], PAYMENT),
    "more than its length": (b"HTTP/1.1 200 OK", [b"Content-Length: 4"], PAYMENT),
    "less than its length": (b"HTTP/1.1 200 OK", [b"Content-Length: 99"], PAYMENT),
    "lines that end in LF": (b"HTTP/1.1 200 OK", [b"A: b\n\n" + PAYMENT + b"\n" + LENGTH], PAYMENT),
    "a refusal": (b"HTTP/1.1 400 Bad Request", [LENGTH], PAYMENT),
    "nothing new": (b"HTTP/1.1 204 No Content", [LENGTH], b""),
    "going on, then plain": (b"HTTP/1.1 100 Continue", [], b"HTTP/1.1 200 OK\r\n%s\r\n\r\n%s" % (LENGTH, PAYMENT)),
    "no HTTP at all": (b"<html>", [], b""),
}  # fmt: skip


def raw(name: str) -> bytes:
    status, headers, body = ANSWERS[name]
    return b"".join(line + b"\r\n" for line in (status, *headers, b"")) + body


@contextmanager
def sent(text: bytes) -> Iterator[socket.socket]:
    """A connection on which all of it lies ready, and no more comes."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(text)
        theirs.shutdown(socket.SHUT_WR)
        yield ours


def as_http_client_reads_it(text: bytes) -> tuple[int, str | None, bytes, bool] | type[Exception]:
    with sent(text) as sock:
        try:
            response = http.client.HTTPResponse(sock, method="POST")
            response.begin()
            closes = response.will_close
            body = _decoded(response.read(), response.headers.get("Content-Encoding"))
        except Exception as error:  # noqa: BLE001 - whatever it is, it must be the same one
            return type(error)
        return response.status, response.headers.get("retry-after"), body, not closes


def as_we_read_it(sock: socket.socket) -> tuple[int, str | None, bytes, bool] | type[Exception]:
    try:
        answer, reusable = _exchange(sock, "POST", b"", 5.0)
    except Exception as error:  # noqa: BLE001
        return type(error)
    return answer.status, answer.headers.get("retry-after"), answer.body, reusable


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_read_as_http_client_reads_it(name: str) -> None:
    with sent(raw(name)) as sock:
        assert as_we_read_it(sock) == as_http_client_reads_it(raw(name))


@pytest.mark.parametrize("name", ["plain", "kept alive, by its own word", "in chunks that also name a length"])
def test_an_answer_that_comes_in_pieces_is_the_same_wherever_it_is_cut(name: str) -> None:
    text = raw(name)
    whole = as_http_client_reads_it(text)
    for at in range(1, len(text)):
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.sendall(text[:at])
            # The rest is sent when the first piece has been taken out, so that they are two reads.
            first = ours.recv(65_536)
            theirs.sendall(text[at:])
            assert _read_after(ours, first) == whole, at


def _read_after(ours: socket.socket, first: bytes) -> tuple[int, str | None, bytes, bool] | type[Exception]:
    class FirstPiece(socket.socket):
        pieces: list[bytes]

        def recv(self, size: int, flags: int = 0) -> bytes:
            return self.pieces.pop() if self.pieces else super().recv(size, flags)

    with FirstPiece(fileno=ours.detach()) as sock:
        sock.pieces = [first]
        return as_we_read_it(sock)
