"""What settling reads under lock: everything that decides about a batch of provider payments.

Users, payment rows, attempts, subscriptions: always locked in that order, each sorted. Two settlers wait for each
other instead of deadlocking.

The statements go to the driver as they are: compiling and caching them would cost as much as sending them. Each is one
constant text, so the server plans it once for a connection.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone

import sqlalchemy as sa

from billing_orchestration.database.attempts import ATTEMPT_COLUMNS, attempt_of_raw
from billing_orchestration.database.conventions import naive_utc, of_this_shop, of_this_shop_first, readable
from billing_orchestration.database.errors import DatabaseBusy
from billing_orchestration.domain.attempts import SCAN_MARGIN, Attempt
from billing_orchestration.domain.lost_attempts import Identity, identity_of, recreate
from billing_orchestration.domain.money import Money
from billing_orchestration.domain.problem_kinds import IGNORED, NOT_WRITABLE
from billing_orchestration.domain.provider_payment import ProviderPayment
from billing_orchestration.domain.settlement_decisions import Facts, PaymentRow, PlanRow, Ruling, SubscriptionRow


class ChangedMeanwhile(DatabaseBusy):
    """A row is not what it was when it was read under lock, or two payments of a batch want the same row.

    Nothing of the batch was written. Settling its payments one at a time decides each of them again.
    """


def read_facts(
    connection: sa.Connection, batch: Sequence[ProviderPayment], rulings: Mapping[str, Ruling]
) -> dict[str, Facts]:
    """Everything that decides about each payment of the batch, read under lock, by the provider's payment id.

    Raises ChangedMeanwhile when the service writes a payment row in between.
    """
    lock_users(connection, batch)
    books = _lock_payment_rows(connection, [payment.id for payment in batch])
    named = {payment.id: payment.claims.renewal_attempt_id for payment in batch}
    identities = {payment.id: identity for payment in batch if (identity := identity_of(payment)) is not None}
    attempts = _lock_periods(connection, [id_ for id_ in named.values() if id_ is not None], identities.values())
    lost = {id_: identity for id_, identity in identities.items() if named[id_] not in attempts}
    attached = {ruling.attach_to for ruling in rulings.values() if ruling.attach_to is not None}
    purchases = sorted({purchase for payment in batch if (purchase := _user_and_plan(payment)) is not None})
    subscriptions = _lock_subscriptions(
        connection,
        {
            *attached,
            *(row.subscription_id for rows in books.rows.values() for row in rows if row.subscription_id is not None),
            *(attempt.subscription_id for attempt in attempts.values()),
            *(identity.subscription_id for identity in lost.values()),
        },
        purchases,
    )
    plan_ids = {
        *(plan_id for _, plan_id in purchases),
        *(attempt.plan_id for attempt in attempts.values()),
        *(plan_id for id_ in attached & subscriptions.keys() if (plan_id := subscriptions[id_].plan_id) is not None),
    }
    plans, provider_ids = _read_beside(connection, books, plan_ids)
    of_payment = {id_: attempts[name] for id_, name in named.items() if name is not None and name in attempts}
    rebuilt = dict(_rebuild(batch, lost, books, subscriptions, plans, provider_ids))
    of_payment.update({id_: attempt for id_, attempt in rebuilt.items() if isinstance(attempt, Attempt)})
    misfits = {id_: why for id_, why in rebuilt.items() if isinstance(why, str)}
    paid_meanwhile = _read_paid_meanwhile(
        connection, {id_: attempt for id_, attempt in of_payment.items() if books.has_succeeded(id_)}
    )
    changed_meanwhile = _read_changed_meanwhile(
        connection, [payment for payment in batch if books.is_half_settled(payment.id) and payment.id not in of_payment]
    )
    periods = _by_period(attempts.values())
    return {
        payment.id: Facts(
            settled_as=books.settled_as.get(payment.id),
            set_aside=payment.id in books.set_aside,
            rows=books.rows[payment.id],
            attempt=of_payment.get(payment.id),
            rivals=_rivals(of_payment.get(payment.id), periods),
            subscriptions=subscriptions,
            plans=plans,
            provider_ids=provider_ids,
            paid_meanwhile=payment.id in paid_meanwhile,
            changed_meanwhile=payment.id in changed_meanwhile,
            misfit=misfits.get(payment.id),
        )
        for payment in batch
    }


def _rebuild(
    batch: Sequence[ProviderPayment],
    lost: Mapping[str, Identity],
    books: _Books,
    subscriptions: Mapping[int, SubscriptionRow],
    plans: Mapping[int, PlanRow],
    provider_ids: frozenset[int],
) -> Iterator[tuple[str, Attempt | str]]:
    """The attempts that the database has lost, by their payment's id; or why one does not fit."""
    for payment in batch:
        if (identity := lost.get(payment.id)) is not None:
            subscription = subscriptions.get(identity.subscription_id)
            plan = plans.get(payment.claims.plan_id or 0)
            is_written = books.has_succeeded(payment.id)
            yield payment.id, recreate(payment, identity, subscription, plan, provider_ids, is_written=is_written)


def _user_and_plan(payment: ProviderPayment) -> tuple[str, int] | None:
    """Whom and what a payment's metadata names, if it names both."""
    user_id, plan_id = payment.claims.user_id, payment.claims.plan_id
    return None if user_id is None or plan_id is None else (user_id, plan_id)


# --- users ---

_LOCK_USERS = """
    SELECT count(pg_advisory_xact_lock(key)) FROM (
        SELECT DISTINCT hashtextextended('billing_orchestration/user/' || name, 0) AS key
        FROM unnest(CAST(%(names)s AS text[])) AS name ORDER BY key
    ) AS keys
"""


def lock_users(connection: sa.Connection, batch: Sequence[ProviderPayment]) -> None:
    """Lock the users of these payments for the rest of the transaction: nobody else settles for them."""
    lock_user_names(connection, [payment.lock_name for payment in batch])


def lock_user_names(connection: sa.Connection, names: Sequence[str]) -> None:
    """The same by name: a user's, or "payment ID" for a payment that names no user."""
    connection.exec_driver_sql(_LOCK_USERS, {"names": sorted(set(names))})


# --- payment rows, and what our own books say about the same ids ---

_LOCK_PAYMENT_ROWS = f"""
    WITH held AS (
        SELECT id, subscription_id, payment_provider_id, status::text AS status, amount,
               currency::text AS currency, external_payment_id, greatest(created_at, updated_at) AS touched_at
        FROM payments WHERE external_payment_id = ANY(%(ids)s) AND {of_this_shop_first("payments")}
        ORDER BY id FOR NO KEY UPDATE
    ), entries AS (
        -- A person who ignores one holds it: whoever comes second sees what the first has decided.
        SELECT external_payment_id, kind, resolution, payment_id, evidence FROM billing_orchestration.quarantine
        WHERE external_payment_id = ANY(%(ids)s) ORDER BY id FOR NO KEY UPDATE
    )
    SELECT 'row' AS what, external_payment_id, status AS word, id, subscription_id, payment_provider_id, amount,
           currency, {readable("touched_at")} AS touched_at
    FROM held
    UNION ALL
    SELECT 'settled', external_payment_id, kind, NULL, NULL, NULL, NULL, NULL, NULL
    FROM billing_orchestration.settlements WHERE external_payment_id = ANY(%(ids)s)
    UNION ALL
    SELECT DISTINCT 'set aside', external_payment_id, NULL, CAST(NULL AS bigint), CAST(NULL AS bigint),
           CAST(NULL AS bigint), CAST(NULL AS numeric), NULL, CAST(NULL AS timestamp)
    FROM entries
    -- An entry about a row of the service's (its expiry was refused) says nothing about the provider's payment.
    WHERE resolution = '{IGNORED}'
      AND NOT (kind = '{NOT_WRITABLE}' AND payment_id IS NOT NULL)
      -- One about differing books says nothing about a grant.
      AND NOT jsonb_exists(evidence, 'books')
"""


@dataclass(slots=True)
class _Books:
    """What is written about the payments of a batch: their rows, oldest first, and our own records."""

    rows: dict[str, list[PaymentRow]]
    settled_as: dict[str, str] = field(default_factory=dict)
    set_aside: set[str] = field(default_factory=set)

    def has_succeeded(self, payment_id: str) -> bool:
        """Whether a row says that the payment succeeded."""
        return any(row.status == "SUCCEEDED" for row in self.rows[payment_id])

    def is_half_settled(self, payment_id: str) -> bool:
        """Whether a row says so without having granted it, and we have not settled it either."""
        return payment_id not in self.settled_as and any(row.is_half_settled for row in self.rows[payment_id])


def _lock_payment_rows(connection: sa.Connection, ids: Sequence[str]) -> _Books:
    books = _Books({id_: [] for id_ in ids})
    found = connection.exec_driver_sql(_LOCK_PAYMENT_ROWS, {"ids": list(ids)})
    for what, payment_id, word, row_id, subscription_id, provider_id, amount, currency, touched_at in found:
        if what == "row":
            money = Money(amount, currency) if currency is not None else None
            row = PaymentRow(row_id, subscription_id, provider_id, word, money, payment_id, _utc(touched_at))
            books.rows.setdefault(payment_id, []).append(row)
        elif what == "settled":
            books.settled_as[payment_id] = word
        else:
            books.set_aside.add(payment_id)
    for rows in books.rows.values():
        rows.sort(key=lambda row: row.id)
    return books


# --- attempts ---

# The named attempts and all others of their periods; also those of periods whose named attempt is lost.
_LOCK_PERIODS = f"""
    SELECT {", ".join(column.name for column in ATTEMPT_COLUMNS)}
    FROM billing_orchestration.renewal_attempts
    WHERE (subscription_id, period_start) IN (
        SELECT subscription_id, period_start FROM billing_orchestration.renewal_attempts WHERE id = ANY(%(ids)s)
        UNION SELECT * FROM unnest(CAST(%(subscriptions)s AS bigint[]), CAST(%(starts)s AS timestamp[])))
    ORDER BY subscription_id, period_start, number FOR UPDATE
"""


def _lock_periods(
    connection: sa.Connection, attempt_ids: Sequence[uuid.UUID], identities: Collection[Identity]
) -> Mapping[uuid.UUID, Attempt]:
    if not attempt_ids:
        return {}
    found = connection.exec_driver_sql(
        _LOCK_PERIODS,
        {
            "ids": attempt_ids,
            "subscriptions": [identity.subscription_id for identity in identities],
            "starts": [naive_utc(identity.period_start) for identity in identities],
        },
    )
    return {row[0]: attempt_of_raw(row) for row in found}


_Periods = Mapping[tuple[int, datetime], Sequence[Attempt]]


def _by_period(attempts: Iterable[Attempt]) -> _Periods:
    periods: dict[tuple[int, datetime], list[Attempt]] = {}
    for attempt in attempts:
        periods.setdefault((attempt.subscription_id, attempt.period_start), []).append(attempt)
    return periods


def _rivals(attempt: Attempt | None, periods: _Periods) -> list[Attempt]:
    """The other attempts of its period."""
    if attempt is None:
        return []
    of_period = periods.get((attempt.subscription_id, attempt.period_start), ())
    return [other for other in of_period if other is not attempt]


# --- subscriptions ---

# An end that Python has no datetime for ('infinity') reads as none: nothing can be added to it.
_LOCK_SUBSCRIPTIONS = f"""
    SELECT s.id, s.user_id, s.plan_id, s.status::text AS status,
           {readable("s.started_at")} AS started_at, {readable("s.ended_at")} AS ended_at
    FROM subscriptions s
    WHERE s.id IN (
        SELECT unnest(CAST(%(ids)s AS bigint[]))
        UNION
        SELECT a.id FROM subscriptions a
        JOIN (SELECT * FROM unnest(CAST(%(users)s AS text[]), CAST(%(plans)s AS bigint[])) AS w (user_id, plan_id)) w
          ON a.user_id = w.user_id AND a.plan_id = w.plan_id
        WHERE a.status = 'ACTIVE')
    ORDER BY s.id FOR NO KEY UPDATE OF s
"""


def _lock_subscriptions(
    connection: sa.Connection, ids: Iterable[int], purchases: Sequence[tuple[str, int]]
) -> dict[int, SubscriptionRow]:
    """Those with these ids, and the ACTIVE ones of these users and plans."""
    found = connection.exec_driver_sql(
        _LOCK_SUBSCRIPTIONS,
        {"ids": sorted(ids), "users": [user for user, _ in purchases], "plans": [plan for _, plan in purchases]},
    )
    return {
        id_: SubscriptionRow(id_, user_id, plan_id, status, _utc(started_at), _utc(ended_at))
        for id_, user_id, plan_id, status, started_at, ended_at in found
    }


def _utc(instant: datetime | None) -> datetime | None:
    """A naive timestamp of the service's, which holds UTC."""
    return None if instant is None else instant.replace(tzinfo=timezone.utc)


# --- what is read last, when everything is locked ---

# The payment rows once more, and what no transaction of ours changes.
_READ_BESIDE = f"""
    SELECT 'row' AS what, id, NULL AS number, NULL AS word, NULL AS amount
    FROM payments WHERE external_payment_id = ANY(%(ids)s) AND {of_this_shop_first("payments")}
    UNION ALL
    SELECT 'price', plan_id, CAST(NULL AS int), currency::text, amount
    FROM prices WHERE plan_id = ANY(CAST(%(plans)s AS bigint[])) AND currency IS NOT NULL AND amount IS NOT NULL
    UNION ALL
    SELECT 'plan', id, duration, duration_unit, NULL FROM plans WHERE id = ANY(CAST(%(plans)s AS bigint[]))
    UNION ALL
    SELECT 'provider', id, CAST(NULL AS int), NULL, NULL FROM payment_providers WHERE {of_this_shop("id")}
"""


def _read_beside(
    connection: sa.Connection, books: _Books, plan_ids: Iterable[int]
) -> tuple[dict[int, PlanRow], frozenset[int]]:
    """The plans with their prices, and the ids of this shop's payment providers.

    Raises ChangedMeanwhile when payment rows have appeared.
    """
    appeared: set[int] = set()
    periods: dict[int, tuple[int | None, str | None]] = {}
    prices: dict[int, set[Money]] = {}
    providers: set[int] = set()
    bound = {"ids": list(books.rows), "plans": sorted(plan_ids)}
    for what, id_, number, word, amount in connection.exec_driver_sql(_READ_BESIDE, bound):
        if what == "row":
            appeared.add(id_)
        elif what == "price":
            prices.setdefault(id_, set()).add(Money(amount, word))
        elif what == "plan":
            periods[id_] = number, word
        else:
            providers.add(id_)
    plans = {id_: PlanRow(id_, *period, frozenset(prices.get(id_, ()))) for id_, period in periods.items()}
    appeared -= {row.id for rows in books.rows.values() for row in rows}
    if appeared:
        # The service's webhook writes a row and extends the subscription in one transaction. Its new row cannot be
        # waited for, the subscription can: when that wait is over, the row is there, and its period must not be
        # granted again.
        raise ChangedMeanwhile(f"payment rows of this batch appeared while it was read: {sorted(appeared)}")
    return plans, frozenset(providers)


# Our clock and the service's may differ, so a grant of half an hour before the send counts as one after it.
_PAID_MEANWHILE = sa.text("""
    SELECT DISTINCT x.external_payment_id
    FROM unnest(
        CAST(:ids AS text[]), CAST(:subscriptions AS bigint[]), CAST(:methods AS text[]), CAST(:since AS timestamp[]))
        AS x (external_payment_id, subscription_id, payment_method_id, since)
    JOIN payments p ON p.subscription_id = x.subscription_id
    WHERE p.status IN ('SUCCEEDED', 'REFUNDED') AND p.updated_at >= x.since
      AND p.external_payment_id IS DISTINCT FROM x.external_payment_id
      -- The purchase that saved the method came long before, whenever its row was touched last.
      AND p.external_payment_id IS DISTINCT FROM x.payment_method_id
""")


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


# What the service may have granted and then failed to link to the payment, by whatever status it has now.
_CHANGED_MEANWHILE = """
    SELECT DISTINCT x.external_payment_id
    FROM unnest(
        CAST(%(ids)s AS text[]), CAST(%(users)s AS text[]), CAST(%(plans)s AS bigint[]), CAST(%(since)s AS timestamp[]))
        AS x (external_payment_id, user_id, plan_id, since)
    JOIN subscriptions s ON s.user_id = x.user_id AND s.plan_id = x.plan_id
    WHERE s.status IS DISTINCT FROM 'CREATED' AND greatest(s.created_at, s.updated_at) >= x.since
"""


def _read_changed_meanwhile(connection: sa.Connection, half_settled: Sequence[ProviderPayment]) -> set[str]:
    """Of purchases that the service has half settled: those whose user's subscription was changed since."""
    asked = [
        (payment.id, *named, naive_utc(payment.succeeded_at - SCAN_MARGIN))
        for payment in half_settled
        if (named := _user_and_plan(payment)) is not None
    ]
    if not asked:
        return set()
    ids, users, plans, since = (list(column) for column in zip(*asked, strict=True))
    found = connection.exec_driver_sql(_CHANGED_MEANWHILE, {"ids": ids, "users": users, "plans": plans, "since": since})
    return set(found.scalars())
