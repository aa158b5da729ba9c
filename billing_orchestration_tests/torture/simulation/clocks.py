"""Our host's clock or PostgreSQL's goes wrong for some hours: ahead or behind, also while a run is under way."""

from __future__ import annotations

from datetime import timedelta

from billing_orchestration_tests.torture.simulation.agenda import Agenda, Dice
from billing_orchestration_tests.torture.simulation.ticks import Ticks
from billing_orchestration_tests.torture.simulation.world import World


class WrongClocks:
    """They begin by chance and are put right by themselves."""

    def __init__(self, world: World, dice: Dice, agenda: Agenda, ticks: Ticks) -> None:
        self._world, self._dice, self._agenda, self._ticks = world, dice, agenda, ticks

    def begin(self) -> None:
        """One of them jumps."""
        world = self._world
        if world.clocks_are_apart or world.journal.calm:
            return
        error = timedelta(hours=self._dice.choice((-30.0, -3.0, -1.5, 0.2, 1.5, 3.0, 6.0, 30.0)))
        whose = self._dice.choice(("ours", "ours", "PostgreSQL's"))
        if whose == "ours":
            world.set_clocks(error, timedelta(0))
        else:
            world.set_clocks(timedelta(0), error)
        where = "ahead" if error > timedelta(0) else "behind"
        world.tell(f"  wrong clock: {whose}, {where} by {abs(error)}")
        world.happened[f"wrong clock: {whose}, {where}"] += 1
        self._agenda.after(self._dice.minutes(10, 9 * 60), "the clock is put right", self.end)

    def end(self) -> None:
        """It is right again."""
        if self._world.clocks_are_apart:
            self._world.set_clocks(timedelta(0), timedelta(0))
            self._world.tell("  the clocks are right again")
            self._ticks.again_from_now()
            self._agenda.tick_at(self._world.now)
