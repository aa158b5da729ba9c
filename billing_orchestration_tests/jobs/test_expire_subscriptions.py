"""expire_subscriptions_job, whole: whose grace is over, who is held back, what stops a run that would end too many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
import sqlalchemy as sa

from billing_orchestration.database.expiry import fetch_over
from billing_orchestration.domain.clocks import Clocks
from billing_orchestration.domain.run_scope import RunScope
from billing_orchestration.jobs.expire_subscriptions import CHUNK, SubscriptionsOver, expire_chunks
from billing_orchestration.jobs.run_report import RunReport
from billing_orchestration.resources import BillingDatabase, Clock
from billing_orchestration.threads import OF_THE_SYSTEM
from billing_orchestration_tests.books import NOON, stored
from billing_orchestration_tests.jobs.service import Service
from billing_orchestration_tests.waiting import wait_for_a_blocked_session

UTC = timezone.utc
JOB = "expire_subscriptions_job"


def over(service: Service, plan: int | None = None, **row: Any) -> int:
    """An ACTIVE subscription that ended a month ago."""
    return service.subscription(plan_id=plan, ended_at=row.pop("ended_at", service.now - timedelta(days=30)), **row)


def many(service: Service, count: int, *, ended_at: datetime) -> None:
    """As many ACTIVE subscriptions as it takes."""
    service.execute(
        """
        INSERT INTO subscriptions (user_id, status, started_at, ended_at, created_at, updated_at)
        SELECT 'user ' || n, 'ACTIVE', '2025-01-01', :ended_at, '2025-01-01', '2025-01-01'
        FROM generate_series(1, :count) AS n
        """,
        count=count,
        ended_at=ended_at.replace(tzinfo=None),
    )


def count_of(service: Service, state: str) -> int:
    """How many subscriptions are in a status."""
    [found] = service.scalars("SELECT count(*) FROM subscriptions WHERE status::text = :state", state=state)
    return int(found)


# --- Whose grace is over


def test_the_grace_of_three_days_is_counted_in_whole_billing_days(service: Service) -> None:
    three_days_ago = over(service, ended_at=datetime(2026, 3, 9, 23, 59, 59, 999999, tzinfo=UTC))
    two_days_ago = over(service, ended_at=datetime(2026, 3, 10, 0, 0, tzinfo=UTC))
    later_today = over(service, ended_at=NOON + timedelta(hours=3))

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.status("subscriptions", three_days_ago) == "EXPIRED"
    assert service.statuses("subscriptions", two_days_ago, later_today) == [
        "ACTIVE",
        "ACTIVE",
    ]


def test_the_billing_day_is_that_of_the_billing_time_zone(service_with: Callable[..., Service]) -> None:
    # At 19:00 UTC it is half past midnight of 13 March in Kolkata: three days ago there is the 10th.
    service = service_with(billing_timezone="Asia/Kolkata", now=datetime(2026, 3, 12, 19, 0, tzinfo=UTC))
    on_the_tenth = over(service, ended_at=datetime(2026, 3, 10, 18, 29, tzinfo=UTC))
    on_the_eleventh = over(service, ended_at=datetime(2026, 3, 10, 18, 30, tzinfo=UTC))

    assert service.run(JOB).ok

    assert service.statuses("subscriptions", on_the_tenth, on_the_eleventh) == [
        "EXPIRED",
        "ACTIVE",
    ]


@pytest.mark.parametrize(("grace_days", "first_to_stay"), [(0, 12), (10, 2)])
def test_the_grace_is_a_setting(service_with: Callable[..., Service], grace_days: int, first_to_stay: int) -> None:
    service = service_with(subscription_grace_days=grace_days)
    expired = over(service, ended_at=datetime(2026, 3, first_to_stay, 23, 59, tzinfo=UTC))
    stays = over(service, ended_at=datetime(2026, 3, first_to_stay + 1, 0, 0, tzinfo=UTC))

    assert service.run(JOB).ok

    assert service.statuses("subscriptions", expired, stays) == ["EXPIRED", "ACTIVE"]


def test_one_without_an_end_stays_and_is_counted(service: Service) -> None:
    endless = service.subscription(plan_id=None, ended_at=None)

    run = service.run(JOB)

    assert run.ok, run.failure
    assert service.status("subscriptions", endless) == "ACTIVE"
    assert run.number("fetch_subscriptions_over", "ACTIVE without an end") == 1


def test_months_of_stale_active_subscriptions_expire_in_one_run_chunk_by_chunk(service: Service) -> None:
    many(service, 10_001, ended_at=NOON - timedelta(days=90))
    many(service, 100, ended_at=NOON + timedelta(days=1))

    run = service.run(JOB, max_changes=10_001)

    assert run.ok, run.failure
    assert (count_of(service, "EXPIRED"), count_of(service, "ACTIVE")) == (10_001, 100)
    assert run.report["applied"] == 10_001
    assert service.scalars("SELECT count(DISTINCT entity_id) FROM billing_orchestration.audit_trail") == [10_001]
    assert any("expired 10000 of 10001" in line for line in run.log)


# --- Who is held back


def test_one_whose_charge_is_unknown_pending_or_in_review_is_held_back_and_reported(service: Service) -> None:
    plan = service.plan("299.00")
    day = NOON - timedelta(days=4)
    service.set_time(day)
    unknown = service.subscriber(plan, method="unknown")
    pending = service.subscriber(plan, script="pending")
    review = service.subscriber(plan, method="review")
    declined = service.subscriber(plan, script="canceled:card_expired")
    renewed = service.subscriber(plan)
    service.sandbox.misbehave("create", "cut_after", times=None, payment_method_id="unknown")
    service.sandbox.misbehave("create", "change", payment_method_id="review", set={"amount.value": "1.00"})
    service.run("autopayment_job")
    service.set_time(NOON)

    run = service.run(JOB)

    assert run.ok, run.failure
    states = {name: service.attempts(subscription)[0].state for name, subscription in
              (("unknown", unknown), ("pending", pending), ("review", review), ("declined", declined))}  # fmt: skip
    assert states == {"unknown": "UNKNOWN", "pending": "PENDING", "review": "REVIEW", "declined": "STOPPED"}
    assert service.statuses("subscriptions", unknown, pending, review, renewed) == ["ACTIVE"] * 4
    assert service.status("subscriptions", declined) == "EXPIRED"
    for subscription in (unknown, pending, review):
        assert run.reasons(f"subscription {subscription}")[0].startswith("leave: held back")
    assert run.report["skipped"] == 3


def test_one_that_is_paid_after_it_expired_is_active_again(service: Service) -> None:
    service.set_time(NOON - timedelta(days=4))
    subscription = service.subscriber(method="hers")
    service.sandbox.misbehave("create", "cut_after", times=None)
    service.run("autopayment_job")
    # As if nothing had held it back.
    service.execute("UPDATE subscriptions SET status = 'EXPIRED'")
    service.set_time(NOON)

    assert service.run("matching_successful_payments_job", as_of=NOON - timedelta(days=4)).ok

    assert service.status("subscriptions", subscription) == "ACTIVE"
    assert service.ended_at(subscription) == datetime(2026, 4, 8, 12, 0, tzinfo=UTC)
    service.check_books()


# --- The guard


@pytest.mark.parametrize(
    ("ending", "active", "stops"),
    [
        (100, 100, False),
        (101, 505, False),
        (101, 504, True),
        (101, 101, True),
    ],
    ids=["a hundred of a hundred", "exactly a fifth", "more than a fifth and than a hundred", "all of them"],
)
def test_a_run_that_would_end_more_than_a_fifth_and_more_than_a_hundred_stops_before_applying(
    service: Service, ending: int, active: int, stops: bool
) -> None:
    many(service, ending, ended_at=NOON - timedelta(days=30))
    many(service, active - ending, ended_at=NOON + timedelta(days=30))

    run = service.run(JOB)

    assert run.ok is not stops
    assert count_of(service, "EXPIRED") == (0 if stops else ending)
    assert bool(service.rows("audit_trail")) is not stops


def test_a_stopped_run_says_what_it_would_have_done_and_how_to_go_on(service: Service) -> None:
    many(service, 150, ended_at=NOON - timedelta(days=30))
    before = service.snapshot()

    run = service.run(JOB)

    assert not run.ok
    assert "stopped before anything was applied: it would expire 150 of 150 ACTIVE subscriptions" in run.failure
    assert "launch it again with max_changes: 150" in run.failure
    assert len(run.decisions) == 100
    assert run.materialized == {}
    assert service.snapshot() == before
    assert service.run(JOB, max_changes=150).ok
    assert count_of(service, "EXPIRED") == 150


def test_those_that_are_held_back_do_not_count_for_the_guard(service: Service) -> None:
    many(service, 101, ended_at=NOON - timedelta(days=30))
    service.execute("""
        INSERT INTO billing_orchestration.renewal_attempts (id, subscription_id, period_start, number, state,
            idempotence_key, body, amount, currency, user_id, plan_id, payment_provider_id, payment_method_id,
            planned_at, run_id)
        SELECT gen_random_uuid(), min(id), min(ended_at), 1, 'UNKNOWN', gen_random_uuid(), '{}', 1, 'RUB', '', 1, 1, '',
               now(), '' FROM subscriptions
    """)

    run = service.run(JOB)

    assert run.ok, run.failure
    assert (count_of(service, "EXPIRED"), count_of(service, "ACTIVE")) == (100, 1)


# --- Locked, changed meanwhile, refused


def test_one_that_is_renewed_while_the_run_waits_for_it_is_skipped_and_reported(
    service: Service, engine: sa.Engine
) -> None:
    renewed, ended = over(service), over(service)
    with engine.connect() as webhook:
        webhook.execute(sa.text("UPDATE subscriptions SET ended_at = '2026-05-01' WHERE id = :id"), {"id": renewed})
        wait = service.begin(JOB)
        wait_for_a_blocked_session(engine)
        webhook.commit()
    run = wait()

    assert run.ok, run.failure
    assert service.statuses("subscriptions", renewed, ended) == ["ACTIVE", "EXPIRED"]
    assert (run.report["applied"], run.report["skipped"]) == (1, 1)
    assert run.report["changed meanwhile"] == 1
    assert run.materialized[JOB.removesuffix("_job")]["expired"] == 1


def test_one_that_somebody_keeps_locked_stays_and_the_run_is_red_after_the_others_are_done(service: Service) -> None:
    locked, free = over(service), over(service)
    with service.locking("subscriptions", locked):
        run = service.run(JOB, load=service.impatient)

    assert not run.ok
    assert "busy" in run.failure
    assert service.statuses("subscriptions", locked, free) == ["ACTIVE", "EXPIRED"]
    assert service.run(JOB).ok
    assert service.status("subscriptions", locked) == "EXPIRED"


def test_one_that_the_database_refuses_goes_to_a_person_once_and_never_stops_the_others(service: Service) -> None:
    subscriptions = [over(service, ended_at=NOON - timedelta(days=60 - number)) for number in range(25)]
    service.refuse_changes_of("subscriptions", subscriptions[0], subscriptions[13])

    runs = [service.run(JOB) for _ in range(2)]

    assert [run.failure for run in runs] == ["", ""]
    refused = {
        subscription for subscription in subscriptions if service.status("subscriptions", subscription) == "ACTIVE"
    }
    assert refused == {subscriptions[0], subscriptions[13]}
    assert [run.report["newly quarantined"] for run in runs] == [2, 0]
    problems = service.rows("quarantine")
    assert {(row.kind, row.subscription_id) for row in problems} == {("not_writable", row) for row in refused}
    assert "not this one" in problems[0].reason
    assert runs[0].report["applied"] == 23


def test_of_several_chunks_all_expire_but_the_odd_ones(service: Service, engine: sa.Engine) -> None:
    many(service, 2 * CHUNK + 500, ended_at=NOON - timedelta(days=30))
    refused, locked = service.scalars("SELECT id FROM subscriptions ORDER BY id OFFSET 12000 LIMIT 2")
    service.refuse_changes_of("subscriptions", refused)
    with service.locking("subscriptions", locked):
        wait = service.begin(JOB, max_changes=3 * CHUNK)
        wait_for_a_blocked_session(engine)
    run = wait()

    assert run.ok, run.failure
    assert (run.report["applied"], run.report["skipped"]) == (2 * CHUNK + 499, 0)
    assert service.scalars("SELECT id FROM subscriptions WHERE status = 'ACTIVE'") == [refused]
    assert service.scalars(
        "SELECT count(DISTINCT entity_id) FROM billing_orchestration.audit_trail WHERE entity = 'subscription'"
    ) == [2 * CHUNK + 499]
    assert len(service.audit(run)) == 2 * CHUNK + 499 + 1  # and the opening of the quarantine's entry


def test_side_by_side_no_more_expire_than_were_shown_and_guarded(service: Service) -> None:
    many(service, 3 * CHUNK, ended_at=NOON - timedelta(days=30))
    over_before = NOON - timedelta(days=20)
    with service.engine.connect() as connection:
        found = fetch_over(connection, over_before, 10)
    scope = RunScope(
        as_of=NOON, source="config", heals=False, dry_run=False, max_changes=None, run_id="run", approved_plan=None
    )
    database = BillingDatabase(lambda: service.settings)

    shown, report = replace(found, over=2 * CHUNK + 7), RunReport()

    over_all = SubscriptionsOver(scope, over_before, shown, Clocks())
    expire_chunks(over_all, database, Clock(lambda: NOON), OF_THE_SYSTEM, report, print)

    database.close()
    assert report.applied == 2 * CHUNK + 7
    assert count_of(service, "EXPIRED") == 2 * CHUNK + 7


def test_a_database_that_refuses_everything_fails_the_run_and_fills_no_quarantine(service: Service) -> None:
    subscriptions = [over(service) for _ in range(60)]
    service.refuse_changes_of("subscriptions", *subscriptions)

    run = service.run(JOB)

    assert not run.ok
    assert "not this one" in run.failure
    assert service.rows("quarantine") == []
    assert count_of(service, "ACTIVE") == 60


def test_a_second_run_changes_nothing(service: Service) -> None:
    for _ in range(5):
        over(service)
    assert service.run(JOB).ok
    before = service.snapshot()

    assert service.run(JOB).ok

    assert service.snapshot() == before


# --- What a run tells


def test_every_change_is_in_the_audit_trail_with_run_id_old_and_new_value_and_reason(service: Service) -> None:
    subscription = over(service, ended_at=datetime(2026, 3, 1, 9, 30, tzinfo=UTC))

    run = service.run(JOB)

    [entry] = service.audit(run)
    assert (entry.job, entry.entity, entry.entity_id, entry.action) == (
        JOB,
        "subscription",
        str(subscription),
        "expired",
    )
    assert (entry.old, entry.new) == ({"status": "ACTIVE"}, {"status": "EXPIRED"})
    assert entry.reason == "ended 2026-03-01 09:30:00, the grace of 3 days is over"
    assert entry.at == NOON
    row = service.row("subscriptions", subscription)
    assert (row.updated_at, row.ended_at) == (stored(2026, 3, 12, 12, 0), stored(2026, 3, 1, 9, 30))


def test_a_run_shows_its_slice_its_decisions_and_the_numbers_of_the_day(service: Service) -> None:
    ended = over(service, user="anna", ended_at=datetime(2026, 3, 1, 9, 30, tzinfo=UTC))
    over(service, ended_at=NOON + timedelta(days=1))

    run = service.run(JOB)

    assert run.number("fetch_subscriptions_over", "ACTIVE") == 2
    assert run.number("fetch_subscriptions_over", "over") == 1
    assert run.number("fetch_subscriptions_over", "ended before") == "2026-03-10 00:00:00 UTC"
    assert run.reasons(f"subscription {ended}") == ["expire: ended 2026-03-01 09:30:00 UTC"]
    assert run.materialized == {JOB.removesuffix("_job"): {"expired": 1, "held back": 0, "active": 1}}


def test_it_needs_no_provider(service: Service) -> None:
    over(service)
    service.sandbox.misbehave("any", "silence_before", times=None)

    assert service.run(JOB).ok

    assert service.sandbox.count() == 0
