"""The charging protocol: how a renewal moves money, and how it survives being killed anywhere.

What moves: the price of one period, from the saved method, at most once per (subscription, period). A partial unique
index and the idempotence key hold that. Each attempt goes through five steps, in this order and never side by side:

1. lock      a session lock on the attempt, so that no two processes send one key at the same time
2. claim     one transaction, committed: the subscription is checked again under lock; a new attempt is written PLANNED
             with its exact body, its key and `first_sent_at`; one that is sent again gets a new `last_sent_at`. Both by
             PostgreSQL's clock, which is the same for all: they tell how old the key is, and who may still be at work
3. send      the POST, with no transaction open
4. conclude  one transaction, committed: on success the payment row, the extension, the settlement and the attempt
             SUCCEEDED, together; otherwise the attempt's new state
5. unlock

Killed between 1 and 2: nothing has happened. Between 2 and 4: the attempt is PLANNED or UNKNOWN with a `first_sent_at`.
The next run sends the same key and body, and the provider answers with the same payment; once the key is too old, the
run searches the provider's list instead. The matching jobs also find a success within minutes, by the attempt's id in
its metadata. Killed between 4 and 5: the lock ends with the session.

`pipeline` runs the steps for many attempts at once.
"""

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Protocol

from billing_orchestration.database.attempts import Claimed, claim, close, excuse, open_and_claim, try_lock, unlock
from billing_orchestration.database.audit import Stamp
from billing_orchestration.database.engine import keep_to_indexes, translated
from billing_orchestration.database.health import server_clock
from billing_orchestration.database.one_by_one import NotWritten, Witnesses, one_by_one
from billing_orchestration.database.settling import Settled, settle_batch
from billing_orchestration.domain.answers import (
    Closing,
    as_answer_to,
    judge_payment,
    judge_refusal,
    judge_silence,
    judge_unsent,
    names_another_attempt,
)
from billing_orchestration.domain.attempts import KEY_LIFETIME, Attempt
from billing_orchestration.domain.clocks import Clocks
from billing_orchestration.domain.provider_payment import ProviderPayment
from billing_orchestration.domain.renewals import Charge, Resend
from billing_orchestration.jobs.run_failures import FailureCode
from billing_orchestration.provider.errors import (
    NeverSent,
    OutcomeUnknown,
    RateLimited,
    RequestRejected,
    WrongCredentials,
)
from billing_orchestration.provider.pacing import RateLimit
from billing_orchestration.resources import BillingDatabase

if TYPE_CHECKING:
    import sqlalchemy as sa

    from billing_orchestration.jobs.autopayment.pace import Sent

# A claim that was committed longer ago than this is made again before the send: the process may have been suspended, or
# its sender was busy. Whether the provider has finished with a send is counted from its claim: 5 s until it is sent,
# 5 s to connect and the provider's own 30 s are less than its 45 s.
_CLAIM_LIFETIME = timedelta(seconds=5)


class ChargesPayments(Protocol):
    """The part of the provider's client that charging needs."""

    is_live: bool
    charge_done_s: float
    rate: RateLimit

    def create_payment(
        self, body: str, idempotence_key: str, before_send: Callable[[], None] | None = None
    ) -> ProviderPayment:
        """One POST of exactly these bytes, right after `before_send`; what that raises goes through, nothing sent."""
        ...


class ClockWasSet(Exception):
    """A clock that may not be trusted: nothing was claimed, nothing was sent."""


class Withheld(Exception):
    """A claimed charge was not sent: charging had stopped, or the claim was too old."""


@dataclass(slots=True)
class Work:
    """An attempt on its way through the steps.

    `sent_before`: an earlier request may have been executed, of this run or another. `uncounted`: how many of `sends`
    were withheld or answered by 429, and so do not count against `max_sends`. `put_off`: how often it could not be
    claimed because the provider may still have been at work on an earlier send.
    """

    attempt: Attempt
    is_new: bool
    sent_before: bool
    order: int = 0
    sends: int = 0
    uncounted: int = 0
    put_off: int = 0
    claimed_at: datetime | None = None
    sent: "Sent | None" = None

    @property
    def is_to_be_opened(self) -> bool:
        """Whether the attempt is not in the database yet."""
        return self.is_new and not self.sends


def works_of(decisions: Sequence[Charge | Resend]) -> list[Work]:
    """The decisions in the order of their sends: attempts of earlier runs first, for they may have moved money."""
    works: list[Work] = []
    for decision in sorted(decisions, key=lambda decision: isinstance(decision, Charge)):
        is_new = isinstance(decision, Charge)
        sent_before = not is_new and decision.attempt.may_have_been_sent
        works.append(Work(decision.attempt, is_new, sent_before, order=len(works)))
    return works


@dataclass(slots=True)
class Claims:
    """What may be sent, each with whether it may have been sent before; what the second look forbids, and what the
    database refused to look at, each with why.

    `wait_s`: what the provider may still be at work on, each with the seconds until it has certainly finished.
    `wrong_clock`: why nothing else of the group was claimed, if no clock may be trusted.
    """

    claimed: dict[uuid.UUID, bool] = field(default_factory=dict)
    held: dict[uuid.UUID, str] = field(default_factory=dict)
    refused: dict[uuid.UUID, str] = field(default_factory=dict)
    wait_s: dict[uuid.UUID, float] = field(default_factory=dict)
    wrong_clock: str | None = None

    def why_refused(self, attempt_id: uuid.UUID) -> str | None:
        """Why nobody knows whether an attempt may be sent; None where that is known."""
        if attempt_id in self.refused or attempt_id in self.claimed or attempt_id in self.held:
            return self.refused.get(attempt_id)
        return None if self.wrong_clock is None else "a clock may not be trusted"


@dataclass(frozen=True, slots=True)
class Charging:
    """The five steps. Each takes as many attempts as can share its statements.

    `locks` is a connection in autocommit whose session holds the locks. `make_stamp` gives job, run id and the present
    moment; `clocks_apart` says after an answer whether the provider's clock was set in mid-run, `database_now` what
    time it is by PostgreSQL's. Every step raises DatabaseUnavailable when the database is gone.
    """

    database: BillingDatabase
    provider: ChargesPayments
    make_stamp: Callable[[], Stamp]
    log: Callable[[str], None]
    # What the claims of the run say about a doubtful refusal, and what its conclusions say.
    claim_witnesses: Witnesses = field(default_factory=Witnesses)
    conclude_witnesses: Witnesses = field(default_factory=Witnesses)
    clocks_apart: Callable[[], Clocks | None] = lambda: None
    database_now: Callable[["sa.Connection"], datetime] = server_clock

    def lock_session(self) -> "sa.Connection":
        """A session that holds locks. It is not the pool's: closing it ends every lock, whatever went wrong."""
        connection = self.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        connection.detach()
        keep_to_indexes(connection)
        return connection

    @contextmanager
    def own_connection(self) -> "Iterator[sa.Connection]":
        """A thread's own connection, which does not return to the pool."""
        with self.database.engine.connect() as connection:
            connection.detach()
            keep_to_indexes(connection)
            yield connection

    def lock(self, locks: "sa.Connection", group: Sequence[Work]) -> set[uuid.UUID]:
        """Step 1: which of these are ours. An attempt that waited for another send has kept its lock."""
        new = [work.attempt.id for work in group if not work.sends]
        held = {work.attempt.id for work in group if work.sends}
        return held | (try_lock(locks, new) if new else set())

    def claim(self, connection: "sa.Connection", group: Sequence[Work]) -> Claims:
        """Step 2, committed: which of these may be sent now. A row that somebody keeps locked holds up no other."""
        claims = Claims()
        # Two transactions: what the one has committed must not be claimed again because the other failed.
        for part in (
            [work for work in group if work.is_to_be_opened],
            [work for work in group if not work.is_to_be_opened],
        ):
            try:
                self._claim_part(connection, part, claims)
            except ClockWasSet as wrong:
                claims.wrong_clock = str(wrong)
        return claims

    def _claim_part(self, connection: "sa.Connection", part: Sequence[Work], claims: Claims) -> None:
        # No second try of a row that is busy: the others of the group wait for their send.
        for works, result in one_by_one(
            part, lambda works: self._claim_together(connection, works), tries=1, witnesses=self.claim_witnesses
        ):
            if isinstance(result, NotWritten):
                claims.refused[works[0].attempt.id] = works[0].attempt.unnamed(result.reason)
            else:
                claims.claimed.update(result.sent_before)
                claims.held.update(result.held)
                claims.wait_s.update(result.at_work_s)

    def _claim_together(self, connection: "sa.Connection", group: Sequence[Work]) -> Claimed:
        """One transaction; all of them new, or all sent again."""
        with translated(), connection.begin():
            stamp = self._stamp_of_claim(connection)
            for work in group:
                work.claimed_at = self.make_stamp().at
            settings = self.database.settings
            view = settings.billing_renewal_view
            if group[0].is_to_be_opened:
                return open_and_claim(connection, stamp, [work.attempt for work in group], view)
            return claim(
                connection,
                stamp,
                [work.attempt.id for work in group],
                stamp.at - KEY_LIFETIME,
                stamp.at - timedelta(seconds=self.provider.charge_done_s),
                settings.yookassa_shop_id,
                view,
            )

    def _stamp_of_claim(self, connection: "sa.Connection") -> Stamp:
        """The moment of a claim, by PostgreSQL's clock. Raises ClockWasSet where that is too far from the run's own."""
        stamp = self.make_stamp()
        told = self.database_now(connection)
        clocks = Clocks(database=told - stamp.at)
        if not clocks.may_be_trusted:
            raise ClockWasSet(str(clocks))
        return replace(stamp, at=told)

    def at_work_s(self, claimed_at: datetime) -> float:
        """For how many more seconds the provider may be at work on a send that was claimed then and got no answer."""
        done_s = self.provider.charge_done_s
        return min(max(0.0, done_s - (self.make_stamp().at - claimed_at).total_seconds()), done_s)

    def send(self, work: Work, is_stopped: Callable[[], bool]) -> ProviderPayment | Exception:
        """Step 3: one POST, no transaction open. Returns the answer, or what went wrong instead. Never raises."""

        def before_send() -> None:
            not_sent = "not sent again" if work.sent_before else "not sent"
            if is_stopped():
                raise Withheld(f"{not_sent}: charging had stopped")
            if self.provider.rate.is_paused:
                raise Withheld(f"{not_sent}: the provider has asked everybody to wait")
            if work.claimed_at is None or abs(self.make_stamp().at - work.claimed_at) > _CLAIM_LIFETIME:
                raise Withheld(f"{not_sent}: its turn came too long after it was looked at")

        attempt = work.attempt
        try:
            before_send()
            answer = self.provider.create_payment(attempt.body, str(attempt.idempotence_key), before_send)
        except Exception as error:  # noqa: BLE001 - judged below; one that nobody knows leaves the outcome unknown
            return error
        if names_another_attempt(attempt, answer):
            return OutcomeUnknown(f"the answer names another attempt (payment {answer.id})", answered=True)
        return as_answer_to(attempt, answer)

    def why_stop(self, answer: ProviderPayment | Exception) -> tuple[str, str] | None:
        """Why nothing more may be sent after this answer, with the code: a wrong shop key, or a wrong clock.

        What is sent by a wrong clock and lost would be searched for at the wrong time.
        """
        if isinstance(answer, WrongCredentials):
            return str(answer), type(answer).__name__
        clocks = self.clocks_apart()
        return None if clocks is None else (f"{clocks}. Nothing more was charged", FailureCode.CLOCKS_APART)

    def conclude(
        self, connection: "sa.Connection", answers: Sequence[ProviderPayment | Closing]
    ) -> Iterator[tuple[ProviderPayment | Closing, Settled | NotWritten | None]]:
        """Step 4: settle the successes and close the others, in one transaction; if that fails, each in its own.

        An answer that cannot be written leaves its attempt as it was claimed, "may have been sent". The next run sends
        the same key and hears the same.
        """

        def write(part: Sequence[ProviderPayment | Closing]) -> Mapping[str, Settled]:
            payments = [answer for answer in part if isinstance(answer, ProviderPayment)]
            with translated(), connection.begin():
                stamp = self.make_stamp()
                settled = settle_batch(
                    connection, payments, stamp=stamp, calendar=self.database.calendar, is_live=self.provider.is_live
                )
                close(connection, stamp, [answer for answer in part if isinstance(answer, Closing)])
            return {result.payment.id: result for result in settled}

        for part, result in one_by_one(answers, write, witnesses=self.conclude_witnesses):
            for answer in part:
                if isinstance(result, NotWritten):
                    yield answer, result
                else:
                    yield answer, result[answer.id] if isinstance(answer, ProviderPayment) else None

    def withdraw(self, works: Sequence[Work]) -> None:
        """Take back the claims of what certainly never left; what may have left stays as it is."""
        stopped = "not sent: charging had stopped"
        closings = [judge_unsent(work.attempt, stopped, sent_before=work.sent_before).given_up() for work in works]
        withdrawn = [closing for closing in closings if closing.never_sent]
        if withdrawn:
            with self.database.begin() as connection:
                close(connection, self.make_stamp(), withdrawn)

    def excuse(self, attempt_ids: Sequence[uuid.UUID], reason: str) -> None:
        """Note of refused attempts that the shop was refused: they are no try of the day."""
        with self.database.begin() as connection:
            excuse(connection, self.make_stamp(), attempt_ids, reason)

    def unlock(self, locks: "sa.Connection", attempt_ids: Sequence[uuid.UUID]) -> None:
        """Step 5."""
        if attempt_ids:
            unlock(locks, attempt_ids)


def judge(work: Work, answer: ProviderPayment | Exception) -> Closing:
    """What the answer to a send makes of its attempt; `work` remembers it for the next send."""
    attempt = work.attempt
    if isinstance(answer, ProviderPayment):
        return judge_payment(attempt, answer)
    if isinstance(answer, RequestRejected):
        return judge_refusal(
            attempt,
            str(answer),
            status_code=answer.status_code,
            code=answer.code,
            parameter=answer.parameter,
            sent_before=work.sent_before,
        )
    work.uncounted += isinstance(answer, (Withheld, RateLimited))
    if isinstance(answer, (Withheld, NeverSent)):
        return judge_unsent(attempt, str(answer), sent_before=work.sent_before)
    work.sent_before = True
    return judge_silence(
        attempt,
        str(answer) or repr(answer),
        is_recognised=isinstance(answer, OutcomeUnknown),
        answered=getattr(answer, "answered", False),
    )
