"""The official SDK's part in a charge: its path, its verb, and the headers that name it to the provider.

Imported with the first charge of a process. The SDK brings a hundred modules, a tenth of the CPU of a tick that finds
nothing, and 1,440 ticks a day only read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from yookassa import Payment
from yookassa.client import ApiClient
from yookassa.domain.common import HttpVerb, UserAgent

from billing_orchestration.provider.wire import Answer

# Sends once: method, target, headers, body.
Send = Callable[[str, str, Mapping[str, str], bytes | None], Answer]


class _ApiClient(ApiClient):
    """The SDK's transport on our own wire: no global Configuration, and the raw answer instead of a guess at it."""

    def __init__(self, api_url: str, send: Send) -> None:
        # No super().__init__: it reads the process-wide Configuration, in which two shops mix.
        self.endpoint = api_url
        self._send = send
        # It holds the operating system's name, which may not be ASCII.
        agent = UserAgent().get_header_string().encode("ascii", "replace").decode("ascii")
        self._headers = {"User-Agent": agent, "YM-User-Agent": agent}

    def request(
        self,
        method: str = "",
        path: str = "",
        query_params: Mapping[str, str] | None = None,  # noqa: ARG002 - a charge has none
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> Answer:
        """Send once; return the answer as it is, whatever its status."""
        return self._send(method.upper(), path, {**self._headers, **(headers or {})}, body)


class Charges(Payment):
    """The SDK's payments, bound to one client instead of the global one."""

    def __init__(self, api_url: str, send: Send) -> None:
        # No super().__init__: it makes a client of the global Configuration.
        self.client = _ApiClient(api_url, send)

    def post(self, body: bytes, idempotence_key: str) -> Answer:
        """Exactly these bytes: the SDK's `create` would add `cms_name`, and make up a missing key."""
        answer: Answer = self.client.request(
            HttpVerb.POST, self.base_path, None, {"Idempotence-Key": idempotence_key}, body
        )
        return answer
