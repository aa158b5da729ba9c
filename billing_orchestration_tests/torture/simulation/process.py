"""One run of a job as the operating system sees it: its points, and what befalls it there.

At every SQL statement, commit and request of a run the simulation has a *point*: there a run may be killed, its
connection cut, a commit's answer lost, and there the rest of the world goes on (a webhook arrives, a customer cancels,
another scheduler's run begins).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

import psycopg
import sqlalchemy as sa
from psycopg.pq import TransactionStatus
from sqlalchemy import event

from billing_orchestration.resources import BillingDatabase
from billing_orchestration_tests.torture.simulation.threads import OrderedThreads
from billing_orchestration_tests.torture.simulation.wire import (
    CHARGE_FAULTS,
    READ_FAULTS,
    UNDER_WAY_FAULTS,
    PatientWire,
    SimulatedProvider,
    SimulatedWire,
    pick_fault,
)

if TYPE_CHECKING:
    from billing_orchestration_tests.torture.simulation.world import World


class Killed(BaseException):
    """The run's process is dead from here on. No Exception: nothing in the code under test may catch it."""


class DeadProcess(Exception):
    """The same, in a thread that talks to the provider: the database sees nothing of it either."""


@dataclass
class Accidents:
    """What may happen to one run. All of it is drawn before the run begins, or by its own generator."""

    generator: random.Random
    kill_at: int | None = None
    cut_at: int | None = None
    lose_commit: int | None = None
    charge_faults: float = 0.0
    read_faults: float = 0.0
    meanwhile: float = 0.0
    points: int = 0
    commits: int = 0
    dead: bool = False
    happened: list[str] = field(default_factory=list)
    # Cards that are stuck: the run may be late for their customers, and for nobody else.
    stuck: int = 0

    @property
    def undisturbed(self) -> bool:
        """Nothing happened that a run may be late for."""
        return not self.happened


class Process:
    """One run of a job as the operating system sees it: its points, what befalls it, what it sends."""

    def __init__(self, world: World, accidents: Accidents, as_of: datetime) -> None:
        self.world = world
        self.accidents = accidents
        self.as_of = as_of
        self.began = world.now
        self._clocks_set = world.clocks_set
        # One at a time goes on, in an order that is drawn.
        self.threads = OrderedThreads(
            random.Random(accidents.generator.getrandbits(64)), world.seconds, world.pass_time
        )
        self.sessions: set[int] = set()

    def _point(self, place: str, *, connection: Any = None) -> None:
        accidents, world = self.accidents, self.world
        if accidents.dead:
            raise Killed if connection is not None else DeadProcess
        accidents.points += 1
        if accidents.points == accidents.kill_at:
            accidents.dead = True
            accidents.happened.append(f"killed at {place}")
            raise Killed if connection is not None else DeadProcess
        if connection is not None and accidents.points == accidents.cut_at:
            accidents.happened.append(f"connection cut at {place}")
            world.oracle.rows("SELECT pg_terminate_backend(%s, 60000)", connection.info.backend_pid)
            return
        if accidents.meanwhile and accidents.generator.random() < accidents.meanwhile:
            world.go_on(place)

    @property
    def clocks_as_at_its_beginning(self) -> bool:
        """Whether nobody has set a clock since it began."""
        return self.world.clocks_set == self._clocks_set

    def _look_at_clocks(self) -> None:
        """A wrong clock is seen before the first charge; one that is set later changes nothing of the run."""
        if self.world.clocks_are_apart and self.clocks_as_at_its_beginning:
            self.world.fault("CHARGED BY A WRONG CLOCK: it was wrong before the run began")

    def at_statement(self, connection: Any, statement: str) -> None:
        self.sessions.add(connection.info.backend_pid)
        if connection.info.transaction_status == TransactionStatus.IDLE:
            self.threads.give_way()
        self._point("statement " + " ".join(statement.split())[:60], connection=connection)

    def at_commit(self, connection: Any, commit: Callable[[Any], None]) -> None:
        self._point("commit", connection=connection.dbapi_connection)
        self.accidents.commits += 1
        if self.accidents.commits == self.accidents.lose_commit:
            self.accidents.happened.append("the answer to a COMMIT was lost")
            commit(connection)
            connection.dbapi_connection.close()
            raise psycopg.OperationalError("server closed the connection unexpectedly")
        commit(connection)
        self.threads.give_way()
        if self.accidents.kill_at is not None:
            # Where a process dies between its commit and its next step.
            self._point("after commit", connection=connection.dbapi_connection)

    def before_request(self, method: str, body: bytes | None, key: str | None, fault: str | None) -> None:
        self.threads.give_way()
        world, lived = self.world, not self.accidents.dead
        if method == "POST" and key is not None and lived:
            self._look_at_clocks()
            world.charges.look_at(key, body or b"", self.as_of, self.began, reaches=fault != "not connected")
        try:
            self._point(f"before {method}")
        except DeadProcess:
            # What has left the machine is worked on, whoever is dead.
            if lived and method == "POST" and world.plays("charges under way") and fault is None:
                world.in_flight.begin(body or b"", key)
            raise
        self.world.pass_time(self.accidents.generator.choice((0.05, 0.1, 0.3, 1.0)))

    def after_request(self, method: str, key: str | None, answer: Any) -> None:
        if method == "POST" and key is not None and not self.accidents.dead:
            self.world.charges.note_answer(key, answer)
        self.world.on_time_passed()
        self._point(f"after {method}")
        self.threads.give_way()

    def pick_fault(self, method: str, body: bytes | None) -> str | None:
        """The fault of one call: the provider's outage, a card that is stuck, or one that is drawn."""
        accidents = self.accidents
        if self.world.outage is not None:
            accidents.happened.append("provider outage")
            return self.world.outage
        if method == "POST" and (stuck := self.world.stuck_cards.get(json.loads(body or b"{}")["payment_method_id"])):
            accidents.stuck += 1
            self.world.tell(f"  POST of a card that is stuck: {stuck}")
            return stuck
        rate = accidents.charge_faults if method == "POST" else accidents.read_faults
        if not rate or accidents.generator.random() >= rate:
            return None
        faults = READ_FAULTS if method != "POST" else CHARGE_FAULTS
        if method == "POST" and self.world.plays("charges under way"):
            faults += UNDER_WAY_FAULTS
        fault = pick_fault(faults, accidents.generator)
        accidents.happened.append(f"{method}: {fault}")
        self.world.tell(f"  {method} {fault}")
        return fault

    def end(self) -> None:
        """What the operating system does for a process that has died: its sessions end, and with them their locks."""
        for session in sorted(self.sessions):
            self.world.oracle.rows("SELECT pg_terminate_backend(%s, 60000)", session)

    def connect(self, settings: Any, now: Callable[[], datetime]) -> SimulatedProvider:
        """The provider's client of this process, by the clock of its run."""
        world = self.world

        def wire() -> SimulatedWire:
            return SimulatedWire(
                world.provider,
                in_flight=world.in_flight,
                fault=self.pick_fault,
                before=self.before_request,
                after=self.after_request,
                pass_time=world.pass_time,
                provider_now=world.provider_now,
                page_size=world.traits.page_size,
                unreadable=world.journal.unreadable,
                inner=None if world.served_url is None else PatientWire(world.served_url),
            )

        return SimulatedProvider(
            settings,
            wire,
            self.threads,
            now,
            lambda seconds: world.pass_time(min(seconds, 5.0)),
            self.accidents.generator,
        )


class SimulatedDatabase(BillingDatabase):
    """The jobs' database, with a point at every statement and commit. `process` is whoever uses it at the moment."""

    def __init__(self, world: World) -> None:
        super().__init__(lambda: world.settings)
        self.process: Process | None = None

    @cached_property
    def engine(self) -> sa.Engine:
        engine: sa.Engine = BillingDatabase.engine.func(self)  # type: ignore[attr-defined]

        @event.listens_for(engine, "before_cursor_execute")
        def _before(_connection: Any, cursor: Any, statement: str, *_: Any) -> None:
            if self.process is not None:
                self.process.at_statement(cursor.connection, statement)

        commit = engine.dialect.do_commit

        def do_commit(connection: Any) -> None:
            if self.process is not None:
                self.process.at_commit(connection, commit)
            else:
                commit(connection)

        engine.dialect.do_commit = do_commit  # type: ignore[method-assign]
        return engine
