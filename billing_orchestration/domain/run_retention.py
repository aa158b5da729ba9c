"""Which runs leave the run history, and why the others stay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

YOUNG = "younger than RUN_HISTORY_DAYS"
CHANGED = "changed something"
MARKS_ITS_PARTITION = "the last run of its partition"
GOES = "goes"


@dataclass(frozen=True, slots=True)
class PastRun:
    """A finished run. `changed`: it has changed something; `partition`: the hour or day it stands for, if any."""

    run_id: str
    job: str
    created_at: datetime
    ended_at: datetime
    partition: str | None
    changed: bool


def retention(
    runs_newest_first: Iterable[PastRun], as_of: datetime, keep_days: int, keep_changed_days: int
) -> Iterator[tuple[PastRun, str]]:
    """For each run, whether it goes (GOES) or why it stays.

    After `keep_days` a run stays only if it changed something, or if it is the last one of its partition, so that the
    grid still shows what was covered. After `keep_changed_days` every run goes.
    """
    marked: set[tuple[str, str]] = set()
    for run in runs_newest_first:
        age = as_of - run.created_at
        marks = run.partition is not None and (run.job, run.partition) not in marked
        if run.partition is not None:
            marked.add((run.job, run.partition))
        if age < timedelta(days=keep_days):
            yield run, YOUNG
        elif age >= timedelta(days=max(keep_days, keep_changed_days)):
            yield run, GOES
        elif run.changed:
            yield run, CHANGED
        elif marks:
            yield run, MARKS_ITS_PARTITION
        else:
            yield run, GOES
