"""Somebody at the launchpad."""

from __future__ import annotations

from datetime import date, datetime, timedelta
from typing import Any

import dagster as dg

from billing_orchestration_tests.torture.simulation.agenda import Agenda, Dice
from billing_orchestration_tests.torture.simulation.judge import DAY, UTC, naive
from billing_orchestration_tests.torture.simulation.runs import MATCHING, PARTITIONED_BY_DAY, Runs
from billing_orchestration_tests.torture.simulation.world import World


class Operator:
    """Dry runs, launches by hand, backfills, the same again."""

    def __init__(self, world: World, dice: Dice, agenda: Agenda, runs: Runs) -> None:
        self._world, self._dice, self._agenda, self._runs = world, dice, agenda, runs

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
                window = self._window(world.day() - back * DAY)
            else:
                start = world.now.replace(minute=0, second=0, microsecond=0) - timedelta(hours=back * 5)
                window = dg.TimeWindow(start, start + timedelta(hours=1))
            self.same_again(job, partition=window)
        else:
            self.same_again(job)

    def backfill_weeks(self) -> None:
        """Days of weeks ago, several in a row, and the same again on later days."""
        self._world.happened["operator: backfill of weeks"] += 1
        job = self._dice.choice(("autopayment_job", "autopayment_job", *PARTITIONED_BY_DAY))
        self._backfill_weeks(job, self._some_old_day(), self._dice.randint(2, 5), self._dice.randint(1, 3))

    def _some_old_day(self) -> date:
        """Weeks ago, or just before the end of a subscription that support has revived by hand."""
        world = self._world
        over = world.oracle.rows(
            "SELECT id, ended_at FROM subscriptions WHERE status IN ('EXPIRED', 'CANCELED', 'PAUSED') AND ended_at < %s"
            " ORDER BY id",
            naive(world.now - 4 * DAY),
        )
        if not over or self._dice.chance(0.3) or "service" in world.out:
            return world.day() - self._dice.randint(8, 67) * DAY
        row = self._dice.choice(over)
        world.service.execute("UPDATE subscriptions SET status = 'ACTIVE' WHERE id = %s RETURNING id", row.id)
        world.journal.touched[row.id] = world.latest_now()
        world.tell(f"  subscription {row.id} is ACTIVE again, and ended {row.ended_at}")
        ended_on: date = row.ended_at.replace(tzinfo=UTC).astimezone(world.zone).date()
        return ended_on - self._dice.randint(0, 2) * DAY

    def _window(self, day: date) -> dg.TimeWindow:
        start = datetime(day.year, day.month, day.day, tzinfo=self._world.zone)
        return dg.TimeWindow(start, start + DAY)

    def _backfill_weeks(self, job: str, first: date, count: int, days_left: int) -> None:
        """Several days in a row, and the same again tomorrow."""
        if "ours" in self._world.out or self._world.journal.calm:
            return
        for number in range(count):
            self._runs.launch(job, self._runs.calm(), partition=self._window(first + number * DAY))
        if days_left > 1:
            self._agenda.after(
                DAY, "the same backfill again", lambda: self._backfill_weeks(job, first, count, days_left - 1)
            )

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
