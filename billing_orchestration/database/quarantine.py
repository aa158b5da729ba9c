"""The quarantine as a person works through it: read entries, close one with a resolution."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from billing_orchestration.database.audit import Change, Stamp, record_changes
from billing_orchestration.database.conventions import of_this_shop, sql_list
from billing_orchestration.database.second_look import holds_a_charge, is_in_hand
from billing_orchestration.domain.problem_kinds import (
    MENDED,
    METHOD_UNUSABLE,
    NO_CONTACT,
    NOT_WRITABLE,
    SECOND_SUCCESS,
    UNKNOWN_ATTEMPT,
    UNREADABLE,
    kind_of,
)

# A provider's record that cannot be read may hold anything.
_LONGEST_SUM = 40


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry. Open while `resolved_at` is None."""

    id: int
    problem_key: str
    kind: str
    reason: str
    external_payment_id: str | None
    payment_id: int | None
    subscription_id: int | None
    attempt_id: uuid.UUID | None
    evidence: Mapping[str, Any]
    job: str
    run_id: str
    opened_at: datetime
    resolved_at: datetime | None
    resolution: str | None
    resolution_reason: str | None
    resolved_by: str | None

    @property
    def subject(self) -> str:
        """What the problem is about: "payment …", "subscription 12", "job …"."""
        return self.problem_key.removesuffix(f":{self.kind}")

    @property
    def provider_sum(self) -> str:
        """The provider's amount with its currency, as its record in the evidence has it; empty without one."""
        item = self.evidence.get("item")
        amount = item.get("amount") if isinstance(item, Mapping) else None
        if isinstance(amount, Mapping):
            amount = f"{amount.get('value')} {amount.get('currency')}"
        return amount[:_LONGEST_SUM] if isinstance(amount, str) else ""

    @property
    def about_books(self) -> bool:
        """Whether it is about books that differ, and not about a grant: reconciliation opened it."""
        return "books" in self.evidence

    @property
    def attachable(self) -> bool:
        """Whether a person may attach it to a subscription."""
        return bool(kind_of(self.kind).attach) and self.about_provider_payment and not self.about_books

    @property
    def about_provider_payment(self) -> bool:
        """Whether it is about a payment at the provider, rather than a row that could not be written."""
        about_a_row = self.kind == NOT_WRITABLE and self.payment_id is not None
        return self.external_payment_id is not None and not about_a_row


_SELECT = """
    SELECT id, problem_key, kind, reason, external_payment_id, payment_id, subscription_id, attempt_id, evidence, job,
           run_id, opened_at, resolved_at, resolution, resolution_reason, resolved_by
    FROM billing_orchestration.quarantine
"""


def _entries(connection: sa.Connection, rest: str, **values: Any) -> list[Entry]:
    return [Entry(*row) for row in connection.execute(sa.text(_SELECT + rest), values)]


def open_entries(connection: sa.Connection, limit: int | None = None) -> list[Entry]:
    """What waits for a person, oldest first."""
    return _entries(connection, "WHERE resolved_at IS NULL ORDER BY id LIMIT :limit", limit=limit)


def all_entries(connection: sa.Connection) -> list[Entry]:
    """Every entry, resolved ones too, oldest first."""
    return _entries(connection, "ORDER BY id")


def entries_since(connection: sa.Connection, last_id: int, limit: int) -> list[Entry]:
    """Open entries that are newer than the one with this id, oldest first."""
    return _entries(
        connection, "WHERE id > :last_id AND resolved_at IS NULL ORDER BY id LIMIT :limit", last_id=last_id, limit=limit
    )


_SUMS = sa.text("""
    SELECT q.id, concat_ws(' ', coalesce(p.amount, a.amount), coalesce(p.currency::text, a.currency::text)) AS money
    FROM billing_orchestration.quarantine q
    LEFT JOIN payments p ON p.id = q.payment_id
    LEFT JOIN billing_orchestration.renewal_attempts a ON a.id = q.attempt_id
    WHERE q.id = ANY(:ids)
""")


def sums_of(connection: sa.Connection, entries: Sequence[Entry]) -> dict[int, str]:
    """By entry: how much money it is about, as the provider says, else as the payment's row or the attempt does."""
    ours = {row.id: str(row.money) for row in connection.execute(_SUMS, {"ids": [entry.id for entry in entries]})}
    return {entry.id: entry.provider_sum or ours.get(entry.id, "") for entry in entries}


_OPEN_AND_LAST = sa.text("""
    SELECT count(*) AS open, coalesce(max(id), 0) AS last
    FROM billing_orchestration.quarantine WHERE resolved_at IS NULL
""")


def count_and_last(connection: sa.Connection) -> tuple[int, int]:
    """How many entries are open, and the newest open one's id (0: none)."""
    row = connection.execute(_OPEN_AND_LAST).one()
    return int(row.open), int(row.last)


def read_entry(connection: sa.Connection, entry_id: int, *, lock: bool = False) -> Entry | None:
    """One entry, open or resolved; with `lock`, held until the transaction ends."""
    return next(iter(_entries(connection, f"WHERE id = :id {'FOR UPDATE' if lock else ''}", id=entry_id)), None)


_CLOSE = sa.text("""
    UPDATE billing_orchestration.quarantine
    SET resolved_at = :at, resolution = :resolution, resolution_reason = :reason, resolved_by = :by
    WHERE id = :id AND resolved_at IS NULL
""")


def close_entry(connection: sa.Connection, stamp: Stamp, entry: Entry, resolution: str, reason: str, by: str) -> bool:
    """Close an open entry, with the audit trail. False: it was closed meanwhile."""
    bound = {"at": stamp.at, "resolution": resolution, "reason": reason, "by": by, "id": entry.id}
    closed = connection.execute(_CLOSE, bound).rowcount
    if closed:
        record_changes(
            connection,
            stamp,
            [
                Change(
                    "quarantine",
                    str(entry.id),
                    resolution,
                    f"{by}: {reason}",
                    old={"resolution": None},
                    new={"resolution": resolution, "resolved_by": by},
                    external_payment_id=entry.external_payment_id,
                )
            ],
        )
    return bool(closed)


_ALONE = sa.text(f"""
    SELECT DISTINCT q.external_payment_id
    FROM billing_orchestration.quarantine q
    JOIN billing_orchestration.renewal_attempts a ON a.id = q.attempt_id
    WHERE q.kind = '{SECOND_SUCCESS}' AND q.resolved_at IS NULL AND q.external_payment_id IS NOT NULL
      AND {of_this_shop("a.payment_provider_id")} AND NOT EXISTS (
          SELECT FROM billing_orchestration.renewal_attempts r
          WHERE r.subscription_id = a.subscription_id AND r.period_start = a.period_start AND {is_in_hand("r")})
    ORDER BY 1
""")


_DOUBTFUL = sa.text(f"""
    SELECT DISTINCT q.external_payment_id FROM billing_orchestration.quarantine q
    WHERE (q.kind = '{UNREADABLE}' OR (q.kind = '{UNKNOWN_ATTEMPT}' AND jsonb_exists(q.evidence, 'unfinished')))
      AND q.external_payment_id IS NOT NULL AND {holds_a_charge("q")}
    ORDER BY 1
""")
_OF_PAYMENTS = f"""
    WHERE kind IN {sql_list(UNREADABLE, UNKNOWN_ATTEMPT)} AND external_payment_id = ANY(:ids) AND resolved_at IS NULL
    ORDER BY id FOR UPDATE
"""


def doubtful_charges(connection: sa.Connection) -> list[str]:
    """The payments that hold a charge, for nobody knows yet whether they are paid."""
    return list(connection.execute(_DOUBTFUL).scalars())


def close_canceled(connection: sa.Connection, stamp: Stamp, payment_ids: Sequence[str]) -> int:
    """Close what is open about these payments, which the provider says are canceled. Returns how many entries."""
    reason = "the provider says that it is canceled: no money moved"
    entries = _entries(connection, _OF_PAYMENTS, ids=list(payment_ids))
    return sum(close_entry(connection, stamp, entry, MENDED, reason, stamp.job) for entry in entries)


def successes_left_alone(connection: sa.Connection) -> list[str]:
    """The payments of open `second_success` entries beside which nothing else has paid their period, or still may."""
    return list(connection.execute(_ALONE).scalars())


_REACHABLE = f"""
    WHERE subscription_id = ANY(:ids) AND kind IN {sql_list(NO_CONTACT, METHOD_UNUSABLE)} AND resolved_at IS NULL
    ORDER BY id FOR UPDATE
"""
_OVER = f"""
    WHERE kind = '{METHOD_UNUSABLE}' AND resolved_at IS NULL AND NOT EXISTS (
        SELECT FROM subscriptions s WHERE s.id = subscription_id AND s.status = 'ACTIVE')
    ORDER BY id FOR UPDATE
"""


def close_reachable(connection: sa.Connection, stamp: Stamp, subscription_ids: Sequence[int]) -> int:
    """Close what stood in the way of charging these subscriptions, and what asked for a method of one that is over.

    Returns how many.
    """
    charged = f"nothing stands in the way of its charge any more: run {stamp.run_id}"
    closing = [(entry, charged) for entry in _entries(connection, _REACHABLE, ids=list(subscription_ids))]
    closing += [(entry, "the subscription is no longer ACTIVE") for entry in _entries(connection, _OVER)]
    return sum(close_entry(connection, stamp, entry, MENDED, reason, stamp.job) for entry, reason in closing)
