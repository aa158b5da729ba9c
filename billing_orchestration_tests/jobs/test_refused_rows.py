"""A row that a trigger of the service's refuses, alters or swallows, in every job that writes it.

It comes first, it is put before a person, and the others go through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import pytest

from billing_orchestration_tests.books import NOON
from billing_orchestration_tests.jobs.service import Service

OTHERS = 4
TWO_ROWS_AS_ONE = "PERFORM (SELECT v FROM (VALUES (1), (2)) AS two (v))"
NO_SUCH_TABLE = "PERFORM FROM no_such_table"


@dataclass(frozen=True)
class Case:
    """Rows of one job. `meddle` spoils the first of them; `revert` undoes the change of a row."""

    job: str
    prepare: Callable[[Service], list[int]]
    table: str
    event: str
    condition: str
    revert: str
    is_done: Callable[[Service, int], bool]
    # The payment that a person hears about; None: the row itself is named.
    payment: bool = False


def purchases(service: Service) -> list[int]:
    """Paid there, no row here: a subscription is created, and a payment row."""
    for number in range(OTHERS + 1):
        service.paid_there(f"paid-{number}", user=f"user-{number}", plan_id=service.monthly)
    return list(range(OTHERS + 1))


def has_bought(service: Service, number: int) -> bool:
    return len(service.rows("subscriptions", "user_id = :user", user=f"user-{number}")) == 1


def extensions(service: Service) -> list[int]:
    """Paid there, PENDING here, by customers with a subscription."""
    subscriptions = []
    for number in range(OTHERS + 1):
        user = f"user-{number}"
        subscriptions.append(service.subscription(user, ended_at=NOON + timedelta(days=3)))
        service.payment(service.paid_there(f"paid-{number}", user=user, plan_id=service.monthly))
    return subscriptions


def is_extended(service: Service, subscription: int) -> bool:
    return service.ended_at(subscription) > NOON + timedelta(days=20)


def renewals(service: Service) -> list[int]:
    return [service.subscriber() for _ in range(OTHERS + 1)]


def over(service: Service) -> list[int]:
    return [service.subscription(ended_at=NOON - timedelta(days=30 - number)) for number in range(OTHERS + 1)]


def stale(service: Service) -> list[int]:
    return [service.payment(created_at=NOON - timedelta(days=30 - number)) for number in range(OTHERS + 1)]


CASES = {
    "purchases": Case(
        "matching_successful_payments_job", purchases, "subscriptions", "INSERT", "NEW.user_id = 'user-0'",
        "NEW.ended_at := NEW.started_at", has_bought, payment=True,
    ),
    "payment rows of purchases": Case(
        "matching_successful_payments_job", purchases, "payments", "INSERT", "NEW.external_payment_id = 'paid-0'",
        "NEW.subscription_id := NULL", has_bought, payment=True,
    ),
    "extensions": Case(
        "matching_pending_payments_job", extensions, "subscriptions", "UPDATE", "NEW.user_id = 'user-0'",
        "NEW.ended_at := OLD.ended_at", is_extended, payment=True,
    ),
    "payment rows": Case(
        "matching_pending_payments_job", extensions, "payments", "UPDATE", "NEW.external_payment_id = 'paid-0'",
        "NEW.status := OLD.status", is_extended, payment=True,
    ),
    "subscriptions that are over": Case(
        "expire_subscriptions_job", over, "subscriptions", "UPDATE", "NEW.id = 1",
        "NEW.status := OLD.status", lambda service, id_: service.status("subscriptions", id_) == "EXPIRED",
    ),
    "stale payments": Case(
        "expire_payments_job", stale, "payments", "UPDATE", "NEW.id = 1",
        "NEW.status := OLD.status", lambda service, id_: service.status("payments", id_) == "EXPIRED",
    ),
}  # fmt: skip
WAYS = {
    "two rows where one is wanted": (TWO_ROWS_AS_ONE, False),
    "a table that is missing": (NO_SUCH_TABLE, False),
    "at commit": ("RAISE 'not this one'", True),
    "at commit, a table that is missing": (NO_SUCH_TABLE, True),
    "swallowed": ("RETURN NULL", False),
}


@pytest.mark.parametrize("way", [*WAYS, "reverted"])
@pytest.mark.parametrize("name", CASES)
def test_one_row_that_a_trigger_spoils_never_stops_the_others(service: Service, name: str, way: str) -> None:
    case = CASES[name]
    rows = case.prepare(service)
    deed, at_commit = WAYS.get(way, (case.revert, False))
    service.meddle(case.table, case.condition, deed, event=case.event, at_commit=at_commit)

    runs = [service.run(case.job) for _ in range(2)]

    assert [run.failure for run in runs] == ["", ""]
    assert [case.is_done(service, row) for row in rows] == [False] + [True] * OTHERS
    [problem] = service.rows("quarantine")
    assert problem.kind == "not_writable"
    if case.payment:
        assert problem.external_payment_id == "paid-0"
        assert service.settled("paid-0") == []
    else:
        assert rows[0] in (problem.subscription_id, problem.payment_id)
    assert [run.report["newly quarantined"] for run in runs] == [1, 0]
    assert (runs[0].report["applied"], runs[1].report["applied"]) == (OTHERS, 0)


@pytest.mark.parametrize("way", [*WAYS, "reverted"])
def test_a_renewal_that_is_paid_and_cannot_be_granted_is_told_and_never_stops_the_others(
    service: Service, way: str
) -> None:
    refused, *others = renewals(service)
    deed, at_commit = WAYS.get(way, ("NEW.ended_at := OLD.ended_at", False))
    service.meddle("subscriptions", f"NEW.id = {refused}", deed, at_commit=at_commit)

    runs = [service.run("autopayment_job") for _ in range(2)]

    assert service.charged() == dict.fromkeys([refused, *others], 1)
    assert [service.ended_at(id_) > NOON for id_ in (refused, *others)] == [False] + [True] * OTHERS
    assert not any(run.ok for run in runs)
    assert "paid at the provider" in runs[0].failure
    assert "not granted" in runs[0].failure
    [problem] = service.rows("quarantine")
    assert (problem.kind, problem.subscription_id) == ("not_writable", refused)
    # Mended, the next run grants what was paid, and nobody is charged for it.
    service.execute("DROP TRIGGER meddle ON subscriptions")
    assert service.run("autopayment_job").ok
    assert service.ended_at(refused) > NOON
    assert service.charged() == dict.fromkeys([refused, *others], 1)
    service.check_books()


@pytest.mark.parametrize("name", CASES)
def test_what_every_row_meets_alike_stops_the_run_with_the_reason_and_fills_no_quarantine(
    service: Service, name: str
) -> None:
    case = CASES[name]
    rows = case.prepare(service)
    service.meddle(case.table, "true", NO_SUCH_TABLE, event=case.event)

    run = service.run(case.job)

    assert not run.ok
    assert "no_such_table" in run.failure
    assert "doctor" in run.failure
    assert "must be retried" not in run.failure
    assert not any(case.is_done(service, row) for row in rows)
    assert service.rows("quarantine") == []


def test_what_is_each_rows_own_fault_puts_each_before_a_person(service: Service) -> None:
    extensions(service)
    service.meddle("subscriptions", "true", TWO_ROWS_AS_ONE)

    run = service.run("matching_pending_payments_job")

    assert run.ok, run.failure
    assert len(service.rows("quarantine", "kind = 'not_writable'")) == OTHERS + 1


def test_many_rows_that_a_trigger_swallows_never_stop_the_others(service: Service) -> None:
    rows = [service.subscription(ended_at=NOON - timedelta(days=90 - number)) for number in range(60)]
    service.meddle("subscriptions", f"NEW.id IN ({', '.join(map(str, rows[:25]))})", "RETURN NULL")

    run = service.run("expire_subscriptions_job")

    assert run.ok, run.failure
    assert service.statuses("subscriptions", *rows) == ["ACTIVE"] * 25 + ["EXPIRED"] * 35
    assert {row.subscription_id for row in service.rows("quarantine")} == set(rows[:25])


def test_a_trigger_that_swallows_every_row_stops_the_expiry_and_fills_no_quarantine(service: Service) -> None:
    rows = [service.subscription(ended_at=NOON - timedelta(days=90 - number)) for number in range(60)]
    service.meddle("subscriptions", "true", "RETURN NULL")

    run = service.run("expire_subscriptions_job")

    assert not run.ok
    assert "a trigger or rule of the service's" in run.failure
    assert service.statuses("subscriptions", *rows) == ["ACTIVE"] * 60
    assert service.rows("quarantine") == []


def test_a_row_for_which_a_trigger_is_always_busy_is_tried_again_and_never_stops_the_expiry(service: Service) -> None:
    rows = over(service)
    service.meddle("subscriptions", f"NEW.id = {rows[0]}", "RAISE lock_not_available")

    run = service.run("expire_subscriptions_job")

    assert not run.ok
    assert f"subscription {rows[0]}: the database was busy" in run.failure
    assert service.statuses("subscriptions", *rows) == ["ACTIVE"] + ["EXPIRED"] * OTHERS
    assert service.rows("quarantine") == []
