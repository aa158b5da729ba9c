"""Our host's clock goes wrong for some hours: ahead or behind, also while a run is under way."""

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
        """The host's clock jumps."""
        world = self._world
        if world.host_error or world.journal.calm:
            return
        hours = self._dice.choice((-30.0, -3.0, -1.5, 0.2, 1.5, 3.0, 6.0, 30.0))
        world.host_error = timedelta(hours=hours)
        world.tell(f"  our clock is {hours} hours {'ahead' if hours > 0 else 'behind'}")
        world.happened["wrong clock: ours, ahead" if hours > 0 else "wrong clock: ours, behind"] += 1
        self._agenda.after(self._dice.minutes(10, 9 * 60), "our clock is put right", self.end)

    def end(self) -> None:
        """It is right again."""
        if self._world.host_error:
            self._world.host_error = timedelta(0)
            self._world.tell("  our clock is right again")
            self._ticks.again_from_now()
            self._agenda.tick_at(self._world.now)
