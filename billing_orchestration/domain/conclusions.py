"""What a run will have concluded by what the provider says, as its own decisions must see it.

A run first concludes, then charges. A decline that it hears of frees the period for the next try, and may forbid the
card to everybody: in this run already, for the same launch a second time must find nothing to do.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence, Set
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING

from billing_orchestration.domain import declines
from billing_orchestration.domain.answers import ProviderView, judge_payment
from billing_orchestration.domain.attempts import LIVE, Attempt, State

if TYPE_CHECKING:
    from billing_orchestration.domain.renewals import DueSubscription


def conclude_in(
    due: Sequence[DueSubscription], open_attempts: Sequence[Attempt], view: ProviderView
) -> tuple[Sequence[DueSubscription], Set[uuid.UUID]]:
    """The due as they will be once the provider's answers are written down, and the attempts that are closed then.

    Only answers by which no money moved: a success is settled, and its period is not due any more.
    """
    as_it_will_be = [_as_concluded(attempt, view) for attempt in open_attempts]
    closed = {attempt.id: attempt for attempt in as_it_will_be if attempt.state not in LIVE}
    if not closed:
        return due, frozenset()
    declined = _latest_by_method(a for a in closed.values() if a.state in (State.DECLINED, State.STOPPED))
    stopped = _latest_by_method(
        a for a in closed.values() if a.state == State.STOPPED and a.decline_class == declines.HARD
    )
    concluded = tuple(
        replace(
            one,
            attempts=tuple(closed.get(attempt.id, attempt) for attempt in one.attempts),
            method_declined_at=_later(one.method_declined_at, declined.get(one.method_id)),
            method_stopped_at=_later(one.method_stopped_at, stopped.get(one.method_id)),
        )
        for one in due
    )
    return concluded, closed.keys()


def _as_concluded(attempt: Attempt, view: ProviderView) -> Attempt:
    if (answer := view.answers.get(attempt.id)) is None:
        return attempt
    closing = judge_payment(attempt, answer)
    return replace(
        attempt, state=closing.state, decline_class=closing.decline_class, decline_reason=closing.decline_reason
    )


def _latest_by_method(attempts: Iterable[Attempt]) -> dict[str | None, datetime]:
    """When each payment method was tried, by these."""
    latest: dict[str | None, datetime] = {}
    for attempt in attempts:
        method, at = attempt.payment_method_id, attempt.last_sent_at
        if at is not None:
            latest[method] = max(at, latest.get(method, at))
    return latest


def _later(*instants: datetime | None) -> datetime | None:
    return max((instant for instant in instants if instant is not None), default=None)
