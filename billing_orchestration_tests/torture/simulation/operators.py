"""Somebody at the launchpad."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import dagster as dg

from billing_orchestration_tests.torture.simulation.agenda import Dice
from billing_orchestration_tests.torture.simulation.judge import DAY
from billing_orchestration_tests.torture.simulation.runs import MATCHING, PARTITIONED_BY_DAY, Runs
from billing_orchestration_tests.torture.simulation.world import World


class Operator:
    """Dry runs, launches by hand, backfills, the same again."""

    def __init__(self, world: World, dice: Dice, runs: Runs) -> None:
        self._world, self._dice, self._runs = world, dice, runs

    def act(self) -> None:
        """Somebody at the launchpad: a dry run, a launch by hand, a backfill, the same again."""
        world = self._world
        if "ours" in world.out:
            return
        job = self._dice.choice((*PARTITIONED_BY_DAY, *MATCHING))
        what = self._dice.choice(("dry run", "launch", "backfill", "twice"))
        world.tell(f"  operator: {what} of {job}")
        world.happened[f"operator: {what}"] += 1
        if what == "dry run":
            self.dry_run(job)
        elif what == "launch":
            self._runs.run(job, self._runs.accidents(job))
        elif what == "backfill":
            back = self._dice.randint(0, 9)
            if job in PARTITIONED_BY_DAY:
                day = world.day() - back * DAY
                start = datetime(day.year, day.month, day.day, tzinfo=world.zone)
                window = dg.TimeWindow(start, start + DAY)
            else:
                start = world.now.replace(minute=0, second=0, microsecond=0) - timedelta(hours=back * 5)
                window = dg.TimeWindow(start, start + timedelta(hours=1))
            self.same_again(job, partition=window)
        else:
            self.same_again(job)

    def dry_run(self, job: str) -> None:
        """It changes nothing on either side."""
        world = self._world
        before, money = world.snapshot(), len(world.provider.ledger())
        world.run(job, self._runs.calm(), dry_run=True)
        if world.snapshot() != before or len(world.provider.ledger()) != money:
            world.fault(f"a dry run of {job} has changed something")

    def same_again(self, job: str, **how: Any) -> None:
        """A second run right after an undisturbed green one changes nothing."""
        world = self._world
        first = self._runs.run(job, self._runs.calm(), **how)
        if not first.ok:
            return
        open_before = world.oracle.rows(
            "SELECT id FROM billing_orchestration.renewal_attempts WHERE state IN ('PLANNED', 'UNKNOWN', 'PENDING')"
        )
        before = world.snapshot()
        second = self._runs.launch(job, self._runs.calm(), **how)
        if second.ok and not open_before and world.snapshot() != before:
            world.fault(f"a second run of {job} ({how or 'by hand'}) has changed something")
