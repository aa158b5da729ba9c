"""How hard one run drives the provider: how many charges are under way, when one is sent again, when the run gives up.

The first charge goes alone, so that a wrong shop key costs one request. The width then doubles with every answer up to
`max_concurrency`, and halves with every failure. Several failures in a row open the breaker.

`provider.pacing.map_concurrently` keeps its own count of what is under way: a read that fails moves no money, so it
needs no halving, and "not found" is a good answer there.
"""

from dataclasses import dataclass

from billing_orchestration.domain.provider_payment import ProviderPayment
from billing_orchestration.jobs.autopayment.charging import Withheld
from billing_orchestration.jobs.run_failures import FailureCode
from billing_orchestration.provider.errors import (
    Forbidden,
    OutcomeUnknown,
    RateLimited,
    RequestRejected,
    WrongCredentials,
)
from billing_orchestration.provider.pacing import Breaker
from billing_orchestration.threads import Event

# After this many failures in a row the provider fails for everyone. Silence counts double: each costs the whole read
# timeout.
BREAKER_LIMIT = 6
_WEIGHT_OF_SILENCE = 2
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


class Pace:
    """The pace of one run. `note` every answer; one thread only, but for `stop` and `is_stopped`."""

    def __init__(self, limits: ChargingLimits, stopped: Event) -> None:
        self.width = 1
        self.stop_reason: str | None = None
        self.stop_code: str | None = None
        self._limits = limits
        self._stopped = stopped
        self._breaker = Breaker(BREAKER_LIMIT)

    @property
    def is_stopped(self) -> bool:
        """Whether nothing more is sent in this run."""
        return self._stopped.is_set()

    def stop(self, reason: str | None = None, code: str | None = None) -> None:
        """Send nothing more. The first reason and its code are kept; without one, the run is over."""
        if self.stop_reason is None:
            self.stop_reason, self.stop_code = reason, code
        self._stopped.set()

    def note(self, answer: ProviderPayment | Exception) -> None:
        """Follow an answer: faster after what the provider has understood, slower after a failure."""
        if isinstance(answer, Withheld):
            return
        if isinstance(answer, WrongCredentials):
            self.stop(str(answer), type(answer).__name__)
        elif isinstance(answer, RateLimited):
            self._narrow()
        elif isinstance(answer, OutcomeUnknown):
            self._failed(_WEIGHT_OF_SILENCE if answer.timed_out else 1, str(answer))
        elif isinstance(answer, ProviderPayment) or (
            isinstance(answer, RequestRejected) and not isinstance(answer, Forbidden)
        ):
            self._breaker.heard()
            self.width = min(self._limits.max_concurrency, self.width * 2)
        else:
            self._failed(1, str(answer) or repr(answer))

    def _narrow(self) -> None:
        self.width = max(1, self.width // 2)

    def _failed(self, weight: int, reason: str) -> None:
        self._narrow()
        self._breaker.failed(weight)
        if self._breaker.is_open:
            self.stop(
                f"the provider fails for everyone ({self._breaker.failures} times in a row), last: {reason}",
                FailureCode.PROVIDER_FAILS,
            )

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
