"""Every way in which an answer leaves, or does not. What happens to a connection happens on the wire."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from billing_orchestration.sandbox.provider.endpoints import response
from billing_orchestration.sandbox.provider.misbehaviour import Misbehaviour
from billing_orchestration.sandbox.provider.waits import Waits


class Exchange:
    """One request and its connection. `transport` is None when the client is gone already."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, transport: asyncio.Transport | None, waits: Waits
    ) -> None:
        self.scope, self.receive, self.send = scope, receive, send
        self._transport = transport
        self._waits = waits

    async def answer(self, answer: Response) -> None:
        """Send it whole."""
        await answer(self.scope, self.receive, self.send)

    async def strike(self, rule: Misbehaviour, answer: Response | None = None) -> None:
        """Do what the rule says. `answer`: the true one, if the call was executed."""
        transport = self._transport
        if transport is None:
            return
        match rule.kind:
            case "cut":
                transport.close()
                await self._gone()
            case "reset":
                _reset(transport)
                await self._gone()
            case "silence":
                await self._waits.silence(transport, self._gone(), rule.seconds)
                transport.abort()
                await self._gone()
            case "truncated" if answer is not None:
                await self._truncated(transport, answer)
            case "drip" if answer is not None:
                await self._drip(answer, rule.seconds or 1.0)
            case "change" if answer is not None:
                changed = json.dumps(rule.changed(json.loads(bytes(answer.body))), ensure_ascii=False)
                await self.answer(Response(changed, answer.status_code, media_type=answer.headers["content-type"]))
            case "none" | "duplicate" if answer is not None:
                await self.answer(answer)
            case _:
                await self.answer(response(rule.answer()))

    async def _truncated(self, transport: asyncio.Transport, answer: Response) -> None:
        half = answer.body[: len(answer.body) // 2]
        await self.send({"type": "http.response.start", "status": answer.status_code, "headers": answer.raw_headers})
        await self.send({"type": "http.response.body", "body": half, "more_body": True})
        transport.close()
        await self._gone()

    async def _drip(self, answer: Response, seconds: float) -> None:
        body = bytes(answer.body)
        pause = seconds / max(1, len(body))

        async def one_by_one() -> AsyncIterator[bytes]:
            for at in range(len(body)):
                await asyncio.sleep(pause)
                yield body[at : at + 1]

        await self.answer(StreamingResponse(one_by_one(), answer.status_code, dict(answer.headers)))

    async def _gone(self) -> None:
        """Wait until the connection is gone, so that the server does not add an answer of its own."""
        while (await self.receive())["type"] != "http.disconnect":
            pass


def _reset(transport: asyncio.Transport) -> None:
    # Linger on, for no time: closing sends RST instead of FIN.
    connection = transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
