"""What else may go wrong in the world: each mishap by its name. A seed plays some of them."""

from __future__ import annotations

import random
from collections.abc import Mapping

MISHAPS: Mapping[str, str] = {
    "old backfills": "an operator backfills days of weeks ago, several in a row, and the same again on later days",
    "wrong clocks": "the host's or PostgreSQL's clock is hours away from the provider's, also in the middle of a run",
    "charges under way": "the provider works on for seconds after the connection is cut or its client is dead, and may"
    " not serialise two requests with one key",
    "stuck cards": "some cards are never answered, or always with 500",
    "careless webhooks": "the service's handler takes no locks: it reads PENDING and writes by id, some seconds later",
    "half webhooks": "the handler dies between the payment and its grant: SUCCEEDED, and no subscription",
    "late half webhooks": "the same for a payment of hours ago, in the minute before a run that catches up",
    "helping hands": "support adds days to a subscription, or moves its end back",
    "restored backups": "the whole database is set back to an earlier state, or a standby lacks the last run's commits;"
    " and a charge that is lost with it may have a record that nobody can read",
    "odd amounts": "somebody pays an amount that is no price, and the service has no row of it",
    "changes in mid-run": "a price, a plan or a subscription's plan changes while a run is under way",
    "newer cards": "a card is replaced by a newer purchase's, or the payment that saved it is refunded in full",
    "two shops": "another shop's customers and payments are in the same tables",
}
# What the code under test cannot stand yet: named here, it is played on request only, and docs/safety.md says why.
AWAITED: frozenset[str] = frozenset()
_SHARE = 0.4


def draw_mishaps(draw: random.Random) -> frozenset[str]:
    """Those of one seed."""
    return frozenset([name for name in MISHAPS if draw.random() < _SHARE]) - AWAITED
