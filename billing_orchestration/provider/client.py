"""The payment provider for the jobs: the official SDK made safe for money and for threads.

What an operator can rely on: a charge is one POST of exactly the frozen bytes and is never repeated here; a read is
repeated within a bound; a slice is whole or an error; every error says what is known about the money; no text, repr
or log holds credentials; two shops in one process never mix.
"""

from __future__ import annotations

import random
import re
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlencode

from billing_orchestration.domain.clocks import ANSWERS_COMPARED, DATE_RESOLUTION, Readings, offset_of
from billing_orchestration.domain.provider_payment import ProviderPayment, UnusablePayment
from billing_orchestration.provider.errors import (
    Forbidden,
    IncompleteSlice,
    NeverSent,
    OutcomeUnknown,
    PaymentNotFound,
    ProviderError,
    RateLimited,
    RequestRejected,
    WrongCredentials,
)
from billing_orchestration.provider.lists import Lists, window
from billing_orchestration.provider.pacing import RateLimit, map_concurrently
from billing_orchestration.provider.records import parse_payment, read_json
from billing_orchestration.provider.slices import RefundSlice, Slice
from billing_orchestration.provider.translation import Call, Translator, told_at
from billing_orchestration.provider.wire import Answer, NoWay, Wire
from billing_orchestration.threads import OF_THE_SYSTEM, Threads

if TYPE_CHECKING:
    from billing_orchestration.provider.sdk import Charges

__all__ = ["PaymentProvider", "Slice", "Timeouts"]

Value = TypeVar("Value")

# The provider takes 1 to 64 characters; beyond ASCII they would not survive an HTTP header.
_KEY = re.compile(r"[\x21-\x7e]{1,64}")
_utc_now = partial(datetime.now, timezone.utc)
# Half a minute is long enough for a hiccup; a run every two minutes tries again anyway.
_LONGEST_BACKOFF_S = 30.0
# Of a payment method's state, as a word of a report.
_LONGEST_STATE = 20


@dataclass(frozen=True)
class Timeouts:
    """How long one request may take, in seconds."""

    # A connection is made in milliseconds or not at all; a lost SYN is repeated after 1 s and 3 s.
    connect_s: float = 5.0
    # The provider answers a charge within 30 s or with HTTP 500; giving up earlier makes outcomes unknown for nothing.
    charge_read_s: float = 40.0
    # A page of 100 payments takes a fraction of a second; 15 s is silence.
    read_s: float = 15.0
    # A charge that got no answer is not repeated before this much time has passed since its claim: by then the provider
    # has finished with it. More than the time to connect and to be answered.
    charge_done_s: float = 45.0


class _Payments:
    """The provider's /payments: one request a call, with the headers of this shop."""

    def __init__(self, api_url: str, wire: Wire, timeouts: Timeouts, authorization: str) -> None:
        self._api_url = api_url
        self._wire = wire
        self._timeouts = timeouts
        common = {"Accept": "application/json", "Authorization": authorization}
        # Pages compress tenfold. A charge's answer is small, and its fate shall not hang on a decompressor.
        self._get_headers = {**common, "Accept-Encoding": "gzip", "User-Agent": "billing-orchestration"}
        self._post_headers = {**common, "Accept-Encoding": "identity", "Content-Type": "application/json"}

    @cached_property
    def charges(self) -> Charges:
        """The SDK's payments, imported with the first charge; reads do without the SDK."""
        from billing_orchestration.provider.sdk import Charges

        return Charges(self._api_url, self._post)

    def one(self, quoted_id: str) -> Answer:
        """GET one payment."""
        return self._get(f"/payments/{quoted_id}")

    def page(self, what: str, query: Mapping[str, str]) -> Answer:
        """GET one page of a list: payments, refunds."""
        return self._get(f"/{what}?{urlencode(query)}")

    def method(self, quoted_id: str) -> Answer:
        """GET one saved payment method."""
        return self._get(f"/payment_methods/{quoted_id}")

    def shop(self) -> Answer:
        """GET what the shop is."""
        return self._get("/me")

    def _get(self, path: str) -> Answer:
        return self._wire.send("GET", path, headers=self._get_headers, body=None, read_s=self._timeouts.read_s)

    def _post(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None) -> Answer:
        ready = {**self._post_headers, **headers}
        return self._wire.send(method, path, headers=ready, body=body, read_s=self._timeouts.charge_read_s)


def _wire(api_url: str, max_connections: int, timeouts: Timeouts) -> Wire:
    try:
        return Wire(api_url, max_connections=max_connections, connect_s=timeouts.connect_s)
    except NoWay as fault:
        raise NeverSent(f"Nothing was sent, so no money moved: {fault}.") from fault


class PaymentProvider:
    """One shop at the payment provider. One instance serves any number of threads.

    `max_requests_per_second` caps all threads together; after a 429 all of them wait. `read_attempts` and
    `read_backoff_s` bound how a read is repeated: the back-off doubles, and a delay the provider asks for is honoured.
    `now` is the clock that the provider's is compared with.
    """

    def __init__(
        self,
        *,
        shop_id: str,
        secret_key: str,
        api_url: str,
        max_connections: int = 64,
        timeouts: Timeouts = Timeouts(),
        max_requests_per_second: float | None = None,
        read_attempts: int = 4,
        read_backoff_s: float = 0.5,
        threads: Threads = OF_THE_SYSTEM,
        now: Callable[[], datetime] = _utc_now,
        sleep: Callable[[float], None] = time.sleep,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """Sends nothing. Raises ValueError for what cannot work, NeverSent for a proxy or certificates that cannot."""
        if not shop_id or not secret_key:
            raise ValueError("the shop id and the secret key must not be empty")
        if read_attempts < 1:
            raise ValueError(f"read_attempts is {read_attempts}; it must be at least 1")
        self.api_url = api_url.rstrip("/")
        self.shop_id = shop_id
        self.is_live = secret_key.startswith("live_")
        self.charge_done_s = timeouts.charge_done_s
        self._read_attempts = read_attempts
        self._read_backoff_s = read_backoff_s
        self._threads = threads
        self._now = now
        self._clock = Readings()
        self._sleep = sleep
        self._uniform = uniform
        self.rate = RateLimit(max_requests_per_second, clock=threads.monotonic, sleep=sleep)
        self._wire = _wire(self.api_url, max_connections, timeouts)
        token = b64encode(f"{shop_id}:{secret_key}".encode()).decode("ascii")
        self._errors = Translator((secret_key, token))
        self._payments = _Payments(self.api_url, self._wire, timeouts, f"Basic {token}")
        self.lists = Lists(self._read_page, self._errors.foreign, threads)

    def __repr__(self) -> str:
        return f"PaymentProvider(api_url={self.api_url!r}, shop_id={self.shop_id!r})"

    @property
    def clock_offset(self) -> timedelta | None:
        """How far the provider's clock is ahead of ours, by the Date of its last few answers; None: none had one."""
        return self._clock.offset

    @property
    def is_clock_suspicious(self) -> bool:
        """Whether the last answer's Date is further off than may be."""
        return self._clock.is_suspicious

    def make_sure_of_clock(self) -> None:
        """Ask for the time by the cheapest request: where no answer has told it yet, and again where it is odd.

        Raises the ProviderError of a provider that gives no answer at all, and WrongCredentials.
        """
        for _ in range(ANSWERS_COMPARED):
            if self._clock.is_settled:
                return
            try:
                self._within_bound(self.check)
            except WrongCredentials:
                raise
            except ProviderError:
                if self._clock.offset is None:
                    raise
                return
            if self._clock.offset is None:
                return  # its answers carry no Date

    def close(self) -> None:
        """Close the pooled connections."""
        self._wire.close()

    # --- Charges -------------------------------------------------------------------------------------------------

    def create_payment(
        self, body: str, idempotence_key: str, before_send: Callable[[], None] | None = None
    ) -> ProviderPayment:
        """Send one charge: ONE POST of exactly these bytes with this key, never repeated here.

        What moves: the amount in `body`, from the customer to the shop, if the answer's status is `succeeded`. The
        caller has committed body and key (SPEC 5), so a process killed here leaves an attempt whose outcome is
        unknown and whose key may be sent again within 24 h. It does not wait for its turn: the caller has taken one
        from `rate`, before it looked at the customer. An exception from `before_send` passes with nothing sent.

        NeverSent, WrongCredentials, Forbidden, RequestRejected: no money moved by this request. RateLimited,
        StillProcessing, OutcomeUnknown: it may have. Raises ValueError, before anything is sent, for a key that is
        not 1 to 64 visible ASCII characters.
        """
        if not isinstance(idempotence_key, str) or not _KEY.fullmatch(idempotence_key):
            raise ValueError("the idempotence key must be 1 to 64 visible ASCII characters; nothing was sent")
        sent = body.encode("utf-8")
        charges = self._payments.charges
        call = Call(f"charge with key {idempotence_key}", body=body)
        if before_send is not None:
            before_send()
        answer = self._send(call, lambda: charges.post(sent, idempotence_key))
        payment = parse_payment(self._object(answer, call))
        if isinstance(payment, UnusablePayment):
            name = f"payment {payment.payment_id}" if payment.payment_id else "a payment without a readable id"
            raise self._errors.of_unusable(answer, call, f"{name} that cannot be used: {payment.reason}")
        return payment

    # --- Reads ---------------------------------------------------------------------------------------------------

    def get_payment(self, payment_id: str) -> ProviderPayment | UnusablePayment:
        """Ask for one payment, repeating within the bound.

        Raises PaymentNotFound when the provider says so, RequestRejected, Forbidden or WrongCredentials when it
        refuses, NeverSent or OutcomeUnknown when it gives no usable answer.
        """
        call = Call(f"payment {self._errors.foreign(str(payment_id))}", by_id=True)
        if not isinstance(payment_id, str) or not payment_id.strip():
            raise RequestRejected(f"{call.what!r}: an empty id names no payment; nothing was asked", status_code=400)
        quoted = quote(payment_id, safe="", errors="replace")
        if not quoted.strip("."):  # "." and ".." would be steps in the path
            quoted = quoted.replace(".", "%2E")

        def ask() -> ProviderPayment | UnusablePayment:
            answer = self._ask(call, lambda: self._payments.one(quoted))
            payment = parse_payment(self._object(answer, call))
            answered_id = payment.id if isinstance(payment, ProviderPayment) else payment.payment_id
            if answered_id not in (None, payment_id):
                raise self._errors.of_unusable(answer, call, f"which is about another payment, {answered_id}")
            return payment

        return self._within_bound(ask)[0]

    def list_payments(self, filters: Mapping[str, str]) -> Slice:
        """Every payment that matches the filters, following the cursors to the end.

        Raises IncompleteSlice when the end was not reached, with the reason as `__cause__`; WrongCredentials as it is.
        """
        return self.lists.payments(filters)

    def fetch_slice(self, start: datetime, end: datetime, *, parallel_windows: int | None = 1) -> Slice:
        """The payments that succeeded and were created or captured in [start, end], each once. Whole, or an error.

        Two lists: a card may be paid in the 59th minute and cash on the eighth day. Bounds are widened to whole
        milliseconds. Another status is dropped, should the provider ignore the filter. `parallel_windows`: read in that
        many parts at once, which overlap by an instant; None: only where a list is longer than a few pages.
        """
        return self.lists.succeeded(start, end, parallel_windows)

    def fetch_day(self, start: datetime, end: datetime, *, parallel_windows: int | None = None) -> Slice:
        """The payments in ANY status that were created or captured in [start, end), each once. Whole, or an error."""
        return self.lists.payments_of_day(start, end, parallel_windows)

    def fetch_unfinished(self, start: datetime, end: datetime) -> Slice:
        """The payments that were created in [start, end] and may still be paid, each once. Whole, or an error."""
        return self.lists.unfinished(start, end)

    def fetch_refunds(self, start: datetime, end: datetime) -> RefundSlice:
        """The refunds in any status that were created in [start, end), each once. Whole, or an error."""
        return self.lists.refunds_of_day(start, end)

    def look_up(
        self, payment_ids: Iterable[str], max_concurrency: int
    ) -> dict[str, ProviderPayment | UnusablePayment | None]:
        """Ask for each of these payments, some at once. None: the provider does not know it.

        Whole, or an error: IncompleteSlice when it does not answer for one of them, WrongCredentials as it is.
        """
        ids = list(dict.fromkeys(payment_ids))
        found: dict[str, ProviderPayment | UnusablePayment | None] = {}
        for payment_id, answer in map_concurrently(self.get_payment, ids, max_concurrency, threads=self._threads):
            if isinstance(answer, PaymentNotFound):
                found[payment_id] = None
            elif isinstance(answer, RequestRejected) and not isinstance(answer, Forbidden):
                found[payment_id] = UnusablePayment(payment_id, f"it refuses to look it up: {answer}", payment_id)
            elif isinstance(answer, ProviderError):
                raise IncompleteSlice(
                    f"payment {self._errors.foreign(payment_id)} could not be looked up: {answer} Nothing was decided"
                    " without it."
                ) from answer
            elif isinstance(answer, Exception):
                raise answer
            else:
                found[payment_id] = answer
        return found

    def scan(self, start: datetime, end: datetime) -> Slice:
        """Every payment created in [start, end], in any status: where a lost charge is searched for."""
        return self.list_payments(window("created_at", start, end))

    def check(self) -> None:
        """The cheapest authenticated request, once. Raises the ProviderError that says what is wrong."""
        call = Call("the list of payments")
        self._items(self._ask(call, lambda: self._payments.page("payments", {"limit": "1"})), call)

    def cards(self, method_ids: Iterable[str], max_concurrency: int = 8) -> dict[str, str]:
        """The last four digits of saved cards, "" for what has none; or why one may not be charged (`inactive`).

        Raises WrongCredentials.
        """

        def ask(method_id: str) -> str:
            call = Call("a saved payment method", by_id=True)
            quoted = quote(method_id, safe="")
            method = self._object(self._ask(call, lambda: self._payments.method(quoted)), call)
            if method.get("id") not in (None, method_id):
                raise OutcomeUnknown(f"{call.what}: the answer is about another one", answered=True)
            return _told_of(method)

        ids = list(dict.fromkeys(method_ids))
        answers = map_concurrently(ask, ids, max_concurrency, threads=self._threads)
        return {method_id: told for method_id, told in answers if isinstance(told, str)}

    def has_fiscalization(self) -> bool | None:
        """Whether the provider registers the shop's receipts. None: it does not say. Raises ProviderError."""
        call = Call("the shop's settings")
        shop = self._object(self._ask(call, self._payments.shop), call)
        told = shop.get("fiscalization")
        enabled = told.get("enabled") if isinstance(told, dict) else shop.get("fiscalization_enabled")
        return enabled if isinstance(enabled, bool) else None

    def _read_page(self, what: str, query: Mapping[str, str], call: Call) -> tuple[list[Any], Any, int]:
        def ask() -> tuple[list[Any], Any]:
            return self._items(self._ask(call, lambda: self._payments.page(what, query)), call)

        (items, following), requests = self._within_bound(ask)
        return items, following, requests

    # --- One request ---------------------------------------------------------------------------------------------

    def _ask(self, call: Call, request: Callable[[], Answer]) -> Answer:
        """A read: wait for the turn, then as `_send`."""
        self.rate.wait_turn()
        return self._send(call, request)

    def _send(self, call: Call, request: Callable[[], Answer]) -> Answer:
        """Send once. An answer other than HTTP 200 is raised as the error it means."""
        began_s = self._threads.monotonic()
        try:
            answer = request()
        except Exception as fault:
            raise self._errors.of_fault(fault, call) from fault
        received_at = self._now()
        if (there := told_at(answer)) is not None:
            took = timedelta(seconds=self._threads.monotonic() - began_s)
            self._clock.note(offset_of(there, received_at, took, DATE_RESOLUTION))
        if answer.status == 200:
            self.rate.answered()
            return answer
        error = self._errors.of_answer(answer, call, received_at)
        if isinstance(error, RateLimited):
            self.rate.slow_down(error.retry_after_s)
        else:
            self.rate.answered()
        raise error

    def _within_bound(self, ask: Callable[[], Value]) -> tuple[Value, int]:
        """Repeat a read while its outcome is unknown. Never a charge. Returns the value and the number of requests.

        A dozen lines instead of a library: the waiting after a 429 is shared by all threads.
        """
        attempt = 1
        while True:
            try:
                return ask(), attempt
            except (NeverSent, OutcomeUnknown) as fault:
                if attempt >= self._read_attempts:
                    raise
                if not isinstance(fault, RateLimited):  # after a 429 the next turn is the wait
                    backoff_s = min(self._read_backoff_s * 2 ** (attempt - 1), _LONGEST_BACKOFF_S)
                    # Jitter, so that 64 threads do not come back in step.
                    backoff_s *= self._uniform(0.75, 1.25)
                    self._sleep(max(backoff_s, getattr(fault, "retry_after_s", None) or 0.0))
            attempt += 1

    def _object(self, answer: Answer, call: Call) -> dict[str, Any]:
        """The JSON object of an HTTP 200."""
        try:
            document = read_json(answer.body)
        except ValueError as fault:
            raise self._errors.of_unusable(answer, call, "which is not whole JSON") from fault
        if not isinstance(document, dict):
            raise self._errors.of_unusable(answer, call, "which is not a JSON object")
        return document

    def _items(self, answer: Answer, call: Call) -> tuple[list[Any], Any]:
        """A page's items and its cursor."""
        page = self._object(answer, call)
        items = page.get("items")
        if not isinstance(items, list):
            hint = "which holds no list of items; is YOOKASSA_API_URL right?"
            raise self._errors.of_unusable(answer, call, hint)
        return items, page.get("next_cursor")


def _told_of(method: Mapping[str, Any]) -> str:
    """Digits or nothing of a method that may be charged, else a word: its state, or `unsaved`."""
    state = method.get("status")
    if isinstance(state, str) and state != "active":
        return state if state.isascii() and state.isalpha() and len(state) <= _LONGEST_STATE else "inactive"
    if method.get("saved") is False:
        return "unsaved"
    card = method.get("card")
    last4 = card.get("last4") if isinstance(card, dict) else None
    return last4 if isinstance(last4, str) and last4.isdigit() and len(last4) == 4 else ""
