"""PostgreSQL fails in the middle of a run: at some steps always, at each kind of step with `make torture`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa

from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration_tests.fixtures.postgres import Server
from billing_orchestration_tests.jobs.service import Service
from billing_orchestration_tests.torture.extent import NIGHT, THOROUGH
from billing_orchestration_tests.torture.kill_points import AFTER, BEFORE, Death, Step
from billing_orchestration_tests.torture.kill_runner import Runner
from billing_orchestration_tests.torture.kill_scenarios import ALL as SCENARIOS
from billing_orchestration_tests.torture.kill_scenarios import AUTOPAYMENT, SHORT, Scenario
from billing_orchestration_tests.torture.postgres_faults import (
    CUT,
    FAULTS,
    FULL,
    FULL_FOR_STATEMENTS,
    LOCKED,
    PANIC,
    RESTARTED,
    Fault,
    ballast,
    fill,
    with_triggers,
)
from billing_orchestration_tests.torture.postgres_matrix import (
    FEW,
    SLOW,
    Cell,
    Matrix,
    PostgresStage,
    migrated_server,
    play,
    small_disk,
)


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    """The process that forks; its imports take three seconds."""
    with Runner() as running:
        yield running


@pytest.fixture(scope="module")
def own_server() -> Iterator[tuple[Server, str]]:
    """A server that these tests may stop, and its migrated template."""
    with migrated_server() as lent:
        yield lent


def judge(matrix: Matrix, capsys: pytest.CaptureFixture[str]) -> None:
    """Every cell came to agree, and every run that failed told the operator what happened."""
    if THOROUGH or matrix.lost or matrix.untold:
        with capsys.disabled():
            print(f"\n{matrix.table()}")
    assert not [(cell.subject, cell.wrong) for cell in matrix.lost]
    assert not [(cell.subject, cell.ended) for cell in matrix.untold]
    # One at most, or one in ten.
    assert matrix.unreached * 10 <= max(10, len(matrix.cells))


@pytest.mark.thorough
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_whatever_happens_to_postgresql_at_any_step_the_next_runs_complete_it(
    own_server: tuple[Server, str],
    sandbox: Sandbox,
    runner: Runner,
    scenario: Scenario,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # A restart takes seconds: of a night, in each job; else where charging alone has one.
    slow = SLOW if NIGHT or scenario is FEW[0] else ()
    faults = [CUT, LOCKED, FULL_FOR_STATEMENTS, *slow]
    # One step of each kind; in a night the last of each kind as well, and the moment after each.
    judge(play(*own_server, sandbox, runner, scenario, faults, thorough=NIGHT, shares=3), capsys)


@pytest.mark.parametrize("scenario", FEW if THOROUGH else [SHORT], ids=lambda scenario: scenario.name)
def test_a_disk_that_is_really_full_loses_nothing(
    sandbox: Sandbox, runner: Runner, scenario: Scenario, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a small disk of its own. Where none can be mounted, the triggers of the other tests stand for it."""
    with small_disk() as disk:
        if disk is None:
            with capsys.disabled():
                print("\nNo disk can be mounted here (root only): a full one is tried by triggers alone.")
            pytest.skip("no disk can be mounted here: tried by triggers, which raise the same SQLSTATE")
        with migrated_server(disk) as (server, migrated):
            if THOROUGH:
                matrix = play(
                    server, migrated, sandbox, runner, scenario, [FULL, PANIC], thorough=False, disk=disk, shares=3
                )
                judge(matrix, capsys)
                # A handful of expiries may find room in the pages that are there, and need none of the disk's.
                needs_room = scenario.job != "expire_subscriptions_job"
                assert not needs_room or any("is full" in cell.ended for cell in matrix.cells)
            else:
                cells = at(server, migrated, sandbox, runner, [(PANIC, Death(Step("POST /payments", 1), AFTER))], disk)
                assert all(cell.runs is not None and cell.is_told for cell in cells), cells


SOME = [
    (CUT, Death(Step("POST /payments", 1), AFTER)),
    # The one statement that writes all of a settlement.
    (CUT, Death(Step("UPDATE subscriptions", 1), BEFORE)),
    (RESTARTED, Death(Step("UPDATE subscriptions", 1), AFTER)),
    (LOCKED, Death(Step("INSERT renewal_attempts", 1), BEFORE)),
    (LOCKED, Death(Step("POST /payments", 1), AFTER)),
    (FULL_FOR_STATEMENTS, Death(Step("INSERT renewal_attempts", 1), BEFORE)),
    (FULL_FOR_STATEMENTS, Death(Step("POST /payments", 1), AFTER)),
]


def at(
    server: Server,
    migrated: str,
    sandbox: Sandbox,
    runner: Runner,
    wanted: list[tuple[Fault, Death]],
    disk: Path | None,
) -> list[Cell]:
    """These faults at these steps of the short scenario; each must be reached."""
    with ExitStack() as stack:
        stage = PostgresStage(server, migrated, sandbox, runner, with_triggers(SHORT))
        stack.callback(stage.close)
        stage.warm_up()
        cells = [stage.suffer(fault, death, disk) for fault, death in wanted]
    assert None not in cells
    return [cell for cell in cells if cell is not None]


def test_a_charge_in_whose_middle_postgresql_fails_is_completed_by_the_next_runs(
    own_server: tuple[Server, str], sandbox: Sandbox, runner: Runner
) -> None:
    cells = at(*own_server, sandbox, runner, SOME, None)

    assert not [(cell.subject, cell.wrong) for cell in cells if cell.runs is None]
    assert not [(cell.subject, cell.ended) for cell in cells if not cell.is_told]


def test_a_full_disk_of_the_run_history_loses_no_charge(
    engine: sa.Engine, database_url: str, sandbox: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    service = Service(engine, database_url, sandbox)
    subscriptions = [service.subscriber() for _ in range(3)]
    with small_disk("32m") as disk:
        if disk is None:
            with capsys.disabled():
                print("\nNo disk can be mounted here (root only): a full one under the run history is not tried.")
            pytest.skip("no disk can be mounted here")

        def fill_it(document: Any) -> Any:
            fill(disk)  # the money has just moved
            return document

        sandbox.misbehave("create", "change", transform=fill_it)
        told = ""
        with dg.DagsterInstance.local_temp(str(disk)) as history:
            try:
                told = service.run(AUTOPAYMENT, instance=history).failure
            except Exception as error:  # noqa: BLE001 - the run has nowhere left to write what happened
                told = str(error)
            ballast(disk).unlink()

    assert "disk" in told  # SQLite's words, by Dagster
    assert service.run(AUTOPAYMENT).ok
    charged = Counter(charge.metadata["subscription_id"] for charge in service.charges())
    assert charged == Counter(str(subscription) for subscription in subscriptions)
    service.check_books()


def test_each_fault_has_a_name_of_its_own() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
