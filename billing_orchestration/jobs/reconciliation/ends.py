"""What becomes of the differences that settling has not repaired: each is put before a person, once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from billing_orchestration.both_sides import BothSides
from billing_orchestration.database.audit import Problem, Stamp, open_problems
from billing_orchestration.database.reconciliation import close_agreed, open_of_books, states_of
from billing_orchestration.database.settling import Settled
from billing_orchestration.domain.decisions import Action, Code
from billing_orchestration.domain.problem_kinds import NOT_WRITABLE
from billing_orchestration.domain.reconciled import CLASSES, KIND_OF_CLASS, REFUNDED_THERE, UNREADABLE
from billing_orchestration.domain.settlement_decisions import CloseAsGranted, Leave, Quarantine, RecordRefund, Settle
from billing_orchestration.jobs.reconciliation.report import decision_of, differing, each, in_words
from billing_orchestration.jobs.run_failures import FailureCode
from billing_orchestration.jobs.run_report import RunReport
from billing_orchestration.jobs.settling import Failed, unusable_problems
from billing_orchestration.resources import BillingDatabase

if TYPE_CHECKING:
    import pandas as pd

Results = Mapping[str, Settled | Failed]


@dataclass(frozen=True)
class Ends:
    """The differences that are left, by what they wait for, each in words; and how many a person has decided about."""

    waiting: Sequence[str] = ()
    nobodys: Sequence[str] = ()
    decided: int = 0

    @property
    def left(self) -> int:
        """How many there are."""
        return len(self.waiting) + len(self.nobodys) + self.decided

    def red(self, day: object, *, dry_run: bool) -> tuple[str, str] | None:
        """Why the day's run is red, as a code and words; None when it is not."""
        if not self.waiting and not self.nobodys:
            return None
        words = [f"the books of {day} differ."]
        if self.waiting:
            words.append(f"Waiting for a person: {len(self.waiting)} (billing-orchestration quarantine list).")
        if self.nobodys:
            words.append(f"Before nobody: {len(self.nobodys)} (look at each with billing-orchestration explain).")
        words.append(
            "This was a dry run: nothing was written."
            if dry_run
            else "All else was applied, and nothing was taken back. Decide about each, then launch the day again."
        )
        words.append(f"In detail: {in_words([*self.nobodys, *self.waiting])}")
        return FailureCode.DAY_DIFFERS, " ".join(words)


def left_after(
    both: BothSides, lines: "pd.DataFrame", results: Results, database: BillingDatabase, *, dry_run: bool
) -> "pd.DataFrame":
    """The differences that settling has left: our side is read again, and compared again.

    A dry run has changed nothing, so it leaves out what would have been repaired.
    """
    found = differing(lines)
    if found.empty:
        return found
    if not dry_run:
        return differing(both.again(database.read, found).compare())
    repaired = [id_ for id_, result in results.items() if isinstance(_decision(result), (Settle, CloseAsGranted))]
    returned = [id_ for id_, result in results.items() if isinstance(_decision(result), RecordRefund)]
    is_gone = found["payment_id"].isin(returned) | (found["payment_id"].isin(repaired) & (found["line"] == "payment"))
    return found[~is_gone]


def put_before_a_person(
    report: RunReport,
    both: BothSides,
    lines: "pd.DataFrame",
    left: "pd.DataFrame",
    results: Results,
    database: BillingDatabase,
    stamp: Stamp,
    *,
    dry_run: bool,
) -> Ends:
    """Open an entry for each difference that a person must decide about, and close those that are gone.

    `lines`: all of the day, as they were found; `left`: what still differs.
    """
    problems = {problem.key: problem for line in each(left) if (problem := _problem(both, line)) is not None}
    unreadable = [problem.key for problem in unusable_problems(both.provider.unusable)]
    refused = {id_: _refusal_of(id_) for id_, result in results.items() if isinstance(result, Failed)}
    states: dict[str, bool] = {}
    if not dry_run:
        with database.begin() as connection:
            report.opened += len(open_problems(connection, stamp, list(problems.values())))
            gone = [entry for entry, key in open_of_books(connection) if _is_gone(key, problems, lines)]
            report.applied += close_agreed(connection, stamp, gone)
            states = states_of(connection, [*problems, *unreadable, *refused.values()])
    waiting: list[str] = []
    nobodys: list[str] = []
    decided = 0
    for line in each(left):
        problem = _problem(both, line)
        state: bool | None  # it waits for a person, a person has decided, or nobody knows of it
        if problem is not None:
            state = states.get(problem.key, True)
        elif line.klass == UNREADABLE:
            state = any(states.get(key, True) for key in unreadable)
        elif line.payment_id in refused:
            state = states.get(refused[line.payment_id])
        else:
            state = _settled_state(_decision(results.get(line.payment_id)))
        shown = decision_of(Action.QUARANTINE, line)
        name = f"{shown.subject}: {shown.reason}"
        if state is None:
            nobodys.append(name)
            report.decisions.append(decision_of(Action.REPORT, line))
        elif state:
            waiting.append(name)
            if problem is not None:
                report.quarantined += 1
                report.decisions.append(shown)
        else:
            decided += 1
            report.decisions.append(decision_of(Action.LEAVE, line))
    return Ends(waiting, nobodys, decided)


def _problem(both: BothSides, line: Any) -> Problem | None:
    """What a person is asked about a line; None where settling, or the entry of an unreadable record, asks it."""
    from billing_orchestration.domain.reconciliation import reason_of, subject_of

    kind = KIND_OF_CLASS.get(line.klass)
    if line.klass == REFUNDED_THERE and line.in_full and not line.succeeded + line.refunded:
        kind = None  # settling records it
    if line.klass == UNREADABLE and line.line == "refund":
        kind = "unreadable"
    if kind is None:
        return None
    payment_id = None if line.payment_id.startswith("\x00") else line.payment_id
    return Problem(
        subject_of(line),
        kind,
        f"{CLASSES[line.klass]}: {reason_of(line)}",
        external_payment_id=payment_id,
        payment_id=line.row or None,
        evidence={"books": _evidence(both, line)},
    )


def _evidence(both: BothSides, line: Any) -> dict[str, Any]:
    """Both sides of a line."""
    payment = both.provider.payments.get(line.payment_id)
    rows = [row for row in both.rows if row[0] == line.row or row[1] == line.payment_id]
    return {
        "day": both.day.day.isoformat(),
        "there": None
        if payment is None
        else {
            "id": payment.id,
            "status": payment.status,
            "amount": str(payment.money),
            "refunded_amount": payment.refunded_amount,
            "created_at": payment.created_at,
            "captured_at": payment.captured_at,
        },
        "refunds": [
            {"id": refund.id, "status": refund.status, "amount": str(refund.money), "created_at": refund.created_at}
            for refund in both.provider.refunds
            if refund.payment_id == line.payment_id
        ],
        "here": [{"row": row[0], "status": row[2], "kopecks": row[3], "currency": row[4]} for row in rows],
    }


def _is_gone(key: str, problems: Mapping[str, Problem], lines: "pd.DataFrame") -> bool:
    """Whether an open entry is about a line of this day that does not differ any more."""
    kind, name, id_ = key.rpartition(":")[2], *key.rpartition(":")[0].partition(" ")[::2]
    if key in problems or not kind:
        return False
    of_kind = lines[lines["line"] == name]
    return bool(((of_kind["id"] == id_) | ((of_kind["id"] == "") & (of_kind["row"].astype(str) == id_))).any())


def _decision(result: Settled | Failed | None) -> Any:
    return result.decision if isinstance(result, Settled) else None


def _refusal_of(payment_id: str) -> str:
    """The problem of a payment that the database refuses."""
    return Problem(f"payment {payment_id}", NOT_WRITABLE, "").key


def _settled_state(decision: Any) -> bool | None:
    """Whether settling has put it before a person; False if a person has set it aside."""
    if isinstance(decision, Quarantine):
        return True
    return False if isinstance(decision, Leave) and decision.code == Code.SET_ASIDE else None
