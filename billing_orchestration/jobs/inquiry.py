"""What the provider says about many payments: by its lists of unpaid ones, else each by its id. It reads only."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from billing_orchestration.domain.expiry import ListedThere, NoAnswer, NotFoundThere, ProviderAnswer, StalePayment
from billing_orchestration.domain.provider_payment import CANCELED, PENDING, UnusablePayment
from billing_orchestration.provider.errors import (
    Forbidden,
    IncompleteSlice,
    PaymentNotFound,
    ProviderError,
    RequestRejected,
)
from billing_orchestration.provider.pacing import Breaker, map_concurrently
from billing_orchestration.resources import ProviderConnection
from billing_orchestration.threads import Threads

# After this many payments in a row without an answer the provider fails for everyone, and the rest waits.
BREAKER_SILENCES = 10
# A page of the list is worth reading where it stands for this many questions: two and a half rounds of them, and where
# a list turns out to be too long a twentieth more requests for each of the two.
PAGE_IS_WORTH = 20
# How far the service's instant and the provider's may differ for one payment. What lies further apart is asked about.
_APART = timedelta(minutes=5)


@dataclass
class _List:
    """What each reading of one status's list has shown, with the instant up to which it was read; oldest first."""

    answer: ListedThere
    shown: deque[tuple[datetime, frozenset[str]]] = field(default_factory=deque)
    read_until: datetime | None = None

    def forget_before(self, instant: datetime) -> None:
        """Rows come in the order of their time: what was read up to here shows none of those to come."""
        while self.shown and self.shown[0][0] < instant:
            self.shown.popleft()


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
        self._list_is_of_use = True
        # Canceled first: of what is old, nearly all is.
        self._lists = [_List(ListedThere(status)) for status in (CANCELED, PENDING)]
        self.asked = self.listed = self.not_found = self.unanswered = 0

    def ask_about(self, rows: Sequence[StalePayment]) -> dict[str, ProviderAnswer]:
        """One answer for each provider id of these rows, which are in the order of their time."""
        ids = list(dict.fromkeys(row.external_payment_id for row in rows if row.external_payment_id))
        answers = self._listed(ids, [row.created_at for row in rows if row.created_at is not None])
        self.listed += len(answers)
        rest = [payment_id for payment_id in ids if payment_id not in answers]
        if rest and not self._breaker.is_open:
            self._ask(rest, answers)
        for payment_id in ids:
            answers.setdefault(payment_id, NoAnswer("not asked: the provider does not answer for anyone"))
        self.asked += len(ids)
        self.not_found += sum(isinstance(answer, NotFoundThere) for answer in answers.values())
        self.unanswered += sum(isinstance(answer, NoAnswer) for answer in answers.values())
        return answers

    def _listed(self, ids: Sequence[str], created: Sequence[datetime]) -> dict[str, ProviderAnswer]:
        """The unpaid ones, where the list of their time is whole within fewer requests than there are ids to ask about.

        What is paid or held is never taken from the list. A list that lags behind may show as pending what was paid
        minutes ago: it expires, as if it had been paid a minute later, and the matching jobs settle it.
        """
        answers: dict[str, ProviderAnswer] = {}
        for there in self._lists:
            most_pages = (len(ids) - len(answers)) // PAGE_IS_WORTH
            if most_pages and created and self._list_is_of_use and not self._breaker.is_open:
                self._read_list(there, created[0] - _APART, created[-1] + _APART, most_pages)
            shown = frozenset[str]().union(*(names for _, names in there.shown))
            answers |= {payment_id: there.answer for payment_id in ids if payment_id in shown}
        return answers

    def _read_list(self, there: _List, start: datetime, end: datetime, most_pages: int) -> None:
        """Read what the rows before these have not read already: many may be of one instant."""
        there.forget_before(start)
        begin = max(start, there.read_until) if there.read_until is not None else start
        if begin >= end:
            return
        try:
            found = self._provider.client.lists.in_status(there.answer.status, begin, end, most_pages)
        except IncompleteSlice as fault:
            self._list_is_of_use = False
            self._warn(f"{fault} Each payment is asked about instead")
            return
        if found is not None:
            there.shown.append((end, found))
            there.read_until = end

    def _ask(self, ids: Sequence[str], answers: dict[str, ProviderAnswer]) -> None:
        results = map_concurrently(
            self._provider.client.get_payment,
            ids,
            self._max_concurrency,
            threads=self._threads,
            first_alone=not self.asked and not self.listed,
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
