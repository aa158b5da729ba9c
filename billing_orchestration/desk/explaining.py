"""`explain`: the whole history of one customer's case in plain words, for support on the phone. It changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import sqlalchemy as sa

from billing_orchestration.database.case_history import Case, case_of_payment, case_of_subscription, find_payment
from billing_orchestration.database.engine import read
from billing_orchestration.desk.resolving import NotResolved
from billing_orchestration.domain.problem_kinds import kind_of
from billing_orchestration.domain.provider_payment import ProviderPayment
from billing_orchestration.provider.client import PaymentProvider
from billing_orchestration.provider.errors import PaymentNotFound, ProviderError

# The latest ones: each is a request.
_MOST_ASKED = 20
Event = tuple[datetime, int, str]
Connect = Callable[[], PaymentProvider]


def explain_payment(engine: sa.Engine, connect: Connect, name: str) -> list[str]:
    """The case of a payment, by the provider's id or the row's. Raises NotResolved when neither side knows it."""
    with read(engine) as connection:
        found = find_payment(connection, name)
        case = case_of_payment(
            connection,
            name if found is None else found if isinstance(found, str) else None,
            found if isinstance(found, int) else None,
        )
    there = _ask(connect, case.provider_ids)
    if found is None and not there.payments and not there.is_silent:
        raise NotResolved(f"neither this database nor the provider knows a payment {name}")
    return _in_words(f"payment {name}", case, there)


def explain_subscription(engine: sa.Engine, connect: Connect, subscription_id: int) -> list[str]:
    """The case of a subscription. Raises NotResolved when nothing is known of it."""
    with read(engine) as connection:
        case = case_of_subscription(connection, subscription_id)
    if not case.subscriptions and not case.attempts and not case.audit:
        raise NotResolved(f"this database knows no subscription {subscription_id}")
    return _in_words(f"subscription {subscription_id}", case, _ask(connect, case.provider_ids))


@dataclass(slots=True)
class _ProviderSide:
    """What the provider says now; `gaps` are sentences on what is missing, `is_silent`: it did not answer."""

    payments: dict[str, ProviderPayment] = field(default_factory=dict)
    gaps: list[str] = field(default_factory=list)
    is_silent: bool = False


def _ask(connect: Connect, ids: Sequence[str]) -> _ProviderSide:
    side = _ProviderSide()
    if not ids:
        return side
    asked = list(ids)[-_MOST_ASKED:]
    if len(asked) < len(ids):
        side.gaps.append(f"{len(ids) - len(asked)} of {len(ids)} payments were not looked up at the provider")
    provider = connect()
    try:
        for payment_id in asked:
            try:
                payment = provider.get_payment(payment_id)
            except PaymentNotFound:
                side.gaps.append(f"the provider knows no payment {payment_id}")
            except ProviderError as error:
                side.is_silent = True
                side.gaps.append(f"the provider did not answer, its side is missing here: {error}")
                break
            else:
                if isinstance(payment, ProviderPayment):
                    side.payments[payment_id] = payment
                else:
                    side.gaps.append(f"the provider's record of payment {payment_id} cannot be read: {payment.reason}")
    finally:
        provider.close()
    return side


def _in_words(subject: str, case: Case, side: _ProviderSide) -> list[str]:
    lines = [subject, "", "Now:"]
    lines += [f"  {line}" for line in (*_now_here(case), *_now_there(side.payments), *side.gaps)]
    lines += ["", "What happened (UTC):"]
    lines += [f"  {at:%Y-%m-%d %H:%M:%S}  {text}" for at, _, text in sorted(_events(case, side.payments))]
    waiting = [q for q in case.problems if q.resolved_at is None]
    lines += ["", "Waits for a person:" if waiting else "Nothing waits for a person."]
    for q in waiting:
        lines.append(f"  entry {q.id}, {q.kind}: {kind_of(q.kind).means}")
        lines.append(f"    billing-orchestration quarantine show {q.id}")
    return lines


def _now_here(case: Case) -> Iterator[str]:
    for s in case.subscriptions:
        plan = f"plan {s.plan_id} ({s.plan})" if s.plan_id is not None else "without a plan"
        yield f"subscription {s.id} of user {s.user_id}: {s.status}, until {s.ended_at} UTC, {plan}"
    for p in case.payments:
        at = f", at the provider {p.external_payment_id}" if p.external_payment_id else ", without a provider's id"
        owner = f", for subscription {p.subscription_id}" if p.subscription_id is not None else ", for no subscription"
        yield f"payment row {p.id}: {p.status}, {p.amount} {p.currency}{owner}{at}{_elsewhere(p)}"
    for a in case.attempts:
        word = f", {a.last_error}" if a.last_error else ""
        period = f"the period from {a.period_start}"
        yield f"renewal attempt {a.number} of {period}: {a.state}, {a.amount} {a.currency}{word}{_elsewhere(a)}"


def _elsewhere(row: Any) -> str:
    return (
        "" if row.is_ours is not False else f", of payment provider {row.payment_provider_id}, which is not this shop's"
    )


def _now_there(there: Mapping[str, ProviderPayment]) -> Iterator[str]:
    for payment in there.values():
        refunded = f", {payment.refunded_amount} of it refunded" if payment.refunded_amount else ""
        test = ", a TEST payment" if payment.is_test else ""
        yield f"at the provider, payment {payment.id}: {payment.status}, {payment.money}{refunded}{test}"


def _events(case: Case, there: Mapping[str, ProviderPayment]) -> Iterator[Event]:
    """(when, order within one instant, what): what was written, by us, the service and the provider."""
    for s in case.subscriptions:
        yield _utc(s.created_at), 0, f"the service created subscription {s.id}"
    for p in case.payments:
        yield _utc(p.created_at), 1, f"payment row {p.id} of {p.amount} {p.currency} was created"
    for payment in there.values():
        yield payment.created_at, 2, f"provider: payment {payment.id} of {payment.money} was created"
        if payment.captured_at is not None:
            yield payment.captured_at, 3, f"provider: payment {payment.id} succeeded"
        if payment.cancellation_reason:
            by = payment.cancellation_party or "nobody named"
            yield (
                payment.created_at,
                3,
                f"provider: payment {payment.id} was canceled by {by}: {payment.cancellation_reason}",
            )
    for a in case.attempts:
        yield a.planned_at, 1, f"attempt {a.number} to charge {a.amount} {a.currency} was planned (run {a.run_id})"
        if a.last_sent_at is not None and a.sends:
            yield a.last_sent_at, 2, f"attempt {a.number} was sent to the provider (send {a.sends})"
    for entry in case.audit:
        yield entry.at, 4, _audited(entry)


def _audited(entry: Any) -> str:
    old, new = entry.old or {}, entry.new or {}
    changed = [
        f"{name} {old.get(name)} -> {new[name]}" if name in old else f"{name} {new[name]}"
        for name in new
        if old.get(name) != new[name] and new[name] is not None and name != "problem_key"
    ]
    what = f" [{', '.join(changed)}]" if changed else ""
    by = f"{entry.job}, run {entry.run_id}"
    return f"{entry.entity} {entry.entity_id} {entry.action}: {entry.reason}{what} ({by})"


def _utc(at: datetime) -> datetime:
    return at.replace(tzinfo=timezone.utc) if at.tzinfo is None else at.astimezone(timezone.utc)
