"""Outages of the provider, of the service, and our own."""

from __future__ import annotations

from datetime import datetime, timedelta

from billing_orchestration_tests.torture.simulation.agenda import Agenda, Dice
from billing_orchestration_tests.torture.simulation.judge import DAY, UTC
from billing_orchestration_tests.torture.simulation.runs import DAILY, Runs
from billing_orchestration_tests.torture.simulation.successes import Successes
from billing_orchestration_tests.torture.simulation.ticks import Ticks
from billing_orchestration_tests.torture.simulation.traits import MINUTE
from billing_orchestration_tests.torture.simulation.world import World

OUTAGE_LENGTHS = (5 * MINUTE, timedelta(hours=26), 8 * DAY)


class Outages:
    """They begin by chance and end by themselves."""

    def __init__(
        self, world: World, dice: Dice, agenda: Agenda, runs: Runs, ticks: Ticks, successes: Successes
    ) -> None:
        self._world, self._dice, self._agenda, self._runs, self._ticks = world, dice, agenda, runs, ticks
        self._successes = successes

    def begin(self, whose: str) -> None:
        """Of the provider, of the service, or ours."""
        world = self._world
        if whose in world.out:
            return
        length = self._dice.choices(OUTAGE_LENGTHS, (6, 3, 1))[0]
        world.happened[f"outage of {whose}, {length}"] += 1
        until = world.now + length
        world.out[whose] = until
        world.tell(f"  outage: {whose} until {until}")
        if whose == "ours":
            # No tick in between: the next one has to catch up by itself.
            self._ticks.forget()
        if whose == "provider":
            world.outage = self._dice.choice(("not connected", "error before", "html before", "cut before"))
            if length < DAY:
                world.outage = self._dice.choice((world.outage, "silence before"))

        self._agenda.at(until, f"outage of {whose} over", lambda: self._end(whose, until - length))

    def _end(self, whose: str, began: datetime) -> None:
        world = self._world
        if world.out.pop(whose, None) is None:
            return
        if whose == "provider":
            world.outage = None
            self._ticks.again_from_now()
        world.tell(f"  outage over: {whose}")
        if "service" not in world.out:
            self._successes.die_half_way_before_a_run()
        self._agenda.tick_at(world.now)
        if whose == "ours":
            self._run_late(began)

    def _run_late(self, began: datetime) -> None:
        """Of all missed ticks of a schedule only the latest is run."""
        world, jobs = self._world, list(DAILY)
        self._dice.shuffle(jobs)
        for job, hour in jobs:
            day = world.day()
            tick = datetime(day.year, day.month, day.day, hour, tzinfo=world.zone).astimezone(UTC)
            tick = tick if tick <= world.now else tick - DAY
            if tick > began:
                self._runs.run_daily(job, tick)
