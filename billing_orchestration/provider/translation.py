"""The one place where a failed call becomes an error that says what is known about the money and what to do next.

What is not recognised is OutcomeUnknown, never a failure. No text holds a credential: every foreign text is cut and
cleaned, since a proxy's error page may repeat the request.
"""

from __future__ import annotations

import math
import ssl
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, TypedDict

from billing_orchestration.domain.personal import mask_personal, names_in_body, without_names
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

# Foreign texts end up in a table's cell and in an alert: enough to recognise, not a page of HTML.
LONGEST_FOREIGN_TEXT = 300
# Shorter "secrets" occur in ordinary words and would blank out half of a message.
_SHORTEST_SECRET = 6


@dataclass(frozen=True, slots=True)
class Call:
    """What was asked, as error texts name it. `by_id`: one payment, asked for by its id.

    `body`: a charge's. Whom it names is left out of what the provider repeats.
    """

    what: str
    by_id: bool = False
    body: str = ""

    @property
    def moves_money(self) -> bool:
        """Whether it is a charge."""
        return bool(self.body)


class _Refusal(TypedDict):
    status_code: int
    code: str
    parameter: str
    description: str


class Translator:
    """Makes the errors of one API, and keeps its credentials out of them."""

    def __init__(self, secrets: tuple[str, ...]) -> None:
        self._secrets = tuple(secret for secret in secrets if len(secret) >= _SHORTEST_SECRET)

    def of_fault(self, fault: Exception, call: Call) -> ProviderError:
        """The error for an exception that the wire raised; the caller raises it `from` that exception."""
        reason = self.foreign(_innermost(fault))
        if isinstance(fault, NotConnected):
            if isinstance(fault.__cause__, ssl.SSLError):
                hint = "the TLS connection was not trusted: check the certificates (REQUESTS_CA_BUNDLE, SSL_CERT_FILE)"
            else:
                hint = "check YOOKASSA_API_URL, the network and HTTPS_PROXY"
            return NeverSent(f"{call.what}: {_never_sent(call)} The provider cannot be reached: {hint} ({reason}).")
        if isinstance(fault, TimeoutError):
            return OutcomeUnknown(f"{call.what}: no answer within the time allowed. {_unknown(call)}", timed_out=True)
        return OutcomeUnknown(f"{call.what}: no whole answer arrived ({reason}). {_unknown(call)}")

    def of_answer(self, answer: Answer, call: Call, now: datetime) -> ProviderError:
        """The error for an answer that is not HTTP 200."""
        status = answer.status
        document = _document(answer)
        refusal, said = self._refusal(status, document, call)
        answered = f"{call.what}: HTTP {status}" + (f" ({said})" if said else "")
        delay_s = retry_after_s(answer, document, now)
        # An HTML 403 of some proxy says nothing about the request.
        by_provider = isinstance(document, dict) and (document.get("type") == "error" or bool(_text(document, "code")))

        if status == 401:
            return WrongCredentials(
                f"{answered}: the provider does not know this shop id or secret key; check YOOKASSA_SHOP_ID and "
                f"YOOKASSA_SECRET_KEY. Nothing was executed and nothing else is sent with them.",
                **refusal,
            )
        if status == 429:
            when = "" if delay_s is None else f", it asks for {delay_s:g} s"
            return RateLimited(
                f"{answered}: too many requests{when}. {_unknown(call)}", retry_after_s=delay_s, answered=True
            )
        if status == 202:
            # "Ask again with the same key", says its documentation: the provider knows the key by now.
            return StillProcessing(
                f"{answered}: still in progress. {_unknown(call)}", retry_after_s=delay_s, answered=True
            )
        if by_provider and status == 403:
            return Forbidden(
                f"{answered}: the credentials are right, but the shop may not do this; recurring charges are enabled "
                f"by the provider's manager. {_rejected(call)}",
                **refusal,
            )
        if by_provider and status == 400:
            if call.moves_money and "idempoten" in said.lower():
                # The provider holds an earlier request with this key, and that one may have been executed.
                return OutcomeUnknown(
                    f"{answered}: the provider knows this key already. {_unknown(call)}", answered=True
                )
            return RequestRejected(f"{answered}: the provider rejects the request. {_rejected(call)}", **refusal)
        if by_provider and status == 404 and call.by_id:
            return PaymentNotFound(f"{answered}: the provider has no such payment in this shop.", **refusal)
        kind = "the provider's own error" if by_provider else f"not the provider's JSON but {_kind_of(answer)}"
        return OutcomeUnknown(
            f"{answered}, {kind}{self._hint(status)}. {_unknown(call)}", retry_after_s=delay_s, answered=by_provider
        )

    def _refusal(self, status: int, document: Any, call: Call) -> tuple[_Refusal, str]:
        """What the provider's error JSON says: in its fields, and as one text."""
        code, parameter, description = (
            self.foreign(_text(document, name), call) for name in ("code", "parameter", "description")
        )
        said = ", ".join(part for part in (code, parameter, description) if part)
        refusal: _Refusal = {
            "status_code": status,
            "code": code,
            "parameter": parameter,
            "description": description,
        }
        return refusal, said

    @staticmethod
    def _hint(status: int) -> str:
        if status in {404, 405}:
            return "; does YOOKASSA_API_URL end with /v3?"
        if 300 <= status < 400:
            return "; redirects are not followed, check YOOKASSA_API_URL"
        return ""

    def of_unusable(self, answer: Answer, call: Call, reason: str) -> OutcomeUnknown:
        """The error for an HTTP 200 that does not hold what was asked."""
        return OutcomeUnknown(
            f"{call.what}: HTTP 200 with {_kind_of(answer)}, {self.foreign(reason, call)}. {_unknown(call)}",
            answered=isinstance(_document(answer), dict),
        )

    def foreign(self, text: str, call: Call | None = None) -> str:
        """A foreign text, cut and cleaned of the credentials and of what is personal, on one line.

        `call`: the one that it answers; whom its body names is left out too.
        """
        for secret in self._secrets:
            text = text.replace(secret, "***")
        if call is not None and call.body and text:
            text = without_names(text, names_in_body(call.body))
        text = mask_personal(" ".join(text.split()))
        return text if len(text) <= LONGEST_FOREIGN_TEXT else text[:LONGEST_FOREIGN_TEXT] + "…"


def retry_after_s(answer: Answer, document: Any, now: datetime) -> float | None:
    """The delay the provider asks for, capped: `Retry-After` (s or a date), else the body's `retry_after` (ms)."""
    header = answer.headers.get("Retry-After")
    if header:
        try:
            return _capped(float(header))
        except ValueError:
            pass
        moment = _http_date(header)
        if moment is not None:
            return _capped((moment - now).total_seconds())
    delay_ms = document.get("retry_after") if isinstance(document, dict) else None
    if isinstance(delay_ms, (int, float)) and not isinstance(delay_ms, bool):
        return _capped(delay_ms / 1000)
    return None


def told_at(answer: Answer) -> datetime | None:
    """What time it was there, by the answer's Date header; None where it has none that can be read."""
    return _http_date(answer.headers.get("Date") or "")


def _http_date(header: str) -> datetime | None:
    try:
        moment = parsedate_to_datetime(header)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return moment.astimezone(timezone.utc) if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def _capped(seconds: float) -> float | None:
    return None if math.isnan(seconds) else min(max(seconds, 0.0), LONGEST_PAUSE_S)


def _document(answer: Answer) -> Any:
    try:
        return read_json(answer.body)
    except ValueError:
        return None


def _kind_of(answer: Answer) -> str:
    start = answer.body.lstrip()[:200].lower()
    if not start:
        return "an empty body"
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<body")):
        return "an HTML page"
    form = "JSON" if start.startswith((b"{", b"[")) else "something else"
    return f"{len(answer.body)} bytes of {form}"


def _text(document: Any, name: str) -> str:
    text = document.get(name) if isinstance(document, dict) else None
    return text if isinstance(text, str) else ""


def _innermost(fault: BaseException) -> str:
    """The plainest reason in the chain: `[Errno 111] Connection refused` rather than a wrapping of it."""
    # urllib3 hands some of the reasons over as an argument.
    while reason := fault.__cause__ or next((arg for arg in fault.args if isinstance(arg, BaseException)), None):
        fault = reason
    return f"{type(fault).__name__}: {fault}" if str(fault) else type(fault).__name__


def _never_sent(call: Call) -> str:
    if call.moves_money:
        return "nothing was sent, so no money moved; the same key may be sent later."
    return "nothing was sent and nothing is known; ask again later."


def _rejected(call: Call) -> str:
    return "No money moved by it." if call.moves_money else "Nothing was changed by it."


def _unknown(call: Call) -> str:
    if call.moves_money:
        return (
            "The charge may have been executed, so money may have moved: send the same key and body again, or look the "
            "payment up; never a new key."
        )
    return "Nothing is known and nothing was changed; ask again later."
