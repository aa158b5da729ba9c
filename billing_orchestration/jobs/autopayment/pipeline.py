"""Many charges at once: the threads and queues between the five steps of `charging`.

One thread decides (`Pipeline.run`), one locks, claims and unlocks, two conclude, up to `max_concurrency` send. While a
batch of answers is written, the next attempts are claimed and sent; only the attempt that is being written waits for
the database. No more answers wait to be written than charges may be under way.
"""

import queue
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from billing_orchestration.database.engine import translated
from billing_orchestration.database.one_by_one import NotWritten
from billing_orchestration.database.settling import Settled
from billing_orchestration.domain.answers import Closing, judge_silence
from billing_orchestration.domain.decisions import Code
from billing_orchestration.domain.provider_payment import SUCCEEDED, ProviderPayment
from billing_orchestration.domain.renewals import Charge, Resend
from billing_orchestration.jobs.autopayment.charging import Charging, Claims, Work, judge, works_of
from billing_orchestration.jobs.autopayment.pace import ChargingLimits, Pace
from billing_orchestration.jobs.autopayment.results import ChargeResult, Results, not_sent_after_all, result_of
from billing_orchestration.jobs.autopayment.waiting import Waiting
from billing_orchestration.jobs.run_failures import FailureCode
from billing_orchestration.threads import Queue, Thread, Threads

if TYPE_CHECKING:
    import sqlalchemy as sa

# Results of one transaction: enough to share its statements, few enough that the first of them does not wait.
_MOST_RESULTS_AT_ONCE = 64
# An answer waits this long for others to share a transaction with, while there are others under way.
_LINGER_S = 0.008
_ENOUGH_RESULTS = 24
# Two, so that one batch is decided while the other waits for its commit. More would only make smaller batches.
_WRITERS = 2
_PROGRESS_EVERY_S = 10.0
# How often an attempt is put off that the provider may still be at work on. Once is enough where all clocks agree.
_MOST_TIMES_PUT_OFF = 2


@dataclass(slots=True)
class _Answered:
    """A send is over."""

    work: Work
    answer: ProviderPayment | Exception


@dataclass(slots=True)
class _Claimed:
    """A group was locked and claimed. `free`: those whose lock we have."""

    group: list[Work]
    free: set[uuid.UUID]
    claims: Claims


@dataclass(slots=True)
class _Judged:
    """An answer that is to be written: a success, or the attempt's next state and when it is sent again, if it is."""

    work: Work
    answer: ProviderPayment | Closing
    wait_s: float | None = None


@dataclass(slots=True)
class _Written:
    """A batch was written, each answer with what came of it."""

    results: list[tuple[_Judged, Settled | NotWritten | None]]


@dataclass(slots=True)
class _Broken:
    """A thread has given up."""

    error: BaseException


@dataclass(slots=True)
class _Terminated:
    """Somebody wants the run to end."""


class Pipeline:
    """One run of the protocol over many attempts. Use `run` once."""

    def __init__(self, charging: Charging, limits: ChargingLimits, threads: Threads) -> None:
        self._charging = charging
        self._limits = limits
        self._threads = threads
        self._now_s = threads.monotonic
        self.pace = Pace(limits, threads.make_event())
        self._waiting = Waiting(())
        self._events: Queue[_Answered | _Claimed | _Written | _Broken | _Terminated] = threads.make_queue()
        self._to_claim: Queue[tuple[list[Work], list[uuid.UUID]] | None] = threads.make_queue()
        self._to_send: Queue[Work | None] = threads.make_queue()
        self._to_write: Queue[list[_Judged] | None] = threads.make_queue()
        self._senders: list[Thread] = []
        self._judged: deque[_Judged] = deque()
        self._oldest_judged_at = 0.0
        self._to_unlock: list[uuid.UUID] = []
        self._waits_for_turn = False
        # How many are where: with the claiming thread, under way, with a writer; and how many writers are busy.
        self._claiming = self._in_flight = self._writing = self._batches = 0
        self._results = Results()

    def run(self, decisions: Sequence[Charge | Resend]) -> list[ChargeResult]:
        """Charge every decision; one result each.

        Raises BillingDatabaseError when the database is gone: sends that are under way are waited for, and their
        attempts stay open for the next run.
        """
        if not decisions:
            return []
        works = works_of(decisions)
        self._waiting = Waiting(works)
        started = told = self._now_s()
        try:
            with self._charging.lock_session() as locks:
                with self._database_threads(locks):
                    while self._go_on():
                        if self._now_s() - told >= _PROGRESS_EVERY_S:
                            told = self._now_s()
                            self._charging.log(self._results.progress(len(works), told - started))
                self._give_up_the_rest(locks)
        finally:
            # Whatever happens here, nothing new is sent, and what was sent is waited for before the run ends.
            self.pace.stop()
            for _ in self._senders:
                self._to_send.put(None)
            for sender in self._senders:
                sender.join()
        self._charging.log(self._results.progress(len(works), self._now_s() - started))
        return self._results.all

    def terminate(self) -> None:
        """Send nothing more; conclude what is under way. May be called by a signal's handler, at any moment."""
        self._events.put(_Terminated())

    def _go_on(self) -> bool:
        """Hand out what can be handed out and take what comes; False when nothing is left to do."""
        self._claim_more()
        self._write_more()
        under_way = self._in_flight or self._claiming or self._writing or self._judged
        if not under_way and (self.pace.is_stopped or not self._waiting):
            return False
        self._take_events()
        return True

    # --- the threads

    @contextmanager
    def _database_threads(self, locks: "sa.Connection") -> Iterator[None]:
        """The threads of all steps but the sends, until they are asked to end."""
        start = self._threads.start
        started = [
            start(self._guarded, self._keep_claiming, locks, name="claim"),
            *(start(self._guarded, self._keep_concluding, name=f"conclude {number}") for number in range(_WRITERS)),
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
        try:
            with translated():
                body(*given)
        except BaseException as error:  # noqa: BLE001 - raised again by the deciding thread
            self._events.put(_Broken(error))

    def _keep_claiming(self, locks: "sa.Connection") -> None:
        """Steps 5, 1 and 2: the only thread that uses the connection of the locks. Claims have one of their own."""
        with self._charging.own_connection() as connection:
            while (order := self._to_claim.get()) is not None:
                group, done = order
                self._charging.unlock(locks, done)
                free = self._charging.lock(locks, group)
                claims = self._charging.claim(connection, [work for work in group if work.attempt.id in free])
                if claims.wrong_clock is not None:
                    self.pace.stop(f"{claims.wrong_clock}. Nothing more was charged", FailureCode.CLOCKS_APART)
                self._events.put(_Claimed(group, free, claims))

    def _keep_sending(self) -> None:
        """Step 3."""
        while (work := self._to_send.get()) is not None:
            answer = self._charging.send(work, lambda: self.pace.is_stopped)
            if (why := self._charging.why_stop(answer)) is not None:
                # At once: until the deciding thread hears of it, this one would send the next.
                self.pace.stop(*why)
            self._events.put(_Answered(work, answer))

    def _keep_concluding(self) -> None:
        """Step 4, on a connection of its own."""
        with self._charging.own_connection() as connection:
            while (batch := self._to_write.get()) is not None:
                by_answer = {id(judged.answer): judged for judged in batch}
                written = self._charging.conclude(connection, [judged.answer for judged in batch])
                self._events.put(_Written([(by_answer[id(answer)], result) for answer, result in written]))

    # --- what the deciding thread waits for

    def _take_events(self) -> None:
        """Wait for the next event, and take all that have come."""
        try:
            event = self._events.get(timeout=self._patience_s())
            while True:
                self._take(event)
                event = self._events.get_nowait()
        except queue.Empty:
            pass

    def _take(self, event: "_Answered | _Claimed | _Written | _Broken | _Terminated") -> None:
        if isinstance(event, _Answered):
            self._in_flight -= 1
            if not self._judged:
                self._oldest_judged_at = self._now_s()
            self._judged.append(self._judge(event.work, event.answer))
        elif isinstance(event, _Claimed):
            self._claiming = 0
            self._send_claimed(event)
        elif isinstance(event, _Written):
            self._writing -= len(event.results)
            self._batches -= 1
            for judged, result in event.results:
                self._finish_written(judged, result)
        elif isinstance(event, _Terminated):
            self.pace.stop("the run was terminated", FailureCode.TERMINATED)
        else:
            raise event.error

    def _patience_s(self) -> float:
        """How long to wait for an event: until something else is due."""
        waits = [_PROGRESS_EVERY_S]
        if self._judged and self._batches < _WRITERS:
            waits.append(self._oldest_judged_at + _LINGER_S - self._now_s())
        if self._waiting.next_at is not None and not self._claiming and not self.pace.is_stopped:
            waits.append(self._waiting.next_at - self._now_s())
        if self._waits_for_turn:
            waits.append(self._charging.provider.rate.next_turn_s())
        return max(0.001, min(waits))

    # --- between the steps

    def _claim_more(self) -> None:
        """Hand the next group to the claiming thread, with the locks to release.

        Its turn at the provider comes first: between the claim, which looks at the customer again, and the send there
        is nothing to wait for.
        """
        self._waits_for_turn = False
        if self._claiming:
            return
        rate = self._charging.provider.rate
        room = self.pace.room(self._in_flight, self._writing + len(self._judged))
        turns = rate.turns(room) if room else 0
        group, skipped = self._waiting.take(turns, self._now_s(), in_doubt=self.pace.in_doubt)
        rate.take(len(group))
        self._waits_for_turn = room > turns and self._waiting.has_some(self._now_s())
        for work in skipped:
            reason = "this payment method was declined a moment ago; tried again on another day"
            self._finish(work, ChargeResult(work.attempt, "skipped", reason, code=Code.METHOD_DECLINED_TODAY))
        if group or (self._to_unlock and not self._waiting.ready):
            self._to_claim.put((group, self._to_unlock))
            self._claiming = len(group) or 1
            self._to_unlock = []

    def _send_claimed(self, event: _Claimed) -> None:
        claims = event.claims
        for work in event.group:
            attempt_id = work.attempt.id
            if attempt_id in claims.claimed:
                # What this run has sent itself it knows better than the row: it may be certain that it never left.
                if not work.sends:
                    work.sent_before = claims.claimed[attempt_id]
                self._hand_to_sender(work)
                continue
            if attempt_id in claims.wait_s and work.put_off < _MOST_TIMES_PUT_OFF:
                self._put_off(work, claims.wait_s[attempt_id])
                continue
            if attempt_id not in event.free:
                reason = "another run is charging it at this moment"
                self._finish(work, ChargeResult(work.attempt, "skipped", reason, code=Code.CHARGED_ELSEWHERE))
                continue
            self._to_unlock.append(attempt_id)
            if attempt_id in claims.wait_s:
                self._leave(work, "not sent again: the provider may still be at work on its last send")
            elif (refused := claims.why_refused(attempt_id)) is not None:
                self._leave(work, f"not sent: {refused}")
            else:
                why = claims.held.get(attempt_id, "its attempt is closed, or its key too old")
                self._finish(work, not_sent_after_all(work.attempt, why, sent_before=work.sent_before))

    def _put_off(self, work: Work, seconds: float) -> None:
        """Keep it until the provider has certainly finished with its last send, which nobody has an answer to."""
        work.put_off += 1
        work.sent_before = True
        if not work.sends:  # else its lock is kept, as always between two sends
            self._to_unlock.append(work.attempt.id)
        self._waiting.send_again(work, self._now_s() + seconds)

    def _hand_to_sender(self, work: Work) -> None:
        work.sends += 1
        work.sent = self.pace.begin(work.attempt)
        self._in_flight += 1
        self._to_send.put(work)
        # One for each that may be under way at once, as needed.
        if len(self._senders) < min(self._in_flight, self._limits.max_concurrency):
            self._senders.append(self._threads.start(self._keep_sending, name=f"charge {len(self._senders)}"))

    def _judge(self, work: Work, answer: ProviderPayment | Exception) -> _Judged:
        """What an answer means, judged on arrival: pace and breaker follow it at once."""
        if work.sent is not None:
            self.pace.note(work.sent, answer)
        if isinstance(answer, ProviderPayment) and answer.status == SUCCEEDED:
            return _Judged(work, answer)
        closing = judge(work, answer)
        wait_s = None
        if closing.resend:
            least_s = getattr(answer, "retry_after_s", None) or 0.0
            if closing.unanswered and work.claimed_at is not None:
                least_s = self._charging.at_work_s(work.claimed_at)
            wait_s = self.pace.wait_before_resend(work.sends, work.uncounted, least_s)
        return _Judged(work, closing if wait_s is not None else closing.given_up(), wait_s)

    def _write_more(self) -> None:
        """Hand answers to a writer that is free: enough of them, or those that have waited long enough."""
        while self._judged and self._batches < _WRITERS:
            is_alone = not self._in_flight and not self._claiming
            lingers = self._now_s() - self._oldest_judged_at < _LINGER_S
            if len(self._judged) < _ENOUGH_RESULTS and lingers and not is_alone:
                return
            batch = _batch_of([self._judged.popleft() for _ in range(min(len(self._judged), _MOST_RESULTS_AT_ONCE))])
            self._oldest_judged_at = self._now_s()
            self._writing += len(batch)
            self._batches += 1
            self._to_write.put(batch)

    # --- the end of an attempt, and of the run

    def _finish_written(self, judged: _Judged, result: Settled | NotWritten | None) -> None:
        work, answer = judged.work, judged.answer
        if isinstance(answer, Closing):
            if isinstance(result, NotWritten):
                state, why = f"{answer.state}: {answer.reason}", work.attempt.unnamed(result.reason)
                self._charging.log(f"{work.attempt.subject} ({state}) could not be written: {why}")
            if judged.wait_s is not None:
                self._waiting.send_again(work, self._now_s() + judged.wait_s)
                return
        self._to_unlock.append(work.attempt.id)
        told = result_of(work.attempt, answer, result)
        if isinstance(answer, ProviderPayment):
            if told.outcome == "charged":
                self.pace.granted()
            elif told.outcome != "refunded":
                self.pace.not_granted(told.reason)
        self._finish(work, told)

    def _leave(self, work: Work, reason: str) -> None:
        """Not sent, or not again, in this run."""
        outcome = "unknown" if work.sent_before else "never sent"
        self._finish(work, ChargeResult(work.attempt, outcome, reason, needs_retry=True))

    def _finish(self, work: Work, result: ChargeResult) -> None:
        self._results.add(result)
        self._waiting.release(work, declined=result.outcome in ("declined", "stopped"))

    def _give_up_the_rest(self, locks: "sa.Connection") -> None:
        """After a stop: attempts that wait for another send keep their state, charges that were not begun stay so."""
        again, not_begun = self._waiting.give_up()
        self._charging.withdraw(again)
        if self.pace.refuses_the_shop:
            self._charging.excuse(self._results.excuse(self.pace.refused_alike), str(self.pace.stop_reason))
        self._charging.unlock(locks, [*self._to_unlock, *(work.attempt.id for work in again)])
        for work in again:
            self._leave(work, f"charging stopped: {self.pace.stop_reason}")
        for work in not_begun:
            reason = f"not begun, charging stopped: {self.pace.stop_reason}"
            self._finish(work, ChargeResult(work.attempt, "never sent", reason, needs_retry=True))


def _batch_of(judged: Sequence[_Judged]) -> list[_Judged]:
    """What one transaction writes. A payment that answered another attempt too leaves this one's outcome unknown."""
    seen: set[str] = set()
    batch = []
    for one in judged:
        payment = one.answer
        if isinstance(payment, ProviderPayment) and payment.id in seen:
            reason = f"payment {payment.id} answered two attempts"
            batch.append(_Judged(one.work, judge_silence(one.work.attempt, reason, is_recognised=False)))
            continue
        if isinstance(payment, ProviderPayment):
            seen.add(payment.id)
        batch.append(one)
    return batch
