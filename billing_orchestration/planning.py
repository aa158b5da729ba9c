"""`plan JOB`: a dry run on the command line, for CI: every decision, the plan's hash, and an exit code to gate on.

It reads what a run would read, and writes nothing anywhere: not to the database, the provider, or a run history.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import dagster as dg

from billing_orchestration.desk.tables import hanging, table
from billing_orchestration.jobs.approval import PLAN_TAG
from billing_orchestration.jobs.run_failures import failure_of
from billing_orchestration.jobs.run_report import decisions_in, read_result

_COLUMNS = ("action", "subject", "amount", "code", "reason")
_RUSSIAN = ("действие", "предмет", "сумма", "код", "причина")


class NotPlanned(Exception):
    """The plan could not be made; the run's own words."""


@dataclass(frozen=True, slots=True)
class Plan:
    """`decisions`: the first rows of the run's table, of `total`. `plan`: the hash that `approved_plan` takes."""

    job: str
    as_of: str
    plan: str
    changes: int
    total: int
    decisions: list[Mapping[str, Any]]

    def as_data(self) -> dict[str, Any]:
        """All of it, for programs."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {**fields, "decisions": [dict(row) for row in self.decisions]}

    def as_table(self, language: str) -> Iterator[str]:
        """A row for each decision under a header in this language, then what it comes to."""
        if self.decisions:
            rows = [[str(row[name] or "") for name in _COLUMNS] for row in self.decisions]
            yield from table([_RUSSIAN if language == "ru" else _COLUMNS, *rows])
        if self.total > len(self.decisions):
            yield f"... and {self.total - len(self.decisions)} more decisions"
        yield from hanging("", f"{self.job} as of {self.as_of}: {self.changes} changes, plan {self.plan}")


def make_plan(definitions: dg.Definitions, job: str, as_of: datetime | None) -> Plan:
    """Run a job dry, in this process. Raises NotPlanned with the run's own words when it fails."""
    config: dict[str, Any] = {"dry_run": True}
    if as_of is not None:
        config["as_of"] = as_of.isoformat()
    with dg.DagsterInstance.ephemeral() as instance:
        result = definitions.get_job_def(job).execute_in_process(
            instance=instance,
            run_config={
                "resources": {"run": {"config": config}},
                "loggers": {"console": {"config": {"log_level": "CRITICAL"}}},  # the plan is what is printed
            },
            raise_on_error=False,
        )
        if not result.success:
            raise NotPlanned(f"{job}: {failure_of(instance, result.run_id).words}")
        run = instance.get_run_by_id(result.run_id)
        report: Mapping[str, Any] = {}
        for entry in instance.all_logs(result.run_id, of_type=dg.DagsterEventType.STEP_OUTPUT):
            if entry.dagster_event is not None and "result" in entry.dagster_event.step_output_data.metadata:
                report = entry.dagster_event.step_output_data.metadata
    decisions, total = decisions_in(report)
    return Plan(
        job=job,
        as_of=str(report["as_of"].value).split(" ")[0],
        plan=run.tags.get(PLAN_TAG, "") if run is not None else "",
        changes=read_result(str(report["result"].value))["applied"],
        total=total,
        decisions=decisions,
    )
