"""The one place where a failed call becomes an error that says what is known about the money and what to do next.

What is not recognised is OutcomeUnknown, never a failure. No text holds a credential: whatever came from outside is
cut and cleaned of them, for a proxy's error page may well repeat the request.
"""

from __future__ import annotations

import math
import ssl
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, TypedDict

from billing_orchestration.provider.errors import (
    Forbidden,
    NeverSent,
    OutcomeUnknown,
    PaymentNotFound,
    ProviderError,
    RateLimited,
    RequestRejected,
    StillProcessing,
    WrongCredentials,
)
from billing_orchestration.provider.pacing import LONGEST_PAUSE_S
from billing_orchestration.provider.records import read_json
from billing_orchestration.provider.wire import Answer, NotConnected

# Provider-given texts end up in a table's cell and in an alert: enough to recognise, not a page of HTML.
LONGEST_FOREIGN_TEXT = 300
# Shorter "secrets" occur in ordinary words and would blank out half of a message.
_SHORTEST_SECRET = 6


@dataclass(frozen=True, slots=True)
class Call:
    """What was asked, as the texts name it. `moves_money`: a charge; `by_id`: one payment asked by its id."""

    what: str
    moves_money: bool = False
    by_id: bool = False


class _Words(TypedDict):
    status_code: int
    code: str
    description: str


class Outcomes:
    """Translates, for one API and its credentials."""

    def __init__(self, api_url: str, secrets: tuple[str, ...]) -> None:
        self._api_url = api_url
        self._secrets = tuple(secret for secret in secrets if len(secret) >= _SHORTEST_SECRET)

    def of_wire(self, fault: Exception, call: Call) -> ProviderError:
        """The error for an exception on the way; the caller raises it `from` that exception."""
        reason = self.foreign(_innermost(fault))
        if isinstance(fault, NotConnected):
            if isinstance(fault.__cause__, ssl.SSLError):
                hint = "the TLS connection was not trusted: check the certificates (REQUESTS_CA_BUNDLE, SSL_CERT_FILE)"
            else:
                hint = "check YOOKASSA_API_URL, the network and HTTPS_PROXY"
            return NeverSent(f"{call.what}: {self._api_url} cannot be reached ({reason}); {hint}. {_never_sent(call)}")
        if isinstance(fault, TimeoutError):
            return OutcomeUnknown(f"{call.what}: no answer within the time allowed. {_unknown(call)}", timed_out=True)
        return OutcomeUnknown(f"{call.what}: the connection broke before a whole answer ({reason}). {_unknown(call)}")

    def of_answer(self, answer: Answer, call: Call, now: datetime) -> ProviderError:
        """The error for an answer that is not HTTP 200."""
        status = answer.status
        document = _document(answer)
        own = _own_words(document)
        code = self.foreign(_text(document, "code"))
        description = self.foreign(_text(document, "description"))
        parameter = self.foreign(_text(document, "parameter"))
        said = ", ".join(part for part in (code, parameter, description) if part)
        answered = f"{call.what}: HTTP {status}" + (f" ({said})" if said else "")
        words: _Words = {"status_code": status, "code": code, "description": description}
        wish = retry_after_s(answer, document, now)

        if status == 401:
            return WrongCredentials(
                f"{answered}: the provider does not know this shop id or secret key; check YOOKASSA_SHOP_ID and "
                f"YOOKASSA_SECRET_KEY. Nothing was executed and nothing else is sent with them.",
                **words,
            )
        if status == 429:
            when = "" if wish is None else f", it asks for {wish:g} s"
            return RateLimited(f"{answered}: too many requests{when}. {_unknown(call)}", retry_after_s=wish)
        if status == 202:
            return StillProcessing(f"{answered}: the provider still works on it. {_unknown(call)}", retry_after_s=wish)
        if own and status == 403:
            return Forbidden(
                f"{answered}: the credentials are right, but the shop may not do this; recurring charges are enabled "
                f"by the provider's manager. {_rejected(call)}",
                **words,
            )
        if own and status == 400:
            if call.moves_money and "idempoten" in f"{code} {parameter} {description}".lower():
                # The provider holds an earlier request with this key, and that one may have been executed.
                return OutcomeUnknown(f"{answered}: the provider knows this key already. {_unknown(call)}")
            return RequestRejected(f"{answered}: the provider rejects the request as it is. {_rejected(call)}", **words)
        if own and status == 404 and call.by_id:
            return PaymentNotFound(f"{answered}: the provider has no such payment in this shop.", **words)
        kind = "the provider's own error" if own else f"not the provider's error JSON but {self._kind_of(answer)}"
        hint = f"; does YOOKASSA_API_URL end with /v3? It is {self._api_url}" if status in {404, 405} else ""
        if 300 <= status < 400:
            hint = f"; redirects are not followed, check YOOKASSA_API_URL ({self._api_url})"
        return OutcomeUnknown(f"{answered}, {kind}{hint}. {_unknown(call)}", retry_after_s=wish)

    def of_unusable(self, answer: Answer, call: Call, reason: str) -> OutcomeUnknown:
        """The error for an HTTP 200 that does not hold what was asked."""
        return OutcomeUnknown(
            f"{call.what}: HTTP 200 with {self._kind_of(answer)}, {self.foreign(reason)}. {_unknown(call)}"
        )

    def foreign(self, text: str) -> str:
        """A text from outside, cut and cleaned of the credentials, on one line."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        text = " ".join(text.split())
        return text if len(text) <= LONGEST_FOREIGN_TEXT else text[:LONGEST_FOREIGN_TEXT] + "…"

    def _kind_of(self, answer: Answer) -> str:
        if not answer.body.strip():
            return "an empty body"
        start = answer.body.lstrip()[:200].lower()
        if start.startswith((b"<!doctype", b"<html", b"<head", b"<body")):
            return "an HTML page"
        if start.startswith((b"{", b"[")):
            return f"{len(answer.body)} bytes of JSON"
        return f"{len(answer.body)} bytes of something else"


def retry_after_s(answer: Answer, document: Any, now: datetime) -> float | None:
    """The provider's wish, in seconds: the header (seconds or a date), else the body's `retry_after` (ms). Capped."""
    header = answer.headers.get("Retry-After")
    if header:
        try:
            return _capped(float(header))
        except ValueError:
            pass
        try:
            moment = parsedate_to_datetime(header)
        except (ValueError, TypeError, OverflowError):
            pass
        else:
            moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
            return _capped((moment - now).total_seconds())
    wish = document.get("retry_after") if isinstance(document, dict) else None
    if isinstance(wish, (int, float)) and not isinstance(wish, bool):
        return _capped(wish / 1000)
    return None


def _capped(seconds: float) -> float | None:
    return None if math.isnan(seconds) else min(max(seconds, 0.0), LONGEST_PAUSE_S)


def _document(answer: Answer) -> Any:
    try:
        return read_json(answer.body)
    except ValueError:
        return None


def _own_words(document: Any) -> bool:
    """Whether this is the provider's error JSON. An HTML 403 of some proxy says nothing about the request."""
    return isinstance(document, dict) and (document.get("type") == "error" or bool(_text(document, "code")))


def _text(document: Any, name: str) -> str:
    text = document.get(name) if isinstance(document, dict) else None
    return text if isinstance(text, str) else ""


def _innermost(fault: BaseException) -> str:
    """The plainest words in the chain: `[Errno 111] Connection refused` rather than a wrapping of it."""
    while fault.__cause__ is not None:
        fault = fault.__cause__
    return f"{type(fault).__name__}: {fault}" if str(fault) else type(fault).__name__


def _never_sent(call: Call) -> str:
    if call.moves_money:
        return "Nothing was sent, so no money moved; the same key may be sent later."
    return "Nothing was sent and nothing is known; ask again later."


def _rejected(call: Call) -> str:
    return "No money moved by it." if call.moves_money else "Nothing was changed by it."


def _unknown(call: Call) -> str:
    if call.moves_money:
        return (
            "The charge may have been executed, so money may have moved: the same key and body again, or look it up; "
            "never a new key."
        )
    return "Nothing is known from it and nothing was changed; ask again later."
