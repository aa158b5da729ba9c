"""Charges that the provider still works on although nobody waits for them: its client was cut off, or is dead."""

from __future__ import annotations

import random
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from billing_orchestration_tests.torture.simulation.world import World

# The provider has finished a charge by then, says its documentation.
LONGEST_S = 44.0


class InFlight:
    """`finish` executes what is due: before anything else happens at the provider, and by the agenda."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._at_work: list[tuple[datetime, bytes, str | None, bool]] = []

    def begin(self, body: bytes, key: str | None) -> None:
        """A request that has arrived. Whether its key was known is looked at now, unless keys are serialised."""
        world = self._world
        drawn_s = random.Random(f"{key} {world.now}").uniform(1.0, LONGEST_S)
        seconds = max(0.0, min(drawn_s, LONGEST_S - world.charges.seconds_since_claim(key or "")))
        looked_up = not world.traits.switches.serialise_keys and key is not None and not world.provider.holds_key(key)
        self._at_work.append((world.now + timedelta(seconds=seconds), body, key, looked_up))
        world.happened["a charge under way"] += 1
        world.on_charge_under_way(timedelta(seconds=seconds))

    def seconds_until_free(self, key: str | None) -> float:
        """How long a second request with a key waits, where keys are serialised."""
        if not self._world.traits.switches.serialise_keys or key is None:
            return 0.0
        dues = [due for due, _, of, _ in self._at_work if of == key]
        return max(((due - self._world.now).total_seconds() for due in dues), default=0.0)

    def finish(self) -> None:
        """Execute what is due by now."""
        due = sorted((one for one in self._at_work if one[0] <= self._world.now), key=lambda one: one[0])
        self._at_work = [one for one in self._at_work if one not in due]
        for _, body, key, looked_up in due:
            self._world.provider.create_payment(body, key, looked_up=looked_up)
