"""Shards: every subscription belongs to one, and all of a run agree on what the run is about."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest

from billing_orchestration.domain.shards import MOST_SHARDS, Division, Shard, divide, shard_of_key, share


@pytest.mark.parametrize("count", [1, 2, 3, MOST_SHARDS])
def test_every_remainder_belongs_to_one_shard(count: int) -> None:
    assert sorted(shard.number - 1 for shard in divide(count)) == list(range(count))


@pytest.mark.parametrize("shard", [Shard(1, 1), Shard(3, 4), Shard(256, 256)])
def test_a_shard_is_told_by_its_key(shard: Shard) -> None:
    assert shard_of_key(shard.key) == shard


@pytest.mark.parametrize(
    "key", [None, "", "shard_0_of_4", "shard_5_of_4", "shard_1_of_257", "shard_1_of_4 ", "shard_-1_of_4", "1_of_4"]
)
def test_a_key_that_names_no_shard_is_refused(key: str | None) -> None:
    with pytest.raises(ValueError, match="is no shard"):
        shard_of_key(key)


def test_a_division_is_told_through_text() -> None:
    division = Division(datetime(2026, 3, 12, 3, 0, 0, 123456, timezone.utc), "now", 2, 30)

    assert Division.from_text(division.to_text()) == division


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"as_of": 3}', '{"as_of": "2026-03-12T03:00:00+00:00"}'])
def test_a_text_that_is_no_division_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a division|Expecting value"):
        Division.from_text(text)


@pytest.mark.parametrize(("limit", "at_once", "expected"), [(16, 1, 16), (16, 2, 8), (17, 2, 8), (16, 3, 5), (1, 4, 1)])
def test_the_shards_that_run_at_a_time_share_the_runs_limit(limit: int, at_once: int, expected: int) -> None:
    assert share(limit, at_once) == expected
    assert share(limit, at_once) * at_once <= max(limit, at_once)


def test_a_shard_does_not_look_ahead_of_its_own_clock() -> None:
    noon, later = datetime(2026, 3, 12, 12, tzinfo=timezone.utc), datetime(2026, 3, 13, tzinfo=timezone.utc)
    assert Division(later, "now", 2, 30).as_of_at(noon) == noon
    assert Division(noon, "now", 2, 30).as_of_at(later) == noon
