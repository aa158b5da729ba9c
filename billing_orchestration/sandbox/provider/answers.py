"""What the API answers, before it meets the wire."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, headers and body."""

    status: int
    body: bytes
    headers: Sequence[tuple[str, str]] = ()
    content_type: str = "application/json; charset=UTF-8"


class Refused(Exception):
    """The API says no. No money moved."""

    def __init__(self, status: int, code: str | None, description: str, parameter: str | None = None) -> None:
        super().__init__(description)
        self.status, self.code, self.description, self.parameter = status, code, description, parameter

    def answer(self) -> Answer:
        """The refusal in the provider's body form."""
        document: dict[str, Any] = {"type": "error", "id": str(uuid.uuid4())}
        if self.code is not None:
            document["code"] = self.code
        document["description"] = self.description
        if self.parameter is not None:
            document["parameter"] = self.parameter
        return Answer(self.status, json.dumps(document, ensure_ascii=False).encode())


def invalid(description: str, parameter: str | None = None) -> Refused:
    """HTTP 400 `invalid_request`."""
    return Refused(400, "invalid_request", description, parameter)


NO_RECURRING = "This store can't make recurring payments. Contact the YooMoney manager to learn more"


def forbidden(description: str) -> Refused:
    """HTTP 403 `forbidden`."""
    return Refused(403, "forbidden", description)


def internal_error() -> Answer:
    return Refused(500, "internal_server_error", "Technical error. Repeat the request with the same key").answer()


def processing() -> Answer:
    return Answer(
        202, b'{"type":"processing","description":"Request accepted, but not processed yet","retry_after":1800}'
    )


def too_many_requests(retry_after_s: int | None) -> Answer:
    document: dict[str, Any] = {
        "type": "error",
        "id": "ab5a11cd-13cc-4e33-af8b-75a74e18dd09",
        "code": "too_many_requests",
        "description": "Too many requests",
    }
    headers: list[tuple[str, str]] = []
    if retry_after_s is not None:
        document["retry_after"] = retry_after_s * 1000
        headers.append(("retry-after", str(retry_after_s)))
    return Answer(429, json.dumps(document).encode(), headers)
