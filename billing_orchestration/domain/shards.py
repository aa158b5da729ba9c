"""Shards: the due subscriptions in independent parts, so that several processes can share a run.

A subscription belongs to one shard by its id alone, and so do its attempts. No two shards of a run ever look at the
same period. Runs with different numbers of shards may meet; the attempts' locks and the unique index keep them apart,
as they do any two runs.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import datetime, timezone

_KEY = re.compile(r"shard_([0-9]{1,4})_of_([0-9]{1,4})")
# Far more than a database has connections for; each shard costs the start of a process.
MOST_SHARDS = 256


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `number` (1 to `count`) of `count`: subscriptions whose id leaves the remainder `number` - 1."""

    number: int
    count: int

    @property
    def key(self) -> str:
        """Its name in the run, such as shard_1_of_4."""
        return f"shard_{self.number}_of_{self.count}"


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a deployment divides its renewal runs: into `shards` parts, of which at most `at_once` run side by side.

    Raises ValueError for numbers that make no sense.
    """

    shards: int
    at_once: int

    def __post_init__(self) -> None:
        if not 1 <= self.shards <= MOST_SHARDS:
            raise ValueError(f"a renewal run has 1 to {MOST_SHARDS} shards, not {self.shards}")
        if not 1 <= self.at_once <= self.shards:
            raise ValueError(f"of {self.shards} shards 1 to {self.shards} run at once, not {self.at_once}")


def divide(count: int) -> list[Shard]:
    """All shards of a run."""
    return [Shard(number, count) for number in range(1, count + 1)]


def shard_of_key(key: str | None) -> Shard:
    """The shard that `Shard.key` names. Raises ValueError for anything else."""
    match = _KEY.fullmatch(key or "")
    if match is None or not 1 <= int(match[1]) <= int(match[2]) <= MOST_SHARDS:
        raise ValueError(f"{key!r} is no shard; they are named as in {Shard(1, 4).key}")
    return Shard(int(match[1]), int(match[2]))


@dataclass(frozen=True, slots=True)
class Division:
    """What all shards of a run must agree on, whenever and in whatever process each of them starts.

    `at_once`: how many may run side by side and so share the provider's limits. `max_overdue_days`: as the run was
    configured.
    """

    as_of: datetime
    source: str
    at_once: int
    max_overdue_days: int

    def as_of_at(self, now: datetime) -> datetime:
        """What a shard stands for: never later than its own clock, whatever the process that divided has read."""
        return min(self.as_of, now)

    def to_text(self) -> str:
        """As text, for the run's record."""
        return json.dumps(
            {
                "as_of": self.as_of.isoformat(),
                "source": self.source,
                "at_once": self.at_once,
                "max_overdue_days": self.max_overdue_days,
            }
        )

    @staticmethod
    def from_text(text: str) -> Division:
        """What `to_text` has written. Raises ValueError for anything else."""
        told = json.loads(text)
        try:
            as_of = datetime.fromisoformat(told["as_of"]).astimezone(timezone.utc)
            return Division(as_of, str(told["source"]), int(told["at_once"]), int(told["max_overdue_days"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a division into shards: {text!r}") from error


def share(limit: int, at_once: int) -> int:
    """A shard's share of a limit on the whole run; at least one, since a shard with none could do nothing."""
    return max(1, limit // at_once)
