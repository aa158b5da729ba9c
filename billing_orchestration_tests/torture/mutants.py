"""Mutants: known faults are put into the code, and the suite must notice each.

    python -m billing_orchestration_tests.torture.mutants               all of them, printed as a table
    python -m billing_orchestration_tests.torture.mutants "a random key" ...    these only, with the words of their end

A mutant is an exact replacement in a copy of the package (never in the tree). Its tests run against that copy in a
process of their own, on a real PostgreSQL and the sandbox. It is

    killed     a test failed by what it asserts about the rule
    SURVIVED   all its tests passed: a test is missing
    BROKEN     it could not be tried: a replacement does not fit the source exactly once, the copy does not start (a
               smoke test), or its tests end otherwise than by an assertion. That is a fault of this machinery, no kill.

The same tests pass on an unchanged copy first: else a failure would mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from billing_orchestration_tests.fixtures.postgres import BORROWED, start_server
from billing_orchestration_tests.torture.mutant import Edit, Mutant
from billing_orchestration_tests.torture.mutant_catalogue import ALL
from billing_orchestration_tests.torture.mutant_runner import ASSERTION, ERROR, PASSED
from billing_orchestration_tests.torture.zygote import OUTPUT, Zygote

ROOT = Path(__file__).parents[2]
PACKAGE, TESTS = "billing_orchestration", "billing_orchestration_tests"
KILLED, SURVIVED, BROKEN = "killed", "SURVIVED", "BROKEN"
# A mutant that does not end by then hangs, which is no assertion. All tests of all mutants take longer than one's.
_LONGEST_S = 240
_LONGEST_BASELINE_S = 1800
AT_A_TIME = 2


Told = TypeVar("Told")


class DoesNotFit(Exception):
    """A replacement that the source does not hold exactly once, or that is no Python."""


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant. `by`: the test that killed it, or why it could not be tried."""

    mutant: Mutant
    outcome: str
    by: str
    words: str = ""
    seconds: float = 0.0


def edited(sources: Path, edits: Iterable[Edit]) -> dict[str, str]:
    """The changed files of the package below `sources`, as text. Raises DoesNotFit."""
    texts: dict[str, str] = {}
    for edit in edits:
        text = texts.get(edit.file) or (sources / PACKAGE / edit.file).read_text()
        found = text.count(edit.old)
        if found != 1:
            raise DoesNotFit(f"{edit.file} holds {found} times, not once: {edit.old.strip().splitlines()[0]!r}")
        texts[edit.file] = text.replace(edit.old, edit.new)
    for file, text in texts.items():
        try:
            compile(text, file, "exec")
        except SyntaxError as error:
            raise DoesNotFit(f"{file} would be no Python: {error}") from error
        if text == (sources / PACKAGE / file).read_text():
            raise DoesNotFit(f"{file} would stay as it is")
    return texts


def _share(source: str, copy: str) -> None:
    """A second name for a file: a thousand copies for each mutant cost more than its tests."""
    try:
        os.link(source, copy)
    except OSError:  # on another disk
        shutil.copy2(source, copy)


def copy_to(folder: Path, edits: Sequence[Edit] = ()) -> None:
    """Package and tests, with the replacements made. Compiled files come along: they cost half of a start."""
    texts = edited(ROOT, edits)
    for name in (PACKAGE, TESTS):
        shutil.copytree(ROOT / name, folder / name, copy_function=_share)
    shutil.copy2(ROOT / "pyproject.toml", folder)
    for file, text in texts.items():
        path = folder / PACKAGE / file
        path.unlink()  # the tree's own file has this name, too
        path.write_text(text)
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()


def run_tests(
    folder: Path, tests: Sequence[str], postgres_url: str, zygote: Zygote, longest_s: int = _LONGEST_S
) -> dict[str, Any]:
    """The runner's report. Raises RuntimeError when there is none."""
    report = folder / "report.json"
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DAGSTER_", "YOOKASSA_", "BILLING_", "PYTEST_", "TORTURE_"))
        and name not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
    }
    environment |= {BORROWED: postgres_url, "PYTHONHASHSEED": "0"}
    arguments = [str(report), *(f"{TESTS}/{test}" for test in tests)]
    try:
        zygote.run(folder, f"{TESTS}.torture.mutant_runner", arguments, environment, longest_s)
    except TimeoutError as error:
        raise RuntimeError(f"its tests did not end within {longest_s} s") from error
    if not report.exists():
        raise RuntimeError(f"it did not start: {' '.join((folder / OUTPUT).read_text().split())[-300:]}")
    told: dict[str, Any] = json.loads(report.read_text())
    return told


def judge(mutant: Mutant, told: dict[str, Any]) -> Verdict:
    """Killed only by an assertion, and only after the smoke test has passed."""
    if [how for _, how, _ in told["smoke"]] != [PASSED]:
        words = "; ".join(words for _, _, words in told["smoke"]) or "no smoke test ran"
        return Verdict(mutant, BROKEN, "the smoke test failed", words)
    for name, how, words in told["tests"]:
        if how == ASSERTION:
            return Verdict(mutant, KILLED, name.partition("/")[2], words)
    errors = [(name, words) for name, how, words in told["tests"] if how == ERROR]
    if errors:
        return Verdict(mutant, BROKEN, f"an error, no assertion: {errors[0][0].partition('/')[2]}", errors[0][1])
    if not told["tests"]:
        return Verdict(mutant, BROKEN, "none of its tests ran")
    return Verdict(mutant, SURVIVED, f"{len(told['tests'])} tests passed")


def attempt(mutant: Mutant, postgres_url: str, zygote: Zygote) -> Verdict:
    """Put it into a copy and let its tests have it."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        try:
            copy_to(Path(name), mutant.edits)
            verdict = judge(mutant, run_tests(Path(name), mutant.tests, postgres_url, zygote))
        except (DoesNotFit, RuntimeError) as error:
            verdict = Verdict(mutant, BROKEN, str(error))
    return Verdict(mutant, verdict.outcome, verdict.by, verdict.words, time.monotonic() - started)


def baseline(mutants: Iterable[Mutant], postgres_url: str, zygote: Zygote) -> list[str]:
    """The same tests on an unchanged copy: everything that did not pass (nothing)."""
    tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    with tempfile.TemporaryDirectory(prefix="no-mutant-") as name:
        copy_to(Path(name))
        told = run_tests(Path(name), tests, postgres_url, zygote, _LONGEST_BASELINE_S)
    failed = [f"{name}: {how}, {words}" for name, how, words in (*told["smoke"], *told["tests"]) if how != PASSED]
    if told["status"] != 0 and not failed:
        failed = [f"pytest ended with {told['status']}: a test that is named here does not exist"]
    return failed


def attempt_all(mutants: Sequence[Mutant], longest_s: float = float("inf")) -> tuple[list[str], list[Verdict]]:
    """What the baseline failed, and the verdicts of those that were begun within the time, some at once."""
    end = time.monotonic() + longest_s
    free: SimpleQueue[tuple[str, Zygote]] = SimpleQueue()

    def warmly(do: Callable[[str, Zygote], Told]) -> Told:
        place = free.get()
        try:
            return do(*place)
        finally:
            free.put(place)

    with ExitStack() as stack:
        for _ in range(AT_A_TIME):
            # A server each, as under xdist: tests make roles, and these are the whole server's.
            free.put((stack.enter_context(start_server()).url(), stack.enter_context(Zygote())))
        threads = stack.enter_context(ThreadPoolExecutor(AT_A_TIME))
        sound = threads.submit(warmly, partial(baseline, mutants))

        def try_one(mutant: Mutant) -> Verdict | None:
            return warmly(partial(attempt, mutant)) if time.monotonic() < end else None

        verdicts = list(threads.map(try_one, mutants))
        return sound.result(), [verdict for verdict in verdicts if verdict is not None]


def table(verdicts: Sequence[Verdict]) -> str:
    """As a person reads it."""
    outcomes = [verdict.outcome for verdict in verdicts]
    width = max(len(verdict.mutant.name) for verdict in verdicts)
    rules = max(len(verdict.mutant.rule) for verdict in verdicts)
    lines = [
        f"{len(verdicts)} mutants: {outcomes.count(KILLED)} killed, {outcomes.count(SURVIVED)} survived,"
        f" {outcomes.count(BROKEN)} broken",
        f"  {'mutant':<{width}}  {'rule':<{rules}}  fate",
    ]
    for verdict in verdicts:
        test = verdict.by.rpartition("::")[2]
        fate = f"killed by {test}" if verdict.outcome == KILLED else f"{verdict.outcome}: {verdict.by} {verdict.words}"
        lines.append(f"  {verdict.mutant.name:<{width}}  {verdict.mutant.rule:<{rules}}  {fate}")
    return "\n".join(lines)


def markdown(mutants: Sequence[Mutant]) -> str:
    """The catalogue as docs/mutants.md holds it."""
    lines = ["| mutant | rule it breaks | the suite's test |", "|---|---|---|"]
    for mutant in mutants:
        tests = "<br>".join(f"`{test.partition('[')[0]}`" for test in mutant.tests)
        lines.append(f"| {mutant.name} | {mutant.rule} | {tests} |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Put known faults into the code, and see the suite notice.")
    parser.add_argument("mutant", nargs="*", help="the names in the table")
    parser.add_argument("--markdown", action="store_true", help="only print the table of docs/mutants.md")
    asked = parser.parse_args()
    if asked.markdown:
        print(markdown(ALL))
        return
    unknown = set(asked.mutant) - {mutant.name for mutant in ALL}
    if unknown:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in ALL if not asked.mutant or mutant.name in asked.mutant]
    started = time.monotonic()
    unsound, verdicts = attempt_all(chosen)
    print(table(verdicts))
    if asked.mutant:
        for verdict in verdicts:
            print(f"\n{verdict.mutant.name}: {verdict.outcome}, {verdict.seconds:.0f} s")
            print(f"  {verdict.by}\n  {verdict.words}")
    for line in unsound:
        print(f"the unchanged code fails {line}")
    print(f"{time.monotonic() - started:.0f} s")
    sys.exit(1 if unsound or any(verdict.outcome != KILLED for verdict in verdicts) else 0)


if __name__ == "__main__":
    main()
