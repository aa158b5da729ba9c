"""`stop` and `start` act on the deployment's own schedules, and say what they did only after looking again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.run_request import InstigatorType
from dagster._core.remote_origin import InProcessCodeLocationOrigin, RemoteRepositoryOrigin
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin

from billing_orchestration.definitions import build_definitions
from billing_orchestration.desk.switching import ORDER, NotSwitched, start, stop

ROOT = Path(__file__).parents[2]
JOB = "autopayment_job"


@pytest.fixture(scope="module")
def history() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as instance:
        yield instance


@pytest.fixture(scope="module")
def started(history: dg.DagsterInstance) -> list[str]:
    """All schedules, switched on through the workspace file of this checkout."""
    return list(start(history, ROOT / "workspace.yaml", []))


def on(history: dg.DagsterInstance) -> set[str]:
    states = history.all_instigator_state(instigator_type=InstigatorType.SCHEDULE)
    return {state.name for state in states if state.is_running}


def run_of(history: dg.DagsterInstance, status: str) -> str:
    location = InProcessCodeLocationOrigin(LoadableTargetOrigin(module_name="billing_orchestration.definitions"))
    run = history.create_run_for_job(
        build_definitions().get_job_def(JOB),
        status=dg.DagsterRunStatus[status],
        remote_job_origin=RemoteRepositoryOrigin(location, "__repository__").get_job_origin(JOB),
    )
    return run.run_id


def test_start_switches_all_on_and_charging_last(history: dg.DagsterInstance, started: list[str]) -> None:
    assert started == [f"{job}: schedule on" for job in ORDER]
    assert ORDER[-1] == JOB
    assert len(on(history)) == len(ORDER)
    location = history.all_instigator_state()[0].origin.repository_origin.code_location_origin.location_name
    assert location == "billing"


def test_stop_leaves_the_other_jobs_on_and_takes_back_what_waits(
    history: dg.DagsterInstance, started: list[str]
) -> None:
    waiting, under_way = run_of(history, "QUEUED"), run_of(history, "STARTED")

    lines = list(stop(history, [JOB]))

    assert lines[0] == f"{JOB}: schedule off"
    assert not any(name.startswith("autopayment") for name in on(history))
    assert len(on(history)) == len(ORDER) - 1
    waited, goes_on = history.get_run_by_id(waiting), history.get_run_by_id(under_way)
    assert waited is not None
    assert waited.status is dg.DagsterRunStatus.CANCELED
    assert goes_on is not None
    assert goes_on.status is dg.DagsterRunStatus.STARTED
    assert any(under_way in line and "goes on" in line for line in lines)


def test_stop_without_a_job_stops_everything(history: dg.DagsterInstance, started: list[str]) -> None:
    list(stop(history, []))

    assert on(history) == set()


def test_a_job_that_does_not_exist_is_named_and_nothing_is_switched(history: dg.DagsterInstance) -> None:
    with pytest.raises(NotSwitched, match="no job is called autopayments"):
        list(stop(history, ["autopayments"]))


def test_start_says_when_there_is_no_workspace(history: dg.DagsterInstance, tmp_path: Path) -> None:
    with pytest.raises(NotSwitched, match="name the workspace file"):
        list(start(history, tmp_path / "workspace.yaml", [JOB]))
