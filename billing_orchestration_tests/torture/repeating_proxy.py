"""A proxy that delivers every POST twice, side by side: a network that repeats itself, as the provider sees it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

_PATIENCE_S = 30.0


@contextmanager
def repeating_proxy(api_url: str) -> Iterator[str]:
    """The URL under which the API at `api_url` is reached through it. The answer to the later delivery is handed on."""
    target = urlsplit(api_url)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _deliver(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            headers = {
                name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")
            }
            connection = HTTPConnection(target.hostname or "", target.port, timeout=_PATIENCE_S)
            try:
                connection.request(self.command, self.path, body or None, headers)
                answer = connection.getresponse()
                handed_on = {name: answer.headers.get(name, "") for name in ("Content-Type", "Date")}
                return answer.status, handed_on, answer.read()
            finally:
                connection.close()

        def _relay(self, deliveries: int) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with ThreadPoolExecutor(deliveries) as threads:
                answers = list(threads.map(self._deliver, [body] * deliveries))
            status, handed_on, answer = answers[-1]
            self.send_response_only(status)  # without a date of its own
            for name, value in handed_on.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def do_GET(self) -> None:
            self._relay(1)

        def do_POST(self) -> None:
            self._relay(2)

        def log_message(self, *args: Any) -> None:
            """Nothing on the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}{target.path}"
    finally:
        server.shutdown()
        server.server_close()
