"""A provider that costs next to nothing, as a process of its own: so that the client is measured and not the server.

It speaks what the client needs of the provider's API (a charge, one payment by its id, which nobody paid, and the list
with its filters and cursors; nothing was refunded), answers each request after a given latency, and does no more:
0.1 ms of CPU an answer, against 0.9 ms of the sandbox, which checks everything and would itself be the limit on a
machine with two cores. Tests use the sandbox, never this.
"""

from __future__ import annotations

import asyncio
import bisect
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any
from urllib.parse import parse_qsl, urlsplit

UTC = timezone.utc
PAGE = 100


@dataclass(frozen=True)
class History:
    """The list that the provider tells: `count` succeeded payments, one each `step_s` seconds, from `start` on.

    Each was created when it was captured; `user-N`, plan 1 and provider 1 stand in its metadata. With `unpaid_every`
    they are canceled, and named `paid-N` by every such number.
    """

    count: int = 0
    start: str = "2026-03-01T00:00:00+00:00"
    step_s: float = 0.03
    unpaid_every: int = 0


def payment_id(number: int) -> str:
    """The provider's id of the payment with that number."""
    return f"{number:08x}-000f-5000-8000-1d2c3b4a5968"


def _stamp(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%S.") + f"{at.microsecond // 1000:03d}Z"


def _payment(id_: str, at: str, amount: Mapping[str, str], metadata: Mapping[str, str], method: str) -> dict[str, Any]:
    return {
        "id": id_,
        "status": "succeeded",
        "paid": True,
        "amount": amount,
        "income_amount": amount,
        "captured_at": at,
        "created_at": at,
        "description": "a payment",
        "metadata": metadata,
        "payment_method": {"type": "bank_card", "id": method, "saved": True, "title": "Bank card *4444"},
        "recipient": {"account_id": "100500", "gateway_id": "100700"},
        "refundable": True,
        "refunded_amount": {"value": "0.00", "currency": "RUB"},
        "test": False,
    }


_PRICE = {"value": "299.00", "currency": "RUB"}
_CANCELED = {
    "status": "canceled",
    "paid": False,
    "captured_at": None,
    "cancellation_details": {"party": "yoo_money", "reason": "expired_on_confirmation"},
}


def _unpaid(id_: str, at: str) -> dict[str, Any]:
    return {**_payment(id_, at, _PRICE, {}, id_), **_CANCELED}


class _Books:
    def __init__(self, history: History) -> None:
        start = datetime.fromisoformat(history.start)
        step = timedelta(seconds=history.step_s)
        self.status = "canceled" if history.unpaid_every else "succeeded"
        self.stamps = [_stamp(start + step * number) for number in range(history.count)]
        self.items = [
            json.dumps(_unpaid(f"paid-{(number + 1) * history.unpaid_every}", stamp)).encode()
            if history.unpaid_every
            else json.dumps(
                _payment(
                    payment_id(number),
                    stamp,
                    _PRICE,
                    {"user_id": f"user-{number}", "plan_id": "1", "payment_provider_id": "1"},
                    payment_id(number),
                )
            ).encode()
            for number, stamp in enumerate(self.stamps)
        ]

    def page(self, query: Mapping[str, str]) -> bytes:
        """One page of the list, the latest first. Both instants of a payment are the same, so both filters are."""
        if query.get("status", self.status) != self.status:
            return b'{"type":"list","items":[]}'
        bounds = {name.partition(".")[2]: value for name, value in query.items() if "_at." in name}
        first = bisect.bisect_left(self.stamps, bounds.get("gte", ""))
        last = bisect.bisect_right(self.stamps, bounds["lte"]) if "lte" in bounds else len(self.stamps)
        if "cursor" in query:
            last = int(query["cursor"])
        limit = int(query.get("limit", "10"))
        begin = max(first, last - limit)
        items = b",".join(reversed(self.items[begin:last]))
        cursor = b',"next_cursor":"%d"' % begin if begin > first else b""
        return b'{"type":"list","items":[' + items + b"]" + cursor + b"}"


class _Connection(asyncio.Protocol):
    def __init__(self, books: _Books, latency_s: float) -> None:
        self._books = books
        self._latency_s = latency_s
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end]
            mark = head.lower().find(b"content-length:")
            length = (
                int(head[mark + 15 : head.find(b"\r\n", mark) if b"\r\n" in head[mark:] else None]) if mark > 0 else 0
            )
            if len(self._buffer) < end + 4 + length:
                return
            body = self._buffer[end + 4 : end + 4 + length]
            self._buffer = self._buffer[end + 4 + length :]
            method, target, _ = head.split(b"\r\n", 1)[0].split(b" ", 2)
            answer = self._answer(method, target.decode(), body)
            whole = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(answer)
            asyncio.get_running_loop().call_later(self._latency_s, self._transport.write, whole + answer)  # type: ignore[attr-defined]

    def _answer(self, method: bytes, target: str, body: bytes) -> bytes:
        if method == b"GET":
            address = urlsplit(target)
            if address.path.endswith("/refunds"):
                return b'{"type":"list","items":[]}'
            asked_about = address.path.partition("/payments/")[2]
            if asked_about:
                return json.dumps(_unpaid(asked_about, _stamp(datetime.now(UTC)))).encode()
            return self._books.page(dict(parse_qsl(address.query)))
        asked = json.loads(body)
        at = _stamp(datetime.now(UTC))
        method_id = asked["payment_method_id"]
        return json.dumps(_payment(str(uuid.uuid4()), at, asked["amount"], asked["metadata"], method_id)).encode()


@contextmanager
def provider(latency_s: float, history: History = History()) -> Iterator[str]:
    """Yield the address (with /v3) of a provider that answers each request after so many seconds."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            __name__,
            repr(latency_s),
            str(history.count),
            history.start,
            repr(history.step_s),
            str(history.unpaid_every),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ.copy(),
        text=True,
    )
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v3"
    finally:
        process.terminate()
        process.wait()


async def _serve(latency_s: float, history: History) -> None:
    books = _Books(history)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(books, latency_s), "127.0.0.1", 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    # It ends with its starter, whose end of the pipe closes then.
    await loop.run_in_executor(None, sys.stdin.buffer.read)
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(
        _serve(float(sys.argv[1]), History(int(sys.argv[2]), sys.argv[3], float(sys.argv[4]), int(sys.argv[5])))
    )
