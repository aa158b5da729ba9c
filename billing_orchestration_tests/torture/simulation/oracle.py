"""The judge: compares the provider's ledger with the tables, by SQL and arithmetic of its own."""

from __future__ import annotations

from billing_orchestration_tests.torture.simulation.oracle_books import BooksJudge
from billing_orchestration_tests.torture.simulation.oracle_clocks import ClocksJudge
from billing_orchestration_tests.torture.simulation.oracle_runs import RunsJudge
from billing_orchestration_tests.torture.simulation.oracle_sends import SendsJudge


class Oracle(BooksJudge, RunsJudge, SendsJudge, ClocksJudge):
    """One installation's judge. `violations` runs every check of the books; the others are for certain moments."""
