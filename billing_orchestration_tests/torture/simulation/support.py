"""People who help: support moves ends, the shop's owners change prices and plans, also while a run is under way."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from billing_orchestration_tests.torture.simulation.agenda import Agenda, Dice
from billing_orchestration_tests.torture.simulation.customers import Customers
from billing_orchestration_tests.torture.simulation.judge import DAY
from billing_orchestration_tests.torture.simulation.service import Busy
from billing_orchestration_tests.torture.simulation.world import World

# Where a moved end hurts most: the subscription has a charge whose outcome nobody knows yet, or nobody has settled.
_OPEN_CHARGES = (
    "SELECT s.id FROM subscriptions s JOIN billing_orchestration.renewal_attempts a ON a.subscription_id = s.id"
    " WHERE s.status = 'ACTIVE' AND a.state IN ('PLANNED', 'UNKNOWN', 'PENDING', 'REVIEW') ORDER BY s.id"
)


class Support:
    """Helping hands."""

    def __init__(self, world: World, dice: Dice, agenda: Agenda, customers: Customers) -> None:
        self._world, self._dice, self._agenda, self._customers = world, dice, agenda, customers

    def move_an_end(self) -> None:
        """A bonus of some days, or an end moved back, now and then into what was paid for."""
        world = self._world
        if "service" in world.out:
            return
        rows = world.oracle.rows(_OPEN_CHARGES) if self._dice.chance(0.5) else []
        rows = rows or world.oracle.rows("SELECT id FROM subscriptions WHERE status = 'ACTIVE' ORDER BY id")
        if rows:
            # None is as long as a plan's period: on top of an unsettled charge nobody could tell it from that charge's
            # grant.
            days = self._dice.choice((1, 1, 5, 20, -1, -3, -8, -31))
            self._change_subscription(
                self._dice.choice(rows).id, "ended_at = ended_at + %s", days * DAY, f"end moved by {days} days"
            )

    def switch_plan(self) -> None:
        """A customer goes over to another plan."""
        plan_id = self._dice.choice(self._customers.plans)
        rows = self._world.oracle.rows("SELECT id FROM subscriptions WHERE status = 'ACTIVE' ORDER BY id")
        if rows and "service" not in self._world.out:
            self._change_subscription(self._dice.choice(rows).id, "plan_id = %s", plan_id, f"goes over to {plan_id}")

    def _change_subscription(self, number: int, change: str, value: Any, words: str) -> None:
        world = self._world
        self._close_chapter(number)
        try:
            rows = world.service.execute(
                f"UPDATE subscriptions SET {change} WHERE id = %s RETURNING started_at, ended_at", value, number
            )
        except Busy:
            return
        world.journal.before[number] = (rows[0].started_at, rows[0].ended_at)
        world.journal.touched[number] = world.journal.moved[number] = world.latest_now()
        world.tell(f"  subscription {number}: {words}")
        world.happened[f"subscription: {words.rpartition(' by ')[0] or 'plan switched'}"] += 1

    def _close_chapter(self, number: int) -> None:
        for words in self._world.oracle.close_chapter(number, self._world.provider.ledger()):
            self._world.fault(words)

    def change_price(self) -> None:
        """For good."""
        self._change_plan("a price", lambda plan_id: self._world.service.execute(
            "UPDATE prices SET amount = amount + 7 WHERE plan_id = %s RETURNING id", plan_id
        ))  # fmt: skip

    def stop_renewals(self) -> None:
        """A plan is not renewed for a while."""

        def stop(plan_id: int) -> None:
            self._world.service.execute("UPDATE plans SET is_recurring = false WHERE id = %s RETURNING id", plan_id)
            self._agenda.after(self._dice.minutes(60, 2 * 1440), "renewals go on", lambda: go_on(plan_id))

        def go_on(plan_id: int) -> None:
            self._world.service.execute("UPDATE plans SET is_recurring = true WHERE id = %s RETURNING id", plan_id)

        if not self._world.journal.calm:
            self._change_plan("is not renewed", stop)

    def change_period(self) -> None:
        """A plan has another duration from now on, also for those who have it."""

        def change(plan_id: int) -> None:
            world = self._world
            for row in world.oracle.rows("SELECT id FROM subscriptions WHERE plan_id = %s", plan_id):
                self._close_chapter(row.id)
            [plan] = world.oracle.rows("SELECT duration, duration_unit FROM plans WHERE id = %s", plan_id)
            world.journal.period_before[plan_id] = (plan.duration, plan.duration_unit)
            # A run that began before our clock was set has its moment from the clock as it was.
            world.journal.period_changed[plan_id] = (world.now, world.host_now())
            world.service.execute(
                "UPDATE plans SET duration = CASE duration WHEN 1 THEN 2 ELSE duration + 1 END WHERE id = %s"
                " RETURNING id",
                plan_id,
            )

        self._change_plan("another period", change)

    def _change_plan(self, what: str, change: Callable[[int], Any]) -> None:
        world = self._world
        if "service" in world.out:
            return
        plan_id = self._dice.choice(self._customers.plans[:5])
        try:
            change(plan_id)
        except Busy:
            return
        world.journal.plan_changed[plan_id] = world.latest_now() + timedelta(microseconds=1)
        world.tell(f"  plan {plan_id}: {what}")
        world.happened[f"plan: {what}"] += 1
