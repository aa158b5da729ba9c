"""What holds for both matching jobs: what a slice is, and that nothing is settled from half of one, or twice."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from billing_orchestration_tests.books import NOON, stored
from billing_orchestration_tests.jobs.service import Service

PENDING_JOB = "matching_pending_payments_job"
SUCCESSFUL_JOB = "matching_successful_payments_job"
JOBS = [PENDING_JOB, SUCCESSFUL_JOB]


def unheard(
    service: Service, job: str, name: str, *, created_at: datetime = NOON - timedelta(minutes=10), **there: Any
) -> None:
    """A purchase that was paid and that the service did not hear of: PENDING here, or (second job) without a row."""
    service.paid_there(name, created_at=created_at, **{"user": f"user of {name}", "plan_id": service.monthly} | there)
    if job == PENDING_JOB:
        service.payment(name, method=None, created_at=created_at)


def granted(service: Service) -> set[str]:
    """The payments that gave somebody a period."""
    return {row.external_payment_id for row in service.rows("settlements")}


@pytest.mark.parametrize("job", JOBS)
def test_the_window_is_by_created_or_captured_and_both_ends_are_in_it(service: Service, job: str) -> None:
    hour_ago, millisecond, long_ago = NOON - timedelta(hours=1), timedelta(milliseconds=1), NOON - timedelta(days=9)
    for name, created_at, captured_at in (
        ("created at the start", hour_ago, hour_ago),
        ("created before the start", hour_ago - millisecond, hour_ago - millisecond),
        ("created at the end", NOON, NOON),
        ("created after the end", NOON + millisecond, NOON + millisecond),
        ("captured at the start", long_ago, hour_ago),
        ("captured before the start", long_ago, hour_ago - millisecond),
        ("captured at the end", long_ago, NOON),
    ):
        unheard(service, job, name, created_at=created_at, captured_at=captured_at)
    service.advance(minutes=5)

    assert service.run(job, as_of=NOON).ok

    assert granted(service) == {
        "created at the start", "created at the end", "captured at the start", "captured at the end",
    }  # fmt: skip


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("effect", ["truncated", "error_before"])
def test_a_list_that_breaks_off_on_page_seven_fails_the_run_before_anything_is_applied(
    service: Service, job: str, effect: str
) -> None:
    plan = service.plan()
    service.provider.add_payments(
        {
            "id": f"paid-{number}",
            "created_at": NOON - timedelta(seconds=number + 1),
            "amount": "299.00",
            "metadata": {"user_id": f"user-{number}", "plan_id": str(plan), "payment_provider_id": "1"},
        }
        for number in range(601)
    )
    for name in ("paid-0", "paid-600") if job == PENDING_JOB else ():
        service.payment(name)
    service.sandbox.misbehave("list", effect, page=7, times=None)
    before = service.snapshot()

    run = service.run(job)

    assert not run.ok
    assert "page 7" in run.failure
    assert service.snapshot() == before
    assert service.watermark(job) is None
    service.sandbox.behave()
    assert service.run(job).ok
    expected = 2 if job == PENDING_JOB else 601
    assert len(service.rows("subscriptions")) == len(service.rows("payments")) == expected


@pytest.mark.parametrize("job", JOBS)
def test_one_poisoned_payment_goes_to_a_person_once_and_never_stops_the_others(service: Service, job: str) -> None:
    eternal, endless = service.subscription("eva"), service.subscription("ina", ended_at=None)
    service.execute("UPDATE subscriptions SET ended_at = 'infinity' WHERE id = :id", id=eternal)
    for name in ("one", "two"):
        unheard(service, job, name)
    unheard(service, job, "eternal", user="eva")
    unheard(service, job, "endless", user="ina")
    service.paid_there("nulls", override={"amount": None, "created_at": None, "metadata": None})
    service.paid_there("nameless", raw=[])

    run = service.run(job)

    assert run.ok, run.failure
    assert granted(service) == {"one", "two"}
    assert [service.quarantined(name) for name in ("eternal", "endless", "nulls")] == [
        ["no_end"], ["no_end"], ["unreadable"],
    ]  # fmt: skip
    assert len(service.rows("quarantine")) == 4
    assert service.row("subscriptions", endless).ended_at is None
    assert service.run(job).report["newly quarantined"] == 0


@pytest.mark.parametrize("job", JOBS)
def test_a_second_run_of_either_job_changes_nothing(service: Service, job: str) -> None:
    service.subscription("anna", ended_at=NOON + timedelta(days=4))
    unheard(service, job, "extends", user="anna")
    unheard(service, job, "creates")
    unheard(service, job, "returned", refunded_amount="299.00")
    unheard(service, job, "odd", override={"metadata": {}})
    assert service.run(job).ok
    before = service.snapshot()

    for again in (job, job, *JOBS):
        assert service.run(again).ok

    assert service.snapshot() == before


@pytest.mark.parametrize("unique", [True, False], ids=["with the unique index", "without it"])
def test_both_jobs_at_once_grant_each_payment_once(service: Service, unique: bool) -> None:
    if not unique:
        service.tolerate_duplicates()
    names = [f"paid-{number}" for number in range(60)]
    for number, name in enumerate(names):
        # Twelve users with five payments each: batches of both jobs meet at the same users.
        unheard(service, PENDING_JOB, name, user=f"user-{number % 12}")
    # Both have read their slices before either applies.
    service.sandbox.misbehave("list", "none", delay_s=0.2, times=4)
    running = [service.begin(job) for job in JOBS]
    runs = [wait() for wait in running]

    assert [run.failure for run in runs] == ["", ""]
    assert all(len(service.settled(name)) == 1 for name in names)
    assert len(service.rows("payments")) == 60
    assert {row.status for row in service.rows("payments")} == {"SUCCEEDED"}
    # One subscription for each user, extended once for each of the five payments: 12 March to 12 August.
    assert [row.ended_at for row in service.rows("subscriptions")] == [stored(2026, 8, 12, 12, 0)] * 12
    service.check_books()


@pytest.mark.parametrize("job", JOBS)
def test_a_tick_that_changes_nothing_plots_nothing(service: Service, job: str) -> None:
    unheard(service, job, "paid")
    numbers = {"corrections": 1, "quarantined": 0, "to retry": 0}
    assert service.tick(job).materialized == {job.removesuffix("_job"): numbers}

    assert service.tick(job).materialized == {}
