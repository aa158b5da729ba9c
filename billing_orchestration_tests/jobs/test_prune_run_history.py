"""run_history_job, and how much a run leaves in the run history.

Runs are made now, whatever the service's clock says; so the service's clock goes on by weeks to make them old.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa

from billing_orchestration_tests.jobs.service import Run, Service

JOB = "run_history_job"
DELETE = "delete_old_runs"
HOUR = "2026-03-12-10:00"
MATCHING = "matching_successful_payments_job"


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def empty_tick(service: Service, instance: dg.DagsterInstance, partition: str | None = HOUR) -> Run:
    return service.tick(MATCHING, instance=instance, partition=partition)


def repairing_tick(service: Service, instance: dg.DagsterInstance) -> Run:
    service.paid_there(plan_id=service.plan())
    run = service.tick(MATCHING, instance=instance, partition=HOUR)
    assert run.report["applied"] == 1
    return run


def later(service: Service, days: float) -> None:
    service.set_time(datetime.now(timezone.utc) + timedelta(days=days))


def ids(instance: dg.DagsterInstance) -> set[str]:
    return {record.dagster_run.run_id for record in instance.get_run_records()}


def test_a_run_that_changed_nothing_goes_with_its_events_after_its_days(
    service: Service, instance: dg.DagsterInstance
) -> None:
    first, second = empty_tick(service, instance), empty_tick(service, instance)
    later(service, 29.9)
    assert service.run(JOB, instance=instance).number(DELETE, "result") == "nothing to do"
    later(service, 30.1)
    run = service.run(JOB, instance=instance)
    assert run.ok, run.failure
    assert run.number(DELETE, "result") == "runs deleted 2"  # the first tick, and the run of this job before
    assert ids(instance) == {second.run_id, run.run_id}, "the last run of its hour keeps the hour green in the grid"
    assert instance.all_logs(first.run_id) == []
    assert instance.all_logs(second.run_id) != []


def test_a_run_that_changed_something_carries_a_tag_and_stays_longer(
    service: Service, instance: dg.DagsterInstance
) -> None:
    repaired, empty = repairing_tick(service, instance), empty_tick(service, instance)
    tagged = instance.get_run_records(dg.RunsFilter(tags={"billing/changed": "1"}))
    assert [record.dagster_run.run_id for record in tagged] == [repaired.run_id]
    later(service, 364)
    run = service.run(JOB, instance=instance)
    assert ids(instance) == {repaired.run_id, empty.run_id, run.run_id}
    assert run.number("find_old_runs", "kept: changed something") == 1
    later(service, 366)
    run = service.run(JOB, instance=instance)
    assert ids(instance) == {run.run_id}


def test_a_run_that_was_killed_after_a_change_is_known_by_the_audit_trail(
    service: Service, instance: dg.DagsterInstance
) -> None:
    killed, _ = empty_tick(service, instance), empty_tick(service, instance)
    service.execute(
        "INSERT INTO billing_orchestration.audit_trail (at, job, run_id, entity, entity_id, action, reason)"
        " VALUES (now(), :job, :run_id, 'payment', '1', 'settled', 'before it was killed')",
        job=MATCHING,
        run_id=killed.run_id,
    )
    later(service, 31)
    service.run(JOB, instance=instance)
    assert killed.run_id in ids(instance)


def test_the_audit_trail_is_asked_only_about_runs_that_would_go(service: Service, instance: dg.DagsterInstance) -> None:
    first, second = empty_tick(service, instance), empty_tick(service, instance)
    repaired = repairing_tick(service, instance)
    last = empty_tick(service, instance)
    asked: list[str] = []

    def note(_connection: sa.Connection, _cursor: Any, statement: str, values: Any, *_: Any) -> None:
        if "DISTINCT run_id" in statement:
            asked.extend(values["ids"])

    later(service, 31)
    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        service.run(JOB, instance=instance)
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)

    # Neither the one that is tagged nor the last of its hour.
    assert set(asked) == {first.run_id, second.run_id}
    assert {repaired.run_id, last.run_id} <= ids(instance)


def test_a_dry_run_shows_what_would_go_and_deletes_nothing(service: Service, instance: dg.DagsterInstance) -> None:
    empty_tick(service, instance, partition=None)
    before = ids(instance)
    later(service, 31)
    run = service.run(JOB, instance=instance, dry_run=True)
    assert run.number(DELETE, "result") == "dry run: runs to delete 1"
    assert ids(instance) == before | {run.run_id}


def test_what_is_more_than_max_runs_is_left_for_the_next_day_the_youngest_first(
    service: Service, instance: dg.DagsterInstance
) -> None:
    runs = [empty_tick(service, instance, partition=None) for _ in range(3)]
    later(service, 31)
    run = service.run(JOB, instance=instance, ops={"delete_old_runs": {"max_runs": 2}})
    assert run.number(DELETE, "result") == "runs deleted 2, left for the next run 1"
    assert ids(instance) == {runs[-1].run_id, run.run_id}


def test_max_changes_stops_it_before_anything_is_deleted(service: Service, instance: dg.DagsterInstance) -> None:
    runs = [empty_tick(service, instance, partition=None) for _ in range(2)]
    later(service, 31)
    run = service.run(JOB, instance=instance, max_changes=1)
    assert "would make 2 changes" in run.failure
    assert {run.run_id for run in runs} <= ids(instance)


def test_runs_of_another_project_and_unfinished_ones_are_left_alone(
    service: Service, instance: dg.DagsterInstance
) -> None:
    @dg.op
    def theirs() -> None: ...

    @dg.job
    def their_job() -> None:
        theirs()

    foreign = their_job.execute_in_process(instance=instance).run_id
    unfinished = instance.create_run_for_job(their_job, tags={"billing/singleton": "autopayment_job"}).run_id
    later(service, 400)
    service.run(JOB, instance=instance)
    assert {foreign, unfinished} <= ids(instance)


def test_without_the_billing_database_nothing_is_deleted(service: Service, instance: dg.DagsterInstance) -> None:
    old = empty_tick(service, instance, partition=None)
    later(service, 31)
    nowhere = service.settings.model_copy(
        update={"billing_database_url": "postgresql+psycopg://nobody@127.0.0.1:1/none"}
    )
    run = service.run(JOB, instance=instance, load=lambda: nowhere)
    assert "cannot connect to the database" in run.failure
    assert old.run_id in ids(instance)


@pytest.mark.parametrize("job", [MATCHING, "matching_pending_payments_job"])
def test_a_tick_that_finds_nothing_writes_few_events(service: Service, instance: dg.DagsterInstance, job: str) -> None:
    run = service.tick(job, instance=instance, partition=HOUR)
    # Three of each of the four ops, and what Dagster itself tells of a run's begin and end. The launch adds four.
    assert len(instance.all_logs(run.run_id)) <= 19
    assert run.log == []
    assert run.materialized == {}


# --- what is kept of customers


REMOVE = "remove_old_evidence"


def with_evidence(service: Service, instance: dg.DagsterInstance) -> None:
    """A renewal, an entry that a person has ignored, and one that waits."""
    service.subscriber()
    assert service.run("autopayment_job", instance=instance).ok
    for name in ("ignored", "waits"):
        service.paid_there(name, metadata={"user_id": "anna"}, created_at=service.now - timedelta(minutes=30))
    assert service.run(MATCHING, instance=instance).ok
    service.execute("""
        UPDATE billing_orchestration.quarantine
        SET resolved_at = opened_at, resolution = 'ignored', resolution_reason = 'refunded', resolved_by = 'vera'
        WHERE external_payment_id = 'ignored'
    """)
    service.execute("""
        INSERT INTO billing_orchestration.audit_trail (at, job, run_id, entity, entity_id, action, reason)
        VALUES ('2026-03-12', 'customer', 'cli', 'customer', 'erased-1', 'erased', 'vera: asked')
    """)


def test_evidence_and_audit_trail_end_after_their_days_and_what_holds_the_promise_stays(
    service: Service, instance: dg.DagsterInstance
) -> None:
    with_evidence(service, instance)
    before = {table: service.rows(table) for table in ("renewal_attempts", "settlements")}
    audit = len(service.rows("audit_trail"))
    service.advance(days=1094)
    assert service.run(JOB, instance=instance).number(REMOVE, "result") == "nothing to do"
    service.advance(days=2)
    dry = service.run(JOB, instance=instance, dry_run=True)
    would = f"dry run: evidence to empty 1, audit trail to delete {audit - 1}"
    assert dry.number(REMOVE, "result") == would
    assert len(service.rows("audit_trail")) == audit

    run = service.run(JOB, instance=instance)

    did = f"evidence emptied 1, audit trail deleted {audit - 1}"
    assert run.number(REMOVE, "result") == did
    assert [row.entity for row in service.rows("audit_trail")] == ["customer"]
    ignored, waits = service.rows("quarantine")
    assert (ignored.evidence, ignored.resolution) == ({}, "ignored")
    assert waits.evidence.get("item", {}).get("metadata") == {"user_id": "anna"}
    assert {table: service.rows(table) for table in before} == before
    assert service.run(JOB, instance=instance).number(REMOVE, "result") == "nothing to do"


def test_a_role_that_may_not_delete_the_audit_trail_keeps_it_and_says_so(
    service: Service, instance: dg.DagsterInstance
) -> None:
    with_evidence(service, instance)
    service.execute("CREATE ROLE careful_jobs; GRANT ALL ON ALL TABLES IN SCHEMA billing_orchestration TO careful_jobs")
    service.execute("GRANT USAGE ON SCHEMA billing_orchestration TO careful_jobs")
    service.execute("GRANT ALL ON ALL TABLES IN SCHEMA public TO careful_jobs")
    service.execute("GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO careful_jobs")
    service.execute("REVOKE DELETE ON billing_orchestration.audit_trail FROM careful_jobs")
    audit = len(service.rows("audit_trail"))
    service.advance(days=1096)
    url = service.settings.billing_database_url
    options = f"{url}{'&' if '?' in url else '?'}options=-c%20role%3Dcareful_jobs"
    service.settings = service.settings.model_copy(update={"billing_database_url": options})
    try:
        run = service.run(JOB, instance=instance)
    finally:
        service.execute("DROP OWNED BY careful_jobs; DROP ROLE careful_jobs")

    assert run.ok, run.failure
    assert run.number(REMOVE, "result") == "evidence emptied 1"
    assert "may not delete them: GRANT DELETE" in run.number(REMOVE, "stays")
    assert len(service.rows("audit_trail")) == audit


@pytest.mark.parametrize("years", [4, -4])
def test_with_a_wrong_clock_nothing_is_deleted_and_the_run_is_red_and_names_it(
    service: Service, instance: dg.DagsterInstance, years: int
) -> None:
    with_evidence(service, instance)
    later(service, 1)
    before = {table: service.rows(table) for table in ("audit_trail", "quarantine")}, ids(instance)
    service.wrong_by(timedelta(days=365 * years))

    run = service.run(JOB, instance=instance)

    assert not run.ok
    clocks = run.metadata["find_old_runs"]["clocks"]
    assert f"is {365 * abs(years)} days ahead of" in clocks
    assert run.failure.startswith(f"stopped before anything was applied: {clocks}")
    assert ({table: service.rows(table) for table in before[0]}, ids(instance) - {run.run_id}) == before
    service.wrong_by(timedelta(days=-365 * years))
    service.skew()
    assert service.run(JOB, instance=instance).ok
