"""What the provider says about many payments, each asked about by its id. It reads only."""

from collections.abc import Callable, Iterable, Sequence

from billing_orchestration.domain.expiry import NoAnswer, NotFoundThere, ProviderAnswer
from billing_orchestration.domain.provider_payment import UnusablePayment
from billing_orchestration.provider.errors import Forbidden, PaymentNotFound, ProviderError, RequestRejected
from billing_orchestration.provider.pacing import Breaker, map_concurrently
from billing_orchestration.resources import ProviderConnection
from billing_orchestration.threads import Threads

# After this many payments in a row without an answer the provider fails for everyone, and the rest waits.
BREAKER_SILENCES = 10


class Inquiry:
    """Asks the provider about pages of ids, a few at once, and gives up when it answers for nobody."""

    def __init__(
        self, provider: ProviderConnection, max_concurrency: int, threads: Threads, warn: Callable[[str], None]
    ) -> None:
        self._provider = provider
        self._max_concurrency = max_concurrency
        self._threads = threads
        self._warn = warn
        self._breaker = Breaker(BREAKER_SILENCES)
        self.asked = self.not_found = self.unanswered = 0

    def ask(self, payment_ids: Iterable[str]) -> dict[str, ProviderAnswer]:
        """One answer per id."""
        ids = list(dict.fromkeys(payment_ids))
        answers: dict[str, ProviderAnswer] = {}
        if ids and not self._breaker.is_open:
            self._ask(ids, answers)
        for payment_id in ids:
            answers.setdefault(payment_id, NoAnswer("not asked: the provider does not answer for anyone"))
        self.asked += len(ids)
        self.not_found += sum(isinstance(answer, NotFoundThere) for answer in answers.values())
        self.unanswered += sum(isinstance(answer, NoAnswer) for answer in answers.values())
        return answers

    def _ask(self, ids: Sequence[str], answers: dict[str, ProviderAnswer]) -> None:
        results = map_concurrently(
            self._provider.client.get_payment,
            ids,
            self._max_concurrency,
            threads=self._threads,
            first_alone=not self.asked,
        )
        for payment_id, result in results:
            if isinstance(result, PaymentNotFound):
                answers[payment_id] = NotFoundThere()
            elif isinstance(result, RequestRejected) and not isinstance(result, Forbidden):
                answers[payment_id] = UnusablePayment(payment_id, f"it refuses to look it up: {result}", payment_id)
            elif isinstance(result, ProviderError):
                answers[payment_id] = NoAnswer(str(result))
            elif isinstance(result, Exception):
                raise result
            else:
                answers[payment_id] = result
            if not isinstance(answers[payment_id], NoAnswer):
                self._breaker.heard()
                continue
            self._breaker.failed(payment_id)
            if self._breaker.is_open:
                self._warn(
                    f"the provider did not answer {BREAKER_SILENCES} times in a row: the rest is left for the next run"
                )
                break
