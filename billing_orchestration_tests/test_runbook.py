"""The runbook keeps up with the code: alerts link to headings that exist, and every kind of problem is described."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from billing_orchestration.domain.problem_kinds import KINDS, ProblemKind
from billing_orchestration.jobs.money_checks import CHECKS
from billing_orchestration.jobs.run_alerts import CONSEQUENCES

ROOT = Path(__file__).parents[1]
RUNBOOK = (ROOT / "docs" / "operations.md").read_text()


def test_every_alert_links_to_a_heading_of_the_runbook() -> None:
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in RUNBOOK.splitlines()
                if line.startswith("#")}  # fmt: skip
    linked = {*CONSEQUENCES, *(check.name for check in CHECKS), "quarantine"}
    assert linked <= headings, linked - headings


def test_every_kind_of_problem_is_in_the_table_in_the_words_that_the_command_uses() -> None:
    rows = [line.strip("|").split(" | ") for line in RUNBOOK.splitlines() if line.startswith("| `")]
    table = {cells[0].strip(" `"): [cell.strip() for cell in cells[1:]] for cells in rows}
    for name, kind in KINDS.items():
        assert table[name] == [kind.means, kind.accept, kind.attach or "-", kind.ignore]


def test_every_kind_that_the_code_can_open_is_described() -> None:
    assert set(get_args(ProblemKind)) == set(KINDS)
