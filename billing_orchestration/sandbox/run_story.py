"""What a run said about itself, read back from Dagster's run history: slices, decisions with reasons, its failure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import dagster as dg

from billing_orchestration.domain.decisions import PASSIVE
from billing_orchestration.jobs.run_failures import failure_of
from billing_orchestration.jobs.run_report import decisions_in, read_result

# A reason of several sentences is cut in the table; the run's page in the UI has all of it.
_LONGEST_REASON = 240


@dataclass(frozen=True, slots=True)
class RunStory:
    """One run. `found`: the sizes of its slices; `counts`: applied, skipped, quarantined, to retry."""

    run_id: str
    found: Mapping[str, int]
    counts: Mapping[str, int]
    decisions: Sequence[Mapping[str, Any]]
    more_decisions: int
    failure: str | None


@dataclass(frozen=True, slots=True)
class Group:
    """Decisions with one action and one code: how many, their sums by currency, and the first one's reason."""

    action: str
    reason: str
    count: int
    sums: Mapping[str, Decimal]


def read_run(instance: dg.DagsterInstance, job: str) -> RunStory | None:
    """The latest run of a job; None when there is none."""
    records = instance.get_run_records(dg.RunsFilter(job_name=job), limit=1)
    if not records:
        return None
    run = records[0].dagster_run
    failure = failure_of(instance, run.run_id) if run.status == dg.DagsterRunStatus.FAILURE else None
    found: dict[str, int] = {}
    report: Mapping[str, Any] = failure.metadata if failure else {}
    for entry in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_OUTPUT):
        if entry.dagster_event is None:
            continue
        metadata = entry.dagster_event.step_output_data.metadata
        if "result" in metadata:
            report = metadata
        elif (entry.dagster_event.step_key or "").startswith("fetch_"):
            found |= _numbers(metadata)
    decisions, total = decisions_in(report)
    counts = read_result(str(report["result"].value)) if "result" in report else {}
    return RunStory(run.run_id, found, counts, decisions, total - len(decisions), failure.words if failure else None)


def _numbers(metadata: Mapping[str, Any]) -> dict[str, int]:
    return {name: value.value or 0 for name, value in metadata.items() if isinstance(value, dg.IntMetadataValue)}


def grouped(decisions: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Decisions that are alike, counted together: changes first, then by number."""
    alike: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for decision in decisions:
        alike.setdefault((str(decision["action"]), str(decision["code"])), []).append(decision)
    groups = [
        Group(action, _shortened(str(rows[0]["reason"])), len(rows), _sums(rows)) for (action, _), rows in alike.items()
    ]
    return sorted(groups, key=lambda group: (group.action in PASSIVE, group.action, -group.count))


def _shortened(reason: str) -> str:
    return reason if len(reason) <= _LONGEST_REASON else reason[:_LONGEST_REASON].rsplit(" ", 1)[0] + " …"


def _sums(rows: Sequence[Mapping[str, Any]]) -> dict[str, Decimal]:
    sums: dict[str, Decimal] = {}
    for row in rows:
        amount, _, currency = str(row["amount"]).partition(" ")
        if currency:
            sums[currency] = sums.get(currency, Decimal(0)) + Decimal(amount)
    return sums


def reported(stories: Sequence[RunStory]) -> dict[str, str]:
    """Subject -> the reason of what was last said about it."""
    return {str(row["subject"]): str(row["reason"]) for story in stories for row in story.decisions}
