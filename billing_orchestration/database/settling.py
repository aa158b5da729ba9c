"""Settling provider payments into the service's books: the one function behind all five jobs (SPEC 4).

`settle_batch` reads the facts under lock, lets `domain.settlement` decide each payment, and writes every decision with
its audit trail. It is set-based: a batch of one and a batch of two hundred take the same handful of statements.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import sqlalchemy as sa

from billing_orchestration.database.attempts import ATTEMPT_COLUMNS, attempt_of_raw
from billing_orchestration.database.audit import (
    CLOSE_SETTLED,
    Change,
    Problem,
    Stamp,
    change_rows,
    evidence_of,
    open_problems,
    record_healed,
    to_json,
)
from billing_orchestration.database.errors import DatabaseBusy
from billing_orchestration.database.tables import naive_utc, readable
from billing_orchestration.database.tables import subscriptions as subscriptions_table
from billing_orchestration.domain.billing_calendar import BillingCalendar
from billing_orchestration.domain.money import Money
from billing_orchestration.domain.provider_payment import ProviderPayment
from billing_orchestration.domain.renewals import SCAN_MARGIN, Attempt, State
from billing_orchestration.domain.settlement import (
    CloseAsGranted,
    Facts,
    PaymentRow,
    PlanRow,
    Quarantine,
    RecordRefund,
    Ruling,
    Settle,
    SettlementDecision,
    SubscriptionRow,
    decide_settlement,
    metadata_int,
    metadata_user,
    named_attempt_id,
)

# Problems that a later, successful settling proves to be gone. The others (a second success) stay for a person.
HEALING_KINDS = (
    "amount_differs", "canceled_here", "foreign_metadata", "metadata", "no_end", "period", "status_unknown",
    "subscription_gone", "test_payment", "unclear_grant", "unknown_attempt", "unreadable", "not_writable",
)  # fmt: skip


class ChangedMeanwhile(DatabaseBusy):
    """A row is not what it was when it was read under lock, or two payments of a batch want the same row.

    Nothing of the batch was written. Settling its payments one at a time decides each of them anew.
    """


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of one payment. `subscription_id` and `payment_row_id` where there are such;
    `newly_opened`: the quarantine did not know its problem (or a grant's notice) yet."""

    payment: ProviderPayment
    decision: SettlementDecision
    subscription_id: int | None = None
    payment_row_id: int | None = None
    newly_opened: bool = False


_LOCK_USERS = """
    SELECT count(pg_advisory_xact_lock(key)) FROM (
        SELECT DISTINCT hashtextextended('billing_orchestration/user/' || name, 0) AS key
        FROM unnest(CAST(%(names)s AS text[])) AS name ORDER BY key
    ) AS keys
"""

# Statements of the hot path are handed to the driver as they are: compiling and caching them costs SQLAlchemy as much
# as the driver needs to send them. Each takes a constant text, so that the server plans it once for a connection.

# The payment rows, locked, and with them what our own books say about the same ids.
_ROWS = """
    WITH held AS (
        SELECT id, subscription_id, payment_provider_id, status::text AS status, amount,
               currency::text AS currency, external_payment_id
        FROM payments WHERE external_payment_id = ANY(%(ids)s) ORDER BY id FOR NO KEY UPDATE
    )
    SELECT 'row' AS what, external_payment_id, status AS word, id, subscription_id, payment_provider_id, amount,
           currency
    FROM held
    UNION ALL
    SELECT 'settled', external_payment_id, kind, NULL, NULL, NULL, NULL, NULL
    FROM billing_orchestration.settlements WHERE external_payment_id = ANY(%(ids)s)
    UNION ALL
    SELECT DISTINCT 'set aside', external_payment_id, NULL, CAST(NULL AS int), CAST(NULL AS int), CAST(NULL AS int),
           CAST(NULL AS numeric), NULL
    FROM billing_orchestration.quarantine
    -- An entry about a row of the service's (its expiry was refused) says nothing about the provider's payment.
    WHERE external_payment_id = ANY(%(ids)s) AND resolution = 'ignored'
      AND NOT (kind = 'not_writable' AND payment_id IS NOT NULL)
"""

# The named attempts and all others of their periods.
_PERIODS = f"""
    SELECT {", ".join(column.name for column in ATTEMPT_COLUMNS)}
    FROM billing_orchestration.renewal_attempts
    WHERE (subscription_id, period_start) IN (
        SELECT subscription_id, period_start FROM billing_orchestration.renewal_attempts WHERE id = ANY(%(ids)s))
    ORDER BY subscription_id, period_start, number FOR UPDATE
"""

# An end that Python has no datetime for ('infinity') reads as none: nothing can be added to it.
_SUBSCRIPTIONS = f"""
    SELECT s.id, s.user_id, s.plan_id, s.status::text AS status,
           {readable("s.started_at")} AS started_at, {readable("s.ended_at")} AS ended_at
    FROM subscriptions s
    WHERE s.id IN (
        SELECT unnest(CAST(%(ids)s AS int[]))
        UNION
        SELECT a.id FROM subscriptions a
        JOIN (SELECT * FROM unnest(CAST(%(users)s AS text[]), CAST(%(plans)s AS int[])) AS w (user_id, plan_id)) w
          ON a.user_id = w.user_id AND a.plan_id = w.plan_id
        WHERE a.status = 'ACTIVE')
    ORDER BY s.id FOR NO KEY UPDATE OF s
"""

# What is read last, when everything is locked: the payment rows once more, and what no transaction of ours changes.
_BESIDE = """
    SELECT 'row' AS what, id, NULL AS duration, NULL AS duration_unit
    FROM payments WHERE external_payment_id = ANY(%(ids)s)
    UNION ALL
    SELECT 'plan', id, duration, duration_unit FROM plans WHERE id = ANY(CAST(%(plans)s AS int[]))
    UNION ALL
    SELECT 'provider', id, CAST(NULL AS int), NULL FROM payment_providers
"""


# Our clock and the service's may differ, so a grant of half an hour before the send counts as one after it.
_PAID_MEANWHILE = sa.text("""
    SELECT DISTINCT x.external_payment_id
    FROM unnest(
        CAST(:ids AS text[]), CAST(:subscriptions AS int[]), CAST(:methods AS text[]), CAST(:since AS timestamp[]))
        AS x (external_payment_id, subscription_id, payment_method_id, since)
    JOIN payments p ON p.subscription_id = x.subscription_id
    WHERE p.status IN ('SUCCEEDED', 'REFUNDED') AND p.updated_at >= x.since
      AND p.external_payment_id IS DISTINCT FROM x.external_payment_id
      -- The purchase that saved the method came long before, whenever its row was touched last.
      AND p.external_payment_id IS DISTINCT FROM x.payment_method_id
""")


def lock_users(connection: sa.Connection, batch: Sequence[ProviderPayment]) -> None:
    """Take the users' locks of these payments, for the rest of the transaction: nobody else settles for them."""
    lock_user_names(connection, [metadata_user(payment) or f"payment {payment.id}" for payment in batch])


def lock_user_names(connection: sa.Connection, names: Sequence[str]) -> None:
    """The same by name: a user's, or "payment ID" for a payment that names no user."""
    connection.exec_driver_sql(_LOCK_USERS, {"names": sorted(set(names))})


def _read_facts(
    connection: sa.Connection, batch: Sequence[ProviderPayment], rulings: Mapping[str, Ruling]
) -> dict[str, Facts]:
    """Everything that decides about each payment of the batch, read under lock.

    Users, payment rows, attempts, subscriptions: locked always in that order and each sorted, so that two settlers
    wait for each other instead of deadlocking. Raises ChangedMeanwhile when the service writes a payment row in
    between.
    """
    ids = [payment.id for payment in batch]
    users = {payment.id: metadata_user(payment) for payment in batch}
    lock_users(connection, batch)
    settled_as: dict[str, str] = {}
    set_aside: set[str] = set()
    rows: dict[str, list[PaymentRow]] = {}
    found = connection.exec_driver_sql(_ROWS, {"ids": ids})
    for what, payment_id, word, row_id, subscription_id, provider_id, amount, currency in found:
        if what == "row":
            money = Money(amount, currency) if currency is not None else None
            row = PaymentRow(row_id, subscription_id, provider_id, word, money, payment_id)
            rows.setdefault(payment_id, []).append(row)
        elif what == "settled":
            settled_as[payment_id] = word
        else:
            set_aside.add(payment_id)
    for of_one in rows.values():
        of_one.sort(key=lambda row: row.id)
    named = {payment.id: named_attempt_id(payment) for payment in batch}
    attempts = _read_periods(connection, [id_ for id_ in named.values() if id_ is not None])
    periods: dict[tuple[int, datetime], list[Attempt]] = {}
    for attempt in attempts.values():
        periods.setdefault((attempt.subscription_id, attempt.period_start), []).append(attempt)
    subscription_ids = {row.subscription_id for of_one in rows.values() for row in of_one}
    subscription_ids |= {attempt.subscription_id for attempt in attempts.values()}
    attached = {ruling.attach_to for ruling in rulings.values() if ruling.attach_to is not None}
    subscription_ids |= attached
    wanted = sorted(
        {
            (user, plan)
            for payment in batch
            if (user := users[payment.id]) is not None and (plan := metadata_int(payment, "plan_id")) is not None
        }
    )
    subscriptions = {
        row[0]: SubscriptionRow(row[0], row[1], row[2], row[3], _utc(row[4]), _utc(row[5]))
        for row in connection.exec_driver_sql(
            _SUBSCRIPTIONS,
            {
                "ids": sorted(id_ for id_ in subscription_ids if id_ is not None),
                "users": [user for user, _ in wanted],
                "plans": [plan for _, plan in wanted],
            },
        )
    }
    plan_ids = {plan for _, plan in wanted} | {attempt.plan_id for attempt in attempts.values()}
    plan_ids |= {row.plan_id for row in subscriptions.values() if row.id in attached and row.plan_id is not None}
    appeared: set[int] = set()
    plans: dict[int, PlanRow] = {}
    providers: set[int] = set()
    for what, id_, duration, unit in connection.exec_driver_sql(_BESIDE, {"ids": ids, "plans": sorted(plan_ids)}):
        if what == "row":
            appeared.add(id_)
        elif what == "plan":
            plans[id_] = PlanRow(id_, duration, unit)
        else:
            providers.add(id_)
    appeared -= {row.id for of_one in rows.values() for row in of_one}
    if appeared:
        # The service's webhook writes a row and extends the subscription in one transaction. Its new row cannot be
        # waited for, the subscription can: when that wait is over, the row is there, and its period must not be
        # granted again.
        raise ChangedMeanwhile(f"payment rows of this batch appeared while it was read: {sorted(appeared)}")
    provider_ids = frozenset(providers)
    written_by_service: dict[str, Attempt] = {}
    for payment_id, name in named.items():
        if name is not None and name in attempts and any(row.status == "SUCCEEDED" for row in rows.get(payment_id, ())):
            written_by_service[payment_id] = attempts[name]
    paid_meanwhile = _read_paid_meanwhile(connection, written_by_service)
    facts: dict[str, Facts] = {}
    for payment in batch:
        named_id = named[payment.id]
        its_attempt = None if named_id is None else attempts.get(named_id)
        rivals = [] if its_attempt is None else [
            other
            for other in periods[its_attempt.subscription_id, its_attempt.period_start]
            if other is not its_attempt
        ]  # fmt: skip
        facts[payment.id] = Facts(
            settled_as=settled_as.get(payment.id),
            set_aside=payment.id in set_aside,
            rows=rows.get(payment.id, []),
            attempt=its_attempt,
            rivals=rivals,
            subscriptions=subscriptions,
            plans=plans,
            provider_ids=provider_ids,
            paid_meanwhile=payment.id in paid_meanwhile,
        )
    return facts


def _utc(instant: datetime | None) -> datetime | None:
    """A naive timestamp of the service's, which holds UTC."""
    return None if instant is None else instant.replace(tzinfo=timezone.utc)


def _read_paid_meanwhile(connection: sa.Connection, written_by_service: Mapping[str, Attempt]) -> set[str]:
    """Of renewals whose row the service has finished: those beside which another payment was granted meanwhile."""
    sent = [
        (
            payment_id,
            attempt.subscription_id,
            attempt.payment_method_id,
            naive_utc(attempt.first_sent_at - SCAN_MARGIN),
        )
        for payment_id, attempt in written_by_service.items()
        if attempt.first_sent_at is not None
    ]
    if not sent:
        return set()
    ids, subscriptions, methods, since = (list(column) for column in zip(*sent, strict=True))
    found = connection.execute(
        _PAID_MEANWHILE, {"ids": ids, "subscriptions": subscriptions, "methods": methods, "since": since}
    )
    return set(found.scalars())


def _read_periods(connection: sa.Connection, attempt_ids: Sequence[uuid.UUID]) -> Mapping[uuid.UUID, Attempt]:
    """The named attempts and all others of their periods, locked."""
    if not attempt_ids:
        return {}
    found = connection.exec_driver_sql(_PERIODS, {"ids": attempt_ids})
    return {row[0]: attempt_of_raw(row) for row in found}


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
    Raises ChangedMeanwhile (or a database error) for the whole batch: settle its payments one at a time then.
    """
    if not batch:
        return []
    rulings = rulings or {}
    facts = _read_facts(connection, batch, rulings)
    decisions = [
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
    _refuse_collisions(decisions)
    writing = _Writing()
    created = _write_subscriptions(connection, stamp, decisions, writing)
    payment_rows = _write_payments(connection, stamp, decisions, created, writing)
    _write_attempts(connection, stamp, decisions, writing)
    _write_settlements(connection, decisions, created, payment_rows, writing)
    payment_rows |= _write(connection, stamp, writing)
    opened = _write_problems(connection, stamp, decisions)
    return [
        Settled(
            payment=decision.payment,
            decision=decision,
            subscription_id=_subscription_of(decision, created),
            payment_row_id=payment_rows.get(decision.payment.id),
            newly_opened=(problem := _problem(decision)) is not None and problem.key in opened,
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
    facts = _read_facts(connection, batch, {}) if batch else {}
    return [
        Settled(p, decide_settlement(p, facts[p.id], now=stamp.at, calendar=calendar, is_live=is_live)) for p in batch
    ]


def _subscription_of(decision: SettlementDecision, created: Mapping[str, int]) -> int | None:
    if isinstance(decision, Settle):
        return decision.subscription.id if decision.subscription else created[decision.payment.id]
    if isinstance(decision, (RecordRefund, CloseAsGranted, Quarantine)):
        return decision.subscription_id
    return decision.row.subscription_id if decision.row else None


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


@dataclass(slots=True)
class _Writing:
    """What one statement writes for a whole batch, each as the rows of a JSON parameter."""

    extensions: list[dict[str, Any]] = field(default_factory=list)
    payments: list[dict[str, Any]] = field(default_factory=list)
    closings: list[dict[str, Any]] = field(default_factory=list)
    settlements: list[dict[str, Any]] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)


_CLOSE_ATTEMPTS = """
    UPDATE billing_orchestration.renewal_attempts a
    SET state = x.state, external_payment_id = coalesce(x.external_payment_id, a.external_payment_id),
        last_error = x.reason, closed_at = %(at)s
    FROM jsonb_to_recordset(CAST(%(closings)s AS jsonb)) AS x (
        id uuid, state text, old_state text, external_payment_id text, reason text)
    WHERE a.id = x.id AND a.state = x.old_state
"""

# Everything that a batch changes, in one statement: on the way to the server and back, a batch waits longer than for
# the work itself. What it updates was locked and read before; each part repeats its precondition and tells how many
# rows it changed. The provider's ids of a batch are distinct, so a new payment row is found by its own.
_WRITE = f"""
    WITH paid AS (
        INSERT INTO payments (subscription_id, payment_provider_id, payment_method, status, currency, amount,
                              external_payment_id, created_at, updated_at)
        SELECT x.subscription_id, x.payment_provider_id, x.payment_method::paymentmethodsenum,
               x.status::paymentstatusenum, x.currency::currencyenum, x.amount, x.external_payment_id, x.created_at,
               x.updated_at
        FROM jsonb_to_recordset(CAST(%(payments)s AS jsonb)) AS x (
            number int, subscription_id int, payment_provider_id int, payment_method text, status text,
            currency text, amount numeric(8,2), external_payment_id text, created_at timestamp, updated_at timestamp)
        ORDER BY x.number
        RETURNING external_payment_id, id
    ), settled AS (
        INSERT INTO billing_orchestration.settlements
            (external_payment_id, kind, payment_id, subscription_id, attempt_id, user_id, plan_id, amount, currency,
             period_start, period_end, settled_at, run_id)
        SELECT x.external_payment_id, x.kind, coalesce(x.payment_id, paid.id), x.subscription_id, x.attempt_id,
               x.user_id, x.plan_id, x.amount, x.currency, x.period_start, x.period_end, %(at)s, %(run_id)s
        FROM jsonb_to_recordset(CAST(%(settlements)s AS jsonb)) AS x (
            external_payment_id text, kind text, payment_id int, subscription_id int, attempt_id uuid, user_id text,
            plan_id int, amount numeric(8,2), currency text, period_start timestamp, period_end timestamp)
        LEFT JOIN paid ON x.payment_id IS NULL AND paid.external_payment_id = x.external_payment_id
    ), noted AS (
        INSERT INTO billing_orchestration.audit_trail
            (at, job, run_id, entity, entity_id, action, old, new, reason, external_payment_id)
        SELECT %(at)s, %(job)s, %(run_id)s, x.entity, coalesce(x.entity_id, CAST(paid.id AS text)), x.action, x.old,
               x.new, x.reason, x.external_payment_id
        FROM jsonb_to_recordset(CAST(%(changes)s AS jsonb)) AS x (
            number int, entity text, entity_id text, action text, old jsonb, new jsonb, reason text,
            external_payment_id text)
        LEFT JOIN paid ON x.entity_id IS NULL AND paid.external_payment_id = x.external_payment_id
        ORDER BY x.number
    ), healed AS (
        -- The open problems of these payments, of the kinds that are gone by their settlement.
        {CLOSE_SETTLED}
    ), closed AS (
        {_CLOSE_ATTEMPTS}
        RETURNING a.id
    ), extended AS (
        UPDATE subscriptions s
        SET ended_at = x.ended_at, updated_at = %(naive_at)s,
            status = CASE WHEN x.reactivate THEN 'ACTIVE'::subscriptionstatusenum ELSE s.status END
        FROM jsonb_to_recordset(CAST(%(extensions)s AS jsonb)) AS x (
            id int, ended_at timestamp, old_ended_at timestamp, old_status text, reactivate boolean)
        WHERE s.id = x.id AND s.ended_at = x.old_ended_at AND s.status::text IS NOT DISTINCT FROM x.old_status
        RETURNING s.id
    )
    SELECT 'paid' AS what, id, external_payment_id FROM paid
    UNION ALL SELECT 'healed', id, external_payment_id FROM healed
    UNION ALL SELECT 'closed', count(*), NULL FROM closed
    UNION ALL SELECT 'extended', count(*), NULL FROM extended
"""


def _write(connection: sa.Connection, stamp: Stamp, writing: _Writing) -> dict[str, int]:
    """Write it; give back the ids of the created payment rows by provider payment id.

    Raises ChangedMeanwhile when a row is not what it was: the caller's transaction must be rolled back then.
    """
    if not (writing.changes or writing.settlements):
        return {}
    written = connection.exec_driver_sql(
        _WRITE,
        {
            "payments": to_json(writing.payments),
            "settlements": to_json(writing.settlements),
            "changes": to_json(change_rows(writing.changes)),
            "closings": to_json(writing.closings),
            "extensions": to_json(writing.extensions),
            "ids": [row["external_payment_id"] for row in writing.settlements],
            "kinds": list(HEALING_KINDS),
            "at": stamp.at,
            "naive_at": naive_utc(stamp.at),
            "job": stamp.job,
            "run_id": stamp.run_id,
        },
    )
    created: dict[str, int] = {}
    healed: list[tuple[int, str]] = []
    for what, number, payment_id in written:
        if what == "paid":
            created[payment_id] = number
        elif what == "healed":
            healed.append((number, payment_id))
        elif what == "closed" and number != len(writing.closings):
            raise ChangedMeanwhile(f"{len(writing.closings)} attempts were to be closed, {number} could be")
        elif what == "extended" and number != len(writing.extensions):
            raise ChangedMeanwhile(f"{len(writing.extensions)} subscriptions were to be extended, {number} could be")
    record_healed(connection, stamp, healed)
    return created


def _write_subscriptions(
    connection: sa.Connection, stamp: Stamp, decisions: Sequence[SettlementDecision], writing: _Writing
) -> dict[str, int]:
    """Create subscriptions, prepare the extensions; give back the created ones' ids by provider payment id."""
    grants = [decision for decision in decisions if isinstance(decision, Settle)]
    extended = [(grant, grant.subscription) for grant in grants if grant.subscription is not None]
    creations = [grant for grant in grants if grant.subscription is None]
    writing.extensions += [
        {
            "id": subscription.id,
            "ended_at": naive_utc(grant.period_end),
            "old_ended_at": None if subscription.ended_at is None else naive_utc(subscription.ended_at),
            "old_status": subscription.status,
            "reactivate": grant.reactivate,
        }
        for grant, subscription in extended
    ]
    writing.changes += [
        Change(
            "subscription",
            str(subscription.id),
            grant.kind,
            grant.reason,
            old={"ended_at": subscription.ended_at, "status": subscription.status},
            new={"ended_at": grant.period_end, "status": "ACTIVE" if grant.reactivate else subscription.status},
            external_payment_id=grant.payment.id,
        )
        for grant, subscription in extended
    ]
    created: dict[str, int] = {}
    if creations:
        inserted = connection.execute(
            sa.insert(subscriptions_table).returning(subscriptions_table.c.id, sort_by_parameter_order=True),
            [
                {
                    "user_id": grant.user_id,
                    "status": "ACTIVE",
                    "started_at": grant.period_start,
                    "ended_at": grant.period_end,
                    "plan_id": grant.plan_id,
                    "created_at": stamp.at,
                    "updated_at": stamp.at,
                }
                for grant in creations
            ],
        ).scalars()
        for grant, subscription_id in zip(creations, inserted, strict=True):
            created[grant.payment.id] = subscription_id
            writing.changes.append(
                Change(
                    "subscription",
                    str(subscription_id),
                    "created",
                    grant.reason,
                    new={
                        "user_id": grant.user_id,
                        "plan_id": grant.plan_id,
                        "status": "ACTIVE",
                        "started_at": grant.period_start,
                        "ended_at": grant.period_end,
                    },
                    external_payment_id=grant.payment.id,
                )
            )
    return created


_FINISH_PAYMENT = """
    UPDATE payments p
    SET status = x.status::paymentstatusenum, subscription_id = coalesce(x.subscription_id, p.subscription_id),
        payment_method = coalesce(x.payment_method::paymentmethodsenum, p.payment_method), updated_at = %(naive_at)s,
        amount = coalesce(x.amount, p.amount), currency = coalesce(x.currency::currencyenum, p.currency)
    FROM jsonb_to_recordset(CAST(%(rows)s AS jsonb)) AS x (
        id int, status text, old_status text, subscription_id int, payment_method text, amount numeric(8,2),
        currency text)
    WHERE p.id = x.id AND p.status::text IS NOT DISTINCT FROM x.old_status
"""


def _write_payments(
    connection: sa.Connection,
    stamp: Stamp,
    decisions: Sequence[SettlementDecision],
    created: Mapping[str, int],
    writing: _Writing,
) -> dict[str, int]:
    """Turn payment rows SUCCEEDED or REFUNDED, prepare the missing ones; give back row ids by provider payment id."""
    written: dict[str, int] = {}
    updates: list[dict[str, Any]] = []
    for decision in decisions:
        if not isinstance(decision, (Settle, RecordRefund, CloseAsGranted)):
            continue
        payment, row = decision.payment, decision.row
        if row is not None:
            written[payment.id] = row.id
        if isinstance(decision, CloseAsGranted) or decision.row_is_final:
            continue
        status = "SUCCEEDED" if isinstance(decision, Settle) else "REFUNDED"
        subscription_id = _subscription_of(decision, created)
        if row is not None:
            true_money = payment.money if isinstance(decision, Settle) and decision.correct_money else None
            corrected = {} if true_money is None else {"amount": true_money.amount, "currency": true_money.currency}
            replaced = {} if true_money is None or row.money is None else {
                "amount": row.money.amount, "currency": row.money.currency
            }  # fmt: skip
            updates.append(
                {
                    **corrected,
                    "id": row.id,
                    "status": status,
                    "old_status": row.status,
                    "subscription_id": subscription_id,
                    "payment_method": payment.method_label,
                }
            )
            writing.changes.append(
                Change(
                    "payment",
                    str(row.id),
                    status.lower(),
                    decision.reason,
                    old={"status": row.status, "subscription_id": row.subscription_id, **replaced},
                    new={
                        "status": status,
                        "subscription_id": subscription_id,
                        "payment_method": payment.method_label,
                        **corrected,
                    },
                    external_payment_id=payment.id,
                )
            )
            continue
        # A created row takes the provider's instant of creation; so does a renewal's (SPEC 4).
        writing.payments.append(
            {
                "number": len(writing.payments),
                "subscription_id": subscription_id,
                "payment_provider_id": decision.payment_provider_id,
                "payment_method": payment.method_label,
                "status": status,
                "currency": payment.money.currency,
                "amount": payment.money.amount,
                "external_payment_id": payment.id,
                "created_at": naive_utc(payment.created_at),
                "updated_at": naive_utc(stamp.at),
            }
        )
        writing.changes.append(
            Change(
                "payment",
                None,
                "created",
                decision.reason,
                new={
                    "status": status,
                    "amount": payment.money.amount,
                    "currency": payment.money.currency,
                    "subscription_id": subscription_id,
                },
                external_payment_id=payment.id,
            )
        )
    if updates:
        result = connection.exec_driver_sql(
            _FINISH_PAYMENT, {"rows": to_json(updates), "naive_at": naive_utc(stamp.at)}
        )
        if result.rowcount != len(updates):
            raise ChangedMeanwhile(f"{len(updates)} payment rows were to be finished, {result.rowcount} could be")
    return written


def _write_attempts(
    connection: sa.Connection, stamp: Stamp, decisions: Sequence[SettlementDecision], writing: _Writing
) -> None:
    """Void the attempts that must give way; prepare the end of those that are settled, refunded or in review."""
    closings: list[tuple[Attempt, str, str | None, str]] = []
    voids: list[tuple[Attempt, str, str | None, str]] = []
    for decision in decisions:
        if isinstance(decision, (Settle, CloseAsGranted)):
            attempt, state = decision.attempt, State.SUCCEEDED
        elif isinstance(decision, RecordRefund):
            attempt, state = decision.attempt, State.REFUNDED
        elif isinstance(decision, Quarantine):
            attempt, state = decision.review, State.REVIEW
        else:
            continue
        if decision.void_first is not None:
            voids.append((decision.void_first, State.VOID, None, "never sent: a late success came for its period"))
        if attempt is not None and attempt.state != state:
            closings.append((attempt, state, decision.payment.id, decision.reason))
    # The voids first: at most one live attempt per period, at every moment (a unique index).
    if voids:
        rows = [_closing(*void) for void in voids]
        voided = connection.exec_driver_sql(_CLOSE_ATTEMPTS, {"closings": to_json(rows), "at": stamp.at}).rowcount
        if voided != len(rows):
            raise ChangedMeanwhile(f"{len(rows)} attempts were to be voided, {voided} could be")
    writing.closings += [_closing(*closing) for closing in closings]
    writing.changes += [
        Change(
            "attempt",
            str(attempt.id),
            state.lower(),
            reason,
            old={"state": attempt.state},
            new={"state": state, "subscription_id": attempt.subscription_id},
            external_payment_id=payment_id,
        )
        for attempt, state, payment_id, reason in (*voids, *closings)
    ]


def _closing(attempt: Attempt, state: str, payment_id: str | None, reason: str) -> dict[str, Any]:
    return {
        "id": attempt.id,
        "state": state,
        "old_state": attempt.state,
        "external_payment_id": payment_id,
        "reason": reason,
    }


_SAVE_METHODS = sa.text("""
    INSERT INTO billing_orchestration.saved_methods
        (subscription_id, payment_method_id, currency, payment_provider_id, saved_by_external_payment_id, saved_at)
    SELECT x.subscription_id, x.payment_method_id, x.currency, x.payment_provider_id, x.external_payment_id, x.saved_at
    FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS x (
        subscription_id int, payment_method_id text, currency text, payment_provider_id int, external_payment_id text,
        saved_at timestamptz)
    ON CONFLICT (subscription_id) DO UPDATE
    SET payment_method_id = excluded.payment_method_id, currency = excluded.currency,
        payment_provider_id = excluded.payment_provider_id,
        saved_by_external_payment_id = excluded.saved_by_external_payment_id, saved_at = excluded.saved_at
    -- A purchase that is settled late does not bring an older card back.
    WHERE saved_methods.saved_at <= excluded.saved_at
""")


def _write_settlements(
    connection: sa.Connection,
    decisions: Sequence[SettlementDecision],
    created: Mapping[str, int],
    payment_rows: Mapping[str, int],
    writing: _Writing,
) -> None:
    """Prepare the idempotence record of each payment; save the method that a purchase brings for its subscription."""
    methods: dict[int, dict[str, Any]] = {}
    for decision in decisions:
        if not isinstance(decision, (Settle, RecordRefund, CloseAsGranted)):
            continue
        payment = decision.payment
        subscription_id = _subscription_of(decision, created)
        attempt = decision.attempt
        grant = decision if isinstance(decision, Settle) else None
        writing.settlements.append(
            {
                "external_payment_id": payment.id,
                "kind": grant.kind if grant else "refunded" if isinstance(decision, RecordRefund) else "renewed",
                "payment_id": payment_rows.get(payment.id),  # None: the row that is created with it
                "subscription_id": subscription_id,
                "attempt_id": attempt.id if attempt else None,
                "user_id": grant.user_id if grant else metadata_user(payment),
                "plan_id": grant.plan_id if grant else metadata_int(payment, "plan_id"),
                "amount": payment.money.amount,
                "currency": payment.money.currency,
                "period_start": naive_utc(grant.period_start) if grant else None,
                "period_end": naive_utc(grant.period_end) if grant else None,
            }
        )
        # Only a purchase saves a method; a renewal carries the id of one that was saved before (YOOKASSA.md).
        if (
            grant
            and grant.attempt is None
            and payment.method_saved
            and payment.method_id
            and subscription_id is not None
        ):
            methods[subscription_id] = {
                "subscription_id": subscription_id,
                "payment_method_id": payment.method_id,
                "currency": payment.money.currency,
                "payment_provider_id": grant.payment_provider_id,
                "external_payment_id": payment.id,
                "saved_at": payment.captured_at or payment.created_at,
            }
    if methods:
        connection.execute(_SAVE_METHODS, {"rows": to_json(list(methods.values()))})


def _write_problems(connection: sa.Connection, stamp: Stamp, decisions: Sequence[SettlementDecision]) -> set[str]:
    problems = (_problem(decision) for decision in decisions)
    return open_problems(connection, stamp, [problem for problem in problems if problem is not None])


def _problem(decision: SettlementDecision) -> Problem | None:
    """What a person has to look at: everything in quarantine, and grants that come with a notice."""
    payment = decision.payment
    if isinstance(decision, Quarantine):
        return Problem(
            subject=f"payment {payment.id}",
            kind=decision.kind,
            reason=decision.reason,
            external_payment_id=payment.id,
            payment_id=decision.row.id if decision.row else None,
            subscription_id=decision.subscription_id,
            attempt_id=decision.review.id if decision.review else named_attempt_id(payment),
            evidence=evidence_of(_facts_of(payment)),
        )
    if isinstance(decision, Settle) and decision.notice and decision.subscription:
        return Problem(
            subject=f"payment {payment.id}",
            kind=decision.notice_kind,
            reason=decision.notice,
            external_payment_id=payment.id,
            subscription_id=decision.subscription.id,
            attempt_id=decision.attempt.id if decision.attempt else None,
            evidence=evidence_of(_facts_of(payment)),
        )
    return None


def _facts_of(payment: ProviderPayment) -> dict[str, Any]:
    """The provider's side of a payment, as evidence."""
    return {
        "id": payment.id,
        "status": payment.status,
        "amount": str(payment.money),
        "refunded_amount": payment.refunded_amount,
        "created_at": payment.created_at,
        "captured_at": payment.captured_at,
        "test": payment.is_test,
        "payment_method": payment.method_type,
        "metadata": payment.metadata,
    }
