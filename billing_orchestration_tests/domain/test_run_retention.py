"""Which runs leave the run history."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from billing_orchestration.domain.run_retention import CHANGED, GOES, MARKS_ITS_PARTITION, YOUNG, PastRun, retention

NOW = datetime(2026, 3, 12, 6, 0, tzinfo=timezone.utc)


def past(days: float, *, partition: str | None = None, changed: bool = False, job: str = "matching") -> PastRun:
    at = NOW - timedelta(days=days)
    return PastRun(f"{job}-{days}", job, at, at, partition, changed)


def verdicts(*runs: PastRun, keep: int = 30, keep_changed: int = 365) -> list[str]:
    return [verdict for _, verdict in retention(runs, NOW, keep, keep_changed)]


@pytest.mark.parametrize(
    ("run", "verdict"),
    [
        (past(29.9), YOUNG),
        (past(30), GOES),
        (past(30, changed=True), CHANGED),
        (past(30, partition="10:00"), MARKS_ITS_PARTITION),
        (past(364.9, changed=True), CHANGED),
        (past(365, changed=True), GOES),
        (past(365, partition="10:00"), GOES),
    ],
)
def test_a_run_stays_longer_if_it_changed_something_or_marks_its_partition(run: PastRun, verdict: str) -> None:
    assert verdicts(run) == [verdict]


def test_of_the_runs_of_one_hour_the_last_stays_and_those_that_changed_something() -> None:
    tick = {"partition": "10:00"}
    found = verdicts(past(31.0, **tick), past(31.1, **tick), past(31.2, changed=True, **tick), past(31.3, **tick))
    assert found == [MARKS_ITS_PARTITION, GOES, CHANGED, GOES]


def test_a_younger_run_marks_the_partition_for_the_older_ones() -> None:
    assert verdicts(past(1, partition="10:00"), past(31, partition="10:00")) == [YOUNG, GOES]


def test_each_job_marks_its_own_partitions() -> None:
    found = verdicts(past(31, partition="10:00"), past(31, partition="10:00", job="other"))
    assert found == [MARKS_ITS_PARTITION] * 2


def test_what_changed_something_is_never_kept_shorter_than_the_rest() -> None:
    assert verdicts(past(29, changed=True), keep=30, keep_changed=7) == [YOUNG]
