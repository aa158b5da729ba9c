"""What the demo prints: each run's story, every case, and both books."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal

import dagster as dg
import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from billing_orchestration.both_sides import BothSides
from billing_orchestration.domain.decisions import PASSIVE
from billing_orchestration.domain.reconciled import CLASSES
from billing_orchestration.domain.reconciliation import sum_up, to_amount
from billing_orchestration.sandbox.books import Books, CaseReader, reconciled, verdict
from billing_orchestration.sandbox.example_data.records import Case, Subscription
from billing_orchestration.sandbox.run_story import RunStory, grouped, read_run, reported
from billing_orchestration.sandbox.stage import JobRun

_MOST_FAULTS = 10


class Report:
    """Prints to a console, and remembers what the runs said."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._stories: list[RunStory] = []

    def run(self, history: dg.DagsterInstance, run: JobRun, question: str) -> None:
        """One run: what it found, decided and did."""
        self.console.print()
        self._rule(f"{run.job}  ({question})")
        told = read_run(history, run.job)
        if told is None:
            self.console.print(f"Dagster has no record of this run: see {run.log}", style="red")
            return
        self._stories.append(told)
        self.console.print("found: " + _numbers(told.found))
        if told.decisions:
            self._decisions(told)
        if told.more_decisions:
            self.console.print(f"… and {told.more_decisions} more like these", style="dim")
        colour = "green" if run.succeeded else "red"
        self.console.print(
            f"{colour}: {_numbers(told.counts)}  ({run.seconds:.1f} s)",
            style=colour,
        )
        if not run.succeeded:
            self.console.print(told.failure or f"see {run.log}", style="red")

    def _decisions(self, told: RunStory) -> None:
        table = _table("action", "count", "sum", "reason", right=(1, 2))
        for group in grouped(told.decisions):
            cells = (group.action, str(group.count), _sums(group.sums), group.reason)
            table.add_row(*cells, style="dim" if group.action in PASSIVE else "")
        self.console.print(table)

    def cases(self, jobs: Sequence[str], cases: Sequence[Case], books: Books) -> bool:
        """Every case with its outcome. True when all are as expected."""
        reader = CaseReader(books, reported(self._stories))
        self.console.print()
        self._rule("Every situation: what was expected, and what happened")
        good = True
        for job in jobs:
            table = _table(job, "n", "expected", "happened", "", right=(1,))
            table.columns[0].ratio, table.columns[2].ratio, table.columns[3].ratio = 4, 4, 6
            table.expand = True
            for case in (case for case in cases if case.job == job):
                outcome = reader.read(case)
                good = good and outcome.as_expected
                mark, style = ("✓", "") if outcome.as_expected else ("✗", "bold red")
                table.add_row(case.label, str(len(case.items)), case.expected, outcome.told, mark, style=style)
            self.console.print(table)
        return good

    def books(self, both: BothSides, books: Books, before: Sequence[Subscription]) -> bool:
        """Both books, line by line. True when every promise holds."""
        lines = both.compare()
        sums = sum_up(lines)
        self._rule("The books of both sides, reconciled line by line, as reconciliation_job does every day")
        columns = ("paid_there", "refunded_there", "paid_here")
        table = _table("class", "lines", *(name.replace("_", " ") for name in columns), right=(1, 2, 3, 4))
        found = {name: sums[sums["class"] == name] for name in CLASSES}
        for name, of_class in sorted(found.items(), key=lambda item: item[1].empty):
            amounts = [_by_currency(of_class, column) for column in columns]
            style = "dim" if of_class.empty else ""
            table.add_row(CLASSES[name], str(of_class["lines"].sum()), *amounts, style=style)
        self.console.print(table)
        checks = [*reconciled(lines, sums, books), *verdict(books, before)]
        for check in checks:
            self.check(f"{check.promise} ({check.looked_at})", check.faults)
        return not any(check.faults for check in checks)

    def check(self, promise: str, faults: Sequence[str]) -> None:
        """One promise, with what breaks it."""
        mark, colour = ("✗", "red") if faults else ("✓", "green")
        self.console.print(f"{mark} {promise}", style=colour)
        for fault in faults[:_MOST_FAULTS]:
            self.console.print(f"    {fault}", style=colour)

    def verdict(self, good: bool) -> None:
        """The last word."""
        self.console.print(
            "\nVERDICT: both sides agree. Nobody was charged twice, nothing paid was lost, nothing was granted unpaid."
            if good
            else "\nVERDICT: a promise is broken. See the lines marked ✗ above.",
            style="bold green" if good else "bold red",
        )

    def _rule(self, title: str) -> None:
        self.console.rule(title, align="left", style="bold")


def _table(*names: str, right: Sequence[int] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number in right else "left")
    return table


def _numbers(numbers: Mapping[str, int]) -> str:
    return " · ".join(f"{name} {number}" for name, number in numbers.items() if number) or "nothing"


def _sums(sums: Mapping[str, Decimal]) -> str:
    return ", ".join(f"{total:,.2f} {currency}" for currency, total in sorted(sums.items()))


def _by_currency(sums: pd.DataFrame, column: str) -> str:
    amounts = zip(sums["currency"], sums[column], strict=True)
    return "\n".join(f"{to_amount(kopecks):,.2f} {currency}" for currency, kopecks in amounts if kopecks)
