"""What a failed call to the provider says about the money.

    ProviderError
    ├── NeverSent              nothing left this machine (refused, no such host, no TLS): no money moved
    ├── RequestRejected        the provider itself said no to this request (400): no money moved by it
    │   ├── WrongCredentials   401: shop id or secret key; stops a run at once
    │   ├── Forbidden          403: the shop may not do this (autopayments not enabled, say)
    │   └── PaymentNotFound    404 from the provider itself, for a payment asked for by its id
    ├── OutcomeUnknown         anything else: the request may have been executed, so money may have moved
    │   ├── RateLimited        429: slow down, then the same key again
    │   └── StillProcessing    202: ask again with the same key
    └── IncompleteSlice        a list broke off before its end: nothing may be decided from it

What is not recognised is OutcomeUnknown, never a failure. A *declined* payment is no error: it is an answer, a
ProviderPayment with status `canceled`. Messages never hold credentials.
"""

from __future__ import annotations


class ProviderError(Exception):
    """A call to the provider that did not return what was asked for."""


class NeverSent(ProviderError):
    """The request did not leave this machine. No money moved; the same key may be used later."""


class RequestRejected(ProviderError):
    """The provider answered this request with an error of its own. No money moved by it.

    `status_code` is the HTTP status, `code` the provider's error code, `parameter` what it names as wrong,
    `description` its words.
    """

    def __init__(
        self, message: str, *, status_code: int, code: str = "", parameter: str = "", description: str = ""
    ) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.code = code
        self.parameter = parameter
        self.description = description


class WrongCredentials(RequestRejected):
    """401: the shop id or the secret key is wrong. Nothing else may be sent with them."""


class Forbidden(RequestRejected):
    """403: the credentials are right, the shop may not do this."""


class PaymentNotFound(RequestRejected):
    """404 from the provider itself, for a payment asked for by its id."""


class OutcomeUnknown(ProviderError):
    """The request may have been executed. For a charge: money may have moved.

    `timed_out`: it took the whole read timeout; `retry_after_s`: the delay the provider asks for, if any.
    `answered`: by the provider itself, which has finished with this request. Anything else may be a proxy's word while
    the provider is still at work.
    """

    def __init__(
        self, message: str, *, retry_after_s: float | None = None, timed_out: bool = False, answered: bool = False
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.timed_out = timed_out
        self.answered = answered


class RateLimited(OutcomeUnknown):
    """429: too many requests. Everybody slows down; the same key and body later."""


class StillProcessing(OutcomeUnknown):
    """202: still in progress. Ask again with the same key and body."""


class IncompleteSlice(ProviderError):
    """A list of payments broke off before its end. A diff of a part invents differences, so nothing was applied."""
