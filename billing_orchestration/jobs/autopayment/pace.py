"""How hard one run drives the provider: how many charges are under way, when one is sent again, when the run gives up.

The first charge goes alone until its grant is committed. Each committed grant then makes room for one more charge under
way, up to `max_concurrency`, and each failure halves the width. A 429 halves it too, and from there it grows slowly for
the rest of the run. So charging runs ahead neither of the books nor of the provider.

What stops a run: a wrong shop key; one refusal of the shop, repeated for the first charges; a few paid charges in a row
that cannot be granted; a provider that fails for everyone (`provider.pacing.Breaker`); a person who terminates it.
"""

from dataclasses import dataclass

from billing_orchestration.domain.answers import is_about_the_shop
from billing_orchestration.domain.attempts import Attempt
from billing_orchestration.domain.provider_payment import ProviderPayment
from billing_orchestration.jobs.autopayment.charging import Withheld
from billing_orchestration.jobs.run_failures import FailureCode
from billing_orchestration.provider.errors import Forbidden, OutcomeUnknown, RateLimited, RequestRejected
from billing_orchestration.provider.pacing import Breaker
from billing_orchestration.threads import Event

# When this many payment methods in a row have failed, the provider fails for everyone. Silence counts double: it costs
# the whole read timeout.
BREAKER_LIMIT = 8
_WEIGHT_OF_SILENCE = 2
# When the first charges of a run are refused alike, the provider refuses the shop and not this many customers.
MOST_REFUSED_ALIKE = 5
# When this many in a row are paid and not granted, the books cannot take what is charged.
MOST_NOT_GRANTED = 3
# A provider that says 429 did not execute the request, so it may be sent more often than after other failures.
_MOST_THROTTLED_SENDS = 10
_WAIT_GROWTH = 3.0
_LONGEST_WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class ChargingLimits:
    """`max_sends`: how often one attempt is sent in one run at most."""

    max_concurrency: int
    max_sends: int
    resend_wait_s: float


@dataclass(frozen=True, slots=True)
class Sent:
    """A send, with how often the provider had been heard, and had slowed the run down, when it began."""

    attempt: Attempt
    heard: int
    slowed: int


class Pace:
    """The pace of one run. One thread only, but for `stop` and `is_stopped`."""

    def __init__(self, limits: ChargingLimits, stopped: Event) -> None:
        # The first charge goes alone until its grant is committed: what the books refuse, one customer has paid.
        self.width = 1
        self.stop_reason: str | None = None
        self.stop_code: str | None = None
        # The payment methods of the first charges, if all of these were refused alike.
        self.refused_alike: set[str] = set()
        self._refusal: tuple[int, str, str] | None = None
        self._limits = limits
        self._stopped = stopped
        self._breaker = Breaker(BREAKER_LIMIT)
        # Below it each grant widens; from there on, as many grants as the width.
        self._ceiling = limits.max_concurrency
        self._grants_at_ceiling = self._slowed = self._not_granted = 0
        self._is_accepted = False

    @property
    def is_stopped(self) -> bool:
        """Whether nothing more is sent in this run."""
        return self._stopped.is_set()

    @property
    def in_doubt(self) -> bool:
        """Whether the latest failures may be everybody's: other customers, tried next, will tell."""
        return bool(self._breaker.failures or self.refused_alike or self._not_granted)

    @property
    def refuses_the_shop(self) -> bool:
        """Whether the first charges were refused alike, often enough to stop."""
        return len(self.refused_alike) >= MOST_REFUSED_ALIKE

    def stop(self, reason: str | None = None, code: str | None = None) -> None:
        """Send nothing more. The first reason and its code are kept; without one, the run is over."""
        if self.stop_reason is None:
            self.stop_reason, self.stop_code = reason, code
        self._stopped.set()

    # --- what the provider says

    def begin(self, attempt: Attempt) -> Sent:
        """A send begins. `note` its answer."""
        return Sent(attempt, self._breaker.heard_so_far, self._slowed)

    def note(self, sent: Sent, answer: ProviderPayment | Exception) -> None:
        """Follow an answer: slow down after a failure, stop after one that is everybody's."""
        if isinstance(answer, Withheld):
            return
        if isinstance(answer, ProviderPayment):
            self._breaker.heard()
            self._is_accepted = True
            self.refused_alike.clear()
        elif isinstance(answer, RequestRejected):
            self._refused(sent, answer)
        elif isinstance(answer, RateLimited):
            self._throttled(sent)
        else:
            self._failed(sent, answer)

    def _refused(self, sent: Sent, answer: RequestRejected) -> None:
        if is_about_the_shop(sent.attempt, answer.status_code, answer.parameter):
            self.stop(str(answer), type(answer).__name__)
            return
        if isinstance(answer, Forbidden):
            self._failed(sent, answer)
        else:
            self._breaker.heard()
        if self._is_accepted:
            return  # others are charged: this refusal is about the one
        refusal = (answer.status_code, answer.code, answer.parameter)
        if refusal != self._refusal:
            self._refusal = refusal
            self.refused_alike.clear()
        self.refused_alike.add(sent.attempt.payment_method_id)
        if self.refuses_the_shop:
            self.stop(
                f"the provider refuses the shop: the first {len(self.refused_alike)} charges were refused alike."
                f" In its words: {answer}",
                FailureCode.SHOP_REFUSED,
            )

    def _throttled(self, sent: Sent) -> None:
        # The answers to one burst are one slow-down.
        if sent.slowed == self._slowed:
            self._slowed += 1
            self._narrow()
            self._ceiling, self._grants_at_ceiling = self.width, 0

    def _failed(self, sent: Sent, answer: Exception) -> None:
        is_silent = isinstance(answer, OutcomeUnknown) and answer.timed_out
        # A card that hangs while others are answered is not the provider's trouble.
        if not (is_silent and sent.heard < self._breaker.heard_so_far):
            self._narrow()
        self._breaker.failed(sent.attempt.payment_method_id, _WEIGHT_OF_SILENCE if is_silent else 1, sent.heard)
        if self._breaker.is_open:
            self.stop(
                f"the provider fails for everyone ({self._breaker.failures} failures, nothing heard between them),"
                f" last: {str(answer) or repr(answer)}",
                FailureCode.PROVIDER_FAILS,
            )

    def _narrow(self) -> None:
        self.width = max(1, self.width // 2)

    # --- what the books say

    def granted(self) -> None:
        """A grant was committed."""
        self._not_granted = 0
        if self.width >= self._ceiling:
            self._grants_at_ceiling += 1
            if self._grants_at_ceiling < self.width:
                return
            self._grants_at_ceiling = 0
        self.width = min(self._limits.max_concurrency, self.width + 1)

    def not_granted(self, reason: str) -> None:
        """A paid charge could not be granted: the next goes alone again."""
        self.width = 1
        self._not_granted += 1
        if self._not_granted >= MOST_NOT_GRANTED:
            self.stop(
                f"the books cannot take what is charged: {self._not_granted} charges in a row are paid and not granted"
                f" yet, last: {reason}",
                FailureCode.NOT_GRANTED,
            )

    # --- what follows from it

    def room(self, under_way: int, unwritten: int) -> int:
        """How many more to claim, given the charges under way and the answers not yet written."""
        if self.is_stopped:
            return 0
        # At full width some more are claimed than can be sent, so that no sender waits for the database.
        full = self.width == self._limits.max_concurrency > 1
        ahead = max(2, self.width // 2) if full else 0
        room = self.width + ahead - under_way
        if under_way >= self.width and room <= ahead // 2:
            return 0  # soon there is room for more, which share a statement
        if unwritten >= self.width + ahead:
            return 0  # the database is behind: what it has not written yet must not grow without end
        return max(0, room)

    def wait_before_resend(self, sends: int, uncounted: int, least_s: float) -> float | None:
        """Seconds until an attempt may be sent again; None when it has had its tries, or charging has stopped.

        `least_s`: the provider's own wish, or until it has finished with the last send.
        `uncounted` of its `sends` do not count against `max_sends`: they were withheld, or answered by 429.
        """
        if self.is_stopped:
            return None
        most = max(self._limits.max_sends, _MOST_THROTTLED_SENDS if uncounted else 0)
        if sends - uncounted >= self._limits.max_sends or sends >= most:
            return None
        wait_s = self._limits.resend_wait_s * _WAIT_GROWTH ** (sends - 1)
        return min(max(wait_s, least_s), _LONGEST_WAIT_S)
