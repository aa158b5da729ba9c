"""One seed's story, day after day."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import date, datetime, timedelta

from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration_tests.torture.simulation.agenda import Agenda, Dice
from billing_orchestration_tests.torture.simulation.backups import Backups
from billing_orchestration_tests.torture.simulation.clocks import WrongClocks
from billing_orchestration_tests.torture.simulation.customers import Customers, Script
from billing_orchestration_tests.torture.simulation.founding import draw_script, found_the_service
from billing_orchestration_tests.torture.simulation.judge import DAY, UTC
from billing_orchestration_tests.torture.simulation.operators import Operator
from billing_orchestration_tests.torture.simulation.outages import Outages
from billing_orchestration_tests.torture.simulation.runs import DAILY, MATCHING, Runs
from billing_orchestration_tests.torture.simulation.successes import Successes
from billing_orchestration_tests.torture.simulation.support import Support
from billing_orchestration_tests.torture.simulation.ticks import Ticks
from billing_orchestration_tests.torture.simulation.traits import MINUTE, Traits, draw_traits
from billing_orchestration_tests.torture.simulation.world import World

DAYS = 60
# After them: what was left open closes by its rule, which takes an unknown attempt three days.
CALM_DAYS = 5


class Simulation:
    """`play` is the whole of it."""

    def __init__(
        self,
        url: str,
        seed: int,
        *,
        served: Sandbox | None = None,
        traits: Traits | None = None,
        script: Script = draw_script,
    ) -> None:
        self.dice = dice = Dice(f"story {seed}")
        traits = traits or draw_traits(seed)
        traits = replace(traits, switches=replace(traits.switches, list_lag_s=traits.list_lag.total_seconds()))
        # Many starts near a month's end, some near a change of clocks; 60 days see two ends of months at least.
        first = date(2026, 1, 1) + dice.choice((20, 29, 30, 31, 45, 57, 80, 150, 240, 290)) * DAY
        start = datetime(first.year, first.month, first.day, 1, tzinfo=UTC) + dice.randint(0, 1380) * MINUTE
        self.world = world = World(url, seed, start, traits, served=served)
        self.agenda = agenda = Agenda(world)
        self.successes = Successes(world, dice, agenda)
        self.customers = Customers(world, dice, agenda, self.successes, script)
        self.support = Support(world, dice, agenda, self.customers)
        self.backups = Backups(world, dice, agenda)
        self.runs = Runs(world, dice, agenda, self.successes, self.backups)
        self.ticks = Ticks(world, dice, agenda, self.runs)
        self.operator = Operator(world, dice, agenda, self.runs)
        self.outages = Outages(world, dice, agenda, self.runs, self.ticks, self.successes)
        self.clocks = WrongClocks(world, dice, agenda, self.ticks)
        self.backups.on_restore = self._set_back
        world.on_charge_under_way = self._ends_later
        world.on_time_passed = self.successes.end_overdue_handlers

    def _set_back(self) -> None:
        """No tick has come since; now and then charging is the first to see the database as it was."""
        self.ticks.forget()
        if "ours" not in self.world.out and self.dice.chance(0.5):
            self.world.happened["autopayment_job first after a restore"] += 1
            self.runs.run("autopayment_job", self.runs.calm())

    def _ends_later(self, delay: timedelta) -> None:
        """A charge that nobody waits for is executed, and may succeed."""

        def executed() -> None:
            self.world.in_flight.finish()
            self.successes.ticks()
            self.successes.watch_new_charges()

        self.agenda.after(delay, "a charge under way is executed", executed)

    def found_the_service(self) -> None:
        """Before the first day."""
        found_the_service(self.world, self.dice, self.customers)

    def play(self, days: int = DAYS) -> None:
        """Everything, day after day; the judge looks after every day and at the end."""
        world = self.world
        self.found_the_service()
        # Whoever installs the jobs sees them green once: from here on they know what they have covered.
        for job in MATCHING:
            self.runs.launch(job, self.runs.calm(), tick=world.now)
        end = world.now + days * DAY
        self.agenda.tick_at(world.now)
        today = world.day()
        for number in range(days + CALM_DAYS + 1):
            day = today + number * DAY
            for job, hour in DAILY:
                # Through UTC: an hour that a change of clocks skips lands on a real instant.
                when = datetime(day.year, day.month, day.day, hour, tzinfo=world.zone).astimezone(UTC)
                if when > world.now:
                    self.agenda.at(when, job, self.runs.daily(job, when))
            if number < days:
                self._plan_day(datetime(day.year, day.month, day.day, tzinfo=world.zone).astimezone(UTC))
        world.meanwhile = self._meanwhile
        self.go_until(end)
        self._calm_down()
        self.go_until(end + CALM_DAYS * DAY)
        if not world.faults:
            # One last tick, late enough for everything that was paid: after it nothing may be missing.
            world.now += 30 * MINUTE
            for job in MATCHING:
                ended = self.runs.run(job, self.runs.calm())
                if not ended.ok:
                    world.fault(f"{job} is red at the end of the calm days: {ended.failure}")
            ledger, payments = world.provider.ledger(), world.payments()
            for words in world.oracle.unsettled(ledger, payments, world.now, world.now):
                world.fault(words)
            world.judge()
            self.nothing_is_left_open()

    def go_until(self, end: datetime) -> None:
        """Everything that the agenda holds until then, as long as the promise holds."""
        world, before = self.world, self.world.day()
        while not world.faults and (event := self.agenda.due(end)):
            what, do = event
            if world.day() != before:
                world.judge()
            if what != "tick":
                world.tell(what)
            do()
            before = world.day()

    def _plan_day(self, midnight: datetime) -> None:
        """What else will happen on a billing day."""
        world = self.world

        def some(what: str, expected: float, do: Callable[[], None]) -> None:
            count = int(expected) + self.dice.chance(expected % 1)
            for _ in range(count):
                when = midnight + timedelta(seconds=self.dice.randint(0, 86_399))
                if when > world.now:
                    self.agenda.at(when, what, do)

        some("purchase", 1.6, self.customers.purchase)
        some("refund", 0.12, self.customers.refund)
        some("pause or cancel", 0.25, self.customers.pause_or_cancel)
        some("resume", 0.2, self.customers.resume)
        some("price", 0.05, self.customers.change_price)
        some("operator", 0.35, self.operator.act)
        some("idle tick", 2, lambda: self.agenda.tick_at(world.now))
        for mishap, what, expected, do in (
            ("old backfills", "backfill of weeks", 0.25, self.operator.backfill_weeks),
            ("helping hands", "an end is moved", 0.5, self.support.move_an_end),
            ("changes in mid-run", "plan switched", 0.2, self.support.switch_plan),
            ("changes in mid-run", "renewals stop", 0.04, self.support.stop_renewals),
            ("changes in mid-run", "another period", 0.04, self.support.change_period),
            ("stuck cards", "cards are stuck", 0.15, self.customers.stick_cards),
            ("wrong clocks", "our clock goes wrong", 0.08, self.clocks.begin),
            ("restored backups", "backup", 0.05, self.backups.backup),
            ("newer cards", "a card is replaced", 0.3, self.customers.replace_card),
            ("newer cards", "a card's purchase is refunded", 0.1, self.customers.refund_card),
            ("two shops", "another shop sells", 0.3, self.customers.sell_elsewhere),
        ):
            if world.plays(mishap):
                some(what, expected, do)
        if world.traits.accidents:
            some("provider outage", 0.06 * world.traits.accidents, lambda: self.outages.begin("provider"))
            some("our outage", 0.05 * world.traits.accidents, lambda: self.outages.begin("ours"))
            some("service outage", 0.04 * world.traits.accidents, lambda: self.outages.begin("service"))

    def _meanwhile(self, place: str) -> None:
        """While a run is at some point: the world goes on."""
        world = self.world
        choices: list[Callable[[], None]] = [
            self.customers.pause_or_cancel,
            self.customers.resume,
            self.successes.webhook_now,
            self.customers.pay_now,
        ]
        if world.plays("changes in mid-run"):
            choices += [
                self.support.change_price, self.support.switch_plan, self.support.stop_renewals,
                self.support.change_period,
            ]  # fmt: skip
        if world.plays("helping hands"):
            choices.append(self.support.move_an_end)
        if world.plays("wrong clocks") and self.dice.chance(0.1):
            choices = [self.clocks.begin]
        if ("POST" in place or "GET" in place) and world.traits.max_concurrency == 1 and world.served_url is None:
            # No transaction is open here, so another scheduler's run can do all of its work.
            choices.append(self.runs.another_run)
        world.tell(f"  meanwhile, at {place}:")
        world.happened[f"meanwhile, at: {place.split(maxsplit=1)[0]}"] += 1
        self.dice.choice(choices)()

    def _calm_down(self) -> None:
        """From here on no accidents: what is open must close by its rule."""
        world = self.world
        world.tell("calm days")
        world.meanwhile = world.outage = None
        world.journal.calm = True
        world.out.clear()
        world.stuck_cards.clear()
        self.clocks.end()
        self.runs.accident_rate = 0.0
        self.agenda.tick_at(world.now)

    def nothing_is_left_open(self) -> None:
        """An attempt whose outcome is unknown is closed within three days."""
        world = self.world
        left = world.oracle.rows(
            "SELECT id, state FROM billing_orchestration.renewal_attempts"
            " WHERE state IN ('PLANNED', 'UNKNOWN') AND planned_at < %s",
            world.now - 4 * DAY,
        )
        for row in left:
            world.fault(f"OPEN TOO LONG: attempt {row.id} is {row.state} after the calm days")

    def numbers(self) -> dict[str, int]:
        """What the story was made of, for the summary."""
        world = self.world
        states = {
            row.state: row.count
            for row in world.oracle.rows(
                "SELECT state, count(*) AS count FROM billing_orchestration.renewal_attempts GROUP BY state"
            )
        }
        kinds = {
            row.kind: row.count
            for row in world.oracle.rows(
                "SELECT kind, count(*) AS count FROM billing_orchestration.settlements GROUP BY kind"
            )
        }
        return {
            **{f"attempts {state}": count for state, count in sorted(states.items())},
            **{f"settled {kind}": count for kind, count in sorted(kinds.items())},
            **{f"played: {name}": count for name, count in sorted(world.happened.items())},
            "granted by webhook": len(world.journal.service_grants),
            "in quarantine": world.oracle.rows("SELECT count(*) AS n FROM billing_orchestration.quarantine")[0].n,
        }
