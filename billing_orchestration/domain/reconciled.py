"""The words of reconciliation: a day, the classes of its lines, what becomes of each. Imported without pandas."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime, timedelta
from typing import NamedTuple

from billing_orchestration.domain.billing_calendar import BillingCalendar
from billing_orchestration.domain.problem_kinds import ProblemKind
from billing_orchestration.domain.run_scope import RunRefused, RunScope


class NotReconciled(Exception):
    """The period or the registry makes no sense, or the sums do not close. Its text is one line."""


class Day(NamedTuple):
    """A day to be reconciled, [start, end). `since`: the first instant of the days that are compared together."""

    day: date
    start: datetime
    end: datetime
    since: datetime

    @classmethod
    def of(cls, day: date, calendar: BillingCalendar, since: date | None = None) -> Day:
        """The day in the calendar's time zone."""
        return cls(day, calendar.start_of(day), calendar.end_of(day), calendar.start_of(since or day))


AGREES = "agrees"
PAID_THERE = "paid_there"
NOT_PAID_THERE = "not_paid_there"
CANCELED_THERE = "canceled_there"
AMOUNT_DIFFERS = "amount_differs"
REFUNDED_THERE = "refunded_there"
REFUNDED_HERE = "refunded_here"
DOUBLED_HERE = "doubled_here"
GRANTED_TO_NOBODY = "granted_to_nobody"
FOREIGN = "foreign"
UNREADABLE = "unreadable"

# What each means, in the order in which they are shown.
CLASSES: Mapping[str, str] = {
    AGREES: "both sides agree",
    PAID_THERE: "paid there, missing or unfinished here",
    GRANTED_TO_NOBODY: "paid there, granted to nobody here",
    NOT_PAID_THERE: "paid here, not paid there: granted unpaid",
    AMOUNT_DIFFERS: "the amount or the currency differs",
    REFUNDED_THERE: "refunded there, not here",
    REFUNDED_HERE: "refunded here, not there",
    DOUBLED_HERE: "several paid rows here for one payment",
    UNREADABLE: "the provider's record cannot be read",
    CANCELED_THERE: "canceled there, still open here: it expires by itself",
    FOREIGN: "foreign: not this service's",
}
# No difference in money: neither repaired nor shown to a person.
QUIET = (AGREES, CANCELED_THERE, FOREIGN)
# Settling may repair these.
REPAIRABLE = (PAID_THERE, GRANTED_TO_NOBODY)
# What a person is asked about each of the others. What cannot be read opens an entry of its own kind.
KIND_OF_CLASS: Mapping[str, ProblemKind] = {
    NOT_PAID_THERE: "not_paid_there",
    AMOUNT_DIFFERS: "amount_differs",
    REFUNDED_THERE: "refunded_there",
    REFUNDED_HERE: "refunded_here",
    DOUBLED_HERE: "doubled_here",
}


def reconciled_day(scope: RunScope, calendar: BillingCalendar) -> date:
    """The day that a run reconciles: its partition's, or the last that was over at `as_of`.

    A partition's `as_of` is the last instant of its day. Raises RunRefused for a day that is not over: its books change
    while they are compared.
    """
    after = scope.as_of + timedelta(microseconds=1)
    if scope.source == "partition" and calendar.start_of(calendar.day_of(after)) != after:
        raise RunRefused(
            f"the day {calendar.day_of(scope.as_of)} is not over yet, so there is nothing to reconcile. Nothing was"
            " read or written"
        )
    return calendar.day_of(after) - timedelta(days=1)
