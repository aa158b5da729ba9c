"""`upcoming`: who will be charged in the next days, when, how much and with which card; and who will not, and why.

By the same function that decides a renewal run. It changes nothing: the database is read, and the provider is asked for
the last digits of each card, and whether what would be charged for the first time was saved.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass, replace
from datetime import datetime, time, timedelta

import sqlalchemy as sa

from billing_orchestration.database.engine import read
from billing_orchestration.database.renewal_view import check_view
from billing_orchestration.database.renewals import DueSlice, fetch_due
from billing_orchestration.desk.tables import table
from billing_orchestration.domain.answers import ProviderView
from billing_orchestration.domain.billing_calendar import BillingCalendar
from billing_orchestration.domain.money import Money
from billing_orchestration.domain.printable import no_formula, printable
from billing_orchestration.domain.renewals import (
    Charge,
    DueSubscription,
    NotCharged,
    RenewalRules,
    Resend,
    decide_renewals,
)
from billing_orchestration.first_use import ask_about_methods
from billing_orchestration.provider.client import PaymentProvider
from billing_orchestration.resources import rules_of
from billing_orchestration.settings import Settings

# As autopayment_job has it: its schedule's hour, and what it leaves as too long overdue.
_RUN_AT = time(3, 0)
_MAX_OVERDUE_DAYS = 30
_ENGLISH = ("subscription", "user", "on", "charged", "amount", "currency", "card", "code", "reason")
_RUSSIAN = ("подписка", "пользователь", "когда", "списание", "сумма", "валюта", "карта", "код", "причина")


@dataclass(frozen=True, slots=True)
class Upcoming:
    """One renewal that is due. `card`: its last four digits; empty where it is none, or the provider does not say."""

    subscription: int
    user: str
    on: str
    charged: str
    amount: str
    currency: str
    card: str
    code: str
    reason: str


def find_upcoming(
    engine: sa.Engine, provider: PaymentProvider, settings: Settings, now: datetime, days: int
) -> list[Upcoming]:
    """What is due up to the end of the day that is this many days from now, in the order of the runs."""
    calendar = BillingCalendar(settings.billing_timezone)
    today, view = calendar.day_of(now), settings.billing_renewal_view
    with read(engine) as connection:
        if view:
            check_view(connection, view)
        found = fetch_due(
            connection,
            over_before=calendar.end_of(today + timedelta(days=days)),
            oldest=calendar.start_of(today - timedelta(days=_MAX_OVERDUE_DAYS)),
            today=calendar.start_of(today),
            view=view,
        )
    rules = rules_of(settings, calendar, _MAX_OVERDUE_DAYS)
    by_run: dict[datetime, list[DueSubscription]] = {}
    for due in found.due:
        by_run.setdefault(_run_of(due, now, calendar), []).append(due)
    runs = [at for at in sorted(by_run) if calendar.day_of(at) <= today + timedelta(days=days)]
    with closing(provider):
        for at in runs:
            of_run = replace(found, due=tuple(by_run[at]))
            asked, _ = ask_about_methods(of_run, provider, lambda: read(engine), now=at, rules=rules)
            by_run[at] = list(asked.due)
        cards = provider.cards([due.method_id for at in runs for due in by_run[at] if due.method_id])
    return [line for at in runs for line in _of_one_run(by_run[at], found, at, rules, cards)]


def _run_of(due: DueSubscription, now: datetime, calendar: BillingCalendar) -> datetime:
    """When a renewal run decides about it next: on the day of its end, or at the next run if that is over."""
    day = max(calendar.day_of(due.ended_at), calendar.day_of(now))
    at = datetime.combine(day, _RUN_AT, tzinfo=calendar.zone)
    return at if at > now else datetime.combine(day + timedelta(days=1), _RUN_AT, tzinfo=calendar.zone)


def _of_one_run(
    due: Sequence[DueSubscription], found: DueSlice, at: datetime, rules: RenewalRules, cards: Mapping[str, str]
) -> Iterator[Upcoming]:
    by_id = {subscription.id: subscription for subscription in due}
    open_attempts = [attempt for attempt in found.open_attempts if attempt.subscription_id in by_id]
    subjects = {subscription.subject: subscription.id for subscription in due}
    subjects |= {attempt.subject: attempt.subscription_id for attempt in open_attempts}
    decisions = decide_renewals(
        due, open_attempts, ProviderView(), now=at, rules=rules, in_review=found.in_review, holds=found.holds
    )
    for decision in decisions:
        money: Money | None
        if isinstance(decision, (Charge, Resend)):
            subscription_id, money, code, charged = decision.attempt.subscription_id, decision.attempt.money, "", "yes"
        elif isinstance(decision, NotCharged):
            subscription_id, money, code, charged = subjects[decision.subject], decision.money, decision.code, "no"
        else:  # about an old attempt alone; its subscription has a line of its own
            continue
        subscription = by_id[subscription_id]
        card = cards.get(subscription.method_id or "", "")
        yield Upcoming(
            subscription_id,
            subscription.user_id or "",
            f"{at:%Y-%m-%d %H:%M}",
            charged,
            "" if money is None else f"{money.amount:.2f}",
            "" if money is None else money.currency,
            card if card.isdigit() else "",
            code,
            decision.reason,
        )


def in_form(lines: Sequence[Upcoming], form: str, language: str) -> list[str]:
    """As a table or CSV."""
    header = _RUSSIAN if language == "ru" else _ENGLISH
    words = {"yes": "да", "no": "нет"} if language == "ru" else {}
    rows = [astuple(replace(line, charged=words.get(line.charged, line.charged))) for line in lines]
    if form == "csv":
        text = io.StringIO()
        cells = [[no_formula(printable(str(value))) for value in row] for row in rows]
        csv.writer(text, lineterminator="\n").writerows([header, *cells])
        return text.getvalue().splitlines()
    return table([header, *([str(value) for value in row] for row in rows)])
