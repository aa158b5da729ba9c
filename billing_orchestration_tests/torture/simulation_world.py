"""One installation in simulated time: database, sandbox provider, three clocks, the jobs' runs and their accidents.

`World.run` runs one job, by its ops (`simulation_runner`) or through whole Dagster. At every SQL statement, commit and
request of a run the simulation has a *point*: there a run may be killed, its connection cut, a commit's answer lost,
and there the rest of the world goes on (a webhook arrives, a customer cancels, another scheduler's run begins).
"""

from __future__ import annotations

import json
import random
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any
from zoneinfo import ZoneInfo

import dagster as dg
import psycopg
import sqlalchemy as sa
from psycopg.pq import TransactionStatus
from sqlalchemy import event

from billing_orchestration.definitions import build_definitions
from billing_orchestration.resources import BillingDatabase, Clock, HandOver, ProviderConnection, RunSettings
from billing_orchestration.sandbox.provider.account import SandboxProvider
from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration.sandbox.provider.switches import Switches
from billing_orchestration.settings import Settings
from billing_orchestration.threads import threads_made_by
from billing_orchestration_tests.torture.simulation_oracle import Journal, Oracle, Rules
from billing_orchestration_tests.torture.simulation_runner import Outcome, run_ops
from billing_orchestration_tests.torture.simulation_service import BillingService
from billing_orchestration_tests.torture.simulation_threads import OrderedThreads
from billing_orchestration_tests.torture.simulation_wire import (
    CHARGE_FAULTS,
    READ_FAULTS,
    SimulatedProvider,
    SimulatedWire,
    pick_fault,
    status_of,
)

JOBS = {
    name: build_definitions().get_job_def(name)
    for name in (
        "autopayment_job",
        "expire_payments_job",
        "expire_subscriptions_job",
        "matching_pending_payments_job",
        "matching_successful_payments_job",
    )
}
# What a service connection waits for a locked row: the simulation has one thread, so whoever holds it cannot go on.
_SERVICE_OPTIONS = "-c lock_timeout=15ms -c timezone=UTC -c search_path=public -c synchronous_commit=off"


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
            world.oracle.rows("SELECT pg_terminate_backend(%s, 1000)", connection.info.backend_pid)
            return
        if accidents.meanwhile and accidents.generator.random() < accidents.meanwhile:
            world.go_on(place)

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
        if method == "POST" and key is not None and not self.accidents.dead:
            self.world.look_at_charge(key, body or b"", self.as_of, self.began, reaches=fault != "not connected")
        self._point(f"before {method}")
        self.world.pass_time(self.accidents.generator.choice((0.05, 0.1, 0.3, 1.0)))

    def after_request(self, method: str, key: str | None, answer: Any) -> None:
        if method == "POST" and key is not None and not self.accidents.dead:
            self.world.note_answer(key, answer)
        self._point(f"after {method}")
        self.threads.give_way()

    def pick_fault(self, method: str) -> str | None:
        """The fault of one call: the provider's outage, or one that is drawn."""
        accidents = self.accidents
        if self.world.outage is not None:
            accidents.happened.append("provider outage")
            return self.world.outage
        rate = accidents.charge_faults if method == "POST" else accidents.read_faults
        if not rate or accidents.generator.random() >= rate:
            return None
        fault = pick_fault(CHARGE_FAULTS if method == "POST" else READ_FAULTS, accidents.generator)
        accidents.happened.append(f"{method}: {fault}")
        self.world.tell(f"  {method} {fault}")
        return fault

    def end(self) -> None:
        """What the operating system does for a process that has died: its sessions end, and with them their locks."""
        for session in sorted(self.sessions):
            self.world.oracle.rows("SELECT pg_terminate_backend(%s, 10000)", session)

    def connect(self, settings: Any) -> SimulatedProvider:
        """The provider's client of this process."""
        world = self.world

        def wire(real: Any) -> SimulatedWire:
            return SimulatedWire(
                world.provider,
                fault=self.pick_fault,
                before=self.before_request,
                after=self.after_request,
                pass_time=world.pass_time,
                page_size=world.traits.page_size,
                inner=real if world.over_http else None,
            )

        return SimulatedProvider(
            settings, wire, lambda seconds: world.pass_time(min(seconds, 5.0)), self.accidents.generator
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


@dataclass(frozen=True)
class Traits:
    """What distinguishes one simulated installation from another; all drawn from the seed."""

    zone: str = "UTC"
    grace_days: int = 3
    ttl_days: int = 7
    provider_skew: timedelta = timedelta(0)
    service_skew: timedelta = timedelta(0)
    list_lag: timedelta = timedelta(0)
    page_size: int = 100
    max_concurrency: int = 1
    switches: Switches = field(default_factory=Switches)
    writes_unknown: bool = False
    settles_renewals: str = "leave"
    accidents: float = 1.0


class World:
    """The installation. `now` is our own clock; the provider's and the service's differ by their skew."""

    def __init__(self, url: str, seed: int, start: datetime, traits: Traits, *, served: Sandbox | None = None) -> None:
        self.now = start
        self.seed = seed
        self.traits = traits
        self.zone = ZoneInfo(traits.zone)
        self.url = url
        self.settings = Settings(
            _env_file=None,  # type: ignore[call-arg]
            billing_database_url=url,
            yookassa_shop_id="100500",
            yookassa_secret_key="test_sandbox",
            yookassa_api_url=served.url if served else "http://127.0.0.1:9/v3",
            billing_timezone=traits.zone,
            subscription_grace_days=traits.grace_days,
            pending_payment_ttl_days=traits.ttl_days,
        )
        self.provider = served.provider if served else SandboxProvider(seed=seed)
        self.provider.clock, self.provider.switches = self.provider_now, traits.switches
        self.over_http = served is not None
        self.journal = Journal()
        self.connection = psycopg.connect(url, autocommit=True, options=_SERVICE_OPTIONS)
        self.oracle = Oracle(
            psycopg.connect(url, autocommit=True, options="-c timezone=UTC -c search_path=public"),
            self.journal,
            Rules(self.zone, traits.grace_days, traits.ttl_days, traits.provider_skew, traits.list_lag),
        )
        now = start.replace(tzinfo=None)
        self.service = BillingService(self.connection, self.zone, self.journal, 0)
        self.service.provider_row = self.service.insert(
            "payment_providers", name="YooKassa", description="", is_active=True, created_at=now, updated_at=now
        )
        self.faults: list[str] = []
        self.told: list[str] = []
        # Print the story while it happens.
        self.live = False
        self.runs = 0
        # What the story was made of, by name: the end of a night says what was never played.
        self.happened: Counter[str] = Counter()
        self.outage: str | None = None
        self.meanwhile: Callable[[str], None] | None = None
        self._busy = False
        self._database: SimulatedDatabase | None = None
        self._first_posts: dict[str, tuple[datetime, bytes]] = {}
        self._declines: dict[str, tuple[datetime, bool]] = {}
        self._tries: dict[tuple[str, Any], str] = {}
        self._instance: dg.DagsterInstance | None = None

    # --- clocks

    def provider_now(self) -> datetime:
        return self.now + self.traits.provider_skew

    def service_now(self) -> datetime:
        return self.now + self.traits.service_skew

    def seconds(self) -> float:
        """Our clock as a number."""
        return self.now.timestamp()

    def pass_time(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def day(self) -> Any:
        return self.now.astimezone(self.zone).date()

    def tell(self, text: str) -> None:
        """One line of the story, for whoever replays the seed."""
        line = f"{self.now:%Y-%m-%d %H:%M:%S} {text}"
        self.told.append(line)
        if self.live:
            print(line, flush=True)

    def fault(self, text: str) -> None:
        """Something that breaks the promise."""
        self.tell(f"!!! {text}")
        self.faults.append(f"{self.now:%Y-%m-%d %H:%M:%S} {text}")

    def close(self) -> None:
        self._drop_database()
        self.connection.close()
        self.oracle._connection.close()
        if self._instance is not None:
            self._instance.dispose()

    # --- the world outside a run

    def go_on(self, place: str) -> None:
        """Something else happens while a run is at `place`; nothing happens while that happens."""
        if self.meanwhile is not None and not self._busy:
            self._busy = True
            try:
                self.meanwhile(place)
            finally:
                self._busy = False

    def note_answer(self, key: str, answer: Any) -> None:
        """What a run was told about a charge."""
        status, method_id = status_of(answer)
        if status == "canceled" and method_id is not None:
            self._declines[method_id] = (self.now, self._busy)
        if answer.status in (401, 403):
            # Refused because of the shop: nobody's card was tried.
            self._tries = {name: tried for name, tried in self._tries.items() if tried != key}

    def look_at_charge(self, key: str, body: bytes, as_of: datetime, began: datetime, *, reaches: bool) -> None:
        """What must hold at the moment a charge is sent. `reaches`: a connection to the provider can be made."""
        text = body.decode()
        wrong = self.oracle.wrong_send(key, text, began)
        if key not in self._first_posts:
            wrong += self.oracle.wrong_charge(key, text, self.provider.payments(), as_of, self.now)
        for words in wrong:
            self.fault(words)
        document = json.loads(text)
        method_id = document["payment_method_id"]
        subscription = document["metadata"]["subscription_id"]
        self.tell(f"POST {subscription} from {document['metadata']['period_start']} key {key[:8]}")
        first = self._first_posts.get(key)
        if not reaches:
            return
        if first is None:
            self._first_posts[key] = (self.now, body)
            declined_at, by_another_run = self._declines.get(method_id, (None, False))
            # What another run hears while this one is under way is not known to it.
            if by_another_run and declined_at is not None and declined_at >= began:
                declined_at = None
            if declined_at is not None and declined_at.astimezone(self.zone).date() == self.day():
                self.fault(f"TRIED TWICE A DAY: method {method_id} was declined at {declined_at} and is charged again")
            other = self._tries.setdefault((subscription, self.day()), key)
            if other != key:
                self.fault(f"TRIED TWICE A DAY: subscription {subscription} by {other} and {key}")
        else:
            sent_at, sent = first
            if sent != body:
                self.fault(f"key {key} is sent with two bodies")
            if self.now - sent_at >= timedelta(hours=24):
                self.fault(f"RE-SENT TOO LATE: key {key} was first sent at {sent_at}")

    # --- runs

    def _drop_database(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def run(
        self,
        job: str,
        accidents: Accidents | None = None,
        *,
        tick: datetime | None = None,
        partition: dg.TimeWindow | None = None,
        dry_run: bool = False,
        whole: bool = False,
        nested: bool = False,
    ) -> Outcome:
        """Run a job: a scheduled tick, a partition, or a launch by hand. The outcome's `crash` is a fault already.

        `whole`: through Dagster itself. `nested`: while another run is under way, as another process.
        """
        self.runs += 1
        mine = accidents or Accidents(random.Random(self.seed))
        process = Process(self, mine, tick or (min(partition.end, self.now) if partition else self.now))
        database = SimulatedDatabase(self) if nested else self._database or SimulatedDatabase(self)
        database.process = process
        if not nested:
            self._database = database
        provider = ProviderConnection(lambda: self.settings, process.connect)
        tags = {"dagster/schedule_name": "the schedule"} if tick is not None else {}
        ops: dict[str, dict[str, Any]] = {
            "charge_renewals": {"resend_wait_s": 0.0, "max_concurrency": self.traits.max_concurrency},
            "fetch_stale_at_provider": {"max_concurrency": 1},
        }
        if tick is not None:
            ops["diff_successful_payments"] = {"webhook_grace_s": 60}
        as_of = tick.isoformat() if tick is not None else None
        try:
            with threads_made_by(process.threads):
                if whole:
                    outcome = self._run_whole(process, job, ops, as_of, tags, dry_run=dry_run)
                else:
                    outcome = run_ops(
                        JOBS[job],
                        {
                            "run": RunSettings(as_of=as_of, dry_run=dry_run),
                            "billing_database": database,
                            "payment_provider": provider,
                            "clock": Clock(lambda: self.now),
                            "hand_over": HandOver(),
                        },
                        op_config=ops,
                        tags=tags,
                        partition=partition,
                    )
        except Killed:
            outcome = Outcome("killed", failure="killed")
        finally:
            provider.close()
        database.process = None
        if mine.dead:
            outcome.failure, outcome.crash = "killed", None
        self.happened.update({name.partition(" at ")[0] for name in mine.happened})
        self.happened[f"{'whole ' if whole else ''}{job}{' of a partition' if partition else ''}"] += 1
        if mine.dead or nested or mine.cut_at or mine.lose_commit:
            # A dead process's sessions end, and with them its locks.
            with suppress(Exception):
                database.close()
            process.end()
            if not nested:
                self._database = None
        for name in process.threads.left_behind():
            self.fault(f"{job} has ended and its thread {name} has not: it may still change something")
        if outcome.crash is not None:
            trace = "".join(traceback.format_exception(outcome.crash))
            self.fault(f"CRASH of {job}: {outcome.crash!r}\n{trace}")
        if job == "expire_subscriptions_job":
            for words in self.oracle.expired_unduly(self.now):
                self.fault(words)
        how = "ok" if outcome.ok else f"red: {outcome.failure}"
        self.tell(f"{job}{' partition' if partition else ''}{' dry' if dry_run else ''}{' nested' if nested else ''}"
                  f" {how[:200]} {mine.happened[:3] or ''}")  # fmt: skip
        return outcome

    def _run_whole(
        self, process: Process, job: str, ops: Any, as_of: str | None, tags: dict[str, str], *, dry_run: bool
    ) -> Outcome:
        definitions = build_definitions(load=lambda: self.settings, now=lambda: self.now, connect=process.connect)
        if self._instance is None:
            self._instance = dg.DagsterInstance.ephemeral()
        known = {node.name for node in JOBS[job].nodes_in_topological_order}
        config: dict[str, Any] = {
            "ops": {name: {"config": value} for name, value in ops.items() if name in known},
            "loggers": {"console": {"config": {"log_level": "CRITICAL"}}},
            "resources": {"run": {"config": {"dry_run": dry_run, **({"as_of": as_of} if as_of else {})}}},
        }
        result = definitions.get_job_def(job).execute_in_process(
            instance=self._instance, run_config=config, raise_on_error=False, tags=tags
        )
        outcome = Outcome(result.run_id)
        for step in result.all_events:
            if step.event_type_value == "STEP_OUTPUT":
                outcome.metadata.append(step.step_output_data.metadata)
            elif step.event_type_value == "STEP_FAILURE":
                data = step.step_failure_data
                if data.user_failure_data is None:
                    outcome.crash = RuntimeError(data.error.to_string() if data.error else "no words")
                else:
                    outcome.failure = data.user_failure_data.description or "no words"
                    outcome.metadata.append(data.user_failure_data.metadata)
        if not result.success and outcome.ok:
            outcome.failure = "failed"
        return outcome

    # --- the books

    def snapshot(self) -> list[Any]:
        """Everything that a dry run, or a second run of anything, must not change."""
        tables = ("subscriptions", "payments", *(
            f"billing_orchestration.{name}"
            for name in ("renewal_attempts", "settlements", "saved_methods", "quarantine", "audit_trail")
        ))  # fmt: skip
        return [self.oracle.rows(f"SELECT * FROM {table} ORDER BY 1") for table in tables]

    def payments(self) -> dict[str, Any]:
        """The provider's payments by id."""
        return {payment.id: payment for payment in self.provider.payments()}

    def judge(self) -> None:
        """The oracle's whole comparison."""
        for words in self.oracle.violations(self.provider.ledger(), self.payments(), self.now):
            self.fault(words)
