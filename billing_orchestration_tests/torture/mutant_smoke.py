"""What must still work in every mutant: a mutant that cannot even start is killed by nothing, it is a broken one."""

from __future__ import annotations

import importlib
import pkgutil

import sqlalchemy as sa

import billing_orchestration
from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration_tests.jobs.service import Service

JOBS = (
    "autopayment_job", "expire_subscriptions_job", "expire_payments_job", "matching_pending_payments_job",
    "matching_successful_payments_job",
)  # fmt: skip


def test_every_module_can_be_imported_and_every_job_runs_on_an_empty_service(
    engine: sa.Engine, database_url: str, sandbox: Sandbox
) -> None:
    for module in pkgutil.walk_packages(billing_orchestration.__path__, "billing_orchestration."):
        # Alembic's environment runs when it is imported, by Alembic.
        if not module.name.endswith(".migrations.env") and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    service = Service(engine, database_url, sandbox)
    for job in JOBS:
        run = service.run(job)
        assert run.ok, run.failure
