"""What customers and the service's support do: they buy, pay, are refunded, pause, cancel, and change prices."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from decimal import Decimal
from functools import partial
from typing import Any
from uuid import UUID

from billing_orchestration_tests.torture.simulation.agenda import Agenda, Dice
from billing_orchestration_tests.torture.simulation.judge import DAY, naive
from billing_orchestration_tests.torture.simulation.service import Busy
from billing_orchestration_tests.torture.simulation.successes import Successes
from billing_orchestration_tests.torture.simulation.traits import MINUTE
from billing_orchestration_tests.torture.simulation.world import World

# What a card will do, charge after charge.
Script = Callable[[Dice], list[Any]]


class Customers:
    """`plans` are the service's, `methods` the saved cards by user."""

    def __init__(self, world: World, dice: Dice, agenda: Agenda, successes: Successes, script: Script) -> None:
        self._world, self._dice, self._agenda, self._successes = world, dice, agenda, successes
        self.script = script
        self.plans: list[int] = []
        self.methods: dict[str, list[str]] = {}
        self._numbers = itertools.count(1)

    def new_user(self) -> str:
        """A name that nobody has yet."""
        return f"user-{next(self._numbers)}"

    def price_of(self, plan_id: int) -> Any:
        """The first of the plan's prices."""
        return self._world.oracle.rows(
            "SELECT amount, currency::text AS currency FROM prices WHERE plan_id = %s", plan_id
        )[0]

    def purchase(self) -> None:
        """A customer begins to pay; the service writes a row; much may go wrong between the two."""
        world = self._world
        if "service" in world.out or "provider" in world.out:
            return
        plan_id = self._dice.choice(self.plans)
        known = world.oracle.rows("SELECT user_id, plan_id FROM subscriptions ORDER BY id")
        if known and self._dice.chance(0.5):
            again = self._dice.choice(known)
            user = again.user_id
            if self._dice.chance(0.6):
                plan_id = again.plan_id
        else:
            user = self.new_user()
        poison = self._dice.choices(
            (None, "metadata", "amount_differs", "canceled_here"), (0.955, 0.015, 0.015, 0.015)
        )[0]
        kind = self._dice.choices(("card", "cash", "hold", "saved card"), (0.75, 0.1, 0.05, 0.1))[0]
        self._sell(user, plan_id, kind, poison, save=kind == "card" and self._dice.chance(0.85))

    def replace_card(self) -> None:
        """A customer pays for another period with a new card, which is saved."""
        world = self._world
        rows = world.oracle.rows("SELECT user_id, plan_id FROM subscriptions WHERE status = 'ACTIVE' ORDER BY id")
        if rows and not {"service", "provider"} & set(world.out):
            row = self._dice.choice(rows)
            world.happened["a card is replaced"] += 1
            self._sell(row.user_id, row.plan_id, "card", None, save=True)

    def _sell(self, user: str, plan_id: int, kind: str, poison: str | None, *, save: bool) -> None:
        world = self._world
        price = self.price_of(plan_id)
        metadata: dict[str, Any] = {
            "user_id": user, "plan_id": str(plan_id), "payment_provider_id": str(world.service.provider_row),
        }  # fmt: skip
        if poison == "metadata":
            metadata = self._dice.choice(
                ({"user_id": user}, {**metadata, "plan_id": "99999"}, {**metadata, "plan_id": "x"})
            )
        amount = price.amount
        is_odd = poison is None and world.plays("odd amounts") and self._dice.chance(0.08)
        if is_odd:
            poison, amount = "amount_differs", self._dice.choice((Decimal("1.50"), price.amount - 1, price.amount * 2))
        payment = world.provider.purchase(
            amount,
            currency=price.currency,
            metadata=metadata,
            method_type="cash" if kind == "cash" else "bank_card",
            save_method=save,
            capture=kind != "hold",
        )
        saved = self.methods.get(user)
        if kind == "saved card" and saved:
            # A second subscription on the card that pays for the first.
            payment.method_id, payment.method_saved = self._dice.choice(saved), True
            payment.touch(payment.changed_at)
        if save:
            world.provider.add_method(payment.id, self.script(self._dice))
            self.methods.setdefault(user, []).append(payment.id)
            world.journal.methods[payment.id] = user
        row = None if is_odd else self._row_of(payment, price, poison)
        if poison == "canceled_here" and row is None:
            poison = None
        without_row = " without a row" if is_odd else ""
        world.happened[f"purchase by {kind}{f', {poison}{without_row}' if poison else ''}"] += 1
        self._payment_comes(payment.id, kind, poison)

    def _row_of(self, payment: Any, price: Any, poison: str | None) -> int | None:
        """The service's row; now and then it crashes between the provider's answer and its own write."""
        world = self._world
        amount = price.amount + (Decimal("1.00") if poison == "amount_differs" else 0)
        dice = self._dice.random()
        if poison is None and dice < 0.06:
            return None
        external_id = payment.id if poison is not None or dice < 0.95 else None
        subscription_id = None
        if self._dice.chance(0.3):
            found = world.oracle.rows(
                "SELECT id FROM subscriptions WHERE user_id = %s AND plan_id::text = %s AND status = 'ACTIVE'",
                payment.metadata.get("user_id"),
                payment.metadata.get("plan_id"),
            )
            subscription_id = found[0].id if found else None
        return world.service.payment(
            world.service_now(), amount, price.currency, external_id=external_id,
            status="CREATED" if self._dice.chance(0.05) else "PENDING", subscription_id=subscription_id,
        )  # fmt: skip

    def _payment_comes(self, payment_id: str, kind: str, poison: str | None) -> None:
        world = self._world
        if kind == "cash":
            delay = self._dice.choice((timedelta(hours=3), 2 * DAY, 6 * DAY, 8 * DAY, 8 * DAY + 59 * MINUTE))
        else:
            delay = self._dice.choice((self._dice.minutes(0.2, 3), self._dice.minutes(1, 58), 59 * MINUTE))
        if self._dice.chance(0.15):
            return  # never paid

        def pay() -> None:
            if world.provider.payment(payment_id).status != "pending":
                return
            world.provider.pay(payment_id)
            found = poison
            if poison == "canceled_here" and not world.service.execute(
                "UPDATE payments SET status = 'CANCELED' WHERE external_payment_id = %s AND status = 'PENDING'"
                " RETURNING id",
                payment_id,
            ):
                found = None
            if kind == "hold":
                self._agenda.after(self._dice.minutes(5, 6 * 1440), "capture", lambda: capture(found))
            else:
                self._successes.succeeded(payment_id, found)

        def capture(found: str | None) -> None:
            if world.provider.payment(payment_id).status == "waiting_for_capture":
                world.provider.capture(payment_id)
                self._successes.succeeded(payment_id, found)

        self._agenda.after(delay, f"pay {payment_id}", pay)

    def refund(self) -> None:
        """A customer gets all of a payment back; the service may write it down, or not."""
        world = self._world
        if "provider" in world.out:
            return
        paid = [
            payment for payment in world.provider.payments()
            if payment.status == "succeeded" and not payment.refunded and payment.id not in world.journal.history
        ]  # fmt: skip
        if not paid:
            return
        payment = self._dice.choice(paid[-12:])
        if self._dice.chance(0.3):
            world.happened["refund in part"] += 1
            world.provider.refund(payment.id, payment.amount / 2)
            return
        self._refund_in_full(payment.id)

    def refund_card(self) -> None:
        """The payment that saved a card is refunded in full."""
        world = self._world
        if "provider" in world.out:
            return
        saved = [
            payment for payment in world.provider.payments()
            if payment.status == "succeeded" and not payment.refunded and payment.id in world.journal.methods
        ]  # fmt: skip
        if saved:
            world.happened["a card's purchase is refunded"] += 1
            self._refund_in_full(self._dice.choice(saved).id)

    def _refund_in_full(self, payment_id: str) -> None:
        world = self._world
        world.happened["refund in full"] += 1
        rows = world.oracle.rows(
            "SELECT id, status::text AS status FROM payments WHERE external_payment_id = %s", payment_id
        )
        world.provider.refund(payment_id)
        settled = world.oracle.rows(
            "SELECT 1 FROM billing_orchestration.settlements WHERE external_payment_id = %s", payment_id
        )
        journal = world.journal
        journal.refunded[payment_id] = (
            bool(settled) or payment_id in journal.service_grants or payment_id in journal.history
        )
        if any(row.status == "SUCCEEDED" for row in rows) and self._dice.chance(0.6):
            with suppress(Busy):
                world.service.execute(
                    "UPDATE payments SET status = 'REFUNDED', updated_at = %s WHERE external_payment_id = %s"
                    " AND status = 'SUCCEEDED' RETURNING id",
                    naive(world.service_now()), payment_id,
                )  # fmt: skip
        self._agenda.tick_at(world.now)

    def stick_cards(self) -> None:
        """Some cards are never answered, or always with 500, for some days."""
        world = self._world
        every = sorted(set(world.journal.methods) - set(world.stuck_cards))
        how = self._dice.choice(("silence before", "error before"))
        for method in self._dice.sample(every, min(len(every), self._dice.randint(1, 6))):
            world.stuck_cards[method] = how
            world.happened[f"a card is stuck: {how}"] += 1
            later = self._dice.choice((DAY, 3 * DAY, 20 * DAY))
            self._agenda.after(later, f"{method} is free again", partial(world.stuck_cards.pop, method, None))

    def sell_elsewhere(self) -> None:
        """Another shop's customer pays. Its row is that shop's own work, whatever its age."""
        world = self._world
        if "service" in world.out:
            return
        external_id = str(UUID(int=self._dice.getrandbits(128)))
        row = world.service.payment(
            world.service_now(), Decimal("500.00"), "RUB", external_id=external_id, provider_row=world.service.other_row
        )
        world.journal.methods[external_id] = world.journal.elsewhere[row] = "another shop's"
        world.journal.history.add(external_id)
        world.happened["another shop sells"] += 1
        if self._dice.chance(0.7):
            later = self._dice.choice((self._dice.minutes(1, 600), 5 * DAY, 12 * DAY))
            self._agenda.after(later, "another shop grants", lambda: self._grant_elsewhere(row))

    def _grant_elsewhere(self, row: int) -> None:
        world = self._world
        start = naive(world.service_now())
        end = start + self._dice.choice((3 * DAY, 30 * DAY))
        if "service" in world.out:
            return
        # In a database that was set back since, there is no such row.
        if not world.oracle.rows(
            "SELECT 1 FROM payments WHERE id = %s AND payment_provider_id = %s", row, world.service.other_row
        ):
            return
        number = world.service.insert(
            "subscriptions", user_id=self.new_user(), status="ACTIVE", started_at=start, ended_at=end,
            plan_id=self._dice.choice(self.plans), created_at=start, updated_at=start,
        )  # fmt: skip
        world.journal.before[number] = (start, end)
        with suppress(Busy):
            world.service.execute(
                "UPDATE payments SET status = 'SUCCEEDED', subscription_id = %s WHERE id = %s RETURNING id", number, row
            )

    def _some_subscription(self, *statuses: str) -> Any:
        rows = self._world.oracle.rows(
            "SELECT id, status::text AS status FROM subscriptions WHERE status::text = ANY(%s) ORDER BY id",
            list(statuses),
        )
        return self._dice.choice(rows) if rows else None

    def _set_status(self, row: Any, status: str) -> None:
        try:
            self._world.service.execute(
                "UPDATE subscriptions SET status = %s::subscriptionstatusenum WHERE id = %s AND status::text = %s",
                status, row.id, row.status,
            )  # fmt: skip
            self._world.journal.touched[row.id] = self._world.latest_now()
            self._world.tell(f"  subscription {row.id} {row.status} -> {status}")
            self._world.happened[f"subscription {row.status} -> {status}"] += 1
        except Busy:
            pass

    def pause_or_cancel(self) -> None:
        """Somebody leaves, for a while or for good."""
        row = self._some_subscription("ACTIVE")
        if row is not None and "service" not in self._world.out:
            self._set_status(row, self._dice.choice(("PAUSED", "CANCELED")))

    def resume(self) -> None:
        """Somebody comes back."""
        row = self._some_subscription("PAUSED", "CANCELED")
        if row is not None and "service" not in self._world.out:
            self._set_status(row, "ACTIVE")

    def change_price(self) -> None:
        """For good, or by mistake."""
        world = self._world
        plan_id = self._dice.choice(self.plans)
        world.journal.plan_changed[plan_id] = world.latest_now()
        if self._dice.chance(0.5):
            world.service.execute("UPDATE prices SET amount = amount + 10 WHERE plan_id = %s RETURNING id", plan_id)
            return
        # Two prices for a while: nobody is charged until support has cleaned up.
        number = world.service.insert("prices", plan_id=plan_id, amount=Decimal("1.00"), currency="RUB")

        def clean_up() -> None:
            # By its amount as well: in a database that was set back the id may be another one's.
            world.service.execute("DELETE FROM prices WHERE id = %s AND amount = 1 RETURNING id", number)
            world.journal.plan_changed[plan_id] = world.latest_now()

        self._agenda.after(self._dice.minutes(60, 3 * 1440), "price cleaned up", clean_up)

    def pay_now(self) -> None:
        """A customer who had begun to pay does so."""
        waiting = [
            payment for payment in self._world.provider.payments()
            if payment.status == "pending" and payment.idempotence_key is None and payment.capture
        ]  # fmt: skip
        if waiting and "provider" not in self._world.out:
            payment = self._dice.choice(waiting)
            row = self._world.oracle.rows("SELECT amount FROM payments WHERE external_payment_id = %s", payment.id)
            metadata = payment.metadata
            poison = None
            if not str(metadata.get("plan_id", "")).isdigit() or metadata.get("plan_id") == "99999":
                poison = "metadata"
            elif payment.amount != (row[0] if row else self.price_of(int(metadata["plan_id"]))).amount:
                poison = "amount_differs"
            self._world.provider.pay(payment.id)
            self._successes.succeeded(payment.id, poison)
