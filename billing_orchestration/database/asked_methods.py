"""What the provider said about payment methods before their first charge: remembered, so that it is asked once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

import sqlalchemy as sa

from billing_orchestration.database.audit import Stamp
from billing_orchestration.database.conventions import of_this_shop, sql_list
from billing_orchestration.database.renewal_view import stopped_at
from billing_orchestration.domain.attempts import State
from billing_orchestration.domain.methods import MethodAnswer

_REMEMBER = sa.text("""
    INSERT INTO billing_orchestration.asked_methods
        (payment_provider_id, about, name, answer, payment_method_id, asked_at, run_id)
    VALUES (:provider_id, :about, :name, :answer, :method_id, :at, :run_id)
    ON CONFLICT DO NOTHING
""")
_DECLINES = sa.text(f"""
    SELECT m.id, {stopped_at("m.id")} AS stopped_at, (
        SELECT max(a.last_sent_at) FROM billing_orchestration.renewal_attempts a
        WHERE a.last_sent_at >= :today AND a.payment_method_id = m.id
          AND a.state IN {sql_list(State.DECLINED, State.STOPPED)} AND {of_this_shop("a.payment_provider_id")}
        ) AS declined_at
    FROM unnest(CAST(:ids AS text[])) AS m (id)
""")


def remember(connection: sa.Connection, stamp: Stamp, answers: Sequence[MethodAnswer]) -> None:
    """Keep these answers. The first one about a payment or method stays."""
    if answers:
        rows = [
            {
                "provider_id": answer.question.provider_id,
                "about": answer.question.about,
                "name": answer.question.name,
                "answer": answer.word,
                "method_id": answer.method_id,
                "at": stamp.at,
                "run_id": stamp.run_id,
            }
            for answer in answers
        ]
        connection.execute(_REMEMBER, rows)


def read_declines(
    connection: sa.Connection, method_ids: Sequence[str], today: datetime
) -> Mapping[str, tuple[datetime | None, datetime | None]]:
    """Of each method: when a hard decline stopped it, and when it was last declined today."""
    rows = connection.execute(_DECLINES, {"ids": list(method_ids), "today": today})
    return {row.id: (row.stopped_at, row.declined_at) for row in rows}
