"""A person resolves a quarantine entry: safely, once, audited, through the one settling function.

Accept: the payment is booked as it is. Attach: one period of a subscription's plan for that
subscription. Ignore: nothing is granted, and settling leaves the payment for ever. An entry that is about no payment
(a gap, a row that could not be written) is only closed. One about books that differ grants nothing: accepted, our rows
take the provider's truth. docs/operations.md says what each does for each kind.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial

import sqlalchemy as sa

from billing_orchestration.database.attempts import by_ids
from billing_orchestration.database.audit import Stamp
from billing_orchestration.database.engine import begin, read
from billing_orchestration.database.matching import fetch_settled
from billing_orchestration.database.one_by_one import NotWritten, write_alone
from billing_orchestration.database.quarantine import (
    Entry,
    close_entry,
    read_entry,
)
from billing_orchestration.database.reconciliation import adopt, lock_rows, settled_row
from billing_orchestration.database.settling import Settled, settle_batch
from billing_orchestration.database.settling_facts import lock_user_names, lock_users
from billing_orchestration.domain.adoption import RowChange, provider_truth
from billing_orchestration.domain.answers import as_answer_to
from billing_orchestration.domain.billing_calendar import BillingCalendar
from billing_orchestration.domain.decisions import Code
from billing_orchestration.domain.problem_kinds import ACCEPTED, ATTACHED, GRANTED_ALREADY, IGNORED, MENDED
from billing_orchestration.domain.provider_payment import SUCCEEDED, ProviderPayment, UnusablePayment
from billing_orchestration.domain.settlement_decisions import (
    CloseAsGranted,
    Leave,
    Quarantine,
    RecordRefund,
    Ruling,
    Settle,
)
from billing_orchestration.provider.client import PaymentProvider
from billing_orchestration.provider.errors import PaymentNotFound
from billing_orchestration.resources import BillingDatabase, connect_provider, utc_now
from billing_orchestration.settings import Settings, load_settings

JOB = "quarantine"


class NotResolved(Exception):
    """The entry was not resolved and nothing was written. Its text is one line that says why, and what can be done."""


@dataclass(frozen=True, slots=True)
class Resolution:
    """What a person decided. `attach_to` with ATTACHED only. `by` is the person's name, for the audit trail."""

    word: str
    reason: str
    by: str
    attach_to: int | None = None


@dataclass(frozen=True)
class Desk:
    """What a command works with: the database, a way to the provider, the billing calendar, settings, the time."""

    engine: sa.Engine
    connect: Callable[[], PaymentProvider]
    calendar: BillingCalendar
    settings: Settings
    now: Callable[[], datetime] = utc_now


@contextmanager
def open_desk(load: Callable[[], Settings] = load_settings) -> Iterator[Desk]:
    """The desk of the environment's settings. Raises SettingsError, BillingDatabaseError."""
    database = BillingDatabase(load)
    try:
        settings = database.settings
        yield Desk(database.engine, lambda: connect_provider(settings), database.calendar, settings)
    finally:
        database.close()


def resolve(
    engine: sa.Engine,
    connect: Callable[[], PaymentProvider],
    calendar: BillingCalendar,
    entry_id: int,
    resolution: Resolution,
    now: Callable[[], datetime],
    *,
    run_id: str | None = None,
    dry_run: bool = False,
) -> list[str]:
    """Resolve one open entry; return what was done, in lines for a person.

    What moves: nothing at the provider; at most one grant in the books, through `settle_batch`, whose primary key
    allows one per provider payment. The payment is fetched again, before any transaction. Then one transaction: the
    user's lock, the entry's row (still open?), the entry closed, the payment settled with the ruling, the audit trail.
    Killed anywhere: all of it or nothing. With `dry_run` the same transaction is rolled back instead of committed.
    `run_id` names the run in the audit trail; without one it gets a name of its own. Raises NotResolved with nothing
    written; and, also with nothing written, ProviderError, BillingDatabaseError.
    """
    if not dry_run and not (resolution.reason.strip() and resolution.by.strip()):
        raise NotResolved("a resolution needs a reason and a name: they are what the next person reads")
    with read(engine) as connection:
        entry = _open_entry(read_entry(connection, entry_id), entry_id)
    stamp = Stamp(JOB, run_id or f"cli-{uuid.uuid4()}", now())
    transaction = partial(read if dry_run else begin, engine)
    if entry.about_books:
        return _resolve_books(transaction, connect, stamp, entry, resolution)
    if resolution.word == IGNORED or not entry.about_provider_payment or entry.kind in GRANTED_ALREADY:
        _refuse_attaching(entry, resolution)
        with transaction() as connection:
            _close(connection, stamp, entry, _closing_word(entry, resolution), resolution)
            if entry.about_provider_payment and entry.kind not in GRANTED_ALREADY:
                _refuse_granted(connection, entry)
        return [_closed_in_words(entry, resolution)]
    payment, is_live = _ask(engine, connect, entry)

    def settle(payments: Sequence[ProviderPayment]) -> Settled:
        with transaction() as connection:
            return _settle(connection, stamp, entry, payments[0], resolution, calendar, is_live=is_live)

    settled = write_alone(payment, settle)
    if isinstance(settled, NotWritten):
        raise NotResolved(f"entry {entry.id} was not resolved, nothing was written: {settled.reason}")
    return [
        _granted_in_words(settled),
        f"entry {entry.id} is closed as {resolution.word} (audit trail: {stamp.run_id})",
    ]


def _refuse_attaching(entry: Entry, resolution: Resolution) -> None:
    if resolution.word == ATTACHED:
        raise NotResolved(
            f"entry {entry.id} ({entry.kind}) holds nothing that could be granted to a subscription: accept or"
            " ignore it"
        )


def _resolve_books(
    transaction: Callable[[], AbstractContextManager[sa.Connection]],
    connect: Callable[[], PaymentProvider],
    stamp: Stamp,
    entry: Entry,
    resolution: Resolution,
) -> list[str]:
    """Close an entry about books that differ. Accepted: our rows take what the provider says now.

    What moves: no money and no grant; the status or amount of the payment's rows. One transaction: the user's lock, the
    rows, the entry (still open?), the rows changed, the audit trail. Killed anywhere: all of it or nothing.
    """
    _refuse_attaching(entry, resolution)
    payment = _there(connect, entry.external_payment_id) if resolution.word == ACCEPTED else None

    def close(_: Sequence[Entry]) -> list[RowChange]:
        with transaction() as connection:
            payment_id = entry.external_payment_id
            changes: list[RowChange] = []
            if resolution.word == ACCEPTED:
                lock_user_names(connection, [payment.lock_name if payment else f"payment {payment_id}"])
                rows = lock_rows(connection, payment_id, entry.payment_id)
                holder = None if payment_id is None else settled_row(connection, payment_id)
                changes = provider_truth(rows, payment, holder)
            _close(connection, stamp, entry, resolution.word, resolution)
            adopt(connection, stamp, changes, f"{resolution.by}: {resolution.reason}", payment_id)
            return changes

    closed = write_alone(entry, close)
    if isinstance(closed, NotWritten):
        raise NotResolved(f"entry {entry.id} was not resolved, nothing was written: {closed.reason}")
    corrected = [
        f"payment {change.row.id}: {change.row.status} becomes {change.status}"
        + (f", {change.row.money} becomes {change.money}" if change.money else "")
        for change in closed
    ]
    return [
        *(corrected or ["no row is changed"]),
        f"entry {entry.id} is closed as {resolution.word}; grants stay as they are (audit trail: {stamp.run_id})",
    ]


def _there(connect: Callable[[], PaymentProvider], payment_id: str | None) -> ProviderPayment | None:
    """The provider's payment as it is now; None where it knows none."""
    if payment_id is None:
        return None
    provider = connect()
    try:
        payment = provider.get_payment(payment_id)
    except PaymentNotFound:
        return None
    finally:
        provider.close()
    if isinstance(payment, UnusablePayment):
        raise NotResolved(
            f"the provider's record of payment {payment_id} cannot be read ({payment.reason}): correct the row by hand,"
            " then ignore the entry"
        )
    return payment


def _open_entry(entry: Entry | None, entry_id: int) -> Entry:
    if entry is None:
        raise NotResolved(f"there is no entry {entry_id} in the quarantine: billing-orchestration quarantine list")
    if entry.resolved_at is not None:
        raise NotResolved(
            f"entry {entry_id} is resolved already: {entry.resolution} on {entry.resolved_at:%Y-%m-%d %H:%M} UTC by"
            f" {entry.resolved_by} ({entry.resolution_reason}). Nothing was changed"
        )
    return entry


def _refuse_granted(connection: sa.Connection, entry: Entry) -> None:
    """What was granted meanwhile cannot be ignored. Its entry is locked, so nobody is granting it at this moment."""
    payment_id = entry.external_payment_id or ""
    if fetch_settled(connection, [payment_id]):
        raise NotResolved(
            f"payment {payment_id} was settled meanwhile, so it can no longer be ignored; accept closes the entry."
            " Nothing was changed"
        )


def _close(connection: sa.Connection, stamp: Stamp, entry: Entry, word: str, resolution: Resolution) -> None:
    _open_entry(read_entry(connection, entry.id, lock=True), entry.id)
    close_entry(connection, stamp, entry, word, resolution.reason, resolution.by)


def _closing_word(entry: Entry, resolution: Resolution) -> str:
    """A problem without a payment may come back after a person says it is fixed; it then alerts again."""
    return MENDED if resolution.word == ACCEPTED and not entry.about_provider_payment else resolution.word


def _closed_in_words(entry: Entry, resolution: Resolution) -> str:
    if not entry.about_provider_payment:
        after = "if it happens again, it alerts again" if resolution.word == ACCEPTED else "it never alerts again"
        return f"entry {entry.id} ({entry.kind}) is closed, nothing else was changed; {after}"
    if entry.kind in GRANTED_ALREADY:
        return f"entry {entry.id} is closed: the renewal was granted when it was opened, and that stands"
    return (
        f"entry {entry.id} is closed: nothing is granted for payment {entry.external_payment_id}, now or later. Refund"
        " it at the provider if that is not done yet"
    )


def _ask(engine: sa.Engine, connect: Callable[[], PaymentProvider], entry: Entry) -> tuple[ProviderPayment, bool]:
    """The provider's payment as it is now, and whether the shop is live."""
    payment_id = entry.external_payment_id or ""
    provider = connect()
    try:
        payment = provider.get_payment(payment_id)
        is_live = provider.is_live
    except PaymentNotFound:
        raise NotResolved(
            f"the provider knows no payment {payment_id}: nothing can be granted for it, ignore it"
        ) from None
    finally:
        provider.close()
    if isinstance(payment, UnusablePayment):
        raise NotResolved(
            f"the provider's record of payment {payment_id} cannot be used ({payment.reason}), so nothing can be"
            " granted for it by a program: fix it by hand, then ignore it here"
        )
    if payment.status != SUCCEEDED:
        raise NotResolved(f"payment {payment_id} is {payment.status} at the provider, not succeeded: nothing to grant")
    if entry.attempt_id is not None:
        with read(engine) as connection:
            attempt = by_ids(connection, [entry.attempt_id]).get(entry.attempt_id)
        if attempt is not None and attempt.external_payment_id == payment.id:
            payment = as_answer_to(attempt, payment)
    return payment, is_live


def _settle(
    connection: sa.Connection,
    stamp: Stamp,
    entry: Entry,
    payment: ProviderPayment,
    resolution: Resolution,
    calendar: BillingCalendar,
    *,
    is_live: bool,
) -> Settled:
    # Before the entry: a job that settles this very payment takes the user's lock, and then the entry.
    lock_users(connection, [payment])
    # Closed first, so that settling does not close it in its own words.
    _close(connection, stamp, entry, resolution.word, resolution)
    [settled] = settle_batch(
        connection,
        [payment],
        stamp=stamp,
        calendar=calendar,
        is_live=is_live,
        rulings={payment.id: Ruling(resolution.attach_to)},
    )
    decision = settled.decision
    if isinstance(decision, Quarantine):
        ways = (
            "ignore it, or attach it to another subscription" if resolution.word == ATTACHED else "attach or ignore it"
        )
        raise NotResolved(f"it cannot be granted this way: {decision.reason}. Nothing was written; {ways}")
    if isinstance(decision, Leave) and (decision.code == Code.SET_ASIDE or resolution.word == ATTACHED):
        raise NotResolved(f"nothing is left to grant for payment {payment.id}: {decision.reason}. Nothing was written")
    return settled


def _granted_in_words(settled: Settled) -> str:
    decision, payment = settled.decision, settled.payment
    if isinstance(decision, Settle):
        return (
            f"payment {payment.id} ({payment.money}) is granted: subscription {settled.subscription_id} until"
            f" {decision.period_end:%Y-%m-%d %H:%M} UTC; {decision.reason}"
        )
    if isinstance(decision, RecordRefund):
        return f"payment {payment.id} is recorded as REFUNDED, nothing is granted: {decision.reason}"
    if isinstance(decision, CloseAsGranted):
        return f"payment {payment.id} was granted before, its attempt is closed: {decision.reason}"
    return f"payment {payment.id} was granted before, nothing was added: {decision.reason}"
