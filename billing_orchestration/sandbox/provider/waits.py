"""What is kept waiting: connections that hear nothing, and calls that are delayed. All of it can be ended at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable


class Waits:
    """Used on the server's loop, but for `end`."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._silent: set[asyncio.Transport] = set()
        self._delayed: set[asyncio.Future[None]] = set()

    async def delay(self, seconds: float) -> None:
        """Wait so long, or until the end of all waits."""
        if not seconds:
            return
        self._loop = asyncio.get_running_loop()
        delayed: asyncio.Future[None] = self._loop.create_future()
        self._delayed.add(delayed)
        try:
            await asyncio.wait([delayed], timeout=seconds)
        finally:
            self._delayed.discard(delayed)

    async def silence(self, transport: asyncio.Transport, gone: Awaitable[None], seconds: float | None) -> None:
        """Say nothing until the client has gone, the time is over, or all waits end."""
        self._loop = asyncio.get_running_loop()
        self._silent.add(transport)
        try:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(gone, seconds)
        finally:
            self._silent.discard(transport)

    def end(self) -> None:
        """End every wait, from any thread: silent connections are cut, delayed calls go on at once."""
        if self._loop is not None and (self._silent or self._delayed):
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        for transport in list(self._silent):
            transport.abort()
        for delayed in self._delayed:
            if not delayed.done():
                delayed.set_result(None)
