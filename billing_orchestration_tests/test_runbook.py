"""The runbook keeps up with the code: alerts link to its headings, and every kind of problem and code is described."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import get_args

from billing_orchestration.database import fitness, health
from billing_orchestration.database.errors import BillingDatabaseError
from billing_orchestration.desk import doctor
from billing_orchestration.domain.decisions import Code
from billing_orchestration.domain.problem_kinds import KINDS, ProblemKind
from billing_orchestration.domain.reconciled import CLASSES, QUIET
from billing_orchestration.domain.run_scope import RunRefused
from billing_orchestration.jobs.money_checks import CHECKS
from billing_orchestration.jobs.run_alerts import CONSEQUENCES
from billing_orchestration.jobs.run_failures import FailureCode
from billing_orchestration.provider.errors import ProviderError
from billing_orchestration.settings import SettingsError

ROOT = Path(__file__).parents[1]
RUNBOOK = (ROOT / "docs" / "operations.md").read_text()


def test_every_alert_links_to_a_heading_of_the_runbook() -> None:
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in RUNBOOK.splitlines()
                if line.startswith("#")}  # fmt: skip
    linked = {*CONSEQUENCES, *(check.name for check in CHECKS), "quarantine"}
    assert linked <= headings, linked - headings


def test_every_kind_of_problem_is_in_the_table_in_the_words_that_the_command_uses() -> None:
    rows = [line.strip("|").split(" | ") for line in _below("## Quarantine").splitlines() if line.startswith("| `")]
    table = {cells[0].strip(" `"): [cell.strip() for cell in cells[1:]] for cells in rows}
    for name, kind in KINDS.items():
        assert table[name] == [kind.means, kind.accept, kind.attach or "-", kind.ignore]


def test_every_kind_that_the_code_can_open_is_described() -> None:
    assert set(get_args(ProblemKind)) == set(KINDS)


def test_every_code_is_described() -> None:
    errors = {name for base in (BillingDatabaseError, ProviderError, SettingsError, RunRefused) for name in _tree(base)}
    assert _coded("### Failure codes") == errors | _constants(FailureCode)
    assert _coded("### Decision codes") == _constants(Code) | (CLASSES.keys() - KINDS.keys() - set(QUIET))


def test_every_finding_of_doctor_is_described() -> None:
    texts = {
        node.value
        for module in (doctor, fitness)
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    told = {text for text in texts if re.fullmatch(r"[a-z_]+\.[a-z_]+", text)} - {"dagster.yaml"}
    kinds = (health.NO_TABLE, health.NO_COLUMN, health.NO_ENUM, health.TYPE, health.LABELS)
    assert len(told) > 30
    assert _coded("### Findings of doctor") == told | {f"tables.{kind}" for kind in kinds}


def _below(heading: str) -> str:
    return RUNBOOK.split(f"\n{heading}\n")[1].split(f"\n{heading.split(maxsplit=1)[0]} ")[0]


def _coded(heading: str) -> set[str]:
    """The codes in the first column of the table below a heading."""
    first = [line.split(" | ")[0] for line in _below(heading).splitlines() if line.startswith("| `")]
    return {code for cell in first for code in re.findall(r"`([\w.]+)`", cell)}


def _constants(codes: type) -> set[str]:
    return {value for name, value in vars(codes).items() if name.isupper()}


def _tree(error: type[Exception]) -> set[str]:
    """The name of an error's class, and of all below it in the package."""
    below = [part for part in error.__subclasses__() if part.__module__.startswith("billing_orchestration.")]
    return {error.__name__}.union(*map(_tree, below))
