"""`make demo`: the five jobs on example data, and the books of both sides, in about a minute.

It ends with 0 only if every case came out as expected and every promise holds in the provider's ledger.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from decimal import Decimal
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from billing_orchestration.domain.decisions import PASSIVE
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

    from billing_orchestration.sandbox.books import Books
    from billing_orchestration.sandbox.example_data import Story
    from billing_orchestration.sandbox.run_story import RunStory

# First what customers have paid themselves is recognised, then what is still due is charged, last what is over ends.
STORY = (
    ("matching_pending_payments_job", "every 2 minutes: PENDING here, paid at the provider?"),
    ("matching_successful_payments_job", "every 2 minutes: paid at the provider, and unknown or unfinished here?"),
    ("expire_payments_job", "daily: PENDING for more than 7 days, and the provider's word on each"),
    ("autopayment_job", "daily: charge what is due, with the saved payment method"),
    ("expire_subscriptions_job", "daily: 3 days past the end, and not renewed"),
)
_WIDTH_OF_A_FILE = 150
_ROOM_FOR_EXAMPLES = 120
INTERRUPTED = 130
_LONGEST_PLAY_S = 120


def main(argv: Sequence[str] = ()) -> int:
    """Play the demo from an empty stage. Returns 0 when the verdict is good."""
    if argv:
        print(f"demo takes no arguments, not {' '.join(argv)}", file=sys.stderr)
        return 2
    console = make_console()
    for name in (signal.SIGINT, signal.SIGTERM):  # also where a shell's background job ignores Ctrl-C
        signal.signal(name, signal.default_int_handler)
    try:
        with open_stage(project_root(), fresh=True) as stage:
            good = play(stage, console)
    except StageError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted, everything that it had started is stopped", file=sys.stderr)
        return INTERRUPTED
    console.print("\nOpen the Dagster UI on this very data, with all runs and the schedules on:  make dev")
    return 0 if good else 1


def make_console() -> Console:
    """A console that stays readable in a file, and whose texts are taken literally."""
    if isinstance(sys.stdout.encoding, str) and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, emoji=False, width=_WIDTH_OF_A_FILE)
    return console


def play(stage: Stage, console: Console) -> bool:
    """Fill the stage, run the jobs, show both books. True when everything came out as promised."""
    from billing_orchestration.database.engine import create_engine
    from billing_orchestration.sandbox.example_data import fill

    began = time.monotonic()
    engine = create_engine(stage.billing_url, application_name="demo")
    try:
        _let_midnight_pass(console)
        story = fill(engine, stage.control, datetime.now(timezone.utc))
        _introduce(console, story)
        with ExitStack() as stack:
            good = _Play(stage, console, engine, story, lambda: stack.enter_context(_run_history(stage))).run()
    finally:
        engine.dispose()
    mark_complete(stage)
    console.print(f"\n{time.monotonic() - began:.0f} seconds. Logs of the runs: {stage.folder.name}/logs/", style="dim")
    return good


def _let_midnight_pass(console: Console) -> None:
    """What is due today must be due today when the jobs run, too."""
    now = datetime.now(timezone.utc)
    left_s = 86_400 - (now.hour * 3600 + now.minute * 60 + now.second)
    if left_s < _LONGEST_PLAY_S:
        console.print(f"The billing day (UTC) ends in {left_s} s: the demo begins after that, on one day.")
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
        f"Example data: {len(story.subscriptions)} subscriptions and {story.payments} payments in the service's"
        f" database, {story.provider_payments} payments at the provider (a sandbox with books of its own).\n"
        f"{len(story.cases)} situations in {instances} instances: what was expected of each, and what happened, is"
        " shown at the end.\n"
        "billing-orchestration migrate, on this existing database:"
    )
    for line in story.migrated:
        console.print(f"    {line}", style="dim")


class _Play:
    """One performance."""

    def __init__(
        self,
        stage: Stage,
        console: Console,
        engine: sa.Engine,
        story: Story,
        open_history: Callable[[], dg.DagsterInstance],
    ) -> None:
        self.stage, self.console, self.engine, self.story = stage, console, engine, story
        self.open_history = open_history
        self.runs = 0
        self.stories: list[RunStory] = []

    @cached_property
    def history(self) -> dg.DagsterInstance:
        """Opened after the first run, which creates its tables."""
        return self.open_history()

    def run(self) -> bool:
        """All acts, in order."""
        red = []
        for job, question in STORY:
            run = self._run(job)
            self._report(run, question)
            if not run.succeeded:
                red.append((job, question))
        self.stage.control.behave()
        if red:
            self.console.rule("The provider answers again: what was red is run once more", align="left", style="bold")
            self.console.print(
                "A red run has applied everything else. The next tick or day completes it; here it is now."
            )
            with self.console.status("the red runs once more …"):
                runs = [started.wait() for started in [self._start(job) for job, _ in red]]
            for run, (_, question) in zip(runs, red, strict=True):
                self._report(run, question)
        books = self._books()
        expected = self._show_cases(books)
        kept = self._show_books(books)
        unchanged = self._second_round()
        good = expected and kept and unchanged
        self.console.print(
            "\nVERDICT: both sides agree. Nobody was charged twice, nothing paid was lost, nothing was granted unpaid."
            if good
            else "\nVERDICT: NOT as promised; see what is marked with ✗ above.",
            style="bold green" if good else "bold red",
        )
        return good

    def _start(self, job: str) -> StartedJob:
        self.runs += 1
        return self.stage.start_job(job, self.runs)

    def _run(self, job: str) -> JobRun:
        with self.console.status(f"{job} runs …"):
            started = self._start(job)
            # Seconds of imports that the report needs, while the job's process does its own.
            import_module("billing_orchestration.sandbox.run_story")
            import_module("billing_orchestration.sandbox.books")
            return started.wait()

    def _report(self, run: JobRun, question: str) -> None:
        from billing_orchestration.sandbox.run_story import grouped, read_run

        told = read_run(self.history, run.job)
        self.console.print()
        self.console.rule(f"{run.job}  ({question})", align="left", style="bold")
        if told is None:
            self.console.print(f"The run was not even recorded, see {run.log}", style="red")
            return
        self.stories.append(told)
        self.console.print("found: " + _numbers(told.found))
        wide = self.console.width >= _ROOM_FOR_EXAMPLES
        table = _table("what was done", "how many", "sum", "why", *(["for example"] if wide else []))
        table.columns[1].justify = table.columns[2].justify = "right"
        for group in grouped(told.decisions):
            style = "dim" if group.action in PASSIVE else ""
            table.add_row(
                group.action,
                str(group.count),
                _sums(group.sums),
                group.reason,
                *([group.example] if wide else []),
                style=style,
            )
        if told.decisions:
            self.console.print(table)
        if told.more_decisions:
            self.console.print(f"… and {told.more_decisions} more of the kinds above", style="dim")
        if run.succeeded:
            self.console.print(f"green: {_numbers(told.counts)}  ({run.seconds:.1f} s)", style="green")
        else:
            self.console.print(f"red: {_numbers(told.counts)}  ({run.seconds:.1f} s)", style="red")
            self.console.print(told.failure or f"see {run.log}", style="red")

    def _books(self) -> Books:
        from billing_orchestration.sandbox.books import read_books

        return read_books(self.engine, self.stage.control.ledger())

    def _show_cases(self, books: Books) -> bool:
        from billing_orchestration.sandbox.books import CaseReader
        from billing_orchestration.sandbox.run_story import reported

        reader = CaseReader(books, reported(self.stories))
        self.console.print()
        self.console.rule("Every situation: what was expected, and what happened", align="left", style="bold")
        good = True
        for job, _ in STORY:
            table = _table(job, "n", "expected", "happened", "")
            table.columns[0].ratio, table.columns[2].ratio, table.columns[3].ratio = 4, 4, 6
            table.columns[1].justify = "right"
            table.expand = True
            for case in (case for case in self.story.cases if case.job == job):
                outcome = reader.read(case)
                good = good and outcome.as_expected
                table.add_row(
                    case.label, str(len(case.items)), case.expected, outcome.told, "✓" if outcome.as_expected else "✗",
                    style="" if outcome.as_expected else "bold red",
                )  # fmt: skip
            self.console.print(table)
        return good

    def _show_books(self, books: Books) -> bool:
        from billing_orchestration.sandbox.books import BAD, GOOD, compare, verdict

        both = compare(books)
        self.console.rule("The books of both sides", align="left", style="bold")
        table = _table(
            "provider payment by payment", "payments", "provider's ledger", "refunded there", "counts as paid here"
        )
        for column in table.columns[1:]:
            column.justify = "right"
        for name in (*GOOD, *BAD):
            lines = both[both["verdict"] == name]
            if name in BAD and lines.empty:
                table.add_row(name.lower(), "0", "", "", "", style="dim")
                continue
            table.add_row(
                name, str(len(lines)), _by_currency(lines, "charged"), _by_currency(lines, "refunded"),
                _by_currency(lines[lines["succeeded"] > 0], "amount"), style="bold red" if name in BAD else "",
            )  # fmt: skip
        self.console.print(table)
        good = True
        for check in verdict(books, self.story.subscriptions):
            good = good and not check.faults
            mark = "✗" if check.faults else "✓"
            self.console.print(f"{mark} {check.promise} ({check.looked_at})", style="red" if check.faults else "green")
            for fault in check.faults[:10]:
                self.console.print(f"    {fault}", style="red")
        return good

    def _second_round(self) -> bool:
        """All five again, two at a time: nothing may change, on neither side."""
        from billing_orchestration.sandbox.books import fingerprint

        before, ledger = fingerprint(self.engine), self.stage.control.ledger()
        waiting = [job for job, _ in STORY]
        runs = []
        with self.console.status("all five jobs once more …"):
            while waiting:
                pair, waiting = waiting[:2], waiting[2:]
                runs += [started.wait() for started in [self._start(job) for job in pair]]
        changed = [table for table, sums in fingerprint(self.engine).items() if before[table] != sums]
        if len(self.stage.control.ledger()) != len(ledger):
            changed.append("the provider's ledger")
        failed = [run.job for run in runs if not run.succeeded]
        good = not changed and not failed
        what = (
            "all five jobs run once more change nothing, on neither side"
            if good
            else f"a second round: changed {', '.join(changed) or 'nothing'}; red: {', '.join(failed) or 'none'}"
        )
        self.console.print(f"{'✓' if good else '✗'} {what}", style="green" if good else "red")
        return good


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name)
    return table


def _numbers(numbers: Mapping[str, int]) -> str:
    return " · ".join(f"{name} {number}" for name, number in numbers.items()) or "nothing"


def _sums(sums: Mapping[str, Decimal]) -> str:
    return ", ".join(f"{total:,.2f} {currency}" for currency, total in sorted(sums.items()))


def _by_currency(lines: object, column: str) -> str:
    sums: dict[str, Decimal] = {}
    for line in lines.itertuples():  # type: ignore[attr-defined]
        amount = getattr(line, column)
        if isinstance(amount, Decimal) and amount:
            sums[line.currency] = sums.get(line.currency, Decimal(0)) + amount
    return _sums(sums)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
