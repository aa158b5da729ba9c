"""upcoming_job: the asset shows what the next renewal runs will decide, and names no customer."""

from __future__ import annotations

from datetime import timedelta

from billing_orchestration.desk.upcoming import find_upcoming
from billing_orchestration_tests.jobs.service import Service

JOB = "upcoming_job"
A_DAY = timedelta(days=1)


def test_the_asset_shows_what_the_command_shows_without_the_customers(service: Service) -> None:
    soon = service.subscriber(user="anna-of-example", ended_at=service.now + A_DAY)
    later = service.subscriber(ended_at=service.now + 5 * A_DAY)
    no_method = service.subscription(ended_at=service.now + 2 * A_DAY)
    before = service.snapshot()

    run = service.run(JOB)

    assert run.ok, run.failure
    shown = run.materialized["upcoming"]
    assert (shown["to be charged"], shown["not to be charged"], shown["to be charged, RUB"]) == (1, 1, 299.0)
    rows = shown["renewals (2)"]
    assert [(row["subscription"], row["charged"], row["code"]) for row in rows] == [
        (str(soon), "yes", ""),
        (str(no_method), "no", "no_method"),
    ]
    provider = service.connect_provider(service.settings)
    told = find_upcoming(service.engine, provider, service.settings, service.now, 3)
    assert [(row["on"], row["amount"], row["card"]) for row in rows] == [(t.on, t.amount, t.card) for t in told]
    assert "anna-of-example" not in str(shown)
    assert str(later) not in [row["subscription"] for row in rows]
    assert service.snapshot() == before
    assert service.charges() == []


def test_it_looks_as_far_as_it_is_told_and_a_dry_run_marks_nothing(service: Service) -> None:
    service.subscriber(ended_at=service.now + 5 * A_DAY)

    run = service.run(JOB, dry_run=True, ops={"show_upcoming": {"days": 7}})

    assert run.ok, run.failure
    assert run.materialized == {}
    told = run.metadata["show_upcoming"]
    assert told["result"] == "dry run: to be charged 1 (299.00 RUB)"


def test_its_last_event_tells_the_result_in_one_sentence_and_counts_nothing_that_is_zero(service: Service) -> None:
    empty = service.run(JOB).metadata["show_upcoming"]
    assert empty["result"] == "nothing to do"
    assert set(empty) == {"result", "next: numbers over time"}
    service.subscriber(ended_at=service.now + A_DAY)
    service.subscription(ended_at=service.now + A_DAY)

    told = service.run(JOB).metadata["show_upcoming"]

    assert told["result"] == "to be charged 1 (299.00 RUB), not to be charged 1"
    assert set(told) == {"result", "next: numbers over time", "renewals (2)", "all of them"}
