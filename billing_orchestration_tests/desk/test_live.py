"""`doctor --live` tells what is dead: the daemon, a schedule's ticks, a run, a watermark. By a real run history."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import dagster as dg
import pytest
import sqlalchemy as sa
from dagster._core.definitions.run_request import InstigatorType
from dagster._core.remote_origin import InProcessCodeLocationOrigin, RemoteRepositoryOrigin
from dagster._core.scheduler.instigation import (
    InstigatorState,
    InstigatorStatus,
    ScheduleInstigatorData,
    TickData,
    TickStatus,
)
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._daemon.types import DaemonHeartbeat
from dagster._utils.error import SerializableErrorInfo

from billing_orchestration.definitions import SCHEDULES, build_definitions
from billing_orchestration.desk.doctor import Finding, Level
from billing_orchestration.desk.live import (
    as_json,
    as_line,
    is_live,
    look_at_daemon,
    look_at_runs,
    look_at_schedules,
    look_at_watermarks,
)
from billing_orchestration.desk.switching import ORDER
from billing_orchestration_tests.fixtures.installation import command
from billing_orchestration_tests.jobs.service import Service

# The run history stamps its runs by the real clock.
NOW = datetime.now(timezone.utc)
ORIGIN = RemoteRepositoryOrigin(
    InProcessCodeLocationOrigin(LoadableTargetOrigin(module_name="billing_orchestration.definitions")), "__repository__"
)
MATCHING = "matching_pending_payments_every_2_minutes_schedule"
CHARGING = "autopayment_daily_schedule"
PARTS = ("SCHEDULER", "SENSOR", "QUEUED_RUN_COORDINATOR")


@pytest.fixture
def history() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as instance:
        yield instance


def beat(history: dg.DagsterInstance, part: str, ago: timedelta) -> None:
    history.add_daemon_heartbeat(DaemonHeartbeat((NOW - ago).timestamp(), part, "daemon"))


def switch_on(history: dg.DagsterInstance, name: str, ago: timedelta) -> None:
    state = InstigatorState(
        ORIGIN.get_instigator_origin(name),
        InstigatorType.SCHEDULE,
        InstigatorStatus.RUNNING,
        ScheduleInstigatorData("*/2 * * * *", (NOW - ago).timestamp()),
    )
    history.add_instigator_state(state)


def tick(history: dg.DagsterInstance, name: str, ago: timedelta, error: str | None = None) -> None:
    [state] = [state for state in history.all_instigator_state() if state.instigator_name == name]
    history.create_tick(
        TickData(
            state.instigator_origin_id,
            name,
            InstigatorType.SCHEDULE,
            TickStatus.FAILURE if error else TickStatus.SKIPPED,
            (NOW - ago).timestamp(),
            selector_id=state.selector_id,
            skip_reason=None if error else "run of an earlier tick",
            error=SerializableErrorInfo(error, [], None) if error else None,
        )
    )


def test_start_and_live_know_every_scheduled_job() -> None:
    assert set(ORDER) == {schedule.job_name for schedule in SCHEDULES}


def test_a_daemon_that_is_heard_is_alive(history: dg.DagsterInstance) -> None:
    for part in PARTS:
        beat(history, part, timedelta(seconds=40))

    found = look_at_daemon(history, NOW)

    assert (found.level, found.text) == (Level.OK, "daemon heard 40 s ago")


@pytest.mark.parametrize("dead", PARTS)
def test_a_daemon_is_dead_when_one_of_its_parts_is_silent_for_two_minutes(
    history: dg.DagsterInstance, dead: str
) -> None:
    for part in PARTS:
        beat(history, part, timedelta(seconds=121 if part == dead else 10))

    found = look_at_daemon(history, NOW)

    assert (found.level, found.text) == (Level.FAULT, f"the daemon is dead: {dead} was last heard 2 min ago")


def test_a_daemon_that_never_ran_is_named(history: dg.DagsterInstance) -> None:
    assert look_at_daemon(history, NOW).text == "no daemon has ever run here"


def of(findings: Iterator[Finding], code: str) -> Finding:
    return next(found for found in findings if found.code.startswith(code))


@pytest.mark.parametrize(("name", "ago", "level"), [
    (MATCHING, timedelta(minutes=3), Level.OK),
    (MATCHING, timedelta(minutes=11), Level.FAULT),
    (CHARGING, timedelta(hours=25), Level.OK),
    (CHARGING, timedelta(hours=27), Level.FAULT),
], ids=["matching, 3 min", "matching, 11 min", "daily, 25 h", "daily, 27 h"])  # fmt: skip
def test_a_schedule_whose_ticks_have_stopped_is_a_fault(
    history: dg.DagsterInstance, name: str, ago: timedelta, level: Level
) -> None:
    switch_on(history, name, timedelta(days=3))
    tick(history, name, ago)

    job = "matching_pending" if name == MATCHING else "autopayment"
    assert of(look_at_schedules(history, NOW), job).level is level


def test_a_schedule_that_was_just_switched_on_has_time_for_its_first_tick(history: dg.DagsterInstance) -> None:
    switch_on(history, CHARGING, timedelta(hours=3))

    assert of(look_at_schedules(history, NOW), "autopayment").level is Level.OK
    assert of(look_at_schedules(history, NOW + timedelta(days=1)), "autopayment").level is Level.FAULT


def test_a_failed_tick_is_a_fault_and_a_schedule_that_is_off_is_shown(history: dg.DagsterInstance) -> None:
    switch_on(history, MATCHING, timedelta(days=3))
    tick(history, MATCHING, timedelta(minutes=1), error="the code server has shut down")

    assert of(look_at_schedules(history, NOW), "matching_pending").level is Level.FAULT
    off = of(look_at_schedules(history, NOW), "autopayment")
    assert (off.level, off.text) == (Level.WARNING, "autopayment_job: schedule off")


def test_a_run_without_progress_is_a_fault(history: dg.DagsterInstance) -> None:
    run = history.create_run_for_job(build_definitions().get_job_def("autopayment_job"))
    history.report_run_canceling(run)  # under way, and its last event is of this moment, by Dagster's own clock
    now = datetime.now(timezone.utc)

    assert of(look_at_runs(history, now), "runs").text == "1 runs under way"
    stuck = of(look_at_runs(history, now + timedelta(minutes=16)), "runs")
    assert stuck.level is Level.FAULT
    assert f"run {run.run_id[:8]} is stuck" in stuck.text


def test_a_watermark_that_stands_still_is_a_fault(service: Service, engine: sa.Engine) -> None:
    def watermarks(now: datetime) -> list[Level]:
        with engine.connect() as connection:
            return [found.level for found in look_at_watermarks(connection, now)]

    assert watermarks(NOW) == [Level.WARNING, Level.WARNING]
    for job in ("matching_pending_payments_job", "matching_successful_payments_job"):
        service.execute(
            "INSERT INTO billing_orchestration.watermarks (job, covered_until, run_id, updated_at)"
            f" VALUES ('{job}', '{NOW.isoformat()}', 'run', '{NOW.isoformat()}')"
        )

    assert watermarks(NOW + timedelta(minutes=59)) == [Level.OK, Level.OK]
    assert watermarks(NOW + timedelta(minutes=61)) == [Level.FAULT, Level.FAULT]


def test_the_line_names_the_faults_and_nothing_else_when_there_are_any() -> None:
    findings = [Finding("daemon.dead", Level.FAULT, "the daemon is dead"), Finding("runs.ok", Level.OK, "1 runs")]

    assert (is_live(findings), as_line(findings)) == (False, "CRITICAL: the daemon is dead")
    assert (is_live(findings[1:]), as_line(findings[1:])) == (True, "OK: 1 runs")
    assert json.loads(as_json(findings))["live"] is False


@pytest.mark.usefixtures("healthy")
def test_the_command_tells_in_one_line_and_by_its_exit_code_that_no_daemon_runs(tmp_path: Path) -> None:
    told = command("doctor", "--live")

    assert told.returncode == 2
    assert told.stdout.splitlines() == ["CRITICAL: no daemon has ever run here"]
    as_object = json.loads(command("doctor", "--live", "--json").stdout)
    assert as_object["findings"][0] == {
        "check": "daemon.never", "level": "fault", "text": "no daemon has ever run here",
    }  # fmt: skip
    (tmp_path / "dagster.yaml").write_text("storage: {postgres: {postgres_url: 'postgresql://u:word@127.0.0.1:9/x'}}")
    lost = command("doctor", "--live", "--daemon")
    assert lost.returncode == 2
    assert lost.stdout.startswith("CRITICAL: the run history cannot be read")
    assert "word" not in lost.stdout + lost.stderr
