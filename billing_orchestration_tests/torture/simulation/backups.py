"""The database is set back: to a backup, or to a standby that lacks the last commits. The provider forgets nothing."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg
import sqlalchemy as sa

from billing_orchestration_tests.torture.simulation.agenda import Agenda, Dice
from billing_orchestration_tests.torture.simulation.charges import PROVIDER_HAS_FINISHED
from billing_orchestration_tests.torture.simulation.judge import Journal
from billing_orchestration_tests.torture.simulation.world import World

# Facts of the journal that are about rows: they are set back with them.
_ABOUT_ROWS = (
    "before", "counted", "service_grants", "service_granted_at", "service_periods", "service_rows", "half_written",
    "elsewhere",
)  # fmt: skip


@dataclass(frozen=True)
class Backup:
    """A copy of the whole database, sequences included, and what the world knew of its rows."""

    database: str
    taken_at: datetime
    about_rows: dict[str, Any]


class Backups:
    """`on_restore` is called when the database has been set back."""

    def __init__(self, world: World, dice: Dice, agenda: Agenda) -> None:
        self._world, self._dice, self._agenda = world, dice, agenda
        self._number = 0
        self.on_restore: Callable[[], None] = lambda: None

    def backup(self) -> None:
        """A backup, to which somebody goes back within the days that matching covers by itself."""
        taken = self.take()
        later = self._dice.choice((self._dice.minutes(5, 180), self._dice.minutes(1440, 4 * 1440)))
        self._agenda.after(later, "a backup is restored", lambda: self.restore(taken, "a backup was restored"))

    def fail_over_after(self, run: Callable[[], None]) -> None:
        """A standby takes over that has nothing of what a run has committed."""
        taken = self.take()
        run()
        self.restore(taken, "a standby without the last commits took over")

    def take(self) -> Backup:
        """A copy as of now."""
        world = self._world
        self._number += 1
        name = f"{self._name()}_backup_{self._number}"
        world.disconnect()
        self._admin(f"CREATE DATABASE {name} TEMPLATE {self._name()} STRATEGY file_copy")
        world.connect()
        about = {name: copy.deepcopy(getattr(world.journal, name)) for name in _ABOUT_ROWS}
        return Backup(name, world.now, about)

    def restore(self, backup: Backup, what: str) -> None:
        """Put it in the database's place, and drop it."""
        world = self._world
        if not world.journal.calm:
            world.tell(f"  {what}, of {backup.taken_at}")
            world.happened[what] += 1
            world.disconnect()
            self._admin(f"DROP DATABASE {self._name()} WITH (FORCE)")
            self._admin(f"ALTER DATABASE {backup.database} RENAME TO {self._name()}")
            world.connect()
            for name, value in copy.deepcopy(backup.about_rows).items():
                setattr(world.journal, name, value)
            self._set_back(world.journal, backup.taken_at)
            self._garble_a_lost_charge()
            # What was under way is executed by then. A claim that is lost sooner protects nobody (docs/safety.md).
            world.pass_time(PROVIDER_HAS_FINISHED.total_seconds())
            world.charges.forget_tries(backup.taken_at)
            self.on_restore()
            self._agenda.tick_at(world.now)
        else:
            self._admin(f"DROP DATABASE {backup.database}")

    def _garble_a_lost_charge(self) -> None:
        """Now and then nobody can read the provider's record of a charge that our records have lost."""
        world = self._world
        lost = sorted(
            payment.id for payment in world.provider.payments()
            if payment.id in world.journal.lost - world.journal.unreadable and payment.status != "canceled"
        )  # fmt: skip
        # Dice of its own: a story without it stays the story it was.
        dice = random.Random(f"{world.seed} {self._number}")
        if lost and dice.random() < 0.4:
            payment_id = dice.choice(lost)
            world.journal.unreadable.add(payment_id)
            world.tell(f"  the record of {payment_id} cannot be read any more")
            world.happened["a lost charge cannot be read"] += 1

    def _set_back(self, journal: Journal, taken_at: datetime) -> None:
        """What else is true of the rows that are there now."""
        world = self._world
        journal.restored_at = world.now
        journal.lost |= {
            payment.id for payment in world.provider.payments()
            if payment.created_at >= taken_at + world.traits.provider_skew and payment.idempotence_key is not None
        }  # fmt: skip
        granted = {
            row.id
            for row in world.oracle.rows(
                "SELECT external_payment_id AS id FROM billing_orchestration.settlements WHERE kind <> 'refunded'"
            )
        }
        for payment_id in journal.refunded:
            journal.refunded[payment_id] = payment_id in granted or payment_id in journal.service_grants
        rows = {
            row.id: row
            for row in world.oracle.rows(
                "SELECT external_payment_id AS id, status::text AS status, amount FROM payments"
                " WHERE external_payment_id IS NOT NULL"
            )
        }
        for payment_id, kind in list(journal.poisoned.items()):
            row = rows.get(payment_id)
            is_gone = {
                "canceled_here": row is None or row.status != "CANCELED",
                "amount_differs": row is None,
            }.get(kind, False)
            if is_gone:
                del journal.poisoned[payment_id]

    def _name(self) -> str:
        return str(sa.make_url(self._world.url).database)

    def _admin(self, statement: str) -> None:
        admin = sa.make_url(self._world.url).set(database="postgres").render_as_string(hide_password=False)
        with psycopg.connect(admin, autocommit=True) as connection:
            connection.execute(statement)
