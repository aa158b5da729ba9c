"""Before a method is charged for the first time, the provider is asked about it: for the run, and for `upcoming`.

It only reads. Who would not be charged anyway is not asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import datetime

import sqlalchemy as sa

from billing_orchestration.database.asked_methods import read_declines
from billing_orchestration.database.renewals import DueSlice
from billing_orchestration.domain.methods import (
    INACTIVE,
    METHOD,
    NOT_KNOWN,
    NOT_SAVED,
    PAYMENT,
    REFUNDED,
    SAVED,
    SILENT,
    MethodAnswer,
    Question,
    answer_of,
)
from billing_orchestration.domain.provider_payment import UnusablePayment
from billing_orchestration.domain.renewals import Charge, DueSubscription, RenewalRules, decide_renewal
from billing_orchestration.provider.client import PaymentProvider
from billing_orchestration.provider.errors import (
    Forbidden,
    PaymentNotFound,
    ProviderError,
    RequestRejected,
    WrongCredentials,
)
from billing_orchestration.provider.pacing import map_concurrently
from billing_orchestration.threads import OF_THE_SYSTEM, Threads

_ASKED_AT_ONCE = 16
Read = Callable[[], AbstractContextManager[sa.Connection]]


def ask_about_methods(
    found: DueSlice,
    client: PaymentProvider,
    read: Read,
    *,
    now: datetime,
    rules: RenewalRules,
    threads: Threads = OF_THE_SYSTEM,
) -> tuple[DueSlice, tuple[MethodAnswer, ...]]:
    """The slice with what the provider says of methods that are charged for the first time; and the answers.

    Raises WrongCredentials. A provider that gives no answer about one is silent about that one.
    """
    found, answers = _ask(found, client, read, now, rules, threads)
    latest = answers
    # Who had a newer payment that saved no method, and an older method.
    while latest:
        found, latest = _ask(found, client, read, now, rules, threads)
        answers += latest
    return found, answers


def _ask(
    found: DueSlice,
    client: PaymentProvider,
    read: Read,
    now: datetime,
    rules: RenewalRules,
    threads: Threads,
) -> tuple[DueSlice, tuple[MethodAnswer, ...]]:
    waiting = {attempt.subscription_id for attempt in found.in_review}
    waiting |= {attempt.subscription_id for attempt in found.open_attempts if attempt.may_have_been_sent}
    asked = {
        due.id: due.question
        for due in found.due
        if due.question is not None and due.id not in waiting and _is_due(due, found, now, rules)
    }
    questions = list(dict.fromkeys(asked.values()))
    if not questions:
        return found, ()
    answers = {
        answer.question: answer
        for answer in (
            *_about_payments([q for q in questions if q.about == PAYMENT], client, threads),
            *_about_methods([q for q in questions if q.about == METHOD], client),
        )
    }
    # A method may have another id than the payment that saved it, and declines are known by the method's.
    others = [a.method_id for a in answers.values() if a.method_id is not None and a.method_id != a.question.name]
    others += [older.id for due in found.due if due.id in asked for older in due.older]
    today = rules.calendar.start_of(rules.calendar.day_of(now))
    declines: Mapping[str, tuple[datetime | None, datetime | None]] = {}
    if others:
        with read() as connection:
            declines = read_declines(connection, others, today)
    due = tuple(_with_answer(d, answers.get(asked[d.id]), declines) if d.id in asked else d for d in found.due)
    return replace(found, due=due), tuple(answers.values())


def _is_due(due: DueSubscription, found: DueSlice, now: datetime, rules: RenewalRules) -> bool:
    """Whether it is charged if its method may be; an attempt that was never sent is not in the way."""
    unsent = frozenset(attempt.id for attempt in due.attempts if not attempt.may_have_been_sent)
    return isinstance(decide_renewal(due, now=now, rules=rules, voided=unsent, holds=found.holds), Charge)


def _about_payments(questions: Sequence[Question], client: PaymentProvider, threads: Threads) -> Iterator[MethodAnswer]:
    by_name = {question.name: question for question in questions}
    for name, told in map_concurrently(client.get_payment, list(by_name), _ASKED_AT_ONCE, threads=threads):
        question = by_name[name]
        if isinstance(told, WrongCredentials):
            raise told
        if isinstance(told, PaymentNotFound) or (isinstance(told, RequestRejected) and not isinstance(told, Forbidden)):
            yield MethodAnswer(question, NOT_KNOWN)
        elif isinstance(told, ProviderError):
            yield MethodAnswer(question, SILENT, detail=str(told))
        elif isinstance(told, Exception):
            raise told
        elif isinstance(told, UnusablePayment):
            yield MethodAnswer(question, SILENT, detail=f"the provider's record cannot be used: {told.reason}")
        else:
            yield answer_of(question, told)


def _about_methods(questions: Sequence[Question], client: PaymentProvider) -> Iterator[MethodAnswer]:
    """Of a method that the service names, only what the provider does say counts: else the charge itself will tell."""
    told = client.cards([question.name for question in questions]) if questions else {}
    for question in questions:
        if question.name in told:
            state = told[question.name]
            word = SAVED if state.isdigit() or not state else INACTIVE
            yield MethodAnswer(question, word, question.name, detail=state)


def _with_answer(
    due: DueSubscription,
    answer: MethodAnswer | None,
    declines: Mapping[str, tuple[datetime | None, datetime | None]],
) -> DueSubscription:
    if answer is None:
        return due
    method_id = answer.method_id
    # An id that the provider does not know may be a method's own. It displaces none that we know.
    is_no = answer.word in (NOT_SAVED, REFUNDED) or (
        answer.word == NOT_KNOWN and any(older.is_kept for older in due.older)
    )
    if is_no and due.older:
        next_one, *rest = due.older
        due = replace(due, question=next_one.question, method_word=next_one.word, older=tuple(rest))
        method_id = next_one.id
    else:
        due = replace(due, question=None, method_word=answer.word, method_detail=answer.detail, older=())
    if method_id is None or method_id == due.method_id:
        return due
    stopped_at, declined_at = declines.get(method_id, (None, None))
    return replace(due, method_id=method_id, method_stopped_at=stopped_at, method_declined_at=declined_at)
