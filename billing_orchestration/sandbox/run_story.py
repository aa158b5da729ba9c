"""What a run said about itself, read back from Dagster's run history: slices, decisions with reasons, its failure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import dagster as dg

# What differs from row to row in a reason, so that rows with the same reason can be counted together.
_PARTICULARS = re.compile(
    r"[0-9a-f]{8}(?:-[0-9a-f]{3,12}){3,4}"  # ids of provider payments, attempts and users
    r"|\d{4}-\d\d-\d\d(?:[ T]\d\d:\d\d(?::\d\d(?:\.\d+)?)?)?"  # days and instants
    r"|(?<=subscription )\d+|(?<=payment )\d+"
    r"|\d+(?= days ago)|(?<=overdue by )\d+"
)


@dataclass(frozen=True, slots=True)
class RunStory:
    """One run. `found`: the sizes of its slices; `counts`: applied, skipped, quarantined, needs another try."""

    run_id: str
    found: Mapping[str, int]
    counts: Mapping[str, int]
    decisions: Sequence[Mapping[str, Any]]
    more_decisions: int
    failure: str | None


# A reason of several sentences is cut in the table; the run's page in the UI has all of it.
_LONGEST_REASON = 240


@dataclass(frozen=True, slots=True)
class Group:
    """Decisions of one kind for one reason, with an example and their sums by currency."""

    action: str
    reason: str
    count: int
    sums: Mapping[str, Decimal]
    example: str


def read_run(instance: dg.DagsterInstance, job: str) -> RunStory | None:
    """The latest run of a job; None when there is none."""
    records = instance.get_run_records(dg.RunsFilter(job_name=job), limit=1)
    if not records:
        return None
    run_id = records[0].dagster_run.run_id
    found: dict[str, int] = {}
    counts: dict[str, int] = {}
    decisions: Sequence[Mapping[str, Any]] = ()
    more, failure = 0, None
    for entry in instance.all_logs(run_id):
        event = entry.dagster_event
        if event is None:
            continue
        data: Any = event.event_specific_data
        metadata: Mapping[str, Any] = {}
        if event.event_type == dg.DagsterEventType.STEP_OUTPUT:
            metadata = data.metadata
        elif event.event_type == dg.DagsterEventType.STEP_FAILURE:
            if data.user_failure_data is not None:
                metadata = data.user_failure_data.metadata
                failure = data.user_failure_data.description
            elif data.error is not None:
                failure = str(data.error.message).strip().splitlines()[-1]
        numbers = {name: value.value or 0 for name, value in metadata.items() if isinstance(value, dg.IntMetadataValue)}
        if "applied" in numbers:
            names = ("applied", "skipped", "quarantined", "quarantined for the first time", "needs another try")
            counts = {name: numbers[name] for name in names if name in numbers}
            decisions, more = _table(metadata)
        elif (event.step_key or "").startswith("fetch_"):
            found |= numbers
    return RunStory(run_id, found, counts, decisions, more, failure)


def _table(metadata: Mapping[str, Any]) -> tuple[Sequence[Mapping[str, Any]], int]:
    for name, value in metadata.items():
        if isinstance(value, dg.TableMetadataValue) and name.startswith("decisions"):
            records = [record.data for record in value.records]
            total = re.search(r"of (\d+)\)", name)
            return records, (int(total.group(1)) if total else len(records)) - len(records)
    return (), 0


def grouped(decisions: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Decisions that differ only in whom they are about, counted together: changes first, then by number."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for decision in decisions:
        key = (str(decision["action"]), _PARTICULARS.sub("…", str(decision["reason"])))
        groups.setdefault(key, []).append(decision)
    told = [
        Group(
            action,
            _shortened(str(rows[0]["reason"]) if len(rows) == 1 else reason),
            len(rows),
            _sums(rows),
            str(rows[0]["subject"]),
        )
        for (action, reason), rows in groups.items()
    ]
    return sorted(told, key=lambda group: (group.action in ("leave", "skip", "report"), group.action, -group.count))


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
