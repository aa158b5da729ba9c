"""The matrix of PostgreSQL's own faults: each strikes each kind of step of each job, and the next runs complete it.

    python -m billing_orchestration_tests.torture.postgres_matrix                    all of it, printed as a table
    python -m billing_orchestration_tests.torture.postgres_matrix --fault restarted

The steps are found by instrumentation, as those of the kill matrix are (`kill_points`). At a step the run waits while
the fault is done to PostgreSQL: so it strikes in the middle of the transaction, or of the charge, that the step belongs
to. The run must end in one line that tells what happened, or go on; then, with the fault mended, at most three ordinary
runs, and the provider's ledger and our tables must agree (`kill_oracle`).
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer

from billing_orchestration.database.engine import create_engine
from billing_orchestration.database.migrating import migrate
from billing_orchestration.sandbox.provider.server import Sandbox, running_sandbox
from billing_orchestration_tests.fixtures.postgres import Server, start_server
from billing_orchestration_tests.torture.extent import is_its_turn
from billing_orchestration_tests.torture.kill_matrix import MOST_RUNS_AGAIN, Stage
from billing_orchestration_tests.torture.kill_oracle import complaints
from billing_orchestration_tests.torture.kill_points import AFTER, BEFORE, Death, Step
from billing_orchestration_tests.torture.kill_runner import Case, Runner
from billing_orchestration_tests.torture.kill_scenarios import ALL as SCENARIOS
from billing_orchestration_tests.torture.kill_scenarios import Scenario
from billing_orchestration_tests.torture.postgres_faults import CRASHED, FAULTS, RESTARTED, Fault, World, with_triggers

# The whole disk of PostgreSQL, with room for its databases.
_DISK = "192m"
_SMALL_WAL = "min_wal_size = 32MB\nmax_wal_size = 64MB\n"


class Conductor:
    """Does something when a run has come to its step, and lets the run go on when it is done. Use it as a context."""

    def __init__(self, action: Callable[[], None]) -> None:
        conductor = self
        self.acted = False
        self.error: Exception | None = None

        class Handler(BaseRequestHandler):
            def handle(self) -> None:
                try:
                    action()
                    conductor.acted = True
                except Exception as error:  # noqa: BLE001 - raised where the run was started
                    conductor.error = error

        self._server = ThreadingTCPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def address(self) -> str:
        """Where a run finds it."""
        return f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Conductor:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        if self.error is not None:
            raise self.error


@dataclass(frozen=True)
class Cell:
    """One fault at one step. `ended`: "went on" or the run's words. `runs`: runs after it; None: not within three."""

    fault: Fault
    death: Death
    ended: str
    runs: int | None
    wrong: tuple[str, ...] = ()

    @property
    def is_told(self) -> bool:
        """Whether a run that failed says in one line what an operator has to know."""
        return self.ended == WENT_ON or (
            "\n" not in self.ended and "Traceback" not in self.ended and bool(re.search(self.fault.words, self.ended))
        )

    @property
    def subject(self) -> str:
        """As a person names it."""
        return f"{self.fault.name} {self.death.when} {self.death.step.name} #{self.death.step.nth}"


WENT_ON = "went on"


class PostgresStage(Stage):
    """A scenario's world, whose PostgreSQL may be struck."""

    _conductor: str | None = None
    _suffix = ""
    # How a run ends that nothing happens to: red where its books differ.
    undisturbed = ""

    def _case(self, url: str, now: datetime, death: Death | None = None) -> Case:
        case = super()._case(url, now, death)
        url = f"{url}{'&' if '?' in url else '?'}{self._suffix}" if self._suffix else url
        return replace(case, database_url=url, conductor=self._conductor, patience_s=10.0)

    def suffer(self, fault: Fault, death: Death, disk: Path | None = None) -> Cell | None:
        """A run with the fault at that step, and runs without it. None when the run did not come by there."""
        with self._world() as url:
            world = World(self._server, url, disk)
            try:
                with Conductor(lambda: fault.strike(world)) as conductor:
                    self._conductor, self._suffix = conductor.address, fault.url_suffix
                    ended = self._run(url, 0, death)
            finally:
                self._conductor, self._suffix = None, ""
                fault.mend(world)
            if not conductor.acted:
                return None
            self._wait_for_peace(url)
            told = WENT_ON if ended.ok or ended.failure == self.undisturbed else ended.failure
            wrong: list[str] = []
            for runs in range(MOST_RUNS_AGAIN + 1):
                wrong = complaints(url, self._sandbox.provider.ledger(), self.story.expected)
                if not wrong:
                    return Cell(fault, death, told, runs)
                if runs < MOST_RUNS_AGAIN:
                    self._run(url, runs + 1)
            return Cell(fault, death, told, None, tuple(wrong))


def deaths_of(steps: Sequence[Step], *, thorough: bool) -> list[Death]:
    """One step of each kind, the first; `thorough`: the last as well, and after each as before it."""
    first: dict[str, Step] = {}
    last: dict[str, Step] = {}
    for step in steps:
        first.setdefault(step.name, step)
        last[step.name] = step
    chosen = list(dict.fromkeys([*first.values(), *(last.values() if thorough else ())]))
    marks = ("COMMIT", "POST", "GET")
    return [Death(step, when) for step in chosen for when in (BEFORE, AFTER)
            if when == BEFORE or thorough or step.name.startswith(marks)]  # fmt: skip


@dataclass(frozen=True)
class Matrix:
    """All cells of one scenario. `unreached`: charges side by side vary a little."""

    scenario: Scenario
    cells: tuple[Cell, ...]
    unreached: int

    @property
    def lost(self) -> list[Cell]:
        """Those after which the books did not come to agree."""
        return [cell for cell in self.cells if cell.runs is None]

    @property
    def untold(self) -> list[Cell]:
        """Those whose run failed without the words that an operator needs."""
        return [cell for cell in self.cells if not cell.is_told]

    def table(self) -> str:
        """As a person reads it: a line a kind of step, a column a fault: went on + failed / most runs after."""
        faults = list(dict.fromkeys(cell.fault.name for cell in self.cells))
        lines = [
            f"{self.scenario.name} ({self.scenario.job}): {len(self.cells)} cells, {len(self.lost)} lost,"
            f" {len(self.untold)} without the words, {self.unreached} not reached"
            " (went on + failed / most runs until the books agreed)",
            f"  {'step':<40}" + "".join(f"{name:>34}" for name in faults),
        ]
        for step in dict.fromkeys(cell.death.step.name for cell in self.cells):
            told = []
            for name in faults:
                mine = [cell for cell in self.cells if (cell.death.step.name, cell.fault.name) == (step, name)]
                on = sum(cell.ended == WENT_ON for cell in mine)
                runs = (
                    "LOST" if any(cell.runs is None for cell in mine) else max((c.runs or 0 for c in mine), default=0)
                )
                told.append(f"{on} + {len(mine) - on} / {runs}" if mine else "-")
            lines.append(f"  {step:<40}" + "".join(f"{text:>34}" for text in told))
        lines.extend(f"  LOST: {c.subject}: {'; '.join(c.wrong)} {c.ended}" for c in self.lost)
        lines.extend(f"  WITHOUT THE WORDS: {c.subject}: {c.ended}" for c in self.untold)
        return "\n".join(lines)


def play(
    server: Server,
    migrated: str,
    sandbox: Sandbox,
    runner: Runner,
    scenario: Scenario,
    faults: Sequence[Fault],
    *,
    thorough: bool,
    disk: Path | None = None,
    shares: int = 1,
) -> Matrix:
    """Every fault at every kind of step of a scenario. `shares`: of what a short torture tries (`extent`)."""
    stage = PostgresStage(server, migrated, sandbox, runner, with_triggers(scenario))
    try:
        stage.warm_up()
        lived, wrong = stage.live()
        if wrong:
            raise AssertionError(f"{scenario.name}, undisturbed: {'; '.join(wrong)} {lived.failure}")
        stage.undisturbed = lived.failure
        cells: list[Cell] = []
        unreached = 0
        tried = itertools.product(faults, deaths_of(lived.steps, thorough=thorough))
        for number, (fault, death) in enumerate(tried):
            if is_its_turn(number, shares):
                cell = stage.suffer(fault, death, disk)
                unreached += cell is None
                cells.extend([cell] if cell else [])
        return Matrix(scenario, tuple(cells), unreached)
    finally:
        stage.close()


@contextmanager
def small_disk(size: str = _DISK) -> Iterator[Path | None]:
    """A disk that can be filled: a tmpfs of its own; None where mounting is not permitted."""
    with tempfile.TemporaryDirectory(prefix="small-disk-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)
        try:
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", name], check=True, capture_output=True
            )
        except (OSError, subprocess.CalledProcessError):
            yield None
            return
        try:
            yield folder
        finally:
            subprocess.run(["umount", "-l", name], check=True, capture_output=True)


@contextmanager
def migrated_server(disk: Path | None = None) -> Iterator[tuple[Server, str]]:
    """A server of one's own with a migrated template, on that disk."""
    with start_server(disk, _SMALL_WAL if disk else "") as server:
        migrated = server.create_database()
        engine = create_engine(server.url(migrated))
        migrate(engine, echo=lambda _: None)
        engine.dispose()
        yield server, migrated


_BY_NAME: Mapping[str, Scenario] = {scenario.name: scenario for scenario in SCENARIOS}
# A restart takes seconds, and of a disk of 192 MB there is only one: charging (first), expiry, matching have one job.
SLOW = (RESTARTED, CRASHED)
FEW = tuple(
    _BY_NAME[name] for name in ("autopayment, side by side", "expiry of subscriptions", "matching successful payments")
)
ALL = SCENARIOS


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Strike PostgreSQL at each kind of step of each job.")
    parser.add_argument("scenario", nargs="?", help="; ".join(_BY_NAME))
    parser.add_argument("--fault", choices=[fault.name for fault in FAULTS])
    parser.add_argument(
        "--thorough", action="store_true", help="the first and the last step of each kind, and after it"
    )
    asked = parser.parse_args()
    failed, started = 0, time.monotonic()
    with running_sandbox() as sandbox, Runner() as runner, small_disk() as disk:
        for on_disk in (False, True):
            faults = [f for f in FAULTS if f.needs_disk == on_disk and asked.fault in (None, f.name)]
            if on_disk and disk is None:
                print("no disk can be mounted here: its faults are tried by triggers only")
                continue
            if not faults:
                continue
            with migrated_server(disk if on_disk else None) as (server, migrated):
                for scenario in FEW if on_disk else ALL:
                    everything = asked.thorough or asked.fault or asked.scenario or scenario in FEW
                    here = [fault for fault in faults if everything or fault not in SLOW]
                    if here and asked.scenario in (None, scenario.name):
                        matrix = play(server, migrated, sandbox, runner, scenario, here,
                                      thorough=asked.thorough, disk=disk)  # fmt: skip
                        failed += len(matrix.lost) + len(matrix.untold)
                        print(matrix.table(), f"\n  {time.monotonic() - started:.0f} s\n", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
