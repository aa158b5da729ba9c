"""One installation in simulated time: database, sandbox provider, three clocks, and the jobs' runs.

`World.run` runs one job, by its ops (`runner`) or through whole Dagster, with what befalls it (`process`).
"""

from __future__ import annotations

import random
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import dagster as dg
import psycopg

from billing_orchestration.database.errors import BillingDatabaseError
from billing_orchestration.definitions import build_definitions
from billing_orchestration.jobs.matching_look import Nothing, Start, look
from billing_orchestration.jobs.matching_pending_payments import compare_pending
from billing_orchestration.jobs.matching_successful_payments import compare_successful
from billing_orchestration.provider.errors import ProviderError
from billing_orchestration.resources import Clock, HandOver, ProviderConnection, RunSettings
from billing_orchestration.sandbox.provider.account import SandboxProvider
from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration.settings import Settings
from billing_orchestration_tests.torture.simulation.charges import Charges
from billing_orchestration_tests.torture.simulation.in_flight import InFlight
from billing_orchestration_tests.torture.simulation.judge import Journal, Rules
from billing_orchestration_tests.torture.simulation.mishaps import MISHAPS
from billing_orchestration_tests.torture.simulation.oracle import Oracle
from billing_orchestration_tests.torture.simulation.process import Accidents, Killed, Process, SimulatedDatabase
from billing_orchestration_tests.torture.simulation.runner import RunEnd, run_ops
from billing_orchestration_tests.torture.simulation.service import BillingService
from billing_orchestration_tests.torture.simulation.traits import Traits

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
COMPARE = {
    "matching_pending_payments_job": compare_pending,
    "matching_successful_payments_job": compare_successful,
}
# What a service connection waits for a locked row: the simulation has one thread, so whoever holds it cannot go on.
_JUDGE_OPTIONS = "-c timezone=UTC -c search_path=public"
_SERVICE_OPTIONS = "-c lock_timeout=15ms -c timezone=UTC -c search_path=public -c synchronous_commit=off"


@dataclass(frozen=True)
class Order:
    """What a run is asked for."""

    tick: datetime | None
    partition: dg.TimeWindow | None
    dry_run: bool
    ops: dict[str, dict[str, Any]]

    @property
    def as_of(self) -> str | None:
        """A scheduled tick's own time."""
        return None if self.tick is None else self.tick.isoformat()

    @property
    def run_config(self) -> dict[str, Any]:
        """Of the shared resource `run`."""
        return {"dry_run": self.dry_run, **({"as_of": self.as_of} if self.as_of else {})}

    @property
    def tags(self) -> dict[str, str]:
        """As a schedule's run has them."""
        return {} if self.tick is None else {"dagster/schedule_name": "the schedule"}


class World:
    """The installation. `now` is the time; clocks are off by `host_error`, `database_error` and their skew."""

    def __init__(self, url: str, seed: int, start: datetime, traits: Traits, *, served: Sandbox | None = None) -> None:
        self.now = start
        self.host_error = self.database_error = timedelta(0)
        # How often a clock was set, to the wrong time or the right one.
        self.clocks_set = 0
        self.seed = seed
        self.traits = traits
        self.zone = ZoneInfo(traits.zone)
        self.url = url
        self.settings = Settings(
            _env_file=None,  # type: ignore[call-arg]
            billing_database_url=url,
            yookassa_shop_id="100500",
            yookassa_secret_key="test_sandbox",
            yookassa_api_url="http://127.0.0.1:9/v3",  # in words only: a story holds no port of the machine's
            billing_timezone=traits.zone,
            subscription_grace_days=traits.grace_days,
            pending_payment_ttl_days=traits.ttl_days,
        )
        self.provider = served.provider if served else SandboxProvider(seed=seed)
        self.provider.clock, self.provider.switches = self.provider_now, traits.switches
        # Where the sandbox answers over HTTP, if it does.
        self.served_url = served.url if served else None
        self.journal = Journal()
        rules = Rules(
            self.zone, traits.grace_days, traits.ttl_days, traits.provider_skew, traits.list_lag, traits.mishaps
        )
        self.oracle = Oracle(self._connect(_JUDGE_OPTIONS), self.journal, rules)
        self.service = BillingService(self._connect(_SERVICE_OPTIONS), self.zone, self.journal, 0)
        now = start.replace(tzinfo=None)
        self.service.provider_row = self.service.insert(
            "payment_providers", name="YooKassa", description="", is_active=True, created_at=now, updated_at=now
        )
        self.service.other_row = self.service.insert(
            "payment_providers", name="another shop", description="", is_active=True, created_at=now, updated_at=now
        )
        ours = {"yookassa_provider_ids": str(self.service.provider_row)}
        self.settings = self.settings.model_copy(update=ours)
        self.faults: list[str] = []
        self.told: list[str] = []
        # Print the story while it happens.
        self.live = False
        self.runs = 0
        # What the story was made of, by name: the end of a night says what was never played.
        self.happened: Counter[str] = Counter()
        # Who is out of order, and until when; how the provider's outage looks on the wire.
        self.out: dict[str, datetime] = {}
        self.outage: str | None = None
        self.meanwhile: Callable[[str], None] | None = None
        self.is_busy = False
        self._database: SimulatedDatabase | None = None
        self.charges = Charges(self)
        self.in_flight = InFlight(self)
        self.on_charge_under_way: Callable[[timedelta], None] = lambda _seconds: None
        # Called when a request has taken its time.
        self.on_time_passed: Callable[[], None] = lambda: None
        # What every charge of a card meets, by the card.
        self.stuck_cards: dict[str, str] = {}
        self._instance: dg.DagsterInstance | None = None

    def plays(self, mishap: str) -> bool:
        """Whether something of that name befalls this seed."""
        assert mishap in MISHAPS
        return mishap in self.traits.mishaps

    # --- clocks

    def host_now(self) -> datetime:
        """As the jobs read it."""
        return self.now + self.host_error

    def latest_now(self) -> datetime:
        """By the later of the right clock and ours: what happens now is not before anything that was written down."""
        return max(self.now, self.host_now())

    def provider_now(self) -> datetime:
        return self.now + self.traits.provider_skew

    def service_now(self) -> datetime:
        return self.now + self.traits.service_skew

    def database_now(self) -> datetime:
        return self.now + self.database_error

    def set_clocks(self, host_error: timedelta, database_error: timedelta) -> None:
        """Somebody has, or a machine of its own."""
        self.host_error, self.database_error = host_error, database_error
        self.journal.behind = max(timedelta(0), -host_error)
        self.clocks_set += 1

    @property
    def clocks_are_apart(self) -> bool:
        """Whether one of them is wrong, by more than may be tolerated."""
        return bool(self.host_error or self.database_error)

    def seconds(self) -> float:
        """The time as a number."""
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

    def _connect(self, options: str) -> psycopg.Connection[Any]:
        return psycopg.connect(self.url, autocommit=True, options=options)

    def connect(self) -> None:
        """Go on after `disconnect`."""
        self.oracle.connection, self.service.connection = self._connect(_JUDGE_OPTIONS), self._connect(_SERVICE_OPTIONS)

    def disconnect(self) -> None:
        """Leave the database: nobody may be connected to it when it is copied or replaced."""
        self._drop_database()
        self.service.connection.close()
        self.oracle.connection.close()

    def close(self) -> None:
        self.disconnect()
        if self._instance is not None:
            self._instance.dispose()

    # --- the world outside a run

    def go_on(self, place: str) -> None:
        """Something else happens while a run is at `place`; nothing happens while that happens."""
        if self.meanwhile is not None and not self.is_busy:
            self.is_busy = True
            try:
                self.meanwhile(place)
            finally:
                self.is_busy = False

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
    ) -> RunEnd:
        """Run a job: a scheduled tick, a partition, or a launch by hand. The end's `crash` is a fault already.

        `whole`: through Dagster itself. `nested`: while another run is under way, as another process.
        """
        self.runs += 1
        mine = accidents or Accidents(random.Random(self.seed))
        process = Process(self, mine, tick or (min(partition.end, self.now) if partition else self.now))
        database = SimulatedDatabase(self) if nested else self._database or SimulatedDatabase(self)
        database.process = process
        if not nested:
            self._database = database
        bound_to_time = self.oracle.bound_to_time() if self.clocks_are_apart else None
        order = Order(tick and tick + self.host_error, partition, dry_run, self._op_config(tick))
        try:
            end = self._run_whole(process, job, order) if whole else self._run_ops(process, job, order, database)
        except Killed:
            end = RunEnd("killed", failure="killed")
        database.process = None
        if mine.dead:
            end.failure, end.crash = "killed", None
        self.happened.update({name.partition(" at ")[0] for name in mine.happened})
        self.happened[f"{'whole ' if whole else ''}{job}{' of a partition' if partition else ''}"] += 1
        if mine.dead or nested or mine.cut_at or mine.lose_commit:
            # A dead process's sessions end, and with them its locks.
            with suppress(Exception):
                database.close()
            process.end()
            if not nested:
                self._database = None
        self.look_after(job, process, end)
        if bound_to_time is not None and process.clocks_as_at_its_beginning:
            for words in self.oracle.done_by_a_wrong_clock(job, bound_to_time):
                self.fault(words)
        how = "ok" if end.ok else f"red: {end.failure}"
        self.tell(f"{job}{' partition' if partition else ''}{' dry' if dry_run else ''}{' nested' if nested else ''}"
                  f" {how[:200]} {mine.happened[:3] or ''}")  # fmt: skip
        return end

    def look(self, job: str, accidents: Accidents, tick: datetime) -> Nothing | Start:
        """A matching job's tick looks whether it has to start a run."""
        process = Process(self, accidents, tick)
        database = self._database = self._database or SimulatedDatabase(self)
        database.process = process
        clock = Clock(self.host_now, lambda _: self.database_now(), self.seconds)
        provider = ProviderConnection(lambda: self.settings, process.connect, clock.now)
        try:
            found = look(job, COMPARE[job], database, provider, clock, tick + self.host_error)
        except (BillingDatabaseError, ProviderError) as error:
            found = Start(f"the look failed: {error}")
        finally:
            provider.close()
            database.process = None
        self.happened["a look, and no run" if isinstance(found, Nothing) else "a look, and a run"] += 1
        self.tell(f"{job} looks: {str(found)[:200]}")
        return found

    def _op_config(self, tick: datetime | None) -> dict[str, dict[str, Any]]:
        """Of all jobs' ops; what a job does not have is left out where it matters."""
        ops: dict[str, dict[str, Any]] = {
            "charge_renewals": {"resend_wait_s": 0.0, "max_concurrency": self.traits.max_concurrency},
            "fetch_stale_at_provider": {"max_concurrency": 1},
        }
        if tick is not None:
            ops["diff_pending_payments"] = ops["diff_successful_payments"] = {"webhook_grace_s": 60}
        return ops

    def look_after(self, job: str, process: Process, end: RunEnd) -> None:
        """What must hold after any run, however it ended."""
        for name in process.threads.left_behind():
            self.fault(f"{job} has ended and its thread {name} has not: it may still change something")
        if end.crash is not None:
            trace = "".join(traceback.format_exception(end.crash))
            self.fault(f"CRASH of {job}: {end.crash!r}\n{trace}")
        if job == "expire_subscriptions_job":
            for words in self.oracle.expired_unduly(self.now):
                self.fault(words)

    def _run_ops(self, process: Process, job: str, order: Order, database: SimulatedDatabase) -> RunEnd:
        clock = Clock(self.host_now, lambda _: self.database_now(), self.seconds)
        provider = ProviderConnection(lambda: self.settings, process.connect, clock.now)
        resources = {
            "run": RunSettings(as_of=order.as_of, dry_run=order.dry_run),
            "billing_database": database,
            "payment_provider": provider,
            "clock": clock,
            "threads": process.threads,
            "hand_over": HandOver(),
        }
        try:
            return run_ops(JOBS[job], resources, op_config=order.ops, tags=order.tags, partition=order.partition)
        finally:
            provider.close()

    def _run_whole(self, process: Process, job: str, order: Order) -> RunEnd:
        definitions = build_definitions(
            load=lambda: self.settings,
            now=self.host_now,
            database_now=lambda _: self.database_now(),
            steady_s=self.seconds,
            connect=process.connect,
            threads=process.threads,
        )
        if self._instance is None:
            self._instance = dg.DagsterInstance.ephemeral()
        known = {node.name for node in JOBS[job].nodes_in_topological_order}
        config: dict[str, Any] = {
            "ops": {name: {"config": value} for name, value in order.ops.items() if name in known},
            "loggers": {"console": {"config": {"log_level": "CRITICAL"}}},
            "resources": {
                "run": {"config": {"dry_run": order.dry_run, **({"as_of": order.as_of} if order.as_of else {})}}
            },
        }
        result = definitions.get_job_def(job).execute_in_process(
            instance=self._instance, run_config=config, raise_on_error=False, tags=order.tags
        )
        end = RunEnd(result.run_id)
        for step in result.all_events:
            if step.event_type_value == "STEP_OUTPUT":
                end.metadata.append(step.step_output_data.metadata)
            elif step.event_type_value == "STEP_FAILURE":
                data = step.step_failure_data
                if data.user_failure_data is None:
                    end.crash = RuntimeError(data.error.to_string() if data.error else "no words")
                else:
                    end.failure = data.user_failure_data.description or "no words"
                    end.metadata.append(data.user_failure_data.metadata)
        if not result.success and end.ok:
            end.failure = "failed"
        return end

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
