"""Eight processes of a job at once, backfills beside the schedule, two schedulers, and the service's webhook: one
effect each. Always each job in one race and each race once, with fewer processes; with `make torture` every job in
every race, in as many rounds as it says.

The runs are processes of their own (`kill_runner`). Alone they are judged by what the scenario says must come of it
(`kill_oracle`); beside the webhook handler, which may take any of the work away from them, by the simulation's oracle.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from typing import Any

import dagster as dg
import psycopg
import pytest

from billing_orchestration.sandbox.provider.server import Sandbox
from billing_orchestration_tests.books import NOON
from billing_orchestration_tests.fixtures.postgres import Server
from billing_orchestration_tests.jobs.service import evaluate
from billing_orchestration_tests.torture.extent import ROUNDS, THOROUGH
from billing_orchestration_tests.torture.kill_matrix import Stage
from billing_orchestration_tests.torture.kill_oracle import complaints
from billing_orchestration_tests.torture.kill_points import BEFORE
from billing_orchestration_tests.torture.kill_runner import Case, Runner
from billing_orchestration_tests.torture.kill_scenarios import ALL, AUTOPAYMENT
from billing_orchestration_tests.torture.simulation.judge import Journal, Rules
from billing_orchestration_tests.torture.simulation.oracle import Oracle
from billing_orchestration_tests.torture.simulation.service import BillingService, Busy

UTC = timezone.utc
PROCESSES = 8 if THOROUGH else 3
TIMES = max(1, ROUNDS // 10)
# One for each of the five jobs; that of autopayment with every kind of renewal. Reconciliation settles by the same
# function as they do.
BY_JOB = {
    scenario.job: scenario
    for scenario in ALL
    if scenario.job != "reconciliation_job"
    and (scenario.job != AUTOPAYMENT or scenario.name.endswith("every kind of renewal"))
}
# In the middle of a run's transaction: right after the last read of what settling decides by, and before its first
# write; where nothing is settled, anywhere.
IN_THE_MIDDLE = """
    SELECT FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'billing-orchestration'
    AND state LIKE 'idle in transaction%%' AND query LIKE %s LIMIT 1
"""
SCHEDULES = {
    "autopayment_job": ("autopayment_daily_schedule", timedelta(hours=9)),
    "expire_payments_job": ("expire_payments_daily_schedule", timedelta(hours=8)),
    "expire_subscriptions_job": ("expire_subscriptions_daily_schedule", timedelta(hours=7)),
    "matching_pending_payments_job": ("matching_pending_payments_every_2_minutes_schedule", timedelta(0)),
    "matching_successful_payments_job": ("matching_successful_payments_every_2_minutes_schedule", timedelta(0)),
}


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    """The process that forks; its imports take three seconds."""
    with Runner() as running:
        yield running


@pytest.fixture
def stage(
    request: pytest.FixtureRequest, postgres_server: Server, migrated_template: str, sandbox: Sandbox, runner: Runner
) -> Iterator[Stage]:
    """A job's work, waiting in a database that each race gets a copy of."""
    stage = Stage(postgres_server, migrated_template, sandbox, runner, BY_JOB[request.param])
    try:
        stage.warm_up()
        yield stage
    finally:
        stage.close()


# Where the runs of a race wait for each other: what decides is read, and nothing is locked or written yet.
MEETING_POINTS = {
    "autopayment_job": "INSERT renewal_attempts",
    "expire_subscriptions_job": "SELECT subscriptions FOR NO KEY UPDATE",
    "expire_payments_job": "pg_advisory_xact_lock",
    "matching_pending_payments_job": "pg_advisory_xact_lock",
    "matching_successful_payments_job": "pg_advisory_xact_lock",
}
# For one that does not come by there (it was fast, or stands for another day) the others do not wait for ever.
_WAIT_S = 5.0


@contextmanager
def meeting(cases: Sequence[Case]) -> Iterator[list[Case]]:
    """The same runs, which go on from the meeting point all at once: two cores would let them pass one by one."""
    waiting: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def wait_for_all() -> None:
            with suppress(OSError):
                while len(waiting) < len(cases):
                    arrived = server.accept()[0]
                    if over.is_set():
                        arrived.close()
                        return
                    waiting.append(arrived)
                    server.settimeout(_WAIT_S)
            for connection in waiting:
                connection.close()
            server.settimeout(None)
            with suppress(OSError):
                while not over.is_set():  # whoever is late
                    server.accept()[0].close()

        over = threading.Event()
        host = threading.Thread(target=wait_for_all)
        host.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        try:
            yield [replace(case, death=(MEETING_POINTS[case.job], 1, BEFORE), conductor=address) for case in cases]
        finally:
            over.set()
            while host.is_alive():
                with suppress(OSError), socket.create_connection(server.getsockname()):
                    host.join(0.01)
    # A meeting point that no run comes by any more would leave a race that nobody runs.
    assert len(waiting) > 1, f"{len(waiting)} of {len(cases)} runs have come to {MEETING_POINTS[cases[0].job]}"


def copies(case: Case) -> list[Case]:
    """Launched by hand, all at once."""
    return [case] * PROCESSES


def scheduled(case: Case, instance: dg.DagsterInstance) -> Case:
    """The run that a scheduler with this run history launches for the last tick before noon."""
    name, ago = SCHEDULES[case.job]
    request = evaluate(name, instance, NOON - ago)
    assert isinstance(request, dg.RunRequest), request
    tags = {**request.tags, "dagster/schedule_name": name, "dagster/run_key": str(request.run_key)}
    return replace(case, config=request.run_config, tags=tags)


def by_two_schedulers(case: Case) -> list[Case]:
    """Two Dagster instances that know nothing of each other launch the run of one tick; each tries again once."""
    with dg.instance_for_test() as one:
        first = scheduled(case, one)
    with dg.instance_for_test() as another:
        second = scheduled(case, another)
    return [first, second, first, second]


def backfilled_beside_the_schedule(case: Case) -> list[Case]:
    """The last partitions, the present one twice, while the schedule's own run is under way."""
    hourly = case.job.startswith("matching")
    step = timedelta(hours=1) if hourly else timedelta(days=1)
    begins = NOON - step if hourly else NOON.replace(hour=0) - step
    keys = [f"{begins - back * step:{'%Y-%m-%d-%H:%M' if hourly else '%Y-%m-%d'}}" for back in range(3)]
    with dg.instance_for_test() as instance:
        tick = scheduled(case, instance)
    return [*(replace(case, partition=key) for key in (*keys, keys[0])), tick, tick]


RACES = {
    "copies": copies,
    "two schedulers": by_two_schedulers,
    "a backfill beside the schedule": backfilled_beside_the_schedule,
}
# What is raced always.
SHORT = {
    "autopayment_job": "copies",
    "expire_subscriptions_job": "copies",
    "expire_payments_job": "a backfill beside the schedule",
    "matching_pending_payments_job": "two schedulers",
    "matching_successful_payments_job": "copies",
}
BESIDE_THE_WEBHOOK = "matching_successful_payments_job"


@pytest.mark.parametrize("_round", range(TIMES))
@pytest.mark.parametrize(
    ("stage", "race"),
    [(job, race) for job in BY_JOB for race in RACES if THOROUGH or SHORT[job] == race],
    indirect=["stage"],
)
def test_runs_of_a_job_at_once_have_the_effect_of_one(stage: Stage, sandbox: Sandbox, race: str, _round: int) -> None:
    expected = stage.story.expected
    if race == "a backfill beside the schedule":
        # A run that stands for yesterday voids what was planned for today and never sent; another attempt follows it.
        expected = replace(expected, attempts={})
    with ExitStack() as stack:
        url, ended = stack.enter_context(stage.racing(lambda case: stack.enter_context(meeting(RACES[race](case)))))
        wrong = complaints(url, sandbox.provider.ledger(), expected)

    assert not any(one.killed for one in ended)
    assert not wrong, [one.failure for one in ended]


@dataclass
class Webhook:
    """The service's handler: every success of the provider's ledger is delivered again and again, by two threads."""

    sandbox: Sandbox
    comes_after: str
    journal: Journal = field(default_factory=Journal)
    did: list[str] = field(default_factory=list)
    error: BaseException | None = None

    @contextmanager
    def delivering(self, url: str) -> Iterator[None]:
        """As long as the context lasts, and once more after it."""
        self._note_what_was_there(url)
        stop = threading.Event()
        threads = [threading.Thread(target=self._deliver_all, args=(url, stop, turn)) for turn in (1, -1)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join(60)
        if self.error is not None:
            raise self.error

    def _note_what_was_there(self, url: str) -> None:
        with psycopg.connect(url) as connection:
            subscriptions = connection.execute("SELECT id, started_at, ended_at FROM subscriptions").fetchall()
            self.journal.before = {number: (start, end) for number, start, end in subscriptions}
            finished = connection.execute("SELECT external_payment_id FROM payments WHERE status = 'SUCCEEDED'")
            self.journal.history = {name for (name,) in finished}
        self.journal.refunded = {
            payment.id: False
            for payment in self.sandbox.provider.payments()
            if payment.refunded and payment.refunded >= payment.amount
        }

    def _deliver_all(self, url: str, stop: threading.Event, turn: int) -> None:
        try:
            with psycopg.connect(url, autocommit=True, options="-c lock_timeout=500ms -c timezone=UTC") as connection:
                found = connection.execute("SELECT min(id) FROM payment_providers").fetchone()
                assert found is not None
                service = BillingService(connection, UTC, self.journal, found[0])
                while True:
                    # Each while some run is in the middle of a transaction: a handler that came first would leave
                    # nothing to race for.
                    for payment in self.sandbox.provider.payments()[::turn]:
                        while not stop.is_set() and not self._comes_now(connection):
                            stop.wait(0.0005)
                        if payment.status == "succeeded":
                            self._deliver(service, payment)
                    if stop.is_set():
                        return
        except BaseException as error:  # noqa: BLE001 - raised again by the test's thread
            self.error = error

    def _comes_now(self, connection: psycopg.Connection[Any]) -> bool:
        return connection.execute(IN_THE_MIDDLE, (f"%{self.comes_after}%",)).fetchone() is not None

    def _deliver(self, service: BillingService, payment: Any) -> None:
        try:
            self.did.append(service.on_success(payment, NOON, writes_unknown=True, settles_renewals="grant"))
        except Busy:
            self.did.append("again later")

    def complaints(self, url: str, now: datetime) -> list[str]:
        """What is wrong with the books by the simulation's oracle: charges, grants, periods, and nothing is lost."""
        rules = Rules(UTC, grace_days=3, ttl_days=7, provider_skew=timedelta(0), list_lag=timedelta(0))
        ledger = self.sandbox.provider.ledger()
        payments = {payment.id: payment for payment in self.sandbox.provider.payments()}
        with psycopg.connect(url, autocommit=True, options="-c timezone=UTC") as connection:
            oracle = Oracle(connection, self.journal, rules)
            return oracle.violations(ledger, payments, now)


@pytest.mark.parametrize("_round", range(TIMES))
@pytest.mark.parametrize("stage", BY_JOB if THOROUGH else [BESIDE_THE_WEBHOOK], indirect=True)
def test_runs_of_a_job_beside_the_services_webhook_grant_each_success_once(
    stage: Stage, sandbox: Sandbox, _round: int
) -> None:
    settles = stage.scenario.job != "expire_subscriptions_job"
    webhook = Webhook(sandbox, "FROM payment_providers" if settles else "")

    with stage.racing(copies, webhook.delivering) as (url, ended):
        wrong = webhook.complaints(url, NOON + timedelta(hours=8))

    # A handler that did nothing would race with nobody.
    assert set(webhook.did) - {"again later"}
    assert not any(one.killed for one in ended)
    assert not wrong, [one.failure for one in ended]
