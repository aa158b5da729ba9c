"""What the database knows of people: whom a problem is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sqlalchemy as sa

from billing_orchestration.database.audit import Problem

# Two look-ups by indexes instead of one OR.
_USERS = sa.text("""
    SELECT user_id FROM subscriptions WHERE id = ANY(:subscriptions)
    UNION SELECT s.user_id FROM payments p JOIN subscriptions s ON s.id = p.subscription_id WHERE p.id = ANY(:payments)
    UNION SELECT s.user_id FROM payments p JOIN subscriptions s ON s.id = p.subscription_id
        WHERE p.external_payment_id = ANY(:externals)
""")


def users_of(connection: sa.Connection, problems: Sequence[Problem]) -> frozenset[str]:
    """The service's ids of the users whom these problems are about."""
    bound = {
        "subscriptions": [problem.subscription_id for problem in problems if problem.subscription_id is not None],
        "payments": [problem.payment_id for problem in problems if problem.payment_id is not None],
        "externals": [problem.external_payment_id for problem in problems if problem.external_payment_id is not None],
    }
    items = (problem.evidence.get("item") for problem in problems)
    metadata = (item.get("metadata") for item in items if isinstance(item, Mapping))
    claimed = {part.get("user_id") for part in metadata if isinstance(part, Mapping)}
    users = {*connection.execute(_USERS, bound).scalars(), *claimed}
    return frozenset(user for user in users if isinstance(user, str) and user.strip())
