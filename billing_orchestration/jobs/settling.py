"""Settle many payments: in batches first, one by one where a batch fails.

One poisoned payment never stops the others: a batch that fails is settled payment by payment; what the database
refuses for good goes to quarantine, what it was too busy for must be retried.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from billing_orchestration.database.audit import Problem, Stamp, evidence_of, known_problems, open_problems
from billing_orchestration.database.customers import users_of
from billing_orchestration.database.errors import BillingDatabaseError
from billing_orchestration.database.matching import fetch_settled
from billing_orchestration.database.one_by_one import NotWritten, Witnesses, one_by_one
from billing_orchestration.database.settling import Settled, preview_batch, settle_batch
from billing_orchestration.domain.decisions import Action, Code, Decision
from billing_orchestration.domain.lost_attempts import charge_of, identity_of
from billing_orchestration.domain.money import Money
from billing_orchestration.domain.personal import without_names
from billing_orchestration.domain.problem_kinds import NOT_WRITABLE, RECEIPT, UNREADABLE
from billing_orchestration.domain.provider_payment import ProviderPayment, UnusablePayment
from billing_orchestration.domain.settlement_decisions import CloseAsGranted, Leave, Quarantine, RecordRefund, Settle
from billing_orchestration.jobs.run_report import RunReport
from billing_orchestration.resources import BillingDatabase

if TYPE_CHECKING:
    import sqlalchemy as sa

# Large enough that the statements' round trips do not count, small enough that the service's webhook never waits long
# for the rows a batch has locked.
BATCH_SIZE = 200


@dataclass(frozen=True, slots=True)
class Failed:
    """A payment that could not be settled."""

    payment: ProviderPayment
    refusal: NotWritten


def batches(payments: Sequence[ProviderPayment], size: int = BATCH_SIZE) -> Iterator[list[ProviderPayment]]:
    """Cut payments into batches in which every user and every id occurs once; a user's payments keep their order."""
    waves: list[list[ProviderPayment]] = []
    seen: dict[str, int] = {}
    ids: set[str] = set()
    for payment in payments:
        if payment.id in ids:
            continue
        ids.add(payment.id)
        user = payment.lock_name
        wave = seen.get(user, 0)
        seen[user] = wave + 1
        if wave == len(waves):
            waves.append([])
        waves[wave].append(payment)
    for wave_payments in waves:
        for start in range(0, len(wave_payments), size):
            yield wave_payments[start : start + size]


def settle_all(
    database: BillingDatabase,
    payments: Sequence[ProviderPayment],
    *,
    make_stamp: Callable[[], Stamp],
    is_live: bool,
    dry_run: bool,
) -> Iterator[Settled | Failed]:
    """Settle payments, each batch in its own transaction. Raises when the database itself is gone.

    With `dry_run` every decision is made from the same facts and nothing is written.
    """

    def settle(batch: Sequence[ProviderPayment]) -> list[Settled]:
        stamp, calendar = make_stamp(), database.calendar
        if dry_run:
            with database.read() as connection:
                return preview_batch(connection, batch, stamp=stamp, calendar=calendar, is_live=is_live)
        with database.begin() as connection:
            return settle_batch(connection, batch, stamp=stamp, calendar=calendar, is_live=is_live)

    witnesses = Witnesses()
    for batch in batches(payments):
        for part, result in one_by_one(batch, settle, witnesses=witnesses):
            if isinstance(result, NotWritten):
                yield Failed(part[0], result)
            else:
                yield from result


def report_settled(
    report: RunReport, results: Iterator[Settled | Failed], *, database: BillingDatabase, stamp: Stamp, dry_run: bool
) -> None:
    """Add what became of the payments to the report; put what the database refuses for good into the quarantine."""
    refused: list[Refused] = []
    for result in results:
        payment = result.payment
        subject = f"payment {payment.id}"
        if isinstance(result, Failed):
            reason = f"settling it failed: {result.refusal.reason}"
            evidence = evidence_of({"id": payment.id, "metadata": payment.metadata})
            identity = identity_of(payment)
            problem = Problem(
                subject,
                NOT_WRITABLE,
                reason,
                external_payment_id=payment.id,
                subscription_id=None if identity is None else identity.subscription_id,
                attempt_id=payment.claims.renewal_attempt_id,
                evidence=evidence,
            )
            refused.append(Refused(problem, result.refusal, payment.money))
            continue
        decision = result.decision
        reason = decision.reason
        if isinstance(decision, Settle):
            report.applied += 1
            # A grant with a notice (the customer had said no meanwhile) opens a problem of its own.
            report.opened += result.newly_opened
            report.quarantined += decision.notice is not None
            if result.subscription_id is not None:
                reason = f"{reason} (subscription {result.subscription_id}, until {decision.period_end:%Y-%m-%d})"
            report.decisions.append(Decision(_VERBS[decision.kind], subject, reason, payment.money))
        elif isinstance(decision, RecordRefund):
            report.applied += 1
            report.decisions.append(Decision(Action.RECORD_REFUND, subject, reason, payment.money))
        elif isinstance(decision, CloseAsGranted):
            report.applied += 1
            report.decisions.append(Decision(Action.CLOSE_ATTEMPT, subject, reason, payment.money))
        elif isinstance(decision, Quarantine):
            report.quarantined += 1
            report.opened += result.newly_opened
            report.decisions.append(Decision(Action.QUARANTINE, subject, reason, payment.money, decision.kind))
        elif isinstance(decision, Leave):
            report.skipped += 1
            if decision.code == Code.LEFT_TO_WEBHOOK:
                report.left.append(payment)
            report.decisions.append(Decision(Action.LEAVE, subject, reason, payment.money, decision.code))
    report_refused(report, refused, database=database, stamp=stamp, dry_run=dry_run)


_VERBS = {"created": Action.CREATE, "extended": Action.EXTEND, "renewed": Action.RENEW}


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that the database did not take: the problem that it would be for a person, and what the database said."""

    problem: Problem
    refusal: NotWritten
    money: Money | None = None


def report_refused(
    report: RunReport, refused: Sequence[Refused], *, database: BillingDatabase, stamp: Stamp, dry_run: bool = False
) -> None:
    """Put before a person what the database refuses for good; leave to the next run what it may take then.

    Where nothing tells whether an error is about the row or about the database, an earlier run may have found out: a
    row that is in quarantine already stays there.
    """
    if not refused:
        return
    with database.read() as connection:
        refused = _unnamed(connection, refused)
        known = known_problems(connection, [row.problem.key for row in refused if row.refusal.doubt is not None])
    problems = []
    for row in refused:
        subject, reason = row.problem.subject, row.refusal.reason
        if row.refusal.for_good or row.problem.key in known:
            problems.append(row.problem)
            report.decisions.append(Decision(Action.QUARANTINE, subject, reason, row.money, row.problem.kind))
        else:
            report.again.append(f"{subject}: {reason}")
            report.decisions.append(Decision(Action.TRY_AGAIN, subject, reason, row.money))
    report.quarantined += len(problems)
    if not dry_run:
        report.opened += open_all(database, stamp, problems)


def _unnamed(connection: "sa.Connection", refused: Sequence[Refused]) -> list[Refused]:
    """The same without the users whom a trigger of the service's may have named."""
    names = users_of(connection, [row.problem for row in refused])
    return [
        replace(
            row,
            problem=replace(row.problem, reason=without_names(row.problem.reason, names)),
            refusal=replace(row.refusal, reason=without_names(row.refusal.reason, names)),
        )
        for row in refused
    ]


def open_all(database: BillingDatabase, stamp: Stamp, problems: Sequence[Problem]) -> int:
    """Put problems into the quarantine, together or one by one; return how many are new.

    Raises BillingDatabaseError when one could not be put there, after all others were.
    """

    def write(part: Sequence[Problem]) -> int:
        with database.begin() as connection:
            return len(open_problems(connection, stamp, part))

    opened, refused = 0, []
    for part, result in one_by_one(problems, write):
        if isinstance(result, NotWritten):
            refused.append(f"{part[0].subject} could not be put into quarantine: {result.reason}")
        else:
            opened += result
    if refused:
        raise BillingDatabaseError("; ".join(refused[:3]))
    return opened


def unusable_problems(unusable: Sequence[UnusablePayment]) -> list[Problem]:
    """Odd items of a provider's answer, as problems for a person. One without an id is named by its contents.

    One that names a renewal attempt in its metadata may be its charge: it holds that attempt, and its subscription
    where our records do not know better.
    """
    problems = []
    for item in unusable:
        evidence = evidence_of(item.evidence)
        charge, _ = charge_of(item)
        name = item.payment_id or hashlib.sha256(json.dumps(evidence, sort_keys=True).encode()).hexdigest()[:16]
        problems.append(
            Problem(
                subject=f"payment {name}",
                kind=UNREADABLE,
                reason=f"the provider's record cannot be used: {item.reason}",
                external_payment_id=item.payment_id,
                subscription_id=None if charge is None else charge.subscription_id,
                attempt_id=None if charge is None else charge.attempt_id,
                evidence=evidence,
            )
        )
    return problems


def receipt_problems(payments: Iterable[ProviderPayment], settled: Set[str]) -> list[Problem]:
    """What a person has to look at among settled payments: receipts that were not registered."""
    return [
        Problem(
            f"payment {payment.id}",
            RECEIPT,
            f"renewed and granted for {payment.money}, and the registration of its receipt was canceled",
            external_payment_id=payment.id,
        )
        for payment in payments
        if payment.lacks_receipt and payment.id in settled
    ]


def report_without_receipt(
    report: RunReport, payments: Iterable[ProviderPayment], *, database: BillingDatabase, stamp: Stamp, dry_run: bool
) -> None:
    """Paid renewals that the tax office does not know: their grants stand, and a person makes the receipts."""
    lacking = [payment for payment in payments if payment.lacks_receipt]
    if not lacking:
        return
    with database.read() as connection:
        settled = fetch_settled(connection, [payment.id for payment in lacking])
    problems = receipt_problems(lacking, settled)
    report.quarantined += len(problems)
    report.decisions.extend(Decision(Action.QUARANTINE, p.subject, p.reason, code=p.kind) for p in problems)
    if not dry_run:
        report.opened += open_all(database, stamp, problems)


def report_unusable(
    report: RunReport, unusable: Sequence[UnusablePayment], *, database: BillingDatabase, stamp: Stamp, dry_run: bool
) -> None:
    """Quarantine odd items and report them."""
    problems = unusable_problems(unusable)
    report.quarantined += len(problems)
    report.decisions.extend(
        Decision(Action.QUARANTINE, problem.subject, problem.reason, code=problem.kind) for problem in problems
    )
    if not dry_run:
        report.opened += open_all(database, stamp, problems)
