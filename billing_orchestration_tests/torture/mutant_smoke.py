"""What must still work in every mutant: a mutant that cannot even start is killed by nothing, it is a broken one."""

from __future__ import annotations

import importlib
from contextlib import closing
from datetime import datetime, timezone

from billing_orchestration_tests.torture.mutants import ALL
from billing_orchestration_tests.torture.simulation.traits import Traits
from billing_orchestration_tests.torture.simulation.world import JOBS, World


def test_every_module_can_be_imported_and_every_job_runs_on_an_empty_service(database_url: str) -> None:
    # Of those that a mutant changes: the page of the UI and its plots cost more than most mutants' tests.
    for file in sorted({edit.file for mutant in ALL for edit in mutant.edits}):
        importlib.import_module("billing_orchestration." + file.removesuffix(".py").replace("/", "."))
    # Its jobs' ops without Dagster's bookkeeping, which would cost more than all tests of most mutants.
    with closing(World(database_url, 1, datetime(2026, 3, 5, 12, tzinfo=timezone.utc), Traits())) as world:
        for job in JOBS:
            end = world.run(job)
            assert end.ok, end.failure or end.crash
