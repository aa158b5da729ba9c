"""Settling provider payments into the service's books: the one function behind all five jobs.

`settle_batch` reads the facts under lock, lets `domain.settlement` decide each payment, and writes every decision with
its audit trail. It is set-based: a batch of one and a batch of two hundred take the same handful of statements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from billing_orchestration.database.attempts import insert_lost
from billing_orchestration.database.audit import (
    CLOSE_SETTLED,
    Problem,
    Stamp,
    change_rows,
    in_words_of,
    open_problems,
    record_healed,
    to_json,
)
from billing_orchestration.database.conventions import naive_utc
from billing_orchestration.database.errors import NotAsMeant
from billing_orchestration.database.settlement_rows import Rows, new_subscription, problem_of, subscription_of
from billing_orchestration.database.settling_facts import ChangedMeanwhile, read_facts
from billing_orchestration.domain.billing_calendar import BillingCalendar
from billing_orchestration.domain.problem_kinds import FOR_A_PERSON, KINDS, REJECTED
from billing_orchestration.domain.provider_payment import ProviderPayment
from billing_orchestration.domain.settlement import decide_settlement
from billing_orchestration.domain.settlement_decisions import (
    CloseAsGranted,
    RecordRefund,
    Ruling,
    Settle,
    SettlementDecision,
)

# What a successful settling proves to be gone.
_HEALED = [kind for kind in KINDS if kind not in FOR_A_PERSON]


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of one payment. `subscription_id` and `payment_row_id` where there are such;
    `newly_opened`: the quarantine did not know its problem (or a grant's notice) yet."""

    payment: ProviderPayment
    decision: SettlementDecision
    subscription_id: int | None = None
    payment_row_id: int | None = None
    newly_opened: bool = False


def settle_batch(
    connection: sa.Connection,
    batch: Sequence[ProviderPayment],
    *,
    stamp: Stamp,
    calendar: BillingCalendar,
    is_live: bool,
    rulings: Mapping[str, Ruling] | None = None,
) -> list[Settled]:
    """Settle succeeded provider payments in the caller's transaction; one result each, in the batch's order.

    `rulings`: what a person said, by the provider's payment id.

    What moves: nothing at the provider; a grant (a period of a subscription) in the service's books.
    Locks: the users named, then the payment rows, attempts and subscriptions; every precondition is read under them.
    Idempotent by the provider's payment id: `settlements` has it as its primary key, so a payment that was settled in
    another transaction is found settled, and one that is being settled is waited for. Killed before the caller's
    commit: nothing of the batch is written. Ids must be distinct; payments of one user belong in different batches.
    Raises ChangedMeanwhile, NotAsMeant (or another database error) for the whole batch: settle its payments one at a
    time then.
    """
    if not batch:
        return []
    decisions = _decide(connection, batch, stamp, calendar, is_live=is_live, rulings=rulings or {})
    _refuse_collisions(decisions)
    created = _create_subscriptions(connection, stamp, decisions)
    rows = Rows(stamp.at)
    for decision in decisions:
        rows.add(decision, subscription_of(decision, created))
    finish_payments(connection, stamp, rows.finished)
    _void_attempts(connection, stamp, rows)
    _insert_lost_attempts(connection, stamp, rows)
    _save_methods(connection, rows)
    payment_rows = _write(connection, stamp, rows)
    problems = {decision.payment.id: problem_of(decision) for decision in decisions}
    opened = open_problems(connection, stamp, [problem for problem in problems.values() if problem is not None])
    return [
        Settled(
            payment=decision.payment,
            decision=decision,
            subscription_id=subscription_of(decision, created),
            payment_row_id=payment_rows.get(decision.payment.id),
            newly_opened=(problem := problems[decision.payment.id]) is not None and problem.key in opened,
        )
        for decision in decisions
    ]


def preview_batch(
    connection: sa.Connection,
    batch: Sequence[ProviderPayment],
    *,
    stamp: Stamp,
    calendar: BillingCalendar,
    is_live: bool,
) -> list[Settled]:
    """What `settle_batch` would decide, with nothing written: for a dry run. The caller rolls its transaction back."""
    decisions = _decide(connection, batch, stamp, calendar, is_live=is_live, rulings={}) if batch else []
    return [Settled(decision.payment, decision) for decision in decisions]


def _decide(
    connection: sa.Connection,
    batch: Sequence[ProviderPayment],
    stamp: Stamp,
    calendar: BillingCalendar,
    *,
    is_live: bool,
    rulings: Mapping[str, Ruling],
) -> list[SettlementDecision]:
    facts = read_facts(connection, batch, rulings)
    return [
        decide_settlement(
            payment,
            facts[payment.id],
            now=stamp.at,
            calendar=calendar,
            is_live=is_live,
            ruling=rulings.get(payment.id),
        )
        for payment in batch
    ]


def _refuse_collisions(decisions: Sequence[SettlementDecision]) -> None:
    seen: set[tuple[str, Any]] = set()
    for decision in decisions:
        keys: list[tuple[str, Any]] = [("payment", decision.payment.id)]
        if isinstance(decision, Settle):
            keys.append(("subscription", decision.subscription.id) if decision.subscription else
                        ("purchase", (decision.user_id, decision.plan_id)))  # fmt: skip
        if isinstance(decision, (Settle, RecordRefund, CloseAsGranted)) and decision.attempt is not None:
            keys.append(("attempt", decision.attempt.id))
        for key in keys:
            if key in seen:
                raise ChangedMeanwhile(f"two payments of one batch want the same {key[0]} ({key[1]})")
            seen.add(key)


# A column may hold whole seconds only.
_ABOUT = "BETWEEN interval '-1 second' AND interval '1 second'"
_CREATE_SUBSCRIPTIONS = f"""
    WITH wanted AS (
        SELECT * FROM jsonb_to_recordset(CAST(%(rows)s AS jsonb)) AS x (
            number int, user_id text, status text, started_at timestamp, ended_at timestamp, plan_id bigint,
            created_at timestamp, updated_at timestamp)
    ), created AS (
        INSERT INTO subscriptions (user_id, status, started_at, ended_at, plan_id, created_at, updated_at)
        SELECT user_id, status::subscriptionstatusenum, started_at, ended_at, plan_id, created_at, updated_at
        FROM wanted ORDER BY number
        RETURNING id, user_id, status::text AS status, started_at, ended_at, plan_id
    )
    -- No two of a batch are for one user and plan.
    SELECT w.number, c.id FROM created c JOIN wanted w USING (user_id, plan_id, status)
    WHERE c.started_at - w.started_at {_ABOUT} AND c.ended_at - w.ended_at {_ABOUT}
"""


def _create_subscriptions(
    connection: sa.Connection, stamp: Stamp, decisions: Sequence[SettlementDecision]
) -> dict[str, int]:
    """Create the subscriptions of new customers; return their ids by provider payment id. Raises NotAsMeant."""
    grants = [decision for decision in decisions if isinstance(decision, Settle) and decision.subscription is None]
    if not grants:
        return {}
    rows = [
        {
            "number": number,
            **{
                name: naive_utc(value) if isinstance(value, datetime) else value
                for name, value in new_subscription(grant, stamp.at).items()
            },
        }
        for number, grant in enumerate(grants)
    ]
    created = connection.exec_driver_sql(_CREATE_SUBSCRIPTIONS, {"rows": to_json(rows)}).all()
    if len(created) != len(grants):
        raise NotAsMeant("a new subscription")
    return {grants[number].payment.id: id_ for number, id_ in created}


_FINISH_PAYMENT = """
    WITH finished AS (
        UPDATE payments p
        SET status = x.status::paymentstatusenum, subscription_id = coalesce(x.subscription_id, p.subscription_id),
            payment_method = coalesce(x.payment_method::paymentmethodsenum, p.payment_method),
            updated_at = %(naive_at)s, amount = coalesce(x.amount, p.amount),
            currency = coalesce(x.currency::currencyenum, p.currency)
        FROM jsonb_to_recordset(CAST(%(rows)s AS jsonb)) AS x (
            id bigint, status text, old_status text, subscription_id bigint, payment_method text, amount numeric(8,2),
            currency text)
        WHERE p.id = x.id AND p.status::text IS NOT DISTINCT FROM x.old_status
        RETURNING p.status::text = x.status
                  AND (x.subscription_id IS NULL OR p.subscription_id = x.subscription_id)
                  AND (x.amount IS NULL OR (p.amount = x.amount AND p.currency::text = x.currency)) AS as_meant
    )
    SELECT count(*) FILTER (WHERE as_meant) FROM finished
"""


def finish_payments(connection: sa.Connection, stamp: Stamp, rows: Sequence[Mapping[str, Any]]) -> None:
    """Give payment rows a status, as in `Rows.finished`. They were read under lock. Raises NotAsMeant."""
    if not rows:
        return
    bound = {"rows": to_json(rows), "naive_at": naive_utc(stamp.at)}
    finished = connection.exec_driver_sql(_FINISH_PAYMENT, bound).scalar_one()
    if finished != len(rows):
        raise NotAsMeant("a payment row")


_CLOSE_ATTEMPTS = """
    UPDATE billing_orchestration.renewal_attempts a
    SET state = x.state, external_payment_id = coalesce(x.external_payment_id, a.external_payment_id),
        last_error = x.reason, closed_at = %(at)s
    FROM jsonb_to_recordset(CAST(%(closings)s AS jsonb)) AS x (
        id uuid, state text, old_state text, external_payment_id text, reason text)
    WHERE a.id = x.id AND a.state = x.old_state
"""


def _void_attempts(connection: sa.Connection, stamp: Stamp, rows: Rows) -> None:
    """Close the attempts that give way, before others end: a period has one live attempt at most (a unique index).

    Raises ChangedMeanwhile.
    """
    if not rows.voids:
        return
    bound = {"closings": to_json(in_words_of(connection, rows.voids)), "at": stamp.at}
    voided = connection.exec_driver_sql(_CLOSE_ATTEMPTS, bound).rowcount
    if voided != len(rows.voids):
        raise ChangedMeanwhile(f"{len(rows.voids)} attempts were to be voided, {voided} could be")


def _insert_lost_attempts(connection: sa.Connection, stamp: Stamp, rows: Rows) -> None:
    """Write the attempts that were rebuilt from their payments, before they end. Raises ChangedMeanwhile."""
    if not rows.recreated:
        return
    inserted = insert_lost(connection, stamp, rows.recreated)
    if inserted != len(rows.recreated):
        raise ChangedMeanwhile(f"{len(rows.recreated)} lost attempts were to be written, {inserted} could be")


_SAVE_METHODS = sa.text("""
    INSERT INTO billing_orchestration.saved_methods
        (subscription_id, payment_method_id, currency, payment_provider_id, saved_by_external_payment_id, saved_at)
    SELECT x.subscription_id, x.payment_method_id, x.currency, x.payment_provider_id, x.external_payment_id, x.saved_at
    FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS x (
        subscription_id bigint, payment_method_id text, currency text, payment_provider_id bigint,
        external_payment_id text, saved_at timestamptz)
    ON CONFLICT (subscription_id) DO UPDATE
    SET payment_method_id = excluded.payment_method_id, currency = excluded.currency,
        payment_provider_id = excluded.payment_provider_id,
        saved_by_external_payment_id = excluded.saved_by_external_payment_id, saved_at = excluded.saved_at
    -- A purchase that is settled late does not bring an older card back.
    WHERE saved_methods.saved_at <= excluded.saved_at
""")


def _save_methods(connection: sa.Connection, rows: Rows) -> None:
    """Keep the method that a purchase brings for its subscription."""
    if rows.methods:
        connection.execute(_SAVE_METHODS, {"rows": to_json(rows.methods)})


# Everything that a batch changes, in one statement: a batch spends more time on round trips than on the work itself.
# What it updates was locked and read before; each part repeats its precondition and returns how many rows are now as
# they were meant. The provider's ids of a batch are distinct, so a new payment row is found by its own.
_WRITE = f"""
    WITH wanted AS (
        SELECT * FROM jsonb_to_recordset(CAST(%(payments)s AS jsonb)) AS x (
            number int, subscription_id bigint, payment_provider_id bigint, payment_method text, status text,
            currency text, amount numeric(8,2), external_payment_id text, created_at timestamp, updated_at timestamp)
    ), paid AS (
        INSERT INTO payments (subscription_id, payment_provider_id, payment_method, status, currency, amount,
                              external_payment_id, created_at, updated_at)
        SELECT x.subscription_id, x.payment_provider_id, x.payment_method::paymentmethodsenum,
               x.status::paymentstatusenum, x.currency::currencyenum, x.amount, x.external_payment_id, x.created_at,
               x.updated_at
        FROM wanted x ORDER BY x.number
        RETURNING external_payment_id, id, subscription_id, status, amount, currency
    ), settled AS (
        INSERT INTO billing_orchestration.settlements
            (external_payment_id, kind, payment_id, subscription_id, attempt_id, user_id, plan_id, amount, currency,
             period_start, period_end, settled_at, run_id)
        SELECT x.external_payment_id, x.kind, coalesce(x.payment_id, paid.id), x.subscription_id, x.attempt_id,
               x.user_id, x.plan_id, x.amount, x.currency, x.period_start, x.period_end, %(at)s, %(run_id)s
        FROM jsonb_to_recordset(CAST(%(settlements)s AS jsonb)) AS x (
            external_payment_id text, kind text, payment_id bigint, subscription_id bigint, attempt_id uuid,
            user_id text, plan_id bigint, amount numeric(8,2), currency text, period_start timestamp,
            period_end timestamp)
        LEFT JOIN paid ON x.payment_id IS NULL AND paid.external_payment_id = x.external_payment_id
        WHERE coalesce(x.payment_id, paid.id) IS NOT NULL
    ), noted AS (
        INSERT INTO billing_orchestration.audit_trail
            (at, job, run_id, entity, entity_id, action, old, new, reason, external_payment_id)
        SELECT %(at)s, %(job)s, %(run_id)s, x.entity, coalesce(x.entity_id, CAST(paid.id AS text)), x.action, x.old,
               x.new, x.reason, x.external_payment_id
        FROM jsonb_to_recordset(CAST(%(changes)s AS jsonb)) AS x (
            number int, entity text, entity_id text, action text, old jsonb, new jsonb, reason text,
            external_payment_id text)
        LEFT JOIN paid ON x.entity_id IS NULL AND paid.external_payment_id = x.external_payment_id
        WHERE coalesce(x.entity_id, CAST(paid.id AS text)) IS NOT NULL
        ORDER BY x.number
    ), healed AS (
        -- The open problems of these payments, of the kinds that are gone by their settlement, and the refused charges
        -- of the subscriptions that they pay for.
        {CLOSE_SETTLED}
    ), closed AS (
        {_CLOSE_ATTEMPTS}
        RETURNING a.id
    ), extended AS (
        UPDATE subscriptions s
        SET ended_at = x.ended_at, updated_at = %(naive_at)s,
            status = CASE WHEN x.reactivate THEN 'ACTIVE'::subscriptionstatusenum ELSE s.status END
        FROM jsonb_to_recordset(CAST(%(extensions)s AS jsonb)) AS x (
            id bigint, ended_at timestamp, old_ended_at timestamp, old_status text, reactivate boolean)
        WHERE s.id = x.id AND s.ended_at = x.old_ended_at AND s.status::text IS NOT DISTINCT FROM x.old_status
        RETURNING s.ended_at - x.ended_at {_ABOUT}
                  AND s.status::text IS NOT DISTINCT FROM CASE WHEN x.reactivate THEN 'ACTIVE' ELSE x.old_status END
                  AS as_meant
    )
    SELECT 'paid' AS what, paid.id, paid.external_payment_id
    FROM paid JOIN wanted USING (external_payment_id)
    WHERE paid.subscription_id IS NOT DISTINCT FROM wanted.subscription_id AND paid.status::text = wanted.status
      AND paid.amount = wanted.amount AND paid.currency::text = wanted.currency
    UNION ALL SELECT 'healed', id, external_payment_id FROM healed
    UNION ALL SELECT 'closed', count(*), NULL FROM closed
    UNION ALL SELECT 'extended', count(*) FILTER (WHERE as_meant), NULL FROM extended
"""


def _write(connection: sa.Connection, stamp: Stamp, rows: Rows) -> dict[str, int]:
    """Write the rest of it; return the ids of all settled payment rows by provider payment id.

    Raises ChangedMeanwhile when an attempt is not what it was, NotAsMeant when the service's rows are not what was
    written: the caller's transaction must be rolled back then.
    """
    if not (rows.changes or rows.settlements):
        return {}
    written = connection.exec_driver_sql(
        _WRITE,
        {
            "payments": to_json(rows.payments),
            "settlements": to_json(rows.settlements),
            "changes": to_json(change_rows(connection, rows.changes)),
            "closings": to_json(in_words_of(connection, rows.closings)),
            "extensions": to_json(rows.extensions),
            "ids": [row["external_payment_id"] for row in rows.settlements],
            "kinds": _HEALED,
            "problem_keys": [
                Problem(f"subscription {row['subscription_id']}", REJECTED, "").key
                for row in rows.settlements
                if row["kind"] != "refunded"
            ],
            "at": stamp.at,
            "naive_at": naive_utc(stamp.at),
            "job": stamp.job,
            "run_id": stamp.run_id,
        },
    )
    payment_rows = {row["external_payment_id"]: row["payment_id"] for row in rows.settlements if row["payment_id"]}
    healed: list[tuple[int, str | None]] = []
    new_rows = 0
    for what, number, payment_id in written:
        if what == "paid":
            payment_rows[payment_id] = number
            new_rows += 1
        elif what == "healed":
            healed.append((number, payment_id))
        elif what == "closed" and number != len(rows.closings):
            raise ChangedMeanwhile(f"{len(rows.closings)} attempts were to be closed, {number} could be")
        elif what == "extended" and number != len(rows.extensions):
            raise NotAsMeant("the subscription's new end")
    if new_rows != len(rows.payments):
        raise NotAsMeant("a new payment row")
    record_healed(connection, stamp, healed)
    return payment_rows
