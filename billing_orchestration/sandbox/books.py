"""The books of both sides, reconciled, and the verdict. It only reads.

Reconciliation compares them payment by payment, as any day's. Beside it, the sandbox's ledger holds every movement of
money, whoever caused it: its sums must be those of the comparison, and no grant may be without one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from billing_orchestration.both_sides import BothSides, read_provider
from billing_orchestration.both_sides import read_books as read_sides
from billing_orchestration.database.engine import read
from billing_orchestration.domain.reconciled import CLASSES, REFUNDED_THERE, UNREADABLE, Day
from billing_orchestration.domain.reconciliation import Totals, reason_of, subject_of, to_kopecks, unclosed
from billing_orchestration.jobs.partitions import KEPT
from billing_orchestration.jobs.reconciliation.report import differing, each
from billing_orchestration.provider.client import PaymentProvider
from billing_orchestration.sandbox.example_data.records import Case, Item, Subscription

if TYPE_CHECKING:
    import pandas as pd

_LOOKED_UP_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Books:
    """Both sides at one moment: the provider's ledger, and our tables as lists of rows."""

    ledger: Sequence[Mapping[str, Any]]
    payments: Sequence[Any]
    subscriptions: Mapping[int, Any]
    settlements: Sequence[Any]
    attempts: Sequence[Any]
    quarantine: Sequence[Any]


@dataclass(frozen=True, slots=True)
class Check:
    """One sentence of the verdict. `faults` are the exceptions, in words."""

    promise: str
    looked_at: str
    faults: tuple[str, ...]


def read_books(engine: sa.Engine, ledger: Sequence[Mapping[str, Any]]) -> Books:
    """Read our side in one snapshot."""
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:

        def rows(query: str) -> Sequence[Any]:
            return connection.execute(sa.text(query)).all()

        return Books(
            ledger,
            rows("SELECT id, status::text AS status, amount, currency::text AS currency, subscription_id,"
                 " external_payment_id FROM payments ORDER BY id"),
            {row.id: row for row in rows("SELECT id, status::text AS status, ended_at FROM subscriptions")},
            rows("SELECT * FROM billing_orchestration.settlements ORDER BY period_start, settled_at"),
            rows("SELECT * FROM billing_orchestration.renewal_attempts ORDER BY subscription_id, period_start, number"),
            rows("SELECT * FROM billing_orchestration.quarantine WHERE resolved_at IS NULL ORDER BY id"),
        )  # fmt: skip


def both_sides(engine: sa.Engine, provider: PaymentProvider, now: datetime) -> BothSides:
    """Both sides' books as reconciliation_job reads those of a day: here of all days at once, until now."""
    day = Day(now.date(), now - KEPT, now, now - KEPT)
    return read_sides(
        partial(read, engine), provider, day, read_provider(provider, day), _LOOKED_UP_AT_ONCE, leaves_foreign=True
    )


def reconciled(lines: pd.DataFrame, sums: pd.DataFrame, books: Books) -> list[Check]:
    """What the lines of `both_sides` must show: nothing is left out, and nothing differs that no person sees."""
    in_hand = lines["payment_id"].isin({row.external_payment_id for row in books.quarantine})
    # Paid, granted once, and given back later: tomorrow's reconciliation_job asks a person about it.
    later = (lines["class"] == REFUNDED_THERE) & (lines["succeeded"] == 1)
    faults = differing(lines[~in_hand & ~later])
    waiting = len(differing(lines)) - len(faults)
    odd = set(lines.loc[lines["class"] == UNREADABLE, "payment_id"])
    return [
        Check(
            "the classes add up to the provider's ledger, to the kopeck",
            f"{len(books.ledger)} movements of money",
            tuple(unclosed(sums, _totals(entry for entry in books.ledger if entry["payment_id"] not in odd))),
        ),
        Check(
            "every success at the provider is granted once, refunded, in front of a person, or another seller's",
            f"{len(lines)} lines, {waiting} of them in front of a person or given back since",
            tuple(f"{subject_of(line)}: {CLASSES[line.klass]}: {reason_of(line)}" for line in each(faults)),
        ),
    ]


def _totals(ledger: Iterable[Mapping[str, Any]]) -> Totals:
    totals: dict[str, dict[str, int]] = {"charge": {}, "refund": {}}
    for entry in ledger:
        of_kind = totals[entry["kind"]]
        of_kind[entry["currency"]] = of_kind.get(entry["currency"], 0) + to_kopecks(Decimal(entry["amount"]))
    return Totals(totals["charge"], totals["refund"])


def verdict(books: Books, before: Sequence[Subscription]) -> list[Check]:
    """What no comparison of payments shows: that time is granted for money alone, and charged for once."""
    grants = [row for row in books.settlements if row.kind != "refunded"]
    charged_ids = {entry["payment_id"] for entry in books.ledger if entry["kind"] == "charge"}
    periods: dict[tuple[str, str], int] = {}
    for entry in books.ledger:
        if entry["kind"] == "charge" and "period_start" in entry["metadata"]:
            period = (entry["metadata"]["subscription_id"], entry["metadata"]["period_start"])
            periods[period] = periods.get(period, 0) + 1
    return [
        Check(
            "nothing is granted without a success",
            f"{len(grants)} grants, {len(books.subscriptions)} subscriptions",
            (
                *(
                    f"settlement of {row.external_payment_id}: the provider took no money"
                    for row in grants
                    if row.external_payment_id not in charged_ids
                ),
                *_unpaid_time(books, before),
            ),
        ),
        Check(
            "no period is charged twice",
            f"{len(periods)} periods charged by us",
            tuple(
                f"subscription {subscription}, period from {start}: charged {count} times"
                for (subscription, start), count in periods.items()
                if count > 1
            ),
        ),
    ]


def _unpaid_time(books: Books, before: Sequence[Subscription]) -> list[str]:
    """Subscriptions whose end is not where their settlements, period after period, lead to."""
    grants: dict[int, list[Any]] = {}
    for row in books.settlements:
        if row.kind != "refunded" and row.subscription_id is not None:
            grants.setdefault(row.subscription_id, []).append(row)
    ends: dict[int, datetime | None] = {
        subscription.id: subscription.ended_at.replace(tzinfo=None) for subscription in before
    }
    faults = []
    for identity, row in books.subscriptions.items():
        end = ends.get(identity)
        for grant in grants.get(identity, []):
            if end is not None and grant.period_start != end:
                faults.append(f"subscription {identity}: a period begins at {grant.period_start}, not at {end}")
            end = grant.period_end
        if end != row.ended_at:
            faults.append(f"subscription {identity} ends {row.ended_at}, paid until {end}")
    return faults


def fingerprint(engine: sa.Engine) -> dict[str, str]:
    """A checksum of every table's rows; the watermarks are left out, they move with time."""
    tables = ["public.subscriptions", "public.payments"]
    tables += [f"billing_orchestration.{name}" for name in
               ("renewal_attempts", "settlements", "saved_methods", "quarantine", "audit_trail")]  # fmt: skip
    with engine.connect() as connection:
        return {
            table: str(
                connection.execute(
                    sa.text(f"SELECT md5(coalesce(string_agg(t::text, '|' ORDER BY t::text), '')) FROM {table} t")
                ).scalar_one()
            )
            for table in tables
        }


@dataclass(frozen=True, slots=True)
class CaseResult:
    """What became of one case: whether it is what was expected, and in words."""

    as_expected: bool
    told: str


@dataclass(frozen=True, slots=True)
class _Facts:
    """The rows about one instance, None where there is none. `now`: the subscription after the runs."""

    grant: Any
    trouble: Any
    row: Any
    now: Any
    attempt: Any
    charges: int


class CaseReader:
    """Reads from the books what became of the example cases. `reported`: subject -> what the runs said about it."""

    def __init__(self, books: Books, reported: Mapping[str, str]) -> None:
        self._books = books
        self._reported = reported
        self._rows = {row.id: row for row in books.payments}
        self._by_external: dict[str | None, list[Any]] = {}
        for row in books.payments:
            if row.external_payment_id is not None:
                self._by_external.setdefault(row.external_payment_id, []).append(row)
        self._settled = {row.external_payment_id: row for row in books.settlements}
        self._renewed: dict[Any, Any] = {
            (row.subscription_id, row.period_start): row for row in books.settlements if row.attempt_id is not None
        }
        # The newest wins.
        self._attempts: dict[Any, Any] = {(row.subscription_id, row.period_start): row for row in books.attempts}
        self._quarantined = {row.external_payment_id: row for row in books.quarantine}

    def read(self, case: Case) -> CaseResult:
        """All instances of a case; those that differ from the expectation are named."""
        told: dict[str, int] = {}
        wrong = 0
        for item in case.items:
            faults, words = self._item(case, item)
            wrong += bool(faults)
            text = f"{words} (expected {', '.join(faults)})" if faults else words
            told[text] = told.get(text, 0) + 1
        parts = [text if count == len(case.items) else f"{count}: {text}" for text, count in told.items()]
        if len(parts) > 3:
            parts = [*parts[:2], f"and {len(parts) - 2} more alike"]
        return CaseResult(not wrong, "; ".join(parts))

    def _item(self, case: Case, item: Item) -> tuple[list[str], str]:
        """What differs from the expectation, and what happened, in words."""
        facts = self._facts(item)
        found: dict[str, Any] = {
            "grant": facts.grant.kind if facts.grant else "",
            "quarantine": facts.trouble.kind if facts.trouble else "",
            "row": facts.row.status if facts.row else None,
        }
        if facts.now is not None:
            found |= {
                "status": facts.now.status,
                "until": f"{facts.now.ended_at:%Y-%m-%d}",
                "attempt": facts.attempt.state if facts.attempt else "",
                "charges": facts.charges,
            }
        faults = [
            f"{name} {wanted or 'none'}, found {found.get(name) or 'none'}"
            for name, wanted in asdict(case.want).items()
            if wanted is not None and found.get(name) != wanted
        ]
        return faults, ", ".join(self._words(item, facts)) or "untouched"

    def _facts(self, item: Item) -> _Facts:
        """Everything in the books that is about this instance."""
        subscription, external_id = item.subscription, item.external_id
        period = None if subscription is None else (subscription.id, subscription.ended_at.replace(tzinfo=None))
        grant = self._settled.get(external_id) if external_id else self._renewed.get(period)
        if grant is not None and item.row is not None and grant.payment_id != item.row.id:
            grant = None  # it settled another row with the same provider id
        return _Facts(
            grant=grant,
            trouble=self._quarantined.get(external_id) if external_id else None,
            row=self._rows.get(item.row.id) if item.row else self._by_external.get(external_id, [None])[0],
            now=subscription and self._books.subscriptions[subscription.id],
            attempt=self._attempts.get(period),
            charges=self._charges(*period) if period else 0,
        )

    def _words(self, item: Item, facts: _Facts) -> list[str]:
        """What happened, in words for a reader."""
        words, grant, attempt = [], facts.grant, facts.attempt
        if grant is not None and grant.period_end is not None:
            words.append(
                f"{'subscription ' if grant.kind == 'created' else ''}{grant.kind}, until {grant.period_end:%Y-%m-%d}"
            )
        if item.row is not None or item.external_id is not None:
            words.append(f"payment {facts.row.status}" if facts.row else "no payment here")
        if item.subscription is not None:
            if facts.now.status != item.subscription.status:
                words.append(str(facts.now.status))
            if attempt is not None and attempt.state != "SUCCEEDED":
                reason = attempt.decline_reason or attempt.last_error or "sent, no answer"
                words.append(f"{attempt.state.lower()}: {reason}")
            elif attempt is not None and attempt.sends > 1:
                words.append(f"sent {attempt.sends} times, charged {'once' if facts.charges == 1 else facts.charges}")
            if not words and (reason := self._reported.get(f"subscription {item.subscription.id}")):
                words.append(f"not charged: {reason}")
        if facts.trouble is not None:
            words.append(f"quarantine: {facts.trouble.reason}")
        elif not grant and item.row and (reason := self._reported.get(f"payment {item.row.id}")):
            words.append(reason)
        return words

    def _charges(self, subscription_id: int, period_start: datetime) -> int:
        identity, start = str(subscription_id), period_start.isoformat()
        return sum(
            entry["kind"] == "charge"
            and entry["metadata"].get("subscription_id") == identity
            and entry["metadata"].get("period_start", "").startswith(start)
            for entry in self._books.ledger
        )
