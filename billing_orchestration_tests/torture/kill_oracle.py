"""The judge of the kill matrix: the provider's ledger against the service's tables, by plain SQL.

Written apart from the code under test on purpose: nothing of `billing_orchestration` but the sandbox's ledger is used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import psycopg
from psycopg.rows import namedtuple_row

from billing_orchestration.sandbox.provider.records import LedgerEntry


@dataclass(frozen=True)
class Expected:
    """What must be true in the end, said by hand.

    `ends`: subscription id -> (status, end). `payments`: payment row id -> status. `attempts`: subscription id -> the
    states of its attempts. `quarantine`: open kinds with how many of each. `bought`: users who must have one new
    subscription of a month each, and nobody else may. `unsettled`: renewals whose success is left to another job.
    """

    ends: Mapping[int, tuple[str, datetime]] = field(default_factory=dict)
    payments: Mapping[int, str] = field(default_factory=dict)
    attempts: Mapping[int, Sequence[str]] = field(default_factory=dict)
    quarantine: Mapping[str, int] = field(default_factory=dict)
    bought: Sequence[str] = ()
    refunds: int = 0
    unsettled: int = 0


def complaints(url: str, ledger: Sequence[LedgerEntry], expected: Expected) -> list[str]:
    """Everything that is wrong; empty when both sides' books agree and say what they should."""
    with psycopg.connect(url, row_factory=namedtuple_row) as connection:
        return [*_promise(connection, ledger, expected.unsettled), *_said(connection, expected)]


def _promise(connection: psycopg.Connection[Any], ledger: Sequence[LedgerEntry], unsettled: int) -> list[str]:
    """Whatever the data: nobody charged twice, nothing paid is lost, nothing granted unpaid."""
    wrong: list[str] = []
    charges = [entry for entry in ledger if entry.kind == "charge"]
    ours = [entry for entry in charges if "renewal_attempt_id" in entry.metadata]
    periods = Counter((entry.metadata["subscription_id"], entry.metadata["period_start"]) for entry in ours)
    wrong += [f"subscription {who} was charged {count} times for {when}" for (who, when), count in periods.items()
              if count > 1]  # fmt: skip
    by_id = {entry.payment_id: entry for entry in charges}
    settlements = connection.execute("SELECT * FROM billing_orchestration.settlements").fetchall()
    settled = {row.external_payment_id: row for row in settlements}
    in_review = {
        row.external_payment_id
        for row in connection.execute("SELECT * FROM billing_orchestration.quarantine WHERE resolved_at IS NULL")
    }
    lost = [e.payment_id for e in ours if e.payment_id not in settled and e.payment_id not in in_review]
    if len(lost) != unsettled:
        wrong.append(f"renewals {lost} were paid and are neither settled nor in quarantine, {unsettled} may be")
    rows = Counter(
        row.external_payment_id for row in connection.execute("SELECT * FROM payments WHERE status = 'SUCCEEDED'")
    )
    for payment_id, row in settled.items():
        if payment_id not in by_id:
            wrong.append(f"payment {payment_id} was settled as {row.kind} and never succeeded at the provider")
        elif (row.amount, row.currency) != (by_id[payment_id].amount, by_id[payment_id].currency):
            wrong.append(f"payment {payment_id} was settled with another amount than the ledger's")
        if row.kind != "refunded" and rows[payment_id] != 1:
            wrong.append(f"payment {payment_id} was settled and has {rows[payment_id]} SUCCEEDED rows")
    # One change of a subscription per settlement that grants, one settlement per change.
    grants = Counter(row.external_payment_id for row in settlements if row.kind != "refunded")
    audited = Counter(
        row.external_payment_id
        for row in connection.execute(
            "SELECT * FROM billing_orchestration.audit_trail"
            " WHERE entity = 'subscription' AND action IN ('renewed', 'extended', 'created')"
        )
    )
    if grants != audited:
        wrong.append(f"settlements and changed subscriptions differ: {grants} against {audited}")
    wrong += [f"subscription {row.subscription_id} has {row.n} live attempts for {row.period_start}"
              for row in connection.execute("""
                  SELECT subscription_id, period_start, count(*) AS n FROM billing_orchestration.renewal_attempts
                  WHERE state NOT IN ('DECLINED', 'STOPPED', 'REJECTED', 'VOID') GROUP BY 1, 2 HAVING count(*) > 1
              """)]  # fmt: skip
    return wrong


def _said(connection: psycopg.Connection[Any], expected: Expected) -> list[str]:
    wrong: list[str] = []
    subscriptions = {row.id: row for row in connection.execute("SELECT * FROM subscriptions")}
    for subscription_id, (status, end) in expected.ends.items():
        row = subscriptions[subscription_id]
        if (row.status, row.ended_at) != (status, end.replace(tzinfo=None)):
            wrong.append(
                f"subscription {subscription_id} is {row.status} until {row.ended_at}, not {status} until {end}"
            )
    created = [row for id_, row in subscriptions.items() if id_ not in expected.ends]
    if Counter(row.user_id for row in created) != Counter(expected.bought):
        wrong.append(f"subscriptions were created for {[row.user_id for row in created]}, not {expected.bought}")
    for row in created:
        a_month = row.started_at.replace(month=row.started_at.month + 1)
        if (row.status, row.ended_at) != ("ACTIVE", a_month):
            wrong.append(f"subscription {row.id} of {row.user_id} is {row.status}, {row.started_at} to {row.ended_at}")
    payments = {row.id: row.status for row in connection.execute("SELECT id, status FROM payments")}
    for payment_id, status in expected.payments.items():
        if payments[payment_id] != status:
            wrong.append(f"payment {payment_id} is {payments[payment_id]}, not {status}")
    states: dict[int, list[str]] = {}
    for row in connection.execute("SELECT * FROM billing_orchestration.renewal_attempts ORDER BY period_start, number"):
        states.setdefault(row.subscription_id, []).append(row.state)
    for subscription_id, attempts in expected.attempts.items():
        if states.get(subscription_id, []) != list(attempts):
            wrong.append(
                f"attempts of subscription {subscription_id} are {states.get(subscription_id)}, not {attempts}"
            )
    kinds = Counter(
        row.kind
        for row in connection.execute("SELECT kind FROM billing_orchestration.quarantine WHERE resolved_at IS NULL")
    )
    if kinds != Counter(expected.quarantine):
        wrong.append(f"quarantine holds {dict(kinds)}, not {dict(expected.quarantine)}")
    refunds = connection.execute(
        "SELECT count(*) AS n FROM billing_orchestration.settlements WHERE kind = 'refunded'"
    ).fetchone()
    if refunds is None or refunds.n != expected.refunds:
        wrong.append(f"{refunds} refunds recorded, not {expected.refunds}")
    return wrong
