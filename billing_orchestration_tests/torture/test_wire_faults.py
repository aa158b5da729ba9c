"""Struck on the wire, run again, and the books agree: some cells always, the whole matrix with `make torture`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration_tests.fixtures.postgres import Server
from billing_orchestration_tests.torture.extent import THOROUGH, is_its_turn
from billing_orchestration_tests.torture.kill_runner import Runner
from billing_orchestration_tests.torture.kill_scenarios import Scenario
from billing_orchestration_tests.torture.wire_matrix import (
    ALWAYS,
    EVERY_SECOND,
    ONCE,
    PAGE_2,
    REFUSED_REPEAT,
    REPEATED,
    SHORTLY_STRUCK,
    STRUCK,
    cells_of,
    play,
    table,
)

# The worst of each kind of request: the money has moved and nobody learns it; what looks like an answer and is none.
SHORT = {
    "POST": [
        ("lost answer", EVERY_SECOND),
        ("500 after", ALWAYS),
        (REPEATED, ALWAYS),
        (REFUSED_REPEAT, ALWAYS),
        ("the provider's clock three hours behind", ALWAYS),
    ],
    "GET": [("HTML 404", ALWAYS), ("60 s of silence after", ONCE), ("the provider's clock three hours ahead", ALWAYS)],
    "list": [
        ("truncated body", PAGE_2),
        ("HTML 200 after", ALWAYS),
        ("the provider's clock three hours ahead", ALWAYS),
    ],
}


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    """The process that forks; its imports take three seconds."""
    with Runner() as running:
        yield running


# One job for each kind of request.
CHOSEN = STRUCK if THOROUGH else [struck for struck in STRUCK if struck[:2] in SHORTLY_STRUCK]


@pytest.mark.parametrize(
    ("scenario", "call", "extents"), CHOSEN, ids=[f"{call}, {scenario.name}" for scenario, call, _ in CHOSEN]
)
def test_whatever_strikes_the_wire_the_next_runs_complete_what_was_struck(
    postgres_server: Server,
    migrated_template: str,
    sandbox: Sandbox,
    runner: Runner,
    scenario: Scenario,
    call: str,
    extents: Sequence[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    every = enumerate(cells_of(scenario, call, extents))
    wanted = [cell for number, cell in every if is_its_turn(number, shares=3)] if THOROUGH else SHORT[call]

    cells = play(postgres_server, migrated_template, sandbox, runner, scenario, call, wanted)

    if THOROUGH or any(cell.runs is None for cell in cells):
        with capsys.disabled():
            print(f"\n{table(cells)}")
    assert not [cell.subject for cell in cells if cell.runs is None]
    # A fault that strikes nothing proves nothing.
    assert not [cell.subject for cell in cells if not cell.struck]
    # The next run heals what a half blind one has missed; that one must not call itself a success.
    assert not [cell.subject for cell in cells if cell.is_green_by_mistake]
