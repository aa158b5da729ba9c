"""The promise in simulated time: a few days from fixed seeds always, months from many seeds with `make torture`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest

from billing_orchestration.sandbox.provider.account import SandboxProvider
from billing_orchestration.sandbox.provider.records import Outcome as Scripted
from billing_orchestration.sandbox.provider.server import running_sandbox
from billing_orchestration_tests.fixtures.postgres import Server
from billing_orchestration_tests.torture.extent import THOROUGH
from billing_orchestration_tests.torture.simulation.judge import DAY
from billing_orchestration_tests.torture.simulation.playing import play_seed, simulated_server
from billing_orchestration_tests.torture.simulation.story import Simulation
from billing_orchestration_tests.torture.simulation.traits import Traits


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, str]]:
    """A PostgreSQL of these tests, and its migrated template."""
    with simulated_server() as lent:
        yield lent


# One that charges one by one, one that charges side by side.
@pytest.mark.parametrize("seed", [1, 5])
def test_the_promise_holds_on_every_simulated_day(server: tuple[str, str], seed: int) -> None:
    result = play_seed(*server, seed, days=8)

    assert result.faults == (), f"play it again: {result.replay}"
    assert result.runs > 8


# Several charges at a time; then the same over HTTP.
@pytest.mark.parametrize("seed", [5, *((10, 3014) if THOROUGH else ())])
def test_a_seed_tells_one_story(server: tuple[str, str], seed: int) -> None:
    days = 20 if THOROUGH else 6

    first, second = (play_seed(*server, seed, days=days) for _ in range(2))

    assert any("POST" in line for line in first.story)
    assert first.story == second.story
    assert first.numbers == second.numbers


def test_a_story_holds_no_port_of_the_machine(postgres_server: Server, migrated_template: str) -> None:
    with (
        postgres_server.database(migrated_template) as url,
        running_sandbox(SandboxProvider(seed=10)) as served,
    ):
        played = Simulation(url, 10, served=served, traits=Traits())
        try:
            played.world.outage = "not connected"
            end = played.runs.launch("matching_pending_payments_job", played.runs.calm())
            assert "cannot be reached" in str(end.failure)
            assert str(served.port) not in "".join([str(end.failure), *played.world.told])
        finally:
            played.world.close()


def test_a_tick_comes_for_what_a_run_within_a_run_left_pending(postgres_server: Server, migrated_template: str) -> None:
    with postgres_server.database(migrated_template) as url:
        # Every card's charge is pending for most of a day.
        pending = [Scripted("pending", then="succeeded", after_s=80_000)] * 5
        played = Simulation(url, 7, traits=Traits(), script=lambda _dice: list(pending))
        try:
            world = played.world
            played.found_the_service()
            world.now += 40 * DAY
            for _ in range(40):
                played.runs.another_run()
            ends = [due for due, _, result in world.provider.agenda() if result.kind == "succeeded"]
            assert ends
            agenda = {when for when, what in played.agenda.planned() if what.endswith("succeeds")}
            assert agenda == {end + timedelta(seconds=1) for end in ends}
        finally:
            played.world.close()


def test_ticks_that_were_late_have_covered_nothing(postgres_server: Server, migrated_template: str) -> None:
    with postgres_server.database(migrated_template) as url:
        played = Simulation(url, 7, traits=Traits())
        world, agenda = played.world, played.agenda
        try:
            played.found_the_service()
            paid = world.provider.purchase(
                Decimal("299.00"),
                metadata={"user_id": "late", "plan_id": "1", "payment_provider_id": str(world.service.provider_row)},
            )

            def takes_hours() -> None:
                world.pass_time(600)
                world.provider.pay(paid.id)
                world.pass_time(7200)

            agenda.tick_at(world.now)
            agenda.after(timedelta(minutes=10), "a run that takes hours", takes_hours)
            agenda.after(timedelta(hours=3), "all ticks since then", lambda: agenda.tick_at(world.now))
            played.go_until(world.now + timedelta(hours=4))

            # The judge of a green tick has nothing to say either.
            assert world.faults == []
            assert world.oracle.rows("SELECT 1 FROM payments WHERE external_payment_id = %s", paid.id)
        finally:
            world.close()


_TWO_WORKERS = """
import os, signal, time
# A shell's background job is born with it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from billing_orchestration_tests.torture.simulation.playing import workers_of

with workers_of(2) as workers:
    playing = [workers.submit(os.write, 1, b"plays\\n") for _ in range(2)]
    for one in playing:
        one.result()
    for one in [workers.submit(time.sleep, 90) for _ in playing]:
        one.result()
"""


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT], ids=lambda by: by.name)
def test_the_workers_of_a_simulation_end_with_it(by: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _TWO_WORKERS], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as simulation:
        assert simulation.stdout is not None
        assert [simulation.stdout.readline() for _ in range(2)] == ["plays\n"] * 2
        simulation.send_signal(by)

        # Whoever still lives holds the other end of it.
        assert simulation.communicate(timeout=60) == ("", None)


_A_SERVER = """
import time
from billing_orchestration_tests.fixtures.postgres import start_server

with start_server() as server:
    print(server._folder, (server._folder / "data" / "postmaster.pid").read_text().split()[0], flush=True)
    time.sleep(90)
"""


def test_a_killed_simulation_leaves_no_postgresql_behind() -> None:
    with subprocess.Popen([sys.executable, "-c", _A_SERVER], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        folder, postmaster = holder.stdout.readline().split()
        holder.kill()
    deadline = time.monotonic() + 60
    while (Path(folder).exists() or is_alive(int(postmaster))) and time.monotonic() < deadline:
        time.sleep(0.05)

    assert not Path(folder).exists()
    assert not is_alive(int(postmaster))


def is_alive(process: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
