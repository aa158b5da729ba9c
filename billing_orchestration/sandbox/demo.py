"""`make demo`: the five jobs on example data, and the books of both sides, in half a minute.

It ends with 0 only if every case came out as expected and every promise holds in the provider's ledger.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import datetime, timezone
from functools import cached_property
from typing import TYPE_CHECKING

from rich.console import Console

from billing_orchestration.sandbox.stage import (
    JobRun,
    Stage,
    StageError,
    StartedJob,
    mark_complete,
    open_stage,
    project_root,
)

if TYPE_CHECKING:
    import dagster as dg
    import sqlalchemy as sa

    from billing_orchestration.sandbox.example_data.records import Story
    from billing_orchestration.sandbox.report import Report

# First what customers have paid themselves is recognised, then what is still due is charged, last what is over ends.
JOBS = {
    "matching_pending_payments_job": "every 2 minutes: PENDING here, paid at the provider?",
    "matching_successful_payments_job": "every 2 minutes: paid at the provider, unknown or unfinished here?",
    "expire_payments_job": "daily: PENDING for more than 7 days; asks the provider about each",
    "autopayment_job": "daily: charges what is due to the saved payment method",
    "expire_subscriptions_job": "daily: ended 3 days ago and not renewed",
}
_WIDTH = 100
INTERRUPTED = 130
_LONGEST_PLAY_S = 120


def main(argv: Sequence[str] = ()) -> int:
    """Play the demo from an empty stage. Returns 0 when the verdict is good."""
    if argv:
        print(f"demo takes no arguments, not {' '.join(argv)}", file=sys.stderr)
        return 2
    console = make_console()
    interrupt_on_signals()
    try:
        with open_stage(project_root(), fresh=True) as stage:
            good = play(stage, console)
    except StageError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; everything it started has been stopped", file=sys.stderr)
        return INTERRUPTED
    console.print("\nOpen this data in the Dagster UI, with every run and the schedules on:  make dev")
    return 0 if good else 1


def interrupt_on_signals() -> None:
    """Let Ctrl-C and SIGTERM raise KeyboardInterrupt, also in a shell's background job, which ignores Ctrl-C."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.default_int_handler)


def make_console() -> Console:
    """A console that stays readable in a file, and whose texts are taken literally."""
    if isinstance(sys.stdout.encoding, str) and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal or console.width > _WIDTH:
        console.width = _WIDTH
    return console


def play(stage: Stage, console: Console) -> bool:
    """Fill the stage, run the jobs, show both books. True when everything came out as promised."""
    from billing_orchestration.database.engine import create_engine
    from billing_orchestration.sandbox.example_data.story import fill

    began = time.monotonic()
    engine = create_engine(stage.billing_url, application_name="demo")
    try:
        _let_midnight_pass(console)
        story = fill(engine, stage.control, datetime.now(timezone.utc))
        _introduce(console, story)
        with ExitStack() as stack:
            good = _Play(stage, console, engine, story, stack).run()
    finally:
        engine.dispose()
    mark_complete(stage)
    console.print(f"\nTook {time.monotonic() - began:.0f} s. Logs of the runs: {stage.folder.name}/logs/", style="dim")
    return good


def _let_midnight_pass(console: Console) -> None:
    """What is due today must be due today when the jobs run, too."""
    now = datetime.now(timezone.utc)
    left_s = 86_400 - (now.hour * 3600 + now.minute * 60 + now.second)
    if left_s < _LONGEST_PLAY_S:
        console.print(f"The billing day (UTC) ends in {left_s} s. The demo starts after midnight, to stay on one day.")
        time.sleep(left_s + 1)


@contextmanager
def _run_history(stage: Stage) -> Iterator[dg.DagsterInstance]:
    import dagster as dg

    os.environ.update({name: stage.env[name] for name in ("DAGSTER_HOME", "DAGSTER_POSTGRES_URL")})
    with dg.DagsterInstance.get() as instance:
        yield instance


def _introduce(console: Console, story: Story) -> None:
    console.rule("A subscription service on an eventful day", align="left", style="bold")
    instances = sum(len(case.items) for case in story.cases)
    console.print(
        f"Here, in the service's database: {len(story.subscriptions)} subscriptions and {story.payments} payments."
        f" There, at the provider (a sandbox with its own ledger): {story.provider_payments} payments.\n"
        f"They play out {len(story.cases)} situations in {instances} instances. The end shows what was expected of each"
        " and what happened.\n"
        "billing-orchestration migrate prepares the existing database:"
    )
    for line in story.migrated:
        console.print(f"    {line}", style="dim")


class _Play:
    """One performance."""

    def __init__(self, stage: Stage, console: Console, engine: sa.Engine, story: Story, stack: ExitStack) -> None:
        self.stage, self.console, self.engine, self.story = stage, console, engine, story
        self._stack = stack
        self._runs = 0

    @cached_property
    def report(self) -> Report:
        """Imported while the first job's process imports its own: each takes seconds."""
        from billing_orchestration.sandbox.report import Report

        return Report(self.console)

    @cached_property
    def history(self) -> dg.DagsterInstance:
        """Opened after the first run, which creates its tables."""
        return self._stack.enter_context(_run_history(self.stage))

    def run(self) -> bool:
        """All acts, in order."""
        red = [job for job in JOBS if not self._run(job)]
        self.stage.control.behave()
        if red:
            self._repeat(red)
        from billing_orchestration.sandbox.books import both_sides, read_books

        books = read_books(self.engine, self.stage.control.ledger())
        with closing(self.stage.connect_provider()) as provider:
            both = both_sides(self.engine, provider, datetime.now(timezone.utc))
        good = all(
            [
                self.report.cases(list(JOBS), self.story.cases, books),
                self.report.books(both, books, self.story.subscriptions),
                self._money_checks(),
                self._second_round(),
            ]
        )
        self.report.verdict(good)
        self._write_report()
        return good

    def _start(self, job: str) -> StartedJob:
        self._runs += 1
        return self.stage.start_job(job, self._runs)

    def _run(self, job: str) -> bool:
        """Whether it was green."""
        with self.console.status(f"{job} runs …"):
            started = self._start(job)
            _ = self.report
            run = started.wait()
        self.report.run(self.history, run, JOBS[job])
        return run.succeeded

    def _repeat(self, jobs: Sequence[str]) -> None:
        self.console.rule("The provider answers again: the red runs are repeated", align="left", style="bold")
        self.console.print(
            "A red run has applied everything that it could. Its next tick completes the rest; the demo does not wait."
        )
        with self.console.status("the red runs once more …"):
            runs = [started.wait() for started in [self._start(job) for job in jobs]]
        for run in runs:
            self.report.run(self.history, run, JOBS[run.job])

    def _money_checks(self) -> bool:
        """What the UI will say of the same books: its checks must not contradict the verdict."""
        from billing_orchestration.database.engine import read
        from billing_orchestration.jobs.money_checks import CHECKS

        with read(self.engine) as connection:
            verdicts = {check.name: check.ask(connection, datetime.now(timezone.utc)) for check in CHECKS}
        faults = [f"{name}: {what}" for name, verdict in verdicts.items() for what in verdict.broken]
        self.report.check(f"the money checks of the UI are green ({', '.join(verdicts)})", faults)
        return not faults

    def _write_report(self) -> None:
        """The daily report of the same books, as a file."""
        from billing_orchestration.database.engine import read
        from billing_orchestration.jobs.report.composing import as_html, count
        from billing_orchestration.jobs.report.plots import plots

        with read(self.engine) as connection:
            counted = count(connection, datetime.now(timezone.utc), "UTC")
        path = self.stage.folder / "report.html"
        path.write_text(as_html(counted, plots(counted)), encoding="utf-8")
        self.console.print(f"The daily report, as report_job shows it: {self.stage.folder.name}/{path.name}")

    def _second_round(self) -> bool:
        """All five again, two at once: nothing may change on either side."""
        from billing_orchestration.sandbox.books import fingerprint

        before, ledger = fingerprint(self.engine), self.stage.control.ledger()
        waiting, runs = list(JOBS), list[JobRun]()
        with self.console.status("all five jobs once more …"):
            while waiting:
                pair, waiting = waiting[:2], waiting[2:]
                runs += [started.wait() for started in [self._start(job) for job in pair]]
        changed = [table for table, rows in fingerprint(self.engine).items() if before[table] != rows]
        if len(self.stage.control.ledger()) != len(ledger):
            changed.append("the provider's ledger")
        red = [run.job for run in runs if not run.succeeded]
        faults = [f"changed: {name}" for name in changed] + [f"red: {job}" for job in red]
        self.report.check("all five jobs, run again, change nothing on either side", faults)
        return not faults


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
