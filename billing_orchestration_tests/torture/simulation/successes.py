"""What follows a success at the provider: webhooks, and the ticks that can see it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from billing_orchestration_tests.torture.simulation.agenda import Agenda, Dice
from billing_orchestration_tests.torture.simulation.service import Busy
from billing_orchestration_tests.torture.simulation.traits import MINUTE
from billing_orchestration_tests.torture.simulation.world import World


class Successes:
    """Of customers' payments and of our own charges."""

    def __init__(self, world: World, dice: Dice, agenda: Agenda) -> None:
        self._world, self._dice, self._agenda = world, dice, agenda
        self._charges_seen_until = world.now
        self._watched: set[tuple[str, datetime]] = set()
        # The service's handlers that have read and not yet written, and when they will.
        self._handlers: dict[str, tuple[datetime, Callable[[], None]]] = {}

    def succeeded(self, payment_id: str, poison: str | None) -> None:
        """A success that is not ours: webhooks, and ticks when it can be seen."""
        if poison is not None and not self._was_forgotten(payment_id, poison):
            self._world.journal.poisoned[payment_id] = poison
        self.ticks()
        self.webhooks(payment_id)

    def _was_forgotten(self, payment_id: str, poison: str) -> bool:
        """Whether its row, with which nothing agreed, was lost since: the database was set back."""
        world = self._world
        if world.journal.restored_at is None or poison == "metadata":
            return False
        payment = world.provider.payment(payment_id)
        return not world.oracle.rows("SELECT 1 FROM payments WHERE external_payment_id = %s", payment_id) and bool(
            poison == "canceled_here"
            or world.oracle.rows(
                "SELECT 1 FROM prices WHERE plan_id::text = %s AND amount = %s",
                payment.metadata.get("plan_id"), payment.amount,
            )
        )  # fmt: skip

    def ticks(self) -> None:
        """The next tick, which may be too early, and the first one that sees it: in its window, in the lagging list,
        and no longer left to the webhook."""
        traits, now = self._world.traits, self._world.now
        self._agenda.tick_at(now)
        self._agenda.tick_at(now + max(MINUTE + timedelta(seconds=1), traits.list_lag, traits.provider_skew + MINUTE))

    def webhooks(self, payment_id: str) -> None:
        """Delivered once, twice, late, or never."""
        minutes = self._dice.minutes
        for _ in range(self._dice.choices((0, 1, 2), (0.3, 0.6, 0.1))[0]):
            delay = self._dice.choice((minutes(0.02, 0.2), minutes(0.2, 8), minutes(1, 1400)))
            self._agenda.after(delay, f"webhook {payment_id}", lambda: self._webhook(payment_id, 6))

    def _webhook(self, payment_id: str, deliveries: int) -> None:
        world, traits = self._world, self._world.traits
        did = None
        # One delivery of a payment's webhook at a time: what the service does to itself is not ours to prevent.
        if "service" not in world.out and payment_id not in self._handlers:
            payment = world.provider.payment(payment_id)
            if payment.status != "succeeded":
                return
            if self._is_handled_badly(payment):
                return
            try:
                did = world.service.on_success(
                    payment, world.service_now(), writes_unknown=traits.writes_unknown,
                    settles_renewals=traits.settles_renewals,
                )  # fmt: skip
            except Busy:
                did = None
            if did == "granted":
                world.journal.touched[world.journal.service_grants[payment_id]] = world.latest_now()
            world.tell(f"  webhook {payment_id}: {did or 'again later'}")
            world.happened[f"webhook: {did or 'again later'}"] += 1
        if did is None and deliveries > 1:
            self._agenda.after(
                self._dice.minutes(1, 240),
                f"webhook {payment_id} again",
                lambda: self._webhook(payment_id, deliveries - 1),
            )

    def _is_handled_badly(self, payment: Any) -> bool:
        """A handler that dies half-way, or one that takes no locks."""
        world = self._world
        if "renewal_attempt_id" in payment.metadata or payment.id in world.journal.poisoned or payment.refunded:
            return False
        if self._dies_half_way(payment, is_late=world.provider_now() - payment.captured_at > 40 * MINUTE):
            return True
        # It has a minute, which the jobs leave to it, by the provider's clock.
        left_s = 57.0 - (world.provider_now() - payment.captured_at).total_seconds()
        if not world.plays("careless webhooks") or left_s < 1.0 or world.is_busy:
            return False
        row_id = world.service.read_pending(payment)
        if row_id is None:
            return False
        world.tell(f"  webhook {payment.id}: has read its row")
        delay = timedelta(seconds=self._dice.uniform(0.5, left_s))
        self._handlers[payment.id] = world.now + delay, partial(self._write_by_id, payment, row_id)
        self._agenda.after(delay, f"webhook {payment.id} writes", lambda: self._end_handler(payment.id))
        return True

    def _dies_half_way(self, payment: Any, *, is_late: bool) -> bool:
        world = self._world
        mishap = "late half webhooks" if is_late else "half webhooks"
        if not world.plays(mishap) or not self._dice.chance(0.25) or not self._write_half(payment):
            return False
        world.tell(f"  webhook {payment.id}: dies half-way")
        world.happened[f"webhook: dies half-way{', late' if is_late else ''}"] += 1
        self._agenda.tick_at(world.now)
        skew = world.traits.service_skew - world.traits.provider_skew
        self._agenda.tick_at(world.now + MINUTE + max(timedelta(0), skew))
        return True

    def die_half_way_before_a_run(self) -> None:
        """Handlers of what was paid hours ago, while no run came, in the minute before one that catches up."""
        world = self._world
        for payment in world.provider.payments():
            is_purchase = payment.idempotence_key is None and payment.id not in world.journal.poisoned
            if not is_purchase or payment.status != "succeeded" or payment.refunded:
                continue
            if world.provider_now() - payment.captured_at > 40 * MINUTE:
                self._dies_half_way(payment, is_late=True)

    def _write_half(self, payment: Any) -> bool:
        try:
            return self._world.service.write_half(payment, self._world.service_now())
        except Busy:
            return False

    def _write_by_id(self, payment: Any, row_id: int) -> None:
        world = self._world
        try:
            world.service.write_by_id(payment, row_id, world.service_now())
        except Busy:
            world.tell(f"  webhook {payment.id}: could not write")
            return
        world.journal.touched[world.journal.service_grants[payment.id]] = world.latest_now()
        world.tell(f"  webhook {payment.id}: granted by its row's id")
        world.happened["webhook: granted by its row's id"] += 1

    def _end_handler(self, payment_id: str) -> None:
        if payment_id in self._handlers:
            _, write = self._handlers.pop(payment_id)
            write()

    def end_handlers(self) -> None:
        """Let those write that have read, before a run comes that leaves them no minute."""
        for payment_id in list(self._handlers):
            self._end_handler(payment_id)

    def end_overdue_handlers(self) -> None:
        """Let those write whose time has come, while a run takes longer than the agenda can see."""
        for payment_id, (due, _) in list(self._handlers.items()):
            if due <= self._world.now:
                self._end_handler(payment_id)

    def webhook_now(self) -> None:
        """One of some recent payment, delivered again or for the first time."""
        paid = [
            payment for payment in self._world.provider.payments()
            if payment.status == "succeeded" and payment.id not in self._world.journal.history
        ]  # fmt: skip
        if paid:
            self._webhook(self._dice.choice(paid[-4:]).id, 1)

    def watch_new_charges(self) -> None:
        """Webhooks of our own charges, and ticks when a pending one settles."""
        for payment in self._world.provider.payments():
            if payment.idempotence_key is None or payment.created_at <= self._charges_seen_until:
                continue
            if payment.status == "succeeded":
                self.webhooks(payment.id)
        self._charges_seen_until = max(self._charges_seen_until, self._world.provider_now())
        for due, payment_id, result in self._world.provider.agenda():
            when = due - self._world.traits.provider_skew
            if result.kind == "succeeded" and (payment_id, due) not in self._watched:
                self._watched.add((payment_id, due))
                self._agenda.at(
                    when + timedelta(seconds=1),
                    f"pending {payment_id} succeeds",
                    partial(self._settles_later, payment_id),
                )

    def _settles_later(self, payment_id: str) -> None:
        if self._world.provider.payment(payment_id).status == "succeeded":
            self.ticks()
            self.webhooks(payment_id)
