"""Our own runs: what may befall each, and what must hold right after it."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from billing_orchestration_tests.torture.simulation.agenda import Agenda, Dice
from billing_orchestration_tests.torture.simulation.backups import Backups
from billing_orchestration_tests.torture.simulation.judge import UTC
from billing_orchestration_tests.torture.simulation.process import Accidents
from billing_orchestration_tests.torture.simulation.runner import RunEnd
from billing_orchestration_tests.torture.simulation.successes import Successes
from billing_orchestration_tests.torture.simulation.world import World

# From the first send: our own limit is 23 h, the provider forgets a key after 24 h.
AROUND_THE_END_OF_A_KEY = tuple(
    timedelta(hours=hours, seconds=seconds) for hours in (23, 24) for seconds in (-600, -60, -1, 0, 1, 60, 600)
)
MATCHING = ("matching_pending_payments_job", "matching_successful_payments_job")
DAILY = (("autopayment_job", 3), ("expire_payments_job", 4), ("expire_subscriptions_job", 5))
PARTITIONED_BY_DAY = tuple(job for job, _ in DAILY)


class Runs:
    """Scheduled runs, launches by hand, and their accidents."""

    def __init__(self, world: World, dice: Dice, agenda: Agenda, successes: Successes, backups: Backups) -> None:
        self._world, self._dice, self._agenda, self._successes, self._backups = world, dice, agenda, successes, backups
        self.accident_rate = world.traits.accidents
        self._last_points: dict[str, int] = {}
        self._keys_watched: set[Any] = set()

    def accidents(self, job: str) -> Accidents:
        """What will happen to the next run of a job."""
        rate = self.accident_rate
        accidents = Accidents(random.Random(self._dice.getrandbits(64)))
        if not rate:
            return accidents
        dice = self._dice.random()
        points = max(4, self._last_points.get(job, 20))
        if dice < 0.06 * rate:
            accidents.kill_at = self._dice.randint(1, points + 2)
        elif dice < 0.08 * rate:
            accidents.cut_at = self._dice.randint(1, points)
        elif dice < 0.10 * rate:
            accidents.lose_commit = self._dice.randint(1, 4)
        if self._dice.chance(0.25 * rate):
            accidents.charge_faults = self._dice.choice((0.1, 0.3, 1.0))
            accidents.read_faults = self._dice.choice((0.0, 0.05, 0.3, 1.0))
        if self._dice.chance(0.3 * rate):
            accidents.meanwhile = self._dice.choice((0.02, 0.1, 0.3))
        return accidents

    def calm(self) -> Accidents:
        """Nothing will happen to it."""
        return Accidents(random.Random(self._dice.getrandbits(64)))

    def run(self, job: str, accidents: Accidents, **how: Any) -> RunEnd:
        """A run, now and then through whole Dagster."""
        # Through Dagster there are no points at statements: what is killed at a request would still write.
        whole = how.get("partition") is None and self._dice.chance(0.004) and accidents.kill_at is None
        end = self.launch(job, accidents, whole=whole, **how)
        if not accidents.dead:
            self._last_points[job] = accidents.points
        if job == "autopayment_job":
            self._come_back_near_the_end_of_a_key()
        return end

    def launch(self, job: str, accidents: Accidents, **how: Any) -> RunEnd:
        """A run, after which the ticks come that see what it has charged: now, or when a pending charge succeeds."""
        if how.get("tick") is None:
            self._successes.end_handlers()
        end = self._world.run(job, accidents, **how)
        if job == "autopayment_job":
            self._successes.ticks()
            self._successes.watch_new_charges()
        return end

    def _come_back_near_the_end_of_a_key(self) -> None:
        """Now and then somebody launches the job just when an open attempt's key is about to be forgotten."""
        if self._world.journal.calm or not self._dice.chance(0.3):
            return
        rows = self._world.oracle.rows(
            "SELECT id, first_sent_at FROM billing_orchestration.renewal_attempts"
            " WHERE state IN ('PLANNED', 'UNKNOWN') AND first_sent_at IS NOT NULL ORDER BY first_sent_at, id"
        )
        for row in rows:
            if row.id in self._keys_watched:
                continue
            self._keys_watched.add(row.id)
            when = row.first_sent_at.astimezone(UTC) + self._dice.choice(AROUND_THE_END_OF_A_KEY)
            if when > self._world.now:
                self._agenda.at(when, f"launch near the end of {row.id}'s key", self._launch_near_the_end_of_a_key)

    def _launch_near_the_end_of_a_key(self) -> None:
        if "ours" not in self._world.out:
            self._world.happened["launch around a key's 23 or 24 h"] += 1
            self._run_and_look("autopayment_job", self.accidents("autopayment_job"))

    def daily(self, job: str, tick: datetime) -> Callable[[], None]:
        """What a schedule does at its tick."""

        def run() -> None:
            if "ours" not in self._world.out:
                self.run_daily(job, tick)

        return run

    def run_daily(self, job: str, tick: datetime) -> None:
        """One scheduled run; after a red one an operator may launch it again, or wait for tomorrow."""
        if job == "autopayment_job" and self._world.plays("restored backups") and self._dice.chance(0.06):
            self._backups.fail_over_after(lambda: self._run_and_look(job, self.accidents(job), tick=tick))
        self._try(job, 1, tick=tick)

    def _try(self, job: str, number: int, **how: Any) -> None:
        end = self._run_and_look(job, self.accidents(job), **how)
        if not end.ok and number <= 3 and self._dice.chance(0.5):
            delay = timedelta(seconds=self._dice.choice((30, 600, 4000)))
            self._agenda.after(delay, f"{job} again", lambda: self._try_again(job, number + 1))

    def _try_again(self, job: str, number: int) -> None:
        if "ours" not in self._world.out:
            self._try(job, number)

    def _run_and_look(self, job: str, accidents: Accidents, **how: Any) -> RunEnd:
        """A run, and what must hold right after it if nothing disturbed it."""
        world = self._world
        as_of = how.get("tick") or world.now
        charges = job == "autopayment_job"
        due = world.oracle.due(as_of, 30) if charges else []
        chargeable = world.oracle.chargeable(world.provider.payments(), as_of, world.now) if charges else {}
        began = world.now
        end = self.run(job, accidents, **how)
        disturbed = not accidents.undisturbed or accidents.meanwhile or world.outage or world.clocks_are_apart
        if charges and accidents.stuck and not disturbed and end.failure != "killed":
            # Nobody else's card is stuck, so nobody else waits.
            for words in world.oracle.not_charged(chargeable, world.provider.payments()):
                world.fault(words)
        if end.ok and not disturbed:
            world.journal.undisturbed[job].append(began)
            for words in world.oracle.not_charged(chargeable, world.provider.payments()):
                world.fault(words)
            if job == "expire_payments_job":
                for words in world.oracle.stale_payments(world.payments(), as_of):
                    world.fault(words)
            elif job == "expire_subscriptions_job":
                for words in world.oracle.stale_subscriptions(as_of):
                    world.fault(words)
        elif job == "autopayment_job" and not disturbed and end.failure != "killed":
            world.journal.undisturbed[job].append(began)
        if job == "autopayment_job" and not disturbed and end.decisions:
            for words in world.oracle.unexplained(due, end.decisions):
                world.fault(words)
        return end

    def another_run(self) -> None:
        """Another scheduler's, while a run is under way."""
        job = self._dice.choice((*PARTITIONED_BY_DAY, *MATCHING))
        self.launch(job, self.calm(), nested=True)
