"""The kill matrix: each job is killed before and after each of its steps, run again, and judged by the books.

    python -m billing_orchestration_tests.torture.kill_matrix               all jobs, every step, printed as a table
    python -m billing_orchestration_tests.torture.kill_matrix "expiry of payments" --step COMMIT --nth 2 --when before

A step: a statement that writes or locks, a COMMIT, a request to the provider (`kill_points` finds them). A killed run
is followed by at most three ordinary ones; then the provider's ledger and our tables must agree (`kill_oracle`).
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

import sqlalchemy as sa

from billing_orchestration.database.engine import create_engine
from billing_orchestration.database.migrating import migrate
from billing_orchestration.sandbox.provider.server import Sandbox, running_sandbox
from billing_orchestration_tests.books import NOON
from billing_orchestration_tests.fixtures.postgres import Server, start_server
from billing_orchestration_tests.jobs.service import Service
from billing_orchestration_tests.torture.extent import is_its_turn
from billing_orchestration_tests.torture.kill_oracle import complaints
from billing_orchestration_tests.torture.kill_points import AFTER, BEFORE, Death, Step
from billing_orchestration_tests.torture.kill_runner import Case, Ended, Runner
from billing_orchestration_tests.torture.kill_scenarios import ALL, Scenario, Story
from billing_orchestration_tests.waiting import wait_until

MOST_RUNS_AGAIN = 3
# Where charges run side by side, a step of one run may be missing in the next (two answers shared a transaction).
_TRIES_TO_REACH = 5
_OURS = "billing-orchestration"


@dataclass(frozen=True)
class Cell:
    """One death. `runs`: how many ordinary runs it took until the books agreed; None: not within three."""

    death: Death
    runs: int | None
    wrong: tuple[str, ...] = ()
    last_failure: str = ""


@dataclass(frozen=True)
class Matrix:
    """All deaths of one scenario. `unreached`: those that no run came by; charges side by side vary a little.
    `steps`: all that were seen in any run."""

    scenario: Scenario
    cells: tuple[Cell, ...]
    unreached: tuple[Death, ...]
    steps: tuple[Step, ...]

    @property
    def lost(self) -> list[Cell]:
        """Those after which the books did not come to agree."""
        return [cell for cell in self.cells if cell.runs is None]

    @property
    def names(self) -> set[str]:
        """The names of the steps at which a run was killed."""
        return {cell.death.step.name for cell in self.cells}

    @property
    def missed(self) -> set[tuple[str, str]]:
        """The kinds of deaths that were tried and never happened: the name of a step, and before or after it."""
        died = {(cell.death.step.name, cell.death.when) for cell in self.cells}
        return {(death.step.name, death.when) for death in self.unreached} - died

    def table(self) -> str:
        """As a person reads it: a line for each kind of step, in the order of their first occurrence."""
        lines = [f"{self.scenario.name} ({self.scenario.job}): {len(self.cells)} deaths, {len(self.lost)} lost"]
        lines.append(f"  {'step':<40} {'times':>5}  {'killed before, then agreed':<36} killed after, then agreed")
        by_name: dict[str, list[Cell]] = {}
        for cell in self.cells:
            by_name.setdefault(cell.death.step.name, []).append(cell)
        for name, cells in by_name.items():
            times = len({cell.death.step for cell in cells})
            before, after = (_told([cell for cell in cells if cell.death.when == when]) for when in (BEFORE, AFTER))
            lines.append(f"  {name:<40} {times:>5}  {before:<36} {after}")
        lines.extend(f"  not reached: {_named(death)}" for death in self.unreached)
        lines.extend(f"  LOST: {_named(c.death)}: {'; '.join(c.wrong)} {c.last_failure}" for c in self.lost)
        return "\n".join(lines)


def _told_to_die(death: Death | None) -> tuple[str, int, str] | None:
    return (death.step.name, death.step.nth, death.when) if death else None


def _named(death: Death) -> str:
    return f"{death.when} {death.step.name} #{death.step.nth}"


def _told(cells: Sequence[Cell]) -> str:
    """`at once 2, after 1 run 5`: how many deaths, by the runs that it took."""
    words = {None: "NOT AGREED", 0: "at once", 1: "after 1 run"}
    found = Counter(cell.runs for cell in cells)
    ordered = sorted(found, key=lambda runs: -1 if runs is None else runs)
    return ", ".join(f"{words.get(runs, f'after {runs} runs')} {found[runs]}" for runs in ordered) or "-"


class Stage:
    """A scenario's prepared world, from which each case gets a fresh copy."""

    # How far the provider's clock is ahead of the run's.
    provider_ahead = timedelta(0)

    def __init__(self, server: Server, migrated: str, sandbox: Sandbox, runner: Runner, scenario: Scenario) -> None:
        self._server, self._sandbox, self._runner, self.scenario = server, sandbox, runner, scenario
        sandbox.reset()
        self._template = server.create_database(migrated)
        engine = create_engine(server.url(self._template), application_name="preparation")
        self.story: Story = scenario.prepare(Service(engine, server.url(self._template), sandbox))
        engine.dispose()
        self._folder = tempfile.TemporaryDirectory(prefix="kill-matrix-")
        self._provider_state = Path(self._folder.name) / "provider.json"
        sandbox.provider.save(self._provider_state)

    def close(self) -> None:
        """Remove it."""
        self._folder.cleanup()
        self._server.drop_database(self._template)

    def die(self, death: Death) -> tuple[Ended, Cell | None]:
        """One case: a run that is killed there, and what comes after. No cell when the run did not come by there."""
        with self._world() as url:
            ended = self._run(url, 0, death)
            if not ended.killed:
                return ended, None
            self._wait_for_peace(url)
            failure = ""
            wrong: list[str] = []
            for runs in range(MOST_RUNS_AGAIN + 1):
                wrong = complaints(url, self._sandbox.provider.ledger(), self.story.expected)
                if not wrong:
                    return ended, Cell(death, runs)
                if runs < MOST_RUNS_AGAIN:
                    failure = self._run(url, runs + 1).failure
            return ended, Cell(death, None, tuple(wrong), failure)

    def warm_up(self) -> None:
        """Let the runner import and compile what this job needs."""
        with self._world() as url:
            self._sandbox.clock.set(NOON)
            self._runner.warm_up(self._case(url, NOON))

    def live(self) -> tuple[Ended, list[str]]:
        """A run that lives, and its followers: the steps of the first, and what is wrong in the end (nothing)."""
        with self._world() as url:
            ended = self._run(url, 0)
            wrong = complaints(url, self._sandbox.provider.ledger(), self.story.expected)
            for runs in range(1, MOST_RUNS_AGAIN + 1):
                if not wrong:
                    break
                self._run(url, runs)
                wrong = complaints(url, self._sandbox.provider.ledger(), self.story.expected)
            return ended, wrong

    @contextmanager
    def _world(self) -> Iterator[str]:
        self._sandbox.api.forget()
        self._sandbox.provider.load(self._provider_state)
        self.story.misbehave(self._sandbox)
        with self._server.database(self._template) as url:
            yield url

    def _run(self, url: str, later: int, death: Death | None = None) -> Ended:
        now = NOON + later * self.scenario.again_after
        self._sandbox.clock.set(now + self.provider_ahead)
        return self._runner.run(self._case(url, now, death))

    def _case(self, url: str, now: datetime, death: Death | None = None) -> Case:
        return Case(
            job=self.scenario.job,
            now=now.isoformat(),
            database_url=url,
            api_url=self._sandbox.url,
            shop_id=self._sandbox.shop_id,
            secret_key=self._sandbox.secret_key,
            ops=self.scenario.ops,
            shards=self.scenario.shards,
            death=_told_to_die(death),
        )

    def race(self, processes: int, deaths: Sequence[Death] = ()) -> tuple[list[Ended], list[str]]:
        """Several runs at once, some of which die; then ordinary ones. How they ended, and what is wrong at last."""
        fates = [*deaths, *[None] * (processes - len(deaths))]
        with self.racing(lambda case: [replace(case, death=_told_to_die(death)) for death in fates]) as (url, ended):
            return ended, complaints(url, self._sandbox.provider.ledger(), self.story.expected)

    @contextmanager
    def racing(
        self,
        cases: Callable[[Case], Sequence[Case]],
        beside: Callable[[str], AbstractContextManager[object]] | None = None,
    ) -> Iterator[tuple[str, list[Ended]]]:
        """Runs at once, then ordinary ones; lends the database's URL and how the first ended.

        `cases` makes the runs from an ordinary one; `beside` is what goes on in the same database all the while.
        """
        with self._world() as url:
            self._sandbox.clock.set(NOON)
            with beside(url) if beside else nullcontext():
                ended = self._runner.race(cases(self._case(url, NOON)))
                self._wait_for_peace(url)
                for runs in range(1, MOST_RUNS_AGAIN + 1):
                    self._run(url, runs)
            yield url, ended

    def _wait_for_peace(self, url: str) -> None:
        """Until PostgreSQL has noticed the death, and the provider has dealt with what was on its way."""
        database = sa.make_url(url).database
        of_ours = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND application_name = %s"
        with self._server.connect() as connection:
            wait_until(
                lambda: (
                    connection.execute(of_ours, (database, _OURS)).fetchone() == (0,)
                    and not self._sandbox.api.in_flight
                ),
                "the end of the killed run's sessions",
                every_s=0.002,
            )


def play(
    server: Server,
    migrated: str,
    sandbox: Sandbox,
    runner: Runner,
    scenario: Scenario,
    *,
    thorough: bool = True,
    shares: int = 1,
) -> Matrix:
    """Every death of a scenario. Raises AssertionError when not even an undisturbed run gets it right.

    Not `thorough`: before the first statement of each kind, and before and after every COMMIT and every request. A
    death after a statement whose transaction is still open is one before the next step. `shares`: of what a short
    torture tries (`extent`).
    """
    stage = Stage(server, migrated, sandbox, runner, scenario)
    try:
        stage.warm_up()
        lived, wrong = stage.live()
        if wrong:
            raise AssertionError(f"{scenario.name}, undisturbed: {'; '.join(wrong)} {lived.failure}")
        known = dict.fromkeys(lived.steps)
        waiting = deque(lived.steps)
        cells: list[Cell] = []
        unreached: list[Death] = []
        numbers = itertools.count()
        while waiting:
            step = waiting.popleft()
            for when in _moments(step, thorough):
                if not is_its_turn(next(numbers), shares):
                    continue
                death = Death(step, when)
                for _ in range(_TRIES_TO_REACH):
                    ended, cell = stage.die(death)
                    # Charges that run side by side may take steps that the first run did not.
                    fresh = [step for step in ended.steps if step not in known]
                    known.update(dict.fromkeys(fresh))
                    waiting.extend(fresh)
                    if cell is not None:
                        cells.append(cell)
                        break
                else:
                    unreached.append(death)
        return Matrix(scenario, tuple(cells), tuple(unreached), tuple(known))
    finally:
        stage.close()


def _moments(step: Step, thorough: bool) -> tuple[str, ...]:
    if thorough or step.name.startswith(("COMMIT", "POST", "GET")):
        return BEFORE, AFTER
    return (BEFORE,) if step.nth == 1 else ()


@contextmanager
def workshop() -> Iterator[tuple[Server, str, Sandbox, Runner]]:
    """A PostgreSQL with a migrated template, a sandbox and a runner."""
    with start_server() as server, running_sandbox() as sandbox, Runner() as runner:
        migrated = server.create_database()
        engine = create_engine(server.url(migrated))
        migrate(engine, echo=lambda _: None)
        engine.dispose()
        yield server, migrated, sandbox, runner


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Kill each job at each of its steps.")
    parser.add_argument("scenario", nargs="?", help="; ".join(scenario.name for scenario in ALL))
    parser.add_argument("--step", help="only this one, by its name in the table")
    parser.add_argument("--nth", type=int, default=1, help="which of that name")
    parser.add_argument("--when", choices=[BEFORE, AFTER], default=BEFORE)
    asked = parser.parse_args()
    chosen = [scenario for scenario in ALL if asked.scenario in (None, scenario.name)]
    lost = 0
    with workshop() as (server, migrated, sandbox, runner):
        for scenario in chosen:
            if asked.step is not None:
                stage = Stage(server, migrated, sandbox, runner, scenario)
                stage.warm_up()
                print(*stage.die(Death(Step(asked.step, asked.nth), asked.when)), sep="\n")
                stage.close()
                continue
            started = time.monotonic()
            matrix = play(server, migrated, sandbox, runner, scenario)
            lost += len(matrix.lost)
            print(matrix.table(), f"\n  {time.monotonic() - started:.0f} s\n", flush=True)
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
