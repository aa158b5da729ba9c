"""The service as it is before the first simulated day."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from typing import Any

from billing_orchestration.sandbox.provider.records import Outcome as Scripted
from billing_orchestration_tests.torture.simulation.agenda import Dice
from billing_orchestration_tests.torture.simulation.customers import Customers
from billing_orchestration_tests.torture.simulation.judge import DAY, UTC, end_of_next_period, naive
from billing_orchestration_tests.torture.simulation.world import World

DECLINES = (
    "insufficient_funds", "issuer_unavailable", "payment_method_limit_exceeded", "rejected_by_timeout",
    "internal_timeout", "general_decline", "call_issuer", "a_reason_of_tomorrow", "card_expired", "permission_revoked",
    "fraud_suspected", "3d_secure_failed", "loan_declined", "canceled_by_merchant", "deal_expired",
)  # fmt: skip


def found_the_service(world: World, dice: Dice, customers: Customers) -> None:
    """Plans and prices, and some customers who are there already."""
    service = world.service
    now = naive(world.now)

    def plan(duration: int, unit: str, price: str, *, recurring: bool = True, currency: str = "RUB") -> None:
        number = service.insert(
            "plans", name=f"plan {duration} {unit}", description="", is_active=True, is_recurring=recurring,
            duration=duration, duration_unit=unit, created_at=now, updated_at=now,
        )  # fmt: skip
        service.insert("prices", plan_id=number, amount=Decimal(price), currency=currency)
        customers.plans.append(number)

    plan(1, "month", "299.00")
    plan(7, "days", "99.90")
    plan(3, "days", "45.00", currency="USD")
    plan(1, "month", "19.99", currency="EUR")
    plan(1, "year", "2990.00")
    plan(10, "days", "10.00", recurring=False)
    for _ in range(dice.randint(6, 16)):
        _customer_of_old(world, dice, customers)


def _customer_of_old(world: World, dice: Dice, customers: Customers) -> None:
    """A subscription from before, its last payment in both books."""
    service = world.service
    plan_id = dice.choice(customers.plans[:5])
    plan = world.oracle.rows("SELECT * FROM plans WHERE id = %s", plan_id)[0]
    price = customers.price_of(plan_id)
    user = customers.new_user()
    started = naive(world.now) - timedelta(minutes=dice.randint(60, 40 * 1440))
    if dice.chance(0.4):
        # On the last days of a month, late in the evening: where anchors and days of other zones differ.
        started = started.replace(day=1) - timedelta(minutes=dice.randint(1, 4 * 1440))
    ended = started
    while ended < naive(world.now) - 2 * DAY:
        ended = end_of_next_period(world.zone, started, ended, plan.duration, plan.duration_unit)
    if dice.chance(0.1):
        ended += timedelta(days=dice.randint(0, 20))  # support was generous
    paid = world.provider.add_payment(
        amount=price.amount,
        currency=price.currency,
        created_at=(started + timedelta(seconds=5)).replace(tzinfo=UTC),
        metadata={"user_id": user, "plan_id": str(plan_id), "payment_provider_id": str(service.provider_row)},
        saved=True, script=customers.script(dice),
    )  # fmt: skip
    number = service.insert(
        "subscriptions", user_id=user, status="ACTIVE", started_at=started, ended_at=ended, plan_id=plan_id,
        created_at=started, updated_at=started,
    )  # fmt: skip
    service.payment(
        started.replace(tzinfo=UTC), price.amount, price.currency, external_id=paid.id, status="SUCCEEDED",
        subscription_id=number,
    )  # fmt: skip
    world.journal.history.add(paid.id)
    world.journal.before[number] = (started, ended)
    customers.methods.setdefault(user, []).append(paid.id)
    world.journal.methods[paid.id] = user


def draw_script(dice: Dice) -> list[Any]:
    """What a card will do, charge after charge: mostly it pays."""
    outcomes: list[Any] = []
    for _ in range(30):
        share = dice.random()
        if share < 0.68:
            outcomes.append("succeeded")
        elif share < 0.86:
            outcomes.append(f"canceled:{dice.choice(DECLINES)}")
        elif share < 0.96:
            seconds = dice.choice((60, 300, 3600, 86_400, 8 * 86_400, 23 * 3600 + 3500))
            then = dice.choice(("succeeded", "succeeded", "canceled"))
            outcomes.append(Scripted("pending", then=then, after_s=seconds, reason=dice.choice(DECLINES)))
        elif share < 0.98:
            outcomes.append("pending")
        else:
            outcomes.append(dice.choice(("forbidden", "bad_request")))
    return outcomes
