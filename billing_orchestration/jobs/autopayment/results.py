"""What became of each charge, in the words of the run's report."""

import uuid
from collections import Counter
from collections.abc import Set
from dataclasses import dataclass

from billing_orchestration.database.audit import Problem, evidence_of
from billing_orchestration.database.one_by_one import NotWritten
from billing_orchestration.database.settling import Settled
from billing_orchestration.domain.answers import SHOP, Closing
from billing_orchestration.domain.attempts import KEY_LIFETIME_HOURS, Attempt
from billing_orchestration.domain.decisions import Code
from billing_orchestration.domain.problem_kinds import NOT_WRITABLE
from billing_orchestration.domain.provider_payment import ProviderPayment
from billing_orchestration.domain.settlement_decisions import Leave, Quarantine, RecordRefund, Settle


@dataclass(slots=True)
class ChargeResult:
    """What became of one attempt in this run.

    `outcome`: charged | pending | declined | stopped | rejected | review | refunded | unknown | never sent | skipped.
    `code`: the provider's word for a decline, the problem's kind for a review. `needs_retry`: the run ends red.
    `problem`: what a person has to look at.
    """

    attempt: Attempt
    outcome: str
    reason: str
    decline_class: str | None = None
    needs_retry: bool = False
    newly_quarantined: bool = False
    code: str = ""
    problem: Problem | None = None


def result_of(attempt: Attempt, answer: ProviderPayment | Closing, result: Settled | NotWritten | None) -> ChargeResult:
    """What became of an attempt whose answer was written, or could not be."""
    if isinstance(answer, Closing):
        needs_retry = answer.needs_retry or isinstance(result, NotWritten)
        code = answer.decline_reason or answer.decline_class or ""
        return ChargeResult(attempt, answer.word, answer.reason, answer.decline_class, needs_retry, code=code)
    if not isinstance(result, Settled):
        why = attempt.unnamed(result.reason) if result is not None else "no reason is known"
        reason = (
            f"paid at the provider ({answer.id}), not granted yet: {why}; the matching jobs or the next run settle it"
        )
        is_refused = result is not None and (result.for_good or result.doubt is not None)
        problem = _not_granted(attempt, answer, why) if is_refused else None
        return ChargeResult(attempt, "unknown", reason, needs_retry=True, problem=problem)
    decision = result.decision
    if isinstance(decision, Quarantine):
        return ChargeResult(
            attempt, "review", decision.reason, newly_quarantined=result.newly_opened, code=decision.kind
        )
    if isinstance(decision, RecordRefund):
        return ChargeResult(attempt, "refunded", decision.reason)
    if isinstance(decision, Leave):
        return ChargeResult(attempt, "charged", f"{decision.reason}, by another run")
    until = f", paid until {decision.period_end:%Y-%m-%d}" if isinstance(decision, Settle) else ""
    return ChargeResult(attempt, "charged", f"payment {answer.id}{until}")


def _not_granted(attempt: Attempt, payment: ProviderPayment, why: str) -> Problem:
    # It does not name the attempt: that would hold the next run, which hears of the payment and grants it.
    return Problem(
        f"payment {payment.id}",
        NOT_WRITABLE,
        f"a renewal was paid and could not be granted: {why}",
        external_payment_id=payment.id,
        subscription_id=attempt.subscription_id,
        evidence=evidence_of({"id": payment.id, "metadata": payment.metadata}),
    )


def not_sent_after_all(attempt: Attempt, why: str, *, sent_before: bool) -> ChargeResult:
    """What became of an attempt that the look right before its send has stopped."""
    rest = f"its outcome stays open and is searched after {KEY_LIFETIME_HOURS} h" if sent_before else "not charged"
    reason = f"looked at again right before sending: {why}; {rest}"
    return ChargeResult(attempt, "skipped", reason, code=Code.CHANGED_MEANWHILE)


class Results:
    """What became of each attempt, and how far the run is."""

    def __init__(self) -> None:
        self.all: list[ChargeResult] = []
        self._outcomes: Counter[str] = Counter()

    def add(self, result: ChargeResult) -> None:
        self.all.append(result)
        self._outcomes[result.outcome] += 1

    def excuse(self, methods: Set[str]) -> list[uuid.UUID]:
        """The charges of these methods were refused because of the shop, not because of their own; their attempts."""
        excused = [one for one in self.all if one.outcome == "rejected" and one.attempt.payment_method_id in methods]
        for result in excused:
            result.decline_class, result.needs_retry = SHOP, True
        return [result.attempt.id for result in excused]

    def progress(self, total: int, elapsed_s: float) -> str:
        """One line for the run's log."""
        done = len(self.all)
        rate = done / elapsed_s if elapsed_s > 0 else 0.0
        remaining = f", about {(total - done) / rate:.0f} s to go" if rate and done < total else ""
        told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self._outcomes.items()))
        return f"{done} of {total} done ({told or 'no answer yet'}), {rate:.1f} a second{remaining}"
