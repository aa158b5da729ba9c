"""The charging protocol (SPEC 5): how a renewal moves money, and how it survives being killed anywhere.

For each attempt, in this order and never side by side:

1. lock      a session lock on the attempt: no two processes send one key at the same time
2. claim     one transaction, committed: the subscription is looked at again; the attempt is PLANNED with its exact
             body, its key and `first_sent_at` (a new one), or its `last_sent_at` moves (one that is sent again)
3. send      POST, with no transaction open
4. conclude  one transaction, committed: success -> payment row, extension, settlement, attempt SUCCEEDED, together;
             anything else -> the attempt's new state
5. unlock

Killed between 1 and 2: nothing happened. Between 2 and 3, or 3 and 4: the attempt is PLANNED or UNKNOWN with a
`first_sent_at`; the next run sends the same key and body (the provider answers with the same payment), or, after
23 h, searches for it; a success is also found by the matching jobs within minutes, by the attempt's id in its metadata.
Between 4 and 5: the lock ends with the session.

Many attempts share the statements of steps 1, 2, 4 and 5. One thread decides (`run`), one claims, two conclude, up to
`max_concurrency` send: while one batch of answers is written, the next attempts are claimed and sent, so that nobody
waits for the database but the attempt that is being written. The first charge of a run goes alone, so that a wrong
shop key costs one request; then the width doubles with every answer up to `max_concurrency`, and halves with every
failure. No more answers wait to be written than charges may be under way.
"""

import heapq
import itertools
import queue
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Protocol

from billing_orchestration.database.attempts import claim, close, open_and_claim, try_lock, unlock
from billing_orchestration.database.audit import Stamp
from billing_orchestration.domain.answers import (
    Closing,
    as_answer_to,
    judge_payment,
    judge_refusal,
    judge_silence,
    judge_unsent,
    names_another_attempt,
)
from billing_orchestration.domain.attempts import KEY_LIFETIME, Attempt, State
from billing_orchestration.domain.provider_payment import SUCCEEDED, ProviderPayment
from billing_orchestration.domain.renewals import Charge, Resend
from billing_orchestration.domain.settlement import CloseAsGranted, Leave, Quarantine, RecordRefund, Settle
from billing_orchestration.jobs.settling import Failed, settle_all
from billing_orchestration.provider.errors import (
    Forbidden,
    NeverSent,
    OutcomeUnknown,
    RateLimited,
    RequestRejected,
    WrongCredentials,
)
from billing_orchestration.resources import BillingDatabase
from billing_orchestration.threads import Event, Queue, Thread, threads

if TYPE_CHECKING:
    import sqlalchemy as sa

    from billing_orchestration.database.settling import Settled

# So many sends in a row that brought no usable answer: the provider fails for everyone. Silence weighs double, since
# each costs the whole read timeout.
BREAKER_LIMIT = 6
_WEIGHT_OF_SILENCE = 2
# A provider that says 429 did not execute the request, so more tries than for other failures are harmless.
_MOST_THROTTLED_SENDS = 10
_WAIT_GROWTH = 3.0
_LONGEST_WAIT_S = 60.0
# A claim that was committed longer ago than this is not sent by, but made anew: the process may have been suspended,
# or have waited for its turn behind many 429. The hour between KEY_LIFETIME and the provider's 24 h, and the margin
# of a search (SCAN_MARGIN), both count on a send following its claim soon.
_CLAIM_LIFETIME = timedelta(minutes=10)
# Results of one transaction: enough to share its statements, few enough that the first of them does not wait.
_MOST_RESULTS_AT_ONCE = 64
# An answer waits this long for others to share a transaction with, while there are others under way.
_LINGER_S = 0.008
_ENOUGH_RESULTS = 24
# Two, so that one batch is decided while the other waits for its commit. More would only make smaller batches.
_WRITERS = 2
_PROGRESS_EVERY_S = 10.0


class ChargesPayments(Protocol):
    """The part of the provider's client that charging needs."""

    is_live: bool

    def create_payment(
        self, body: str, idempotence_key: str, before_send: Callable[[], None] | None = None
    ) -> ProviderPayment:
        """One POST of exactly these bytes, right after `before_send`; what that raises goes through, nothing sent."""
        ...


@dataclass(frozen=True, slots=True)
class ChargingLimits:
    """How hard the provider is driven. `max_sends`: how often one attempt is sent in one run at most."""

    max_concurrency: int
    max_sends: int
    resend_wait_s: float


@dataclass(slots=True)
class ChargeResult:
    """What became of one attempt in this run.

    `outcome`: charged | pending | declined | stopped | rejected | review | refunded | unknown | never sent | skipped.
    `needs_retry`: the run ends red because of it.
    """

    attempt: Attempt
    outcome: str
    reason: str
    decline_class: str | None = None
    needs_retry: bool = False
    newly_quarantined: bool = False


@dataclass(slots=True)
class _Work:
    """An attempt on its way. `sent_before`: an earlier request may have been executed, in this run or another."""

    attempt: Attempt
    is_new: bool
    sent_before: bool
    sends: int = 0
    throttled: int = 0
    order: int = 0
    claimed_at: datetime | None = None


class _Withheld(Exception):
    """The worker did not send: charging had stopped by then, or its claim was too old."""


@dataclass(slots=True)
class _Answered:
    """An answer of the provider's, or what went wrong instead, and when it came."""

    work: _Work
    answer: ProviderPayment | Exception


@dataclass(slots=True)
class _Claimed:
    """What became of a group that was to be locked and claimed. `busy`: not claimed, with the reason."""

    group: list[_Work]
    free: set[uuid.UUID]
    claimed: dict[uuid.UUID, bool]
    busy: dict[uuid.UUID, str]


@dataclass(slots=True)
class _Judged:
    """What an answer means: a success that is to be settled, or the attempt's next state with the report's word.

    `wait_s`: how long to wait before it is sent again; None when it is not.
    """

    work: _Work
    success: ProviderPayment | None = None
    closing: Closing | None = None
    wait_s: float | None = None


@dataclass(slots=True)
class _Batch:
    """Judged answers that are written in one transaction."""

    successes: "dict[str, _Judged]" = field(default_factory=dict)
    closings: list[tuple[_Judged, Closing]] = field(default_factory=list)

    def add(self, judged: _Judged) -> None:
        """Take one in. A second answer with the payment of another one leaves its attempt's outcome unknown."""
        payment = judged.success
        if payment is not None and payment.id not in self.successes:
            self.successes[payment.id] = judged
            return
        closing = judged.closing
        if payment is not None or closing is None:
            told = payment.id if payment is not None else "without an id"
            closing = Closing(judged.work.attempt, State.UNKNOWN, f"payment {told} answered two attempts")
        self.closings.append((judged, closing))

    def __len__(self) -> int:
        return len(self.successes) + len(self.closings)


@dataclass(slots=True)
class _Written:
    """A batch that was written. `unwritten`: attempts whose new state could not be."""

    batch: _Batch
    results: "dict[str, Settled | Failed]"
    unwritten: set[uuid.UUID]


@dataclass(slots=True)
class _Broken:
    """A thread of the database's side has given up."""

    error: BaseException


@dataclass
class Charging:
    """One run of the protocol. Use `run` once.

    `make_stamp` gives job, run id and the present moment; `log` takes progress lines.
    """

    database: BillingDatabase
    provider: ChargesPayments
    limits: ChargingLimits
    make_stamp: Callable[[], Stamp]
    log: Callable[[str], None]
    monotonic: Callable[[], float] = field(init=False)
    stop_reason: str | None = None
    _ready: "deque[_Work]" = field(default_factory=deque)
    _delayed: list[tuple[float, int, _Work]] = field(default_factory=list)
    _events: "Queue[_Answered | _Claimed | _Written | _Broken]" = field(init=False)
    _to_claim: "Queue[tuple[list[_Work], list[uuid.UUID]] | None]" = field(init=False)
    _to_send: "Queue[_Work | None]" = field(init=False)
    _senders: list[Thread] = field(default_factory=list)
    _to_write: "Queue[_Batch | None]" = field(init=False)
    _judged: "deque[_Judged]" = field(default_factory=deque)
    _oldest_judged_at: float = 0.0
    # One charge of a payment method at a time: who has it, and who waits behind for what the card says.
    _method_held_by: dict[str, _Work] = field(default_factory=dict)
    _behind: "dict[str, deque[_Work]]" = field(default_factory=dict)
    _declined: set[str] = field(default_factory=set)
    _done: list[uuid.UUID] = field(default_factory=list)
    _claiming: int = 0
    _writing: int = 0
    _batches: int = 0
    _stopped: Event = field(init=False)
    _order: "itertools.count[int]" = field(default_factory=itertools.count)
    _in_flight: int = 0
    _width: int = 1
    _failures: int = 0
    _results: list[ChargeResult] = field(default_factory=list)
    _outcomes: "Counter[str]" = field(default_factory=Counter)

    def __post_init__(self) -> None:
        make = threads()
        self.monotonic = make.monotonic
        self._events, self._to_claim = make.make_queue(), make.make_queue()
        self._to_send, self._to_write = make.make_queue(), make.make_queue()
        self._stopped = make.make_event()

    def run(self, decisions: Sequence[Charge | Resend]) -> list[ChargeResult]:
        """Charge every decision; one result each.

        What moves: the price of one period, from the saved method, per attempt; at most once per (subscription,
        period), held by a partial unique index and the idempotence key. Raises BillingDatabaseError when the database
        is gone: sends that were under way are waited for, and their attempts stay open for the next run.
        """
        # Attempts of earlier runs first: money may have moved by them already.
        for decision in sorted(decisions, key=lambda decision: isinstance(decision, Charge)):
            is_new = isinstance(decision, Charge)
            sent_before = not is_new and decision.attempt.may_have_been_sent
            self._ready.append(_Work(decision.attempt, is_new, sent_before, order=next(self._order)))
        total = len(self._ready)
        if not total:
            return []
        started = told = self.monotonic()
        try:
            with self._autocommit() as locks:
                with self._database_threads(locks):
                    while True:
                        self._claim_more()
                        self._write_more()
                        if self._in_flight or self._claiming or self._writing:
                            self._take_events()
                        elif not self._judged and not self._wait_for_delayed():
                            break
                        if self.monotonic() - told >= _PROGRESS_EVERY_S:
                            told = self.monotonic()
                            self.log(self._progress(total, told - started))
                self._give_up_the_rest(locks)
        finally:
            # Whatever happens here, nothing new is sent, and what was sent is waited for before the run ends.
            self._stopped.set()
            for _ in self._senders:
                self._to_send.put(None)
            for sender in self._senders:
                sender.join()
        self.log(self._progress(total, self.monotonic() - started))
        return self._results

    @contextmanager
    def _database_threads(self, locks: "sa.Connection") -> Iterator[None]:
        """The threads of steps 1, 2, 4 and 5: a body of work each, until they are told to end."""
        start = threads().start
        started = [
            start(self._guarded, self._keep_claiming, locks, name="claim"),
            *(start(self._guarded, self._keep_writing, name=f"conclude {number}") for number in range(_WRITERS)),
        ]
        try:
            yield
        finally:
            self._to_claim.put(None)
            for _ in range(_WRITERS):
                self._to_write.put(None)
            for thread in started:
                thread.join()

    def _guarded(self, body: Callable[..., None], *given: "sa.Connection") -> None:
        from billing_orchestration.database.engine import translated

        try:
            with translated():
                body(*given)
        except BaseException as error:  # noqa: BLE001 - raised again by the deciding thread
            self._events.put(_Broken(error))

    def _take_events(self) -> None:
        """Wait for the next event, and take all that have come."""
        try:
            event = self._events.get(timeout=self._patience_s())
            while True:
                self._take(event)
                event = self._events.get_nowait()
        except queue.Empty:
            pass

    def _take(self, event: "_Answered | _Claimed | _Written | _Broken") -> None:
        if isinstance(event, _Answered):
            self._in_flight -= 1
            if not self._judged:
                self._oldest_judged_at = self.monotonic()
            self._judged.append(self._judge(event.work, event.answer))
        elif isinstance(event, _Claimed):
            self._claiming = 0
            self._send_claimed(event)
        elif isinstance(event, _Written):
            self._writing -= len(event.batch)
            self._batches -= 1
            self._finish_batch(event)
        else:
            raise event.error

    def _patience_s(self) -> float:
        """How long to wait for an event: until something else is due."""
        waits = [_PROGRESS_EVERY_S]
        if self._judged and self._batches < _WRITERS:
            waits.append(self._oldest_judged_at + _LINGER_S - self.monotonic())
        if self._delayed and not self._claiming and not self._stopped.is_set():
            waits.append(self._delayed[0][0] - self.monotonic())
        return max(0.001, min(waits))

    # --- steps 1 to 3: lock, claim, send

    def _claim_more(self) -> None:
        """Hand the next group to the claiming thread, with the locks to give back."""
        if self._claiming:
            return
        group = self._next_group()
        if group or (self._done and not self._ready):
            self._to_claim.put((group, self._done))
            self._claiming = len(group) or 1
            self._done = []

    def _next_group(self) -> list[_Work]:
        if self._stopped.is_set():
            return []
        # At full width some more are claimed than can be sent, so that no sender waits for the database.
        ahead = max(2, self._width // 2) if self._width == self.limits.max_concurrency > 1 else 0
        room = self._width + ahead - self._in_flight
        if self._in_flight >= self._width and room <= ahead // 2:
            return []  # soon there is room for more, which share a statement
        if self._writing + len(self._judged) >= self._width + ahead:
            return []  # the database is behind: what it has not written yet must not grow without end
        group: list[_Work] = []
        while len(group) < room and self._delayed and self._delayed[0][0] <= self.monotonic():
            group.append(heapq.heappop(self._delayed)[2])
        while len(group) < room and self._ready:
            work = self._ready.popleft()
            method = work.attempt.payment_method_id
            if method in self._declined and not work.sent_before:
                # By one that may have been sent the money may have moved: only that one has to be asked about.
                self._finish(work, "skipped", "this payment method was declined a moment ago, tried on another day")
            elif self._method_held_by.setdefault(method, work) is work:
                group.append(work)
            else:
                self._behind.setdefault(method, deque()).append(work)
        return group

    def _release_method(self, work: _Work, outcome: str) -> None:
        """Let those that wait for the same method have their turn, and remember what the card said."""
        method = work.attempt.payment_method_id
        if self._method_held_by.get(method) is not work:
            return
        del self._method_held_by[method]
        if outcome in ("declined", "stopped"):
            self._declined.add(method)
        self._ready.extend(self._behind.pop(method, ()))

    def _keep_claiming(self, locks: "sa.Connection") -> None:
        """Steps 5 and 1 and 2, in a thread of its own: the only one that uses the connection of the locks."""
        while (order := self._to_claim.get()) is not None:
            group, done = order
            if done:
                unlock(locks, done)
            # What waits for another send has kept its lock.
            new = [work.attempt.id for work in group if not work.sends]
            free = try_lock(locks, new) if new else set()
            free |= {work.attempt.id for work in group if work.sends}
            claimed, busy = self._claim([work for work in group if work.attempt.id in free], locks)
            self._events.put(_Claimed(group, free, claimed, busy))

    def _send_claimed(self, event: _Claimed) -> None:
        for work in event.group:
            attempt_id = work.attempt.id
            if attempt_id not in event.free:
                self._finish(work, "skipped", "another run is charging it at this moment")
            elif attempt_id in event.claimed:
                # What this run itself has sent is known better than by the row: it may be certain that it never left.
                if not work.sends:
                    work.sent_before = event.claimed[attempt_id]
                work.sends += 1
                self._in_flight += 1
                self._to_send.put(work)
                # One for each that may be under way at a time, as they are needed.
                if len(self._senders) < min(self._in_flight, self.limits.max_concurrency):
                    self._senders.append(threads().start(self._keep_sending, name=f"charge {len(self._senders)}"))
            elif attempt_id in event.busy:
                self._done.append(attempt_id)
                outcome = "unknown" if work.sent_before else "never sent"
                self._finish(work, outcome, f"not sent: {event.busy[attempt_id]}", needs_retry=True)
            else:
                self._done.append(attempt_id)
                self._finish(
                    work,
                    "skipped",
                    "looked at again right before sending: renewed, canceled, paused or charged meanwhile"
                    + (", its outcome stays open and is searched after 23 h" if work.sent_before else ", not charged"),
                )

    def _claim(
        self, group: Sequence[_Work], alone: "sa.Connection"
    ) -> tuple[dict[uuid.UUID, bool], dict[uuid.UUID, str]]:
        """Step 2, committed: which of these may be sent now, each with whether it may have been sent before.

        Second: those that the database would not let us look at again (a row that somebody keeps locked), with the
        reason. One such row does not hold up the others of its group.
        """
        claimed: dict[uuid.UUID, bool] = {}
        busy: dict[uuid.UUID, str] = {}
        # Two kinds, two transactions: what the one has committed must not be claimed anew because the other failed.
        for kind in (
            [work for work in group if work.is_new and not work.sends],
            [work for work in group if not work.is_new or work.sends],
        ):
            one, refused = self._claim_kind(kind, alone)
            claimed.update(one)
            busy.update(refused)
        return claimed, busy

    def _claim_kind(
        self, group: Sequence[_Work], alone: "sa.Connection"
    ) -> tuple[dict[uuid.UUID, bool], dict[uuid.UUID, str]]:
        from billing_orchestration.database.errors import BillingDatabaseError, DatabaseUnavailable

        try:
            return self._claim_together(group, alone), {}
        except DatabaseUnavailable:
            raise
        except BillingDatabaseError as error:
            if len(group) == 1:
                return {}, {group[0].attempt.id: str(error)}
        claimed: dict[uuid.UUID, bool] = {}
        busy: dict[uuid.UUID, str] = {}
        for work in group:
            one, refused = self._claim_kind([work], alone)
            claimed.update(one)
            busy.update(refused)
        return claimed, busy

    def _claim_together(self, group: Sequence[_Work], alone: "sa.Connection") -> dict[uuid.UUID, bool]:
        """In one transaction: all of them new, or all sent again.

        `alone`: a connection in autocommit, on which one statement is one committed transaction.
        """
        from billing_orchestration.database.engine import translated

        if not group:
            return {}
        stamp = self.make_stamp()
        for work in group:
            work.claimed_at = stamp.at
        with translated():
            if group[0].is_new and not group[0].sends:
                return dict.fromkeys(open_and_claim(alone, stamp, [work.attempt for work in group]), False)
            with self.database.engine.begin() as connection:
                return claim(connection, stamp, [work.attempt.id for work in group], stamp.at - KEY_LIFETIME)

    def _keep_sending(self) -> None:
        """Step 3, in one of many threads, until it is told to end."""
        while (work := self._to_send.get()) is not None:
            self._send(work)

    def _send(self, work: _Work) -> None:
        """One POST, and its answer into the queue."""
        answer: ProviderPayment | Exception

        def before_send() -> None:
            if self._stopped.is_set():
                raise _Withheld("charging had stopped")
            if work.claimed_at is None or self.make_stamp().at - work.claimed_at > _CLAIM_LIFETIME:
                raise _Withheld("its turn came too long after it was looked at")

        try:
            before_send()
            answer = self.provider.create_payment(work.attempt.body, str(work.attempt.idempotence_key), before_send)
        except Exception as error:  # noqa: BLE001 - judged by the coordinating thread; an unknown one counts as unknown
            if isinstance(error, WrongCredentials):
                # At once: until the coordinating thread hears of it, this one would send the next.
                self._stopped.set()
            answer = error
        self._events.put(_Answered(work, answer))

    # --- step 4 and 5: conclude, unlock

    def _write_more(self) -> None:
        """Hand answers to a writer that is free: enough of them, or those that have waited long enough."""
        while self._judged and self._batches < _WRITERS:
            is_alone = not self._in_flight and not self._claiming
            lingers = self.monotonic() - self._oldest_judged_at < _LINGER_S
            if len(self._judged) < _ENOUGH_RESULTS and lingers and not is_alone:
                return
            batch = _Batch()
            for _ in range(min(len(self._judged), _MOST_RESULTS_AT_ONCE)):
                batch.add(self._judged.popleft())
            self._oldest_judged_at = self.monotonic()
            self._writing += len(batch)
            self._batches += 1
            self._to_write.put(batch)

    def _keep_writing(self) -> None:
        """Step 4, in a thread and on a connection of its own."""
        from billing_orchestration.database.engine import keep_to_indexes

        with self.database.engine.connect() as connection:
            connection.detach()
            keep_to_indexes(connection)
            while (batch := self._to_write.get()) is not None:
                results, unwritten = self._write(
                    connection,
                    [judged.success for judged in batch.successes.values() if judged.success],
                    [closing for _, closing in batch.closings],
                )
                self._events.put(_Written(batch, results, unwritten))

    def _finish_batch(self, event: _Written) -> None:
        for payment_id, judged in event.batch.successes.items():
            self._done.append(judged.work.attempt.id)
            self._finish_success(judged.work, event.results[payment_id])
        for judged, closing in event.batch.closings:
            work = judged.work
            if judged.wait_s is not None:
                heapq.heappush(self._delayed, (self.monotonic() + judged.wait_s, work.order, work))
                continue
            self._done.append(work.attempt.id)
            self._finish(
                work,
                closing.word,
                closing.reason,
                decline_class=closing.decline_class,
                needs_retry=closing.needs_retry or closing.attempt.id in event.unwritten,
            )

    def _judge(self, work: _Work, answer: ProviderPayment | Exception) -> _Judged:
        """What an answer means, as soon as it is there: pace and breaker follow it at once."""
        if isinstance(answer, ProviderPayment) and names_another_attempt(work.attempt, answer):
            answer = OutcomeUnknown(f"the answer speaks of another attempt (payment {answer.id})")
        if isinstance(answer, ProviderPayment):
            answer = as_answer_to(work.attempt, answer)
            self._heard()
            if answer.status == SUCCEEDED:
                return _Judged(work, success=answer)
        closing, wait_s = self._judge_other(work, answer)
        return _Judged(work, None, closing, wait_s)

    def _judge_other(self, work: _Work, answer: ProviderPayment | Exception) -> tuple[Closing, float | None]:
        """What becomes of the attempt, and how long to wait before it is sent again, if so."""
        attempt = work.attempt
        if isinstance(answer, ProviderPayment):
            return judge_payment(attempt, answer), None
        if isinstance(answer, _Withheld):
            # Not a send: after a stop it is left, else it is claimed anew at once.
            work.throttled += 1
            wait_s = self._next_wait(work, None)
            reason = f"{'not sent again' if work.sent_before else 'not sent'}: {answer}"
            return judge_unsent(attempt, reason, sent_before=work.sent_before, is_last=wait_s is None), wait_s
        if isinstance(answer, NeverSent):
            self._failed(1, str(answer))
            wait_s = self._next_wait(work, None)
            return judge_unsent(attempt, str(answer), sent_before=work.sent_before, is_last=wait_s is None), wait_s
        if isinstance(answer, RequestRejected):
            return self._judge_rejection(work, answer), None
        # Anything else may have been executed: unknown, never failed.
        work.sent_before = True
        if isinstance(answer, RateLimited):
            self._width = max(1, self._width // 2)
            work.throttled += 1
            wait_s = self._next_wait(work, answer.retry_after_s)
        elif isinstance(answer, OutcomeUnknown):
            self._failed(_WEIGHT_OF_SILENCE if answer.timed_out else 1, str(answer))
            wait_s = self._next_wait(work, answer.retry_after_s)
        else:
            self._failed(1, repr(answer))
            wait_s = None
        return judge_silence(attempt, str(answer) or repr(answer)), wait_s

    def _judge_rejection(self, work: _Work, answer: RequestRejected) -> Closing:
        if isinstance(answer, WrongCredentials):
            self._stop(str(answer))
        elif isinstance(answer, Forbidden):
            self._failed(1, str(answer))
        else:
            self._heard()
        return judge_refusal(
            work.attempt,
            str(answer),
            status_code=answer.status_code,
            code=answer.code,
            sent_before=work.sent_before,
        )

    def _write(
        self, connection: "sa.Connection", payments: Sequence[ProviderPayment], closings: Sequence[Closing]
    ) -> "tuple[dict[str, Settled | Failed], set[uuid.UUID]]":
        """Step 4: everything of these answers in one transaction; if that will not go, each on its own.

        Second: attempts whose new state could not be written. They stay as they were claimed, "may have been sent":
        the next run sends the same key and hears the same.
        """
        from billing_orchestration.database.engine import translated
        from billing_orchestration.database.errors import BillingDatabaseError, DatabaseUnavailable
        from billing_orchestration.database.settling import settle_batch

        try:
            with translated(), connection.begin():
                stamp = self.make_stamp()
                settled = settle_batch(
                    connection, payments, stamp=stamp, calendar=self.database.calendar, is_live=self.provider.is_live
                )
                close(connection, stamp, closings)
            return {result.payment.id: result for result in settled}, set()
        except DatabaseUnavailable:
            raise
        except Exception as error:  # noqa: BLE001 - each gets its own try and its own words below
            self.log(f"a batch of {len(payments) + len(closings)} answers is written one by one: {error}")
        settled_alone = {
            result.payment.id: result
            for result in settle_all(
                self.database, payments, make_stamp=self.make_stamp, is_live=self.provider.is_live, dry_run=False
            )
        }
        unwritten: set[uuid.UUID] = set()
        for closing in closings:
            try:
                with translated(), connection.begin():
                    close(connection, self.make_stamp(), [closing])
            except DatabaseUnavailable:
                raise
            except BillingDatabaseError as error:
                unwritten.add(closing.attempt.id)
                self.log(f"{closing.attempt.subject} ({closing.state}: {closing.reason}) could not be written: {error}")
        return settled_alone, unwritten

    def _finish_success(self, work: _Work, result: "Settled | Failed") -> None:
        if isinstance(result, Failed):
            self._finish(
                work,
                "unknown",
                f"paid at the provider ({result.payment.id}), not granted yet: {result.reason}; the matching jobs or"
                " the next run settle it",
                needs_retry=True,
            )
            return
        decision = result.decision
        if isinstance(decision, Quarantine):
            self._finish(work, "review", decision.reason, newly_quarantined=result.newly_opened)
        elif isinstance(decision, RecordRefund):
            self._finish(work, "refunded", decision.reason)
        elif isinstance(decision, Leave):
            self._finish(work, "charged", f"{decision.reason}, by another run")
        elif isinstance(decision, (Settle, CloseAsGranted)):
            until = f", paid until {decision.period_end:%Y-%m-%d}" if isinstance(decision, Settle) else ""
            self._finish(work, "charged", f"payment {result.payment.id}{until}")

    # --- pace and breaker; the end of a run

    def _next_wait(self, work: _Work, retry_after_s: float | None) -> float | None:
        """How long an attempt waits before it is sent again; None when it had its tries."""
        if self._stopped.is_set():
            return None
        allowed = max(self.limits.max_sends, _MOST_THROTTLED_SENDS if work.throttled else 0)
        if work.sends - work.throttled >= self.limits.max_sends or work.sends >= allowed:
            return None
        wait_s = self.limits.resend_wait_s * _WAIT_GROWTH ** (work.sends - 1)
        return min(max(wait_s, retry_after_s or 0.0), _LONGEST_WAIT_S)

    def _heard(self) -> None:
        self._failures = 0
        self._width = min(self.limits.max_concurrency, self._width * 2)

    def _failed(self, weight: int, reason: str) -> None:
        self._failures += weight
        self._width = max(1, self._width // 2)
        if self._failures >= BREAKER_LIMIT:
            self._stop(f"the provider fails for everyone ({self._failures} times in a row), last: {reason}")

    def _stop(self, reason: str) -> None:
        if self.stop_reason is None:
            self.stop_reason = reason
        self._stopped.set()

    def _wait_for_delayed(self) -> bool:
        """With nothing in flight: wait for the next resend. False when there is nothing to wait for."""
        if self._stopped.is_set():
            return False
        if self._delayed and not self._ready:
            # The event is set by a stop, so a wait ends early then.
            self._stopped.wait(max(0.0, self._delayed[0][0] - self.monotonic()))
        return bool(self._delayed or self._ready)

    def _give_up_the_rest(self, locks: "sa.Connection") -> None:
        """After a stop: attempts that wait for another send keep their state, charges that were not begun stay so."""
        from billing_orchestration.database.engine import translated

        left = [work for _, _, work in self._delayed]
        not_begun = [*self._ready, *(work for waiting in self._behind.values() for work in waiting)]
        self._behind.clear()
        withdrawn = [
            Closing(work.attempt, State.PLANNED, "not sent: charging had stopped", never_sent=True)
            for work in left
            if not work.sent_before
        ]
        if withdrawn:
            with translated(), self.database.engine.begin() as connection:
                close(connection, self.make_stamp(), withdrawn)
        for work in left:
            outcome = "unknown" if work.sent_before else "never sent"
            self._finish(work, outcome, f"charging stopped: {self.stop_reason}", needs_retry=True)
        done = [*self._done, *(work.attempt.id for work in left)]
        if done:
            unlock(locks, done)
        for work in not_begun:
            self._finish(work, "never sent", f"not begun, charging stopped: {self.stop_reason}", needs_retry=True)
        self._delayed.clear()
        self._ready.clear()

    def _finish(
        self,
        work: _Work,
        outcome: str,
        reason: str,
        *,
        decline_class: str | None = None,
        needs_retry: bool = False,
        newly_quarantined: bool = False,
    ) -> None:
        self._outcomes[outcome] += 1
        self._results.append(ChargeResult(work.attempt, outcome, reason, decline_class, needs_retry, newly_quarantined))
        self._release_method(work, outcome)

    def _progress(self, total: int, elapsed_s: float) -> str:
        done = len(self._results)
        rate = done / elapsed_s if elapsed_s > 0 else 0.0
        remaining = f", about {(total - done) / rate:.0f} s to go" if rate and done < total else ""
        told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self._outcomes.items()))
        return f"{done} of {total} done ({told or 'no answer yet'}), {rate:.1f} a second{remaining}"

    def _autocommit(self) -> "sa.Connection":
        from billing_orchestration.database.engine import keep_to_indexes

        connection = self.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        # Not the pool's any more: closing it ends the session, and with it every lock, whatever went wrong.
        connection.detach()
        keep_to_indexes(connection)
        return connection
