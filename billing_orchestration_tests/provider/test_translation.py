"""What an error says: how long to wait, no credentials, and to keep the key."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

import pytest
from urllib3 import HTTPHeaderDict

from billing_orchestration.provider.errors import OutcomeUnknown
from billing_orchestration.provider.translation import Call, Translator, retry_after_s
from billing_orchestration.provider.wire import Answer

BODY = '{"metadata":{"user_id":"anna-17"},"receipt":{"customer":{"email":"ada@example.ru"}}}'
NOW = datetime(2026, 3, 1, 10, 0, 0, tzinfo=timezone.utc)
CHARGE = Call("charge with key k-1", body=BODY)


def answered(status: int, body: Any = None, **headers: str) -> Answer:
    named = HTTPHeaderDict({name.replace("_", "-"): value for name, value in headers.items()})
    return Answer(status, named, b"" if body is None else json.dumps(body).encode())


@pytest.mark.parametrize(
    ("header", "body", "expected"),
    [
        (None, None, None),
        ("5", None, 5),
        ("0.5", None, 0.5),
        ("-3", None, 0),
        ("86400", None, 60),
        ("inf", None, 60),
        ("nan", None, None),
        ("soon", None, None),
        ("soon", {"retry_after": 1500}, 1.5),
        ("5", {"retry_after": 1500}, 5),
        ("Sun, 01 Mar 2026 10:00:09 GMT", None, 9),
        ("Sun, 01 Mar 2026 09:00:00 GMT", None, 0),
        ("Mon, 02 Mar 2026 10:00:00 GMT", None, 60),
        (None, {"retry_after": 1800}, 1.8),
        (None, {"retry_after": 86_400_000}, 60),
        (None, {"retry_after": "1800"}, None),
        (None, {"retry_after": True}, None),
        (None, {"retry_after": None}, None),
        (None, [1800], None),
    ],
)
def test_the_delay_is_read_from_header_or_body_and_capped(
    header: str | None, body: Any, expected: float | None
) -> None:
    answer = answered(429, body) if header is None else answered(429, body, Retry_After=header)
    assert retry_after_s(answer, body, NOW) == (None if expected is None else pytest.approx(expected))


def test_a_foreign_text_is_one_line_without_credentials() -> None:
    translator = Translator(("hush-hush-hush", "abc"))
    assert translator.foreign("a\n\thush-hush-hush  b") == "a *** b"
    assert translator.foreign("abc") == "abc", "a secret that short would blank out ordinary words"
    assert len(translator.foreign("x" * 1000)) == 301


def test_every_unknown_outcome_of_a_charge_says_to_keep_the_key() -> None:
    translator = Translator(())
    for status in (202, 204, 302, 404, 405, 408, 409, 410, 413, 418, 429, 500, 502, 503, 504, 599):
        told = translator.of_answer(answered(status, {"type": "error", "code": "c"}), CHARGE, NOW)
        assert isinstance(told, OutcomeUnknown), status
        assert "never a new key" in str(told)


def test_whom_a_charge_names_is_left_out_of_what_the_provider_repeats() -> None:
    said = {"type": "error", "code": "invalid_request", "description": "user anna-17 (ada@example.ru) is not anna-177"}
    told = Translator(()).of_answer(answered(400, said), CHARGE, NOW)
    assert "user (a customer) ((a customer)) is not anna-177" in str(told)
    assert "anna-17 " not in repr(told)
