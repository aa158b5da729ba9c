"""How the matching jobs heal themselves: what a tick covers after an outage, and what may never move the watermark."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from billing_orchestration_tests.books import NOON
from billing_orchestration_tests.jobs.service import Run, Service

PENDING_JOB = "matching_pending_payments_job"
SUCCESSFUL_JOB = "matching_successful_payments_job"
BOTH = pytest.mark.parametrize("job", [PENDING_JOB, SUCCESSFUL_JOB])
# What only the code that both share decides is tried with one of them.
ONE = pytest.mark.parametrize("job", [SUCCESSFUL_JOB])
OVERLAP = timedelta(minutes=15)


def paid(service: Service, plan: int, at: datetime, **there: Any) -> str:
    """A purchase that was paid then and that the service did not hear of: PENDING here, succeeded there."""
    payment_id = service.paid_there(user=f"user of {at}", plan_id=plan, created_at=at, **there)
    service.payment(payment_id, created_at=at)
    return payment_id


def window(run: Run) -> str:
    """The window as the run shows it."""
    return next(str(shown["window"]) for op, shown in run.metadata.items() if op.startswith("fetch_paid"))


@BOTH
def test_the_first_run_covers_an_hour_and_sets_the_watermark_to_its_as_of(service: Service, job: str) -> None:
    run = service.tick(job)

    assert run.ok, run.failure
    assert window(run) == "2026-03-12 11:00:00 UTC to 2026-03-12 12:00:00 UTC"
    assert service.watermark(job) == NOON


@BOTH
@pytest.mark.parametrize("outage", [timedelta(hours=3), timedelta(days=6)], ids=["three hours", "six days"])
def test_a_tick_after_an_outage_covers_all_of_it_with_an_overlap(service: Service, job: str, outage: timedelta) -> None:
    plan = service.plan()
    service.tick(job)
    service.advance(seconds=outage.total_seconds())
    names = [
        paid(service, plan, NOON - OVERLAP),
        paid(service, plan, NOON + timedelta(minutes=1)),
        paid(service, plan, service.now - timedelta(hours=1, minutes=1)),
        paid(service, plan, NOON - timedelta(days=20), captured_at=NOON + timedelta(minutes=1)),
    ]
    before = paid(service, plan, NOON - OVERLAP - timedelta(seconds=1))

    run = service.tick(job)

    assert run.ok, run.failure
    assert [service.settled(name) for name in names] == [["created"]] * 4
    assert service.settled(before) == []
    assert service.watermark(job) == service.now
    assert any("catching up from 2026-03-12 11:45:00 UTC" in line for line in run.log)
    service.check_books()


@ONE
def test_a_manual_launch_after_an_outage_covers_it_as_a_tick_does(service: Service, job: str) -> None:
    service.tick(job)
    name = paid(service, service.plan(), NOON + timedelta(minutes=1))
    service.advance(hours=3)

    assert service.run(job).ok

    assert service.settled(name) == ["created"]
    assert service.watermark(job) == service.now


@BOTH
def test_an_outage_of_eight_days_is_covered_for_seven_and_the_gap_is_reported_once(service: Service, job: str) -> None:
    plan = service.plan()
    service.tick(job)
    service.advance(days=8)
    in_the_gap = paid(service, plan, NOON + timedelta(hours=12, minutes=30))
    first_covered = paid(service, plan, service.now - timedelta(days=7))

    runs = [service.tick(job)]
    service.advance(minutes=2)
    runs.append(service.tick(job))

    assert [run.failure for run in runs] == ["", ""]
    assert service.settled(first_covered) == ["created"]
    assert service.settled(in_the_gap) == []
    [problem] = service.rows("quarantine")
    assert "2026-03-12 11:45:00 UTC to 2026-03-13 12:00:00 UTC" in problem.reason
    assert f"Backfill these hours of {job}" in problem.reason
    assert [run.report["newly quarantined"] for run in runs] == [1, 0]
    assert [len(run.reasons(job)) for run in runs] == [1, 0]
    # As it says: the hours of the gap are backfilled.
    assert service.run(job, partition="2026-03-13-00:00").ok
    assert service.settled(in_the_gap) == ["created"]


@ONE
def test_a_gap_is_reported_once_although_the_run_that_found_it_has_to_be_repeated(service: Service, job: str) -> None:
    service.tick(job)
    service.advance(days=8)
    paid(service, service.plan(), service.now - timedelta(minutes=5))
    service.tick(job, max_changes=0)
    service.advance(minutes=2)
    service.tick(job)
    service.advance(minutes=2)
    service.tick(job)

    assert len(service.rows("quarantine")) == 1


@ONE
def test_a_dry_run_shows_the_gap_and_leaves_it_to_the_next_run(service: Service, job: str) -> None:
    service.tick(job)
    service.advance(days=8)

    dry = service.tick(job, dry_run=True)

    assert dry.ok, dry.failure
    assert len(dry.reasons(job)) == 1
    assert service.rows("quarantine") == []
    assert service.watermark(job) == NOON
    assert service.tick(job).report["newly quarantined"] == 1


# --- What does not move it


@BOTH
@pytest.mark.parametrize("failure", ["the provider fails", "a page is missing", "max_changes", "a row is locked"])
def test_a_run_that_fails_does_not_move_the_watermark_and_the_next_one_covers_its_time(
    service: Service, job: str, failure: str
) -> None:
    plan = service.plan()
    service.tick(job)
    names = [paid(service, plan, NOON + timedelta(minutes=1, seconds=number)) for number in range(2)]
    service.advance(minutes=30)
    if failure == "max_changes":
        run = service.tick(job, max_changes=1)
    elif failure == "a row is locked":
        [first, _] = service.rows("payments")
        with service.locking("payments", first.id):
            run = service.tick(job, load=service.impatient)
    else:
        # Whichever of the two lists it is: by creation or by capture.
        effect = "error_before" if failure == "the provider fails" else "truncated"
        service.sandbox.misbehave("list", effect, times=None, skip=1 if effect == "truncated" else 0)
        run = service.tick(job)
        service.sandbox.behave()
    assert not run.ok
    assert service.watermark(job) == NOON

    service.advance(hours=2)
    assert service.tick(job).ok

    assert [service.settled(name) for name in names] == [["created"]] * 2
    assert service.watermark(job) == service.now


def half_written(service: Service, job: str, name: str, paid_at: datetime) -> None:
    """Paid long ago, and the webhook has written SUCCEEDED a moment ago and granted nothing yet."""
    service.tolerate_duplicates()
    service.paid_there(name, user=name, plan_id=service.plan(), created_at=paid_at)
    if job == PENDING_JOB:
        service.payment(name, created_at=paid_at)
    service.payment(name, status="SUCCEEDED", created_at=service.now - timedelta(seconds=20))


@BOTH
@pytest.mark.parametrize("outage", [timedelta(minutes=2), timedelta(hours=5)], ids=["none", "five hours"])
def test_a_watermark_stays_behind_what_a_webhook_has_half_written_and_the_next_tick_settles_it(
    service: Service, job: str, outage: timedelta
) -> None:
    service.tick(job)
    service.advance(seconds=outage.total_seconds())
    # At the far edge of what this tick covers: it would be out of the next one's reach.
    paid_at = min(NOON - OVERLAP, service.now - timedelta(hours=1)) + timedelta(minutes=1)
    half_written(service, job, "half written", paid_at)

    run = service.tick(job)

    assert run.ok, run.failure
    assert service.settled("half written") == []
    assert service.watermark(job) == paid_at
    service.advance(minutes=2)
    assert service.tick(job).ok
    assert service.settled("half written") == ["created"]
    assert service.watermark(job) == service.now


@BOTH
def test_a_webhook_that_goes_on_has_its_time_and_the_watermark_goes_on_with_it(service: Service, job: str) -> None:
    service.tick(job)
    service.advance(hours=5)
    half_written(service, job, "slow", NOON + timedelta(minutes=1))
    service.tick(job)
    subscription = service.subscription(user="slow")
    service.execute("UPDATE payments SET subscription_id = :id WHERE external_payment_id = 'slow'", id=subscription)
    service.advance(minutes=2)

    assert service.tick(job).ok

    assert service.settled("slow") == []
    assert service.watermark(job) == service.now


@BOTH
def test_a_backfill_that_leaves_something_to_a_webhook_is_red_for_no_tick_covers_its_time_again(
    service: Service, job: str
) -> None:
    service.tick(job)
    half_written(service, job, "half written", NOON - timedelta(days=3, minutes=30))

    run = service.run(job, partition="2026-03-09-11:00")

    assert "1 must be retried" in run.failure
    assert "the service's webhook is at work on it" in run.failure
    assert service.watermark(job) == NOON
    service.advance(minutes=2)
    assert service.run(job, partition="2026-03-09-11:00").ok
    assert service.settled("half written") == ["created"]


@ONE
def test_an_explicit_as_of_does_not_jump_over_what_was_not_covered(service: Service, job: str) -> None:
    plan = service.plan()
    service.tick(job)
    name = paid(service, plan, NOON + timedelta(minutes=30))
    service.advance(hours=5)

    for hours in (0, 1, 3):
        assert service.run(job, as_of=service.now - timedelta(hours=hours)).ok

    assert service.watermark(job) == NOON
    assert service.settled(name) == []
    assert service.tick(job).ok
    assert service.settled(name) == ["created"]


@BOTH
def test_partitions_do_not_jump_over_what_was_not_covered(service: Service, job: str) -> None:
    plan = service.plan()
    service.tick(job)
    name = paid(service, plan, NOON + timedelta(minutes=30))
    service.advance(hours=5)

    for partition in ("2026-03-12-14:00", "2026-03-12-17:00", "2026-03-01-00:00"):
        assert service.run(job, partition=partition).ok

    assert service.watermark(job) == NOON
    assert service.tick(job).ok
    assert service.settled(name) == ["created"]


def test_each_job_has_a_watermark_of_its_own(service: Service) -> None:
    service.tick(PENDING_JOB)
    service.tick(SUCCESSFUL_JOB)
    name = service.paid_there(plan_id=service.plan(), created_at=NOON + timedelta(minutes=5))
    service.advance(hours=3)
    service.tick(PENDING_JOB)

    assert service.tick(SUCCESSFUL_JOB).ok

    assert service.settled(name) == ["created"]


@ONE
def test_what_waits_for_a_person_does_not_hold_the_watermark(service: Service, job: str) -> None:
    service.paid_there("odd", metadata={})
    service.payment("odd", created_at=NOON)

    assert service.tick(job).ok

    assert service.quarantined("odd") == ["metadata"]
    assert service.watermark(job) == NOON


# --- The edges of what was covered


@pytest.mark.parametrize("pause", [timedelta(minutes=59), timedelta(minutes=60), timedelta(minutes=61),
                                   timedelta(hours=4)], ids=str)  # fmt: skip
def test_what_a_tick_left_to_the_webhook_is_covered_by_the_next_one_whenever_that_comes(
    service: Service, pause: timedelta
) -> None:
    name = service.paid_there(plan_id=service.plan(), created_at=NOON - timedelta(seconds=59))
    service.tick(SUCCESSFUL_JOB)
    assert service.settled(name) == []
    assert service.watermark(SUCCESSFUL_JOB) == NOON - timedelta(seconds=59)
    service.advance(seconds=pause.total_seconds())

    assert service.tick(SUCCESSFUL_JOB).ok

    assert service.settled(name) == ["created"]


@ONE
def test_a_payment_that_the_providers_list_shows_late_is_covered_by_a_later_tick(service: Service, job: str) -> None:
    service.provider.switches.list_lag_s = 300.0
    service.tick(job)
    service.advance(minutes=2)
    name = paid(service, service.plan(), service.now - timedelta(minutes=1))
    service.tick(job)
    assert service.settled(name) == []
    service.advance(hours=2)

    assert service.tick(job).ok

    assert service.settled(name) == ["created"]
