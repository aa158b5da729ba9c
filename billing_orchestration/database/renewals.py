"""The slice of autopayment_job: which subscriptions are due, and everything that decides about charging each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from billing_orchestration.database.attempts import (
    attempt_of,
    attempts_of_others,
    count_open_attempts,
    of_shard,
    open_attempts,
    select_attempts,
)
from billing_orchestration.database.conventions import naive_utc, of_this_shop, readable, sql_list
from billing_orchestration.database.renewal_view import read_view, stopped_at
from billing_orchestration.database.second_look import OUTLASTS, holds_a_charge
from billing_orchestration.database.tables import UtcNaive, renewal_attempts, subscriptions
from billing_orchestration.domain.answers import SHOP_REFUSALS
from billing_orchestration.domain.attempts import Attempt, State
from billing_orchestration.domain.methods import METHOD, NOT_KNOWN, NOT_SAVED, PAYMENT, REFUNDED, OlderMethod, Question
from billing_orchestration.domain.problem_kinds import HOLDING
from billing_orchestration.domain.renewals import DueSubscription, Holds, SaidByService
from billing_orchestration.domain.shards import Shard


@dataclass(frozen=True, slots=True)
class DueSlice:
    """What the database says about renewals. The counts are of due rows that are not fetched one by one.

    `in_review` holds the attempts that others decide about (a person, another shop), of any period.
    `too_old_examples`: (subscription id, its end as text) of the latest ones among those.
    """

    due: tuple[DueSubscription, ...]
    open_attempts: tuple[Attempt, ...]
    in_review: tuple[Attempt, ...]
    holds: Holds
    too_old: int
    too_old_examples: tuple[tuple[int, str], ...]
    not_recurring: int
    without_end: int


# Of a subscription's payments, beside the newest, so many are asked about before somebody is left uncharged.
MOST_OLDER = 3
# Another shop's only says why nothing is charged.
_NEWEST_FIRST = f"{of_this_shop('c.payment_provider_id')} DESC, no.is_no, c.created_at DESC, c.id DESC"

# One pass: each due subscription with its plan, the payment that says which method is charged, and the plan's prices in
# that currency. It is the newest SUCCEEDED one of which the provider has not said that it saved no method, or was
# refunded. A renewal's own payment is none (its id is not chargeable). What our own records hold is one among them,
# unless the service says REFUNDED.
_DUE = f"""
    SELECT s.id, s.user_id, s.plan_id, {readable("s.started_at")} AS started_at, s.ended_at,
           pl.name AS plan_name, pl.duration, pl.duration_unit, price.amounts,
           method.id AS method_id, method.currency AS method_currency, method.provider_id AS method_provider_id,
           {of_this_shop("method.provider_id")} AS method_is_ours,
           {stopped_at("method.id")} AS stopped_at,
           settled.until AS settled_until, longest.id AS outlasted_by,
           paid.external_payment_id AS method_payment, paid.answer AS method_word,
           paid.older
    FROM subscriptions s
    LEFT JOIN plans pl ON pl.id = s.plan_id
    LEFT JOIN billing_orchestration.saved_methods sm ON sm.subscription_id = s.id
    LEFT JOIN LATERAL (
        SELECT c.*, asked.answer, asked.payment_method_id, no.is_no,
               -- What counts instead, where the provider says of it that it saved none.
               jsonb_agg(jsonb_build_object(
                   'payment', c.external_payment_id, 'is_kept', c.is_kept, 'word', asked.answer,
                   'method', CASE WHEN c.is_kept THEN sm.payment_method_id
                                  ELSE coalesce(asked.payment_method_id, c.external_payment_id) END,
                   'paid_by', jsonb_build_array(c.currency, c.payment_provider_id)
               )) FILTER (WHERE NOT no.is_no) OVER (
                   ORDER BY {_NEWEST_FIRST}
                   ROWS BETWEEN 1 FOLLOWING AND {MOST_OLDER} FOLLOWING
               ) AS older
        FROM (
            SELECT p.external_payment_id, p.currency::text AS currency, p.payment_provider_id, p.created_at, p.id,
                   p.external_payment_id IS NOT DISTINCT FROM sm.saved_by_external_payment_id
                   AND sm.subscription_id IS NOT NULL AS is_kept
            FROM payments p
            WHERE p.subscription_id = s.id AND p.status = 'SUCCEEDED'
              AND NOT EXISTS (
                  SELECT FROM billing_orchestration.renewal_attempts a
                  WHERE a.external_payment_id = p.external_payment_id)
            UNION ALL
            SELECT sm.saved_by_external_payment_id, sm.currency, sm.payment_provider_id,
                   timezone('UTC', sm.saved_at), 0, true
            WHERE sm.subscription_id IS NOT NULL AND NOT EXISTS (
                SELECT FROM payments p
                WHERE p.external_payment_id = sm.saved_by_external_payment_id
                  AND (p.status = 'REFUNDED' OR (p.status = 'SUCCEEDED' AND p.subscription_id = s.id)))
        ) c
        LEFT JOIN billing_orchestration.asked_methods asked
          ON asked.payment_provider_id = c.payment_provider_id AND asked.about = '{PAYMENT}'
          AND asked.name = c.external_payment_id
        CROSS JOIN LATERAL (
            -- An id that the provider does not know may be a method's own, but does not displace a method that we know.
            SELECT coalesce(asked.answer IN {sql_list(NOT_SAVED, REFUNDED)}, false)
                   OR (coalesce(asked.answer = '{NOT_KNOWN}', false) AND sm.subscription_id IS NOT NULL
                       AND NOT c.is_kept) AS is_no
        ) no
        ORDER BY {_NEWEST_FIRST}
        LIMIT 1
    ) paid ON true
    -- A method that was bound without a payment: it is known from the service's view only. Of several rows that are
    -- this shop's its payments get the first.
    LEFT JOIN (
        SELECT min(id) AS provider_id FROM payment_providers WHERE {of_this_shop("id")}
    ) shops ON CAST(:currency AS text) IS NOT NULL
    CROSS JOIN LATERAL (
        SELECT CASE WHEN paid.is_kept THEN sm.payment_method_id
                    ELSE coalesce(paid.payment_method_id, paid.external_payment_id) END AS id,
               coalesce(paid.currency, sm.currency, CAST(:currency AS text)) AS currency,
               coalesce(paid.payment_provider_id, sm.payment_provider_id, shops.provider_id) AS provider_id
    ) method
    LEFT JOIN LATERAL (
        SELECT array_agg(pr.amount ORDER BY pr.id) AS amounts
        FROM prices pr WHERE pr.plan_id = s.plan_id AND pr.currency::text = method.currency
    ) price ON true
    LEFT JOIN LATERAL (
        SELECT max(st.period_end) AS until FROM billing_orchestration.settlements st WHERE st.subscription_id = s.id
    ) settled ON true
    LEFT JOIN LATERAL (
        SELECT t.id FROM subscriptions t WHERE {OUTLASTS} ORDER BY t.ended_at DESC, t.id DESC LIMIT 1
    ) longest ON true
    WHERE s.status = 'ACTIVE' AND s.ended_at >= :oldest AND s.ended_at < :over_before
      AND (pl.id IS NULL OR pl.is_recurring) {{of_shard}}
    ORDER BY s.ended_at, s.id
"""
_DUE_COLUMNS: Mapping[str, Any] = {
    "id": sa.BigInteger,
    "user_id": sa.String,
    "plan_id": sa.BigInteger,
    "started_at": UtcNaive,
    "ended_at": UtcNaive,
    "plan_name": sa.String,
    "duration": sa.Integer,
    "duration_unit": sa.String,
    "method_id": sa.String,
    "method_currency": sa.String,
    "method_provider_id": sa.BigInteger,
    "method_is_ours": sa.Boolean,
    "amounts": sa.ARRAY(sa.Numeric(8, 2)),
    "stopped_at": sa.DateTime(timezone=True),
    "settled_until": UtcNaive,
    "outlasted_by": sa.BigInteger,
    "method_payment": sa.String,
    "method_word": sa.String,
    "older": sa.JSON,
}

_COUNTS = """
    SELECT count(*) FILTER (WHERE s.ended_at < :oldest AND (pl.id IS NULL OR pl.is_recurring)) AS too_old,
           count(*) FILTER (WHERE s.ended_at < :over_before AND pl.id IS NOT NULL AND pl.is_recurring IS NOT TRUE)
               AS not_recurring,
           count(*) FILTER (WHERE s.ended_at >= :oldest AND (pl.id IS NULL OR pl.is_recurring)) AS due
    FROM subscriptions s LEFT JOIN plans pl ON pl.id = s.plan_id
    WHERE s.status = 'ACTIVE' AND s.ended_at < :over_before {of_shard}
"""

_WITHOUT_END = "SELECT count(*) FROM subscriptions s WHERE s.status = 'ACTIVE' AND s.ended_at IS NULL {of_shard}"

_TOO_OLD_EXAMPLES = """
    SELECT s.id, s.ended_at::text AS ended_at
    FROM subscriptions s LEFT JOIN plans pl ON pl.id = s.plan_id
    WHERE s.status = 'ACTIVE' AND s.ended_at < :oldest AND s.ended_at < :over_before
      AND (pl.id IS NULL OR pl.is_recurring)
      {of_shard}
    ORDER BY s.ended_at DESC, s.id LIMIT :size
"""
# As many as a report shows.
_EXAMPLES = 100

_TRIED_TODAY = f"""
    SELECT subscription_id, max(last_sent_at) AS at
    FROM billing_orchestration.renewal_attempts
    WHERE last_sent_at >= :today {{of_shard}}
      -- Refused because of the shop's own key or rights: nobody's card was tried.
      AND NOT (state = '{State.REJECTED}' AND coalesce(decline_class, '') IN {sql_list(*SHOP_REFUSALS)})
    GROUP BY subscription_id
"""

_DECLINED_TODAY = sa.text(f"""
    SELECT payment_method_id, max(last_sent_at) AS at
    FROM billing_orchestration.renewal_attempts
    WHERE last_sent_at >= :today AND state IN {sql_list(State.DECLINED, State.STOPPED)}
      AND {of_this_shop("payment_provider_id")}
    GROUP BY payment_method_id
""")

# Few: what waits for a person.
_HOLDS = sa.text(f"""
    SELECT q.attempt_id, CASE WHEN q.kind IN {sql_list(*HOLDING)} THEN q.subscription_id END AS subscription_id,
           'quarantine entry ' || q.id || ' (' || q.kind || ') is open and is about this charge' AS why
    FROM billing_orchestration.quarantine q WHERE {holds_a_charge("q")}
""")


# Only where a run has shards: PostgreSQL guesses badly how many rows a remainder leaves.
_OF_SHARD = "AND {column} % :shards = :remainder"


def _statement(query: str, shard: Shard | None, column: str = "s.id") -> sa.TextClause:
    return sa.text(query.format(of_shard=_OF_SHARD.format(column=column) if shard else ""))


@dataclass(frozen=True, slots=True)
class DueCounts:
    """How much there is to do, without fetching it; the counts of what is not fetched as in DueSlice."""

    due: int
    open_attempts: int
    too_old: int
    not_recurring: int
    without_end: int


def count_due(connection: sa.Connection, *, over_before: datetime, oldest: datetime) -> DueCounts:
    """The sizes of the slice that `fetch_due` reads, for a run that leaves the reading to its shards."""
    bounds = {"over_before": naive_utc(over_before), "oldest": naive_utc(oldest)}
    counts = connection.execute(_statement(_COUNTS, None), bounds).one()
    return DueCounts(
        due=counts.due,
        open_attempts=count_open_attempts(connection),
        too_old=counts.too_old,
        not_recurring=counts.not_recurring,
        without_end=connection.execute(_statement(_WITHOUT_END, None)).scalar_one(),
    )


def fetch_due(
    connection: sa.Connection,
    *,
    over_before: datetime,
    oldest: datetime,
    today: datetime,
    shard: Shard | None = None,
    view: str | None = None,
) -> DueSlice:
    """Every subscription that is due: ACTIVE, ended before `over_before`, its plan recurring (or gone).

    Those that ended before `oldest` are only counted: months of stale rows cost nothing. `today` is the first instant
    of the billing day on the wall, from which `oldest` is counted back. With a `shard`, all of it is of that shard's
    subscriptions only. With a `view`, method, consent and contact are what the service says there.
    """
    part = {"shards": shard.count, "remainder": shard.number - 1} if shard else {}
    bounds = {"over_before": naive_utc(over_before), "oldest": naive_utc(oldest), **part}
    attempts = _attempts_of_due(connection, over_before, oldest, shard)
    tried = _instants(connection, _statement(_TRIED_TODAY, shard, "subscription_id"), {"today": today, **part})
    declined = _instants(connection, _DECLINED_TODAY, {"today": today})
    rows = _rows_of_due(connection, shard, bounds, view)
    said = _what_the_service_says(connection, view, [row.id for row in rows])
    due = tuple(
        replace(
            _due_of(row, said.get(row.id), declined),
            attempts=tuple(attempts.get((row.id, row.ended_at), ())),
            last_tried_at=tried.get(row.id),
        )
        for row in rows
    )
    counts = connection.execute(_statement(_COUNTS, shard), bounds).one()
    examples = connection.execute(_statement(_TOO_OLD_EXAMPLES, shard), {**bounds, "size": _EXAMPLES}).all()
    return DueSlice(
        due=due,
        open_attempts=tuple(open_attempts(connection, shard)),
        in_review=tuple(attempts_of_others(connection, shard)),
        holds=_read_holds(connection),
        too_old=counts.too_old,
        too_old_examples=tuple((row.id, row.ended_at) for row in examples),
        not_recurring=counts.not_recurring,
        without_end=connection.execute(_statement(_WITHOUT_END, shard), part).scalar_one(),
    )


def _due_of(row: Any, said: SaidByService | None, declined: Mapping[Any, datetime]) -> DueSubscription:
    """A row of the due, with what the service says about it, and without its attempts."""
    method_id, name, about = row.method_id, row.method_payment, PAYMENT
    stopped, word = row.stopped_at, row.method_word
    older = _older(row)
    if said is not None:
        older = ()
        method_id, name, about = said.method_id, said.method_id, METHOD
        stopped, word = said.method_stopped_at, said.method_word
    is_asked_about = word is None and name and row.method_provider_id is not None
    return DueSubscription(
        id=row.id,
        user_id=row.user_id,
        plan_id=row.plan_id,
        started_at=row.started_at,
        ended_at=row.ended_at,
        plan_duration=row.duration,
        plan_duration_unit=row.duration_unit,
        method_id=method_id,
        method_currency=row.method_currency,
        method_provider_id=row.method_provider_id,
        method_is_elsewhere=row.method_is_ours is False,
        prices=tuple(row.amounts or ()),
        method_declined_at=declined.get(method_id) if method_id else None,
        method_stopped_at=stopped,
        said=said,
        settled_until=row.settled_until,
        outlasted_by=row.outlasted_by,
        plan_name=row.plan_name,
        question=Question(about, name, row.method_provider_id) if is_asked_about else None,
        method_word=word,
        older=older,
    )


def _older(row: Any) -> tuple[OlderMethod, ...]:
    """What may be charged instead of a row's method: of the same currency and provider, newest first."""
    paid_by = [row.method_currency, row.method_provider_id]
    return tuple(
        OlderMethod(
            one["method"],
            Question(PAYMENT, one["payment"], row.method_provider_id) if one["word"] is None else None,
            one["word"],
            one["is_kept"],
        )
        for one in row.older or ()
        if one["paid_by"] == paid_by
    )


def _rows_of_due(
    connection: sa.Connection, shard: Shard | None, bounds: Mapping[str, Any], view: str | None
) -> Sequence[Any]:
    # A method that only the view knows is charged in roubles, as the provider charges saved methods.
    currency = "RUB" if view else None
    return connection.execute(_statement(_DUE, shard).columns(**_DUE_COLUMNS), {**bounds, "currency": currency}).all()


def _what_the_service_says(
    connection: sa.Connection, view: str | None, ids: Sequence[int]
) -> Mapping[int, SaidByService]:
    """Of each of these subscriptions, if there is a view."""
    if view is None:
        return {}
    return {id_: SaidByService() for id_ in ids} | dict(read_view(connection, view, ids))


def _attempts_of_due(
    connection: sa.Connection, over_before: datetime, oldest: datetime, shard: Shard | None
) -> Mapping[tuple[int, datetime], Sequence[Attempt]]:
    """The attempts of the periods that are due, by subscription and period."""
    attempts: dict[tuple[int, datetime], list[Attempt]] = {}
    of_due_periods = select_attempts(
        sa.exists().where(
            subscriptions.c.id == renewal_attempts.c.subscription_id,
            subscriptions.c.ended_at == renewal_attempts.c.period_start,
            subscriptions.c.status == "ACTIVE",
            subscriptions.c.ended_at >= oldest,
            subscriptions.c.ended_at < over_before,
        ),
        *of_shard(shard),
    )
    for row in connection.execute(of_due_periods):
        attempts.setdefault((row.subscription_id, row.period_start), []).append(attempt_of(row))
    return attempts


def _read_holds(connection: sa.Connection) -> Holds:
    entries = connection.execute(_HOLDS).all()
    return Holds(
        {row.attempt_id: row.why for row in entries},
        {row.subscription_id: row.why for row in entries if row.subscription_id is not None},
    )


def _instants(connection: sa.Connection, query: sa.TextClause, bounds: Mapping[str, Any]) -> Mapping[Any, datetime]:
    return {row[0]: row[1] for row in connection.execute(query, bounds)}
