"""The matching jobs' ticks. They come when they could see something; what is in between leaves a watermark only.

Each looks first, and starts a run only where the look says so.
"""

from __future__ import annotations

import random
from datetime import datetime, timedelta

import dagster as dg

from billing_orchestration.jobs.matching_look import Nothing
from billing_orchestration_tests.torture.simulation.agenda import TICK, Agenda, Dice
from billing_orchestration_tests.torture.simulation.process import Accidents
from billing_orchestration_tests.torture.simulation.runs import MATCHING, Runs
from billing_orchestration_tests.torture.simulation.world import World


class Ticks:
    """Both matching jobs, every two minutes."""

    def __init__(self, world: World, dice: Dice, agenda: Agenda, runs: Runs) -> None:
        self._world, self._dice, self._agenda, self._runs = world, dice, agenda, runs
        agenda.on_tick = self.tick
        # Of its own: what a look meets changes no other part of the story.
        self._looks = Dice(f"looks of {world.seed}")
        # Whether the last tick of a job was green and has left nothing.
        self._green: dict[str, bool] = {}
        self._again_at = world.now

    def forget(self) -> None:
        """No tick came for a while: the next one has to catch up by itself."""
        self._green.clear()

    def again_from_now(self) -> None:
        """What made ticks red is over."""
        self._again_at = self._world.now

    def tick(self, mark: datetime) -> None:
        """A tick of both matching jobs, and what must hold after a green one."""
        world = self._world
        if "ours" in world.out:
            return
        greens = []
        clocks_set = world.clocks_set
        # The ticks in between found nothing, and the last run that covered its hour was one of them.
        covered_ago = self._looks.choice((1, 5, 15, 24)) * TICK
        found_nothing_until = min(mark - covered_ago, self._agenda.behind_since or mark)
        self._agenda.behind_since = None
        for job in MATCHING:
            if self._green.get(job):
                # This is all that they left behind.
                world.service.execute(
                    "UPDATE billing_orchestration.watermarks SET covered_until = %s WHERE job = %s"
                    " AND covered_until < %s",
                    found_nothing_until, job, found_nothing_until,
                )  # fmt: skip
            before = world.now
            if isinstance(world.look(job, self._bad_reads(), mark), Nothing):
                greens.append((before, True))
                continue
            accidents = self._runs.accidents(job)
            end = self._runs.run(job, accidents, tick=mark)
            self._green[job] = end.ok and self._has_covered(job, mark)
            greens.append(end.ok and (before, accidents.undisturbed and not accidents.meanwhile))
        if not all(greens) and self._again_at <= world.now:
            # One more at a time: each red tick asking for two would fill an outage of eight days with nothing else.
            self._again_at = world.now + (
                TICK if world.outage is None and not world.clocks_are_apart else self._dice.minutes(30, 400)
            )
            self._agenda.tick_at(self._again_at)
        self._backfill_gaps()
        # By a clock that was set back under way a payment looks younger than the webhook's minute: the next tick has it
        if greens[1] and world.clocks_set == clocks_set:
            before, _ = greens[1]
            for words in world.oracle.unsettled(world.provider.ledger(), world.payments(), mark, before):
                world.fault(words)

    def _bad_reads(self) -> Accidents:
        """What may happen to a look: it does nothing but read."""
        accidents = Accidents(random.Random(self._looks.getrandbits(64)))
        if self._looks.chance(0.2 * self._runs.accident_rate):
            accidents.read_faults = self._looks.choice((0.05, 0.3, 1.0))
        return accidents

    def _has_covered(self, job: str, mark: datetime) -> bool:
        """Whether the watermark stands at a tick's end: what a tick leaves to the webhook keeps it behind."""
        rows = self._world.oracle.rows("SELECT covered_until FROM billing_orchestration.watermarks WHERE job = %s", job)
        return bool(rows) and rows[0].covered_until >= mark

    def _backfill_gaps(self) -> None:
        """What an operator does about a gap that the quarantine names: backfill its hours."""
        world = self._world
        rows = world.oracle.rows(
            "SELECT q.id, q.job, q.evidence, q.opened_at FROM billing_orchestration.quarantine q"
            " WHERE q.kind = 'gap' AND q.resolved_at IS NULL"
        )
        for row in rows:
            first, last = (datetime.fromisoformat(row.evidence[name]) for name in ("from", "until"))
            hour = first.replace(minute=0, second=0, microsecond=0) - timedelta(hours=1)
            while hour <= last:
                window = dg.TimeWindow(hour, hour + timedelta(hours=1))
                run = self._runs.launch(row.job, self._runs.calm(), partition=window)
                if not run.ok and world.outage is None and not world.clocks_are_apart:
                    world.fault(f"a backfill of {hour} is red: {run.failure}")
                hour += timedelta(hours=1)
            world.service.execute(
                "UPDATE billing_orchestration.quarantine SET resolved_at = %s, resolution = 'accepted',"
                " resolution_reason = 'backfilled', resolved_by = 'operator' WHERE id = %s",
                world.now, row.id,
            )  # fmt: skip
